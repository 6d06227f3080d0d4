"""一行一件事的日志（JSONL），只在末尾添：登记簿、工作流的进度、灰度的流量都记成它。

    append(path, {"event": "register", …})    # 返回时已在盘上；几个进程可以一起写
    read(path)                                 # [{…}, …]：只有写完整的行

写一半被杀掉，只会留下末尾的半行（没有换行）：那件事还没有做成。读的人不看它；下一个写的人先把它挪到 <path>.half 再写。
磁盘满了，写进去的那一截退回去，文件与写之前一样。中间的一行坏了，是别的原因（有人改过，盘坏了）：不猜，说出是第几行。
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from nlp_common.base.errors import UserError

WAIT = 10.0  # 别的进程写一行只要几毫秒；等了这么久还没轮到，就不是平常的事


def read(path: Path) -> list[dict]:
    """全部写完整的行；没有这个文件是空的。坏的一行是 UserError。"""
    try:
        return _events(path, path.read_bytes())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"读不了 {path}：{error.strerror or error}。") from error


def append(path: Path, event: dict, sync: bool = True) -> None:
    """在末尾添一行。sync=False 不等它落到盘上：进程被杀不会丢，机器断电会丢最后几行。"""
    with updating(path, sync) as (_, add):
        add(event)


@contextlib.contextmanager
def updating(path: Path, sync: bool = True) -> Iterator[tuple[list[dict], Callable[[dict], None]]]:
    """锁住文件，给出 (已有的各行, 添一行的函数)：先看再写的事，两个进程不会同时做。

    锁由操作系统持有：持有它的进程被 kill -9，锁自动放开。等了 WAIT 秒还锁着是 UserError。
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock").acquire(timeout=WAIT):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644)
            try:
                _set_half_line_aside(path, descriptor)

                def add(event: dict) -> None:
                    _write_line(descriptor, json.dumps(event, ensure_ascii=False), sync)

                yield _events(path, _whole(descriptor)), add
            finally:
                os.close(descriptor)
    except Timeout:
        raise UserError(
            f"{path} 被另一个进程锁着，等了 {WAIT:g} 秒：什么也没有写。等它写完再运行同一条命令；"
            f"看是谁锁着：lsof {path}.lock（Windows 用资源监视器）。"
        ) from None
    except OSError as error:
        raise UserError(f"{_why(error, path)}：这一行没有写进去，已有的都在。") from error


def _why(error: OSError, path: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"磁盘满了，写不下 {path}。清出空间后再运行同一条命令"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"没有写 {error.filename or path} 的权限（{error.strerror}）。换一个可写的文件夹"
    if error.errno in (errno.EISDIR, errno.ENOTDIR, errno.EEXIST):
        return f"{path} 的位置上是别的东西（{error.strerror}）。换一个文件名"
    return f"写不了 {path}（{error.strerror or error}）"


def _whole(descriptor: int) -> bytes:
    size = os.lseek(descriptor, 0, os.SEEK_END)
    os.lseek(descriptor, 0, os.SEEK_SET)
    content = b""
    while len(content) < size and (block := os.read(descriptor, size - len(content))):
        content += block
    return content


def _events(path: Path, content: bytes) -> list[dict]:
    """换行结尾的各行；末尾的半行不算。"""
    events = []
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        try:
            event = json.loads(line)
        except ValueError:  # 不是 JSON，或不是 UTF-8
            event = None
        if not isinstance(event, dict):
            raise UserError(
                f"{path} 第 {number} 行不是一个完整的 JSON 对象：不是写了一半（那只会在末尾），是被改过或盘坏了。"
                "从备份取回这个文件，或把这一行改好、删掉，再运行同一条命令。"
            )
        events.append(event)
    return events


def _set_half_line_aside(path: Path, descriptor: int) -> None:
    """末尾的半行：其实写完了、只差换行的补上；不然挪到 <path>.half。"""
    content = _whole(descriptor)
    whole = content.rfind(b"\n") + 1
    half = content[whole:]
    if not half:
        return
    try:
        if isinstance(json.loads(half), dict):
            _write_all(descriptor, b"\n")
            return
    except ValueError:
        pass
    with open(f"{path}.half", "ab") as file:
        file.write(half + b"\n")
    os.ftruncate(descriptor, whole)
    print(f"{path.name} 的末尾有上次没写完的半行（{len(half)} 个字节），已挪到 {path.name}.half。")


def _write_line(descriptor: int, line: str, sync: bool) -> None:
    """写一行；写到一半出错（磁盘满），退回原来的长度：截短不需要空间。"""
    before = os.lseek(descriptor, 0, os.SEEK_END)
    try:
        _write_all(descriptor, line.encode() + b"\n")
        if sync:
            os.fsync(descriptor)  # 有的盘到这时才说满了
    except OSError:
        os.ftruncate(descriptor, before)
        raise


def _write_all(descriptor: int, content: bytes) -> None:
    while content:
        content = content[os.write(descriptor, content) :]
