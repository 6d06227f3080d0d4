"""评判自己也要被量：三份考卷；种下位置与长度的偏见，看量不量得出来。"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from judges import POINTS, A, Ask, B, Verdict, both_ways, points_of, quality
from length_control import fit_logistic, sigmoid
from nlp_common.base.intervals import Interval, mean_interval
from nlp_common.tiny.world import WORLD

SKILL = 4.0  # 种了偏见的评判也看得出好坏：质量差 1，对数胜算多 4

# ---------------------------------------------------------------- 1. 考卷：知道不偏心的评判会怎样说


def papers(questions: Sequence[dict]) -> dict[str, list[Ask]]:
    """三份考卷，都只用第一问：

    - right：对的与错的，只差答案那个词。该选第一个。
    - same：一字不差的两份。选哪个都是看位置。
    - wordy：同样对，第一个翻来覆去说了三遍。更常选它，就是看长短。
    """
    found: dict[str, list[Ask]] = {"right": [], "same": [], "wordy": []}
    for question in questions:
        turn = question["turns"][0]
        words = WORLD[turn["slot"]]
        another = words[(words.index(turn["answer"]) + 1) % len(words)]
        good = turn["sentence"]
        wordy = f"{good}。我把故事从头到尾又看了一遍，仔细想过了，{good}。是的，我可以肯定，{good}"
        found["right"].append(Ask(question, 0, (good,), (good.replace(turn["answer"], another),)))
        found["same"].append(Ask(question, 0, (good,), (good,)))
        found["wordy"].append(Ask(question, 0, (wordy,), (good,)))
    return found


def exam(questions: Sequence[dict], judge_them: Callable[[list[Ask]], list[Verdict]], seed: int) -> dict:
    """考一个评判：``{考卷: Interval 或 None}``。right、wordy 是第一个（对的、啰嗦的）得分；same 是排在前面的得分。

    平均两种次序，所以 right 与 wordy 不受位置影响；None 是一个结论也没有。
    """
    found: dict[str, Interval | None] = {}
    for name, asks in papers(questions).items():
        verdicts = both_ways(asks, judge_them)
        of = first_points if name == "same" else points_of
        points = [value for value in map(of, verdicts) if value is not None]
        found[name] = mean_interval(points, seed) if points else None
    return found


def first_points(verdicts: tuple[Verdict, Verdict]) -> float | None:
    """两次里排在前面的平均得几分：不看位置就是 0.5。"""
    there, back = verdicts
    return None if there is None or back is None else (POINTS[there] + POINTS[back]) / 2


# ---------------------------------------------------------------- 2. 种下偏见


def biased_judge(
    asks: list[Ask], position: float, length: float, spread: float, rng: np.random.Generator
) -> list[Verdict]:
    """P(说 A) = σ(SKILL·质量差 + position + length·tanh(长度差 / spread))。从不说平。"""
    design = features(asks, spread) @ [SKILL, position, length]  # (n,)
    return [A if rng.random() < chance else B for chance in sigmoid(design)]


def features(asks: list[Ask], spread: float) -> np.ndarray:
    """每次评判三个数 (n, 3)：质量差、1（谁排在前面）、长度差。"""
    rows = []
    for ask in asks:
        better = quality(ask, "first") - quality(ask, "second")
        rows.append((better, 1.0, np.tanh(length_gap(ask) / spread)))
    return np.array(rows)


def length_gap(ask: Ask) -> int:
    """第一个比第二个多几个字。"""
    return len(ask.first[ask.turn]) - len(ask.second[ask.turn])


# ---------------------------------------------------------------- 3. 再把它量出来


def rows_of(
    asks: list[Ask], verdicts: list[tuple[Verdict, Verdict]], spread: float
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """有结论的每一次评判一行：→ (三个数 (n, 3)，说 A 得几分 (n,)，是哪道题)。"""
    rows, wins, owner = [], [], []
    both = np.concatenate([features(asks, spread), features([ask.turned() for ask in asks], spread)])
    for place, pair in enumerate(verdicts):
        for half, verdict in enumerate(pair):
            if verdict is not None:
                rows.append(both[place + half * len(asks)])
                wins.append(POINTS[verdict])
                owner.append(asks[place].question["id"])
    return np.array(rows), np.array(wins), owner


def find_bias(
    asks: list[Ask], verdicts: list[tuple[Verdict, Verdict]], spread: float, seed: int = 0, draws: int = 200
) -> dict[str, Interval]:
    """逻辑回归：说没说 A，对质量差、位置、长度差 → 三个系数与区间。

    同一道题的各次评判不是互不相干的，所以重抽的是题。要知道质量差：不放进去，"长而且好"就都记在长度的账上。
    """
    x, y, owner = rows_of(asks, verdicts, spread)
    names, group = np.unique(owner, return_inverse=True)  # 每一行是第几道题的
    rng = np.random.default_rng(seed)
    again = []
    for _ in range(draws):
        counts = np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names))
        again.append(fit_logistic(x, y, weights=counts[group].astype(float))[0])
    values = fit_logistic(x, y)[0]
    low, high = np.quantile(again, (0.025, 0.975), axis=0)
    spreads = np.std(again, axis=0, ddof=1)
    return {
        name: Interval(*map(float, (values[i], low[i], high[i], spreads[i])), len(names))
        for i, name in enumerate(("quality", "position", "length"))
    }


def win_rate_without_bias(asks: list[Ask], verdicts: list[tuple[Verdict, Verdict]], spread: float) -> float:
    """知道质量差的长度控制：三项一起拟合，只去掉位置与长度，质量差留着，再对各题平均。"""
    x, y, _ = rows_of(asks, verdicts, spread)
    beta, _ = fit_logistic(x, y)
    return float(sigmoid(features(asks, spread)[:, 0] * beta[0]).mean())


@dataclass(frozen=True)
class Planted:
    """种下的偏见；0 是没有。"""

    position: float
    length: float


def plant_and_find(
    asks: list[Ask], planted: Planted, spread: float, seed: int, draws: int = 200
) -> tuple[dict[str, Interval], list[tuple[Verdict, Verdict]]]:
    """种下，再量：→ (三个系数，各次的结论)。"""
    judge_them = partial(
        biased_judge,
        position=planted.position,
        length=planted.length,
        spread=spread,
        rng=np.random.default_rng([seed, 1]),  # 与重抽用的随机数分开
    )
    verdicts = both_ways(asks, judge_them)
    return find_bias(asks, verdicts, spread, seed, draws), verdicts


def coverage(asks: list[Ask], planted: Planted, spread: float, seed: int, repeats: int) -> dict[str, float]:
    """种 repeats 遍，95 % 区间盖住种下的数的有多少；每一遍重抽 60 次就够。"""
    hits = {"position": 0, "length": 0}
    for repeat in range(repeats):
        found, _ = plant_and_find(asks, planted, spread, seed + 1 + repeat, draws=60)
        for name in hits:
            low = found[name].value - 1.96 * found[name].stderr
            high = found[name].value + 1.96 * found[name].stderr
            hits[name] += low <= getattr(planted, name) <= high
    return {name: count / repeats for name, count in hits.items()}
