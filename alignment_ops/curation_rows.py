"""一份正在清洗的数据：还留着哪些行，丢了哪些、为什么；还有看文字就能做的几步。

每一步只做一件事：drop(步骤, {行号: 为什么})。丢掉的行连同原因留在 dropped 里，最后写进 dropped.jsonl：丢错了，找得回来。
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minhash import find_duplicates, find_exact
from nlp_common.base.errors import UserError
from nlp_common.data.chats import to_chats, to_pairs, to_questions
from nlp_common.data.overlap import leaking_lines, strings_in
from nlp_common.data.rows import read_rows
from personal_data import NAMES, mask
from text_rules import garbage_fault, language_fault, other_languages

if TYPE_CHECKING:
    from planted_data import Planted

SHORT = 40  # 一行不到这么多字的（寒暄、口令）本来就有许多一样的：只限份数，不当作近重复
STEPS = {  # 步骤 → (名字, 它该查出哪几种毛病)
    "unusable": ("读不成的行", ()),
    "personal": ("个人信息（盖住，不丢）", ("personal",)),
    "garbage": ("垃圾", ("garbage",)),
    "language": ("语言", ("language",)),
    "duplicate": ("一样的", ("duplicate", "near_duplicate")),
    "near_duplicate": ("近重复", ("duplicate", "near_duplicate")),
    "contaminated": ("评测的题", ("contaminated",)),
    "wrong_answer": ("答错的", ("wrong_answer",)),
    "flipped": ("好坏标反的", ("flipped",)),
}
TABLES = {"chats": "对话", "pairs": "偏好对"}


@dataclass
class Table:
    """name 是 chats 或 pairs；raw 是读来的行，rows 是盖住了个人信息的；alive 是还留着的行号。"""

    name: str
    raw: list[dict]
    source: dict
    planted: Planted | None = None  # 埋了毛病的数据，答案在这里；只有量的时候才看
    rows: list[dict] = field(default_factory=list)
    alive: list[int] = field(default_factory=list)
    dropped: list[dict] = field(default_factory=list)
    steps: list[dict] = field(default_factory=list)
    masked: dict[int, list[str]] = field(default_factory=dict)  # 行号 → 盖住了哪几种
    notes: list[str] = field(default_factory=list)  # 要人知道的
    margins: dict[int, float] = field(default_factory=dict)  # 行号 → 交叉验证的余地
    log_ratios: dict[int, float] = field(default_factory=dict)  # 行号 → 同样的，看对数之比
    places: list[int] = field(default_factory=list)  # 行号 → 文件里的第几条，从 1 数，读不成的也数

    def __post_init__(self) -> None:
        self.rows = copy.deepcopy(self.raw)
        self.alive = list(range(len(self.raw)))
        self.places = self.places or list(range(1, len(self.raw) + 1))

    def drop(self, step: str, reasons: dict[int, str], like: dict[int, int] | None = None) -> None:
        """丢掉 reasons 里的行；like：它和留下的哪一行重复。"""
        before = len(self.alive)
        self.alive = [number for number in self.alive if number not in reasons]
        for number, reason in sorted(reasons.items()):
            kept = {"same_as": self.places[like[number]]} if like else {}
            said = {"table": self.name, "row": number, "place": self.places[number], "step": step}
            self.dropped.append(said | {"reason": reason} | kept | self.rows[number])
        counts = Counter(reason.partition("：")[0] for reason in reasons.values())
        self.steps.append(
            {"step": step, "before": before, "after": len(self.alive), "reasons": dict(counts.most_common())}
        )

    def curated(self) -> list[dict]:
        return [self.rows[number] for number in self.alive]

    def found_in(self, step: str) -> list[int]:
        """这一步查出了哪些行。"""
        if step == "personal":
            return list(self.masked)
        return [row["row"] for row in self.dropped if row["step"] == step]


def read_table(dataset: str, limit: int | None, source: str) -> Table:
    """一个文件、文件夹或 hub 上的数据 → Table：有 chosen 的是偏好对，没有的是对话。读不成的行丢掉，记下原因。"""
    found = read_rows(dataset, limit=limit, source=source)
    return table_of(found.rows, dataset, found.source)


def table_of(read: list[dict], where: str, source: dict, before: int = 0) -> Table:
    """读来的行 → Table；before：文件里它们前面还有几条。"""
    is_pairs = any(column in read[0] for column in ("chosen", "response_chosen"))
    skipped: dict[int, str] = {}
    rows = (to_pairs if is_pairs else to_chats)(read, where, skipped)
    places = [before + number + 1 for number in range(len(read)) if number not in skipped]
    table = Table("pairs" if is_pairs else "chats", rows, source, places=places)
    table.dropped = [
        {"table": table.name, "place": before + number + 1, "step": "unusable", "reason": reason}
        | mask_all(read[number], [])
        for number, reason in skipped.items()
    ]
    reasons = dict(Counter(skipped.values()))
    table.steps = [{"step": "unusable", "before": len(read), "after": len(rows), "reasons": reasons}]
    return table


def turns_of(row: dict) -> list[dict]:
    """一行里全部的消息，依次；是 row 里的那几个，改了就改了。"""
    return row["messages"] if "messages" in row else row["prompt"] + row["chosen"] + row["rejected"]


# ---------------------------------------------------------------- 看文字就能做的几步


def mask_personal(table: Table) -> None:
    """最先做：后面的每一份文件（丢掉的行、审计页）里都不该再有号码，对话以外的栏里也不该有。"""
    for number in table.alive:
        kinds: list[str] = []
        table.rows[number] = mask_all(table.rows[number], kinds)
        if kinds:
            table.masked[number] = kinds
    counts = Counter(NAMES[kind] for kinds in table.masked.values() for kind in kinds)
    table.steps.append(
        {"step": "personal", "before": len(table.alive), "after": len(table.alive), "reasons": dict(counts)}
    )


def mask_all(value: Any, kinds: list[str]) -> Any:
    """一行里的每个字符串、每个整数都盖一遍，不管它在哪一栏、套了几层；盖住的种类添进 kinds。"""
    if isinstance(value, dict):
        return {name: mask_all(each, kinds) for name, each in value.items()}
    if isinstance(value, list):
        return [mask_all(each, kinds) for each in value]
    if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
        text, found = mask(str(value))
        kinds += [each.kind for each in found]
        return text if found else value
    return value


def drop_garbage(table: Table) -> None:
    faults = {number: garbage_fault(turns_of(table.rows[number])) for number in table.alive}
    table.drop("garbage", {number: fault for number, fault in faults.items() if fault})


def drop_other_languages(table: Table, keep: tuple[str, ...]) -> int:
    """丢掉多半是别的语言的行；返回留下的行里，几行夹着一两句别的语言。"""
    faults = {number: language_fault(turns_of(table.rows[number]), keep) for number in table.alive}
    table.drop("language", {number: fault for number, fault in faults.items() if fault})
    return sum(bool(other_languages(turns_of(table.rows[number]), keep)) for number in table.alive)


def mixed_note(mixed: int) -> str:
    return f"语言：另有 {mixed} 行夹着别的语言的句子，不到一半，没有丢。"


def drop_duplicates(table: Table, threshold: float, short_copies: int) -> None:
    """先是一样的，再是近重复。"""
    drop_exact(table, short_copies)
    drop_near(table, threshold)


def drop_exact(table: Table, short_copies: int) -> None:
    """一样的（只差标点、空白）留第一份；短的行留 short_copies 份。"""
    texts = {number: text_of(table.rows[number]) for number in table.alive}
    numbers = list(texts)
    copies, same, reasons = Counter(), {}, {}
    for dropped, kept in find_exact(list(texts.values())):
        number = numbers[dropped]
        copies[kept] += 1
        if len(texts[number]) >= SHORT or copies[kept] >= short_copies:
            same[number] = numbers[kept]
            reasons[number] = f"一样：与第 {table.places[numbers[kept]]} 条"
    table.drop("duplicate", reasons, same)


def drop_near(table: Table, threshold: float) -> None:
    """近重复；短的行不看。"""
    texts = {number: text_of(table.rows[number]) for number in table.alive}
    numbers = [number for number in table.alive if len(texts[number]) >= SHORT]
    same, reasons = {}, {}
    for duplicate in find_duplicates([texts[number] for number in numbers], threshold):
        number, kept = numbers[duplicate.dropped], numbers[duplicate.kept]
        same[number] = kept
        reasons[number] = f"近重复：与第 {table.places[kept]} 条，Jaccard {duplicate.similarity:.2f}"
    table.drop("near_duplicate", reasons, same)


def drop_contaminated(table: Table, asked: dict[str, str], n: int, at_least: float) -> None:
    """评测的题混进来的：训练数据里的一行，盖住一道题的 at_least 以上。"""
    lines = ((str(number), text_of(table.rows[number])) for number in table.alive)
    found = leaking_lines(asked, lines, n, at_least)
    reasons = {int(place): f"评测的题：{name}，盖住 {share:.0%}" for place, (name, share) in found.items()}
    table.drop("contaminated", reasons)


def text_of(row: dict) -> str:
    """一行里说的全部的话。"""
    return "\n".join(message["content"] for message in turns_of(row))


def evaluation_texts(files: list[str]) -> dict[str, str]:
    """评测的文件 → {文件|第几条: 题目}；认得出对话或题目的写法，取用户说的话，认不出就取全部的文字。"""
    texts = {}
    for file in files:
        rows = read_rows(file).rows
        try:
            asked = [
                [turn["content"] for turn in row["messages"] if turn["role"] == "user"]
                for row in to_questions(rows, file)
            ]
        except UserError:
            asked = [strings_in(row) for row in rows]
        texts |= {
            f"{Path(file).name} 第 {number + 1} 条": "\n".join(said) for number, said in enumerate(asked)
        }
    return texts
