"""串起来的日志：改一个字、删一行、换次序都找得到；写到一半断了接得上；几个进程一起写不乱。"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nlp_common.base.errors import UserError
from rag_common.audit import START, AuditLog, hash_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def log(tmp_path):
    log = AuditLog(tmp_path / "audit.jsonl")
    for n in range(4):
        log.append({"do": "delete", "id": f"文档{n}\u2028\n"})
    return log


def test_good(log):
    assert log.verify() == 4 and [row["event"]["id"] for row in log.rows()][2] == "文档2\u2028\n"
    assert log.rows()[0]["previous"] == START and log.rows()[1]["previous"] == log.rows()[0]["hash"]
    assert log.verify(head=log.head()) == 4
    empty = AuditLog(log.path.with_name("空.jsonl"))
    assert empty.verify() == 0 and empty.head() == START


def change(log, lines):
    log.path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def test_any_change_is_found(log):
    lines = log.path.read_text(encoding="utf-8").split("\n")[:-1]
    for altered, place in (
        ([lines[0], lines[1].replace("文档1", "文档9"), *lines[2:]], "第 2 行：内容"),
        ([lines[0], *lines[2:]], "第 2 行：编号"),
        ([lines[0], lines[2], lines[1], lines[3]], "第 2 行"),
        ([*lines[:3], lines[3][:-5]], "第 4 行：不是完整"),
        (["{}", *lines[1:]], "第 1 行"),
    ):
        change(log, altered)
        with pytest.raises(UserError, match=place):
            log.verify()
    row = json.loads(lines[1])
    row["event"] = {"do": "另一件事"}
    row["hash"] = hash_of(row)  # 连这一行的散列也改了：后一行接不上
    change(log, [lines[0], json.dumps(row), *lines[2:]])
    with pytest.raises(UserError, match="第 3 行：接不上"):
        log.verify()


def test_a_cut_tail_is_seen_only_against_the_head(log):
    head, lines = log.head(), log.path.read_text(encoding="utf-8").split("\n")[:-1]
    change(log, lines[:2])
    assert log.verify() == 2
    with pytest.raises(UserError, match="截掉"):
        log.verify(head=head)


def test_half_a_line_is_dropped_when_writing_goes_on(log):
    with log.path.open("a", encoding="utf-8") as file:
        file.write('{"n": 5, "time": "20')
    with pytest.raises(UserError, match="第 5 行"):
        log.verify()
    log.append({"do": "接着写"})
    assert log.verify() == 5


def test_long_lines(log):
    log.append({"text": "长" * 100_000})
    log.append({"text": "短"})
    assert log.verify() == 6


@settings(max_examples=20, deadline=None)
@given(st.dictionaries(st.text(max_size=5), st.one_of(st.text(), st.integers(), st.none()), max_size=4))
def test_any_event_comes_back(tmp_path_factory, event):
    try:
        json.dumps(event, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return  # 半个字，文字里本来不会有
    log = AuditLog(tmp_path_factory.mktemp("log") / "a.jsonl")
    log.append(event)
    assert log.rows()[0]["event"] == event


def test_two_processes_take_turns(log):
    code = f"""
import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "rag")!r}]
from rag_common.audit import AuditLog
log = AuditLog({str(log.path)!r})
for n in range(20): log.append({{"from": sys.argv[1]}})
"""
    children = [subprocess.Popen([sys.executable, "-c", code, name]) for name in "ab"]
    assert [child.wait(60) for child in children] == [0, 0] and log.verify() == 44
