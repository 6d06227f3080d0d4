"""运行别人写的代码，只要一句判决：测试走完了没有。它做什么都不应当伤到这台机器。

    verdict = run_answer(answer, test, "add", limits=Limits(seconds=5))
    verdict.passed, verdict.kind, verdict.detail

一份答案两个子进程（sandbox_child.py）：出题人拿着测试，答题人只有答案，两边之间只过普通数据。主进程等出题人的判决，
等不到就把两个都结束。计时用等待，不用 SIGALRM：Windows 没有它，用它的评测在那里每题都是 0 分。

各层限制里哪些在这台机器上有，layers() 照实说。这是防模型写错、写坏的代码；要防存心攻击的人，请放进容器或虚拟机。
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

CHILD = Path(__file__).resolve().with_name("sandbox_child.py")
WINDOWS = os.name == "nt"
STARTUP = 60.0  # 秒：两个进程起得来的时间，不算在答案的时间里
AT_MOST = 1 << 16  # 判决最多多少字节

KINDS = {
    "passed": "通过",
    "wrong": "答错",
    "error": "出错",
    "syntax": "语法错",
    "timeout": "超时",
    "memory": "内存太多",
    "output": "输出太多",
    "forbidden": "做了不许做的事",
    "exited": "自己退出",
}


@dataclass(frozen=True)
class Limits:
    seconds: float = 5.0  # 一份答案从开始到测试走完
    memory_mb: int = 512
    output_bytes: int = 1 << 20


@dataclass(frozen=True)
class Verdict:
    kind: str
    detail: str = ""
    seconds: float = 0.0
    held: tuple[str, ...] = ()  # 内核给答案设上了哪些限制
    output: str = ""  # 测试走完时，它放在 output 里的文字

    @property
    def passed(self) -> bool:
        return self.kind == "passed"

    def text(self) -> str:
        return KINDS[self.kind] + (f"：{self.detail}" if self.detail else "")


def run_answer(
    answer: str, test: str, entry_point: str, helpers: str = "", limits: Limits | None = None
) -> Verdict:
    """运行一份答案（整段代码），测试里的 check(函数) 从头到尾走完才是 passed。

    helpers：题面里的其他函数，测试可能要用；它和 test 来自题目文件，是信得过的一边。
    """
    limits = limits or Limits()
    with tempfile.TemporaryDirectory(prefix="nlp-sandbox-", ignore_cleanup_errors=True) as folder:
        paper = {
            "answer": answer,
            "test": test,
            "entry_point": entry_point,
            "helpers": helpers,
            "folder": folder,
            "limits": asdict(limits),
            "seal": secrets.token_hex(16),  # 判决上要有它：答案那边没见过
        }
        judge = Judge(folder, limits)
        try:
            return judge.verdict(paper)
        finally:
            judge.end()


PROGRAM = """
class Lines:
    def __init__(self):
        self.kept, self.room = [], %d
    def write(self, text):
        text = str(text)
        self.kept.append(text[: self.room])
        self.room = max(0, self.room - len(text))
        return len(text)
    def flush(self):
        pass

def run(source):
    import sys, traceback
    lines = sys.stdout = Lines()
    try:
        exec(compile(source, "program.py", "exec"), {"__name__": "__main__"})
    except SystemExit:
        pass
    except MemoryError:
        raise
    except BaseException as error:
        places = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "program.py"]
        place = error.lineno if isinstance(error, SyntaxError) else places[-1] if places else None
        lines.room += 400
        lines.write(f"{type(error).__name__}: {str(error)[:300]}" + (f"（第 {place} 行）" if place else ""))
    return "".join(lines.kept)
