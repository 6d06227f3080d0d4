"""把一篇长文档切成几块。每种切法都给出一串 (start, end)：text[start:end] 是一块。

给位置不给文字，所以原文的每个字在哪一块、答案有没有被切断、来源在原文的哪里，都算得出来。
切法不同，在哪里下刀不同：

    fixed      每 size 个字一刀，不看内容
    recursive  先按段落切，放不下的按行，再放不下按句……（LangChain 的 RecursiveCharacterTextSplitter 的次序）；
               它默认的分隔符是空行、换行、空格：中文一段里没有空格，退到最后就是逐字切
    sentences  在句末标点后面切，一句一句装满
    structure  先按标题与段落切，各节分开装，再在句末切：一块不跨两节
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from nlp_common.base.errors import UserError

Span = tuple[int, int]

DEFAULT_SEPARATORS = ("\n\n", "\n", " ")  # 别的库的默认
CHINESE_SEPARATORS = ("\n\n", "\n", "。", "！", "？", "；", "，", "、", " ")
# 句末标点，连同跟着的引号、括号；英文的句点后面要有空白，不然 3.14 也成了两句
_SENTENCE_END = re.compile(r"[。！？!?；;…]+[”’」』）)》]*|\.[”’)]*(?=\s)|\n+")
_HEADING = re.compile(
    r"^(#{1,6}\s.*|第[一二三四五六七八九十百零\d]+[章节回条].*|[一二三四五六七八九十]+、.{1,30})$",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Chunk:
    """知识库里的一条：文字，来自哪篇文档的哪里，和别的可以用来过滤的栏（meta）。"""

    id: str
    text: str
    document: str = ""
    start: int = 0
    end: int = 0
    meta: dict = field(default_factory=dict)


# ---------------------------------------------------------------- 四种切法


def fixed(text: str, size: int, overlap: int = 0) -> list[Span]:
    """每块 size 个字，后一块的前 overlap 个字与前一块的末尾相同。"""
    _check(size, overlap)
    spans = []
    for start in range(0, max(len(text) - overlap, 1), size - overlap):
        spans.append((start, min(start + size, len(text))))
    return _trim(text, spans)


def recursive(
    text: str, size: int, overlap: int = 0, separators: tuple[str, ...] = CHINESE_SEPARATORS
) -> list[Span]:
    """按排在前面的分隔符切；切出的一片还是放不下，就用下一个切它；都用完了，逐字切。然后把小片装满。"""
    _check(size, overlap)
    return _pack(text, _pieces(text, 0, len(text), size, separators), size, overlap)


def sentences(text: str, size: int, overlap: int = 0) -> list[Span]:
    """一句一句装，装不下就另起一块；一句比 size 还长，在逗号、顿号处切，再不行逐字切。"""
    _check(size, overlap)
    pieces: list[Span] = []
    for start, end in split_sentences(text):
        pieces += _pieces(text, start, end, size, ("，", "、", " "))
    return _pack(text, pieces, size, overlap)


def structure(text: str, size: int, overlap: int = 0) -> list[Span]:
    """在标题（#、第一章、一、）处和空行处分节，一节一节地用 sentences 切：一块里不会有两节的话。"""
    _check(size, overlap)
    borders = {0, len(text)} | {found.start() for found in _HEADING.finditer(text)}
    places = sorted(borders)
    sections: list[Span] = []
    for start, end in itertools.pairwise(places):
        at = start
        for gap in re.finditer(r"\n\s*\n", text[start:end]):
            title_only = _HEADING.fullmatch(text[at : start + gap.start()].strip())
            if not title_only:  # 标题与它下面的第一段不分开
                sections.append((at, start + gap.end()))
                at = start + gap.end()
        sections.append((at, end))
    spans = []
    for start, end in sections:
        spans += [(start + a, start + b) for a, b in sentences(text[start:end], size, overlap)]
    return spans


SPLITTERS: dict[str, Callable[..., list[Span]]] = {
    "fixed": fixed,
    "recursive": recursive,
    "sentences": sentences,
    "structure": structure,
}


def splitter_named(name: str) -> Callable[..., list[Span]]:
    if name not in SPLITTERS:
        raise UserError(f"不认识切法 {name}，可以是 {'、'.join(SPLITTERS)}。")
    return SPLITTERS[name]


def split_sentences(text: str) -> list[Span]:
    """一句一段位置，句末的标点在句子里；连起来就是全文，一个字不少。"""
    spans, start = [], 0
    for found in _SENTENCE_END.finditer(text):
        spans.append((start, found.end()))
        start = found.end()
    if start < len(text):
        spans.append((start, len(text)))
    return spans


# ---------------------------------------------------------------- 位置 → 块


def make_chunks(document: str, text: str, spans: list[Span], **meta: object) -> list[Chunk]:
    """一篇文档的各块。id 由文档名与这一块的文字决定，与位置无关：前面插进一段，后面各块的 id 不变，
    于是只有变了的块要重新算向量。同一篇里文字相同的几块，从第二块起加上 -2、-3。
    """
    chunks, seen = [], {}
    for start, end in spans:
        piece = text[start:end]
        name = f"{document}:{text_hash(piece)}"
        seen[name] = seen.get(name, 0) + 1
        if seen[name] > 1:
            name = f"{name}-{seen[name]}"
        chunks.append(Chunk(name, piece, document, start, end, dict(meta)))
    return chunks


def text_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ---------------------------------------------------------------- 各部分


def _check(size: int, overlap: int) -> None:
    if size < 1 or not 0 <= overlap < size:
        raise UserError(f"一块至少 1 个字，重叠的要比一块少：给的是一块 {size} 字，重叠 {overlap} 字。")


def _pieces(text: str, start: int, end: int, size: int, separators: tuple[str, ...]) -> list[Span]:
    """text[start:end] 切成不超过 size 的小片；分隔符归前面的一片。"""
    if end - start <= size:
        return [(start, end)] if end > start else []
    if not separators:
        return [(at, min(at + size, end)) for at in range(start, end, size)]
    pieces: list[Span] = []
    at = start
    while at < end:
        found = text.find(separators[0], at, end)
        stop = end if found < 0 else found + len(separators[0])
        pieces += _pieces(text, at, stop, size, separators[1:])
        at = stop
    return pieces


def _pack(text: str, pieces: list[Span], size: int, overlap: int) -> list[Span]:
    """相邻的小片装成不超过 size 的块；下一块从前一块末尾的几片开始，这几片合起来不超过 overlap。"""
    spans: list[Span] = []
    first = 0  # 这一块的第一片
    for number, (_, end) in enumerate(pieces):
        if end - pieces[first][0] <= size:
            continue
        spans.append((pieces[first][0], pieces[number - 1][1]))
        last, first = first, number
        while (
            first - 1 > last
            and pieces[number - 1][1] - pieces[first - 1][0] <= overlap
            and end - pieces[first - 1][0] <= size
        ):
            first -= 1
    if pieces:
        spans.append((pieces[first][0], pieces[-1][1]))
    return _trim(text, spans)


def _trim(text: str, spans: list[Span]) -> list[Span]:
    """去掉每块两头的空白；只有空白的不要。"""
    trimmed = []
    for start, end in spans:
        piece = text[start:end]
        left = len(piece) - len(piece.lstrip())
        right = len(piece.rstrip())
        if right > left:
            trimmed.append((start + left, start + right))
    return trimmed
