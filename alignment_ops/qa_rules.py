"""照规则出题：一份文档的每句话，认得出的句式变成一问一答，答案总是原句里的几个字。

规则只认常见的几种句式，宁可漏，不出错题：出错的题会教坏模型，漏掉的题只是少教一件事。
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

from text_cleaning import ENDS, PAIR, Cleaned

PRONOUN = r"它们?|他们?|她们?|该馆|本馆|本公司|其"
TIMES = "清晨|早上|上午|正午|中午|下午|傍晚|晚上|深夜|拂晓|日落|周末"
TIME = rf"(?:每?(?:周|星期)[一二三四五六日天](?:至(?:周|星期)?[一二三四五六日天])?|\d{{4}}年(?:\d+月)?(?:\d+日)?|\d+月\d+日|{TIMES})"
DIGIT = r"[\d.,零一二两三四五六七八九十百千万半]"
NUMBER = r"(?:\d[\d.,]*|[零一二两三四五六七八九十百千万半]+)"
UNIT = "天|本|元|角|次|人|岁|年|个月|小时|分钟|公里|米|页|册|间|层|倍|%"
CARE = "照看|照顾|负责|管理|保管|主持|写|发明|创办"  # 由人来做的事
EAT = "吃|喝|种|养|卖"
CONDITION = r"满$|之后|以后|到期|如果|超过|[^，]*时$"  # 说的是条件，不是一件事
CLAUSE = r"[^，。！？；：\s]"
# 接着上一句说的，或带着条件：单独拿出来成了问题，意思就变了
LINKED = re.compile(
    r"^(?:因为|由于|但|如果|虽然|即使|当|而|并|且|所以|因此|其中|后来|于是|此后|之后|到了|后)"
)
ADVERB = r"(?:通常|一般|都|也|均|主要|曾|曾经|已|已经|正|将|则|就|才|又|还|再)$"
# 数字后面是"年"的：只认"有效期三年"这样的，不认"顺治七年"、"1990年"
NOT_A_YEAR = rf"(?:(?<=[期共约达长要需为了])(?!{DIGIT}{{3,}}年)|(?!{NUMBER}年))"


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
        for name, rule in RULES.items():
            if made := ask(rule, told, passage.subject):
                questions, answer, said = made
                pair = Pair(
                    passage.document, passage.text, passage.subject, name, questions, answer, said, plain
                )
                found.setdefault(questions[0], pair)
                break  # 前面的规则认得更准，一句只用一条
    return list(found.values())


def with_subject(sentence: str, subject: str) -> str:
    """句里第一个代词换成标题：问题离开了这一段，"它"就不知道是谁了。"""
    return re.sub(PRONOUN, lambda _: subject, sentence, count=1) if subject else sentence


@dataclass(frozen=True)
class Rule:
    """一种句式。patterns 里的 {s} 是标题，组 answer 是答案；各组填进 asks（三种问法，最后一种留着考）与 said。

    refused：{哪一组: 像这样就不认}。
    """

    patterns: tuple[str, ...]
    asks: tuple[str, str, str]
    said: str
    refused: dict[str, str] = field(default_factory=dict)


def ask(rule: Rule, sentence: str, subject: str) -> tuple[tuple[str, ...], str, str] | None:
    """→ (几种问法, 答案, 完整的一句回答)；不是这种句式是 None。要标题的，没有标题就不认。"""
    if not subject and any("{s}" in text for text in (*rule.patterns, rule.said)):
        return None
    tries = (re.match(pattern.replace("{s}", re.escape(subject)), sentence) for pattern in rule.patterns)
    if (found := next((each for each in tries if each), None)) is None:
        return None
    parts = {name: text.strip() for name, text in found.groupdict().items()} | {"s": subject}
    if any(re.search(pattern, parts[name]) for name, pattern in rule.refused.items()):
        return None
    return tuple(each.format(**parts) for each in rule.asks), parts["answer"], rule.said.format(**parts)


KEY_VALUE = Rule(
    (PAIR.pattern,),
    ("{s}的{name}是什么？", "{s}是什么{name}？", "说出{s}的{name}。"),
    "{s}的{name}是{answer}。",
)
RULES = {
    "key_value": KEY_VALUE,
    "attribute": replace(  # 甲的乙是丙
        KEY_VALUE, patterns=(rf"{{s}}的(?P<name>{CLAUSE}{{1,8}})[是为](?P<answer>{CLAUSE}{{1,16}})[，。]",)
    ),
    "place": Rule(
        (rf"(?P<who>{CLAUSE}+?)(?P<verb>住在|位于|坐落在|设在|放在)(?P<answer>{CLAUSE}{{1,16}})[，。]",),
        ("{who}{verb}哪里？", "{who}{verb}什么地方？", "要找{who}，去哪里？"),
        "{who}{verb}{answer}。",
        {"who": rf"[是有在]|{ADVERB}"},
    ),
    "carer": Rule(  # 照看甲的是乙；甲由乙照看
        (
            rf"(?P<verb>{CARE})(?P<what>{CLAUSE}+?)的是(?P<answer>{CLAUSE}{{1,8}})[，。]",
            rf"(?P<what>{CLAUSE}+?)由(?P<answer>{CLAUSE}{{1,8}}?)(?P<verb>{CARE})[，。]",
        ),
        ("{verb}{what}的是谁？", "谁{verb}{what}？", "{what}由谁{verb}？"),
        "{verb}{what}的是{answer}。",
        {"what": ADVERB},
    ),
    "time": Rule(
        (rf"(?P<who>{CLAUSE}+?)(?:在|于|每天|是在)(?P<answer>{TIME})(?P<does>{CLAUSE}{{1,12}})[，。]",),
        ("{who}什么时候{does}？", "{who}是什么时候{does}的？", "什么时候{who}{does}？"),
        "{who}{answer}{does}。",
        # "1980年代"、"2002年时"、"2014年之前"：说的不是做这件事的那一刻
        {"who": rf"^在|{ADVERB}", "does": r"^[及和与、至到或~～\-代时\d]|[时前后起间]$"},
    ),
    "number": Rule(  # 普通图书借期三十天：说的是什么，取数字前面的一小句
        (rf"(?P<what>{CLAUSE}{{2,20}}?){NOT_A_YEAR}(?P<answer>{NUMBER}(?P<unit>{UNIT}))(?=[，。；])",),
        ("{what}多少{unit}？", "{what}几{unit}？", "想知道{what}多少{unit}。"),
        "{what}{answer}。",
        {"what": rf"{PRONOUN}|[第每各等独\d]$|{CONDITION}"},
    ),
    "object": Rule(  # 甲爱吃乙
        (rf"(?P<who>{CLAUSE}+?)(?P<verb>(?:每天|爱|只|常|最爱)(?:{EAT}))(?P<answer>{CLAUSE}{{1,12}})[，。]",),
        ("{who}{verb}什么？", "{who}{verb}的是什么？", "{who}{verb}的东西是什么？"),
        "{who}{verb}{answer}。",
    ),
    "definition": Rule(  # 甲是乙：只认以标题开头的，别的"是"多半不是在下定义
        (r"{s}(?:是指|是|指)(?P<answer>[^。！？]{4,40})。",),
        ("{s}是什么？", "什么是{s}？", "{s}指什么？"),
        "{s}是{answer}。",
    ),
}
