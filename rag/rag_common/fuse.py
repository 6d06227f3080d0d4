"""把几种检索的结果合成一列。每种给的都是分高的在前。

BM25 的分是几到几十，余弦多半在 0.7 到 0.9：直接相加，等于只用 BM25。一种办法只看名次（RRF），一种先把分拉到 0 到 1。
"""

from __future__ import annotations

from collections.abc import Sequence

Ranked = Sequence[tuple[str, float]]  # [(id, 分), …]


def reciprocal_rank(lists: Sequence[Sequence[str]], k: int = 60) -> list[tuple[str, float]]:
    """RRF（Cormack et al. 2009）：score(d) = Σ 1 / (k + d 的名次)，名次从 1 数，没上榜的不加。

    k 越大，第一名与第十名的差别越小。同分的，先在前面的列里出现的在前。
    """
    scores: dict[str, float] = {}
    for names in lists:
        for rank, name in enumerate(names, 1):
            scores[name] = scores.get(name, 0.0) + 1 / (k + rank)
    return sorted(scores.items(), key=lambda item: -item[1])


def weighted(lists: Sequence[Ranked], weights: Sequence[float]) -> list[tuple[str, float]]:
    """每列的分先拉到 0 到 1（最高的是 1，上榜的最低的是 0），乘上权重相加；没上榜的当作 0。"""
    scores: dict[str, float] = {}
    for ranked, weight in zip(lists, weights, strict=True):
        for name, score in min_max(ranked):
            scores[name] = scores.get(name, 0.0) + weight * score
    return sorted(scores.items(), key=lambda item: -item[1])


def min_max(ranked: Ranked) -> list[tuple[str, float]]:
    """一列的分拉到 0 到 1；全都同分（或只有一条）时都是 1。"""
    if not ranked:
        return []
    scores = [score for _, score in ranked]
    low, high = min(scores), max(scores)
    if high == low:
        return [(name, 1.0) for name, _ in ranked]
    return [(name, (score - low) / (high - low)) for name, score in ranked]
