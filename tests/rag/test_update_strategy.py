"""更新：只编码变了的块，断在哪里都接得上（真的杀掉也是），换库时查询不丢，丢了坏了的行对得出、补得回。"""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import blue_green
import reconciling
import store_keeping as keeping
import update_strategy as us
from catalogue import FACTS, change, make_products
from nlp_common.base.errors import UserError
from rag_common.audit import AuditLog
from rag_common.embed import HashedEmbedder
from rag_common.store import open_store

RAG = Path(us.__file__).parent


@pytest.fixture
def embedder():
    return HashedEmbedder(64)


@pytest.fixture
def place(tmp_path, embedder):
    return keeping.StorePlace(None, tmp_path / "stores", embedder)


def wanted(documents):
    return sorted(chunk.id for name, text in documents.items() for chunk in keeping.chunks_of(name, text))


# ---------------------------------------------------------------- 手册


def test_every_question_is_answered_in_its_own_paragraph():
    products = make_products(30, seed=1)
    assert len({product.name for product in products}) == 30
    assert not {p.name for p in products} & {p.name for p in make_products(30, seed=1, start=130)}
    for product in products:
        chunks = keeping.chunks_of(product.name, product.text())
        for fact in FACTS:
            assert sum(product.answer(fact) in chunk.text for chunk in chunks) == 1


def test_a_change_is_one_paragraph():
    import random

    product = make_products(1)[0]
    for fact in FACTS:
        changed = change(product, fact, random.Random(0))
        old, new = (set(each.text().split("\n\n")) for each in (product, changed))
        assert len(new - old) == 1 and changed.answer(fact) != product.answer(fact)


# ---------------------------------------------------------------- 按散列比


def test_only_what_changed_is_embedded(place, embedder):
    store = place.open("a")
    documents = {"甲": "第一段话在这里。\n\n第二段话也在这里。" * 3, "乙": "乙的一段。", "丙": "丙的一段。"}
    first = us.sync(store, embedder, documents)
    assert first.embedded_rows == len(wanted(documents)) == store.count()
    assert us.sync(store, embedder, documents) == us.Change()  # 什么也没变，什么也不做
    documents = {
        "甲": documents["甲"] + "\n\n新添的一段，比较长，自己成一块。" * 3,
        "丙": "丙改了。",
        "丁": "丁。",
    }
    done = us.sync(store, embedder, documents)
    assert sorted(store.ids()) == wanted(documents)
    assert done.documents == 4 and done.removed_rows >= 2
    assert done.embedded_rows < len(wanted(documents))


TEXTS = st.lists(st.sampled_from("甲乙丙丁戊己庚辛"), min_size=0, max_size=5).map(
    lambda parts: "\n\n".join(part * 40 for part in parts)
)
EDITIONS = st.lists(st.dictionaries(st.sampled_from("abcd"), TEXTS, max_size=4), min_size=1, max_size=4)


@given(EDITIONS)
@settings(max_examples=25, deadline=None)
def test_any_history_ends_with_exactly_the_last_edition(tmp_path_factory, editions):
    embedder = HashedEmbedder(16)
    store = open_store(f"faiss://{tmp_path_factory.mktemp('s')}", embedder.fingerprint, embedder.dim)
    for documents in editions:
        us.sync(store, embedder, documents)
        assert sorted(store.ids()) == wanted(documents)
    store.close()


def test_strategies_against_each_other(tmp_path):
    embedder = HashedEmbedder()
    place = keeping.StorePlace(None, tmp_path, embedder)
    before, after = us.two_editions(20, 0.1, seed=0)
    assert len(after) == 20 and len({p.name for p in before} & {p.name for p in after}) == 18
    rows = {}
    for name, update in us.STRATEGIES.items():
        store = place.open(name)
        us.sync(store, embedder, keeping.texts_of(before))
        done = update(store, embedder, keeping.texts_of(after))
        rows[name] = vars(done) | us.ask_everything(store, embedder, before, after)
        store.close()
    # 改 2 件（各一块）、添 2 件（各四块）、删 2 件
    assert rows["按散列比"]["embedded_rows"] == rows["按散列比"]["removed_rows"] == 2 + 2 * 4
    assert rows["全部重建"]["embedded_rows"] == 80
    assert rows["按散列比"]["stale_answers"] == rows["全部重建"]["stale_answers"] == 0
    assert rows["只添"]["stale_answers"] == 2 + 2  # 改了的两样、没了的两件，旧答案都还查得到
    assert rows["按散列比"]["questions"] == 20 * 4 + 2


# ---------------------------------------------------------------- 断电


def test_power_cut_at_every_step(place, embedder):
    before, after = us.two_editions(10, 0.2, seed=0)
    found = us.die_at_every_step(place, embedder, keeping.texts_of(before), keeping.texts_of(after))
    assert found["same"] == found["steps"] > 5
    assert found["embedded_twice"] <= keeping.AT_ONCE


KILLED = """
import os, sys
sys.path[:0] = [{rag!r}]
import store_keeping, update_strategy as us
from rag_common.embed import HashedEmbedder
embedder = HashedEmbedder(64)
store = us.open_store({url!r}, embedder.fingerprint, embedder.dim)
_, after = us.two_editions(10, 0.2, seed=0)
count = 0
def step(rows=0):
    global count
    if count == {stop}:
        os._exit(9)  # 与 kill -9 一样：什么也不收拾
    count += 1
us.sync(store, embedder, store_keeping.texts_of(after), step=step)
"""


