"""一行一件事的日志：只留下写完整的行；写一半、盘满、被锁、坏行，都不丢已有的，并说清楚。"""

import errno
import os
import shutil
import subprocess

import pytest
from filelock import FileLock

import line_log
from nlp_common.base.errors import UserError

EVENTS = [{"n": 1, "说": "一"}, {"n": 2}, {"n": 3, "list": [1, 2]}]


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "book" / "log.jsonl"
    for event in EVENTS:
        line_log.append(path, event)
    return path


def test_read_gives_what_was_appended(log):
    assert line_log.read(log) == EVENTS
    assert line_log.read(log.with_name("none.jsonl")) == []


def test_cut_anywhere_loses_only_what_was_not_finished(log):
    """在任何一个字节截断：前面写完整的行都在，再写的接在后面，半行没有丢，在 .half 里。"""
    whole = log.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    half = log.with_name("log.jsonl.half")
    for cut in range(len(whole) + 1):
        half.unlink(missing_ok=True)
        log.write_bytes(whole[:cut])
        finished = sum(end <= cut for end in ends)
        assert line_log.read(log) == EVENTS[:finished]
        line_log.append(log, {"n": 9})
        only_newline_missing = cut + 1 in ends
        assert line_log.read(log) == [*EVENTS[: finished + only_newline_missing], {"n": 9}]
        rest = whole[:cut][ends[finished - 1] if finished else 0 :]
        assert half.exists() == (bool(rest) and not only_newline_missing)
        if half.exists():
            assert half.read_bytes() == rest + b"\n"


@pytest.mark.parametrize("tail", [b"\0" * 20, b"{'n': 4", '{"说": "'.encode() + "一".encode()[:2]])
def test_strange_half_lines_are_set_aside(log, tail, capsys):
    """断电后末尾常是一串 0；一个汉字也会从中间断开。"""
    with log.open("ab") as file:
        file.write(tail)
    assert line_log.read(log) == EVENTS
    line_log.append(log, {"n": 4})
    assert line_log.read(log) == [*EVENTS, {"n": 4}]
    assert "没写完的半行" in capsys.readouterr().out


@pytest.mark.parametrize("bad", ['{"n": 2', "[1]", "\0\0"])
def test_a_bad_line_in_the_middle_is_named_not_skipped(log, bad):
    lines = log.read_text(encoding="utf-8").split("\n")
    log.write_text("\n".join([lines[0], bad, *lines[2:]]), encoding="utf-8")
    before = log.read_bytes()
    for use in (lambda: line_log.read(log), lambda: line_log.append(log, {})):
        with pytest.raises(UserError, match=r"log.jsonl 第 2 行不是一个完整的 JSON 对象.*备份"):
            use()
    assert log.read_bytes() == before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("where", ["write", "fsync"])
def test_a_failed_write_leaves_the_file_as_it_was(log, monkeypatch, code, where):
    before, write = log.read_bytes(), os.write

    def half_then_fail(descriptor, content):
        write(descriptor, content[: len(content) // 2])
        raise OSError(code, os.strerror(code))

    def fail(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(line_log.os, where, half_then_fail if where == "write" else fail)
    with pytest.raises(UserError, match="这一行没有写进去，已有的都在") as said:
        line_log.append(log, {"n": 4})
    assert ("磁盘满了" in str(said.value)) == (code != errno.EIO)
    monkeypatch.undo()
    assert log.read_bytes() == before
    line_log.append(log, {"n": 4})
    assert line_log.read(log)[-1] == {"n": 4}


def test_a_really_full_disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    command = [mount, "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    if not mount or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("这里不能挂载 tmpfs")
    try:
        log, written = place / "log.jsonl", 0
        with pytest.raises(UserError, match=r"磁盘满了.*清出空间后再运行同一条命令"):
            for written in range(1000):
                line_log.append(log, {"n": written, "text": "字" * 300})
        assert [event["n"] for event in line_log.read(log)] == list(range(written))
        (place / "log.jsonl.lock").unlink()
        with log.open("r+b") as file:  # 清出空间
            file.truncate(len(b"".join(log.read_bytes().splitlines(keepends=True)[:3])))
        line_log.append(log, {"n": 3})
        assert len(line_log.read(log)) == 4
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_locked_by_another_says_so_and_writes_nothing(log, monkeypatch):
    monkeypatch.setattr(line_log, "WAIT", 0.05)
    before = log.read_bytes()
    with FileLock(f"{log}.lock"), pytest.raises(UserError, match=r"被另一个进程锁着.*什么也没有写.*lsof"):
        line_log.append(log, {"n": 4})
    assert log.read_bytes() == before
    assert line_log.read(log) == EVENTS  # 只读的不用等


def test_places_where_no_file_can_be(tmp_path):
    with pytest.raises(UserError, match=r"的位置上是别的东西|读不了"):
        line_log.append(tmp_path, {})
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="换一个"):
        line_log.append(tmp_path / "file" / "log.jsonl", {})
    with pytest.raises(UserError, match="读不了"):
        line_log.read(tmp_path)


def test_errors_of_the_caller_are_not_taken_for_ours(log):
    """锁里面自己抛出的 UserError 原样出来，锁也放开了。"""
    with pytest.raises(UserError, match=r"^别的事$"), line_log.updating(log):
        raise UserError("别的事")
    line_log.append(log, {"n": 4})
