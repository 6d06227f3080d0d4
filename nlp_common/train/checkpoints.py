"""检查点：模型、优化器、随机数的状态由 accelerate 存，加上历史；写完整了才打上完成标记。"""

from __future__ import annotations

import json
import logging
import shutil
import time
from pathlib import Path

from accelerate import Accelerator

from nlp_common.base.processes import is_main, wait
from nlp_common.base.runs import CHECKPOINT_DONE, write_json
from nlp_common.train.stage import Stage

# 小模型的 lm_head 就是嵌入那张表，只存一份；accelerate 每存一次都要警告一遍
logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
KEEP = 2  # 正在写的一个加上写完的一个：写到一半被杀，还有前一个可用


def save_checkpoint(stage: Stage, accelerator: Accelerator, step: int, history: list[dict]) -> float:
    """存第 step 步的状态：accelerator.prepare 过的模型与优化器、登记过的学习率、fp16 的倍数、随机数。各进程都要调用。返回用了几秒。"""
    started = time.perf_counter()
    folder = stage.folder.checkpoints / f"checkpoint-{step}"
    if is_main():
        shutil.rmtree(folder, ignore_errors=True)
    wait()
    accelerator.save_state(str(folder))
    wait()  # 别的进程的随机数状态、优化器的分片也写完了，才算写完
    if is_main():
        write_json(folder / "history.json", history)
        write_json(folder / CHECKPOINT_DONE, {"seconds": stage.seconds()})
        done = sorted(stage.folder.checkpoints.glob("checkpoint-*"), key=_step)
        for old in done[:-KEEP]:
            shutil.rmtree(old, ignore_errors=True)
    return time.perf_counter() - started


def load_checkpoint(folder: Path, accelerator: Accelerator) -> tuple[int, list[dict]]:
    """把状态读回 accelerator.prepare 过的模型与优化器 → (走完了几步, 历史)。"""
    accelerator.load_state(str(folder))
    return _step(folder), json.loads((folder / "history.json").read_text(encoding="utf-8"))


def _step(folder: Path) -> int:
    return int(folder.name.rsplit("-", 1)[1])
