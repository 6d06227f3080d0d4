"""电脑同时在做别的事时慢多少：旁边有两个一直在算的单线程程序，训练一小段 SFT、一小段 PPO。

torch 的线程（OpenMP）算完自己那份，先空转着等别的线程，等久了才睡。机器空着时这样最快；旁边有别的程序时，
空转的占着核，要等的那个线程反而轮不上。nlp_common/base/environment.py 把空转的次数（GOMP_SPINCOUNT）设得很小。

每个阶段、每种线程数打印一行 JSON，秒数是整个命令的（含启动），各取几轮的中位数，几种情形轮流跑：

- quiet_s、busy_s：读者得到的设置，安静时与旁边有两个程序时；slowdown 是两者的比；
- quiet_default_s、busy_default_s：OpenMP 自己的默认（空转 300,000 次）；
- quiet_cost：安静时我们的设置比默认的慢多少（负的是快）。

    python benchmarks/busy.py                              # 约 12 分钟；机器上不要有别的程序
    python benchmarks/busy.py --stages sft --threads 2 --rounds 1
    python benchmarks/busy.py --spin 0 10000               # 再看别的空转次数
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
QWEN = ROOT / "qwen_chinese_finetune"
OPENMP_DEFAULT = "300000"
LIMIT_S = 600

# 阶段 → 只走几步的命令；上一阶段的模型在 folder 里
STEPS = {
    "sft": ["sft_chinese_qwen.py", "--max_steps", "80", "--max_eval_samples", "64"],
    "ppo": ["ppo_alignment.py", "--max_steps", "4", "--max_eval_samples", "64"],
}


def train_parents(folder: Path) -> None:
    """SFT 的起点与 PPO 的起点、奖励模型：只训练几步，快慢与训练得好不好无关。"""
    short = ["--max_steps", "60", "--max_eval_samples", "64"]
    for stage, script in (
        ("pretrain", "pretrain_chinese-nvidia.py"),
        ("sft", "sft_chinese_qwen.py"),
        ("reward", "reward_model.py"),
    ):
        run([script, *short, "--output_dir", str(folder / stage)], {}, folder)


def run(command: list[str], environment: dict[str, str], folder: Path) -> float:
    """跑一个脚本，返回秒数。"""
    words = [sys.executable, str(QWEN / command[0]), "--preset", "tiny", *command[1:]]
    started = time.perf_counter()
    done = subprocess.run(
        words, env=os.environ | environment, capture_output=True, text=True, timeout=LIMIT_S, cwd=folder
    )
    if done.returncode:
        sys.exit(f"{command[0]} 没有跑完：\n{done.stderr[-2000:]}")
    return time.perf_counter() - started


@contextlib.contextmanager
def busy_programs(n: int) -> Iterator[None]:
    """n 个一直在算的单线程程序。"""
    programs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


def measure(stage: str, threads: int, spins: list[str], rounds: int, folder: Path) -> dict[str, float]:
    """各种情形轮流跑 rounds 轮 → ``{"quiet_s", "busy_s", …}``，中位数。空的 spin 是读者得到的设置。"""
    seconds: dict[str, list[float]] = {}
    for _ in range(rounds):
        for spin in spins:
            for situation, others in (("quiet", 0), ("busy", 2)):
                environment = {"OMP_NUM_THREADS": str(threads)}
                if spin:
                    environment["GOMP_SPINCOUNT"] = spin
                label = {"": "", OPENMP_DEFAULT: "_default"}.get(spin, f"_spin_{spin}")
                out = ["--output_dir", str(folder / f"busy-{stage}"), "--retrain"]
                with busy_programs(others):
                    taken = run([*STEPS[stage], *out], environment, folder)
                seconds.setdefault(f"{situation}{label}_s", []).append(taken)
    return {name: round(statistics.median(values), 1) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", nargs="+", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--spin", nargs="*", default=[], help="另外再试的 GOMP_SPINCOUNT")
    parser.add_argument("--record", action="store_true", help="记进 docs/measurements")
    args = parser.parse_args()
    from nlp_common.base.measurements import record

    os.environ.pop("GOMP_SPINCOUNT", None)  # 导入 nlp_common 时设了；子进程要的是读者的环境
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        train_parents(folder)
        for stage in args.stages:
            for threads in args.threads:
                row = measure(stage, threads, ["", OPENMP_DEFAULT, *args.spin], args.rounds, folder)
                row["slowdown"] = round(row["busy_s"] / row["quiet_s"], 2)
                row["quiet_cost"] = round(row["quiet_s"] / row["quiet_default_s"] - 1, 3)
                print(json.dumps({"stage": stage, "threads": threads, **row}), flush=True)
                if args.record:
                    units = {"slowdown": "ratio", "quiet_cost": "fraction"}
                    record("qwen", {f"busy.{stage}.threads_{threads}": row}, unit=units)


if __name__ == "__main__":
    main()
