"""BM25，手写（Lucene 的写法），可以随时添、改、删。

    score(q, d) = Σ_{t ∈ q} idf(t) · tf / (tf + k1 · (1 − b + b · |d| / 平均长))
    idf(t)      = ln(1 + (N − df + ½) / (df + ½))

N 段文字里有 df 段有词 t；tf 是 t 在这一段里出现几次。tf 越大分越高，但有上限：第十次出现几乎不再加分；
长的段出现得多不稀奇，所以除以长度。问题里重复的词算几次。

索引照 Lucene 的办法分成几节（Segment）：一节建好就不再改，每个词有一列"哪些段、各几次"（倒排表）。
- 添：新来的自成一节。节数多了，把小的几节并成一节。
- 删：记下哪些段不在了（alive），不动倒排表。不在的多了，并的时候扔掉。
- 查：N、平均长、df 都按现在还在的段数，所以与重新建一个索引的分数完全相同，只是不必重建。
倒排表里只存 tf，不存分数：添了删了，N、df、平均长就变了，存下的分数全是旧的。代价是查的时候多一次除法。
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from nlp_common.base.errors import UserError
from rag_common.tokenizers import Tokenizer, characters_and_bigrams

K1, B = 1.5, 0.75
BLOCK = 65_536  # 一次添得多时，每这么多段建一节，排序用的内存有限
SMALL = 8  # 不止这么多节，就把小的并起来
DENSE = 0.2  # 过两成的段里都有的词，加分写成一整行
KNOWN = 20_000  # 最多记住多少个词的加分
GONE = 0.5  # 一节里过半不在了，就重写它


class Segment:
    """不再改的一节：words 是词的编号（由小到大），第 i 个词的倒排表是 docs、counts 的 offsets[i] 到 offsets[i + 1]。

    docs 里是段在这一节里的序号。alive 之外都不变。
    """

    def __init__(
        self,
        words: np.ndarray,
        offsets: np.ndarray,
        docs: np.ndarray,
        counts: np.ndarray,
        lengths: np.ndarray,
    ):
        self.words, self.offsets = words, offsets  # (W,)，(W + 1,)
        self.docs, self.counts = docs, counts  # (P,) 与 (P,)
        self.lengths = lengths  # (D,) 每段几个词
        self.alive = np.ones(len(lengths), dtype=bool)  # (D,)
        self.all_alive = True

    def postings(self, words: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
        """每个词在这一节里：还在的哪些段、各几次。"""
        if not len(self.words):  # 每一段都是空的
            return [(self.docs, self.counts)] * len(words)
        found = []
        places = np.minimum(self.words.searchsorted(words), len(self.words) - 1)
        for word, place in zip(words, places.tolist(), strict=True):
            here = self.words[place] == word
            start, end = self.offsets[place], self.offsets[place + 1 if here else place]
            docs, counts = self.docs[start:end], self.counts[start:end]
            if not self.all_alive:
                alive = self.alive[docs]
                docs, counts = docs[alive], counts[alive]
            found.append((docs, counts))
        return found


def make_segment(rows: np.ndarray, words: np.ndarray, counts: np.ndarray, lengths: np.ndarray) -> Segment:
    """(段, 词, 几次) 的一堆三元组 → 一节。同一段同一个词可以有几条，次数加在一起。"""
    keys = words.astype(np.int64) * len(lengths) + rows  # 先按词排，再按段排
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    first = np.ones(len(keys), dtype=bool)
    first[1:] = keys[1:] != keys[:-1]
    starts = np.flatnonzero(first)
    totals = np.add.reduceat(counts[order], starts) if len(starts) else counts[:0]
    words, docs = np.divmod(keys[starts], max(len(lengths), 1))
    names, offsets = np.unique(words, return_index=True)
    offsets = np.append(offsets, len(words))
    return Segment(names, offsets, docs.astype(np.int32), totals.astype(np.float32), lengths)


class BM25:
    """``index.add(ids, texts)``，``index.delete(ids)``，``index.search(问题, k)`` → [(id, 分), …]。"""

    def __init__(self, tokenizer: Tokenizer = characters_and_bigrams, k1: float = K1, b: float = B):
        if k1 < 0 or not 0 <= b <= 1:
            raise UserError(f"BM25 的 k1 不能小于 0，b 要在 0 到 1 之间，给的是 k1={k1}、b={b}。")
        self.tokenizer, self.k1, self.b = tokenizer, k1, b
        self.vocabulary: dict[str, int] = {}
        self.segments: list[Segment] = []
        self.names: list[list[str]] = []  # 每节里每段的 id
        self.places: dict[str, tuple[Segment, int]] = {}  # id → 在哪一节、第几段
        self._changed()

    def __len__(self) -> int:
        return len(self.places)

    def __contains__(self, name: str) -> bool:
        return name in self.places

    # ------------------------------------------------------------ 查

    def search(self, query: str, k: int, allowed: Iterable[str] | None = None) -> list[tuple[str, float]]:
        """分最高的 k 段 [(id, 分), …]，分高的在前；一个词也没有对上的不要。allowed：只在这些 id 里找。"""
        scores = self.scores(query)  # (D,)
        if allowed is not None:
            scores = np.where(self.mask(allowed), scores, np.float32(0))
        best = top(scores, k)
        pairs = zip(best.tolist(), scores[best].tolist(), strict=True)
        return [(self._name_of[place], score) for place, score in pairs if score > 0]

    def scores(self, query: str) -> np.ndarray:
        """每段的分 (D,)，次序是添进来的次序（不在了的是 0）。"""
        scores = np.zeros(self._size, dtype=np.float32)
        words = self._query_words(query)
        self._remember([word for word in words if word not in self._known])
        for word, times in words.items():
            docs, impact = self._known[word]
            impact = impact if times == 1 else np.float32(times) * impact
            if docs is None:
                scores += impact
            else:
                np.add.at(scores, docs, impact)
        return scores

    def mask(self, names: Iterable[str]) -> np.ndarray:
        """这些 id 在 scores 里的位置是 True (D,)；不认识的 id 不管。"""
        chosen = np.zeros(self._size, dtype=bool)
        for name in names:
            if name in self.places:
                segment, row = self.places[name]
                chosen[self._starts[self.segments.index(segment)] + row] = True
        return chosen

    def _query_words(self, query: str) -> dict[int, int]:
        words: dict[int, int] = {}
        for token in self.tokenizer(query):
            word = self.vocabulary.get(token)
            if word is not None:
                words[word] = words.get(word, 0) + 1
        return words

    def _remember(self, words: list[int]) -> None:
        """算出一个词给哪些段加分、各加多少，记住：idf · tf / (tf + 长度的那一项)。索引变了就全部作废。

        到处都有的字（的、是、国）写成整行 (D,)，哪些段是 None：整行相加比挑着加快几倍。
        """
        if len(self._known) > KNOWN:
            self._known.clear()
        if not words or not self.segments:
            self._known.update((word, (np.zeros(0, np.int64), np.zeros(0, np.float32))) for word in words)
            return
        columns = [segment.postings(words) for segment in self.segments]
        parts = []  # 一个词接一个词，每个词里一节接一节
        sizes = np.zeros(len(words), dtype=np.int64)  # 每个词的 df
        for number in range(len(words)):
            for column, start in zip(columns, self._starts, strict=True):
                docs, counts = column[number]
                parts.append((docs + start if start else docs, counts))
                sizes[number] += len(docs)
        docs = np.concatenate([docs for docs, _ in parts]).astype(np.int64)
        counts = np.concatenate([counts for _, counts in parts])
        idf = np.log(1 + (len(self.places) - sizes + 0.5) / (sizes + 0.5)).astype(np.float32)
        impacts = counts / (counts + self._norm[docs]) * np.repeat(idf, sizes)
        end = 0
        for word, df in zip(words, sizes.tolist(), strict=True):
            start, end = end, end + df
            if df > self._size * DENSE:
                row = np.zeros(self._size, dtype=np.float32)
                row[docs[start:end]] = impacts[start:end]
                self._known[word] = (None, row)
            else:
                self._known[word] = (docs[start:end].copy(), impacts[start:end].copy())

    # ------------------------------------------------------------ 添、改、删

    def add(self, ids: Sequence[str], texts: Sequence[str]) -> None:
        """添几段；id 已经有了的是改：旧的删掉，新的添上。一次给的 id 里有重复的是 UserError。"""
        if len(ids) != len(texts):
            raise UserError(f"BM25：{len(ids)} 个 id，{len(texts)} 段文字，要一样多。")
        if len(set(ids)) < len(ids):
            twice = next(name for name in ids if list(ids).count(name) > 1)
            raise UserError(f"BM25：一次添进来的 id 里有重复的：{twice!r}。")
        self._mark_gone([name for name in ids if name in self.places])
        for start in range(0, len(ids), BLOCK):
            names = list(ids[start : start + BLOCK])
            self._append(self._build(texts[start : start + BLOCK]), names)
        self._merge()
        self._changed()

    def delete(self, ids: Iterable[str]) -> int:
        """删去几段，返回删了几段；没有的 id 不管。"""
        gone = [name for name in dict.fromkeys(ids) if name in self.places]
        self._mark_gone(gone)
        self._merge()
        self._changed()
        return len(gone)

    def _build(self, texts: Sequence[str]) -> Segment:
        words: list[int] = []
        lengths = np.zeros(len(texts), dtype=np.float32)
        vocabulary = self.vocabulary
        for row, text in enumerate(texts):
            tokens = self.tokenizer(text)
            lengths[row] = len(tokens)
            for token in tokens:
                words.append(vocabulary.setdefault(token, len(vocabulary)))
        rows = np.repeat(np.arange(len(texts)), lengths.astype(np.int64))
        return make_segment(
            rows, np.array(words, dtype=np.int64), np.ones(len(words), dtype=np.float32), lengths
        )

    def _append(self, segment: Segment, names: list[str]) -> None:
        if not names:
            return
        self.segments.append(segment)
        self.names.append(names)
        for row, name in enumerate(names):
            self.places[name] = (segment, row)

    def _mark_gone(self, ids: Iterable[str]) -> None:
        for name in ids:
            segment, row = self.places.pop(name)
            segment.alive[row] = False
            segment.all_alive = False

    def _merge(self) -> None:
        """过半不在了的重写；节数多了，把最小的几节并成一节。每段被并的次数是 log 级的，所以添得再零碎也不慢。"""
        chosen = [n for n, s in enumerate(self.segments) if s.alive.mean() < GONE or not len(s.lengths)]
        if len(self.segments) - len(chosen) > SMALL:
            by_size = sorted(range(len(self.segments)), key=lambda n: len(self.segments[n].lengths))
            chosen = sorted({*chosen, *by_size[: SMALL // 2 + 1]})
        if not chosen:
            return
        merged, names = _join([self.segments[n] for n in chosen], [self.names[n] for n in chosen])
        self.segments = [s for n, s in enumerate(self.segments) if n not in chosen]
        self.names = [each for n, each in enumerate(self.names) if n not in chosen]
        if names:
            self._append(merged, names)

    def _changed(self) -> None:
        """索引变了：重新算平均长，记住的列作废。"""
        sizes = [len(segment.lengths) for segment in self.segments]
        starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self._size = int(starts[-1])
        self._starts = starts[:-1].tolist()  # 每节的第一段在 scores 里的位置
        self._name_of = [name for names in self.names for name in names]
        lengths = np.concatenate([s.lengths for s in self.segments] or [np.zeros(0, dtype=np.float32)])
        alive = np.concatenate([s.alive for s in self.segments] or [np.zeros(0, dtype=bool)])
        average = lengths[alive].mean(dtype=np.float64) if alive.any() else 1.0
        average = average or 1.0  # 全是空的段
        self._norm = (self.k1 * (1 - self.b + self.b * lengths / average)).astype(np.float32)  # (D,)
        self._known: dict[int, tuple[np.ndarray | None, np.ndarray]] = {}

    # ------------------------------------------------------------ 存、读

    def save(self, folder: str | Path) -> None:
        """存成一个文件夹（npz 与 json，没有 pickle）。先写临时文件再改名，写到一半断了不留半个。"""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        merged, names = _join(self.segments, self.names)
        arrays = {name: getattr(merged, name) for name in ("words", "offsets", "docs", "counts", "lengths")}
        facts = {"names": names, "vocabulary": list(self.vocabulary), "tokenizer": _name_of(self.tokenizer)}
        text = json.dumps(facts | {"k1": self.k1, "b": self.b}, ensure_ascii=False)
        arrays["facts"] = np.frombuffer(
            text.encode(), dtype=np.uint8
        )  # 放在一个文件里：要么全是新的，要么全是旧的
        temporary = folder / ".bm25.tmp.npz"
        with temporary.open("wb") as file:
            np.savez(file, **arrays)
        temporary.replace(folder / "bm25.npz")

    @classmethod
    def load(cls, folder: str | Path, tokenizer: Tokenizer = characters_and_bigrams) -> BM25:
        """读回 save 存的；坏了、分词器不同是 UserError。"""
        path = Path(folder) / "bm25.npz"
        try:
            with np.load(path, allow_pickle=False) as arrays:
                facts = json.loads(arrays["facts"].tobytes())
                segment = Segment(
                    *(arrays[name] for name in ("words", "offsets", "docs", "counts", "lengths"))
                )
        except FileNotFoundError:
            raise UserError(f"没有 BM25 的索引 {path}。") from None
        except Exception as error:  # zip、npy、json 各有各的异常
            raise UserError(
                f"BM25 的索引 {path} 坏了（{error.__class__.__name__}）：删掉它，重新建。"
            ) from error
        if facts["tokenizer"] != _name_of(tokenizer):
            raise UserError(
                f"{path} 是用分词器 {facts['tokenizer']} 建的，现在用的是 {_name_of(tokenizer)}：换回去，或重新建。"
            )
        index = cls(tokenizer, facts["k1"], facts["b"])
        index.vocabulary = {token: number for number, token in enumerate(facts["vocabulary"])}
        if facts["names"]:
            index._append(segment, facts["names"])
        index._changed()
        return index


def _name_of(tokenizer: Tokenizer) -> str:
    return getattr(tokenizer, "__name__", type(tokenizer).__name__)


def _join(segments: list[Segment], names: list[list[str]]) -> tuple[Segment, list[str]]:
    """几节并成一节，不在了的段扔掉。"""
    rows, words, counts, kept = [], [], [], []
    start = 0
    for segment, each in zip(segments, names, strict=True):
        new = np.cumsum(segment.alive) - 1 + start  # 旧的序号 → 并后的序号
        here = segment.alive[segment.docs]
        rows.append(new[segment.docs[here]])
        words.append(np.repeat(segment.words, np.diff(segment.offsets))[here])
        counts.append(segment.counts[here])
        kept += [name for name, alive in zip(each, segment.alive, strict=True) if alive]
        start = len(kept)
    lengths = [segment.lengths[segment.alive] for segment in segments]
    empty_int, empty = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32)
    merged = make_segment(
        np.concatenate([empty_int, *rows]),
        np.concatenate([empty_int, *words]),
        np.concatenate([empty, *counts]),
        np.concatenate([empty, *lengths]),
    )
    return merged, kept


def top(scores: np.ndarray, k: int) -> np.ndarray:
    """分最高的 k 个的位置，分高的在前；同分的，位置靠前的在前。"""
    k = min(k, len(scores))
    if k <= 0:
        return np.zeros(0, dtype=np.int64)
    if k < len(scores):
        border = np.partition(scores, len(scores) - k)[len(scores) - k]  # 第 k 高的分
        above = np.flatnonzero(scores > border)
        equal = np.flatnonzero(scores == border)[: k - len(above)]
        best = np.concatenate([above, equal])
    else:
        best = np.arange(len(scores))
    return best[np.lexsort((best, -scores[best]))]
