"""文字文件解不了码时：是整个文件用了别的编码，还是 UTF-8 里坏了几行？两种毛病的改法相反，弄错了就把好字变成乱码。"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

BOM = "\ufeff"
# 中日韩的文字与标点：UTF-8 解出来的好字多半在这里；GBK 的字节误当 UTF-8 解，偶尔才碰巧解出一个
_CJK = re.compile(r"[\u3000-\u30ff\u4e00-\u9fff\uff00-\uffef]")


def raw_lines(path: Path) -> Iterator[bytes]:
    """一行行的字节，带着行尾。按 b"\\n" 分行；整个文件只有 b"\\r"（老式 Mac）就按它分。"""
    with open(path, "rb") as file:
        head = file.read(1 << 16)
        file.seek(0)
        if b"\n" in head or b"\r" not in head:
            yield from file
            return
        rest = b""
        while chunk := file.read(1 << 20):
            *lines, rest = (rest + chunk).split(b"\r")
            for line in lines:
                yield line + b"\r"
        if rest:
            yield rest


def what_is_wrong(path: Path, number: int, error: UnicodeDecodeError) -> str:
    """第 number 行（从 1 数）解不了码：说出毛病和改法。只在出错时调用，它把文件再读一遍。"""
    start = f"{path} 第 {number} 行不是 UTF-8"
    head = error.object[:2] if number == 1 else b""
    if head in (b"\xff\xfe", b"\xfe\xff"):
        return f"{start} 编码（是 UTF-16）。请用编辑器另存为 UTF-8，或运行：iconv -f UTF-16 -t UTF-8 {path} > 新文件"
    bad, good = _count(path)
    good_text, encoding = sum(good.values()), _whole_encoding(path)
    if encoding and good_text * 4 <= sum(bad.values()):
        return (
            f"{start} 编码（多半是 {encoding[0]}）。"
            f"请用编辑器另存为 UTF-8；也可以运行：iconv -f {encoding[1]} -t UTF-8 {path} > 新文件"
        )
    lines = "、".join(f"第 {line} 行" for line in list(bad)[:5])
    many = (
        f"这样的行有 {len(bad)} 行（{lines}{' 等' if len(bad) > 5 else ''}）"
        if len(bad) > 1
        else "只有这一行"
    )
    place = f"第 {error.start + 1} 个字节起坏了（0x{error.object[error.start]:02x}）"
    if good_text:
        return (
            f"{start}：{place}，而别的行是好的 UTF-8；{many}。"
            "多半是两种编码的文件拼在一起，或有一行被截断了：改好或删去这几行，不要转换整个文件，那会把好的行变成乱码。"
        )
    return f"{start}：{place}；{many}。整个文件也不是 GBK、Big5 或 UTF-16：请改好或删去这几行。"


def _count(path: Path) -> tuple[dict[int, int], dict[int, int]]:
    """→ (坏行的行号 → 坏了几处, 行号 → 解得出几个中文字)。"""
    bad: dict[int, int] = {}
    good: dict[int, int] = {}
    for number, raw in enumerate(raw_lines(path), 1):
        text = raw.decode("utf-8", errors="replace")
        if found := len(_CJK.findall(text)):
            good[number] = found
        try:
            raw.decode("utf-8")
        except UnicodeDecodeError:
            bad[number] = text.count("\N{REPLACEMENT CHARACTER}")
    return bad, good


def _whole_encoding(path: Path) -> tuple[str, str] | None:
    """整个文件是哪种中文编码 → (名字, iconv 里的名字)；都不像是 None。

    GB18030 几乎什么字节都解得开，所以还要看解出来的是不是常用字。
    """
    data = path.read_bytes()[: 1 << 22]
    data = data[: data.rfind(b"\n") + 1] or data  # 不从半个字切开
    for name, iconv, codec, common in (
        ("GBK", "GB18030", "gb18030", "gb2312"),
        ("Big5", "BIG5", "big5", "big5"),
    ):
        try:
            text = data.decode(codec)
        except UnicodeDecodeError:
            continue
        letters = [char for char in text if ord(char) > 127]
        usual = sum(bool(_CJK.match(char)) and _encodable(char, common) for char in letters)
        if letters and usual >= 0.9 * len(letters):
            return name, iconv
    return None


def _encodable(char: str, codec: str) -> bool:
    try:
        char.encode(codec)
    except UnicodeEncodeError:
        return False
    return True
