"""各脚本共用的开头：从哪个模型开始，在哪些对话上学，学得怎样。小世界里答案是知道的，别的数据只量留出的损失。"""

from __future__ import annotations

import torch

from nlp_common.base.errors import UserError
from nlp_common.data.chats import to_chats
from nlp_common.data.rows import read_rows
from nlp_common.lm import chat_rows
from nlp_common.lm.chat_rows import chat_length, chat_row
from nlp_common.lm.loading import load_chat_lm
from nlp_common.tiny import world
from nlp_common.train.splits import distinct_rows, drop_long


def is_real(settings) -> bool:
    """从真的模型（Qwen、SmolLM2）开始，还是小世界的：学习率要小得多，也没有学过小世界的题。"""
    return settings.preset == "full" or settings.model == "smollm2"


def fill_in(settings, small: dict, real: dict) -> None:
    """没给的参数：小世界的模型与真的模型各一组，与预设无关。"""
    for name, value in (real if is_real(settings) else small).items():
        if getattr(settings, name) is None:
            setattr(settings, name, value)


def names(text: str) -> list[str]:
    """逗号隔开的几个名字；中文的逗号也认。"""
    return [each.strip() for each in text.replace("，", ",").split(",")]


def load_start(path: str, device: torch.device):
    """→ (分词器, 模型)，float32，一轮在 <|im_end|> 结束。"""
    return load_chat_lm(path, device)


def heldout_questions(n: int) -> list[dict]:
    return world.heldout_questions(n, seed=0)


def heldout_loss(model, tokenizer, chats: list[dict], max_length: int, batch_size: int = 16) -> float:
    """留出对话里，助手每个 token 的平均损失（nats）；超过 max_length 的不算，一段不剩是 UserError。"""
    rows = [chat_row(tokenizer, chat["messages"]) for chat in chats]
    rows = drop_long(rows, chat_length, max_length, "留出数据")
    return chat_rows.heldout_loss(model, rows, tokenizer.pad_token_id, batch_size)


def own_chats(dataset: str, limit: int, source: str) -> tuple[list[dict], list[dict], dict]:
    """自己的对话（--dataset，写法同 SFT）→ (训练的, 留出的, 数据的来历)：去掉重复，二十段留出一段。"""
    read = read_rows(dataset, limit=limit, source=source)
    chats = distinct_rows(to_chats(read.rows, dataset), dataset)
    if len(chats) < 2:
        raise UserError(f"{dataset} 只有 {len(chats)} 段对话，至少要两段：一段训练，一段留出。")
    train = [chat for i, chat in enumerate(chats) if i % 20]
    print(f"{dataset}：训练 {len(train)} 段，留出 {len(chats) - len(train)} 段")
    return train, chats[::20], read.source
