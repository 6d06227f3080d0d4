"""FAISS 的几种索引，写成同一个样子：.add(向量, 编号)、.search(问题, k)；外加量 recall 的、造数据的。

FAISS 钉在一个线程上：一个问题分给几个线程，互相等的时间比算的还长。
"""

from __future__ import annotations

import sys
import time
from importlib.util import find_spec
from typing import Any

import numpy as np

from hand_index import best_first
from nlp_common.base.errors import UserError


def use_one_thread() -> None:
    """FAISS 在不在；在就钉在一个线程上。"""
    if find_spec("faiss") is None:
        raise UserError("这一课讲的是 FAISS 里面，要先安装：pip install faiss-cpu")
    if sys.platform == "darwin":
        raise UserError(
            "macOS 上 faiss 与 torch 各带一份 OpenMP，一起导入会崩：这一课请在 Linux、WSL 或容器里跑。"
        )
    import faiss

    faiss.omp_set_num_threads(1)


# ---------------------------------------------------------------- 四种索引，都是内积


def Flat(dim: int) -> Any:
    """一条一条全比：精确。"""
    import faiss

    return faiss.IndexFlatIP(dim)


def HNSW(dim: int, links: int = 16) -> Any:
    """近邻图：从入口开始，总往更近的邻居走。"""
    import faiss

    index = faiss.IndexHNSWFlat(dim, links, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction, index.hnsw.efSearch = 80, 64
    return index


def IVF(train: np.ndarray, n_lists: int, n_probe: int, seed: int = 0) -> Any:
    """先在 train 上学 n_lists 个中心；查的时候只看最近的 n_probe 个桶。"""
    import faiss

    dim = train.shape[1]
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, n_lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed, index.cp.min_points_per_centroid, index.nprobe = seed + 1, 1, n_probe
    index.train(train)
    return index


def IVF_with(centroids: np.ndarray, n_probe: int) -> Any:
    """中心是给定的：与手写的比，两边要从同样的中心出发。"""
    import faiss

    n_lists, dim = centroids.shape
    quantizer = faiss.IndexFlatIP(dim)
    quantizer.add(np.ascontiguousarray(centroids))
    index = faiss.IndexIVFFlat(quantizer, dim, n_lists, faiss.METRIC_INNER_PRODUCT)
    index.is_trained, index.nprobe = True, n_probe
    return index


def PQ(train: np.ndarray, n_parts: int, seed: int = 0) -> Any:
    """每条只存 n_parts 个字节。"""
    import faiss

    index = faiss.IndexPQ(train.shape[1], n_parts, 8, faiss.METRIC_INNER_PRODUCT)
    index.pq.cp.seed, index.pq.cp.min_points_per_centroid = seed + 1, 1
    index.train(train)
    return index


def PQ_with(books: np.ndarray) -> Any:
    """码本是给定的 (M, 256, D/M)。"""
    import faiss

    n_parts, n_codes, size = books.shape
    index = faiss.IndexPQ(n_parts * size, n_parts, int(np.log2(n_codes)), faiss.METRIC_INNER_PRODUCT)
    faiss.copy_array_to_vector(np.ascontiguousarray(books, np.float32).ravel(), index.pq.centroids)
    index.is_trained = True
    return index


def faiss_kmeans(x: np.ndarray, start: np.ndarray, steps: int) -> np.ndarray:
    import faiss

    k, dim = start.shape
    learner = faiss.Kmeans(dim, k, niter=steps, min_points_per_centroid=1, max_points_per_centroid=len(x))
    learner.train(x, init_centroids=start)
    return learner.centroids


# ---------------------------------------------------------------- 量


def recall(index: Any, base: np.ndarray, queries: np.ndarray, k: int = 10) -> float:
    """真正最近的 k 个找到了几成。与第 k 名一样近的（相同的文字）都算对。"""
    scores = queries @ base.T  # (Q, N)
    worst = np.take_along_axis(scores, best_first(scores, k), 1)[:, -1]  # 第 k 名的分
    _, found = index.search(queries, k)
    right = [
        sum(scores[row, place] >= worst[row] - 1e-6 for place in places if place >= 0)
        for row, places in enumerate(found)
    ]
    return float(np.mean(right)) / k


def list_sizes(index: Any) -> np.ndarray:
    return np.array([index.invlists.list_size(number) for number in range(index.nlist)])


def scanned(index: Any, queries: np.ndarray) -> float:
    """一次查询看了全部数据的几成。"""
    _, probed = index.quantizer.search(queries, index.nprobe)
    sizes = list_sizes(index)
    return float(sizes[probed].sum(1).mean() / sizes.sum())


def topics(n: int, dim: int, n_topics: int, seed: int, spread: float = 0.5) -> np.ndarray:
    """n 个点围着 n_topics 个随机的主题，长度都是 1。种子不同，主题全不同。"""
    rng = np.random.default_rng(seed)
    centers = rng.standard_normal((n_topics, dim))
    points = centers[rng.integers(n_topics, size=n)] + spread * rng.standard_normal((n, dim))
    return np.ascontiguousarray(points / np.linalg.norm(points, axis=1, keepdims=True), dtype=np.float32)


def compare_adding(old: np.ndarray, new: np.ndarray, queries: np.ndarray, n_lists: int, n_probe: int) -> dict:
    """已有 old，来了 new：只添，与全部重建，各用多久、recall 各多少。"""
    everything, rows = np.concatenate([old, new]), {}
    makers = {
        "flat": lambda train: Flat(old.shape[1]),
        "hnsw": lambda train: HNSW(old.shape[1]),
        "ivf": lambda train: IVF(train, n_lists, n_probe),
    }
    for name, make in makers.items():
        added = make(old)
        added.add(old)
        started = time.perf_counter()
        added.add(new)
        seconds = time.perf_counter() - started
        started = time.perf_counter()
        rebuilt = make(everything)
        rebuilt.add(everything)
        rows[name] = {
            "add_ms": 1000 * seconds,
            "rebuild_ms": 1000 * (time.perf_counter() - started),
            "add_recall": recall(added, everything, queries),
            "rebuild_recall": recall(rebuilt, everything, queries),
        }
    return rows


def compare_kinds(x: np.ndarray, queries: np.ndarray, n_lists: int, probes: list[int]) -> dict[str, dict]:
    """同样的向量，几种索引：recall、看了几成数据、一条占几个字节、一次查询几毫秒。"""
    dim = x.shape[1]
    made = {"flat": Flat(dim), "hnsw": HNSW(dim)}
    for index in made.values():
        index.add(x)
    ivf = IVF(x, n_lists, 1)
    ivf.add(x)
    for parts in (dim // 8, dim // 4):
        made[f"pq_{parts}"] = PQ(x, parts)
        made[f"pq_{parts}"].add(x)
    links = 2 * 16 * 4  # HNSW 最底下一层每条 32 个邻居，一个 4 字节
    sizes = {"flat": 4 * dim, "hnsw": 4 * dim + links, "ivf": 4 * dim + 8}
    rows = {}
    for name, index in made.items():
        kind = name.split("_")[0]
        size = sizes.get(kind, int(name.split("_")[1]) if kind == "pq" else 0)
        share = 1.0 if kind != "hnsw" else None
        rows[name] = {"kind": kind, "recall": recall(index, x, queries), "scanned": share, "bytes": size}
        rows[name]["ms"] = milliseconds(index, queries)
    for probe in probes:
        ivf.nprobe = probe
        rows[f"ivf_{probe}"] = {
            "kind": "ivf",
            "recall": recall(ivf, x, queries),
            "scanned": scanned(ivf, queries),
            "bytes": sizes["ivf"],
            "ms": milliseconds(ivf, queries),
        }
    return rows


def milliseconds(index: Any, queries: np.ndarray, k: int = 10) -> float:
    """一次一个问题，中位数。"""
    taken = []
    for query in queries:
        started = time.perf_counter()
        index.search(query[None], k)
        taken.append(time.perf_counter() - started)
    return 1000 * float(np.median(taken))


# ---------------------------------------------------------------- 删除以后的编号


def ids_after_removal(x: np.ndarray, n_lists: int = 8, gone: int = 10) -> dict:
    """放进 x 的前九成，删掉第 3 到第 3 + gone 条，再添剩下的一成；拿每一条自己去问，查出来的是不是它。

    wrong：还在的里面，查出来的编号不是它自己的有几条；repeated：有几个编号是两条共用的。
    """
    import faiss

    n = int(0.9 * len(x))
    removed, kept, late = np.arange(3, 3 + gone), np.r_[0:3, 3 + gone : n], np.arange(n, len(x))
    makers = {
        "flat": (lambda: Flat(x.shape[1]), False),
        "flat_idmap2": (lambda: faiss.IndexIDMap2(Flat(x.shape[1])), True),
        "ivf": (lambda: IVF(x, n_lists, n_lists), False),
        "ivf_idmap2": (lambda: faiss.IndexIDMap2(IVF(x, n_lists, n_lists)), True),
        "ivf_own_ids": (lambda: IVF(x, n_lists, n_lists), True),  # IVF 自己就会记编号
    }
    rows = {}
    for name, (make, named) in makers.items():
        index = make()
        for part in (np.arange(n), late):
            if named:
                index.add_with_ids(x[part], part)
            else:
                index.add(x[part])  # 编号由它自己排
            if len(part) == n:
                index.remove_ids(removed)
        _, found = index.search(x[np.r_[kept, late]], 1)
        wrong = found[:, 0] != np.r_[kept, late]
        _, times = np.unique(found, return_counts=True)
        rows[name] = {"wrong": int(wrong.sum()), "repeated": int((times > 1).sum()), "asked": len(found)}
    return rows
