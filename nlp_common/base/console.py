"""往终端里写字。"""

from __future__ import annotations

import unicodedata


def printable(text: str) -> str:
    """没练好的模型什么字节都说得出来；控制字符会弄乱终端，换成 �。"""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "�" for c in text)


def width(text: str) -> int:
    """终端里占几格：汉字与全角标点两格。"""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


def padded(text: str, cells: int, right: bool = False) -> str:
    """补空格到 cells 格，左对齐；right 是右对齐。已经够宽的，左对齐仍留一格，好与下一栏分开。"""
    space = " " * max(0 if right else 1, cells - width(text))
    return space + text if right else text + space
