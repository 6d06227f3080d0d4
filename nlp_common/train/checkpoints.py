"""PPO 的检查点：两个在学的模型、两个优化器、历史；写完整了才打上完成标记。"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model

from nlp_common.base.runs import CHECKPOINT_DONE, write_json
from nlp_common.train.stage import Stage


def save_training_state(
    stage: Stage,
    step: int,
    models: dict[str, torch.nn.Module],
    optimizers: dict,
    scaler: torch.amp.GradScaler | None,
    history: list[dict],
) -> None:
    """存第 step 步的状态，只留最近两个检查点。scaler 是 fp16 放大梯度的倍数，不用 fp16 时是 None。"""
    folder = stage.folder.checkpoints / f"checkpoint-{step}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, model in models.items():
        save_model(model, str(folder / f"{name}.safetensors"))
        torch.save(optimizers[name].state_dict(), folder / f"{name}_optimizer.pt")
    if scaler is not None:
        write_json(folder / "scaler.json", scaler.state_dict())
    write_json(folder / "history.json", history)
    write_json(folder / CHECKPOINT_DONE, {"seconds": stage.seconds()})
    done = sorted(stage.folder.checkpoints.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    for old in done[:-2]:
        shutil.rmtree(old, ignore_errors=True)


def load_training_state(
    folder: Path,
    models: dict[str, torch.nn.Module],
    optimizers: dict,
    scaler: torch.amp.GradScaler | None,
) -> list[dict]:
    """把状态读回 models、optimizers 和 scaler，返回历史（长度就是已经走完的步数）。"""
    for name, model in models.items():
        load_model(model, str(folder / f"{name}.safetensors"))
        optimizers[name].load_state_dict(torch.load(folder / f"{name}_optimizer.pt", weights_only=True))
    if scaler is not None and (saved := folder / "scaler.json").exists():
        scaler.load_state_dict(json.loads(saved.read_text(encoding="utf-8")))
    return json.loads((folder / "history.json").read_text(encoding="utf-8"))
