"""灰度：赌不会白赢（穷举），看几眼都守得住，界限与区间是一回事；一个用户只算一次；被打断了接着走。"""

import collections
import itertools
import json
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import canary_simulation as cs
import line_log
from canary import (
    BETS,
    FINE_SHARES,
    MOST,
    Canary,
    HarmTest,
    aimed_stake,
    gain_if_better,
    gain_if_worse,
    run_canary,
    share_at,
    wealth,
)
from nlp_common.base.errors import UserError
from traffic import arm_of, visits

KINDS = ["a", "b", "c"] * 20

# ---------------------------------------------------------------- 打赌


@pytest.mark.parametrize("limit", [0.0, 0.05, -0.2])
@pytest.mark.parametrize("gain", [gain_if_worse, gain_if_better])
def test_every_outcome_enumerated_the_bet_is_fair_and_ville_holds(limit, gain):
    """差是 −1、0、1，均值正好是 limit：八组的 3^8 种结果全列出来，本钱的期望是 1，赢到过 1/α 的概率不超过 α。"""
    chance = {1: 0.2 + limit / 2, 0: 0.6, -1: 0.2 - limit / 2}
    paths = np.array(list(itertools.product(chance, repeat=8)), dtype=float)  # (6561, 8)
    weights = np.prod(np.vectorize(chance.get)(paths), axis=1)
    money = np.exp(wealth(gain(paths, np.float64(limit)).cumsum(1)))  # (6561, 8)
    assert weights @ money == pytest.approx(np.ones(8), abs=1e-12)
    for alpha in (0.5, 0.2, 0.05):
        assert weights @ (money.max(1) >= 1 / alpha) <= alpha


def test_wealth_by_hand():
    """两组，差是 1 和 −1：押几成，就是 (1+λ)(1−λ)，几种押法平均。"""
    gains = gain_if_worse(np.array([1.0, -1.0]), np.float64(0)).sum(0)
    assert wealth(gains) == pytest.approx(math.log(np.mean(1 - BETS**2)), abs=1e-12)


def test_every_outcome_enumerated_the_aimed_bet_is_fair():
    """押几成看以前的各组：差正好是界限时，六组的 3^6 种结果全列出来，本钱的期望仍是 1。"""
    margin, chance = 0.05, {1.0: 0.225, 0.0: 0.6, -1.0: 0.175}
    paths = list(itertools.product(chance, repeat=6))
    weights = np.array([math.prod(chance[d] for d in path) for path in paths])
    money = []
    for path in paths:
        test, most = HarmTest(margin, 0.05, 0.05, 0.0), 0.0
        for difference in path:
            test.add(difference)
            most = max(most, math.exp(wealth(test.fine_gains, FINE_SHARES)))
        money.append((math.exp(wealth(test.fine_gains, FINE_SHARES)), most))
    last, most = np.array(money).T
    assert weights @ last == pytest.approx(1, abs=1e-12)
    for alpha in (0.8, 0.7):
        assert 0 < weights @ (most >= 1 / alpha) <= alpha


def released(d: np.ndarray, margin: float, aimed: bool) -> float:
    """(次, 组) 的差 → 放开的比例；aimed：八成本钱冲着"一样好"押，还是全平分给 BETS。"""
    seen = np.concatenate([np.zeros((len(d), 1)), (d * d).cumsum(1)[:, :-1]], 1)
    stake = aimed_stake(seen, np.arange(d.shape[1]), margin)
    stakes = np.concatenate([np.broadcast_to(BETS, (*d.shape, len(BETS))), stake[..., None]], 2)
    money = wealth(gain_if_better(d, np.float64(margin), stakes).cumsum(1)[..., : None if aimed else -1],
                   FINE_SHARES if aimed else None)  # fmt: skip
    return float((money >= -math.log(0.05)).any(1).mean())


@pytest.mark.parametrize("rate", [0.02, 0.15])
def test_a_version_as_bad_as_the_margin_is_rarely_released_and_an_equal_one_more_often(rate):
    d = cs.simulated_differences(400, 500, rate, 0.0, 0)
    assert released(d, 0.05, aimed=True) > released(d, 0.05, aimed=False) + (0.05 if rate > 0.1 else -0.01)
    assert released(cs.simulated_differences(400, 500, rate, 0.05, 1), 0.05, aimed=True) <= 0.05


def test_the_aimed_stake_is_the_one_that_grows_fastest():
    """差是 ±1 与 0、平均 0：押 margin / E[(margin − d)²] 上下，一组平均赢的对数最多。"""
    margin, share = 0.05, 0.1
    best = aimed_stake(2 * share * 10_000, 10_000, margin) / (1 - margin)

    def growth(stake: float) -> float:
        return sum(
            p * math.log1p(stake * (margin - d)) for d, p in ((1, share), (0, 1 - 2 * share), (-1, share))
        )

    assert growth(best) > max(growth(0.8 * best), growth(1.25 * best))
    assert aimed_stake(0.0, 10_000, 0.3) < MOST  # 从来没有坏过，也不会押上全部


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=1, max_size=60), st.floats(0.01, 0.5))
def test_interval_and_decisions_agree(differences, margin):
    test = HarmTest(margin, 0.05, 0.05, 0.0)
    for difference in differences:
        test.add(difference)
    low, high = test.bounds()
    assert test.is_worse == (low[-1] >= 0) and test.is_fine == (high[-1] <= margin)
    assert (np.diff(low) >= 0).all() and (np.diff(high) <= 0).all()
    assert np.isfinite(test.worse_gains).all() and np.isfinite(test.fine_gains).all()


