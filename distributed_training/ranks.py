"""在一台电脑上开 n 个进程（gloo），连成一组，各跑同一个函数：没有 GPU 也能看见并行。

    def worker(rank, world_size, size):            # 要写在模块里：别的进程按名字找到它
        x = torch.full((size,), float(rank))
        torch.distributed.all_reduce(x)
        return {"sum": x}                          # 张量、数、字符串，与它们的列表、字典

    results = run_ranks(worker, 4, 1000)           # [0 号返回的, 1 号返回的, …]

哪个进程出了错，别的都停下，主进程说是哪一个、为什么；主进程被杀掉，它们也不留下。
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nlp_common.base.errors import UserError

HOST = "127.0.0.1"
TIMEOUT = 300.0  # 秒：一个进程等别的进程，最多这么久


def run_ranks(
    worker: Callable[..., Any], n: int, *args: Any, port: int = 0, timeout: float = TIMEOUT
) -> list[Any]:
    """开 n 个进程，各跑 ``worker(rank, n, *args)``，返回它们返回的，按进程号排。

    port：进程们在哪个端口碰头，0 是找一个空的；timeout：集合通信最多等几秒。
    worker 抛出的 UserError 原样再抛；别的错误、被杀掉、端口被占，是写明哪个进程、为什么的 UserError。
    """
    if n < 1:
        raise UserError(f"至少要 1 个进程，给的是 {n}：改 --num_processes。")
    store = _open_store(port, n)
    # fork 出来的进程里，OpenMP 的线程池是坏的：从一个只导入过、没有算过的进程里分出来（Windows 没有 fork，重新导入）
    context = multiprocessing.get_context("forkserver" if hasattr(os, "fork") else "spawn")
    context.set_forkserver_preload(["__main__", "torch.distributed", *_slow_imports()])  # 只导入一遍
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(
                target=_run, args=(worker, rank, n, store.port, folder, timeout, args), daemon=True
            )
            for rank in range(n)
        ]
        try:
            for process in processes:
                process.start()
            _watch(processes, Path(folder))
        finally:
            _stop(processes)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(n)]


def _slow_imports() -> list[str]:
    """用 FSDP2 与分片的检查点的脚本：它们自己与用到时才导入的 dynamo 要一两秒，每个进程都导入一遍就慢几倍。"""
    used = [
        name for name in ("torch.distributed.checkpoint", "torch.distributed.fsdp") if name in sys.modules
    ]
    return [*used, "torch._dynamo"] if used else []


def _open_store(port: int, n: int) -> dist.TCPStore:
    """各进程在这里登记、碰头。开在主进程里，端口一开好就是自己的，别人抢不走。"""
    try:
        return dist.TCPStore(HOST, port, n, is_master=True, wait_for_workers=False)
    except (RuntimeError, ValueError, OverflowError) as error:
        raise UserError(
            f"{HOST}:{port} 这个端口用不了（{_short(error)}）：换一个 --port，或不给，自己找。"
        ) from None


def _run(worker, rank: int, n: int, port: int, folder: str, timeout: float, args: tuple) -> None:
    """一个进程从头到尾。出了错写进文件：主进程读了再说。"""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C 由主进程管
    threading.Thread(target=_die_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    try:
        store = dist.TCPStore(HOST, port, n, is_master=False, timeout=timedelta(seconds=timeout))
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=n, timeout=timedelta(seconds=timeout)
        )
        result = worker(rank, n, *args)
        part = Path(folder) / f"{rank}.part"
        torch.save(result, part)
        dist.barrier()  # 谁也不先走：先走的一断开，别人没做完的通信就算失败
        part.rename(part.with_suffix(".pt"))
        dist.destroy_process_group()
    except BaseException as error:
        kind = "user" if isinstance(error, UserError) else "error"
        text = str(error) if kind == "user" else traceback.format_exc()
        # 先写好再露面；时间最早的那个是原因，别的多半是连接跟着断了
        note = Path(folder) / f"{rank}.note"
        note.write_text(f"{time.monotonic()}\n{kind}\n{text}", encoding="utf-8")
        note.rename(note.with_suffix(".failed"))
        sys.stderr.flush()
        os._exit(1)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _watch(processes: list, folder: Path) -> None:
    """等到都做完；有一个失败了，就不等别的。"""
    waiting = {process.sentinel: rank for rank, process in enumerate(processes)}
    while waiting:
        for sentinel in wait(list(waiting)):
            rank = waiting.pop(sentinel)
            processes[rank].join()
            if processes[rank].exitcode != 0:
                raise UserError(_why(rank, processes[rank].exitcode, folder))


def _why(rank: int, code: int, folder: Path) -> str:
    """第一个出错的进程说了什么。"""
    time.sleep(0.2)  # 断开的连接有时比真正的原因先到：等一等别的进程也写下来
    notes = []
    for path in folder.glob("*.failed"):
        when, kind, text = path.read_text(encoding="utf-8").split("\n", 2)
        notes.append((float(when), int(path.stem), kind, text))
    if code < 0:  # 被杀掉的什么也来不及写；别人写的只是连接断了
        name = signal.Signals(-code).name
        return f"{rank} 号进程被 {name} 结束了（内存不够时系统也会这样）；别的进程都停了，什么也没有存下。"
    if not notes:
        return f"{rank} 号进程自己退出了（退出码 {code}）；别的进程都停了。"
    _, rank, kind, text = min(notes)
    if kind == "user":
        return text
    return f"{rank} 号进程出了错，别的进程都停了：\n{text}"


def _stop(processes: list) -> None:
    for process in processes:
        if process.is_alive():
            process.kill()
    for process in processes:
        if process.pid is not None:
            process.join()


def _short(error: BaseException) -> str:
    return str(error).splitlines()[0][:120]
