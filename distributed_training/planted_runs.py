"""几十次真的小训练，每次里埋一样毛病（或一样也没有），写成各家的日志：用来考 training_log_inspector.py。

毛病是照它们真正发生的样子埋的：坏数据真的喂进去，学习率真的写错，读数据真的停住；日志由 write_* 照各家的写法写出来。
"""

from __future__ import annotations

import json
import math
import random
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from nlp_common.tiny import world
from small_gpt import Sizes, SmallGPT, make_model
from tensorboard_events import EventWriter

LENGTH, BATCH, STEPS = 64, 4, 240
MAX_GRAD_NORM, LEARNING_RATE, WARMUP = 1.0, 1e-2, 10
STALL = 1.6  # 秒

FAULTS = {
    "spike": "一批坏数据（标签全乱了）",
    "nan": "一步的损失溢出成无穷大",
    "plateau": "学习率的曲线写错，三成以后几乎是 0",
    "divergence": "学习率的曲线写错，六成以后大了一百倍",
    "gradient": "有一步忘了除以累积的批数，梯度大了五十倍",
    "clipping": "裁剪的阈值写成 0.05",
    "repeated": "每一遍都不打乱，同样的批按同样的次序来",
    "restarted": "接着训练时数据从头读起，后一半又是前一半的那些批",
    "stall": "读数据停住了一会儿",
}


@dataclass
class Run:
    """一次训练记下来的；points 每步一条。"""

    fault: str | None
    seed: int
    at: int  # 毛病埋在第几步（1 起数）；一直都有的是 1
    points: list[dict]
    settings: dict
    model: SmallGPT


def sizes() -> Sizes:
    return Sizes(vocab=len(corpus()[1]), width=32, heads=4, layers=2, inner=64, context=LENGTH)


@cache
def corpus() -> tuple[Tensor, list[str]]:
    """小世界的故事连成一长串，一个字一个 token：``(各字的编号, 字表)``。"""
    text = "\n".join(row["text"] for row in world.documents(6000, seed=0))
    letters = sorted(set(text))
    number = {letter: index for index, letter in enumerate(letters)}
    return torch.tensor([number[letter] for letter in text]), letters


