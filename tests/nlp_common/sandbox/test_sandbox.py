"""沙箱：危险的答案个个判为没过，什么也没有伤到；对的答案照样通过；每一层单独也拦得住。"""

import ctypes
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nlp_common.sandbox import sandbox, sandbox_child, windows_job
from nlp_common.sandbox.sandbox import Limits, run_answer, run_program

TEST = "def check(f):\n    assert f(1, 2) == 3\n    assert f(5, 0) == 5\n"
LIMITS = Limits(seconds=10, memory_mb=256, output_bytes=100_000)
RIGHT = "def add(a, b):\n    return a + b\n"


def judge(body, test=TEST, limits=LIMITS, **more):
    return run_answer(body, test, "add", limits=limits, **more)


def inside(line):
    """加法的函数，先做一行坏事（做不成也接住异常），再返回对的答案。"""
    return f"import os\ndef add(a, b):\n    try:\n        {line}\n    except BaseException:\n        pass\n    return a + b\n"


def test_right_and_wrong_answers():
    assert judge(RIGHT).passed
    assert judge("def add(a, b):\n    return a - b\n").kind == "wrong"
    assert judge("def add(a, b:\n").kind == "syntax"
    assert judge("total = 3\n").kind == "error"
    assert "ZeroDivisionError" in judge("def add(a, b):\n    return 1 / 0\n").detail


@pytest.mark.parametrize(
    "answer",
    [
        "def add(a, b):\n    while True: pass\n",
        "while True: pass\n",
        "import time\ndef add(a, b):\n    time.sleep(1e6)\n",
        "import threading, time\ndef add(a, b):\n    while True: threading.Thread(target=time.sleep, args=(9,)).start()\n",
    ],
    ids=["loop", "loop while loading", "sleep", "threads"],
)
def test_answers_that_never_end(answer):
    verdict = judge(answer, limits=Limits(seconds=1, memory_mb=256))
    assert not verdict.passed and verdict.kind in ("timeout", "error")
    assert verdict.seconds < 30


@pytest.mark.parametrize("line", ["while True: os.fork()", "os.system('true')", "os.execv('/bin/true', ['true'])",
                                  "__import__('subprocess').run(['true'])",
                                  "__import__('multiprocessing').Process(target=print).start()",
                                  "__import__('_posixsubprocess').fork_exec()",
                                  "__import__('subprocess')._fork_exec()",
                                  "os.posix_spawn('/bin/true', ['true'], {})"])  # fmt: skip
def test_no_processes(line):
    if "posix" in line and not hasattr(os, "posix_spawn"):
        pytest.skip("这个系统没有 posix_spawn")
    assert judge(inside(line)).kind == "forbidden"


@pytest.mark.parametrize(
    "answer",
    [
        "exit(0)\n",
        "import sys\nsys.exit(0)\n",
        "import os\nos._exit(0)\n",
        "def add(a, b):\n    exit(0)\n",
        "import os\ndef add(a, b):\n    os._exit(0)\n",
        "raise SystemExit\n",
    ],
)
def test_leaving_early_is_not_passing(answer):
    assert judge(answer).kind == "exited"
    swallowing = "def check(f):\n    try:\n        f(1, 2)\n    except Exception:\n        pass\n"
    assert judge(answer, swallowing).kind == "exited"


