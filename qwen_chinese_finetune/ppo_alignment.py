"""PPO：让 SFT 模型自己回答，奖励模型打分，按分数一点点改；KL 惩罚拉住它，别为了分数说胡话。

学到什么：一轮 PPO 的五步——采样、打分（奖励 + 逐 token 的 KL 惩罚）、GAE、裁剪的策略损失、裁剪的价值损失。
四个模型各管一事：

    policy（在学）──采样──▶ 回答 ──▶ reward（冻住）给整段打分
       ▲                     │  └──▶ reference（冻住的 SFT）给每个 token 的 KL
       └──── 优势 ◀── GAE ◀── value（在学，从奖励模型开始）估计每个位置还能拿多少分

运行：
    python ppo_alignment.py                                # 自动选预设
    python ppo_alignment.py --preset tiny                  # 离线小世界
    python ppo_alignment.py --preset full                  # 需要加速器

预期输出（tiny，实测见本文件夹的 README.md）：奖励升高一个标准差以上，又对、又完整、又有礼的采样回答从两成多
升到 90% 以上，贪心正确率不降，每个 token 对 SFT 的 KL 不到 0.6 nats。

参考：Schulman et al. 2017（PPO）；Schulman et al. 2016（GAE）；Ziegler et al. 2019；Ouyang et al. 2022。
"""

from nlp_common.base.cli import run_main

import random
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator, DistributedType

from chain import CHAIN
from nlp_common.base.arguments import option
from nlp_common.base.device import precision
from nlp_common.base.errors import UserError
from nlp_common.base.processes import gather, is_main, num_processes
from nlp_common.data.chats import to_questions
from nlp_common.fast.columns import only_columns
from nlp_common.fast.together import together
from nlp_common.lm.chatml import prompt_ids
from nlp_common.lm.generation import pad_left, padded_positions, stop_tokens, stream_tokens
from nlp_common.lm.loading import end_chat_turns, load_causal_lm, load_reward_model, load_value_model
from nlp_common.lm.replies import reply_of, reply_to, score_replies, token_kl
from nlp_common.tiny.judge import judge, measure_chat
from nlp_common.train.checkpoints import load_training_state, save_training_state
from nlp_common.train.splits import drop_long, load_train_and_eval
from nlp_common.train.stage import Stage, StageSettings, parse_settings, run_stage
from nlp_common.train.trainer import progress_bar

PRESETS = {
    "tiny": {
        "dataset": "tiny_world",
        "max_train_samples": 2000,
        "max_length": 256,
        "max_steps": 28,
        "per_device_train_batch_size": 48,
        "micro_batch_size": 16,
        "learning_rate": 2e-4,
        "kl_coef": 0.1,
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
        "kl_coef": 0.1,
        "max_new_tokens": 128,
        "save_steps": 20,
    },
}

# 各阶段共有、PPO 却用不着的参数 → 该用哪个
INSTEAD = {
    "gradient_accumulation_steps": "--micro_batch_size（每批切成几份，结果不变）",
    "gradient_checkpointing": "--micro_batch_size（一次算的行数越少，越省显存）",
    "num_train_epochs": "--max_steps（几批回答）与 --ppo_epochs（每批更新几遍）",
    "lr_scheduler_type": "--warmup_steps（预热之后总是线性降到 0）",
}


@dataclass
class PPOSettings(StageSettings):
    reward_model: str | None = option("奖励模型的文件夹；默认是 reward_model.py 的结果")
    max_new_tokens: int | None = option("一个回答最多多少个 token")
    micro_batch_size: int | None = option(
        "前向、反向一次算几行：长度相近的在一起，梯度累加，结果与一次算完相同"
    )
    ppo_epochs: int = option("每批回答用来更新几遍", 4)
    kl_coef: float | None = option("KL 惩罚的系数 β：越大离 SFT 模型越近")
    kl_estimator: Literal["k1", "k2", "k3"] = option("KL 惩罚用哪个单样本估计", "k1")
    kl_target: float | None = option(
        "每个 token 的 KL 想要多少 nats：给了就每步调整 β（自适应 KL）；不给则 β 不变"
    )
    kl_gain: float = option("自适应 KL 每步最多调整 β 的 0.2 倍乘以它", 0.1)
    max_update_kl: float | None = option("一批之内新旧策略的 KL 超过它，策略在这批上就不再更新；不给则不管")
    gamma: float = option("折扣；一个回答很短，不打折", 1.0)
    lam: float = option("GAE 的 λ：1 是蒙特卡洛，0 是一步自举", 0.95)
    clip_range: float = option("概率比裁剪的范围 ε", 0.2)
    clip_range_value: float = option("价值裁剪的范围", 0.2)
    missing_end_penalty: float = option("没有说完（不以 <|im_end|> 结束）的回答扣几分（归一后的分）", 3.0)
    temperature: float = option("采样的温度", 1.0)


