"""BM25：与照公式一条一条算的、与 bm25s 相同；添、改、删之后，与重新建一个索引相同。"""

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nlp_common.base.errors import UserError
from rag_common import tokenizers
from rag_common.bm25 import BM25, top
from rag_common.tokenizers import characters_and_bigrams, normalize

TEXTS = [
    "那天清晨，小刚去了花园。",
    "一只乌黑的松鼠跑了过来，松鼠很高兴。",
    "小刚拿出香蕉给它吃。2008 年的 iPhone 很贵",
    "",
    "后来王伯也来了，王伯去了花园，花园里有香蕉",
]


def by_formula(texts: list[str], query: str, tokenizer=characters_and_bigrams, k1=1.5, b=0.75) -> list[float]:
    """照公式，一段一段、一个词一个词地算。"""
    docs = [tokenizer(text) for text in texts]
    average = sum(map(len, docs)) / len(docs)
    scores = []
    for doc in docs:
        score = 0.0
        for word in tokenizer(query):
            df = sum(word in other for other in docs)
            idf = math.log(1 + (len(docs) - df + 0.5) / (df + 0.5))
            tf = doc.count(word)
            score += idf * tf / (tf + k1 * (1 - b + b * len(doc) / average)) if tf else 0.0
        scores.append(score)
    return scores


def built(texts: list[str], **options) -> BM25:
    index = BM25(**options)
    index.add([str(n) for n in range(len(texts))], texts)
    return index


@pytest.mark.parametrize("query", ["小刚去了哪里？", "松鼠", "花园花园", "iphone 2008", "没有的词语", ""])
def test_scores_are_the_formula(query):
    expected = by_formula(TEXTS, query)
    assert built(TEXTS).scores(query) == pytest.approx(expected, abs=3e-6)
    assert built(TEXTS, k1=0.9, b=0.4).scores(query) == pytest.approx(
        by_formula(TEXTS, query, k1=0.9, b=0.4), abs=3e-6
    )
    found = built(TEXTS).search(query, 10)
    assert [name for name, _ in found] == [
        str(n) for n in sorted(range(5), key=lambda n: -expected[n]) if expected[n] > 0
    ]


def random_texts(n: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [
        "".join(rng.choices("一二三四五六七八九十百千万天地人，ab 1", k=rng.randint(0, 60))) for _ in range(n)
    ]


def test_equal_to_bm25s():
    """同样的词，每一段的分与 bm25s 的 lucene 相差不到 3e-6（相对）。"""
    bm25s = pytest.importorskip("bm25s", reason="没有装 bm25s")
    texts = random_texts(300, 0)
    theirs = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
    theirs.index([characters_and_bigrams(text) for text in texts], show_progress=False)
    ours = built(texts)
    for query in random_texts(30, 1):
        tokens = [token for token in characters_and_bigrams(query) if token in theirs.vocab_dict]
        if tokens:
            assert ours.scores(query) == pytest.approx(theirs.get_scores(tokens), rel=3e-6, abs=3e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.sampled_from(["add", "delete", "change"]), max_size=30))
def test_after_any_changes_it_equals_a_fresh_index(seed, steps):
    """添、删、改无论什么次序，分数与照现在的文字重新建的索引相同；节数不会一直多下去。"""
    rng = random.Random(seed)
    index, texts = BM25(), {}
    for number, step in enumerate(steps):
        if step == "add":
            new = {
                f"{number}-{i}": text for i, text in enumerate(random_texts(rng.randint(0, 4), rng.random()))
            }
        else:
            chosen = rng.sample(sorted(texts), min(len(texts), rng.randint(0, 4)))
            new = {name: random_texts(1, rng.random())[0] for name in chosen} if step == "change" else {}
            if step == "delete":
                assert index.delete([*chosen, "没有"]) == len(chosen)
                for name in chosen:
                    del texts[name]
        index.add(list(new), list(new.values()))
        texts |= new
        assert len(index) == len(texts) and len(index.segments) <= 9
    fresh = BM25()
    fresh.add(list(texts), list(texts.values()))
    for query in ("一二三", "天地人 ab", "九九"):
        assert dict(index.search(query, 1000)) == pytest.approx(dict(fresh.search(query, 1000)), abs=3e-6)


