"""几个人给同样的东西打分，他们一致吗：Cohen κ、Fleiss κ、Krippendorff α、Gwet AC1。

都是同一句话：κ = (实际的一致 − 碰巧的一致) / (1 − 碰巧的一致)，不同在"碰巧"怎么算、差一级算不算错、缺了怎么办。

  Cohen κ         两个人，都打了分；各按自己的习惯碰巧
  Fleiss κ        每样东西 m 个人打分（不必是同样的人）；所有人合起来的习惯
  Krippendorff α  几个人都行，可以缺；名目、次序、间隔三种距离
  Gwet AC1        两个人；碰巧的算法不怕一类特别多（κ 的悖论）
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

NAN = float("nan")
LEVELS = ("nominal", "ordinal", "interval")


def weights_between(levels: int, kind: str | None) -> np.ndarray:
    """两级之间算错多少，(K, K)：不加权是 0 或 1；linear 是差几级；quadratic 是它的平方。"""
    steps = np.abs(np.subtract.outer(np.arange(levels), np.arange(levels))).astype(float)
    if kind is None:
        return (steps > 0).astype(float)
    return steps if kind == "linear" else steps**2


def cohen_kappa(a: Sequence, b: Sequence, weights: str | None = None, order: Sequence | None = None) -> float:
    """Cohen（1960）的 κ；weights 是 linear 或 quadratic 就是加权的（1968）。

    order：各级从低到高，没给就排序。两个人全程只用同一级，碰巧也是 1，κ 没有定义（NaN）。
    """
    levels = list(order) if order is not None else sorted({*a, *b})
    table = np.zeros((len(levels), len(levels)))  # table[i, j]：甲打 i、乙打 j 的有几个
    for first, second in zip(a, b, strict=True):
        table[levels.index(first), levels.index(second)] += 1
    table /= table.sum()
    by_chance = np.outer(table.sum(1), table.sum(0))  # 各按自己的习惯，互不看对方
    wrong = weights_between(len(levels), weights)
    chance = (wrong * by_chance).sum()
    return float(1 - (wrong * table).sum() / chance) if chance else NAN


def fleiss_kappa(counts: np.ndarray) -> float:
    """Fleiss（1971）的 κ。counts (N, K)：第 i 样东西被几个人打成第 k 级；每一行的和是人数，要相同。"""
    counts = np.asarray(counts, dtype=float)
    raters = counts.sum(1)
    if not len(counts) or (raters != raters[0]).any() or raters[0] < 2:
        raise ValueError("Fleiss κ 要每样东西有同样多的人（至少两个）打分；有缺的请用 Krippendorff α。")
    pairs = raters[0] * (raters[0] - 1)
    agreed = ((counts * (counts - 1)).sum(1) / pairs).mean()  # 随便挑两个人，打得一样的比例
    share = counts.sum(0) / counts.sum()
    chance = (share**2).sum()
    return float((agreed - chance) / (1 - chance)) if chance < 1 else NAN


def krippendorff_alpha(
    ratings: Sequence[Sequence], level: str = "nominal", order: Sequence | None = None
) -> float:
    """Krippendorff 的 α = 1 − 实际的不一致 / 碰巧的不一致。ratings：一样东西一行，各人的分；缺的是 None。

    一样东西有 m ≥ 2 个人打了分，才配得成对；每一对的分量是 1/(m−1)，打分的人多也不多占。
    距离：名目 0 或 1；次序，隔着多少人次（两头各算一半）的平方；间隔 (a − b)²。
    """
    units = [[value for value in row if value is not None] for row in ratings]
    units = [row for row in units if len(row) > 1]
    if not units:
        return NAN
    levels = list(order) if order is not None else sorted({value for row in units for value in row})
    together = np.zeros((len(levels), len(levels)))  # 同一样东西上，一个人打 i、另一个人打 j 的分量
    for row in units:
        places = [levels.index(value) for value in row]
        for one, other in itertools.permutations(range(len(places)), 2):
            together[places[one], places[other]] += 1 / (len(places) - 1)
    used = together.sum(1)  # 各级用了几人次
    if level == "nominal":
        distance = weights_between(len(levels), None)
    elif level == "interval":
        distance = np.subtract.outer(np.array(levels, float), np.array(levels, float)) ** 2
    else:
        middle = np.cumsum(used) - used / 2  # 每一级的中点之前有几人次
        distance = np.subtract.outer(middle, middle) ** 2
    chance = (np.outer(used, used) * distance).sum() / (used.sum() - 1)
    return float(1 - (together * distance).sum() / chance) if chance else NAN


def gwet_ac1(a: Sequence, b: Sequence) -> float:
    """Gwet（2008）的 AC1：碰巧一致 = Σ π(1−π)/(K−1)，一类占得越多反而越小，不会把一致的都算成碰巧。"""
    levels = sorted({*a, *b})
    if len(levels) < 2:
        return 1.0
    agreed = sum(x == y for x, y in zip(a, b, strict=True)) / len(a)
    share = np.array([(list(a).count(v) + list(b).count(v)) / (2 * len(a)) for v in levels])
    chance = float((share * (1 - share)).sum() / (len(levels) - 1))
    return (agreed - chance) / (1 - chance)


def counts_of(ratings: Sequence[Sequence], order: Sequence) -> np.ndarray:
    """一样东西一行的分 → (N, K) 的人数表，给 Fleiss 用。"""
    return np.array([[sum(value == level for value in row) for level in order] for row in ratings])
