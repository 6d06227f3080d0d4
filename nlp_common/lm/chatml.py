"""ChatML：把消息变成 token，并标出哪些 token 是助手说的。

<|im_start|>user\\n你好<|im_end|>\\n<|im_start|>assistant\\n你好！<|im_end|>\\n
                                                        └ 只有这一段（含 <|im_end|>）算损失 ┘

各家分词器自带的模板多半没有 {% generation %} 标记，助手掩码会全是 0；所以掩码由我们自己拼：
一段一段地分词，角色头不算损失，助手的内容和 <|im_end|> 算。
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from nlp_common.lm.tool_text import (
    CALL,
    CALL_END,
    CONTROL_STARTS,
    RESPONSE,
    RESPONSE_END,
    TOOLS_AFTER,
    TOOLS_BEFORE,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
UNTRUSTED = ("user", "tool")  # 这几种角色的话是别人写的；system 是开发者写的，assistant 是模型写的
TOOL_WORDS = (CALL, CALL_END, RESPONSE, RESPONSE_END)

# Qwen3 的 ChatML，工具、调用、结果都在内。不同的是：不自动补 system 和思考；JSON 字符串里的控制符字样写成 \u003c（tool_text.py）。
_AS_JSON = " | tojson" + "".join(
    " | replace(" + json.dumps(start) + ", " + json.dumps("\\u003c" + start[1:]) + ")"
    for start in CONTROL_STARTS
)
CHAT_TEMPLATE = (
    "{% if tools %}"
    "{{ '<|im_start|>system\\n' }}"
    "{% if messages[0]['role'] == 'system' and messages[0]['content'] %}{{ messages[0]['content'] + '\\n\\n' }}{% endif %}"
    "{{ " + json.dumps(TOOLS_BEFORE) + " }}"
    "{% for tool in tools %}{{ '\\n' }}{{ tool" + _AS_JSON + " }}{% endfor %}"
    "{{ " + json.dumps(TOOLS_AFTER) + " + '<|im_end|>\\n' }}"
    "{% endif %}"
    "{% for message in messages %}"
    "{% set content = message['content'] or '' %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<|im_start|>assistant\\n' }}"
    "{% generation %}"
    "{{ content }}"
    "{% for tool_call in message['tool_calls'] or [] %}"
    "{% set call = tool_call['function'] or tool_call %}"
    "{% if content or not loop.first %}{{ '\\n' }}{% endif %}"
    "{{ '<tool_call>\\n{\"name\": ' }}{{ call['name']" + _AS_JSON + " }}{{ ', \"arguments\": ' }}"
    "{% if call['arguments'] is string %}{{ call['arguments'] }}{% else %}{{ call['arguments']"
    + _AS_JSON
    + " }}{% endif %}"
    "{{ '}\\n</tool_call>' }}"
    "{% endfor %}"
    "{{ '<|im_end|>' }}"
    "{% endgeneration %}"
    "{{ '\\n' }}"
    "{% elif message['role'] == 'tool' %}"
    "{% if loop.first or messages[loop.index0 - 1]['role'] != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1]['role'] != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}"
    "{% elif not (tools and loop.first and message['role'] == 'system') %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + content + '<|im_end|>\\n' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """用户写的内容 → token。里面就算打出 <|im_end|> 这样的字样，也只当普通文字切开，不会变成控制符。"""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """几段一次分完：分词器调用一次的开销，比切一句话还大。"""
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def encode_untrusted(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """用户、文档、工具写的内容 → token：什么控制符也不会冒出来，也冒充不了工具的结果。

    encode_text 只切开"特殊"的控制符；Qwen3 的 <tool_call>、<think> 是加进词表而不算特殊的，照样会变成一个控制符：
    在每个这样的字样里面切一刀，两边分开分词，就只是普通文字，解码回来一字不差。
    没有工具控制符的分词器（Qwen1.5），包着结果的 <tool_response> 自己也是普通文字：内容里的只能改写一个字，见 disarmed。
    """
    return _without_control(tokenizer, disarmed(tokenizer, text))


def disarmed(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """TOOL_WORDS 里不是控制符的那几个，"<" 写成全角的 "＜"：人和模型照样读得懂，却不是我们写的那个字样。"""
    plain = _plain_tool_words(tokenizer)
    return plain.sub("＜", text) if plain else text


def _without_control(
    tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int] | None = None
) -> list[int]:
    """text → 没有控制符的 token；ids 是已经分好的，没有控制符就是它。"""
    control = _control_tokens(tokenizer)
    ids = encode_text(tokenizer, text) if ids is None else ids
    if control.keys().isdisjoint(ids):
        return ids
    words = "|".join(re.escape(word) for word in sorted(control.values()))
    cuts = [found.start() + 1 for found in re.finditer(f"(?={words})", text)]  # 向前看着匹配，重叠的也不漏
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    ids = [token for piece in encode_texts(tokenizer, pieces) for token in piece]
    if control.keys().isdisjoint(ids):
        return ids
    # 分词器先改写文字（全角变半角、大写变小写）再认控制符：字样不是照原样写的，就一个字一个字地切
    return [token for character in encode_texts(tokenizer, list(text)) for token in character]


@functools.lru_cache(maxsize=64)
def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """后来加进词表的 token，特殊的和不算特殊的 → 字样；一个字的切不开，不在内。"""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {number: token.content for number, token in added.items() if len(token.content) > 1}


@functools.lru_cache(maxsize=64)
def _plain_tool_words(tokenizer: PreTrainedTokenizerBase) -> re.Pattern | None:
    """TOOL_WORDS 里不是控制符的那几个的 "<"。"""
    plain = [word[1:] for word in TOOL_WORDS if word not in _control_tokens(tokenizer).values()]
    return re.compile("<(?=" + "|".join(plain) + ")") if plain else None


@functools.lru_cache(maxsize=64)
def _fixed(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """角色名、换行这些每段对话都有的文字，只分一次词。"""
    return encode_text(tokenizer, text)


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> tuple[list[int], list[int]]:
    """一段对话 → (input_ids, is_answer)，等长；is_answer 为 1 的是助手说的内容和它后面的 <|im_end|>。

    weight 是 0 的一轮（data/turns.py）只是上文，不学。工具的结果（role 是 tool）写成 Qwen3 的样子：一轮 user，连着的几个
    结果在一轮里，各用 <tool_response> 包着；调用已经写在助手的内容里（tool_text.call_text）。
    """
    start, end = tokenizer.convert_tokens_to_ids([IM_START, IM_END])
    newline = _fixed(tokenizer, "\n")
    input_ids: list[int] = []
    is_answer: list[int] = []
    for role, ids, answer in _encoded_turns(tokenizer, messages):
        header = [start, *_fixed(tokenizer, role + "\n")]
        content = [*ids, end]
        input_ids += header + content + newline
        is_answer += [0] * len(header) + [int(answer)] * len(content) + [0] * len(newline)
    return input_ids, is_answer


def _encoded_turns(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict]
) -> Iterator[tuple[str, list[int], bool]]:
    """→ 每一轮的 (角色, 内容的 token, 学不学)。"""
    texts = [
        disarmed(tokenizer, message["content"]) if message["role"] in UNTRUSTED else message["content"]
        for message in messages
    ]
    results: list[str] = []  # 连着的工具结果
    for number, (message, text, ids) in enumerate(
        zip(messages, texts, encode_texts(tokenizer, texts), strict=True), 1
    ):
        if message["role"] == "tool":
            results.append(text)
            if number == len(messages) or messages[number]["role"] != "tool":
                yield "user", _encode_results(tokenizer, results), False
                results = []
        elif message["role"] in UNTRUSTED:
            yield message["role"], _without_control(tokenizer, text, ids), False
        else:
            yield message["role"], ids, message["role"] == "assistant" and message.get("weight") != 0


def _encode_results(tokenizer: PreTrainedTokenizerBase, results: list[str]) -> list[int]:
    """几个工具结果（经过 disarmed 的）→ ``<tool_response>\\n…\\n</tool_response>``，中间隔一个换行。"""
    control = {word: number for number, word in _control_tokens(tokenizer).items()}
    if not {RESPONSE, RESPONSE_END} <= control.keys():  # 包着结果的也是普通文字
        wrapped = "\n".join(f"{RESPONSE}\n{text}\n{RESPONSE_END}" for text in results)
        return _without_control(tokenizer, wrapped)
    ids: list[int] = []
    for text in results:
        ids += _fixed(tokenizer, "\n") if ids else []
        ids += [control[RESPONSE], *_without_control(tokenizer, f"\n{text}\n"), control[RESPONSE_END]]
    return ids


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> list[int]:
    """生成用的提示：历史消息，加上 ``<|im_start|>assistant\\n``，等模型接着写。"""
    start = tokenizer.convert_tokens_to_ids(IM_START)
    ids, _ = encode_chat(tokenizer, messages)
    return [*ids, start, *_fixed(tokenizer, "assistant\n")]


def answer_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """一个回复的 token，以 <|im_end|> 结尾。"""
    return [*encode_text(tokenizer, text), tokenizer.convert_tokens_to_ids(IM_END)]


def whole_pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """每个 token 的文字。一个字（emoji、生僻字）由几个 token 拼成时，整个字记在最后一个上，前面几个是空的。"""
    pieces: list[str] = []
    waiting: list[int] = []
    for token in ids:
        waiting.append(token)
        text = tokenizer.decode(waiting)
        if (
            "\N{REPLACEMENT CHARACTER}" in text and len(waiting) < 8
        ):  # 一个字至多四个字节；真有坏字节也不永远等
            pieces.append("")
            continue
        pieces.append(text)
        waiting = []
    if waiting:
        pieces[-1] = tokenizer.decode(waiting)
    return pieces