def test_many_small_additions_stay_few_segments():
    index = BM25()
    for n in range(100):
        index.add([str(n)], [f"第 {n} 条，天地"])
    assert len(index) == 100 and len(index.segments) <= 9
    assert index.search("第 42 条", 1)[0][0] == "42"
    assert index.delete(map(str, range(100))) == 100
    assert len(index) == 0 and index.search("天地", 3) == [] and not index.segments


def test_only_among_the_allowed():
    index = built(TEXTS)
    assert [name for name, _ in index.search("花园 小刚", 5, allowed={"4", "没有"})] == ["4"]
    assert index.search("花园", 5, allowed=set()) == []


def test_saved_and_read_back(tmp_path):
    index = built(TEXTS)
    index.delete(["1"])
    index.save(tmp_path)
    again = BM25.load(tmp_path)
    assert again.search("小刚的花园", 5) == index.search("小刚的花园", 5) and len(again) == 4
    again.add(["新"], ["新的花园"])
    assert "新" in again and again.search("新的", 1)[0][0] == "新"
    with pytest.raises(UserError, match="分词器"):
        BM25.load(tmp_path, tokenizers.characters)
    data = (tmp_path / "bm25.npz").read_bytes()
    (tmp_path / "bm25.npz").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="坏了"):
        BM25.load(tmp_path)
    with pytest.raises(UserError, match="没有 BM25"):
        BM25.load(tmp_path / "别处")


def test_refused():
    for ids, texts, message in ((["a"], [], "一样多"), (["a", "a"], ["", ""], "重复")):
        with pytest.raises(UserError, match=message):
            BM25().add(ids, texts)
    with pytest.raises(UserError, match="k1"):
        BM25(k1=-1)


@given(st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.0]), max_size=30), st.integers(0, 40))
def test_top_is_sorting(values, k):
    scores = np.array(values, dtype=np.float32)
    assert list(top(scores, k)) == sorted(range(len(values)), key=lambda n: (-values[n], n))[:k]


# ---------------------------------------------------------------- 分词


def test_characters_and_bigrams():
    assert characters_and_bigrams("北京２００８年，iPhone") == ["北", "京", "北京", "2008", "年", "iphone"]
    assert tokenizers.characters("北京a1") == ["北", "京", "a1"]
    assert tokenizers.bigrams("北京市的 a") == ["北京", "京市", "市的", "a"]
    assert tokenizers.bigrams("我，你们") == ["我", "你们"]


def test_default_tokenizers_make_nothing_of_chinese():
    """问题与原文没有一个"词"相同，所以一段也找不到。"""
    text, query = "今天下午，小刚去了学校的花园。", "小刚去了哪里？"
    for tokenizer in (tokenizers.whitespace, tokenizers.word_pattern):
        assert not set(tokenizer(text)) & set(tokenizer(query))
        assert built([text], tokenizer=tokenizer).search(query, 1) == []
    assert built([text]).search(query, 1)


@given(st.text())
def test_every_tokenizer_takes_any_text(text):
    for name in ("characters_and_bigrams", "characters", "bigrams", "whitespace", "word_pattern"):
        tokens = tokenizers.tokenizer_named(name)(text)
        assert all(tokens) and all(token in normalize(text) or token in text.lower() for token in tokens)


def test_jieba():
    pytest.importorskip("jieba", reason="没有装 jieba")
    assert "学校" in tokenizers.jieba_words("小刚去了学校。")
    with pytest.raises(UserError, match="characters_and_bigrams"):
        tokenizers.tokenizer_named("bert")
