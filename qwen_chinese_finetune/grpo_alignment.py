"""GRPO：同一道题写一组回答，比组里平均好的多说，差的少说。没有价值网络；有标准答案时，连奖励模型也不用。

学到什么：一轮 GRPO 的四步——一题采样 G 个回答、验证器打分、减去组平均、裁剪的策略损失；以及它的几个亲戚（Dr. GRPO、RLOO、
REINFORCE++、DAPO、GSPO、CISPO）各改了哪一行。与 PPO 比：

    PPO    policy ─▶ 1 个回答 ─▶ 奖励模型的分 ─▶ 减去价值网络的估计 ─▶ 优势
    GRPO   policy ─▶ G 个回答 ─▶ 验证器的分   ─▶ 减去同组的平均     ─▶ 优势

运行：
    python grpo_alignment.py                               # 自动选预设
    python grpo_alignment.py --preset tiny                 # 离线小世界，验证器打分
    python grpo_alignment.py --preset tiny --reward reward_model
    python grpo_alignment.py --preset tiny --reward_file 我的奖励.py     # 里面写一个 reward(questions, replies, ended)
    python grpo_alignment.py --dataset 题目.jsonl --reward verifier      # 每行有问题和标准答案 answer
    python grpo_alignment.py --preset full                 # 需要加速器

预期输出（tiny，实测见 README.md）：又对、又完整、又有礼的采样回答从两成多到九成半以上。损失几乎总是 0：看奖励和没有信号的组。

参考：Shao et al. 2024（GRPO）；Ahmadian et al. 2024（RLOO）；Liu et al. 2025（Dr. GRPO）；Yu et al. 2025（DAPO）；
Hu et al. 2025（REINFORCE++）；Zheng et al. 2025（GSPO）；MiniMax 2025（CISPO）。
"""

from nlp_common.base.cli import run_main

import random
import time
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from chain import CHAIN
from grpo_rewards import load_reward_file, make_score, sample, to_answered
from nlp_common.base.arguments import Limits, option
from nlp_common.base.errors import UserError
from nlp_common.base.processes import merge_stats, num_processes
from nlp_common.lm.loading import end_chat_turns, load_causal_lm, load_reward_model
from nlp_common.lm.rollout import (
    group_logps,
    join_rollouts,
    prompt_length,
    rollout_speed,
    with_prompts,
)
from nlp_common.tiny.judge import judge, measure_aligned
from nlp_common.train.chain import run_stage
from nlp_common.train.checkpoints import load_checkpoint, save_checkpoint
from nlp_common.train.loop import make_optimizer
from nlp_common.train.progress import progress_bar
from nlp_common.train.settings import StageSettings, parse_settings
from nlp_common.train.setup import SHARDED, make_accelerator
from nlp_common.train.splits import drop_long, load_train_and_eval
from nlp_common.train.stage import Stage
from ppo_alignment import kl_estimate, learning_rate

PRESETS = {
    "tiny": {
        "dataset": "tiny_world",
        "max_train_samples": 2000,
        "max_length": 256,
        "max_steps": 60,
        "per_device_train_batch_size": 128,
        "num_generations": 8,
        "micro_batch_size": 128,
        "learning_rate": 5e-4,
        "max_new_tokens": 24,
        "save_steps": 20,
        "reward": "verifier",
    },
    "full": {
        "dataset": "shibing624/DPO-En-Zh-20k-Preference:zh",
        "max_train_samples": 5000,
        "max_length": 512,
        "max_steps": 200,
        "per_device_train_batch_size": 64,
        "num_generations": 8,
        "micro_batch_size": 8,
        "learning_rate": 1e-6,
        "max_new_tokens": 128,
        "save_steps": 20,
        "reward": "reward_model",
    },
}

INSTEAD = {  # 各阶段共有、GRPO 却用不着的参数 → 该用哪个
    "gradient_accumulation_steps": "--micro_batch_size（每批切成几份，结果不变）",
    "gradient_checkpointing": "--micro_batch_size（一次算的行数越少，越省显存）",
    "num_train_epochs": "--max_steps（几批回答）与 --grpo_epochs（每批更新几遍）",
    "lr_scheduler_type": "--warmup_steps（预热之后总是线性降到 0）",
    "trainer": "这里的 grpo_step（TRL 的 GRPOTrainer 与它的比较在 benchmarks/grpo.py）",
}
EPSILON = 1e-4  # 除以标准差时加上它，与 TRL 相同


