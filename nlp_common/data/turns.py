"""一轮轮对话的读法和查法：把各家写法的消息变成 ``{"role", "content"}``，并检查是不是一问一答。"""

from __future__ import annotations

Turn = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": str}

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
_TYPE_NAMES = {str: "字符串", list: "列表", dict: "对象", int: "数字", float: "数字", bool: "真假值"}


class Skip(Exception):
    """这一条没有用，跳过；参数是原因。"""


class Malformed(Exception):
    """这一条的格式不对；参数说明哪一栏、怎么不对。"""


def as_string(value: object, column: str) -> str:
    """字符串原样返回，None 当作空（Parquet 和 hub 上没填的格就是 None）。"""
    if value is not None and not isinstance(value, str):
        raise Malformed(f"{column} 应是字符串，这里是{_TYPE_NAMES.get(type(value), type(value).__name__)}")
    return value or ""


def turn(role: str, content: object, column: str) -> Turn:
    return {"role": role, "content": as_string(content, column)}


def as_turns(value: object, column: str, role: str | None = None) -> list[Turn]:
    """一栏 → 消息列表。认得：消息的列表，一条消息，以及（给了 role 时）只有内容的字符串。

    一条消息写作 ``{"role", "content"}`` 或 ShareGPT 的 ``{"from", "value"}``。
    """
    if value is None:
        return []
    if role and isinstance(value, str):
        return [turn(role, value, column)]
    turns = []
    for message in value if isinstance(value, list) else [value]:
        if not isinstance(message, dict):
            kind = _TYPE_NAMES.get(type(message), type(message).__name__)
            raise Malformed(f"{column} 应是消息的列表，如 [{{'role': 'user', 'content': '…'}}]，这里有{kind}")
        speaker, content = ("role", "content") if "role" in message else ("from", "value")
        if speaker not in message or content not in message:
            raise Malformed(
                f"{column} 里的一条消息要有 role 和 content（或 from 和 value），这里只有 {'、'.join(message)}"
            )
        if (name := str(message[speaker])) not in ROLES:
            raise Malformed(f"{column} 里的角色 {name} 不认识，要是 {'、'.join(ROLES)} 之一")
        turns.append(turn(ROLES[name], message[content], column))
    return turns


def opening(row: dict, turns: list[Turn]) -> list[Turn]:
    """在对话前面加上 system 和 history（``[[问, 答], …]``）两栏的内容；没有或空的就不加。"""
    before: list[Turn] = []
    system = as_string(row.get("system"), "system")
    if system.strip() and not (turns and turns[0]["role"] == "system"):
        before.append(turn("system", system, "system"))
    history = row.get("history") or []
    if not isinstance(history, list) or any(not isinstance(qa, list) or len(qa) != 2 for qa in history):
        raise Malformed("history 应是 [[问, 答], …]")
    for question, answer in history:
        before += [turn("user", question, "history"), turn("assistant", answer, "history")]
    return before + turns


def checked(turns: list[Turn], last: str) -> list[Turn]:
    """一问一答、以 last 结尾的对话；空的 system 去掉。不合的抛出 Skip。"""
    if turns and turns[0]["role"] == "system" and not turns[0]["content"].strip():
        turns = turns[1:]
    if not turns or any(not message["content"].strip() for message in turns):
        raise Skip("有一轮是空的")
    if turns[-1]["role"] != last:
        raise Skip("最后一轮不是回答" if last == "assistant" else "提示的最后一轮不是提问")
    spoken = turns[1:] if turns[0]["role"] == "system" else turns
    if any(message["role"] != ("user", "assistant")[i % 2] for i, message in enumerate(spoken)):
        raise Skip("不是一问一答")
    return turns
