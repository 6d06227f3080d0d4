"""区间：手算的例子，与 scipy 的一致，覆盖率是 95 % 上下，成对的比不成对的窄。"""

import math

import numpy as np
import pytest

from nlp_common.base import intervals as iv


def test_mean_interval_equals_the_normal_one_for_many_values():
    values = np.random.default_rng(1).normal(3, 2, 4000)
    found = iv.mean_interval(values)
    half = iv.Z * values.std(ddof=1) / math.sqrt(len(values))
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.006)
    assert found.high == pytest.approx(values.mean() + half, abs=0.006)
    assert found.n == 4000


def test_same_seed_same_interval_and_one_value_has_no_width():
    values = [0, 1, 1, 0, 1]
    assert iv.mean_interval(values, seed=3) == iv.mean_interval(values, seed=3)
    single = iv.mean_interval([0.5])
    assert (single.low, single.high) == (0.5, 0.5) and math.isnan(single.stderr)
    with pytest.raises(ValueError, match="一个分数也没有"):
        iv.mean_interval([])


def test_all_right_is_not_certain():
    """对错的均值就是比例：全对也有宽度；差（可能碰巧只有 0 与 1）不是比例，仍是 bootstrap。"""
    for right, n in ((20, 20), (0, 20), (13, 20)):
        values = [1.0] * right + [0.0] * (n - right)
        found, wilson = iv.mean_interval(values), iv.proportion_interval(right, n)
        assert (found.value, found.low, found.high) == (wilson.value, wilson.low, wilson.high)
    assert iv.mean_interval([1] * 20).low == pytest.approx(0.839, abs=5e-4)
    assert iv.mean_interval([True, False]).n == 2
    assert iv.mean_interval([0.5, 1.0, 1.0]) == iv.bootstrap_interval([0.5, 1.0, 1.0])
    zeros, ones = np.zeros(10), np.array([1.0] * 9 + [0.0])
    assert iv.paired_difference(ones, zeros) == iv.bootstrap_interval(ones)


@pytest.mark.parametrize(("right", "n"), [(0, 20), (20, 20), (7, 20), (1, 1), (430, 500)])
def test_wilson_equals_scipy(right, n):
    from scipy.stats import binomtest

    found = iv.proportion_interval(right, n)
    theirs = binomtest(right, n).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=1e-7)


def test_intervals_hold_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(0)
    inside_mean = inside_wilson = 0
    for trial in range(300):
        answers = rng.random(80) < 0.7
        mean = iv.mean_interval(answers, seed=trial, draws=400)
        wilson = iv.proportion_interval(int(answers.sum()), 80)
        inside_mean += mean.low <= 0.7 <= mean.high
        inside_wilson += wilson.low <= 0.7 <= wilson.high
    assert 0.90 <= inside_mean / 300 <= 0.985
    assert 0.92 <= inside_wilson / 300 <= 0.985


def test_pairing_cancels_what_both_find_hard():
    rng = np.random.default_rng(2)
    hard = rng.normal(0, 1, 300)  # 每道题的难度，两边都有
    ours, theirs = hard + 0.1 + rng.normal(0, 0.2, 300), hard + rng.normal(0, 0.2, 300)
    paired = iv.paired_difference(ours, theirs)
    apart = math.hypot(iv.mean_interval(ours).stderr, iv.mean_interval(theirs).stderr)
    assert paired.stderr < apart / 2
    assert paired.is_sure and paired.low > 0
    with pytest.raises(ValueError, match="同样的题"):
        iv.paired_difference([1, 2], [1])


def test_statistic_interval_of_the_mean_equals_mean_interval():
    values = list(np.random.default_rng(4).normal(0, 1, 200))
    ours = iv.statistic_interval(values, lambda rows: sum(rows) / len(rows), draws=2000)
    mean = iv.mean_interval(values)
    assert ours.value == pytest.approx(mean.value)
    assert (ours.low, ours.high) == pytest.approx((mean.low, mean.high), abs=0.02)
    assert ours.stderr == pytest.approx(mean.stderr, rel=0.1)


def test_a_statistic_that_cannot_be_computed_leaves_no_interval():
    found = iv.statistic_interval([1, 1, 1], lambda rows: float("nan"))
    assert math.isnan(found.low) and found.n == 3


def test_an_interval_as_people_read_it():
    assert iv.Interval(0.5, 0.25, 0.75, 0.1, 8).text(2) == "0.50（0.25–0.75，n=8）"
    assert iv.Interval(0.5, float("nan"), float("nan"), 0.1, 8).text() == "0.500（区间算不出来，n=8）"
    assert iv.Interval(0.5, None, None, None, 8).text() == "0.500（区间算不出来，n=8）"


def test_mean_of_categories_weighs_them_alike():
    """两类，一类 10 道对 5 道，一类 1000 道全对：均值 0.75；一类的时候，就是它自己的区间。"""
    few, many = iv.proportion_interval(5, 10), iv.proportion_interval(1000, 1000)
    both = iv.mean_of_intervals([few, many])
    assert both.value == 0.75 and both.n == 1010
    assert both.low == pytest.approx(0.75 - math.hypot(few.value - few.low, 1 - many.low) / 2)
    assert both.high == pytest.approx(0.75 + (few.high - few.value) / 2)
    alone = iv.mean_of_intervals([few])
    assert (alone.low, alone.high) == pytest.approx((few.low, few.high))
    with pytest.raises(ValueError, match="一类也没有"):
        iv.mean_of_intervals([])


def test_mean_of_categories_holds_the_truth_about_95_times_in_100():
    rng = np.random.default_rng(0)
    rates, sizes = (0.9, 0.5, 0.98), (30, 80, 50)
    hits = 0
    for _ in range(400):
        parts = [
            iv.proportion_interval(int(rng.binomial(n, p)), n) for p, n in zip(rates, sizes, strict=True)
        ]
        found = iv.mean_of_intervals(parts)
        hits += found.low <= sum(rates) / 3 <= found.high
    assert 0.92 <= hits / 400 <= 0.98
