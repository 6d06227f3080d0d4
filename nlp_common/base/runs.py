"""运行记录与输出文件夹：存在即完成，没完成的绝不会被当成完成的。

``outputs/tiny/sft/`` 只要存在就是完整的：模型先写进旁边的工作文件夹 ``.sft.work/``，最后一步才改名过来。
训练中的检查点也在工作文件夹里，随时被打断，再运行同一条命令就从最近一个写完整的检查点继续。
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from nlp_common.base.errors import UserError
from nlp_common.base.processes import is_main

RUN_FILE = "run.json"
NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}  # 没有权限、只读的盘、路径中间有个文件
NOT_HERE = "没有写入权限，或路径不是文件夹：{where}（{why}）。用 --output_dir 换一个可写的文件夹。"
CHECKPOINT_DONE = "complete.json"  # 检查点写完之后才写它；没有它的检查点是半个


def write_text(path: Path, text: str) -> None:
    """先写临时文件再改名：读到的要么是旧内容，要么是新内容。"""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2))


def without_password(url: str) -> str:
    """印出来、记下来的网址里没有密码。"""
    return re.sub(r"(://[^:/@]*):[^@/]*@", r"\1:***@", url)


def load_run(folder: Path) -> dict | None:
    """读已完成的运行记录；文件夹不存在返回 None，存在却没有记录是 UserError。"""
    if not folder.exists():
        return None
    refuse_others(folder)
    try:
        return json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} 存在，但里面没有可用的 {RUN_FILE}（{error.__class__.__name__}），不是一次完整的运行结果。"
            "请移走或删掉这个文件夹，或用 --output_dir 换一个位置。"
        ) from error


def refuse_others(folder: Path) -> None:
    """folder 里是别的东西（没有 run.json）就是 UserError：不是这里训练的结果，不能替换掉，也不该叫人删掉。"""
    if not folder.exists() or (folder / RUN_FILE).exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} 是一个文件，结果要写成文件夹：请用 --output_dir 换一个位置。")
    inside = sorted(item.name for item in folder.iterdir())
    if inside:
        names = "、".join(inside[:3]) + (f" 等 {len(inside)} 项" if len(inside) > 3 else "")
        raise UserError(
            f"{folder} 里是别的东西（{names}；没有 {RUN_FILE}），不是这里训练的结果，不会动它。"
            f"请换一个还不存在的文件夹，例如 --output_dir {folder / 'result'}。"
        )


def run_record(path: str) -> dict:
    """运行记录；不是我们训练的模型没有，返回空的。"""
    folder = Path(path)
    return (load_run(folder) or {}) if (folder / RUN_FILE).exists() else {}


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def whole_safetensors(path: Path) -> bool:
    """safetensors 的文件头写明了总长度，截断的文件一打开就能发现，不必读完。"""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):
            return True
    except (OSError, SafetensorError):
        return False


def differences(recorded: dict, wanted: dict) -> list[str]:
    """逐项列出不同的设置，例如 ``learning_rate：已有 0.001，这次 0.002``。"""
    keys = sorted(recorded.keys() | wanted.keys())
    return [
        f"{key}：已有 {recorded.get(key)}，这次 {wanted.get(key)}"
        for key in keys
        if recorded.get(key) != wanted.get(key)
    ]


class RunFolder:
    """一次运行的输出文件夹 ``path`` 与它旁边的工作文件夹、锁。用 open_run 打开。"""

    def __init__(self, path: Path):
        self.path = path
        self.work = path.with_name(f".{path.name}.work")
        self.checkpoints = self.work / "checkpoints"
        self._final = self.work / "final"
        self._old = path.with_name(f".{path.name}.old")

    def finished(self, wanted: dict) -> dict | None:
        """已完成且设置相同则返回记录；设置不同是 UserError，列出每一项不同。"""
        run = load_run(self.path)
        if run and (changed := differences(run["fingerprint"], wanted)):
            raise UserError(
                f"{self.path} 里已有一次设置不同的结果：\n  "
                + "\n  ".join(changed)
                + "\n加 --retrain 重新训练并替换它，或用 --output_dir 另存一份。"
            )
        return run

    def start(self, wanted: dict) -> None:
        """准备工作文件夹：同样设置的半途结果留着继续，设置变了就从头来（并说明）。"""
        settings = self.work / "fingerprint.json"
        if settings.exists():
            with contextlib.suppress(ValueError):
                if differences(json.loads(settings.read_text(encoding="utf-8")), wanted):
                    if self.latest_checkpoint():  # 数据有错等，还没开始训练就停下的，不必说
                        print("上次没有训练完，而这次的设置（或上一阶段的模型）不同：从头训练。")
                    shutil.rmtree(self.work)
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        write_json(settings, wanted)

    def latest_checkpoint(self) -> Path | None:
        """最近一个写完整的检查点。"""
        done = [p.parent for p in self.checkpoints.glob(f"*/{CHECKPOINT_DONE}")]
        return max(done, key=lambda p: int(p.name.rsplit("-", 1)[1]), default=None)

    def finish(self, write: Callable[[Path], object], record: dict) -> dict:
        """write(文件夹) 写出模型；补上 run.json 后一步改名成 path。返回写下的记录。"""
        shutil.rmtree(self._final, ignore_errors=True)
        self._final.mkdir(parents=True)
        write(self._final)
        weights = sorted(self._final.glob("*.safetensors"))
        record["id"] = hashlib.sha256("".join(file_sha256(p) for p in weights).encode()).hexdigest()[:16]
        write_json(self._final / RUN_FILE, record)
        self._swap()
        return record

    def _swap(self) -> None:
        if self.path.exists():
            shutil.rmtree(self._old, ignore_errors=True)
            self.path.rename(self._old)
        self._final.rename(self.path)
        shutil.rmtree(self._old, ignore_errors=True)
        shutil.rmtree(self.work, ignore_errors=True)

    def recover(self) -> None:
        """上次恰好在两次改名之间被打断：新结果已写好就换上，否则放回旧的。"""
        if not self.path.exists() and self._old.exists():
            if (self._final / RUN_FILE).exists():
                self._swap()
            else:
                self._old.rename(self.path)


@contextlib.contextmanager
def open_run(path: Path) -> Iterator[RunFolder]:
    """锁住并打开一个输出文件夹；另一个进程正在用它时是 UserError，说出是哪个进程。

    锁由操作系统持有：进程被 kill -9 之后锁自动放开，不会留下死锁。几个进程一起训练时，由主进程锁。
    """
    folder = RunFolder(path)
    if not is_main():
        yield folder
        return
    owner = path.with_name(f".{path.name}.owner.json")
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        if path.parent.exists() and not path.parent.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path.parent))
        _make_folder(path.parent)
        with lock.acquire(timeout=0):
            write_json(
                owner,
                {
                    "pid": os.getpid(),
                    "host": socket.gethostname(),
                    "started": time.strftime("%Y-%m-%d %H:%M:%S"),
                    "command": " ".join(sys.argv),
                },
            )
            try:
                folder.recover()
                refuse_others(path)  # --retrain 也只替换我们自己的结果
                yield folder
            finally:
                with contextlib.suppress(OSError):
                    owner.unlink()
    except Timeout:
        if not Path(lock.lock_file).exists():  # /proc 这样不能建文件的地方，也是"锁不上"
            raise UserError(NOT_HERE.format(where=path.parent, why="建不了文件")) from None
        raise UserError(
            f"{path} 正被另一个进程使用{_describe_owner(owner)}。等它结束，或用 --output_dir 换一个位置。"
        ) from None
    except Exception as error:
        if disk_full(error, path):
            raise UserError(
                f"磁盘满了，写不下 {path}（还剩 {_free_bytes(path) / 1e6:.1f} MB）。"
                "清出空间后再运行同一条命令，会从最近一个写完整的检查点继续；或用 --output_dir 换一个磁盘。"
            ) from error
        if isinstance(error, OSError) and error.errno in NOT_WRITABLE:
            raise UserError(NOT_HERE.format(where=error.filename or path, why=error.strerror)) from error
        raise


def check_writable(path: Path) -> None:
    """结果放不到 path 就是 UserError：在准备上一阶段的模型之前就说。只看不建；建的时候（open_run）还会再看。"""
    if path.is_file():
        raise UserError(f"{path} 是一个文件，结果要写成文件夹：请用 --output_dir 换一个位置。")
    above = next(each for each in path.absolute().parents if os.path.exists(each))
    if not above.is_dir() or not os.access(above, os.W_OK):
        why = "建不了文件" if above.is_dir() else "不是文件夹"
        raise UserError(NOT_HERE.format(where=above, why=why))


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:  # 上一级明明在：/proc 这样的地方不给建
        raise PermissionError(errno.EACCES, error.strerror, error.filename) from error


def disk_full(error: BaseException | None, path: Path) -> bool:
    """这个错误是不是因为磁盘满了。

    写 safetensors、torch 的检查点失败时，它们抛的不是 OSError，有的也不说原因；所以再看一眼盘上还剩多少。
    """
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        if type(error).__name__ == "SafetensorError" or "PytorchStreamWriter" in str(error):
            return "No space left" in str(error) or _free_bytes(path) < 1 << 20
        error = error.__cause__ or error.__context__
    return False


def _free_bytes(path: Path) -> int:
    existing = next(each for each in (path, *path.parents) if each.exists())
    return shutil.disk_usage(existing).free


def _describe_owner(owner: Path) -> str:
    try:
        who = json.loads(owner.read_text(encoding="utf-8"))
        return f"（进程 {who['pid']}，主机 {who['host']}，{who['started']} 开始：{who['command']}）"
    except (OSError, ValueError, KeyError):
        return ""
