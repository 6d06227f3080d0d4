"""PPO 的每个稳定措施值多少：去掉一个，其余不变，从同一个 SFT 模型、同一个奖励模型重新训练。

先跑完 qwen_chinese_finetune/run_all.py --preset tiny，然后：

    python benchmarks/ppo_ablation.py                       # 全部，2 核 CPU 约 20 分钟；做完的变体再运行时直接用
    python benchmarks/ppo_ablation.py --only 默认 不预热    # 只跑几个

打印一张 Markdown 表：奖励均值、程序评分、又对又完整又有礼的比例、贪心正确率、对 SFT 的 KL（都在留出的题上），
以及训练中最大的概率比。
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

QWEN = Path(__file__).resolve().parent.parent / "qwen_chinese_finetune"
sys.path.insert(0, str(QWEN))  # 基准不在脚本的文件夹里，要自己找到 chain.py 等

OFF = 1e9  # 裁剪的范围取这么大，等于不裁剪
FAST = {"learning_rate": 1e-3}  # 默认的 5 倍：步子太大时，才看得出哪个措施救了命
VARIANTS = {
    "默认": {},
    "自适应 KL（目标 0.05）": {"kl_target": 0.05, "kl_gain": 1.0},
    "没有 KL 惩罚": {"kl_coef": 0.0},
    "KL 用 k2 估计": {"kl_estimator": "k2"},
    "KL 用 k3 估计": {"kl_estimator": "k3"},
    "没说完不罚": {"missing_end_penalty": 0.0},
    "不裁剪概率比": {"clip_range": OFF},
    "不裁剪价值": {"clip_range_value": OFF},
    "不裁剪梯度": {"max_grad_norm": OFF},
    "不预热": {"warmup_steps": 0},
    "KL 超过 0.02 提前停": {"max_update_kl": 0.02},
    "5 倍学习率": FAST,
    "5 倍学习率，不裁剪概率比": FAST | {"clip_range": OFF},
    "5 倍学习率，不裁剪梯度": FAST | {"max_grad_norm": OFF},
    "5 倍学习率，不预热": FAST | {"warmup_steps": 0},
    "5 倍学习率，预热 10 步": FAST | {"warmup_steps": 10},
    "5 倍学习率，KL 超过 0.02 提前停": FAST | {"max_update_kl": 0.02},
    "5 倍学习率，自适应 KL（目标 0.05）": FAST | {"kl_target": 0.05, "kl_gain": 1.0},
}


def run(name: str, flags: dict, chain: Path, seed: int) -> dict:
    import ppo_alignment

    flags = {
        "preset": "tiny",
        "model": chain / "sft",
        "reward_model": chain / "reward",
        "output_dir": chain / "ablation" / f"{list(VARIANTS).index(name)}-seed{seed}",
        "seed": seed,
    } | flags
    arguments = []
    for key, value in flags.items():
        arguments += [f"--{key}", str(value)]
    return ppo_alignment.main(arguments)


SLUGS = {  # 变体 → docs/measurements 里的名字
    "默认": "default",
    "自适应 KL（目标 0.05）": "adaptive_kl",
    "没有 KL 惩罚": "no_kl",
    "KL 用 k2 估计": "kl_k2",
    "KL 用 k3 估计": "kl_k3",
    "没说完不罚": "no_end_penalty",
    "不裁剪概率比": "no_ratio_clip",
    "不裁剪价值": "no_value_clip",
    "不裁剪梯度": "no_grad_clip",
    "不预热": "no_warmup",
    "KL 超过 0.02 提前停": "early_stop",
    "5 倍学习率": "lr5",
    "5 倍学习率，不裁剪概率比": "lr5_no_ratio_clip",
    "5 倍学习率，不裁剪梯度": "lr5_no_grad_clip",
    "5 倍学习率，不预热": "lr5_no_warmup",
    "5 倍学习率，预热 10 步": "lr5_warmup10",
    "5 倍学习率，KL 超过 0.02 提前停": "lr5_early_stop",
    "5 倍学习率，自适应 KL（目标 0.05）": "lr5_adaptive_kl",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--chain", type=Path, default=QWEN / "outputs" / "tiny", help="run_all.py 的结果文件夹"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="PPO 的随机种子")
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="变体")
    parser.add_argument("--record", action="store_true", help="记进 docs/measurements")
    args = parser.parse_args()
    for stage in ("sft", "reward"):
        if not (args.chain / stage / "run.json").exists():
            sys.exit(f"{args.chain} 里没有训练好的 {stage}。先运行：run_all.py --preset tiny")
    columns = ("reward_mean", "judge_score", "preferred_rate", "qa_accuracy", "kl_to_sft")
    lines = [
        "| 变体 | 种子 | 奖励 | 程序评分 | 又对又完整又有礼 | 贪心正确 | KL | 最大的概率比 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in args.only:
        for seed in args.seeds:
            record = run(name, VARIANTS[name], args.chain.resolve(), seed)
            metrics = [f"{record['metrics'][key]:.3f}" for key in columns]
            largest = max(row["ratio_max"] for row in record["history"])
            if args.record:
                from nlp_common.base import measurements

                values = {key: record["metrics"][key] for key in columns} | {"ratio_max": largest}
                rows = {f"ablation.{SLUGS[name]}": values}
                measurements.record("qwen", rows, unit={"ratio_max": "ratio"}, seed=seed)
            lines.append(f"| {name} | {seed} | {' | '.join(metrics)} | {largest:.1f} |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
