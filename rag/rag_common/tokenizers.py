"""把文字切成词，给 BM25 用：一个函数，字符串进，词的列表出。

中文没有空格。按空格切的分词器（许多 BM25 库的默认）把一整句当成一个词，问题里的词一个也对不上；
只取 ``\\w\\w+`` 的也一样，一句话里两个标点之间的全部汉字是一个词。不装分词器也有好办法：单个的字加上相邻的两个字。
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

from nlp_common.base.errors import UserError

Tokenizer = Callable[[str], list[str]]

# 一段连着的汉字，或一个字母、数字组成的词；标点与空白是分界
_RUNS = re.compile(
    r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+"
    r"|[^\W_\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+"
)
_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")


def normalize(text: str) -> str:
    """全角变半角，大写变小写：Ａ、A、a 是同一个词。"""
    return unicodedata.normalize("NFKC", text).lower()


def characters_and_bigrams(text: str) -> list[str]:
    """单个的汉字，加上相邻的两个汉字；字母与数字连成的词不拆。

    "北京2008年" → 北 京 北京 2008 年。字保证总能对上一些，两个字的大半就是词，稀有得多，分也就高得多。
    """
    tokens: list[str] = []
    for run in _RUNS.findall(normalize(text)):
        if _HAN.match(run):
            tokens += run  # 每个字
            tokens += [run[i : i + 2] for i in range(len(run) - 1)]
        else:
            tokens.append(run)
    return tokens


def characters(text: str) -> list[str]:
    """单个的汉字；字母与数字连成的词不拆。"""
    tokens: list[str] = []
    for run in _RUNS.findall(normalize(text)):
        tokens += run if _HAN.match(run) else [run]
    return tokens


def bigrams(text: str) -> list[str]:
    """相邻的两个汉字；只有一个汉字的一段留着那一个字。"""
    tokens: list[str] = []
    for run in _RUNS.findall(normalize(text)):
        if _HAN.match(run) and len(run) > 1:
            tokens += [run[i : i + 2] for i in range(len(run) - 1)]
        else:
            tokens.append(run)
    return tokens


def whitespace(text: str) -> list[str]:
    """按空白切：许多库的默认。英文可以，中文里一个问题就是一个词。"""
    return text.lower().split()


def word_pattern(text: str) -> list[str]:
    """``\\w\\w+``：scikit-learn、bm25s 等的默认。中文里，两个标点之间的整段是一个词。"""
    return re.findall(r"(?u)\b\w\w+\b", text.lower())


def jieba_words(text: str) -> list[str]:
    """jieba 切的词（搜索引擎模式：长词之外，里面的短词也要）。要 pip install jieba。"""
    try:
        import jieba
    except ImportError:
        raise UserError(
            '分词器 jieba 还没有安装：pip install jieba（或 pip install -e ".[rag]"）。'
        ) from None
    jieba.setLogLevel("WARNING")  # 不印"正在载入词典"
    return [word for word in jieba.cut_for_search(normalize(text)) if _RUNS.search(word)]


TOKENIZERS: dict[str, Tokenizer] = {
    "characters_and_bigrams": characters_and_bigrams,
    "characters": characters,
    "bigrams": bigrams,
    "jieba": jieba_words,
    "whitespace": whitespace,
    "word_pattern": word_pattern,
}


def tokenizer_named(name: str) -> Tokenizer:
    if name not in TOKENIZERS:
        raise UserError(f"不认识分词器 {name}，可以是 {'、'.join(TOKENIZERS)}。")
    return TOKENIZERS[name]
