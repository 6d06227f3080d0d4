"""指标与融合：手算的例子；与 scikit-learn 的 nDCG 相同；bootstrap 的区间。"""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag_common import fuse, metrics


def test_hand_computed():
    ranked, gold = ["a", "b", "c", "d"], {"c", "z"}
    assert [metrics.recall_at(ranked, gold, k) for k in (1, 2, 3, 10)] == [0, 0, 1, 1]
    assert metrics.reciprocal_rank_of(ranked, gold) == pytest.approx(1 / 3)
    assert metrics.reciprocal_rank_of(ranked, {"z"}) == 0 == metrics.ndcg_at(ranked, set(), 5)
    assert metrics.ndcg_at(ranked, gold, 4) == pytest.approx((1 / math.log2(4)) / (1 + 1 / math.log2(3)))
    row = metrics.retrieval_row([["a"], ["b", "a"], []], [{"a"}, {"a"}, {"a"}])
    assert row["recall_at_1"] == pytest.approx(1 / 3) and row["recall_at_5"] == pytest.approx(2 / 3)
    assert row["mrr"] == pytest.approx(0.5) and row["n"] == 3
    assert metrics.retrieval_row([], [])["mrr"] == 0


@given(st.lists(st.booleans(), min_size=2, max_size=12), st.integers(1, 12))
def test_ndcg_equals_scikit_learn(relevant, k):
    from sklearn.metrics import ndcg_score

    names = [str(n) for n in range(len(relevant))]
    gold = {name for name, yes in zip(names, relevant, strict=True) if yes}
    scores = [[float(-n) for n in range(len(names))]]
    expected = ndcg_score([list(map(int, relevant))], scores, k=k) if gold else 0.0
    assert metrics.ndcg_at(names, gold, k) == pytest.approx(expected, abs=1e-9)


def test_answers():
    assert (
        metrics.exact_match("小刚。", "小刚") == 1
        and metrics.exact_match("１９９８年", ["1998年", "去年"]) == 1
    )
    assert metrics.exact_match("是小刚", "小刚") == 0
    assert metrics.f1("是小刚", "小刚") == pytest.approx(2 * (2 / 3) * 1 / (2 / 3 + 1))
    assert metrics.f1("", "") == 1 and metrics.f1("", "小刚") == 0 and metrics.f1("小", ["大", "小"]) == 1
    assert metrics.f1("iPhone 15", "iphone15") == 0 and metrics.f1("iPhone 15", "15 iphone") == 1


def test_bootstrap():
    same = [1.0, 0.0, 1.0, 0.0] * 50
    assert metrics.paired_bootstrap(same, same) == (0, 0, 0)
    rng = random.Random(0)
    better = [min(1.0, each + (rng.random() < 0.2)) for each in same]
    difference, low, high = metrics.paired_bootstrap(better, same)
    assert 0 < low < difference < high and difference == pytest.approx(sum(better) / 200 - 0.5)


def test_reciprocal_rank_by_hand():
    fused = fuse.reciprocal_rank([["a", "b"], ["b", "c"]], k=60)
    assert fused == [("b", 1 / 62 + 1 / 61), ("a", 1 / 61), ("c", 1 / 62)]
    assert (
        fuse.reciprocal_rank([["a", "b"], []]) == [("a", 1 / 61), ("b", 1 / 62)]
        and fuse.reciprocal_rank([]) == []
    )


def test_weighted_by_hand():
    bm25, dense = [("a", 30.0), ("b", 20.0), ("c", 10.0)], [("c", 0.9), ("a", 0.8)]
    assert fuse.weighted([bm25, dense], [0.5, 0.5]) == [("a", 0.5), ("c", 0.5), ("b", 0.25)]
    assert fuse.weighted([bm25, []], [1, 1])[0] == ("a", 1.0)
    assert fuse.min_max([("a", 5.0)]) == [("a", 1.0)]


@given(st.lists(st.sampled_from("abcdefgh"), unique=True), st.floats(0.01, 100), st.floats(-50, 50))
def test_weights_do_not_care_about_scale(names, scale, shift):
    ranked = [(name, float(-n)) for n, name in enumerate(names)]
    other = [(name, scale * score + shift) for name, score in ranked]
    assert (
        [n for n, _ in fuse.weighted([ranked], [1])] == names == [n for n, _ in fuse.weighted([other], [1])]
    )
