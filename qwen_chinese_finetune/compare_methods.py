"""十种对齐方法，一张图：从同一个 SFT 模型出发，离它一样远的时候，谁的回答更好？

学到什么：DPO、IPO、hinge、RPO、ORPO、SimPO 的损失只差一两行；它们与 KTO、PPO、GRPO、best-of-n 该怎样比——不比各自的默认
设置，比同样的 KL 换来多少分；DPO 的推导在只有两个回答的世界里，可以验算到小数点后六位。

运行：
    python compare_methods.py                          # tiny，两个核约半小时；做完的部分再运行时直接用
    python compare_methods.py --methods dpo,simpo --seeds 1 --output_dir outputs/tiny/two    # 只比几种
    python compare_methods.py --bandit                 # 只验算 DPO 的推导，一秒

预期输出：实测的表和图见本文件夹的 README.md。

参考：Rafailov et al. 2023（DPO）；Azar et al. 2024（IPO）；Zhao et al. 2023（SLiC，hinge）；Pang et al. 2024（RPO）；
Hong et al. 2024（ORPO）；Meng et al. 2024（SimPO）；Ethayarajh et al. 2024（KTO）；Gao et al. 2023（分数与 KL）。
"""

from nlp_common.base.cli import run_main

import dataclasses
import math
import statistics
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

import grpo_alignment
import kto_alignment
import ppo_alignment
from chain import HOME
from dpo_chinese_qwen import add_references, collate, encode, sequence_logps
from kl_tradeoff import best_of_n
from nlp_common.base.arguments import COUNT, option
from nlp_common.base.errors import UserError
from nlp_common.data.chats import to_pairs
from nlp_common.draw.plots import line_chart
from nlp_common.lm.loading import load_chat_lm, load_reward_model
from nlp_common.lm.losses import IGNORE
from nlp_common.lm.pairs import count_pairs, pair_length, pair_tokens
from nlp_common.lm.replies import token_kl
from nlp_common.tiny import world
from nlp_common.tiny.judge import measure_chat
from nlp_common.train.chain import chain_model
from nlp_common.train.lesson import run_lesson, run_part
from nlp_common.train.loop import train_loop
from nlp_common.train.settings import StageSettings, parse_settings
from nlp_common.train.splits import EVAL_SEED, drop_long, load_train_and_eval
from nlp_common.train.stage import Stage

PRESETS = {
    "tiny": {
        "dataset": "tiny_world",
        "max_train_samples": 1500,
        "max_length": 256,
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-4,
        "adam_beta2": 0.98,
        "seeds": 3,
    },
    "full": {},
}


@dataclass
class CompareSettings(StageSettings):
    NOT_IN_FINGERPRINT: ClassVar[set[str]] = StageSettings.NOT_IN_FINGERPRINT | {"bandit"}

    methods: str = option("比哪几种，逗号分开；默认全部", "")
    seeds: int | None = option("各几个种子（从 --seed 起）", None, COUNT)
    bandit: bool = option("只在两个回答的世界里验算 DPO 的推导", False)

    def check(self) -> None:
        if self.preset == "full" or self.dataset != "tiny_world":
            raise UserError(
                "这个比较要有标准答案才做得了，只在小世界里：加 --preset tiny，不要给 --dataset。"
            )
        if self.model or self.eval_dataset:
            raise UserError("都从链上的 SFT 模型开始、在小世界里量，--model、--eval_dataset 用不上：去掉它。")
        super().check()
        self.check_loop_only()
        if self.learning_rate != PRESETS["tiny"]["learning_rate"]:
            raise UserError(
                "各种方法的学习率不同，写在 compare_methods.py 的 METHODS 里：要换就改那里，去掉 --learning_rate。"
            )
        if unknown := set(chosen_methods(self)) - set(METHODS):
            raise UserError(f"--methods 不认识 {'、'.join(sorted(unknown))}，可以是 {'、'.join(METHODS)}。")


def chosen_methods(settings) -> list[str]:
    return [name.strip() for name in settings.methods.split(",") if name.strip()] or list(METHODS)


# ---------------------------------------------------------------- 1. 六种损失，只差一两行


@dataclass
class Pairs:
    """B 对回答的对数概率与 token 数，都是 (B,)。"""

    chosen: Tensor  # log π(好|x)
    rejected: Tensor
    ref_chosen: Tensor  # log π_ref(好|x)
    ref_rejected: Tensor
    n_chosen: Tensor  # 几个 token
    n_rejected: Tensor

    @property
    def delta(self) -> Tensor:
        """log π/π_ref，好的减差的。"""
        return (self.chosen - self.ref_chosen) - (self.rejected - self.ref_rejected)


