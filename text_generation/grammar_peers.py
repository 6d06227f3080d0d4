"""xgrammar 与 llguidance（装了才有）：同一个 JSON schema、同一串 token，它们每步许可哪些 token，花多少时间。

pip install --no-deps xgrammar apache-tvm-ffi llguidance        # 不带依赖：torch、transformers 不动
"""

import json
import time
from importlib.util import find_spec

import numpy as np

SEPARATORS = (", ", ": ")  # 与 schema_grammar.py 相同的唯一一种空白


def installed() -> list[str]:
    """两个包里装了的；xgrammar 还要 tvm_ffi 才导入得了。"""
    needs = {"xgrammar": ("xgrammar", "tvm_ffi"), "llguidance": ("llguidance",)}
    return [name for name, parts in needs.items() if all(find_spec(part) for part in parts)]


def unpack(words: np.ndarray, size: int) -> np.ndarray:
    """一位一个 token 的 int32 → (V,) 的真假。"""
    return np.unpackbits(words.view(np.uint8), bitorder="little")[:size].astype(bool)


def follow_xgrammar(tokenizer, size: int, schema: dict, ids: list[int], any_whitespace: bool = False) -> dict:
    """→ {"masks": 每步的 (V,), "ms": 每步几毫秒, "compile_ms"}；ids 是一份合法的文字的 token。"""
    import torch
    import xgrammar

    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=size)
    compiler = xgrammar.GrammarCompiler(info, max_threads=1)
    started = time.perf_counter()
    if any_whitespace:
        compiled = compiler.compile_json_schema(json.dumps(schema))
    else:
        compiled = compiler.compile_json_schema(
            json.dumps(schema), any_whitespace=False, separators=SEPARATORS
        )
    compile_ms = 1000 * (time.perf_counter() - started)
    matcher = xgrammar.GrammarMatcher(compiled)
    words = xgrammar.allocate_token_bitmask(1, size)
    masks, ms = [], []
    for token in [*ids, None]:
        started = time.perf_counter()
        matcher.fill_next_token_bitmask(words)
        ms.append(1000 * (time.perf_counter() - started))
        masks.append(unpack(words[0].to(torch.int32).numpy(), size))
        if token is not None and not matcher.accept_token(token):
            break
    return {"masks": masks, "ms": ms, "compile_ms": compile_ms}


def follow_llguidance(
    tokenizer, size: int, schema: dict, ids: list[int], any_whitespace: bool = False
) -> dict:
    """同上。"""
    import llguidance
    import llguidance.hf

    info = llguidance.hf.from_tokenizer(tokenizer, n_vocab=size)
    options = (
        {}
        if any_whitespace
        else {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    )
    started = time.perf_counter()
    grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=options)
    matcher = llguidance.LLMatcher(info, grammar)
    compile_ms = 1000 * (time.perf_counter() - started)
    masks, ms = [], []
    for token in [*ids, None]:
        started = time.perf_counter()
        words = matcher.compute_bitmask()
        ms.append(1000 * (time.perf_counter() - started))
        masks.append(unpack(np.frombuffer(words, dtype=np.int32), size))
        if token is not None and not matcher.consume_token(token):
            break
    return {"masks": masks, "ms": ms, "compile_ms": compile_ms}


FOLLOW = {"xgrammar": follow_xgrammar, "llguidance": follow_llguidance}
