"""一条数据不能用：没有用的跳过（Skip），格式不对的停下来（Malformed）。读一格内容的几个小函数也在这里。"""

from __future__ import annotations

_TYPE_NAMES = {str: "字符串", list: "列表", dict: "对象", int: "数字", float: "数字", bool: "真假值"}


class Skip(Exception):
    """这一条没有用，跳过；参数是原因。"""


class Malformed(Exception):
    """这一条的格式不对；参数说明哪一栏、怎么不对。"""


def type_name(value: object) -> str:
    """一个值是什么，用中文说。"""
    return _TYPE_NAMES.get(type(value), type(value).__name__)


def as_string(value: object, column: str) -> str:
    """字符串原样返回，None 当作空（Parquet 和 hub 上没填的格就是 None）。"""
    if value is not None and not isinstance(value, str):
        mend = f"（{value}），请加上引号" if isinstance(value, int | float) else ""
        raise Malformed(f"{column} 应是字符串，这里是{type_name(value)}{mend}")
    return value or ""
