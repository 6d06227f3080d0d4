"""几件样子各不相同的工具，给 tool_format.py、tool_schema.py 看格式用；只有签名与 docstring，不真的做什么。"""

import random
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from function_schema import function_schema


class Pay(Enum):
    CASH = "现金"
    CARD = "刷卡"


@dataclass
class Item:
    name: str
    count: int = 1


def look_up(person: str, time: str):
    """查一个人某时的故事。

    参数：
        person: 谁
        time: 什么时候
    """


def weather(city: Literal["北京", "上海", "广州", "成都"], days: int = 1):
    """查天气。

    参数：
        city: 哪座城市
        days: 往后几天
    """


def search_notes(words: list[str], at_most: int = 5):
    """在笔记里找有这些词的几段。

    参数：
        words: 要有的词
        at_most: 最多几段
    """


def remind(text: str, when: str, people: list[str] | None = None, again: bool = False):
    """到时候提醒。

    参数：
        text: 提醒什么
        when: 什么时候
        people: 还提醒谁
        again: 要不要每天
    """


def convert(value: float, unit: Literal["km", "mi", "kg", "lb"]):
    """换算单位。

    参数：
        value: 多少
        unit: 原来的单位
    """


def order(items: list[Item], pay: Pay, note: str | None = None):
    """下单。

    参数：
        items: 买什么
        pay: 怎样付钱
        note: 备注
    """


def now():
    """现在几点。"""


FUNCTIONS = (look_up, weather, search_notes, remind, convert, order, now)
TOOLS = [function_schema(function) for function in FUNCTIONS]
QUESTIONS = (
    "小刚傍晚去了哪里？",
    "北京后天天气怎么样？",
    "笔记里哪里讲过注意力和旋转位置编码？",
    "明天早上八点提醒我和小刚开会。",
    "26.2 英里是多少公里？",
    "买三个苹果、一盒饼干，刷卡。",
    "现在几点了？",
)
TEXTS = (
    "开会",
    "取快递（三号柜，密码 0427）",
    '读"注意力就是一切"，第 3 节',
    "It's 5 o'clock: go!",
    "第一行\n第二行",
    "买菜，做饭；洗碗：都要",
    "C:\\notes\\new.txt",
    "https://example.com/a?b=1#c",
    "价格 {原价} [打折]",
    "😀 𠮷",
    "100%",
    "",
)


def random_call(rng: random.Random) -> dict:
    """一个合法的调用，参数里有标点、引号、换行：修补的时候最容易弄错的。"""
    texts = rng.sample(TEXTS, 4)
    calls = [
        ("weather", {"city": rng.choice(["北京", "上海", "广州", "成都"]), "days": rng.randint(1, 14)}),
        ("search_notes", {"words": texts[: rng.randint(1, 3)], "at_most": rng.randint(1, 9)}),
        (
            "remind",
            {"text": texts[0], "when": "明天 08:00", "people": ["小刚", "小美"], "again": rng.random() < 0.5},
        ),
        ("remind", {"text": texts[1], "when": "12:30", "people": None}),
        ("convert", {"value": rng.choice([26.2, -3.5, 1e-3, 12]), "unit": rng.choice(["km", "lb"])}),
        (
            "order",
            {
                "items": [{"name": text or "苹果", "count": rng.randint(1, 9)} for text in texts[2:]],
                "pay": rng.choice(["现金", "刷卡"]),
                "note": texts[1],
            },
        ),
    ]
    name, arguments = rng.choice(calls)
    return {"name": name, "arguments": arguments}
