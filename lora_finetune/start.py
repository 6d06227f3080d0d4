"""各脚本共用的开头：从哪个模型开始，在哪些对话上学，学得怎样。小世界里答案是知道的，别的数据只量留出的损失。"""

from __future__ import annotations

import torch

from nlp_common.lm import chat_rows
from nlp_common.lm.chat_rows import chat_length, chat_row
from nlp_common.lm.loading import load_chat_lm
from nlp_common.lm.replies import reply_to
from nlp_common.tiny import world
from nlp_common.tiny.judge import judge
from nlp_common.train.splits import drop_long


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


def heldout_loss(model, tokenizer, chats: list[dict], max_length: int, batch_size: int = 16) -> float:
    """留出对话里，助手每个 token 的平均损失（nats）；超过 max_length 的不算，一段不剩是 UserError。"""
    rows = [chat_row(tokenizer, chat["messages"]) for chat in chats]
    rows = drop_long(rows, chat_length, max_length, "留出数据")
    return chat_rows.heldout_loss(model, rows, tokenizer.pad_token_id, batch_size)
