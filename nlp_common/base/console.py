"""往终端里写字。"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence


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


def print_table(rows: Sequence[Sequence[object]]) -> None:
    """第一行是表头；第一栏左对齐，别的右对齐，汉字按两格算。"""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(width(row[column]) for row in cells) for column in range(len(cells[0]))]
    print()
    for row in cells:
        rest = "".join(
            padded(cell, 2 + size, right=True) for cell, size in zip(row[1:], widths[1:], strict=True)
        )
        print("  " + padded(row[0], widths[0] + 1) + rest)
