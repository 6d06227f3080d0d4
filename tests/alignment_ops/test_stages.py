"""另开的进程：说清楚为什么没有跑完；上次被杀掉的流程开的还在跑，等它做完，不报错。"""

import sys
import threading
import time

import pytest
from filelock import FileLock

from nlp_common.base.errors import UserError
from stages import in_use, run_command

# 像训练的脚本那样：锁住结果文件夹，锁不到就退出码 2
SCRIPT = """
import pathlib, sys
from filelock import FileLock, Timeout
out = pathlib.Path(sys.argv[sys.argv.index("--output_dir") + 1])
try:
    with FileLock(out.with_name(f".{out.name}.lock")).acquire(timeout=0):
        print("线程", __import__("os").environ.get("OMP_NUM_THREADS"))
        sys.exit(int(sys.argv[1]))
except Timeout:
    sys.exit(2)
"""


def command(out, code=0):
    return [sys.executable, "-c", SCRIPT, str(code), "--output_dir", str(out)]


def test_waits_for_the_process_that_a_killed_flow_left(tmp_path, capsys):
    out = tmp_path / "sft"
    locked = threading.Event()

    def hold():
        with FileLock(tmp_path / ".sft.lock"):
            locked.set()
            time.sleep(0.3)

    thread = threading.Thread(target=hold)
    thread.start()
    locked.wait()
    run_command("没有训练成", command(out), tmp_path / "sft.log", threads=1)
    thread.join()
    assert "等它做完" in capsys.readouterr().out
    assert not in_use(out) and "线程 1" in (tmp_path / "sft.log").read_text(encoding="utf-8")


def test_a_failure_shows_the_last_lines_and_ctrl_c_is_ctrl_c(tmp_path):
    with pytest.raises(UserError, match=r"没有训练成（退出码 2），全部输出在 .*sft.log，最后几行：\n  线程"):
        run_command("没有训练成", command(tmp_path / "sft", 2), tmp_path / "sft.log")
    with pytest.raises(KeyboardInterrupt):
        run_command("没有训练成", command(tmp_path / "sft", 130), tmp_path / "sft.log")
