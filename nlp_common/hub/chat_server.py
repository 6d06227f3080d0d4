"""任何会说 OpenAI 聊天接口的服务器：vLLM、Ollama、llama.cpp、各家的云服务。裁判、RAG 的生成、智能体都可以用它。"""

from __future__ import annotations

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from nlp_common.base.errors import UserError

AT_MOST = 8 << 20  # 服务器的一个回答最多读多少字节：再多就不是回答
CONTROL_WORD = re.compile(r"<(?=\|\w+\|>|/?(?:tool_call|tool_response|think)>)")  # Qwen 一类的控制符的 "<"


@dataclass
class ChatServer:
    """一个服务器上的一个模型。

    url 写到 /v1 为止。钥匙从环境变量 api_key_env 里读，不打印，也不进运行记录。
    chat 试 1 + retries 次；超时、断线、5xx、429、不成样子的回答都是"没有回答"（None），不当成任何一种回答。
    """

    url: str
    model: str
    api_key_env: str = "OPENAI_API_KEY"
    timeout: float = 30.0
    retries: int = 2
    wait: float = 1.0  # 秒；两次之间等多久，每次加倍
    faults: dict[str, int] = field(default_factory=dict)  # 没有回答的原因 → 几次

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise UserError(
                f"{self.url} 不是网址：要以 http:// 或 https:// 开头，例如 http://127.0.0.1:8000/v1。"
            )

    @property
    def name(self) -> str:
        return self.model

    def chat(self, messages: list[dict], **params: Any) -> str | None:
        """一次对话的回答；没有回答是 None。钥匙不对、没有这个模型（401、404 等）是 UserError：再试也不会好。"""
        answer = self._try(messages, params, _has_content)
        return None if answer is None else answer["content"]

    def message(self, messages: list[dict], **params: Any) -> dict | None:
        """同 chat，要整条回答：``{"content", "tool_calls", …, "finish_reason", "usage"}``。params 里可以有 tools。

        content 与 tool_calls 至少有一样，不然就是没有回答。messages 里可以有 tool_calls 与工具的结果。
        """
        return self._try(messages, params, _has_content_or_calls)

    def _try(self, messages: list[dict], params: dict, fits: Callable[[dict], bool]) -> dict | None:
        pause = self.wait
        tools = {"tools": plain_words(params["tools"])} if "tools" in params else {}  # 说明也许是陌生人写的
        for attempt in range(1 + self.retries):
            answer, fault = self._ask(
                {"model": self.model, "messages": harmless(messages), **params, **tools}
            )
            if answer is not None and fits(answer):
                return answer
            fault = fault or "回答不成样子"
            self.faults[fault] = self.faults.get(fault, 0) + 1
            if attempt < self.retries:
                time.sleep(pause)
                pause *= 2
        return None

    def check(self) -> None:
        """开始之前先问一句：一句也答不了就不必开始，是 UserError。"""
        if self.chat([{"role": "user", "content": "你好"}], max_tokens=8) is None:
            reasons = "；".join(f"{fault}（{count} 次）" for fault, count in self.faults.items())
            raise UserError(
                f"{self.url} 上的 {self.model} 没有回答：{reasons}。请看服务器开了没有、网址到 /v1 为止对不对。"
            )

    def _ask(self, body: dict) -> tuple[dict | None, str]:
        """问一次 → (第一条回答，带上 finish_reason 与 usage；为什么没有回答)。"""
        request = urllib.request.Request(
            self.url.rstrip("/") + "/chat/completions",
            data=json.dumps(body, ensure_ascii=False).encode("utf-8"),
            headers={"Content-Type": "application/json"},
        )
        if key := os.environ.get(self.api_key_env):
            request.add_header("Authorization", f"Bearer {key}")
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                answered = json.loads(answer.read(AT_MOST))
            first = answered["choices"][0]
            more = {"finish_reason": first.get("finish_reason"), "usage": answered.get("usage")}
            return {**first["message"], **more}, ""
        except urllib.error.HTTPError as error:
            said = error.read(300).decode("utf-8", "replace")
            if error.code in (400, 413, 422):  # 这一句它不收（太长、有不许说的词），别的句子还可以问
                return None, f"不接受这一句（{error.code}：{said[:80]}）"
            if error.code < 500 and error.code not in (408, 425, 429):
                raise UserError(
                    f"{self.url} 拒绝了（{error.code}）：{said}\n钥匙放在环境变量 {self.api_key_env} 里，模型名（--judge_model、--llm_model 等）要是服务器上有的。"
                ) from error
            return None, f"服务器错误 {error.code}"
        except TimeoutError:
            return None, f"{self.timeout:g} 秒没有回答"
        except (OSError, http.client.HTTPException) as error:
            timed_out = isinstance(getattr(error, "reason", None), TimeoutError)
            return None, f"{self.timeout:g} 秒没有回答" if timed_out else f"连不上（{error}）"
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            return None, "回答不成样子"


def _has_content(answer: dict) -> bool:
    return isinstance(answer.get("content"), str)


def _has_content_or_calls(answer: dict) -> bool:
    calls = answer.get("tool_calls") or []
    well = isinstance(calls, list) and all(isinstance(each, dict) for each in calls)
    return well and (bool(calls) or _has_content(answer))


def harmless(messages: list[dict]) -> list[dict]:
    """用户、工具的话（里面也许抄着文档、网页）里的控制符字样，"<" 写成全角的 "＜"；别的照旧。

    服务器先把对话拼成一段文字再分词：里面的 <|im_end|>、<tool_call> 会变成真的控制符，冒充 system、冒充一次调用。
    """
    safe = []
    for message in messages:
        if message["role"] in ("user", "tool"):
            message = message | {"content": plain_words(message.get("content"))}
        safe.append(message)
    return safe


def plain_words(value: Any) -> Any:
    """字符串（列表、对象里的也是）里的控制符字样，"<" 写成全角。"""
    if isinstance(value, str):
        return CONTROL_WORD.sub("＜", value)
    if isinstance(value, list):
        return [plain_words(each) for each in value]
    if isinstance(value, dict):
        return {name: plain_words(each) for name, each in value.items()}
    return value
