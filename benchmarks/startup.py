"""simple_demo 五个脚本从敲下回车到结束要多久，除以 `python -c "import torch"` 的时间。

用法：python benchmarks/startup.py [--repeat 5]
打印一行 JSON：每个脚本的秒数（重复几次取中位数）和倍数；goal 是要求的上限，within_goal 说是否都达到。
每一轮都先量一次 import torch，再量五个脚本，机器忽快忽慢时分子分母一起变。
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

FOLDER = Path(__file__).resolve().parents[1] / "simple_demo"
SCRIPTS = [
    "minimal_word_embedding_train.py",
    "simple_sentiment_classifier.py",
    "rnn_text_classifier.py",
    "transformer_sentiment_classification.py",
    "transformer_encoder_classifier.py",
]
GOAL = 3.0


def wall_seconds(arguments: list[str], folder: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=5, help="每个脚本量几次，取中位数（1 以上）")
    parser.add_argument("--record", action="store_true", help="记进 docs/measurements")
    args = parser.parse_args()
    repeat = args.repeat
    if repeat < 1:
        parser.error(f"--repeat 要 1 以上，现在是 {repeat}")
    seconds: dict[str, list[float]] = {name: [] for name in ["import torch", *SCRIPTS]}
    with tempfile.TemporaryDirectory() as folder:
        for name in SCRIPTS:
            shutil.copy(FOLDER / name, folder)
        for round_number in range(repeat + 1):
            for name in seconds:
                arguments = ["-c", name] if name == "import torch" else [name]
                measured = wall_seconds(arguments, folder)
                if round_number > 0:  # 第 0 轮只为把文件读进系统缓存，不算
                    seconds[name].append(measured)
    base = median(seconds["import torch"])
    result = {
        "benchmark": "startup",
        "import_torch_seconds": round(base, 3),
        "seconds": {name: round(median(seconds[name]), 3) for name in SCRIPTS},
        "times_import_torch": {name: round(median(seconds[name]) / base, 2) for name in SCRIPTS},
        "goal": GOAL,
        "within_goal": all(median(seconds[name]) / base <= GOAL for name in SCRIPTS),
        "repeat": repeat,
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "torch": version("torch"),
    }
    print(json.dumps(result, ensure_ascii=False))
    if args.record:
        from nlp_common.base.measurements import record

        names = ("import_torch_seconds", "times_import_torch")
        record("simple_demo", {"startup": {name: result[name] for name in names}})


if __name__ == "__main__":
    main()
