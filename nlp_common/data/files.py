"""一个数据文件读成一行行 dict；文件有错时说清是哪个文件的哪一行。

只读 UTF-8；BOM（U+FEFF）不论在哪里都去掉，不当作一个字。逐行读取，几 GB 的文件只要前几千行时不会占满内存。
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from nlp_common.base.errors import UserError
from nlp_common.data.encodings import BOM, raw_lines, what_is_wrong

_TYPE_NAMES = {list: "列表", str: "字符串", int: "数字", float: "数字", bool: "真假值", type(None): "null"}


def read_file(path: Path) -> Iterator[dict]:
    """按后缀读一个文件，每次给出一行 dict；读到哪里，错误就报到哪里。

    - ``.json`` ``.jsonl``：每行一个对象，或整个文件是一个对象的列表；
    - ``.csv`` ``.tsv``：第一行是列名，值都是字符串；tsv 里引号就是引号，一行一条；
    - ``.parquet``；
    - ``.txt``：有空行时以空行分段，一段是一篇 ``{"text": 文档}``；没有空行时一行一篇；
      里面其实是 JSON 行的，按 jsonl 读。

    空文件、不是 UTF-8、格式有错时抛出 UserError，消息里有文件名和行号。
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"不认识 {path} 的格式；能读的后缀有 {' '.join(READERS)}。")
    try:
        if path.stat().st_size == 0:
            raise UserError(f"{path} 是空文件（0 字节）。请检查它有没有下载或写入完整。")
        empty = True
        for row in reader(path):
            empty = False
            yield row
    except OSError as error:
        raise UserError(f"读不了 {path}：{error.strerror or error}") from error
    if empty:
        raise UserError(f"{path} 里没有一行数据（只有空白或表头）。")


def sha256_of(paths: Iterable[Path]) -> str:
    """文件内容的 sha256（十六进制）；几个分片依次相接。"""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def row_place(path: Path, index: int) -> str:
    """read_file 给出的第 index 条（从 0 数）在文件的哪里，如"第 7 行"；说不出行号的格式说"第 7 条"。

    只在报错时调用：它把文件再读一遍。
    """
    suffix, starts = path.suffix.lower(), []
    if path.is_file() and suffix in (".csv", ".tsv"):
        starts = [line for line, _ in _table(path)]
        starts = starts[1:]  # 第一个是表头
    elif path.is_file() and suffix in (".json", ".jsonl"):
        lines = list(_lines(path))
        starts = [number for number, line in enumerate(lines, 1) if line.strip()]
        if lines[starts[0] - 1].lstrip().startswith("["):
            return f"第 {_line_of_item(''.join(lines), index)} 行"
    return f"第 {starts[index]} 行" if starts else f"第 {index + 1} 条"


def _lines(path: Path) -> Iterator[str]:
    """逐行解码。自己按字节分行：str.splitlines 会在 U+2028 等处断行，行号就和编辑器里的不一样了。"""
    for number, raw in enumerate(raw_lines(path), 1):
        try:
            yield raw.decode("utf-8").replace(BOM, "")  # 几个文件拼成的，BOM 会在中间
        except UnicodeDecodeError as error:
            raise UserError(what_is_wrong(path, number, error)) from error


def without_bom(value: Any) -> Any:
    """一行数据里的字符串都去掉 BOM：写成 \\ufeff 转义的、Parquet 和网上的数据里也会有。"""
    if isinstance(value, str):
        return value.replace(BOM, "")
    if isinstance(value, list):
        return [without_bom(each) for each in value]
    if isinstance(value, dict):
        return {without_bom(key): without_bom(each) for key, each in value.items()}
    return value


def _read_json(path: Path) -> Iterator[dict]:
    started = False
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        if not started and line.lstrip().startswith("["):
            yield from _read_json_list(path)
            return
        started = True
        value = _loads(line.rstrip("\r\n"), path, number)
        if fault := _row_fault(value, line):
            raise UserError(f"{path} 第 {number} 行：{fault}。")
        yield value


def _read_json_list(path: Path) -> Iterator[dict]:
    text = "".join(_lines(path))
    for index, value in enumerate(_loads(text, path, 1)):
        if fault := _row_fault(value, text):  # 有错才去找它在第几行：为每一项都数行号太慢
            raise UserError(f"{path} 第 {_line_of_item(text, index)} 行：{fault}。")
        yield value


def _line_of_item(text: str, index: int) -> int:
    """JSON 列表里第 index 项（从 0 数）开始于第几行；text 已知是正确的 JSON。"""
    decoder = json.JSONDecoder()
    at = text.index("[") + 1
    while True:
        while text[at] in " \t\r\n,":
            at += 1
        if index == 0:
            return text.count("\n", 0, at) + 1
        at = decoder.raw_decode(text, at)[1]
        index -= 1


def _loads(text: str, path: Path, first_line: int) -> Any:
    try:
        value = json.loads(text)
        return without_bom(value) if "\\ufeff" in text.lower() else value
    except json.JSONDecodeError as error:
        near = text[max(0, error.pos - 20) : error.pos + 20]
        raise UserError(
            f"{path} 第 {first_line + error.lineno - 1} 行不是正确的 JSON："
            f"第 {error.colno} 个字符附近 {near!r}（{error.msg}）。"
            '要么每行一个完整的对象，如 {"text": "…"}；要么整个文件是一个对象的列表 [{…}, {…}]。'
        ) from error


