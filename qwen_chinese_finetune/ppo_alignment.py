"""PPO：让 SFT 模型自己回答，奖励模型打分，按分数一点点改；KL 惩罚拉住它，别为了分数说胡话。

学到什么：一轮 PPO 的五步——采样、打分（奖励 + 逐 token 的 KL 惩罚）、GAE、裁剪的策略损失、裁剪的价值损失。四个模型各管一事：

    policy（在学）──采样──▶ 回答 ──▶ reward（冻住）给整段打分
       ▲                     │  └──▶ reference（冻住的 SFT）给每个 token 的 KL
       └──── 优势 ◀── GAE ◀── value（在学，从奖励模型开始）估计每个位置还能拿多少分

运行：
    python ppo_alignment.py                                # 自动选预设
    python ppo_alignment.py --preset tiny                  # 离线小世界
    python ppo_alignment.py --preset full                  # 需要加速器

预期输出（tiny，实测见 README.md）：奖励升一个标准差以上，采样回答九成以上又对、又完整、又有礼，每个 token 的 KL 不到 0.6 nats。

参考：Schulman et al. 2017（PPO）；Schulman et al. 2016（GAE）；Ziegler et al. 2019；Ouyang et al. 2022。
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
from nlp_common.base.arguments import Limits, option
from nlp_common.base.errors import UserError
from nlp_common.base.processes import merge_stats, num_processes
from nlp_common.data.chats import to_questions
from nlp_common.fast.together import together
from nlp_common.lm.loading import end_chat_turns, load_causal_lm, load_reward_model, load_value_model
from nlp_common.lm.replies import reply_of
from nlp_common.lm.rollout import (
    prompt_length,
    reference_scores,
    response_logps,
    response_values,
    roll_out,
    rollout_speed,
    score_with_logps,
    score_with_values,
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

PRESETS = {
    "tiny": {
        "dataset": "tiny_world",
        "max_train_samples": 2000,
        "max_length": 256,
        "max_steps": 28,
        "per_device_train_batch_size": 48,
        "micro_batch_size": 16,
        "learning_rate": 2e-4,
        "max_new_tokens": 24,
        "save_steps": 10,
    },
    "full": {
        "dataset": "shibing624/DPO-En-Zh-20k-Preference:zh",
        "max_train_samples": 5000,
        "max_length": 512,
        "max_steps": 200,
        "per_device_train_batch_size": 16,
        "micro_batch_size": 4,
        "learning_rate": 1e-5,
        "max_new_tokens": 128,
        "save_steps": 20,
    },
}

INSTEAD = {  # 各阶段共有、PPO 却用不着的参数 → 该用哪个
    "gradient_accumulation_steps": "--micro_batch_size（每批切成几份，结果不变）",
    "gradient_checkpointing": "--micro_batch_size（一次算的行数越少，越省显存）",
    "num_train_epochs": "--max_steps（几批回答）与 --ppo_epochs（每批更新几遍）",
    "lr_scheduler_type": "--warmup_steps（预热之后总是线性降到 0）",
    "trainer": "这里的 ppo_step（TRL 已经没有 PPOTrainer）",
}


@dataclass
class PPOSettings(StageSettings):
    reward_model: str | None = option("奖励模型的文件夹；默认是 reward_model.py 的结果")
    max_new_tokens: int | None = option("一个回答最多多少个 token")
    max_steps: int | None = option("更新几步（几批回答）", limits=Limits(at_least=1))
    micro_batch_size: int | None = option("前向、反向一次算几行：梯度累加，结果与一次算完相同")
    ppo_epochs: int = option("每批回答用来更新几遍", 4)
    kl_coef: float = option("KL 惩罚的系数 β：越大离 SFT 模型越近", 0.1)
    kl_estimator: Literal["k1", "k2", "k3"] = option("KL 惩罚用哪个单样本估计", "k1")
    kl_target: float | None = option("每个 token 的 KL 想要多少 nats：给了就每步调整 β（自适应 KL）")
    kl_gain: float = option("自适应 KL 每步最多调整 β 的 0.2 倍乘以它", 0.1)
    max_update_kl: float | None = option("一批之内新旧策略的 KL 超过它，策略在这批上就不再更新；不给则不管")
    gamma: float = option("折扣；一个回答很短，不打折", 1.0)
    lam: float = option("GAE 的 λ：1 是蒙特卡洛，0 是一步自举", 0.95)
    clip_range: float = option("概率比裁剪的范围 ε", 0.2)
    clip_range_value: float = option("价值裁剪的范围", 0.2)
    missing_end_penalty: float = option("没有说完（不以 <|im_end|> 结束）的回答扣几分（归一后的分）", 3.0)
    temperature: float = option("采样的温度", 1.0, limits=Limits(above=0))


@dataclass
class Models:
    policy: torch.nn.Module
    value: torch.nn.Module
    reference: torch.nn.Module
    reward: torch.nn.Module
    score_mean: float  # SFT 的回答在奖励模型那里的均值与标准差
    score_std: float


def ppo_step(models, optimizers, prompts, tokenizer, settings, accelerator, generator, kl_coef) -> dict:
    """policy 回答 B 个提示，再用这批回答更新 ppo_epochs 遍；返回这一轮的统计。R 是最长的回答的 token 数。"""
    started = time.perf_counter()
    # 1. 采样。几个进程合起来（share），采出的与一个进程采一大批相同
    policy, reference = accelerator.unwrap_model(models.policy), models.reference
    share = (accelerator.process_index, accelerator.num_processes)
    sampling = (settings.max_new_tokens, settings.temperature, generator, share)
    with accelerator.autocast():
        rollout = roll_out(policy, prompts, tokenizer, *sampling)
    mask = rollout.mask  # (B, R)
    sampled = time.perf_counter()

    # 2. 打分。log π、log π_ref、价值都是 (B, R)，奖励模型给整段的分是 (B,)
    size, pad_id = settings.micro_batch_size, tokenizer.pad_token_id
    with accelerator.autocast():
        (old_logps, ref_logps), (old_values, scores) = together(
            partial(score_with_logps, (policy, reference), rollout, settings.temperature, size),
            partial(score_with_values, models.value, models.reward, rollout, pad_id, size),
        )

    # 3. 奖励。每个 token 扣 KL，整段的分落在最后一个 token 上
    scaled = response_rewards(
        scores, rollout.ended, models.score_mean, models.score_std, settings.missing_end_penalty
    )  # (B,)
    kl = kl_estimate(old_logps, ref_logps, settings.kl_estimator)  # (B, R)
    rewards = token_rewards(scaled, kl, mask, kl_coef)  # (B, R)

    # 4. 优势。这个 token 比价值网络估计的好多少
    advantages, returns = gae(rewards, old_values, mask, settings.gamma, settings.lam)  # (B, R)
    advantages = whiten(advantages, mask, accelerator)
    scored = time.perf_counter()

    # 5. 更新。策略与价值网络互不相干，各学各的
    n_tokens = accelerator.reduce(mask.sum().float(), "mean")  # 每个进程平均多少个 token
    shared = (n_tokens, settings, accelerator)
    on_policy, on_value = together(
        partial(update_policy, models.policy, optimizers["policy"], rollout, old_logps, advantages, *shared),
        partial(update_value, models.value, optimizers["value"], rollout, old_values, returns, *shared),
    )
    return {
        "score": scores.mean().item(),
        "kl": (((old_logps - ref_logps) * mask).sum() / n_tokens).item(),
        "kl_coef": kl_coef,
        "length": mask.sum(1).float().mean().item(),
        "ended": rollout.ended.float().mean().item(),
        **on_policy,
        **on_value,
        "rollout_s": sampled - started,
        "scoring_s": scored - sampled,
        "update_s": time.perf_counter() - scored,
        "replies": [ids[real].tolist() for ids, real in zip(rollout.responses, mask, strict=True)],
    }


def response_rewards(scores: Tensor, ended: Tensor, mean: float, std: float, missing_end_penalty: float):
    """分数 (B,) → 奖励 (B,)：按 SFT 回答的均值和标准差归一；没说完的再扣分，免得模型学会不停地说。

    成对的损失只管谁高谁低，分数的零点和尺度是任意的；归一之后，kl_coef、clip_range_value 在哪个奖励模型上
    都是同一个意思。
    """
    return (scores - mean) / std - missing_end_penalty * (~ended)


def kl_estimate(logps: Tensor, ref_logps: Tensor, kind: str = "k1") -> Tensor:
    """KL(π‖π_ref) 的单样本估计（Schulman 2020，"Approximating KL Divergence"），形状不变。

    样本来自 π，记 d = log π − log π_ref：k1 = d，无偏，但单个样本可以是负的；k2 = d²/2，非负、波动小，有偏；
    k3 = e^(−d) − 1 + d，非负而且无偏。
    """
    d = logps - ref_logps
    if kind == "k1":
        return d
    return d**2 / 2 if kind == "k2" else torch.exp(-d) - 1 + d


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """每个 token 的奖励，(B, R)：处处是 −β·KL，最后一个真实 token 再加整段的分数 (B,)。

    Ziegler et al. 2019 式 2、Ouyang et al. 2022 式 2 的前两项；奖励模型只在末尾说一次话，中间的 token 只有 KL。
    """
    last = mask.sum(1) - 1  # (B,)
    return (-kl_coef * kl * mask).scatter_add(1, last[:, None], scores[:, None])


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """广义优势估计（Schulman et al. 2016 式 16）。(B, R) → 优势与回报，都是 (B, R)。

    δ_t = r_t + γ·V_{t+1} − V_t；A_t = δ_t + γλ·A_{t+1}；回答结束之后的价值是 0。
    """
    values = values * mask
    advantages = torch.zeros_like(rewards)
    next_advantage = next_value = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = (delta + gamma * lam * next_advantage) * mask[:, t]
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, advantages + values


def whiten(advantages: Tensor, mask: Tensor, accelerator) -> Tensor:
    """减均值、除标准差，只算真实 token（各进程的一起算）：学习率从此不必随奖励的尺度调整。"""
    n = accelerator.reduce(mask.sum())
    mean = accelerator.reduce((advantages * mask).sum()) / n
    variance = accelerator.reduce(((advantages - mean) ** 2 * mask).sum()) / n
    return (advantages - mean) * torch.rsqrt(variance + 1e-8) * mask


def update_policy(policy, optimizer, rollout, old_logps, advantages, n_tokens, settings, accelerator) -> dict:
    """同一批回答更新策略 ppo_epochs 遍，返回各遍平均的统计。old_logps、advantages：(B, R)。"""
    epochs, size = [], settings.micro_batch_size
    for _ in range(settings.ppo_epochs):
        stats = {"clip_fraction": 0.0, "update_kl": 0.0, "ratio_max": 0.0}
        for _, part, old, advantage in rollout.micro_batches(size, old_logps, advantages):  # (b, R)
            with accelerator.autocast():
                logps = response_logps(policy, part, settings.temperature)  # (b, R)
            loss, clipped = policy_loss(logps, old, advantage, part.mask, settings.clip_range)
            # 这一份占全批 token 的几成：梯度累加起来等于整批的。DDP 对各进程的梯度求平均，所以按进程平均的 token 数算
            share = part.mask.sum() / n_tokens
            accelerator.backward(loss * share)
            logps = logps.detach()
            stats["clip_fraction"] += clipped * share
            stats["update_kl"] += kl_estimate(old, logps, "k3")[part.mask].mean() * share
            stats["ratio_max"] = max(stats["ratio_max"], torch.exp(logps - old)[part.mask].max())
        epochs.append(stats)
        limit = settings.max_update_kl
        if limit is not None and accelerator.reduce(stats["update_kl"], "mean") > limit:
            optimizer.zero_grad()  # 离采样时太远，旧样本上的梯度不再可信
            break
        accelerator.clip_grad_norm_(policy.parameters(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    means = {name: float(sum(stats[name] for stats in epochs)) / len(epochs) for name in epochs[0]}
    return {"epochs": len(epochs), **means}


def policy_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, clip: float):
    """裁剪的策略损失（Schulman et al. 2017 式 7）→ (标量, 被裁剪的 token 占比)。

    −E[min(ρA, clip(ρ, 1−ε, 1+ε)A)]，ρ = π/π_old：好处最多拿到 ε 为止，坏处不封顶。
    """
    ratio = torch.exp(logps - old_logps)
    unclipped, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    loss = -torch.min(unclipped, clipped)[mask].mean()
    return loss, (clipped < unclipped)[mask].float().mean()


def update_value(value, optimizer, rollout, old_values, returns, n_tokens, settings, accelerator) -> dict:
    """同一批回答更新价值网络 ppo_epochs 遍。old_values、returns：(B, R)。"""
    total, size = 0.0, settings.micro_batch_size
    for _ in range(settings.ppo_epochs):
        for _, part, old, target in rollout.micro_batches(size, old_values, returns):  # (b, R)
            with accelerator.autocast():
                values = response_values(value, part)  # (b, R)
            loss = value_loss(values, old, target, part.mask, settings.clip_range_value)
            share = part.mask.sum() / n_tokens
            accelerator.backward(loss * share)
            total += loss.detach() * share
        accelerator.clip_grad_norm_(value.parameters(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return {"value_loss": float(total) / settings.ppo_epochs}


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float) -> Tensor:
    """裁剪的价值损失（标量）：一次更新里价值不许离旧值超过 clip，取两者中较大的误差。"""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2)[mask].mean()


# ---------------------------------------------------------------- 训练


def train(stage: Stage) -> dict:
    settings = stage.settings
    accelerator = make_accelerator(stage.device, settings)
    if accelerator.distributed_type in SHARDED:
        raise UserError("PPO 边训练边采样，参数不能分片：换用 ../accelerate_configs/ddp.yaml。")
    tokenizer, models = load_models(stage, accelerator.device)
    train_rows, heldout, data = load_train_and_eval(settings, "questions", to_questions)
    rows = drop_long(with_prompts(tokenizer, train_rows), prompt_length, settings.max_length, "提示")
    heldout = drop_long(with_prompts(tokenizer, heldout), prompt_length, settings.max_length, "留出的提示")
    random.Random(settings.seed).shuffle(rows)
    batch = settings.per_device_train_batch_size
    n_rows = batch * num_processes()  # 一步几个回答
    length, temperature = settings.max_new_tokens, settings.temperature
    prompts = [row["prompt"] for row in rows]
    with accelerator.autocast():  # 各进程算的都一样，也与一个进程时一样
        mean, std = models.score_mean, models.score_std = reference_scores(
            models.reference, models.reward, prompts, tokenizer, length, temperature, settings.seed, n_rows
        )
    print(f"  SFT 的回答平均 {mean:+.2f} 分，标准差 {std:.2f}：奖励按它归一。")
    with torch.no_grad():  # 价值从奖励模型开始，也换到归一后的尺度
        models.value.score.weight /= std
        models.value.score.bias -= mean / std
    on_policy, on_value = make_optimizer(models.policy, settings), make_optimizer(models.value, settings)
    models.policy, on_policy, models.value, on_value = accelerator.prepare(
        models.policy, on_policy, models.value, on_value
    )
    optimizers = {"policy": on_policy, "value": on_value}
    history: list[dict] = []
    if latest := stage.checkpoint():
        _, history = load_checkpoint(latest, accelerator)
    bar = progress_bar("PPO", settings.max_steps, len(history))
    for step in range(len(history), settings.max_steps):
        for group in on_policy.param_groups + on_value.param_groups:
            group["lr"] = learning_rate(settings, step)
        kl_coef = settings.kl_coef
        if history and settings.kl_target is not None:  # 由上一轮决定，所以续训时不必另存
            last = history[-1]
            kl_coef = next_kl_coef(last["kl_coef"], last["kl"], settings.kl_target, settings.kl_gain)
        # 第 step 轮用哪些提示、哪个随机数，只由 (种子, step, 进程) 决定：中断后继续，结果不变
        first = (step * accelerator.num_processes + accelerator.process_index) * batch
        chosen = [rows[(first + i) % len(rows)] for i in range(batch)]
        prompts = [row["prompt"] for row in chosen]
        generator = torch.Generator(accelerator.device).manual_seed(settings.seed * 1_000_003 + step)
        stats = ppo_step(models, optimizers, prompts, tokenizer, settings, accelerator, generator, kl_coef)
        replies = [reply_of(tokenizer, ids) for ids in stats.pop("replies")]
        if settings.dataset == "tiny_world":  # 程序知道标准答案：奖励涨的时候，回答真的变好了吗？
            verdicts = [judge(q, r["text"], r["ended"]) for q, r in zip(chosen, replies, strict=True)]
            stats["judge_score"] = sum(v.score for v in verdicts) / batch
        stats = {"step": step + 1, **merge_stats(stats, largest={"ratio_max"})}
        history.append(stats)
        stage.report(stats)
        bar.update(1)
        bar.set_postfix_str(f"奖励 {stats['score']:.2f} KL {stats['kl']:.3f}", refresh=False)
        if (step + 1) % settings.logging_steps == 0:
            bar.write(
                f"  {step + 1:>4} 步  奖励 {stats['score']:+.2f}  KL {stats['kl']:.3f}  长度 {stats['length']:.1f}"
                f"  裁剪 {stats['clip_fraction']:.2f}  价值损失 {stats['value_loss']:.3f}  例：{replies[0]['text']}"
            )
        if (step + 1) % settings.save_steps == 0:
            save_checkpoint(stage, accelerator, step + 1, history)
    bar.close()
    policy = accelerator.unwrap_model(models.policy)
    metrics = measure_aligned(policy, models.reference, models.reward, tokenizer, heldout, length)
    metrics |= rollout_speed(history, n_rows)
    return stage.finish(policy, tokenizer, metrics, data, history)


def load_models(stage: Stage, device: torch.device):
    """→ (分词器, 四个模型)：policy 与 reference 从同一个 SFT 模型开始，value 从奖励模型开始。"""
    tokenizer, policy = load_causal_lm(stage.model_path)
    _, reference = load_causal_lm(stage.model_path)
    end_chat_turns(policy, tokenizer)
    reward_path = stage.parents["reward_model"]["path"]
    reward = load_reward_model(reward_path, tokenizer)
    value = load_value_model(reward_path, tokenizer)
    for frozen in (reference, reward):
        frozen.to(device).eval().requires_grad_(False)
    return tokenizer, Models(policy.to(device), value.to(device), reference, reward, 0.0, 1.0)


def learning_rate(settings: PPOSettings, step: int) -> float:
    """先线性预热，再线性降到 0。刚开始时 Adam 的二阶矩只见过一两批，走满步容易一下走远。"""
    steps = settings.warmup_steps
    warmup = steps if steps >= 1 else steps * settings.max_steps  # 小于 1 的是比例
    return settings.learning_rate * min(1.0, (step + 1) / max(1.0, warmup)) * (1 - step / settings.max_steps)


def next_kl_coef(kl_coef: float, kl: float, target: float, gain: float) -> float:
    """自适应 KL（Ziegler et al. 2019 第 2.2 节）：KL 比目标大，就把 β 调大一点；比目标小，就调小一点。

    e = clip(KL/目标 − 1, −0.2, 0.2)，β ← β·(1 + gain·e)。
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + gain * error)


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(PPOSettings, PRESETS, argv, CHAIN.full_model)
    for name, instead in INSTEAD.items():
        if getattr(settings, name) != settings.COMMON[name]:
            raise UserError(f"PPO 用不着 --{name}，改用 {instead}。")
    return run_stage("ppo", settings, {"model": "sft", "reward_model": "reward"}, train, CHAIN)


if __name__ == "__main__":
    run_main(main)
