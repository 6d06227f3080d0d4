"""剪枝与量化共用的：哪些设置，校准的行、恢复时学的行、留出的行，与怎样量一个模型。

三种来处：小世界的对话（程序知道答案，量答对几成）；读者自己的对话；python_docs，Python 自带的英文语言手册
（标准库的 pydoc_data，装了 Python 就有），给只懂英文的 SmolLM2 用，量困惑度。
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from calibration import calibration_rows
from measuring import measure
from nlp_common.base.arguments import COUNT, option
from nlp_common.base.errors import UserError
from nlp_common.data.chats import to_chats
from nlp_common.lm.chat_rows import chat_length, chat_row, heldout_loss
from nlp_common.tiny import world
from nlp_common.train.settings import LessonSettings
from nlp_common.train.splits import drop_long, load_train_and_eval

DOCS_LENGTH = 128  # python_docs 一行几个 token
N_HELDOUT = 16  # python_docs 留出几行


@dataclass
class CalibratedSettings(LessonSettings):
    """压哪个模型，校准与量用什么数据。"""

    # 没给的：False 是别的模型；True 是 smollm2（只懂英文，CPU 上慢，所以少试几样）
    DEFAULTS: ClassVar[dict[bool, dict]] = {
        False: {"dataset": "tiny_world"},
        True: {"dataset": "python_docs"},
    }

    model: str | None = option("压哪个模型：文件夹、hub 名或 smollm2；默认是 Qwen 链 tiny 预设的 SFT 模型")
    source: Literal["hf", "modelscope"] = option("hub 名从哪里下载", "hf")
    dataset: str | None = option(
        "校准与量的数据：tiny_world、python_docs（Python 自带的英文手册，smollm2 的默认），或自己的对话，写法同 SFT"
    )
    eval_dataset: str | None = option("自己的留出对话；没给就从 --dataset 里分出来")
    n_calibration: int | None = option("校准用几段对话", limits=COUNT)
    max_train_samples: int = option("自己的数据最多读几段；剪枝以后恢复，也学这么多段", 2000)
    max_eval_samples: int | None = option("用几道留出的题（自己的数据：几段留出的对话）量", limits=COUNT)
    max_length: int = option("自己的对话最多几个 token，更长的不用", 512)

    def check(self) -> None:
        for defaults in (self.DEFAULTS, CalibratedSettings.DEFAULTS):
            for name, value in defaults[self.model == "smollm2"].items():
                if getattr(self, name) is None:
                    setattr(self, name, value)
        if self.eval_dataset and self.dataset in ("tiny_world", "python_docs"):
            raise UserError(f"{self.dataset} 自带留出的，--eval_dataset 用不上：与自己的 --dataset 一起给。")


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
