"""手写的 EM、F1、BLEU、chrF、ROUGE：手算的例子，与 sacrebleu、rouge-score 逐位相同，性质。"""

import importlib.util
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import text_metrics as tm

# 各种麻烦的字：汉字、全角与半角标点、数字里的点、破折号与弯引号（zh 的怪区间）、扩展 B、表情、日文、空白、实体
PIECES = [
    "小刚",
    "去了花园",
    "。",
    "，",
    "3.14",
    "1,000",
    "12%",
    "１２％",
    "GPT-4",
    "a b",
    "—",
    "“",
    "”",
    "…",
    "𠮷",
    "😀",
]
PIECES += ["カ", "&amp;", "\n", "-\n", "\u3000", "(", "'s", "x.y", ".", "5-", "Ａ", "㈱", "〇", "#", "\t"]
text = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)


# ---------------------------------------------------------------- 切法


@pytest.mark.parametrize("name", ["13a", "zh", "char"])
@settings(max_examples=300, deadline=None)
@given(line=st.one_of(text, st.text(max_size=20)))
def test_splits_equal_sacrebleu(name, line):
    bleu = pytest.importorskip("sacrebleu.metrics", reason="与 sacrebleu 比").BLEU
    theirs = bleu(tokenize=name)._preprocess_segment(line).split()
    assert {"13a": tm.split_13a, "zh": tm.split_zh, "char": tm.split_char}[name](line) == theirs


def test_default_splits_cannot_see_chinese():
    assert tm.split_13a("小刚去了花园。") == ["小刚去了花园。"]
    assert tm.split_zh("小刚去了GPT-4花园。") == ["小", "刚", "去", "了", "GPT-4", "花", "园", "。"]
    assert tm.split_rouge("小刚2026年去了花园") == ["2026"]
    # 毫不相干的两句，只要有同样的数字，rouge-score 的默认就给满分
    assert tm.rouge_l("小刚2026年去了花园", ["股市在2026年大跌"], tm.split_rouge) == 1.0
    assert tm.rouge_l("小刚2026年去了花园", ["股市在2026年大跌"]) < 0.6


# ---------------------------------------------------------------- 归一、EM、F1


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ("《红楼梦》。", "红楼梦"),
        ("ＧＰＴ４", "gpt4"),
        ("１２％", "12%"),
        ("1,000 元", "1000元"),
        ("小刚　去了 花园！", "小刚去了花园"),
        ("（一）", "一"),
        ("3。", "3"),
    ],
)
def test_same_after_normalising(said, wanted):
    assert tm.exact_match(said, [wanted]) == 1.0


@pytest.mark.parametrize(
    ("said", "wanted"), [("3.5", "35"), ("10:30", "1030"), ("12%", "12"), ("-5", "5"), ("1/2", "12")]
)
def test_marks_inside_numbers_matter(said, wanted):
    assert tm.exact_match(said, [wanted]) == 0.0


@pytest.mark.skipif(importlib.util.find_spec("snownlp") is None, reason="繁简的表在 snownlp 里")
def test_traditional_only_when_asked():
    assert tm.exact_match("紅樓夢", ["红楼梦"]) == 0.0
    assert tm.exact_match(tm.to_simplified("紅樓夢"), ["红楼梦"]) == 1.0
    assert tm.to_simplified("著名的剩餘") == "著名的剩余"


@settings(max_examples=200, deadline=None)
@given(line=st.text(max_size=30))
def test_normalising_twice_is_once(line):
    once = tm.normalise(line)
    # 分解与大小写个别字要两遍才稳（如 ϓ）；标点与空白第一遍就该没有了
    assert not any(char.isspace() or char in "，。！？《》“”" for char in once)
    assert tm.exact_match(line, [line]) == 1.0


def test_f1_by_hand():
    # 共有 花、园 两个；回答 5 个字，标准答案 2 个：P = 2/5，R = 1
    assert tm.f1_answer("小刚去花园", ["花园"]) == pytest.approx(2 * 2 / (5 + 2))
    assert tm.f1_answer("园花", ["花园"]) == 1.0  # 袋子不管次序
    assert tm.f1_cmrc("园花", ["花园"]) == pytest.approx(0.5)  # 连着的只有一个
    assert tm.f1_answer("价格是 3.5 元", ["3.5 元"]) == pytest.approx(2 * 2 / (5 + 2))  # 3.5 是一个单位
    assert tm.f1_answer("。", ["花园"]) == 0.0
    assert tm.f1_answer("", ["花园", "学校"]) == 0.0
    assert tm.f1_spaces("小刚去了花园", ["小刚去花园"]) == 0.0  # 差一个字，SQuAD 的原样给 0


