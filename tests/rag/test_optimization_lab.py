"""调优实验室：指标对得上手算；账本断了接着来，与一次做完相同；自己的实验记进同一本账。"""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

import optimization_lab as ol
from lab_pipeline import Config, Lab, Outcome, changed, clauses, difference, fill_in
from nlp_common.base.errors import UserError
from rag_common.chunking import Chunk
from rag_common.corpus import Corpus, Question
from rag_common.documents import Document

QUICK = ["--preset", "tiny", "--embedder", "hashed", "--documents", "60", "--questions", "40"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "r"
    arguments = [*QUICK, "--output_dir", str(folder)]
    return ol.main(arguments), arguments, folder


def rows_of(folder):
    return [json.loads(line) for line in (folder / ol.LEDGER).read_text(encoding="utf-8").splitlines()]


def without_time(rows):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_the_lesson(finished):
    record, arguments, folder = finished
    rows = {row["name"]: row for row in rows_of(folder)}
    assert list(rows) == ["start", *(name for name, _ in ol.EXPERIMENTS)]
    assert rows["start"]["metrics"]["recall_at_1"] < 0.1 < 0.9 < rows["characters"]["metrics"]["recall_at_1"]
    assert rows["characters"]["verdict"] == "better" and rows["rerank_random"]["verdict"] == "worse"
    assert rows["rerank_random"]["metrics"]["recall_at_1"] < rows["simplified"]["metrics"]["recall_at_1"] / 2
    assert rows["blank"]["metrics"]["exact_match"] > 0.4
    for row in rows.values():
        assert (row["low"] > 0) == (row["verdict"] == "better")
        assert row["low"] <= row["gain"] + 1e-9 and row["gain"] <= row["high"] + 1e-9
    held_out = record["metrics"]["held_out"]
    assert held_out["low"] > 0 and (folder / "progress.svg").is_file()
    assert ol.main(arguments) == json.loads((folder / "run.json").read_text(encoding="utf-8"))  # 第二次直接用


def test_interrupted_and_resumed_is_the_same(finished, tmp_path, monkeypatch):
    _, _, folder = finished
    arguments = [*QUICK, "--output_dir", str(tmp_path / "r")]
    real, calls = ol.Lab.run, []

    def run(self, config, questions):
        calls.append(config)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(self, config, questions)

    monkeypatch.setattr(ol.Lab, "run", run)
    with pytest.raises(KeyboardInterrupt):
        ol.main(arguments)
    (ledger,) = tmp_path.rglob(ol.LEDGER)
    assert len(ledger.read_text(encoding="utf-8").splitlines()) == 5
    with ledger.open("a", encoding="utf-8") as file:
        file.write('{"name": "断在半')  # 断电时写了一半的一行
    ol.main(arguments)
    assert without_time(rows_of(tmp_path / "r")) == without_time(rows_of(folder))
    assert len(calls) == 6 + (1 + len(ol.EXPERIMENTS) - 5) + 2  # 做完的五个没有重做


def test_own_experiment(finished, capsys):
    _, arguments, folder = finished
    before = rows_of(folder)
    row = ol.main([*arguments, "--try", "k=2 reader=sentence"])
    assert row["name"] == "try_1" and row["verdict"] == "worse" and row["change"] == "k=2 reader=sentence"
    assert rows_of(folder)[:-1] == before and rows_of(folder)[-1] == row
    assert ol.main([*arguments, "--try", "k=2 reader=sentence"]) == row
    assert "已有一样的" in capsys.readouterr().out and len(rows_of(folder)) == len(before) + 1
    with pytest.raises(UserError, match="--generator"):
        ol.main([*arguments, "--try", "reader=model"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "空的"),
        ("chunk", "chunk 看不懂"),
        ("chunks=9", "是不是 chunk"),
        ("chunk=大", "chunk 要是整数"),
        ("chunk=2", "chunk 要在 8 到 4000"),
        ("weight=nan", "weight 要在 0 到 1"),
        ("fusion=both", "fusion 没有 both，可以是 bm25"),
        ("chunk=64 overlap=64", "overlap.*小"),
        ("reader=model", "--generator"),
    ],
)
def test_an_experiment_that_is_none(text, message, tmp_path):
    with pytest.raises(UserError, match=message):
        ol.main([*QUICK, "--output_dir", str(tmp_path / "r"), "--try", text])


