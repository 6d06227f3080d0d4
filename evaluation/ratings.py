"""排名：Elo 一局一局地改分，Bradley–Terry 把全部对局一起算；要多少道题，两个模型的高下才确定。

一局是 ``(甲, 乙, 甲得几分)``：赢 1、平 0.5、输 0。甲、乙是模型的编号。
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import binom

from nlp_common.base.intervals import Interval

Game = tuple[int, int, float]
PER_NAT = 400 / math.log(10)  # Bradley–Terry 的强弱 → Elo 的分：差 400 分，胜算 10 : 1
START = 1000.0
PRIOR = 0.01  # 有模型场场赢（或场场输）时，强弱没有有限的解：加一点点往 0 拉的力


# ---------------------------------------------------------------- 1. Elo


def elo(games: Sequence[Game], n_models: int, k: float = 32.0) -> np.ndarray:
    """依次打完 games 之后各模型的分 (M,)。后打的几局说了算：同样的对局换个次序，分就不同。"""
    ratings = [START] * n_models
    for a, b, points in games:
        expected = 1 / (1 + 10 ** ((ratings[b] - ratings[a]) / 400))
        change = k * (points - expected)
        ratings[a] += change
        ratings[b] -= change
    return np.array(ratings)


def elo_over_orders(
    games: Sequence[Game], n_models: int, orders: int, seed: int, k: float = 32.0
) -> np.ndarray:
    """同样的对局洗 orders 次牌，各算一遍 Elo：(orders, M)。"""
    rng = np.random.default_rng(seed)
    return np.stack(
        [elo([games[i] for i in rng.permutation(len(games))], n_models, k) for _ in range(orders)]
    )


# ---------------------------------------------------------------- 2. Bradley–Terry


def win_table(games: Sequence[Game], n_models: int) -> np.ndarray:
    """(M, M)：[i, j] 是 i 从 j 手里拿到几分；平局两边各得半分。"""
    table = np.zeros((n_models, n_models))
    for a, b, points in games:
        table[a, b] += points
        table[b, a] += 1 - points
    return table


def everyone_beats_everyone(table: np.ndarray) -> bool:
    """从每个模型出发，沿着"赢过"都走得到每个别的：这时最大似然才有有限的解（Ford 1957）。"""
    reach = (table > 0) | np.eye(len(table), dtype=bool)
    for _ in range(len(table)):
        reach = (reach.astype(int) @ reach.astype(int)) > 0
    return bool(reach.all())


def bradley_terry(table: np.ndarray, prior: float = 0.0) -> np.ndarray:
    """胜负表 (M, M) → 强弱 θ (M,)，平均是 0；P(i 胜 j) = σ(θi − θj)。

    求 Σ table[i, j]·log σ(θi − θj) − prior·‖θ‖² 的最大值，牛顿法。与对局的次序无关。
    没有有限的解而 prior 是 0，是 ValueError。
    """
    if prior == 0 and not everyone_beats_everyone(table):
        raise ValueError("有模型从没赢过（或从没输过），强弱没有有限的解：给一个大于 0 的 prior。")
    games = table + table.T  # (M, M)
    theta = np.zeros(len(table))

    def objective(theta: np.ndarray) -> float:
        gap = theta[:, None] - theta[None]
        return float(-(table * np.logaddexp(0, -gap)).sum() - prior * (theta**2).sum())

    for _ in range(200):
        chance = 1 / (1 + np.exp(theta[None] - theta[:, None]))  # [i, j] = P(i 胜 j)
        slope = (table - games * chance).sum(1) - 2 * prior * theta
        weight = games * chance * (1 - chance)
        curve = np.diag(weight.sum(1)) - weight + 2 * prior * np.eye(len(theta))
        step = np.linalg.pinv(curve) @ slope  # 整体加一个数不变，所以 curve 少一个秩
        before = objective(theta)
        while objective(theta + step) < before - 1e-12 and np.abs(step).max() > 1e-12:
            step /= 2  # 走过头了
        theta = theta + step
        if np.abs(step).max() < 1e-10:
            break
    return theta - theta.mean()


def ratings(table: np.ndarray) -> np.ndarray:
    """强弱，写成 Elo 的刻度，平均 1000：(M,)。没有有限的解时加上 PRIOR。"""
    prior = 0.0 if everyone_beats_everyone(table) else PRIOR
    return START + PER_NAT * bradley_terry(table, prior)


def rating_intervals(
    groups: Sequence[Sequence[Game]], n_models: int, seed: int, draws: int = 400
) -> list[Interval]:
    """各模型的分与 95 % 区间。groups 是一组一组的对局（同一道题的在一组）：重抽的是组，不是局。

    同一道题的几局（两种次序、几对模型）不是互不相干的：当成一局一局地重抽，区间就窄得不可信。
    """
    tables = np.stack([win_table(games, n_models) for games in groups])  # (G, M, M)
    rng = np.random.default_rng(seed)
    again = []
    for _ in range(draws):
        counts = np.bincount(rng.integers(len(tables), size=len(tables)), minlength=len(tables))
        again.append(ratings(np.tensordot(counts, tables, 1)))
    again = np.stack(again)  # (draws, M)
    low, high = np.quantile(again, (0.025, 0.975), axis=0)
    values, spread = ratings(tables.sum(0)), again.std(0, ddof=1)
    return [Interval(*map(float, each), len(groups)) for each in zip(values, low, high, spread, strict=True)]


def difference_to_choix(table: np.ndarray) -> float | None:
    """与 choix 的最大似然（同一张胜负表，同样的 prior）的最大差；没有装 choix 是 None。"""
    try:
        import choix
    except ImportError:
        return None
    if everyone_beats_everyone(table):
        theirs = choix.ilsr_pairwise_dense(table, tol=1e-12)
        return float(np.abs(bradley_terry(table) - (theirs - theirs.mean())).max())
    rows = []  # 带 prior 的那个函数只认整局的胜负：都算四倍，平局就是各赢两局
    for i in range(len(table)):
        for j in range(len(table)):
            rows += [(i, j)] * round(4 * table[i, j])
    theirs = choix.opt_pairwise(len(table), rows, alpha=4 * PRIOR, method="Newton-CG", tol=1e-12)
    return float(np.abs(bradley_terry(table, PRIOR) - (theirs - theirs.mean())).max())


# ---------------------------------------------------------------- 3. 多少道题才够


def sign_test(wins: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """平的不算，赢的与输的是不是各半：双侧的二项检验，p 值。题少时也准，正态近似不准。"""
    fewer = np.minimum(wins, losses)
    return np.minimum(1.0, 2 * binom.cdf(fewer, wins + losses, 0.5))


def power_curve(
    points: Sequence[float], sizes: Sequence[int], seed: int, repeats: int = 2000
) -> dict[int, float]:
    """``{n: 抽 n 道题，p < 0.05 而且说对了谁强的机会}``。points 是各题上一方的得分（大于 0.5 是赢了这道题）。"""
    points = np.asarray(points)
    share = np.array([(points > 0.5).mean(), (points < 0.5).mean(), (points == 0.5).mean()])
    rng = np.random.default_rng(seed)
    found = {}
    for n in sizes:
        wins, losses, _ = rng.multinomial(n, share / share.sum(), size=repeats).T
        sure = sign_test(wins, losses) < 0.05
        right = (wins > losses) == (share[0] > share[1])
        found[n] = float((sure & right).mean())
    return found


def enough(curve: dict[int, float], power: float = 0.95) -> int | None:
    """曲线第一次到 power 的题数；到不了是 None。"""
    return next((n for n, chance in curve.items() if chance >= power), None)


def peeking(games: int, seed: int, repeats: int = 4000, first: int = 10) -> tuple[float, float]:
    """两个一样强的模型打 games 局：只在最后检验一次的误报，与从第 first 局起每局都看一眼、显著就停的误报。"""
    rng = np.random.default_rng(seed)
    wins = rng.integers(2, size=(repeats, games)).cumsum(1)  # (R, n)
    played = np.arange(1, games + 1)
    alarm = sign_test(wins, played - wins) < 0.05
    return float(alarm[:, -1].mean()), float(alarm[:, first - 1 :].any(1).mean())