def test_cmrc_by_hand():
    """CMRC 官方脚本的约定：标点按它的表去掉，最长公共子串，几个标准答案取最好的。"""
    assert tm.split_cmrc("2018年CMRC，评测") == ["2018", "年", "cmrc", "评", "测"]
    assert tm.em_cmrc("「花园」", ["花园"]) == 1.0
    assert tm.em_cmrc("１２", ["12"]) == 0.0  # 它不认全角
    # 共同最长的一段是 花园里（3），回答 5、标准答案 4
    assert tm.f1_cmrc("在花园里玩", ["花园里面"]) == pytest.approx(2 * 3 / (5 + 4))
    assert tm.f1_cmrc("学校", ["花园", "学校里"]) == pytest.approx(2 * 2 / (2 + 3))
    assert tm.f1_cmrc("", ["花园"]) == 0.0


def test_cmrc_words_equal_nltk():
    """官方脚本切英文的词用 nltk.word_tokenize，它切一句里的词的部分不用下载数据。"""
    tokenizer = pytest.importorskip("nltk.tokenize", reason="与 nltk 比").NLTKWordTokenizer()
    for line in (
        "Kaji Dha",
        "f(x)",
        "3.14",
        "1,000 kg",
        "99%",
        "U.S. army",
        "[a] {b}",
        "$5; ok?",
        "a,b",
        "rock'n'roll",
    ):
        assert tm.split_cmrc(line) == tokenizer.tokenize(line.lower()), line


# ---------------------------------------------------------------- BLEU


def test_bleu_by_hand():
    # 7 个字对 7 个字，错一个（花→果）：一元 6/7，二元 4/6，三元 2/5，四元 1/4
    counts = tm.bleu_counts("小刚去了果园。", ["小刚去了花园。"])
    assert counts.tolist() == [7, 7, 6, 4, 2, 1, 7, 6, 5, 4]
    assert tm.bleu(counts) == pytest.approx(100 * (6 / 7 * 4 / 6 * 2 / 5 * 1 / 4) ** 0.25)
    # 短了要罚：回答 4 个字，标准答案 7 个
    short = tm.bleu(tm.bleu_counts("小刚去了", ["小刚去了花园。"]))
    assert short == pytest.approx(100 * np.exp(1 - 7 / 4))
    assert tm.bleu(tm.bleu_counts("小刚去了花园。", ["小刚去了花园。"])) == pytest.approx(100)
    assert tm.bleu(tm.bleu_counts("", ["花园"])) == 0.0
    # 只答一个词：没有三元、四元，整批的算法给 0，单句的有几元算几元
    assert tm.bleu(tm.bleu_counts("花园", ["花园"])) == 0.0
    assert tm.bleu(tm.bleu_counts("花园", ["花园"]), short=True) == pytest.approx(100)


def random_pairs(n, seed):
    rng = random.Random(seed)
    said, wanted = [], []
    for _ in range(n):
        base = [rng.choice(PIECES) for _ in range(rng.randint(1, 14))]
        said.append("".join(piece for piece in base if rng.random() < 0.8).replace("\n", " "))
        several = [base, [piece for piece in base if rng.random() < 0.7] or ["花园"]]
        wanted.append(["".join(each).replace("\n", " ") for each in several])
    return said, wanted


