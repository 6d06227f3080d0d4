"""混合检索：各行对得上手算；向量只算一次，中断了接着来；HyDE、改写、自己的文件夹都走得通。"""

import json

import numpy as np
import pytest

import hybrid_retrieval as hr
from nlp_common.base.errors import UserError
from rag_common.bm25 import BM25
from rag_common.corpus import Corpus, Question, tiny_world_corpus
from rag_common.documents import Document
from rag_common.embed import HashedEmbedder
from rag_common.store import open_store

QUICK = [
    "--preset",
    "tiny",
    "--embedder",
    "hashed",
    "--generator",
    "none",
    "--documents",
    "60",
    "--questions",
    "30",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "r"
    arguments = [*QUICK, "--stories", "60", "--output_dir", str(folder)]
    return hr.main(arguments), arguments, folder


def test_the_lesson(finished):
    record, arguments, folder = finished
    metrics = record["metrics"]
    assert set(metrics["slices"]) == set(hr.SLICES) and set(metrics["methods"]) == set(hr.METHODS) - {"hyde"}
    for rows in metrics["slices"].values():
        for row in rows.values():
            assert (
                0 <= row["recall_at_1"] <= row["mrr"] <= 1 and row["recall_at_1"] <= row["recall_at_5"] <= 1
            )
    tokenizers = {name: row["recall_at_1"] for name, row in metrics["tokenizers"].items()}
    assert tokenizers["whitespace"] < 0.1 and tokenizers["word_pattern"] < 0.2
    assert tokenizers["characters_and_bigrams"] > 0.9
    bounds, tiny = metrics["bounds"], metrics["slices"]
    assert tiny["tiny_world"]["bm25"]["recall_at_1"] == pytest.approx(
        bounds["tiny_world"]["matches"], abs=0.15
    )
    assert bounds["synonyms"]["literal"] < bounds["synonyms"]["matches"]
    assert (folder / "slices.svg").is_file() and (folder / "weights.svg").is_file()
    assert hr.main(arguments) == json.loads((folder / "run.json").read_text(encoding="utf-8"))  # 第二次直接用
    with pytest.raises(UserError, match="weight"):
        hr.main([*arguments, "--weight", "0.3"])
    with pytest.raises(UserError, match="HyDE 的模型在本机运行"):
        hr.main([*arguments, "--generator", "http://127.0.0.1:9/v1 m"])


def small() -> Corpus:
    texts = {"甲": "小刚去了花园", "乙": "松鼠吃了香蕉", "丙": "王伯也来了"}
    documents = [Document(name, text) for name, text in texts.items()]
    return Corpus("小", documents, [Question("谁去了花园？", "小刚", frozenset(["甲"]))])


class Counting(HashedEmbedder):
    def __init__(self):
        super().__init__()
        self.embedded: list[str] = []

    def passages(self, texts):
        self.embedded += texts
        return super().passages(texts)


def test_only_missing_passages_are_embedded(tmp_path, capsys):
    """中断之后只补没存的，说出来；文字变了的重算，不在了的删掉；别的语料的不动。"""
    embedder, corpus = Counting(), small()
    store, here = open_store(f"faiss://{tmp_path}/s", embedder.fingerprint, embedder.dim), {"corpus": "小"}
    hr.fill(store, embedder, hr.chunks_of(Corpus("别的", [Document("甲", "不相干")], [])), {"corpus": "别的"})
    hr.fill(store, embedder, hr.chunks_of(corpus)[:2], here, batch=1)
    assert "库里已经有" not in capsys.readouterr().out
    embedder.embedded.clear()
    assert hr.fill(store, embedder, hr.chunks_of(corpus), here) == 1
    assert (
        embedder.embedded == ["王伯也来了"] and "库里已经有 2 段，接着写缺的 1 段" in capsys.readouterr().out
    )
    corpus.documents[1] = Document("乙", "松鼠吃了面包")
    hr.fill(store, embedder, hr.chunks_of(corpus), here)
    assert embedder.embedded[1:] == ["松鼠吃了面包"]
    assert store.count(here) == 3 and store.count() == 4
    found = hr.search_dense(store, "小", embedder.queries(["小刚去了花园"]))[0]
    assert found[0] == ("甲", pytest.approx(1.0, abs=1e-5))
    assert {name for name, _ in found} == {"甲", "乙", "丙"}
    store.close()


def test_finished_slices_are_not_measured_again(finished, tmp_path, monkeypatch, capsys):
    """断在第三片：前两片直接用，结果与一口气做完的相同。"""
    arguments = [*finished[1][:-1], str(tmp_path / "r")]
    measured, whole = [], hr.retrieve

    def breaks_at_the_third(corpus, *rest):
        measured.append(corpus.name)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return whole(corpus, *rest)

    monkeypatch.setattr(hr, "retrieve", breaks_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        hr.main(arguments)
    assert not (tmp_path / "r").exists()
    again = hr.main(arguments)
    assert len(measured) == 2 + 1 + 3  # 两片，断了的，再来的三片
    said = capsys.readouterr().out
    assert "plain：上次中断以前做完了" in said and "traditional：上次" not in said
    assert again["metrics"] == finished[0]["metrics"]


def test_methods_are_what_they_say(tmp_path):
    """dense 是余弦的次序，bm25 是 BM25 的次序，weight 为 1 或 0 的加权就是其中一个。"""
    corpus, embedder = tiny_world_corpus(40, 10), HashedEmbedder()
    store = open_store(f"faiss://{tmp_path}/s", embedder.fingerprint, embedder.dim)
    index = BM25()
    index.add([d.id for d in corpus.documents], [d.text for d in corpus.documents])
    vectors = embedder.passages([d.text for d in corpus.documents])
    only_bm25, sweep = hr.retrieve(corpus, embedder, store, 1.0, None)
    only_dense, _ = hr.retrieve(corpus, embedder, store, 0.0, None)
    gold = [question.gold for question in corpus.questions]
    for weight, method in (("1.0", only_bm25["bm25"]), ("0.0", only_dense["dense"])):
        assert sweep[weight] == hr.retrieval_row(method, gold)["recall_at_1"]
    for number, question in enumerate(corpus.questions):
        assert only_bm25["bm25"][number] == [name for name, _ in index.search(question.text, hr.DEPTH)]
        cosines = vectors @ embedder.queries([question.text])[0]
        best = np.argsort(-cosines)[:5]
        got = [cosines[int(name.removeprefix("故事"))] for name in only_dense["dense"][number][:5]]
        assert got == pytest.approx(cosines[best].tolist(), abs=1e-5)
        assert only_bm25["weighted"][number][0] == only_bm25["bm25"][number][0]
        assert only_dense["weighted"][number][0] == only_dense["dense"][number][0]
    store.close()


def test_rewriting():
    assert hr.rewrite("請問誰在花園裡看見了松鼠？") == "在花园里看见了松鼠？"
    assert hr.rewrite("松鼠吃了什么？") == "松鼠吃了？"


def test_hyde_writes_without_the_passage(chat_folder):
    """随机的小模型也写得出来（写得不好），一题一段，两次相同。"""
    generator = {"path": str(chat_folder), "stage": "sft", "id": "x"}
    first = hr.imagine(["小刚去了哪里？", "谁来了？"], generator)
    assert len(first) == 2 and all(isinstance(text, str) for text in first)
    assert hr.imagine(["小刚去了哪里？", "谁来了？"], generator) == first


def test_a_gain_is_sure_only_when_its_interval_is_above_zero():
    gold = [{"a"}] * 100
    ranked = {"bm25": [["b"]] * 60 + [["a"]] * 40, "dense": [["b"]] * 100, "weighted": [["a"]] * 100}
    gain = hr.gain_over_best_single(ranked, gold, 0)
    assert gain["over"] == "bm25" and gain["gain"] == pytest.approx(0.6) and gain["low"] > 0.4
    same = hr.gain_over_best_single({**ranked, "weighted": ranked["bm25"]}, gold, 0)
    assert same["low"] == same["gain"] == same["high"] == 0


def test_a_readers_folder(tmp_path):
    """自己的文件夹：一个坏文件说出来，别的照做。"""
    docs = tmp_path / "docs"
    docs.mkdir()
    for name, text in {
        "借书.md": "# 借书\n读者每次最多可以借阅图书五本，借期一共是三十天。逾期每天要交一角钱的滞纳金。",
        "座位.txt": "自习室的座位每天早上七点开始预约，迟到半小时座位就会自动释放给别的读者。",
        "坏.txt": "",
    }.items():
        (docs / name).write_text(text, encoding="utf-8")
    record = hr.main([*QUICK, "--dataset", str(docs), "--stories", "10", "--output_dir", str(tmp_path / "r")])
    assert record["metrics"]["methods"]["bm25"]["recall_at_1"] > 0.9 and record["data"]["dataset"]["sha256"]
    with pytest.raises(UserError, match="请检查 --dataset"):
        hr.main([*QUICK, "--dataset", str(tmp_path / "没有"), "--output_dir", str(tmp_path / "q")])
