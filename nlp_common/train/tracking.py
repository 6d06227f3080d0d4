"""``--report_to``：一边训练，一边把曲线记到别处去看。五种去处在 track_to.py，这里是一个小接口。

    reporter = Reporter("mlflow", "sft", fingerprint, work)
    reporter.open()                          # 连不上、令牌不对是 UserError：训练之前就说
    reporter.log(100, {"loss": 1.23})        # 训练循环每 logging_steps 步一次
    reporter.finish(run_json)                # 指标、run.json；或 reporter.stop(failed)

训练比记录要紧：中途断了网、数据库锁住了，只说一句，记不上的先留着，过一会儿再送。最后也没有送到也不丢：曲线都在 run.json 里，
``alignment_ops/version_tracking.py upload 文件夹`` 补记。中断以后接着训练，还记在同一次里，不重复。
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import time
from pathlib import Path
from typing import Protocol

from nlp_common.base.errors import UserError
from nlp_common.base.measurements import ROOT, numbers_in
from nlp_common.base.processes import is_main

PLACES = ("none", "jsonl", "tensorboard", "mlflow", "wandb", "swanlab")
PACKAGES = {name: name for name in PLACES[2:]}  # 去处 → 要装的包
WAIT = 30.0  # 没有送到，过几秒再试：锁着的数据库一试就要等上几秒，不能步步都试
SECRETS = ("WANDB_API_KEY", "SWANLAB_API_KEY", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD")


class Place(Protocol):
    """一种去处。run 是 ``{"name", "settings"}``，number 是上次没有训练完的那一次的编号。"""

    def open(self, run: dict, number: str | None) -> tuple[str, str]:
        """→ (这一次的编号, 在哪里看)。"""

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def finish(self, record: dict) -> None: ...

    def stop(self, failed: bool) -> None: ...


def tracking_folder() -> Path:
    """不联网的几种记在哪里：仓库里的 outputs/tracking，或环境变量 NLP_LEARNING_TRACKING。"""
    return Path(os.environ.get("NLP_LEARNING_TRACKING") or ROOT / "outputs" / "tracking").expanduser()


def check_installed(to: str) -> None:
    """要用的包没有装是 UserError，说出装它的命令。"""
    package = PACKAGES.get(to)
    if package and importlib.util.find_spec(package) is None:
        raise UserError(
            f'--report_to {to} 要先装它：pip install {package}（或 pip install -e ".[ops]"）；'
            "不装也行：--report_to jsonl。"
        )


def without_secrets(text: str) -> str:
    """错误信息里的令牌、网址里的密码换成星号。"""
    for name in SECRETS:
        if secret := os.environ.get(name):
            text = text.replace(secret, "***")
    return re.sub(r"//[^/@\s]+@", "//***@", text)


class Reporter:
    """一次训练的记录：还没有 open（或 ``--report_to none``、不是主进程）时，什么也不做。"""

    def __init__(self, to: str, name: str, settings: dict, work: Path):
        self.to, self.run, self.state_file = to, {"name": name, "settings": settings}, work / "tracking.json"
        self.place: Place | None = None
        self.number: str | None = None  # 那一边给这一次的编号
        self.last: dict[str, int] = {}  # 每条曲线记到第几步了
        self.waiting: list[tuple[int, dict[str, float]]] = []  # 还没有送到的
        self.retry_at = 0.0
        self.lost = ""  # 为什么送不到

    def open(self) -> None:
        if self.to == "none" or not is_main():
            return
        from nlp_common.train.track_to import PLACES_BY_NAME, advice

        state: dict = {}
        with contextlib.suppress(OSError, ValueError):  # 没有，或写到一半被杀了：从头记
            state = json.loads(self.state_file.read_text(encoding="utf-8"))
        if state.get("to") != self.to:
            state = {}
        place = PLACES_BY_NAME[self.to]()
        try:
            self.number, where = place.open(self.run, state.get("number"))
        except Exception as error:  # 各家的库抛什么都有：一律说成一句话
            raise UserError(f"--report_to {self.to} 记不了：{reason(error)}。{advice(self.to)}") from error
        # 接不上原来那一次的（SwanLab 不联网时）、先攒在内存里的（被杀了就丢了）：检查点里的都再记一遍
        same = self.number == state.get("number") and not getattr(place, "buffered", False)
        self.place, self.last = place, state.get("last", {}) if same else {}
        self._save_state()
        print(f"训练曲线记到 {where}")

    def log(self, step: int, values: dict[str, float]) -> None:
        """第 step 步的几个数；从检查点接着训练，走过的几步已经记了，不再记。"""
        if self.place is None:
            return
        new = {name: value for name, value in values.items() if step > self.last.get(name, -1)}
        if new:
            self.last |= dict.fromkeys(new, step)
            self.waiting.append((step, new))
            self._send()

    def finish(self, record: dict) -> None:
        """训练完了：history 里还没有记的几步、指标、整个 run.json。"""
        if self.place is None:
            return
        for row in record.get("history", []):
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                self.log(row["step"], numbers_in({k: v for k, v in row.items() if k != "step"}))
        self.retry_at = 0.0
        self._send()
        if not self.waiting:
            try:
                self.place.finish(record)
            except Exception as error:
                self.lost = reason(error)
        if self.waiting or self.lost:
            print(
                f"结果已经存好，只是没有全记到 {self.to}（{self.lost}）。补记："
                f"python alignment_ops/version_tracking.py upload 结果文件夹 --report_to {self.to}"
            )
        self.place = None

    def stop(self, failed: bool) -> None:
        """没有训练完就停了：中断的，同一条命令接着训练，也接着记。"""
        if self.place is not None:
            self.retry_at = 0.0
            self._send()
            with contextlib.suppress(Exception):  # 已经有一个错误在往外抛，不用这里的盖住它
                self.place.stop(failed)
            self.place = None

    def _send(self) -> None:
        if time.monotonic() < self.retry_at:
            return
        assert self.place is not None
        try:
            while self.waiting:
                self.place.log(*self.waiting[0])
                self.waiting.pop(0)
            self.lost = ""
        except Exception as error:
            if not self.lost:
                print(f"  记到 {self.to} 时出错（{reason(error)}）：先留着，训练照常。")
            self.lost, self.retry_at = reason(error), time.monotonic() + WAIT
        self._save_state()

    def _save_state(self) -> None:
        """记到哪里了；还没有送到的几步不算，杀了再来会再记一遍。"""
        last = dict(self.last)
        for step, values in reversed(self.waiting):
            last |= {name: step - 1 for name in values}
        text = json.dumps({"to": self.to, "number": self.number, "last": last})
        with contextlib.suppress(OSError):  # 磁盘满了由存检查点的去说
            self.state_file.write_text(text, encoding="utf-8")


def reason(error: Exception) -> str:
    """错误的第一行，没有令牌与密码，不太长。"""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = without_secrets(lines[0] if lines else type(error).__name__)
    return text if len(text) <= 160 else text[:160] + "…"
