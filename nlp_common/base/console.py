"""往终端里写字。"""

from __future__ import annotations

import unicodedata


def printable(text: str) -> str:
    """没练好的模型什么字节都说得出来；控制字符会弄乱终端，换成 �。"""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "�" for c in text)
