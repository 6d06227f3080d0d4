"""只读一个文件夹里的文件：没有 ..，没有绝对路径，链接一个也不跟，太大的、不是文字的说清楚。tools.py 的 read_file、list_files。

常见的写法是先 realpath 再看开头对不对，然后 open：看过之后、打开之前，有人把文件换成链接，就读出去了（TOCTOU）。
这里从文件夹的句柄起一层一层往下开（openat + O_NOFOLLOW）：开到的就是看过的，换不掉；上层是链接的也开不开。
Windows 没有 openat：打开以后再看开到的是谁，与路径说的对不上就不读。
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from nlp_common.base.errors import UserError
from tool_calls import ToolError

MOST_BYTES = 1 << 20  # 一个文件最多多大
MOST_NAMES = 200  # 一次列出几个
MOST_PARTS = 20  # 路径最多几层
OPENAT = os.open in os.supports_dir_fd and hasattr(os, "O_NOFOLLOW")
FLAGS = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # Windows 的设备


def check_folder(folder: str) -> Path:
    """--folder：有、是文件夹。它自己可以是链接：是读者说的。"""
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise UserError(f"--folder {folder}：{'不是文件夹' if path.exists() else '没有这个文件夹'}。")
    return path.resolve()


def parts_of(path: str) -> list[str]:
    """一个路径 → 一层一层的名字；出得去的、藏着的、Windows 有别的意思的，都不收。"""
    if "\0" in path:
        raise ToolError("路径里不能有空字符。")
    plain = path.replace("\\", "/")
    if plain.startswith(("/", "~")) or ":" in plain:
        raise ToolError("只能写文件夹里的相对路径，如 notes/a.txt。")
    parts = [part for part in plain.split("/") if part not in ("", ".")]
    if len(parts) > MOST_PARTS or any(len(part.encode("utf-8", "replace")) > 255 for part in parts):
        raise ToolError("路径太长。")
    for part in parts:
        if part.strip(" .") == "" or part == "..":
            raise ToolError("路径里不能有 ..：只读这个文件夹里面的。")
        if part.startswith("."):
            raise ToolError("名字以 . 开头的不读：那里常放着钥匙与设置。")
        if DEVICES.fullmatch(part) or part != part.rstrip(" ."):
            raise ToolError("没有这个文件。")
    return parts


@contextlib.contextmanager
def opened(root: Path, parts: list[str]) -> Iterator[int]:
    """root 里 parts 说的文件或文件夹，打开了的句柄。"""
    try:
        descriptor = open_by_steps(root, parts) if OPENAT else open_and_compare(root, parts)
    except FileNotFoundError:
        raise ToolError(f"没有 {'/'.join(parts)[:80]}。") from None
    except OSError as error:
        raise ToolError(reason(error)) from None
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def reason(error: OSError) -> str:
    """打不开，为什么；不带路径。"""
    import errno

    told = {
        errno.ELOOP: "是一个链接：链接不跟，它可能通到文件夹外面。",
        errno.EMLINK: "是一个链接：链接不跟，它可能通到文件夹外面。",
        errno.ENOTDIR: "路径的中间不是文件夹（或者是链接：链接不跟）。",
        errno.EACCES: "没有读它的权限。",
        errno.EPERM: "没有读它的权限。",
    }
    return told.get(error.errno or 0, f"打不开：{error.strerror or '不知为什么'}。")


def open_by_steps(root: Path, parts: list[str]) -> int:
    """从 root 起一层一层地开，每一层都不跟链接。"""
    current = os.open(root, FLAGS | os.O_DIRECTORY)
    for number, part in enumerate(parts):
        directory = os.O_DIRECTORY if number < len(parts) - 1 else 0
        try:
            below = os.open(part, FLAGS | os.O_NOFOLLOW | directory, dir_fd=current)
        finally:
            os.close(current)
        current = below
    return current


def open_and_compare(root: Path, parts: list[str]) -> int:
    """没有 openat 的系统：打开之后，再看路径真正在哪里、是不是同一个文件。"""
    path = root.joinpath(*parts)
    real = path.resolve(strict=True)
    if real != root and root not in real.parents:
        raise ToolError("是一个链接：链接不跟，它可能通到文件夹外面。")
    descriptor = os.open(real, FLAGS)
    again = path.resolve(strict=True)
    if again != real or not os.path.samestat(os.fstat(descriptor), os.stat(again)):
        os.close(descriptor)
        raise ToolError("读的时候文件换了，不读。")
    return descriptor


def read_text(root: Path, path: str) -> str:
    """一个文字文件。大小看打开了的那一个；读的时候变长了，也只读到上限。"""
    parts = parts_of(path)
    if not parts:
        raise ToolError("要写读哪个文件；有哪些，用 list_files 看。")
    with opened(root, parts) as descriptor:
        about = os.fstat(descriptor)
        if stat.S_ISDIR(about.st_mode):
            raise ToolError(f"{'/'.join(parts)} 是文件夹：里面有什么，用 list_files 看。")
        if not stat.S_ISREG(about.st_mode):
            raise ToolError("不是普通的文件（管道、设备），不读。")
        if about.st_size > MOST_BYTES:
            raise ToolError(f"文件有 {about.st_size} 字节，最多读 {MOST_BYTES} 字节的。")
        content = read_at_most(descriptor, MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise ToolError(f"文件正在变长，超过了 {MOST_BYTES} 字节。")
    return decode(content)


def read_at_most(descriptor: int, size: int) -> bytes:
    pieces, left = [], size
    while left and (piece := os.read(descriptor, min(left, 1 << 16))):
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces)


def decode(content: bytes) -> str:
    """UTF-8（有没有 BOM 都行）、有 BOM 的 UTF-16、GB18030；里面有空字符、控制字符的不是文字。"""
    encodings = ["utf-16"] if content[:2] in (b"\xff\xfe", b"\xfe\xff") else ["utf-8-sig", "gb18030"]
    for encoding in encodings:
        try:
            text = content.decode(encoding)
        except UnicodeDecodeError:
            continue
        if not re.search(r"[\x00-\x08\x0e-\x1a\x1c-\x1f]", text):
            return text.replace("\r\n", "\n")
    raise ToolError(f"不是文字文件（{len(content)} 字节，图片、压缩包一类），读不了。")


def list_folder(root: Path, path: str) -> str:
    """一个文件夹里有什么：名字与大小；藏着的、链接不列。"""
    parts = parts_of(path)
    with opened(root, parts) as descriptor:
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise ToolError(f"{'/'.join(parts)} 不是文件夹：用 read_file 读它。")
        place = descriptor if os.scandir in os.supports_fd else root.joinpath(*parts)
        lines, more = [], 0
        with os.scandir(place) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.is_symlink():
                    continue
                if len(lines) >= MOST_NAMES:
                    more += 1
                elif entry.is_dir(follow_symlinks=False):
                    lines.append(f"{entry.name}/")
                elif entry.is_file(follow_symlinks=False):
                    lines.append(f"{entry.name}（{entry.stat(follow_symlinks=False).st_size} 字节）")
    lines.sort()
    return "\n".join([*lines, f"……还有 {more} 个"] if more else lines) or "（空的）"


def text_files(root: Path, endings: tuple[str, ...], at_most: int) -> Iterator[str]:
    """root 里以 endings 结尾的文件，相对路径，从上到下；藏着的、链接不算。"""
    found = 0
    for folder, folders, names in os.walk(root, followlinks=False):
        folders[:] = sorted(each for each in folders if not each.startswith("."))
        for name in sorted(names):
            if name.lower().endswith(endings) and not name.startswith("."):
                yield (Path(folder) / name).relative_to(root).as_posix()
                found += 1
                if found >= at_most:
                    return
