"""问终端前的人：许不许做。文字（模型的、工具的、管道里的）怎样也答不了这个问题。"""

from __future__ import annotations

import json
import sys

from agent_secrets import Hider
from agent_trace import visible
from nlp_common.lm.reply_parser import Call

YES = ("y", "yes", "是", "好", "可以")


def describe(call: Call, hider: Hider) -> str:
    """一个调用 → 一行：看不见的字符都换掉，秘密隐去，不能借它们改写屏幕。"""
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    return visible(hider.text(f"{call.name} {arguments}"))


def confirm_at_terminal(call: Call, hider: Hider) -> bool:
    """问终端前的人：许不许做。只认这个问题印出来以后、从键盘敲进来的字。

    输入不是终端（管道、文件）就不许：管道里的下一行可能是文档里的字。问之前先倒掉已经敲进来的：
    从网页上整段贴进来的话，第二行也许就是一个 y。
    """
    print(f"\n要做一件会改东西的事：\n  {describe(call, hider)}")
    if not sys.stdin.isatty():
        print("（输入不是终端，没有人可问：不许。）")
        return False
    discard_typed()
    try:
        said = input("许可吗？（y 许可；别的、直接回车都是不许）")
    except (EOFError, KeyboardInterrupt):
        print()
        return False
    return said.strip().lower() in YES


def discard_typed() -> None:
    """倒掉已经敲进来、还没有读的字。"""
    try:
        import termios

        termios.tcflush(sys.stdin, termios.TCIFLUSH)
    except ImportError:
        import msvcrt

        while msvcrt.kbhit():
            msvcrt.getwch()
