"""重复与近重复：MinHash + LSH，一步步写出来，只用 numpy。near_duplicates.py 是它的课，big_files.py 用它去重放不进内存的文件。

    find_duplicates(texts, threshold=0.8) -> [Duplicate(dropped, kept, similarity), …]    # 丢第几个，因为与留下的第几个像
    find_exact(texts)                     -> [(dropped, kept), …]                         # 只差空白、标点、全半角、大小写的

1. 字的 n 元组：一段文字变成一个集合（连着的 5 个字是一个元素），像不像就是两个集合的 Jaccard = 交 / 并。
2. MinHash：把集合里每个元素打散成一个数，记最小的那个。两个集合的最小数相同的概率正好是 Jaccard，
   所以换 K 个打散的办法，K 个最小数里相同的比例就是它的估计，标准差 √(J(1−J)/K)。
3. LSH：K 个最小数每 r 个一段，切成 b 段；有一段全相同才去比。被比到的概率 1 − (1 − s^r)^b 是一条 S 形曲线。
4. 比到的两段，算真的 Jaccard，不小于 threshold 才算重复：所以不会冤枉，只会漏掉曲线说的那么多。

参考：Broder 1997（MinHash）；Leskovec et al.《Mining of Massive Datasets》第 3 章（LSH）；
Dietzfelbinger et al. 1997（multiply-shift）；Lee et al. 2022（语言模型的训练数据去重）。
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

NGRAM, N_HASHES, RECALL = 5, 128, 0.95
BATCH_CHARACTERS = 1 << 16  # 一批大约多少个字：几个数组都放得进缓存
HALF, ODD = np.uint64(32), np.uint64(0x9E3779B97F4A7C15)
COMMON, FULL_WIDTH = re.compile(r"[\s，。！？；：、（）《》“”…]+"), re.compile("[！-～]+")
# 标点不算。挨着数字的 + - * / 等要留着："3+5" 与 "3-5" 不是同一道题，"1.5" 与 "15"、"50%" 与 "50" 也不是。
IGNORED = re.compile(
    r"""[\W_](?:
      (?<![-+*/×÷=<>^−.%])                # 别的标点
    | (?<=[-+*/×÷=<>^−])(?<!\d.)(?!\d)    # 运算符，左右都不是数字
    | (?<=\.)(?!\d) | (?<=%)(?<!\d.)     # 不是小数点的点，前面不是数字的百分号
    )""",
    re.VERBOSE,
)


class Duplicate(NamedTuple):
    dropped: int  # 丢掉的是第几个
    kept: int  # 它与留下的第几个重复；留下的总在前面
    similarity: float  # 两段文字 n 元组的 Jaccard；只差标点的是 1


@dataclass(frozen=True)
class Scheme:
    """怎么比：n 个字一组，K 个打散的办法，切成几段、每段几个。"""

    threshold: float
    n: int
    bands: int
    rows: int
    multipliers: np.ndarray  # (K,) uint64
    offsets: np.ndarray  # (K,) uint64

    @property
    def least_estimate(self) -> float:
        deviation = (self.threshold * (1 - self.threshold) / len(self.offsets)) ** 0.5
        return self.threshold - 4 * deviation


def make_scheme(threshold: float = 0.8, n: int = NGRAM, n_hashes: int = N_HASHES, seed: int = 0) -> Scheme:
    bands, rows = choose_bands(threshold, n_hashes)
    rng = np.random.default_rng(seed)
    multipliers, offsets = rng.integers(0, 1 << 64, (2, n_hashes), dtype=np.uint64)
    return Scheme(threshold, n, bands, rows, multipliers | np.uint64(1), offsets)


# ---------------------------------------------------------------- 找重复


def find_duplicates(
    texts: Sequence[str], threshold: float = 0.8, n: int = NGRAM, n_hashes: int = N_HASHES, seed: int = 0
) -> list[Duplicate]:
    """按次序看每一段文字：与前面留下的某一段像（Jaccard ≥ threshold）就丢掉，否则留下。

    只与留下的比：A 像 B、B 像 C 而 A 不像 C 时，B 因为 A 丢掉，C 留着，没有哪一行是因为不像它的一行丢掉的。
    有几段都像，取最像的。结果按 dropped 的次序。
    """
    scheme = make_scheme(threshold, n, n_hashes, seed)
    clean = [normalize(text) for text in texts]
    first: dict[str, Duplicate] = {}  # 一样的文字 → 第一次出现时，它算谁的重复
    buckets: dict[int, list[int]] = {}  # 一段的键 → 留下的第几个
    values = signatures(clean, scheme)  # (N, K)
    duplicates = []
    for index, keys in enumerate(band_keys(values, scheme.bands, scheme.rows).tolist()):
        if clean[index] in first:  # 一字不差
            duplicates.append(first[clean[index]]._replace(dropped=index))
            continue
        others = sorted({other for key in keys for other in buckets.get(key, ())})
        others = worth_comparing(values[index], others, values[others], scheme) if others else []
        kept, similarity = most_similar(clean[index], {other: clean[other] for other in others}, scheme.n)
        first[clean[index]] = Duplicate(index, index, 1.0)
        if similarity >= threshold:
            first[clean[index]] = Duplicate(index, kept, similarity)
            duplicates.append(first[clean[index]])
            continue
        for key in keys:
            buckets.setdefault(key, []).append(index)
    return duplicates


def worth_comparing(own: np.ndarray, others: list[int], values: np.ndarray, scheme: Scheme) -> list[int]:
    """others（各自的 K 个最小数是 values 的一行）里，估计的相似度不比 threshold 低出四个标准差的：别的不用细比。"""
    estimates = (values == own).mean(axis=1)  # (M, K) → (M,)
    return [other for other, each in zip(others, estimates, strict=True) if each >= scheme.least_estimate]


def most_similar(text: str, others: dict[int, str], n: int) -> tuple[int, float]:
    """others（第几个 → 文字）里与 text 最像的：(第几个, Jaccard)，一样像的取最前面的；没有是 (-1, 0)。"""
    best, own = (-1, 0.0), shingles(text, n) if others else None
    for index, other in others.items():
        similarity = jaccard(own, shingles(other, n))
        if similarity > best[1]:
            best = (index, similarity)
    return best


def find_exact(texts: Sequence[str]) -> list[tuple[int, int]]:
    """只差空白、标点、全半角、大小写的：[(丢第几个, 留第几个)]。"""
    first: dict[str, int] = {}
    pairs = []
    for index, text in enumerate(texts):
        kept = first.setdefault(normalize(text), index)
        if kept != index:
            pairs.append((index, kept))
    return pairs


# ---------------------------------------------------------------- 1. 文字 → n 元组


def normalize(text: str) -> str:
    """全角变半角、大写变小写，去掉空白与标点；全是标点的，只去掉空白。

    整段做 NFKC 慢：常见的标点先去掉，全角的字母数字单独变，多数文字就不用再做了。
    """
    clean = FULL_WIDTH.sub(lambda found: unicodedata.normalize("NFKC", found[0]), COMMON.sub("", text))
    if not unicodedata.is_normalized("NFKC", clean):
        clean = unicodedata.normalize("NFKC", clean)
    return IGNORED.sub("", clean.lower()) or "".join(text.split())


def shingles(clean: str, n: int = NGRAM) -> np.ndarray:
    """一段文字的 n 元组的集合：排好序的 32 位数，没有重复。不到 n 个字的，整段是一个元素。"""
    return np.unique(hashed_ngrams([clean], n)[0])


def jaccard(left: np.ndarray, right: np.ndarray) -> float:
    """两个集合（shingles 的结果）的交 / 并。"""
    shared = len(np.intersect1d(left, right, assume_unique=True))
    return shared / (len(left) + len(right) - shared)


def hashed_ngrams(clean: Sequence[str], n: int) -> tuple[np.ndarray, np.ndarray]:
    """几段文字的 n 元组接成一列 (M,) uint64（值小于 2^32），与每一段从第几个开始 (N,)；一段里可以有重复。"""
    padded = [text.ljust(n, "\0") for text in clean]
    codes = np.frombuffer("".join(padded).encode("utf-32-le", "surrogatepass"), "<u4")
    hashes = np.zeros(len(codes) - n + 1, np.uint64)
    for place in range(n):  # 五个字的编码揉成一个 64 位数：乘一个奇数，加下一个字
        hashes *= ODD
        hashes += codes[place : len(codes) - n + 1 + place]
    lengths = np.array([len(text) for text in padded])
    ends = lengths.cumsum()
    inside = np.ones(len(hashes), bool)
    for place in range(1, n):  # 跨过两段文字的那些组不要
        inside[(ends[:-1] - place)] = False
    starts = np.concatenate([[0], (lengths - n + 1).cumsum()[:-1]])
    return mix(hashes[inside]) >> HALF, starts


def mix(hashes: np.ndarray) -> np.ndarray:
    """MurmurHash3 的收尾：每一位都影响所有的位。就地改。"""
    for multiplier in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        hashes ^= hashes >> np.uint64(33)
        hashes *= np.uint64(multiplier)
    hashes ^= hashes >> np.uint64(33)
    return hashes


# ---------------------------------------------------------------- 2. n 元组 → K 个最小数


def signatures(clean: Sequence[str], scheme: Scheme) -> np.ndarray:
    """每段文字的 K 个最小数 (N, K) uint32。clean 是 normalize 过的。"""
    values = np.empty((len(clean), len(scheme.multipliers)), np.uint32)
    for start, stop in batches(clean):
        hashes, starts = hashed_ngrams(clean[start:stop], scheme.n)
        values[start:stop] = smallest(hashes, starts, scheme)
    return values


def smallest(hashes: np.ndarray, starts: np.ndarray, scheme: Scheme) -> np.ndarray:
    """multiply-shift：h_k(x) = ((a_k·x + b_k) mod 2^64) >> 32，a_k、b_k 是随机的 64 位数，x 是 32 位数。

    溢出正是要的 mod 2^64：numpy 的 uint64 乘法自己就丢掉高位。移位不改变大小的次序，所以先取最小再移。
    """
    found = np.empty((len(scheme.multipliers), len(starts)), np.uint64)  # (K, N)
    scattered = np.empty_like(hashes)
    for k, (a, b) in enumerate(zip(scheme.multipliers, scheme.offsets, strict=True)):
        np.multiply(hashes, a, out=scattered)
        np.add(scattered, b, out=scattered)
        np.minimum.reduceat(scattered, starts, out=found[k])
    return (found >> HALF).T.astype(np.uint32)


def batches(clean: Sequence[str]) -> Iterator[tuple[int, int]]:
    """从第几段到第几段是一批，一批约 BATCH_CHARACTERS 个字，至少一段。"""
    start = size = 0
    for index, text in enumerate(clean):
        if size and size + len(text) > BATCH_CHARACTERS:
            yield start, index
            start, size = index, 0
        size += max(len(text), 1)
    if size:
        yield start, len(clean)


def estimate(left: np.ndarray, right: np.ndarray) -> float:
    """由 K 个最小数估计 Jaccard。"""
    return float((left == right).mean())


# ---------------------------------------------------------------- 3. K 个最小数 → b 个键


def band_keys(values: np.ndarray, bands: int, rows: int) -> np.ndarray:
    """(N, K) 个最小数 → (N, b) uint64：每段 rows 个数揉成一个键，第几段也揉进去。"""
    keys = np.tile(np.arange(1, bands + 1, dtype=np.uint64), (len(values), 1))
    for row in range(rows):
        keys *= ODD
        keys += values[:, row : bands * rows : rows]
    return mix(keys)


def seen_probability(similarity: float, bands: int, rows: int) -> float:
    """相似度是 similarity 的两段文字被比到的概率：S 形曲线。"""
    return 1 - (1 - similarity**rows) ** bands


def choose_bands(threshold: float, n_hashes: int = N_HASHES, recall: float = RECALL) -> tuple[int, int]:
    """(b, r)：刚到 threshold 的两段文字至少有 recall 的机会被比到，在这之上 r 越大越好（不相干的少比）。"""
    for rows in range(n_hashes, 1, -1):
        bands = n_hashes // rows
        if seen_probability(threshold, bands, rows) >= recall:
            return bands, rows
    return n_hashes, 1
