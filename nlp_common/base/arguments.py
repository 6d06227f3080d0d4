"""命令行 → 设置（dataclass）；写错了是一句中文的 UserError，不是一屏 usage。"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from dataclasses import field
from typing import Any, NoReturn, TypeVar

from nlp_common.base.errors import UserError

S = TypeVar("S")  # 各脚本自己的设置，dataclass

# argparse 的英文报错 → 中文；没有列出的原样显示。
MESSAGES = [
    (r"argument (--\w+)\S*: invalid choice: '?(.*?)'? \(choose from (.*)\)", r"\1 不认识 \2，可以是 \3"),
    (r"argument (--\w+)\S*: invalid int value: (.*)", r"\1 要是整数，给的是 \2"),
    (r"argument (--\w+)\S*: invalid float value: (.*)", r"\1 要是数，给的是 \2"),
    (r"argument (--\w+)\S*: expected .*", r"\1 后面要写上值"),
    (r"argument (--\w+)\S*: Truthy value expected: got (.*) but .*", r"\1 要是 true 或 false，给的是 '\2'"),
    (r"argument (?:-h/)?(--\w+)\S*: ignored explicit argument (.*)", r"\1 后面不写值，给的是 \2"),
]


def option(help: str, default: Any = None, **extra: Any) -> Any:
    """dataclass 字段；default 为 None 的参数由预设补上。"""
    return field(default=default, metadata={"help": help, **extra})


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """脚本开头的说明原样印出，不挤成一段；有默认值的参数写上默认值。"""

    def _get_help_string(self, action: argparse.Action) -> str:
        shown = not any(action.default is hidden for hidden in (None, False, argparse.SUPPRESS))
        return f"{action.help or ''}{'（默认 %(default)s）' if shown else ''}"


def parse_arguments(settings_class: type[S], argv: list[str] | None) -> S:
    """按 dataclass 的字段解析 argv（None 是 sys.argv）；``--help`` 先印脚本开头的说明。"""
    from transformers.hf_argparser import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            for pattern, chinese in MESSAGES:
                message = re.sub(pattern, chinese, message)
            raise UserError(f"命令行参数不对：{message}。加 --help 看全部参数。")

    # 不许缩写：写错的参数会悄悄变成别的参数。
    script = sys.modules[settings_class.__module__].__doc__
    parser = Parser(settings_class, description=script, allow_abbrev=False, formatter_class=HelpFormatter)
    settings, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        close = difflib.get_close_matches(unknown[0], [f"--{name}" for name in vars(settings)], n=1)
        raise UserError(
            f"命令行参数不对：不认识 {' '.join(unknown)}{f'，是不是 {close[0]}？' if close else '。'}加 --help 看全部参数。"
        )
    return settings
