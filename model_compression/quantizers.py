"""一个矩阵怎样量化：RTN、GPTQ、AWQ 的缩放，都用同一种格子（packed_weights.py），差别只在编号怎样挑。

H = XᵀX 是这一层收到的输入的二阶矩，float64：‖(Ŵ − W)X‖² = Σ_行 (ŵ − w) H (ŵ − w)ᵀ，三种都用它量误差。
参考：Frantar et al. 2022（GPTQ）；Frantar & Alistarh 2022（OBQ，精确的 OBS 更新）；Lin et al. 2023（AWQ）。
"""

from __future__ import annotations

import torch
from torch import Tensor

from packed_weights import Packed, make_grid, restore, to_codes

DAMPING = 0.01  # 对角线加上它平均的 1%：校准没有照到的方向，也不会除以 0
ALPHAS = [place / 20 for place in range(20)]  # AWQ 试这些指数；0 就是 RTN


def hessian_of(x: Tensor) -> Tensor:
    """x (N, in) → XᵀX (in, in)，float64：几千个数的平方加起来，float32 求逆会差很多。"""
    x = x.double()
    return x.T @ x


def output_error(change: Tensor, hessian: Tensor) -> float:
    """‖ΔW X‖² = Σ_行 Δw H Δwᵀ；change (out, in)。"""
    change = change.double()
    return ((change @ hessian) * change).sum().item()


# ---------------------------------------------------------------- 1. RTN：各取最近的一格


def nearest(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """weight (out, in)：每组定一个格子，每个权重各自取最近的一格 → 编号 (out, in)，刻度、零点各 (out, 组数)。"""
    codes, scales, zeros = [], [], []
    for w in weight.float().split(group, dim=1):  # (out, group)；最后一组可以不满
        scale, zero = make_grid(w, bits)
        codes.append(to_codes(w, scale[:, None], zero[:, None], bits))
        scales.append(scale)
        zeros.append(zero)
    return torch.cat(codes, 1), torch.stack(scales, 1), torch.stack(zeros, 1)


def rtn(weight: Tensor, bits: int, group: int) -> Packed:
    """不看输入，各取最近的一格。"""
    return Packed.of(*nearest(weight, bits, group), bits, group)


# ---------------------------------------------------------------- 2. GPTQ：量化一列，误差让后面的列去补


def gptq(
    weight: Tensor,
    hessian: Tensor,
    bits: int,
    group: int,
    order: str = "left",
    grid: str = "late",
    keep: Tensor | None = None,
) -> Packed:
    """weight (out, in)、hessian (in, in) float64。

    一列一列地量化；第 i 列差了多少，没有量化的列照 OBS 的最优解补：Δw = −(w_i − ŵ_i) / [H⁻¹]_ii · [H⁻¹]_i,:
    每量化一列，H⁻¹ 就要去掉一行一列；H⁻¹ = UᵀU 的第 i 行正是去掉前面各列以后的那一行，所以只分解一次。

    order  left：从左到右；act：输入大的列先来（act-order）。
    grid   late：轮到一组才定它的格子，那时权重已经补过；early：一开始就照原来的权重定好。act 只能 early，组是打散的。
    keep   剪过的矩阵留下的位置 (out, in)：剪掉的总是 0，由此差的也让后面的补。
    """
    w = weight.double().clone()  # (out, in)
    n_in = w.shape[1]
    columns = torch.arange(n_in, device=w.device)
    if order == "act":
        columns = hessian.diagonal().argsort(descending=True)
    damped = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(n_in).to(hessian)
    inverse = torch.linalg.inv(damped[columns][:, columns])
    upper = torch.linalg.cholesky((inverse + inverse.T) / 2, upper=True)  # (in, in)，行列都照 columns 排

    grids = [make_grid(part, bits) for part in w.split(group, dim=1)]
    codes = torch.empty_like(w)
    for place, column in enumerate(columns.tolist()):
        which = column // group
        if grid == "late" and order == "left" and column % group == 0:
            grids[which] = make_grid(w[:, column : column + group], bits)
        scale, zero = grids[which]
        codes[:, column] = to_codes(w[:, column], scale, zero, bits)
        if keep is not None:
            codes[:, column] = codes[:, column].where(keep[:, column], zero)  # 编号是零点，还原正好是 0
        error = (w[:, column] - scale * (codes[:, column] - zero)) / upper[place, place]  # (out,)
        later = columns[place + 1 :]
        w[:, later] -= error[:, None] * upper[place, place + 1 :]
    scales, zeros = (torch.stack([each[part] for each in grids], 1) for part in (0, 1))
    return Packed.of(codes, scales, zeros, bits, group)


# ---------------------------------------------------------------- 3. AWQ：输入大的列，先放大再取整


def awq_scale(
    weights: list[Tensor], x: Tensor, hessian: Tensor, bits: int, group: int
) -> tuple[Tensor, float]:
    """收到同一份输入 x (N, in) 的几个矩阵 → (每个输入的放大倍数 s (in,), 挑中的 α)。

    W X = (W·s)(X/s)：权重放大 s 倍，取整的误差对这一列就小 s 倍；太大又把同组的格子撑宽，别的列吃亏。
    s = 平均|x|^α，α 试二十个，挑输出误差最小的。
    """
    size = x.abs().mean(0).clamp(min=1e-4)  # (in,)
    best, scale, chosen = float("inf"), torch.ones_like(size), 0.0
    for alpha in ALPHAS:
        s = size**alpha
        s = s / (s.max() * s.min()).sqrt()  # 整体大小不变：放大的与缩小的一样多
        error = sum(
            output_error(restore(*nearest(w * s, bits, group), group) / s - w, hessian) for w in weights
        )
        if error < best:
            best, scale, chosen = error, s, alpha
    return scale, chosen
