"""选择题的题面：三种问法，中英文，直接续写或聊天；以及从写出来的回答里认出选的是哪个。

字母    题目与全部选项都给看，比较接着写 A、B、C、D 的概率
全文    只给看题目，比较接着写每个选项全文的概率
生成    题目与全部选项都给看，让模型自己写，再从写的话里找答案
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mc_questions import LETTERS, Question
from mc_score import Ask
from nlp_common.lm.chatml import prompt_ids

CHINESE = re.compile(r"[\u4e00-\u9fff]")


@dataclass(frozen=True)
class Wording:
    """一种语言的题面；delimiter 是题目与答案之间的空白（英文的词前面有空格）。"""

    question: str
    listed: str
    delimiter: str
    only_letter: str


WORDINGS = {
    "zh": Wording("{text}\n答案：", "{text}\n{options}\n答案：", "", "只回答一个字母。"),
    "en": Wording(
        "Question: {text}\nAnswer:",
        "{text}\n{options}\nAnswer:",
        " ",
        "Answer with one letter only.",
    ),
}


def language_of(questions: list[Question]) -> str:
    chinese = sum(bool(CHINESE.search(each.text)) for each in questions)
    return "zh" if 2 * chinese >= len(questions) else "en"


def listed(question: Question) -> str:
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, question.options, strict=False)]
    return "\n".join(lines)


# ---------------------------------------------------------------- 1. 问法


def letter_ask(tokenizer, question: Question, shots: list[Question], wording: Wording, chat: bool) -> Ask:
    """按字母：接着写的是 A、B、C、D。"""
    letters = list(LETTERS[: len(question.options)])
    if chat:
        turns = []
        for each in [*shots, question]:
            body = f"{each.text}\n{listed(each)}\n{wording.only_letter}"
            turns += [_turn("user", body), _turn("assistant", LETTERS[each.answer])]
        return Ask(prompt_ids(tokenizer, turns[:-1]), letters)
    context = ""
    for each in shots:
        context += _listed(each, wording) + wording.delimiter + LETTERS[each.answer] + "\n\n"
    return Ask(context + _listed(question, wording), [wording.delimiter + letter for letter in letters])


def text_ask(tokenizer, question: Question, shots: list[Question], wording: Wording, chat: bool) -> Ask:
    """按全文：接着写的是选项的全文，题面里没有别的选项。"""
    if chat:
        turns = []
        for each in [*shots, question]:
            turns += [*(each.messages or [_turn("user", each.text)])]
            turns += [_turn("assistant", each.options[each.answer])]
        return Ask(prompt_ids(tokenizer, turns[:-1]), list(question.options))
    context = ""
    for each in shots:
        gap = "" if each.stem else wording.delimiter
        context += _alone(each, wording) + gap + each.options[each.answer] + "\n\n"
    gap = "" if question.stem else wording.delimiter
    return Ask(context + _alone(question, wording), [gap + each for each in question.options])


def reply_prompt(
    tokenizer, question: Question, shots: list[Question], wording: Wording, chat: bool
) -> list[int]:
    """生成：给模型的 token，等它接着写。聊天的模型，小世界的题照它学过的样子问，不列选项。"""
    if chat and question.messages:
        return prompt_ids(tokenizer, question.messages)
    ask = letter_ask(tokenizer, question, shots, wording, chat)
    return ask.context if chat else tokenizer(ask.context)["input_ids"]


def _listed(question: Question, wording: Wording) -> str:
    return wording.listed.format(text=question.text, options=listed(question))


def _alone(question: Question, wording: Wording) -> str:
    return question.stem or wording.question.format(text=question.text)


def _turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}


# ---------------------------------------------------------------- 2. 从回答里认出答案

_LETTER = r"[(（\[【]?\s*([A-Z])(?![A-Za-z])"
PHRASES = re.compile(
    r"\\boxed\{\s*(?:\\text\{)?\s*([A-Z])\b"
    rf"|(?:正确)?(?:答案|选项)\s*(?:应该|应当|应)?(?:是|为|选)?\s*[:：]?\s*{_LETTER}"
    rf"|(?:应选|故选|我选|选择|选)\s*[:：]?\s*{_LETTER}"
    rf"|(?:[Aa]nswer|ANSWER|option|choice)\s*(?:is|:|：)*\s*(?:option|choice)?\s*{_LETTER}"
)
FIRST = re.compile(r"^\s*[(（\[【]?([A-Z])(?:[)）\]】.．、:：,，。\n]|\s*$)")
ALONE = re.compile(r"(?<![A-Za-z])([A-Z])(?![A-Za-z])(?! +[a-z])")  # 英文的冠词 A、代词 I 不算


def extract(reply: str, options: list[str]) -> int | None:
    """回答 → 选的是第几个；认不出是 None（算错，另外报告有多少）。

    依次看：“答案是 B”这样的话（几处就看最后一处）；开头就是字母；只写出了一个选项的全文；只出现过一个字母。
    """
    reply = reply.rsplit("</think>", 1)[-1]  # 思考的过程里每个字母都提到过
    letters = LETTERS[: len(options)]
    said = [next(filter(None, groups)) for groups in PHRASES.findall(reply)]
    if said:
        return letters.index(said[-1]) if said[-1] in letters else None
    if (found := FIRST.match(reply)) and found[1] in letters:
        return letters.index(found[1])
    written = [place for place, option in enumerate(options) if option in reply]
    inside = [p for p in written if not any(options[p] in options[q] and p != q for q in written)]
    if len(inside) == 1:
        return inside[0]
    alone = {letter for letter in ALONE.findall(reply) if letter in letters}
    return letters.index(alone.pop()) if len(alone) == 1 and not inside else None
