"""CPU 上几件互不相干的计算同时做，各用一份核。"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from nlp_common.base.device import accelerator_available
from nlp_common.base.processes import num_processes


def together(*tasks: Callable[[], Any]) -> list[Any]:
    """各个 task 的返回值，次序与 tasks 相同；哪个出错就抛出它的异常（等别的都做完）。

    task 是 ``functools.partial(函数, 参数…)``：它用到什么，一眼看得全。

    小模型的一步是几百个几十微秒的小算子，一个算子分给两个核，光是互相等待就去掉小一半；不如一个核做一件事。
    PyTorch 计算时放开 GIL，所以线程就够了。只有一个核、用加速器（它自己会排队）、几个进程一起训练（各进程的
    通信次序要一致）时，一件件地做，结果相同。no_grad、autocast 是每个线程各自的，要写在函数里面。
    """
    cores = torch.get_num_threads()
    if cores < len(tasks) or accelerator_available() or num_processes() > 1:
        return [task() for task in tasks]
    torch.set_num_threads(cores // len(tasks))
    try:
        with ThreadPoolExecutor(len(tasks)) as pool:
            running = [pool.submit(task) for task in tasks]
        return [each.result() for each in running]
    finally:
        torch.set_num_threads(cores)