# ---------------------------------------------------------------- 1. 采样


@dataclass
class Rollout:
    """一批回答。P 是提示的列数（左填充），R 是回答的列数（右填充）。"""

    ids: torch.Tensor  # (B, P+R)
    attention_mask: torch.Tensor  # (B, P+R)，真实 token 为 1
    position_ids: torch.Tensor  # (B, P+R)
    mask: torch.Tensor  # (B, R)，回答里的真实 token 为 True，含 <|im_end|>
    ended: torch.Tensor  # (B,)，自己说完的为 True

    @property
    def responses(self) -> torch.Tensor:
        return self.ids[:, -self.mask.shape[1] :]  # (B, R)

    @property
    def before_responses(self) -> torch.Tensor:
        """(R,) 列号：每个回答 token 的前一列；位置 t 的输出说的是位置 t+1。"""
        total, n = self.ids.shape[1], self.mask.shape[1]
        return torch.arange(total - n - 1, total - 1, device=self.ids.device)

    def rows(self, index: torch.Tensor) -> "Rollout":
        """取出几行，去掉它们用不着的填充列。"""
        width = self.mask.shape[1]
        left = int(self.attention_mask[index, :-width].sum(1).max())  # 这几行里最长的提示
        right = int(self.mask[index].sum(1).max())
        first = self.ids.shape[1] - width - left
        columns = slice(first, first + left + right)
        return Rollout(
            ids=self.ids[index, columns],
            attention_mask=self.attention_mask[index, columns],
            position_ids=self.position_ids[index, columns],
            mask=self.mask[index, :right],
            ended=self.ended[index],
        )


def micro_batches(rollout: Rollout, size: int) -> list[tuple[torch.Tensor, Rollout]]:
    """按长度排好，每 size 行一份 → [(行号 (b,), 这几行)]：少算填充，也少占内存。"""
    order = rollout.attention_mask.sum(1).argsort(stable=True)
    return [(index, rollout.rows(index)) for index in order.split(size)]


def for_each_token(
    function: Callable[[Rollout], torch.Tensor], parts: list[tuple[torch.Tensor, Rollout]], like: Rollout
) -> torch.Tensor:
    """逐份算出每个回答 token 的一个数，放回原来的行，(B, R)。"""
    result = torch.zeros(like.mask.shape, device=like.ids.device)
    for index, part in parts:
        result[index, : part.mask.shape[1]] = function(part)
    return result


def roll_out(policy, prompts: list[list[int]], tokenizer, settings, generator, share=(0, 1)) -> Rollout:
    """policy 按温度采样，每个提示一个回答。share=(i, n)：这些提示是 n 个进程里第 i 个的那一份。"""
    policy.eval()
    device = next(policy.parameters()).device
    pad_id, stops = tokenizer.pad_token_id, stop_tokens(tokenizer)
    ids, attention_mask = pad_left(prompts, pad_id, device)
    tokens = stream_tokens(
        policy,
        ids,
        attention_mask,
        settings.max_new_tokens,
        stops,
        pad_id,
        settings.temperature,
        generator=generator,
        share=share,
    )
    responses = torch.stack(list(tokens), 1)  # (B, R)
    is_stop = torch.isin(responses, torch.tensor(stops, device=device))
    mask = is_stop.cumsum(1) - is_stop.int() == 0  # 第一个结束符及它之前
    attention_mask = torch.cat([attention_mask, mask.long()], 1)
    return Rollout(
        ids=torch.cat([ids, responses], 1),
        attention_mask=attention_mask,
        position_ids=padded_positions(attention_mask),
        mask=mask,
        ended=(is_stop & mask).any(1),
    )


