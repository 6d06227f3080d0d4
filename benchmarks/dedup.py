"""去重的速度与内存：alignment_ops/minhash.py 对 datasketch，同样的文字、同样的 n 元组、同样的 K 与切法，一个线程。

用法：python benchmarks/dedup.py [--rounds 5] [--record ops.dedup]
打印一行 JSON，没有达到目标退出码 1：
  signatures  一段文字 → 128 个最小数，每秒几段，是 datasketch（MinHash.bulk，默认的 sha1）的几倍；另与它换成 crc32 的比
  duplicates  从文字到一张重复的表，每秒几段，是 datasketch（MinHash + MinHashLSH，也按次序、只与留下的比）的几倍
  stream      放不进内存的文件（默认 60 与 240 MB）：big_files.py 另开一个进程，内存的峰值与文件的大小无关
文字是《人民日报》里随机的句子接成的 400 字，五分之一是改了几个字的。要空闲的 Linux 机器，约三分钟；要 pip install datasketch。
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from statistics import median

os.environ["OMP_NUM_THREADS"] = "1"  # 要在导入 numpy 之前
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "alignment_ops"), str(ROOT)]
GOALS = {"times_signatures": 3.0, "times_duplicates": 3.0}
MOST_GROWTH_MB = 25.0  # 文件大四倍，内存的峰值至多多这些
SIZE, SHARE = 400, 0.2  # 一段几个字；几成是改过的
STREAM = """
import json, re, sys, time
from pathlib import Path
sys.path[:0] = sys.argv[3:]
from big_files import find_in_files

def peak_memory_mb():
    return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

before, started = peak_memory_mb(), time.perf_counter()
found = sum(1 for _ in find_in_files([sys.argv[1]], scratch=sys.argv[2], memory_mb=32))
print(json.dumps({"found": found, "seconds": time.perf_counter() - started, "before": before, "peak": peak_memory_mb()}))
"""


def texts(seed: int) -> Iterator[str]:
    """没有尽头：随机几句话接起来，或者前一百段里的一段改了百分之一的字。"""
    from nlp_common.data.people_daily import people_daily

    sentences = re.findall("[^。]{10,}。", "".join(row["text"] for row in people_daily("train")))
    rng, recent = random.Random(seed), []
    while True:
        if len(recent) == 100 and rng.random() < SHARE:
            letters = list(rng.choice(recent))
            for _ in range(SIZE // 100):
                letters[rng.randrange(SIZE)] = "的"
            yield "".join(letters)
            continue
        text = ""
        while len(text) < SIZE:
            text += rng.choice(sentences)
        recent = [*recent[-99:], text[:SIZE]]
        yield recent[-1]


def ngrams(clean: str, n: int) -> set[bytes]:
    return {clean[start : start + n].encode() for start in range(max(len(clean) - n + 1, 1))}


def their_signatures(clean: list[str], n: int, **options) -> list:
    from datasketch import MinHash

    return MinHash.bulk([ngrams(text, n) for text in clean], num_perm=128, **options)


def their_duplicates(rows: list[str], scheme) -> list[int]:
    """datasketch 自己的两样拼成同样的规矩：按次序，与留下的像就丢掉。"""
    from datasketch import MinHashLSH

    from minhash import normalize

    index = MinHashLSH(num_perm=128, params=(scheme.bands, scheme.rows))
    kept, dropped = {}, []
    clean = [normalize(text) for text in rows]
    for number, sketch in enumerate(their_signatures(clean, scheme.n)):
        others = [kept[other] for other in index.query(sketch)]
        if any(sketch.jaccard(other) >= scheme.threshold for other in others):
            dropped.append(number)
        else:
            index.insert(number, sketch)
            kept[number] = sketch
    return dropped


def seconds_of(work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def compare(rows: list[str], rounds: int) -> dict:
    import minhash

    scheme = minhash.make_scheme(0.8)
    clean = [minhash.normalize(text) for text in rows]
    works = {
        "signatures": lambda: minhash.signatures(clean, scheme),
        "signatures_datasketch": lambda: their_signatures(clean, scheme.n),
        "signatures_crc32": lambda: their_signatures(clean, scheme.n, hashfunc=zlib.crc32),
        "duplicates": lambda: minhash.find_duplicates(rows),
        "duplicates_datasketch": lambda: their_duplicates(rows, scheme),
    }
    ours = {each.dropped for each in minhash.find_duplicates(rows)}
    theirs = set(their_duplicates(rows, scheme))
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):  # 轮流跑：机器忽快忽慢时两边一起变
        for name, work in works.items():
            seconds[name].append(seconds_of(work))

    def times(theirs: str, ours: str) -> float:
        return round(median(b / a for a, b in zip(seconds[ours], seconds[theirs], strict=True)), 2)

    found: dict = {f"{name}_rows_per_s": round(len(rows) / median(each)) for name, each in seconds.items()}
    return found | {
        "times_signatures": times("signatures_datasketch", "signatures"),
        "times_signatures_crc32": times("signatures_crc32", "signatures"),
        "times_duplicates": times("duplicates_datasketch", "duplicates"),
        "dropped": len(ours),
        "dropped_datasketch": len(theirs),
        "dropped_by_both": len(ours & theirs),
    }


def stream(megabytes: int) -> dict:
    """写一个这么大的 jsonl，另开一个进程去重，量它的内存。"""
    with tempfile.TemporaryDirectory() as folder:
        path, rows = Path(folder) / "big.jsonl", 0
        with path.open("w", encoding="utf-8") as file:
            for text in texts(1):
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                rows += 1
                if file.tell() >= megabytes << 20:
                    break
        command = [sys.executable, "-c", STREAM, str(path), folder, *sys.path[:2]]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"去重没有做完：{done.stderr[-500:]}")
        found = json.loads(done.stdout)
    return {
        "file_mb": megabytes,
        "rows": rows,
        "found": found["found"],
        "start_memory_mb": round(found["before"]),
        "peak_memory_mb": round(found["peak"]),
        "rows_per_s": round(rows / found["seconds"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=2000, help="比速度用几段")
    parser.add_argument("--rounds", type=int, default=5, help="轮流跑几轮")
    parser.add_argument("--big_mb", type=int, default=240, help="大文件多少 MB；小的是它的四分之一")
    parser.add_argument("--record", help="记进 docs/measurements，例如 ops.dedup")
    args = parser.parse_args()
    if find_spec("datasketch") is None:
        raise SystemExit("错误：要与 datasketch 比，先 pip install datasketch。")
    source = texts(0)
    result = compare([next(source) for _ in range(args.rows)], args.rounds)
    small, big = stream(args.big_mb // 4), stream(args.big_mb)
    result |= {"small": small, "big": big, "goals": {**GOALS, "memory_growth_mb": MOST_GROWTH_MB}}
    print(json.dumps(result, ensure_ascii=False))
    if args.record:
        from nlp_common.base.measurements import numbers_in, record, split_prefix

        topic, rest = split_prefix(args.record)
        del result["goals"]
        record(topic, numbers_in(result, f"{rest}."), unit={"file_mb": "MB"})
    missed = [name for name, goal in GOALS.items() if result[name] < goal]
    missed += ["memory"] if big["peak_memory_mb"] - small["peak_memory_mb"] > MOST_GROWTH_MB else []
    if missed:
        raise SystemExit(f"没有达到目标：{'、'.join(missed)}")


if __name__ == "__main__":
    main()
