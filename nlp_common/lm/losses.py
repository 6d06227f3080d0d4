"""损失里到处要用的：不算损失的标签，数标签，和有标签的 token 的 log π。"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from nlp_common.fast.columns import labelled_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IGNORE = -100  # 交叉熵忽略的标签


def count_labels(batch: dict[str, torch.Tensor]) -> int:
    """一批里有几个 token 要算损失。"""
    return int((batch["labels"] != IGNORE).sum())


def token_logps(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    temperature: float = 1.0,
    **inputs: Any,
) -> torch.Tensor:
    """有标签的 token 的对数概率 log π(y_t | x, y_<t)：(B, T) 与 (B, T) → (B, C)，没有标签的位置是 0。

    位置 t 的 logits 预测位置 t+1：移位要在掩码之前想清楚，差一格就是在学错的东西。
    C 是至少有一行带标签的列数。别的列没有人读，最后一层不必算；输出层只算带标签的位置，词表越大，省得越多。
    inputs 是 position_ids 等交给模型的其余输入。
    """
    labels = labels[:, 1:]  # (B, T-1)，与预测它的位置对齐
    keep = labels != IGNORE
    logits = labelled_logits(model, input_ids, keep, **inputs).float()  # (M, V)，M 是标签的个数
    if temperature != 1:
        logits = logits / temperature
    logps = -F.cross_entropy(logits, labels[keep], reduction="none")  # (M,)
    inside = keep[:, keep.any(0)]  # (B, C)
    return torch.zeros(inside.shape, dtype=logps.dtype, device=logps.device).masked_scatter(inside, logps)
