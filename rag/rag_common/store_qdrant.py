"""Qdrant：网址 qdrant://文件夹 是本地模式（同一时间一个进程），qdrant+http://主机:6333/集合 是服务器。"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from rag_common import store_shared as shared
from rag_common.chunking import Chunk
from rag_common.store import Hit, Where

AT_ONCE = 500


class QdrantStore:
    def __init__(self, url: str, fingerprint: str, dim: int):
        from qdrant_client import QdrantClient, models

        self.url, self.fingerprint, self.dim = shared.without_password(url), fingerprint, dim
        self.models = models
        self.lock = threading.RLock()  # 本地模式不许几个线程同时用
        scheme, _, rest = url.partition("://")
        with shared.opening(partial(_what_is_wrong, self.url)):
            if scheme == "qdrant":
                self.name = "rag"
                self.client = QdrantClient(path=str(Path(rest).expanduser()))
            else:
                address, self.name = shared.server_address(url)
                shared.must_listen(address, 6333)  # 不在听的，客户端先印一段英文的警告
                self.client = QdrantClient(url=address, timeout=10)
            self._make()

    def _make(self) -> None:
        """集合没有就建；embedder 的指纹存在旁边一个只有一点的集合里。"""
        models, facts = self.models, f"{self.name}-settings"
        if not self.client.collection_exists(facts):
            self.client.create_collection(facts, models.VectorParams(size=1, distance=models.Distance.DOT))
            saved = {"fingerprint": self.fingerprint, "dim": self.dim}
            self.client.upsert(facts, [models.PointStruct(id=1, vector=[1.0], payload=saved)], wait=True)
        saved = self.client.retrieve(facts, [1])[0].payload or {}
        shared.check_fingerprint(self.url, saved, self.fingerprint, self.dim)
        if not self.client.collection_exists(self.name):
            vectors = models.VectorParams(size=self.dim, distance=models.Distance.DOT)
            self.client.create_collection(self.name, vectors)

    def upsert(self, chunks: Sequence[Chunk], vectors: np.ndarray) -> None:
        vectors = shared.check_rows(chunks, vectors, self.dim)
        with self.lock:
            for start in range(0, len(chunks), AT_ONCE):
                points = []
                for chunk, vector in zip(
                    chunks[start : start + AT_ONCE], vectors[start : start + AT_ONCE], strict=True
                ):
                    row = self.models.PointStruct(
                        id=shared.stable_id(chunk.id), vector=vector.tolist(), payload=shared.payload(chunk)
                    )
                    points.append(row)
                self.client.upsert(self.name, points, wait=True)

    def delete(self, ids: Iterable[str]) -> int:
        points = [shared.stable_id(name) for name in dict.fromkeys(ids)]
        with self.lock:
            present = (
                [row.id for row in self.client.retrieve(self.name, points, with_payload=False)]
                if points
                else []
            )
            if present:
                selector = self.models.PointIdsList(points=present)
                self.client.delete(self.name, selector, wait=True)
        return len(present)

    def search(self, vectors: np.ndarray, k: int, where: Where | None = None) -> list[list[Hit]]:
        vectors, condition = shared.check_queries(vectors, self.dim), self._filter(where)
        found = []
        with self.lock:
            for vector in vectors:
                points = self.client.query_points(
                    self.name, vector.tolist(), limit=k, query_filter=condition
                ).points
                found.append([shared.hit_from(row.payload, row.score) for row in points])
        return found

    def get(self, ids: Iterable[str]) -> list[Chunk]:
        wanted = list(dict.fromkeys(ids))
        with self.lock:
            rows = (
                self.client.retrieve(self.name, [shared.stable_id(name) for name in wanted]) if wanted else []
            )
        found = {row.payload["id"]: shared.chunk_of(row.payload) for row in rows}
        return [found[name] for name in wanted if name in found]

    def ids(self, where: Where | None = None) -> list[str]:
        names, offset = [], None
        with self.lock:
            while True:
                rows, offset = self.client.scroll(self.name, self._filter(where), 1000, offset=offset)
                names += [row.payload["id"] for row in rows]
                if offset is None:
                    return sorted(names)

    def count(self, where: Where | None = None) -> int:
        with self.lock:
            return self.client.count(self.name, self._filter(where), exact=True).count

    def close(self) -> None:
        with self.lock:
            self.client.close()

    def _filter(self, where: Where | None):
        if not where:
            return None
        models, conditions = self.models, []
        for name, wanted in where.items():
            key = "document" if name == "document" else f'meta."{name}"'
            each = [
                models.FieldCondition(key=key, match=models.MatchValue(value=v))
                for v in shared.values_of(wanted)
            ]
            conditions.append(models.Filter(should=each) if each else models.Filter(must=[_nothing(models)]))
        return models.Filter(must=conditions)


def _nothing(models):
    """什么都不满足的条件。"""
    return models.HasIdCondition(has_id=[])


def _what_is_wrong(url: str, error: Exception) -> str:
    text = str(error)
    if "already accessed" in text or "AlreadyLocked" in type(error).__name__:
        return f"{url} 正被另一个进程用着：Qdrant 的本地模式同一时间只许一个进程，要几个就用服务器（qdrant+http://…）。"
    return f"打不开 {url}：{shared.one_line(error)}。是服务器的话，看它启动了没有、地址对不对。"
