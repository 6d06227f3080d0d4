"""小世界：一部会写小故事、会出题、知道标准答案的语法。

它是一台仪器。真实语料里没人知道"最低能到多少 loss""答案到底对不对"；这里每一步随机选择都由程序做出，
所以文档的信息量（nats）是精确的，每道题的答案也是确定的。各训练阶段有没有效果，在它上面一量便知。

一篇文档 = 故事（五句话） + 几句回顾 + 几道判断题。回顾要求往前看、把故事里的词抄过来；判断题要求认出一个词
与故事合不合。预训练在每个 token 上学这两样本领，SFT 只需引出前一样（回答问题），奖励模型只需引出后一样
（分辨对错）。训练集与留出集按槽位组合的哈希值分开，任何组合只在一边出现。
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Callable
from typing import TypeVar

# 每个词的最后一个字只属于它自己：看到这个字，就知道故事里有没有这个词。
# 同类的词也尽量不同头：十个"老×"要先写出"老"再往回找，这一类总是最晚才学会，有的种子学不会。
WORLD = {
    "time": ["清晨", "正午", "傍晚", "深夜", "拂晓", "日落"],
    "person": ["小刚", "小兰", "小明", "小丽", "小芳", "小强", "小燕", "小龙", "小梅", "小军"],
    "place": ["花园", "学校", "山顶", "海边", "市场", "车站", "田间", "桥头", "书店", "村口"],
    "color": ["乌黑", "雪白", "银灰", "深棕", "金黄", "火红"],
    "animal": ["松鼠", "野兔", "信鸽", "乌龟", "狐狸", "刺猬", "山羊", "鹦鹉", "麻雀", "猕猴"],
    "food": ["香蕉", "苹果", "面包", "饼干", "花生", "玉米", "葡萄", "萝卜", "蛋糕", "西瓜"],
    "friend": ["王伯", "李婶", "张叔", "赵姨", "陈爷", "周嫂", "吴哥", "郑姐", "孙舅", "朱姑"],
    "mood": ["高兴", "失望", "平静", "难受", "激动", "满意", "害怕", "骄傲"],
}
SLOTS = list(WORLD)

# 每句话的几种写法；任何两种写法都不会写出同一句话，所以文本的信息量就等于选择的信息量。
STORY = [
    ["那天{time}，{person}去了{place}。", "那天{time}，{person}来到{place}。"],
    ["一只{color}的{animal}跑了过来。", "忽然跑来一只{color}的{animal}。"],
    ["{person}拿出{food}给它吃。", "{person}把{food}分给它吃。"],
    ["后来{friend}也来了。", "不久{friend}也来了。"],
    ["{person}心里很{mood}。", "{person}觉得很{mood}。"],
]
# 回顾用的句子，也是"完整回答"的句子。
SENTENCE = {
    "time": "那是{time}",
    "person": "去{place}的是{person}",
    "place": "{person}去了{place}",
    "color": "{animal}的颜色是{color}",
    "animal": "跑来的是{animal}",
    "food": "{animal}吃了{food}",
    "friend": "后来的是{friend}",
    "mood": "{person}的心情是{mood}",
}
# 判断题里各槽位的名称。
LABEL = {
    "time": "时间",
    "person": "人物",
    "place": "地点",
    "color": "颜色",
    "animal": "动物",
    "food": "食物",
    "friend": "朋友",
    "mood": "心情",
}
QUESTION = {
    "time": ["{person}是什么时候去{place}的？", "那是什么时候？"],
    "person": ["谁去了{place}？", "去{place}的是谁？"],
    "place": ["{person}去了哪里？", "{person}去了什么地方？"],
    "color": ["{animal}是什么颜色的？", "它是什么颜色的？"],
    "animal": ["跑来的是什么动物？", "什么动物跑来了？"],
    "food": ["{animal}吃了什么？", "{person}给它吃了什么？"],
    "friend": ["后来谁也来了？", "后来的是谁？"],
    "mood": ["{person}的心情怎么样？", "{person}觉得怎么样？"],
}
OPENINGS = ["您好，", "好的，", "谢谢您的提问，"]
UNHELPFUL = ["我不知道。", "这个不好说。", "你自己看吧。"]
SMALL_TALK = [
    (["你好", "您好", "你好！", "嗨"], "你好！有什么想问我的吗？"),
    (["你是谁？", "你是谁", "你叫什么名字？"], "我是小故事助手。"),
    (["你会做什么？", "你能做什么？"], "我会读小故事，回答您的问题。"),
    (["谢谢", "谢谢你！"], "不客气！"),
    (["再见", "再见！"], "再见！祝您愉快！"),
]
TALK_FAULTS = [
    "unhelpful",
    "another",
    "joined",
    "decorated",
    "stuttered",
    "cut_short",
    "story",
]  # 寒暄怎样回得不好
SMALL_TALK_SHARE = 0.08  # 偏好对里，寒暄占多少
PROMPT_TALK_SHARE = 0.2  # PPO 的提示里：一共才一千多个回答，13 句寒暄每句要练到二十来次

RECAPS = 4  # 每篇文档回顾几个槽位："往回看"的本领
CHECKS = 3  # 每篇文档有几道判断题："分辨对错"的本领
RIGHT, WRONG = "√", "×"
# SFT 数据里四种口气混在一起，就像真实的指令数据：留给 DPO 和 PPO 去挑。
STYLES = {"courteous": 0.28, "plain": 0.45, "terse": 0.22, "unhelpful": 0.05}
# 偏好的次序：越靠前越好。
QUALITY = ["courteous", "plain", "terse", "wrong", "unhelpful"]


T = TypeVar("T")


class Draw:
    """做随机选择，并记下选择的信息量：从 n 个里等概率选一个是 ln(n) nats。"""

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.nats = 0.0

    def pick(self, options: list[T]) -> T:
        self.nats += math.log(len(options))
        return options[self.rng.randrange(len(options))]


def draw_slots(draw: Draw, world: dict[str, list[str]] = WORLD) -> dict[str, str]:
    """选好一个故事的全部槽位。"""
    return {slot: draw.pick(values) for slot, values in world.items()}


def write_story(draw: Draw, slots: dict[str, str]) -> str:
    return "".join(draw.pick(variants).format(**slots) for variants in STORY)


def _pick_several(draw: Draw, options: list[str], n: int) -> list[str]:
    """依次选出 n 个，不重复。"""
    left = list(options)
    return [left.pop(left.index(draw.pick(left))) for _ in range(n)]


def mistaken(
    pick: Callable[[list], str], slots: dict[str, str], slot: str, world: dict[str, list[str]] = WORLD
) -> dict[str, str]:
    """把 slot 换成同类的另一个词：照着它说就是说错。"""
    return slots | {slot: pick([v for v in world[slot] if v != slots[slot]])}


def write_document(
    draw: Draw,
    slots: dict[str, str],
    world: dict[str, list[str]] = WORLD,
    recaps: int = RECAPS,
    checks: int = CHECKS,
) -> str:
    """故事 + 几句回顾（"小刚去了花园。"） + 几道判断题（"地点学校×"），判断题对错各半。

    对错紧跟在词的后面：模型读到这个词的最后一个字，就得知道合不合故事。判断题不用回顾的句式：回顾里的话
    句句是真的，模型照着抄就对；同样的句式一半是假话，微调之后它就拿不准该不该照抄。
    """
    text = write_story(draw, slots) + "回想一下，"
    for slot in _pick_several(draw, list(slots), recaps):
        text += SENTENCE[slot].format(**slots) + "。"
    text += "判断一下，"
    for slot in _pick_several(draw, list(slots), checks):
        mark = draw.pick([RIGHT, WRONG])
        said = slots if mark == RIGHT else mistaken(draw.pick, slots, slot, world)
        text += LABEL[slot] + said[slot] + mark
    return text


def is_heldout(slots: dict[str, str]) -> bool:
    """十分之一的槽位组合留出：只看组合本身，与种子、写法无关。"""
    return zlib.crc32("|".join(slots.values()).encode()) % 10 == 0


def _side(rng: random.Random, heldout: bool) -> tuple[Draw, dict[str, str]]:
    while True:
        draw = Draw(rng)
        slots = draw_slots(draw)
        if is_heldout(slots) == heldout:
            return draw, slots


def _rng(kind: str, seed: int, heldout: bool) -> random.Random:
    return random.Random(f"{kind}-{seed}-{heldout}")  # 字符串种子：各种数据互不相干


def documents(n: int, seed: int, heldout: bool = False) -> list[dict]:
    """n 篇预训练文档：``{"text", "nats"}``，nats = −ln p(文档)，由语法的选择精确算出。"""
    rng = _rng("documents", seed, heldout)
    rows = []
    for _ in range(n):
        draw, slots = _side(rng, heldout)
        text = write_document(draw, slots)
        rows.append({"text": text, "nats": draw.nats})
    return rows


def recap_prompts(n: int, seed: int) -> list[dict]:
    """n 道留出的回顾题：``{"prompt": 故事与回顾的开头, "answer": 应该接着写出的词}``。"""
    rng = _rng("recaps", seed, True)
    rows = []
    for i in range(n):
        draw, slots = _side(rng, True)
        slot = SLOTS[i % len(SLOTS)]
        start = SENTENCE[slot].split("{" + slot + "}")[0].format(**slots)
        rows.append({"prompt": write_story(draw, slots) + "回想一下，" + start, "answer": slots[slot]})
    return rows


def _answer(rng: random.Random, slots: dict[str, str], slot: str, style: str) -> str:
    """用某种口气回答 slot 这一问。"""
    if style == "unhelpful":
        return rng.choice(UNHELPFUL)
    if style == "terse":
        return slots[slot]
    opening = rng.choice(OPENINGS) if style == "courteous" else ""
    return opening + SENTENCE[slot].format(**slots)


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _small_talk(rng: random.Random) -> list[dict[str, str]]:
    asks, reply = rng.choice(SMALL_TALK)
    return [_turn("user", rng.choice(asks)), _turn("assistant", reply)]


def chats(n: int, seed: int, heldout: bool = False) -> list[dict]:
    """n 段 SFT 对话 ``{"messages"}``：一个故事连问一到五题（第二题起要靠第一轮里的故事），五段里有一段以寒暄
    结束；二十段里有一段只有寒暄。
    """
    rng = _rng("chats", seed, heldout)
    styles, weights = zip(*STYLES.items(), strict=True)
    rows = []
    for _ in range(n):
        if rng.random() < 0.05:
            rows.append({"messages": _small_talk(rng)})
            continue
        draw, slots = _side(rng, heldout)
        prefix, messages = write_story(draw, slots) + "\n", []
        for slot in rng.sample(SLOTS, rng.randint(1, 5)):
            ask = prefix + rng.choice(QUESTION[slot]).format(**slots)
            style = rng.choices(styles, weights)[0]
            messages += [_turn("user", ask), _turn("assistant", _answer(rng, slots, slot, style))]
            prefix = ""
        if rng.random() < 0.2:
            messages += _small_talk(rng)
        rows.append({"messages": messages})
    return rows


def _question(rng: random.Random, heldout: bool) -> tuple[dict, dict[str, str]]:
    draw, slots = _side(rng, heldout)
    first, slot = rng.sample(SLOTS, 2)
    story = write_story(draw, slots) + "\n"
    ask = {s: rng.choice(QUESTION[s]).format(**slots) for s in (first, slot)}
    messages = [_turn("user", story + ask[slot])]
    if rng.random() < 0.5:  # 追问：故事在上一轮，这一轮只有问题
        reply = _answer(rng, slots, first, rng.choice(["courteous", "plain", "terse"]))
        messages = [_turn("user", story + ask[first]), _turn("assistant", reply), _turn("user", ask[slot])]
    question = {
        "messages": messages,
        "answer": slots[slot],
        "slot": slot,
        "sentence": SENTENCE[slot].format(**slots),
    }
    return question, slots


def questions(n: int, seed: int, heldout: bool = False) -> list[dict]:
    """n 道题：``messages`` 以用户的问题结尾，``answer`` 是标准答案，``sentence`` 是完整的一句回答。

    一半是单轮，一半是要靠上一轮里的故事才能回答的追问。
    """
    rng = _rng("questions", seed, heldout)
    return [_question(rng, heldout)[0] for _ in range(n)]


def small_talk_questions() -> list[dict]:
    """全部寒暄，写法同 questions；slot 是 None，answer 是该回的那一句。"""
    return [
        {"messages": [_turn("user", ask)], "answer": reply, "slot": None, "sentence": reply}
        for asks, reply in SMALL_TALK
        for ask in asks
    ]


def prompts(n: int, seed: int, heldout: bool = False) -> list[dict]:
    """n 道给 PPO 练习的题：questions 里混进寒暄，不然只练答题，连"你好"也会忘了怎样回。留出的没有寒暄。"""
    rows, talk, rng = questions(n, seed, heldout), small_talk_questions(), _rng("prompts", seed, heldout)
    if not heldout:
        rows = [rng.choice(talk) if rng.random() < PROMPT_TALK_SHARE else row for row in rows]
    return rows


def heldout_questions(n: int, seed: int) -> list[dict]:
    """n 道留出集上的题，见 questions。"""
    return questions(n, seed, heldout=True)


def _small_talk_pair(rng: random.Random, heldout: bool) -> dict:
    """该回的那一句，好过各种走样的：不搭理，别的寒暄的回话，说到一半接上别的，加了客套，开头结巴，没说完，答非所问。

    PPO 会找奖励模型没见过的空子：只见过"不搭理"的，就以为"您好，你你好！"也不错。
    """
    ask, reply = _small_talk(rng)
    text, kind = reply["content"], rng.choice(TALK_FAULTS)
    _, slots = _side(rng, heldout)
    another = rng.choice([other for _, other in SMALL_TALK if other != text])
    bad = {
        "unhelpful": rng.choice(UNHELPFUL),
        "another": another,
        "joined": text[: rng.randint(2, len(text) - 1)] + another[rng.randint(1, len(another) - 2) :],
        "decorated": rng.choice(OPENINGS) + text,
        "stuttered": text[: rng.randint(1, 2)] + text,
        "cut_short": text[: rng.randint(1, len(text) - 1)],
        "story": rng.choice(["", *OPENINGS]) + SENTENCE[rng.choice(SLOTS)].format(**slots),
    }[kind]
    return {
        "prompt": [ask],
        "chosen": [reply],
        "rejected": [_turn("assistant", bad)],
        "kinds": ["small_talk", kind],
    }


def pairs(n: int, seed: int, heldout: bool = False) -> list[dict]:
    """n 个偏好对 ``{"prompt", "chosen", "rejected", "kinds"}``，好坏的次序见 QUALITY；混有寒暄，
    免得对齐之后只会答题，连"你好"也不会了。
    """
    rng = _rng("pairs", seed, heldout)
    rows = []
    for _ in range(n):
        if rng.random() < SMALL_TALK_SHARE:
            rows.append(_small_talk_pair(rng, heldout))
            continue
        question, slots = _question(rng, heldout)
        slot = question["slot"]
        helpful = rng.choice(["courteous", "courteous", "courteous", "plain", "terse"])
        kinds = rng.choices(
            [
                [helpful, "wrong"],  # 同一口气，对与错：逼奖励模型读故事
                ["courteous", rng.choice(["plain", "plain", "plain", "terse", "wrong", "unhelpful"])],
                sorted(rng.sample(QUALITY, 2), key=QUALITY.index),
            ],
            [0.35, 0.5, 0.15],
        )[0]
        chosen, rejected = (
            _answer(rng, mistaken(rng.choice, slots, slot), slot, helpful)
            if kind == "wrong"
            else _answer(rng, slots, slot, kind)
            for kind in kinds
        )
        rows.append(
            {
                "prompt": question["messages"],
                "chosen": [_turn("assistant", chosen)],
                "rejected": [_turn("assistant", rejected)],
                "kinds": kinds,
            }
        )
    return rows
