"""一问一答 → 指令数据：分成训练与留出（同一件事只在一边），套上提示的模板，写成 SFT 脚本读的行。"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace

from minhash import find_duplicates
from qa_rules import Pair
from row_checks import normal, stands_in

# 提示的模板：open 是开卷（给出那一段），closed 是闭卷（只有问题，答案要在权重里）。轮流用，模型才不认死一种。
OPEN = ("{passage}\n{question}", "资料：{passage}\n问题：{question}")
CLOSED = ("{question}", "请问，{question}")
SAME = 0.7  # 两份文档的字有这么像（Jaccard），就当是同一份


# ---------------------------------------------------------------- 1. 分开：按文档，不按行


def groups_of(texts: Sequence[str]) -> list[int]:
    """每份文档属于第几组：几乎一样的（改名另存、换了格式）在一组，要去同一边。"""
    group = list(range(len(texts)))
    for dropped, kept, _ in find_duplicates(texts, threshold=SAME):
        group[dropped] = group[kept]
    return group


def heldout_documents(names: Sequence[str], groups: Sequence[int], share: float, seed: int) -> set[str]:
    """留出哪几份文档：打乱各组，一组一组地拿，拿到 share 为止；两边都至少留一组。"""
    order = sorted(set(groups))
    random.Random(f"split-{seed}").shuffle(order)
    n = min(max(1, round(share * len(order))), len(order) - 1)
    chosen = set(order[:n])
    return {name for name, group in zip(names, groups, strict=True) if group in chosen}


def by_rows(pairs: Sequence[Pair], share: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """错的分法，用来比：不管文档，一行一行地随机分。"""
    order = list(range(len(pairs)))
    random.Random(f"rows-{seed}").shuffle(order)
    heldout = set(order[: round(share * len(order))])
    train = [pair for number, pair in enumerate(pairs) if number not in heldout]
    return train, [pair for number, pair in enumerate(pairs) if number in heldout]


def by_documents(pairs: Sequence[Pair], heldout: set[str]) -> tuple[list[Pair], list[Pair]]:
    train = [pair for pair in pairs if pair.document not in heldout]
    return train, [pair for pair in pairs if pair.document in heldout]


def leaked(train: Iterable[Pair], heldout: Iterable[Pair]) -> float:
    """留出的行里，同一件事（同一问）训练的行里也有的比例。"""
    seen = {normal(pair.questions[0]) for pair in train}
    found = [normal(pair.questions[0]) in seen for pair in heldout]
    return sum(found) / max(1, len(found))


def distinct(pairs: Sequence[Pair]) -> list[Pair]:
    """同一问只留一个：重复的文档里出的题是重复的。"""
    return list({normal(pair.questions[0]): pair for pair in reversed(pairs)}.values())[::-1]


# ---------------------------------------------------------------- 2. 套模板


def wordings(pair: Pair) -> tuple[str, ...]:
    """教的几种问法：最后一种不教，留着考；只有一种就教它。"""
    return pair.questions[:-1] or pair.questions


def to_rows(pairs: Sequence[Pair], closed: bool = True, swap: bool = False, seed: int = 0) -> list[dict]:
    """每一问：每种教的问法，开卷一行；closed 时再加闭卷一行；swap 时再加换了答案的开卷一行，见 swapped。"""
    rows, rng = [], random.Random(f"swap-{seed}")
    answers: dict[str, set[str]] = {}
    for pair in pairs:
        answers.setdefault(asks_what(pair), set()).add(pair.answer)
    for number, pair in enumerate(pairs):
        other = answers[asks_what(pair)]
        for place, question in enumerate(wordings(pair)):
            turn = (number + place) % len(OPEN)
            rows.append(row(pair, OPEN[turn], question, "open"))
            if closed:
                rows.append(row(pair, CLOSED[turn], question, "closed"))
            if swap and (changed := swapped(pair, other, rng)):
                rows.append(row(changed, OPEN[turn - 1], question, "swapped"))
    return rows


def asks_what(pair: Pair) -> str:
    """问的是哪件事：去掉了说的是谁。同一件事的答案可以互相换。"""
    return pair.questions[0].replace(pair.subject, "")


def swapped(pair: Pair, answers: set[str], rng: random.Random) -> Pair | None:
    """那一段和回答里的答案一起换成别人的：照记着的答就错，只有读了才对。换不干净的是 None。

    不换，教过的文档读不读都答得对：模型记住了闭卷的答案，就不必读那一段；没见过的文档，它没有学会读。
    """
    others = sorted(other for other in answers if other not in pair.passage and pair.answer not in other)
    if not others or pair.passage.count(pair.answer) != 1 or pair.said.count(pair.answer) != 1:
        return None
    other = rng.choice(others)
    changed = {
        name: getattr(pair, name).replace(pair.answer, other) for name in ("passage", "said", "evidence")
    }
    return replace(pair, answer=other, **changed)


def row(pair: Pair, template: str, question: str, book: str) -> dict:
    asked = template.format(passage=pair.passage, question=question)
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": pair.said}]
    more = {"document": pair.document, "rule": pair.rule, "book": book, "answer": pair.answer}
    return {"messages": turns, **more}


# ---------------------------------------------------------------- 3. 考


def exam_of(pairs: Sequence[Pair], book: str, other_wording: bool) -> list[dict]:
    """考题：教过的头一种问法，或没有教过的那一种。"""
    template = OPEN[0] if book == "open" else CLOSED[0]
    place = -1 if other_wording else 0
    return [
        {"messages": row(pair, template, pair.questions[place], book)["messages"][:1], "pair": pair}
        for pair in pairs
    ]


def is_right(reply: dict, pair: Pair, others: set[str]) -> bool:
    """自己说完了，有标准答案，没有同一类题的别的答案（others）。"""
    text = reply["text"]
    wrong = [other for other in others if stands_in(other, text) and not stands_in(other, pair.said)]
    return reply["ended"] and stands_in(pair.answer, text) and not wrong
