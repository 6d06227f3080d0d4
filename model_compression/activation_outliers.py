"""激活也压成 int8：几个离群的通道怎样毁了它，LLM.int8() 怎样绕过去（Dettmers et al. 2022）。

权重可以一列一列细细地定格子，激活要当场定：一个 token 一个刻度。一个通道比别的大一百倍，刻度就照它定，别的通道都舍入成 0。
"""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import Tensor, nn

from calibration import capture_inputs, linear_blocks
from nlp_common.hub.models import require_model
from nlp_common.hub.smollm2 import INSTALL_HINT, packages_installed
from nlp_common.lm.chat_rows import chat_row
from nlp_common.lm.loading import load_chat_lm
from nlp_common.lm.replies import reply_to

THRESHOLD = 6.0  # 绝对值超过它的通道算离群（LLM.int8() 的默认）
PLANTED, TIMES = (7, 39, 71, 103), 200.0  # 种在哪几个通道，放大几倍
PROMPTS = (
    "What is the capital of France?",
    "Explain why the sky is blue.",
    "Write a short story about a cat who finds a key.",
    "List five uses of a paper bag.",
    "How do I boil an egg?",
    "What is the difference between a frog and a toad?",
    "Give me three tips for learning a new language.",
    "Describe a city at night.",
)


# ---------------------------------------------------------------- 1. int8 的矩阵乘法


def to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (N, d) → (−127 … 127 的整数 (N, d), 每行的刻度 (N, 1))，对称，一行一个刻度。"""
    scale = x.abs().amax(1, keepdim=True).clamp(min=1e-8) / 127
    return (x / scale).round(), scale


def int8_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (N, in) Wᵀ，两边都是 int8：一个 token 一个刻度，一个输出一个刻度。整数乘加，最后才乘刻度。"""
    (a, scale_a), (b, scale_b) = to_int8(x), to_int8(weight)
    return (a @ b.T) * scale_a * scale_b.T  # 整数不超过 2²⁴ 的和，float32 算得准


def mixed_linear(x: Tensor, weight: Tensor, threshold: float = THRESHOLD) -> Tensor:
    """LLM.int8()：有一个 token 的绝对值超过 threshold 的通道不压，单独乘；其余的 int8，加起来。"""
    outlier = x.abs().amax(0) > threshold  # (in,)
    rest = int8_linear(x[:, ~outlier], weight[:, ~outlier]) if not outlier.all() else 0
    return rest + x[:, outlier] @ weight[:, outlier].T


@torch.no_grad()
def use_int8(model: nn.Module, linear) -> nn.Module:
    """model 的一份，解码块里的线性层都用 linear(x, W) 算。"""
    model = copy.deepcopy(model)
    for layers in linear_blocks(model):
        for layer in layers.values():
            layer.forward = partial(_forward, layer, linear)
    return model


def _forward(layer: nn.Linear, linear, x: Tensor) -> Tensor:
    y = linear(x.flatten(0, -2), layer.weight).view(*x.shape[:-1], -1)
    return y if layer.bias is None else y + layer.bias


# ---------------------------------------------------------------- 2. 种几个离群的通道


@torch.no_grad()
def plant_outlier(model: nn.Module, channels: tuple[int, ...] = PLANTED, times: float = TIMES) -> nn.Module:
    """model 的一份：归一的增益在几个通道上大 times 倍，后面的矩阵在那几列上小 times 倍：输出一点不变。"""
    model = copy.deepcopy(model)
    for block in model.get_decoder().layers:
        attention, mlp = block.self_attn, block.mlp
        for norm, after in (
            (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            norm.weight[list(channels)] *= times
            for layer in after:
                layer.weight[:, list(channels)] /= times
    return model


def int8_lesson(model: nn.Module, planted: nn.Module, measured) -> dict[str, dict]:
    """权重与激活都 int8：原来的模型、种了离群通道的、种了而离群通道另算的，各答对几成。"""
    return {
        "int8": measured(use_int8(model, int8_linear)),
        "planted_float32": measured(planted),
        "planted_int8": measured(use_int8(planted, int8_linear)),
        "planted_mixed": measured(use_int8(planted, mixed_linear)),
    }


# ---------------------------------------------------------------- 3. 真模型：SmolLM2


@torch.no_grad()
def smollm2_outliers() -> dict[str, dict]:
    """SmolLM2-135M 说自己的话时，几层的激活有多偏，int8 差多少；没有装是空的。"""
    if not packages_installed():
        print(f"没有装 SmolLM2，跳过真模型的激活：{INSTALL_HINT}")
        return {}
    tokenizer, model = load_chat_lm(str(require_model("smollm2")), torch.device("cpu"))
    questions = [{"messages": [{"role": "user", "content": text}]} for text in PROMPTS]
    replies = reply_to(model.eval(), tokenizer, questions, 32)
    rows = [
        chat_row(tokenizer, [*q["messages"], {"role": "assistant", "content": r["text"]}])
        for q, r in zip(questions, replies, strict=True)
    ]
    blocks = list(linear_blocks(model))
    picked = [blocks[place] for place in (0, len(blocks) // 2, len(blocks) - 1)]
    layers = {
        name: layer
        for block in picked
        for name, layer in block.items()
        if name.endswith(("q_proj", "o_proj", "gate_proj", "down_proj"))
    }
    inputs = capture_inputs(model, rows, layers, tokenizer.pad_token_id)
    return {name.removeprefix("model."): look(x, layers[name].weight) for name, x in inputs.items()}


def look(x: Tensor, weight: Tensor) -> dict[str, float]:
    """x (N, in)：各通道最大的绝对值，最大的通道是中位数的几倍；int8 与另算离群通道的相对输出误差。"""
    largest = x.abs().amax(0)  # (in,)
    exact = x @ weight.T
    return {
        "largest_over_median": (largest.max() / largest.median()).item(),
        "largest": largest.max().item(),
        "n_outliers": int((largest > THRESHOLD).sum()),
        "int8_error": ((int8_linear(x, weight) - exact).norm() / exact.norm()).item(),
        "mixed_error": ((mixed_linear(x, weight) - exact).norm() / exact.norm()).item(),
    }
