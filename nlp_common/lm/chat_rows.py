"""对话的训练行：token 与标签，拼成一批，助手说的话的损失，留出的对话上量一量。SFT 为什么这样做，见 qwen_chinese_finetune/sft_chinese_qwen.py。"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from nlp_common.lm.chatml import encode_chat
from nlp_common.lm.losses import IGNORE, count_labels, token_logps

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def chat_row(tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> dict[str, list[int]]:
    """一段对话 → input_ids 与等长的 labels：助手说的话（含结尾的 <|im_end|>）留着，其余是 IGNORE。"""
    input_ids, is_answer = encode_chat(tokenizer, messages)
    labels = [token if answer else IGNORE for token, answer in zip(input_ids, is_answer, strict=True)]
    return {"input_ids": input_ids, "labels": labels}


def chat_length(row: dict) -> int:
    """一行几个 token。"""
    return len(row["input_ids"])


def collate(rows: list[dict], pad_id: int) -> dict[str, torch.Tensor]:
    """右填充成 (B, T)。注意力是因果的，真实 token 看不到右边的填充，所以连 attention_mask 都不需要。"""
    width = max(chat_length(row) for row in rows)

    def pad(key: str, value: int) -> torch.Tensor:
        return torch.tensor([row[key] + [value] * (width - len(row[key])) for row in rows])

    fill = {"input_ids": pad_id, "labels": IGNORE, "position_ids": 0}
    return {key: pad(key, fill[key]) for key in rows[0]}


def answer_loss(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict]:
    """一批对话（input_ids、labels 各 (B, T)）里，助手的每个 token 的 −log π，加起来：train_loop 要的写法。"""
    inputs: Any = batch
    return -token_logps(model, **inputs).sum(), {}


@torch.no_grad()
def heldout_loss(
    model: PreTrainedModel, rows: list[dict[str, list[int]]], pad_id: int, batch_size: int
) -> float:
    """留出对话（chat_row 的行）里，助手每个 token 的平均损失（nats）；model 原来在训练的，还是在训练。"""
    was_training = model.training
    model.eval()
    total, n = 0.0, 0
    for start in range(0, len(rows), batch_size):
        batch = collate(rows[start : start + batch_size], pad_id)
        n += count_labels(batch)
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        total += answer_loss(model, batch)[0].item()
    model.train(was_training)
    return total / n
