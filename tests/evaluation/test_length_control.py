"""长度控制：手写的逻辑回归等于 scikit-learn 与 statsmodels；模拟里真相知道，量得回来。"""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

import length_control as lc


def some_data(seed=0, n=300):
    rng = np.random.default_rng(seed)
    x = np.stack([np.ones(n), rng.normal(size=n), rng.normal(size=n)], 1)
    wins = rng.binomial(2, lc.sigmoid(x @ [0.3, -0.8, 1.2])) / 2  # 平是 0.5
    return x, wins


def test_logistic_equals_scikit_learn():
    """它不收 0.5：一行拆成赢、输两行，各按得分加权。"""
    x, wins = some_data()
    twice, labels = np.concatenate([x, x]), np.concatenate([np.ones(len(x)), np.zeros(len(x))])
    theirs = LogisticRegression(C=1 / 0.7, fit_intercept=False, tol=1e-12, max_iter=1000)
    theirs.fit(twice, labels, sample_weight=np.concatenate([wins, 1 - wins]))
    ours, _ = lc.fit_logistic(x, wins, ridge=0.7)
    assert np.abs(ours - theirs.coef_[0]).max() < 1e-5


def test_logistic_and_its_errors_equal_statsmodels():
    sm = pytest.importorskip("statsmodels.api", reason="没有装 statsmodels：pip install statsmodels")
    x, wins = some_data(1)
    ours, errors = lc.fit_logistic(x, wins, ridge=0.0)
    theirs = sm.GLM(wins, x, family=sm.families.Binomial()).fit(tol=1e-13)
    assert np.abs(ours - theirs.params).max() < 1e-8
    assert np.abs(errors - theirs.bse).max() < 1e-7


def test_weights_are_repeats():
    x, wins = some_data(2, 50)
    counts = np.random.default_rng(0).integers(0, 4, 50)
    ours = lc.fit_logistic(x, wins, weights=counts.astype(float))[0]
    repeated = lc.fit_logistic(np.repeat(x, counts, 0), np.repeat(wins, counts))[0]
    assert np.abs(ours - repeated).max() < 1e-9


@pytest.mark.parametrize("truth", [0.3, 0.5, 0.6])
def test_the_truth_comes_back(truth):
    found = lc.recovered(truth, 805, 60, seed=1)
    assert found["lc"] == pytest.approx(truth, abs=0.01)
    assert found["raw"] > truth + 0.07


def test_without_length_bias_nothing_changes():
    rng = np.random.default_rng(0)
    wins, ours, theirs = lc.simulate(0.6, 20_000, rng, length=0.0)
    controlled, phi = lc.controlled(wins, lc.length_term(ours, theirs))
    assert abs(phi) < 0.05 and controlled == pytest.approx(0.6, abs=0.015)


def test_turned_round_is_one_minus():
    wins, ours, theirs = lc.simulate(0.4, 200, np.random.default_rng(3))
    there = lc.controlled(wins, lc.length_term(ours, theirs))
    back = lc.controlled(1 - wins, lc.length_term(theirs, ours))
    assert there[0] == pytest.approx(1 - back[0], abs=1e-9) and there[1] == pytest.approx(back[1], abs=1e-9)


def test_edge_cases():
    same, phi = lc.lc_win_rate([1, 1, 0, 0.5], [10] * 4, [8] * 4)  # 长度差都一样：看不出长度的作用
    assert same.value == pytest.approx(0.625, abs=0.002) and phi == 0
    all_won, _ = lc.lc_win_rate([1.0] * 20, list(range(20)), [5] * 20, draws=20)
    assert 0.9 < all_won.value < 1 and np.isfinite([all_won.low, all_won.high]).all()
    one, _ = lc.lc_win_rate([1.0], [3], [5], draws=20)
    assert 0.5 < one.value < 1 and one.n == 1