@dataclass
class GRPOSettings(StageSettings):
    reward: Literal["verifier", "reward_model"] | None = option(
        "谁打分：verifier 是程序按标准答案判；reward_model 是奖励模型"
    )
    reward_file: str | None = option(
        "自己写的打分：一个 Python 文件，里面有 reward(questions, replies, ended)"
    )
    reward_model: str | None = option(
        "奖励模型的文件夹；默认是 reward_model.py 的结果，--reward reward_model 时才用"
    )
    num_generations: int | None = option("G：一道题写几个回答")
    max_new_tokens: int | None = option("一个回答最多多少个 token")
    max_steps: int | None = option("更新几步（几批回答）", limits=Limits(at_least=1))
    micro_batch_size: int | None = option("前向、反向一次算几个回答：梯度累加，结果与一次算完相同")
    grpo_epochs: int = option("每批回答用来更新几遍；大于 1，概率比才会离开 1，裁剪才有用", 1)
    advantage: Literal["grpo", "dr_grpo", "rloo", "reinforce_pp"] = option(
        "优势：组平均作基线之后，怎样归一", "grpo"
    )
    loss: Literal["grpo", "dapo", "dr_grpo", "gspo", "cispo"] = option(
        "损失：概率比按 token 还是按整段，怎样裁剪，怎样平均", "dapo"
    )
    dynamic_sampling: bool = option("没有信号的组（一组的分全一样）扔掉，另采样补上（DAPO）", False)
    max_rounds: int = option("动态采样最多采几轮，不够就少几组", 4)
    kl_coef: float = option("KL 惩罚的系数 β，加在损失里（k3）；0 就不用参考模型", 0.0)
    clip_range: float = option("概率比裁剪的范围 ε", 0.2)
    clip_range_high: float | None = option("上边的 ε；默认同 clip_range，DAPO 用 0.28")
    ratio_max: float = option("CISPO 的概率比最大多少", 5.0)
    missing_end_penalty: float = option("奖励模型打分时，没有说完的回答扣几分（归一后的分）", 3.0)
    temperature: float = option("采样的温度", 1.0, limits=Limits(above=0))

    def check(self) -> None:
        super().check()
        n, batch = self.num_generations, self.per_device_train_batch_size
        if n == 1:
            raise UserError(
                "--num_generations 至少 2：一组只有一个回答，减去组平均永远是 0，什么也学不到。"
                "想一题只写一个回答，用 ppo_alignment.py（价值网络当基线）。"
            )
        if batch % n:
            raise UserError(
                f"--per_device_train_batch_size 是一步几个回答，要是 --num_generations {n} 的倍数，给的是 {batch}。"
            )
        if self.dynamic_sampling and num_processes() > 1:
            raise UserError("--dynamic_sampling 只能用一个进程：各进程要补几组不一样，会互相等。")


def grpo_step(policy, reference, optimizer, draw, score, tokenizer, settings, accelerator, generator) -> dict:
    """一轮：draw(第几次) 给出 B 道题，写 N = B·G 个回答，用它们更新 grpo_epochs 遍；返回这一轮的统计。"""
    started = time.perf_counter()
    # 1. 采样与打分。R 是最长的回答的 token 数
    group, given = settings.num_generations, (score, tokenizer, settings, accelerator, generator)
    answers = sample(policy, draw(0), *given)
    rollout, rewards = answers.rollout, answers.rewards  # 掩码 (N, R)，奖励 (N,)
    if settings.dynamic_sampling:
        rollout, rewards = resample(answers, policy, draw, *given)
    sampled = time.perf_counter()

    # 2. 优势。一个回答里每个 token 都一样
    advantages = group_advantages(rewards, group, settings.advantage, accelerator)  # (N,)

    # 3. 更新。先数好平均除以几：没有信号的组不必算，可是照样算进分母
    n_answers = torch.tensor(float(len(rewards)), device=rewards.device)
    n_tokens = accelerator.reduce(rollout.mask.sum().float(), "mean")  # 每个进程平均多少个 token
    keep = useful_answers(rewards, group, settings.kl_coef, accelerator)  # (n,) 行号
    updated: dict = {"loss": 0.0, "clip_fraction": 0.0, "update_kl": 0.0}
    if len(keep):
        used, sizes = (rollout.rows(keep), advantages[keep]), (n_answers, n_tokens)
        updated = update(policy, reference, optimizer, *used, *sizes, settings, accelerator)
    return {
        "score": answers.rewards.mean().item(),
        "advantage": advantages.abs().mean().item(),
        "zero_groups": 1 - has_signal(answers.rewards, group).float().mean().item(),
        "length": answers.rollout.mask.sum(1).float().mean().item(),
        "ended": answers.rollout.ended.float().mean().item(),
        **updated,
        "rollout_s": sampled - started,
        "scoring_s": 0.0,  # 打分算在采样里
        "update_s": time.perf_counter() - sampled,
        "answers": answers,
    }