def response_logps(model, rollout: Rollout, temperature: float) -> torch.Tensor:
    """log π(a_t | s_t)，(B, R)：每个回答 token 的对数概率。"""
    with only_columns(model, rollout.before_responses):
        logits = model(
            input_ids=rollout.ids,
            attention_mask=rollout.attention_mask,
            position_ids=rollout.position_ids,
            use_cache=False,
            logits_to_keep=rollout.before_responses,
        ).logits  # (B, R, V)
    logits = logits.float() / temperature
    return -F.cross_entropy(logits.transpose(1, 2), rollout.responses, reduction="none")


def response_values(model, rollout: Rollout) -> torch.Tensor:
    """V(s_t)，(B, R)：写出第 t 个 token 之前，估计整段最终能拿多少分。"""
    with only_columns(model, rollout.before_responses):
        values = model(
            input_ids=rollout.ids,
            attention_mask=rollout.attention_mask,
            position_ids=rollout.position_ids,
            use_cache=False,
        ).logits.squeeze(-1)  # (B, P+R)
    return values[:, rollout.before_responses].float()


# ---------------------------------------------------------------- 2. 打分


@torch.no_grad()
def score_responses(reward_model, rollout: Rollout, pad_id: int) -> torch.Tensor:
    """奖励模型在回答的最后一个字上的分数，(B,)。

    结束符换成填充，奖励模型就像训练时一样读到最后一个字为止。
    """
    last = rollout.mask.sum(1) - 1  # (B,)
    is_end = torch.zeros_like(rollout.mask).scatter(1, last[:, None], rollout.ended[:, None])
    ids = rollout.ids.clone()
    ids[:, -rollout.mask.shape[1] :][is_end] = pad_id
    columns = torch.arange(-rollout.mask.shape[1] - 1, 0, device=ids.device) + ids.shape[1]
    with only_columns(reward_model, columns):
        scores = reward_model(
            input_ids=ids,
            attention_mask=rollout.attention_mask,
            position_ids=rollout.position_ids,
            use_cache=False,
        ).logits.squeeze(-1)
    return scores.float()


def response_rewards(
    scores: torch.Tensor, ended: torch.Tensor, mean: float, std: float, missing_end_penalty: float
) -> torch.Tensor:
    """分数 (B,) → 奖励 (B,)：按 SFT 回答的均值和标准差归一；没说完的再扣分，免得模型学会不停地说。

    成对的损失只管谁高谁低，分数的零点和尺度是任意的；归一之后，kl_coef、clip_range_value 在哪个奖励模型上
    都是同一个意思。
    """
    return (scores - mean) / std - missing_end_penalty * (~ended)


def kl_estimate(logps: torch.Tensor, ref_logps: torch.Tensor, kind: str = "k1") -> torch.Tensor:
    """KL(π‖π_ref) 的单样本估计（Schulman 2020，"Approximating KL Divergence"），形状不变。

    样本来自 π，记 d = log π − log π_ref：k1 = d，无偏，但单个样本可以是负的；k2 = d²/2，非负、波动小，有偏；
    k3 = e^(−d) − 1 + d，非负而且无偏。
    """
    d = logps - ref_logps
    if kind == "k1":
        return d
    return d**2 / 2 if kind == "k2" else torch.exp(-d) - 1 + d


def token_rewards(scores: torch.Tensor, kl: torch.Tensor, mask: torch.Tensor, kl_coef: float) -> torch.Tensor:
    """每个 token 的奖励，(B, R)：处处是 −β·KL，最后一个真实 token 再加整段的分数 (B,)。

    Ziegler et al. 2019 式 2、Ouyang et al. 2022 式 2 的前两项；奖励模型只在末尾说一次话，中间的 token 只有 KL。
    """
    last = mask.sum(1) - 1  # (B,)
    return (-kl_coef * kl * mask).scatter_add(1, last[:, None], scores[:, None])


