"""Elasticsearch 8 以上：网址 elasticsearch://用户:密码@主机:9200/索引（https 写 elasticsearch+https://…），只用标准库的 HTTP。

默认精确地找（script_score）；?index=hnsw 用它的 knn（近似，大了才快）；?ca=文件 是服务器自己签的证书（安装时生成的 http_ca.crt）。
写都带 refresh=wait_for：返回了就查得到。
OpenSearch 说的话大半相同，不同的几处在 store_opensearch.py。
"""

from __future__ import annotations

import base64
import json
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import numpy as np

from nlp_common.base.errors import UserError
from rag_common import store_shared as shared
from rag_common.chunking import Chunk
from rag_common.store import Hit, Where

AT_ONCE = 500
PAGE = 1000
TIMEOUT = 30.0
MOST = 10_000  # 一次最多给这么多条（index.max_result_window），候选也最多这么多


class ElasticsearchStore:
    NAME = "Elasticsearch"

    def __init__(self, url: str, fingerprint: str, dim: int):
        parts = urlsplit(url)
        self.url, self.fingerprint, self.dim = shared.without_password(url), fingerprint, dim
        self.lock = threading.RLock()
        host = parts.netloc.rpartition("@")[2]
        self.address = f"{'https' if parts.scheme.endswith('https') else 'http'}://{host}"
        name = parts.path.strip("/") or "rag"
        if name != name.lower():
            raise UserError(f"{self.url}：{self.NAME} 的索引名只许小写。")
        self.index = quote(name, safe="")
        options = parse_qs(parts.query)
        self.kind = options.get("index", ["flat"])[-1]
        if self.kind not in ("flat", "hnsw"):
            raise UserError(f"{self.NAME.lower()}:// 的 index={self.kind} 不认识，可以是 flat 或 hnsw。")
        self.trust = _trust(options["ca"][-1]) if "ca" in options else None
        self.headers = {"Content-Type": "application/json"}
        if parts.username:
            secret = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
            self.headers["Authorization"] = "Basic " + base64.b64encode(secret).decode()
        self._make()

    def _make(self) -> None:
        found = self._ask("GET", f"/{self.index}/_mapping", missing=True)
        if found is None:
            self._ask("PUT", f"/{self.index}", self._definition(), missing=True)
            found = self._ask("GET", f"/{self.index}/_mapping")
        (mapping,) = found.values()
        shared.check_fingerprint(self.url, mapping["mappings"].get("_meta", {}), self.fingerprint, self.dim)

    def _definition(self) -> dict:
        """新建索引时说的：各栏是什么；embedder 的指纹记在 _meta 里。"""
        fields = {
            "id": {"type": "keyword"},
            "document": {"type": "keyword"},
            "text": {"type": "text", "index": False},
            "start": {"type": "integer"},
            "end": {"type": "integer"},
            "meta": {"type": "flattened"},  # 各栏都按字符串比
            "vector": self._vector_field(),
        }
        saved = {"fingerprint": self.fingerprint, "dim": self.dim}
        return {"mappings": {"_meta": saved, "properties": fields}}

    def _vector_field(self) -> dict[str, Any]:
        if self.kind == "hnsw":
            return {"type": "dense_vector", "dims": self.dim, "index": True, "similarity": "dot_product"}
        return {"type": "dense_vector", "dims": self.dim, "index": False}

    def upsert(self, chunks: Sequence[Chunk], vectors: np.ndarray) -> None:
        vectors = shared.check_rows(chunks, vectors, self.dim)
        lines = []
        for chunk, vector in zip(chunks, vectors, strict=True):
            lines.append({"index": {"_id": shared.stable_id(chunk.id)}})
            lines.append({**shared.payload(chunk), "vector": vector.tolist()})
        for start in range(0, len(lines), 2 * AT_ONCE):
            self._bulk(lines[start : start + 2 * AT_ONCE])

    def delete(self, ids: Iterable[str]) -> int:
        present = [chunk.id for chunk in self.get(ids)]
        for start in range(0, len(present), AT_ONCE):
            self._bulk(
                [{"delete": {"_id": shared.stable_id(name)}} for name in present[start : start + AT_ONCE]]
            )
        return len(present)

    def search(self, vectors: np.ndarray, k: int, where: Where | None = None) -> list[list[Hit]]:
        found = []
        for vector in shared.check_queries(vectors, self.dim):
            rows = self._search(self._nearest(vector.tolist(), min(k, MOST), where))
            found.append([shared.hit_from(row["_source"], self._product(row["_score"])) for row in rows])
        return found

    def get(self, ids: Iterable[str]) -> list[Chunk]:
        wanted = list(dict.fromkeys(ids))
        found = {}
        for start in range(0, len(wanted), AT_ONCE):
            part = wanted[start : start + AT_ONCE]
            query = {
                "query": {"ids": {"values": [shared.stable_id(name) for name in part]}},
                "size": len(part),
            }
            for row in self._search(query):
                found[row["_source"]["id"]] = shared.chunk_of(row["_source"])
        return [found[name] for name in wanted if name in found]

    def ids(self, where: Where | None = None) -> list[str]:
        names: list[str] = []
        query = {"query": condition(where), "size": PAGE, "sort": [{"id": "asc"}]}
        while True:
            rows = self._search(query)
            names += [row["_source"]["id"] for row in rows]
            if len(rows) < PAGE:
                return names
            query["search_after"] = rows[-1]["sort"]

    def count(self, where: Where | None = None) -> int:
        return self._ask("POST", f"/{self.index}/_count", {"query": condition(where)})["count"]

    def close(self) -> None:
        pass  # 没有一直开着的连接

    # ------------------------------------------------------------ 说 HTTP

    def _nearest(self, vector: list[float], k: int, where: Where | None) -> dict:
        if self.kind == "hnsw":
            candidates = min(max(10 * k, 100), MOST)
            knn = {"field": "vector", "query_vector": vector, "k": k, "num_candidates": candidates}
            return {"knn": {**knn, "filter": condition(where)}, "size": k}
        # 分数不许是负的，所以加 1
        script = {"source": "dotProduct(params.query, 'vector') + 1.0", "params": {"query": vector}}
        return {"query": {"script_score": {"query": condition(where), "script": script}}, "size": k}

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
        """missing：404（没有这个索引）与"已经有了"（别的进程刚建好）都是 None。"""
        data = (
            body.encode()
            if isinstance(body, str)
            else json.dumps(body).encode()
            if body is not None
            else None
        )
        request = urllib.request.Request(self.address + path, data, self.headers, method=method)
        try:
            with self.lock, urllib.request.urlopen(request, timeout=TIMEOUT, context=self.trust) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            said = error.read(2000).decode(errors="replace")
            if missing and (error.code == 404 or "resource_already_exists" in said):
                return None
            if error.code in (401, 403):
                raise UserError(f"{self.url}：用户名或密码不对，或没有权限（HTTP {error.code}）。") from error
            raise UserError(f"{self.url} 说 HTTP {error.code}：{said[:300]}") from error
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, ssl.SSLCertVerificationError):
                raise UserError(
                    f"{self.url} 的证书信不过（{reason.verify_message}）：自己签的证书，用 ?ca=证书文件 指给它。"
                ) from error
            raise UserError(
                f"连不上 {self.url}（{reason}）。看看 {self.NAME} 启动了没有、地址与端口对不对、是不是该用 https。"
            ) from error


def _trust(path: str) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=path)
    except (OSError, ssl.SSLError) as error:
        raise UserError(f"?ca={path} 读不成证书（{error}）：要是一个 PEM 文件。") from error


def condition(where: Where | None) -> dict:
    """where → 它的查询语言；flattened 的栏按字符串比，真假写作 true、false。"""
    terms = []
    for name, wanted in (where or {}).items():
        field = "document" if name == "document" else f"meta.{name}"
        values = [
            value if isinstance(value, str) else json.dumps(value) for value in shared.values_of(wanted)
        ]
        terms.append({"terms": {field: values}})
    return {"bool": {"filter": terms}} if terms else {"match_all": {}}
