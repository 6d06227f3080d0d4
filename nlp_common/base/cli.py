"""命令行入口：把能预料的错误变成一句读者能照着做的话，而不是一屏 traceback。"""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from nlp_common.base.errors import UserError
from nlp_common.base.processes import is_main, leave, lost_another

INTERRUPTED = "\n已中断。有结果文件夹的脚本，再运行同一条命令：做完的部分不重做，训练从最近的检查点继续。"


def say_interrupted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """还没有走到 run_main 就按了 Ctrl-C（慢的机器上，导入库要好几秒）：也只说一句，不是一屏 traceback。"""
    if issubclass(kind, KeyboardInterrupt):
        print(INTERRUPTED, file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = say_interrupted  # 每个脚本最先导入的就是这个文件


def run_main(main: Callable[[], object]) -> None:
    """运行 main；UserError 退出码 2，Ctrl-C 退出码 130，磁盘满退出码 2，读输出的先走了退出码 141，其余异常照常抛出。

    accelerate launch 开了几个进程时，只有主进程往屏幕上打印。
    """
    streams: tuple[Any, ...] = (sys.stdin, sys.stdout, sys.stderr)
    for stream in streams:  # 终端的编码读不懂、写不出的字换成问号，不中途报错
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # 输出接到文件或管道时，也随时看得到
    if not is_main():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 （一直开到进程结束）
    try:
        try:
            _run(main)
        finally:
            sys.stdout.flush()  # 读输出的已经走了，就在这里出错，不等到解释器退出时
    except UserError as error:
        if not is_main():
            time.sleep(2)  # 同样的错误主进程也有，它说过之后启动器就来结束这里；还活着，才是这里独有的
        print(f"错误：{error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        if is_main():
            print(INTERRUPTED, file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        _leave_if_unread()
        raise
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(
            f"错误：磁盘已满，写不下 {error.filename or '结果'}；清出空间后再运行同一条命令。",
            file=sys.stderr,
        )
        sys.exit(2)


def _leave_if_unread() -> None:
    """输出接到 ``head`` 之类，它读够就走了：安静地结束，退出码与被 SIGPIPE 结束的程序相同。"""
    try:
        print(flush=True)  # 再写一次：还出错就是它，不然断的是别的管道
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # 解释器退出时还要写一次
        sys.exit(141)


def _run(main: Callable[[], object]) -> None:
    try:
        main()
        leave()
    except RuntimeError as error:
        if lost_another(error):
            time.sleep(10)  # 别用一屏"连接断了"盖住那个进程说的原因；启动器马上会来结束这里
        raise