def has_signal(rewards: Tensor, group: int) -> Tensor:
    """(N,) 的奖励 → (B,)：这一组的奖励不全一样。全一样就没有谁比谁好，学不到什么。"""
    grouped = rewards.view(-1, group)
    return (grouped != grouped[:, :1]).any(1)


def resample(answers, policy, draw, score, tokenizer, settings, accelerator, generator):
    """动态采样（Yu et al. 2025 式 11）：只留有信号的组，不够 B 组就换题再采几次；一组也没有，就还是原来那批。"""
    rollouts, rewards, group, missing = [], [], settings.num_generations, len(answers.rewards)
    for number in range(settings.max_rounds):
        if number:
            answers = sample(policy, draw(number), score, tokenizer, settings, accelerator, generator)
        index = has_signal(answers.rewards, group).repeat_interleave(group).nonzero().squeeze(1)[:missing]
        if len(index):
            rollouts.append(answers.rollout.rows(index))
            rewards.append(answers.rewards[index])
            missing -= len(index)
        if not missing:
            break
    if not rollouts:
        return answers.rollout, answers.rewards
    return join_rollouts(rollouts, tokenizer.pad_token_id), torch.cat(rewards)


def group_advantages(rewards: Tensor, group: int, kind: str, accelerator) -> Tensor:
    """优势 (N,)：比同一道题的其余回答好多少。记组里的奖励 r_1…r_G。

    grpo          (r_i − mean)/std，std 除以 G−1（Shao et al. 2024 第 4.1.1 节；std 的算法同 TRL）
    dr_grpo       r_i − mean：除以 std，就把太难、太易的题放大了（Liu et al. 2025 第 3 节）
    rloo          r_i − 其余 G−1 个的平均 = G/(G−1)·(r_i − mean)，无偏（Ahmadian et al. 2024 式 5）
    reinforce_pp  rloo 的优势，再按整批的均值与标准差归一（Hu et al. 2025 带组基线的那一种）
    """
    grouped = rewards.view(-1, group)
    centred = grouped - grouped.mean(1, keepdim=True)  # (B, G)
    if kind == "grpo":
        return (centred / (grouped.std(1, keepdim=True) + EPSILON)).flatten()
    if kind == "dr_grpo":
        return centred.flatten()
    alone = centred.flatten() * group / (group - 1)
    if kind == "rloo":
        return alone
    every = accelerator.gather(alone)  # 各进程的一起算
    return (alone - every.mean()) / (every.std() + EPSILON)


def useful_answers(rewards: Tensor, group: int, kl_coef: float, accelerator) -> Tensor:
    """要算前向、反向的行号：一组的优势全是 0，梯度恰好是 0，不必算（有 KL 项的除外）。

    几个进程时都算：DDP 每次反向都要等大家，各进程的次数得一样。
    """
    keep = has_signal(rewards, group)
    several = accelerator.num_processes > 1
    if kl_coef or (several and accelerator.reduce(keep.float().sum()) > 0):
        keep[:] = True
    return keep.repeat_interleave(group).nonzero().squeeze(1)


