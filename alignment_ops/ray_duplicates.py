"""一台机器放不下的数据怎样去重：Ray Data 把 big_files.py 的三步分给许多进程、许多台机器，函数是同样的，结果也相同。

    find_with_ray(["a.jsonl", "b.jsonl"], threshold=0.8) -> [Duplicate(dropped, kept, similarity), …]

1. map：文件按字节切成一段段，每段一个任务：每行算出指纹与键。
2. shuffle 与 reduce：按键的头几位送到一处（groupby），键相同的配成对（map_groups）。
3. 比：一对对按后面的那一行送到一处，照位置从文件里读回两行文字，算真的 Jaccard。
4. resolve：只有够像的对回到主进程，按行的次序定下留哪行、丢哪行。

要 pip install "ray[data]"。没有集群就在本机开几个进程；有集群，先设好环境变量 RAY_ADDRESS，
每台机器上同样的位置要有这个项目的代码与数据（共享文件夹）。只读 jsonl：一行一个对象，才能从中间切开。
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path

import numpy as np

from big_files import bucket_pairs, data_files, digest, repeated, row_text
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
from nlp_common.data.files import read_file

HERE = Path(__file__).resolve().parent
BLOCK_BYTES, PART_BYTES = 8 << 20, 128 << 20  # 一个任务读多少字节；多少字节的文字，键送到一处
OFFSET_BITS = 44  # 一行的位置：第几个文件 << 44 | 从第几个字节开始
Table = dict[str, np.ndarray]  # Ray Data 的一批：栏名 → 一列


def find_with_ray(
    paths: list[str | Path], threshold: float = 0.8, block_bytes: int = BLOCK_BYTES
) -> list[Duplicate]:
    files = [str(path.resolve()) for path in data_files(paths)]
    if others := [path for path in files if not path.endswith(".jsonl")]:
        raise UserError(f"Ray 这条路只读 jsonl，{others[0]} 不是：先存成 jsonl，或者用 --engine stream。")
    scheme, n_parts = make_scheme(threshold), 4 + sum(map(os.path.getsize, files)) // PART_BYTES
    with running_ray(files) as ray:
        blocks = number_lines(ray, files, block_bytes)
        texts = ray.data.from_items(blocks).map_batches(
            partial(keys_of_block, scheme=scheme, files=files), batch_size=1, batch_format="numpy"
        )
        texts = texts.materialize()  # 每行：digest、keys (b,)、row、place
        digests = texts.map_batches(partial(by_digest, n_parts=n_parts), batch_format="numpy")
        twins = grouped(digests, repeated_in_group, n_parts)
        same = dict(zip(twins["row"].tolist(), twins["other"].tolist(), strict=True))
        near = partial(by_key, twins=np.array(sorted(same), np.uint64), n_parts=n_parts)
        keyed = texts.map_batches(near, batch_format="numpy").groupby("part", num_partitions=n_parts)
        pairs = keyed.map_groups(partial(pairs_in_group, n_parts=n_parts), batch_format="numpy")
        compare = partial(compare_group, scheme=scheme, files=files)
        edges = grouped(pairs, compare, n_parts)
    return resolve(same, edges)


def grouped(dataset, work, n_parts: int) -> Table:
    """按 part 一栏送到一处，每处做 work，结果全部取回来。"""
    found = dataset.groupby("part", num_partitions=n_parts).map_groups(work, batch_format="numpy").take_all()
    names = ("row", "other", "similarity")
    return {name: np.array([each.get(name, 1.0) for each in found]) for name in names}


def resolve(same: dict[int, int], edges: Table) -> list[Duplicate]:
    """same：一字不差的行 → 第一行；edges：够像的对。按行的次序，只与留下的比（同 minhash.find_duplicates）。"""
    near: dict[int, list[tuple[float, int]]] = {}
    for row, other, similarity in zip(*edges.values(), strict=True):
        near.setdefault(int(row), []).append((-float(similarity), int(other)))
    dropped: dict[int, Duplicate] = {}
    for row in sorted({*same, *near}):
        if row in same:
            first = dropped.get(same[row], Duplicate(row, same[row], 1.0))
            dropped[row] = first._replace(dropped=row)
            continue
        kept = [pair for pair in near[row] if pair[1] not in dropped]
        if kept:  # 最像的；一样像的取最前面的
            similarity, other = min(kept)
            dropped[row] = Duplicate(row, other, -similarity)
    return list(dropped.values())


# ---------------------------------------------------------------- 1. 文件 → 每行的键


def number_lines(ray, files: list[str], block_bytes: int) -> list[dict]:
    """文件切成段：``{"file", "start", "stop", "first"}``，first 是段里第一行的编号。"""
    blocks = []
    for number, path in enumerate(files):
        size = Path(path).stat().st_size
        for start in range(0, size, block_bytes):
            blocks.append({"file": number, "start": start, "stop": min(start + block_bytes, size)})
    if not blocks:
        raise UserError(f"{'、'.join(files)} 是空的。")
    counted = ray.data.from_items(blocks).map(partial(count_rows, files=files)).take_all()
    counted.sort(key=lambda block: (block["file"], block["start"]))
    firsts = accumulate((block["rows"] for block in counted), initial=0)
    return [block | {"first": first} for block, first in zip(counted, firsts, strict=False)]


def lines_of_block(path: str, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
    """从这一段里开始的行（最后一行可以伸到段外）：(从第几个字节开始, 一行)，空行不算。"""
    with open(path, "rb") as file:
        if start:
            file.seek(start - 1)
            file.readline()  # 前一段的最后一行
        while (at := file.tell()) < stop and (line := file.readline()):
            if line.strip():
                yield at, line


def count_rows(block: dict, files: list[str]) -> dict:
    lines = lines_of_block(files[block["file"]], block["start"], block["stop"])
    return block | {"rows": sum(1 for _ in lines)}


def text_at(path: str, at: int, line: bytes) -> str:
    try:
        return normalize(row_text(json.loads(line.decode("utf-8-sig" if at == 0 else "utf-8"))))
    except ValueError as error:
        raise UserError(f"{path} 从第 {at} 个字节起的一行不是正确的 JSON：{error}。") from None


def keys_of_block(batch: Table, scheme: Scheme, files: list[str]) -> Table:
    block = {name: int(column[0]) for name, column in batch.items()}
    path = files[block["file"]]
    places, clean = [], []
    for at, line in lines_of_block(path, block["start"], block["stop"]):
        places.append(block["file"] << OFFSET_BITS | at)
        clean.append(text_at(path, at, line))
    rows = np.arange(block["first"], block["first"] + len(clean), dtype=np.uint64)
    return {
        "row": rows,
        "place": np.array(places, np.uint64),
        "digest": np.array([digest(text) for text in clean], np.uint64),
        "keys": band_keys(signatures(clean, scheme), scheme.bands, scheme.rows),  # (N, b)
    }


# ---------------------------------------------------------------- 2. 键相同的送到一处，配成对


def by_digest(batch: Table, n_parts: int) -> Table:
    return {"part": part_of(batch["digest"], n_parts), "key": batch["digest"], "row": batch["row"]}


def by_key(batch: Table, twins: np.ndarray, n_parts: int) -> Table:
    """一行变成 b 行，每个键一行；与前面一字不差的不要。"""
    once = ~np.isin(batch["row"], twins)
    keys = np.stack(list(batch["keys"]))[once]  # (N, b)
    columns = {name: np.repeat(batch[name][once], keys.shape[1]) for name in ("row", "place")}
    return columns | {"part": part_of(keys.ravel(), n_parts), "key": keys.ravel()}


def part_of(keys: np.ndarray, n_parts: int) -> np.ndarray:
    return (keys % np.uint64(n_parts)).astype(np.int64)


def repeated_in_group(group: Table) -> Table:
    order = np.argsort(group["row"])
    later, first = repeated(group["key"][order], group["row"][order])
    return {"row": later, "other": first}


def pairs_in_group(group: Table, n_parts: int) -> Table:
    """键相同的两两配成一对；part 换成后面那一行的：同一行的对要送到一处。"""
    order = np.argsort(group["row"])
    rows, places = group["row"][order], group["place"][order]
    found = list(bucket_pairs(group["key"][order], np.arange(len(rows))))
    later, earlier = (np.concatenate([np.empty(0, int), *(each[side] for each in found)]) for side in (0, 1))
    return {
        "part": part_of(rows[later], n_parts),
        "row": rows[later],
        "other": rows[earlier],
        "place": places[later],
        "other_place": places[earlier],
    }


# ---------------------------------------------------------------- 3. 读回文字，细比


def compare_group(group: Table, scheme: Scheme, files: list[str]) -> Table:
    pairs = np.unique(np.stack([group[name] for name in ("row", "other", "place", "other_place")], 1), axis=0)
    texts: dict[int, str] = {}
    for place in np.unique(pairs[:, 2:]).tolist():
        path, at = files[place >> OFFSET_BITS], place & ((1 << OFFSET_BITS) - 1)
        with open(path, "rb") as file:
            file.seek(at)
            texts[place] = text_at(path, at, file.readline())
    values = dict(zip(texts, signatures(list(texts.values()), scheme), strict=True))
    found = []
    for row, other, place, other_place in pairs.tolist():
        if worth_comparing(values[place], [other], values[other_place][None], scheme):
            similarity = most_similar(texts[place], {other: texts[other_place]}, scheme.n)[1]
            if similarity >= scheme.threshold:
                found.append((row, other, similarity))
    rows, others, similarities = zip(*found, strict=True) if found else ((), (), ())
    return {
        "row": np.array(rows, np.uint64),
        "other": np.array(others, np.uint64),
        "similarity": np.array(similarities, float),
    }


# ---------------------------------------------------------------- 开、关 Ray


@contextlib.contextmanager
def running_ray(files: list[str]) -> Iterator:
    """已经开着就用它，否则开一个，用完关掉；不向外报告使用情况。"""
    if find_spec("ray") is None:
        raise UserError('没有安装 Ray：pip install "ray[data]"，或者用 --engine stream。')
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    ray.data.DataContext.get_current().enable_progress_bars = False
    ours = not ray.is_initialized()
    if ours:
        code = {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])}
        local = {} if os.environ.get("RAY_ADDRESS") else {"include_dashboard": False}
        ray.init(log_to_driver=False, logging_level="ERROR", runtime_env={"env_vars": code}, **local)
    try:
        yield ray
    except ray.exceptions.RayError as error:
        for file in files:
            for _ in read_file(Path(file)):  # 多半是哪一行写坏了：再读一遍，说得出是第几行
                pass
        reason = str(error).strip().splitlines()[-1]
        raise UserError(
            f"Ray 没有做完：{reason}。要的是一行一个对象的 jsonl；也可以用 --engine stream。"
        ) from error
    finally:
        if ours:
            ray.shutdown()
