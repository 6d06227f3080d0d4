"""困惑度与每字比特：一段文字在模型眼里有多意外。−ln p 加起来是总数，除以什么、怎样平均，就有对有错。

token_losses      每个 token 的 −ln p（nats），一段文字一次前向
strided_losses    文字比窗口长：窗口每次挪 stride，每个 token 只算一次，前文尽量长
perplexities      同一批数，三种平均：只有按 token 加权的是困惑度
bits_per_char     不论怎样切 token，都能比的：总的信息量 ÷ 字数
NgramModel        对照：数出来的 n 元模型，单位可以是字，也可以是字节
"""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence

import torch
import torch.nn.functional as F

from nlp_common.lm.generation import batches_by_length
from nlp_common.tiny import world

# ---------------------------------------------------------------- 1. 每个 token 的 −ln p


@torch.no_grad()
def token_losses(model, rows: list[list[int]], batch_size: int = 32) -> list[torch.Tensor]:
    """每一行（一段文字的 token）→ (T−1,) 的 −ln p(x_t | x_<t)。第一个 token 没有前文，不算。

    右边填充：因果的模型看不到右边，填充不影响左边的数。
    """
    found: list[torch.Tensor] = [torch.empty(0)] * len(rows)
    for batch in batches_by_length([len(row) for row in rows], batch_size):
        width = max(len(rows[i]) for i in batch)
        ids = torch.tensor([rows[i] + [0] * (width - len(rows[i])) for i in batch], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]  # (B, T−1, V)
        losses = F.cross_entropy(logits.transpose(1, 2).float(), ids[:, 1:], reduction="none")  # (B, T−1)
        for place, i in enumerate(batch):
            found[i] = losses[place, : len(rows[i]) - 1].double().cpu()
    return found


@torch.no_grad()
def strided_losses(
    model, ids: list[int], window: int, stride: int, batch_size: int = 32
) -> tuple[torch.Tensor, int]:
    """长文字 → ((T−1,) 的 −ln p, 前向了几个 token)。窗口宽 window，每次往前挪 stride。

    第一个窗口里的 token 都算，以后每个窗口只算最后新来的 stride 个：它们前面有 window − stride 个以上的前文。
    stride = window 是把文字切断了各算各的，块头的 token 没有前文可看，困惑度就虚高。
    """
    if not 1 <= stride < window:
        raise ValueError(f"要 1 ≤ stride < window，给的是 stride={stride}、window={window}。")
    spans = []  # (窗口从哪里到哪里, 从哪个 token 起是新的)
    start, done = 0, 1
    while done < len(ids):
        end = min(start + window, len(ids))
        spans.append((start, end, done))
        start, done = start + stride, end
    found = torch.zeros(len(ids) - 1, dtype=torch.float64)
    for at in range(0, len(spans), batch_size):
        batch = spans[at : at + batch_size]
        width = max(end - start for start, end, _ in batch)
        rows = [ids[start:end] + [0] * (width - (end - start)) for start, end, _ in batch]
        tensor = torch.tensor(rows, device=model.device)
        logits = model(input_ids=tensor, use_cache=False).logits[:, :-1]
        losses = F.cross_entropy(logits.transpose(1, 2).float(), tensor[:, 1:], reduction="none")
        for row, (start, end, new) in zip(losses.double().cpu(), batch, strict=True):
            found[new - 1 : end - 1] = row[new - 1 - start : end - 1 - start]
    return found, sum(end - start for start, end, _ in spans)


def cut_losses(model, ids: list[int], window: int) -> tuple[torch.Tensor, int]:
    """把文字切成 window 长的块各算各的：每块的第一个 token 没有前文，不算。最省，也最高。"""
    blocks = [ids[i : i + window] for i in range(0, len(ids), window)]
    losses = token_losses(model, [block for block in blocks if len(block) > 1])
    return torch.cat(losses), len(ids)


# ---------------------------------------------------------------- 2. 怎样平均


