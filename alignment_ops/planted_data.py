"""往小世界的数据里埋已知的毛病：哪一行有什么毛病，程序都记着，清洗的每一步就量得出查准与查全。

埋两份：SFT 对话与偏好对，各约两成是坏的。另埋几行"像而不是"的：看着可疑，其实没有毛病，冤枉了它们就是查得不准。
交给清洗的行里没有答案；答案在 Planted 的另几栏里，只有量的时候才看。怎样埋的文字在 planted_text.py。
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from curation_rows import turns_of
from nlp_common.tiny import world
from planted_text import broken_text, foreign_turns, lookalike_turns, personal_sentence, reworded

SHARES_CHATS = {
    "duplicate": 0.015,  # 一字不差的第二份
    "near_duplicate": 0.015,  # 改了标点、客套话
    "garbage": 0.02,  # 乱码、网页残渣、重复、乱打
    "language": 0.01,  # 不是简体中文
    "personal": 0.015,  # 有电话、邮箱、身份证号、银行卡号
    "wrong_answer": 0.12,  # 答错了
    "contaminated": 0.005,  # 评测的题
}
SHARES_PAIRS = {
    "duplicate": 0.01,
    "near_duplicate": 0.01,
    "garbage": 0.015,
    "language": 0.01,
    "personal": 0.01,
    "contaminated": 0.005,
}  # 另有好坏标反的（flipped），约一成四：是标注员标出来的，见 _annotate
LOOKALIKES = 0.02  # 像而不是的，不算在坏的里
ANNOTATORS = [f"标注员{number}" for number in range(1, 9)]
FIRST_PICKER, LONG_PICKER = "标注员3", "标注员6"  # 一个偷懒时挑先看到的，一个偷懒时挑长的
LAZY = 0.5  # 他们有几成的对是偷懒标的
CARELESS = 0.12  # 谁都会看错
SHORT = 40  # 不到这么多字的（寒暄）本来就有许多一样的，不去抄


@dataclass
class Planted:
    """一份埋了毛病的数据；行号是 rows 里的次序，没有毛病的行不在 faults 里。"""

    rows: list[dict] = field(default_factory=list)
    faults: dict[int, str] = field(default_factory=dict)  # 行号 → 毛病
    copies: dict[int, int] = field(default_factory=dict)  # 副本的行号 → 原件的行号
    personal: dict[int, tuple[str, str]] = field(default_factory=dict)  # 行号 → (哪一种, 原文)
    details: dict[int, str] = field(default_factory=dict)  # 行号 → 毛病的细类，如 mojibake
    lookalikes: dict[int, str] = field(default_factory=dict)  # 行号 → 像哪一种毛病


def planted_chats(n: int, seed: int, asked: list[dict]) -> Planted:
    """n 行对话 ``{"messages", "kind"}``。asked：评测的题，其中几道混进来。"""
    rng = random.Random(f"planted-chats-{seed}")
    source = (
        {"messages": row["messages"], "kind": kind_of(row["messages"])} for row in world.chats(2 * n, seed)
    )
    leaked = [{"messages": each["messages"] + [_say(_polite(rng, each))]} for each in asked]
    return _plant(n, SHARES_CHATS, rng, source, leaked)


def planted_pairs(n: int, seed: int, asked: list[dict]) -> Planted:
    """n 个偏好对 ``{"prompt", "chosen", "rejected", "kind", "annotator", "shown_first"}``。

    shown_first：标注的时候，先给他看的是后来标为好的（chosen）还是标为差的（rejected）。
    """
    rng = random.Random(f"planted-pairs-{seed}")
    source = (
        {name: row[name] for name in ("prompt", "chosen", "rejected")} | {"kind": kind_of(row["prompt"])}
        for row in world.pairs(2 * n, seed)
    )
    leaked = [
        {"prompt": each["messages"], "chosen": [_say(_polite(rng, each))], "rejected": [_say("我不知道。")]}
        for each in asked
    ]
    result = _plant(n, SHARES_PAIRS, rng, source, leaked)
    for number, row in enumerate(result.rows):
        if _annotate(rng, row) and number not in result.faults and number not in result.copies.values():
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
            row["shown_first"] = "rejected" if row["shown_first"] == "chosen" else "chosen"
            result.faults[number] = "flipped"
    return result


def _plant(n: int, shares: dict, rng: random.Random, source: Iterator[dict], leaked: list[dict]) -> Planted:
    """先排好哪一行是什么，再一行一行地写；副本总在原件后面。"""
    kinds = [kind for kind, share in shares.items() for _ in range(round(n * share))]
    kinds += ["lookalike"] * round(n * LOOKALIKES)
    kinds += [""] * (n - len(kinds))
    rng.shuffle(kinds)
    result, good = Planted(), []  # good：干净的、还没有被抄过的行号
    for number, kind in enumerate(kinds):
        if kind in ("duplicate", "near_duplicate") and good:
            original = good.pop(rng.randrange(len(good)))
            result.copies[number] = original
            row = copied(result.rows[original])
            if kind == "near_duplicate":
                for message in turns_of(row):
                    message["content"] = reworded(rng, message["content"])
        elif kind == "contaminated":
            row = leaked.pop(rng.randrange(len(leaked)))
            row = {"kind": kind_of(turns_of(row))} | row
        else:
            row = copied(next(source))
            while kind not in ("", "duplicate", "near_duplicate") and not spoil(
                rng, row, kind, result, number
            ):
                row = copied(next(source))  # 这一行埋不进这一种，例如没有答出词的，说不成错的
        if kind in ("", "duplicate", "near_duplicate") and number not in result.copies:
            kind = ""
            if sum(len(message["content"]) for message in turns_of(row)) > SHORT:
                good.append(number)
        result.rows.append(row)
        if kind and kind != "lookalike":
            result.faults[number] = kind
    return result


# ---------------------------------------------------------------- 一行怎样变坏


def spoil(rng: random.Random, row: dict, kind: str, result: Planted, number: int) -> bool:
    """把一行改成 kind 这一种坏的（或像而不是的），并记下细节；改不成是 False。"""
    messages = turns_of(row)
    if sum(len(message["content"]) for message in messages) <= SHORT:
        return False
    replies = [message for message in messages if message["role"] == "assistant"]
    reply = rng.choice(replies)
    if kind == "garbage":
        result.details[number], reply["content"] = broken_text(rng, reply["content"], messages[0]["content"])
    elif kind == "language":
        result.details[number], turns = foreign_turns(rng)
        _replace_turns(row, turns)
    elif kind == "personal":
        which, written, sentence = personal_sentence(rng)
        result.details[number], result.personal[number] = which, (which, written)
        rng.choice(messages)["content"] += sentence
    elif kind == "wrong_answer":
        return _answer_wrongly(rng, messages)
    elif kind == "lookalike":
        result.lookalikes[number], turns = lookalike_turns(rng, messages[0]["content"])
        _replace_turns(row, turns)
    return True


def _replace_turns(row: dict, turns: list[str]) -> None:
    """整行换成 [问, 答, 差的答]。"""
    asked, answer, worse = turns
    if "messages" in row:
        row["messages"] = [{"role": "user", "content": asked}, _say(answer)]
    else:
        row |= {
            "prompt": [{"role": "user", "content": asked}],
            "chosen": [_say(answer)],
            "rejected": [_say(worse)],
        }


def _answer_wrongly(rng: random.Random, messages: list[dict]) -> bool:
    """挑一问，把回答里的词换成同类的另一个。"""
    places = list(range(1, len(messages), 2))
    rng.shuffle(places)
    for place in places:
        slot, reply = slot_of(messages[place - 1]["content"]), messages[place]
        said = [value for value in world.WORLD.get(slot or "", []) if value in reply["content"]]
        if said:
            other = rng.choice([value for value in world.WORLD[slot] if value != said[0]])
            reply["content"] = reply["content"].replace(said[0], other)
            return True
    return False


def _annotate(rng: random.Random, row: dict) -> bool:
    """给一对配上标注员、先看到哪一个（在行里）；返回他是不是标反了。"""
    row["annotator"] = rng.choice(ANNOTATORS)
    row["shown_first"] = rng.choice(["chosen", "rejected"])
    lazy = rng.random() < LAZY
    if row["annotator"] == FIRST_PICKER and lazy:
        return row["shown_first"] == "rejected"
    if row["annotator"] == LONG_PICKER and lazy:
        return len(row["rejected"][-1]["content"]) > len(row["chosen"][-1]["content"])
    return rng.random() < CARELESS


# ---------------------------------------------------------------- 小零件


def copied(row: dict) -> dict:
    """一份自己的：改它，不会改到别的行。"""
    return {
        name: [dict(message) for message in value] if isinstance(value, list) else value
        for name, value in row.items()
    }


def kind_of(messages: list[dict]) -> str:
    """第一问问的是什么：时间、地点……；不是问故事的是寒暄。"""
    slot = slot_of(messages[0]["content"])
    return world.LABEL[slot] if slot else "寒暄"


def slot_of(asked: str) -> str | None:
    """一句话问的是哪个槽位；不是问故事的是 None。"""
    question = asked.rpartition("\n")[2]
    for slot, wordings in world.QUESTION.items():
        for wording in wordings:
            if re.fullmatch(re.sub(r"\{\w+\}", ".{2}", wording), question):
                return slot
    return None


def _polite(rng: random.Random, asked: dict) -> str:
    return rng.choice(world.OPENINGS) + asked["sentence"]


def _say(content: str) -> dict:
    return {"role": "assistant", "content": content}
