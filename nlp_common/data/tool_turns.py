"""对话里的工具：列出来的工具、助手的调用、工具的结果，各家的写法都变成 Qwen 的文字（nlp_common/lm/tool_text.py）。

OpenAI                                        ShareGPT（LLaMA-Factory、glaive、Hermes）
tools: [{"type": "function", "function": …}]   tools: '[{"name": …, "parameters": …}]'
"tool_calls": [{"function": {"name",           {"from": "function_call",
    "arguments": '{"x": 1}'}}]                     "value": '{"name": …, "arguments": {…}}'}
{"role": "tool", "content": …}                 {"from": "observation"（或 tool）, "value": …}
"""

from __future__ import annotations

import json
import re
from typing import Any

from nlp_common.data.faults import Malformed, Skip, type_name
from nlp_common.lm.tool_text import RESPONSE, RESPONSE_END, TOOLS_TAG, call_text, with_tools

TOOL_COLUMNS = ("tools", "functions")  # functions：OpenAI 以前的叫法
_WRAPPED = re.compile(f"{RESPONSE}\\s*(.*?)\\s*{RESPONSE_END}\\s*", re.DOTALL)


def list_tools(row: dict, turns: list[dict]) -> list[dict]:
    """把一行的 tools 栏写进对话的 system；没有这一栏、是空的、system 里已经列了（Hermes），就不动。"""
    tools: list[dict] = []
    for column in TOOL_COLUMNS:
        tools += _tools(row.get(column), column)
    said = turns[0]["content"] if turns and turns[0]["role"] == "system" else None
    if not tools or (said and TOOLS_TAG in said):
        return turns
    system = {"role": "system", "content": with_tools(said or "", tools)}
    return [system, *(turns if said is None else turns[1:])]


def _tools(value: object, column: str) -> list[dict]:
    """一栏（列表，或写成 JSON 的字符串）→ 工具的列表；只写了函数的，包上 ``{"type": "function", …}``。"""
    listed = _json(_filled(value), column)
    if isinstance(listed, dict):
        listed = [listed]
    if not isinstance(listed, list | None):
        raise Malformed(f"{column} 应是工具的列表（或写成 JSON 的字符串），这里是{type_name(listed)}")
    tools = []
    for number, tool in enumerate(listed or [], 1):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Malformed(
                f'{column} 第 {number} 个没有 name：工具写作 {{"name": …, "description": …, "parameters": {{…}}}}'
            )
        tools.append(tool if "function" in tool else {"type": "function", "function": function})
    return tools


def with_calls(message: dict, content: str, place: str) -> tuple[str, list]:
    """助手的一轮 → (说的话后面接着调用, 各个调用的 id)；没有调用就是说的话。"""
    asked = _json(_filled(message.get("tool_calls")), f"{place} tool_calls") or []
    if not isinstance(asked, list):
        raise Malformed(f"{place} tool_calls 应是列表，这里是{type_name(asked)}")
    places = [f"{place} tool_calls 第 {number} 个" for number in range(1, len(asked) + 1)]
    # OpenAI 以前的写法；Parquet 里没有调用的一轮，里面全是 None
    if single := _filled(message.get("function_call")):
        asked, places = [*asked, single], [*places, f"{place} function_call"]
    calls = [_call(each, where) for each, where in zip(asked, places, strict=True)]
    ids = [each.get("id") for each in asked if isinstance(each, dict)]
    return (call_text(calls, content if content.strip() else "") if calls else content), ids


def called(value: object, place: str) -> str:
    """ShareGPT 的 function_call：一个调用或几个调用的列表（对象，或写成 JSON 的字符串）→ 调用的文字。"""
    written = _json(_filled(value), place)
    calls = written if isinstance(written, list) else [written]
    if not calls or written is None:
        raise Malformed(f'{place} 是空的，应是 {{"name": …, "arguments": {{…}}}}')
    return call_text([_call(each, place) for each in calls])


def _call(value: Any, place: str) -> dict:
    """一个调用 → ``{"name", "arguments": 对象}``。"""
    value = _json(value, place)
    call = value.get("function") or value if isinstance(value, dict) else value
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not call["name"].strip():
        raise Malformed(f'{place} 没有 name，应是 {{"name": …, "arguments": {{…}}}}')
    arguments = _json(call.get("arguments", call.get("parameters")), f"{place}的 arguments")
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        raise Malformed(f"{place}的 arguments 应是对象，如 {{'x': 1}}，这里是{type_name(arguments)}")
    return {"name": call["name"], "arguments": arguments}


def results_of(content: object) -> list[str]:
    """工具的一轮 → 几个结果：内容不是文字的写成 JSON；已经用 <tool_response> 包着的（Hermes），一个一个拆开。"""
    if content is None:
        return [""]
    if not isinstance(content, str):
        return [json.dumps(content, ensure_ascii=False)]
    wrapped = _WRAPPED.findall(content)
    return wrapped if wrapped and not _WRAPPED.sub("", content).strip() else [content]


def in_order(turns: list[dict]) -> list[dict]:
    """一轮里的几个结果照调用的次序排好（文字里没有 id，只能靠次序），去掉 id。调用与结果对不上是 Skip。"""
    done: list[dict] = []
    asked: list = []
    results: list[dict] = []
    for each in [*turns, None]:
        if each is not None and each["role"] == "tool":
            results.append(each)
            continue
        named = [result.pop("id", None) for result in results]
        if named and all(named) and all(asked) and len(set(asked)) == len(asked) > 0:
            if len(named) != len(asked) or set(named) != set(asked):
                raise Skip("调用与结果的 id 对不上")
            results = [results[named.index(number)] for number in asked]
        done, results = done + results, []
        if each is not None:
            asked = each.pop("ids", [])
            done.append(each)
    return done


def _json(value: object, place: str) -> Any:
    """写成 JSON 的字符串 → 值；空的字符串是 None，别的原样。"""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except ValueError as error:
        raise Malformed(f"{place} 不是正确的 JSON：{value.strip()[:60]}（{error}）") from None


def _filled(value: Any) -> Any:
    """去掉值是 None 的键：Parquet 里每一行的键都补成一样的，这一行没有的就是 None。写成 JSON 字符串的原样，里面的 null 照写。"""
    if isinstance(value, list):
        return [_filled(each) for each in value]
    if isinstance(value, dict):
        return {key: _filled(each) for key, each in value.items() if each is not None}
    return value
