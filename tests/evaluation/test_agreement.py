"""一致性与相关：手算、公开的例子，与 scikit-learn、statsmodels、krippendorff、scipy 相同，性质。"""

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import agreement as ag
import correlation
import rating_tables
from nlp_common.base.errors import UserError

ratings = st.lists(st.integers(1, 5), min_size=4, max_size=30)


def two_raters(seed, n=80, levels=5):
    rng = random.Random(seed)
    a = [rng.randint(1, levels) for _ in range(n)]
    b = [min(levels, max(1, x + rng.choice([-1, 0, 0, 0, 1, 2]))) for x in a]
    return a, b


# ---------------------------------------------------------------- Cohen


def test_cohen_by_hand():
    # 20 样：都说好 8，都说坏 6，甲好乙坏 4，甲坏乙好 2。一致 0.7；碰巧 0.6·0.5 + 0.4·0.5 = 0.5
    a = ["好"] * 12 + ["坏"] * 8
    b = ["好"] * 8 + ["坏"] * 4 + ["坏"] * 6 + ["好"] * 2
    assert ag.cohen_kappa(a, b) == pytest.approx((0.7 - 0.5) / (1 - 0.5))
    assert ag.cohen_kappa(a, a) == 1.0
    assert math.isnan(ag.cohen_kappa(["好"] * 5, ["好"] * 5))  # 没有别的级，没有碰巧可言


@pytest.mark.parametrize("weights", [None, "linear", "quadratic"])
@pytest.mark.parametrize("seed", range(5))
def test_cohen_equals_sklearn(weights, seed):
    from sklearn.metrics import cohen_kappa_score

    a, b = two_raters(seed)
    assert ag.cohen_kappa(a, b, weights) == pytest.approx(cohen_kappa_score(a, b, weights=weights), abs=1e-12)
    order = [1, 2, 3, 4, 5, 6]  # 没有人用过的一级
    theirs = cohen_kappa_score(a, b, weights=weights, labels=order)
    assert ag.cohen_kappa(a, b, weights, order) == pytest.approx(theirs, abs=1e-12)


# ---------------------------------------------------------------- Fleiss


def test_fleiss_published_example():
    """Fleiss (1971) 之后教科书常用的 10 样、14 人、5 级的表：κ = 0.210。"""
    table = [[0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1]]
    table += [[7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7]]
    assert ag.fleiss_kappa(np.array(table)) == pytest.approx(0.210, abs=5e-4)


@pytest.mark.parametrize("seed", range(3))
def test_fleiss_equals_statsmodels(seed):
    raters = pytest.importorskip("statsmodels.stats.inter_rater", reason="与 statsmodels 比")
    rows = np.random.default_rng(seed).integers(0, 4, size=(40, 5))
    table, _ = raters.aggregate_raters(rows)
    assert ag.fleiss_kappa(table) == pytest.approx(raters.fleiss_kappa(table), abs=1e-12)
    assert (ag.counts_of(rows.tolist(), [0, 1, 2, 3]) == table).all()


def test_fleiss_needs_everyone():
    with pytest.raises(ValueError, match="同样多的人"):
        ag.fleiss_kappa(np.array([[2, 1], [1, 1]]))


# ---------------------------------------------------------------- Krippendorff


def test_alpha_by_hand():
    # 三样两人：同、同、不同。名目：实际不一致 2/6；碰巧：3 个甲、3 个乙，共 6 → (36−9−9)/(6·5)
    rows = [["a", "a"], ["b", "b"], ["a", "b"]]
    assert ag.krippendorff_alpha(rows) == pytest.approx(1 - (2 / 6) / (18 / 30))
    assert ag.krippendorff_alpha([["a", None], [None, "b"]]) != ag.krippendorff_alpha(rows)  # NaN
    assert math.isnan(ag.krippendorff_alpha([["a", None]]))
    assert math.isnan(ag.krippendorff_alpha([["a", "a"], ["a", "a"]]))


