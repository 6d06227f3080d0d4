"""选型的每一种都守同一份约定：改了的是新的，删了的不再出来，重新打开也不；筛选的意思相同；少了什么说得清。"""

import importlib.util
import json

import numpy as np
import pytest

import knowledge_base_selection as kbs
import knowledge_bases as kb
from nlp_common.base.errors import UserError
from rag_common.chunking import Chunk

pytest.importorskip("faiss", reason="没有装 faiss-cpu")
LOCAL = [name for name in kb.BASES if name.startswith("faiss") or name in ("sqlite", "chroma", "lancedb")]
DATA = kbs.make_data(600, 16, 20, seed=0)
NO_SERVERS = dict.fromkeys(("pgvector", *kb.SERVERS))


@pytest.fixture(params=LOCAL)
def name(request):
    for package in kb.BASES[request.param][1]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"没有装 {package}：pip install {kb.BASES[request.param][2]}")
    return request.param


@pytest.fixture
def place(tmp_path):
    return kb.Place(tmp_path, 16, DATA.vectors, NO_SERVERS)


def test_the_whole_measurement(name, place):
    row = kbs.measure(place, name, DATA)
    assert row["came_back"] == row["came_back_reopened"] == 0 and row["counted"] and row["kept"]
    assert row["disk_mb"] > 0 and row["p95_ms"] >= row["p50_ms"] > 0
    if name in ("faiss_flat", "sqlite", "lancedb"):  # 精确的
        assert row["recall"] == row["filter_recall"] == row["changed_found"] == 1.0
    assert row["recall"] > 0.5 and row["filter_recall"] > 0.4


def test_filters_quotes_and_two_values(name, place):
    store = place.open(name)
    rows = [
        Chunk(f"c'{n}", f"第 {n} 条 '引号' \"", "文'档", n, n + 1, {"tenant": "甲'乙丙"[n % 4]})
        for n in range(40)
    ]
    store.upsert(rows, DATA.vectors[:40])
    asked = {"tenant": ["甲", "'"]}
    [hits] = store.search(DATA.vectors[:1], 40, asked)
    expected = {row.id for row in rows if row.meta["tenant"] in asked["tenant"]}
    found = {hit.id for hit in hits}
    assert found <= expected and (found == expected or name in ("faiss_ivf", "faiss_hnsw"))
    [hit] = [hit for hit in hits if hit.id == "c'0"]
    assert (hit.text, hit.document, hit.meta) == (rows[0].text, "文'档", {"tenant": "甲"})
    assert store.search(DATA.vectors[:1], 5, {"tenant": "没有这一家"}) == [[]]
    assert store.delete(["c'1", "没有", "c'1"]) == 1 and store.count() == 39
    store.close()


def test_scores_are_inner_products(name, place):
    store = place.open(name)
    store.upsert(DATA.chunks, DATA.vectors)
    [hits] = store.search(DATA.queries[:1], 5)
    for hit in hits:
        exact = float(DATA.vectors[int(hit.id[1:])] @ DATA.queries[0])
        assert hit.score == pytest.approx(exact, abs=0.35 if name == "faiss_pq" else 1e-5)
    store.close()


def test_faiss_numbers_are_never_used_again(place):
    store = place.open("faiss_flat")
    store.upsert(DATA.chunks[:10], DATA.vectors[:10])
    store.delete([chunk.id for chunk in DATA.chunks[5:10]])
    store.close()
    store = place.open("faiss_flat")
    store.upsert(DATA.chunks[10:12], DATA.vectors[10:12])
    assert sorted(store.rows) == [0, 1, 2, 3, 4, 10, 11]


def test_plain_hnsw_cannot_delete():
    """所以 FaissBase 只能记下来、查的时候去掉。"""
    from index_lab import HNSW

    index = HNSW(16)
    index.add(DATA.vectors)
    with pytest.raises(RuntimeError):
        index.remove_ids(np.array([1]))


