"""蒸馏的损失：老师与学生在同一个位置上的两个分布差多远。各个函数收 (M, V) 的 logits，给出 M 个位置的和。

前向 KL   Σ p ln(p/q)                p 是老师，q 是学生：p 大的地方 q 不能小，学生要把老师会说的都盖住
反向 KL   Σ q ln(q/p)                q 大的地方 p 不能小：学生只说老师也会说的，可以只挑一种
JSD(β)    β KL(p‖m) + (1 − β) KL(q‖m)，m = βp + (1 − β)q；β → 0 像前向，β → 1 像反向
温度      两边的 logits 都除以 τ：τ 大，不大可能的词也看得见
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def divergence(student: Tensor, teacher: Tensor, beta: float, temperature: float = 1.0) -> Tensor:
    """beta 是 0 用前向 KL，1 用反向 KL，中间是 JSD（Agarwal et al. 2024 式 1，与 TRL 的 GKD 同一个约定）。"""
    log_q = (student / temperature).log_softmax(-1)  # (M, V)
    log_p = (teacher / temperature).log_softmax(-1)  # (M, V)
    if beta == 0:
        return kl(log_p, log_q)
    if beta == 1:
        return kl(log_q, log_p)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))  # (M, V)
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a‖b) 的和，每个位置对整个词表求和。"""
    return (log_a.exp() * (log_a - log_b)).sum()
