"""data_bias.py：比例手算，检验对照 scipy，偏的标注员找得出来、不偏的不冤枉，少留了的种类提醒。"""

import random

import pytest

from data_bias import (
    biased_annotators,
    binomial_tail,
    coverage,
    kind_of_row,
    length_bias,
    more_often,
    position_bias,
)


def pair(chosen: str, rejected: str, **more) -> dict:
    return {
        "prompt": [{"role": "user", "content": "问"}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        **more,
    }


def test_length_and_position_by_hand():
    pairs = [pair("长长", "短", shown_first="chosen"), pair("短", "长长", shown_first="chosen"),
             pair("长长长", "短", shown_first="rejected"), pair("同", "样")]  # fmt: skip
    length, position = length_bias(pairs), position_bias(pairs)
    assert (length["n"], length["longer_chosen"], length["chosen_chars"]) == (3, pytest.approx(2 / 3), 1.75)
    assert (position["n"], position["first_chosen"]) == (3, pytest.approx(2 / 3))
    assert length_bias([pair("同", "样")]) == {"n": 0} and position_bias([pair("长长", "短")]) == {"n": 0}


def test_tests_equal_scipy():
    stats = pytest.importorskip("scipy.stats", reason="没有装 scipy，不比")
    assert binomial_tail(60, 100) == pytest.approx(stats.binomtest(60, 100, alternative="greater").pvalue)
    exact = stats.fisher_exact([[80, 20], [300, 200]], alternative="greater").pvalue
    assert more_often(0.8, 100, 0.6, 500) == pytest.approx(exact, abs=1e-3)  # 正态近似与 Fisher 的差


@pytest.mark.parametrize("lazy", ["先看到的", "长的", ""])
def test_annotators(lazy):
    rng = random.Random(1)
    pairs = []
    for number in range(1600):
        who = f"标注员{number % 8}"
        longer, first = rng.random() < 0.6, rng.random() < 0.5
        if who == "标注员2":
            longer, first = longer or lazy == "长的", first or (lazy == "先看到的" and rng.random() < 0.5)
        answers = ("长长", "短") if longer else ("短", "长长")
        pairs.append(pair(*answers, annotator=who, shown_first="chosen" if first else "rejected"))
    found = [(row["annotator"], row["bias"]) for row in biased_annotators(pairs) if row["biased"]]
    assert found == ([("标注员2", lazy)] if lazy else [])


def test_coverage_warns_when_a_kind_is_gone():
    before = [{"kind": "问答"} for _ in range(900)] + [{"kind": "寒暄"} for _ in range(100)]
    after = before[:850] + before[900:920]
    table = {row["kind"]: row for row in coverage(before, after)}
    assert (table["寒暄"]["before"], table["寒暄"]["after"], table["寒暄"]["kept"]) == (100, 20, 0.2)
    assert table["寒暄"]["fewer"] and not table["问答"]["fewer"]


@pytest.mark.parametrize(
    ("asked", "kind"),
    [("把这句话翻译成英文", "翻译"), ("写一个排序的函数", "代码"), ("计算 3+5", "数学"), ("给下文写摘要", "摘要"),
     ("为什么天是蓝的", "问答"), ("嗯", "其他")],
)  # fmt: skip
def test_kind_is_guessed_from_the_question(asked, kind):
    assert kind_of_row({"messages": [{"role": "user", "content": asked}]}) == kind
    assert kind_of_row({"category": "自己的", "messages": []}) == "自己的"
