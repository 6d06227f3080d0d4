"""分批写断在哪里都接得上（真的杀掉也是）；手写的 k-means、IVF、PQ 与 FAISS 相同；漂移与删除后的编号。"""

import contextlib
import json
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import batch_embedding as be
import build_vector_store as bvs
import hand_index as hand
from nlp_common.base.errors import UserError
from rag_common.chunking import make_chunks
from rag_common.embed import HashedEmbedder

faiss = pytest.importorskip("faiss", reason="没有装 faiss-cpu")
import index_lab as lab  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
X = lab.topics(600, 32, 12, seed=0)
QUERIES = lab.topics(40, 32, 12, seed=0)


@pytest.fixture(autouse=True)
def one_thread():
    lab.use_one_thread()


def chunks_of(n: int):
    text = "".join(f"第{number}件事，讲的是{number * 7}与{number % 5}。" for number in range(n))
    return make_chunks("甲", text, bvs.structure(text, 20))


# ---------------------------------------------------------------- 手写的 = FAISS


@pytest.mark.parametrize("seed", [0, 1, 3])  # 种子 2 中途有一个中心空了，见下一个测试
def test_kmeans_walks_as_faiss_does(seed):
    start = hand.starting_points(X, 12, seed)
    for steps in (1, 3, 10):
        ours, theirs = hand.kmeans(X, start, steps), lab.faiss_kmeans(X, start, steps)
        assert np.abs(ours - theirs).max() < 1e-5
    assert not np.allclose(start, ours)  # 真的走了


def test_an_empty_centroid_stays_here_and_is_split_off_in_faiss():
    start = np.concatenate([X[:3], [X[0]]])  # 两个起点相同，后一个分不到点
    assert (hand.kmeans(X, start, 1)[3] == X[0]).all()
    assert not np.allclose(lab.faiss_kmeans(X, start, 1)[3], X[0])


def test_starting_points_are_never_the_same():
    x = np.repeat(np.eye(6, dtype=np.float32), 5, axis=0)
    for seed in range(5):
        assert len(np.unique(hand.starting_points(x, 6, seed), axis=0)) == 6


def test_kmeans_by_hand_on_a_case_one_can_count():
    x = np.array([[0.0], [1.0], [10.0], [12.0]], np.float32)
    assert hand.kmeans(x, np.array([[0.0], [1.0]], np.float32), 1).ravel().tolist() == [
        0,
        pytest.approx(23 / 3),
    ]
    assert hand.kmeans(x, np.array([[0.0], [1.0]], np.float32), 3).ravel().tolist() == [0.5, 11]
    assert (
        hand.kmeans(x, np.array([[0.0], [99.0]], np.float32), 1)[0, 0] == 23 / 4
    )  # 99 一个点也没有，留在原处


@pytest.mark.parametrize("n_probe", [1, 3, 12])
def test_ivf_by_hand_finds_what_faiss_finds(n_probe):
    centroids = hand.kmeans(X, hand.starting_points(X, 12, 0), 5)
    ours, theirs = hand.HandIVF(centroids), lab.IVF_with(centroids, n_probe)
    for part in (np.arange(400), np.arange(400, 600)):
        ours.add(X[part], part)
        theirs.add_with_ids(X[part], part)
    assert [len(names) for names in ours.lists] == lab.list_sizes(theirs).tolist()
    for _ in range(2):
        (a, names), (b, theirs_names) = ours.search(QUERIES, 10, n_probe), theirs.search(QUERIES, 10)
        assert np.abs(np.where(names < 0, 0, a) - np.where(theirs_names < 0, 0, b)).max() < 1e-5
        assert (names == theirs_names).mean() > 0.99  # 同分的里面次序不定
        ours.remove(np.arange(50, 90))
        theirs.remove_ids(np.arange(50, 90))
    assert not np.isin(names, np.arange(50, 90)).all()


def test_probing_every_list_is_exact():
    index = hand.HandIVF(hand.starting_points(X, 12, 0))
    index.add(X, np.arange(len(X)))
    scores, _ = index.search(QUERIES, 10, 12)
    assert scores == pytest.approx(np.sort(QUERIES @ X.T, 1)[:, ::-1][:, :10], abs=1e-6)


