"""排名：Bradley–Terry 等于 choix；Elo 手算、看次序；区间重抽的是题；多少题才够等于直接算的二项概率。"""

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

import ratings as rt


def some_table(seed, n=5):
    table = np.random.default_rng(seed).integers(1, 30, (n, n)) / 4.0
    np.fill_diagonal(table, 0)
    return table


@pytest.mark.parametrize("seed", range(5))
def test_bradley_terry_equals_choix(seed):
    pytest.importorskip("choix", reason="没有装 choix：pip install choix")
    assert rt.difference_to_choix(some_table(seed)) < 1e-9


def test_someone_who_never_won_equals_choix_with_the_same_prior():
    pytest.importorskip("choix", reason="没有装 choix：pip install choix")
    table = some_table(1)
    table[2] = 0  # 2 号一局没赢过
    assert not rt.everyone_beats_everyone(table)
    with pytest.raises(ValueError, match="没有有限的解"):
        rt.bradley_terry(table)
    assert rt.difference_to_choix(table) < 1e-6
    assert rt.ratings(table).argmin() == 2 and np.isfinite(rt.ratings(table)).all()


def test_two_models_by_hand():
    """甲赢 3 局、平 1 局、输 0.5：胜算就是得分之比。"""
    table = rt.win_table([(0, 1, 1.0)] * 3 + [(0, 1, 0.5), (1, 0, 1.0)], 2)
    assert table.tolist() == [[0, 3.5], [1.5, 0]]
    theta = rt.bradley_terry(table)
    assert theta[0] - theta[1] == pytest.approx(math.log(3.5 / 1.5), abs=1e-9)
    assert rt.ratings(table).mean() == pytest.approx(1000)


def test_elo_by_hand_and_its_order():
    first = rt.elo([(0, 1, 1.0)], 2)
    assert first.tolist() == [1016, 984]
    expected = 1 / (1 + 10 ** ((1016 - 984) / 400))  # 第二局：1 号赢 0 号
    second = rt.elo([(0, 1, 1.0), (1, 0, 1.0)], 2)
    assert second[1] == pytest.approx(984 + 32 * (1 - expected))
    games = [(0, 1, 1.0)] * 5 + [(0, 1, 0.0)] * 5  # 五胜五负
    assert rt.elo(games, 2)[0] < 1000 < rt.elo(games[::-1], 2)[0]  # 先赢后输与先输后赢
    table = rt.win_table(games, 2)
    assert rt.bradley_terry(table) == pytest.approx(0) == rt.bradley_terry(rt.win_table(games[::-1], 2))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_properties(seed):
    rng = random.Random(seed)
    games = [(a, b, rng.choice([0, 0.25, 0.5, 1.0])) for a, b in (rng.sample(range(4), 2) for _ in range(60))]
    table = rt.win_table(games, 4)
    assert table.sum() == pytest.approx(len(games))
    assert rt.elo(games, 4).sum() == pytest.approx(4000)  # 一边加的就是另一边减的
    shuffled = games[:]
    rng.shuffle(shuffled)
    assert rt.ratings(rt.win_table(shuffled, 4)) == pytest.approx(rt.ratings(table), abs=1e-6)
    flipped = [(b, a, 1 - points) for a, b, points in games]  # 换个说法，同一局
    assert rt.win_table(flipped, 4) == pytest.approx(table)


def test_intervals_resample_questions_not_games():
    """一道题的四局说的都一样：当成四局不相干的，区间只有一半宽。"""
    rng = np.random.default_rng(0)
    groups = [[(0, 1, float(won))] * 4 for won in rng.integers(2, size=100)]
    by_question = rt.rating_intervals(groups, 2, seed=0)[0]
    by_game = rt.rating_intervals([[game] for group in groups for game in group], 2, seed=0)[0]
    width, narrow = by_question.high - by_question.low, by_game.high - by_game.low
    assert 1.7 < width / narrow < 2.3
    assert by_question.low < by_question.value < by_question.high


def test_interval_covers_the_truth():
    """强 60 分的模型：95 % 区间大约二十次里盖住十九次。"""
    chance = 1 / (1 + 10 ** (-60 / 400))
    covered = 0
    for seed in range(60):
        wins = np.random.default_rng(seed).random(150) < chance
        found = rt.rating_intervals([[(0, 1, float(won))] for won in wins], 2, seed, draws=100)
        covered += found[0].low <= 1030 <= found[0].high
    assert covered >= 51


def test_sign_test_equals_scipy():
    wins, losses = np.array([0, 3, 10, 7, 0]), np.array([6, 3, 2, 1, 0])
    ours = rt.sign_test(wins, losses)
    for value, w, n in zip(ours, wins, wins + losses, strict=True):
        assert value == pytest.approx(binomtest(int(w), int(n)).pvalue if n else 1.0)


def test_power_equals_the_exact_probability():
    """没有平局、每题 0.7 赢：n 道题里赢够的概率，直接加起来。"""
    points, n = [1.0] * 7 + [0.0] * 3, 30
    exact = sum(
        math.comb(n, k) * 0.7**k * 0.3 ** (n - k)
        for k in range(n + 1)
        if k > n - k and binomtest(k, n).pvalue < 0.05
    )
    assert rt.power_curve(points, [n], seed=0, repeats=20_000)[n] == pytest.approx(exact, abs=0.015)
    assert rt.enough({5: 0.1, 10: 0.96}) == 10 and rt.enough({5: 0.1}) is None
    assert rt.power_curve([0.5] * 4, [100], seed=0)[100] == 0  # 全是平的，多少题也分不出


def test_peeking_raises_false_alarms():
    once, every = rt.peeking(100, seed=0)
    assert once < 0.06 and every > 3 * once
