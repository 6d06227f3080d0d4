"""剪枝用的数据：校准的行、恢复时学的行、留出的行，与怎样量一个模型。

三种来处：小世界的对话（程序知道答案，量答对几成）；读者自己的对话；python_docs，Python 自带的英文语言手册
（标准库的 pydoc_data，装了 Python 就有），给只懂英文的 SmolLM2 用，量困惑度。
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

from calibration import calibration_rows
from measuring import measure
from nlp_common.base.errors import UserError
from nlp_common.data.chats import to_chats
from nlp_common.lm.chat_rows import chat_length, chat_row, heldout_loss
from nlp_common.tiny import world
from nlp_common.train.splits import drop_long, load_train_and_eval

DOCS_LENGTH = 128  # python_docs 一行几个 token
N_HELDOUT = 16  # python_docs 留出几行


@dataclass
class PruneData:
    calibration: list[dict]  # chat_row 的行：input_ids、labels
    train: list[dict]
    heldout: list[dict]
    questions: list[dict] | None  # 小世界的题；别的数据没有程序判对错
    source: dict

    def measure(self, model, tokenizer) -> dict[str, float]:
        """小世界：{"qa_accuracy", "heldout_loss"}；别的数据：{"heldout_loss", "perplexity"}。"""
        if self.questions is not None:
            return measure(model, tokenizer, self.questions)
        loss = heldout_loss(model, self.heldout, tokenizer.pad_token_id, 8)
        return {"heldout_loss": loss, "perplexity": math.exp(min(loss, 50))}


def load_data(settings: Any, tokenizer) -> PruneData:
    """settings.dataset 是 tiny_world、python_docs，或读者自己的对话；校准一行也没有是 UserError。"""
    n = settings.n_calibration
    if settings.dataset == "python_docs":
        rows = docs_rows(tokenizer)
        order = list(range(N_HELDOUT, len(rows)))
        random.Random(settings.seed).shuffle(order)
        train = [rows[place] for place in order]
        return PruneData(train[:n], train[n:], rows[:N_HELDOUT], None, {"name": "python_docs"})
    if settings.dataset == "tiny_world":
        rows = calibration_rows(tokenizer, n + settings.max_train_samples, settings.seed)
        questions = world.heldout_questions(settings.max_eval_samples, seed=0)
        return PruneData(rows[:n], rows[n:], [], questions, {"name": "tiny_world", "kind": "builtin"})
    chats, heldout, source = load_train_and_eval(settings, "chats", to_chats)
    length = settings.max_length
    train, kept = (
        drop_long([chat_row(tokenizer, chat["messages"]) for chat in part], chat_length, length, what)
        for part, what in ((chats, "校准与恢复的对话"), (heldout, "留出的对话"))
    )
    return PruneData(train[:n], train, kept, None, source)


def docs_rows(tokenizer) -> list[dict]:
    """Python 的语言手册切成 DOCS_LENGTH 个 token 一行，每个 token 都要学；次序打乱，与种子无关，留出的总是同样的几行。"""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids  # 比上下文长，后面就切
    n_rows = len(ids) // DOCS_LENGTH
    if n_rows < 2 * N_HELDOUT:
        raise UserError(f"这个 Python 自带的手册只有 {n_rows} 行，不够分：用 --dataset 给自己的对话。")
    rows = [ids[place * DOCS_LENGTH : (place + 1) * DOCS_LENGTH] for place in range(n_rows)]
    random.Random(0).shuffle(rows)
    return [{"input_ids": row, "labels": list(row)} for row in rows]
