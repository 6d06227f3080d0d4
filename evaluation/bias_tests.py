"""成对的差是不是碰巧：翻符号的置换检验、Holm 的多重比较，和它们找得到多大的偏见（功效）。

一对句子只换了人，别的都一样；d = 换成甲的分 − 换成乙的分。没有偏见时，谁是甲谁是乙可以互换，所以每个 d 的正负号
随便翻都一样像。真的均值比翻出来的绝大多数都大，才说有偏见。不假设分数服从什么分布。
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

ALPHA = 0.05
EXACT = 12  # 不多于几组时，2^组数 种翻法一种不漏
DRAWS = 10_000


def sign_flip_p(
    differences: Sequence[float], clusters: Sequence | None = None, seed: int = 0, draws: int = DRAWS
) -> float:
    """双侧 p 值：各种翻法里，|和| 不小于真的 |和| 的占多少。

    clusters：同一个模板写出的几对不是独立的证据，要一起翻；没给就一对一对地翻。
    """
    totals = np.asarray(differences, dtype=float)
    if clusters is not None:
        _, which = np.unique(np.asarray(clusters), return_inverse=True)
        totals = np.bincount(which, weights=totals)  # (组数,)
    seen = abs(totals.sum()) * (1 - 1e-12)  # 舍入不算
    if len(totals) <= EXACT:
        signs = np.array(list(itertools.product((1, -1), repeat=len(totals))))
        return float((abs(signs @ totals) >= seen).mean())
    signs = random_signs(np.random.default_rng(seed), draws, len(totals))
    return float((1 + (abs(signs @ totals) >= seen).sum()) / (1 + draws))  # 真的那一种也算一种翻法


def random_signs(rng: np.random.Generator, draws: int, n: int) -> np.ndarray:
    return rng.integers(0, 2, size=(draws, n), dtype=np.int8).astype(np.float32) * 2 - 1


def holm(ps: Sequence[float]) -> list[float]:
    """Holm（1979）：m 个 p 从小到大，依次乘 m、m−1 …，后面的不小于前面的。校正后 ≤ 0.05 才算；一个也不错怪的把握 ≥ 95 %。"""
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    adjusted, highest = [0.0] * len(ps), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[i]))
        adjusted[i] = highest
    return adjusted


# ---------------------------------------------------------------- 知道真相的模拟


def simulate(
    effect: float,
    pairs: int = 200,
    comparisons: int = 8,
    families: int = 1000,
    seed: int = 0,
    draws: int = 2000,
) -> dict:
    """一次评测有 comparisons 个比较，第一个埋了 effect 个标准差的偏见，别的没有；做 families 次。

    → power：埋的被找到的比例；false_alarms：没有偏见的里面，至少错怪了一个的比例。
    """
    rng = np.random.default_rng([seed, round(effect * 1000)])
    found = wrong = 0
    at_once = 100
    for start in range(0, families, at_once):
        size = min(at_once, families - start)
        d = rng.standard_normal((size, comparisons, pairs), dtype=np.float32)
        d[:, 0] += effect
        signs = random_signs(rng, draws, pairs)
        seen = abs(d.sum(-1))  # (size, comparisons)
        flipped = abs(np.tensordot(d, signs, axes=(2, 1)))  # (size, comparisons, draws)
        ps = (1 + (flipped >= seen[..., None] * (1 - 1e-6)).sum(-1)) / (1 + draws)
        for row in ps:
            called = [p <= ALPHA for p in holm(list(row))]
            found += called[0] and effect != 0
            wrong += any(called[1:] if effect else called)
    return {"power": found / families, "false_alarms": wrong / families}


def same_template_trap(
    templates: int = 20, each: int = 10, share: float = 0.25, families: int = 400, seed: int = 0
) -> dict:
    """没有偏见，可同一个模板的 each 对一起偏（方差里 share 是模板的）：一对对地翻、整个模板地翻，各错怪多少。"""
    rng = np.random.default_rng(seed)
    clusters = np.repeat(np.arange(templates), each)
    wrong = {"by_pair": 0, "by_template": 0}
    for family in range(families):
        lean = rng.normal(0, share**0.5, templates)[clusters]
        d = lean + rng.normal(0, (1 - share) ** 0.5, templates * each)
        wrong["by_pair"] += sign_flip_p(d, None, family, 1000) <= ALPHA
        wrong["by_template"] += sign_flip_p(d, clusters, family, 1000) <= ALPHA
    return {name: count / families for name, count in wrong.items()}
