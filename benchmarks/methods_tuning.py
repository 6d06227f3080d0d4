"""compare_methods.py 的学习率是怎样挑的：六种损失各换几个学习率、几个强弱，都用另一个种子（10），看谁的程序评分最高。

先跑完 qwen_chinese_finetune/run_all.py --preset tiny，然后：

    python benchmarks/methods_tuning.py                        # 全部，一个核约 8 分钟；做完的再运行时直接用
    python benchmarks/methods_tuning.py --only ipo simpo       # 只挑几种方法的

打印一张 Markdown 表：一格是一个学习率的几个强弱里，最高的程序评分，与那时每个回答的 KL。比较用种子 0、1、2，这里用 10：
挑的时候没有看过要报的数。
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

QWEN = Path(__file__).resolve().parent.parent / "qwen_chinese_finetune"
sys.path.insert(0, str(QWEN))  # 基准不在脚本的文件夹里，要自己找到 chain.py 等

SEED = 10
RATES = {  # 方法 → 试哪几个学习率；KTO、PPO、GRPO 的是各自的脚本里挑好的
    "dpo": (1e-4, 2e-4, 5e-4),
    "ipo": (1e-4, 2e-4, 5e-4),
    "hinge": (1e-4, 2e-4, 5e-4),
    "rpo": (2e-4, 5e-4, 1e-3),
    "orpo": (5e-4, 1e-3, 2e-3),
    "simpo": (5e-5, 1e-4, 2e-4),
}


def tune(stage, names: list[str], sft_path: str) -> dict:
    """→ {方法: {学习率: {强弱: 一个点}}}，写进 stage 的结果。"""
    import compare_methods as compare
    from nlp_common.train.lesson import run_part

    pairs, _, data = compare.load_train_and_eval(stage.settings, "pairs", compare.to_pairs)
    tokenizer, sft = compare.load_chat_lm(sft_path, stage.device)
    rows = compare.with_references(tokenizer, sft, pairs, stage.settings)
    found: dict = {}
    for name in names:
        method, _, knob, strengths, held = compare.METHODS[name]
        for rate in RATES[name]:
            compare.METHODS[name] = (method, rate, knob, strengths, held)
            for strength in strengths:
                given = {"name": name, "strength": strength, "seed": SEED, "sft_path": sft_path}
                work = partial(compare.train_pairs, rows=rows, **given)
                point = run_part(stage, f"{name}-{rate:g}-{strength}", work)
                found.setdefault(name, {}).setdefault(f"{rate:g}", {})[str(strength)] = point
                print(
                    f"  {name} 学习率 {rate:g} {knob} {strength}：KL {point['kl_per_answer']:.2f}，"
                    f"评分 {point['judge_score']:.3f}，寒暄 {point['small_talk']:.2f}"
                )
    return stage.save(found, data)


def best(points: dict[str, dict]) -> tuple[str, dict]:
    """几个强弱里程序评分最高的。"""
    return max(points.items(), key=lambda item: item[1]["judge_score"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=list(RATES), choices=list(RATES), metavar="方法")
    parser.add_argument("--output_dir", default=str(QWEN / "outputs" / "tiny" / "methods_tuning"))
    parser.add_argument("--record", action="store_true", help="记进 docs/measurements")
    args = parser.parse_args()

    import compare_methods as compare
    from nlp_common.base.measurements import record
    from nlp_common.train.chain import chain_model
    from nlp_common.train.lesson import run_lesson
    from nlp_common.train.settings import parse_settings

    flags = ["--preset", "tiny", "--methods", ",".join(args.only), "--output_dir", args.output_dir]
    settings = parse_settings(compare.CompareSettings, compare.PRESETS, flags)
    learn = partial(tune, names=args.only, sft_path=chain_model("sft")["path"])
    found = run_lesson("methods_tuning", compare.HOME, settings, learn)["metrics"]
    print("| 方法 | 学习率：最高的程序评分（强弱，每个回答的 KL） |\n|---|---|")
    values = {}
    for name in args.only:
        cells = []
        for rate, points in found[name].items():
            strength, point = best(points)
            cells.append(f"{rate}：{point['judge_score']:.3f}（{strength}，{point['kl_per_answer']:.2f}）")
            values[f"{name}.{rate}"] = {k: point[k] for k in ("judge_score", "kl_per_answer")}
        print(f"| {name} | {'；'.join(cells)} |")
    if args.record:
        record("qwen", {"methods_tuning": values}, unit={"kl_per_answer": "nats/answer"}, seed=SEED)


if __name__ == "__main__":
    from nlp_common.base.cli import run_main

    run_main(main)
