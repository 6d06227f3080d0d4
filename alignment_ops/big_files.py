"""放不进内存的文件怎样去重：同样的 MinHash + LSH，分三步在磁盘上做，内存的用量不随文件变大。

    for each in find_in_files(["很大.jsonl"], scratch="/有地方的/文件夹"): …      # Duplicate(丢第几行, 留第几行, 相似度)

1. 一块块地读（map）：算出每行的键，键的头几位说它放进哪一个文件；文字与 K 个最小数也存下来，后面要比。
2. 一个文件一个文件地看（reduce）：键相同的排在一起，就是要比的几行；写成（后面的行，前面的行）。
3. 按行的次序（resolve）：与前面留下的比，够像就丢掉。与 minhash.find_duplicates 是同一条规矩，结果相同。

内存：一块的文字、memory_mb 那么多的键、每行一个字节。磁盘：文字的一份，每行再加约 0.8 KB，做完就删。
一台机器不够：ray_duplicates.py 用这里同样的函数，每步分给许多台。
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np

from minhash import (
    Duplicate,
    Scheme,
    band_keys,
    make_scheme,
    most_similar,
    normalize,
    signatures,
    worth_comparing,
)
from nlp_common.base.errors import UserError
from nlp_common.data.files import READERS, read_file

BLOCK_ROWS, BLOCK_CHARACTERS = 8192, 1 << 20  # 一块多少行、多少个字
PARTS = 64  # 键分进几个文件：看头六位
MOST, MOST_PAIRS = 100, 1 << 18  # 一个键下面很多行的：每行只与最前面这么多行比；攒到这么多对就写下来
ROWS_BITS = 20  # 一百万行的对放进一个文件
KEY = np.dtype([("key", "<u8"), ("row", "<u8")])
PAIR = np.dtype([("row", "<u8"), ("other", "<u8"), ("same", "u1")])  # same：一字不差
ANSWER = np.dtype([("kept", "<u8"), ("similarity", "<f8")])  # kept 从 1 数，0 是没有丢
SORTING = 4  # 排序要几份内存


def find_in_files(
    paths: Iterable[str | Path],
    threshold: float = 0.8,
    scratch: str | Path | None = None,
    memory_mb: int = 256,
    text_of: Callable[[dict], str] | None = None,
    scheme: Scheme | None = None,
) -> Iterator[Duplicate]:
    """几个文件（或文件夹）里的行依次编号，给出重复的行，按行的次序。

    scratch：中间的文件放在哪里，默认是系统的临时文件夹；text_of：一行里拿来比的文字，默认是全部的文字。
    整个是一个列表的 json 与 txt，要先整个读进内存：大的请存成 jsonl。
    """
    scheme, memory = scheme or make_scheme(threshold), memory_mb << 20
    try:
        with tempfile.TemporaryDirectory(prefix="duplicates-", dir=scratch) as folder:
            n_rows = write_keys(read_texts(paths, text_of or row_text), Path(folder), scheme)
            write_pairs(Path(folder), n_rows, memory)
            resolve(Path(folder), n_rows, memory, scheme)
            for start, answers in chunks(Path(folder) / "answers", ANSWER):
                for place in np.flatnonzero(answers["kept"]):
                    kept, similarity = answers[place].item()
                    yield Duplicate(start + int(place), kept - 1, similarity)
    except OSError as error:
        where = scratch or tempfile.gettempdir()
        raise UserError(
            f"去重的中间文件写不进 {where}：{error.strerror or error}。换一个有地方的文件夹（约要文字的两三倍）。"
        ) from error


# ---------------------------------------------------------------- 0. 文件 → 一段段文字


def data_files(paths: Iterable[str | Path]) -> list[Path]:
    """文件照给的次序；文件夹里的按名字。"""
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"没有 {path} 这个文件。")
        inside = sorted(
            each
            for each in path.rglob("*")
            if each.suffix.lower() in READERS and not each.name.startswith(".")
        )
        if path.is_dir() and not inside:
            raise UserError(f"文件夹 {path} 里没有能读的数据（{'、'.join(READERS)}）。")
        files += inside if path.is_dir() else [path]
    return files


def read_texts(paths: Iterable[str | Path], text_of: Callable[[dict], str]) -> Iterator[str]:
    for file in data_files(paths):
        for row in read_file(file):
            yield text_of(row)


def row_text(row: object) -> str:
    """一行里全部的文字；"user"、"assistant" 这些角色名不算，每行都有的字会让短的行看上去都像。"""
    if isinstance(row, str):
        return row
    if isinstance(row, dict):
        row = [value for name, value in row.items() if name not in ("role", "from")]
    return "\n".join(filter(None, map(row_text, row))) if isinstance(row, list) else ""


# ---------------------------------------------------------------- 1. map：一行 → 几个键


def write_keys(texts: Iterable[str], folder: Path, scheme: Scheme) -> int:
    """每块：一字不差的只留第一行去算键，别的直接写成一对。返回一共几行。"""
    n_rows = 0
    with open_spool(folder, scheme) as spool:
        for block in blocks(texts):
            clean = [normalize(text) for text in block]
            rows = np.arange(n_rows, n_rows + len(block), dtype=np.uint64)
            values = signatures(clean, scheme)
            spool.append(clean, values)
            digests = np.array([digest(text) for text in clean], np.uint64)
            later, first = repeated(digests, rows)
            append_pairs(folder, later, first, same=True)
            once = ~np.isin(rows, later)
            append_keys(folder, "same", digests[once], rows[once])
            keys = band_keys(values[once], scheme.bands, scheme.rows)  # (N, b)
            append_keys(folder, "near", keys.ravel(), np.repeat(rows[once], scheme.bands))
            n_rows += len(block)
    return n_rows


def blocks(texts: Iterable[str]) -> Iterator[list[str]]:
    block, size = [], 0
    for text in texts:
        block.append(text)
        size += len(text)
        if len(block) == BLOCK_ROWS or size > BLOCK_CHARACTERS:
            yield block
            block, size = [], 0
    if block:
        yield block


def digest(clean: str) -> int:
    """64 位的指纹：一亿行里碰巧相同的机会不到千分之一，而且丢掉之前还要再比一次文字。"""
    return int.from_bytes(hashlib.blake2b(clean.encode("utf-8", "surrogatepass"), digest_size=8).digest())


# ---------------------------------------------------------------- 2. reduce：同一个键下面的行 → 一对对


def write_pairs(folder: Path, n_rows: int, memory: int) -> None:
    twin = np.zeros(n_rows, bool)  # 与前面的一字不差：不用再找近的
    for part in range(PARTS):
        for records in pieces(folder / f"same-{part}", KEY, "key", memory):
            later, first = repeated(records["key"], records["row"])
            twin[later] = True
            append_pairs(folder, later, first, same=True)
    for part in range(PARTS):
        for records in pieces(folder / f"near-{part}", KEY, "key", memory):
            records = records[~twin[records["row"]]]
            for later, earlier in bucket_pairs(records["key"], records["row"]):
                append_pairs(folder, later, earlier, same=False)


def repeated(keys: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """键相同的行，除了第一行：(这些行, 各自的第一行)。rows 是从小到大的。"""
    _, first, which = np.unique(keys, return_index=True, return_inverse=True)
    later = np.flatnonzero(first[which] != np.arange(len(keys)))
    return rows[later], rows[first[which[later]]]


def bucket_pairs(keys: np.ndarray, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """键相同的行两两配成一对：(后面的行, 前面的行)；一个键下面很多行的，只与最前面的 MOST 行配。"""
    order = np.lexsort((rows, keys))
    keys, rows = keys[order], rows[order]
    borders = np.concatenate([[0], np.flatnonzero(np.diff(keys)) + 1, [len(keys)]])
    later, earlier, size = [], [], 0
    for bucket in np.flatnonzero(np.diff(borders) > 1).tolist():
        start, stop = borders[bucket : bucket + 2].tolist()
        for place in range(start + 1, stop):
            others = rows[start : min(place, start + MOST)]
            earlier.append(others)
            later.append(np.full(len(others), rows[place]))
            size += len(others)
            if size > MOST_PAIRS:
                yield np.concatenate(later), np.concatenate(earlier)
                later, earlier, size = [], [], 0
    if size:
        yield np.concatenate(later), np.concatenate(earlier)


# ---------------------------------------------------------------- 3. resolve：按行的次序，与留下的比


def resolve(folder: Path, n_rows: int, memory: int, scheme: Scheme) -> None:
    """answers：每行一条，留下的是零，丢掉的写着留下的是哪一行。"""
    with open_spool(folder, scheme) as spool, (folder / "answers").open("w+b") as file:
        file.truncate(n_rows * ANSWER.itemsize)
        for part in range((n_rows >> ROWS_BITS) + 1):
            for pairs in pieces(folder / f"pairs-{part}", PAIR, "row", memory):
                pairs = np.unique(pairs)  # 按行、再按前面的行排好
                borders = [0, *(np.flatnonzero(np.diff(pairs["row"])) + 1).tolist(), len(pairs)]
                for start, stop in pairwise(borders):
                    write_answer(int(pairs["row"][start]), pairs[start:stop], spool, file, scheme)


def write_answer(row: int, group: np.ndarray, spool: Spool, file: BinaryIO, scheme: Scheme) -> None:
    for other in group["other"][group["same"] == 1].tolist():
        if spool.text(row) == spool.text(other):
            kept, similarity = answer_of(other, file)
            put_answer(row, (kept, similarity) if kept else (other + 1, 1.0), file)
            return
    others = [other for other in group["other"].tolist() if not answer_of(other, file)[0]]
    values = np.array([spool.values(other) for other in others])
    others = worth_comparing(spool.values(row), others, values, scheme) if others else []
    texts = {other: spool.text(other) for other in others}
    kept, similarity = most_similar(spool.text(row), texts, scheme.n)
    if similarity >= scheme.threshold:
        put_answer(row, (kept + 1, similarity), file)


def answer_of(row: int, file: BinaryIO) -> tuple[int, float]:
    file.seek(row * ANSWER.itemsize)
    return np.frombuffer(file.read(ANSWER.itemsize), ANSWER)[0].item()


def put_answer(row: int, answer: tuple[int, float], file: BinaryIO) -> None:
    file.seek(row * ANSWER.itemsize)
    file.write(np.array(answer, ANSWER).tobytes())


# ---------------------------------------------------------------- 磁盘上的几个文件


@dataclass
class Spool:
    """每行的文字与 K 个最小数，存在磁盘上，按行号取。"""

    texts: BinaryIO
    ends: BinaryIO  # 每行的文字到第几个字节为止
    numbers: BinaryIO
    width: int  # 一行的 K 个最小数多少字节

    def append(self, clean: list[str], values: np.ndarray) -> None:
        for text in clean:
            self.texts.write(text.encode("utf-8", "surrogatepass"))
            self.ends.write(self.texts.tell().to_bytes(8, "little"))
        self.numbers.write(values.tobytes())

    def text(self, row: int) -> str:
        self.ends.seek(8 * max(row - 1, 0))
        borders = np.frombuffer(self.ends.read(16 if row else 8), "<u8").tolist()
        start, stop = borders if row else (0, *borders)
        self.texts.seek(start)
        return self.texts.read(stop - start).decode("utf-8", "surrogatepass")

    def values(self, row: int) -> np.ndarray:
        self.numbers.seek(row * self.width)
        return np.frombuffer(self.numbers.read(self.width), "<u4")


@contextlib.contextmanager
def open_spool(folder: Path, scheme: Scheme) -> Iterator[Spool]:
    names = [folder / name for name in ("texts", "ends", "values")]
    with names[0].open("a+b") as texts, names[1].open("a+b") as ends, names[2].open("a+b") as numbers:
        yield Spool(texts, ends, numbers, 4 * len(scheme.offsets))


def append_keys(folder: Path, kind: str, keys: np.ndarray, rows: np.ndarray) -> None:
    records = np.empty(len(keys), KEY)
    records["key"], records["row"] = keys, rows
    append_parts(folder, kind, records, keys >> np.uint64(58))


def append_pairs(folder: Path, later: np.ndarray, earlier: np.ndarray, same: bool) -> None:
    """按后面的那一行在哪一段分进几个文件：第 0 个文件里的行都在第 1 个的前面。"""
    records = np.empty(len(later), PAIR)
    records["row"], records["other"], records["same"] = later, earlier, same
    append_parts(folder, "pairs", records, later >> np.uint64(ROWS_BITS))


def append_parts(folder: Path, kind: str, records: np.ndarray, parts: np.ndarray) -> None:
    for part in np.unique(parts).tolist():
        with (folder / f"{kind}-{part}").open("ab") as file:
            records[parts == part].tofile(file)


def chunks(path: Path, dtype: np.dtype, size: int = 1 << 16) -> Iterator[tuple[int, np.ndarray]]:
    """从头到尾，一次几万条：(第几条开始, 这些条)。"""
    start = 0
    with path.open("rb") as file:
        while len(records := np.fromfile(file, dtype, size)):
            yield start, records
            start += len(records)


def pieces(path: Path, dtype: np.dtype, column: str, memory: int) -> Iterator[np.ndarray]:
    """一个文件里的记录，按 column 从小到大分成几份给出，每份排得下 memory 字节；一份里的次序是文件里的次序。"""
    if not path.exists():
        return
    n_pieces = -(-path.stat().st_size * SORTING // memory)
    if n_pieces == 1:
        yield np.fromfile(path, dtype)
        return
    low = min(int(records[column].min()) for _, records in chunks(path, dtype))
    high = max(int(records[column].max()) for _, records in chunks(path, dtype)) + 1
    edges = [low + (high - low) * number // n_pieces for number in range(n_pieces + 1)]
    for start, stop in pairwise(edges):
        found = [r[(r[column] >= start) & (r[column] <= stop - 1)] for _, r in chunks(path, dtype)]
        yield np.concatenate(found)
