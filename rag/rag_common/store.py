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
    elasticsearch://用户:密码@主机:9200/索引         Elasticsearch（8 以上）；opensearch://… 是 OpenSearch（2.9 以上）

where 是 {栏: 值} 或 {栏: [值, 值]}（其中之一），几栏都要满足；栏是 Chunk.meta 里的，外加 document。
分数都是内积（向量长度为 1，就是余弦），越大越近。
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qs

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
    scheme, rest = check_url(url)
    if scheme == "faiss":
        from rag_common.store_sqlite import SqliteStore

        folder, options = _path_and_options(rest)
        return SqliteStore(folder, fingerprint, dim, **options)
    if scheme in KNOWN["qdrant"]:
        need("qdrant_client", "qdrant-client")
        from rag_common.store_qdrant import QdrantStore

        return QdrantStore(url, fingerprint, dim)
    if scheme in KNOWN["milvus"]:
        need("pymilvus", "pymilvus milvus-lite")
        from rag_common.store_milvus import MilvusStore

        return MilvusStore(url, fingerprint, dim)
    if scheme == "pgvector":
        need("psycopg", "'psycopg[binary]'")
        from rag_common.store_pgvector import PgvectorStore

        return PgvectorStore(url, fingerprint, dim)
    if scheme in KNOWN["elasticsearch"]:
        from rag_common.store_elasticsearch import ElasticsearchStore

        return ElasticsearchStore(url, fingerprint, dim)
    from rag_common.store_opensearch import OpenSearchStore

    return OpenSearchStore(url, fingerprint, dim)


KNOWN = {  # 后端 → 网址的开头可以怎样写
    "faiss": ("faiss",),
    "qdrant": ("qdrant", "qdrant+http", "qdrant+https"),
    "milvus": ("milvus", "milvus+http", "milvus+https"),
    "pgvector": ("pgvector",),
    "elasticsearch": ("elasticsearch", "elasticsearch+https"),
    "opensearch": ("opensearch", "opensearch+https"),
}


def check_url(url: str) -> tuple[str, str]:
    """--store 的写法对不对 → (开头, 其余)；不对是 UserError。"""
    scheme, _, rest = url.partition("://")
    if not rest:
        raise UserError(f"--store {url} 不是网址：要写成 faiss://文件夹、qdrant://文件夹、pgvector://… 等。")
    if not any(scheme in ways for ways in KNOWN.values()):
        raise UserError(f"--store {url}：不认识 {scheme}，可以是 {'、'.join(KNOWN)}。")
    return scheme, rest


def _path_and_options(rest: str) -> tuple[Path, dict[str, str]]:
    path, _, query = rest.partition("?")
    return Path(path).expanduser(), {key: values[-1] for key, values in parse_qs(query).items()}


def need(module: str, install: str) -> None:
    if find_spec(module) is None:
        raise UserError(f"这种知识库要先安装：pip install {install}")
