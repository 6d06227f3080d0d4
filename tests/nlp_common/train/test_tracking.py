"""--report_to：每一点恰好记一次（中断几次也是），记不上的不耽误训练也不丢，令牌不露出来，不影响结果。"""

import errno
import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nlp_common.base.errors import UserError
from nlp_common.train import track_to, tracking
from nlp_common.train.lesson import run_lesson, run_part
from nlp_common.train.settings import LoopSettings, fingerprint, parse_settings
from nlp_common.train.track_to import PLACES_BY_NAME, read_jsonl
from nlp_common.train.tracking import PLACES, Reporter, check_installed, without_secrets

RECORD = {
    "stage": "sft", "id": "0123456789abcdef", "seconds": 1.5, "metrics": {"accuracy": 0.5, "by": {"kind": 1}},
    "parent": {"model": {"stage": "pretrain", "id": "aa", "path": "x"}}, "commit": "abc", "script": "a.py",
    "data": {"train": {"name": "d/行.jsonl", "sha256": "f" * 64, "rows": 3}}, "history": [],
}  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.setenv("NLP_LEARNING_TRACKING", str(tmp_path / "tracking"))
    for name in (
        "MLFLOW_TRACKING_URI",
        "MLFLOW_EXPERIMENT_NAME",
        *tracking.SECRETS,
        "WANDB_MODE",
        "SWANLAB_MODE",
    ):
        monkeypatch.delenv(name, raising=False)


def reporter(tmp_path, to="jsonl") -> Reporter:
    work = tmp_path / "work"
    work.mkdir(exist_ok=True)
    return Reporter(to, "sft", {"seed": 0, "learning_rate": 1e-3}, work)


def rows_of(tmp_path) -> list[dict]:
    return [row for path in sorted((tmp_path / "tracking/jsonl").glob("*")) for row in read_jsonl(path)]


# ---------------------------------------------------------------- 每一点恰好一次


@settings(max_examples=40, deadline=None)
@given(runs=st.lists(st.integers(0, 12), max_size=4), every=st.integers(1, 4))
def test_each_point_once_however_often_killed(tmp_path_factory, runs, every):
    """训练到第 k 点被杀（不 stop），从最近的检查点重来；不论几次，12 点各记一次，次序不乱。"""
    tmp_path = tmp_path_factory.mktemp("killed")
    old = os.environ["NLP_LEARNING_TRACKING"]
    os.environ["NLP_LEARNING_TRACKING"] = str(tmp_path / "tracking")
    try:
        checkpoint = 0
        for number, until in enumerate([*runs, 12]):
            each = reporter(tmp_path)
            each.open()
            for step in range(checkpoint + 1, until + 1):
                each.log(step, {"loss": step / 10})
                if step % every == 0:
                    checkpoint = step
            if number == len(runs):
                each.finish(
                    RECORD | {"history": [{"step": step, "loss": step / 10} for step in range(1, 13)]}
                )
        rows = rows_of(tmp_path)
        assert [row["step"] for row in rows if "step" in row] == list(range(1, 13))
        assert len(list((tmp_path / "tracking/jsonl").glob("*"))) == 1 and rows[-1]["event"] == "finish"
    finally:
        os.environ["NLP_LEARNING_TRACKING"] = old


def test_history_fills_what_was_not_reported_live(tmp_path):
    """有的脚本、库自带的训练器，训练时没有报全：最后照 history 补上；同一步的两种数各是各的。"""
    each = reporter(tmp_path)
    each.open()
    each.log(10, {"loss": 1.0})
    history = [
        {"step": 10, "loss": 1.0, "margin": 0.1},
        {"step": 20, "loss": 0.5},
        {"step": 20, "eval_loss": 2.0},
    ]
    each.finish(RECORD | {"history": history})
    points = [
        (row["step"], *[item for item in row.items() if item[0] not in ("step", "time")])
        for row in rows_of(tmp_path)
        if "step" in row
    ]
    assert points == [
        (10, ("loss", 1.0)),
        (10, ("margin", 0.1)),
        (20, ("loss", 0.5)),
        (20, ("eval_loss", 2.0)),
    ]