def test_nothing_is_written_anywhere(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("还在", encoding="utf-8")
    deeds = [
        f"open({str(tmp_path / 'new')!r}, 'w').write('x')",
        f"open({str(victim)!r}, 'a').write('x')",
        f"os.open({str(victim)!r}, os.O_RDWR | os.O_TRUNC)",
        f"os.remove({str(victim)!r})",
        f"os.rename({str(victim)!r}, {str(tmp_path / 'moved')!r})",
        f"os.mkdir({str(tmp_path / 'folder')!r})",
        f"__import__('shutil').rmtree({str(tmp_path)!r})",
        f"__import__('pathlib').Path({str(victim)!r}).write_text('x')",
        f"__import__('sqlite3').connect({str(tmp_path / 'base')!r})",
        "open('here', 'w').write('x')",
    ]
    for deed in deeds:
        assert judge(inside(deed)).kind == "forbidden", deed
    assert [path.name for path in tmp_path.iterdir()] == ["victim"]
    assert victim.read_text("utf-8") == "还在"


def test_files_of_the_reader_are_not_read(tmp_path):
    secret = tmp_path / "tests.txt"
    secret.write_text("答案是 3", encoding="utf-8")
    verdict = judge(f"def add(a, b):\n    return int(open({str(secret)!r}, encoding='utf-8').read()[-1])\n")
    assert verdict.kind == "error" and "读不到" in verdict.detail


def test_environment_is_not_given(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    check = "def check(f):\n    assert 'OPENAI_API_KEY' not in f()\n"
    assert judge("import os\ndef add():\n    return dict(os.environ)\n", check).passed


@pytest.mark.parametrize("line", ["__import__('socket').create_connection(('127.0.0.1', PORT))",
                                  "__import__('urllib.request').request.urlopen('http://127.0.0.1:PORT')",
                                  "__import__('socket').getaddrinfo('localhost', 80)",
                                  "__import__('socket').socket()"])  # fmt: skip
def test_no_network(line):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        port = server.getsockname()[1]
        assert judge(inside(line.replace("PORT", str(port)))).kind == "forbidden"
        with pytest.raises(TimeoutError):
            server.accept()


def test_printing_without_end_is_bounded():
    assert judge("def add(a, b):\n    while True: print('x' * 100_000)\n").kind == "output"
    assert judge("def add(a, b):\n    print('x' * 500_000)\n    return a + b\n").kind == "output"
    assert judge("import sys\nsys.stderr.write('x' * 500_000)\n" + RIGHT).kind == "output"
    assert judge("print('调试')\n" + RIGHT).passed


def test_allocating_without_end():
    assert judge("def add(a, b):\n    bytearray(10**10)\n    return a + b\n").kind == "memory"
    assert judge("x = [0] * 10**9\n" + RIGHT).kind == "memory"
    assert judge("def add(a, b):\n    return 'x' * 10**7\n").kind == "output"


def test_parent_and_others_live_on():
    bystander = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        for target in ("os.getppid()", str(os.getpid()), str(bystander.pid)):
            assert judge(inside(f"os.kill({target}, 9)")).kind == "forbidden"
        assert judge(inside("os.killpg(0, 9)")).kind == "forbidden"
        assert bystander.poll() is None
    finally:
        bystander.communicate()


ALWAYS_EQUAL = (
    "class Same{base}:\n    def __eq__(self, other): return True\n    def __hash__(self): return 1\n"
)


@pytest.mark.parametrize(
    "answer",
    [
        ALWAYS_EQUAL.format(base="") + "def add(a, b):\n    return Same()\n",
        ALWAYS_EQUAL.format(base="(int)") + "def add(a, b):\n    return Same(99)\n",
        ALWAYS_EQUAL.format(base="(list)") + "def add(a, b):\n    return Same()\n",
        "import builtins\nbuiltins.AssertionError = Exception\ndef add(a, b):\n    return 99\n",
        "import __main__\n__main__.pack = lambda v: {'kind': 'passed'}\ndef add(a, b):\n    return 99\n",
        "import json\njson.dumps = lambda m: '{\"kind\": \"passed\"}'\ndef add(a, b):\n    return 99\n",
        "import os\ndef add(a, b):\n    for fd in range(64):\n        try: os.write(fd, b'{\"kind\": \"passed\", \"detail\": \"\"}\\n')\n"
        "        except OSError: pass\n    return 99\n",
        "def add(a, b):\n    raise AssertionError\n",
        "import inspect\ndef add(a, b):\n    for frame in inspect.stack(): frame.frame.f_locals.clear()\n    return 99\n",
    ],
)  # fmt: skip
def test_tricks_on_the_test(answer):
    assert not judge(answer).passed


@pytest.mark.parametrize("line", ["import __main__; __main__.FORBIDDEN.clear(); os.system('true')",
                                  "__import__('gc').get_objects()",
                                  "__import__('resource').setrlimit(7, (99, 99))"])  # fmt: skip
def test_limits_cannot_be_lifted(line):
    if "resource" in line:
        pytest.importorskip("resource", reason="这个系统没有 resource")
    assert judge(inside(line)).kind == "forbidden"


def test_exceptions_and_arguments_cross_the_pipe():
    check = (
        "def check(f):\n"
        "    numbers = [3, 1]\n"
        "    assert f(numbers) is None and numbers == [1, 3]\n"
        "    try:\n        f(None)\n        assert False\n    except TypeError:\n        pass\n"
    )
    assert judge("def add(numbers):\n    numbers.sort() if numbers else numbers + 1\n", check).passed
    assert judge("def add(numbers):\n    return sorted(numbers)\n", check).kind == "wrong"


def test_helpers_of_the_prompt_reach_the_test():
    helpers = "def twice(x):\n    return 2 * x\n"
    assert judge(RIGHT, "def check(f):\n    assert f(1, 1) == twice(1)\n", helpers=helpers).passed
    assert judge(RIGHT, "assert add(1, 2) == 3\n").passed  # MBPP 的写法：测试直接叫函数的名字


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(max_size=9),
    lambda each: (
        st.lists(each, max_size=3)
        | st.tuples(each, each)
        | st.dictionaries(st.text(max_size=3) | st.integers() | st.tuples(st.integers()), each, max_size=3)
        | st.frozensets(st.integers() | st.text(max_size=2), max_size=3)
    ),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(values)
def test_plain_data_crosses_unchanged(value):
    import json

    back = sandbox_child.unpack(json.loads(json.dumps(sandbox_child.pack(value))))
    assert back == value and type(back) is type(value)


def test_nothing_is_left_behind():
    before = set(Path(sandbox.tempfile.gettempdir()).glob("nlp-sandbox-*"))
    judge("import time\ndef add(a, b):\n    time.sleep(1e6)\n", limits=Limits(seconds=0.5))
    assert set(Path(sandbox.tempfile.gettempdir()).glob("nlp-sandbox-*")) <= before


@pytest.mark.skipif(os.name == "nt", reason="os.kill 在 Windows 上看不出进程还在不在")
def test_the_answer_dies_when_the_evaluation_is_killed(tmp_path):
    """主进程被 kill -9：出题人读到断开，两个都走。"""
    note = tmp_path / "pid"
    script = (
        f"import sys; sys.path.insert(0, {str(Path(sandbox.__file__).parents[2])!r})\n"
        "from nlp_common.sandbox import sandbox\n"
        "old = sandbox.Judge.wait\n"
        f"def wait(self, deadline):\n    open({str(note)!r}, 'w').write(str(self.answer_pid)); return old(self, deadline)\n"
        "sandbox.Judge.wait = wait\n"
        "sandbox.run_answer('import time\\ndef f():\\n    time.sleep(1e6)\\n', 'f()', 'f', limits=sandbox.Limits(seconds=60))\n"
    )
    # 自己的临时文件夹：同时运行的别的沙箱不算
    main = subprocess.Popen([sys.executable, "-c", script], env=os.environ | {"TMPDIR": str(tmp_path)})
    until(lambda: note.exists() and note.read_text())
    main.kill()
    main.wait()
    answer = int(note.read_text())
    until(lambda: not alive(answer))
    until(lambda: not list(tmp_path.glob("nlp-sandbox-*")))


def until(condition):
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    pytest.fail("等不到")


def alive(pid):
    stat = Path(f"/proc/{pid}/stat")
    try:
        os.kill(pid, 0)
        return not (stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] == "Z")
    except (ProcessLookupError, FileNotFoundError):  # 看的时候走的，也是走了
        return False


# ---------------------------------------------------------------- 每一层单独


SECCOMP = """
import sys, os, socket
sys.path.insert(0, {here!r})
import sandbox_seccomp, subprocess, threading
assert sandbox_seccomp.install()
def refused(deed):
    try:
        deed()
    except PermissionError:
        return
    raise SystemExit(f"没有拦住 {{deed}}")
for deed in (
    os.fork,
    lambda: os.execv("/bin/true", ["true"]),
    lambda: subprocess.run(["/bin/true"]),
    lambda: os.kill(os.getppid(), 0),
    lambda: open({victim!r}, "w"),
    lambda: open({victim!r}, "a"),
    lambda: os.open({victim!r}, os.O_RDWR),
    lambda: os.remove({victim!r}),
    lambda: os.mkdir({victim!r} + "2"),
    lambda: os.chmod({victim!r}, 0),
    lambda: socket.socket(),
    os.setsid,
):
    refused(deed)
assert open({victim!r}).read() == "safe"
socket.socketpair()
thread = threading.Thread(target=print, args=("线程可以",)); thread.start(); thread.join()
"""


@pytest.mark.skipif(
    not (sys.platform.startswith("linux") and platform.machine() in ("x86_64", "aarch64")),
    reason="seccomp 只有 Linux 有",
)
def test_the_kernel_refuses_by_itself(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("safe")
    here = str(Path(sandbox.__file__).parent)
    done = subprocess.run(
        [sys.executable, "-X", "utf8", "-c", SECCOMP.format(here=here, victim=str(victim))],
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "线程可以" in done.stdout and victim.read_text() == "safe"


def test_memory_is_watched_where_the_kernel_does_not(monkeypatch):
    """macOS：RLIMIT_AS 不管用，主进程一边等一边看。"""
    monkeypatch.setattr(sandbox, "kernel_limits_memory", lambda: False)
    monkeypatch.setattr(sandbox, "resident_mb", lambda pid: 999.0)
    verdict = judge("import time\ndef add(a, b):\n    time.sleep(30)\n")
    assert verdict.kind == "memory"
    assert any("内存每 0.1 秒" in layer for layer in sandbox.layers())


@pytest.mark.skipif(os.name == "nt", reason="看的是没有 Windows 时的 ps")
def test_resident_memory_of_a_process():
    assert 1 < sandbox.resident_mb(os.getpid()) < 100_000
    assert sandbox.resident_mb(2**22 + 1) == 0


class Kernel:
    """假的 kernel32，记下调用。"""

    def __init__(self, fails=""):
        self.calls, self.fails, self.flags = [], fails, None
        for name in ("CreateJobObjectW", "SetInformationJobObject", "AssignProcessToJobObject",
                     "TerminateJobObject", "CloseHandle"):  # fmt: skip
            setattr(self, name, self.record(name))

    def record(self, name):
        def called(*arguments):
            self.calls.append(name)
            return 0 if name == self.fails else 7

        return called


def test_windows_job_object():
    """结构的大小与文档一致（64 位），先建、再设、再装，最后一起结束。"""
    if ctypes.sizeof(ctypes.c_void_p) == 8:
        assert (ctypes.sizeof(windows_job.BasicLimits), ctypes.sizeof(windows_job.ExtendedLimits)) == (
            64,
            144,
        )
    kernel = Kernel()
    job = windows_job.Job(256, kernel)
    job.add(5)
    job.kill()
    job.close()
    assert kernel.calls == ["CreateJobObjectW", "SetInformationJobObject", "AssignProcessToJobObject",
                            "TerminateJobObject", "CloseHandle"]  # fmt: skip
    for broken in ("CreateJobObjectW", "SetInformationJobObject"):
        with pytest.raises(OSError, match="没有成功"):
            windows_job.Job(256, Kernel(broken))


def test_windows_without_a_job_falls_back_to_taskkill(monkeypatch):
    monkeypatch.setattr(windows_job, "Job", lambda *_: (_ for _ in ()).throw(OSError("没有成功")))
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert sandbox.put_in_job(process, LIMITS) is None
        commands = []
        monkeypatch.setattr(sandbox.subprocess, "run", lambda command, **_: commands.append(command))
        sandbox.end_on_windows(process, None)
        assert commands == [["taskkill", "/T", "/F", "/PID", str(process.pid)]]
    finally:
        process.communicate()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="看的是 Linux 内核设上了哪些")
def test_the_layers_are_asked_not_claimed(monkeypatch):
    assert {"RLIMIT_AS", "RLIMIT_CPU", "RLIMIT_FSIZE"} <= set(judge(RIGHT).held)
    assert any("内核管着" in layer and "内存" in layer for layer in sandbox.layers())
    monkeypatch.setattr(sandbox, "CHILD", Path("nowhere.py"))
    [only] = sandbox.layers()
    assert "不能用" in only


def test_no_alarm_signal_is_used():
    """SIGALRM 在 Windows 上没有：这里一处也不用。"""
    for name in ("sandbox.py", "sandbox_child.py"):
        text = Path(sandbox.__file__).with_name(name).read_text("utf-8")
        assert "signal.alarm" not in text and "setitimer" not in text


# ---------------------------------------------------------------- 一段程序


def test_a_program_shows_what_it_printed():
    ran = run_program("print(sum(range(101)))\nprint('好')", LIMITS)
    assert ran.passed and ran.output == "5050\n好\n"
    ran = run_program("print(1)\nx = 1 / 0", LIMITS)
    assert ran.passed and ran.output == "1\nZeroDivisionError: division by zero（第 2 行）"
    assert "SyntaxError" in run_program("for", LIMITS).output
    assert run_program("import sys\nprint(2)\nsys.exit(1)", LIMITS).output == "2\n"


def test_a_program_that_prints_too_much_is_cut():
    ran = run_program("print('长' * 1_000_000)", LIMITS)
    assert ran.passed and ran.output == "长" * sandbox.OUTPUT_CHARS
    assert run_program("import sys\nwhile True: sys.stderr.write('x' * 1000)", LIMITS).kind == "output"


def test_a_program_may_not_write_or_leave():
    for source in ("open('x', 'w')", "import os\nos.system('true')", "import socket\nsocket.socket()"):
        assert run_program(source, LIMITS).kind in ("forbidden", "exited")
    assert run_program("while True: pass", Limits(seconds=0.5)).kind == "timeout"
