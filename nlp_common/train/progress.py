"""进度条、吞吐、把几步的损失平均成一条记录。"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from tqdm import tqdm

from nlp_common.base.processes import is_main

if TYPE_CHECKING:
    from accelerate import Accelerator


def progress_bar(label: str, total: int, initial: int = 0) -> tqdm:
    """终端里是一条会动的进度条；输出到文件时每 20 秒一行；只有主进程有。"""
    return tqdm(
        disable=not is_main(),
        total=total,
        initial=initial,
        desc=f"  {label}",
        unit="步",
        mininterval=0.5 if sys.stderr.isatty() else 20,
        ascii=" #" if not sys.stderr.isatty() else None,
        dynamic_ncols=True,
    )


def speed(epochs: float, tokens: list[int], seconds: float) -> dict[str, float]:
    """训练了几遍、每行几个 token、用了几秒 → 每秒多少行、多少 token（不算填充）。最后一批可能不满，按遍数算才准。"""
    rows_per_s = epochs * len(tokens) / seconds
    return {
        "train_samples_per_s": round(rows_per_s, 2),
        "train_seconds": round(seconds, 2),
        "train_tokens_per_s": round(rows_per_s * sum(tokens) / len(tokens), 1),
    }


def average(accelerator: Accelerator, steps: list[dict]) -> dict[str, float]:
    """几步的 ``{名字: 标量张量}`` 的平均，几个进程的合起来。"""
    means = {name: sum(each[name] for each in steps) / len(steps) for name in steps[0]}
    return {name: round(accelerator.reduce(value, "mean").item(), 5) for name, value in means.items()}