def update(
    policy, reference, optimizer, rollout, advantages, n_answers, n_tokens, settings, accelerator
) -> dict:
    """同一批回答更新策略 grpo_epochs 遍，返回各遍平均的统计。advantages：(N,)；n_answers、n_tokens 见 token_weights。"""
    group, size = settings.num_generations, settings.micro_batch_size
    old_logps = torch.zeros(rollout.mask.shape, device=rollout.ids.device)  # (N, R)
    stats = dict.fromkeys(("loss", "clip_fraction", "update_kl"), 0.0)
    for epoch in range(settings.grpo_epochs):
        for index, part, old in rollout.micro_batches(size, old_logps, group=group):
            with accelerator.autocast():
                logps = group_logps(policy, part, group, settings.temperature)  # (b, R)
            if epoch == 0:  # 还没有更新：现在的就是采样时的
                old = logps.detach()
                old_logps[index, : old.shape[1]] = old
            losses, clipped = token_losses(
                settings.loss, logps, old, advantages[index], part.mask, settings
            )  # (b, R)
            if settings.kl_coef:
                with torch.no_grad(), accelerator.autocast():
                    ref_logps = group_logps(reference, part, group, settings.temperature)
                # Shao et al. 2024 式 3、4：KL 加在损失里，而不是奖励里
                losses = losses + settings.kl_coef * kl_estimate(logps, ref_logps, "k3")
            weights = token_weights(settings.loss, part.mask, n_answers, n_tokens, settings.max_new_tokens)
            loss = (losses * weights).sum()
            accelerator.backward(loss)
            share = part.mask / n_tokens
            stats["loss"] += loss.detach()
            stats["clip_fraction"] += (clipped * share).sum()
            stats["update_kl"] += (kl_estimate(old, logps.detach(), "k3") * share).sum()
        accelerator.clip_grad_norm_(policy.parameters(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return {name: float(total) / settings.grpo_epochs for name, total in stats.items()}


def token_losses(kind: str, logps: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, settings):
    """每个 token 的损失 (b, R)，和它被裁剪了没有。ρ = π/π_old，A 是整个回答的优势 (b,)。

    grpo、dapo、dr_grpo  −min(ρA, clip(ρ, 1−ε, 1+ε')A)；DAPO 放宽上边，ε' > ε（Yu et al. 2025 式 10）
    gspo                 同上，但 ρ 是整段的几何平均 (π/π_old)^(1/|o|)（Zheng et al. 2025 式 7）
    cispo                −sg(min(ρ, ρ_max))·A·log π：裁剪的是权重，梯度一个也不丢（MiniMax 2025 式 4）
    """
    advantages = advantages[:, None]  # (b, 1)
    log_ratio = logps - old  # (b, R)
    if kind == "gspo":
        mean = (log_ratio * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
        log_ratio = mean.expand_as(log_ratio)
    ratio = torch.exp(log_ratio)
    if kind == "cispo":
        weight = ratio.clamp(max=settings.ratio_max).detach()
        return -weight * advantages * logps, (ratio > settings.ratio_max) & (advantages > 0)
    high = settings.clip_range if settings.clip_range_high is None else settings.clip_range_high
    unclipped, clipped = ratio * advantages, ratio.clamp(1 - settings.clip_range, 1 + high) * advantages
    return -torch.min(unclipped, clipped), clipped < unclipped


def token_weights(kind: str, mask: Tensor, n_answers: Tensor, n_tokens: Tensor, max_new_tokens: int):
    """每个 token 的权重 (b, R)，加权的和就是损失。n_answers、n_tokens：整个更新步（每个进程平均）有几个回答、几个 token。

    grpo、gspo   先在回答里平均，再在回答间平均：1/(N·|o_i|)，长回答里的每个 token 分到的少（Shao et al. 2024 式 3）
    dapo、cispo  每个 token 一样重：1/Σ|o_i|（Yu et al. 2025 式 8）
    dr_grpo      除以一个常数 N·max_new_tokens：长短都不偏（Liu et al. 2025 第 3 节）
    """
    if kind in ("grpo", "gspo"):
        return mask / mask.sum(1, keepdim=True) / n_answers
    return mask / (n_tokens if kind in ("dapo", "cispo") else n_answers * max_new_tokens)


# ---------------------------------------------------------------- 训练


def train(stage: Stage) -> dict:
    settings = stage.settings
    accelerator = make_accelerator(stage.device, settings)
    if accelerator.distributed_type in SHARDED:
        raise UserError("GRPO 边训练边采样，参数不能分片：换用 ../accelerate_configs/ddp.yaml。")
    device = accelerator.device
    tokenizer, policy = load_causal_lm(stage.model_path)
    _, reference = load_causal_lm(stage.model_path)
    end_chat_turns(policy, tokenizer)
    reward_model = None
    if "reward_model" in stage.parents:
        reward_model = load_reward_model(stage.parents["reward_model"]["path"], tokenizer)
    for frozen in (reference, reward_model):
        if frozen is not None:
            frozen.to(device).eval().requires_grad_(False)
    answered = settings.reward == "verifier" and not settings.reward_file
    convert = partial(to_answered, needed=answered)
    train_rows, heldout, data = load_train_and_eval(settings, "questions", convert)
    rows = drop_long(with_prompts(tokenizer, train_rows), prompt_length, settings.max_length, "提示")
    heldout = drop_long(with_prompts(tokenizer, heldout), prompt_length, settings.max_length, "留出的提示")
    random.Random(settings.seed).shuffle(rows)
    n_rows = settings.per_device_train_batch_size * num_processes()  # 一步几个回答
    prompts = [row["prompt"] for row in rows]
    with accelerator.autocast():
        score = make_score(settings, tokenizer, reference, reward_model, prompts, n_rows)
    policy = policy.to(device)
    optimizer = make_optimizer(policy, settings)
    policy, optimizer = accelerator.prepare(policy, optimizer)
    history: list[dict] = []
    if latest := stage.checkpoint():
        _, history = load_checkpoint(latest, accelerator)
    bar = progress_bar("GRPO", settings.max_steps, len(history))
    for step in range(len(history), settings.max_steps):
        for each in optimizer.param_groups:
            each["lr"] = learning_rate(settings, step)
        # 第 step 轮用哪些题、哪个随机数，只由 (种子, step, 进程) 决定：中断后继续，结果不变
        draw = partial(draw_rows, rows, step, settings, accelerator)
        generator = torch.Generator(device).manual_seed(settings.seed * 1_000_003 + step)
        stats = grpo_step(
            policy, reference, optimizer, draw, score, tokenizer, settings, accelerator, generator
        )
        answers = stats.pop("answers")
        if settings.dataset == "tiny_world":  # 换别的奖励时：奖励涨的时候，回答真的变好了吗？
            both = zip(answers.questions, answers.replies, strict=True)
            scores = [judge(q, r["text"], r["ended"]).score for q, r in both]
            stats["judge_score"] = sum(scores) / len(scores)
        history.append({"step": step + 1, **merge_stats(stats, largest=set())})
        stage.report(history[-1])
        bar.update(1)
        bar.set_postfix_str(f"奖励 {stats['score']:.2f}", refresh=False)
        if (step + 1) % settings.logging_steps == 0:
            bar.write(
                f"  {step + 1:>4} 步  奖励 {stats['score']:+.3f}  |A| {stats['advantage']:.2f}  没信号的组 "
                f"{stats['zero_groups']:.0%}  长度 {stats['length']:.1f}  例：{answers.replies[0]['text']}"
            )
        if (step + 1) % settings.save_steps == 0:
            save_checkpoint(stage, accelerator, step + 1, history)
    bar.close()
    policy = accelerator.unwrap_model(policy)
    length = settings.max_new_tokens
    metrics = measure_aligned(policy, reference, reward_model, tokenizer, heldout, length)
    metrics |= rollout_speed(history, n_rows)
    metrics["completions_per_s"] = metrics["episodes_per_s"]
    return stage.finish(policy, tokenizer, metrics, data, history)


def draw_rows(rows: list[dict], step: int, settings, accelerator, number: int) -> list[dict]:
    """第 step 步、第 number 轮（动态采样才有第 1 轮以后的）、这个进程用的 B 道题，一圈圈地取。"""
    n = settings.per_device_train_batch_size // settings.num_generations
    rounds = settings.max_rounds if settings.dynamic_sampling else 1
    turn = (step * rounds + number) * accelerator.num_processes + accelerator.process_index
    return [rows[(turn * n + i) % len(rows)] for i in range(n)]


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(GRPOSettings, PRESETS, argv, CHAIN.full_model)
    for name, instead in INSTEAD.items():
        if getattr(settings, name) != settings.COMMON[name]:
            raise UserError(f"GRPO 用不着 --{name}，改用 {instead}。")
    if settings.reward_file:
        load_reward_file(settings.reward_file)  # 写错了，不必等上一阶段训练完才知道
    parents = {"model": "sft"}
    if settings.reward == "reward_model" and not settings.reward_file:
        parents["reward_model"] = "reward"
    return run_stage("grpo", settings, parents, train, CHAIN)


if __name__ == "__main__":
    run_main(main)
