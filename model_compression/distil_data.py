"""蒸馏用的对话，与怎样量学生：小世界的题程序知道答案；自己的对话看留出的损失。"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from nlp_common.data.chats import to_chats
from nlp_common.lm.chat_rows import chat_length, chat_row, heldout_loss
from nlp_common.tiny import world
from nlp_common.tiny.judge import qa_accuracy
from nlp_common.train.splits import drop_long, load_train_and_eval


@dataclass
class Data:
    """学的对话，与怎样量：小世界答对几成；自己的对话没有程序判对错，量留出的 e^−L（每个 token 平均给对的几成概率）。"""

    train: list[dict]
    rows: list[dict]  # train 分好词的：几种学法都用，只分一次
    heldout: list[dict]
    source: dict
    tiny: bool

    def score(self, model, tokenizer, quick: bool = False) -> float:
        """quick：训练途中看看，用另一份题，最后的成绩不用它挑。"""
        if not self.tiny:
            return math.exp(
                -heldout_loss(model, chat_rows(tokenizer, self.heldout), tokenizer.pad_token_id, 8)
            )
        n = len(self.heldout)
        questions = world.heldout_questions(min(n, 128), seed=1) if quick else self.heldout
        return qa_accuracy(model, tokenizer, questions)

    def final(self, model, tokenizer) -> dict:
        found = {"accuracy": self.score(model, tokenizer)}
        if self.tiny:
            found["sampled_accuracy"] = qa_accuracy(model, tokenizer, self.heldout, temperature=1.0)
        return found


def load_data(settings: Any, tokenizer) -> Data:
    if settings.dataset == "tiny_world":
        train = world.chats(settings.max_train_samples, settings.seed)
        heldout = world.heldout_questions(settings.max_eval_samples, seed=0)
        source = {"train": {"name": "tiny_world", "kind": "builtin", "rows": len(train)}}
        return Data(train, chat_rows(tokenizer, train), heldout, source, True)
    train, heldout, source = load_train_and_eval(settings, "chats", to_chats)
    train, heldout = (
        drop_long(
            rows, lambda row: chat_length(chat_row(tokenizer, row["messages"])), settings.max_length, "对话"
        )
        for rows in (train, heldout)
    )
    return Data(train, chat_rows(tokenizer, train), heldout, source, False)


def chat_rows(tokenizer, chats: list[dict]) -> list[dict]:
    return [chat_row(tokenizer, chat["messages"]) for chat in chats]
