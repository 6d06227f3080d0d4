"""工具箱：智能体能用的几件工具，每一件都当作会被人拿来攻击。

你会学到
  1. 一件工具是一个普通的函数：类型与 docstring 就是给模型看的说明（function_schema.py），函数体才是做的事。
  2. 调用之前查参数，调用时限时间，结果限长短，出错变成一句话：模型看得懂，也看不到路径与秘密（tool_calls.py）。
  3. 计算器自己读算式（expressions.py），从不 eval：eval 认得整个 Python，一个"式子"就能删文件。
  4. 读文件只在一个文件夹里（file_tools.py）：从文件夹的句柄往下开，链接一个也不跟，看过的换不掉。
  5. 会改东西的工具，每次要人许可；许可是程序里的一个 True，文字里写什么都不算。

怎么运行
  python tools.py                                          # 每件工具的说明、几个调用、一张攻击表
  python tools.py --call calculator '{"expression": "(23+48)*2"}'
  python tools.py --folder 我的笔记 --call search '{"words": "显存 不够"}'
  python tools.py --table 我的表.csv --call look_up '{"column": "城市", "value": "杭州"}'
  python tools.py --allow_python --call run_python '{"code": "print(2**100)"}'

应当看到（实测见本文件夹的 README.md）：攻击表里每一行都拦住了；同样的算式交给 eval，有的运行了代码，有的算到超时。

参考：OWASP LLM06（权力太大的智能体）；openat(2)；Robertson & Zaragoza 2009（BM25）。
"""

from nlp_common.base.cli import run_main

import datetime
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from nlp_common.base.arguments import option, parse_arguments
from nlp_common.base.errors import UserError
from nlp_common.lm.reply_parser import Call
from nlp_common.train.lesson import run_lesson
from nlp_common.train.settings import LessonSettings, parse_settings
from nlp_common.train.stage import Stage
from tool_attacks import show_attacks, try_attacks
from tool_calls import ERROR, Result, Tool, run_call
from tool_parts import toolbox

__all__ = ["ERROR", "Result", "Tool", "run_call", "toolbox"]  # 别的脚本从这里导入

HOME = Path(__file__).resolve().parent
PRESETS: dict[str, dict] = {"tiny": {}, "full": {}}


@dataclass
class ToolSettings(LessonSettings):
    NOT_IN_FINGERPRINT: ClassVar[set[str]] = LessonSettings.NOT_IN_FINGERPRINT | {
        "folder", "table", "notes", "allow_python", "call",
    }  # fmt: skip

    folder: str | None = option("许可读这个文件夹里的文件（只读；不给就没有 search、read_file、list_files）")
    table: str | None = option("look_up 查的表：csv 或 jsonl；默认是自带的小世界")
    notes: str | None = option("write_note 写到哪个文件；默认 outputs/notes.md")
    allow_python: bool = option("加上 run_python：在沙箱里运行 Python", False)
    call: list[str] | None = option("只做一个调用：工具名，和参数的 JSON", nargs="+")  # noqa: RUF009

    def check(self) -> None:
        for name in ("folder", "table", "notes", "allow_python"):
            if getattr(self, name) and not self.call:
                raise UserError(f"--{name} 与 --call 一起用；这一课自己的调用只用自带的，去掉 --{name}。")


# ---------------------------------------------------------------- 1. 几个调用，对的与错的

CALLS = [
    Call("calculator", {"expression": "（１２.５＋7）×4÷3"}),
    Call("calculator", {"expression": "12 ++ * 3"}),
    Call("calculater", {"expression": "1+1"}),
    Call("calculator", {"expr": "1+1"}),
    Call("calculator", {"expression": 12}),
    Call("convert", {"value": 3, "from_unit": "亩", "to_unit": "平方米"}),
    Call("convert", {"value": 98.6, "from_unit": "℉", "to_unit": "℃"}),
    Call("convert", {"value": 1, "from_unit": "斤", "to_unit": "里"}),
    Call("now", {}),
    Call("now", {"place": "火星"}),
    Call("days_between", {"start": "2024-02-28", "end": "2024年3月1日"}),
    Call("look_up", {"column": "人", "value": "小强"}),
    Call("look_up", {"column": "年龄", "value": "7"}),
    Call("write_note", {"text": "买苹果"}),
]


def fixed_clock() -> datetime.datetime:
    """一个不走的钟：印出来的每次一样。"""
    return datetime.datetime(2026, 11, 28, 4, 0, tzinfo=datetime.UTC)


def learn(stage: Stage) -> dict:
    tools = toolbox(clock=fixed_clock)
    print("1. 工具的说明（模型看到的）")
    for tool in tools.values():
        print(
            f"  {json.dumps(tool.schema['function'], ensure_ascii=False)}{'  ← 要许可' if tool.writes else ''}"
        )
    print("\n2. 几个调用")
    for call in CALLS:
        result = run_call(tools, call)
        print(f"  {call.name} {json.dumps(call.arguments, ensure_ascii=False)}")
        print(f"      {result.kind}  {shorter(result.text)}")
    print("\n3. 攻击")
    attacks = try_attacks()
    show_attacks(attacks)
    metrics = {
        "tools": len(tools),
        "attacks": len(attacks),
        "stopped": sum(attack.stopped for attack in attacks),
        "eval_harmed": sum(attack.eval_said in ("运行了代码", "算到超时") for attack in attacks),
        "eval_tried": sum(attack.eval_said != "" for attack in attacks),
        "slowest_ms": 1000 * max(attack.seconds for attack in attacks if not attack.waits),
    }
    return stage.save(metrics, {"calls": {"name": "tools.CALLS", "kind": "builtin"}})


def shorter(text: str, at_most: int = 80) -> str:
    text = text.replace("\n", "⏎")
    return text if len(text) <= at_most else text[:at_most] + "…"


# ---------------------------------------------------------------- 2. 一个调用


def confirm_here(call: Call) -> bool:
    """在终端里问；输入不是终端，就不许。"""
    from agent_confirm import confirm_at_terminal
    from agent_secrets import Hider

    return confirm_at_terminal(call, Hider.from_environment())


def read_call(words: list[str]) -> Call:
    """--call 后面的：工具名，和参数的 JSON。"""
    name, *rest = words
    try:
        arguments = json.loads(" ".join(rest) or "{}")
    except ValueError as error:
        raise UserError(
            f'--call {name} 后面的参数要是一个 JSON 对象，如 \'{{"expression": "1+1"}}\'：{error}。'
        ) from None
    if not isinstance(arguments, dict):
        raise UserError(f"--call {name} 后面的参数要是一个 JSON 对象 {{…}}，给的是 {rest[0][:40]}。")
    return Call(name, arguments)


def one_call(settings: ToolSettings) -> dict:
    result = run_call(toolbox(settings), read_call(settings.call or []), confirm_here)
    print(result.text)
    if not result.ok:
        sys.exit(1)
    return {"kind": result.kind, "text": result.text}


def main(argv: list[str] | None = None) -> dict:
    if (settings := parse_arguments(ToolSettings, argv)).call:
        return one_call(settings)
    settings = parse_settings(ToolSettings, PRESETS, argv)
    return run_lesson("tools", HOME, settings, learn)


if __name__ == "__main__":
    run_main(main)