def train(fault: str | None, seed: int, steps: int = STEPS) -> Run:
    """训练一个小 GPT；fault 是埋哪一样毛病。毛病在哪一步由种子定。"""
    rng = random.Random(f"{fault} {seed}")
    at = rng.randrange(steps // 2, steps * 4 // 5)
    model = make_model(sizes(), seed, torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    limit = 0.05 if fault == "clipping" else MAX_GRAD_NORM
    points, tokens, started = [], 0, time.time()
    for step in range(1, steps + 1):
        rows = batch_of(step, seed, steps, fault)  # (B, T + 1)
        if fault == "spike" and step == at:
            rows = torch.randint(len(corpus()[1]), rows.shape, generator=torch.Generator().manual_seed(seed))
        if fault == "stall" and step in (at, at + 7):
            time.sleep(STALL)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, fault)
        logits = model(rows[:, :-1])  # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        if fault == "nan" and step == at:
            loss = loss * 1e38 * 1e38
        optimizer.zero_grad()
        loss.backward()
        if fault == "gradient" and step == at:
            for parameter in model.parameters():
                parameter.grad *= 50
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        optimizer.step()
        tokens += rows[:, 1:].numel()
        points.append(
            {
                "step": step,
                "loss": loss.item(),
                "grad_norm": norm.item(),
                "learning_rate": learning_rate(step, steps, fault),
                "tokens": tokens,
                "time": time.time(),
            }
        )
    settings = {"max_grad_norm": limit, "logging_steps": 1, "started": started, "seed": seed}
    whole = fault in ("clipping", "repeated", "restarted", "plateau", "divergence")
    return Run(fault, seed, 1 if whole else at, points, settings, model)


def batch_of(step: int, seed: int, steps: int, fault: str | None) -> Tensor:
    """第 step 步的一批：从长串里随机的几处切下来，(B, T + 1)。每步的随机数只看种子与步数。"""
    if fault == "repeated":
        step = step % (steps // 5)
    if fault == "restarted" and step > steps // 2:
        step -= steps // 2
    text = corpus()[0]
    generator = torch.Generator().manual_seed(seed * 100_003 + step)
    starts = torch.randint(len(text) - LENGTH - 1, (BATCH, 1), generator=generator)
    return text[starts + torch.arange(LENGTH + 1)]


def learning_rate(step: int, steps: int, fault: str | None) -> float:
    """先升，再沿余弦降到一成。"""
    if fault == "plateau" and step > steps * 0.3:
        return LEARNING_RATE * 1e-5
    rate = LEARNING_RATE * min(1.0, step / WARMUP)
    rate *= 0.55 + 0.45 * math.cos(math.pi * step / steps)
    return rate * (100 if fault == "divergence" and step > steps * 0.6 else 1)


# ---------------------------------------------------------------- 各家的写法


def write_ours(run: Run, folder: Path) -> Path:
    """我们的 run.json：历史里只有步数与损失，一次训练的速度在 metrics 里。"""
    folder.mkdir(parents=True, exist_ok=True)
    seconds = run.points[-1]["time"] - run.settings["started"]
    record = {
        "stage": "tiny",
        "settings": run.settings,
        "seconds": seconds,
        "metrics": {"train_seconds": seconds, "train_tokens_per_s": run.points[-1]["tokens"] / seconds},
        "history": [{"step": p["step"], "loss": p["loss"]} for p in run.points],
    }
    path = folder / "run.json"
    path.write_text(json.dumps(record, ensure_ascii=False, indent=1), encoding="utf-8")
    return path


def write_trainer_state(run: Run, folder: Path) -> Path:
    """transformers 的 Trainer：每次记录有 loss、grad_norm、learning_rate，没有时刻。"""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("loss", "grad_norm", "learning_rate", "step")
    history = [{name: p[name] for name in names} for p in run.points]
    seconds = run.points[-1]["time"] - run.settings["started"]
    history.append({"step": run.points[-1]["step"], "train_runtime": seconds})
    state = {"global_step": run.points[-1]["step"], "log_history": history, "logging_steps": 1}
    path = folder / "trainer_state.json"
    path.write_text(json.dumps(state, indent=1), encoding="utf-8")
    return path


def write_tensorboard(run: Run, folder: Path) -> Path:
    writer = EventWriter(folder, run.settings["started"])
    for p in run.points:
        for name in ("loss", "grad_norm", "learning_rate"):
            writer.add_scalar(f"train/{name}", p[name], p["step"], p["time"])
    writer.close()
    return writer.path


def write_deepspeed(run: Run, folder: Path) -> Path:
    """DeepSpeed 与 Megatron 的：一步一行，带时刻、每步的毫秒、损失、梯度范数。"""
    folder.mkdir(parents=True, exist_ok=True)
    lines, before = [], run.settings["started"]
    for p in run.points:
        moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(p["time"]))
        head = f"[{moment},{int(p['time'] % 1 * 1000):03d}] [INFO] [logging.py:107:log_dist] [Rank 0]"
        lines.append(f"{head} step={p['step']}, skipped=0, lr=[{p['learning_rate']:.6g}], mom=[(0.9, 0.98)]")
        elapsed, before = 1000 * (p["time"] - before), p["time"]
        lines.append(
            f" iteration {p['step']:8d}/{len(run.points):8d} | elapsed time per iteration (ms): {elapsed:.1f} "
            f"| learning rate: {p['learning_rate']:.3E} | global batch size: {BATCH:5d} | lm loss: {p['loss']:.6E} "
            f"| grad norm: {p['grad_norm']:.3f} | number of skipped iterations:   0 |"
        )
    path = folder / "deepspeed.log"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_text(run: Run, folder: Path) -> Path:
    """自己的脚本 print 出来的：没有梯度范数。"""
    folder.mkdir(parents=True, exist_ok=True)
    lines, before, tokens = [], run.settings["started"], 0
    for p in run.points:
        elapsed, before = p["time"] - before, p["time"]
        speed, tokens = (p["tokens"] - tokens) / elapsed, p["tokens"]
        lines.append(
            f"step {p['step']}/{len(run.points)} | loss {p['loss']:.4f} | lr {p['learning_rate']:.2e} "
            f"| {elapsed * 1000:.1f}ms | {speed:.0f} tok/s"
        )
    path = folder / "train.log"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


WRITERS = {
    "run.json": write_ours,
    "trainer_state.json": write_trainer_state,
    "TensorBoard": write_tensorboard,
    "DeepSpeed": write_deepspeed,
    "text": write_text,
}
