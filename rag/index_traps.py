"""LangChain 的 index()：按散列比，跳过没变的。什么时候它没有跳过，什么时候跳过得不对，数给你看。

两处要紧的写法（langchain_core/indexing/api.py）：
- cleanup="incremental" 每写一批，就删掉"这一批提到的文档里、这次还没见过的块"。同一篇的下一批还没轮到，也被删了，
  轮到时只好重新编码；这中间去查，它们不在库里。一批的边界落在哪一篇中间，哪一篇就遭殃，一个字没改也一样。
- 跳过不跳过，看的是账本（record manager）里有没有，不看库里有没有；比的是文字加 metadata 的散列。
"""

from __future__ import annotations

from catalogue import make_products
from nlp_common.base.console import print_table
from rag_common.embed import Embedder
from store_keeping import StorePlace, chunks_of
from update_strategy import sync

BOOKS = 40  # 多少篇文档，一篇两件商品、八块
TRAPS = {
    "full": "full",
    "incremental": "incremental，一批 100",
    "incremental_4": "incremental，一批 4",
    "nothing_changed": "incremental，一字未改",
    "offsets": "full，metadata 里有位置",
    "full_of_one": "full，只给了改的那篇",
    "emptied": "full，库先清空了",
    "ours": "我们的",
    "ours_unchanged": "我们的，一字未改",
    "ours_emptied": "我们的，库先清空了",
}


def index_traps(place: StorePlace, embedder: Embedder, seed: int) -> dict[str, dict]:
    """BOOKS 篇文档，一篇八块。第二次只改一块（或者什么也不改），各编码了几块、中间库里最少剩几块、最后剩几块。"""
    products = make_products(2 * BOOKS, seed, start=5000)
    before = {}
    for first, second in zip(products[::2], products[1::2], strict=True):
        before[first.name] = f"{first.text()}\n\n{second.text()}"
    name = next(iter(before))
    after = before | {name: before[name].replace("元。会员", "元整。会员", 1)}  # 第一块多了一个字

    tries = {  # 名字 → (第二次的文档, cleanup, batch_size, metadata 里有没有位置)
        "full": (after, "full", 100, False),
        "incremental": (after, "incremental", 100, False),
        "incremental_4": (after, "incremental", 4, False),
        "nothing_changed": (before, "incremental", 100, False),
        "offsets": (after, "full", 100, True),
        "full_of_one": ({name: after[name]}, "full", 100, False),
    }
    rows = {key: try_index(place, embedder, before, *each) for key, each in tries.items()}
    rows["emptied"] = try_index(place, embedder, before, before, "full", 100, False, empty=True)
    rows["ours"] = try_sync(place, embedder, before, after)
    rows["ours_unchanged"] = try_sync(place, embedder, before, before)
    rows["ours_emptied"] = try_sync(place, embedder, before, before, empty=True)
    return rows


def try_index(
    place: StorePlace, embedder: Embedder, before: dict, after: dict, cleanup: str, batch_size: int,
    offsets: bool, empty: bool = False,
) -> dict:  # fmt: skip
    """index() 两次。账本（record manager）记着写过什么，与库是两处：库空了，它不知道。"""
    from langchain_core.indexing import InMemoryRecordManager, index

    from langchain_parts import OurEmbeddings, OurVectorStore, to_document

    def documents(texts: dict[str, str]) -> list:
        chunks = [chunk for name, text in texts.items() for chunk in chunks_of(name, text)]
        return [to_document(chunk, **({"start": chunk.start} if offsets else {})) for chunk in chunks]

    vectors = OurVectorStore(place.open("index"), OurEmbeddings(embedder))
    records = InMemoryRecordManager("手册")
    records.create_schema()
    same = {"cleanup": cleanup, "source_id_key": "document", "key_encoder": "sha256"}
    index(documents(before), records, vectors, batch_size=100_000, **same)
    first = vectors.embeddings.rows
    if empty:
        vectors.store.delete(vectors.store.ids())
    vectors.fewest, vectors.embeddings.rows = None, 0
    told = index(documents(after), records, vectors, batch_size=batch_size, **same)
    left = vectors.store.count()
    vectors.store.close()
    fewest = left if vectors.fewest is None else vectors.fewest
    return {
        "first": first,
        "embedded": vectors.embeddings.rows,
        "fewest": fewest,
        "left": left,
        "skipped": told["num_skipped"],
    }


def try_sync(place: StorePlace, embedder: Embedder, before: dict, after: dict, empty: bool = False) -> dict:
    """我们的（update_strategy.py）：没有另外的账本，库里有什么就是账；文字没变的块，id 不变，不动。"""
    store = place.open("sync")
    first = sync(store, embedder, before).embedded_rows
    if empty:
        store.delete(store.ids())
    counts = []
    done = sync(store, embedder, after, step=lambda rows=0: counts.append(store.count()))
    left = store.count()
    store.close()
    return {
        "first": first,
        "embedded": done.embedded_rows,
        "fewest": min([*counts, left]),
        "left": left,
        "skipped": left - done.embedded_rows,
    }


def print_traps(rows: dict[str, dict]) -> None:
    first = f"index() 第二次（第一次 {rows['full']['first']} 块）"
    table = [[first, "编码几块", "中间最少剩几块", "最后几块", "说跳过几块"]]
    for key, row in rows.items():
        table.append([TRAPS[key], *(row[name] for name in ("embedded", "fewest", "left", "skipped"))])
    print_table(table)
    print()
