"""约束解码的掩码要多久：agent/call_grammar.py 的，与 xgrammar，同样的工具、同样的调用、同样的 token，轮流跑，打印一行 JSON。

    python benchmarks/tool_mask.py                             # 会用工具的小模型的分词器
    python benchmarks/tool_mask.py --tokenizer smollm2          # 词表 49,152
    python benchmarks/tool_mask.py --tokenizer 文件夹            # 例如 Qwen3 的分词器，词表 151,669
    python benchmarks/tool_mask.py --record tiny

算的是每个 token：给出许可哪些，再记下写了哪个（盖到 logits 上的那一下两边都不算）。每一轮都从头造文法，写 n 个各不相同的调用：
first 是第一个调用（每个状态都是头一次），mean 是全部的平均，later 是后一半的中位数（状态多半见过了）。
不比快慢也比对错：许可的 token（控制符除外）每步都要一样，不一样就说出来、退出码 1。
"""

from __future__ import annotations

from nlp_common.base.cli import run_main

import argparse
import json
import random
import statistics
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from nlp_common.base.errors import UserError
from nlp_common.lm.automaton import Matcher
from nlp_common.lm.gbnf import parse_grammar
from nlp_common.lm.schema_grammar import schema_to_grammar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "agent"))
from call_grammar import CallGrammar
from tool_examples import TOOLS, random_call


def load(name: str | None):
    if name is None:
        from tiny_agent import build_tokenizer

        return build_tokenizer()
    from nlp_common.hub.models import require_model
    from nlp_common.lm.loading import load_tokenizer

    folder = Path(name).expanduser()
    return load_tokenizer(str(folder) if folder.is_dir() else require_model(name))


def ours(tokenizer, calls: list[list[int]], size: int) -> tuple[float, list[list[float]], list[np.ndarray]]:
    """→ (造文法与词表几毫秒, 每个调用的每个 token 几毫秒, 第一个调用每步的掩码)。"""
    started = time.perf_counter()
    grammar = CallGrammar(TOOLS)
    grammar.matcher = Matcher(parse_grammar(schema_to_grammar(grammar.schema)))  # 不要最后的换行，同 xgrammar
    masks = grammar.masks(tokenizer, size)
    build = 1000 * (time.perf_counter() - started)
    spent, seen = [], []
    for number, ids in enumerate(calls):
        state, row = masks.matcher.start, []
        for token in ids:
            started = time.perf_counter()
            allowed = masks.allowed(state)
            state = masks.next(state, token)
            row.append(1000 * (time.perf_counter() - started))
            if number == 0:
                seen.append(allowed)
        spent.append(row)
    return build, spent, seen


def theirs(tokenizer, calls: list[list[int]], size: int) -> tuple[float, list[list[float]], list[np.ndarray]]:
    """同上，xgrammar 用它自己的办法读同一份 schema（读我们的文法，许可的一样，却慢得多）。"""
    import xgrammar

    schema = json.dumps(CallGrammar(TOOLS).schema, ensure_ascii=False)
    started = time.perf_counter()
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=size)
    compiler = xgrammar.GrammarCompiler(info, max_threads=1)
    compiled = compiler.compile_json_schema(schema, any_whitespace=False, separators=(", ", ": "))
    build = 1000 * (time.perf_counter() - started)
    words = xgrammar.allocate_token_bitmask(1, size)
    spent, seen = [], []
    for number, ids in enumerate(calls):
        matcher, row = xgrammar.GrammarMatcher(compiled), []
        for token in ids:
            started = time.perf_counter()
            matcher.fill_next_token_bitmask(words)
            matcher.accept_token(token)
            row.append(1000 * (time.perf_counter() - started))
            if number == 0:
                bits = words[0].numpy().view(np.uint8)
                seen.append(np.unpackbits(bits, bitorder="little")[:size].astype(bool))
        spent.append(row)
    return build, spent, seen


def summary(rounds: list[tuple[float, list[list[float]], list[np.ndarray]]]) -> dict[str, float]:
    """几轮的中位数。"""
    half = len(rounds[0][1]) // 2
    tokens = [[each for row in spent for each in row] for _, spent, _ in rounds]
    later = [[each for row in spent[half:] for each in row] for _, spent, _ in rounds]
    return {
        "build_ms": statistics.median(build for build, _, _ in rounds),
        "first_ms": statistics.median(statistics.mean(spent[0]) for _, spent, _ in rounds),
        "mean_ms": statistics.median(statistics.mean(each) for each in tokens),
        "later_ms": statistics.median(statistics.median(each) for each in later),
    }


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--tokenizer", help="hub 名、本地文件夹或 smollm2；默认是会用工具的小模型的")
    parser.add_argument("--n", type=int, default=50, help="几个调用")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--record", metavar="名字", help="记进 docs/measurements/agent.jsonl")
    settings = parser.parse_args(argv)
    if min(settings.n, settings.rounds) < 1:
        parser.error("--n、--rounds 都要是正整数")
    tokenizer, rng = load(settings.tokenizer), random.Random(0)
    texts = [json.dumps(random_call(rng), ensure_ascii=False) for _ in range(settings.n)]
    calls = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    size = len(tokenizer)
    runs = {"": ours} | ({"xgrammar_": theirs} if find_spec("xgrammar") else {})
    found: dict[str, list] = {name: [] for name in runs}
    for _ in range(settings.rounds):
        for name, run in runs.items():
            found[name].append(run(tokenizer, calls, size))
    row = {"vocabulary": size, "tokens": sum(map(len, calls))}
    for name, rounds in found.items():
        row |= {f"{name}{key}": round(value, 5) for key, value in summary(rounds).items()}
    if "xgrammar_" in found:
        added = np.zeros(size, dtype=bool)
        added[list(tokenizer.added_tokens_decoder)] = True
        pairs = zip(found[""][0][2], found["xgrammar_"][0][2], strict=True)
        row["different"] = int(sum(((mine != other) & ~added).sum() for mine, other in pairs))
    print(json.dumps(row))
    if row.get("different"):
        raise UserError("两边许可的 token 不一样。")
    if settings.record:
        from nlp_common.base.measurements import record

        record("agent", {f"tool_mask.{settings.record}": row}, unit="", seed=0)
    return row


if __name__ == "__main__":
    run_main(main)
