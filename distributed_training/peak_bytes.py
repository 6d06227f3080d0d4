"""一段计算，内存最多时比开始多占几字节：torch 在 CPU 上分配、释放的每一块都记下来，加起来的最高点。

进程的 VmHWM 只升不降，量不出后一次比前一次少；这里量的是张量，与 GPU 上的 max_memory_allocated 是一回事。
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator

from torch.profiler import ProfilerActivity, profile


def peak_bytes(work: Callable[[], object]) -> int:
    """运行 work()，返回它分配的内存最多时有几字节（包括最后留下的）。"""
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with _quiet():
        profiler.start()
    try:
        kept = work()  # 留到量完：返回的张量也算占着
    finally:
        with _quiet():
            profiler.stop()
    del kept
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    held = most = 0
    for event in events:
        held += event.nbytes()  # 释放的是负数
        most = max(most, held)
    return most


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """profiler 开始、结束时各往 stderr 写一行调试的话，这两下子不让它写。"""
    sys.stderr.flush()
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)