"""
OUTPUT_CHARS = 8000  # 印出来的留几个字


def run_program(source: str, limits: Limits | None = None) -> Verdict:
    """运行一段程序：印出来的在 output 里，太长的只留开头。程序出的错也印在里面；做了不许做的、超时的，看 kind。"""
    test = f"def check(run):\n    global output\n    output = run({source!r})\n"
    return run_answer(PROGRAM % OUTPUT_CHARS, test, "run", limits=limits)


class Judge:
    """出题人那个进程：交考卷，等判决，最后连同答题人一起结束。"""

    def __init__(self, folder: str, limits: Limits):
        self.limits, self.job = limits, None
        self.answer_pid: int | None = None
        options: dict[str, Any] = (
            {"creationflags": 0x08000000} if WINDOWS else {"start_new_session": True}
        )  # 不开窗口 / 自成一组
        self.process: subprocess.Popen[bytes] = subprocess.Popen(
            [python(), "-I", "-S", "-B", "-X", "utf8", str(CHILD), "judge"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=environment(folder),
            **options,
        )
        if WINDOWS:
            self.job = put_in_job(self.process, limits)  # 它还在等考卷，来得及
        self.lines: queue.Queue = queue.Queue()
        self.reader = threading.Thread(target=read_lines, args=(self.process.stdout, self.lines), daemon=True)
        self.reader.start()

    def verdict(self, paper: dict) -> Verdict:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(paper).encode("ascii") + b"\n")
            self.process.stdin.flush()  # 不关：主进程没了，那边读到断开，自己结束
        except OSError:
            pass  # 那边没起来：下面等不到消息
        started = self.next_message(STARTUP)
        if not started or "answer_pid" not in started:
            return Verdict("error", "沙箱的进程没有起来")
        self.answer_pid = started["answer_pid"]
        begun = time.monotonic()
        message = self.wait(begun + self.limits.seconds)
        seconds = time.monotonic() - begun
        if message == "timeout":
            return Verdict("timeout", f"{self.limits.seconds:g} 秒没有做完", seconds)
        if message == "memory":
            return Verdict("memory", f"超过 {self.limits.memory_mb} MB", seconds)
        if not isinstance(message, dict) or message.get("seal") != paper["seal"]:
            return Verdict("exited", "出题的进程没了，没有判决", seconds)
        held, output = tuple(message.get("held", ())), str(message.get("output", ""))
        return Verdict(message["kind"], message["detail"], seconds, held, output)

    def wait(self, deadline: float) -> Any:
        """等判决；内核不管内存的系统（macOS），一边等一边看它用了多少。"""
        while (left := deadline - time.monotonic()) > 0:
            message = self.next_message(left if kernel_limits_memory() else min(left, 0.1))
            if message is not None:
                return message
            if not kernel_limits_memory() and resident_mb(self.answer_pid or 0) > self.limits.memory_mb:
                return "memory"
        return "timeout"

    def next_message(self, seconds: float) -> Any:
        """出题人的下一句；断了是 {}，到时间还没有是 None。"""
        try:
            line = self.lines.get(timeout=seconds)
        except queue.Empty:
            return None
        try:
            return json.loads(line) if line else {}
        except ValueError:
            return {}

    def end(self) -> None:
        """结束整棵进程树；早已结束的不碍事。"""
        if WINDOWS:
            end_on_windows(self.process, self.job)
        else:
            for end, number in ((os.kill, self.answer_pid), (os.killpg, self.process.pid)):
                try:
                    if number:
                        end(number, signal.SIGKILL)
                except (ProcessLookupError, PermissionError):
                    pass
        self.process.kill()
        self.process.wait()
        self.reader.join(5)
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                if stream:
                    stream.close()


def python() -> str:
    """真正的解释器：Windows 的虚拟环境里，python.exe 只是再开一个进程的壳。"""
    return getattr(sys, "_base_executable", None) or sys.executable


def environment(folder: str) -> dict[str, str]:
    """读者的环境变量（钥匙、代理、路径）一个也不给。"""
    kept = {name: os.environ[name] for name in ("SYSTEMROOT",) if name in os.environ}  # Windows 起进程要它
    return kept | {"HOME": folder, "TMPDIR": folder, "TEMP": folder, "TMP": folder}


def read_lines(stream: Any, lines: queue.Queue) -> None:
    while line := stream.readline(AT_MOST):
        lines.put(line)
    lines.put(b"")


# ---------------------------------------------------------------- 各系统的不同


def kernel_limits_memory() -> bool:
    """内核自己管内存：Linux 的 RLIMIT_AS，Windows 的作业对象。macOS 设得上，不管用。"""
    return WINDOWS or sys.platform.startswith("linux")


def resident_mb(pid: int) -> float:
    """一个进程现在占多少内存；看不到是 0。"""
    try:
        done = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, timeout=2)
        return int(done.stdout.strip() or 0) / 1024
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return 0.0


def put_in_job(process: subprocess.Popen, limits: Limits) -> Any:
    """Windows：装进作业对象，成了就返回它；不成是 None，结束时改用 taskkill。"""
    from nlp_common.sandbox.windows_job import Job

    try:
        job = Job(limits.memory_mb)
    except (OSError, AttributeError):
        return None
    try:
        job.add(int(process._handle))  # type: ignore[attr-defined]
        return job
    except OSError:
        job.close()
        return None


def end_on_windows(process: subprocess.Popen, job: Any) -> None:
    if job:
        job.kill()
        job.close()
    else:
        subprocess.run(["taskkill", "/T", "/F", "/PID", str(process.pid)], capture_output=True)


HELD = {
    "RLIMIT_AS": "内存",
    "RLIMIT_CPU": "CPU 秒数",
    "RLIMIT_FSIZE": "写文件",
    "RLIMIT_NPROC": "再开进程",
    "seccomp": "系统调用（seccomp：开进程、写文件、联网、杀进程）",
}


def layers() -> list[str]:
    """这台机器上有哪几层限制：真的运行一份答案，问它内核设上了哪些。没有的也说。"""
    verdict = run_answer("def one():\n    return 1\n", "def check(f):\n    assert f() == 1\n", "one")
    if not verdict.passed:
        return [f"沙箱在这台机器上不能用：{verdict.text()}"]
    held = set(verdict.held)
    if not kernel_limits_memory():
        held.discard("RLIMIT_AS")  # macOS：设得上，不管用
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        held.discard("RLIMIT_NPROC")  # 也管不到 root
    missing = [what for name, what in HELD.items() if name not in held]
    found = [
        "答案与测试在两个进程里，之间只过普通数据；到时间结束整棵进程树",
        "临时文件夹里、python -I -S、环境变量一个不给，打印的有上限",
        "审计钩子：开进程、写文件、联网、结束别的进程，一做就结束",
        "内核管着：" + ("、".join(what for name, what in HELD.items() if name in held) or "没有"),
    ]
    if missing:
        found.append("内核没有另外限的：" + "、".join(missing))
    if WINDOWS:
        found.append("Windows：作业对象限内存与进程数，建不成就只有 taskkill")
    elif not kernel_limits_memory():
        found.append("内存每 0.1 秒看一次，超过就结束")
    return found
