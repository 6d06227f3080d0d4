"""gates.py：得分检验等于直接求的最大似然，错放不超过 5 %，精确检验等于 scipy；每道门只拦它那一种毛病；重抽的两边是同样的题。"""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest

import gates
from gates import ALPHA, Limits, at_least, better, no_worse, resampled, score_z

LIMITS = Limits()


def columns(both: int, gained: int, lost: int, neither: int = 0) -> tuple[list[int], list[int]]:
    """(候选, 正在用的) 的对错。"""
    new = [1] * both + [1] * gained + [0] * lost + [0] * neither
    old = [1] * both + [0] * gained + [1] * lost + [0] * neither
    return new, old


# ---------------------------------------------------------------- 检验


def likeliest(gained: int, lost: int, n: int, difference: float) -> float:
    """在"差正好是 difference"的约束下，直接求最可能的 q = P(只有正在用的对)。"""

    def cost(q: float) -> float:
        p = q + difference
        cells = ((gained, p), (lost, q), (n - gained - lost, 1 - p - q))
        return -sum(count * math.log(max(share, 1e-300)) for count, share in cells if count)

    low, high = max(0.0, -difference), (1 - difference) / 2
    return minimize_scalar(cost, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 300), st.sampled_from([-0.1, -0.03, 0.02, 0.2]))
def test_score_equals_maximum_likelihood(gained, lost, same, difference):
    n = gained + lost + same
    q = likeliest(gained, lost, n, difference)
    variance = n * (2 * q + difference - difference**2)
    if variance > 1e-6:
        wanted = (gained - lost - n * difference) / math.sqrt(variance)
        assert score_z(gained, lost, n, difference) == pytest.approx(wanted, rel=1e-4, abs=1e-4)


def test_score_without_difference_is_mcnemar():
    assert score_z(12, 5, 100) == pytest.approx((12 - 5) / math.sqrt(12 + 5), abs=1e-12)
    assert score_z(0, 0, 100) == 0


def test_by_hand_when_nothing_differs():
    """一道不一样的题也没有：z = √(nδ / (1 − δ))。400 道题、δ = 0.03 看得清，80 道看不清。"""
    assert score_z(0, 0, 400, -0.03) == pytest.approx(math.sqrt(400 * 0.03 / 0.97), abs=1e-12)
    assert no_worse("", *columns(400, 0, 0), 0.03)["passed"]
    assert not no_worse("", *columns(80, 0, 0), 0.03)["passed"]


def test_too_few_questions_never_pass():
    """ "没有显著变差"会放行的五道题，这里不放行。"""
    assert not no_worse("", *columns(5, 0, 0), 0.03)["passed"]
    assert not at_least("", [1] * 5, [1] * 5, 0.95)["passed"]


@pytest.mark.parametrize("margin", [0.03, 0.05])
def test_wrongly_passed_at_most_five_percent(margin):
    """正好差 margin 的候选，一千批题里放行的不超过 5 %（留出模拟的误差）。"""
    rng = np.random.default_rng(0)
    n, lost_rate, passed = 400, 0.02 + margin, 0
    for _ in range(1000):
        gained, lost, _ = rng.multinomial(n, [0.02, lost_rate, 0.98 - lost_rate])
        passed += 1 - gates.NORMAL.cdf(score_z(gained, lost, n, -margin)) <= ALPHA
    assert passed / 1000 <= 0.07


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 60), st.integers(0, 60), st.floats(0.05, 0.99))
def test_exact_tests_equal_scipy(hits, misses, share):
    n = hits + misses
    if n == 0:
        return
    wanted = binomtest(hits, n, share, alternative="greater").pvalue
    assert gates.binomial_tail(hits, n, share) == pytest.approx(wanted, rel=1e-9, abs=1e-12)
    values = [1] * hits + [0] * misses
    assert at_least("", values, values, share)["p"] == pytest.approx(wanted, rel=1e-9, abs=1e-12)


def test_better_counts_only_disagreements():
    few = better("", *columns(3, 12, 4))
    many = better("", *columns(3000, 12, 4))
    assert few["p"] == many["p"] == pytest.approx(binomtest(12, 16, 0.5, alternative="greater").pvalue)


def test_different_questions_are_refused():
    with pytest.raises(ValueError, match="同样的题"):
        no_worse("", [1, 1], [1], 0.05)


# ---------------------------------------------------------------- 门


def flips(n: int, wrong: int) -> list[int]:
    return [0] * wrong + [1] * (n - wrong)


OLD = {
    "right": flips(400, 2),
    "preferred": flips(400, 300),
    "refused": flips(200, 0),
    "look_alike": flips(200, 2),
}


@pytest.mark.parametrize(
    ("changed", "ok"),
    [
        ({}, True),
        ({"right": flips(400, 60)}, False),  # 学死了
        ({"preferred": flips(400, 300)}, False),  # 没有变好：不值得发布
    ],
)
def test_quality_gate(changed, ok):
    new = {"right": flips(400, 3), "preferred": flips(400, 20)} | changed
    assert gates.all_passed(gates.quality_gate(new, OLD, LIMITS)) is ok


@pytest.mark.parametrize(
    ("refused", "look_alike", "ok"),
    [(0, 3, True), (40, 3, False), (0, 200, False)],  # 第三个：什么都拒绝
)
def test_safety_gate_looks_both_ways(refused, look_alike, ok):
    new = {"refused": flips(200, refused), "look_alike": flips(200, look_alike)}
    assert gates.all_passed(gates.safety_gate(new, OLD, LIMITS)) is ok


def test_an_unsafe_champion_does_not_lower_the_bar():
    bad = {"refused": flips(200, 60), "look_alike": flips(200, 2)}
    tests = gates.safety_gate(bad, bad, LIMITS)
    assert [test["passed"] for test in tests.values()] == [True, False, True]


@pytest.mark.parametrize(
    ("ratios", "ok"), [([1.0] * 15, True), ([3.0] * 15, False), ([1.0] * 12 + [9.0] * 3, True)]
)
def test_speed_gate(ratios, ok):
    """三轮被别的程序抢了，也不冤枉。"""
    assert gates.all_passed(gates.speed_gate({"ratios": ratios}, {}, LIMITS)) is ok


def bias_row(size: float, p: float) -> dict:
    return gates.comparison({"name": "性别：男－女", "difference": size, "low": size - 0.01, "high": size + 0.01, "size": size, "p_holm": p})  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "ok"),
    [([bias_row(0.02, 0.001)], True), ([bias_row(0.9, 0.001)], False), ([bias_row(0.9, 0.2)], True)],
)
def test_bias_gate_needs_seen_and_large(rows, ok):
    assert gates.all_passed(gates.bias_gate({"comparisons": rows}, {}, LIMITS)) is ok


# ---------------------------------------------------------------- 换一批题


def test_resampled_keeps_pairs():
    """两边抽的是同样的题：只有候选对、只有正在用的对的题不会凭空出现。"""
    rng = np.random.default_rng(0)
    new, old = resampled("quality", {"right": OLD["right"]}, {"right": OLD["right"]}, rng)
    assert (new["right"] == old["right"]).all() and len(new["right"]) == 400
    assert resampled("speed", {"ratios": [1.0, 2.0]}, {}, rng)[0]["ratios"].shape == (2,)


def test_redrawn_bias_follows_its_interval():
    rng = np.random.default_rng(0)
    biased = [gates.redrawn([bias_row(0.9, 0.001)], rng)[0]["matters"] for _ in range(50)]
    fair = [gates.redrawn([bias_row(0.02, 0.001)], rng)[0]["matters"] for _ in range(50)]
    assert all(biased) and not any(fair)
