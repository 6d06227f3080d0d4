"""分数与 KL：离 SFT 模型走多远，换来多好的回答？PPO、DPO、best-of-n 画在一张图上；再看没有 KL 惩罚时的奖励作弊。

学到什么：对齐不是分数越高越好。奖励模型只是人的偏好的替身，离 SFT 模型越远，它越不可信（Gao et al. 2023）：
奖励还在涨，真正的质量已经在跌。横轴是每个回答对 SFT 的 KL（nats），纵轴是程序的评分（奖励模型从没见过它）。

best-of-n 不训练：采样 n 个回答，取奖励模型给分最高的。它的 KL 不必量，不超过 log n − (n−1)/n
（Beirami et al. 2024），几乎是同样的 KL 能换到的最高奖励，所以是很好的标尺；代价是每次回答都要采样 n 遍。

运行（先跑完 run_all.py，或者让它补上缺的阶段）：
    python kl_tradeoff.py                    # tiny 的小世界，2 核 CPU 约 15 分钟；做完的部分再运行时直接用
    python kl_tradeoff.py --parts best_of_n  # 只做其中一部分

预期输出：实测的表和图见本文件夹的 README.md。
"""

from nlp_common.base.cli import run_main

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

import dpo_chinese_qwen
import grpo_alignment
import ppo_alignment
from chain import HOME
from nlp_common.base.arguments import option, parse_arguments
from nlp_common.base.errors import UserError
from nlp_common.base.measurements import record
from nlp_common.base.runs import load_run, write_json
from nlp_common.draw.plots import line_chart
from nlp_common.lm.loading import load_causal_lm, load_chat_lm, load_reward_model
from nlp_common.lm.replies import reply_to, score_replies, token_kl
from nlp_common.tiny import world
from nlp_common.tiny.judge import judge, measure_chat
from nlp_common.train.splits import EVAL_SEED

PARTS = ("best_of_n", "ppo", "dpo", "hacking", "grpo")
NS = (1, 2, 4, 8, 16)
KL_COEFS = (0.0, 0.03, 0.1, 0.3, 1.0)
BETAS = (0.1, 0.3, 1.0, 3.0)


@dataclass
class TradeoffSettings:
    chain: str | None = option("run_all.py 的结果文件夹，里面要有 sft 和 reward；默认 outputs/tiny")
    output_dir: str | None = option("结果写到哪个文件夹；默认是 --chain 里的 tradeoff")
    parts: str = option(f"做哪几部分，逗号分开：{'、'.join(PARTS)}", ",".join(PARTS))
    seed: int = option("随机种子", 0)
    n: int = option("用多少道留出的题", 500)
    hacking_steps: int = option("看奖励作弊时 PPO 走多少步", 120)
    record: bool = option("把表里的数记进 docs/measurements", False)


def run_parts(parts: list[str], root: Path, settings: TradeoffSettings) -> dict:
    """依次做各部分，每做完一部分就存一次；没做的部分照旧。返回 tradeoff.json 的内容。"""
    tokenizer, sft = load_chat_lm(f"{settings.chain}/sft", torch.device("cpu"))
    reward = load_reward_model(f"{settings.chain}/reward", tokenizer).eval()
    questions = world.heldout_questions(settings.n, EVAL_SEED)
    variants = {"ppo": (ppo_alignment, "kl_coef", KL_COEFS), "dpo": (dpo_chinese_qwen, "beta", BETAS)}
    saved = root / "tradeoff.json"
    result = json.loads(saved.read_text(encoding="utf-8")) if saved.exists() else {}
    for part in parts:
        print(f"—— {part}")
        if part == "best_of_n":
            result[part] = best_of_n(sft, reward, tokenizer, questions, settings.seed)
        elif part == "hacking":
            result[part] = hacking_curves(root, settings)
        elif part == "grpo":
            result[part] = grpo_curves(root, settings)
        else:
            script, flag, values = variants[part]
            result[part] = []
            for value in values:
                folder = train(script, root, f"{part}-{value}", settings, **{flag: value})
                result[part].append(measure(folder, f"β={value}", sft, reward, tokenizer, questions))
        write_json(saved, result)
    return result


# ---------------------------------------------------------------- 1. best-of-n


