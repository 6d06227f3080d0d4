"""两串数一起变大变小吗：Pearson、Spearman、Kendall τ-b，手写的，与 scipy 相同（测试看着）。

一串数全都一样，相关没有定义，给 NaN。
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def pearson(a: Sequence[float], b: Sequence[float]) -> float:
    """各减去均值之后的夹角的余弦：看的是不是一条直线。"""
    x, y = np.asarray(a, float) - np.mean(a), np.asarray(b, float) - np.mean(b)
    size = np.sqrt((x * x).sum() * (y * y).sum())
    # 全都一样的数，减去均值之后只剩舍入：不当作真的起伏
    if np.ptp(a) == 0 or np.ptp(b) == 0 or size == 0:
        return float("nan")
    return float((x * y).sum() / size)


def ranks(values: Sequence[float]) -> np.ndarray:
    """名次（从 1 起），并列的取平均名次。"""
    _, place, count = np.unique(np.asarray(values, float), return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[place]


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """名次的 Pearson：只看谁先谁后，不看是不是直线。"""
    return pearson(ranks(a), ranks(b))


def kendall(a: Sequence[float], b: Sequence[float]) -> float:
    """τ-b：任取两个，次序相同的比不同的多多少；并列的从分母里去掉。"""
    _, x = np.unique(np.asarray(a, float), return_inverse=True)
    _, y = np.unique(np.asarray(b, float), return_inverse=True)
    table = np.zeros((x.max() + 1, y.max() + 1))
    np.add.at(table, (x, y), 1)  # table[i, j]：a 排第 i、b 排第 j 的有几个
    below = np.zeros_like(table)  # 两样都更大的有几个
    below[:-1, :-1] = table[::-1, ::-1].cumsum(0).cumsum(1)[::-1, ::-1][1:, 1:]
    across = np.zeros_like(table)  # a 更大而 b 更小的有几个
    across[:-1, 1:] = table[::-1].cumsum(0).cumsum(1)[::-1][1:, :-1]
    same, opposite = (table * below).sum(), (table * across).sum()
    n = len(x)
    pairs = n * (n - 1) / 2
    tied_a = sum(count * (count - 1) / 2 for count in table.sum(1))
    tied_b = sum(count * (count - 1) / 2 for count in table.sum(0))
    size = np.sqrt((pairs - tied_a) * (pairs - tied_b))
    return float((same - opposite) / size) if size else float("nan")
