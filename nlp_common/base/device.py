"""设备、精度、随机种子，以及写进运行记录的环境信息。"""

from __future__ import annotations

import os
import platform
import random
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

LIBRARIES = (
    "torch",
    "transformers",
    "tokenizers",
    "datasets",
    "evaluate",
    "accelerate",
    "trl",
    "peft",
    "huggingface_hub",
    "safetensors",
    "numpy",
    "scikit-learn",
)


def pick_device() -> torch.device:
    """CUDA，其次 MPS（以及 torch 支持的其他加速器，如昇腾 NPU），都没有就 CPU。"""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def accelerator_available() -> bool:
    """有没有可用的加速器。"""
    return pick_device().type != "cpu"


def precision(device: torch.device) -> str:
    """训练用的精度：``bf16``、``fp16`` 或 ``fp32``。"""
    if device.type != "cuda":
        return "fp32"  # MPS 的自动混合精度还不可靠；CPU 上小模型用 bf16 反而更慢
    # T4、V100 也能“模拟”bf16，但比 fp16 慢得多，不算支持。
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def precision_flags(
    device: torch.device, bf16: bool | None = None, cpu_bf16: bool = False
) -> dict[str, bool]:
    """给 TrainingArguments、DPOConfig 等的 ``bf16`` 与 ``fp16``；bf16 是读者指定的，None 就看设备。

    两个都要写明：TRL 的配置默认 bf16=True，在不支持的 CPU 上会直接报错。
    cpu_bf16：CPU 有 bf16 指令（Intel AMX、AVX512_BF16）时也用 bf16，没有的话它反而慢。
    """
    if bf16 is not None:
        return {"bf16": bf16, "fp16": False}
    if cpu_bf16 and device.type == "cpu":
        has: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # 旧版 torch 没有它
        return {"bf16": bool(has.get("amx_bf16") or has.get("avx512_bf16")), "fp16": False}
    chosen = precision(device)
    return {"bf16": chosen == "bf16", "fp16": chosen == "fp16"}


def describe(device: torch.device) -> str:
    """给人看的设备名，例如 ``CPU（2 核）``、``NVIDIA H100（79.6 GB 显存）``。"""
    if device.type == "cpu":
        # 容器或 taskset 只给了一部分核时，cpu_count 会说得太多。
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return f"CPU（{cores} 核）"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}（{properties.total_memory / 2**30:.1f} GB 显存）"
    return "Apple GPU（MPS）" if device.type == "mps" else device.type.upper()


def seed_everything(seed: int) -> None:
    """设好 random、numpy、torch（含加速器）的种子。"""
    import numpy as np

    random.seed(seed)
    np.random.seed(seed % 2**32)  # numpy 只收 32 位
    torch.manual_seed(seed)


def library_versions() -> dict[str, str]:
    """Python 与各库的版本；只查安装信息，不导入它们。没装的不列。"""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def peak_memory_mb() -> float | None:
    """本进程用过的最大内存（MB，2**20 字节），不含显存；Windows 上没有标准办法，给 None。"""
    try:
        # ru_maxrss 会从启动它的进程继承下来，一串子进程里数字就虚高；VmHWM 在 exec 时清零。
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        if high_water := re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE):
            return int(high_water[1]) / 1024
    except OSError:
        pass  # 不是 Linux
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024  # macOS 是字节，其余是 KB


def peak_gpu_memory_mb() -> float | None:
    """本进程在当前 CUDA 设备上用过的最大显存（MB）；没有 CUDA 给 None。"""
    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None
