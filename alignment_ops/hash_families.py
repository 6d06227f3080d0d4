"""MinHash 的打散办法：哪几种是对的，哪几种看着对，其实 128 个办法选中的是同一个元素。near_duplicates.py 用它。

教科书写的是 h(x) = (a·x + b) mod p，p = 2^61 − 1，a、b 在 [0, p) 里随机。x 是 32 位数时 a·x 有 93 位，uint64 放不下，
于是有人把 a 取小些，"就不溢出了"：可是 a·x + b 也就小于 p，mod p 什么也没做，谁最小只看谁的 x 最小，与 a 无关。
multiply-shift 不用 mod：a、b 是 64 位的随机数，乘法溢出的高位正好丢掉，留下的高 32 位就是要的数。
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

PRIME = np.uint64((1 << 61) - 1)


def modulo_prime(hashes: np.ndarray, rng: np.random.Generator, n_hashes: int, largest: int) -> np.ndarray:
    """(a·x + b) mod (2^61 − 1)，a、b 小于 largest，用 uint64 算。hashes (M,) → (K, M)。"""
    a, b = rng.integers(1, largest, (2, n_hashes, 1), dtype=np.uint64)
    return (a * hashes + b) % PRIME


def multiply_shift(hashes: np.ndarray, rng: np.random.Generator, n_hashes: int) -> np.ndarray:
    """((a·x + b) mod 2^64) >> 32：minhash.py 用的。"""
    a, b = rng.integers(0, 1 << 64, (2, n_hashes, 1), dtype=np.uint64)
    return ((a | np.uint64(1)) * hashes + b) >> np.uint64(32)


def affine_32(hashes: np.ndarray, rng: np.random.Generator, n_hashes: int) -> np.ndarray:
    """(a·x + b) mod 2^32，a 是奇数：datasketch 2.0 用的。"""
    a, b = rng.integers(0, 1 << 32, (2, n_hashes, 1), dtype=np.uint32)
    return (a | np.uint32(1)) * hashes.astype(np.uint32) + b


FAMILIES: dict[str, tuple[str, Callable[..., np.ndarray]]] = {
    "small_16": ("mod p，a < 2^16", partial(modulo_prime, largest=1 << 16)),
    "small_29": ("mod p，a < 2^29", partial(modulo_prime, largest=1 << 29)),
    "small_33": ("mod p，a < 2^33", partial(modulo_prime, largest=1 << 33)),
    "overflow": ("mod p，a < 2^61，乘法溢出", partial(modulo_prime, largest=(1 << 61) - 1)),
    "affine_32": ("mod 2^32，a 是奇数", affine_32),
    "multiply_shift": ("multiply-shift（我们的）", multiply_shift),
}


def sets_with(similarity: float, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """两个集合，元素是 32 位的随机数，并集有 size 个，Jaccard 是 similarity（取到最近的整数个）。"""
    union = np.unique(rng.integers(0, 1 << 32, 2 * size, dtype=np.uint64))
    union = rng.permutation(union)[:size]
    shared = round(similarity * size)
    middle = (shared + size) // 2
    return union[:middle], np.concatenate([union[:shared], union[middle:]])


def try_family(
    scatter: Callable[..., np.ndarray], similarity: float, size: int, n_pairs: int, n_hashes: int, seed: int
) -> dict[str, float]:
    """→ 估计的偏差、标准差是公式 √(J(1−J)/K) 的几倍、K 个办法在一个集合里选中了几个不同的元素。"""
    rng = np.random.default_rng(seed)
    estimates, picks = [], []
    for _ in range(n_pairs):
        left, right = sets_with(similarity, size, rng)
        scattered = scatter(np.concatenate([left, right]), rng, n_hashes)  # (K, 两个集合)
        smallest = scattered[:, : len(left)].min(axis=1) == scattered[:, len(left) :].min(axis=1)
        estimates.append(smallest.mean())
        picks.append(len(np.unique(scattered[:, : len(left)].argmin(axis=1))))
    theory = (similarity * (1 - similarity) / n_hashes) ** 0.5
    return {
        "bias": float(np.mean(estimates) - similarity),
        "deviation": float(np.std(estimates)),
        "times_theory": float(np.std(estimates) / theory),
        "elements_picked": float(np.mean(picks)),
    }
