"""输出文件夹遇到的麻烦：两个进程抢、磁盘满、只读、路径里有个文件。"""

from nlp_common.base.cli import run_main

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from nlp_common.base.errors import UserError
from nlp_common.base.runs import CHECKPOINT_DONE, check_writable, load_run, open_run

HOLD = """
import sys, time
from pathlib import Path
from nlp_common.base.runs import open_run
with open_run(Path(sys.argv[1])):
    print("ready", flush=True)
    time.sleep(60)
"""


def write_small(folder):
    save_file({"w": np.ones(4, dtype=np.float32)}, folder / "model.safetensors")


def test_second_run_names_the_first_and_a_killed_run_leaves_no_lock(tmp_path):
    out = tmp_path / "sft"
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "ready\n"
    refused = rf"(?s){out} 正被另一个进程使用.*进程 {first.pid}，.*--output_dir"
    with pytest.raises(UserError, match=refused), open_run(out):
        pytest.fail("两个进程写进了同一个文件夹")
    with open_run(tmp_path / "dpo"):  # 别的文件夹不受影响
        pass
    first.send_signal(signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
    first.wait()
    with open_run(out) as folder:
        folder.start({})
        folder.finish(write_small, {"stage": "sft"})
    assert json.loads((out / "run.json").read_text(encoding="utf-8"))["stage"] == "sft"
    assert sorted(each.name for each in tmp_path.iterdir() if "owner" in each.name) == []


@pytest.fixture
def small_disk(tmp_path):
    """一块 1 MB 的盘；没有权限挂载就跳过（下面还有一个不用挂载的）。"""
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    command = [mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if not mount or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("这里不能挂载 tmpfs")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_disk_full_while_saving_then_the_same_command_finishes(small_disk):
    out, filler = small_disk / "sft", small_disk / "filler"

    def save():
        with open_run(out) as folder:
            folder.start({"seed": 0})
            checkpoint = folder.checkpoints / "checkpoint-5"
            checkpoint.mkdir(exist_ok=True)
            (checkpoint / "complete.json").write_text("{}", encoding="utf-8")
            if not filler.exists() and not (out.parent / "cleared").exists():
                filler.write_bytes(bytes(700_000))
            folder.finish(
                lambda path: save_file({"w": np.ones(100_000, dtype=np.float32)}, path / "model.safetensors"),
                {"stage": "sft"},
            )

    with pytest.raises(UserError, match=r"磁盘满了.*同一条命令.*--output_dir"):
        save()
    assert not out.exists(), "写了一半的不能当成完成的"
    with open_run(out) as folder:
        assert folder.latest_checkpoint().name == "checkpoint-5"  # 之前的进度还在
    filler.unlink()
    (out.parent / "cleared").touch()
    save()
    assert (out / "run.json").exists()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "model.safetensors"),
        type("SafetensorError", (Exception,), {})("I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file"),
    ],
)
def test_every_librarys_way_of_saying_disk_full(tmp_path, monkeypatch, error):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 30, 1 << 30, 0))

    def write(_):
        raise error

    with pytest.raises(UserError, match="磁盘满了"), open_run(tmp_path / "sft") as folder:
        folder.start({})
        folder.finish(write, {})
    assert not (tmp_path / "sft").exists()


def test_other_errors_are_not_called_disk_full(tmp_path):
    with pytest.raises(RuntimeError, match="别的毛病"), open_run(tmp_path / "sft"):
        raise RuntimeError("别的毛病")
    with pytest.raises(FileNotFoundError), open_run(tmp_path / "sft"):
        (tmp_path / "nothing").read_text()


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_folder_that_cannot_be_written(tmp_path, monkeypatch, code):
    """root 不受权限位约束，所以让 mkdir 自己报错。"""

    def mkdir(path, *_, **__):
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr("pathlib.Path.mkdir", mkdir)
    with pytest.raises(UserError, match=r"没有写入权限.*--output_dir"), open_run(tmp_path / "a" / "sft"):
        pytest.fail("写进去了")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="没有 /proc")
@pytest.mark.parametrize("folder", ["/proc/sft", "/proc/outputs/sft"])
def test_file_system_that_takes_no_files(folder):
    with pytest.raises(UserError, match=r"没有写入权限.*--output_dir"), open_run(Path(folder)):
        pytest.fail("写进去了")


def test_read_only_disk(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(UserError, match=r"没有写入权限.*--output_dir"), open_run(small_disk / "sft"):
        pytest.fail("写进去了")


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "outputs").write_text("我是文件", encoding="utf-8")
    for out in (tmp_path / "outputs" / "sft", tmp_path / "outputs" / "tiny" / "sft"):
        with pytest.raises(UserError, match=r"路径不是文件夹.*--output_dir"), open_run(out):
            pytest.fail("写进去了")


def test_a_place_that_takes_nothing_is_said_before_anything_is_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("我是文件", encoding="utf-8")
    check_writable(tmp_path / "new" / "sft")
    assert not (tmp_path / "new").exists()
    for place in ("file", "file/sft", "file/tiny/sft"):
        with pytest.raises(UserError, match="--output_dir"):
            check_writable(tmp_path / place)
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(UserError, match=r"没有写入权限.*--output_dir"):
        check_writable(tmp_path / "new" / "sft")


def test_the_reader_sees_one_line(tmp_path, capsys):
    (tmp_path / "outputs").write_text("我是文件", encoding="utf-8")

    def main():
        with open_run(tmp_path / "outputs" / "sft"):
            pass

    with pytest.raises(SystemExit, match="2"):
        run_main(main)
    assert capsys.readouterr().err.startswith("错误：")


@pytest.mark.parametrize("trained", [False, True])
def test_other_settings_start_afresh_and_say_so_only_if_work_is_lost(tmp_path, capsys, trained):
    with open_run(tmp_path / "sft") as run:
        run.start({"seed": 0})
        if trained:
            (run.checkpoints / "checkpoint-5").mkdir()
            (run.checkpoints / "checkpoint-5" / CHECKPOINT_DONE).write_text("{}")
    with open_run(tmp_path / "sft") as run:
        run.start({"seed": 1})
        assert run.latest_checkpoint() is None
    assert ("从头训练" in capsys.readouterr().out) == trained


def test_a_folder_of_other_things_is_left_alone_and_another_is_named(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in ("a.txt", "b.py", "c.md", "d.csv"):
        (folder / name).write_text("我的", encoding="utf-8")
    with pytest.raises(UserError, match=r"里是别的东西（a\.txt、b\.py、c\.md 等 4 项") as caught:
        load_run(folder)
    assert "--output_dir" in str(caught.value) and "删" not in str(caught.value)
    with pytest.raises(UserError, match="不会动它"), open_run(folder):
        pytest.fail("不该打开")  # --retrain 会把整个文件夹换掉
    assert len(list(folder.iterdir())) == 4
    with pytest.raises(UserError, match="是一个文件"):
        load_run(folder / "a.txt")
