"""照规则出题：一份文档的每句话，认得出的句式变成一问一答，答案总是原句里的几个字。

规则只认常见的几种句式，宁可漏，不出错题：出错的题会教坏模型，漏掉的题只是少教一件事。
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from text_cleaning import ENDS, PAIR, Cleaned

PRONOUN = re.compile(r"它们?|他们?|她们?|该馆|本馆|本公司|其")
TIMES = "清晨|早上|上午|正午|中午|下午|傍晚|晚上|深夜|拂晓|日落|周末"
TIME = rf"(?:每?(?:周|星期)[一二三四五六日天](?:至(?:周|星期)?[一二三四五六日天])?|\d{{4}}年(?:\d+月)?(?:\d+日)?|\d+月\d+日|{TIMES})"
NUMBER = r"(?:\d[\d.,]*|[零一二两三四五六七八九十百千万半]+)"
UNIT = "天|本|元|角|次|人|岁|年|个月|小时|分钟|公里|米|页|册|间|层|倍|%"
CARE = "照看|照顾|负责|管理|保管|主持|写|发明|创办"  # 由人来做的事
EAT = "吃|喝|种|养|卖"
CONDITION = re.compile(r"满$|之后|以后|到期|如果|超过|[^，]*时$")  # 说的是条件，不是一件事
CLAUSE = r"[^，。！？；：\s]"
# 接着上一句说的，或带着条件：单独拿出来成了问题，意思就变了
LINKED = re.compile(
    r"^(?:因为|由于|但|如果|虽然|即使|当|而|并|且|所以|因此|其中|后来|于是|此后|之后|到了|后)"
)
ADVERB = re.compile(r"(?:通常|一般|都|也|均|主要|曾|曾经|已|已经|正|将|则|就|才|又|还|再)$")
YEARS = re.compile(r"(?:期|共|约|达|长|要|需|为|了)$")  # "有效期三年"的年是多少，"顺治七年"的不是


@dataclass(frozen=True)
class Passage:
    """一份文档的一段；subject 是写的谁，见 split_title；看不出来是空的。"""

    document: str
    subject: str
    text: str


@dataclass(frozen=True)
class Pair:
    """一问一答。questions 是几种问法，最后一种不教，留着考；said 是完整的一句回答；evidence 是原句。"""

    document: str
    passage: str
    subject: str
    rule: str
    questions: tuple[str, ...]
    answer: str
    said: str
    evidence: str


# ---------------------------------------------------------------- 1. 文档 → 段


def passages_of(cleaned: Cleaned, most: int) -> list[Passage]:
    """按空行与标题切，太短的并到前一段，太长的按整句切；每段不超过 most 个字。"""
    subject, body = split_title(cleaned)
    pieces: list[str] = []
    for block in re.split(r"\n\s*\n|\n(?=#)", body):
        lines = [line for line in block.split("\n") if line.strip() and not line.startswith("#")]
        if lines:
            pieces += _cut("\n".join(lines), most)
    return [Passage(cleaned.id, _row_subject(piece) or subject, piece) for piece in pieces]


def _row_subject(piece: str) -> str:
    """一行表格（"名称：甲；价格：三元"）写的谁：头一格；不是表格的一行是空的。"""
    cells = [PAIR.match(cell) for cell in piece.split("；")]
    return cells[0][2].strip() if len(cells) > 1 and all(cells) else ""


def split_title(cleaned: Cleaned) -> tuple[str, str]:
    """→ (写的谁, 正文)：头一个 # 行，或头一行（短、没有句号、不是"名称：内容"）；都没有，看头一句是不是"某某是……"。"""
    lines = cleaned.text.split("\n")
    first = lines[0].strip().lstrip("#").strip()
    short = len(lines) > 1 and len(first) <= 24 and not first.endswith(ENDS) and "：" not in first
    if lines[0].startswith("#") or short:
        return first, "\n".join(lines[1:])
    named = re.match(rf"({CLAUSE}{{2,12}}?)(?:（[^）]*）)?是", first)
    return (named[1] if named else ""), cleaned.text


def _cut(text: str, most: int) -> list[str]:
    """整句整句地装，装不下了另起一段；一句就超过 most 的，从中间切开。"""
    pieces, current = [], ""
    for part in split_sentences(text):
        for start in range(0, len(part), most):
            piece = part[start : start + most]
            if current and len(current) + len(piece) > most:
                pieces.append(current.strip())
                current = ""
            current += piece
    return [*pieces, current.strip()] if current.strip() else pieces


def split_sentences(text: str) -> list[str]:
    """切成句，句号、换行留在句尾；接起来就是原文。"""
    return [part for part in re.split(r"(?<=[。！？；\n])", text) if part]


# ---------------------------------------------------------------- 2. 句 → 一问一答


def pairs_of(passage: Passage) -> list[Pair]:
    """一段里认得出的每一句 → 一问一答。同一个答案的同一问只出一次。"""
    found: dict[str, Pair] = {}
    for sentence in split_sentences(passage.text):
        plain = sentence.strip().rstrip("；")
        told = with_subject(plain, passage.subject)
        if LINKED.match(told):
            continue
        for rule, make in RULES.items():
            made = make(told, passage.subject)
            if made is None:
                continue
            questions, answer, said = made
            pair = Pair(
                passage.document, passage.text, passage.subject, rule, tuple(questions), answer, said, plain
            )
            found.setdefault(pair.questions[0], pair)
            break  # 前面的规则认得更准，一句只用一条
    return list(found.values())


