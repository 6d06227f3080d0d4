"""量尺的考试题：同一个标准答案，换几种一样对的写法，再写坏几种；对错由写法决定，不由哪把量尺决定。"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator

from call_questions import Question
from nlp_common.lm.reply_parser import Call
from nlp_common.lm.tool_text import CALL, CALL_END, call_text

TITLES = {
    "same": "照标准答案写",
    "order": "参数换个次序",
    "spaces": "JSON 里不写空格",
    "talk": "调用前先说一句话",
    "float": "整数写成 1.0",
    "optional": "可以不写的也写上",
    "other": "换一个列出的值",
    "marks": "全角标点、书名号",
    "reorder": "几个调用换个次序",
    "paraphrase": "没有列出的对的写法",
    "none": "不该调用，没有调用",
    "function": "叫错工具",
    "missing": "少了参数",
    "value": "值不对",
    "type": "类型不对",
    "extra": "多调用一次",
    "no_call": "该调用，没有调用",
    "unneeded": "不该调用，调用了",
    "lookalike": "错，却看着像、结果像",
}
SPOKEN = "好的，我来办。"
NO_CALL = "抱歉，这件事我办不了。"
MARKS = str.maketrans(":()", "：（）")

Variant = tuple[str, bool, str]  # (写法, 对不对, 回答的文字)


def variants_of(question: Question) -> Iterator[Variant]:
    if question.group == "irrelevance":
        yield "none", True, NO_CALL
        name = question.tools[0]["function"]["name"]
        yield "unneeded", False, text_of([Call(name, {})])
        return
    wanted = question.reference
    yield "same", True, text_of(wanted)
    yield from right_variants(question, wanted)
    for calls in question.also_right:
        yield "paraphrase", True, text_of(calls)
    yield from wrong_variants(question, wanted)
    for calls in question.also_wrong:
        yield "lookalike", False, text_of(calls)


def text_of(calls: list[Call]) -> str:
    return call_text([{"name": call.name, "arguments": call.arguments} for call in calls])


def tight_text(calls: list[Call]) -> str:
    """不写空格的 JSON，汉字写成 \\uXXXX：读出来是同一个调用。"""
    lines = [json.dumps({"name": c.name, "arguments": c.arguments}, separators=(",", ":")) for c in calls]
    return "\n".join(f"{CALL}\n{line}\n{CALL_END}" for line in lines)


# ---------------------------------------------------------------- 一样对的


def right_variants(question: Question, wanted: list[Call]) -> Iterator[Variant]:
    yield "spaces", True, tight_text(wanted)
    yield "talk", True, SPOKEN + "\n" + text_of(wanted)
    if len(wanted) > 1:
        yield "reorder", True, text_of(wanted[::-1])
    changed = {
        "order": [Call(call.name, dict(reversed(call.arguments.items()))) for call in wanted],
        "float": [Call(call.name, floats(call.arguments)) for call in wanted],
        "marks": [Call(call.name, marked(call.arguments)) for call in wanted],
        "optional": [
            with_optional(call, answer) for call, answer in zip(wanted, question.answers, strict=True)
        ],
        "other": [with_others(call, answer) for call, answer in zip(wanted, question.answers, strict=True)],
    }
    for kind, calls in changed.items():
        if text_of(calls) != text_of(wanted):
            yield kind, True, text_of(calls)


def floats(value):
    """里面的整数都写成 1.0。"""
    if isinstance(value, dict):
        return {key: floats(each) for key, each in value.items()}
    if isinstance(value, list):
        return [floats(each) for each in value]
    return float(value) if type(value) is int else value


def marked(arguments: dict) -> dict:
    """文字里的半角冒号、括号写成全角的，书名加书名号。"""
    return {
        key: (f"《{each}》" if key == "book" else each.translate(MARKS)) if isinstance(each, str) else each
        for key, each in arguments.items()
    }


def with_optional(call: Call, answer: dict) -> Call:
    """可以不写的参数，也照它的默认值写上。"""
    arguments = dict(call.arguments)
    for key, accepted in answer[call.name].items():
        if "" in accepted and (given := [each for each in accepted if each != ""]):
            arguments[key] = given[0]
    return Call(call.name, arguments)


def with_others(call: Call, answer: dict) -> Call:
    """列了几个可接受的值的，换成最后一个。"""
    arguments = dict(call.arguments)
    for key in arguments:
        given = [each for each in answer[call.name][key] if each != ""]
        if len(given) > 1:
            arguments[key] = given[-1]
    return Call(call.name, arguments)


# ---------------------------------------------------------------- 写坏了的


def wrong_variants(question: Question, wanted: list[Call]) -> Iterator[Variant]:
    first, rest = wanted[0], wanted[1:]
    others = [tool["function"]["name"] for tool in question.tools if tool["function"]["name"] != first.name]
    yield "no_call", False, SPOKEN
    yield "extra", False, text_of([*wanted, first])
    if others:
        yield "function", False, text_of([Call(others[0], first.arguments), *rest])
    if not first.arguments:
        return
    schema = next(tool for tool in question.tools if tool["function"]["name"] == first.name)
    properties = schema["function"]["parameters"]["properties"]
    key = list(first.arguments)[-1]
    arguments = copy.deepcopy(first.arguments)
    yield (
        "missing",
        False,
        text_of([Call(first.name, {k: v for k, v in arguments.items() if k != key}), *rest]),
    )
    value = arguments[key]
    yield (
        "value",
        False,
        text_of([Call(first.name, arguments | {key: other_value(value, properties[key])}), *rest]),
    )
    wrong = [value] if isinstance(value, str) else str(value)
    yield "type", False, text_of([Call(first.name, arguments | {key: wrong}), *rest])


def other_value(value, schema: dict):
    """同一类型的另一个值，而且肯定不对。"""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 7
    if isinstance(value, list):
        return value[:-1]
    if isinstance(value, dict):
        return {key: other_value(each, {}) for key, each in value.items()}
    if "enum" in schema:
        return next(each for each in schema["enum"] if each != value)
    for old, new in (("06-", "08-"), (":0", ":4"), ("北京", "上海"), ("*", "+")):
        if old in value:
            return value.replace(old, new)
    return "另外" + value
