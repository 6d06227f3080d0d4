"""命令行入口：把能预料的错误变成一句读者能照着做的话，而不是一屏 traceback。"""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable


class UserError(Exception):
    """读者能自己改好的错误：消息要说清哪里错、错在什么、用哪条命令或哪个参数改。"""


def run_main(main: Callable[[], object]) -> None:
    """运行 main；UserError 退出码 2，Ctrl-C 退出码 130，磁盘满退出码 2，其余异常照常抛出。"""
    sys.stdout.reconfigure(line_buffering=True)  # 输出接到文件或管道时，也随时看得到
    try:
        main()
    except UserError as error:
        print(f"错误：{error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\n已中断。训练类脚本再运行同一条命令，会从最近的检查点继续。", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(
            f"错误：磁盘已满，写不下 {error.filename or '结果'}；清出空间后再运行同一条命令。",
            file=sys.stderr,
        )
        sys.exit(2)