def with_subject(sentence: str, subject: str) -> str:
    """句里第一个代词换成标题：问题离开了这一段，"它"就不知道是谁了。"""
    return PRONOUN.sub(subject, sentence, count=1) if subject else sentence


Made = tuple[list[str], str, str]  # (几种问法, 答案, 完整的一句回答)


def _key_value(sentence: str, subject: str) -> Made | None:
    found = PAIR.match(sentence)
    if not found or not subject:
        return None
    name, value = found[1].strip(), found[2].strip()
    asks = [f"{subject}的{name}是什么？", f"{subject}是什么{name}？", f"说出{subject}的{name}。"]
    return asks, value, f"{subject}的{name}是{value}。"


def _attribute(sentence: str, subject: str) -> Made | None:
    """甲的乙是丙。"""
    found = re.match(rf"({re.escape(subject)})的({CLAUSE}{{1,8}})[是为]({CLAUSE}{{1,16}})[，。]", sentence)
    if not found or not subject:
        return None
    return _key_value(f"{found[2]}：{found[3]}", subject)


def _place(sentence: str, subject: str) -> Made | None:
    found = re.match(rf"({CLAUSE}+?)(住在|位于|坐落在|设在|放在)({CLAUSE}{{1,16}})[，。]", sentence)
    if not found or re.search(r"[是有在]", found[1]) or ADVERB.search(found[1]):
        return None
    who, verb, place = found.groups()
    asks = [f"{who}{verb}哪里？", f"{who}{verb}什么地方？", f"要找{who}，去哪里？"]
    return asks, place, f"{who}{verb}{place}。"


def _carer(sentence: str, subject: str) -> Made | None:
    """照看甲的是乙；甲由乙照看。"""
    found = re.match(rf"({CARE})({CLAUSE}+?)的是({CLAUSE}{{1,8}})[，。]", sentence)
    if found:
        verb, what, who = found.groups()
    else:
        found = re.match(rf"({CLAUSE}+?)由({CLAUSE}{{1,8}}?)({CARE})[，。]", sentence)
        if not found:
            return None
        what, who, verb = found.groups()
    if ADVERB.search(what):
        return None
    asks = [f"{verb}{what}的是谁？", f"谁{verb}{what}？", f"{what}由谁{verb}？"]
    return asks, who, f"{verb}{what}的是{who}。"


def _time(sentence: str, subject: str) -> Made | None:
    found = re.match(rf"({CLAUSE}+?)(?:在|于|每天|是在)({TIME})({CLAUSE}{{1,12}})[，。]", sentence)
    if not found:
        return None
    who, when, does = found.groups()
    if re.match(r"[及和与、至到或~～\-代时\d]", does) or re.search(r"[时前后起间]$", does):
        return None  # "1980年代"、"2002年时"、"2014年之前"：说的不是做这件事的那一刻
    if ADVERB.search(who) or who.startswith("在"):
        return None
    asks = [f"{who}什么时候{does}？", f"{who}是什么时候{does}的？", f"什么时候{who}{does}？"]
    return asks, when, f"{who}{when}{does}。"


def _object(sentence: str, subject: str) -> Made | None:
    """甲爱吃乙。"""
    found = re.match(rf"({CLAUSE}+?)((?:每天|爱|只|常|最爱)(?:{EAT}))({CLAUSE}{{1,12}})[，。]", sentence)
    if not found:
        return None
    who, verb, what = found.groups()
    asks = [f"{who}{verb}什么？", f"{who}{verb}的是什么？", f"{who}{verb}的东西是什么？"]
    return asks, what, f"{who}{verb}{what}。"


def _number(sentence: str, subject: str) -> Made | None:
    """普通图书借期三十天 → 普通图书借期多少天？说的是什么，取数字前面的一小句；太短就接上标题。"""
    found = re.match(rf"({CLAUSE}{{2,20}}?)({NUMBER})({UNIT})(?=[，。；])", sentence)
    if not found or PRONOUN.search(found[1]) or re.search(r"[第每各等独\d]$", found[1]):
        return None
    what, amount, unit = found.groups()
    if CONDITION.search(what) or (unit == "年" and (len(amount) > 2 or not YEARS.search(what))):
        return None
    asks = [f"{what}多少{unit}？", f"{what}几{unit}？", f"想知道{what}多少{unit}。"]
    return asks, amount + unit, f"{what}{amount}{unit}。"


def _definition(sentence: str, subject: str) -> Made | None:
    """甲是乙。只认以标题开头的：别的"是"，多半不是在下定义。"""
    found = re.match(rf"({re.escape(subject)})(?:是指|是|指)([^。！？]{{4,40}})。", sentence)
    if not found or not subject:
        return None
    what, meaning = found.groups()
    return [f"{what}是什么？", f"什么是{what}？", f"{what}指什么？"], meaning, f"{what}是{meaning}。"


RULES: dict[str, Callable[[str, str], Made | None]] = {
    "key_value": _key_value,
    "attribute": _attribute,
    "place": _place,
    "carer": _carer,
    "time": _time,
    "number": _number,
    "object": _object,
    "definition": _definition,
}
