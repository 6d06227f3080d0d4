"""请求的 JSON → Asked：每一项的类型、范围都查；不认识的、做不到的直说，不悄悄地当没看见。

查出来的都是 Refusal：HTTP 状态、给人看的一句话、哪一项、OpenAI 的代号。
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import Any

from nlp_common.data.faults import Malformed, Skip, type_name
from nlp_common.data.tool_turns import list_tools
from nlp_common.data.turns import as_turns
from nlp_common.hub.chat_server import plain_words

ROLES = ("system", "developer", "user", "assistant", "tool")
# 认得而不影响回答的：收下，不用
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
# 做不到的：写成这几个值（等于没有要求）就收，别的值就拒绝
ONLY: dict[str, tuple] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tool_choice": ("auto", "none"),
}
KNOWN = {"model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens", "temperature",
         "top_p", "seed", "stop", "tools", *IGNORED, *ONLY}  # fmt: skip


class Refusal(Exception):
    """不接受这个请求。"""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict:
        """OpenAI 的样子。"""
        kinds = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
        kind = kinds.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass
class Asked:
    """一个合格的请求。"""

    turns: list[dict]  # {"role", "content"}，工具的说明、调用已经写成文字
    has_tools: bool
    stream: bool
    with_usage: bool  # 流的末尾报不报 usage
    max_tokens: int | None
    temperature: float
    top_p: float
    seed: int
    stop: list[str]


def read_body(raw: bytes) -> dict:
    """请求的字节 → JSON 对象。"""
    try:
        asked = json.loads(raw)
        json.dumps(asked, ensure_ascii=False).encode()  # 半个代理对不是字，后面写不成 UTF-8
    except UnicodeError as error:
        raise Refusal(400, f"请求不是 UTF-8 的文字：{error}") from None
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"请求不是合法的 JSON：{error}") from None
    if not isinstance(asked, dict):
        raise Refusal(
            400, f'请求要是一个 JSON 对象 {{"model": …, "messages": […]}}，这里是{type_name(asked)}。'
        )
    return asked


def check_fields(asked: dict, model: str, most_tokens: int, temperature: float) -> Asked:
    """model 是这里的模型的名字，most_tokens 是一个回答最多几个 token，temperature 是没有写时用的温度。"""
    asked = {name: value for name, value in asked.items() if value is not None}
    if unknown := [name for name in asked if name not in KNOWN]:
        raise Refusal(400, f"不认识 {unknown[0]}。", unknown[0], "unknown_parameter")
    for name, allowed in ONLY.items():
        if name in asked and not any(
            asked[name] == value and _same_kind(asked[name], value) for value in allowed
        ):
            said = "、".join(json.dumps(value, ensure_ascii=False) for value in allowed)
            raise Refusal(400, f"{name} 这里只能是 {said}，别的还不会。", name, "unsupported_value")
    wanted = _field(asked, "model", str, "字符串")
    if wanted is None:
        raise Refusal(400, "没有写 model：要哪个模型。", "model", "missing_required_parameter")
    if wanted != model:
        raise Refusal(404, f"没有 {wanted[:80]} 这个模型，这里的是 {model}。", "model", "model_not_found")
    tools = _tools(asked)
    options = _field(asked, "stream_options", dict, "对象") or {}
    if asked.get("max_tokens") and asked.get("max_completion_tokens"):
        raise Refusal(400, "max_tokens 与 max_completion_tokens 是同一样，只写一个。", "max_tokens")
    at_most = None
    for name in ("max_tokens", "max_completion_tokens"):
        at_most = _number(asked, name, 1, most_tokens, whole=True, otherwise=at_most)
    return Asked(
        turns=_turns(asked, tools),
        has_tools=bool(tools),
        stream=bool(_field(asked, "stream", bool, "true 或 false")),
        with_usage=bool(_field(options, "include_usage", bool, "true 或 false", "stream_options.")),
        max_tokens=at_most,
        temperature=_number(asked, "temperature", 0, 2, otherwise=temperature),
        top_p=_number(asked, "top_p", 1e-9, 1, otherwise=1.0),
        seed=_number(asked, "seed", -(2**63), 2**63 - 1, whole=True, otherwise=random.getrandbits(62)),
        stop=_stop(asked),
    )


def _same_kind(value: Any, allowed: Any) -> bool:
    """1 与 true 在 Python 里相等，在 JSON 里不是一样东西。"""
    return isinstance(value, bool) == isinstance(allowed, bool)


def _field(asked: dict, name: str, kind: type, said: str, before: str = "") -> Any:
    value = asked.get(name)
    if value is not None and not isinstance(value, kind):
        raise Refusal(
            400, f"{before}{name} 要是{said}，这里是{type_name(value)}。", before + name, "invalid_type"
        )
    return value


def _number(
    asked: dict, name: str, low: float, high: float, whole: bool = False, otherwise: Any = None
) -> Any:
    value = asked.get(name)
    if value is None:
        return otherwise
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        said = "整数" if whole else "数"
        raise Refusal(400, f"{name} 要是{said}，这里是{type_name(value)}。", name, "invalid_type")
    if not low <= value <= high:  # NaN 与谁比都不成立
        said = "大于 0、不大于 1" if name == "top_p" else f"在 {low} 到 {high} 之间"
        raise Refusal(400, f"{name} 要{said}，这里是 {str(value)[:40]}。", name, "invalid_value")
    return value


def _stop(asked: dict) -> list[str]:
    stop = asked.get("stop")
    stop = [stop] if isinstance(stop, str) else stop or []
    well = isinstance(stop, list) and all(isinstance(each, str) and each for each in stop)
    if not well or len(stop) > 4:
        raise Refusal(400, "stop 要是一个字符串，或至多四个不空的字符串的列表。", "stop", "invalid_type")
    return stop


def _tools(asked: dict) -> list[dict]:
    tools = _field(asked, "tools", list, "列表") or []
    for number, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        if (
            not isinstance(function, dict)
            or not isinstance(function.get("name"), str)
            or not function["name"]
        ):
            raise Refusal(
                400,
                f'tools[{number}] 要写成 {{"type": "function", "function": {{"name": …, "parameters": {{…}}}}}}。',
                f"tools[{number}]",
                "invalid_type",
            )
    return [] if asked.get("tool_choice") == "none" else tools


def _turns(asked: dict, tools: list[dict]) -> list[dict]:
    """messages → 一轮轮的文字：调用写进助手的话里，工具的说明写进 system。

    助手的话里抄着的控制符字样不是调用（调用在 tool_calls 里），换成全角的；用户与工具的，编码时切开（lm/chatml.py）。
    """
    messages = asked.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refusal(400, "messages 要是消息的列表，至少一条。", "messages", "invalid_type")
    cleaned = []
    for number, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES:
            raise Refusal(
                400, f"messages[{number}] 的 role 要是 {'、'.join(ROLES)} 之一。", f"messages[{number}].role"
            )
        content = message.get("content")
        if not isinstance(content, str | list) and not (role == "assistant" and content is None):
            raise Refusal(
                400,
                f"messages[{number}] 的 content 要是文字（或几部分文字的列表），这里是{type_name(content)}。",
                f"messages[{number}].content",
            )
        kept = {name: message.get(name) for name in ("role", "content", "tool_calls", "tool_call_id")}
        if role == "assistant":
            kept["content"] = plain_words(content)
        cleaned.append(
            {name: value for name, value in kept.items() if value is not None or name == "content"}
        )
    if cleaned[-1]["role"] not in ("user", "tool"):
        raise Refusal(400, "messages 的最后一条要是 user 的话或 tool 的结果，才轮到助手说。", "messages")
    try:
        return list_tools({"tools": tools}, as_turns(cleaned, "messages"))
    except (Malformed, Skip) as error:
        raise Refusal(400, f"{error}。", "messages") from None
