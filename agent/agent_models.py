"""智能体的模型：本机的一个（小世界的、Qwen3 的、任何 ChatML 的），或一个会说 OpenAI 接口的服务器。

    said = model.say(messages, tools, max_tokens, deadline, stop, piece)
    said.text     模型写的，原样：<think>…</think>话<tool_call>…</tool_call>

messages 的 system 里没有工具的说明：本机的模型由 with_tools 写进 system，服务器的放在请求的 tools 里，由它自己写。
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from nlp_common.hub.chat_server import CONTROL_WORD, ChatServer
from nlp_common.lm.chatml import encode_text, prompt_ids
from nlp_common.lm.generation import generate, stop_tokens, stream_tokens
from nlp_common.lm.reply_parser import Call, parse_reply, unfinished_marker
from nlp_common.lm.tool_text import CALL, CALL_END, call_text, with_tools

THINK, THINK_END = "<think>", "</think>"
NO_THINKING = f"{THINK}\n\n{THINK_END}\n\n"  # Qwen3 的写法：先替它写好一段空的思考，它就直接回答


@dataclass
class Said:
    """模型说的一轮。stopped 是没有说完的原因：""（说完了）、"length"、"time"、"stopped"、"no_answer"。"""

    text: str
    prompt: str = ""  # 它看到的提示，一字不差（服务器的是请求里的 messages）
    prompt_tokens: int = 0
    tokens: int = 0
    seconds: float = 0.0
    stopped: str = ""


def silent(piece: str) -> None:
    pass


class Model(Protocol):
    name: str
    room: int  # 提示加回答最多多少个 token

    def count(self, messages: list[dict], tools: list[dict]) -> int: ...

    def say(
        self,
        messages: list[dict],
        tools: list[dict],
        max_tokens: int,
        deadline: float,
        stop: threading.Event,
        piece: Callable[[str], None] = silent,
    ) -> Said: ...


def without_old_thinking(messages: list[dict]) -> list[dict]:
    """上一问以前的思考不再带上（Qwen3 的模板就是这样）；这一问里、调用之前的思考还带着。"""
    last_user = max((i for i, each in enumerate(messages) if each["role"] == "user"), default=-1)
    kept = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and i < last_user and THINK_END in message["content"]:
            message = message | {"content": message["content"].split(THINK_END)[-1].lstrip("\n")}
        kept.append(message)
    return kept


# ---------------------------------------------------------------- 1. 本机的模型


class LocalModel:
    """本机的一个模型。thinking：Qwen3 一类会思考的，要不要它先想。"""

    def __init__(
        self, model: Any, tokenizer: Any, name: str, thinking: bool = False, temperature: float = 0.0
    ):
        self.model, self.tokenizer, self.name, self.temperature = model.eval(), tokenizer, name, temperature
        self.room = model.config.max_position_embeddings
        self.thinks = "enable_thinking" in (tokenizer.chat_template or "")
        self.thinking = thinking and self.thinks
        self.generator = torch.Generator(model.device).manual_seed(0)

    def prompt(self, messages: list[dict], tools: list[dict]) -> list[int]:
        """→ 提示的 token；用户与工具的话里的控制符字样在这里切开了（chatml.encode_chat）。"""
        messages = without_old_thinking(messages)
        system = ""
        if messages and messages[0]["role"] == "system":
            system, messages = messages[0]["content"], messages[1:]
        if system := with_tools(system, tools):
            messages = [{"role": "system", "content": system}, *messages]
        ids = prompt_ids(self.tokenizer, messages)
        if self.thinks and not self.thinking:
            ids += encode_text(self.tokenizer, NO_THINKING)
        return ids

    def count(self, messages: list[dict], tools: list[dict]) -> int:
        return len(self.prompt(messages, tools))

    def say(self, messages, tools, max_tokens, deadline, stop, piece=silent) -> Said:
        """一个 token 一个 token 地说；到了时间、有人叫停（stop，或 Ctrl-C），就停在那里。"""
        prompt, started = self.prompt(messages, tools), time.monotonic()
        said = Said("", spoken_text(self.tokenizer, prompt), len(prompt), stopped="length")
        stops = stop_tokens(self.tokenizer)
        ids: list[int] = []
        input_ids = torch.tensor([prompt], device=self.model.device)  # (1, T)
        tokens = stream_tokens(
            self.model, input_ids, torch.ones_like(input_ids), max_tokens, stops, self.tokenizer.pad_token_id,
            self.temperature, generator=self.generator,
        )  # fmt: skip
        try:
            for token in tokens:
                if int(token) in stops:
                    said.stopped = ""
                    break
                ids.append(int(token))
                text = spoken_text(self.tokenizer, ids)
                text = text[: len(text) - unfinished_marker(text)].rstrip("\N{REPLACEMENT CHARACTER}")
                if len(text) > len(said.text):
                    piece(text[len(said.text) :])
                    said.text = text
                if stop.is_set() or time.monotonic() > deadline:
                    said.stopped = "stopped" if stop.is_set() else "time"
                    break
        except KeyboardInterrupt:
            said.stopped = "stopped"
        whole = spoken_text(self.tokenizer, ids)
        piece(whole[len(said.text) :])
        said.text, said.tokens, said.seconds = whole, len(ids), time.monotonic() - started
        return said

    def say_many(self, prompts: list[tuple[list[dict], list[dict]]], max_tokens: int) -> list[Said]:
        """许多提示一批说完（贪心），量成功率用。"""
        started, rows = time.monotonic(), [self.prompt(*each) for each in prompts]
        stops, replies = stop_tokens(self.tokenizer), generate(self.model, self.tokenizer, rows, max_tokens)
        many, seconds = [], (time.monotonic() - started) / max(1, len(rows))
        for row, ids in zip(rows, replies, strict=True):
            stopped = "" if ids and ids[-1] in stops else "length"
            text = spoken_text(self.tokenizer, ids if stopped else ids[:-1])
            many.append(Said(text, "", len(row), len(ids), seconds, stopped))
        return many


def spoken_text(tokenizer: Any, ids: list[int]) -> str:
    """token → 文字；只有控制符才写成控制符的样子。

    用户叫它"照着念：<tool_call>…"，它用平常的字拼出这个字样，不是在调用：那样的 "<" 写成全角的 "＜"。
    没有工具控制符的分词器（Qwen1.5）分不出来，照原样。
    """
    added = tokenizer.added_tokens_decoder.items()
    control = {number: token.content for number, token in added if len(token.content) > 1}
    if CALL not in control.values():
        return tokenizer.decode(ids)
    text, plain = "", []
    for token in [*ids, None]:
        if token is not None and token not in control:
            plain.append(token)
            continue
        text += CONTROL_WORD.sub("＜", tokenizer.decode(plain))
        text += control.get(token, "")
        plain = []
    return text


# ---------------------------------------------------------------- 2. 服务器上的模型


class ServerModel:
    """一个会说 OpenAI 接口的服务器（vLLM、Ollama、llama.cpp、云服务）：它给的 tool_calls 写回 <tool_call>，别处只认一种写法。"""

    def __init__(self, server: ChatServer, temperature: float = 0.0, room: int = 1 << 15):
        self.server, self.name, self.room, self.temperature = server, server.name, room, temperature

    def count(self, messages: list[dict], tools: list[dict]) -> int:
        return estimated(json.dumps([to_openai(messages), tools], ensure_ascii=False))

    def say(self, messages, tools, max_tokens, deadline, stop, piece=silent) -> Said:
        """另开一个线程去问：Ctrl-C、停下、到时间，都不必等它答完。"""
        asked = to_openai(without_old_thinking(messages))
        started, answers = time.monotonic(), []
        params = {"max_tokens": max_tokens, "temperature": self.temperature}
        if tools:
            params["tools"] = tools
        job = threading.Thread(target=_ask, args=(self.server, asked, params, answers), daemon=True)
        said = Said("", json.dumps(asked, ensure_ascii=False, indent=1), self.count(messages, tools))
        job.start()
        try:
            while job.is_alive():
                job.join(0.05)
                if stop.is_set() or time.monotonic() > deadline:
                    said.stopped = "stopped" if stop.is_set() else "time"
                    break
        except KeyboardInterrupt:
            said.stopped = "stopped"
        said.seconds = time.monotonic() - started
        if said.stopped:
            return said
        answer = answers[0]
        if isinstance(answer, BaseException):
            raise answer
        if answer is None:
            said.stopped = "no_answer"
            return said
        said.text = from_openai(answer)
        said.stopped = "length" if answer.get("finish_reason") == "length" else ""
        usage = answer["usage"] if isinstance(answer.get("usage"), dict) else {}
        said.prompt_tokens = counted(usage.get("prompt_tokens"), said.prompt_tokens)
        said.tokens = counted(usage.get("completion_tokens"), estimated(said.text))
        piece(said.text)
        return said


def estimated(text: str) -> int:
    """没有它的分词器，照字数估有几个 token：一个汉字约一个，别的约三个字一个。"""
    plain = sum(char.isascii() for char in text)
    return len(text) - plain + plain // 3


def counted(value: Any, otherwise: int) -> int:
    """服务器报的个数；没有报、不成样子，就用我们估的。"""
    return value if type(value) is int and value >= 0 else otherwise


def _ask(server: ChatServer, messages: list[dict], params: dict, answers: list) -> None:
    try:
        answers.append(server.message(messages, **params))
    except BaseException as error:  # 在主线程里抛出
        answers.append(error)


def from_openai(message: dict) -> str:
    """服务器的一条回答 → 原样的文字。arguments 不是合法的 JSON 的，照写，让 parse_reply 说它坏在哪里。"""
    thinking = message.get("reasoning_content") or message.get("reasoning")
    text = f"{THINK}\n{thinking}\n{THINK_END}\n\n" if isinstance(thinking, str) and thinking else ""
    text += message["content"] if isinstance(message.get("content"), str) else ""
    for call in message.get("tool_calls") or []:
        function = call["function"] if isinstance(call.get("function"), dict) else {}
        name, arguments = str(function.get("name") or ""), function.get("arguments") or "{}"
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        try:
            written = call_text([{"name": name, "arguments": json.loads(arguments)}])
        except (ValueError, RecursionError):
            head = f'{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": '
            written = f"{CALL}\n{head}{CONTROL_WORD.sub('＜', arguments)}}}\n{CALL_END}"
        text += ("\n" if text else "") + written
    return text


def to_openai(messages: list[dict]) -> list[dict]:
    """我们的对话 → OpenAI 的：调用放进 tool_calls，每个结果注明是哪一个的。

    坏了的调用也给一个 tool_calls（有的服务器要把 arguments 读成 JSON，坏的会让它整个拒绝）：原文放在 unreadable 里。
    """
    sent: list[dict] = []
    waiting: list[str] = []  # 还没有结果的调用的编号
    for number, message in enumerate(messages):
        if message["role"] == "tool":
            waiting = waiting or [f"call_{number}_0"]
            sent.append({"role": "tool", "tool_call_id": waiting.pop(0), "content": message["content"]})
        elif message["role"] == "assistant":
            reply = parse_reply(message["content"])
            said: dict = {"role": "assistant", "content": reply.content}
            calls = [_openai_call(call, f"call_{number}_{i}") for i, call in enumerate(reply.calls)]
            if calls:
                said["tool_calls"] = calls
            waiting = [call["id"] for call in calls]
            sent.append(said)
        else:
            sent.append({"role": message["role"], "content": message["content"]})
    return sent


def _openai_call(call: Any, number: str) -> dict:
    name, arguments = ("unreadable", {"text": getattr(call, "text", "")})
    if isinstance(call, Call):
        name, arguments = call.name, call.arguments
    function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {"id": number, "type": "function", "function": function}
