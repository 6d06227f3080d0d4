"""三种算法，同一个注意力：整张得分表、分块的（在线 softmax，手写）、torch 的 SDPA。

    S = QKᵀ/√d  (B, nh, T, T)，上三角遮住；P = softmax(S)；O = PV  (B, nh, T, hs)

整张的要存 S 与 P 两张 T×T 的表，反向还要用。分块的（FlashAttention，Dao 2022）一次只看 TILE 行 × TILE 列：

    m ← 见过的最大得分，l ← Σ e^{S−m}，o ← Σ e^{S−m} V
    来了新的一块，最大的变成 m'：旧的 l、o 都乘 e^{m−m'}，再加上这一块的；最后 O = o / l

反向不存 P，由 L = m + log l 再算一遍：P = e^{S−L}。
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 64


def math_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """照定义算。mask (B, 1, T, T) 为真的才看得见；没给就是因果的。"""
    if mask is None:
        mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])  # (B, nh, T, T)
    return scores.masked_fill(~mask, -math.inf).softmax(-1) @ v  # (B, nh, T, hs)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


def tiled_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """因果的，分块算；反向也分块。"""
    return Tiled.apply(q, k, v)


class Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # 都是 (B, nh, T, hs)
        out, log_sum = torch.empty_like(q), q.new_empty(q.shape[:3])
        for rows in tiles(q.shape[2]):
            m = q.new_full((*q.shape[:2], rows.stop - rows.start), -math.inf)  # (B, nh, R) 见过的最大得分
            total, o = torch.zeros_like(m), torch.zeros_like(q[:, :, rows])
            for columns in tiles(rows.stop):  # 这一行块右边的，都遮住了，不必算
                s = scores_of(q, k, rows, columns)  # (B, nh, R, C)
                new_m = torch.maximum(m, s.amax(-1))
                old, p = torch.exp(m - new_m), torch.exp(s - new_m[..., None])
                total = total * old + p.sum(-1)
                o = o * old[..., None] + p @ v[:, :, columns]
                m = new_m
            out[:, :, rows] = o / total[..., None]
            log_sum[:, :, rows] = m + total.log()
        ctx.save_for_backward(q, k, v, out, log_sum)  # 没有一样是 T×T 的
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dV = Pᵀ·dO；dS = P ∘ (dO·Vᵀ − Σ dO∘O)；dQ = dS·K/√d；dK = dSᵀ·Q/√d。"""
        q, k, v, out, log_sum = ctx.saved_tensors
        scale = 1 / math.sqrt(q.shape[3])
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        delta = (grad * out).sum(-1)  # (B, nh, T)
        for rows in tiles(q.shape[2]):
            g = grad[:, :, rows]
            for columns in tiles(rows.stop):
                p = torch.exp(scores_of(q, k, rows, columns) - log_sum[:, :, rows, None])
                dv[:, :, columns] += p.transpose(2, 3) @ g
                ds = p * (g @ v[:, :, columns].transpose(2, 3) - delta[:, :, rows, None])
                dq[:, :, rows] += ds @ k[:, :, columns] * scale
                dk[:, :, columns] += ds.transpose(2, 3) @ q[:, :, rows] * scale
        return dq, dk, dv


def tiles(length: int) -> list[slice]:
    return [slice(start, min(start + TILE, length)) for start in range(0, length, TILE)]


def scores_of(q: Tensor, k: Tensor, rows: slice, columns: slice) -> Tensor:
    """得分表里的一块；跨着对角线的，遮住右上角。"""
    s = q[:, :, rows] @ k[:, :, columns].transpose(2, 3) / math.sqrt(q.shape[3])
    if columns.stop > rows.start + 1:
        i = torch.arange(rows.start, rows.stop)[:, None]
        s = s.masked_fill(torch.arange(columns.start, columns.stop) > i, -math.inf)
    return s