def dpo(x: Pairs, beta: float) -> Tensor:
    """DPO（式 7）：−log σ(βΔ)。"""
    return -F.logsigmoid(beta * x.delta)


def ipo(x: Pairs, beta: float) -> Tensor:
    """IPO（式 17）：(Δ − 1/2β)²，Δ 按 token 平均。差拉到 1/2β 就够了，再拉大反而要罚：不会越推越远。"""
    chosen = (x.chosen - x.ref_chosen) / x.n_chosen
    rejected = (x.rejected - x.ref_rejected) / x.n_rejected
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def hinge(x: Pairs, beta: float) -> Tensor:
    """SLiC 的合页：max(0, 1 − βΔ)。够了就一点梯度也没有。"""
    return torch.relu(1 - beta * x.delta)


def rpo(x: Pairs, beta: float) -> Tensor:
    """RPO（Pang et al. 2024 式 1）：DPO 加上好回答的 SFT 损失，免得好回答的概率跟着降。"""
    return dpo(x, beta) - x.chosen / x.n_chosen


def orpo(x: Pairs, beta: float) -> Tensor:
    """ORPO（式 6、7）：没有参考模型。SFT 损失 − β·log σ(log 优势比)，优势 p/(1−p)，p 是按 token 的几何平均。"""
    chosen, rejected = x.chosen / x.n_chosen, x.rejected / x.n_rejected
    log_odds = (chosen - log1mexp(chosen)) - (rejected - log1mexp(rejected))
    return -chosen - beta * F.logsigmoid(log_odds)