def perplexities(losses: Sequence[torch.Tensor]) -> dict[str, float]:
    """几段文字的 −ln p → 三种"困惑度"。

    token_weighted      exp(全部加起来 ÷ 全部 token 数)：一个 token 一票，这才是困惑度
    mean_of_losses      exp(各段平均损失的平均)：一段一票，短的段占了便宜
    mean_of_perplexities 各段困惑度的平均：又多一个 exp 的凸（Jensen），总是最大
    """
    means = torch.stack([row.mean() for row in losses])
    everything = torch.cat(list(losses))
    return {
        "token_weighted": math.exp(everything.mean()),
        "mean_of_losses": math.exp(means.mean()),
        "mean_of_perplexities": means.exp().mean().item(),
    }


def corpus_perplexity(rows: Sequence[tuple[float, int]]) -> float:
    """``(总的 −ln p, 几个 token)`` 一段一对 → 按 token 加权的困惑度；给 bootstrap 重抽的是段。"""
    return math.exp(sum(nats for nats, _ in rows) / sum(count for _, count in rows))


def bits_per_char(rows: Sequence[tuple[float, int]]) -> float:
    """``(总的 −ln p, 几个字)`` 一段一对 → 每个字几比特：单位是字，与分词器无关。"""
    return sum(nats for nats, _ in rows) / sum(count for _, count in rows) / math.log(2)


# ---------------------------------------------------------------- 3. 小世界的文档，长短不一


def mixed_documents(n: int, seed: int) -> list[dict]:
    """n 段留出的文字 ``{"text", "nats", "kind"}``，一半是整篇文档，一半只有第一句；nats 是语法里的 −ln p，精确。

    第一句短，又几乎处处要猜；整篇长，后面的回顾多半抄得到：长短与难易一起变，平均错了才看得出来。
    """
    rng = random.Random(f"mixed-{seed}")
    rows = [row | {"kind": "document"} for row in world.documents(n - n // 2, seed, heldout=True)]
    while len(rows) < n:
        slots = world.draw_slots(world.Draw(rng))
        if not world.is_heldout(slots):
            continue
        draw = world.Draw(rng)
        for slot in ("time", "person", "place"):  # 第一句里只有这三样
            draw.nats += math.log(len(world.WORLD[slot]))
        text = draw.pick(world.STORY[0]).format(**slots)
        rows.append({"text": text, "nats": draw.nats, "kind": "opening"})
    return rows


# ---------------------------------------------------------------- 4. n 元模型：另一种切法


class NgramModel:
    """数出来的 n 元模型，各阶用 Witten–Bell 混合（1991）：前文见过的次数越多、后面出现过的种类越少，越信它。

    单位是什么都行：字符串是按字，bytes 是按字节。
    """

    def __init__(self, order: int, kinds: int):
        self.order, self.kinds = order, kinds  # kinds：一共有几种单位（字节 256）
        self.after: dict[tuple, Counter] = defaultdict(Counter)

    def learn(self, texts: Sequence[Sequence[Hashable]]) -> NgramModel:
        for text in texts:
            for t, unit in enumerate(text):
                for n in range(min(self.order, t + 1)):
                    self.after[tuple(text[t - n : t])][unit] += 1
        self.total = {context: sum(counts.values()) for context, counts in self.after.items()}
        return self

    def nats(self, text: Sequence[Hashable]) -> float:
        """这段文字的 −ln p。"""
        return sum(-math.log(self.probability(text, t)) for t in range(len(text)))

    def probability(self, text: Sequence[Hashable], t: int) -> float:
        """p(第 t 个 | 前面的)：从"各种都一样"开始，前文长一个就混进一次。"""
        p = 1 / self.kinds
        for n in range(min(self.order, t + 1)):
            counts = self.after.get(tuple(text[t - n : t]))
            if counts is None:
                break
            total = self.total[tuple(text[t - n : t])]
            p = (counts[text[t]] + len(counts) * p) / (total + len(counts))
        return p
