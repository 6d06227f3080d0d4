"""ChatML：把消息变成 token，并标出哪些 token 是助手说的。

<|im_start|>user\\n你好<|im_end|>\\n<|im_start|>assistant\\n你好！<|im_end|>\\n
                                                        └ 只有这一段（含 <|im_end|>）算损失 ┘

各家分词器自带的模板多半没有 {% generation %} 标记，助手掩码会全是 0；所以掩码由我们自己拼：
一段一段地分词，角色头不算损失，助手的内容和 <|im_end|> 算。
"""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
UNTRUSTED = ("user", "tool")  # 这几种角色的话是别人写的；system 是开发者写的，assistant 是模型写的

# Qwen 的 ChatML；只有一处不同：不自动补 "You are a helpful assistant." 的 system 消息。
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\\n' }}{% endif %}"
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
    """用户、文档、工具写的内容 → token：什么控制符也不会冒出来。

    encode_text 只切开"特殊"的控制符；Qwen3 的 <tool_call>、<think> 是加进词表而不算特殊的，照样会变成一个控制符。
    在每个这样的字样里面切一刀，两边分开分词，就只是普通文字。
    """
    pattern = _added_words(tokenizer)
    cuts = [found.start() + 1 for found in pattern.finditer(text)] if pattern else []
    if not cuts:
        return encode_text(tokenizer, text)
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    return [token for ids in encode_texts(tokenizer, pieces) for token in ids]


@functools.lru_cache(maxsize=64)
def _added_words(tokenizer: PreTrainedTokenizerBase) -> re.Pattern | None:
    """加进词表而不算特殊的那些字样；一个字的切不开，不在内。向前看着匹配，重叠的也一个不漏。"""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    words = sorted({token.content for token in added if not token.special and len(token.content) > 1})
    return re.compile("(?=" + "|".join(map(re.escape, words)) + ")") if words else None


@functools.lru_cache(maxsize=64)
def _fixed(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """角色名、换行这些每段对话都有的文字，只分一次词。"""
    return encode_text(tokenizer, text)


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> tuple[list[int], list[int]]:
    """一段对话 → (input_ids, is_answer)，等长；is_answer 为 1 的是助手说的内容和它后面的 <|im_end|>。

    weight 是 0 的一轮（data/turns.py）只是上文，不学。
    """
    start, end = tokenizer.convert_tokens_to_ids([IM_START, IM_END])
    newline = _fixed(tokenizer, "\n")
    input_ids: list[int] = []
    is_answer: list[int] = []
    contents = encode_texts(tokenizer, [message["content"] for message in messages])
    for message, ids in zip(messages, contents, strict=True):
        if message["role"] in UNTRUSTED and _added_words(tokenizer):
            ids = encode_untrusted(tokenizer, message["content"])
        header = [start, *_fixed(tokenizer, message["role"] + "\n")]
        content = [*ids, end]
        answer = int(message["role"] == "assistant" and message.get("weight") != 0)
        input_ids += header + content + newline
        is_answer += [0] * len(header) + [answer] * len(content) + [0] * len(newline)
    return input_ids, is_answer


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