@pytest.mark.parametrize("level", ag.LEVELS)
@pytest.mark.parametrize("seed", range(4))
def test_alpha_equals_krippendorff(level, seed):
    theirs = pytest.importorskip("krippendorff", reason="与 krippendorff 比")
    rng = random.Random(seed)
    rows = []
    for _ in range(40):  # 有缺的，也有只有一个人、没有人打分的
        truth = rng.choice([1, 2, 3, 5, 9])
        row = [rng.choice([truth, truth, rng.choice([1, 2, 3, 5, 9])]) for _ in range(4)]
        rows.append([None if rng.random() < 0.35 else value for value in row])
    table = np.array([[np.nan if v is None else v for v in row] for row in rows]).T
    wanted = theirs.alpha(reliability_data=table, level_of_measurement=level)
    assert ag.krippendorff_alpha(rows, level) == pytest.approx(wanted, abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.lists(st.one_of(st.none(), st.integers(1, 4)), min_size=3, max_size=3), min_size=3, max_size=12
    )
)
def test_alpha_does_not_care_who_is_who(rows):
    for level in ag.LEVELS:
        ours, turned = (
            ag.krippendorff_alpha(rows, level),
            ag.krippendorff_alpha([r[::-1] for r in rows], level),
        )
        assert (math.isnan(ours) and math.isnan(turned)) or ours == pytest.approx(turned)
    # 名目的 α 不看名字，次序的只看次序
    renamed = [[None if v is None else v * 10 for v in row] for row in rows]
    for level in ("nominal", "ordinal"):
        ours, other = ag.krippendorff_alpha(rows, level), ag.krippendorff_alpha(renamed, level)
        assert (math.isnan(ours) and math.isnan(other)) or ours == pytest.approx(other)


# ---------------------------------------------------------------- κ 的悖论


def test_paradox():
    """Feinstein & Cicchetti (1990) 的两张表：一致都是 0.85，κ 一个 0.70，一个 0.32；AC1 不掉。"""

    def raters(both_good, only_a, only_b, both_bad):
        a = [1] * (both_good + only_a) + [0] * (only_b + both_bad)
        b = [1] * both_good + [0] * only_a + [1] * only_b + [0] * both_bad
        return a, b

    balanced, skewed = raters(40, 9, 6, 45), raters(80, 10, 5, 5)
    assert ag.cohen_kappa(*balanced) == pytest.approx(0.70, abs=5e-3)
    assert ag.cohen_kappa(*skewed) == pytest.approx(0.32, abs=5e-3)
    assert ag.gwet_ac1(*balanced) == pytest.approx(0.70, abs=5e-3)
    assert ag.gwet_ac1(*skewed) == pytest.approx(0.81, abs=5e-3)


@pytest.mark.parametrize("share", [0.5, 0.8, 0.95])
def test_paradox_formula_equals_sampling(share):
    """期望的表与真的抽两万样相同（抽样误差之内）。"""
    rng = np.random.default_rng(0)
    truth = rng.random(20_000) < share
    a, b = (np.where(rng.random(20_000) < 0.95, truth, ~truth).tolist() for _ in range(2))
    exact = rating_tables.paradox_table(share, 0.95)
    assert exact["kappa"] == pytest.approx(ag.cohen_kappa(a, b), abs=0.03)
    assert exact["ac1"] == pytest.approx(ag.gwet_ac1(a, b), abs=0.01)
    assert exact["agreement"] == pytest.approx(0.95**2 + 0.05**2)


# ---------------------------------------------------------------- 相关


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.floats(0, 1, width=16)), min_size=3, max_size=40))
def test_correlations_equal_scipy(pairs):
    from scipy import stats

    a, b = [x for x, _ in pairs], [y for _, y in pairs]
    for ours, theirs in (
        (correlation.pearson, stats.pearsonr),
        (correlation.spearman, stats.spearmanr),
        (correlation.kendall, stats.kendalltau),
    ):
        value = ours(a, b)
        if len(set(a)) == 1 or len(set(b)) == 1:
            assert math.isnan(value)
        else:
            assert value == pytest.approx(theirs(a, b).statistic, abs=1e-9)


def test_correlations_by_hand():
    assert correlation.ranks([3, 1, 3, 2]).tolist() == [3.5, 1, 3.5, 2]
    assert correlation.spearman([1, 2, 3, 4], [1, 10, 100, 1000]) == 1.0
    assert correlation.pearson([1, 2, 3, 4], [1, 10, 100, 1000]) < 0.9
    assert correlation.kendall([1, 2, 3], [1, 3, 2]) == pytest.approx((2 - 1) / 3)