@pytest.mark.parametrize("name", ["13a", "zh", "char"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bleu_equals_sacrebleu(name, seed):
    bleu = pytest.importorskip("sacrebleu.metrics", reason="与 sacrebleu 比").BLEU
    split = {"13a": tm.split_13a, "zh": tm.split_zh, "char": tm.split_char}[name]
    said, wanted = random_pairs(60, seed)
    columns = [list(column) for column in zip(*wanted, strict=True)]
    counts = [tm.bleu_counts(s, w, split) for s, w in zip(said, wanted, strict=True)]
    theirs = bleu(tokenize=name).corpus_score(said, columns).score
    assert tm.bleu(np.sum(counts, axis=0)) == pytest.approx(theirs, abs=1e-9)
    single = bleu(tokenize=name, effective_order=True)
    for s, w, count in zip(said, wanted, counts, strict=True):
        assert tm.bleu(count, short=True) == pytest.approx(single.sentence_score(s, w).score, abs=1e-9)


# ---------------------------------------------------------------- chrF、ROUGE


def test_chrf_by_hand():
    # "花园" 对 "花园里"：一元 2/2、2/3，二元 1/1、1/2，三元回答没有、不算
    precision, recall = 1.0, (2 / 3 + 1 / 2) / 2
    wanted = 100 * 5 * precision * recall / (4 * precision + recall)
    assert tm.chrf(tm.chrf_counts("花园", ["花园里"])) == pytest.approx(wanted)
    assert tm.chrf(tm.chrf_counts("", ["花园"])) == 0.0


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_chrf_equals_sacrebleu(seed):
    chrf = pytest.importorskip("sacrebleu.metrics", reason="与 sacrebleu 比").CHRF
    said, wanted = random_pairs(60, seed)
    columns = [list(column) for column in zip(*wanted, strict=True)]
    counts = [tm.chrf_counts(s, w) for s, w in zip(said, wanted, strict=True)]
    assert tm.chrf(np.sum(counts, axis=0)) == pytest.approx(
        chrf().corpus_score(said, columns).score, abs=1e-9
    )
    for s, w, count in zip(said, wanted, counts, strict=True):
        assert tm.chrf(count) == pytest.approx(chrf().sentence_score(s, w).score, abs=1e-9)


@pytest.mark.parametrize("seed", [0, 1])
def test_rouge_equals_rouge_score(seed):
    scorer_class = pytest.importorskip("rouge_score.rouge_scorer", reason="与 rouge-score 比").RougeScorer
    from answer_scores import Characters

    ours = {
        "rouge1": lambda s, w, split: tm.rouge_n(s, w, 1, split),
        "rouge2": lambda s, w, split: tm.rouge_n(s, w, 2, split),
        "rougeL": lambda s, w, split: tm.rouge_l(s, w, split),
    }
    by_char, by_default = scorer_class(list(ours), tokenizer=Characters()), scorer_class(list(ours))
    for s, w in zip(*random_pairs(60, seed), strict=True):
        for scorer, split in ((by_char, tm.split_char), (by_default, tm.split_rouge)):
            theirs = scorer.score_multi(w, s)
            for name, score in ours.items():
                assert score(s, w, split) == pytest.approx(theirs[name].fmeasure, abs=1e-12)


def lcs_by_table(a, b):
    """教科书的表。"""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a, 1):
        for j, y in enumerate(b, 1):
            table[i][j] = table[i - 1][j - 1] + 1 if x == y else max(table[i - 1][j], table[i][j - 1])
    return table[-1][-1]


@settings(max_examples=300, deadline=None)
@given(a=st.text("花园里的小", max_size=12), b=st.text("花园里的小", max_size=12))
def test_longest_common_parts(a, b):
    assert tm.lcs_length(a, b) == lcs_by_table(a, b) == tm.lcs_length(b, a)
    runs = {a[i:j] for i in range(len(a)) for j in range(i + 1, len(a) + 1)}
    assert tm.longest_run(list(a), list(b)) == max([len(run) for run in runs if run in b], default=0)


@settings(max_examples=100, deadline=None)
@given(said=text, wanted=st.lists(text.filter(str.strip), min_size=1, max_size=3))
def test_scores_stay_between_0_and_1(said, wanted):
    from answer_scores import item_scores

    scores = item_scores(said, wanted)
    assert all(-1e-12 <= value <= 1 + 1e-12 for value in scores.values())
    # 多给一个标准答案：EM、F1、ROUGE、chrF 不会变低（BLEU 会：长度罚的是最接近的那个）
    more = item_scores(said, [*wanted, "花园里有松鼠"])
    for name in ("em", "f1", "f1_cmrc", "rouge_1", "rouge_2", "rouge_l", "chrf"):
        assert more[name] >= scores[name] - 1e-12
