"""--dataset 一个参数读遍四处：自带的数据、本地文件、本地文件夹、网上的数据集。

每一行都是一个 dict，并且记下数据从哪里来、内容的 sha256，好写进 run.json：以后能查这个模型学的是什么。
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from nlp_common.base.errors import UserError
from nlp_common.data.files import READERS, read_file, sha256_of, without_bom
from nlp_common.data.online import hub_rows
from nlp_common.data.people_daily import SPLITS, people_daily

BUILTINS: dict[str, Callable[[str, int | None], list[dict]]] = {"people_daily": people_daily}

# 要这一份时依次找哪些文件名；很多数据集把验证集叫 dev，或只有 test。
_SPLIT_STEMS = {
    "train": ["train"],
    "validation": ["validation", "valid", "val", "dev", "test"],
    "test": ["test"],
}
_SHARD = r"(?:-\d+-of-(\d+))?"  # train-00000-of-00002.parquet
_NOT_DATA = {"readme", "license", "requirements", "dataset_info", "dataset_infos", "dataset_dict", "state"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[^/\\]+)?", re.ASCII)
_FILE_SUFFIXES = {*READERS, ".ndjson", ".xlsx", ".xls", ".arrow", ".gz", ".zip"}


@dataclass(frozen=True)
class Rows:
    """读到的数据。

    rows: 每行一个 dict。
    source: ``{"name", "kind", "path", "split", "rows", "sha256"}``。kind 是 builtin、file、folder 或 hub；
    path 是文件的路径（照读者写的样子，文件夹则接上文件名；其余为 None）；split 是真正读的那一份；
    sha256 对文件是全部字节的，对自带和网上的数据是这里返回的各行的。
    """

    rows: list[dict]
    source: dict


def read_rows(
    name: str,
    *,
    split: str = "train",
    limit: int | None = None,
    builtins: dict[str, Callable[[str, int | None], list[dict]]] | None = None,
    source: str = "hf",
    keep: Callable[[dict], bool] | None = None,
) -> Rows:
    """按名字读数据，次序是：自带的名字 → 本地文件或文件夹 → 网上的数据集（``owner/name`` 或 ``owner/name:子集``）。

    limit 是筛选之后最多要几行；keep 返回 False 的行不要。builtins 里的函数收 ``(split, limit)``；
    有 keep 时给它的 limit 是 None，因为筛掉多少还不知道。文件没有"份"之分，split 只是记下来。
    找不到、读不了、格式有错或一行也没有时抛出 UserError。
    """
    if limit is not None and limit < 1:
        raise UserError(f"要读的行数至少是 1，给的是 {limit}。")
    if not name.strip():
        raise UserError("数据集的名字是空的。请用 --dataset 给出一个文件、文件夹或数据集的名字。")
    known = {**BUILTINS, **(builtins or {})}
    path, location, files = Path(name).expanduser(), None, []
    if name in known:
        kind = "builtin"
        found: Iterable[dict] = known[name](split, None if keep else limit)
    elif path.is_file():
        kind, location, files = "file", name, [path]
        found = read_file(path)
    elif path.is_dir():
        kind = "folder"
        split, files = _split_files(path, split)
        location = "、".join((Path(name) / file.relative_to(path)).as_posix() for file in files)
        found = (row for file in files for row in read_file(file))
    elif not _HUB_ID.fullmatch(name) or path.suffix.lower() in _FILE_SUFFIXES:
        raise UserError(_no_such_file(name, path))
    else:
        kind, found = "hub", hub_rows(name, split, source)
    rows = list(islice((row for row in found if keep is None or keep(row)), limit))
    if hasattr(found, "close"):  # 读够了：关上文件，网上读来的行存进缓存
        found.close()
    if kind == "hub":
        rows = without_bom(rows)  # 文件的在读时就去掉了
    if not rows:
        raise UserError(f"{name} 的 {split} 里没有一行符合要求的数据。")
    return Rows(
        rows,
        {
            "name": name,
            "kind": kind,
            "path": location,
            "split": split,
            "rows": len(rows),
            "sha256": sha256_of(files) if files else sha256_of_rows(rows),
        },
    )


def check_path(name: str | None, flag: str = "--dataset（或给出它的那个参数）") -> None:
    """name 写得像路径却不存在时抛出 UserError，说出是 flag 给的；名字、hub 上的数据集不管。"""
    path = Path(name or "").expanduser()
    if name and not path.exists() and (not _HUB_ID.fullmatch(name) or path.suffix.lower() in _FILE_SUFFIXES):
        raise UserError(_no_such_file(name, path, flag))


def check_data(name: str | None, flag: str = "--dataset") -> None:
    """check_path，再看文件是不是空的：训练数据写错了，不必等上一阶段训练完才知道。"""
    check_path(name, flag)
    path = Path(name or "").expanduser()
    if name and path.is_file() and path.stat().st_size == 0:
        raise UserError(f"{name} 是空文件（0 字节）：请检查 {flag}。")


def data_sha256(name: str | None) -> str | None:
    """本地的数据文件，或文件夹里全部数据文件的内容的 sha256；不在本地的是 None。"""
    path = Path(name or "").expanduser()
    if not name or not path.exists():
        return None
    return sha256_of([path] if path.is_file() else _data_files(path))


def has_split(name: str | Path, split: str) -> bool:
    """自带的 people_daily 或本地文件夹里有没有这一份。其余（文件、网上的、不存在的）一律 False，不联网。"""
    if name in BUILTINS:
        return split in SPLITS
    path = Path(name).expanduser()
    return path.is_dir() and bool(_find_split(path, split)[1])


def _data_files(folder: Path) -> list[Path]:
    """文件夹及其 data 子文件夹（hub 上的习惯）里能读的文件，按名字排好。"""
    return sorted(
        file
        for place in (folder, folder / "data")
        if place.is_dir()
        for file in place.iterdir()
        if file.suffix.lower() in READERS and file.is_file() and file.stem.lower() not in _NOT_DATA
    )


def _find_split(folder: Path, split: str) -> tuple[str, list[Path]]:
    files = _data_files(folder)
    for stem in _SPLIT_STEMS.get(split, [split]):
        if found := [file for file in files if re.fullmatch(stem + _SHARD, file.stem.lower())]:
            return ("validation" if stem in ("valid", "val", "dev") else stem), found
    named = "|".join(stem for stems in _SPLIT_STEMS.values() for stem in stems)
    # 只有一个文件、名字又不是 test 之类：就是训练数据。
    if split == "train" and len(files) == 1 and not re.fullmatch(f"({named}){_SHARD}", files[0].stem.lower()):
        return "train", files
    return split, []


def _split_files(folder: Path, split: str) -> tuple[str, list[Path]]:
    """这一份真正的名字和它的文件；没有、有歧义或缺分片时抛出 UserError。"""
    actual, files = _find_split(folder, split)
    if not files:
        inside = sorted(item.name + "/" * item.is_dir() for item in folder.iterdir())
        raise UserError(
            f"文件夹 {folder} 里没有 {split} 这一份数据。\n"
            f"  里面有：{'、'.join(inside[:20]) or '（空的）'}{' 等' if len(inside) > 20 else ''}\n"
            f"  要有：{split}.jsonl 这样的文件（后缀可以是 {' '.join(READERS)}）；或者用 --dataset 直接给出一个文件。"
        )
    matches = [re.search(_SHARD + "$", file.stem) for file in files]  # 不分片的也匹配，只是没有第一组
    shards = {int(match[1] or 1) for match in matches if match}
    if shards != {len(files)} or len({(file.parent, file.suffix.lower()) for file in files}) > 1:
        names = "、".join(file.name for file in files)
        raise UserError(
            f"文件夹 {folder} 里 {actual} 的文件不成一套（有重名的，或缺了分片）：{names}。"
            "请补齐或删去多余的，或者用 --dataset 直接给出一个文件。"
        )
    return actual, files


def _no_such_file(name: str, path: Path, flag: str = "--dataset（或给出它的那个参数）") -> str:
    siblings = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
    message = f"没有这个文件：{name}"
    if not path.is_absolute():
        message += f"（当前文件夹是 {Path.cwd()}）"
    if close := difflib.get_close_matches(path.name, siblings, n=1):
        message += f"。是不是 {(Path(name).parent / close[0]).as_posix()}？"
    elif not siblings and not path.parent.is_dir():
        message += f"。连文件夹 {path.parent} 也没有。"
    return message + f"\n请检查 {flag} 的路径。"


def sha256_of_rows(rows: list[dict]) -> str:
    # default=str：网上的数据集会有日期等 JSON 没有的类型。
    text = json.dumps(rows, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
