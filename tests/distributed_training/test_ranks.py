"""ranks.py：几个进程连成一组；谁死了，别的也停，说得出为什么，一个也不留下。"""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from nlp_common.base.errors import UserError
from ranks import run_ranks

FOLDER = Path(__file__).resolve().parents[2] / "distributed_training"


def summed(rank, n, size):
    x = torch.full((size,), float(rank + 1))
    dist.all_reduce(x)
    return {"x": x, "rank": rank}


def fails(rank, n, how):
    if rank == 1:
        if how == "user":
            raise UserError("第 3 行是空的。")
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ZeroDivisionError("除以零")
    dist.barrier()
    time.sleep(60)


def test_results_come_back_by_rank():
    results = run_ranks(summed, 3, 5)
    assert [r["rank"] for r in results] == [0, 1, 2]
    assert all(torch.equal(r["x"], torch.full((5,), 6.0)) for r in results)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("user", "^第 3 行是空的。$"),
        ("error", "1 号进程出了错.*\n(.*\n)*.*除以零"),
        ("killed", "1 号进程被 SIGKILL"),
    ],
)
def test_one_dead_rank_stops_all(how, said):
    started = time.monotonic()
    with pytest.raises(UserError, match=said):
        run_ranks(fails, 3, how)
    assert time.monotonic() - started < 30


def test_bad_port_and_bad_number():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="端口用不了"):
            run_ranks(summed, 2, 1, port=taken.getsockname()[1])
    with pytest.raises(UserError, match="至少要 1 个进程"):
        run_ranks(summed, 0, 1)


WAITS = """
import os, sys, time
sys.path.insert(0, {folder!r})
from ranks import run_ranks
def wait_long(rank, n, folder):
    open(os.path.join(folder, str(os.getpid())), "w").close()
    time.sleep(120)
if __name__ == "__main__":
    run_ranks(wait_long, 2, sys.argv[1])
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_no_orphans_when_the_main_process_dies(tmp_path, how):
    script = tmp_path / "waits.py"
    script.write_text(WAITS.format(folder=str(FOLDER)), encoding="utf-8")
    pids = tmp_path / "pids"
    pids.mkdir()
    process = subprocess.Popen(
        [sys.executable, str(script), str(pids)],
        stderr=subprocess.DEVNULL,
        cwd=FOLDER.parent,
        env=os.environ | {"PYTHONPATH": str(FOLDER.parent)},
    )
    while len(list(pids.iterdir())) < 2:
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(how)
    process.wait(timeout=30)
    deadline = time.monotonic() + 30
    alive = [int(path.name) for path in pids.iterdir()]
    while alive and time.monotonic() < deadline:
        alive = [pid for pid in alive if is_running(pid)]
        time.sleep(0.1)
    assert not alive


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
