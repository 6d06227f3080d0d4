"""别人的 MCP 服务器列出来的工具 → 我们的 Tool。名字、说明、schema 都是陌生人写的，先洗过；会不会改东西，也不听他说。"""

from __future__ import annotations

import json
import re
from functools import partial
from typing import Any

import jsonschema
import referencing

from agent_trace import visible
from mcp_wire import Connection
from tool_calls import Tool, ToolError

MOST_TOOLS = 64  # 再多，提示里就只剩工具的说明了
MOST_PAGES = 20
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
DESCRIPTION_CHARS, SCHEMA_CHARS, SCHEMA_DEPTH = 1000, 8000, 12


def list_tools(connection: Connection, trusted: bool, seconds: float) -> tuple[dict[str, Tool], list[str]]:
    """→ ({名字: Tool}, 没有收的，一句话一件)。"""
    listed, notes = list_pages(connection, seconds)
    tools: dict[str, Tool] = {}
    for each in listed:
        name = visible(each.name)[:40]
        if fault := fault_of(each, tools):
            notes.append(f"{name} 没有收：{fault}")
            continue
        schema = as_schema(each)
        read_only = bool(trusted and each.annotations and each.annotations.read_only_hint)
        run = partial(call_tool, connection, schema["function"]["parameters"], each.name, seconds)
        tools[each.name] = Tool(each.name, schema, run, writes=not read_only)
    return tools, notes


def list_pages(connection: Connection, seconds: float) -> tuple[list, list[str]]:
    """tools/list 可以一页一页地给；没有完的不陪。"""
    listed: list = []
    cursor = None
    for _ in range(MOST_PAGES):
        page = connection.ask(seconds, connection.client.list_tools, cursor=cursor)
        listed += page.tools
        cursor = page.next_cursor
        if not cursor or len(listed) > MOST_TOOLS:
            break
    if len(listed) > MOST_TOOLS:
        return listed[:MOST_TOOLS], [f"它有 {len(listed)} 件以上，只收前 {MOST_TOOLS} 件"]
    return listed, []


def fault_of(tool: Any, taken: dict[str, Tool]) -> str:
    """一件工具不能收，为什么；能收是空的。"""
    if not NAME.fullmatch(tool.name):
        return "名字只能有字母、数字、_ . -，最多 64 个"
    if tool.name in taken:
        return "名字与前面的一件相同"
    schema = tool.input_schema
    if schema.get("type") != "object":
        return "参数的 schema 不是对象"
    if depth(schema) > SCHEMA_DEPTH or len(json.dumps(schema, ensure_ascii=False)) > SCHEMA_CHARS:
        return "参数的 schema 太大，或套得太深"
    if any(not reference.startswith("#") for reference in references(schema)):
        return "参数的 schema 指到外面（$ref）：那会替它去访问网址"
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except Exception:
        return "参数的 schema 写错了"
    return ""


def depth(value: Any, level: int = 0) -> int:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return level if level > SCHEMA_DEPTH * 4 else max([level, *(depth(each, level + 1) for each in inside)])


def references(value: Any) -> list[str]:
    if isinstance(value, list):
        return [found for each in value for found in references(each)]
    if not isinstance(value, dict):
        return []
    own = [each for name, each in value.items() if name in ("$ref", "$dynamicRef") and isinstance(each, str)]
    return own + [found for each in value.values() for found in references(each)]


def as_schema(tool: Any) -> dict:
    """MCP 的写法 → OpenAI 的写法；控制字符、看不见的字符都换掉，太长的说明截掉。

    <|im_end|> 这样的字样留着：进提示时 tool_text 会把它写成 \\u003c|im_end|>，分词器认不出。
    """
    description = clean(tool.description or "")
    if len(description) > DESCRIPTION_CHARS:
        description = description[:DESCRIPTION_CHARS] + "……（太长，截掉了）"
    function = {"name": tool.name, "description": description, "parameters": clean(tool.input_schema)}
    return {"type": "function", "function": function}


def clean(value: Any) -> Any:
    """文字里看不见的字符换成 �；pattern 去掉：别人写的正则式可以让 re 算上几年，合不合由它自己查。"""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, list):
        return [clean(each) for each in value]
    if isinstance(value, dict):
        is_pattern = {"pattern": str, "patternProperties": dict}
        return {
            clean(name): clean(each)
            for name, each in value.items()
            if not (name in is_pattern and isinstance(each, is_pattern[name]))
        }
    return value


def call_tool(connection: Connection, schema: dict, name: str, seconds: float, /, **arguments: object) -> str:
    """叫一次。参数先照它的 schema 查（不访问网址）；isError 的结果、断开、超时，都是一句话。"""
    validator = jsonschema.Draft202012Validator(schema, registry=referencing.Registry())
    faults = [
        f"{'.'.join(map(str, each.path)) or '参数'}：{each.message[:100]}"
        for each in validator.iter_errors(arguments)
    ]
    if faults:
        raise ToolError(f"{name} 的参数不合：{'；'.join(faults[:3])}")
    try:
        result = connection.ask(seconds, connection.client.call_tool, name, arguments)
    except ConnectionError as error:
        raise ToolError(f"{error}。") from None
    text = as_text(result)
    if result.is_error:
        raise ToolError(text.removeprefix("出错了：") or "工具说出错了，没有说为什么。")
    return text


def as_text(result: Any) -> str:
    """结果的几块 → 文字；图片、声音给不了只读文字的模型，说一声。"""
    parts = []
    for block in result.content:
        if block.type == "text":
            parts.append(block.text)
        elif block.type == "resource" and hasattr(block.resource, "text"):
            parts.append(block.resource.text)
        elif block.type == "resource_link":
            parts.append(f"（资源 {visible(str(block.uri))[:200]}）")
        else:
            parts.append(f"（{block.type}，没有给模型看）")
    if not parts and result.structured_content is not None:
        parts.append(json.dumps(result.structured_content, ensure_ascii=False))
    return "\n".join(parts)
