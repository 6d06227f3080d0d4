"""微调要多少内存：权重、适配器、梯度、优化器逐字节地数，激活照公式估计。qlora_theory、qlora_trainer、method_selector 共用。"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config

from nf4 import BLOCK, BLOCK_OF_SCALES, NF4Linear
from nlp_common.train.dry_run_qwen import logits_bytes, qwen_0_5b, saved_bytes

GB = 2**30
METHODS = ("full", "lora", "qlora")


def qwen(hidden: int, wide: int, layers: int, heads: int, kv: int, tied: bool = False) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=152_064,
        hidden_size=hidden,
        intermediate_size=wide,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        tie_word_embeddings=tied,
    )


def llama(
    hidden: int, wide: int, layers: int, heads: int, kv: int | None = None, vocab: int = 32_000
) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=wide,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv or heads,
    )


# 公布的尺寸，不联网也能算：Qwen1.5-0.5B、Qwen2.5 的 1.5B 到 32B、Llama-3-70B
SIZES = {
    "0.5B": qwen_0_5b(),
    "1.5B": qwen(1536, 8960, 28, 12, 2, tied=True),
    "3B": qwen(2048, 11008, 36, 16, 2, tied=True),
    "7B": qwen(3584, 18944, 28, 28, 4),
    "14B": qwen(5120, 13824, 48, 40, 8),
    "32B": qwen(5120, 27648, 64, 40, 8),
    "70B": llama(8192, 28672, 80, 64, 8, vocab=128_256),
}
# QLoRA 论文里的四个（LLaMA），与它公布的内存：表 6，单位 10⁹ 字节
LLAMA = {
    "LLaMA 7B": (llama(4096, 11008, 32, 32), 5),
    "LLaMA 13B": (llama(5120, 13824, 40, 40), 10),
    "LLaMA 33B": (llama(6656, 17920, 60, 52), 21),
    "LLaMA 65B": (llama(8192, 22016, 80, 64), 41),
}


@dataclass(frozen=True)
class Parts:
    """一个模型里，与内存有关的几样。"""

    linears: tuple[tuple[int, int], ...]  # 输出层以外的线性层，(d_out, d_in)：LoRA 与量化管的
    other: int  # 其余的参数：嵌入、输出层、归一化、偏置
    tensors: int  # 参数张量的个数

    @property
    def total(self) -> int:
        return self.other + sum(out * inner for out, inner in self.linears)


_counted: dict[str, Parts] = {}  # 建过的不再建：70B 在 meta 设备上也要零点几秒


def parts_of(config: PreTrainedConfig) -> Parts:
    """照 config 建在 meta 设备上来数，一个字节的权重都不占。"""
    key = config.to_json_string()
    if key not in _counted:
        _counted[key] = _count(config)
    return _counted[key]


def _count(config: PreTrainedConfig) -> Parts:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    shapes = tuple((m.out_features, m.in_features) for m in linears)
    total = sum(p.numel() for p in model.parameters())
    return Parts(shapes, total - sum(out * inner for out, inner in shapes), len(list(model.parameters())))


def four_bit_bytes(n: int, block: int = BLOCK, double: bool = True) -> int:
    """n 个权重量化成四位占几个字节：编号、刻度，双重量化再加刻度的刻度与平均。"""
    blocks = math.ceil(n / block)
    scales = blocks + 4 * math.ceil(blocks / BLOCK_OF_SCALES) + 4 if double else 4 * blocks
    return math.ceil(n / 2) + scales


def lora_parameters(parts: Parts, r: int) -> int:
    """Σ r(d_in + d_out)"""
    return sum(r * (out + inner) for out, inner in parts.linears)


def memory(
    parts: Parts,
    method: str,
    r: int = 16,
    weight_bytes: int = 4,
    half_copy: bool = False,
    eight_bit_adam: bool = False,
    double: bool = True,
) -> dict[str, int]:
    """各项的字节数。weight_bytes：没有量化的权重每个几字节；half_copy：混合精度，另有一份 2 字节的副本。

    eight_bit_adam：优化器的两份状态各 1 字节，每 256 个加 4 字节的刻度（Dettmers et al. 2022）。
    """
    n = parts.total
    adapters, tensors = lora_parameters(parts, r), 2 * len(parts.linears)
    trained = n if method == "full" else adapters
    weights = weight_bytes * n
    if method == "full":
        adapters, tensors = 0, parts.tensors
    elif method == "qlora":
        weights = sum(four_bit_bytes(out * inner, double=double) for out, inner in parts.linears)
        weights += weight_bytes * parts.other
    state = 2 * trained * (1 + 4 / 256) if eight_bit_adam else 8 * trained
    return {
        "weights": weights,
        "half_copy": 2 * n if half_copy else 0,
        "adapters": 4 * adapters,
        "gradients": 4 * trained,
        "optimizer": round(state) + 4 * tensors,  # 每个张量还记着 4 字节的步数
    }


def activations(config: PreTrainedConfig, n_tokens: int, half: bool, checkpointing: bool) -> int:
    """一次前向 n_tokens 个 token 要为反向留下多少字节，含词表上的 logits：上限（公式在 dry_run_qwen.py）。"""
    return saved_bytes(config, n_tokens, half, True, checkpointing) + logits_bytes(config, n_tokens)


def real_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """真的张量各占多少字节：走过一步之后量，与 memory() 的各项比。"""
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    full = len(trained) == len(parameters)
    weights = parameters if full else [p for p in parameters if not p.requires_grad]
    for module in model.modules():
        if isinstance(module, NF4Linear):
            weights = weights + module.four_bit().tensors()
    return {
        "weights": tensor_bytes(weights),
        "half_copy": 0,
        "adapters": 0 if full else tensor_bytes(trained),
        "gradients": tensor_bytes([p.grad for p in parameters if p.grad is not None]),
        "optimizer": tensor_bytes([t for state in optimizer.state.values() for t in state.values()]),
    }


def tensor_bytes(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
