"""工具与调用的文字，与 Qwen3 的模板一字不差：工具列在 system 里，调用写在助手的话里。

    # Tools … <tools>\\n{"type": "function", …}\\n</tools> …           tools_text
    <tool_call>\\n{"name": "look_up", "arguments": {…}}\\n</tool_call>   call_text
    <tool_response>\\n…\\n</tool_response>                            结果，chatml.encode_chat 写

工具的说明可能是陌生人写的（MCP 服务器），参数里也可能抄着用户的话：JSON 字符串里的控制符字样，"<" 写成 \\u003c。
读出来是同一个 JSON，而分词器认不出它。
"""

from __future__ import annotations

import json
from typing import Any

TOOLS_TAG = "<tools>"
CALL, CALL_END = "<tool_call>", "</tool_call>"
RESPONSE, RESPONSE_END = "<tool_response>", "</tool_response>"
# Qwen 的控制符都这样开头；别处的 "<"（a < b、List<int>）照写
CONTROL_STARTS = ("<|", "<tool", "</tool", "<think", "</think")

TOOLS_BEFORE = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
TOOLS_AFTER = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments "
    'within <tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, '
    '"arguments": <args-json-object>}\n</tool_call>'
)


def json_text(value: Any) -> str:
    """value 的 JSON，汉字照写，控制符字样的 "<" 写成 \\u003c（JSON 里只有字符串里才有 "<"）。"""
    text = json.dumps(value, ensure_ascii=False)
    for start in CONTROL_STARTS:
        text = text.replace(start, "\\u003c" + start[1:])
    return text


def tools_text(tools: list[dict]) -> str:
    """工具（OpenAI 的写法 ``{"type": "function", "function": {…}}``）→ system 里说明它们的一段。"""
    return TOOLS_BEFORE + "".join("\n" + json_text(tool) for tool in tools) + TOOLS_AFTER


def with_tools(system: str, tools: list[dict]) -> str:
    """system 的话，后面接着工具的说明；没有工具，就是 system 的话。"""
    if not tools:
        return system
    return (system + "\n\n" if system else "") + tools_text(tools)


def call_text(calls: list[dict], content: str = "") -> str:
    """几个调用 ``{"name", "arguments": 对象}`` → 助手这一轮的文字；content 是调用之前说的话。"""
    written = [
        f"{CALL}\n{json_text({'name': call['name'], 'arguments': call['arguments']})}\n{CALL_END}"
        for call in calls
    ]
    return "\n".join([content, *written] if content else written)
