"""训练循环之外的部分：Trainer 的参数、按长度分批、进度、检查点的完成标记。"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from torch.utils.data import Sampler
from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from nlp_common.device import precision_flags
from nlp_common.runs import CHECKPOINT_DONE, write_json

from .stage import Stage


class LengthBucketSampler(Sampler[int]):
    """把长度相近的行排进同一批，少算填充：打乱 → 每 50 批为一池，池内按长度排 → 再打乱各批的次序。

    次序只由 (seed, epoch) 决定，所以中断后继续训练看到的数据与不中断完全相同。
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int, pool: int = 50):
        self.lengths, self.batch_size, self.seed, self.pool = lengths, batch_size, seed, pool
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = random.Random(self.seed * 100_003 + self.epoch)
        order = list(range(len(self.lengths)))
        rng.shuffle(order)
        size = self.batch_size * self.pool
        batches = []
        for start in range(0, len(order), size):
            pool = sorted(order[start : start + size], key=self.lengths.__getitem__)
            batches += [pool[i : i + self.batch_size] for i in range(0, len(pool), self.batch_size)]
        last = batches.pop() if batches and len(batches[-1]) < self.batch_size else []
        rng.shuffle(batches)  # 不满的一批留在最后，别让它打乱后面的分批
        yield from (index for batch in [*batches, last] for index in batch)


class Bucketed:
    """混入任何 Trainer：训练数据按长度分批。用之前设好 ``row_lengths``。"""

    row_lengths: list[int]

    def _get_train_sampler(self, *_):
        return LengthBucketSampler(
            self.row_lengths, self.args.per_device_train_batch_size, self.args.data_seed or self.args.seed
        )


def training_kwargs(stage: Stage) -> dict:
    """settings → TrainingArguments / DPOConfig / RewardConfig 共有的参数。"""
    s = stage.settings
    names = [
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
    ]
    # transformers 5.23 起改名；TRL 的配置默认开着它，所以总要写明
    fields = TrainingArguments.__dataclass_fields__
    checkpointing = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if n in fields)
    return {
        checkpointing: s.gradient_checkpointing,
        **{name: getattr(s, name) for name in names},
        **precision_flags(stage.device),
        "output_dir": str(stage.folder.checkpoints),
        "save_strategy": "steps",
        "save_total_limit": 2,  # 正在写的一个加上写完的一个：写到一半被杀，还有前一个可用
        "report_to": "none",
        "disable_tqdm": True,  # 进度由 Progress 显示
        "remove_unused_columns": False,
        "dataloader_pin_memory": stage.device.type == "cuda",
    }


def run_trainer(trainer, stage: Stage, progress: Progress) -> None:
    """训练到底，有检查点就从检查点继续。"""
    trainer.remove_callback(PrinterCallback)  # 它把每条日志原样打印成字典；进度条上已有 loss
    trainer.add_callback(progress)
    trainer.train(resume_from_checkpoint=stage.checkpoint())


class Progress(TrainerCallback):
    """显示进度、给写完的检查点打上完成标记、统计吞吐。"""

    def __init__(self, stage: Stage, label: str, row_tokens: list[int]):
        """row_tokens：每行有几个 token（不算填充）。"""
        self.stage, self.label, self.row_tokens = stage, label, row_tokens
        self.bar: tqdm | None = None

    def on_train_begin(self, args, state, control, **_):
        self.first_epoch, self.started = state.epoch or 0, time.perf_counter()
        if state.is_world_process_zero:
            self.bar = progress_bar(self.label, state.max_steps, state.global_step)

    def on_step_end(self, args, state, control, **_):
        if self.bar is not None:
            self.bar.update(1)

    def on_log(self, args, state, control, logs=None, **_):
        if self.bar is not None and logs and "loss" in logs:
            self.bar.set_postfix_str(f"loss {logs['loss']:.3f}", refresh=False)

    def on_save(self, args, state, control, **_):
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_json(folder / CHECKPOINT_DONE, {"seconds": self.stage.seconds()})

    def on_train_end(self, args, state, control, **_):
        seconds = time.perf_counter() - self.started
        epochs = state.epoch - self.first_epoch  # 最后一批可能不满，按遍数算才准
        self.metrics = {
            "train_samples_per_s": round(epochs * len(self.row_tokens) / seconds, 2),
            "train_tokens_per_s": round(epochs * sum(self.row_tokens) / seconds, 1),
            "train_seconds": round(seconds, 2),
        }
        if self.bar is not None:
            self.bar.close()


def progress_bar(label: str, total: int, initial: int = 0) -> tqdm:
    """终端里是一条会动的进度条；输出到文件时每 20 秒一行。"""
    return tqdm(
        total=total,
        initial=initial,
        desc=f"  {label}",
        unit="步",
        mininterval=0.5 if sys.stderr.isatty() else 20,
        ascii=" #" if not sys.stderr.isatty() else None,
        dynamic_ncols=True,
    )


def loss_curve(log_history: list[dict]) -> list[dict]:
    """Trainer 的日志里留下画曲线要用的：``{"step", "loss", …}``。"""
    drop = {"epoch", "grad_norm", "learning_rate"}
    return [{k: v for k, v in row.items() if k not in drop} for row in log_history if "loss" in row]