@torch.no_grad()
def best_of_n(sft, reward, tokenizer, questions: list[dict], seed: int) -> list[dict]:
    """每道题采样 max(NS) 个回答；取前 n 个里奖励最高的，n 从小到大。"""
    scores, verdicts = [], []
    for k in range(max(NS)):
        replies = reply_to(sft, tokenizer, questions, temperature=1.0, seed=seed * 1000 + k)
        scores.append(score_replies(reward, tokenizer, questions, replies))
        judged = [judge(q, r["text"], r["ended"]).score for q, r in zip(questions, replies, strict=True)]
        verdicts.append(torch.tensor(judged))
    scores, verdicts = torch.stack(scores), torch.stack(verdicts)  # (max(NS), 题数)
    points = []
    for n in NS:
        best = scores[:n].argmax(0, keepdim=True)  # (1, 题数)
        points.append(
            {
                "name": f"n={n}",
                "kl_per_answer": math.log(n) - (n - 1) / n,
                "judge_score": verdicts.gather(0, best).mean().item(),
                "reward_mean": scores.gather(0, best).mean().item(),
            }
        )
    return points


# ---------------------------------------------------------------- 2. 训练出来的模型


def measure(folder: Path, name: str, sft, reward, tokenizer, questions: list[dict]) -> dict:
    """一个训练好的模型：程序评分、奖励、每个回答对 SFT 的 KL。"""
    _, policy = load_causal_lm(str(folder))
    metrics, _, replies = measure_chat(policy, tokenizer, questions)
    tokens = sum(len(reply["ids"]) for reply in replies) / len(replies)
    return {
        "name": name,
        "kl_per_answer": token_kl(policy, sft, tokenizer, questions, replies) * tokens,
        "judge_score": metrics["judge_score"],
        "reward_mean": score_replies(reward, tokenizer, questions, replies).mean().item(),
        "preferred_rate": metrics["preferred_rate"],
        "qa_accuracy": metrics["qa_accuracy"],
    }


def train(script, root: Path, name: str, settings: TradeoffSettings, **flags) -> Path:
    """用阶段脚本本身训练一个变体；已有同样设置的结果时直接用。"""
    chain, out = Path(settings.chain), root / name
    flags = {"preset": "tiny", "seed": settings.seed, "model": chain / "sft", "output_dir": out} | flags
    if script is ppo_alignment or flags.get("reward") == "reward_model":
        flags["reward_model"] = chain / "reward"
    arguments = []
    for key, value in flags.items():
        arguments += [f"--{key}", str(value)]
    script.main(arguments)
    return out


# ---------------------------------------------------------------- 3. 奖励作弊


def hacking_curves(root: Path, settings: TradeoffSettings) -> dict[str, list[dict]]:
    """PPO 走很多步，有没有 KL 惩罚，其余都一样 → {图例: 每一步的历史}。"""
    curves = {}
    for kl_coef in (0.0, 0.1):
        steps = settings.hacking_steps
        out = train(
            ppo_alignment,
            root,
            f"hacking-{kl_coef}",
            settings,
            kl_coef=kl_coef,
            max_steps=steps,
            learning_rate=4e-4,
        )
        curves[f"β = {kl_coef}"] = load_run(out)["history"]
    return curves


def grpo_curves(root: Path, settings: TradeoffSettings) -> dict[str, list[dict]]:
    """GRPO 走同样多步，没有 KL 惩罚，奖励来自验证器或奖励模型 → {图例: 每一步的历史}。"""
    curves = {}
    for reward, label in (
        ("verifier", "GRPO，验证器|GRPO, verifier"),
        ("reward_model", "GRPO，奖励模型|GRPO, reward model"),
    ):
        flags = {"reward": reward, "max_steps": settings.hacking_steps}
        out = train(grpo_alignment, root, f"grpo-{reward}", settings, **flags)
        curves[label] = load_run(out)["history"]
    return curves


def smoothed(history: list[dict], key: str, window: int = 5) -> tuple[list[int], list[float]]:
    """前后共 window 步的平均：每步只有几十个回答，单步的数跳得厉害。"""
    values = [row[key] for row in history]
    half = window // 2
    means = []
    for i in range(len(values)):
        near = values[max(0, i - half) : i + half + 1]
        means.append(sum(near) / len(near))
    return [row["step"] for row in history], means


