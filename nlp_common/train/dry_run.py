"""--dry_run 的公共部分：数参数、常驻的内存、设备有多少内存、真的走三步量时间。激活的公式各模型不同，不在这里。"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from nlp_common.base.errors import UserError
from nlp_common.hub.models import how_to_get
from nlp_common.lm.checks import check_config, readable_errors

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

MEASURABLE = 50_000_000  # CPU 上参数再多，三步也要等很久


def read_config(
    found: str | None, name: str, source: str, full_model: str, sizes: Callable[[], PreTrainedConfig]
) -> tuple[PreTrainedConfig, str]:
    """→ (配置, 它从哪里来)。只读 config.json，不碰权重；found 是 find_model 的结果，sizes() 是内置的尺寸表。"""
    if found is not None and (found != name or os.path.isdir(found) or source == "hf"):
        from transformers import AutoConfig

        check_config(found)
        with readable_errors(found):
            return AutoConfig.from_pretrained(found, trust_remote_code=False), f"{found} 的 config.json"
    if found is None:
        why = f"本地缓存里没有 {name}，也连不上它的服务器"
    else:  # ModelScope 上有；读 config.json 要先把整个模型下载到缓存
        why = f"{name} 还没有从 ModelScope 下载到缓存，--dry_run 不去下载"
    if name == full_model:
        return sizes(), f"内置的尺寸表（{why}）"
    if found is None:
        raise UserError(how_to_get(name, source))
    raise UserError(f"{why}。先运行：modelscope download --model {name}，再运行同一条命令。")


def count(build: Callable[[], torch.nn.Module]) -> tuple[int, int]:
    """build() 出来的模型 → (参数个数, 张量个数)；建在 meta 设备上，一个字节的权重都不占。"""
    with torch.device("meta"):
        parameters = list(build().parameters())
    return sum(p.numel() for p in parameters), len(parameters)


def fixed_bytes(total: int, trained: int, tensors: int, half: bool) -> dict[str, int]:
    """与批大小无关的几项各多少字节。total、trained：全部与要训练的参数个数；tensors：要训练的张量个数。"""
    return {
        "权重（每个参数 4 字节）": 4 * total,
        "半精度副本（2 字节）": 2 * total if half else 0,
        "梯度（4 字节）": 4 * trained,
        "AdamW（8 字节，每个张量另有 4 字节步数）": 8 * trained + 4 * tensors,
    }


def show_fixed(models: dict[str, int], fixed: dict[str, int]) -> None:
    for label, n in models.items():
        print(f"  {label}：{n:,} 个参数")
    for label, size in fixed.items():
        if size:
            print(f"  {label}：{size / 2**30:.2f} GB")


def device_bytes(device: torch.device) -> int | None:
    """设备一共有多少内存；不知道给 None。"""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def cannot_measure(needed: int, n_parameters: int, device: torch.device, room: int | None) -> str | None:
    """不能真走几步的原因；能给 None。needed 是要多少字节。"""
    if room is None or needed > room:
        return "装不下，没有去试"
    if device.type == "cpu" and n_parameters > MEASURABLE:
        return f"CPU 上模型超过 {MEASURABLE / 1e6:.0f} M 参数，三步也要等很久"
    return None


def seconds_per_step(
    model: torch.nn.Module,
    loss: Callable[[], torch.Tensor],
    device: torch.device,
    amp: torch.dtype | None = None,
) -> float:
    """真的走三步（前向、反向、AdamW），取后两步的平均。loss() 算一次损失；amp 是自动混合精度的类型。"""
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(3):
        if step == 1:
            started = time.perf_counter()
        with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        value.item()  # 等加速器算完
    return (time.perf_counter() - started) / 2
