"""各脚本共用的开头：从哪个模型开始，在哪些对话上学，学得怎样。小世界里答案是知道的，别的数据只量留出的损失。"""

from __future__ import annotations

import torch

from nlp_common.lm.chat_rows import answer_loss, chat_length, chat_row, collate
from nlp_common.lm.loading import load_chat_lm
from nlp_common.lm.losses import count_labels
from nlp_common.lm.replies import reply_to
from nlp_common.tiny import world
from nlp_common.tiny.judge import judge


def load_start(path: str, device: torch.device):
    """→ (分词器, 模型)，float32，一轮在 <|im_end|> 结束。"""
    return load_chat_lm(path, device)


def qa_accuracy(model, tokenizer, questions: list[dict]) -> float:
    """贪心回答的正确率，定义同 nlp_common/tiny/judge.py 的 qa_accuracy，只生成这一遍。"""
    was_training = model.training
    replies = reply_to(model.eval(), tokenizer, questions)
    model.train(was_training)
    return sum(judge(q, r["text"], r["ended"]).right for q, r in zip(questions, replies, strict=True)) / len(
        questions
    )


def heldout_questions(n: int) -> list[dict]:
    return world.heldout_questions(n, seed=0)


@torch.no_grad()
def heldout_loss(model, tokenizer, chats: list[dict], max_length: int, batch_size: int = 16) -> float:
    """留出对话里，助手每个 token 的平均损失（nats）。"""
    was_training = model.training
    model.eval()
    rows = [
        row for row in (chat_row(tokenizer, c["messages"]) for c in chats) if chat_length(row) <= max_length
    ]
    total = n = 0.0
    for start in range(0, len(rows), batch_size):
        batch = collate(rows[start : start + batch_size], tokenizer.pad_token_id)
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        total += answer_loss(model, batch)[0].item()
        n += count_labels(batch)
    model.train(was_training)
    return total / max(1.0, n)
