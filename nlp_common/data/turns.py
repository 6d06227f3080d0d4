"""一轮轮对话的读法和查法：把各家写法的消息变成 ``{"role", "content"}``，并检查是不是一问一答。

工具的列表、调用、结果的写法在 tool_turns.py。
"""

from __future__ import annotations

import ast
import json
import re
from typing import Any

from nlp_common.data.faults import Malformed, Skip, as_string, type_name
from nlp_common.data.tool_turns import called, in_order, list_tools, results_of, with_calls

# {"role": "system" | "user" | "assistant" | "tool", "content": str}，不学的一轮另有 "weight": 0。
# 工具在 system 的内容里，调用在 assistant 的内容里，都写成了文字（tool_turns.py）。
Turn = dict[str, Any]

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
}
TEXT_PARTS = ("text", "input_text", "output_text")
# 谁的后面可以是谁；最开头是 None。一次提问之后可以几次调用工具：user (assistant tool…)… assistant
NEXT: dict[str | None, tuple[str, ...]] = {
    None: ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}


def turn(role: str, content: object, column: str) -> Turn:
    return {"role": role, "content": as_string(content, column)}


def as_turns(value: object, column: str, role: str | None = None) -> list[Turn]:
    """一栏 → 消息列表。认得：消息的列表，一条消息，写成 JSON 字符串的消息列表，hh-rlhf 的 ``\\n\\nHuman: …`` 字符串，
    以及（给了 role 时）只有内容的字符串。

    一条消息写作 ``{"role", "content"}`` 或 ShareGPT 的 ``{"from", "value"}``；调用与工具的结果的写法见 tool_turns.py。
    助手的一轮 weight 是 0（或 train、loss 是 false）时不学，记作 ``"weight": 0``。
    """
    if value is None:
        return []
    if isinstance(value, str):
        if is_spoken(value):
            return _spoken(value)
        written = _written_list(value, any_list=role is None)
        if written is None and role:
            return [turn(role, value, column)]
        value = value if written is None else written
    turns: list[Turn] = []
    for number, message in enumerate(value if isinstance(value, list) else [value], 1):
        if not isinstance(message, dict):
            raise Malformed(
                f"{column} 应是消息的列表，如 [{{'role': 'user', 'content': '…'}}]，这里有{type_name(message)}"
            )
        speaker, field = ("role", "content") if "role" in message else ("from", "value")
        if speaker not in message or not message.keys() & {field, "tool_calls", "function_call"}:
            raise Malformed(
                f"{column} 里的一条消息要有 role 和 content（或 from 和 value），这里只有 {'、'.join(message)}"
            )
        if (name := str(message[speaker]).strip().lower()) not in ROLES:
            raise Malformed(f"{column} 里的角色 {message[speaker]} 不认识，要是 {'、'.join(ROLES)} 之一")
        found = _turns_of(message, name, field, column, f"第 {number} 轮 {name} 的")
        if name == "function_call" and turns and turns[-1]["role"] == "assistant":
            turns[-1]["content"] += "\n" + found[0]["content"]  # 说完话接着调用、几个调用分几条写：都是一轮
        else:
            turns += found
    return in_order(turns)


def _turns_of(message: dict, name: str, field: str, column: str, place: str) -> list[Turn]:
    """一条消息 → 一轮；工具的一条里包着几个结果的，几轮。name 是它自己的角色名，field 是写内容的那一项。"""
    role, content = ROLES[name], message.get(field)
    if role == "tool":
        text = _joined(content, column, f"{place} {field}") if _is_text(content) else content
        mark = {"id": message["tool_call_id"]} if message.get("tool_call_id") else {}
        return [{"role": role, "content": result, **mark} for result in results_of(text)]
    spoken: Turn = {"role": role}
    if name == "function_call":
        spoken["content"] = called(content, f"{column} {place} {field}")
    else:
        spoken["content"] = _joined(content, column, f"{place} {field}")
        if role == "assistant":
            spoken["content"], ids = with_calls(message, spoken["content"], f"{column} {place}")
            spoken |= {"ids": ids} if ids else {}
    if role == "assistant" and not _learned(message, f"{column} {place.removesuffix(f' {name} 的')}"):
        spoken["weight"] = 0
    return [spoken]


def _is_text(content: object) -> bool:
    """内容是几部分的列表，每一部分是文字（或图片、声音，之后会说不认）：OpenAI 的写法。别的列表、对象是工具给的数据。"""
    parts = content if isinstance(content, list) else [content]
    known = (*TEXT_PARTS, "image_url", "input_image", "input_audio")
    return bool(parts) and all(isinstance(part, dict) and part.get("type") in known for part in parts)


# hh-rlhf 的写法：整段对话是一个字符串，"\n\nHuman: 问\n\nAssistant: 答"
_ASKER = re.compile(r"\s*(?:Human|User|用户|人类)[:：]")
_ANSWERER = re.compile(r"\n\s*\n\s*(?:Assistant|助手)[:：]")
_NEXT_SPEAKER = re.compile(r"(?:^|\n\s*\n)\s*(Human|User|Assistant|用户|人类|助手)[:：]")