def test_half_a_line_is_skipped_and_the_next_is_whole(tmp_path):
    first = reporter(tmp_path)
    first.open()
    first.log(1, {"loss": 1.0})
    [path] = (tmp_path / "tracking/jsonl").glob("*")
    with path.open("a", encoding="utf-8") as file:
        file.write('{"step": 2, "lo')  # 写到一半被杀
    second = reporter(tmp_path)
    second.open()
    second.log(2, {"loss": 0.5})
    assert [row["step"] for row in read_jsonl(path) if "step" in row] == [1, 2]


def test_two_at_once_write_two_files(tmp_path):
    both = [Reporter("jsonl", "sft", {}, tmp_path / str(i)) for i in range(8)]
    threads = [threading.Thread(target=each.open) for each in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for each in both:
        each.log(1, {"loss": 1.0})
    assert len({each.number for each in both}) == 8 == len(list((tmp_path / "tracking/jsonl").glob("*")))


# ---------------------------------------------------------------- 记不上的时候


class Broken:
    """连得上，记不上：fault 说这时出不出错。"""

    fault: Exception | None = None
    kept: list

    def __init__(self):
        type(self).kept = self.points = []

    def open(self, run, number):
        return "n", "别处"

    def log(self, step, values):
        if type(self).fault:
            raise type(self).fault
        self.points.append(step)

    def finish(self, record):
        self.points.append("finish")

    def stop(self, failed):
        self.points.append("failed" if failed else "interrupted")


@pytest.fixture
def broken(monkeypatch):
    monkeypatch.setitem(PLACES_BY_NAME, "jsonl", Broken)
    Broken.fault = OSError(errno.ENOSPC, "No space left on device")
    return Broken


def test_what_cannot_be_sent_waits_and_is_sent_later(tmp_path, broken, monkeypatch, capsys):
    monkeypatch.setattr(tracking, "WAIT", 0.0)
    each = reporter(tmp_path)
    each.open()
    for step in range(1, 6):
        broken.fault = broken.fault if step < 4 else None
        each.log(step, {"loss": 1.0})
    each.finish(RECORD)
    said = capsys.readouterr().out
    assert broken.kept == [1, 2, 3, 4, 5, "finish"] and said.count("先留着") == 1 and "补记" not in said


def test_what_is_never_sent_is_said_with_the_command(tmp_path, broken, capsys):
    each = reporter(tmp_path)
    each.open()
    each.log(1, {"loss": 1.0})
    each.finish(RECORD)
    said = capsys.readouterr().out
    assert "结果已经存好" in said and "version_tracking.py upload" in said and broken.kept == []
    again = json.loads((tmp_path / "work/tracking.json").read_text(encoding="utf-8"))
    assert again["last"] == {"loss": 0}, "没有送到的不算记了：接着训练时再记"


def test_a_locked_place_is_not_asked_at_every_step(tmp_path, broken):
    each = reporter(tmp_path)
    each.open()
    asked = []
    each.place.log = lambda *point: asked.append(point) or (_ for _ in ()).throw(OSError("locked"))
    for step in range(100):
        each.log(step, {"loss": 1.0})
    assert len(asked) == 1 and len(each.waiting) == 100


def test_cannot_open_is_one_sentence_without_the_token(tmp_path, monkeypatch):
    class Refusing(Broken):
        def open(self, run, number):
            raise RuntimeError("401 for key s3cret-token at https://me:pa55@host/x\nsecond line")

    monkeypatch.setitem(PLACES_BY_NAME, "wandb", Refusing)
    monkeypatch.setenv("WANDB_API_KEY", "s3cret-token")
    with pytest.raises(UserError) as caught:
        reporter(tmp_path, "wandb").open()
    said = str(caught.value)
    assert (
        "WANDB_API_KEY" in said and "s3cret" not in said and "pa55" not in said and "second line" not in said
    )


@given(st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=8), st.text())
def test_no_secret_is_ever_printed(secret, around):
    before = os.environ.get("MLFLOW_TRACKING_TOKEN")
    os.environ["MLFLOW_TRACKING_TOKEN"] = secret
    try:
        assert secret not in without_secrets(f"x{secret}{around.replace(secret, '')}").replace("***", "")
    finally:
        if before is None:
            del os.environ["MLFLOW_TRACKING_TOKEN"]


