"""工具箱里的几件工具，各是一个函数或一个小类的方法：说明与参数的说明写在 docstring 里，schema 从那里来；最后的 toolbox 把它们放进箱子。tools.py 的第一步。"""

from __future__ import annotations

import datetime
import os
import random
import stat
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path

from expressions import ExpressionError, evaluate, shown
from file_tools import check_folder, list_folder, read_text
from function_schema import function_schema
from local_clock import TimeError, days_from, time_in, utc_now
from nlp_common.data.rows import check_path, read_rows
from nlp_common.sandbox.sandbox import Limits, run_program
from nlp_common.tiny.world import Draw, draw_slots
from text_search import Index, index_folder
from tool_calls import Tool, ToolError
from unit_table import UnitError
from unit_table import convert as convert_exactly

HOME = Path(__file__).resolve().parent
COLUMNS = {
    "person": "人",
    "time": "时间",
    "place": "地点",
    "animal": "动物",
    "food": "食物",
    "friend": "朋友",
}
MOST_ROWS = 5  # 一次最多给出几行、几段
NOTE_CHARS, NOTES_BYTES = 1000, 1 << 20


# ---------------------------------------------------------------- 算


def calculator(expression: str) -> str:
    """算一个算式，结果是准确的。

    参数：
        expression: 算式，如 (23+48)*2；有 + - * / // % ** 和括号
    """
    try:
        return shown(evaluate(expression))
    except ExpressionError as error:
        raise ToolError(f"算不了：{error}") from None


def convert(value: float, from_unit: str, to_unit: str) -> str:
    """换算长度、重量、面积、温度的单位，如亩、斤、里、摄氏度、英尺。

    参数：
        value: 多少
        from_unit: 原来的单位，如 亩
        to_unit: 换成什么单位，如 平方米
    """
    try:
        number = convert_exactly(
            Fraction(repr(value)), from_unit, to_unit
        )  # 0.1 就是十分之一，不是它的二进制近似
    except UnitError as error:
        raise ToolError(f"换算不了：{error}") from None
    return f"{shown(number)} {to_unit}"


# ---------------------------------------------------------------- 时间


class Clock:
    """read 给出现在（有时区的）；测试里换成一个不走的钟。"""

    def __init__(self, read: Callable[[], datetime.datetime]):
        self.read = read

    def now(self, place: str = "北京") -> str:
        """现在的日期、时间、星期几。

        参数：
            place: 哪里的时间，如 北京、东京、America/Sao_Paulo
        """
        try:
            return time_in(self.read(), place)
        except TimeError as error:
            raise ToolError(str(error)) from None


def days_between(start: str, end: str) -> str:
    """两个日期隔几天，后一个是星期几。

    参数：
        start: 前一个日期，如 2026-11-28
        end: 后一个日期
    """
    try:
        return days_from(start, end)
    except TimeError as error:
        raise ToolError(str(error)) from None


# ---------------------------------------------------------------- 查


class Table:
    """一张表：一行一个 {列: 值}。"""

    def __init__(self, rows: list[dict]):
        self.rows = rows
        self.columns = list(dict.fromkeys(column for row in rows for column in row))

    def look_up(self, column: str, value: str) -> str:
        """查表：某一列是某个值的行。

        参数：
            column: 哪一列
            value: 这一列的值，要一字不差
        """
        found = [row for row in self.rows if str(row.get(column)) == value.strip()]
        if not found:
            values = list(dict.fromkeys(str(row[column]) for row in self.rows if row.get(column) is not None))
            more = " 等" if len(values) > 20 else ""
            raise ToolError(f"{column} 没有“{value[:30]}”；有的是：{'、'.join(values[:20])[:200]}{more}")
        lines = ["，".join(f"{name}：{each}" for name, each in row.items()) for row in found[:MOST_ROWS]]
        return "\n".join([*lines, f"……共 {len(found)} 行"] if len(found) > MOST_ROWS else lines)


def world_rows(n: int = 12) -> list[dict]:
    """自带的表：小世界里谁什么时候去了哪里。"""
    rng = random.Random(0)
    drawn = [draw_slots(Draw(rng)) for _ in range(n)]
    return [{title: slots[name] for name, title in COLUMNS.items()} for slots in drawn]


def open_table(path: str | None) -> Table:
    """--table 的 csv、jsonl；没给就是自带的。"""
    if path is None:
        return Table(world_rows())
    check_path(path, "--table")
    return Table(read_rows(path).rows)


