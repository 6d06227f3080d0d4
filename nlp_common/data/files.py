"""一个数据文件读成一行行 dict；文件有错时说清是哪个文件的哪一行。

只读 UTF-8（有没有 BOM 都行）。逐行读取，几 GB 的文件只要前几千行时不会占满内存。
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from nlp_common.base.errors import UserError

_TYPE_NAMES = {list: "列表", str: "字符串", int: "数字", float: "数字", bool: "真假值", type(None): "null"}


def read_file(path: Path) -> Iterator[dict]:
    """按后缀读一个文件，每次给出一行 dict；读到哪里，错误就报到哪里。

    - ``.json`` ``.jsonl``：每行一个对象，或整个文件是一个对象的列表；
    - ``.csv`` ``.tsv``：第一行是列名，值都是字符串；
    - ``.parquet``；
    - ``.txt``：有空行时以空行分段，一段是一篇 ``{"text": 文档}``；没有空行时一行一篇。

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
        reader, start = csv.reader(_lines(path), delimiter="\t" if suffix == ".tsv" else ","), 1
        for cells in reader:
            starts += [start] if cells else []
            start = reader.line_num + 1
        starts = starts[1:]  # 第一个是表头
    elif path.is_file() and suffix in (".json", ".jsonl"):
        lines = list(_lines(path))
        starts = [number for number, line in enumerate(lines, 1) if line.strip()]
        if lines[starts[0] - 1].lstrip().startswith("["):
            return f"第 {_line_of_item(''.join(lines), index)} 行"
    return f"第 {starts[index]} 行" if starts else f"第 {index + 1} 条"


def _lines(path: Path) -> Iterator[str]:
    """逐行解码。自己按 b"\\n" 分行：str.splitlines 会在 U+2028 等处断行，行号就和编辑器里的不一样了。"""
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path} 第 {number} 行不是 UTF-8 编码（多半是 GBK 或 UTF-16）。"
                    f"请用编辑器另存为 UTF-8；GBK 文件也可以运行：iconv -f GB18030 -t UTF-8 {path} > 新文件"
                ) from error


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


def _loads(text: str, path: Path, first_line: int) -> object:
    try:
        return json.loads(text)
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


def _read_csv(path: Path) -> Iterator[dict]:
    csv.field_size_limit(2**31 - 1)  # 默认 128 KiB，长文章会超过
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.reader(_lines(path), delimiter=delimiter, strict=True)
    header: list[str] = []
    start = 1
    try:
        for cells in reader:
            line, start = start, reader.line_num + 1  # 引号里可以有换行，一条数据会占几行
            if not cells:
                continue
            if not header:
                header = [cell.strip() for cell in cells]
                if len(set(header)) < len(header) or "" in header:
                    raise UserError(f"{path} 第 {line} 行（表头）有空的或重复的列名：{header}")
            elif len(cells) != len(header):
                raise UserError(
                    f"{path} 第 {line} 行有 {len(cells)} 格，表头有 {len(header)} 列（{'、'.join(header)}）。"
                    "文本里有分隔符或换行时，整格要用英文双引号括起来。"
                )
            else:
                yield dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise UserError(
            f"{path} 从第 {start} 行起引号不成对（{error}）。"
            "以英文双引号开头的格，要整格括起来，里面的双引号写两遍；或者改存为 jsonl。"
        ) from error


def _read_parquet(path: Path) -> Iterator[dict]:
    import pyarrow  # 用到时才导入：多数读者的文件是 json 或 csv
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} 不是完整的 Parquet 文件：{error}。请重新下载它。") from error


def _read_txt(path: Path) -> Iterator[dict]:
    text = "".join(_lines(path)).replace("\r\n", "\n").strip()
    paragraphs = re.split(r"\n[ \t\u3000]*\n", text)
    for document in paragraphs if len(paragraphs) > 1 else text.split("\n"):
        if document.strip():
            yield {"text": document.strip()}


READERS: dict[str, Callable[[Path], Iterator[dict]]] = {
    ".json": _read_json,
    ".jsonl": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}
