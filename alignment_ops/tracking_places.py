"""五种去处各记一遍同样的运行，再读回来：连上要多久，一点要多久，读回来的与训练时的一不一样；以及两本登记簿里的别名。"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from mlflow_aliases import MLflowAliases
from nlp_common.base.errors import UserError
from nlp_common.base.runs import load_run
from nlp_common.train.track_to import PLACES_BY_NAME
from nlp_common.train.tracking import PACKAGES, Reporter, check_installed
from read_places import READERS
from registry import Registry
from run_records import Run

# 测的时候都记在本机：读者自己设的服务器、令牌不用
READERS_OWN = (
    "MLFLOW_TRACKING_URI",
    "MLFLOW_EXPERIMENT_NAME",
    "WANDB_API_KEY",
    "WANDB_MODE",
    "SWANLAB_API_KEY",
    "SWANLAB_MODE",
)
NAME = "assistant"


def upload(run: Run, to: str) -> Reporter:
    """把一次做完了的运行补记到 to：设置、整条曲线、指标、run.json。"""
    check_installed(to)
    with tempfile.TemporaryDirectory() as work:
        reporter = Reporter(to, name_of(run), run.record["fingerprint"], Path(work))
        reporter.open()
        reporter.finish(run.record)
        return reporter


def name_of(run: Run) -> str:
    """页面上叫什么：结果文件夹的名字。"""
    return run.folder.name if run.folder else run.record["stage"]


# ---------------------------------------------------------------- 1. 五种去处


@contextlib.contextmanager
def kept_in(folder: Path) -> Iterator[None]:
    """这里面都记在 folder 里，不记到读者自己的服务器上。"""
    kept = {name: os.environ.pop(name, None) for name in (*READERS_OWN, "NLP_LEARNING_TRACKING")}
    os.environ["NLP_LEARNING_TRACKING"] = str(folder)
    try:
        yield
    finally:
        del os.environ["NLP_LEARNING_TRACKING"]
        os.environ.update({name: value for name, value in kept.items() if value is not None})


def measure_places(folder: Path, runs: list[Run]) -> dict[str, dict]:
    """装了的每一种：``{"open_seconds", "ms_per_point", "points", "same_points"}``；没有装的说怎样装。"""
    found = {}
    shutil.rmtree(folder, ignore_errors=True)
    with kept_in(folder):
        for to in PLACES_BY_NAME:
            package = PACKAGES.get(to)
            if package and importlib.util.find_spec(package) is None:
                print(f"  {to}：没有装（pip install {package}），跳过")
                continue
            found[to] = measure_place(to, runs)
    return found


def measure_place(to: str, runs: list[Run]) -> dict:
    """连上第一次（建数据库、启动它的后台程序）几秒，记一点几毫秒；能读回来的，逐点比。"""
    points = [
        (row["step"], {k: v for k, v in row.items() if k != "step"})
        for run in runs
        for row in run.record["history"]
    ]
    opening = logging = 0.0
    same = 0
    for number, run in enumerate(runs):
        with tempfile.TemporaryDirectory() as work, contextlib.redirect_stdout(io.StringIO()):
            reporter = Reporter(to, name_of(run), run.record["fingerprint"], Path(work))
            started = time.perf_counter()
            reporter.open()
            opening += time.perf_counter() - started if number == 0 else 0.0
            started = time.perf_counter()
            for row in run.record["history"]:
                reporter.log(row["step"], {k: v for k, v in row.items() if k != "step"})
            logging += time.perf_counter() - started
            reporter.finish(run.record)
        back = READERS[to](reporter.number)
        wanted = {
            (row["step"], name): value
            for row in run.record["history"]
            for name, value in row.items()
            if name != "step"
        }
        same += sum(_close(back.get(key), value) for key, value in wanted.items())
    return {
        "open_seconds": round(opening, 3),
        "ms_per_point": round(1000 * logging / len(points), 3),
        "points": sum(len(values) for _, values in points),
        "same_points": same,
    }


def _close(read: float | None, value: float) -> bool:
    return read is not None and abs(read - value) <= 1e-6 * max(1.0, abs(value))  # TensorBoard 存的是 float32


# ---------------------------------------------------------------- 2. 别名


def alias_story(folder: Path, models: list[Path]) -> dict:
    """登记两版、发布、再退回去：登记簿（registry.py）与 MLflow 每一步的别名都应当一样。"""
    with kept_in(folder / "places"):
        return _alias_story(folder / "registry.jsonl", models)


def _alias_story(path: Path, models: list[Path]) -> dict:
    path.unlink(missing_ok=True)
    registry, first, second = Registry(path), *models
    steps = {}
    try:
        other = MLflowAliases(NAME)
    except UserError as error:
        print(f"  MLflow：{error}")
        return {}
    one = registry.register(NAME, first)
    same = other.register(first, load_run(first)) == one
    registry.promote(NAME, one, reason="第一版")
    other.point("champion", one)
    steps["发布第一版"] = registry.aliases(NAME), other.aliases()
    two = registry.register(NAME, second)
    same &= other.register(second, load_run(second)) == two
    other.point("challenger", two)
    steps["登记第二版"] = registry.aliases(NAME), other.aliases()
    registry.promote(NAME, two, over=one, reason="数据改好了")
    other.point("champion", two)
    other.drop("challenger")
    steps["发布第二版"] = registry.aliases(NAME), other.aliases()
    back = registry.rollback(NAME, two, reason="演示退回")
    other.point("champion", back)
    steps["退回"] = registry.aliases(NAME), other.aliases()
    for name, (ours, theirs) in steps.items():
        print(f"  {name}：登记簿 {ours}，MLflow {theirs}")
    same &= other.find("champion")["folder"] == registry.find(NAME, "champion")["folder"]
    return {
        "alias_steps": len(steps),
        "alias_steps_same": sum(a == b for a, b in steps.values()),
        "alias_folder_same": int(same),
    }