def next_kl_coef(kl_coef: float, kl: float, target: float, gain: float) -> float:
    """自适应 KL（Ziegler et al. 2019 第 2.2 节）：KL 比目标大，就把 β 调大一点；比目标小，就调小一点。

    e = clip(KL/目标 − 1, −0.2, 0.2)，β ← β·(1 + gain·e)。
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + gain * error)


# ---------------------------------------------------------------- 3. 优势


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
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


def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (x * mask).sum() / mask.sum()


def whiten(
    advantages: torch.Tensor, mask: torch.Tensor, add_up: Callable[[torch.Tensor], torch.Tensor] = lambda x: x
) -> torch.Tensor:
    """减均值、除标准差，只算真实 token：学习率从此不必随奖励的尺度调整。add_up 把各进程的数加起来。"""
    n = add_up(mask.sum())
    mean = add_up((advantages * mask).sum()) / n
    variance = add_up(((advantages - mean) ** 2 * mask).sum()) / n
    return (advantages - mean) * torch.rsqrt(variance + 1e-8) * mask


# ---------------------------------------------------------------- 4. 损失


def policy_loss(
    logps: torch.Tensor, old_logps: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, clip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """裁剪的策略损失（Schulman et al. 2017 式 7）→ (标量, 被裁剪的 token 占比)。

    −E[min(ρA, clip(ρ, 1−ε, 1+ε)A)]，ρ = π/π_old：好处最多拿到 ε 为止，坏处不封顶。
    """
    ratio = torch.exp(logps - old_logps)
    unclipped, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    loss = -masked_mean(torch.min(unclipped, clipped), mask)
    return loss, masked_mean((clipped < unclipped).float(), mask)


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor, clip: float
) -> torch.Tensor:
    """裁剪的价值损失（标量）：一次更新里价值不许离旧值超过 clip，取两者中较大的误差。"""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * masked_mean(torch.max((values - returns) ** 2, (clipped - returns) ** 2), mask)


# ---------------------------------------------------------------- 5. 一轮 PPO


@dataclass
class Models:
    policy: torch.nn.Module
    value: torch.nn.Module
    reference: torch.nn.Module
    reward: torch.nn.Module
    score_mean: float  # SFT 的回答在奖励模型那里的均值与标准差
    score_std: float


def sft_scores(reference, reward, prompts, tokenizer, settings, n: int = 128) -> tuple[float, float]:
    """SFT 模型回答前 n 个提示，奖励模型给的分的均值与标准差。"""
    generator = torch.Generator(next(reference.parameters()).device).manual_seed(settings.seed)
    batch = settings.per_device_train_batch_size * num_processes()  # 各进程算的都一样，也与一个进程时一样
    scores = []
    for start in range(0, min(n, len(prompts)), batch):
        rollout = roll_out(reference, prompts[start : start + batch], tokenizer, settings, generator)
        scores.append(score_responses(reward, rollout, tokenizer.pad_token_id))
    every = torch.cat(scores)
    return every.mean().item(), max(every.std(correction=0).item(), 1e-3)  # 只有一个回答时标准差是 0


def update_policy(policy, optimizer, parts, old_logps, advantages, n_tokens, settings, accelerator) -> dict:
    """同一批回答更新策略 ppo_epochs 遍（裁剪的策略损失），返回各遍平均的统计。old_logps、advantages：(B, R)。"""
    epochs = []
    for _ in range(settings.ppo_epochs):
        stats = defaultdict(float)
        for index, part in parts:
            old, advantage = (x[index, : part.mask.shape[1]] for x in (old_logps, advantages))  # (b, R)
            # 这一份占全批 token 的几成：梯度累加起来等于整批的。DDP 对各进程的梯度求平均，所以按进程平均的 token 数算
            share = part.mask.sum() / n_tokens
            with accelerator.autocast():
                logps = response_logps(policy, part, settings.temperature)
            loss, clipped = policy_loss(logps, old, advantage, part.mask, settings.clip_range)
            accelerator.backward(loss * share)
            moved = masked_mean(kl_estimate(old, logps.detach(), "k3"), part.mask)
            stats["clip_fraction"] += (clipped * share).item()
            stats["update_kl"] += (moved * share).item()
            ratio = torch.exp(logps.detach() - old)[part.mask]
            stats["ratio_max"] = max(stats["ratio_max"], ratio.max().item())
        epochs.append(stats)
        if settings.max_update_kl is not None:
            update_kl = accelerator.reduce(torch.tensor(stats["update_kl"], device=old_logps.device), "mean")
            if update_kl.item() > settings.max_update_kl:  # 离采样时太远，旧样本上的梯度不再可信
                optimizer.zero_grad()
                break
        accelerator.clip_grad_norm_(policy.parameters(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    means = {name: sum(stats[name] for stats in epochs) / len(epochs) for name in epochs[0]}
    return {"epochs": len(epochs), **means}


def update_value(value, optimizer, parts, old_values, returns, n_tokens, settings, accelerator) -> dict:
    """同一批回答更新价值网络 ppo_epochs 遍（裁剪的价值损失）。old_values、returns：(B, R)。"""
    total = 0.0
    for _ in range(settings.ppo_epochs):
        for index, part in parts:
            old, target = (x[index, : part.mask.shape[1]] for x in (old_values, returns))  # (b, R)
            share = part.mask.sum() / n_tokens
            with accelerator.autocast():
                values = response_values(value, part)
            loss = value_loss(values, old, target, part.mask, settings.clip_range_value)
            accelerator.backward(loss * share)
            total += (loss * share).item()
        accelerator.clip_grad_norm_(value.parameters(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return {"value_loss": total / settings.ppo_epochs}


def ppo_step(
    models: Models, optimizers: dict, prompts, tokenizer, settings, accelerator, generator, kl_coef: float
) -> dict:
    """采样一批回答，用它更新 ppo_epochs 遍，返回这一轮的统计。"""
    clock = {"start": time.perf_counter()}
    part_of = (accelerator.process_index, accelerator.num_processes)
    with accelerator.autocast():
        policy = accelerator.unwrap_model(models.policy)
        rollout = roll_out(policy, prompts, tokenizer, settings, generator, part_of)
    clock["rollout"] = time.perf_counter()
    models.policy.eval()
    parts = micro_batches(rollout, settings.micro_batch_size)
    mask = rollout.mask

    @torch.no_grad()
    def logps_of(model) -> torch.Tensor:  # (B, R)
        with accelerator.autocast():
            return for_each_token(lambda r: response_logps(model, r, settings.temperature), parts, rollout)

    @torch.no_grad()
    def score() -> tuple[torch.Tensor, torch.Tensor]:  # 价值 (B, R)，整段的分 (B,)
        with accelerator.autocast():
            values = for_each_token(lambda r: response_values(models.value, r), parts, rollout)
            scores = torch.zeros(len(mask), device=mask.device)
            for index, part in parts:
                scores[index] = score_responses(models.reward, part, tokenizer.pad_token_id)
        return values, scores

    (old_logps, ref_logps), (old_values, scores) = together(
        lambda: [logps_of(model) for model in (models.policy, models.reference)], score
    )
    outcome = response_rewards(
        scores, rollout.ended, models.score_mean, models.score_std, settings.missing_end_penalty
    )
    kl = kl_estimate(old_logps, ref_logps, settings.kl_estimator)
    rewards = token_rewards(outcome, kl, mask, kl_coef)
    advantages, returns = gae(rewards, old_values, mask, settings.gamma, settings.lam)
    advantages = whiten(advantages, mask, accelerator.reduce)
    n_tokens = accelerator.reduce(mask.sum().float(), "mean")  # 每个进程平均多少个 token
    clock["scoring"] = time.perf_counter()

    shared = (n_tokens, settings, accelerator)
    on_policy, on_value = together(  # 两个网络互不相干，各学各的
        lambda: update_policy(models.policy, optimizers["policy"], parts, old_logps, advantages, *shared),
        lambda: update_value(models.value, optimizers["value"], parts, old_values, returns, *shared),
    )
    end = time.perf_counter()
    return {
        "score": scores.mean().item(),
        "kl": (((old_logps - ref_logps) * mask).sum() / n_tokens).item(),
        "kl_coef": kl_coef,
        "length": mask.sum(1).float().mean().item(),
        "ended": rollout.ended.float().mean().item(),
        **on_policy,
        **on_value,
        "rollout_s": clock["rollout"] - clock["start"],
        "scoring_s": clock["scoring"] - clock["rollout"],
        "update_s": end - clock["scoring"],
        "replies": [ids[real].tolist() for ids, real in zip(rollout.responses, mask, strict=True)],
    }


# ---------------------------------------------------------------- 6. 训练


def learning_rate(settings: PPOSettings, step: int) -> float:
    """先线性预热，再线性降到 0。刚开始时 Adam 的二阶矩只见过一两批，走满步容易一下走远。"""
    warmup = (
        settings.warmup_steps if settings.warmup_steps >= 1 else settings.warmup_steps * settings.max_steps
    )
    return settings.learning_rate * min(1.0, (step + 1) / max(1.0, warmup)) * (1 - step / settings.max_steps)


def train(stage: Stage) -> dict:
    settings = stage.settings
    accelerator = Accelerator(
        cpu=stage.device.type == "cpu", mixed_precision={"fp32": "no"}.get(p := precision(stage.device), p)
    )
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise UserError("PPO 边训练边采样，参数不能分片：换用 accelerate_configs/ddp.yaml。")
    device = accelerator.device
    tokenizer, policy = load_causal_lm(stage.model_path)
    _, reference = load_causal_lm(stage.model_path)
    end_chat_turns(policy, tokenizer)
    reward_path = stage.parents["reward_model"]["path"]
    reward = load_reward_model(reward_path, tokenizer).to(device).eval().requires_grad_(False)
    reference.to(device).eval().requires_grad_(False)
    value = load_value_model(reward_path, tokenizer)

    train_rows, heldout, data = load_train_and_eval(settings, "questions", to_questions)
    rows = [row | {"prompt": prompt_ids(tokenizer, row["messages"])} for row in train_rows]
    rows = drop_long(rows, lambda row: len(row["prompt"]), settings.max_length, "提示")
    heldout = drop_long(
        heldout, lambda row: len(prompt_ids(tokenizer, row["messages"])), settings.max_length, "留出的提示"
    )
    batch = settings.per_device_train_batch_size
    random.Random(settings.seed).shuffle(rows)

    policy, value = policy.to(device), value.to(device)
    with accelerator.autocast():
        mean, std = sft_scores(reference, reward, [row["prompt"] for row in rows], tokenizer, settings)
    print(f"  SFT 的回答平均 {mean:+.2f} 分，标准差 {std:.2f}：奖励按它归一。")
    with torch.no_grad():  # 价值从奖励模型开始，也换到归一后的尺度
        value.score.weight /= std
        value.score.bias -= mean / std
    optimizers = {
        name: torch.optim.AdamW(
            model.parameters(),
            settings.learning_rate,
            betas=(0.9, settings.adam_beta2),
            weight_decay=settings.weight_decay,
            fused=True,
        )
        for name, model in (("policy", policy), ("value", value))
    }
    history: list[dict] = []
    if latest := stage.checkpoint():
        history = load_training_state(
            latest, {"policy": policy, "value": value}, optimizers, accelerator.scaler
        )
    policy, value = accelerator.prepare(policy, value)
    optimizers = {name: accelerator.prepare(optimizer) for name, optimizer in optimizers.items()}
    models = Models(policy, value, reference, reward, mean, std)

    bar = progress_bar("PPO", settings.max_steps, len(history))
    for step in range(len(history), settings.max_steps):
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(settings, step)
        kl_coef = settings.kl_coef
        if history and settings.kl_target is not None:  # 由上一轮决定，所以续训时不必另存
            last = history[-1]
            kl_coef = next_kl_coef(last["kl_coef"], last["kl"], settings.kl_target, settings.kl_gain)
        # 第 step 轮用哪些提示、哪个随机数，只由 (种子, step, 进程) 决定：中断后继续，结果不变
        first = (step * num_processes() + accelerator.process_index) * batch
        chosen = [rows[(first + i) % len(rows)] for i in range(batch)]
        prompts = [row["prompt"] for row in chosen]
        generator = torch.Generator(device).manual_seed(settings.seed * 1_000_003 + step)
        stats = ppo_step(models, optimizers, prompts, tokenizer, settings, accelerator, generator, kl_coef)
        replies = [reply_of(tokenizer, ids) for ids in stats.pop("replies")]
        if settings.dataset == "tiny_world":  # 程序知道标准答案：奖励涨的时候，回答真的变好了吗？
            verdicts = [judge(q, r["text"], r["ended"]) for q, r in zip(chosen, replies, strict=True)]
            stats["judge_score"] = sum(v.score for v in verdicts) / batch
        history.append({"step": step + 1, **over_processes(stats)})
        stats = history[-1]
        bar.update(1)
        bar.set_postfix_str(f"奖励 {stats['score']:.2f} KL {stats['kl']:.3f}", refresh=False)
        if (step + 1) % settings.logging_steps == 0:
            bar.write(
                f"  {step + 1:>4} 步  奖励 {stats['score']:+.2f}  KL {stats['kl']:.3f}  长度 {stats['length']:.1f}"
                f"  裁剪 {stats['clip_fraction']:.2f}  价值损失 {stats['value_loss']:.3f}  例：{replies[0]['text']}"
            )
        if (step + 1) % settings.save_steps == 0 and is_main():
            unwrapped = {"policy": accelerator.unwrap_model(policy), "value": accelerator.unwrap_model(value)}
            save_training_state(stage, step + 1, unwrapped, optimizers, accelerator.scaler, history)
    bar.close()

    policy = accelerator.unwrap_model(policy)
    metrics = evaluate(stage, policy, reference, reward, tokenizer, heldout) | speed(
        history, batch * num_processes()
    )
    return stage.finish(policy, tokenizer, metrics, data, history)


def over_processes(stats: dict) -> dict:
    """各进程的统计合成一份：最大的取最大，其余取平均。"""
    every = gather([stats])
    return {
        name: max(values) if name == "ratio_max" else sum(values) / len(values)
        for name, values in ((name, [each[name] for each in every]) for name in stats)
    }


def evaluate(stage: Stage, policy, reference, reward, tokenizer, questions: list[dict]) -> dict:
    """留出的题上，训练前（SFT）与训练后：奖励、对 SFT 的 KL；小世界里还有程序的评分。"""
    settings = stage.settings
    tiny = settings.dataset == "tiny_world"
    metrics: dict = {}
    for suffix, model in (("_before", reference), ("", policy)):
        if tiny:
            chat, _, replies = measure_chat(model, tokenizer, questions)
            keep = (
                chat if not suffix else {k: chat[k] for k in ("qa_accuracy", "preferred_rate", "judge_score")}
            )
            metrics |= {k + suffix: v for k, v in keep.items()}
        else:
            replies = reply_to(model, tokenizer, questions, settings.max_new_tokens, temperature=1.0)
        scores = score_replies(reward, tokenizer, questions, replies)
        metrics |= {f"reward_mean{suffix}": scores.mean().item(), f"reward_std{suffix}": scores.std().item()}
    metrics["kl_to_sft"] = token_kl(policy, reference, tokenizer, questions, replies)
    return metrics


def speed(history: list[dict], batch: int) -> dict:
    """各步平均花在采样、打分、更新上的秒数，与每秒多少个回答。"""
    parts = {k: sum(row[k] for row in history) / len(history) for k in ("rollout_s", "scoring_s", "update_s")}
    return parts | {
        "episodes_per_s": batch / sum(parts.values()),
        "train_samples_per_s": batch / sum(parts.values()),
        "train_tokens_per_s": sum(r["length"] for r in history) / len(history) * batch / sum(parts.values()),
    }


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(PPOSettings, PRESETS, argv, CHAIN.full_model)
    for name, instead in INSTEAD.items():
        if getattr(settings, name) != settings.COMMON[name]:
            raise UserError(f"PPO 用不着 --{name}，改用 {instead}。")
    return run_stage("ppo", settings, {"model": "sft", "reward_model": "reward"}, train, CHAIN)


if __name__ == "__main__":
    run_main(main)
