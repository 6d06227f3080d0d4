"""手写的两层 Transformer 编码器，注意力自己存着：没有任何库的模型也能看。

与 simple_demo 的第四个脚本是同一种东西，多一层、多一个头，句子换成中文的，里面有否定：
"我 不 喜欢 这家 店" 要同时看见"不"和"喜欢"才判得对。几秒钟训练好。
给 head_view.py 与 rollout_and_flow.py 的 --hand 用；也可以单独运行：

    python hand_transformer.py 文件.json      # 存下一句话的注意力，再用 head_view.py --attention 文件.json 看
"""

from __future__ import annotations

from nlp_common.base.cli import run_main

import hashlib
import json
import math
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from torch import nn

from nlp_common.base.errors import UserError

WHO = ["我", "他们", "大家"]
FEELINGS = {"喜欢": 1, "爱": 1, "讨厌": 0, "恨": 0}
WHAT = ["这家店", "这部电影", "那本书", "这道菜"]
EXAMPLE = ["[CLS]", "大家", "不", "喜欢", "这部电影"]


@dataclass
class Example:
    """一句话与它的注意力：maps 每层 (H, T, T)；feeling 是"不"和好恶词的位置。"""

    pieces: list[str]
    maps: list[torch.Tensor]
    answer: str
    accuracy: float
    feeling: list[int]
    data: dict


class Layer(nn.Module):
    """一层编码器，两个头。forward 之后，weights 里是这次的注意力 (B, H, T, T)。"""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.feed_forward = nn.Sequential(nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, dim))
        self.weights = torch.empty(0)

    def split(self, x: torch.Tensor) -> torch.Tensor:  # (B, T, C) → (B, H, T, C/H)
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, T, C)
        q, k, v = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # (B, H, T, T)
        self.weights = scores.softmax(-1)
        mixed = (self.weights @ v).transpose(1, 2).flatten(2)  # (B, T, C)
        x = self.norm1(x + self.output(mixed))
        return self.norm2(x + self.feed_forward(x))


class HandTransformer(nn.Module):
    """词向量 + 位置向量 → 两层 → [CLS] 的位置 → 2 类。"""

    def __init__(self, vocab: int, dim: int = 16, heads: int = 2, layers: int = 2, length: int = 8):
        super().__init__()
        self.embedding, self.position = nn.Embedding(vocab, dim), nn.Embedding(length, dim)
        self.layers = nn.ModuleList(Layer(dim, heads) for _ in range(layers))
        self.output = nn.Linear(dim, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:  # (B, T) → (B, 2)
        x = self.embedding(ids) + self.position.weight[: ids.shape[1]]  # (B, T, C)
        for layer in self.layers:
            x = layer(x)
        return self.output(x[:, 0])


def sentences() -> list[tuple[list[str], int]]:
    """全部的句子与标签：有"不"，好恶就反过来。没有"不"的那个位置写"很"，句子就一样长。"""
    rows = []
    for who, word, what, negated in product(WHO, FEELINGS, WHAT, (False, True)):
        label = FEELINGS[word] ^ int(negated)
        rows.append((["[CLS]", who, "不" if negated else "很", word, what], label))
    return rows


def hand_example(seed: int, epochs: int = 120) -> Example:
    """训练手写的编码器，再看 EXAMPLE 这一句；它不在训练数据里。"""
    torch.manual_seed(seed)
    rows = sentences()
    vocab = {word: number for number, word in enumerate(sorted({w for words, _ in rows for w in words}))}
    ids = torch.tensor([[vocab[word] for word in words] for words, _ in rows])  # (96, 5)
    labels = torch.tensor([label for _, label in rows])
    # 四分之一不参加训练，EXAMPLE 在其中
    heldout = torch.tensor([n % 4 == 1 or words == EXAMPLE for n, (words, _) in enumerate(rows)])
    model = HandTransformer(len(vocab))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(epochs):
        loss = nn.functional.cross_entropy(model(ids[~heldout]), labels[~heldout])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        accuracy = (model(ids[heldout]).argmax(-1) == labels[heldout]).float().mean().item()
        answer = model(torch.tensor([[vocab[word] for word in EXAMPLE]])).argmax().item()
    maps = [layer.weights[0].detach() for layer in model.layers]
    sha256 = hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()
    data = {"train": {"name": "hand", "kind": "builtin", "rows": len(rows), "sha256": sha256}}
    return Example(EXAMPLE, maps, "正面" if answer else "负面", accuracy, [2, 3], data)


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(__doc__.strip())
        sys.exit(0 if sys.argv[1:] in (["-h"], ["--help"]) else 2)
    path = Path(sys.argv[1])
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"写不了 {path}：要是一个文件的名字，它所在的文件夹要已经有了。")
    example = hand_example(0)
    attention = [
        [[[round(w, 6) for w in row] for row in head] for head in maps.tolist()] for maps in example.maps
    ]
    text = json.dumps({"tokens": example.pieces, "attention": attention}, ensure_ascii=False)
    path.write_text(text, encoding="utf-8")
    print(
        f"{''.join(example.pieces)} → {example.answer}，留出的句子答对 {example.accuracy:.2f}；注意力存在 {sys.argv[1]}"
    )


if __name__ == "__main__":
    run_main(main)
