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


def hessians_of(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """{层: X} → {层: H}；Q、K、V 收到的是同一份，gate、up 也是，只算一次。"""
    found, before, h = {}, None, None
    for name, x in inputs.items():
        if before is None or not torch.equal(x, before):
            before, h = x, hessian_of(x)
        found[name] = h
    return found


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
    n_in = weight.shape[1]
    columns = torch.arange(n_in, device=weight.device)
    if order == "act":
        columns = hessian.diagonal().argsort(descending=True)
    w = weight.double()[:, columns]  # (out, in)，从这里起，第几列就是第几个量化的
    keep = torch.ones_like(w, dtype=torch.bool) if keep is None else keep[:, columns]
    damped = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(n_in).to(hessian)
    inverse = torch.linalg.inv(damped[columns][:, columns])
    upper = torch.linalg.cholesky((inverse + inverse.T) / 2, upper=True)  # (in, in)

    grids = [make_grid(part, bits) for part in weight.double().split(group, dim=1)]
    codes = torch.empty_like(w)
    which = (columns // group).tolist()  # 第几个量化的用第几组的格子
    for start in range(0, n_in, group):
        end = min(start + group, n_in)
        if grid == "late" and order == "left":
            grids[start // group] = make_grid(w[:, start:end], bits)
        errors = torch.zeros_like(w[:, start:end])
        for i in range(start, end):
            scale, zero = grids[which[i]]
            codes[:, i] = to_codes(w[:, i], scale, zero, bits)
            codes[:, i] = codes[:, i].where(keep[:, i], zero)  # 剪掉的，编号是零点，还原正好是 0
            error = (w[:, i] - scale * (codes[:, i] - zero)) / upper[i, i]  # (out,)
            w[:, i:end] -= error[:, None] * upper[i, i:end]  # 这一组里的马上补
            errors[:, i - start] = error
        w[:, end:] -= errors @ upper[start:end, end:]  # 后面的组攒到一起补：一次矩阵乘法，快得多
    codes[:, columns] = codes.clone()  # 放回原来的次序
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
