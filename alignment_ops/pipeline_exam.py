"""data_pipeline.py 的考试：开卷与闭卷，教过的与没见过的文档，教过的与没教过的问法；还有原来会的忘了没有。"""

from __future__ import annotations

import random
from pathlib import Path

from instruction_rows import CLOSED, OPEN, exam_of, is_right, row
from nlp_common.base.intervals import proportion_interval
from nlp_common.lm.loading import load_chat_lm
from nlp_common.lm.replies import reply_to
from nlp_common.tiny.judge import measure_chat
from nlp_common.tiny.world import heldout_questions
from qa_rules import Pair

# 名字：(哪边的文档, 开卷还是闭卷, 是不是没教过的问法)
EXAMS = {
    "open_heldout": ("heldout", "open", False),
    "open_heldout_other_wording": ("heldout", "open", True),
    "closed_trained": ("train", "closed", False),
    "closed_trained_other_wording": ("train", "closed", True),
    "closed_heldout": ("heldout", "closed", False),
}
TITLES = {
    "open_heldout": "没见过的文档，开卷",
    "open_heldout_other_wording": "没见过的文档，开卷，没教过的问法",
    "closed_trained": "教过的文档，闭卷",
    "closed_trained_other_wording": "教过的文档，闭卷，没教过的问法",
    "closed_heldout": "没见过的文档，闭卷（只能猜）",
}
MOST_TOKENS, WORLD_QUESTIONS = 48, 256


def measure(
    path: str | Path,
    train: list[Pair],
    heldout: list[Pair],
    pairs: list[Pair],
    device,
    small_world: bool,
) -> dict:
    """各科的成绩 ``{"accuracy", "low", "high", "n"}``；small_world：还有小世界的 qa_accuracy、small_talk。"""
    tokenizer, model = load_chat_lm(str(path), device)
    model.eval()
    answers: dict[str, set[str]] = {}
    for pair in pairs:
        answers.setdefault(pair.rule, set()).add(pair.answer)
    scores: dict = {}
    for name, (side, book, other) in EXAMS.items():
        asked = exam_of(train if side == "train" else heldout, book, other)
        if not asked:
            continue
        replies = reply_to(model, tokenizer, asked, MOST_TOKENS)
        right = [is_right(r, q["pair"], answers[q["pair"].rule]) for r, q in zip(replies, asked, strict=True)]
        interval = proportion_interval(sum(right), len(right))
        scores[name] = {
            "accuracy": interval.value,
            "low": interval.low,
            "high": interval.high,
            "n": interval.n,
        }
    if small_world:
        chat = measure_chat(model, tokenizer, heldout_questions(WORLD_QUESTIONS, 0))[0]
        scores |= {name: chat[name] for name in ("qa_accuracy", "small_talk")}
    return scores


def read_by_row_split(pairs: list[Pair], share: float, seed: int) -> tuple[list[dict], list[Pair]]:
    """错的分法：教的各种问法摊成一行一行，随机留出 share → (训练的行, 留出的题)。

    留出的题，问法换成留出的那一种：同一件事的另一种问法，多半在训练的行里。
    """
    rng = random.Random(f"row-split-{seed}")
    rows, hidden = [], []
    for pair in pairs:
        for place, question in enumerate(pair.questions[:-1] or pair.questions):
            if rng.random() < share:
                hidden.append(Pair(**{**vars(pair), "questions": (question,)}))
            else:
                rows.append(row(pair, OPEN[place % len(OPEN)], question, "open"))
                rows.append(row(pair, CLOSED[place % len(CLOSED)], question, "closed"))
    return rows, hidden
