"""长句在标点处切开，各段里找到的实体放回整句的位置：训练和预测都要，模型一次读不了一万字。"""

from __future__ import annotations

from collections.abc import Callable

from tagged_files import Sentence, Span

MAX_CHARS = 126  # 一段最长多少字


def cut_long(chars: list[str], limit: int = MAX_CHARS) -> list[tuple[int, int]]:
    """一句话 → 几段 [从, 到)，每段不超过 limit 个字：在限度以内最后一个句末标点之后切，没有就逗号之后，再没有就硬切。"""
    pieces, start = [], 0
    while len(chars) - start > limit:
        window = chars[start : start + limit]
        cut = limit
        for marks in ("。！？!?\n", "；;", "，,、：: \t"):
            places = [i + 1 for i, char in enumerate(window) if char in marks]
            if places and places[-1] >= limit // 4:  # 太靠前的不要：切得太碎，上文就没了
                cut = places[-1]
                break
        pieces.append((start, start + cut))
        start += cut
    if start < len(chars):
        pieces.append((start, len(chars)))
    return pieces


def put_back(pieces: list[tuple[int, int]], spans: list[list[Span]]) -> list[Span]:
    """各段里找到的实体 → 整句话里的位置。"""
    whole = []
    for (start, _), found in zip(pieces, spans, strict=True):
        whole += [(kind, start + begin, start + end) for kind, begin, end in found]
    return whole


def short_sentences(sentences: list[Sentence], limit: int = MAX_CHARS) -> list[Sentence]:
    """训练用：太长的在标点处切开，实体跟着走；正好切在实体中间的那个实体不要。"""
    pieces = []
    for sentence in sentences:
        for start, end in cut_long(sentence.chars, limit):
            inside = [(k, s - start, e - start) for k, s, e in sentence.spans if start <= s and e <= end]
            pieces.append(Sentence(sentence.chars[start:end], inside))
    return pieces


def tag_long(
    sentences: list[Sentence], tag: Callable[[list[Sentence]], list[list[Span]]], limit: int = MAX_CHARS
) -> list[list[Span]]:
    """多长的句子都行：切成不超过 limit 个字的几段，一起交给 tag，找到的实体放回各句原来的位置。"""
    cuts = [cut_long(sentence.chars, limit) for sentence in sentences]
    short = [
        Sentence(s.chars[start:end])
        for s, pieces in zip(sentences, cuts, strict=True)
        for start, end in pieces
    ]
    found = iter(tag(short))
    return [put_back(pieces, [next(found) for _ in pieces]) for pieces in cuts]
