"""Windows 的作业对象：装进去的进程连同它开的进程，一起限内存、限个数，关掉句柄就一起结束。别的系统用不着。

结构照 Microsoft 文档的 JOBOBJECT_EXTENDED_LIMIT_INFORMATION。本项目的机器上没有 Windows：这里只测过结构的大小与调用的次序，
在 Windows 上建不成作业，sandbox.py 退回 taskkill，并说出来。
"""

from __future__ import annotations

import ctypes
from typing import Any

EXTENDED_LIMITS = 9  # JobObjectExtendedLimitInformation
ACTIVE_PROCESS, PROCESS_MEMORY, JOB_MEMORY, KILL_ON_CLOSE = 0x8, 0x100, 0x200, 0x2000
MOST_PROCESSES = 3  # 出题人、答题人，和 Windows 自己可能带上的一个


class BasicLimits(ctypes.Structure):
    _fields_ = [
        ("per_process_time", ctypes.c_int64),
        ("per_job_time", ctypes.c_int64),
        ("flags", ctypes.c_uint32),
        ("least_working_set", ctypes.c_size_t),
        ("most_working_set", ctypes.c_size_t),
        ("active_processes", ctypes.c_uint32),
        ("affinity", ctypes.c_size_t),
        ("priority", ctypes.c_uint32),
        ("scheduling", ctypes.c_uint32),
    ]


class ExtendedLimits(ctypes.Structure):
    _fields_ = [
        ("basic", BasicLimits),
        ("io", ctypes.c_uint64 * 6),
        ("process_memory", ctypes.c_size_t),
        ("job_memory", ctypes.c_size_t),
        ("peak_process", ctypes.c_size_t),
        ("peak_job", ctypes.c_size_t),
    ]


class Job:
    """一个作业对象。建不成、装不进去是 OSError。"""

    def __init__(self, memory_mb: int, kernel: Any = None):
        self.kernel = kernel or ctypes.WinDLL("kernel32", use_last_error=True)  # type: ignore[attr-defined]
        self.kernel.CreateJobObjectW.restype = ctypes.c_void_p
        self.handle = self.kernel.CreateJobObjectW(None, None)
        if not self.handle:
            raise OSError("CreateJobObject 没有成功")
        limits = ExtendedLimits()
        limits.basic.flags = ACTIVE_PROCESS | PROCESS_MEMORY | JOB_MEMORY | KILL_ON_CLOSE
        limits.basic.active_processes = MOST_PROCESSES
        limits.process_memory, limits.job_memory = memory_mb << 20, 2 * memory_mb << 20
        size = ctypes.sizeof(limits)
        if not self.kernel.SetInformationJobObject(
            ctypes.c_void_p(self.handle), EXTENDED_LIMITS, ctypes.byref(limits), size
        ):
            self.close()
            raise OSError("SetInformationJobObject 没有成功")

    def add(self, process_handle: int) -> None:
        if not self.kernel.AssignProcessToJobObject(
            ctypes.c_void_p(self.handle), ctypes.c_void_p(process_handle)
        ):
            raise OSError("AssignProcessToJobObject 没有成功")

    def kill(self) -> None:
        self.kernel.TerminateJobObject(ctypes.c_void_p(self.handle), 1)

    def close(self) -> None:
        if self.handle:
            self.kernel.CloseHandle(ctypes.c_void_p(self.handle))
            self.handle = None
