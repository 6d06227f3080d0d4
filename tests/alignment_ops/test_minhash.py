"""MinHash + LSH：与照公式一个个整数算的相同；误差与公式一样；丢掉的都真的像，留下的不会因为别人丢掉。"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minhash
from hash_families import FAMILIES, sets_with, try_family
from minhash import (
    Duplicate,
    band_keys,
    choose_bands,
    find_duplicates,
    find_exact,
    hashed_ngrams,
    jaccard,
    make_scheme,
    normalize,
    seen_probability,
    shingles,
    signatures,
    smallest,
)

TEXTS = ["今天天气很好，我们去公园。", "好", "", "abc", "松鼠吃了香蕉" * 40, "😀😀😀😀😀😀"]
STORY = "那天清晨小军来到书店忽然跑来一只深棕的乌龟小军拿出玉米给它吃不久吴哥也来了小军心里很害怕"
WORDS = st.text(alphabet="今天气很好我们去公园吃饭，。3+ ", max_size=40)


def mixed(value: int) -> int:
    """MurmurHash3 的收尾，用 Python 的整数。"""
    for multiplier in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        value ^= value >> 33
        value = value * multiplier % 2**64
    return value ^ value >> 33


def ngram_hashes(text: str, n: int) -> list[int]:
    text, found = text.ljust(n, "\0"), []
    for start in range(len(text) - n + 1):
        value = 0
        for letter in text[start : start + n]:
            value = (value * 0x9E3779B97F4A7C15 + ord(letter)) % 2**64
        found.append(mixed(value) >> 32)
    return found


@pytest.mark.parametrize("n", [1, 3, 5])
def test_ngrams_are_those_of_each_text_alone(n):
    hashes, starts = hashed_ngrams(TEXTS, n)
    parts = [part.tolist() for part in np.split(hashes, starts[1:])]
    assert parts == [ngram_hashes(text, n) for text in TEXTS]


def test_signatures_are_the_formula_in_whole_numbers(monkeypatch):
    scheme = make_scheme(0.8, n_hashes=16, seed=3)
    expected = []
    for text in TEXTS:
        rows = zip(scheme.multipliers.tolist(), scheme.offsets.tolist(), strict=True)
        expected.append([min((a * x + b) % 2**64 >> 32 for x in ngram_hashes(text, 5)) for a, b in rows])
    assert signatures(TEXTS, scheme).tolist() == expected
    monkeypatch.setattr(minhash, "BATCH_CHARACTERS", 5)  # 分批与不分批一样
    assert signatures(TEXTS, scheme).tolist() == expected


@given(WORDS, WORDS)
def test_jaccard_is_that_of_the_sets(left, right):
    first, second = (set(ngram_hashes(text, 5)) for text in (left, right))
    assert jaccard(shingles(left), shingles(right)) == len(first & second) / len(first | second)


def test_the_error_is_the_one_of_the_formula():
    """400 对：均值在四个标准误之内；标准差的相对误差约 1/√800，也给四倍。"""
    scheme, rng = make_scheme(), np.random.default_rng(0)
    for similarity in (0.2, 0.5, 0.8, 0.95):
        sets = [each for _ in range(400) for each in sets_with(similarity, 200, rng)]
        values = smallest(np.concatenate(sets), np.cumsum([0, *map(len, sets)])[:-1], scheme)
        estimates = (values[0::2] == values[1::2]).mean(axis=1)
        theory = (similarity * (1 - similarity) / 128) ** 0.5
        assert abs(estimates.mean() - similarity) < 4 * theory / 20
        assert abs(estimates.std() / theory - 1) < 4 / 800**0.5


def test_small_multipliers_pick_one_and_the_same_element():
    """a < 2^29：a·x + b 小于 p，mod p 什么也没做，128 个办法选中同一个元素，估计不是 0 就是 1。"""
    found = {
        name: try_family(FAMILIES[name][1], 0.5, 100, 60, 128, 0) for name in ("small_29", "multiply_shift")
    }
    assert found["small_29"]["elements_picked"] < 1.5 and found["small_29"]["times_theory"] > 8
    assert found["multiply_shift"]["elements_picked"] > 50 and found["multiply_shift"]["times_theory"] < 1.4


def test_estimates_beside_datasketch():
    datasketch = pytest.importorskip("datasketch", reason="要 datasketch 才比得了")
    scheme = make_scheme()
    for cut in (2, 6, 20):
        pair = [STORY, STORY[cut:] + "后来下起了大雨大家都回家去了"[:cut]]
        true = jaccard(*(shingles(text) for text in pair))
        sketches = datasketch.MinHash.bulk(
            [{text[at : at + 5].encode() for at in range(len(text) - 4)} for text in pair], num_perm=128
        )
        theirs, ours = sketches[0].jaccard(sketches[1]), minhash.estimate(*signatures(pair, scheme))
        deviation = (true * (1 - true) / 128) ** 0.5
        assert abs(ours - true) < 4 * deviation and abs(theirs - true) < 4 * deviation


def test_bands_follow_the_s_curve():
    scheme, rng = make_scheme(seed=1), np.random.default_rng(1)
    for similarity in (0.3, 0.5, 0.6, 0.7, 0.85):
        sets = [each for _ in range(300) for each in sets_with(similarity, 200, rng)]
        values = smallest(np.concatenate(sets), np.cumsum([0, *map(len, sets)])[:-1], scheme)
        keys = band_keys(values, 18, 7)
        seen = (keys[0::2] == keys[1::2]).any(axis=1).mean()
        theory = seen_probability(similarity, 18, 7)
        assert abs(seen - theory) < 4 * (theory * (1 - theory) / 300) ** 0.5 + 0.01


def test_a_key_is_equal_only_when_the_whole_band_is():
    values = np.array([[1, 2, 3, 4], [1, 2, 4, 3], [2, 1, 3, 4], [3, 4, 1, 2]], np.uint32)
    keys = band_keys(values, 2, 2)
    assert keys[0, 0] == keys[1, 0] and keys[0, 1] == keys[2, 1]
    assert len(np.unique(keys)) == 6  # 别的都不同：次序不同的不同，第几段不同的也不同


@given(st.floats(0.05, 1.0), st.integers(1, 200))
def test_chosen_bands_see_the_threshold_and_no_more_than_needed(threshold, n_hashes):
    bands, rows = choose_bands(threshold, n_hashes)
    assert bands * rows <= n_hashes
    assert rows == 1 or seen_probability(threshold, bands, rows) >= minhash.RECALL
    if rows < n_hashes:
        assert seen_probability(threshold, n_hashes // (rows + 1), rows + 1) < minhash.RECALL


def test_bands_by_hand():
    assert choose_bands(0.8, 128) == (18, 7)  # 1 − (1 − 0.8^7)^18 = 0.9855；16 段 8 个只有 0.947
    assert seen_probability(0.8, 18, 7) == pytest.approx(1 - (1 - 0.2097152) ** 18)
    assert choose_bands(1.0, 128) == (1, 128)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("你好，世界！", "你 好世界"),
        ("ＡＢＣ１２３", "abc123"),
        ("“好的。”", "好的"),
        ("第1、苹果", "第1.苹果"),
        ("x = 3 + 5", "x=3+5"),
        ("A\tB\n", "ab"),
    ],
)
def test_the_same_but_for_marks_and_width(left, right):
    assert normalize(left) == normalize(right)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("3 + 5 等于几？", "3 - 5 等于几？"),
        ("3×5 等于几", "3÷5 等于几"),
        ("一共 1.5 元", "一共 15 元"),
        ("涨了 50%", "涨了 50"),
        ("-5 的绝对值", "5 的绝对值"),
        ("……", "。。。"),
    ],
)
def test_marks_that_change_the_question(left, right):
    assert normalize(left) != normalize(right)


def test_of_a_chain_only_the_middle_is_dropped():
    """第二段像第一段，第三段像第二段而不像第一段：只丢第二段。"""
    letters = "".join(chr(0x4E00 + number) for number in range(120))
    texts = [letters[0:100], letters[8:108], letters[16:116]]
    first, second, third = (shingles(text) for text in texts)
    assert jaccard(first, second) > 0.8 > jaccard(first, third) and jaccard(second, third) > 0.8
    assert find_duplicates(texts) == [Duplicate(1, 0, jaccard(first, second))]


def test_copies_of_a_dropped_text_point_to_the_kept_one():
    changed = STORY.replace("玉米", "香蕉")
    found = find_duplicates([STORY, changed, "。".join(changed), STORY], threshold=0.7)
    similarity = jaccard(shingles(STORY), shingles(changed))
    assert found == [Duplicate(1, 0, similarity), Duplicate(2, 0, similarity), Duplicate(3, 0, 1.0)]


def test_the_most_similar_is_named_and_the_first_of_equals():
    letters = "".join(chr(0x4E00 + number) for number in range(100))
    near, nearer = "甲乙丙丁戊己庚" + letters[7:], letters[:95] + "子丑寅卯辰"
    assert [each[:2] for each in find_duplicates([near, nearer, letters])] == [(2, 1)]
    equal = [letters[:-3] + "子丑寅", "甲乙丙" + letters[3:], letters]
    assert [each[:2] for each in find_duplicates(equal, threshold=0.9)] == [(2, 0)]


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ([], []),
        (["", ""], [(1, 0)]),
        (["a", "b"], []),
        (["。", "。", "！"], [(1, 0)]),
        (["\ud800", "\ud800"], [(1, 0)]),
    ],
)
def test_odd_texts(texts, expected):
    assert [each[:2] for each in find_duplicates(texts)] == expected == find_exact(texts)


@settings(max_examples=60, deadline=None)
@given(st.lists(WORDS, max_size=12), st.sampled_from([0.3, 0.6, 0.9]))
def test_what_is_dropped_is_like_something_kept(texts, threshold):
    found = find_duplicates(texts, threshold)
    dropped = {each.dropped for each in found}
    assert [each.dropped for each in found] == sorted(dropped)
    for each in found:
        assert each.kept < each.dropped and each.kept not in dropped and each.similarity >= threshold
        sets = [shingles(normalize(texts[place])) for place in (each.dropped, each.kept)]
        assert each.similarity == jaccard(*sets)
    assert {row for row, _ in find_exact(texts)} <= dropped


def test_nearly_all_pairs_are_found():
    """100 段各改一个字的副本（Jaccard 约 0.88）：公式说漏掉不到千分之一。"""
    rng = np.random.default_rng(2)
    texts = ["".join(map(chr, rng.integers(0x4E00, 0x6E00, 80))) for _ in range(100)]
    copies = [text[:40] + "改" + text[41:] for text in texts]
    found = find_duplicates(texts + copies)
    assert [(each.dropped, each.kept) for each in found] == [(100 + at, at) for at in range(100)]


def test_the_seed_changes_the_hashes_only():
    assert make_scheme(seed=1).multipliers.tolist() != make_scheme(seed=2).multipliers.tolist()
    texts = [STORY, STORY + "。完", "别的文字，一点也不像"]
    assert find_duplicates(texts, seed=1) == find_duplicates(texts, seed=2)
