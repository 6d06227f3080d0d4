"""训练一个 token 要算几次乘加：由模型的尺寸数出来，除以机器的峰值就是 MFU（PaLM 附录 B 的算法）。

每个矩阵前向 2 次（乘、加），反向再 4 次（对输入、对权重）：6 · 参数。注意力的两个矩阵乘不是参数，另算：
前向 4·T·C，一共 12·T·C 每层（因果遮住的一半也算：惯例如此，torch 的 FlopCounterMode 也这样数）。
查嵌入表不是矩阵乘，不算；归一化、激活函数这些逐个数做的也不算。
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch

from log_readers import TrainingLog
from nlp_common.base.errors import UserError

# 各种卡的 bf16（或 fp16）稠密矩阵乘的峰值，TFLOP/s，照厂家的规格表；带"稀疏"的数要除以二
PEAKS = {
    "v100": 125, "t4": 65, "a10": 125, "a100": 312, "a800": 312, "l4": 121, "l40s": 362, "rtx3090": 71,
    "rtx4090": 165, "h20": 148, "h100": 989, "h800": 989, "h200": 989, "b200": 2250, "910b": 376,
}  # fmt: skip
CONFIG_NAMES = {  # 我们的名字 → 各家 config.json 里的
    "layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "width": ("hidden_size", "n_embd", "d_model"),
    "heads": ("num_attention_heads", "n_head", "num_heads"),
    "kv_heads": ("num_key_value_heads",),
    "head_size": ("head_dim",),
    "inner": ("intermediate_size", "n_inner", "ffn_dim"),
    "vocab": ("vocab_size",),
}


@dataclass(frozen=True)
class Shape:
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_size: int
    inner: int
    vocab: int
    gated: bool  # MLP 有三个矩阵（SwiGLU），还是两个


def matrix_parameters(shape: Shape) -> int:
    """矩阵乘里用到的参数：q、k、v、o，MLP，最后的输出层（与嵌入共用也要乘，也算）。"""
    q = shape.heads * shape.head_size
    kv = shape.kv_heads * shape.head_size
    attention = shape.width * (2 * q + 2 * kv)
    mlp = shape.width * shape.inner * (3 if shape.gated else 2)
    return shape.layers * (attention + mlp) + shape.width * shape.vocab


def flops_per_token(shape: Shape, length: int) -> float:
    """一行 length 个 token，平均每个 token 前向加反向几次浮点运算。"""
    attention = 12 * shape.layers * length * shape.heads * shape.head_size
    return 6 * matrix_parameters(shape) + attention


def mfu(tokens_per_s: float, flops: float, peak: float) -> float:
    """模型真正要的运算，占机器峰值的几成；重算激活多算的不算进去（那是 HFU）。"""
    return tokens_per_s * flops / peak


def read_shape(path: Path) -> Shape:
    """模型文件夹里的 config.json → 尺寸。MoE、编码器—解码器不是这样数的，说出来。"""
    path = path / "config.json" if path.is_dir() else path
    if not path.exists():
        raise UserError(f"没有 {path}：--model 要给有 config.json 的模型文件夹。")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} 不是完整的 JSON（{error}）。") from None
    if config.get("is_encoder_decoder") or any("expert" in name for name in config):
        raise UserError(f"{path} 是 MoE 或编码器—解码器：一个 token 不经过全部矩阵，这里不会数。")
    found = {}
    for name, theirs in CONFIG_NAMES.items():
        found[name] = next((config[each] for each in theirs if config.get(each)), None)
    for name in ("layers", "width", "heads", "vocab"):
        if not isinstance(found[name], int):
            raise UserError(f"{path} 里没有 {' 或 '.join(CONFIG_NAMES[name])}，数不出要算多少。")
    found["kv_heads"] = found["kv_heads"] or found["heads"]
    found["head_size"] = found["head_size"] or found["width"] // found["heads"]
    found["inner"] = found["inner"] or 4 * found["width"]
    act = str(config.get("hidden_act", ""))
    if any("Classification" in str(name) for name in config.get("architectures") or []):
        found["vocab"] = 0  # 分类的头小得不必算
    return Shape(**found, gated=act in ("silu", "swiglu", "gelu_pytorch_tanh") and "n_embd" not in config)


def shape_of(sizes) -> Shape:
    """small_gpt.Sizes → 同样的一种尺寸。"""
    head = sizes.width // sizes.heads
    return Shape(sizes.layers, sizes.width, sizes.heads, sizes.heads, head, sizes.inner, sizes.vocab, False)


def measured_peak(seconds: float = 0.5, size: int = 1024) -> float:
    """这台机器上 float32 矩阵乘最快每秒几次浮点运算：CPU 没有写着峰值的规格表，量一量，取最快的一次。"""
    a, b = torch.randn(size, size), torch.randn(size, size)
    best, started = 0.0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        begin = time.perf_counter()
        a @ b
        best = max(best, 2 * size**3 / (time.perf_counter() - begin))
    return best


# ---------------------------------------------------------------- 由日志算每步几秒、每秒几个 token


def step_seconds(log: TrainingLog) -> list[tuple[int, float]]:
    """每一步用了几秒：日志写了就用，不然由前后两条的时刻算。"""
    if written := log.column("step_seconds"):
        return [(step, seconds) for step, seconds in written if math.isfinite(seconds)]
    found = []
    moments = [(step, at) for step, at in log.column("time") if math.isfinite(at)]
    for (before, began), (step, ended) in pairwise(moments):
        if step > before and ended >= began:
            found.append((step, (ended - began) / (step - before)))
    return found if any(seconds > 0 for _, seconds in found) else []


def tokens_per_s(log: TrainingLog, paces: list, per_step: float | None) -> float | None:
    """写了每秒几个的，取中位数；不然由一共几个 token、用了几秒算。"""
    if written := [speed for _, speed in log.column("tokens_per_s") if math.isfinite(speed)]:
        return median(written)
    if (whole := log.facts.get("train_tokens_per_s")) is not None:
        return float(whole)
    if per_step is None and len(counted := log.column("tokens")) > 1:
        (first, before), (last, after) = counted[0], counted[-1]
        per_step = (after - before) / max(last - first, 1)
    if per_step is None or not paces:
        return None
    usual = median(seconds for _, seconds in paces)
    return per_step / usual if usual > 0 else None