def test_crossing_reaches_the_recall_it_promises(tmp_path):
    class Part:
        settings = kbs.SelectionSettings(crossing="250,500", dim=16, questions=10)

    found = kbs.find_crossing(Part())
    assert set(found["sizes"]) == {"n250", "n500"}
    assert all(row["ivf_recall"] >= kbs.GOOD for row in found["sizes"].values())
    assert found["ivf_from"] in (None, 250, 500)


def test_what_is_missing_is_said(monkeypatch, capsys):
    monkeypatch.setattr(kb, "find_spec", lambda name: None)
    assert kb.available(NO_SERVERS, list(kb.BASES)) == ["sqlite"]
    said = capsys.readouterr().out
    for name, (label, packages, install) in kb.BASES.items():
        if packages:
            assert f"跳过 {label}：没有安装，pip install {install}" in said, name
    assert "--elasticsearch" in said and "--opensearch opensearch://" in said
    with pytest.raises(UserError, match="一种也比不了"):
        kb.available(NO_SERVERS, ["chroma"])
    monkeypatch.setattr(kb, "find_spec", lambda name: name)  # 都装了，可是没有服务器
    assert kb.available(NO_SERVERS, ["sqlite", "milvus_server"]) == ["sqlite"]
    assert "--milvus_server milvus+http://" in capsys.readouterr().out


def test_slow_ones_are_skipped_by_their_own_speed():
    assert kbs.too_slow(None, 10_000, 60) == 0
    assert kbs.too_slow({"n1000": {"build_seconds": 20.0}}, 5000, 60) == pytest.approx(100)
    assert kbs.too_slow({"n1000": {"build_seconds": 2.0}}, 5000, 60) == 0
    assert kbs.too_slow({"n1000": {"fault": "连不上"}}, 5000, 60) == 0


def test_wrong_settings():
    for argv, said in (
        (["--sizes", "10"], "最小的也要有"),
        (["--sizes", "一千"], "逗号隔开的正整数"),
        (["--only", "mysql"], "不认识 mysql"),
        (["--dim", "30"], "8 的倍数"),
    ):
        with pytest.raises(UserError, match=said):
            kbs.main(["--preset", "tiny", *argv])


def test_nothing_measured_is_no_result(tmp_path):
    """一种也没有比成：说为什么，不存成结果（不然第二次运行会当成做完了）。"""
    argv = ["--preset", "tiny", "--sizes", "600", "--crossing", "250", "--only", "opensearch"]
    argv += ["--opensearch", "opensearch://127.0.0.1:9/x", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(UserError, match="一种也没有比成：\n  连不上 opensearch"):
        kbs.main(argv)
    assert not (tmp_path / "out/run.json").exists()
    assert not list(tmp_path.rglob("run.json"))  # 服务器起好了，同一条命令再来还要比


def test_the_script_goes_on_without_a_server(tmp_path, capsys):
    """连不上的说一句，别的照常比；第二次运行直接用。"""
    argv = [
        "--preset",
        "tiny",
        "--sizes",
        "600",
        "--crossing",
        "250",
        "--only",
        "faiss_flat,sqlite,elasticsearch,opensearch",
    ]
    argv += ["--dim", "16", "--questions", "5", "--output_dir", str(tmp_path / "out")]
    argv += ["--elasticsearch", "elasticsearch://127.0.0.1:9/x", "--opensearch", "opensearch://127.0.0.1:9/x"]
    record = kbs.main(argv)
    for name in ("elasticsearch", "opensearch"):
        assert "fault" in record["metrics"]["rows"][name]["n600"]
    assert record["metrics"]["came_back"] == record["metrics"]["lost_rows"] == 0
    assert "跳过：" in capsys.readouterr().out
    saved = json.loads((tmp_path / "out/run.json").read_text(encoding="utf-8"))
    assert saved["metrics"] == kbs.main(argv)["metrics"]
    assert (tmp_path / "out/crossing.svg").exists() and (tmp_path / "out/filter.svg").exists()
