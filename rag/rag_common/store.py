"""知识库：一条一条的文字与向量，存得住、查得快、删得掉。一套接口，几种后端。

    store = open_store("faiss://文件夹", embedder.fingerprint, embedder.dim)
    store.upsert(chunks, vectors)             # 添或改；返回时已经落盘
    store.delete(["id", …])                   # 删；返回删了几条
    store.search(vectors, k, where={"tenant": "甲"})   # 每个问题一列 Hit，分高的在前
    store.count(where) · store.ids(where) · store.get(ids) · store.close()

网址（--store）：
    faiss://文件夹            默认：SQLite 存一切，FAISS 在内存里找；没装 faiss 用 numpy，结果相同
    qdrant://文件夹           Qdrant 的本地模式；qdrant+http://主机:6333/集合 是服务器
    milvus://文件.db          milvus-lite；milvus+http://主机:19530/集合 是服务器
    pgvector://用户:密码@主机:端口/库?table=表      PostgreSQL + pgvector
    elasticsearch://主机:9200/索引                   Elasticsearch（8 以上）

where 是 {栏: 值} 或 {栏: [值, 值]}（其中之一），几栏都要满足；栏是 Chunk.meta 里的，外加 document。
分数都是内积（向量长度为 1，就是余弦），越大越近。
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qs, urlsplit

import numpy as np

from nlp_common.base.errors import UserError
from rag_common.chunking import Chunk

Where = dict[str, Any]


@dataclass(frozen=True)
class Hit:
    """查到的一条。"""

    id: str
    score: float
    text: str
    document: str = ""
    meta: dict = field(default_factory=dict)


class Store(Protocol):
    """各后端都有的。upsert、delete 返回时已经落盘：这时杀掉进程，再打开一条不少。"""

    url: str
    fingerprint: str
    dim: int

    def upsert(self, chunks: Sequence[Chunk], vectors: np.ndarray) -> None: ...

    def delete(self, ids: Iterable[str]) -> int: ...

    def search(self, vectors: np.ndarray, k: int, where: Where | None = None) -> list[list[Hit]]: ...

    def get(self, ids: Iterable[str]) -> list[Chunk]: ...

    def ids(self, where: Where | None = None) -> list[str]: ...

    def count(self, where: Where | None = None) -> int: ...

    def close(self) -> None: ...


def open_store(url: str, fingerprint: str, dim: int) -> Store:
    """打开或新建一个知识库。已有的是用别的 embedder 建的，是 UserError：两种向量不能放在一起比。"""
    scheme, _, rest = url.partition("://")
    if not rest:
        raise UserError(f"--store {url} 不是网址：要写成 faiss://文件夹、qdrant://文件夹、pgvector://… 等。")
    if scheme == "faiss":
        from rag_common.store_sqlite import SqliteStore

        folder, options = _path_and_options(rest)
        return SqliteStore(folder, fingerprint, dim, **options)
    if scheme in ("qdrant", "qdrant+http", "qdrant+https"):
        need("qdrant_client", "qdrant-client")
        from rag_common.store_qdrant import QdrantStore

        return QdrantStore(url, fingerprint, dim)
    if scheme in ("milvus", "milvus+http", "milvus+https"):
        need("pymilvus", "pymilvus milvus-lite")
        from rag_common.store_milvus import MilvusStore

        return MilvusStore(url, fingerprint, dim)
    if scheme == "pgvector":
        need("psycopg", "'psycopg[binary]'")
        from rag_common.store_pgvector import PgvectorStore

        return PgvectorStore(url, fingerprint, dim)
    if scheme in ("elasticsearch", "elasticsearch+https"):
        from rag_common.store_elasticsearch import ElasticsearchStore

        return ElasticsearchStore(url, fingerprint, dim)
    known = "faiss、qdrant、milvus、pgvector、elasticsearch"
    raise UserError(f"--store {url}：不认识 {scheme}，可以是 {known}。")


# ---------------------------------------------------------------- 各后端共用


def _path_and_options(rest: str) -> tuple[Path, dict[str, str]]:
    path, _, query = rest.partition("?")
    return Path(path).expanduser(), {key: values[-1] for key, values in parse_qs(query).items()}


def server_address(url: str) -> tuple[str, str]:
    """``qdrant+http://主机:6333/集合`` → (``http://主机:6333``, 集合)；没写集合是 rag。"""
    parts = urlsplit(url)
    plain = "https" if parts.scheme.endswith("https") else "http"
    return f"{plain}://{parts.netloc}", parts.path.strip("/") or "rag"


