"""知识库的选型里，rag_common/store.py 之外的几种，写成同一个样子：Chroma、LanceDB，和 FAISS 的四种索引。

接口是 Store 里用得到的几个：upsert、delete、search、count、close（见 rag_common/store.py）。
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from index_lab import HNSW, IVF, PQ, Flat
from rag_common import store_shared as shared
from rag_common.chunking import Chunk
from rag_common.store import Hit, Where

AT_ONCE = 1000


class FaissBase:
    """只有 FAISS：向量在索引里，文字与编号自己在一个 dict 里记着，都在内存里，save 才落盘。

    HNSW 不会删，所以删只是记下来，查的时候多取几条、去掉删了的；改是删了再添。
    """

    def __init__(self, folder: Path, kind: str, dim: int, train: np.ndarray):
        import faiss

        self.faiss, self.folder, self.kind, self.dim = faiss, folder, kind, dim
        lists = max(4, int(4 * np.sqrt(len(train))) // 4)  # 桶的个数取 √N 上下
        makers = {
            "flat": lambda: faiss.IndexIDMap2(Flat(dim)),
            "hnsw": lambda: faiss.IndexIDMap2(HNSW(dim)),
            "ivf": lambda: IVF(train, lists, max(1, lists // 8)),  # IVF 自己记编号，不能再套 IDMap2
            "pq": lambda: faiss.IndexIDMap2(PQ(train, dim // 4)),
        }
        self.numbers: dict[str, int] = {}  # id → 编号
        self.rows: dict[int, Chunk] = {}
        self.next = 0  # 下一个编号，只增不减
        if (folder / "rows.json").is_file():
            self.index = faiss.read_index(str(folder / "index.faiss"))
            saved = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
            self.next = saved["next"]
            self.rows = {int(number): shared.chunk_of(row) for number, row in saved["rows"].items()}
            self.numbers = {chunk.id: number for number, chunk in self.rows.items()}
        else:
            self.index = makers[kind]()

    @property
    def hidden(self) -> int:
        """删了而还在索引里的。"""
        return self.index.ntotal - len(self.rows)

    def upsert(self, chunks: Sequence[Chunk], vectors: np.ndarray) -> None:
        vectors = shared.check_rows(chunks, vectors, self.dim)
        self.delete([chunk.id for chunk in chunks])
        numbers = np.arange(self.next, self.next + len(chunks))
        self.next += len(chunks)
        self.index.add_with_ids(vectors, numbers)
        for chunk, number in zip(chunks, numbers.tolist(), strict=True):
            self.numbers[chunk.id], self.rows[number] = number, chunk

    def delete(self, ids: Iterable[str]) -> int:
        numbers = [self.numbers.pop(name) for name in dict.fromkeys(ids) if name in self.numbers]
        for number in numbers:
            del self.rows[number]
        if numbers and self.kind != "hnsw":
            self.index.remove_ids(np.array(numbers))
        return len(numbers)

    def search(self, vectors: np.ndarray, k: int, where: Where | None = None) -> list[list[Hit]]:
        vectors, options = shared.check_queries(vectors, self.dim), {}
        most = min(k + self.hidden, self.index.ntotal)
        allowed = self.rows.keys()
        if where:
            allowed = {number for number, chunk in self.rows.items() if shared.matches(chunk, where)}
            if self.kind == "pq":
                most = self.index.ntotal  # PQ 不会筛选：全排出来再挑
            elif allowed:
                options["params"] = self._parameters(self.faiss.IDSelectorBatch(sorted(allowed)))
        if not most or not allowed:
            return [[] for _ in vectors]
        scores, numbers = self.index.search(vectors, most, **options)
        found = []
        for row in range(len(vectors)):
            pairs = zip(numbers[row].tolist(), scores[row].tolist(), strict=True)
            found.append([shared.hit_of(self.rows[n], score) for n, score in pairs if n in allowed][:k])
        return found

    def _parameters(self, selector):
        """各种索引的查询参数是各自的类；少写一项就回到它的默认值（n_probe 是 1），所以都照抄一遍。"""
        if self.kind == "ivf":
            return self.faiss.SearchParametersIVF(sel=selector, nprobe=self.index.nprobe)
        if self.kind == "hnsw":
            return self.faiss.SearchParametersHNSW(sel=selector, efSearch=64)
        return self.faiss.SearchParameters(sel=selector)

    def count(self) -> int:
        return len(self.rows)

    def close(self) -> None:
        """到这时才落盘：在这之前断电，什么也没有。"""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.faiss.write_index(self.index, str(self.folder / "index.faiss"))
        rows = {number: shared.payload(chunk) for number, chunk in self.rows.items()}
        saved = json.dumps({"next": self.next, "rows": rows}, ensure_ascii=False)
        (self.folder / "rows.json").write_text(saved, encoding="utf-8")


class ChromaBase:
    """Chroma 的本地模式：SQLite 存文字，向量在 HNSW 里。"""

    def __init__(self, folder: Path, dim: int):
        os.environ["ANONYMIZED_TELEMETRY"] = "False"  # 它默认往外发使用情况
        import chromadb
        from chromadb.config import Settings

        self.dim = dim
        self.client = chromadb.PersistentClient(str(folder), Settings(anonymized_telemetry=False))
        space = {"hnsw": {"space": "ip"}}
        self.table = self.client.get_or_create_collection("rag", configuration=space, embedding_function=None)

    def upsert(self, chunks: Sequence[Chunk], vectors: np.ndarray) -> None:
        vectors = shared.check_rows(chunks, vectors, self.dim)
        for start in range(0, len(chunks), AT_ONCE):
            part = chunks[start : start + AT_ONCE]
            self.table.upsert(
                ids=[chunk.id for chunk in part],
                embeddings=vectors[start : start + AT_ONCE],
                documents=[chunk.text for chunk in part],
                # 它的 meta 只能是平的一层，空的也不行：位置与整个 meta 另存成一栏 JSON
                metadatas=[
                    {**chunk.meta, "document": chunk.document, "_row": json.dumps(shared.payload(chunk))}
                    for chunk in part
                ],
            )

    def delete(self, ids: Iterable[str]) -> int:
        wanted = list(dict.fromkeys(ids))
        present = self.table.get(ids=wanted, include=[])["ids"] if wanted else []
        if present:
            self.table.delete(ids=present)
        return len(present)

    def search(self, vectors: np.ndarray, k: int, where: Where | None = None) -> list[list[Hit]]:
        vectors = shared.check_queries(vectors, self.dim)
        parts = [{name: {"$in": shared.values_of(wanted)}} for name, wanted in (where or {}).items()]
        condition = {"$and": parts} if len(parts) > 1 else parts[0] if parts else None
        found = self.table.query(
            query_embeddings=vectors, n_results=k, where=condition, include=["metadatas", "distances"]
        )
        return [
            [
                shared.hit_from(json.loads(row["_row"]), 1 - distance)
                for row, distance in zip(rows, distances, strict=True)
            ]
            for rows, distances in zip(found["metadatas"], found["distances"], strict=True)
        ]

    def count(self) -> int:
        return self.table.count()

    def close(self) -> None:
        self.client.close()


class LanceBase:
    """LanceDB：一个文件夹里的列式文件；没有建索引时，一条一条地比。meta 的各栏就是表的各栏。"""

    def __init__(self, folder: Path, dim: int, columns: Sequence[str]):
        import lancedb
        import pyarrow

        self.pa, self.dim, self.columns = pyarrow, dim, list(columns)
        text = [pyarrow.field(name, pyarrow.string()) for name in ["id", "document", "row", *self.columns]]
        vector = pyarrow.field("vector", pyarrow.list_(pyarrow.float32(), dim))
        self.table = lancedb.connect(str(folder)).create_table(
            "rag", schema=pyarrow.schema([*text, vector]), exist_ok=True
        )

    def upsert(self, chunks: Sequence[Chunk], vectors: np.ndarray) -> None:
        vectors = shared.check_rows(chunks, vectors, self.dim)
        data = {name: [chunk.meta.get(name) for chunk in chunks] for name in self.columns}
        data["id"] = [chunk.id for chunk in chunks]
        data["document"] = [chunk.document for chunk in chunks]
        data["row"] = [json.dumps(shared.payload(chunk), ensure_ascii=False) for chunk in chunks]
        data["vector"] = self.pa.FixedSizeListArray.from_arrays(self.pa.array(vectors.ravel()), self.dim)
        rows = self.pa.table(data).select(self.table.schema.names)
        merge = self.table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all()
        merge.execute(rows.cast(self.table.schema))

    def delete(self, ids: Iterable[str]) -> int:
        before = self.table.count_rows()
        self.table.delete(f"id IN ({_quoted(ids)})")
        return before - self.table.count_rows()

    def search(self, vectors: np.ndarray, k: int, where: Where | None = None) -> list[list[Hit]]:
        condition = " AND ".join(
            f"{name} IN ({_quoted(shared.values_of(value))})" for name, value in (where or {}).items()
        )
        found = []
        for vector in shared.check_queries(vectors, self.dim):
            query = self.table.search(vector).distance_type("dot").limit(k).select(["row", "_distance"])
            if condition:
                query = query.where(condition, prefilter=True)
            found.append(
                [shared.hit_from(json.loads(row["row"]), 1 - row["_distance"]) for row in query.to_list()]
            )
        return found

    def count(self) -> int:
        return self.table.count_rows()

    def close(self) -> None:
        pass


def _quoted(values: Iterable[str]) -> str:
    """SQL 的一串字符串，里面的单引号写两遍。"""
    return ", ".join("'" + str(value).replace("'", "''") + "'" for value in values) or "NULL"
