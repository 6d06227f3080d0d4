"""每个分数都要说 n 和区间：一个比例、一组分数的均值、任意一个统计量、两个模型在同样的题上的差。

只报一个数，看不出差 0.02 是真的好还是换一批题就没了。这里的区间都是 95 %。
bootstrap：从手里的题有放回地重抽许多次，看统计量晃动多大（Efron 1979）。
成对：两个模型答同样的题，难题两边都难，相减就抵消了，所以差的区间比各自的窄（Miller 2024, arXiv 2411.00640）。
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

Z = 1.959964  # 标准正态分布的 97.5 % 分位点
DRAWS = 2000  # 重抽几次


@dataclass(frozen=True)
class Interval:
    """一个分数：值、95 % 区间、标准误、由几道题得来。"""

    value: float
    low: float
    high: float
    stderr: float
    n: int

    def text(self, digits: int = 3) -> str:
        if self.low is None or math.isnan(self.low):  # 结果文件里，算不出来的是 null
            return f"{self.value:.{digits}f}（区间算不出来，n={self.n}）"
        return f"{self.value:.{digits}f}（{self.low:.{digits}f}–{self.high:.{digits}f}，n={self.n}）"

    @property
    def is_sure(self) -> bool:
        """区间不含 0：这个差不是碰巧。"""
        return self.low > 0 or self.high < 0


def mean_interval(values: Sequence[float], seed: int = 0, draws: int = DRAWS) -> Interval:
    """一组分数的均值。分数不是 0 就是 1 的（对错），区间是 Wilson 的；别的由 bootstrap 得来。没有分数是 ValueError。

    对错不用 bootstrap：全对的题重抽多少次也是全对，它会说"1.000–1.000"，而 20 道全对，真的正确率可能只有 0.84。
    """
    scores = np.asarray(values, dtype=float)  # (n,)
    if not np.isin(scores, (0.0, 1.0)).all():
        return bootstrap_interval(values, seed, draws)
    if not len(scores):
        raise ValueError("一个分数也没有，算不了均值。")
    wilson = proportion_interval(int(scores.sum()), len(scores))
    return replace(wilson, stderr=_stderr(scores))


def bootstrap_interval(values: Sequence[float], seed: int = 0, draws: int = DRAWS) -> Interval:
    """一组数的均值，区间由 bootstrap 得来。没有数是 ValueError。"""
    scores = np.asarray(values, dtype=float)  # (n,)
    if not len(scores):
        raise ValueError("一个分数也没有，算不了均值。")
    means = _resampled_means(scores, seed, draws)
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(float(scores.mean()), float(low), float(high), _stderr(scores), len(scores))


def _stderr(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else float("nan")


def _resampled_means(values: np.ndarray, seed: int, draws: int) -> np.ndarray:
    """重抽 draws 次的均值 (draws,)；一次抽一批，题多时也不占许多内存。"""
    rng = np.random.default_rng(seed)
    at_once = max(1, 2_000_000 // len(values))
    means = []
    for start in range(0, draws, at_once):
        rows = rng.integers(len(values), size=(min(at_once, draws - start), len(values)))
        means.append(values[rows].mean(1))
    return np.concatenate(means)


def proportion_interval(right: int, n: int) -> Interval:
    """n 道题答对 right 道：Wilson 区间。全对或全错时也有宽度，而 p ± 1.96·√(p(1−p)/n) 会说"正好 1"。"""
    if not 0 <= right <= n or n < 1:
        raise ValueError(f"n 道题对几道：要 0 ≤ right ≤ n、n ≥ 1，给的是 right={right}、n={n}。")
    p = right / n
    center = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return Interval(p, max(0.0, center - half), min(1.0, center + half), math.sqrt(p * (1 - p) / n), n)


def paired_difference(
    ours: Sequence[float], theirs: Sequence[float], seed: int = 0, draws: int = DRAWS
) -> Interval:
    """同样的题上，ours 的均值减 theirs 的：先一道题一道题地减，再 bootstrap。两边题数不同是 ValueError。"""
    if len(ours) != len(theirs):
        raise ValueError(f"成对比较要同样的题：一边 {len(ours)} 道，一边 {len(theirs)} 道。")
    gaps = np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)
    return bootstrap_interval(gaps.tolist(), seed, draws)


def statistic_interval(
    items: Sequence, statistic: Callable[[list], float], seed: int = 0, draws: int = 200
) -> Interval:
    """任意一个统计量（整批的 BLEU、相关系数、κ）的区间：重抽的是题，每次重算一遍。

    重抽的一批算不出来（statistic 给出 NaN，例如相关系数遇到全都一样的分数）就不算它。
    """
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(draws):
        drawn.append(statistic([items[i] for i in rng.integers(len(items), size=len(items))]))
    again = np.asarray([value for value in drawn if not math.isnan(value)])
    if len(again) < 2:
        nan = float("nan")
        return Interval(statistic(list(items)), nan, nan, nan, len(items))
    low, high = np.quantile(again, (0.025, 0.975))
    return Interval(
        float(statistic(list(items))), float(low), float(high), float(again.std(ddof=1)), len(items)
    )


def mean_of_intervals(parts: Sequence[Interval]) -> Interval:
    """几类各有各的分，不论各有几道题，直接平均（每一类一样重）；n 是总题数。

    区间由各类的区间合起来（MOVER，Zou & Donner 2008）：各类离自己的界限多远，平方相加再开方，除以类数。
    """
    if not parts:
        raise ValueError("一类也没有，算不了均值。")
    k = len(parts)
    value = sum(part.value for part in parts) / k
    below = math.sqrt(sum((part.value - part.low) ** 2 for part in parts)) / k
    above = math.sqrt(sum((part.high - part.value) ** 2 for part in parts)) / k
    stderr = math.sqrt(sum(part.stderr**2 for part in parts)) / k
    return Interval(value, value - below, value + above, stderr, sum(part.n for part in parts))
