"""几个进程一起训练（``accelerate launch``）：谁准备、谁等、谁写、谁说话。只有一个进程时，这里什么也不做。

约定：各进程跑同样的代码，走到同一处。下载、锁住文件夹、训练缺了的上一阶段、写文件，只由主进程做，结果告诉大家
（on_main）；评测各进程都做同样的一遍，所以谁也不必等谁，参数分片（FSDP、ZeRO-3）时也正好要一起前向。
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

T = TypeVar("T")
LAUNCHER = (
    "RANK",
    "LOCAL_",
    "WORLD_SIZE",
    "GROUP_",
    "ROLE_",
    "MASTER_",
    "TORCHELASTIC_",
    "ACCELERATE_",
    "FSDP_",
)


def num_processes() -> int:
    """启动器开了几个进程；不是它启动的就是 1。"""
    return int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1


def process_index() -> int:
    return int(os.environ["RANK"]) if num_processes() > 1 else 0


def is_main() -> bool:
    return process_index() == 0


def join() -> None:
    """连上别的进程，认领自己的那块 GPU。"""
    if num_processes() == 1:
        return
    from accelerate import PartialState

    from nlp_common.base.device import accelerator_available

    # 等多久算出错：主进程可能正在下载模型，或训练缺了的上一阶段
    PartialState(cpu=not accelerator_available(), timeout=timedelta(hours=3))


def leave() -> None:
    """全部做完了：一起断开。"""
    if num_processes() > 1 and "torch" in sys.modules:
        from torch import distributed

        if distributed.is_initialized():
            distributed.destroy_process_group()


def wait() -> None:
    """等到各进程都走到这里。"""
    on_main(lambda: None)


def on_main(function: Callable[[], T]) -> T:
    """只在主进程里运行 function，各进程都得到它的结果。主进程里出了错，启动器会结束其余的进程。"""
    if num_processes() == 1:
        return function()
    join()
    from accelerate.utils import broadcast_object_list

    box: list[Any] = [function() if is_main() else None]
    broadcast_object_list(box)
    return box[0]


def my_share(values: list) -> list:
    """这个进程分到的一段；算完用 gather 接起来。"""
    n, i = num_processes(), process_index()
    return values[len(values) * i // n : len(values) * (i + 1) // n]


def gather(values: list) -> list:
    """各进程的列表按进程号接成一个，各进程都得到它。"""
    if num_processes() == 1:
        return values
    from accelerate.utils import gather_object

    return gather_object(values)


def merge_stats(stats: dict[str, float], largest: set[str]) -> dict[str, float]:
    """各进程的统计合成一份：largest 里的取最大，其余取平均。"""
    every = gather([stats])
    merged = {}
    for name in stats:
        values = [each[name] for each in every]
        merged[name] = max(values) if name in largest else sum(values) / len(values)
    return merged


def without_launcher() -> dict[str, str]:
    """环境变量，去掉启动器设的：主进程另开的子进程自己跑，不来凑数。"""
    return {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHER)}


def lost_another(error: Exception) -> bool:
    """这个错误是不是别的进程先停了、连接断掉引起的：真正的原因在那边。"""
    return num_processes() > 1 and any(
        sign in str(error) for sign in ("gloo", "NCCL", "Connection closed", "Connection reset")
    )
