"""pass@k：写 k 份答案，至少一份通过的概率。怎样估、估得偏不偏、区间盖不盖得住。

一道题写了 n 份，过了 c 份。从 n 份里随手取 k 份，一份也没过的取法有 C(n−c, k) 种：

    pass@k = 1 − C(n−c, k) / C(n, k)            （Chen et al. 2021）

它是无偏的：c 服从二项分布时，期望正好是 1 − (1−p)^k。直接代 1 − (1−c/n)^k，期望偏低，因为 (1−x)^k 是下凸的（Jensen）。
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from nlp_common.base.intervals import Interval, Z, mean_interval, proportion_interval

DRAWS = 2000


def pass_at_k(n: int, c: int, k: int) -> float:
    """n 份里过了 c 份：随手取 k 份，至少一份过了的概率。"""
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"要 0 ≤ c ≤ n、1 ≤ k ≤ n，给的是 n={n}、c={c}、k={k}。")
    if n - c < k:
        return 1.0  # 没过的不够 k 份，怎么取都有过的
    missed = 1.0
    for i in range(n - c + 1, n + 1):  # C(n−c, k) / C(n, k)，一项项地乘，不算大的阶乘
        missed *= 1.0 - k / i
    return 1.0 - missed


def naive_pass_at_k(n: int, c: int, k: int) -> float:
    """常见的错法：把 c/n 当成真的概率代进去。"""
    return 1.0 - (1.0 - c / n) ** k


def true_pass_at_k(chances: Sequence[float], k: int) -> float:
    """知道每道题做对的概率时，真正的 pass@k。"""
    return float(np.mean(1.0 - (1.0 - np.asarray(chances)) ** k))


# ---------------------------------------------------------------- 区间


def same_tasks_interval(
    counts: Sequence[tuple[int, int]], k: int, seed: int = 0, draws: int = DRAWS
) -> Interval:
    """题不变，每道题的 n 份答案再写一遍会晃多少：题内重抽得标准误，放在无偏的值两边。不说换一批题会怎样。

    不直接用重抽的分位点：重抽是把 c/n 当真的概率，k 大时整个偏低，与 naive_pass_at_k 错在同一处。
    """
    rng = np.random.default_rng(seed)
    again = np.zeros(draws)
    for n, c in counts:
        table = np.array([pass_at_k(n, each, k) for each in range(n + 1)])
        again += table[rng.binomial(n, c / n, size=draws)]
    again /= len(counts)
    value = float(np.mean([pass_at_k(n, c, k) for n, c in counts]))
    stderr = float(again.std(ddof=1))
    return Interval(value, max(0.0, value - Z * stderr), min(1.0, value + Z * stderr), stderr, len(counts))


def pooled_interval(passed: np.ndarray, n: int, k: int) -> Interval:
    """错的：把 n × tasks 份答案当成那么多道题（k > 1 时，当成 n // k × tasks 组），好像同一道题的几份互不相干。"""
    groups = n // k * len(passed)
    value = float(np.mean([pass_at_k(n, int(c), k) for c in passed]))
    return proportion_interval(round(value * groups), groups)


# ---------------------------------------------------------------- 精确的偏差


def beta_binomial(n: int, a: float, b: float) -> np.ndarray:
    """每题的概率 ~ Beta(a, b)，写 n 份，过 c 份的概率，(n+1,)。"""
    logs = [
        math.lgamma(n + 1) - math.lgamma(c + 1) - math.lgamma(n - c + 1) + log_beta(a + c, b + n - c)
        for c in range(n + 1)
    ]
    return np.exp(np.array(logs) - log_beta(a, b))


def log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def population_pass_at_k(a: float, b: float, k: int) -> float:
    """所有这样的题上的 pass@k：1 − E(1−p)^k。"""
    return 1.0 - math.exp(log_beta(a, b + k) - log_beta(a, b))


def bias_table(a: float, b: float, ks: Sequence[int], ns: Sequence[int] = (5, 10, 20, 50, 100)) -> dict:
    """两种估计的期望，对 c 的分布精确求和：``{n: {k: {true, unbiased, naive}}}``。"""
    table: dict = {}
    for n in ns:
        weights = beta_binomial(n, a, b)
        table[str(n)] = {
            str(k): {
                "true": population_pass_at_k(a, b, k),
                "unbiased": float(sum(w * pass_at_k(n, c, k) for c, w in enumerate(weights))),
                "naive": float(sum(w * naive_pass_at_k(n, c, k) for c, w in enumerate(weights))),
            }
            for k in ks
            if k <= n
        }
    return table


# ---------------------------------------------------------------- 区间盖得住吗


def coverage(a: float, b: float, tasks: int, n: int, k: int, seed: int = 0, repeats: int = 400) -> dict:
    """许多次模拟里，95 % 区间盖住真值的比例。

    new_tasks：按题重抽，问的是所有这样的题；every_sample：把 n × tasks 份答案当成那么多道题；
    same_tasks：题内重抽，问的是就这几道题；same_tasks_by_items：按题重抽去问就这几道题，太宽。
    """
    rng = np.random.default_rng(seed)
    everywhere = population_pass_at_k(a, b, k)
    hits = dict.fromkeys(("new_tasks", "every_sample", "same_tasks", "same_tasks_by_items"), 0)
    for repeat in range(repeats):
        chances = rng.beta(a, b, size=tasks)
        passed = rng.binomial(n, chances)
        here = true_pass_at_k(chances, k)
        by_items = mean_interval([pass_at_k(n, int(c), k) for c in passed], repeat, 500)
        within = same_tasks_interval([(n, int(c)) for c in passed], k, repeat, 500)
        pooled = pooled_interval(passed, n, k)
        hits["new_tasks"] += by_items.low <= everywhere <= by_items.high
        hits["every_sample"] += pooled.low <= everywhere <= pooled.high
        hits["same_tasks"] += within.low <= here <= within.high
        hits["same_tasks_by_items"] += by_items.low <= here <= by_items.high
    return {name: count / repeats for name, count in hits.items()}