@pytest.mark.parametrize("n_codes", [16, 256])
def test_pq_by_hand_has_faiss_codes_and_results(n_codes):
    books = hand.train_pq(X, n_parts=8, n_codes=n_codes, steps=4, seed=0)
    codes, theirs = hand.pq_encode(X, books), lab.PQ_with(books)
    theirs.add(X)
    faiss_codes = theirs.pq.compute_codes(X)
    if n_codes == 16:  # 4 位的两个挤在一个字节里
        faiss_codes = np.stack([faiss_codes & 15, faiss_codes >> 4], axis=2).reshape(len(X), 8)
    assert (codes == faiss_codes).mean() > 0.999  # 一样远的两个码字，选哪个看处理器怎样舍入
    pieces = X.reshape(len(X), 8, -1)
    for row, part in zip(*np.nonzero(codes != faiss_codes), strict=True):
        far = [np.sum((pieces[row, part] - books[part][c[row, part]]) ** 2) for c in (codes, faiss_codes)]
        assert far[0] == pytest.approx(far[1], abs=1e-5)
    scores, _ = hand.pq_search(QUERIES, codes, books, 10)
    assert np.abs(scores - theirs.search(QUERIES, 10)[0]).max() < 1e-5
    whole = np.concatenate([books[part][codes[:, part]] for part in range(8)], axis=1)  # 解码回来再算
    assert scores == pytest.approx(np.sort(QUERIES @ whole.T, 1)[:, ::-1][:, :10], abs=1e-5)


