"""标错了的：答错的回答、好坏标反的对。没有标准答案，让没见过这一行的模型来看。

1. 交叉：数据分成几份，轮流拿出一份，在其余的上面训练，再给拿出来的打分。模型见过的行不能自己打分：错的它也背下来了。
2. 回答：每个 token 的余地 = p(写着的) − p(别的里最大的)，一行取最小的一个。说法不止一种的地方，各种说法的 p 都不大，
   余地也就不太负；与故事不合的那个词，模型拿得准该写别的，余地接近 −1。看对数之比就分不开这两种（README 里有数）。
3. 偏好对：DPO 的隐式奖励之差 β·[(log π/π_ref)(好) − (log π/π_ref)(差)]，过 σ 就是"标得对"的概率。
4. 画线：confident learning。一类的线是标成这一类的行的平均把握；模型更相信另一类、又过了那一类的线，才算标错。
   与 cleanlab 的 find_label_issues(filter_by="confident_learning") 一行不差；第 2 步的余地就是它的 normalized margin。

参考：Northcutt et al. 2021（Confident Learning）；Swayamdipta et al. 2020（Dataset Cartography）。
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from nlp_common.fast.columns import labelled_logits
from nlp_common.lm.chat_rows import chat_length, chat_row, collate
from nlp_common.lm.losses import IGNORE, token_logps
from nlp_common.lm.pairs import collate_pairs, encode_pair, pair_length

BATCH, LARGEST = (
    64,
    1 << 26,
)  # 一批至多几行；一批的得分（token 数 × 词表）至多多少个数：词表大的模型，一批少放几行


class Doubt(NamedTuple):
    """一个回答里最可疑的一处：余地（大于 0 是模型自己也最想这样写），写着什么，模型想写什么。"""

    margin: float  # −1 … 1
    said: str
    would_say: str
    log_ratio: float  # 一行里 log p(写着的) − log p(别的里最大的) 最小的一个：只为比较


def fold_of(n: int, folds: int, seed: int) -> np.ndarray:
    """每一行在哪一份：随机，各份一样多。(n,)"""
    order = [number % folds for number in range(n)]
    random.Random(f"folds-{seed}").shuffle(order)
    return np.array(order)


def batches_of(lengths: list[int], vocab_size: int) -> Iterator[list[int]]:
    """行号，长短相近的在一批里。"""
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: lengths[place]):
        if len(batch) == BATCH or (batch and (len(batch) + 1) * lengths[place] * vocab_size > LARGEST):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


# ---------------------------------------------------------------- 回答


@torch.no_grad()
def answer_doubts(model, tokenizer, chats: list[dict]) -> list[Doubt]:
    """每段对话里，助手说的话最可疑的一处。"""
    model.eval()
    rows = [chat_row(tokenizer, chat["messages"]) for chat in chats]
    found: list[Doubt | None] = [None] * len(rows)
    for places in batches_of([chat_length(row) for row in rows], model.config.vocab_size):
        batch = collate([rows[place] for place in places], tokenizer.pad_token_id)
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        labels = batch["labels"][:, 1:]  # (B, T-1)
        keep = labels != IGNORE
        logits = labelled_logits(model, batch["input_ids"], keep).float()  # (M, V)
        margins, choice = token_margins(logits.softmax(-1), labels[keep])
        log_ratios, _ = token_margins(logits.log_softmax(-1), labels[keep])
        which, column = torch.where(keep)
        for row, place in enumerate(places):
            mine = torch.where(which == row)[0]
            worst = mine[margins[mine].argmin()]
            at = int(column[worst]) + 1
            before = batch["input_ids"][row, max(0, at - 3) : at].tolist()
            said = shown(tokenizer, [*before, int(labels[row, at - 1])])
            would_say = shown(tokenizer, [*before, int(choice[worst])])
            found[place] = Doubt(margins[worst].item(), said, would_say, log_ratios[mine].min().item())
    return [doubt for doubt in found if doubt is not None]


def shown(tokenizer, ids: list[int]) -> str:
    """给人看的几个字：说完了写成"（完）"，不写控制符。"""
    text = tokenizer.decode(ids).replace("<|im_end|>", "（完）")
    return "".join(text.rpartition("assistant\n")[2].split())


def token_margins(probabilities: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(M, V) 的概率（或对数概率）与 (M,) → 每个 token 的余地 (M,)，别的里最想写的是哪一个 (M,)。"""
    written = probabilities.gather(-1, labels[:, None])[:, 0]
    others, choice = probabilities.scatter(-1, labels[:, None], float("-inf")).max(-1)
    return written - others, choice


# ---------------------------------------------------------------- 偏好对


@torch.no_grad()
def pair_margins(model, reference, tokenizer, pairs: list[dict], beta: float) -> np.ndarray:
    """每对的隐式奖励之差 (N,)；大于 0 是模型同意标的次序。"""
    rows = [encode_pair(tokenizer, pair) for pair in pairs]
    for row in rows:
        row["rejected_ids"].pop()  # 与 DPO 训练时一样，差的不带结尾
    margins = np.zeros(len(rows))
    for places in batches_of([2 * pair_length(row) for row in rows], model.config.vocab_size):
        batch = collate_pairs([rows[place] for place in places], tokenizer.pad_token_id)
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        ratio = token_logps(model.eval(), **batch).sum(1) - token_logps(reference.eval(), **batch).sum(
            1
        )  # (2B,)
        chosen, rejected = ratio.chunk(2)
        margins[places] = (beta * (chosen - rejected)).cpu().numpy()
    return margins


def average_precision(scores: np.ndarray, is_wrong: np.ndarray) -> float:
    """从最可疑的（分最低的）看起，每碰到一个真错的就记下到此为止的查准率，再平均：不用画线，也知道排得好不好。"""
    ordered = is_wrong[np.argsort(scores, kind="stable")]
    precisions = ordered.cumsum() / np.arange(1, len(ordered) + 1)
    return float(precisions[ordered].mean())


# ---------------------------------------------------------------- 画线：confident learning


def confident_errors(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """labels (N,) 是标的类，probabilities (N, K) 是交叉验证的概率 → 哪些行标错了 (N,) bool。

    线 t_k = 标成 k 的行，p_k 的平均：各类的模型有多自信，线就有多高，不必手调。
    过了线的类里 p 最大的不是标的那一类，就是标错了。
    """
    n_classes = probabilities.shape[1]
    lines = np.array(
        [probabilities[labels == k, k].mean() if (labels == k).any() else 1.0 for k in range(n_classes)]
    )
    above = probabilities >= lines - 1e-6  # (N, K)
    confident = np.where(above, probabilities, -1.0)
    return above.any(1) & (confident.argmax(1) != labels)


def flipped_pairs(margins: np.ndarray, shown_first: np.ndarray) -> np.ndarray:
    """margins (N,) → 标反了的 (N,) bool。看成二分类：先给看的那个好（1），还是后给看的好（0）。"""
    right = 1 / (1 + np.exp(-np.clip(margins, -50, 50)))
    first = np.where(shown_first, right, 1 - right)
    return confident_errors(shown_first.astype(int), np.stack([1 - first, first], 1))
