"""CPU 上训练时，释放了的内存留在进程里接着用，不还给系统。"""

from __future__ import annotations

import ctypes
import os
import sys

# glibc 的 malloc.h 里的编号
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """告诉 glibc 的 malloc：32 MB 以下的内存从堆里分，堆顶空出不到 1 GB 就不还给系统（malloc(3)、mallopt(3)）。

    默认的做法是几 MB 的张量一释放就还掉，下一步再要，系统得一页一页（4 KB）地重新给、清零：一步预训练要缺页
    一千次上下，留着就只有几十次，快百分之几。不是 glibc（Windows、macOS、musl），或设了 NLP_LEARNING_KEEP_MEMORY=0，就什么也不做。
    """
    if not sys.platform.startswith("linux") or os.environ.get("NLP_LEARNING_KEEP_MEMORY") == "0":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 32 << 20)
        mallopt(M_TRIM_THRESHOLD, 1 << 30)
