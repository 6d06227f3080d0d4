"""命令行 → 设置（dataclass）；写错了是一句中文的 UserError，不是一屏 usage。"""

from __future__ import annotations

import argparse
import copy
import difflib
import math
import re
import sys
from dataclasses import dataclass, field, fields
from typing import Any, NoReturn, TypeVar

from nlp_common.base.errors import UserError

S = TypeVar("S")  # 各脚本自己的设置，dataclass

# argparse 的英文报错 → 中文；没有列出的原样显示。有别名的（--extra/--with）说别名：读者敲的是它。
MESSAGES = [
    (
        r"argument (?:--\w+/(?=--\w+:))?(--\w+)\S*: invalid choice: '?(.*?)'? \(choose from (.*)\)",
        r"\1 不认识 \2，可以是 \3",
    ),
    (r"argument (--\w+)\S*: invalid int value: (.*)", r"\1 要是整数，给的是 \2"),
    (r"argument (--\w+)\S*: invalid float value: (.*)", r"\1 要是数，给的是 \2"),
    (r"argument (?:--\w+/(?=--\w+:))?(--\w+)\S*: expected .*", r"\1 后面要写上值"),
    (r"argument (--\w+)\S*: Truthy value expected: got (.*) but .*", r"\1 要是 true 或 false，给的是 '\2'"),
    (r"argument (?:-h/)?(--\w+)\S*: ignored explicit argument (.*)", r"\1 后面不写值，给的是 \2"),
]


@dataclass(frozen=True)
class Limits:
    """一个数能取的范围；also 是范围之外另外许可的一个值（如 -1 表示"不限"）。"""

    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None
    also: float | None = None

    def fault(self, value: float) -> str | None:
        """value 不在范围里时，要怎样；在范围里是 None。NaN 与无穷大从来不行。"""
        if value == self.also:
            return None
        fits = math.isfinite(value)
        fits &= self.above is None or value > self.above
        fits &= self.at_least is None or value >= self.at_least
        fits &= self.below is None or value < self.below
        fits &= self.at_most is None or value <= self.at_most
        return None if fits else self.describe(value)

    def describe(self, value: float) -> str:
        also = "" if self.also is None else f"，或 {self.also:g}"
        if self == Limits():
            return f"要是一个有限的数，给的是 {value:g}"
        if isinstance(value, int) and self.at_least == 1 and self.at_most is None:
            return f"要是正整数{also}，给的是 {value}"
        if self.at_least is not None and self.at_most is not None:
            return f"要在 {self.at_least} 到 {self.at_most} 之间{also}，给的是 {value}"
        parts = []
        if self.above is not None:
            parts.append(f"大于 {self.above:g}")
        if self.at_least is not None:
            parts.append(f"不能小于 {self.at_least:g}")
        if self.below is not None:
            parts.append(f"小于 {self.below:g}")
        if self.at_most is not None:
            parts.append(f"不大于 {self.at_most:g}")
        said = "、".join(parts)
        return f"{'' if said.startswith('不能') else '要'}{said}{also}，给的是 {value:g}"


