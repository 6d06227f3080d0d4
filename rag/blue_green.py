"""换库时查询不断：新库在旁边建好，改一个别名切过去。"""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from catalogue import FACTS, Product
from nlp_common.base.errors import UserError
from nlp_common.base.runs import write_json
from rag_common.audit import AuditLog
from rag_common.chunking import text_hash
from rag_common.embed import Embedder
from rag_common.store import open_store
from store_keeping import CHUNK, StorePlace, fill, note, texts_of


@dataclass
class Alias:
    """一个文件，里面写着现在用哪个库。换它是一步的：读到的要么是旧的，要么是新的。只写名字：地址里可能有密码。"""

    path: Path

    def point_to(self, name: str) -> None:
        write_json(self.path, {"name": name})

    def name(self) -> str:
        return json.loads(self.path.read_text(encoding="utf-8"))["name"]


class Asking(threading.Thread):
    """一直在问的读者：每次问之前看一眼别名，换了就打开新的。lost 是一条也没有查到的，wrong 是第一名里没有答案的。"""

    def __init__(self, place: StorePlace, alias: Alias, embedder: Embedder, products: list[Product]):
        super().__init__(daemon=True)
        self.place, self.alias, self.embedder = place, alias, embedder
        self.asked = [(product, fact) for product in products for fact in FACTS]
        self.vectors = embedder.queries([product.question(fact) for product, fact in self.asked])
        self.stop, self.queries, self.lost, self.wrong = threading.Event(), 0, 0, 0
        self.names: list[str] = []  # 依次用过哪几个库
        self.fault = ""  # 打不开、查不了，是为什么

    def run(self) -> None:
        try:
            self.keep_asking()
        except UserError as error:
            self.fault = str(error)

    def keep_asking(self) -> None:
        store = None
        while not self.stop.is_set():
            product, fact = self.asked[self.queries % len(self.asked)]
            if not self.names or self.alias.name() != self.names[-1]:
                self.names.append(self.alias.name())
                url = self.place.url(self.names[-1])
                fresh = open_store(url, self.embedder.fingerprint, self.embedder.dim)
                if store is not None:
                    store.close()
                store = fresh
            [hits] = store.search(self.vectors[self.queries % len(self.asked)], 1)
            self.lost += not hits
            self.wrong += bool(hits) and product.answer(fact) not in hits[0].text
            self.queries += 1
        store.close()


def switch_while_asking(
    place: StorePlace, embedder: Embedder, products: list[Product], log: AuditLog
) -> dict:
    """换切法要整个重建。一次在旁边建好再切别名，一次就在原地重建：查询各丢多少。"""
    documents = texts_of(products)
    found = {}
    for name in ("蓝绿", "原地"):
        blue = place.open(f"{name}-蓝")
        fill(blue, embedder, documents)
        alias = Alias(place.folder / f"{text_hash(name)[:8]}.json")
        alias.point_to(f"{name}-蓝")
        asking = Asking(place, alias, embedder, products)
        asking.start()
        wait_for(asking, 100)
        if name == "蓝绿":
            switch_ms = rebuild_beside(place, embedder, documents, alias, log)
        else:
            blue.delete(blue.ids())
            fill(blue, embedder, documents)
        wait_for(asking, 100)
        asking.stop.set()
        asking.join()
        blue.close()
        found[name] = asking
    beside, in_place = found["蓝绿"], found["原地"]
    return {
        "queries": beside.queries,
        "lost_queries": beside.lost,
        "wrong": beside.wrong,
        "stores_seen": len(beside.names),
        "switch_ms": switch_ms,
        "lost_in_place": in_place.lost,
        "queries_in_place": in_place.queries,
    }


def rebuild_beside(
    place: StorePlace, embedder: Embedder, documents: dict[str, str], alias: Alias, log: AuditLog
) -> float:
    """建绿库（一块放两段），核对条数，切别名；返回切的那一刻用了几毫秒。旧库不删：出了事，别名指回去就行。"""
    green = place.open("蓝绿-绿")
    rows = fill(green, embedder, documents, 2 * CHUNK)
    if green.count() != rows:
        raise UserError(f"新库里有 {green.count()} 条，应当是 {rows} 条：不切换，旧库照常用。")
    green.close()
    started = time.perf_counter()
    alias.point_to("蓝绿-绿")
    milliseconds = 1000 * (time.perf_counter() - started)
    note(log, "switch", "全部", rows=rows)
    return milliseconds


def wait_for(asking: Asking, more: int, limit_s: float = 30) -> None:
    """等它再问 more 次；它停了（出错）或等太久是 UserError。"""
    target, until = asking.queries + more, time.monotonic() + limit_s
    while asking.queries < target:
        if not asking.is_alive() or time.monotonic() > until:
            raise UserError(f"一直在问的线程停了，没有查下去：{asking.fault or '上面有它的错。'}")
        time.sleep(0.002)
