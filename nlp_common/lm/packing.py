"""把长短不一的文档装进等长的块：不丢 token，不跨文档看，尽量不切断文档。"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from nlp_common.lm.losses import IGNORE


def pack_documents(documents: list, block_size: int, length: Callable[[Any], int] = len) -> list[list]:
    """返回块的列表，每块是若干篇文档，总长不超过 block_size；length(文档) 是它有几个 token。

    先长后短，每篇放进还装得下它的、剩余空间最小的块（best-fit decreasing）。
    """
    blocks: list[list] = []
    with_room: dict[int, list[int]] = {}  # 剩余空间 → 还有这么多空间的块的编号
    for document in sorted(documents, key=length, reverse=True):
        size = length(document)
        room = size
        while room < block_size and not with_room.get(room):
            room += 1
        if room < block_size:
            index = with_room[room].pop()
        else:
            index, room = len(blocks), block_size
            blocks.append([])
        blocks[index].append(document)
        with_room.setdefault(room - size, []).append(index)
    return blocks


def cut_long(documents: list[list[int]], block_size: int) -> list[list[int]]:
    """比一块还长的文档切成几块，其余一篇都不切：切断一篇文档，后半篇就没有前文可看。不丢 token。"""
    return [
        document[i : i + block_size] for document in documents for i in range(0, len(document), block_size)
    ]


def collate_blocks(blocks: list[list[list[int]]], block_size: int, pad_id: int) -> dict[str, torch.Tensor]:
    """若干块 → ``input_ids``、``position_ids``、``labels``，形状都是 (B, block_size)。

    position_ids 在每篇文档开头归零；不传 attention_mask 时，transformers 据此认出文档边界，
    建出"因果且只看本文档"的掩码。每篇文档的第一个 token 没有前文，不作为标签。
    """
    shape = (len(blocks), block_size)
    input_ids = torch.full(shape, pad_id)
    position_ids = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORE)
    for row, block in enumerate(blocks):
        at = 0
        for doc in block:
            span = slice(at, at + len(doc))
            input_ids[row, span] = labels[row, span] = torch.tensor(doc)
            position_ids[row, span] = torch.arange(len(doc))
            labels[row, at] = IGNORE
            at += len(doc)
    return {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}