def test_missing_package_names_the_command(monkeypatch):
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    for to in PLACES:
        if to in ("none", "jsonl"):
            check_installed(to)
        else:
            with pytest.raises(UserError, match=f"pip install {to}"):
                check_installed(to)


# ---------------------------------------------------------------- 与训练合起来


@dataclass
class ToySettings(LoopSettings):
    pass


def toy(stage):
    run_part(stage, "first", lambda part: part.report({"step": 1, "loss": 2.0}) or {"x": 1.0})
    stage.report({"step": 1, "loss": 3.0})
    return stage.save(
        {"accuracy": 0.25}, {"train": {"name": "t", "rows": 1}}, history=[{"step": 1, "loss": 3.0}]
    )


def run_toy(tmp_path, *argv):
    return run_lesson(
        "toy",
        tmp_path,
        parse_settings(ToySettings, {"tiny": {}, "full": {}}, ["--preset", "tiny", *argv]),
        toy,
    )


def test_a_lesson_and_its_parts_are_one_run(tmp_path, capsys):
    record = run_toy(tmp_path, "--report_to", "jsonl")
    rows = rows_of(tmp_path)
    points = [{k: v for k, v in row.items() if k != "time"} for row in rows if "step" in row]
    assert points == [{"step": 1, "first/loss": 2.0}, {"step": 1, "loss": 3.0}]
    assert (
        rows[-1]["run"]["id"] == record["id"]
        and record["script"].endswith("test_tracking.py")
        and record["threads"]
    )
    assert "训练曲线记到" in capsys.readouterr().out


def test_where_it_is_reported_changes_nothing(tmp_path):
    """同样的结果：fingerprint、权重、指标；没有给就什么也不写；已有的结果直接用，不再记一遍。"""
    plain = run_toy(tmp_path)
    assert not (tmp_path / "tracking").exists()
    settings_ = parse_settings(
        ToySettings, {"tiny": {}, "full": {}}, ["--preset", "tiny", "--report_to", "jsonl"]
    )
    assert fingerprint(settings_) == plain["fingerprint"]
    assert run_toy(tmp_path, "--report_to", "jsonl") == plain and not (tmp_path / "tracking").exists()


def test_an_error_and_an_interrupt_are_recorded(tmp_path):
    for error, event in ((KeyboardInterrupt(), "interrupted"), (ValueError("x"), "failed")):

        def fail(stage, error=error):
            raise error

        settings_ = parse_settings(
            ToySettings, {"tiny": {}, "full": {}}, ["--preset", "tiny", "--report_to", "jsonl"]
        )
        with pytest.raises(type(error)):
            run_lesson(event, tmp_path, settings_, fail)
        assert event in [row.get("event") for row in rows_of(tmp_path)]


# ---------------------------------------------------------------- 真的那几家（慢）


def tell(tmp_path, to, steps=range(1, 40)):
    each = reporter(tmp_path, to)
    each.open()
    for step in steps:
        each.log(step, {"loss": 1 / step, "rewards/差（α）": float(step)})
    return each


