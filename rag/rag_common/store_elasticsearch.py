"""Elasticsearch 8 以上：网址 elasticsearch://用户:密码@主机:9200/索引（https 写 elasticsearch+https://…），只用标准库的 HTTP。

默认精确地找（script_score）；?index=hnsw 用它的 knn（近似，大了才快）。写都带 refresh=wait_for：返回了就查得到。
"""

from __future__ import annotations

import base64
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import numpy as np

from nlp_common.base.errors import UserError
from rag_common.chunking import Chunk
from rag_common.store import (
    Hit,
    Where,
    check_fingerprint,
    check_queries,
    check_rows,
    chunk_of,
    hit_of,
    payload,
    stable_id,
    values_of,
    without_password,
)

AT_ONCE = 500
PAGE = 1000
TIMEOUT = 30.0


class ElasticsearchStore:
    def __init__(self, url: str, fingerprint: str, dim: int):
        parts = urlsplit(url)
        self.url, self.fingerprint, self.dim = without_password(url), fingerprint, dim
        self.lock = threading.RLock()
        host = parts.netloc.rpartition("@")[2]
        self.address = f"{'https' if parts.scheme.endswith('https') else 'http'}://{host}"
        self.index = quote(parts.path.strip("/") or "rag", safe="")
        self.kind = parse_qs(parts.query).get("index", ["flat"])[-1]
        if self.kind not in ("flat", "hnsw"):
            raise UserError(f"elasticsearch:// 的 index={self.kind} 不认识，可以是 flat 或 hnsw。")
        self.headers = {"Content-Type": "application/json"}
        if parts.username:
            secret = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
            self.headers["Authorization"] = "Basic " + base64.b64encode(secret).decode()
        self._make()

    def _make(self) -> None:
        found = self._ask("GET", f"/{self.index}/_mapping", missing=True)
        if found is None:
            vector: dict[str, Any] = {"type": "dense_vector", "dims": self.dim, "index": self.kind == "hnsw"}
            if self.kind == "hnsw":
                vector["similarity"] = "dot_product"
            fields = {
                "id": {"type": "keyword"},
                "document": {"type": "keyword"},
                "text": {"type": "text", "index": False},
                "start": {"type": "integer"},
                "end": {"type": "integer"},
                "meta": {"type": "flattened"},  # 各栏都按字符串比
                "vector": vector,
            }
            saved = {"fingerprint": self.fingerprint, "dim": self.dim}
            self._ask(
                "PUT", f"/{self.index}", {"mappings": {"_meta": saved, "properties": fields}}, missing=True
            )
            found = self._ask("GET", f"/{self.index}/_mapping")
        (mapping,) = found.values()
        check_fingerprint(self.url, mapping["mappings"].get("_meta", {}), self.fingerprint, self.dim)

    def upsert(self, chunks: Sequence[Chunk], vectors: np.ndarray) -> None:
        vectors = check_rows(chunks, vectors, self.dim)
        lines = []
        for chunk, vector in zip(chunks, vectors, strict=True):
            lines.append({"index": {"_id": stable_id(chunk.id)}})
            lines.append({**payload(chunk), "vector": vector.tolist()})
        for start in range(0, len(lines), 2 * AT_ONCE):
            self._bulk(lines[start : start + 2 * AT_ONCE])

    def delete(self, ids: Iterable[str]) -> int:
        present = [chunk.id for chunk in self.get(ids)]
        for start in range(0, len(present), AT_ONCE):
            self._bulk([{"delete": {"_id": stable_id(name)}} for name in present[start : start + AT_ONCE]])
        return len(present)

    def search(self, vectors: np.ndarray, k: int, where: Where | None = None) -> list[list[Hit]]:
        found = []
        for vector in check_queries(vectors, self.dim):
            rows = self._search(self._nearest(vector.tolist(), k, where))
            found.append([hit_of(chunk_of(row["_source"]), self._product(row["_score"])) for row in rows])
        return found

    def get(self, ids: Iterable[str]) -> list[Chunk]:
        wanted = list(dict.fromkeys(ids))
        found = {}
        for start in range(0, len(wanted), AT_ONCE):
            part = wanted[start : start + AT_ONCE]
            query = {"query": {"ids": {"values": [stable_id(name) for name in part]}}, "size": len(part)}
            for row in self._search(query):
                found[row["_source"]["id"]] = chunk_of(row["_source"])
        return [found[name] for name in wanted if name in found]

    def ids(self, where: Where | None = None) -> list[str]:
        names: list[str] = []
        query = {"query": _filter(where), "size": PAGE, "sort": [{"id": "asc"}]}
        while True:
            rows = self._search(query)
            names += [row["_source"]["id"] for row in rows]
            if len(rows) < PAGE:
                return names
            query["search_after"] = rows[-1]["sort"]

    def count(self, where: Where | None = None) -> int:
        return self._ask("POST", f"/{self.index}/_count", {"query": _filter(where)})["count"]

    def close(self) -> None:
        pass  # 没有一直开着的连接

    # ------------------------------------------------------------ 说 HTTP

    def _nearest(self, vector: list[float], k: int, where: Where | None) -> dict:
        if self.kind == "hnsw":
            knn = {"field": "vector", "query_vector": vector, "k": k, "num_candidates": max(10 * k, 100)}
            return {"knn": {**knn, "filter": _filter(where)}, "size": k}
        # 分数不许是负的，所以加 1
        script = {"source": "dotProduct(params.query, 'vector') + 1.0", "params": {"query": vector}}
        return {"query": {"script_score": {"query": _filter(where), "script": script}}, "size": k}

    def _product(self, score: float) -> float:
        """它给的分 → 内积：knn 的是 (1 + 内积) / 2，script_score 的是内积 + 1。"""
        return 2 * score - 1 if self.kind == "hnsw" else score - 1

    def _search(self, query: dict) -> list[dict]:
        query = {**query, "_source": {"excludes": ["vector"]}}
        return self._ask("POST", f"/{self.index}/_search", query)["hits"]["hits"]

    def _bulk(self, lines: list[dict]) -> None:
        body = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        answer = self._ask("POST", f"/{self.index}/_bulk?refresh=wait_for", body)
        if answer.get("errors"):
            faults = [item for row in answer["items"] for item in row.values() if item.get("error")]
            raise UserError(
                f"{self.url} 没有写下 {len(faults)} 条，第一条：{json.dumps(faults[0], ensure_ascii=False)[:200]}"
            )

    def _ask(self, method: str, path: str, body: Any = None, missing: bool = False) -> Any:
        """missing：404 是 None（没有这个索引），400 也是 None（别的进程刚建好）。"""
        data = (
            body.encode()
            if isinstance(body, str)
            else json.dumps(body).encode()
            if body is not None
            else None
        )
        request = urllib.request.Request(self.address + path, data, self.headers, method=method)
        try:
            with self.lock, urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            if missing and error.code in (400, 404):
                return None
            if error.code in (401, 403):
                raise UserError(f"{self.url}：用户名或密码不对，或没有权限（HTTP {error.code}）。") from error
            raise UserError(
                f"{self.url} 说 HTTP {error.code}：{error.read(300).decode(errors='replace')}"
            ) from error
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise UserError(
                f"连不上 {self.url}（{reason}）。看看 Elasticsearch 启动了没有、地址与端口对不对。"
            ) from error


def _filter(where: Where | None) -> dict:
    """where → 它的查询语言；flattened 的栏按字符串比，真假写作 true、false。"""
    terms = []
    for name, wanted in (where or {}).items():
        field = "document" if name == "document" else f"meta.{name}"
        values = [value if isinstance(value, str) else json.dumps(value) for value in values_of(wanted)]
        terms.append({"terms": {field: values}})
    return {"bool": {"filter": terms}} if terms else {"match_all": {}}