@pytest.mark.parametrize("limit", [0.0, 0.05, -0.3])
def test_same_as_the_capital_process_of_the_paper(limit):
    """论文（与它的 confseq 0.0.11，那个包在 NumPy 2 上装不上）的写法：数在 0 与 1 之间，一组一组地乘。"""
    d = np.random.default_rng(0).choice([-1.0, -0.1, 0.0, 1.0], 40, p=[0.1, 0.3, 0.2, 0.4])
    x, m = (d + 1) / 2, (limit + 1) / 2
    capital = sum(np.cumprod(1 + stake / m * (x - m)) for stake in BETS) / len(BETS)
    assert np.exp(wealth(gain_if_worse(d, np.float64(limit)).cumsum(0))) == pytest.approx(capital, rel=1e-9)


# ---------------------------------------------------------------- 守得住


@pytest.mark.parametrize("rate", [0.02, 0.2])
def test_looked_at_every_group_a_good_version_is_rarely_rolled_back(rate):
    settings = cs.CanarySettings(seed=1, runs=600, groups=600)
    found = cs.ends(cs.wrongly_rolled_back(settings, rate))
    assert found["bets"] <= 0.05
    assert found["peek"] > 2 * found["once"] and found["peek"] > 0.05


def test_msprt_is_the_integral_it_says():
    quad = pytest.importorskip("scipy.integrate", reason="没有装 scipy").quad
    d = np.random.default_rng(0).normal(0.1, 0.4, (1, 30))
    total, variance = d.sum(), d.var(ddof=1)

    def ratio(theta):
        prior = 2 * math.exp(-((theta / cs.SPREAD) ** 2) / 2) / (cs.SPREAD * math.sqrt(2 * math.pi))
        return prior * math.exp(theta * total / variance - 30 * theta**2 / (2 * variance))

    assert cs.msprt(d)[0, -1] == pytest.approx(math.log(quad(ratio, 0, 2)[0]), abs=1e-6)


def test_harm_is_found_and_the_worse_the_sooner():
    settings = cs.CanarySettings(seed=0, canaries=8, requests=1500, rate=0.1)
    found = {harm: cs.canaries_with(harm, settings) for harm in (0.2, 0.6)}
    assert all(row["rollback"] == 1 for row in found.values())
    assert found[0.6]["rollback_requests_canary"] < found[0.2]["rollback_requests_canary"] < 300


# ---------------------------------------------------------------- 谁算进来


def test_a_user_counts_once_and_groups_are_made_in_order():
    canary = Canary({"bad": None})
    for user, arm, bad in [
        ("u1", "champion", 1),
        ("u1", "champion", 1),  # 再来的不算
        ("u2", "champion", 0),
        ("u3", "canary", 1),  # 配上前面两个：1 − 1/2
        ("u4", "canary", 0),
        ("u5", "canary", 1),
        ("u3", "canary", 1),
        ("u6", "champion", 1),  # 配上前面两个：1/2 − 1
    ]:
        assert canary.see(user, arm, {"bad": bad}) is None
    assert canary.tests["bad"].differences == [0.5, -0.5]
    assert (canary.users, canary.requests) == ({"canary": 3, "champion": 3}, {"canary": 4, "champion": 4})


def test_a_user_may_count_with_the_mean_of_the_first_requests():
    canary = Canary({"bad": None}, per_user=2)
    for user, arm, bad in [
        ("u1", "champion", 1),
        ("u2", "canary", 1),
        ("u2", "canary", 0),
        ("u3", "champion", 1),  # 只来过一次就换了一边：从头数
        ("u3", "canary", 0),
        ("u1", "champion", 1),
    ]:
        canary.see(user, arm, {"bad": bad})
    assert canary.tests["bad"].differences == [-0.5]


def test_several_items_share_alpha_and_all_must_be_fine():
    canary = Canary({"wrong": 0.1, "slow": 0.1, "seen": None})
    assert canary.tests["wrong"].enough_worse == pytest.approx(-math.log(0.05 / 3))
    for user in range(400):
        arm = "canary" if user % 2 else "champion"
        decision = canary.see(user, arm, {"wrong": 0, "slow": float(user % 2 and user % 4 == 1), "seen": 0})
        if decision:
            break
    assert decision == "rollback" and canary.reason.startswith("变坏了：slow +0.")
    assert canary.see("还来", "canary", {"wrong": 1, "slow": 1, "seen": 1}) == "rollback"  # 定了不再变


