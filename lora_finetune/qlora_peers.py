"""与 bitsandbytes + PEFT 比：同样的底座、同样的 A 与 B、同样的几批，各走几步 AdamW，损失相差多少。"""

from __future__ import annotations

import copy

import torch
from torch import nn

from lora_by_hand import lora_layers
from nf4 import NF4Linear, import_bitsandbytes
from nlp_common.lm.adapters import require_peft

# bitsandbytes 0.50.2 在有 AVX512 的 CPU 上，矩阵的宽不是块的整数倍时，还原出来的是错的（误差 0.2 以上）；
# 小模型的 down_proj 宽 352 = 11 × 32，所以比的时候一块 32 个
BLOCK = 32


def bitsandbytes_linears(model: nn.Module, kind: str, double: bool) -> nn.Module:
    """model 里除输出层外的 Linear 换成 bitsandbytes 的 Linear4bit，返回 model。"""
    bnb = import_bitsandbytes()
    head = model.get_output_embeddings()
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and linear is not head:
            four_bit = bnb.nn.Linear4bit(
                linear.in_features,
                linear.out_features,
                linear.bias is not None,
                compute_dtype=torch.float32,
                compress_statistics=double,
                quant_type=kind,
            )
            weight = bnb.nn.Params4bit(
                linear.weight.data,
                requires_grad=False,
                compress_statistics=double,
                quant_type=kind,
                blocksize=BLOCK,
            )
            four_bit.weight, four_bit.bias = weight, linear.bias
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, four_bit.to(linear.weight.device))  # 这一步才量化
    return model


def peft_model(start: nn.Module, ours: nn.Module, kind: str, double: bool):
    """start（没有量化的底座）→ bitsandbytes 的底座上的 PEFT 模型；A、B 与 ours 的相同。"""
    layers = lora_layers(ours)
    first = next(iter(layers.values()))
    r = len(first.A)
    peft = require_peft()
    config = peft.LoraConfig(
        r=r,
        lora_alpha=first.scaling * r,
        target_modules=sorted({name.rsplit(".", 1)[-1] for name in layers}),
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(bitsandbytes_linears(copy.deepcopy(start), kind, double), config)
    for name, layer in layers.items():
        theirs = model.base_model.model.get_submodule(name)
        theirs.lora_A["default"].weight.data.copy_(layer.A.data)
        theirs.lora_B["default"].weight.data.copy_(layer.B.data)
    return model


def losses(model: nn.Module, batches: list[dict], loss, learning_rate: float) -> list[float]:
    """每批走一步 AdamW，各步的损失。"""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], learning_rate)
    found = []
    model.train()
    for batch in batches:
        value = loss(model, batch)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(value.item())
    return found


def copy_scales(ours: nn.Module, theirs: nn.Module) -> int:
    """双重量化的刻度改用 bitsandbytes 的编号，返回有几个不同：它在 CPU 上是查表取近的，偶尔归到另一边。"""
    changed = 0
    for name, layer in lora_layers(ours).items():
        base: NF4Linear = layer.base
        state = theirs.base_model.model.get_submodule(name).base_layer.weight.quant_state
        changed += int((base.scales != state.absmax).sum())
        base.scales.copy_(state.absmax)
    return changed
