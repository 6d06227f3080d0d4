"""Muon：矩阵的更新方向先“正交化”再走一步。mini_gpt.py --recipe fast 用它，代替块里那些矩阵的 AdamW。

想法：梯度矩阵里常有几个方向特别大，AdamW 跟着它们走，别的方向学得慢；正交化把各个方向的大小拉成差不多一样。

公式（G 是梯度，M 是梯度的滑动平均，β = 0.95）
  M ← β M + (1 − β) G
  D ← 正交化(β M + (1 − β) G)          # 设它的奇异值分解是 U Σ Vᵀ，理想的结果是 U Vᵀ：奇异值全变成 1
  W ← (1 − 学习率 · 权重衰减) W − 学习率 · 0.2 √长边 · D
0.2 √长边：D 的每一格约是 1/√长边，乘上它，步子就和 AdamW 的差不多大，两个优化器可以用同一个学习率。

来源：Jordan et al. 2024（Muon，五次迭代的系数也是这里来的）；Liu et al. 2025（0.2 √长边 与权重衰减）。
PyTorch 也有 torch.optim.Muon；它里面写死了 bf16，没有 bf16 指令的机器上慢得多，所以自己写（测试证明走的是同一步）。
"""

import math

import torch


class Muon(torch.optim.Optimizer):
    """只收矩阵。形状相同的叠成一批一起算：比一个一个算，每步快一成。"""

    def __init__(self, matrices, lr, weight_decay=0.0, momentum=0.95):
        same_shape = {}
        for p in matrices:
            same_shape.setdefault(p.shape, []).append(p)
        groups = [{"params": params} for params in same_shape.values()]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params, lr, momentum = group["params"], group["lr"], group["momentum"]
            grads = torch.stack([p.grad for p in params])  # (N, 行, 列)
            state = self.state[params[0]]  # N 个矩阵的平均叠在一起，记在第一个的名下
            if "average" not in state:
                state["average"] = torch.zeros_like(grads)
            average = state["average"]
            average.lerp_(grads, 1 - momentum)
            directions = orthogonalize(grads.lerp(average, momentum))
            size = lr * 0.2 * math.sqrt(max(params[0].shape))
            for p, direction in zip(params, directions, strict=True):
                p.mul_(1 - lr * group["weight_decay"])
                p.sub_(direction, alpha=size)


def orthogonalize(x):
    """x (N, 行, 列)：奇异值都推到 1 附近，方向不变。五次 Newton–Schulz 迭代，只用矩阵乘法，不用慢得多的 SVD。"""
    if x.shape[1] > x.shape[2]:
        return orthogonalize(x.mT).mT  # 让 x @ x.mT 是小的那个
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):  # x ← 3.4445 x − 4.7750 (x xᵀ) x + 2.0315 (x xᵀ)² x；baddbmm 把加和乘并成一次
        a = x @ x.mT
        a = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, a, x, beta=3.4445)
    return x
