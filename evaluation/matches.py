"""一对模型的全部评判：出题给评判、记下结论、按题归好。"""

from __future__ import annotations

from dataclasses import dataclass

from judges import Ask, points_of, quality


@dataclass
class Match:
    """一对模型的全部评判：asks[i] 的第一个是 a；points[i] 是 a 两种次序平均得几分，None 是没有结论。"""

    a: str
    b: str
    asks: list[Ask]
    verdicts: list[tuple]

    @property
    def points(self) -> list[float | None]:
        return [points_of(pair) for pair in self.verdicts]

    def by_question(self) -> dict[str, float]:
        """{题: a 的得分，各轮平均}，没有结论的不在里面。"""
        found: dict[str, list[float]] = {}
        for ask, points in zip(self.asks, self.points, strict=True):
            if points is not None:
                found.setdefault(ask.question["id"], []).append(points)
        return {name: sum(each) / len(each) for name, each in found.items()}


def make_asks(questions: list[dict], ours: list[list[dict]], theirs: list[list[dict]]) -> list[Ask]:
    asks = []
    for question, first, second in zip(questions, ours, theirs, strict=True):
        for turn in range(len(question["turns"])):
            texts = [tuple(reply["text"] for reply in side[: turn + 1]) for side in (first, second)]
            asks.append(Ask(question, turn, *texts, first[turn]["ended"], second[turn]["ended"]))
    return asks


def games_by_question(matches: list[Match], names: list[str]) -> list[list[tuple[int, int, float]]]:
    """同一道题的对局（几对模型、几轮）放在一组。"""
    groups: dict[str, list] = {}
    for match in matches:
        a, b = names.index(match.a), names.index(match.b)
        for ask, points in zip(match.asks, match.points, strict=True):
            if points is not None:
                groups.setdefault(ask.question["id"], []).append((a, b, points))
    return list(groups.values())


def turn_quality(question: dict, replies: list[dict], turn: int) -> float:
    """一个回答的程序分。"""
    texts = tuple(reply["text"] for reply in replies[: turn + 1])
    return quality(Ask(question, turn, texts, texts, replies[turn]["ended"]), "first")