def test_a_better_version_is_released():
    canary = Canary({"wrong": 0.05})
    for user in range(600):
        if decision := canary.see(user, "canary" if user % 2 else "champion", {"wrong": 1 - user % 2}):
            break
    assert decision == "release" and "不会坏过界限" in canary.reason
    assert canary.report()["wrong"]["high"] <= 0.05 and canary.report()["wrong"]["harm"] == -1


@pytest.mark.parametrize("margins", [{}, {"a": 0.0}, {"a": 1.0}, {"a": -0.1}])
def test_margins_that_make_no_sense(margins):
    with pytest.raises(UserError, match="要"):
        Canary(margins)
    with pytest.raises(ValueError, match="在 0 与 1 之间"):
        Canary({"a": 0.1}).see(1, "canary", {"a": math.nan})


# ---------------------------------------------------------------- 流量


def test_traffic_is_reproducible_sticky_and_has_heavy_users():
    requests = list(visits(KINDS, 3000, seed=0))
    assert requests[:500] == list(visits(KINDS, 500, seed=0)) != list(visits(KINDS, 500, seed=1))
    counts = collections.Counter(request.user for request in requests)
    assert 1300 < len(counts) < 1700 and counts.most_common(1)[0][1] > 30
    firsts = [request.user for request in requests if request.first]
    assert firsts == sorted(set(firsts)) == list(range(len(counts)))
    heavy = counts.most_common(1)[0][0]
    kinds = collections.Counter(KINDS[r.question] for r in requests if r.user == heavy)
    assert kinds.most_common(1)[0][1] > counts[heavy] / 2, "常客老问同一类"


def test_arms_are_stable_fair_and_grow():
    users = range(4000)
    small = {user for user in users if arm_of(user, 0.1, "m-2") == "canary"}
    large = {user for user in users if arm_of(user, 0.25, "m-2") == "canary"}
    assert small < large, "比例加大，原来在里面的还在"
    assert abs(len(small) / 4000 - 0.1) < 0.02 and abs(len(large) / 4000 - 0.25) < 0.03
    other = {user for user in users if arm_of(user, 0.1, "m-3") == "canary"}
    assert len(small & other) < 0.2 * len(small), "下一次灰度换一批人"
    assert [share_at(((0, 0.1), (10, 0.5)), n) for n in (0, 9, 10)] == [0.1, 0.1, 0.5]


def flaky(seed=0, harm=0.3):
    rng = random.Random(seed)
    table = {
        arm: [float(rng.random() < rate) for _ in KINDS]
        for arm, rate in (("champion", 0.1), ("canary", 0.1 + harm))
    }
    served = []

    def answer(arm, request):
        served.append(request.number)
        return {"bad": table[arm][request.question]}

    return answer, served


def test_interrupted_anywhere_the_canary_goes_on(tmp_path):
    answer, served = flaky()
    whole = run_canary(visits(KINDS, 900, 0), answer, Canary({"bad": 0.1}), "m-2")
    assert whole["decision"] == "rollback" and 50 < whole["requests"] < 900
    for stop in (0, 1, 40, whole["requests"] - 1):
        log = tmp_path / f"{stop}.jsonl"
        answer, served = flaky()
        run_canary(visits(KINDS, stop, 0), answer, Canary({"bad": 0.1}), "m-2", log)
        again = run_canary(visits(KINDS, 900, 0), answer, Canary({"bad": 0.1}), "m-2", log)
        assert again == whole and served == list(range(whole["requests"])), "每次请求只答一次"
        assert json.loads(json.dumps(again)) == again


def test_the_log_of_another_canary_is_refused(tmp_path):
    log = tmp_path / "canary.jsonl"
    answer, _ = flaky()
    run_canary(visits(KINDS, 50, 0), answer, Canary({"bad": 0.1}), "m-2", log)
    before = log.read_bytes()
    for traffic, margin, salt in ((0, 0.1, "m-3"), (0, 0.2, "m-2"), (7, 0.1, "m-2")):
        with pytest.raises(UserError, match=r"另一次灰度的记录（.*已有.*这次.*）.*移走"):
            run_canary(visits(KINDS, 50, traffic), answer, Canary({"bad": margin}), salt, log)
    assert log.read_bytes() == before
    assert len(line_log.read(log)) == 51


# ---------------------------------------------------------------- 量的那一课


def test_lesson_runs_loads_and_refuses(tmp_path, capsys):
    arguments = ["--preset", "tiny", "--output_dir", str(tmp_path / "out"), "--runs", "50", "--groups", "100"]
    arguments += ["--canaries", "2", "--requests", "200"]
    run = cs.main(arguments)
    assert {"false_rollbacks", "heavy_users", "simpson", "harm"} <= run["metrics"].keys()
    assert {path.name for path in (tmp_path / "out").glob("*.svg")} == {
        *("canary_false_rollbacks.svg", "canary_intervals.svg", "canary_users.svg")
    }
    said = capsys.readouterr().out
    assert "每组都看" in said and "nan" not in said
    assert json.loads(json.dumps(run, allow_nan=False)) == run
    assert cs.main(arguments) == run and "已有训练结果" in capsys.readouterr().out
    with pytest.raises(UserError, match="--rate"):
        cs.main([*arguments, "--rate", "0.6"])
