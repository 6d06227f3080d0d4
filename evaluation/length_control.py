"""长度控制的胜率（AlpacaEval 2，Dubois et al. 2024, arXiv 2404.04475）：假如两边一样长，会赢多少？

评判偏爱长的回答，于是写得长就赢得多。做法：拿"赢没赢"对"长多少"做逻辑回归，

    P(甲胜) = σ(θ + φ·x)，   x = tanh(长度差 / 长度差的标准差)

再把长度那一项去掉：长度控制的胜率 = σ(θ)。原文还有一项"这道题有多难"，要许多模型一起拟合，这里没有。
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nlp_common.base.intervals import Interval

RIDGE = 0.01  # 场场都赢时 θ 没有有限的解：一点点往 0 拉的力（相当于标准差 10 的先验）


def sigmoid(x: np.ndarray | float) -> np.ndarray:
    return 0.5 * (1 + np.tanh(np.asarray(x) / 2))  # 很大很小的 x 也不溢出


def fit_logistic(
    features: np.ndarray, wins: np.ndarray, ridge: float = RIDGE, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """逻辑回归：features (n, d)，wins (n,) 是 0 到 1（平是 0.5）→ (系数 (d,)，标准误 (d,))。牛顿法。

    最小化 Σ weights·交叉熵 + ridge/2·‖系数‖²。
    """
    weights = np.ones(len(wins)) if weights is None else weights
    beta = np.zeros(features.shape[1])
    for _ in range(100):
        chance = sigmoid(features @ beta)  # (n,)
        slope = features.T @ (weights * (wins - chance)) - ridge * beta
        curve = (features * (weights * chance * (1 - chance))[:, None]).T @ features
        curve += ridge * np.eye(len(beta))
        step = np.linalg.lstsq(curve, slope, rcond=None)[0]
        step *= min(1.0, 5 / max(np.abs(step).max(), 1e-300))  # 一步不走太远
        beta = beta + step
        if np.abs(step).max() < 1e-10:
            break
    return beta, np.sqrt(np.diag(np.linalg.pinv(curve)))


def length_term(ours: Sequence[float], theirs: Sequence[float]) -> np.ndarray:
    """各题的 x (n,)；每道题的长度差都一样时（标准差 0）是 0：看不出长度的作用。"""
    gap = np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)
    spread = gap.std()
    return np.tanh(gap / spread) if spread > 0 else np.zeros(len(gap))


def controlled(wins: np.ndarray, x: np.ndarray, weights: np.ndarray | None = None) -> tuple[float, float]:
    """→ (长度控制的胜率，长度的系数 φ)。"""
    beta, _ = fit_logistic(np.stack([np.ones(len(x)), x], 1), wins, weights=weights)
    return float(sigmoid(beta[0])), float(beta[1])


def lc_win_rate(
    wins: Sequence[float], ours: Sequence[float], theirs: Sequence[float], seed: int = 0, draws: int = 400
) -> tuple[Interval, float]:
    """wins：各题我方得几分（两种次序的平均）；ours、theirs：两边多长。→ (胜率与区间，φ)。重抽的是题。"""
    wins, x = np.asarray(wins, dtype=float), length_term(ours, theirs)
    rng = np.random.default_rng(seed)
    again = []
    for _ in range(draws):
        counts = np.bincount(rng.integers(len(wins), size=len(wins)), minlength=len(wins)).astype(float)
        again.append(controlled(wins, x, counts)[0])
    value, phi = controlled(wins, x)
    low, high = np.quantile(again, (0.025, 0.975))
    return Interval(value, float(low), float(high), float(np.std(again, ddof=1)), len(wins)), phi


# ---------------------------------------------------------------- 知道答案的模拟


def simulate(
    truth: float, n: int, rng: np.random.Generator, length: float = 1.2, longer: float = 1.45
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """n 道题：两边一样长时我方会赢 truth；我方的回答平均长 longer 倍；评判给长的加分（φ = length）。

    每道题问两次（两种次序），得分取平均。→ (得分 (n,)，我方的长度，对方的长度)。
    """
    subject = rng.normal(5.2, 0.5, n)  # 有的题本来就要答得长
    ours = np.exp(subject + rng.normal(np.log(longer), 0.35, n))
    theirs = np.exp(subject + rng.normal(0, 0.35, n))
    chance = sigmoid(np.log(truth / (1 - truth)) + length * length_term(ours, theirs))
    return rng.binomial(2, chance) / 2, ours, theirs


def recovered(truth: float, n: int, repeats: int, seed: int) -> dict[str, float]:
    """模拟 repeats 遍：原始胜率与长度控制的胜率，各自的平均与标准差。"""
    rng = np.random.default_rng(seed)
    raw, controlled_rates = [], []
    for _ in range(repeats):
        wins, ours, theirs = simulate(truth, n, rng)
        raw.append(wins.mean())
        controlled_rates.append(controlled(wins, length_term(ours, theirs))[0])
    return {
        "raw": float(np.mean(raw)),
        "raw_sd": float(np.std(raw, ddof=1)),
        "lc": float(np.mean(controlled_rates)),
        "lc_sd": float(np.std(controlled_rates, ddof=1)),
    }
