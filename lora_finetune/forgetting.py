"""不忘旧活儿的两种罚：EWC（重要的参数别走远）与 O-LoRA（新的低秩方向与旧的垂直）。公式与手算的例子在测试里对过。"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_by_hand import lora_layers
from nlp_common.lm.chat_rows import answer_loss, collate
from nlp_common.lm.chatml import prompt_ids
from nlp_common.lm.generation import generate
from nlp_common.lm.losses import IGNORE, count_labels, token_logps


def penalised_loss(model, batch: dict[str, Tensor], penalty) -> tuple[Tensor, dict]:
    """每个 token 的平均损失 + penalty(model)。训练循环会除以标签的个数，所以罚先乘上它。"""
    loss, notes = answer_loss(model, batch)
    return loss + count_labels(batch) * penalty(model), notes


# ---------------------------------------------------------------- EWC


def fisher_diagonal(model, batches: list[dict[str, Tensor]], parameters: dict) -> dict[str, Tensor]:
    """F_i = E[(∂ log p(y|x) / ∂θ_i)²]（Kirkpatrick et al. 2017；对角线）：每个参数动一动，旧的回答变多少。

    一批只有一行：先平方、再平均，几行的梯度不能先加起来。y 要是模型自己写的，不是标准答案。
    """
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for batch in batches:
        logp = token_logps(model, **batch).sum()
        for name, gradient in zip(
            parameters, torch.autograd.grad(logp, list(parameters.values())), strict=True
        ):
            total[name] += gradient**2 / len(batches)
    return total


def own_replies(model, tokenizer, questions: list[dict], seed: int) -> list[dict[str, Tensor]]:
    """每道题，模型自己采样一句回答 → 一行一批，只有回答有标签：Fisher 用的 (x, y)，y ~ p(y|x)。"""
    prompts = [prompt_ids(tokenizer, question["messages"]) for question in questions]
    replies = generate(model, tokenizer, prompts, 32, temperature=1.0, seed=seed)
    batches = []
    for prompt, reply in zip(prompts, replies, strict=True):
        row = {"input_ids": prompt + reply, "labels": [IGNORE] * len(prompt) + reply}
        batch = collate([row], tokenizer.pad_token_id)
        batches.append({name: tensor.to(model.device) for name, tensor in batch.items()})
    return batches


def ewc_penalty(model, memories: list[tuple[dict, dict]], strength: float) -> Tensor:
    """λ/2 · Σ_i F_i (θ_i − θ*_i)²（Kirkpatrick et al. 2017 式 3）。memories：每样旧活儿的 (θ*, F)。"""
    total = torch.zeros((), device=next(model.parameters()).device)
    for anchor, fisher in memories:
        for name, p in model.named_parameters():
            total = total + (fisher[name] * (p - anchor[name]) ** 2).sum()
    return strength / 2 * total


# ---------------------------------------------------------------- O-LoRA


def orthogonality_penalty(model, old: list[dict[str, Tensor]], strength: float) -> Tensor:
    """λ · Σ_旧 Σ_层 ‖A_旧 Aᵀ‖²（Wang et al. 2023 式 8）：新的 A 的每一行，与旧的每一行垂直。

    old：每样旧活儿的 {层: A_旧 (r, d_in)}。A 的行决定适配器看输入的哪些方向；旧活儿用的方向，不去看。
    """
    total = torch.zeros((), device=next(model.parameters()).device)
    for layers in old:
        for name, layer in lora_layers(model).items():
            total = total + ((layers[name] @ layer.A.T) ** 2).sum()
    return strength * total


def main_directions(delta: Tensor, r: int) -> Tensor:
    """全参数学的 ΔW (d_out, d_in) 最主要的 r 个输入方向，(r, d_in)：它没有 A，用奇异值分解的右奇异向量代替。"""
    return torch.linalg.svd(delta.detach(), full_matrices=False).Vh[:r].contiguous()