# ---------------------------------------------------------------- 打分表


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_wide_and_long_tables_are_the_same(tmp_path):
    wide = write(tmp_path / "wide.csv", "item,甲,乙,丙\n1,5,4,\n2,3,3,2\n3,,1,1\n")
    long = "item,rater,rating\n1,甲,5\n1,乙,4\n2,甲,3\n2,乙,3\n2,丙,2\n3,乙,1\n3,丙,1.0\n"
    found = [rating_tables.read_ratings(path) for path in (wide, write(tmp_path / "long.csv", long))]
    assert found[0] == found[1]
    assert found[0].rows == [[5, 4, None], [3, 3, 2], [None, 1, 1]] and found[0].level == "interval"


def test_a_rater_who_comes_late(tmp_path):
    """jsonl 里第一行没有的人，后面打了分也算。"""
    path = write(
        tmp_path / "r.jsonl", '{"item": 1, "甲": 5, "乙": 4}\n{"item": 2, "甲": 1, "乙": 2, "丙": 3}\n'
    )
    found = rating_tables.read_ratings(path)
    assert found.raters == ["甲", "乙", "丙"] and found.rows == [[5, 4, None], [1, 2, 3]]


def test_words_need_an_order(tmp_path):
    path = write(tmp_path / "words.csv", "item,甲,乙\n1,好,好\n2,中,差\n3,差,中\n")
    assert rating_tables.read_ratings(path).level == "nominal"
    ratings = rating_tables.read_ratings(path, "差,中，好")
    assert ratings.level == "ordinal" and ratings.order == ["差", "中", "好"]
    table = rating_tables.agreement_table(ratings, draws=20)
    assert set(table["alpha"]) == {"nominal", "ordinal"}
    numbers = [[["差", "中", "好"].index(v) for v in row] for row in ratings.rows]
    assert table["alpha"]["ordinal"].value == pytest.approx(ag.krippendorff_alpha(numbers, "ordinal"))


@pytest.mark.parametrize(
    ("text", "order", "message"),
    [
        ("item,甲\n1,5\n", None, "只有 1 个人"),
        ("item,甲,乙\n1,5,\n2,,3\n", None, "没有一样东西有两个人"),
        ("item,甲,乙\n1,,\n", None, "一个分也没有"),
        ("item,甲,乙\n1,好,坏\n2,好,棒\n", "坏,好", "第 3 行的 乙 是 '棒'，不在 --order"),
        ("item,rater,rating\n1,甲,好\n1,乙,棒\n", "坏,好", "第 3 行的 rating 是 '棒'"),
        ("item,甲,乙\n1,5,4\n2,3,abc\n", None, "第 3 行的 乙 是 'abc'，不是数"),
        ("item,text,甲,乙\n1,小刚去了花园,5,4\n", None, "第 2 行的 text 是 '小刚去了花园'"),
        ("rater,rating\n甲,5\n乙,4\n", None, "没有 item"),
        ("item,rater,rating\n1,甲,5\n1,甲,4\n", None, "第 3 行：甲 给 1 打过分了"),
        ("item,rater,rating\n1,,5\n", None, "第 2 行的 rater 是空的"),
    ],
)
def test_faults_of_tables_are_named(tmp_path, text, order, message):
    with pytest.raises(UserError, match=message):
        rating_tables.read_ratings(write(tmp_path / "bad.csv", text), order)


def test_example_finds_who_is_off():
    """自带的表：随手打的那个人一去掉，α 升得最多；手紧的人与别人次序一样，平方加权的 κ 高、不加权的低。"""
    table = rating_tables.agreement_table(rating_tables.example_ratings(60, 0), draws=50)
    without = table["without"]
    assert max(without, key=without.get) == "random"
    assert without["random"] > table["alpha"]["ordinal"].high
    strict = table["pairs"]["careful_1-strict"]
    assert strict["kappa"].value < 0.5 < strict["kappa_quadratic"].value
    assert not table["pairs"]["careful_1-random"]["kappa"].is_sure
