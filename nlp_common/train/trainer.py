"""用库自带的训练器（transformers 的 Trainer、TRL 的各种 Trainer）时，训练循环之外的部分：参数、进度、检查点的标记。

BERT 脚本用它们，Qwen 链的 ``--trainer library`` 也用它们。
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from logging import LogRecord
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import logging

from nlp_common.base.device import precision_flags
from nlp_common.base.processes import wait
from nlp_common.base.runs import CHECKPOINT_DONE, write_json
from nlp_common.train.batches import LengthBucketSampler
from nlp_common.train.loop import Trained
from nlp_common.train.progress import progress_bar, speed
from nlp_common.train.stage import Stage

# 设置里原样交给 TrainingArguments 的
PASSED_ON = {
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "warmup_steps",
    "weight_decay",
    "adam_beta2",
    "max_grad_norm",
    "lr_scheduler_type",
    "dataloader_num_workers",
    "logging_steps",
    "save_steps",
    "seed",
}


def trainer_arguments(stage: Stage, **changes: Any) -> dict:
    """stage.settings → TrainingArguments、DPOConfig、RewardConfig 等共有的参数；changes 改掉其中几个。"""
    # transformers 5.23 起改名；TRL 的配置默认开着它，所以总要写明
    fields = TrainingArguments.__dataclass_fields__
    checkpointing = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if n in fields)
    settings = {name: value for name, value in asdict(stage.settings).items() if name in PASSED_ON}
    return {
        **settings,
        **precision_flags(stage.device),
        checkpointing: getattr(stage.settings, "gradient_checkpointing", False),
        "use_cpu": stage.device.type == "cpu",  # 几个进程时，据此选 gloo
        "ddp_find_unused_parameters": False,  # 参数个个都用得上，不必每步去找
        "output_dir": str(stage.folder.checkpoints),
        "save_strategy": "steps",
        "save_total_limit": 2,  # 正在写的（或最好的）一个，加上最近写完的一个
        "report_to": "none",
        "disable_tqdm": True,  # 进度由 Progress 显示
        "remove_unused_columns": False,
        "dataloader_pin_memory": stage.device.type == "cuda",
        **changes,
    }


class BucketTrainer(Trainer):
    """训练数据按长度分批的 Trainer。行是 ``{"input_ids": [...], …}``；其余与 Trainer 完全相同。"""

    def _get_train_sampler(self, *_: Any) -> LengthBucketSampler:
        lengths = [len(row["input_ids"]) for row in self.train_dataset]
        return LengthBucketSampler(lengths, self.args.per_device_train_batch_size, self.args.seed)


class Progress(TrainerCallback):
    """显示进度、给写完的检查点打上完成标记、统计吞吐、把曲线交给 report（stage.report）。

    tokens 是每行几个 token，seconds() 是这次运行至今花了几秒。
    """

    def __init__(
        self,
        label: str,
        tokens: list[int],
        seconds: Callable[[], float],
        report: Callable[[dict], None] | None = None,
    ):
        self.label, self.tokens, self.seconds, self.report = label, tokens, seconds, report
        self.bar: tqdm | None = None
        self.paused = 0.0  # 评测与存盘花掉的秒数，不算进训练速度
        self.step_ended: float | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.first_epoch, self.started = state.epoch or 0, time.perf_counter()
        if state.is_world_process_zero:
            self.bar = progress_bar(self.label, state.max_steps, state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if control.should_evaluate or control.should_save:
            self.step_ended = time.perf_counter()
        if self.bar is not None:
            self.bar.update(1)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._resume_clock()

    def _resume_clock(self) -> None:
        if self.step_ended is not None:
            self.paused += time.perf_counter() - self.step_ended
            self.step_ended = None

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict | None = None,
        **_: Any,
    ) -> None:
        if self.bar is not None and metrics:
            shown = "  ".join(
                f"{name.removeprefix('eval_')} {metrics[name]:.4f}"
                for name in ("eval_loss", "eval_accuracy", "eval_macro_f1")
                if name in metrics
            )
            self.bar.write(
                f"  第 {state.global_step} 步（{state.epoch:.1f} 遍）验证：{shown}", file=sys.stdout
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict | None = None,
        **_: Any,
    ) -> None:
        if self.bar is not None and logs and "loss" in logs:
            self.bar.set_postfix_str(f"loss {logs['loss']:.3f}", refresh=False)
        if self.report is not None and logs:
            for point in curves([{**logs, "step": state.global_step}]):
                self.report(point)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        wait()  # 别的进程的随机数状态、优化器的分片也写完了，才算写完
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_json(folder / CHECKPOINT_DONE, {"seconds": self.seconds()})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._resume_clock()
        seconds = time.perf_counter() - self.started - self.paused
        self.metrics = speed(state.epoch - self.first_epoch, self.tokens, seconds)
        if self.bar is not None:
            self.bar.close()


class HarmlessMissingKeys:
    """从检查点继续时，Trainer 说缺了共用的权重（lm_head 就是嵌入那张表，只存一份）：不缺，不显示；真缺的译成中文。"""

    def __init__(self, model: torch.nn.Module):
        names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        self.shared = {name for same in names.values() if len(same) > 1 for name in same}

    def filter(self, record: LogRecord) -> bool:
        message = record.getMessage()
        if not message.startswith("There were missing keys"):
            return True
        missing = set(re.findall(r"'([^']+)'", message))
        if missing <= self.shared:
            return False
        record.msg, record.args = f"检查点里缺这些权重：{'、'.join(sorted(missing - self.shared))}", ()
        return True


def run_trainer(trainer: Trainer, progress: Progress, checkpoint: Path | None) -> None:
    """训练到底，有检查点就从检查点继续。"""
    logging.disable_progress_bar()  # 每存一次检查点就闪一条"写权重"的进度条；警告照常显示
    trainer.args._n_gpu = 1  # 不用 DataParallel：python 直接运行只用一块 GPU，几块用 accelerate launch
    trainer.remove_callback(PrinterCallback)  # 它把每条日志原样打印成字典；进度条上已有 loss
    trainer.add_callback(progress)
    harmless = HarmlessMissingKeys(trainer.model)
    logger = logging.get_logger("transformers.trainer")
    logger.addFilter(harmless)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        logger.removeFilter(harmless)


def run_library(trainer: Trainer, stage: Stage, label: str, tokens: list[int]) -> Trained:
    """--trainer library：库自己的训练器训练到底，结果的写法与 train_loop 的相同。"""
    progress = Progress(label, tokens, stage.seconds, stage.report)
    run_trainer(trainer, progress, stage.checkpoint())
    drop = {"epoch", "grad_norm", "learning_rate"}
    logs = [row for row in trainer.state.log_history if "loss" in row]
    history = [{name: value for name, value in row.items() if name not in drop} for row in logs]
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) if sharded else None
    return Trained(history, progress.metrics, state)


def curves(log_history: list[dict]) -> list[dict]:
    """Trainer 的日志里留下画曲线要用的：``{"step", "loss" 或 "eval_…"}``。"""
    keep = ("loss", "eval_loss", "eval_accuracy", "eval_macro_f1")
    rows = [{"step": row["step"]} | {k: row[k] for k in keep if k in row} for row in log_history]
    return [row for row in rows if len(row) > 1]