def need(module: str, install: str) -> None:
    if find_spec(module) is None:
        raise UserError(f"这种知识库要先安装：pip install {install}")


def check_rows(chunks: Sequence[Chunk], vectors: np.ndarray, dim: int) -> np.ndarray:
    """要写进去的对不对：个数、维数、重复的 id、NaN。返回 float32 的 (N, D)。"""
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    if vectors.ndim != 2 or vectors.shape[1] != dim:
        raise UserError(
            f"知识库里的向量是 {dim} 维，给的是 {vectors.shape}：换了 embedder 就要另建一个知识库。"
        )
    if len(chunks) != len(vectors):
        raise UserError(f"{len(chunks)} 条文字，{len(vectors)} 个向量，要一样多。")
    if not np.isfinite(vectors).all():
        bad = chunks[int(np.flatnonzero(~np.isfinite(vectors).all(1))[0])]
        raise UserError(f"{bad.id} 的向量里有 NaN 或无穷大，不写进知识库。")
    seen: set[str] = set()
    for chunk in chunks:
        if chunk.id in seen:
            raise UserError(f"一次写进来的 id 里有重复的：{chunk.id}。")
        seen.add(chunk.id)
    return vectors


def check_queries(vectors: np.ndarray, dim: int) -> np.ndarray:
    """问题的向量 (Q, D)；一个问题写成 (D,) 也行。"""
    vectors = np.atleast_2d(np.ascontiguousarray(vectors, dtype=np.float32))
    if vectors.shape[1] != dim:
        raise UserError(
            f"知识库里的向量是 {dim} 维，问题的向量是 {vectors.shape[1]} 维：embedder 不是同一个。"
        )
    return vectors


def check_fingerprint(url: str, saved: dict, fingerprint: str, dim: int) -> None:
    """已有的知识库是不是同一个 embedder 建的。"""
    if saved.get("fingerprint") != fingerprint or int(saved.get("dim", 0)) != dim:
        raise UserError(
            f"知识库 {url} 是用 {saved.get('fingerprint')}（{saved.get('dim')} 维）建的，现在的是 {fingerprint}（{dim} 维）。"
            "向量不能混用：换回原来的 embedder，或换一个 --store 重新建。"
        )


def stable_id(name: str) -> str:
    """由 id 算出的 UUID，同样的 id 总是同样的：有的后端对编号的写法、长短有要求。"""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, name))


def without_password(url: str) -> str:
    """印出来、记下来的网址里没有密码。"""
    return re.sub(r"(://[^:/@]*):[^@/]*@", r"\1:***@", url)


def values_of(wanted: Any) -> list:
    """where 里一栏许可的值。"""
    return list(wanted) if isinstance(wanted, list | tuple | set | frozenset) else [wanted]


def matches(chunk: Chunk, where: Where | None) -> bool:
    """where 的意思，用平常的循环写一遍：各后端都要与它一致。"""
    for name, wanted in (where or {}).items():
        have = chunk.document if name == "document" else chunk.meta.get(name)
        if have is None or have not in values_of(wanted):
            return False
    return True


def payload(chunk: Chunk) -> dict:
    """一条存成平常的 JSON。"""
    return {
        "id": chunk.id,
        "text": chunk.text,
        "document": chunk.document,
        "start": chunk.start,
        "end": chunk.end,
        "meta": chunk.meta,
    }


def chunk_of(row: dict) -> Chunk:
    meta = row["meta"] if isinstance(row["meta"], dict) else json.loads(row["meta"])
    return Chunk(row["id"], row["text"], row["document"], int(row["start"]), int(row["end"]), meta)


def hit_of(chunk: Chunk, score: float) -> Hit:
    return Hit(chunk.id, float(score), chunk.text, chunk.document, chunk.meta)
