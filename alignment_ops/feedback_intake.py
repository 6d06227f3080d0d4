"""收数据、清数据：新收的对话与偏好对，里面混着重复的、乱码的、别的语言的、有人电话的，两道手续洗干净。

只用四条看文字就知道的规则（重复、语言、垃圾、个人信息）。答案错了、好坏标反了这些看不出来的，是 dataset_curation.py 的课；
漏过去的，后面的门会拦住因为它们而变坏的模型。
"""

from __future__ import annotations

import copy
import random
from collections import Counter

from curation_rows import (
    Table,
    drop_exact,
    drop_garbage,
    drop_other_languages,
    mask_personal,
    turns_of,
)
from planted_text import broken_text, foreign_turns, personal_sentence

DIRT = 0.04  # 每样脏东西占几成


def with_dirt(rows: list[dict], seed: int) -> list[dict]:
    """rows 里混进四样脏东西，每样 DIRT：抄了一份的、回答坏了的、别的语言的、带着号码的。"""
    rng = random.Random(f"dirt-{seed}")
    n = round(DIRT * len(rows))
    dirty = [copy.deepcopy(row) for row in rows]
    for row in rng.sample(dirty, n):
        _, _, sentence = personal_sentence(rng)
        asked = turns_of(row)[0]
        asked["content"] = sentence + asked["content"]
    added = [copy.deepcopy(row) for row in rng.sample(rows, n)]  # 抄了一份
    for row in rng.sample(rows, n):
        row = copy.deepcopy(row)
        answer = turns_of(row)[-1]
        _, answer["content"] = broken_text(rng, answer["content"], turns_of(row)[0]["content"])
        added.append(row)
    for row in rng.sample(rows, n):
        _, said = foreign_turns(rng)
        added.append(_foreign(row, said))
    everything = dirty + added
    rng.shuffle(everything)
    return everything


def _foreign(row: dict, said: list[str]) -> dict:
    ask, answer, worse = said
    asked, told = {"role": "user", "content": ask}, {"role": "assistant", "content": answer}
    if "messages" in row:
        return {"messages": [asked, told]}
    rejected = {"role": "assistant", "content": worse}
    return row | {"prompt": [asked], "chosen": [told], "rejected": [rejected]}


def curate(rows: list[dict]) -> tuple[list[dict], list[dict], int]:
    """→ (留下的, 丢掉的行与原因, 留下的里盖住了几处个人信息)。不改 rows。步骤就是 dataset_curation.py 看文字的那几步。"""
    table = Table("pairs" if rows and "chosen" in rows[0] else "chats", rows, {})
    mask_personal(table)
    drop_garbage(table)
    drop_other_languages(table, ("zh",))
    masked = sum(len(table.masked.get(number, [])) for number in table.alive)
    drop_exact(table, short_copies=1)
    return table.curated(), table.dropped, masked


def reasons(dropped: list[dict]) -> dict[str, int]:
    return dict(Counter(each["reason"].partition("：")[0] for each in dropped).most_common())
