"""PostgreSQL + pgvector：网址 pgvector://用户:密码@主机:端口/库?table=表，别的参数原样交给 PostgreSQL。

一条一行，写在一个事务里；WHERE、备份、权限、几个进程同时读写，都是数据库本来就会的。
index=hnsw 建近似的索引；不写就精确地找。
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterable, Sequence
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import numpy as np

from nlp_common.base.errors import UserError
from rag_common import store_shared as shared
from rag_common.chunking import Chunk
from rag_common.store import Hit, Where

COLUMNS = 'id, document, start, "end", text, meta'


class PgvectorStore:
    def __init__(self, url: str, fingerprint: str, dim: int):
        import psycopg

        self.fingerprint, self.dim, self.lock = fingerprint, dim, threading.RLock()
        parts = urlsplit(url)
        options = dict(parse_qsl(parts.query, keep_blank_values=True))
        self.table, kind = options.pop("table", "rag"), options.pop("index", "flat")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,50}", self.table):
            raise UserError(f"表名 {self.table} 只能是字母、数字、下划线。")
        if kind not in ("flat", "hnsw"):
            raise UserError(f"pgvector:// 的 index={kind} 不认识，可以是 flat 或 hnsw。")
        address = urlunsplit(("postgresql", parts.netloc, parts.path, urlencode(options), ""))
        self.url = shared.without_password(url)
        try:
            self.db = psycopg.connect(address, autocommit=True, connect_timeout=10)
            with self.db.transaction():
                self._make(kind)
                saved = dict(self.db.execute(f"SELECT name, value FROM {self.table}_settings").fetchall())
        except psycopg.Error as error:
            raise UserError(_what_is_wrong(self.url, error)) from error
        shared.check_fingerprint(self.url, saved, fingerprint, dim)

    def _make(self, kind: str) -> None:
        table = self.table
        self.db.execute("SELECT pg_advisory_xact_lock(%s)", (7_241_986,))  # 几个进程一起新建时排队
        self.db.execute("CREATE EXTENSION IF NOT EXISTS vector")
        self.db.execute(
            f"CREATE TABLE IF NOT EXISTS {table}_settings (name text PRIMARY KEY, value text NOT NULL)"
        )
        self.db.execute(
            f"""CREATE TABLE IF NOT EXISTS {table} (
                id text PRIMARY KEY, document text NOT NULL, start integer NOT NULL, "end" integer NOT NULL,
                text text NOT NULL, meta jsonb NOT NULL, vector vector({self.dim}) NOT NULL)"""
        )
        if kind == "hnsw":
            self.db.execute(
                f"CREATE INDEX IF NOT EXISTS {table}_hnsw ON {table} USING hnsw (vector vector_ip_ops)"
            )
        for name, value in (("fingerprint", self.fingerprint), ("dim", str(self.dim))):
            self.db.execute(
                f"INSERT INTO {table}_settings VALUES (%s, %s) ON CONFLICT DO NOTHING", (name, value)
            )

    def upsert(self, chunks: Sequence[Chunk], vectors: np.ndarray) -> None:
        vectors = shared.check_rows(chunks, vectors, self.dim)
        rows = []
        for chunk, vector in zip(chunks, vectors, strict=True):
            if "\0" in chunk.text + chunk.id + chunk.document:
                raise UserError(f"{chunk.id!r} 里有 \\0：PostgreSQL 存不下这个字，先去掉它。")
            meta = json.dumps(chunk.meta, ensure_ascii=False)
            rows.append((chunk.id, chunk.document, chunk.start, chunk.end, chunk.text, meta, as_text(vector)))
        with self.lock, self.db.transaction(), self.db.cursor() as cursor:
            cursor.executemany(
                f"""INSERT INTO {self.table} ({COLUMNS}, vector) VALUES (%s, %s, %s, %s, %s, %s, %s)
                ON CONFLICT (id) DO UPDATE SET document = excluded.document, start = excluded.start,
                "end" = excluded."end", text = excluded.text, meta = excluded.meta, vector = excluded.vector""",
                rows,
            )

    def delete(self, ids: Iterable[str]) -> int:
        with self.lock:
            done = self.db.execute(
                f"DELETE FROM {self.table} WHERE id = ANY(%s)", (list(dict.fromkeys(ids)),)
            )
        return done.rowcount

    def search(self, vectors: np.ndarray, k: int, where: Where | None = None) -> list[list[Hit]]:
        vectors = shared.check_queries(vectors, self.dim)
        condition, values = _condition(where)
        found = []
        with self.lock:
            for vector in vectors:
                text = as_text(vector)
                rows = self.db.execute(  # <#> 是负的内积：由小到大排，就是内积由大到小
                    f"""SELECT {COLUMNS}, -(vector <#> %s::vector) FROM {self.table}
                    WHERE {condition} ORDER BY vector <#> %s::vector, id LIMIT %s""",
                    (text, *values, text, k),
                ).fetchall()
                found.append([shared.hit_of(_chunk(row), row[-1]) for row in rows])
        return found

    def get(self, ids: Iterable[str]) -> list[Chunk]:
        wanted = list(dict.fromkeys(ids))
        with self.lock:
            rows = self.db.execute(
                f"SELECT {COLUMNS} FROM {self.table} WHERE id = ANY(%s)", (wanted,)
            ).fetchall()
        found = {row[0]: _chunk(row) for row in rows}
        return [found[name] for name in wanted if name in found]

    def ids(self, where: Where | None = None) -> list[str]:
        condition, values = _condition(where)
        with self.lock:
            rows = self.db.execute(
                f"SELECT id FROM {self.table} WHERE {condition} ORDER BY id", values
            ).fetchall()
        return [row[0] for row in rows]

    def count(self, where: Where | None = None) -> int:
        condition, values = _condition(where)
        with self.lock:
            return self.db.execute(f"SELECT count(*) FROM {self.table} WHERE {condition}", values).fetchone()[
                0
            ]

    def close(self) -> None:
        with self.lock:
            self.db.close()


def as_text(vector: np.ndarray) -> str:
    return "[" + ",".join(map(repr, vector.tolist())) + "]"


def _chunk(row: tuple) -> Chunk:
    names = ("id", "document", "start", "end", "text", "meta")
    return shared.chunk_of(dict(zip(names, row[:6], strict=True)))


def _condition(where: Where | None) -> tuple[str, list]:
    parts, values = ["true"], []
    for name, wanted in (where or {}).items():
        if name == "document":
            parts.append("document = ANY(%s)")
            values.append([str(value) for value in shared.values_of(wanted)])
        else:
            parts.append("meta -> %s = ANY(%s::jsonb[])")
            values += [name, [json.dumps(value, ensure_ascii=False) for value in shared.values_of(wanted)]]
    return " AND ".join(parts), values


def _what_is_wrong(url: str, error: Exception) -> str:
    text = " ".join(str(error).split())
    if "password" in text or "authentication" in text:
        return f"{url}：用户名或密码不对。网址写成 pgvector://用户:密码@主机:端口/库。"
    if "vector" in text and ("control file" in text or "not available" in text):
        return f"{url}：PostgreSQL 里没有装 pgvector 扩展，先装上它（https://github.com/pgvector/pgvector）。"
    if "expected" in text and "dimensions" in text:
        return f"{url}：表里的向量不是这么多维（{text[:100]}）：换一个 ?table=，重新建。"
    return f"连不上 {url}（{text[:160]}）。看看服务器启动了没有、地址与端口对不对。"