def is_spoken(text: str) -> bool:
    """一个字符串里写着一整段对话：以提问的人开头，空一行之后有助手。"""
    return bool(_ASKER.match(text) and _ANSWERER.search(text))


def _spoken(text: str) -> list[Turn]:
    """一个字符串里的对话 → 消息；结尾空着的 Assistant: 只是请它接着说，不算一轮。"""
    pieces = _NEXT_SPEAKER.split(text)
    turns = []
    for name, content in zip(pieces[1::2], pieces[2::2], strict=True):
        role = "assistant" if name in ("Assistant", "助手") else "user"
        turns.append({"role": role, "content": content.strip()})
    if turns and turns[-1]["role"] == "assistant" and not turns[-1]["content"]:
        turns.pop()
    return turns


def _written_list(text: str, any_list: bool) -> list | None:
    """写成字符串的消息列表（JSON，或 pandas 存 csv 时的 Python 写法）→ 列表；不是的给 None。

    any_list：这一栏只能是列表；不然（提问、回答本来就是字符串）要每一项都像一条消息才算。
    """
    if not text.lstrip().startswith("["):
        return None
    try:
        value = json.loads(text)
    except ValueError:
        try:
            value = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None
    if not isinstance(value, list):
        return None
    messages = [
        isinstance(each, dict)
        and ({"from", "value"} <= each.keys() or ("role" in each and each.keys() & {"content", "tool_calls"}))
        for each in value
    ]
    return value if any_list or (messages and all(messages)) else None


def _joined(content: object, column: str, place: str) -> str:
    """一轮的内容：字符串；或几部分的列表，文字的接起来，别的（图片、声音）不认，说出是哪一轮的哪一项。"""
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, dict):
        content = content.get("parts") or [content]
    if not isinstance(content, list):
        kind = type_name(content)
        raise Malformed(
            f'{column} 应是字符串，这里是{kind}：{place} 是 {content}，请加上引号写成 "{content}"'
        )
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else part
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind not in TEXT_PARTS or not isinstance(text, str):
            shown = kind if isinstance(part, dict) else type_name(part)
            raise Malformed(f"{column} {place} 里有 {shown}：这里只用文字，请删去它，或去掉这一条")
        texts.append(text)
    return "".join(texts)


def _learned(message: dict, place: str) -> bool:
    """助手的这一轮要不要学：OpenAI 的 weight（0 或 1），别家的 train、loss（真假）。"""
    for name in ("weight", "train", "loss"):
        value = message.get(name)
        if value is None:
            continue
        if value not in (0, 1):
            raise Malformed(f"{place}的 {name} 是 {value!r}，只能是 0（不学）或 1（学）")
        if not value:
            return False
    return True


def opening(row: dict, turns: list[Turn]) -> list[Turn]:
    """在对话前面加上 system、history（``[[问, 答], …]`` 或消息的列表）、tools 几栏的内容；没有或空的就不加。"""
    before: list[Turn] = []
    system = as_string(row.get("system"), "system")
    if system.strip() and not (turns and turns[0]["role"] == "system"):
        before.append(turn("system", system, "system"))
    history = row.get("history") or []
    if isinstance(history, str):  # csv 里写成字符串
        history = _written_list(history, any_list=True) or history
    if isinstance(history, list) and history and all(isinstance(each, dict) for each in history):
        before += as_turns(history, "history")
    elif not isinstance(history, list) or any(
        not isinstance(qa, list | tuple) or len(qa) != 2 for qa in history
    ):
        raise Malformed("history 应是 [[问, 答], …]")
    else:
        for question, answer in history:
            before += [turn("user", question, "history"), turn("assistant", answer, "history")]
    if turns and turns[0]["role"] == "system":  # 对话自己的 system 仍在最前面
        return list_tools(row, [turns[0], *before, *turns[1:]])
    return list_tools(row, before + turns)


def checked(turns: list[Turn], last: str) -> list[Turn]:
    """一问一答（中间可以有调用与结果）、以 last 结尾的对话；空的 system 去掉。不合的抛出 Skip。

    last 是 user：提示，最后一轮是提问，或者工具的结果，等助手接着说。
    """
    if turns and turns[0]["role"] == "system" and not turns[0]["content"].strip():
        turns = turns[1:]
    if not turns or any(not message["content"].strip() for message in turns if message["role"] != "tool"):
        raise Skip("有一轮是空的")
    ends = ("user", "tool") if last == "user" else (last,)
    if turns[-1]["role"] not in ends:
        raise Skip("最后一轮不是回答" if last == "assistant" else "提示的最后一轮不是提问")
    before = None
    for message in turns[1:] if turns[0]["role"] == "system" else turns:
        if message["role"] not in NEXT.get(before, ()):
            raise Skip("不是一问一答")
        before = message["role"]
    answers = [message for message in turns if message["role"] == "assistant"]
    if answers and all("weight" in message for message in answers):
        raise Skip("没有一轮回答要学（weight 全是 0）")
    return turns
