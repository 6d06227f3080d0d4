"""几个脚本共用：手册怎样切块，一次写几块，库放在哪里，做过的事记进日志。"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, urlencode

from catalogue import Product
from rag_common.audit import AuditLog
from rag_common.chunking import Chunk, make_chunks, recursive, text_hash
from rag_common.embed import Embedder
from rag_common.store import Store, check_url, open_store

CHUNK = 64  # 字；一段一块上下
AT_ONCE = 32  # 一次编码、写进去几块：断了最多白做这么多
Step = Callable[..., None]  # 每次动库之前调用，参数是这次写几块


def no_step(rows: int = 0) -> None:
    """平常的更新：不数，也不断。"""


@dataclass
class StorePlace:
    """知识库放在哪里：默认每次一个新的 faiss:// 文件夹；--store 给了就接上名字。"""

    given: str | None
    folder: Path
    embedder: Embedder

    def __post_init__(self) -> None:
        if self.given:
            check_url(self.given)  # 写错了，照读者写的说，不带后面接上的名字

    def url(self, name: str) -> str:
        name = text_hash(name)[:8]
        if not self.given:
            return f"faiss://{self.folder / name}"
        head, mark, options = self.given.partition("?")
        scheme, rest = head.split("://", 1)
        if scheme == "pgvector":  # 接在表名上
            given = dict(parse_qsl(options, keep_blank_values=True))
            table = f"{given.get('table', 'rag')}_{name}"
            return f"{head}?{urlencode(given | {'table': table})}"
        if scheme == "milvus":  # 文件名要以 .db 结尾
            return f"{head.removesuffix('.db')}_{name}.db"
        if scheme in ("faiss", "qdrant"):  # 文件夹
            return f"{head.rstrip('/')}_{name}{mark}{options}"
        host, _, collection = rest.partition("/")  # 服务器：接在集合或索引的名字上
        return f"{scheme}://{host}/{collection.strip('/') or 'rag'}_{name}{mark}{options}"

    def open(self, name: str) -> Store:
        """空的：同名的里面有上次留下的，清掉。"""
        store = open_store(self.url(name), self.embedder.fingerprint, self.embedder.dim)
        store.delete(store.ids())
        return store


def texts_of(products: list[Product]) -> dict[str, str]:
    return {product.name: product.text() for product in products}


def chunks_of(name: str, text: str, size: int = CHUNK) -> list[Chunk]:
    return make_chunks(name, text, recursive(text, size))


def put(store: Store, embedder: Embedder, chunks: list[Chunk], step: Step = no_step) -> None:
    """编码、写进去，一次 AT_ONCE 块。"""
    for start in range(0, len(chunks), AT_ONCE):
        part = chunks[start : start + AT_ONCE]
        vectors = embedder.passages([chunk.text for chunk in part])
        step(len(part))
        store.upsert(part, vectors)


def note(log: AuditLog | None, what: str, document: str, **more: object) -> None:
    if log is not None:
        log.append({"what": what, "document": document, **more})


def fill(store: Store, embedder: Embedder, documents: dict[str, str], size: int = CHUNK) -> int:
    """documents 全部切块、编码、写进去，返回几块。"""
    chunks = [chunk for name, text in documents.items() for chunk in chunks_of(name, text, size)]
    put(store, embedder, chunks)
    return len(chunks)
