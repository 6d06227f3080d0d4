"""一次训练的外壳：结果文件夹、检查点、运行记录。算法在各脚本里，这里没有；参数在 settings.py。"""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from nlp_common.base.device import describe, library_versions, peak_memory_mb, pick_device, seed_everything
from nlp_common.base.errors import UserError
from nlp_common.base.measurements import ROOT, current_commit, record_run
from nlp_common.base.processes import is_main, on_main
from nlp_common.base.runs import CHECKPOINT_DONE, RunFolder, differences, load_run, open_run
from nlp_common.train.settings import LessonSettings, as_told
from nlp_common.train.tracking import Reporter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Stage:
    """进行中的一次训练；``record`` 不是 None 说明早已训练完，直接用 ``path`` 里的模型。"""

    def __init__(
        self, name: str, settings: LessonSettings, folder: RunFolder, wanted: dict, parents: dict[str, dict]
    ):
        self.name, self.folder, self.parents = name, folder, parents
        self.settings: Any = settings  # 各脚本自己的设置
        self.fingerprint = wanted
        self.path, self.device, self.started = folder.path, pick_device(), time.time()
        self.record: dict | None = None
        self.reporter = Reporter(
            getattr(settings, "report_to", "none"), folder.path.name, wanted, folder.work
        )
        self.prefix = ""  # 一课里的一个部分：曲线的名字前面加上它的名字
        self.started_with: dict[str, str | int | None] = {}  # 开始训练时的脚本、提交、线程数

    @property
    def model_path(self) -> str:
        return self.parents["model"]["path"]

    def seconds(self) -> float:
        return time.time() - self.started

    def report(self, point: dict[str, Any]) -> None:
        """训练曲线的一点 ``{"step", "loss", …}``，记到 --report_to 指的地方；没有给就什么也不做。"""
        values = {f"{self.prefix}{name}": value for name, value in point.items() if name != "step"}
        self.reporter.log(point["step"], values)

    def part_of(self, whole: Stage) -> None:
        """这是 whole 的一个部分：曲线记在它那里。"""
        self.reporter, self.prefix = whole.reporter, f"{whole.prefix}{self.name}/"

    def checkpoint(self) -> Path | None:
        """可以接着训练的检查点；之前花掉的秒数也算进这次的记录。"""
        latest = on_main(self.folder.latest_checkpoint)
        if latest:
            self.started -= json.loads((latest / CHECKPOINT_DONE).read_text())["seconds"]
            print(f"接着上次的检查点继续：{latest.name}")
            for point in _points(latest):  # 上次没来得及记的；记过的不再记
                self.report(point)
        return latest

    def finish(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        metrics: dict,
        data: dict,
        history: list[dict],
        state: dict | None = None,
        draw: Callable[[Path], object] | None = None,
        **extra: Any,
    ) -> dict:
        """把模型、分词器和 run.json 写成完成的文件夹，返回记录。

        state：参数分片时，收齐的那一份；draw(文件夹) 往里面画图。
        """

        def write(folder: Path) -> None:
            model.save_pretrained(folder, state_dict=state)
            tokenizer.save_pretrained(folder)
            if draw:
                draw(folder)

        return self.save(metrics, data, write, history, **extra)

    def save(
        self,
        metrics: dict,
        data: dict,
        write: Callable[[Path], object] | None = None,
        history: list[dict] | None = None,
        **extra: Any,
    ) -> dict:
        """写成完成的文件夹：write(文件夹) 往里面写权重、图、网页，再加上 run.json。返回记录。"""
        record = {
            "stage": self.name,
            "parent": self.parents,
            "data": data,
            "settings": as_told(self.settings),
            "fingerprint": self.fingerprint,
            "versions": library_versions(),
            "device": describe(self.device),
            **self.started_with,
            "seconds": round(self.seconds(), 1),
            "peak_memory_mb": peak_memory_mb(),
            "metrics": metrics,
            "history": history or [],
            **extra,
        }
        self.record = on_main(lambda: self.folder.finish(write or (lambda folder: None), record))
        return self.record