# ---------------------------------------------------------------- 4. 图与主程序


def draw(root: Path, result: dict) -> None:
    series = {}
    for part, label in (("best_of_n", "best-of-n"), ("ppo", "PPO"), ("dpo", "DPO")):
        if part in result:
            points = sorted(result[part], key=lambda p: p["kl_per_answer"])
            series[label] = ([p["kl_per_answer"] for p in points], [p["judge_score"] for p in points])
    if series:
        line_chart(
            root / "tradeoff.svg",
            series,
            "分数与 KL|judge score against KL",
            "每个回答对 SFT 的 KL（nats）|KL to SFT per answer (nats)",
            "程序评分|judge score",
        )
    if "hacking" in result:
        for key, label in (("score", "奖励模型的分|reward model"), ("judge_score", "程序评分|judge score")):
            curves = {name: smoothed(rows, key) for name, rows in result["hacking"].items()}
            line_chart(root / f"hacking-{key}.svg", curves, label, "步|step", label)
    if "grpo" in result:
        curves = {name: smoothed(rows, "judge_score") for name, rows in result["grpo"].items()}
        if "hacking" in result:
            curves["PPO，奖励模型|PPO, reward model"] = smoothed(result["hacking"]["β = 0.0"], "judge_score")
        title, label = "没有 KL 惩罚（β = 0）|No KL penalty", "程序评分|judge score"
        line_chart(root / "hacking-grpo.svg", curves, title, "步|step", label)


def show(result: dict) -> None:
    for part in ("best_of_n", "ppo", "dpo"):
        for p in result.get(part, []):
            print(
                f"  {part:<10} {p['name']:<8} 每个回答的 KL {p['kl_per_answer']:7.3f}  程序评分 {p['judge_score']:.3f}"
                f"  奖励 {p['reward_mean']:+.2f}"
            )
    for name, rows in (result.get("hacking", {}) | result.get("grpo", {})).items():
        for row in (rows[0], rows[len(rows) // 2], rows[-1]):
            print(
                f"  hacking    {name:<8} 第 {row['step']:>3} 步  KL {row.get('kl', math.nan):6.3f}/token"
                f"  程序评分 {row['judge_score']:.3f}  奖励 {row['score']:+.2f}"
            )


def record_result(result: dict, seed: int) -> None:
    """README 的两张表里的数，记进 docs/measurements。"""
    values = {}
    for part, names in (("best_of_n", NS), ("ppo", KL_COEFS), ("dpo", BETAS)):
        for name, point in zip(names, result.get(part, []), strict=False):
            values[f"{part}.{name}"] = point
    for name, rows in result.get("hacking", {}).items():
        for row in (rows[0], rows[len(rows) // 2], rows[-1]):
            key = f"hacking.{name.removeprefix('β = ')}.step_{row['step']}"
            values[key] = {"score": row["score"], "judge_score": row["judge_score"]}
    for name, rows in zip(("verifier", "reward_model"), result.get("grpo", {}).values(), strict=False):
        for row in (rows[0], rows[len(rows) // 2], rows[-1]):
            values[f"grpo_{name}.step_{row['step']}"] = {k: row[k] for k in ("score", "judge_score")}
    record("qwen", {"tradeoff": values}, unit={"kl_per_answer": "nats/answer"}, seed=seed)


def main(argv: list[str] | None = None) -> dict:
    settings = parse_arguments(TradeoffSettings, argv)
    parts = settings.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        raise UserError(f"--parts 不认识 {'、'.join(sorted(unknown))}，可以是 {'、'.join(PARTS)}。")
    settings.chain = str(Path(settings.chain or HOME / "outputs" / "tiny").expanduser().resolve())
    for stage in ("sft", "reward"):
        if load_run(Path(settings.chain) / stage) is None:
            raise UserError(
                f"{settings.chain} 里没有训练好的 {stage}。先运行：python run_all.py --preset tiny"
            )
    root = Path(settings.output_dir or Path(settings.chain) / "tradeoff").expanduser().resolve()
    root.mkdir(parents=True, exist_ok=True)
    result = run_parts(parts, root, settings)
    draw(root, result)
    show(result)
    if settings.record:
        record_result(result, settings.seed)
    print(f"图和数字在 {root}")
    return result


if __name__ == "__main__":
    run_main(main)
