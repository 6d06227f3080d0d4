"""对账：库里的与应当有的逐条对，补得回去；审计日志改过的一行查得出来。"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np

from nlp_common.base.errors import UserError
from rag_common.audit import AuditLog
from rag_common.chunking import make_chunks
from rag_common.embed import Embedder
from rag_common.store import Store
from store_keeping import StorePlace, chunks_of, fill, note, put


def reconcile(store: Store, embedder: Embedder, documents: dict[str, str]) -> dict[str, list[str]]:
    """库里与应当有的逐条对：missing 少了的，extra 多了的，differing 向量与重新算的不同的。

    向量这样对：拿重新算的去查自己那篇文档，第一名应当就是自己、分数是 1。
    """
    wanted = {chunk.id: chunk for name, text in documents.items() for chunk in chunks_of(name, text)}
    present = set(store.ids())
    differing = []
    chunks = [chunk for id, chunk in wanted.items() if id in present]
    vectors = embedder.passages([chunk.text for chunk in chunks])
    for chunk, vector in zip(chunks, vectors, strict=True):
        scores = {hit.id: hit.score for hit in store.search(vector, 50, {"document": chunk.document})[0]}
        if abs(scores.get(chunk.id, 0.0) - float(vector @ vector)) > 1e-3:
            differing.append(chunk.id)
    return {
        "missing": sorted(wanted.keys() - present),
        "extra": sorted(present - wanted.keys()),
        "differing": differing,
    }


def mend(store: Store, embedder: Embedder, documents: dict[str, str], found: dict[str, list[str]]) -> None:
    store.delete(found["extra"])
    wanted = {chunk.id: chunk for name, text in documents.items() for chunk in chunks_of(name, text)}
    put(store, embedder, [wanted[id] for id in [*found["missing"], *found["differing"]]])


def lose_and_mend(place: StorePlace, embedder: Embedder, documents: dict[str, str], log: AuditLog) -> dict:
    """背着 sync 弄丢几行、塞进几行、弄坏几个向量，看对账查不查得出、补不补得回。"""
    rng = np.random.default_rng(0)
    store = place.open("对账")
    fill(store, embedder, documents)
    ids = [store.ids()[i] for i in rng.permutation(store.count())[:9]]
    store.delete(ids[:5])
    strangers = make_chunks("不知哪来的", "一段谁也没写过的话。", [(0, 10)])
    store.upsert(strangers, embedder.passages([chunk.text for chunk in strangers]))
    spoiled = store.get(ids[5:9])
    noise = rng.normal(size=(len(spoiled), embedder.dim)).astype(np.float32)
    store.upsert(spoiled, noise / np.linalg.norm(noise, axis=1, keepdims=True))
    found = reconcile(store, embedder, documents)
    mend(store, embedder, documents, found)
    note(log, "mend", "全部", **{name: len(ids) for name, ids in found.items()})
    left = sum(len(ids) for ids in reconcile(store, embedder, documents).values())
    store.close()
    counts = {name: len(ids) for name, ids in found.items()}
    return {"lost": 5, "extra_put": len(strangers), "spoiled": len(spoiled), **counts, "left": left}


def change_one_line(log: AuditLog, work: Path) -> dict:
    """在日志的抄本里悄悄改掉中间一行的一个数，verify 说是第几行。"""
    lines = log.path.read_text(encoding="utf-8").splitlines(keepends=True)
    place = len(lines) // 2
    row = json.loads(lines[place])
    row["event"]["embedded"] = row["event"].get("embedded", 0) + 1
    lines[place] = json.dumps(row, ensure_ascii=False) + "\n"
    copy = work / "tampered.jsonl"
    copy.write_text("".join(lines), encoding="utf-8")
    try:
        AuditLog(copy).verify()
        said = 0
    except UserError as error:
        said = int(re.search(r"第 (\d+) 行", str(error))[1])
    return {"lines": log.verify(), "changed_line": place + 1, "found_line": said}