@given(st.integers(2, 40), st.integers(1, 6), st.integers(0, 9))
@settings(max_examples=20, deadline=None)
def test_an_ivf_never_loses_or_doubles_an_id(n, k, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, 4)).astype(np.float32)
    index = hand.HandIVF(hand.starting_points(x, min(k, n), seed))
    index.add(x, np.arange(n))
    gone = rng.choice(n, n // 2, replace=False)
    index.remove(gone)
    assert sorted(np.concatenate(index.lists)) == sorted(set(range(n)) - set(gone))


# ---------------------------------------------------------------- 漂移、编号


def test_new_topics_drift_and_training_again_mends_it():
    old, new = lab.topics(1500, 32, 32, seed=1), lab.topics(500, 32, 32, seed=2)
    everything = np.concatenate([old, new])
    index = lab.IVF(old, 32, 2)
    index.add(old)
    before = lab.recall(index, old, old[:100])
    index.add(new)
    drifted = lab.recall(index, everything, new[:100])
    again = lab.IVF(everything, 32, 2)
    again.add(everything)
    mended = lab.recall(again, everything, new[:100])
    assert before > 0.9 and drifted < before - 0.15 and mended > drifted + 0.15


def test_recall_counts_ties_as_found():
    x = np.repeat(np.eye(4, dtype=np.float32), 3, axis=0)  # 每个方向三条一样的
    index = lab.Flat(4)
    index.add(x)
    assert lab.recall(index, x, np.eye(4, dtype=np.float32), 2) == 1.0


def test_ids_after_removal():
    rows = lab.ids_after_removal(X[:200], n_lists=4, gone=5)
    assert rows["flat"]["wrong"] >= 180 - 8  # 第 3 条以后的全往前移了
    assert rows["ivf"]["repeated"] == 5 and rows["ivf_idmap2"]["wrong"] > 100
    assert rows["flat_idmap2"]["wrong"] == rows["ivf_own_ids"]["wrong"] == 0
    assert rows["flat_idmap2"]["repeated"] == rows["ivf_own_ids"]["repeated"] == 0


# ---------------------------------------------------------------- 断了接着写


def test_cut_before_and_after_every_batch(tmp_path):
    found = bvs.cut_everywhere(chunks_of(30), "hashed", tmp_path / "cut", batch=7)
    assert found["same"] == found["stops"] > 6 and found["embedded_twice"] == 7


def test_digest_sees_every_change(tmp_path):
    chunks, embedder = chunks_of(6), HashedEmbedder()
    vectors = embedder.passages([chunk.text for chunk in chunks])
    seen = set()
    for number, (rows, values) in enumerate(
        [
            (chunks, vectors),
            (chunks[::-1], vectors[::-1]),
            (chunks[:-1], vectors[:-1]),
            (chunks, vectors[::-1]),
        ]
    ):
        store = bvs.open_for(f"faiss://{tmp_path}/{number}", "hashed")
        store.upsert(rows, values)
        seen.add(bvs.digest(store))
        store.close()
    assert len(seen) == 4  # 次序、少一条、向量换了，都看得出


def run(folder, *more):
    command = [sys.executable, str(ROOT / "rag/build_vector_store.py"), "--preset", "tiny"]
    command += [
        "--dataset",
        str(folder / "docs"),
        "--output_dir",
        str(folder / "out"),
        "--embedder",
        "hashed",
    ]
    command += ["--batch", "5", "--lists", "8", "--probe", "2", *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def write_documents(folder, n=40):
    (folder / "docs").mkdir()
    for number in range(n):
        text = "\n\n".join(
            f"第 {number} 篇第 {part} 段，说的是{'春夏秋冬'[part % 4]}天的第 {number * part} 件事。"
            for part in range(20)
        )
        (folder / "docs" / f"{number:02d}.txt").write_text(text, encoding="utf-8")


@pytest.mark.slow
def test_killed_for_real_and_started_again(tmp_path):
    """kill -9 之后再运行同一条命令：接着写，知识库与没有被杀过的逐字节相同。"""
    stores = {}
    for name in ("killed", "whole"):
        folder = tmp_path / name
        folder.mkdir()
        write_documents(folder)
        if name == "killed":
            process = run(folder)
            wait_for_rows(folder / "out", process)
            process.send_signal(signal.SIGKILL)
            process.wait()
            process.communicate()
        process = run(folder)
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        assert ("接着写缺的" in output) == (name == "killed")
        store = bvs.open_for(f"faiss://{folder}/out/store", "hashed")
        stores[name] = (bvs.digest(store), store.ids())
        store.close()
    assert stores["killed"][1] == stores["whole"][1]
    assert stores["killed"][0] == stores["whole"][0]
    metrics = json.loads((folder / "out/run.json").read_text(encoding="utf-8"))["metrics"]
    assert metrics["rows"] == len(stores["whole"][1]) == metrics["written"]


def wait_for_rows(out, process):
    """等到库里有了几批（不到一半）。"""
    for _ in range(3000):
        assert process.poll() is None, process.stderr.read()
        for file in out.parent.rglob("store/knowledge.sqlite3"):
            with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(file)) as db:
                if db.execute("SELECT count(*) FROM chunks").fetchone()[0] >= 10:
                    return
        time.sleep(0.01)
    raise AssertionError("一直没有写")


# ---------------------------------------------------------------- 同一个函数，几个进程、Ray Data


TEXTS = [[f"第{number}批的第{row}段" for row in range(4)] for number in range(5)]


def test_lsa_file_is_learned_once(tmp_path):
    texts = [text for part in TEXTS for text in part]
    name = be.lsa_file(tmp_path / "lsa.npz", texts, 4)
    learned = be.embed_batch({"embedder": name, "texts": texts})["vectors"]
    assert be.lsa_file(tmp_path / "lsa.npz", ["别的"], 4) == name
    again = be.read_lsa(tmp_path / "lsa.npz")
    assert np.array_equal(again.passages(texts), learned)
    assert again.fingerprint == be.embedder_named(name).fingerprint


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["processes", "ray"])
def test_every_engine_gives_the_same_in_the_same_order(engine):
    if engine == "ray":
        pytest.importorskip("ray", reason="没有装 ray：pip install 'ray[data]'")
    expected = list(be.embed_in_order(TEXTS, "hashed"))
    found = list(be.embed_in_order(TEXTS, "hashed", engine, 2))
    assert len(found) == len(expected) == 5
    for a, b in zip(found, expected, strict=True):
        assert np.array_equal(a, b)


# ---------------------------------------------------------------- 写错了


def test_errors_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(be, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install"):
        be.check_engine("ray", 1)
    with pytest.raises(UserError, match="processes"):
        be.check_engine("serial", 2)
    with pytest.raises(UserError, match="桶的个数"):
        bvs.main(["--preset", "tiny", "--lists", "4", "--probe", "5"])
    (tmp_path / "a.txt").write_text("太短了。", encoding="utf-8")
    with pytest.raises(UserError, match="至少要 500 段"):
        bvs.load_chunks(str(tmp_path), 100, 10)
    with pytest.raises(UserError, match="没有这个文件夹"):
        bvs.load_chunks(str(tmp_path / "没有"), 100, 10)
