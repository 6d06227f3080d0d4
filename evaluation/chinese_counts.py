"""数中文：字数、句数、段数、比多少、简体繁体，各处同一个定义。

照搬英文的规则多半不灵：\\w+ 把一整句汉字数成一个词，\\b 在汉字之间从不出现，英文的分句不认得 。。这里：

    字数    一个汉字（假名）算一个，连着的字母、数字算一个（3.14、it's 也算一个），标点与空白不算
    句数    到 。！？!?… 或换行为止算一句，连着的几个只算一次；英文的句点后面要有空白才算
    段落    空行隔开
    词      照字面找，不分大小写，不分词：「花园」在「花园里」中算出现
"""

from __future__ import annotations

import re

HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u3007\U00020000-\U0003ffff"
KANA = "\u3041-\u30ff"
WORD = re.compile(rf"[{HAN}{KANA}]|[^\W_{HAN}{KANA}]+(?:['’.,-][^\W_{HAN}{KANA}]+)*")
SENTENCE_END = re.compile(r"[。！？!?…]+[”’」』）)\"']*|\.(?=\s|$)|\n+")
PUNCTUATION = re.compile(r"[^\w\s]|_")  # 既不是字，也不是空白
FULL_WIDTH, HALF_WIDTH = "，。；：！？（）、“”‘’", ",.;:!?()\"'"
QUOTES = ('""', "“”", "「」", "『』")
NUMERAL = r"\s*(?:\d+|[一二三四五六七八九十]+)\s*"
RELATIONS = {
    "at least": "不少于",
    "less than": "少于",
    "at most": "不多于",
    "exactly": "正好",
}
# 语言由文字看：这些文字占字母的一半以上
SCRIPTS = {
    "zh": HAN,
    "ja": KANA,
    "ko": "\uac00-\ud7a3",
    "en": "A-Za-z",
    "ru": "\u0400-\u04ff",
    "ar": "\u0600-\u06ff",
    "hi": "\u0900-\u097f",
    "th": "\u0e00-\u0e7f",
}
SCRIPT_NAMES = ("simplified", "traditional")
WIDTHS = ("full", "half")


# ---------------------------------------------------------------- 数一数


def count_words(text: str) -> int:
    return len(WORD.findall(text))


def sentences(text: str) -> list[str]:
    """一句一句，去掉没有字的。"""
    return [part.strip() for part in SENTENCE_END.split(text) if WORD.search(part)]


def paragraphs(text: str) -> list[str]:
    """空行隔开的段落。"""
    return [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def compare(count: int, relation: str, wanted: int) -> bool:
    """relation 是 IFEval 的英文，或 RELATIONS 里的中文。"""
    if relation in ("at least", "不少于"):
        return count >= wanted
    if relation in ("less than", "少于"):
        return count < wanted
    if relation in ("at most", "不多于"):
        return count <= wanted
    return count == wanted


def count_of(text: str, word: str) -> int:
    return text.lower().count(word.lower())


def can_encode(char: str, codec: str) -> bool:
    try:
        char.encode(codec)
    except UnicodeEncodeError:
        return False
    return True


def only_in(char: str, script: str) -> bool:
    """这个汉字是不是只在简体（或只在繁体）里用：国标 GB 2312 收简体，大五码收繁体，两边都有的不算。"""
    simplified, traditional = can_encode(char, "gb2312"), can_encode(char, "big5")
    return simplified and not traditional if script == "simplified" else traditional and not simplified


# ---------------------------------------------------------------- 是什么文字


def language_is(text: str, language: str) -> bool:
    """这种文字占全部字母的一半以上。日文里汉字也算，但要有假名。"""
    letters = [char for char in text if char.isalpha()]
    own = re.compile(f"[{SCRIPTS[language]}{HAN if language == 'ja' else ''}]")
    share = sum(own.match(char) is not None for char in letters) / max(1, len(letters))
    has_kana = re.search(f"[{KANA}]", text) is not None
    return share > 0.5 and (language not in ("ja", "zh") or has_kana == (language == "ja"))


def in_script(text: str, script: str) -> bool:
    """有汉字，而且没有一个只在另一种里用的字。"""
    other = SCRIPT_NAMES[1 - SCRIPT_NAMES.index(script)]
    han = re.findall(f"[{HAN}]", text)
    return bool(han) and not any(only_in(char, other) for char in han)


def punctuation_width(text: str, width: str) -> bool:
    """标点全是全角（或半角）的；夹在字母、数字中间的（3.14）不算标点。"""
    text = re.sub(r"(?<=[A-Za-z0-9])[.,:'](?=[A-Za-z0-9])", "", text)
    return not any(char in text for char in (HALF_WIDTH if width == "full" else FULL_WIDTH))
