"""Linux 内核的系统调用过滤（seccomp-bpf）：开进程、写文件、联网、杀进程，内核就不做。只在答题人的进程里装，装上拆不掉。

审计钩子拦的是 Python 里的路；答案若找到绕过它的 C 代码，还有内核这一道。只认得 x86_64 与 aarch64，别的机器不装。
"""

import ctypes
import errno
import platform
import struct

NO_NEW_PRIVS, SET_SECCOMP, FILTER_MODE = 38, 22, 2  # prctl 的几个编号
ALLOW, KILL, ERROR = 0x7FFF0000, 0x80000000, 0x00050000
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # BPF 指令
NUMBER, ARCH, ARGUMENT = 0, 4, 16  # struct seccomp_data 里的位置；每个参数 8 个字节，只看低 4 个
WRITING = 0o1 | 0o2 | 0o100 | 0o1000  # O_WRONLY、O_RDWR、O_CREAT、O_TRUNC
THREAD = 0x10000  # clone 的 CLONE_THREAD：线程可以，进程不行
UNIX = 1  # AF_UNIX：只在本机

MACHINES = {
    "x86_64": {
        "arch": 0xC000003E,
        # fork vfork execve execveat kill tkill tgkill connect bind ptrace process_vm_writev setsid setpgid
        # unlink unlinkat rename renameat renameat2 mkdir mkdirat rmdir link linkat symlink symlinkat creat truncate
        # chmod fchmod fchmodat fchmodat2 chown fchown lchown fchownat setrlimit prlimit64 unshare setns mount umount2
        # pidfd_open pidfd_send_signal io_uring_setup bpf
        "never": (
            *(57, 58, 59, 322, 62, 200, 234, 42, 49, 101, 311, 112, 109),
            *(87, 263, 82, 264, 316, 83, 258, 84, 86, 265, 88, 266, 85, 76),
            *(90, 91, 268, 452, 92, 93, 94, 260, 160, 302, 272, 308, 165, 166, 434, 424, 425, 321),
        ),
        "clone": 56,
        "socket": 41,
        "open": ((2, 1), (257, 2)),  # open、openat：编号，flags 是第几个参数
    },
    "aarch64": {
        "arch": 0xC00000B7,
        "never": (
            *(221, 281, 129, 130, 131, 203, 200, 117, 271, 157, 154),
            *(35, 38, 276, 34, 37, 36, 45, 52, 53, 452, 54, 55),
            *(164, 261, 97, 268, 40, 39, 434, 424, 425, 280),
        ),
        "clone": 220,
        "socket": 198,
        "open": ((56, 2),),
    },
}
CLONE3, OPENAT2 = 435, 437  # 参数在内存里，过滤器看不到：说没有这个调用，libc 就改用旧的


def program(machine: dict) -> list[tuple[int, int, int, int]]:
    """过滤器：一条条 (指令, 成立跳几步, 不成立跳几步, 数)。"""
    refuse, missing = (RETURN, 0, 0, ERROR | errno.EPERM), (RETURN, 0, 0, ERROR | errno.ENOSYS)
    lines = [(LOAD, 0, 0, ARCH), (EQUAL, 1, 0, machine["arch"]), (RETURN, 0, 0, KILL), (LOAD, 0, 0, NUMBER)]
    if machine["arch"] == MACHINES["x86_64"]["arch"]:
        lines += [(AT_LEAST, 0, 1, 0x40000000), refuse]  # x32：同一件事的另一套编号
    for number in machine["never"]:
        lines += [(EQUAL, 0, 1, number), refuse]
    for number in (CLONE3, OPENAT2):
        lines += [(EQUAL, 0, 1, number), missing]
    lines += [(EQUAL, 0, 4, machine["clone"]), (LOAD, 0, 0, ARGUMENT), (ANY_BIT, 1, 0, THREAD), refuse]
    lines += [(RETURN, 0, 0, ALLOW)]
    lines += [(EQUAL, 0, 4, machine["socket"]), (LOAD, 0, 0, ARGUMENT), (EQUAL, 1, 0, UNIX), refuse]
    lines += [(RETURN, 0, 0, ALLOW)]
    for number, place in machine["open"]:
        lines += [(EQUAL, 0, 4, number), (LOAD, 0, 0, ARGUMENT + 8 * place), (ANY_BIT, 0, 1, WRITING), refuse]
        lines += [(RETURN, 0, 0, ALLOW)]
    return [*lines, (RETURN, 0, 0, ALLOW)]


class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("lines", ctypes.c_void_p)]


def install() -> bool:
    """给这个进程（和以后的线程）装上过滤器；装不上是 False。"""
    machine = MACHINES.get(platform.machine())
    if machine is None:
        return False
    lines = program(machine)
    packed = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in lines))
    filter_ = Program(len(lines), ctypes.addressof(packed))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
    if prctl(NO_NEW_PRIVS, 1, 0, 0, 0):
        return False
    return prctl(SET_SECCOMP, FILTER_MODE, ctypes.addressof(filter_), 0, 0) == 0
