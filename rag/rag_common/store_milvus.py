"""Milvus：网址 milvus://文件.db 是 milvus-lite（同一时间一个进程），milvus+http://主机:19530/集合 是服务器。"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from nlp_common.base.errors import UserError
from rag_common import store_shared as shared
from rag_common.chunking import Chunk
from rag_common.store import Hit, Where

AT_ONCE = 500
FIELDS = ["id", "text", "document", "start", "end", "meta"]
TEXT_BYTES = 65_535  # Milvus 的 VARCHAR 最长这么多字节
ID_BYTES = 512


class MilvusStore:
    def __init__(self, url: str, fingerprint: str, dim: int):
        from pymilvus import MilvusClient

        self.url, self.fingerprint, self.dim = shared.without_password(url), fingerprint, dim
        self.lock = threading.RLock()
        scheme, _, rest = url.partition("://")
        with shared.opening(partial(_what_is_wrong, self.url)):
            if scheme == "milvus":
                # milvus-lite 没有实现的调用，客户端会换一种办法，可 grpc 先印一屏英文的 traceback
                for noisy in ("grpc._server", "pymilvus.decorators"):
                    logging.getLogger(noisy).setLevel(logging.CRITICAL)
                path = Path(rest).expanduser()
                path.parent.mkdir(parents=True, exist_ok=True)
                self.name, self.client = "rag", MilvusClient(uri=str(path))
            else:
                address, self.name = shared.server_address(url)
                shared.must_listen(address, 19530)
                self.client = MilvusClient(uri=address, timeout=10)
            self._make()

    def _make(self) -> None:
        from pymilvus import DataType, MilvusClient

        if not self.client.has_collection(self.name):
            schema = MilvusClient.create_schema(auto_id=False)
            schema.add_field("id", DataType.VARCHAR, is_primary=True, max_length=ID_BYTES)
            schema.add_field("text", DataType.VARCHAR, max_length=TEXT_BYTES)
            schema.add_field("document", DataType.VARCHAR, max_length=ID_BYTES)
            schema.add_field("start", DataType.INT64)
            schema.add_field("end", DataType.INT64)
            schema.add_field("meta", DataType.JSON)
            schema.add_field("vector", DataType.FLOAT_VECTOR, dim=self.dim)
            index = MilvusClient.prepare_index_params()
            index.add_index("vector", index_type="FLAT", metric_type="IP")  # 精确；大了换 HNSW
            self.client.create_collection(
                self.name, schema=schema, index_params=index, consistency_level="Strong"
            )
        facts = f"{self.name}_settings"  # 只有一行的集合：embedder 的指纹（milvus-lite 不存集合的说明）
        if not self.client.has_collection(facts):
            schema = MilvusClient.create_schema(auto_id=False)
            schema.add_field("id", DataType.INT64, is_primary=True)
            schema.add_field("saved", DataType.JSON)
            schema.add_field("vector", DataType.FLOAT_VECTOR, dim=2)  # 没有向量的集合不许建
            index = MilvusClient.prepare_index_params()
            index.add_index("vector", index_type="FLAT", metric_type="IP")
            self.client.create_collection(
                facts, schema=schema, index_params=index, consistency_level="Strong"
            )
            saved = {"fingerprint": self.fingerprint, "dim": self.dim}
            self.client.upsert(facts, [{"id": 1, "saved": saved, "vector": [1.0, 0.0]}])
        self.client.load_collection(facts)
        rows = self.client.get(facts, ids=[1], output_fields=["saved"])
        shared.check_fingerprint(self.url, dict(rows[0]["saved"]) if rows else {}, self.fingerprint, self.dim)
        self.client.load_collection(self.name)

    def upsert(self, chunks: Sequence[Chunk], vectors: np.ndarray) -> None:
        vectors = shared.check_rows(chunks, vectors, self.dim)
        rows = []
        for chunk, vector in zip(chunks, vectors, strict=True):
            for value, most in ((chunk.text, TEXT_BYTES), (chunk.id, ID_BYTES), (chunk.document, ID_BYTES)):
                if len(value.encode()) > most:
                    raise UserError(
                        f"{chunk.id[:60]}：Milvus 里这一栏最长 {most} 字节，这一条有 {len(value.encode())}。"
                    )
            rows.append({**shared.payload(chunk), "vector": vector.tolist()})
        with self.lock:
            for start in range(0, len(rows), AT_ONCE):
                self.client.upsert(self.name, rows[start : start + AT_ONCE])

    def delete(self, ids: Iterable[str]) -> int:
        wanted = list(dict.fromkeys(ids))
        with self.lock:
            present = [row["id"] for row in self._rows(wanted, ["id"])]
            if present:
                self.client.delete(self.name, ids=present)
        return len(present)

    def search(self, vectors: np.ndarray, k: int, where: Where | None = None) -> list[list[Hit]]:
        vectors, condition = shared.check_queries(vectors, self.dim), _expression(where)
        with self.lock:
            found = self.client.search(
                self.name,
                vectors.tolist(),
                filter=condition,
                limit=k,
                output_fields=FIELDS,
                consistency_level="Strong",
            )
        return [[shared.hit_from(dict(row["entity"]), row["distance"]) for row in rows] for rows in found]

    def get(self, ids: Iterable[str]) -> list[Chunk]:
        wanted = list(dict.fromkeys(ids))
        with self.lock:
            found = {row["id"]: shared.chunk_of(dict(row)) for row in self._rows(wanted, FIELDS)}
        return [found[name] for name in wanted if name in found]

    def ids(self, where: Where | None = None) -> list[str]:
        with self.lock:
            rows = self.client.query(self.name, filter=_expression(where) or 'id != ""', output_fields=["id"])
        return sorted(row["id"] for row in rows)

    def count(self, where: Where | None = None) -> int:
        return len(self.ids(where))

    def close(self) -> None:
        with self.lock:
            self.client.close()

    def _rows(self, ids: list[str], fields: list[str]) -> list:
        rows = []
        for start in range(0, len(ids), AT_ONCE):
            rows += self.client.get(self.name, ids=ids[start : start + AT_ONCE], output_fields=fields)
        return rows


def _expression(where: Where | None) -> str:
    """where → Milvus 的条件。值都照 JSON 写，引号不会跑到外面去。"""
    parts = []
    for name, wanted in (where or {}).items():
        field = "document" if name == "document" else f"meta[{json.dumps(name, ensure_ascii=False)}]"
        values = [json.dumps(value, ensure_ascii=False) for value in shared.values_of(wanted)]
        each = [f"{field} == {value}" for value in values]  # milvus-lite 的 JSON 栏不会用 in
        parts.append("(" + (" or ".join(each) or 'id == ""') + ")")
    return " and ".join(parts)


def _what_is_wrong(url: str, error: Exception) -> str:
    return (
        f"打不开 {url}：{shared.one_line(error)}。"
        "milvus:// 后面是一个 .db 文件（同一时间一个进程用）；服务器要先启动，写成 milvus+http://主机:19530/集合。"
    )
