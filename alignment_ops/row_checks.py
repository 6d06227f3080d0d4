"""一问一答能不能要：答案要在那一段里，要答得上那一问。模型写的、规则出的，都过同一道门。

每一样毛病一个函数，不能要的说出为什么。不要模型，只看字，所以快，也说得清；
看不出来的那种错（答案在对的那一句里，却是别的几个字），还要靠再问一遍（llm_rows.py 的 agrees）。
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Collection
from dataclasses import replace

from qa_rules import NUMBER, TIME, UNIT, Pair, split_sentences

SHORTEST_QUESTION, LONGEST_QUESTION, LONGEST_ANSWER = 4, 80, 80
UNCLEAR = re.compile(
    r"[它牠]|其后|(?<![其吉])[他她](?!人)|(?<![应活])该[\u4e00-\u9fff]|这|(?<![因如彼从])此[\u4e00-\u9fff]|本(?:馆|公司|文|书|品|段|站|校|院|店)|上述|前者|后者|同年"
)
BRACKETS = [("（", "）"), ("(", ")"), ("「", "」"), ("《", "》"), ("“", "”"), ("[", "]")]
ASKS = re.compile(r"什么|谁|哪|多少|几|怎|为何|是否|吗|说出|何时|？|\?")
# 问的是哪一类 → 答案该长什么样；没有写的不管
KINDS = [
    (re.compile(rf"多少|几(?={UNIT})"), re.compile(NUMBER)),
    (re.compile(r"什么时候|何时|哪一?年|哪一?天"), re.compile(rf"{TIME}|{NUMBER}")),
]
STOP = set("的了是在有什么谁哪里多少几怎样吗呢请问说出一下，。？！?“”《》要找去")
NUMERALS = "0123456789零一二两三四五六七八九十百千万半"
SHORTEST_NAME = 4
NEAR = 0.6  # 问题里的字，至少几成在原文里
REASONS = {
    "malformed": "不成样子：太短、太长、不是在问、括号不成对",
    "unclear": "问题单独拿出来，不知道说的是谁（它、该、这 …）",
    "not_in_passage": "答案不在那一段里",
    "in_question": "答案就写在问题里",
    "off_topic": "问的不是这一段写的",
    "wrong_kind": "问多少、什么时候，答的不是",
    "wrong_sentence": "答案不在与问题最像的那一句里",
    "conflict": "同一问有几个不同的答案",
}


def normal(text: str) -> str:
    """比字之前：全角半角、大小写、空白、标点都不算。"""
    text = unicodedata.normalize("NFKC", text).lower()
    return re.sub(r"[\W_]+", "", text)


def stands_in(answer: str, text: str) -> bool:
    """answer 的字在 text 里连着出现；数字不能是半个："三十天"里没有"十天"。空的不算。"""
    said, whole = normal(answer), normal(text)
    start = whole.find(said) if said else -1
    while start >= 0:
        before, after = whole[start - 1 : start], whole[start + len(said) : start + len(said) + 1]
        half = _both_numeral(before, said[:1]) or _both_numeral(said[-1:], after)
        if not half:
            return True
        start = whole.find(said, start + 1)
    return False


def _both_numeral(left: str, right: str) -> bool:
    return bool(left and right and left in NUMERALS and right in NUMERALS)


def fault_of(
    question: str, answer: str, passage: str, subject: str, subjects: Collection[str] = ()
) -> str | None:
    """不能要的原因（REASONS 里的一个）；能要是 None。subjects：各份文档都写的谁。"""
    if not SHORTEST_QUESTION <= len(question.strip()) <= LONGEST_QUESTION or not ASKS.search(question):
        return "malformed"
    said = normal(answer)
    if not said or len(answer) > LONGEST_ANSWER or not (_balanced(question) and _balanced(answer)):
        return "malformed"
    if UNCLEAR.search(question):
        return "unclear"
    if not stands_in(answer, passage):
        return "not_in_passage"
    if said in normal(question):
        return "in_question"
    if not _about(question, passage + subject) or _about_another(question, passage + subject, subjects):
        return "off_topic"
    if any(asked.search(question) and not wanted.search(answer) for asked, wanted in KINDS):
        return "wrong_kind"
    return None if stands_in(answer, _nearest(question, passage, subject)) else "wrong_sentence"


def _balanced(text: str) -> bool:
    return all(text.count(left) == text.count(right) for left, right in BRACKETS)


def _about(question: str, known: str) -> bool:
    """问题里的字（虚词不算）大半在 known（这一段与它的标题）里。"""
    asked = set(normal(question)) - STOP
    return bool(asked) and len(asked & set(normal(known))) >= NEAR * len(asked)


def _about_another(question: str, known: str, subjects: Collection[str]) -> bool:
    """问题里写着别的文档的名字（短的不算：两三个字，谁都会提到），而这一段没有提过它。"""
    return any(len(other) >= SHORTEST_NAME and other in question and other not in known for other in subjects)


def _nearest(question: str, passage: str, subject: str) -> str:
    """与问题相同的字、字对最多的一句；一样多的都算。说的是谁（标题、代词）不比：一段说的都是它。"""
    asked = _pairs(question.replace(subject, ""))
    lines = split_sentences(passage)
    shared = [len(asked & _pairs(line)) for line in lines]
    return "\n".join(line for line, n in zip(lines, shared, strict=True) if n == max(shared))


def _pairs(text: str) -> set[str]:
    text = normal(text)
    return {text[i : i + 2] for i in range(len(text) - 1)} | set(text) - STOP


def check_pairs(pairs: list[Pair]) -> tuple[list[Pair], list[tuple[Pair, str]]]:
    """→ (能要的, [(不能要的, 为什么)])。同一问几处答得不一样的，一处也不要：不知道哪个是对的。"""
    kept, dropped = [], []
    subjects = {pair.subject for pair in pairs}
    for pair in pairs:
        reason = fault_of(pair.questions[0], pair.answer, pair.passage, pair.subject, subjects)
        if reason:
            dropped.append((pair, reason))
        else:
            kept.append(pair)
    answers: dict[str, set[str]] = {}
    for pair in kept:
        answers.setdefault(normal(pair.questions[0]), set()).add(normal(pair.answer))
    agreed = []
    for pair in kept:
        if len(answers[normal(pair.questions[0])]) > 1:
            dropped.append((pair, "conflict"))
        else:
            agreed.append(pair)
    return agreed, dropped


# ---------------------------------------------------------------- 故意写错：门拦得住几成

PLANTED = 600  # 故意写错几个
FAULTS = {
    "not_in_passage": "编的：别的文档里的答案",
    "wrong_sentence": "张冠李戴：同一段里另一句的答案",
    "in_question": "答案写进了问题里",
    "off_topic": "问的是另一份文档里的",
    "malformed": "没有在问，或答案是空的",
    "wrong_span": "同一句里，别的几个字",
}


def plant_faults(pairs: list[Pair], n: int, seed: int) -> list[tuple[Pair, str]]:
    """从对的一问一答改出至多 n 个错的 → [(错的, 哪一种)]，就像模型会写错的那样；各种轮流，改不成的不算。"""
    rng = random.Random(f"faults-{seed}")
    planted: list[tuple[Pair, str]] = []
    for number in range(n if pairs else 0):
        kind = list(FAULTS)[number % len(FAULTS)]
        made = spoil(rng.choice(pairs), rng.choice(pairs), pairs, kind, rng)
        if made is not None:
            planted.append((made, kind))
    return planted


def spoil(pair: Pair, other: Pair, pairs: list[Pair], kind: str, rng: random.Random) -> Pair | None:
    """pair 照 kind 改错；这一对改不成这种错的，是 None。"""
    if kind == "not_in_passage":
        return replace(pair, answer=other.answer) if other.answer not in pair.passage else None
    if kind == "wrong_sentence":
        same = [p for p in pairs if p.passage == pair.passage and p.evidence != pair.evidence]
        same = [p for p in same if p.answer != pair.answer]
        return replace(pair, answer=rng.choice(same).answer) if same else None
    if kind == "in_question":
        question = f"{pair.said.rstrip('。')}，对吗？"
        return replace(pair, questions=(question, *pair.questions[1:]))
    if kind == "off_topic":
        if other.subject == pair.subject or other.rule != pair.rule:
            return None
        return replace(pair, questions=other.questions)
    if kind == "wrong_span":
        left = pair.evidence.replace(pair.answer, "|")
        spans = [left[i : i + 2] for i in range(len(left) - 1) if left[i : i + 2].isalnum()]
        spans = [span for span in spans if span not in pair.questions[0]]
        return replace(pair, answer=rng.choice(spans)) if spans else None
    if rng.random() < 0.5:
        return replace(pair, answer="")
    return replace(pair, questions=(pair.said, *pair.questions[1:]))


def measure_gate(pairs: list[Pair], seed: int) -> dict:
    """故意写错的，各种拦住几成；写对的（同一题的几种问法），冤枉几成。"""
    subjects = {pair.subject for pair in pairs}
    planted = plant_faults(pairs, PLANTED, seed)
    caught: dict[str, list[bool]] = {kind: [] for kind in FAULTS}
    for pair, kind in planted:
        reason = fault_of(pair.questions[0], pair.answer, pair.passage, pair.subject, subjects)
        caught[kind].append(reason is not None)
    wronged = []
    for pair in pairs:
        for question in pair.questions:
            reason = fault_of(question, pair.answer, pair.passage, pair.subject, subjects)
            wronged.append(reason is not None)
    recall = {kind: sum(its) / len(its) for kind, its in caught.items() if its}
    return {"recall": recall, "n": len(planted), "false_alarms": sum(wronged) / len(wronged)}
