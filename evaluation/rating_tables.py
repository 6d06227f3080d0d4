"""人工打分表：读进来（宽的、长的两种），算一致性，看谁与大家不一样；自带一张造出来的例子。

宽的：一样东西一行，一个人一栏 ``item,甲,乙,丙``；长的：一个分一行 ``item,rater,rating``。空格子是没有打分。
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path

import agreement as ag
from nlp_common.base.errors import UserError
from nlp_common.base.intervals import statistic_interval
from nlp_common.data.files import row_place
from nlp_common.data.rows import read_rows

ITEM, RATER, RATING = (
    ("item", "id", "编号", "题"),
    ("rater", "annotator", "评分人"),
    ("rating", "score", "分"),
)


@dataclass
class Ratings:
    """raters 是各人的名字；rows[i] 是第 i 样东西的分，次序同 raters，缺的是 None；order 是各级从低到高。

    level：分能当什么用。nominal 只分得出一样不一样，ordinal 有高低，interval 还能相减。
    """

    raters: list[str]
    rows: list[list]
    order: list
    level: str


def read_ratings(path: str, order: str | None = None) -> Ratings:
    """读一张打分表。order 是 ``差,中,好`` 这样从低到高的各级；没给，分就要是数（不是数就只算名目的）。"""
    rows = read_rows(path).rows
    columns = [str(name) for name in dict.fromkeys(name for row in rows for name in row)]
    item = _one_of(columns, ITEM)
    rater, rating = _one_of(columns, RATER), _one_of(columns, RATING)
    if rater and rating:
        raters, table = _from_long(path, rows, item, rater, rating)
    else:
        raters = [name for name in columns if name != item]
        table = [[_value(row.get(name)) for name in raters] for row in rows]
    if len(raters) < 2:
        raise UserError(f"{path} 里只有 {len(raters)} 个人打分：至少要两个。{FORMS}")
    scored = [rating] if rater and rating else raters  # 放着分的栏
    levels = sorted({value for row in table for value in row if value is not None})
    if not levels:
        raise UserError(f"{path} 里一个分也没有。{FORMS}")
    level = "nominal"
    numbers = [_number(value) for value in levels]
    if order:
        level = "ordinal"
        levels = [part.strip() for part in order.replace("，", ",").split(",")]
        check_known(path, rows, set(levels), f"不在 --order {order} 里", scored)
    elif all(number is not None for number in numbers):
        level = "interval"
        table = [[None if value is None else _number(value) for value in row] for row in table]
        levels = sorted({number for number in numbers if number is not None})  # "3" 与 "3.0" 是同一级
    elif any(number is not None for number in numbers):
        known = {text for text, number in zip(levels, numbers, strict=True) if number is not None}
        fault = "不是数，别的分是数：写错了就改，不是打分的栏就删去，分本来就是字就用 --order 写出各级"
        check_known(path, rows, known, fault, scored)
    if not any(sum(value is not None for value in row) > 1 for row in table):
        raise UserError(f"{path} 里没有一样东西有两个人打分：无从比较。{FORMS}")
    return Ratings(raters, table, levels, level)


def check_known(path: str, rows: list[dict], known: set, fault: str, columns: Sequence[str]) -> None:
    """columns 这几栏里的每个分都在 known 里；不在的是 UserError，说出第几行、哪一栏。"""
    for place, row in enumerate(rows):
        for name in columns:
            value = _value(row.get(name))
            if value is not None and value not in known:
                where = row_place(Path(path).expanduser(), place)
                raise UserError(f"{path} {where}的 {name} 是 {value!r}，{fault}。")


FORMS = "表要写成 item,甲,乙,丙（一个人一栏），或 item,rater,rating（一个分一行）。"


def _one_of(columns: list[str], names: tuple[str, ...]) -> str | None:
    return next((column for column in columns if column.lower() in names), None)


def _value(cell: object) -> str | None:
    text = "" if cell is None else str(cell).strip()
    return text or None


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if number == number and abs(number) != float("inf") else None


def _from_long(
    path: str, rows: list[dict], item: str | None, rater: str, rating: str
) -> tuple[list[str], list[list]]:
    if item is None:
        raise UserError(f"{path} 有 {rater} 与 {rating}，没有 item：不知道每个分打的是哪一样。{FORMS}")
    scores: dict[str, dict[str, str]] = {}
    raters: list[str] = []
    for place, row in enumerate(rows):
        thing, who, value = _value(row.get(item)), _value(row.get(rater)), _value(row.get(rating))
        if thing is None or who is None:
            where = row_place(Path(path).expanduser(), place)
            raise UserError(f"{path} {where}的 {item if thing is None else rater} 是空的。")
        if who in scores.setdefault(thing, {}):
            where = row_place(Path(path).expanduser(), place)
            raise UserError(f"{path} {where}：{who} 给 {thing} 打过分了，一个人一样东西只能打一次。")
        if who not in raters:
            raters.append(who)
        if value is not None:
            scores[thing][who] = value
    return raters, [[scores[thing].get(who) for who in raters] for thing in scores]


# ---------------------------------------------------------------- 一致性


def alpha_of(rows: Sequence[Sequence], level: str, order: Sequence) -> float:
    return ag.krippendorff_alpha(rows, level, order)


def kappa_of(pairs: Sequence[tuple], weights: str | None, order: Sequence) -> float:
    return ag.cohen_kappa([a for a, _ in pairs], [b for _, b in pairs], weights, order)


def agreement_table(ratings: Ratings, seed: int = 0, draws: int = 200) -> dict:
    """一张表的全部一致性，α 与 κ 带区间（重抽的是东西）：

    ``{"alpha": {…}, "fleiss", "pairs": {"甲-乙": {…}}, "without": {"甲": 去掉这个人之后的 α}}``
    """
    levels = ag.LEVELS[: ag.LEVELS.index(ratings.level) + 1]
    best = "ordinal" if "ordinal" in levels else "nominal"
    found: dict = {"alpha": {}, "pairs": {}, "without": {}}
    for level in levels:
        statistic = partial(alpha_of, level=level, order=ratings.order)
        found["alpha"][level] = statistic_interval(ratings.rows, statistic, seed, draws)
    complete = [row for row in ratings.rows if None not in row]
    if len(complete) == len(ratings.rows):
        found["fleiss"] = ag.fleiss_kappa(ag.counts_of(complete, ratings.order))
    for first, second in combinations(range(len(ratings.raters)), 2):
        both = [(r[first], r[second]) for r in ratings.rows if r[first] is not None and r[second] is not None]
        if len(both) < 2:
            continue
        pair: dict = {"n": len(both), "agreement": sum(a == b for a, b in both) / len(both)}
        for name, weights in (("kappa", None), ("kappa_linear", "linear"), ("kappa_quadratic", "quadratic")):
            if weights is None or best == "ordinal":
                statistic = partial(kappa_of, weights=weights, order=ratings.order)
                pair[name] = statistic_interval(both, statistic, seed, draws)
        pair["ac1"] = ag.gwet_ac1([a for a, _ in both], [b for _, b in both])
        found["pairs"][f"{ratings.raters[first]}-{ratings.raters[second]}"] = pair
    if len(ratings.raters) > 2:
        for place, name in enumerate(ratings.raters):
            rest = [row[:place] + row[place + 1 :] for row in ratings.rows]
            found["without"][name] = ag.krippendorff_alpha(rest, best, ratings.order)
    return found


# ---------------------------------------------------------------- 自带的例子


def example_ratings(n: int, seed: int) -> Ratings:
    """造一张表：n 个回答，真的好坏是 1–5；两个人看得准，一个人手紧（常低一级），一个人随手打；一成没有打。"""
    rng = random.Random(f"ratings-{seed}")
    raters = ["careful_1", "careful_2", "strict", "random"]
    rows: list[list] = []
    for _ in range(n):
        truth = rng.randint(1, 5)
        row: list = []
        for who in raters:
            rating = truth + rng.choices([-1, 0, 1], [0.12, 0.76, 0.12])[0]
            if who == "strict" and rng.random() < 0.8:
                rating -= 1
            if who == "random":
                rating = rng.randint(1, 5)
            row.append(None if rng.random() < 0.1 else min(5, max(1, rating)))
        rows.append(row)
    return Ratings(raters, rows, [1, 2, 3, 4, 5], "interval")


def paradox_table(prevalence: float, accuracy: float) -> dict[str, float]:
    """两个人各自判对的概率都是 accuracy，好的占 prevalence：期望的一致、κ、AC1（精确算，不抽样）。

    两个人一样仔细，一致的比例与 prevalence 无关；κ 却随它往下掉（Feinstein & Cicchetti 1990）。
    """
    both_good = prevalence * accuracy**2 + (1 - prevalence) * (1 - accuracy) ** 2
    both_bad = (1 - prevalence) * accuracy**2 + prevalence * (1 - accuracy) ** 2
    agreed = both_good + both_bad
    good = prevalence * accuracy + (1 - prevalence) * (1 - accuracy)  # 一个人说"好"的比例
    chance = good**2 + (1 - good) ** 2
    chance_ac1 = 2 * good * (1 - good)
    return {
        "agreement": agreed,
        "kappa": (agreed - chance) / (1 - chance),
        "ac1": (agreed - chance_ac1) / (1 - chance_ac1),
    }
