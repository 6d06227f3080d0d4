"""在对话上训练一个模型的几行：别的主题（LoRA、压缩、工具调用 …）练的都是这一样，各自的想法在各自的脚本里。"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from nlp_common.lm.chat_rows import answer_loss, chat_length, chat_row, collate
from nlp_common.train.loop import Loss, Trained, train_loop
from nlp_common.train.splits import drop_long
from nlp_common.train.stage import Stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def train_on_chats(
    stage: Stage,
    label: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    chats: list[dict],
    loss: Loss = answer_loss,
) -> Trained:
    """在 chats（每段带 ``"messages"``）上训练 model 里 requires_grad 的参数；学习率、批、步数在 stage.settings 里。

    loss：换一种损失，例如加上一项罚。
    """
    rows = [chat_row(tokenizer, chat["messages"]) for chat in chats]
    rows = drop_long(rows, chat_length, stage.settings.max_length, "训练数据")
    lengths = [chat_length(row) for row in rows]
    pad = partial(collate, pad_id=tokenizer.pad_token_id)
    return train_loop(stage, label, model, rows, pad, loss, tokens=lengths, lengths=lengths)
