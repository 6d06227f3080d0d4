"""各种知识库（store_*.py）共用的：写进去的对不对、是不是同一个 embedder、一条怎样存成 JSON、条件与网址。"""

from __future__ import annotations

import contextlib
import json
import socket
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from nlp_common.base.errors import UserError
from nlp_common.base.runs import without_password  # noqa: F401  各后端从这里拿
from rag_common.chunking import Chunk
from rag_common.store import Hit, Where


@contextlib.contextmanager
def opening(explain: Callable[[Exception], str]) -> Iterator[None]:
    """打开的时候，别人的库抛的各种错（连不上、被占着、坏了）都换成 explain 说的一句话；我们自己的 UserError 照旧。"""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(explain(error)) from error


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def server_address(url: str) -> tuple[str, str]:
    """``qdrant+http://主机:6333/集合`` → (``http://主机:6333``, 集合)；没写集合是 rag。"""
    parts = urlsplit(url)
    plain = "https" if parts.scheme.endswith("https") else "http"
    return f"{plain}://{parts.netloc}", parts.path.strip("/") or "rag"


def must_listen(address: str, port: int) -> None:
    """服务器在不在听；不在是 OSError。有的客户端连不上会自己重试几分钟，先问一声。"""
    parts = urlsplit(address)
    with socket.create_connection((parts.hostname or "", parts.port or port), timeout=10):
        pass


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


def hit_from(row: dict, score: float) -> Hit:
    """存成 JSON 的一条（payload 写的）→ 查到的一条。"""
    return hit_of(chunk_of(row), score)