class Folder:
    """读者许可读的一个文件夹。"""

    def __init__(self, root: Path):
        self.root = root
        self.index: Index | None = None

    def list_files(self, path: str = ".") -> str:
        """许可读的文件夹里有什么。

        参数：
            path: 里面的哪个文件夹，如 notes；. 是最上面一层
        """
        return list_folder(self.root, path)

    def read_file(self, path: str) -> str:
        """读许可的文件夹里的一个文字文件。

        参数：
            path: 文件的相对路径，如 notes/a.txt
        """
        return read_text(self.root, path)

    def search(self, words: str) -> str:
        """在许可读的文件里找有这些词的段落。

        参数：
            words: 要找的词，空格隔开
        """
        if self.index is None:  # 用到才建；建好以后改了的文件，要重新打开才找得到
            self.index = index_folder(self.root)
        found = self.index.search(words, MOST_ROWS)
        if not found:
            return "没有找到"
        return "\n\n".join(f"{passage.where}\n{passage.text}" for _, passage in found)


# ---------------------------------------------------------------- 会改东西的


class Notebook:
    """一个只往后添的笔记文件。"""

    def __init__(self, path: Path, read_clock: Callable[[], datetime.datetime]):
        self.path, self.read_clock = path, read_clock

    def write_note(self, text: str) -> str:
        """在笔记本里添一条笔记。

        参数：
            text: 笔记，一条最多 1000 个字
        """
        plain = "".join(char for char in text if char.isprintable() or char == "\n").strip()
        if not plain or len(plain) > NOTE_CHARS:
            raise ToolError(f"一条笔记要有 1 到 {NOTE_CHARS} 个字，给的有 {len(plain)} 个。")
        moment = self.read_clock().astimezone(datetime.UTC)
        line = f"- {moment:%Y-%m-%d %H:%M:%S} UTC  " + plain.replace("\n", "\n  ") + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        flags = (
            os.O_WRONLY
            | os.O_APPEND
            | os.O_CREAT
            | getattr(os, "O_NOFOLLOW", 0)
            | getattr(os, "O_NONBLOCK", 0)
        )
        with open(os.open(self.path, flags, 0o600), "ab") as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode) or about.st_size > NOTES_BYTES:
                raise ToolError("笔记本满了，或不是普通的文件。")
            file.write(line.encode("utf-8", "replace"))
        return f"记下了（{len(plain)} 个字）。"


class Python:
    """在沙箱的另一个进程里运行一段 Python；到时间就结束那个进程，不留下什么。"""

    def __init__(self, limits: Limits):
        self.limits = limits

    def run_python(self, code: str) -> str:
        """运行一段 Python，给出它印出来的；不能联网、读写文件、开进程。

        参数：
            code: 一段 Python，要看的用 print 印出来
        """
        ran = run_program(code, self.limits)
        if not ran.passed:
            raise ToolError(ran.text())
        return ran.output or "（什么也没有印；要看结果，用 print。）"


# ---------------------------------------------------------------- 箱子


def toolbox(settings: object = None, clock: Callable[[], datetime.datetime] = utc_now) -> dict[str, Tool]:
    """settings 里写着许可什么：folder、table、notes、allow_python（没有这一栏，就是没有许可）。clock 给出现在。"""
    allowed = partial(getattr, settings)
    table = open_table(allowed("table", None))
    reading = [calculator, convert, Clock(clock).now, days_between, table.look_up]
    if folder := allowed("folder", None):
        files = Folder(check_folder(folder))
        reading += [files.list_files, files.read_file, files.search]
    notes = Path(allowed("notes", None) or HOME / "outputs" / "notes.md").expanduser()
    writing = [Notebook(notes, clock).write_note]
    if allowed("allow_python", False):
        seconds = allowed("tool_seconds", 10.0)  # 比 run_call 等的短一点：先由沙箱结束它，不留下线程
        writing.append(Python(Limits(seconds=0.8 * seconds, memory_mb=256)).run_python)
    tools = [as_tool(function) for function in reading] + [as_tool(function, True) for function in writing]
    box = {tool.name: tool for tool in tools}
    column = box["look_up"].schema["function"]["parameters"]["properties"]["column"]
    column["enum"] = table.columns  # 有哪几列，模型看得到；别的列，检查参数时就拦下
    return box


def as_tool(function: Callable[..., str], writes: bool = False) -> Tool:
    """函数 → 工具。run_python 不改文件，可是能做的事太多，也算会改东西的：每次问人。"""
    return Tool(function.__name__, function_schema(function), function, writes)
