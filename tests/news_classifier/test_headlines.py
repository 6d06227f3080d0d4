"""标题语法：概率加得起来、上限算得对、三份数据不相交、同一种子写出同样的标题。"""

import math
import random
from collections import Counter

import pytest

import headlines as grammar
from headlines import LABELS, PRIOR, SCENES, SIZES, all_headlines, bayes_accuracy, headlines, posterior


def test_labels_are_those_of_tnews_in_order():
    assert len(LABELS) == len(PRIOR) == 15
    assert (LABELS[0], LABELS[3], LABELS[6], LABELS[12], LABELS[14]) == (
        "故事",
        "体育",
        "汽车",
        "股票",
        "电竞",
    )
    assert {scene.label for scene in SCENES} == set(LABELS)


def test_words_of_a_scene_are_distinct():
    for scene in SCENES:
        for words in (scene.subjects, scene.verbs, scene.tails):
            assert len(words.split()) == len(set(words.split())), (scene.label, words)


def test_probabilities_of_all_headlines_add_up_to_one_and_to_the_prior():
    joints = [joint for joint, _ in all_headlines().values()]
    assert math.fsum(map(math.fsum, joints)) == pytest.approx(1, abs=1e-9)
    for label, share in enumerate(PRIOR):
        assert math.fsum(joint[label] for joint in joints) == pytest.approx(share / sum(PRIOR), abs=1e-9)


def test_written_headlines_follow_the_enumerated_probabilities():
    """写出来的和遍历算出来的是同一个分布：类别、“猜概率最大的一类”的正确率、几条常见标题的频率。"""
    rng = random.Random(7)
    written = [grammar.write_headline(rng) for _ in range(40_000)]
    table = all_headlines()
    assert all(
        table[sentence][0][label] > 0 and table[sentence][1] == where for sentence, label, where in written
    )
    for split in SIZES:
        rows = [(sentence, label) for sentence, label, where in written if where == split]
        right = sum(max(range(15), key=table[sentence][0].__getitem__) == label for sentence, label in rows)
        bound = bayes_accuracy(split)
        assert right / len(rows) == pytest.approx(bound, abs=4 * math.sqrt(bound * (1 - bound) / len(rows)))
    counts = Counter(sentence for sentence, *_ in written)
    for sentence, (joint, _) in sorted(table.items(), key=lambda item: -sum(item[1][0]))[:20]:
        expected = len(written) * sum(joint)
        assert abs(counts[sentence] - expected) < 5 * math.sqrt(expected) + 1, sentence


def test_the_bound_is_below_one_and_no_rule_beats_it():
    """按上限猜是最好的：换成“见到主语就猜它最常见的类”之类的规则，只会更差。"""
    assert bayes_accuracy("test") == pytest.approx(EXPECTED_BOUND, abs=0.0005)
    table = {text: joint for text, (joint, where) in all_headlines().items() if where == "test"}
    total = sum(map(sum, table.values()))
    by_opening = {}  # 只看前三个字
    for text, joint in table.items():
        sums = by_opening.setdefault(text[:3], [0.0] * 15)
        by_opening[text[:3]] = [a + b for a, b in zip(sums, joint, strict=True)]
    rule = {opening: max(range(15), key=sums.__getitem__) for opening, sums in by_opening.items()}
    ruled = sum(joint[rule[text[:3]]] for text, joint in table.items()) / total
    assert ruled < bayes_accuracy("test") < 1


EXPECTED_BOUND = 0.9292


def test_posterior():
    assert posterior("这条标题语法写不出来") is None
    certain = posterior("量子计算机取得重大突破")
    assert certain[LABELS.index("科技")] == pytest.approx(1)
    shared = posterior("小米发布财报")
    assert sum(shared) == pytest.approx(1)
    assert sum(p > 0.05 for p in shared) >= 3  # 科技、财经、股票、汽车都写得出
    # 手算：每一类的先验 ÷ 场景数 ÷ 主语数 ÷ 谓语数（开头、尾巴各类一样多，约掉了）
    weights = {}
    for scene in SCENES:
        if "小米" in scene.subjects.split() and "发布财报" in scene.verbs.split():
            siblings = sum(other.label == scene.label for other in SCENES)
            choices = siblings * len(scene.subjects.split()) * len(scene.verbs.split())
            weights[scene.label] = weights.get(scene.label, 0) + PRIOR[LABELS.index(scene.label)] / choices
    for label, weight in weights.items():
        assert shared[LABELS.index(label)] == pytest.approx(weight / sum(weights.values()))


def test_splits_share_no_headline_and_no_pairing():
    split_of = {}
    for scene in SCENES:
        for subject in scene.subjects.split():
            for verb in scene.verbs.split():
                where = all_headlines()[subject + verb][1]
                assert split_of.setdefault(subject + verb, where) == where
    texts = {split: {row["sentence"] for row in headlines(split, 800)} for split in SIZES}
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not texts[one] & texts[other]
    shares = Counter(split_of.values())
    assert shares["train"] / sum(shares.values()) == pytest.approx(0.7, abs=0.05)


def test_headlines_are_the_same_for_the_same_seed():
    assert headlines("train", 50) == headlines("train", 50)
    assert headlines("train", 20) == headlines("train", 50)[:20]
    assert headlines("train", 50, seed=1) != headlines("train", 50)
    assert len(headlines("validation")) == SIZES["validation"]


def test_the_sentence_shown_at_the_end_is_not_in_the_grammar():
    assert posterior("中国男篮在亚洲杯比赛中大胜日本队") is None
