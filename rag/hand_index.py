"""k-means、IVF、PQ，用 numpy 写成看得懂的样子；与 FAISS 比的是同样的起点、同样的向量，结果一个不差。

向量都是 (N, D) 的 float32，长度为 1；近就是内积大（余弦）。
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


def squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """|x − y|² = |x|² − 2x·y + |y|²，一次矩阵乘法算完。x (N, D)，y (K, D) → (N, K)"""
    return (x**2).sum(1)[:, None] - 2 * x @ y.T + (y**2).sum(1)[None, :]


def best_first(scores: np.ndarray, k: int) -> np.ndarray:
    """每一行分最高的 k 个的位置，同分的位置小的在前。(Q, N) → (Q, k)"""
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


# ---------------------------------------------------------------- k-means


def kmeans(x: np.ndarray, start: np.ndarray, steps: int) -> np.ndarray:
    """从 start (K, D) 开始走 steps 步：每个点归最近的中心，每个中心挪到归它的点的平均处。"""
    centroids = start.copy()
    for _ in range(steps):
        nearest = squared_distances(x, centroids).argmin(1)  # (N,)
        for number in range(len(centroids)):
            members = x[nearest == number]
            if len(members):  # 一个点也没有的中心留在原处（FAISS 会从最大的一堆里分一半给它）
                centroids[number] = members.mean(0)
    return centroids


def starting_points(x: np.ndarray, k: int, seed: int) -> np.ndarray:
    """随便挑 k 个不同的点做起点：两个起点相同，后一个一个点也分不到。"""
    _, first = np.unique(x, axis=0, return_index=True)  # 相同的文字，向量也相同
    pool = np.sort(first) if len(first) >= k else np.arange(len(x))  # 不同的不够，只好有相同的
    return x[np.random.default_rng(seed).choice(pool, k, replace=False)]


# ---------------------------------------------------------------- IVF：先找最近的几个桶，只在桶里找


@dataclass
class HandIVF:
    centroids: np.ndarray  # (K, D)
    lists: list[np.ndarray] = field(default_factory=list)  # 每个桶里的 id
    vectors: list[np.ndarray] = field(default_factory=list)  # 与之对应的向量

    def __post_init__(self) -> None:
        k, dim = self.centroids.shape
        self.lists = [np.zeros(0, np.int64) for _ in range(k)]
        self.vectors = [np.zeros((0, dim), np.float32) for _ in range(k)]

    def add(self, x: np.ndarray, ids: np.ndarray) -> None:
        """每条放进中心与它最近的桶。中心是训练时定的，添多少数据都不动：漂移就从这里来。"""
        bucket = (x @ self.centroids.T).argmax(1)  # (N,)
        for number in np.unique(bucket):
            here = bucket == number
            self.lists[number] = np.concatenate([self.lists[number], ids[here]])
            self.vectors[number] = np.concatenate([self.vectors[number], x[here]])

    def remove(self, ids: np.ndarray) -> None:
        """id 存在桶里，跟着向量走：删了别的，它不变。"""
        for number, names in enumerate(self.lists):
            kept = ~np.isin(names, ids)
            self.lists[number], self.vectors[number] = names[kept], self.vectors[number][kept]

    def search(self, queries: np.ndarray, k: int, n_probe: int) -> tuple[np.ndarray, np.ndarray]:
        """→ 分 (Q, k) 与 id (Q, k)，不够 k 个的补 -1。"""
        scores = np.full((len(queries), k), -np.inf, np.float32)
        ids = np.full((len(queries), k), -1, np.int64)
        for row, probed in enumerate(best_first(queries @ self.centroids.T, n_probe)):
            names = np.concatenate([self.lists[number] for number in probed])
            found = np.concatenate([self.vectors[number] for number in probed]) @ queries[row]
            best = best_first(found[None], k)[0]
            scores[row, : len(best)], ids[row, : len(best)] = found[best], names[best]
        return scores, ids


# ---------------------------------------------------------------- PQ：一段一段地用码本里最近的那个代替


def train_pq(x: np.ndarray, n_parts: int, n_codes: int, steps: int, seed: int) -> np.ndarray:
    """向量切成 n_parts 段，每段各做一次 k-means。→ 码本 (M, n_codes, D/M)"""
    books = []
    for part in np.split(x, n_parts, axis=1):
        books.append(kmeans(part, starting_points(part, n_codes, seed), steps))
    return np.stack(books)


def pq_encode(x: np.ndarray, books: np.ndarray) -> np.ndarray:
    """每段记下最近的码字是第几个。→ (N, M)，一段一个字节"""
    codes = []
    for part, book in zip(np.split(x, len(books), axis=1), books, strict=True):
        codes.append(squared_distances(part, book).argmin(1))
    return np.stack(codes, axis=1).astype(np.uint8)


def pq_search(
    queries: np.ndarray, codes: np.ndarray, books: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """问题不压缩：先算好它的每一段与每个码字的内积（一张表），一条的分就是查 M 次表、加起来。"""
    n_parts, _, size = books.shape
    parts = queries.reshape(len(queries), n_parts, size)
    table = np.einsum("qms,mcs->qmc", parts, books)  # (Q, M, n_codes)
    scores = np.zeros((len(queries), len(codes)), np.float32)
    for part in range(n_parts):
        scores += table[:, part, codes[:, part]]  # (Q, N)
    best = best_first(scores, k)
    return np.take_along_axis(scores, best, 1), best
