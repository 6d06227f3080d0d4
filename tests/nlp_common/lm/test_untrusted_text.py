"""用户、文档、工具写的字样变不成控制符：Qwen3 的 <tool_call>、<think> 这样加进词表而不算特殊的也一样。"""

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AddedToken

from nlp_common.lm.chatml import IM_END, IM_START, encode_chat, encode_text, encode_untrusted

WORDS = ["<tool_call>", "</tool_call>", "<tool_response>", "<think>", "</think>"]


@pytest.fixture(scope="module")
def qwen3(tokenizer):
    """小世界的分词器，加上 Qwen3 那样的字样。"""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens([AddedToken(word, special=False, normalized=False) for word in WORDS])
    return tokenizer


def controls(tokenizer):
    return set(tokenizer.added_tokens_decoder)


def test_the_trap_is_real(qwen3):
    """不切就会变成一个控制符：这个测试不成立了，那一刀就可以不要了。"""
    assert len(encode_text(qwen3, "<tool_call>")) == 1
    assert not controls(qwen3) & set(encode_text(qwen3, "<|im_end|>"))


PIECES = st.lists(
    st.sampled_from([*WORDS, IM_START, IM_END, "<", "<tool", "_call>", "小刚", "think>", " ", "a\n", "é😀"])
)


@given(PIECES.map("".join))
@settings(max_examples=200, deadline=None)
def test_no_text_becomes_a_control_token(qwen3, text):
    ids = encode_untrusted(qwen3, text)
    assert not controls(qwen3) & set(ids)
    assert qwen3.decode(ids) == text


@given(st.text(max_size=40))
@settings(max_examples=50, deadline=None)
def test_ordinary_text_is_cut_as_before(qwen3, text):
    if not any(word in text for word in WORDS):
        assert encode_untrusted(qwen3, text) == encode_text(qwen3, text)


@pytest.mark.parametrize(("role", "kept"), [("user", 0), ("tool", 0), ("system", 1), ("assistant", 1)])
def test_only_what_others_wrote_is_cut(qwen3, role, kept):
    ids, _ = encode_chat(qwen3, [{"role": role, "content": "<tool_call>小刚"}])
    assert ids.count(qwen3.convert_tokens_to_ids("<tool_call>")) == kept


def test_a_tokenizer_without_such_words_is_untouched(tokenizer):
    messages = [{"role": "user", "content": "<tool_call>小刚<think>"}, {"role": "assistant", "content": "好"}]
    assert encode_untrusted(tokenizer, "<tool_call>") == encode_text(tokenizer, "<tool_call>")
    ids, is_answer = encode_chat(tokenizer, messages)
    assert len(ids) == len(is_answer)