def simpo(x: Pairs, beta: float, gamma: float = 0.5) -> Tensor:
    """SimPO（式 6）：没有参考模型，−log σ(β(log π 的 token 平均之差) − γ)。"""
    return -F.logsigmoid(beta * (x.chosen / x.n_chosen - x.rejected / x.n_rejected) - gamma)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 − e^x)，x < 0；两头都算得准（Mächler 2012）。"""
    x = x.clamp(max=-1e-7)
    return torch.where(x > -math.log(2), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


# 方法 → (损失或脚本, 学习率, 强弱的旋钮叫什么, 从松到紧的几个值, 手里有几个模型：在学的, 冻住的)。
# 六种损失的学习率在另一个种子上挑过（benchmarks/methods_tuning.py）；没写的是脚本自己的。
METHODS = {
    "dpo": (dpo, 5e-4, "beta", (0.1, 0.3, 1.0), (1, 1)),
    "ipo": (ipo, 2e-4, "beta", (0.3, 0.5, 1.0), (1, 1)),
    "hinge": (hinge, 5e-4, "beta", (0.1, 0.3, 1.0), (1, 1)),
    "rpo": (rpo, 1e-3, "beta", (0.1, 0.3, 1.0), (1, 1)),
    "orpo": (orpo, 1e-3, "beta", (1.0, 0.3, 0.1), (1, 0)),
    "simpo": (simpo, 2e-4, "beta", (4.0, 2.0, 1.0), (1, 0)),
    "kto": (kto_alignment, 3e-4, "beta", (0.1, 0.3, 1.0), (1, 1)),
    "ppo": (ppo_alignment, 2e-4, "kl_coef", (0.03, 0.1, 0.3), (2, 2)),
    "grpo": (grpo_alignment, None, "kl_coef", (0.0, 0.03, 0.1), (1, 1)),
    "best_of_n": (best_of_n, None, "n", (2, 4, 8, 16), (0, 2)),
}
FURTHEST = 4.0  # 图上最远画到多少 KL
SCRIPTS = (kto_alignment, ppo_alignment, grpo_alignment)


def pair_loss(model, batch: dict[str, Tensor], loss, beta: float) -> tuple[Tensor, dict]:
    """一批偏好对 → 损失的和。"""
    chosen, rejected = sequence_logps(model, batch["input_ids"], batch["labels"]).chunk(2)
    n_chosen, n_rejected = (batch["labels"][:, 1:] != IGNORE).sum(1).chunk(2)
    pairs = Pairs(chosen, rejected, *batch["ref_logps"].chunk(2), n_chosen, n_rejected)
    return loss(pairs, beta).sum(), {"right": pairs.delta > 0}


# ---------------------------------------------------------------- 2. 推导的验算：只有两个回答的世界


def bandit(
    rewards: tuple[float, float], reference: tuple[float, float], beta: float
) -> tuple[Tensor, Tensor]:
    """两个回答，奖励与 π_ref 都知道。→ (DPO 学到的 π, 公式 π ∝ π_ref·e^(r/β))，各 (2,)，float64。

    偏好按 Bradley–Terry：第一个赢的概率 p = σ(r₁ − r₂)。这里的数据是无穷多对，所以损失就是期望
    −p·log σ(βΔ) − (1−p)·log σ(−βΔ)。
    """
    r, ref = torch.tensor(rewards, dtype=torch.float64), torch.tensor(reference, dtype=torch.float64)
    p = torch.sigmoid(r[0] - r[1])
    logits = ref.log().clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-14, tolerance_change=1e-16)

    def loss() -> Tensor:
        optimizer.zero_grad()
        logps = logits.log_softmax(0)
        delta = beta * ((logps[0] - ref[0].log()) - (logps[1] - ref[1].log()))
        value = -p * F.logsigmoid(delta) - (1 - p) * F.logsigmoid(-delta)
        value.backward()
        return value

    optimizer.step(loss)
    return logits.softmax(0).detach(), (ref * torch.exp(r / beta)) / (ref * torch.exp(r / beta)).sum()


def show_bandit() -> float:
    """几组奖励与 β：学到的与公式的最大差。"""
    worst = 0.0
    for rewards, reference, beta in (
        ((1.0, 0.0), (0.5, 0.5), 1.0),
        ((1.0, 0.0), (0.1, 0.9), 0.5),
        ((-0.3, 0.4), (0.7, 0.3), 0.2),
    ):
        learned, formula = bandit(rewards, reference, beta)
        worst = max(worst, (learned - formula).abs().max().item())
        print(
            f"  奖励 {rewards}，π_ref {reference}，β {beta}：DPO 学到 {learned[0]:.6f}，π_ref·e^(r/β) 归一是 {formula[0]:.6f}"
        )
    print(f"  最大的差 {worst:.1e}")
    return worst


# ---------------------------------------------------------------- 3. 训练一个，量一个点


def measure(model, sft, tokenizer, questions: list[dict]) -> dict:
    """一个点：程序评分，与每个回答对 SFT 的 KL（nats）。"""
    metrics, _, replies = measure_chat(model, tokenizer, questions)
    tokens = sum(len(reply["ids"]) for reply in replies) / len(replies)
    names = ("judge_score", "preferred_rate", "qa_accuracy", "small_talk", "distinct_2")
    kl = token_kl(model, sft, tokenizer, questions, replies) * tokens
    return {"kl_per_answer": kl} | {name: metrics[name] for name in names}


def train_pairs(part: Stage, name: str, strength: float, seed: int, sft_path: str, rows: list[dict]) -> dict:
    """用一种成对的损失训练。"""
    loss, learning_rate, *_ = METHODS[name]
    part.settings = dataclasses.replace(part.settings, seed=seed, learning_rate=learning_rate)
    (tokenizer, sft), (_, model) = (load_chat_lm(sft_path, part.device) for _ in range(2))
    started = time.perf_counter()
    train_loop(
        part,
        name,
        model,
        rows,
        partial(collate, pad_id=tokenizer.pad_token_id),
        partial(pair_loss, loss=loss, beta=strength),
        [pair_tokens(row) for row in rows],
        [pair_length(row) for row in rows],
        count_pairs,
    )
    seconds = time.perf_counter() - started
    questions = world.heldout_questions(part.settings.max_eval_samples, EVAL_SEED)
    return measure(model, sft, tokenizer, questions) | {"train_seconds": seconds}


def run_script(part: Stage, name: str, strength: float, seed: int, sft_path: str, reward_path: str) -> dict:
    """KTO、PPO、GRPO 的脚本自己训练一个。"""
    script, learning_rate, knob, *_ = METHODS[name]
    out = part.folder.work / "trained"
    flags = {"preset": "tiny", "model": sft_path, "output_dir": out, "seed": seed, knob: strength}
    flags["max_eval_samples"] = 16  # 脚本自己的评测用不着：下面用同样的题量
    if learning_rate:
        flags["learning_rate"] = learning_rate
    if part.settings.max_steps > 0:
        flags["max_steps"] = part.settings.max_steps
    if script is ppo_alignment:
        flags["reward_model"] = reward_path
    record = script.main([text for key, value in flags.items() for text in (f"--{key}", str(value))])
    (tokenizer, sft), (_, model) = (load_chat_lm(path, part.device) for path in (sft_path, str(out)))
    questions = world.heldout_questions(part.settings.max_eval_samples, EVAL_SEED)
    return measure(model, sft, tokenizer, questions) | {"train_seconds": training_seconds(record)}


def training_seconds(record: dict) -> float:
    """只算训练，不算载入与评测：训练循环自己记了的，或每一轮的采样、打分、更新加起来。"""
    if "train_seconds" in record["metrics"]:
        return record["metrics"]["train_seconds"]
    return sum(row[name] for row in record["history"] for name in ("rollout_s", "scoring_s", "update_s"))


def with_references(tokenizer, sft, pairs: list[dict], settings) -> list[dict]:
    """偏好对 → token 与参考模型的对数概率；六种损失、几个种子都用这一份。"""
    rows = [encode(tokenizer, pair) for pair in pairs]
    rows = drop_long(rows, pair_length, settings.max_length, "偏好对")
    add_references(sft, rows, tokenizer.pad_token_id, 16)
    return rows


# ---------------------------------------------------------------- 4. 全课


def learn(stage: Stage, sft_path: str, reward_path: str) -> dict:
    settings = stage.settings
    worst = show_bandit()
    pairs, _, data = load_train_and_eval(settings, "pairs", to_pairs)
    tokenizer, sft = load_chat_lm(sft_path, stage.device)
    rows = with_references(tokenizer, sft, pairs, settings)
    n_parameters = sum(p.numel() for p in sft.parameters())
    metrics: dict = {"bandit_difference": worst}
    for name in chosen_methods(settings):
        method, _, _, strengths, (n_trained, n_frozen) = METHODS[name]
        found: dict[str, list[dict]] = {}
        for seed in range(settings.seed, settings.seed + settings.seeds):
            if name == "best_of_n":
                reward = load_reward_model(reward_path, tokenizer).to(stage.device).eval()
                questions = world.heldout_questions(settings.max_eval_samples, EVAL_SEED)
                for point in best_of_n(sft, reward, tokenizer, questions, seed):
                    if point["name"] != "n=1":
                        found.setdefault(point.pop("name").removeprefix("n="), []).append(point)
                continue
            for strength in strengths:
                if method in SCRIPTS:
                    work = partial(run_script, sft_path=sft_path, reward_path=reward_path)
                else:
                    work = partial(train_pairs, sft_path=sft_path, rows=rows)
                work = partial(work, name=name, strength=strength, seed=seed)
                point = run_part(stage, f"{name}-{strength}-{seed}", work)
                found.setdefault(str(strength), []).append(point)
                print(
                    f"  {name} {strength} 种子 {seed}：KL {point['kl_per_answer']:.2f}，评分 {point['judge_score']:.3f}"
                )
        metrics[name] = {strength: summary(points) for strength, points in found.items()}
        seconds = [point.get("train_seconds", 0.0) for point in metrics[name].values()]  # best-of-n 不训练
        metrics[name]["train_seconds"] = statistics.mean(seconds)
        # 权重；在学的再加上梯度与 Adam 的两个状态，都是 float32
        metrics[name]["bytes"] = n_parameters * 4 * (4 * n_trained + n_frozen)
    show(metrics)
    return stage.save(metrics, data, partial(draw, metrics=metrics))


def summary(points: list[dict]) -> dict:
    """几个种子：平均，与平均的标准误差。"""
    result = {}
    for key in points[0]:
        values = [point[key] for point in points]
        result[key] = statistics.mean(values)
        if len(values) > 1 and key in ("judge_score", "kl_per_answer"):
            result[f"{key}_error"] = statistics.stdev(values) / math.sqrt(len(values))
    return result


def points_of(found: dict) -> list[dict]:
    """一种方法的各个点，KL 从小到大。"""
    return sorted((p for p in found.values() if isinstance(p, dict)), key=lambda p: p["kl_per_answer"])


def show(metrics: dict) -> None:
    print("方法        每个回答的 KL → 程序评分")
    for name in METHODS:
        if name in metrics:
            points = points_of(metrics[name])
            print(
                f"{name:<10}"
                + "，".join(f"{p['kl_per_answer']:.2f} → {p['judge_score']:.3f}" for p in points)
            )


def draw(folder: Path, metrics: dict) -> None:
    """走得太远的点在图外：一个点就会把别的都挤成一团。"""
    series = {}
    for name in METHODS:
        if name in metrics:
            points = [p for p in points_of(metrics[name]) if p["kl_per_answer"] <= FURTHEST]
            series[name] = ([p["kl_per_answer"] for p in points], [p["judge_score"] for p in points])
    line_chart(
        folder / "methods.svg",
        series,
        "同样的 KL，谁的回答好|Judge score at equal KL",
        "每个回答对 SFT 的 KL（nats）|KL to SFT per answer (nats)",
        "程序评分|judge score",
    )


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(CompareSettings, PRESETS, argv)
    if settings.bandit:
        return {"bandit_difference": show_bandit()}
    found = {stage: chain_model(stage) for stage in ("sft", "reward")}
    paths = {"sft_path": found["sft"]["path"], "reward_path": found["reward"]["path"]}
    ids = {stage: each["id"] for stage, each in found.items()}
    return run_lesson("compare_methods", HOME, settings, partial(learn, **paths), **ids)


if __name__ == "__main__":
    run_main(main)
