"""看得见的训练循环：打乱、分批 → 前向、反向 → 裁剪、更新 → 学习率 → 记录 → 检查点；在一个或几个进程上。

pretrain、SFT、奖励模型、DPO 交给它三样东西：分好词的行（rows），怎样拼成一批（collate），一批的损失（loss）。
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import get_scheduler

from nlp_common.lm.losses import count_labels
from nlp_common.train.batches import micro_batches_of, my_batches
from nlp_common.train.checkpoints import load_checkpoint, save_checkpoint
from nlp_common.train.progress import average, progress_bar, speed
from nlp_common.train.settings import LoopSettings
from nlp_common.train.setup import gather_state, make_accelerator, recompute_activations
from nlp_common.train.stage import Stage

if TYPE_CHECKING:
    from accelerate import Accelerator

# 一批的损失：(模型, 一批) → (损失的和, 另外要记录的数)
Loss = Callable[[torch.nn.Module, dict], tuple[torch.Tensor, dict]]


@dataclass
class Trained:
    """训练的结果；模型就是交给循环的那一个，已经训练好了。"""

    history: list[dict]  # 每 logging_steps 步一条：{"step", "loss", …}
    metrics: dict  # train_samples_per_s、train_tokens_per_s、train_seconds
    state: dict | None = None  # 参数分片在各个进程里时（FSDP、ZeRO-3）收齐的一份


def train_loop(
    stage: Stage,
    label: str,
    model: torch.nn.Module,
    rows: list,
    collate: Callable[[list], dict],
    loss: Loss,
    tokens: list[int],
    lengths: list[int] | None = None,
    count: Callable[[dict], int] = count_labels,
    build_optimizer: Callable[[torch.nn.Module, LoopSettings], torch.optim.Optimizer] | None = None,
) -> Trained:
    """训练到底，有检查点就从检查点继续。

    loss(model, 一批) 给出这一批损失的**和**，以及另外要记录的数（每项一个，求平均）；count(一批) 是有几项。
    tokens 是每行几个 token；给了 lengths，就把长短相近的行排进同一批。build_optimizer：换一个优化器，默认 AdamW。
    """
    settings = stage.settings
    accelerator = make_accelerator(stage.device, settings)
    if settings.gradient_checkpointing:
        recompute_activations(model)
    optimizer = (build_optimizer or make_optimizer)(model, settings)

    # 一遍有几步，一共几步；学习率先升后降
    n_batches = len(my_batches(len(rows), lengths, settings, epoch=0))
    steps_per_epoch = math.ceil(n_batches / settings.gradient_accumulation_steps)
    last_step = math.ceil(settings.num_train_epochs * steps_per_epoch)
    if settings.max_steps > 0:
        last_step = settings.max_steps
    warmup = settings.warmup_steps if settings.warmup_steps >= 1 else settings.warmup_steps * last_step
    schedule = get_scheduler(settings.lr_scheduler_type, optimizer, math.ceil(warmup), last_step)

    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(schedule)
    step = 0
    history: list[dict] = []
    if latest := stage.checkpoint():
        step, history = load_checkpoint(latest, accelerator)
    first_step, started, paused = step, time.perf_counter(), 0.0
    bar = progress_bar(label, last_step, step)
    recent: list[dict] = []  # 上次记录以来各步的损失
    model.train()
    while step < last_step:
        epoch, done = divmod(step, steps_per_epoch)  # 次序只由 (种子, epoch) 决定：接着训练时跳过走过的
        steps = micro_batches_of(rows, collate, lengths, settings, epoch, done, accelerator.device)
        for micro_batches in steps:
            recent.append(update(accelerator, model, optimizer, micro_batches, loss, count, settings))
            if not accelerator.optimizer_step_was_skipped:  # fp16 溢出的一步没有更新，学习率也不动
                schedule.step()
            step += 1
            bar.update(1)
            if step % settings.logging_steps == 0:
                history.append({"step": step, **average(accelerator, recent)})
                bar.set_postfix_str(f"loss {history[-1]['loss']:.3f}", refresh=False)
                stage.report(history[-1])
                recent.clear()
            if step % settings.save_steps == 0:
                paused += save_checkpoint(stage, accelerator, step, history)
            if step == last_step:
                break
    bar.close()
    seconds = time.perf_counter() - started - paused
    metrics = speed((step - first_step) / steps_per_epoch, tokens, seconds)
    return Trained(history, metrics, gather_state(accelerator, model))


def update(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: list[dict],
    loss: Loss,
    count: Callable[[dict], int],
    settings: LoopSettings,
) -> dict[str, torch.Tensor]:
    """一个更新步：几批的梯度累加，裁剪，更新。返回每项平均的损失，与 loss 另给的数的平均。

    损失是和，除以整个更新步、所有进程里的项数，所以 1×8 累积成 8×1、一个进程换成八个，走出的都是同一步；
    除的是每个进程平均几项，因为 DDP 对各进程的梯度求的是平均，要的却是和。
    """
    n_items = torch.tensor(float(sum(count(batch) for batch in micro_batches)), device=accelerator.device)
    n_items = accelerator.reduce(n_items, "mean")
    totals: dict[str, Any] = {"loss": 0.0}
    for index, batch in enumerate(micro_batches):
        is_last = index == len(micro_batches) - 1  # 最后一批才在进程之间求平均
        with contextlib.nullcontext() if is_last else accelerator.no_sync(model):
            value, notes = loss(model, batch)
            accelerator.backward(value / n_items)
        for name, values in {"loss": value, **notes}.items():
            totals[name] = totals.get(name, 0.0) + values.detach().float().sum() / n_items
    if settings.max_grad_norm > 0:
        accelerator.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return totals


def make_optimizer(model: torch.nn.Module, settings: LoopSettings) -> torch.optim.Optimizer:
    """AdamW（Loshchilov & Hutter 2019）：矩阵才衰减，偏置和归一化的增益往 0 拉没有道理。"""
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    vectors = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    betas = (0.9, settings.adam_beta2)
    return torch.optim.AdamW(groups, settings.learning_rate, betas, fused=True)  # fused：一次更新全部参数
