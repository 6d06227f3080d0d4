"""各种并行都拿它来切的小模型：一个字不少的 GPT，只是小。种子相同，各进程造出来的就相同。

与大模型同名同形：注意力的头可以分、MLP 的中间可以分、词表可以分、层可以分。
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Sizes:
    vocab: int = 96
    width: int = 32
    heads: int = 4
    layers: int = 4
    inner: int = 64
    context: int = 32


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C)
        b, t, _ = x.shape
        q, k, v = (
            layer(x).view(b, t, self.heads, -1).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )  # (B, nh, T, hs)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).reshape(b, t, -1))


class MLP(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    def __init__(self, sizes: Sizes):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(sizes.width), nn.LayerNorm(sizes.width)
        self.attention = Attention(sizes.width, sizes.heads)
        self.mlp = MLP(sizes.width, sizes.inner)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class SmallGPT(nn.Module):
    def __init__(self, sizes: Sizes):
        super().__init__()
        self.sizes = sizes
        self.tokens = nn.Embedding(sizes.vocab, sizes.width)
        self.positions = nn.Embedding(sizes.context, sizes.width)
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.layers))
        self.norm = nn.LayerNorm(sizes.width)
        self.head = nn.Linear(sizes.width, sizes.vocab, bias=False)

    def forward(self, ids: Tensor) -> Tensor:  # (B, T) → (B, T, V)
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def make_model(sizes: Sizes | None = None, seed: int = 0, dtype: torch.dtype = torch.float64) -> SmallGPT:
    """种子定下全部权重：与别处的随机数无关，各进程一样。"""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return SmallGPT(sizes or Sizes()).to(dtype)


def make_batch(n: int, length: int, vocab: int, seed: int = 0) -> Tensor:
    """n 行随机的 token (n, length + 1)：前 length 个是输入，后 length 个是目标。"""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab, (n, length + 1), generator=generator)


def loss_sum(model: nn.Module, rows: Tensor) -> Tensor:
    """每个位置的交叉熵，加起来（不平均：平均要除以全体进程的个数，由调用的人除）。"""
    logits = model(rows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum")


def max_difference(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """两份权重（或梯度），一个数与一个数，最多差多少；名字要一样。"""
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    return max((found[name] - wanted[name]).abs().max().item() for name in wanted)
