"""--preset auto|tiny|full：怎么选，怎么说。"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nlp_common.base.device import accelerator_available
from nlp_common.base.errors import UserError
from nlp_common.hub.models import find_model, why_not
from nlp_common.hub.network import endpoint

PRESETS = ("auto", "tiny", "full")
Preset = Literal["auto", "tiny", "full"]


@dataclass(frozen=True)
class Choice:
    """选定的预设（``tiny`` 或 ``full``）与原因；real_model：full 用的是不是一个真模型。"""

    preset: Preset
    reason: str
    real_model: bool = True


def choose_preset(
    requested: Preset,
    model: str | None,
    *,
    full_model: str | None,
    needs_accelerator: bool,
    source: str = "hf",
) -> Choice:
    """定下预设。requested 是 --preset，model 是 --model（没给是 None），full_model 是 full 的默认模型（没有是 None）。

    不认识的预设名是 UserError。auto 先看加速器再看 hub：没有 GPU 的笔记本不必等网络。
    """
    if requested not in PRESETS:
        raise UserError(f"--preset {requested} 不认识：可以是 {'、'.join(PRESETS)}。")
    if requested != "auto":
        return Choice(requested, f"你给了 --preset {requested}", full_model is not None)
    if model is not None:
        return Choice("full", f"你给了 --model {model}")
    if needs_accelerator and not accelerator_available():
        return Choice("tiny", "没有找到 GPU（CUDA 或 Apple MPS）", full_model is not None)
    if full_model is None:
        return Choice("full", "有加速器", real_model=False)
    found = find_model(full_model, source)
    if found is None:
        return Choice("tiny", f"得不到 {full_model}：{why_not(source)}")
    where = f"可以从 {endpoint(source)} 下载" if found == full_model else "已在本地"
    return Choice("full", f"{'有加速器，' if needs_accelerator else ''}{full_model} {where}")


def announce(choice: Choice) -> str:
    """脚本打印的第一行：用了哪个预设、为什么、换另一个用哪个参数。"""
    if not choice.real_model:
        if choice.preset == "tiny":
            return f"预设 tiny（离线，CPU 几分钟）：{choice.reason}。要用大的设置，加 --preset full。"
        return f"预设 full（大的设置）：{choice.reason}。要在 CPU 上几分钟跑完，加 --preset tiny。"
    if choice.preset == "tiny":
        return f"预设 tiny（内置小模型，离线，CPU 即可）：{choice.reason}。要用真实大模型，加 --preset full。"
    return f"预设 full（真实模型的设置）：{choice.reason}。要在 CPU 上离线快速跑通，加 --preset tiny。"
