"""束搜索的快慢：text_generation/decoding_search.py 手写的，与 transformers 的 generate，同一个模型、同样的开头，轮流跑，打印一行 JSON。

    python benchmarks/decoding.py                            # 没训练过的小 Qwen，批 8、束 4、写 64 个 token
    python benchmarks/decoding.py --model smollm2 --rounds 2 --max_new_tokens 16
    python benchmarks/decoding.py --record beam8

不比快慢也比对错：两边写出的 token、分数都要一样，不一样就说出来、退出码 1。ratio 是 我们每秒的 token ÷ 它的，各轮比值的中位数。
"""

from __future__ import annotations

from nlp_common.base.cli import run_main

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from nlp_common.hub.models import require_model
from nlp_common.lm.generation import pad_left, stop_tokens
from nlp_common.lm.loading import load_plain_lm
from nlp_common.tiny import qwen, world

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "text_generation"))
from decoding_search import beam_search


def load(name: str | None):
    """→ (分词器, 模型)：给的模型，没给就是没训练过的小 Qwen（快慢与训练没有关系）。"""
    if name:
        return load_plain_lm(require_model(name))
    with tempfile.TemporaryDirectory() as folder:
        qwen.save_tiny_base(Path(folder), 0)
        return load_plain_lm(folder)


def ours(model, ids, mask, settings, stops: list[int]) -> tuple[list[list[int]], list[float]]:
    found = beam_search(model, ids, mask, settings.beams, settings.max_new_tokens, stops)
    return [paths[0].ids for paths in found], [paths[0].score for paths in found]


def theirs(model, ids, mask, settings, stops: list[int]) -> tuple[list[list[int]], list[float]]:
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        num_beams=settings.beams,
        do_sample=False,
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=stops,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    rows = []
    for row in out.sequences[:, ids.shape[1] :].tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
        rows.append(row[:end])
    return rows, out.sequences_scores.tolist()


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", help="hub 名、本地文件夹或 smollm2；默认是没训练过的小 Qwen")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--beams", type=int, default=4)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--record", metavar="名字", help="记进 docs/measurements/text_generation.jsonl")
    settings = parser.parse_args(argv)
    if min(settings.batch, settings.beams, settings.max_new_tokens, settings.rounds) < 1:
        parser.error("--batch、--beams、--max_new_tokens、--rounds 都要是正整数")
    tokenizer, model = load(settings.model)
    model.eval()
    texts = [row["text"][: 20 + 3 * i] for i, row in enumerate(world.documents(settings.batch, 0))]
    ids, mask = pad_left([tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts], 0)
    stops = stop_tokens(tokenizer)
    speeds: dict[str, list[float]] = {"ours": [], "transformers": []}
    for _ in range(settings.rounds):
        results = {}
        for name, run in (("ours", ours), ("transformers", theirs)):
            started = time.perf_counter()
            results[name] = run(model, ids, mask, settings, stops)
            seconds = time.perf_counter() - started
            speeds[name].append(sum(map(len, results[name][0])) / seconds)
    same_ids = results["ours"][0] == results["transformers"][0]
    off = max(abs(a - b) for a, b in zip(results["ours"][1], results["transformers"][1], strict=True))
    ratios = [a / b for a, b in zip(speeds["ours"], speeds["transformers"], strict=True)]
    row = {
        "tokens_per_s": round(statistics.median(speeds["ours"])),
        "transformers_tokens_per_s": round(statistics.median(speeds["transformers"])),
        "ratio": round(statistics.median(ratios), 2),
        "same": float(same_ids),
        "max_score_difference": off,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(row))
    if not same_ids:
        print("两边写出的不一样。", file=sys.stderr)
        sys.exit(1)
    if settings.record:
        from nlp_common.base.measurements import record

        record("text_generation", {settings.record: row}, seed=0)
    return row


if __name__ == "__main__":
    run_main(main)
