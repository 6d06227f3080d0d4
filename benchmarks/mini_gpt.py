"""MiniGPT 的速度与质量：运行读者运行的那个脚本，打印一行 JSON。

    python benchmarks/mini_gpt.py --data input.txt                       # mini_gpt.py --recipe fast
    python benchmarks/mini_gpt.py --data input.txt --recipe gpt2         # 其余参数原样交给 mini_gpt.py
    python benchmarks/mini_gpt.py --data input.txt --nanogpt ~/nanoGPT   # 同一次里也跑 nanoGPT（你自己的克隆）
    python benchmarks/mini_gpt.py --data input.txt --nanogpt ~/nanoGPT --pairs 6   # 只比速度，两边轮流跑

tokens_per_s 是训练的每秒字数（不算评测）；wall_s 是整条命令的秒数（导入、评测、存检查点都算）；val_loss 是最后的验证 loss；
seconds_to_1_88 是从敲回车到验证 loss 第一次不高于 1.88 的秒数，没有到就是 null。
--pairs N：默认的 --recipe gpt2（AdamW，12 段），只把两样改得和 nanoGPT 的这份配置一样：没有偏置、精确的 GELU。两边轮流各跑 300 步，
共 N 对；speed_ratio 是各对比值的中位数。机器一阵忙一阵闲，只有轮流跑才比得出差百分之几的两样东西。
nanoGPT 用它 README 里写的 CPU 配置；它的验证 loss 是随机 20 批的平均，我们的是整个验证集（同样的后 10%）。
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "gpt" / "mini_gpt.py"
GOAL = 1.88
# nanoGPT 的 README 里 “I only have a macbook / CPU” 一节的命令；log_interval=1 也是它写的。
NANOGPT = (
    "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 "
    "--block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 "
    "--lr_decay_iters=2000 --dropout=0.0"
)


def timed_lines(command: list[str], folder: Path | None = None):
    """运行命令，逐行产出 (从开始算起的秒数, 这一行)；失败就把它说的话印出来并退出。"""
    started = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8"
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        yield time.perf_counter() - started, line
    if process.wait():
        sys.exit(f"没有跑完：{' '.join(command)}\n{''.join(lines[-20:])}")


def summary(losses: list[tuple[float, float]], wall: float, tokens_per_s: float) -> dict:
    """losses 是 [(秒, 验证 loss), …]。"""
    reached = next((seconds for seconds, loss in losses if loss <= GOAL), None)
    return {
        "tokens_per_s": round(tokens_per_s),
        "wall_s": round(wall, 1),
        "val_loss": losses[-1][1],
        "seconds_to_1_88": reached and round(reached, 1),
    }


def run_ours(data: str, options: list[str]) -> dict:
    losses, speeds, wall = [], [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-u", str(SCRIPT), "--data", data, "--out", f"{folder}/mini_gpt.pt"]
        command += ["--recipe", "fast", "--max_new_tokens", "1", "--eval_every", "100", *options]
        for wall, line in timed_lines(command):
            if found := re.search(r"验证 ([\d.]+)  ([\d,]+) 字/秒", line):
                losses.append((wall, float(found[1])))
                speeds.append(float(found[2].replace(",", "")))
    return summary(losses, wall, statistics.harmonic_mean(speeds))


def prepare_nanogpt(folder: Path, data: str) -> None:
    """数据放进读者自己的克隆的 data/shakespeare_char，用它自己的 prepare.py。"""
    dataset = folder / "data" / "shakespeare_char"
    shutil.copyfile(data, dataset / "input.txt")
    list(timed_lines([sys.executable, "prepare.py"], dataset))


def run_nanogpt(folder: Path, *options: str) -> dict:
    """用它自己的 train.py。每秒字数和我们的一样是平均：它每 250 步评测一次，那一步的用时把评测也算了进去，不要。"""
    losses, times, wall = [], [], 0.0
    with tempfile.TemporaryDirectory() as out:
        for wall, line in timed_lines(
            [sys.executable, "-u", "train.py", *NANOGPT.split(), *options, f"--out_dir={out}"], folder
        ):
            if found := re.match(r"step \d+: train loss [\d.]+, val loss ([\d.]+)", line):
                losses.append((wall, float(found[1])))
            elif (found := re.match(r"iter (\d+): .* time ([\d.]+)ms", line)) and int(found[1]) % 250:
                times.append(float(found[2]))
    return summary(losses, wall, 12 * 64 / statistics.mean(times) * 1000)


def run_pairs(folder: Path, data: str, options: list[str], count: int) -> dict:
    speeds = {"ours": [], "nanogpt": []}
    same = ["--recipe", "gpt2", "--batch", "12", "--no-bias", "--activation", "gelu"]
    same += ["--steps", "300", "--eval_every", "300"]
    for _ in range(count):
        speeds["ours"].append(run_ours(data, [*same, *options])["tokens_per_s"])
        speeds["nanogpt"].append(run_nanogpt(folder, "--max_iters=300")["tokens_per_s"])
    ratios = [round(ours / peer, 3) for ours, peer in zip(*speeds.values(), strict=True)]
    return speeds | {"ratios": ratios, "speed_ratio": round(statistics.median(ratios), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data", required=True, help="文本文件，例如 tinyshakespeare 的 input.txt")
    parser.add_argument("--nanogpt", type=Path, help="nanoGPT 的文件夹（git clone 下来的）")
    parser.add_argument("--pairs", type=int, help="只比速度：和 nanoGPT 轮流跑这么多对")
    parser.add_argument(
        "--record", metavar="名字", help="记进 docs/measurements，名字如 fast、fast_360、gpt2"
    )
    args, options = parser.parse_known_args()
    if args.pairs is not None and (args.pairs < 1 or not args.nanogpt):
        parser.error("--pairs 要是正整数，并且要用 --nanogpt 给出 nanoGPT 的文件夹")
    if args.nanogpt:
        nanogpt = args.nanogpt.resolve()
        prepare_nanogpt(nanogpt, args.data)
    if args.pairs:
        row = run_pairs(nanogpt, args.data, options, args.pairs)
    elif args.nanogpt:
        row, peer = run_ours(args.data, options), run_nanogpt(nanogpt)
        row["nanogpt"] = peer
        row["speed_ratio"] = round(row["tokens_per_s"] / peer["tokens_per_s"], 2)
        row["wall_ratio"] = round(row["wall_s"] / peer["wall_s"], 2)
    else:
        row = run_ours(args.data, options)
    print(json.dumps(row))
    if args.record:
        from nlp_common.base.measurements import record

        record("gpt", {args.record: row}, unit={"seconds_to_1_88": "s"}, seed=0)


if __name__ == "__main__":
    main()