def test_a_killed_process_is_resumed(place, embedder):
    before, after = us.two_editions(10, 0.2, seed=0)
    store = place.open("k")
    us.sync(store, embedder, keeping.texts_of(before))
    store.close()
    code = KILLED.format(rag=str(RAG), url=place.url("k"), stop=4)
    assert subprocess.run([sys.executable, "-c", code], cwd=RAG.parent).returncode == 9
    store = open_store(place.url("k"), embedder.fingerprint, embedder.dim)
    assert sorted(store.ids()) != wanted(keeping.texts_of(after))
    us.sync(store, embedder, keeping.texts_of(after))
    assert sorted(store.ids()) == wanted(keeping.texts_of(after))
    store.close()


# ---------------------------------------------------------------- 换库


def test_no_query_is_lost_while_switching(place, embedder, tmp_path):
    products = make_products(10)
    log = AuditLog(tmp_path / "audit.jsonl")
    found = blue_green.switch_while_asking(place, embedder, products, log)
    assert found["lost_queries"] == 0 and found["stores_seen"] == 2 and found["queries"] >= 200
    assert [row["event"]["what"] for row in log.rows()] == ["switch"]


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("qdrant://某处/", "qdrant://某处_{}"),
        ("milvus://某处/a.db", "milvus://某处/a_{}.db"),
        ("milvus+http://a:1", "milvus+http://a:1/rag_{}"),
        ("qdrant+https://a:1/b/", "qdrant+https://a:1/b_{}"),
        ("pgvector://u:p@a/db", "pgvector://u:p@a/db?table=rag_{}"),
        ("pgvector://u@/db?host=h&table=t", "pgvector://u@/db?host=h&table=t_{}"),
        ("opensearch://u:p@a:1/b?ca=c", "opensearch://u:p@a:1/b_{}?ca=c"),
    ],
)
def test_a_place_in_any_kind_of_store(given, url, embedder, tmp_path):
    """名字接在文件、表、集合上；不碰库名、端口、后缀。"""
    place = keeping.StorePlace(given, tmp_path, embedder)
    name = keeping.text_hash("蓝")[:8]
    assert place.url("蓝") == url.format(name) != place.url("绿")


def test_a_reader_that_cannot_open_says_why(tmp_path, embedder):
    alias = blue_green.Alias(tmp_path / "alias.json")
    alias.point_to("蓝")
    elsewhere = SimpleNamespace(url=lambda name: "没有的://x")
    asking = blue_green.Asking(elsewhere, alias, embedder, make_products(2))
    asking.start()
    with pytest.raises(UserError, match=r"停了，没有查下去：.*不认识 没有的"):
        blue_green.wait_for(asking, 1)


def test_an_incomplete_new_store_is_not_switched_to(place, embedder, tmp_path, monkeypatch):
    alias = blue_green.Alias(tmp_path / "alias.json")
    alias.point_to("旧的")
    monkeypatch.setattr(blue_green, "fill", lambda *_: 10)  # 说写了十条，其实没写
    with pytest.raises(UserError, match=r"新库里有 0 条，应当是 10 条"):
        blue_green.rebuild_beside(place, embedder, {"甲": "甲。"}, alias, AuditLog(tmp_path / "a.jsonl"))
    assert alias.name() == "旧的"


# ---------------------------------------------------------------- 对账与日志


def test_reconcile_finds_what_was_planted_and_mends_it(place, embedder, tmp_path):
    documents = keeping.texts_of(make_products(10))
    log = AuditLog(tmp_path / "audit.jsonl")
    found = reconciling.lose_and_mend(place, embedder, documents, log)
    assert (found["missing"], found["extra"], found["differing"], found["left"]) == (5, 1, 4, 0)


def test_reconcile_of_a_good_store_finds_nothing(place, embedder):
    documents = keeping.texts_of(make_products(5))
    store = place.open("a")
    keeping.fill(store, embedder, documents)
    assert not any(reconciling.reconcile(store, embedder, documents).values())
    [one] = store.get(store.ids()[:1])
    store.upsert([one], np.eye(1, embedder.dim, dtype=np.float32))
    assert reconciling.reconcile(store, embedder, documents)["differing"] == [one.id]


def test_a_changed_line_of_the_log_is_found(tmp_path):
    log = AuditLog(tmp_path / "audit.jsonl")
    for number in range(7):
        keeping.note(log, "add", f"文档{number}", embedded=number)
    assert reconciling.change_one_line(log, tmp_path) == {"lines": 7, "changed_line": 4, "found_line": 4}


# ---------------------------------------------------------------- 整个脚本


def test_script_as_a_reader_runs_it(tmp_path, capsys):
    flags = ["--preset", "tiny", "--products", "20", "--output_dir", str(tmp_path / "out")]
    record = us.main(flags)
    metrics = record["metrics"]
    assert metrics["embedded_rows"] == 10 and metrics["stale_answers"] == metrics["lost_queries"] == 0
    assert metrics["strategies"]["append_only"]["stale_answers"] == 4
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"audit.jsonl", "run.json", "strategies.json", "strategies.svg"}
    assert AuditLog(tmp_path / "out" / "audit.jsonl").verify() > 20
    assert json.loads((tmp_path / "out" / "strategies.json").read_text("utf-8"))["按散列比"]["right"] > 0.9
    capsys.readouterr()
    assert us.main(flags)["id"] == record["id"] and "直接加载" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--changed", "0"], "0 到 0.5"),
        (["--products", "5"], "至少 10 件"),
        (["--store", "某个文件夹"], "--store 某个文件夹 不是网址"),
        (["--store", "faiss+http://x"], "不认识 faiss.http"),
        (["--store", "qdrant://x"], "只许一处"),
    ],
)
def test_bad_settings(flags, said, tmp_path):
    with pytest.raises(UserError, match=said):
        us.main(["--preset", "tiny", "--output_dir", str(tmp_path / "out"), *flags])