@contextlib.contextmanager
def open_result(
    path: Path,
    name: str,
    settings: LessonSettings,
    wanted: dict,
    parents: dict[str, dict] | None = None,
    reuse: Literal["same", "any", "derived"] = "same",
) -> Iterator[Stage]:
    """锁住并打开一个结果文件夹；只有 ``stage.record is None`` 才要训练。wanted 是 fingerprint 的结果。

    已有的结果怎么用：same，设置相同才用，不同是 UserError，列出每一项不同；any，照用，说明哪些不同；
    derived，中间结果，设置相同就用（--retrain 也用，重做一遍还是它），不同就说明哪些不同，重新做。
    新做成的结果，--record 给了就记下它的数（中间结果不记）。
    """
    with open_run(path.expanduser().resolve()) as folder:
        stage = Stage(name, settings, folder, wanted, parents or {})
        # --show_batch 只看数据：有没有训练过都一样
        anew = settings.retrain or getattr(settings, "show_batch", False)
        stage.record = on_main(lambda: _find_record(folder, wanted, anew, reuse))
        if stage.record is None:
            on_main(lambda: folder.start(wanted))
            stage.started_with = how_started(name, settings)
            if reuse != "derived":
                stage.reporter.open()
                stage.started = time.time()  # 第一次建 MLflow 的数据库要好几秒：不算在训练里
            seed_everything(settings.seed)
        elif reuse != "derived":
            if settings.record:
                raise UserError(f"{folder.path} 是以前的结果，--record 只记这次量到的：再加上 --retrain。")
            print(f"已有训练结果，直接加载：{folder.path}（--retrain 重新训练）")
        trained = stage.record is not None
        try:
            yield stage
        except BaseException as error:
            if reuse != "derived":
                stage.reporter.stop(failed=isinstance(error, Exception))
            raise
        if stage.record and not trained and reuse != "derived":
            stage.reporter.finish(stage.record)
            if settings.record:
                record_run(settings.record, stage.record)


def how_started(name: str, settings: LessonSettings) -> dict[str, str | int | None]:
    """→ ``{"script", "commit", "directory", "threads"}``：以后照样再做一遍（alignment_ops/version_tracking.py）要知道的。

    脚本从仓库最上层写起；不是 git 的工作副本，commit 是 None；相对的路径从 directory 算起；线程数不同，加法的次序就不同。
    """
    module = sys.modules[type(settings).__module__]
    script = Path(getattr(module, "__file__", None) or name).resolve()
    inside = script.is_relative_to(ROOT)
    return {
        "script": script.relative_to(ROOT).as_posix() if inside else script.name,
        "commit": _commit(),
        "directory": str(Path.cwd()),
        "threads": torch.get_num_threads(),
    }


@functools.cache  # 一个进程里问一次 git
def _commit() -> str | None:
    try:
        return current_commit() if is_main() else None  # 只有主进程写 run.json
    except UserError:
        return None


def _find_record(folder: RunFolder, wanted: dict, retrain: bool, reuse: str) -> dict | None:
    if reuse == "same":
        return None if retrain else folder.finished(wanted)
    found = load_run(folder.path)
    changed = "；".join(differences(found["fingerprint"], wanted)) if found else ""
    if not changed:
        return found
    if reuse == "any":
        print(f"用 {folder.path.name} 里已有的模型，它的设置和这次的不同（{changed}）。")
        return found
    print(f"{folder.path.name} 的设置和这次的不同，重新做（{changed}）。")
    return None


def _points(checkpoint: Path) -> list[dict]:
    """检查点里的历史；库自带的训练器写的没有它，最后由 run.json 补上。"""
    path = checkpoint / "history.json"
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return [row for row in rows if isinstance(row, dict) and "step" in row]


def show_metrics(metrics: dict) -> None:
    for name, value in metrics.items():
        if isinstance(value, float):
            form = ".2g" if 0 < abs(value) < 1e-3 else ".4f"  # 2e-5 不写成 0.0000
            print(f"  {name:<27} {value:{form}}")
        elif not isinstance(value, (dict, list)):
            print(f"  {name:<27} {value}")