# 各脚本同名的参数是同一个意思，范围写在这里一处；只有一个脚本不同的，写在它的 option 里。
COUNT, POSITIVE, NOT_NEGATIVE, SHARE = (
    Limits(at_least=1),
    Limits(above=0),
    Limits(at_least=0),
    Limits(at_least=0, at_most=1),
)
LIMITS = {
    # 个数、步数：至少 1
    **dict.fromkeys(("max_train_samples", "max_length", "per_device_train_batch_size"), POSITIVE),
    **dict.fromkeys(("hidden_size", "num_layers"), POSITIVE),
    **dict.fromkeys(("max_eval_samples", "max_new_tokens", "micro_batch_size", "batch_size", "n"), COUNT),
    **dict.fromkeys(("gradient_accumulation_steps", "logging_steps", "save_steps", "hacking_steps"), COUNT),
    **dict.fromkeys(("ppo_epochs", "grpo_epochs", "num_generations", "max_rounds", "top_k"), COUNT),
    "max_steps": Limits(at_least=1, also=-1),
    "dataloader_num_workers": NOT_NEGATIVE,
    **dict.fromkeys(("samples", "train_layers"), NOT_NEGATIVE),
    "seed": Limits(at_least=0, at_most=2**32 - 1),  # numpy 的种子只能这么大
    "port": Limits(at_least=1, at_most=65535),
    # 学习率等：大于 0
    **dict.fromkeys(("learning_rate", "mlm_learning_rate", "num_train_epochs", "eval_steps"), POSITIVE),
    **dict.fromkeys(("beta", "kl_target", "max_update_kl", "clip_range", "clip_range_value"), POSITIVE),
    **dict.fromkeys(("clip_range_high", "ratio_max"), POSITIVE),
    "repetition_penalty": POSITIVE,
    "top_p": Limits(above=0, at_most=1),
    # 0 是不用
    **dict.fromkeys(("warmup_steps", "weight_decay", "max_grad_norm", "sft_weight"), NOT_NEGATIVE),
    **dict.fromkeys(("mlm_epochs", "mlm_news", "kl_coef", "kl_gain", "temperature"), NOT_NEGATIVE),
    **dict.fromkeys(("adam_beta2", "dropout"), Limits(at_least=0, below=1)),
    "layer_decay": Limits(above=0, at_most=1),
    "gamma": SHARE,
    "lam": SHARE,
}


def option(help: str, default: Any = None, limits: Limits | None = None, **extra: Any) -> Any:
    """dataclass 字段；default 为 None 的参数由预设补上。limits 是这个脚本里的范围，默认看 LIMITS。"""
    return field(default=default, metadata={"help": help, "limits": limits, **extra})


def check_limits(settings: Any) -> None:
    """每个数都在它的范围里；不在的是 UserError，说出是哪个参数、要怎样。没给的（None）不管。"""
    for each in fields(settings):
        value = getattr(settings, each.name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        limits = each.metadata.get("limits") or LIMITS.get(each.name, Limits())
        if fault := limits.fault(value):
            raise UserError(f"--{each.name} {fault}。")


def check_words(words: list[str]) -> None:
    """终端用别的编码（如 GBK）写的字，Python 读成半个字，一用就出错：在这里就说。"""
    for number, word in enumerate(words, 1):
        try:
            word.encode("utf-8")
        except UnicodeEncodeError:
            shown = word.encode("utf-8", errors="replace").decode("utf-8")
            raise UserError(
                f"命令行的第 {number} 个词（{shown[:40]}）里有不是 {sys.getfilesystemencoding()} 编码的字节，多半是 GBK 的："
                "请把终端改成 UTF-8（Linux/macOS：export LANG=C.UTF-8；Windows：chcp 65001），"
                "或把文字存进 UTF-8 的文件，用 --predict_file 这样的参数读。"
            ) from None


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """脚本开头的说明原样印出，不挤成一段；有默认值的参数写上默认值。"""

    def _get_help_string(self, action: argparse.Action) -> str:
        shown = not any(action.default is hidden for hidden in (None, False, "", argparse.SUPPRESS))
        return f"{action.help or ''}{'（默认 %(default)s）' if shown else ''}"


def parse_arguments(settings_class: type[S], argv: list[str] | None) -> S:
    """按 dataclass 的字段解析 argv（None 是 sys.argv）；``--help`` 先印脚本开头的说明。"""
    from transformers.hf_argparser import HfArgumentParser

    check_words(sys.argv[1:] if argv is None else argv)

    class Parser(HfArgumentParser):
        @staticmethod
        def _parse_dataclass_field(parser: Any, field: Any) -> None:
            field = copy.copy(field)  # argparse 不认识 limits
            field.metadata = {name: value for name, value in field.metadata.items() if name != "limits"}
            HfArgumentParser._parse_dataclass_field(parser, field)

        def error(self, message: str) -> NoReturn:
            for pattern, chinese in MESSAGES:
                message = re.sub(pattern, chinese, message)
            if found := re.search(r"不认识 (\S+)，可以是 (.*)", message):
                near = difflib.get_close_matches(found[1], re.findall(r"[\w.-]+", found[2]), n=1)
                message += f"（是不是 {near[0]}）" if near else ""
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
    check_limits(settings)
    return settings
