"""训练循环之外、任何 Trainer 都用得上的部分：按长度分批、几个进程分一批、进度与吞吐、检查点的完成标记。"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from nlp_common.base.device import precision_flags
from nlp_common.base.errors import UserError
from nlp_common.base.processes import is_main, num_processes, wait
from nlp_common.base.runs import CHECKPOINT_DONE, write_json
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


class SharedBatches(Sampler[list[int]]):
    """一大批切成 parts 份，依次给出：accelerate 把第 i 份发给第 i 个进程，合起来恰好是一个进程的一大批。

    最后不满的一批也尽量平分，不像 accelerate 默认的那样拿开头的行来凑；不够每个进程一行的，才不要了。
    """

    def __init__(self, sampler: Sampler[int], batch_size: int, parts: int):
        """batch_size：每一份多少行。"""
        self.sampler, self.batch_size, self.parts = sampler, batch_size, parts
        self.drop_last = False

    def __len__(self) -> int:
        full, rest = divmod(len(self.sampler), self.batch_size * self.parts)
        return (full + (rest >= self.parts)) * self.parts

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self.sampler)
        for start in range(0, len(order), self.batch_size * self.parts):
            batch = order[start : start + self.batch_size * self.parts]
            if len(batch) >= self.parts:
                cuts = [len(batch) * i // self.parts for i in range(self.parts + 1)]
                yield from (batch[a:b] for a, b in pairwise(cuts))


class ExactTrainer:
    """混入 Trainer：n 个进程各 B 行，与一个进程 n·B 行走出同一步；梯度累积也一样。

    compute_loss 把损失的和除以 num_items_in_batch 即可。它是整个更新步、所有进程里一共多少项（count_items 数的），
    再除以进程数：DDP 对各进程的梯度求的是平均，要的却是和。
    """

    def __init__(self, model=None, args=None, **kwargs):
        if args is not None and args.n_gpu > 1:
            args._n_gpu = 1  # 不用 DataParallel：python 直接运行只用一块 GPU，几块用 accelerate launch
        super().__init__(model=model, args=args, **kwargs)

    model_accepts_loss_kwargs = True  # 请 Trainer 把 num_items_in_batch 传进来
    loss_is_scaled_for_ga = True  # 已经按整个更新步平均过，不必再除以累积的批数

    def count_items(self, batch: dict) -> torch.Tensor:
        """一批里有几项（标签、偏好对）要算损失。"""
        return (batch["labels"] != -100).sum()

    def get_batch_samples(self, epoch_iterator, num_batches: int, device):
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        n_items = sum(self.count_items(batch) for batch in batches).to(device, torch.float)
        return batches, self.accelerator.reduce(n_items, "mean")

    def get_train_dataloader(self) -> DataLoader:
        loader = super().get_train_dataloader()
        if num_processes() == 1:
            return loader
        shard = loader.batch_sampler  # accelerate 的 BatchSamplerShard，里面是普通的 BatchSampler
        shard.batch_sampler = SharedBatches(
            shard.batch_sampler.sampler, self._train_batch_size, num_processes()
        )
        shard.even_batches = False
        if not len(shard):
            raise UserError(f"训练数据只有 {len(self.train_dataset)} 行，不够 {num_processes()} 个进程分。")
        return loader


class BucketTrainer(Trainer):
    """训练数据按长度分批的 Trainer。行是 ``{"input_ids": [...], …}``；其余与 Trainer 完全相同。"""

    def _get_train_sampler(self, *_):
        lengths = [len(row["input_ids"]) for row in self.train_dataset]
        return LengthBucketSampler(lengths, self.args.per_device_train_batch_size, self.args.seed)


class Progress(TrainerCallback):
    """显示进度、给写完的检查点打上完成标记、统计吞吐。seconds() 是这次运行至今花了几秒。"""

    def __init__(self, label: str, n_rows: int, seconds: Callable[[], float]):
        self.label, self.n_rows, self.seconds = label, n_rows, seconds
        self.bar: tqdm | None = None
        self.paused = 0.0  # 评测与存盘花掉的秒数，不算进训练速度
        self.step_ended: float | None = None

    def on_train_begin(self, args, state, control, **_):
        self.first_epoch, self.started = state.epoch or 0, time.perf_counter()
        if state.is_world_process_zero:
            self.bar = progress_bar(self.label, state.max_steps, state.global_step)

    def on_step_end(self, args, state, control, **_):
        if control.should_evaluate or control.should_save:
            self.step_ended = time.perf_counter()
        if self.bar is not None:
            self.bar.update(1)

    def on_step_begin(self, args, state, control, **_):
        self._resume_clock()

    def _resume_clock(self) -> None:
        if self.step_ended is not None:
            self.paused += time.perf_counter() - self.step_ended
            self.step_ended = None

    def on_evaluate(self, args, state, control, metrics=None, **_):
        if self.bar is not None and metrics:
            shown = "  ".join(
                f"{name.removeprefix('eval_')} {metrics[name]:.4f}"
                for name in ("eval_loss", "eval_accuracy", "eval_macro_f1")
                if name in metrics
            )
            self.bar.write(
                f"  第 {state.global_step} 步（{state.epoch:.1f} 遍）验证：{shown}", file=sys.stdout
            )

    def on_log(self, args, state, control, logs=None, **_):
        if self.bar is not None and logs and "loss" in logs:
            self.bar.set_postfix_str(f"loss {logs['loss']:.3f}", refresh=False)

    def on_save(self, args, state, control, **_):
        wait()  # 别的进程的随机数状态、优化器的分片也写完了，才算写完
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_json(folder / CHECKPOINT_DONE, {"seconds": self.seconds()})

    def on_train_end(self, args, state, control, **_):
        self._resume_clock()
        seconds = time.perf_counter() - self.started - self.paused
        epochs = state.epoch - self.first_epoch  # 最后一批可能不满，按遍数算才准
        self.metrics = {
            "train_samples_per_s": round(epochs * self.n_rows / seconds, 2),
            "train_seconds": round(seconds, 2),
        }
        if self.bar is not None:
            self.bar.close()


def run_trainer(trainer: Trainer, progress: Progress, checkpoint: Path | None) -> None:
    """训练到底，有检查点就从检查点继续。"""
    logging.disable_progress_bar()  # 每存一次检查点就闪一条"写权重"的进度条；警告照常显示
    trainer.remove_callback(PrinterCallback)  # 它把每条日志原样打印成字典；进度条上已有 loss
    trainer.add_callback(progress)
    trainer.train(resume_from_checkpoint=checkpoint)


def full_state(trainer: Trainer) -> dict | None:
    """参数分片在各个进程里时（FSDP、ZeRO-3）收齐成一份，各进程都要调用；没有分片是 None。"""
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return None


def progress_bar(label: str, total: int, initial: int = 0) -> tqdm:
    """终端里是一条会动的进度条；输出到文件时每 20 秒一行；只有主进程有。"""
    return tqdm(
        disable=not is_main(),
        total=total,
        initial=initial,
        desc=f"  {label}",
        unit="步",
        mininterval=0.5 if sys.stderr.isatty() else 20,
        ascii=" #" if not sys.stderr.isatty() else None,
        dynamic_ncols=True,
    )


def curves(log_history: list[dict]) -> list[dict]:
    """Trainer 的日志里留下画曲线要用的：``{"step", "loss" 或 "eval_…"}``。"""
    keep = ("loss", "eval_loss", "eval_accuracy", "eval_macro_f1")
    rows = [{"step": row["step"]} | {k: row[k] for k in keep if k in row} for row in log_history]
    return [row for row in rows if len(row) > 1]


def trainer_arguments(stage: Stage, **changes) -> dict:
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
