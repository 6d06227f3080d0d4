"""用户、文档、工具写的字样变不成控制符：Qwen3 的 <tool_call>、<think> 这样加进词表而不算特殊的也一样。

同样的性质在两个分词器上查：这里造的（总能跑），和 Qwen3 自己的（有 ../shared 才跑）。
"""

import copy
import unicodedata
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import normalizers
from transformers import AddedToken

from nlp_common.lm.chatml import (
    END_OF_TEXT,
    IM_END,
    IM_START,
    encode_chat,
    encode_text,
    encode_untrusted,
    prompt_ids,
)
from nlp_common.lm.loading import load_tokenizer

QWEN3 = Path(__file__).resolve().parents[4] / "shared" / "data" / "tokenizers" / "qwen3"
WORDS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
MORE = ["<|fim_prefix|>", "<|repo_name|>", "<|file_sep|>", "<|vision_start|>", END_OF_TEXT]  # Qwen3 另有的
few = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def small(tokenizer):
    """小世界的分词器，加上 Qwen3 那样的字样。"""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens([AddedToken(word, special=False, normalized=False) for word in WORDS])
    return tokenizer


@pytest.fixture(scope="module", params=["small", "qwen3"])
def any_tokenizer(request, small):
    if request.param == "small":
        return small
    if not QWEN3.is_dir():
        pytest.skip("没有 ../shared/data/tokenizers/qwen3")
    return load_tokenizer(str(QWEN3))


def controls(tokenizer):
    return set(tokenizer.added_tokens_decoder)


def test_the_trap_is_real(any_tokenizer):
    """不切就会变成一个控制符：这个测试不成立了，那一刀就可以不要了。"""
    for word in WORDS:
        assert len(encode_text(any_tokenizer, word)) == 1
    assert not controls(any_tokenizer) & set(encode_text(any_tokenizer, "<|im_end|>"))


BITS = [
    "<",
    "</",
    "<tool",
    "_call>",
    "think>",
    "|>",
    "＜tool_call＞",
    "小刚",
    "é😀",
    " ",
    "a\n",
    "\r\n",
    "\x00",
]
ODD = ["\u0338", "\u200b"]  # 组合用的斜线（与 > 拼成一个字）、零宽空格
PIECES = st.lists(st.sampled_from([*WORDS, *MORE, IM_START, IM_END, *BITS, *ODD]) | st.text(max_size=3)).map(
    "".join
)


@few
@given(PIECES)
def test_no_text_becomes_a_control_token(any_tokenizer, text):
    ids = encode_untrusted(any_tokenizer, text)
    assert not controls(any_tokenizer) & set(ids)
    # Qwen 的分词器先做 NFC 规范化
    normal = [unicodedata.normalize("NFC", each) for each in (any_tokenizer.decode(ids), text)]
    assert normal[0] == normal[1]


@few
@given(st.lists(st.tuples(st.sampled_from(["user", "tool"]), PIECES), min_size=1, max_size=4))
def test_a_conversation_holds_only_the_control_tokens_we_wrote(any_tokenizer, said):
    """谁写了什么都一样：控制符的个数只看有几轮、几个结果。"""
    messages = [{"role": "system", "content": "规"}]
    messages += [{"role": role, "content": text} for role, text in said]
    harmless = [{**message, "content": "好"} for message in messages]
    found, expected = (
        [token for token in prompt_ids(any_tokenizer, each) if token in controls(any_tokenizer)]
        for each in (messages, harmless)
    )
    assert found == expected


@given(st.text(max_size=40))
@settings(max_examples=50, deadline=None)
def test_ordinary_text_is_cut_as_before(small, text):
    if not any(word in text for word in WORDS):
        assert encode_untrusted(small, text) == encode_text(small, text)


@pytest.mark.parametrize(("role", "kept"), [("user", 0), ("tool", 0), ("system", 1), ("assistant", 1)])
def test_only_what_others_wrote_is_cut(small, role, kept):
    ids, _ = encode_chat(small, [{"role": role, "content": "<tool_call>小刚"}])
    assert ids.count(small.convert_tokens_to_ids("<tool_call>")) == kept


@pytest.mark.parametrize(
    "flags", [{"normalized": True}, {"lstrip": True, "rstrip": True}, {"single_word": True}]
)
def test_words_that_match_in_other_ways_are_cut_too(tokenizer, flags):
    """字样旁边的空格也吞掉的、规范化之后才认的：照样切开，空格一个不少。"""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens([AddedToken(word, special=False, **flags) for word in WORDS])
    text = "甲  <tool_call>  乙</tool_call><think> 丙"
    ids = encode_untrusted(tokenizer, text)
    assert not controls(tokenizer) & set(ids) and tokenizer.decode(ids) == text


def test_a_word_that_only_appears_after_normalizing_is_cut(tokenizer):
    """先把全角变半角、大写变小写的分词器：原文里找不到那个字样，一个字一个字地切。"""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens([AddedToken(word, special=False, normalized=True) for word in WORDS])
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase()]
    )
    for text in ("＜tool_call＞小刚", "<TOOL_CALL>小刚"):
        assert controls(tokenizer) & set(encode_text(tokenizer, text)), "陷阱不在了"
        ids = encode_untrusted(tokenizer, text)
        assert not controls(tokenizer) & set(ids) and tokenizer.decode(ids) == "<tool_call>小刚"


def test_a_tokenizer_without_such_words_is_untouched(tokenizer):
    """小世界的分词器没有它们：别的字样照写，只有包着调用与结果的四个改写一个字（test_tool_text.py）。"""
    messages = [{"role": "user", "content": "<think>小刚<br>"}, {"role": "assistant", "content": "好"}]
    assert encode_untrusted(tokenizer, "<think>小刚<br>") == encode_text(tokenizer, "<think>小刚<br>")
    ids, is_answer = encode_chat(tokenizer, messages)
    assert len(ids) == len(is_answer)
