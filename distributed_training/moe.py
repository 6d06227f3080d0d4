"""一层混合专家（MoE）：路由、top-2、容量、均衡损失。一个进程里怎样算；专家分给几个进程在 expert_parallel.py。"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TOP = 2  # 一个 token 去几个专家


@dataclass(frozen=True)
class Routes:
    """N 个 token 各去哪里；空着的、装不下的，位置是 −1。"""

    experts: Tensor  # (N, 2) 去哪两个专家
    gates: Tensor  # (N, 2) 各占多少，一行加起来是 1
    places: Tensor  # (N, 2) 是那个专家的第几个；−1：满了，不去
    balance: Tensor  # 均衡损失，最均匀时是 1

    @property
    def dropped(self) -> float:
        return (self.places < 0).float().mean().item()

    def loads(self, n_experts: int) -> Tensor:
        """每个专家想收的占几成 (E,)，装不下的也算。"""
        return torch.bincount(self.experts.flatten(), minlength=n_experts) / self.experts.numel()


def capacity_of(n_tokens: int, n_experts: int, factor: float) -> int:
    """一个专家最多收几个 token：平均的 factor 倍（Lepikhin et al. 2020 第 2.2 节）。"""
    return math.ceil(factor * TOP * n_tokens / n_experts)


def route(x: Tensor, router: Tensor, factor: float) -> Routes:
    """x (N, C)、router (E, C) → 各去哪两个专家，先到先得。"""
    probs = F.softmax(x @ router.T, dim=-1)  # (N, E)
    gates, experts = probs.topk(TOP, dim=-1)  # (N, 2)
    gates = gates / gates.sum(-1, keepdim=True)
    n, n_experts = probs.shape
    # 第一选择都排在第二选择前面：装不下的时候，先丢第二选择
    order = experts.T.flatten()  # (2N,)
    one_hot = F.one_hot(order, n_experts)  # (2N, E)
    places = (one_hot.cumsum(0) * one_hot).sum(-1) - 1  # (2N,)：同一个专家的第几个
    places = places.masked_fill(places >= capacity_of(n, n_experts, factor), -1).view(TOP, n).T
    # E·Σ f_e P_e：f 是第一选择真去了几成（没有梯度），P 是平均给了几成的概率（Shazeer et al. 2017；Fedus et al. 2021 式 4）
    first = F.one_hot(experts[:, 0], n_experts).to(probs.dtype).mean(0)
    return Routes(experts, gates, places, n_experts * (first * probs.mean(0)).sum())


def dispatch(x: Tensor, routes: Routes, n_experts: int, capacity: int) -> Tensor:
    """token 装进各专家的格子：(N, C) → (E, K, C)，空格是 0。"""
    boxes = x.new_zeros(n_experts, capacity, x.shape[1])
    for choice in range(TOP):
        kept = routes.places[:, choice] >= 0
        boxes = boxes.index_put((routes.experts[kept, choice], routes.places[kept, choice]), x[kept])
    return boxes


def combine(boxes: Tensor, routes: Routes) -> Tensor:
    """从格子里取回来，照门的大小加起来：(E, K, C) → (N, C)。两个专家都满了的 token 是 0，只剩残差那一路。"""
    total = torch.zeros(())
    for choice in range(TOP):
        places = routes.places[:, choice]
        taken = boxes[routes.experts[:, choice], places.clamp_min(0)]  # (N, C)
        total = total + taken * (routes.gates[:, choice] * (places >= 0))[:, None]
    return total


class Experts(nn.Module):
    """E 个两层的 MLP，权重叠在一起，一次算完：(E, K, C) → (E, K, C)。"""

    def __init__(self, n_experts: int, width: int, inner: int):
        super().__init__()
        # 起点同 nn.Linear：±1/√输入宽度 之间均匀
        self.up = nn.Parameter((torch.rand(n_experts, width, inner) * 2 - 1) / math.sqrt(width))
        self.down = nn.Parameter((torch.rand(n_experts, inner, width) * 2 - 1) / math.sqrt(inner))

    def forward(self, boxes: Tensor) -> Tensor:
        return F.gelu(boxes @ self.up) @ self.down


class MoE(nn.Module):
    """代替一层 MLP：(B, T, C) → (B, T, C)；这一次的 routes 留着，均衡损失从那里取。"""

    def __init__(self, width: int, inner: int, n_experts: int, factor: float):
        super().__init__()
        self.router = nn.Parameter(torch.randn(n_experts, width) / math.sqrt(width))
        self.experts = Experts(n_experts, width, inner)
        self.factor = factor
        self.routes: Routes | None = None

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)  # (N, C)
        self.routes = route(flat, self.router, self.factor)
        n_experts = len(self.router)
        boxes = dispatch(flat, self.routes, n_experts, capacity_of(len(flat), n_experts, self.factor))
        return combine(self.experts(boxes), self.routes).view_as(x)


def dense_loop(x: Tensor, moe: MoE) -> Tensor:
    """同样的结果，一个专家一个专家、一个 token 一个 token 地算：没有格子，看得最清楚，只用来对照。(N, C) → (N, C)"""
    routes = route(x, moe.router, moe.factor)
    rows = []
    for token in range(len(x)):
        y = torch.zeros_like(x[token])
        for choice in range(TOP):
            if routes.places[token, choice] >= 0:
                e = routes.experts[token, choice]
                hidden = F.gelu(x[token] @ moe.experts.up[e])
                y = y + routes.gates[token, choice] * (hidden @ moe.experts.down[e])
        rows.append(y)
    return torch.stack(rows)
