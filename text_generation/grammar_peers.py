"""xgrammar 与 llguidance（装了才有）：同一个 JSON schema、同一串 token，它们每步许可哪些 token，花多少时间。

pip install --no-deps xgrammar apache-tvm-ffi llguidance        # 不带依赖：torch、transformers 不动
"""

import json
import time
from importlib.util import find_spec

import numpy as np

from nlp_common.lm.schema_fits import is_json
from nlp_common.lm.schema_grammar import schema_to_grammar
from nlp_common.lm.token_masks import make_masks, token_bytes

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


# ---------------------------------------------------------------- 量


def record_schema(words: dict[str, str], places: list[str]) -> dict:
    """一条记录：几选一、日期、整数、可有可无的说明、数组、真假。words 是各栏的名字。"""
    fields = {
        words["place"]: {"enum": places},
        words["date"]: {"type": "string", "format": "date"},
        words["count"]: {"type": "integer", "minimum": 1, "maximum": 100},
        words["price"]: {"type": "number"},
        words["note"]: {"type": "string", "maxLength": 12},
        words["tags"]: {
            "type": "array",
            "items": {"type": "string", "minLength": 1, "maxLength": 6},
            "maxItems": 3,
        },
        words["done"]: {"type": "boolean"},
    }
    required = [words[name] for name in ("place", "date", "count", "price", "done")]
    return {"type": "object", "properties": fields, "required": required, "additionalProperties": False}


RECORD_FIELDS = ("place", "date", "count", "price", "note", "tags", "done")


def mask_costs(tokenizer, size: int, rounds: int = 20) -> dict[str, float]:
    """同一份 JSON 的 token：我们第一遍（现算）、以后各遍（查表）与装了的两个库，每个 token 平均几毫秒；许可的 token 差几个。"""
    schema = record_schema({name: name for name in RECORD_FIELDS}, ["Paris", "London"])
    schema["required"] = list(schema["properties"])
    document = {"place": "Paris", "date": "2024-02-29", "count": 12, "price": 3.5, "note": "two books"}
    document |= {"tags": ["new", "red"], "done": True}
    ids = tokenizer(json.dumps(document, ensure_ascii=False), add_special_tokens=False)["input_ids"]
    started = time.perf_counter()
    masks = make_masks(schema_to_grammar(schema), tokenizer, size)
    costs = {"vocabulary": float(size), "compile_ms": 1000 * (time.perf_counter() - started)}
    ms, states = [], [masks.matcher.start]
    for _ in range(rounds):
        state = masks.matcher.start
        for token in ids:
            started = time.perf_counter()
            masks.allowed(state)
            ms.append(1000 * (time.perf_counter() - started))
            state = masks.next(state, token)
            if len(states) <= len(ids):
                states.append(state)
    costs["mask_ms_first"], costs["mask_ms"] = (
        float(np.mean(ms[: len(ids)])),
        float(np.median(ms[len(ids) :])),
    )
    costs["mask_ms_mean"] = float(np.mean(ms))
    ours = [masks.allowed(state) for state in states]
    special = np.array([not word for word in masks.words])
    special[masks.stop_ids] = False
    for name in installed():
        found = FOLLOW[name](tokenizer, size, schema, ids)
        both = list(zip(ours, found["masks"], strict=False))
        costs[f"{name}_ms"], costs[f"{name}_compile_ms"] = float(np.mean(found["ms"])), found["compile_ms"]
        # 特殊符号当作文字许可的（xgrammar）另数，不算许可的文字不同
        costs[f"{name}_only"] = float(sum((theirs & ~mine & ~special).sum() for mine, theirs in both))
        costs[f"{name}_special"] = float(sum((theirs & special).sum() for _, theirs in both))
        costs[f"{name}_ours_only"] = float(sum((mine & ~theirs).sum() for mine, theirs in both))
    return costs


def whitespace_lover(tokenizer, size: int, steps: int = 60) -> dict[str, float]:
    """一个只爱写空白的"模型"：空白的得分最高。我们的文法里它没有空白可写；xgrammar 默认许可任意的空白。"""
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    words = token_bytes(tokenizer) + [b""] * (size - len(tokenizer))
    blank = np.array([bool(word) and not word.strip() for word in words])
    masks = make_masks(schema_to_grammar(schema), tokenizer, size)
    state, data = masks.matcher.start, b""
    for step in range(steps):
        mask = masks.allowed(state, steps - step - 2)
        choice = int((np.where(mask, 0.0, -np.inf) + 10 * (blank & mask)).argmax())
        if choice in masks.stop_ids:
            break
        data, state = data + words[choice], masks.next(state, choice)
    found = {"whitespace_lover_valid": float(is_json(data.decode(), schema))}
    if "xgrammar" in installed():
        spaces = tokenizer.encode("{" + " " * 3, add_special_tokens=False)[:1]
        for _ in range(steps):
            allowed = follow_xgrammar(tokenizer, size, schema, spaces, any_whitespace=True)["masks"][-1]
            if not (allowed & blank).any():
                break
            spaces.append(int(np.flatnonzero(allowed & blank)[0]))
        found["whitespace_lover_valid_xgrammar"] = float(is_json(tokenizer.decode(spaces), schema))
    return found
