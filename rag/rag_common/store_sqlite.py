"""默认的知识库：SQLite 里存着一切（文字、向量、设置），FAISS 只是由它算出来、放在内存里的索引。

为什么这样分：FAISS 的文件写到一半断了就坏了，它自己也记不住文字与 id；SQLite 写到一半断电，再打开是写之前的样子。
所以只有一处是真的（SQLite），索引随时可以扔掉重建，永远不会与文字对不上。

- 一行写下就不再改：改一条是删旧行、添新行，行号（AUTOINCREMENT）只增不减，从不重用。
- 索引里的编号就是行号。别的进程添了、删了，照行号补上新行、去掉删了的行，不必全部重读。
- 几个进程可以同时读；写的时候排队（SQLite 的 WAL）。
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from nlp_common.base.errors import UserError
from rag_common import store_shared as shared
from rag_common.bm25 import top
from rag_common.chunking import Chunk
from rag_common.store import Hit, Where

FILE = "knowledge.sqlite3"
WAIT = 30.0  # 秒：别的进程正在写，等多久
AT_ONCE = 500  # 一句 SQL 里最多几个 ?
KEPT_GONE = 100_000  # 删了的行号记住最近这么多个，别的进程照它更新索引
TABLES = """
CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS chunks (
    row INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, document TEXT NOT NULL,
    start INTEGER NOT NULL, "end" INTEGER NOT NULL, text TEXT NOT NULL, meta TEXT NOT NULL, vector BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS gone (number INTEGER PRIMARY KEY AUTOINCREMENT, row INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS by_document ON chunks (document);
"""


class SqliteStore:
    def __init__(self, folder: Path, fingerprint: str, dim: int, index: str = "flat"):
        self.url, self.folder = f"faiss://{folder}", folder
        self.fingerprint, self.dim = fingerprint, dim
        self.lock = threading.RLock()  # 一个进程里几个线程轮流用
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.db = sqlite3.connect(
                folder / FILE, timeout=WAIT, check_same_thread=False, isolation_level=None
            )
            self.db.row_factory = sqlite3.Row
            self.db.execute("PRAGMA journal_mode=WAL")  # 写的时候别的进程照样读
            self.db.execute("PRAGMA synchronous=FULL")  # 提交了就在盘上，断电也在
            self.db.executescript(TABLES)
            facts = (("fingerprint", fingerprint), ("dim", str(dim)))
            self.db.executemany("INSERT OR IGNORE INTO settings VALUES (?, ?)", facts)
            saved = dict(self.db.execute("SELECT name, value FROM settings").fetchall())
        except (sqlite3.DatabaseError, OSError) as error:
            raise UserError(_what_is_wrong(folder, error)) from error
        shared.check_fingerprint(self.url, saved, fingerprint, dim)
        self.kind, self.index = index, make_index(index, dim)
        self.last_row = self.last_gone = 0  # 索引跟到了哪里
        self._filters: dict[str, np.ndarray] = {}  # where → 行号；库变了就作废
        with self._one_moment():
            self._follow()

    # ------------------------------------------------------------ 写

    def upsert(self, chunks: Sequence[Chunk], vectors: np.ndarray) -> None:
        vectors = shared.check_rows(chunks, vectors, self.dim)
        rows = []
        for chunk, vector in zip(chunks, vectors, strict=True):
            meta = json.dumps(chunk.meta, ensure_ascii=False)
            rows.append(
                (chunk.id, chunk.document, chunk.start, chunk.end, chunk.text, meta, vector.tobytes())
            )
        with self._one_change():
            self._remove([chunk.id for chunk in chunks])
            self.db.executemany(
                'INSERT INTO chunks (id, document, start, "end", text, meta, vector) VALUES (?, ?, ?, ?, ?, ?, ?)',
                rows,
            )

    def delete(self, ids: Iterable[str]) -> int:
        with self._one_change():
            return self._remove(list(dict.fromkeys(ids)))

    @contextlib.contextmanager
    def _one_change(self) -> Iterator[None]:
        """里面的几句 SQL 要么全做了，要么一句也没做：半途出错、被杀掉，都是之前的样子。"""
        with self.lock:
            try:
                self.db.execute("BEGIN IMMEDIATE")  # 现在就占住写的位置：两个进程不会各改一半
            except sqlite3.OperationalError as error:
                raise UserError(
                    f"知识库 {self.folder} 被别的进程占着写，等了 {WAIT:.0f} 秒（{error}）：等它写完再试。"
                ) from error
            try:
                yield
            except BaseException:
                self.db.execute("ROLLBACK")
                raise
            self.db.execute("COMMIT")

    @contextlib.contextmanager
    def _one_moment(self) -> Iterator[None]:
        """里面读到的是同一个时刻的库，别的进程这时提交的看不见。"""
        with self.lock:
            self.db.execute("BEGIN")
            try:
                yield
            finally:
                self.db.execute("COMMIT")

    def _remove(self, ids: list[str]) -> int:
        removed = 0
        for part in _parts(ids):
            marks = ",".join("?" * len(part))
            self.db.execute(
                f"INSERT INTO gone (row) SELECT row FROM chunks WHERE id IN ({marks}) ORDER BY row", part
            )
            removed += self.db.execute(f"DELETE FROM chunks WHERE id IN ({marks})", part).rowcount
        oldest = self.db.execute("SELECT max(number) FROM gone").fetchone()[0] or 0
        self.db.execute("DELETE FROM gone WHERE number <= ?", (oldest - KEPT_GONE,))
        return removed

    # ------------------------------------------------------------ 读

    def search(self, vectors: np.ndarray, k: int, where: Where | None = None) -> list[list[Hit]]:
        vectors = shared.check_queries(vectors, self.dim)
        if k < 1:
            raise UserError(f"要找几条（k）至少是 1，给的是 {k}。")
        with self._one_moment():
            self._follow()
            allowed = self._rows_where(where) if where else None
            found = self.index.search(vectors, k, allowed)
            chunks = self._read("row", sorted({int(row) for rows, _ in found for row in rows}))
        by_row = {chunk["row"]: shared.chunk_of(dict(chunk)) for chunk in chunks}
        return [
            [shared.hit_of(by_row[int(row)], score) for row, score in zip(rows, scores, strict=True)]
            for rows, scores in found
        ]

    def get(self, ids: Iterable[str]) -> list[Chunk]:
        """这些 id 的原文，次序与 ids 相同；没有的跳过。"""
        wanted = list(dict.fromkeys(ids))
        with self.lock:
            found = {row["id"]: shared.chunk_of(dict(row)) for row in self._read("id", wanted)}
        return [found[name] for name in wanted if name in found]

    def ids(self, where: Where | None = None) -> list[str]:
        condition, values = _condition(where)
        with self.lock:
            rows = self.db.execute(f"SELECT id FROM chunks WHERE {condition} ORDER BY row", values).fetchall()
        return [row["id"] for row in rows]

    def count(self, where: Where | None = None) -> int:
        condition, values = _condition(where)
        with self.lock:
            return self.db.execute(f"SELECT count(*) FROM chunks WHERE {condition}", values).fetchone()[0]

    def vectors(self, ids: Iterable[str]) -> dict[str, np.ndarray]:
        """这些 id 存着的向量。"""
        with self.lock:
            rows = self._read("id", list(dict.fromkeys(ids)), "id, vector")
        return {row["id"]: np.frombuffer(row["vector"], dtype=np.float32) for row in rows}

    def close(self) -> None:
        with self.lock:
            self.db.close()

    def _read(
        self, column: str, wanted: list, columns: str = 'row, id, document, start, "end", text, meta'
    ) -> list:
        rows = []
        for part in _parts(wanted):
            marks = ",".join("?" * len(part))
            rows += self.db.execute(
                f"SELECT {columns} FROM chunks WHERE {column} IN ({marks})", part
            ).fetchall()
        return rows

    def _rows_where(self, where: Where) -> np.ndarray:
        """满足 where 的行号，由小到大；同样的 where 在库没变时记住。"""
        key = json.dumps(where, ensure_ascii=False, sort_keys=True, default=list)
        if key not in self._filters:
            condition, values = _condition(where)
            rows = self.db.execute(
                f"SELECT row FROM chunks WHERE {condition} ORDER BY row", values
            ).fetchall()
            if len(self._filters) > 1000:
                self._filters.clear()
            self._filters[key] = np.array([row["row"] for row in rows], dtype=np.int64)
        return self._filters[key]

    def _follow(self) -> None:
        """把索引补到库现在的样子：新行添进来，删了的去掉。"""
        top_row = self.db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'chunks'").fetchone()
        top_gone = self.db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'gone'").fetchone()
        newest, removed = (top_row or [0])[0], (top_gone or [0])[0]
        if newest == self.last_row and removed == self.last_gone:
            return
        self._filters.clear()
        if self.last_gone < removed - KEPT_GONE:  # 落后太多，删了的行的记录已经清掉：重新建
            self.index, self.last_row = make_index(self.kind, self.dim), 0
        gone = self.db.execute("SELECT row FROM gone WHERE number > ?", (self.last_gone,)).fetchall()
        self.index.remove(
            np.array([row["row"] for row in gone if row["row"] <= self.last_row], dtype=np.int64)
        )
        cursor = self.db.execute(
            "SELECT row, vector FROM chunks WHERE row > ? ORDER BY row", (self.last_row,)
        )
        while rows := cursor.fetchmany(10_000):
            numbers = np.array([row["row"] for row in rows], dtype=np.int64)
            self.index.add(
                numbers, np.frombuffer(b"".join(r["vector"] for r in rows), np.float32).reshape(-1, self.dim)
            )
        self.last_row, self.last_gone = newest, removed


def _parts(values: list) -> list[list]:
    return [values[start : start + AT_ONCE] for start in range(0, len(values), AT_ONCE)]


def _condition(where: Where | None) -> tuple[str, list]:
    """where → SQL 的条件与它的值。栏名也是值，不拼进 SQL。"""
    parts, values = ["1"], []
    for name, wanted in (where or {}).items():
        allowed = shared.values_of(wanted)
        marks = ",".join("?" * len(allowed))
        if name == "document":
            parts.append(f"document IN ({marks})")
        else:
            parts.append(f"json_extract(meta, ?) IN ({marks})")
            values.append('$."' + name.replace('"', "") + '"')
        values += [int(value) if isinstance(value, bool) else value for value in allowed]
    return " AND ".join(parts), values


def _what_is_wrong(folder: Path, error: Exception) -> str:
    if isinstance(error, OSError):
        return f"打不开知识库 {folder}：{error.strerror or error}。"
    return f"{folder / FILE} 不是完好的知识库（{error}）：换一个文件夹，或删掉它重新建。"


# ---------------------------------------------------------------- 内存里的索引：编号是行号


def make_index(kind: str, dim: int) -> Any:
    if kind not in ("flat", "numpy"):
        raise UserError(f"faiss:// 的 index={kind} 不认识，可以是 flat（精确）或 numpy（精确，不用 faiss）。")
    if kind == "numpy":
        return NumpyIndex(dim)
    if sys.platform == "darwin":  # 那里 faiss 与 torch 各带一份 OpenMP，一起导入会崩
        return NumpyIndex(dim)
    if find_spec("faiss") is None:
        print("没有安装 faiss，用 numpy 精确地找（结果相同，大批量查询慢些）；pip install faiss-cpu 装上它。")
        return NumpyIndex(dim)
    return FaissIndex(dim)


class NumpyIndex:
    """精确：与每一行算内积。矩阵留着空位，满了就加倍；删去的行先盖住，过半了再压紧。"""

    def __init__(self, dim: int):
        self.matrix = np.zeros((1024, dim), dtype=np.float32)
        self.rows = np.zeros(1024, dtype=np.int64)  # 由小到大
        self.alive = np.zeros(1024, dtype=bool)
        self.size = 0

    def add(self, rows: np.ndarray, vectors: np.ndarray) -> None:
        end = self.size + len(rows)
        if end > len(self.rows):
            room = max(end, 2 * len(self.rows))
            self.matrix = _grown(self.matrix, room)
            self.rows, self.alive = _grown(self.rows, room), _grown(self.alive, room)
        self.matrix[self.size : end], self.rows[self.size : end], self.alive[self.size : end] = (
            vectors,
            rows,
            True,
        )
        self.size = end

    def remove(self, rows: np.ndarray) -> None:
        self.alive[: self.size] &= ~np.isin(self.rows[: self.size], rows)
        left = int(self.alive[: self.size].sum())
        if left < self.size // 2:
            keep = np.flatnonzero(self.alive[: self.size])
            self.matrix[:left], self.rows[:left] = self.matrix[keep], self.rows[keep]
            self.alive[:left], self.alive[left:] = True, False
            self.size = left

    def search(
        self, vectors: np.ndarray, k: int, allowed: np.ndarray | None
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        places = np.flatnonzero(self.alive[: self.size])
        if allowed is not None:
            places = np.intersect1d(
                places, np.searchsorted(self.rows[: self.size], allowed), assume_unique=True
            )
        few = len(places) < self.size // 8  # 少的挑出来再算；多的全算了再挑，比抄一遍快
        found = []
        for vector in vectors:
            scores = self.matrix[places] @ vector if few else (self.matrix[: self.size] @ vector)[places]
            best = top(scores, k)
            found.append((self.rows[places[best]], scores[best]))
        return found


def _grown(array: np.ndarray, room: int) -> np.ndarray:
    bigger = np.zeros((room, *array.shape[1:]), dtype=array.dtype)
    bigger[: len(array)] = array
    return bigger


class FaissIndex:
    """faiss 的 IndexFlatIP，外面一层 IDMap2：编号跟着向量走，删了别的也不变。

    单独的 Flat 没有编号，只有第几个：删一个，后面的全往前移一位。
    """

    def __init__(self, dim: int):
        import faiss

        self.faiss = faiss
        self.index = faiss.IndexIDMap2(faiss.IndexFlatIP(dim))

    def add(self, rows: np.ndarray, vectors: np.ndarray) -> None:
        self.index.add_with_ids(np.ascontiguousarray(vectors), rows)

    def remove(self, rows: np.ndarray) -> None:
        if len(rows):
            self.index.remove_ids(rows)

    def search(
        self, vectors: np.ndarray, k: int, allowed: np.ndarray | None
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        most = self.index.ntotal if allowed is None else len(allowed)
        k = min(k, most)
        if k == 0:
            return [(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32))] * len(vectors)
        options = {}
        if allowed is not None:
            selector = self.faiss.IDSelectorBatch(allowed)
            options["params"] = self.faiss.SearchParameters(sel=selector)
        before = self.faiss.omp_get_max_threads()
        self.faiss.omp_set_num_threads(1)  # 一个问题分给几个线程，互相等的时间比算的还长
        try:
            scores, rows = self.index.search(vectors, k, **options)
        finally:
            self.faiss.omp_set_num_threads(before)
        return [_in_order(row[row >= 0], score[row >= 0]) for row, score in zip(rows, scores, strict=True)]


def _in_order(rows: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """分高的在前，同分的行号小的在前：faiss 在同分的里面没有一定的次序。"""
    order = np.lexsort((rows, -scores))
    return rows[order], scores[order]
