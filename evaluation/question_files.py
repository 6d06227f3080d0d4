"""读者自己的题目文件：json、jsonl、csv、tsv、parquet，一行一道；错在哪一行就说哪一行。"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nlp_common.base.errors import UserError
from nlp_common.data.files import row_place
from nlp_common.data.rows import read_rows


def read_questions(path: str, required: Sequence[str] = (), limit: int | None = None) -> list[dict]:
    """文件里的各行；少了 required 里的哪一栏、哪一栏是空的，是 UserError，说出第几行（编辑器里的行号）。"""
    if Path(path).expanduser().is_dir():
        raise UserError(f"{path} 是文件夹，这里要一个文件（json、jsonl、csv、tsv 或 parquet）。")
    rows = read_rows(path, limit=limit).rows
    for place, row in enumerate(rows, 1):
        for name in required:
            if name not in row:
                have = "、".join(map(str, row))
                raise UserError(f"{path} {place_of(path, place)}没有 {name}；这一行有的是：{have}。")
            if row[name] is None or (isinstance(row[name], str) and not row[name].strip()):
                raise UserError(f"{path} {place_of(path, place)}的 {name} 是空的。")
    return rows


def place_of(path: str, place: int) -> str:
    """read_questions 给出的第 place 条（从 1 数）在文件的哪里，如"第 7 行"：csv 的表头、空行也算，与编辑器里的相同。"""
    return row_place(Path(path).expanduser(), place - 1)


def places_of(path: str, places: Sequence[int]) -> str:
    """几条的位置，最多写十个。"""
    shown = "、".join(place_of(path, place) for place in places[:10])
    return shown + (" 等" if len(places) > 10 else "")