@pytest.mark.slow
@pytest.mark.parametrize("to", ["tensorboard", "mlflow", "wandb", "swanlab"])
def test_each_place_keeps_every_point(tmp_path, to):
    """记下、中断、接着记、记完，再从它自己的文件里读回来：一点不少，一点不多。"""
    pytest.importorskip(to, reason=f"没有装 {to}")
    sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "alignment_ops"))
    from read_places import READERS

    tell(tmp_path, to, range(1, 20)).stop(failed=False)
    each = tell(tmp_path, to)
    each.finish(RECORD)
    read = READERS[to](each.number)
    losses = {step: value for (step, name), value in read.items() if name == "loss"}
    first = 20 if to == "swanlab" else 1  # 不联网时它接不上原来那一次：另记一次，检查点里的由 Stage 再报一遍
    assert losses.keys() >= set(range(first, 40)) and losses[39] == pytest.approx(1 / 39, abs=1e-6)
    assert (
        any(name == "result/accuracy" and value == 0.5 for (_, name), value in read.items()) or to == "wandb"
    )


@pytest.mark.slow
def test_mlflow_locked_by_another_program(tmp_path, monkeypatch, capsys):
    """训练中数据库被别的程序锁住：训练照走；放开以后全部补上，一点不重。"""
    pytest.importorskip("mlflow", reason="没有装 mlflow")
    import sqlite3

    monkeypatch.setattr(tracking, "WAIT", 0.0)
    each = tell(tmp_path, "mlflow", range(1, 4))
    with closing(sqlite3.connect(tmp_path / "tracking/mlflow.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        each.log(4, {"loss": 0.25})
        assert "locked" in each.lost and len(each.waiting) == 1
        other.execute("ROLLBACK")
    each.log(5, {"loss": 0.2})
    each.finish(RECORD)
    client = track_to.mlflow_client()
    steps = [m.step for m in client.get_metric_history(each.number, "loss")]
    assert sorted(steps) == [1, 2, 3, 4, 5] and client.get_run(each.number).info.status == "FINISHED"


@pytest.mark.slow
def test_a_real_mlflow_server(tmp_path, monkeypatch):
    """照读者的办法开一个服务器（SQLite），训练记到它那里；它的页面打得开，关了它再连是一句话。"""
    pytest.importorskip("mlflow", reason="没有装 mlflow")
    import socket

    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", "sqlite:///mlflow.db", "--port", str(port), "--workers", "1"]  # fmt: skip
    with (tmp_path / "server.log").open("wb") as log:
        server = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log)
    try:
        for _ in range(600):
            try:
                page = urllib.request.urlopen(url, timeout=5).read()
                break
            except OSError:
                time.sleep(0.2)
        assert b"MLflow" in page
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        each = tell(tmp_path, "mlflow", range(1, 6))
        each.finish(RECORD)
        run = track_to.mlflow_client().get_run(each.number)
        assert run.data.metrics["result/accuracy"] == 0.5 and run.data.tags["parent.model"] == "pretrain:aa"
        assert run.inputs.dataset_inputs[0].dataset.digest == "f" * 16
    finally:
        server.terminate()
        server.wait()
    (tmp_path / "work/tracking.json").unlink()
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI"):
        reporter(tmp_path, "mlflow").open()


STARTS = """
import os, sys
import nlp_common
from pathlib import Path
from nlp_common.train.tracking import Reporter
work = Path(sys.argv[1])
work.mkdir()
reporter = Reporter("mlflow", "sft", {}, work)
reporter.open()
for step in range(5):
    reporter.log(step, {"loss": 1.0})
print(reporter.number, len(reporter.waiting))
"""


@pytest.mark.slow
def test_three_trainings_make_the_database_together(tmp_path):
    """第一次用，三次训练同时开始：都来建表，一个也不出错，点都在。"""
    pytest.importorskip("mlflow", reason="没有装 mlflow")
    commands = [[sys.executable, "-c", STARTS, str(tmp_path / str(number))] for number in range(3)]
    started = [subprocess.Popen(each, stdout=subprocess.PIPE, text=True) for each in commands]
    for each in started:
        said = each.communicate()[0].split()
        assert each.returncode == 0 and said[-1] == "0"
        assert len(track_to.mlflow_client().get_metric_history(said[-2], "loss")) == 5
