"""CRF 的速度：我们的 custom autograd function（sequence_labeling/crf.py）对 pytorch-crf，同样的分数、标签、长度。

用法：python benchmarks/crf.py [--rounds 5] [--record sequence_labeling.crf]
打印一行 JSON：训练（前向加反向）与解码每秒几句，我们是它的几倍（几轮轮流跑的中位数），以及损失、梯度、解码是不是一样。
两种大小：批 32 × 40 字 × 28 个标签（实体），与 32 × 40 × 100（连词性一起标）。要空闲的机器；要 pip install pytorch-crf==0.7.2。
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "sequence_labeling"))
GOALS = {"times_training": 2.5, "times_decoding": 1.5}
SIZES = {"28_tags": (32, 40, 28), "100_tags": (32, 40, 100)}  # 批、字、标签


def make(n_rows: int, n_steps: int, n_tags: int, shortest: int):
    """同一组参数的两个 CRF，与一批随机的分数、标签、长度。"""
    import torch
    import torchcrf

    from crf import CRF

    torch.manual_seed(0)
    ours, theirs = CRF(n_tags), torchcrf.CRF(n_tags, batch_first=True)
    pairs = ((ours.start, theirs.start_transitions), (ours.transitions, theirs.transitions))
    for mine, other in (*pairs, (ours.end, theirs.end_transitions)):
        torch.nn.init.normal_(mine)
        other.data.copy_(mine.data)
    emissions = 2 * torch.randn(n_rows, n_steps, n_tags)
    tags = torch.randint(n_tags, (n_rows, n_steps))
    lengths = torch.randint(shortest, n_steps + 1, (n_rows,))
    return ours, theirs, emissions, tags, lengths, torch.arange(n_steps) < lengths[:, None]


def seconds_of(work, repeats: int) -> float:
    started = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - started) / repeats


def measure(size: tuple[int, int, int], rounds: int, repeats: int) -> dict:
    ours, theirs, emissions, tags, lengths, mask = make(*size, shortest=size[1] // 2)
    left, right = emissions.clone().requires_grad_(), emissions.clone().requires_grad_()

    def train_ours():
        left.grad = None
        ours(left, tags, lengths).sum().backward()

    def train_theirs():
        right.grad = None
        (-theirs(right, tags, mask, reduction="sum")).backward()

    works = {
        "training": (train_ours, train_theirs),
        "decoding": (lambda: ours.decode(emissions, lengths), lambda: theirs.decode(emissions, mask)),
    }
    found: dict = {}
    for name, (mine, other) in works.items():
        mine(), other()  # 热身
        ratios, speeds = [], []
        for _ in range(rounds):  # 轮流跑：机器忽快忽慢时两边一起变
            a, b = seconds_of(mine, repeats), seconds_of(other, repeats)
            ratios.append(b / a)
            speeds.append((size[0] / a, size[0] / b))
        found[f"times_{name}"] = round(median(ratios), 2)
        found[f"{name}_sentences_per_s"] = round(median(s[0] for s in speeds), 1)
        found[f"{name}_pytorch_crf_sentences_per_s"] = round(median(s[1] for s in speeds), 1)
    found["max_gradient_difference"] = float((left.grad - right.grad).abs().max())
    found["same_decoding"] = ours.decode(emissions, lengths) == theirs.decode(emissions, mask)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="轮流跑几轮")
    parser.add_argument("--repeats", type=int, default=20, help="一轮里各跑几次")
    parser.add_argument("--record", help="记进 docs/measurements，例如 sequence_labeling.crf")
    args = parser.parse_args()
    if find_spec("torchcrf") is None:
        raise SystemExit(
            "错误：要与 pytorch-crf 比，先 pip install pytorch-crf==0.7.2（PyPI 上的 torchcrf 不是它）。"
        )
    result: dict = {name: measure(size, args.rounds, args.repeats) for name, size in SIZES.items()}
    result["goals"] = GOALS
    print(json.dumps(result, ensure_ascii=False))
    if args.record:
        from nlp_common.base.measurements import numbers_in, record, split_prefix

        topic, rest = split_prefix(args.record)
        values = {name: result[name] for name in SIZES}
        record(topic, numbers_in(values, f"{rest}."), unit={"max_gradient_difference": ""})
    wrong = [
        name
        for name in SIZES
        if not result[name]["same_decoding"] or result[name]["max_gradient_difference"] > 1e-3
    ]
    slow = [name for name, goal in GOALS.items() if result["28_tags"][name] < goal]
    if wrong or slow:
        raise SystemExit(f"没有达到目标：{'、'.join(wrong + slow)}")


if __name__ == "__main__":
    main()