def test_change_and_difference():
    config = changed(Config(), "chunk=96 fusion=rrf weight=0.5")
    assert (config.chunk, config.fusion, config.weight) == (96, "rrf", 0.5)
    assert (
        difference(config, Config()) == "chunk=96 fusion=rrf weight=0.5" and difference(config, config) == ""
    )


def test_a_ledger_that_was_damaged(tmp_path):
    path = tmp_path / "l.jsonl"
    path.write_text('{"name": "甲"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"l.jsonl 第 1 行"):
        ol.Ledger(path)
    path.write_text("[1]\n不是 JSON\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"l.jsonl 第 1 行"):
        ol.Ledger(path)


# ---------------------------------------------------------------- 指标


def test_context_precision_by_hand():
    assert ol.context_precision([True, False, True]) == pytest.approx((1 / 1 + 2 / 3) / 2)
    assert ol.context_precision([False, True]) == 0.5
    assert ol.context_precision([False, False]) == ol.context_precision([]) == 0.0


@given(st.lists(st.booleans(), max_size=12))
def test_context_precision_is_one_only_when_the_useful_come_first(useful):
    value = ol.context_precision(useful)
    assert 0 <= value <= 1
    sorted_first = useful == sorted(useful, reverse=True) and any(useful)
    assert (value == pytest.approx(1.0)) == sorted_first


def test_share_found_by_hand():
    assert ol.share_found("一次借五本", ["读者一次借五本书"]) == 1.0
    assert ol.share_found("一次借八本", ["读者一次借五本书"]) == 0.5  # 一次、次借在；借八、八本不在
    assert ol.share_found("", ["甲"]) == 1.0 and ol.share_found("乙", ["甲"]) == 0.0


def test_score_by_hand():
    question = Question("一次借几本？", "五本", frozenset("甲"), "plain", {"answers": ["五本", "5本"]})
    contexts = [Chunk("1", "借期三十天", "甲"), Chunk("2", "一次借五本。", "甲"), Chunk("3", "五本", "乙")]
    row = ol.score(question, Outcome(["乙", "甲"], contexts, "借五本"))
    assert row["recall_at_1"] == 0.0 and row["recall_at_5"] == 1.0 and row["mrr"] == 0.5
    assert row["context_precision"] == 0.5  # 第三块有"五本"，可是在别的文档里
    assert row["context_recall"] == 1.0 and row["exact_match"] == 0.0
    assert row["f1"] == pytest.approx(2 * (2 / 3) * 1 / (2 / 3 + 1)) and row["faithfulness"] == 1.0


def test_fill_in_by_hand():
    assert fill_in("中国政府恢复对哪里行使主权？", "中国政府恢复对香港行使主权") == "香港"
    assert fill_in("谁说今年是好年头？", "新闻司司长说今年是好年头") == "新闻司司长"
    assert fill_in("一次借几本？", "一次借五本") == "一次借五本"
    assert fill_in("去了哪里？", "") == ""
    assert clauses(["甲乙，丙。", "\n丁"]) == ["甲乙", "丙", "丁"]


def test_every_step_of_the_pipeline_can_be_changed():
    texts = ["一次最多借五本。逾期一天罚一角。", "三楼自习室可以预约座位。", "周一闭馆整理。"]
    corpus = Corpus("手算", [Document(str(n), text) for n, text in enumerate(texts)], [])
    question = [Question("自习室的座位可以预约吗？", "", frozenset("1"))]
    for change in (
        "fusion=dense",
        "fusion=rrf",
        "fusion=weighted",
        "rerank=aligner",
        "splitter=structure",
        "overlap=4",
    ):
        config = changed(Config(chunk=12, tokenizer="characters_and_bigrams"), change)
        (outcome,) = Lab(corpus, "hashed").run(config, question)
        assert outcome.documents[0] == "1" and len(outcome.contexts) <= config.k, change
        assert outcome.answer and outcome.answer in texts[1]