def _row_fault(value: object, source: str) -> str | None:
    """一行的毛病，没有毛病是 None；source 是它的 JSON 原文。"""
    if not isinstance(value, dict):
        return f'要的是一个对象，如 {{"text": "…"}}，这里是{_TYPE_NAMES.get(type(value), "别的类型")}'
    # 抓取的网页常把一个 emoji 从中间切断；不在这里拦住，分词器会报看不懂的错。没有 \ud 转义就不会有这种事。
    if "\\ud" in source or "\\uD" in source:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return "含有半个字符（不成对的 \\ud800–\\udfff 转义），请删去它"
    return None


def _table(path: Path) -> Iterator[tuple[int, list[str]]]:
    """csv、tsv 的每一条（表头也算）→ (开始于第几行, 各格)；空行不算。"""
    tab = path.suffix.lower() == ".tsv"
    if tab and not _all_quoted(path):
        for number, text in enumerate(_lines(path), 1):
            if text.strip("\r\n"):
                yield number, text.rstrip("\r\n").split("\t")
        return
    csv.field_size_limit(2**31 - 1)  # 默认 128 KiB，长文章会超过
    reader = csv.reader(_lines(path), delimiter="\t" if tab else ",", strict=True)
    start = 1
    try:
        for cells in reader:
            line, start = start, reader.line_num + 1  # 引号里可以有换行，一条数据会占几行
            if cells:
                yield line, cells
    except csv.Error as error:
        raise UserError(
            f"{path} 从第 {start} 行起引号不成对（{error}）。"
            "以英文双引号开头的格，要整格括起来，里面的双引号写两遍；或者改存为 jsonl。"
        ) from error


def _all_quoted(path: Path) -> bool:
    """表头的每一格都用双引号括着的 tsv：是照 csv 的规矩写的，引号要去掉。"""
    header = next((line.rstrip("\r\n") for line in _lines(path) if line.strip()), "")
    return all(len(cell) > 1 and cell[0] == cell[-1] == '"' for cell in header.split("\t"))


def _read_csv(path: Path) -> Iterator[dict]:
    header: list[str] = []
    for line, cells in _table(path):
        if not header:
            header = [cell.strip() for cell in cells]
            if len(header) > 1 and not header[0]:
                header[0] = "Unnamed: 0"  # pandas 的 to_csv 默认把行号写在没有名字的头一栏；照它读回来的叫法
            if len(set(header)) < len(header) or "" in header:
                raise UserError(f"{path} 第 {line} 行（表头）有空的或重复的列名：{header}")
        elif len(cells) != len(header):
            advice = "文本里有分隔符或换行时，整格要用英文双引号括起来。"
            if path.suffix.lower() == ".tsv":
                advice = "tsv 里一行一条，引号没有特别的意思：文本里有制表符或换行的，请改存为 csv 或 jsonl。"
            raise UserError(
                f"{path} 第 {line} 行有 {len(cells)} 格，表头有 {len(header)} 列（{'、'.join(header)}）。{advice}"
            )
        else:
            yield dict(zip(header, cells, strict=True))


def _read_parquet(path: Path) -> Iterator[dict]:
    import pyarrow  # 用到时才导入：多数读者的文件是 json 或 csv
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from without_bom(batch.to_pylist())
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} 不是完整的 Parquet 文件：{error}。请重新下载它。") from error


def _read_txt(path: Path) -> Iterator[dict]:
    if holds_json(path):
        yield from _read_json(path)
        return
    text = "".join(_lines(path)).replace("\r\n", "\n").replace("\r", "\n").strip()
    paragraphs = re.split(r"\n[ \t\u3000]*\n", text)
    for document in paragraphs if len(paragraphs) > 1 else text.split("\n"):
        if document.strip():
            yield {"text": document.strip()}


def holds_json(path: Path) -> bool:
    """一个 .txt 里其实是 JSON：头几行里有一行是完整的对象，或整个文件是对象的列表。"""
    first = ""
    for line in islice((line for line in _lines(path) if line.strip()), 5):
        first = first or line.strip()
        if isinstance(_value(line), dict):
            return True
    if not first.startswith("["):
        return False
    value = _value("".join(_lines(path)))
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _value(text: str) -> Any:
    """JSON 的值；不是 JSON 就是 None。"""
    try:
        return json.loads(text)
    except ValueError:
        return None


def lines_of(path: Path) -> list[tuple[int, str]]:
    """一行一段的文字文件：→ [(行号, 去掉首尾空白的一行)]，空行不要；行尾是 \\n、\\r\\n、\\r 都行。"""
    rows = []
    text = "".join(_lines(path)).replace("\r\n", "\n").replace("\r", "\n")
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            rows.append((number, line.strip()))
    return rows


READERS: dict[str, Callable[[Path], Iterator[dict]]] = {
    ".json": _read_json,
    ".jsonl": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}
