"""采样与打分：policy 写一批回答，再量出每个回答 token 的 log π、价值，和整段的分。PPO、GRPO 都从这里开始。

形状里的字母：B 行，P 是提示的列数（左填充），R 是最长的回答的列数（右填充），回答含结尾的 <|im_end|>。

    roll_out          提示 → Rollout
    response_logps    Rollout → 每个回答 token 的 log π (B, R)
    group_logps       同上，一个提示的几个回答并成一行，提示只算一遍（GRPO）
    response_values   Rollout → 写出每个回答 token 之前的价值 (B, R)
    score_responses   Rollout → 整段的分 (B,)

后四个都收 micro_batch_size：一次前向几行。行按长度排好再切，少算填充，也少占内存；结果与一次算完的只差舍入。
score_with_logps、score_with_values 是它们不要梯度的合用，reference_scores 量出起点的分数有多高、多散。
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from nlp_common.fast.columns import labelled_logits
from nlp_common.fast.shared_prompts import merge_groups
from nlp_common.lm.chatml import prompt_ids
from nlp_common.lm.generation import (
    pad_left,
    padded_positions,
    stop_tokens,
    stream_groups,
    stream_tokens,
    takes_4d_masks,
)
from nlp_common.lm.losses import IGNORE, token_logps

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Rollout:
    """一批回答。"""

    ids: torch.Tensor  # (B, P+R)
    attention_mask: torch.Tensor  # (B, P+R)，真实 token 为 1
    position_ids: torch.Tensor  # (B, P+R)
    mask: torch.Tensor  # (B, R)，回答里的真实 token 为 True，每一列至少有一个
    ended: torch.Tensor  # (B,)，自己说完的为 True

    @property
    def responses(self) -> torch.Tensor:
        """回答的 token，(B, R)。"""
        return self.ids[:, -self.mask.shape[1] :]

    @property
    def labels(self) -> torch.Tensor:
        """(B, P+R)：回答的真实 token，其余是 IGNORE。"""
        labels = torch.full_like(self.ids, IGNORE)
        labels[:, -self.mask.shape[1] :] = self.responses.masked_fill(~self.mask, IGNORE)
        return labels

    @property
    def columns_before(self) -> torch.Tensor:
        """(R,) 列号：每个回答 token 的前一列；位置 t 的输出说的是位置 t+1。"""
        total, width = self.ids.shape[1], self.mask.shape[1]
        return torch.arange(total - width - 1, total - 1, device=self.ids.device)

    def rows(self, index: torch.Tensor) -> Rollout:
        """取出几行，去掉它们用不着的填充列。index：(b,) 行号。"""
        width = self.mask.shape[1]
        left = int(self.attention_mask[index, :-width].sum(1).max())  # 这几行里最长的提示
        right = int(self.mask[index].sum(1).max())  # 最长的回答
        first = self.ids.shape[1] - width - left
        columns = slice(first, first + left + right)
        return Rollout(
            ids=self.ids[index, columns],
            attention_mask=self.attention_mask[index, columns],
            position_ids=self.position_ids[index, columns],
            mask=self.mask[index, :right],
            ended=self.ended[index],
        )

    def micro_batches(self, size: int | None, *each_token: torch.Tensor, group: int = 1) -> Iterator[tuple]:
        """按长度排好，每 size 行一份（None 就只有一份），依次给出 (行号 (b,), 这几行, each_token 的这几行…)。

        each_token 是每个回答 token 一个数的张量 (B, R)，切成这几行的 (b, R)：R 变成这几行里最长的。
        相邻的 group 行是同一提示的回答，总在一份里。
        """
        order = self.attention_mask.sum(1).view(-1, group).amax(1).argsort(stable=True)  # 第几组
        for groups in order.split(max(1, (size or len(self.ids)) // group)):
            index = (groups[:, None] * group + torch.arange(group, device=groups.device)).flatten()
            part = self.rows(index)
            width = part.mask.shape[1]
            yield index, part, *(tensor[index, :width] for tensor in each_token)


def with_prompts(tokenizer: PreTrainedTokenizerBase, rows: list[dict]) -> list[dict]:
    """每行（带 ``"messages"``）加上 ``"prompt"``：等着模型接下去的 token 列表。"""
    return [row | {"prompt": prompt_ids(tokenizer, row["messages"])} for row in rows]


def prompt_length(row: dict) -> int:
    return len(row["prompt"])


def roll_out(
    policy: PreTrainedModel,
    prompts: list[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    share: tuple[int, int] = (0, 1),
    group: int = 1,
) -> Rollout:
    """policy 按温度采样，每个提示（token 列表）写 group 个回答，同一提示的相邻：(B·group) 行。

    share=(i, n)：这些提示是 n 个进程里第 i 个的那一份，见 generation.pick_next。
    """
    policy.eval()
    device = next(policy.parameters()).device
    pad_id, stops = tokenizer.pad_token_id, stop_tokens(tokenizer)
    prompt, prompt_mask = pad_left(prompts, pad_id, device)  # (B, P)
    if group > 1 and takes_4d_masks(policy):  # 提示只算一遍
        tokens = stream_groups(
            policy,
            prompt,
            prompt_mask,
            group,
            max_new_tokens,
            stops,
            pad_id,
            temperature,
            generator=generator,
            share=share,
        )
        prompt, prompt_mask = (each.repeat_interleave(group, 0) for each in (prompt, prompt_mask))
    else:
        prompt, prompt_mask = (each.repeat_interleave(group, 0) for each in (prompt, prompt_mask))
        tokens = stream_tokens(
            policy,
            prompt,
            prompt_mask,
            max_new_tokens,
            stops,
            pad_id,
            temperature,
            generator=generator,
            share=share,
        )
    responses = torch.stack(list(tokens), 1)  # (B, R)
    is_stop = torch.isin(responses, torch.tensor(stops, device=device))
    mask = is_stop.cumsum(1) - is_stop.int() == 0  # 第一个结束符及它之前
    attention_mask = torch.cat([prompt_mask, mask.long()], 1)
    return Rollout(
        ids=torch.cat([prompt, responses], 1),
        attention_mask=attention_mask,
        position_ids=padded_positions(attention_mask),
        mask=mask,
        ended=(is_stop & mask).any(1),
    )


def join_rollouts(rollouts: list[Rollout], pad_id: int) -> Rollout:
    """几批回答接成一批：提示左填充、回答右填充到同样宽。"""
    left = max(each.ids.shape[1] - each.mask.shape[1] for each in rollouts)
    right = max(each.mask.shape[1] for each in rollouts)
    ids, attention, masks = [], [], []
    for each in rollouts:
        width = each.mask.shape[1]
        sides = (left - (each.ids.shape[1] - width), right - width)
        ids.append(F.pad(each.ids, sides, value=pad_id))
        attention.append(F.pad(each.attention_mask, sides))
        masks.append(F.pad(each.mask, (0, sides[1])))
    attention_mask = torch.cat(attention)
    return Rollout(
        ids=torch.cat(ids),
        attention_mask=attention_mask,
        position_ids=padded_positions(attention_mask),
        mask=torch.cat(masks),
        ended=torch.cat([each.ended for each in rollouts]),
    )


def group_logps(
    model: PreTrainedModel,
    rollout: Rollout,
    group: int,
    temperature: float = 1.0,
    micro_batch_size: int | None = None,
) -> torch.Tensor:
    """同 response_logps，但相邻的 group 行是同一提示的回答：并成一行，提示只算一遍（fast/shared_prompts.py）。"""
    bare = getattr(model, "module", model)  # DistributedDataParallel 的外壳里面
    if not takes_4d_masks(bare):
        return response_logps(model, rollout, temperature, micro_batch_size)
    logps = None
    for index, part in rollout.micro_batches(micro_batch_size, group=group):
        merged = merge_groups(part.ids, part.attention_mask, part.mask, group)
        if merged is None:
            found = response_logps(model, part, temperature)
        else:
            logits = labelled_logits(
                model,
                merged.input_ids,
                merged.keep,
                attention_mask=merged.attention_mask,
                position_ids=merged.position_ids,
            )  # (M, V)，M 是真实 token 的个数
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            if temperature != 1:
                logits = logits / temperature
            each = -F.cross_entropy(logits, part.responses[part.mask], reduction="none")  # (M,)
            found = torch.zeros(part.mask.shape, dtype=each.dtype, device=each.device)
            found = found.masked_scatter(part.mask, each)
        if logps is None:
            logps = found.new_zeros(rollout.mask.shape)
        logps[index, : found.shape[1]] = found
    assert logps is not None
    return logps


def response_logps(
    model: PreTrainedModel, rollout: Rollout, temperature: float = 1.0, micro_batch_size: int | None = None
) -> torch.Tensor:
    """log π(a_t | s_t)，(B, R)：每个回答 token 的对数概率，回答之外是 0。"""
    logps = torch.zeros(rollout.mask.shape, device=rollout.ids.device)
    for index, part in rollout.micro_batches(micro_batch_size):
        logps[index, : part.mask.shape[1]] = token_logps(
            model,
            part.ids,
            part.labels,
            temperature,
            attention_mask=part.attention_mask,
            position_ids=part.position_ids,
        )
    return logps


def response_values(
    model: PreTrainedModel, rollout: Rollout, micro_batch_size: int | None = None
) -> torch.Tensor:
    """V(s_t)，(B, R)：写出第 t 个 token 之前，估计整段最终能拿多少分；回答之外的数没有意义。

    model 是 loading.load_value_model 载入的：只算 logits_to_keep 那几列。
    """
    values = torch.zeros(rollout.mask.shape, device=rollout.ids.device)
    for index, part in rollout.micro_batches(micro_batch_size):
        logits = model(
            input_ids=part.ids,
            attention_mask=part.attention_mask,
            position_ids=part.position_ids,
            use_cache=False,
            logits_to_keep=part.columns_before,
        ).logits  # (b, R, 1)
        values[index, : part.mask.shape[1]] = logits.squeeze(-1).float()
    return values


@torch.no_grad()
def score_responses(
    reward_model: PreTrainedModel, rollout: Rollout, pad_id: int, micro_batch_size: int | None = None
) -> torch.Tensor:
    """奖励模型在回答的最后一个字上的分，(B,)。

    结束符换成填充，奖励模型就像训练时一样读到最后一个字为止。
    """
    scores = torch.zeros(len(rollout.ids), device=rollout.ids.device)
    for index, part in rollout.micro_batches(micro_batch_size):
        last = part.mask.sum(1) - 1  # (b,)
        is_end = torch.zeros_like(part.mask).scatter(1, last[:, None], part.ended[:, None])  # (b, R)
        ids = part.ids.clone()
        ids[:, -part.mask.shape[1] :][is_end] = pad_id
        logits = reward_model(
            input_ids=ids,
            attention_mask=part.attention_mask,
            position_ids=part.position_ids,
            use_cache=False,
        ).logits  # (b, 1)
        scores[index] = logits.squeeze(-1).float()
    return scores


@torch.no_grad()
def score_with_logps(
    models: Sequence[PreTrainedModel], rollout: Rollout, temperature: float, micro_batch_size: int | None
) -> list[torch.Tensor]:
    """几个语言模型（更新之前的 policy、reference）各自的 log π → 列表，每个是 (B, R)。"""
    return [response_logps(model, rollout, temperature, micro_batch_size) for model in models]


@torch.no_grad()
def score_with_values(
    value_model: PreTrainedModel,
    reward_model: PreTrainedModel,
    rollout: Rollout,
    pad_id: int,
    micro_batch_size: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """更新之前的价值 (B, R)，与整段的分 (B,)。"""
    values = response_values(value_model, rollout, micro_batch_size)
    return values, score_responses(reward_model, rollout, pad_id, micro_batch_size)


def reference_scores(
    reference: PreTrainedModel,
    reward_model: PreTrainedModel,
    prompts: list[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    batch_size: int,
    n: int = 128,
) -> tuple[float, float]:
    """reference 回答前 n 个提示，奖励模型给的分的均值与标准差：分数的零点和尺度是任意的，要按它归一。"""
    generator = torch.Generator(next(reference.parameters()).device).manual_seed(seed)
    scores = []
    for start in range(0, min(n, len(prompts)), batch_size):
        batch = prompts[start : start + batch_size]
        rollout = roll_out(reference, batch, tokenizer, max_new_tokens, temperature, generator)
        scores.append(score_responses(reward_model, rollout, tokenizer.pad_token_id))
    every = torch.cat(scores)
    return every.mean().item(), max(every.std(correction=0).item(), 1e-3)  # 只有一个回答时标准差是 0


def rollout_speed(history: list[dict], batch: int) -> dict[str, float]:
    """历史的每条是一步 → 采样、打分、更新平均各几秒，每秒多少个回答、多少个回答的 token；batch 是一步几个回答。"""
    names = ("rollout_s", "scoring_s", "update_s", "length")
    means = {name: sum(row[name] for row in history) / len(history) for name in names}
    length = means.pop("length")
    rate = batch / sum(means.values())
    return means | {
        "episodes_per_s": rate,
        "train_samples_per_s": rate,
        "train_tokens_per_s": length * rate,
    }
