"""成批生成：左填充、KV 缓存、遇到结束符就停。评测、PPO 采样、chat.py 的流式输出都用同一个循环。"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from nlp_common.lm.chatml import IM_END

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def stop_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """对话遇到哪些 token 就算说完：聊天用 <|im_end|>，基座模型训练时见过的文档结束符也算。"""
    ids = [tokenizer.convert_tokens_to_ids(IM_END), tokenizer.eos_token_id]
    return sorted({i for i in ids if i is not None and i >= 0})


def pad_left(
    sequences: list[list[int]], pad_id: int, device: torch.device | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """→ (input_ids, attention_mask)，形状都是 (B, T)。生成要左填充：每一行的最后一列都是真实 token。"""
    width = max(map(len, sequences))
    ids = torch.tensor([[pad_id] * (width - len(s)) + s for s in sequences], device=device)
    mask = torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in sequences], device=device)
    return ids, mask


def padded_positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """(B, T) 的掩码 → 位置编号：填充不占位置，每行从第一个真实 token 的 0 数起。"""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def pick_next(
    logits: torch.Tensor,
    temperature: float,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    share: tuple[int, int] = (0, 1),
) -> torch.Tensor:
    """(B, V) 的 logits → (B,) 的下一个 token。temperature 为 0 即贪心；top_p 是核采样（Holtzman et al. 2020）。

    share=(i, n)：这 B 行是一大批 n·B 行里的第 i 份，用的也是那一大批的第 i 份随机数：n 个进程合起来，
    采出的与一个进程采 n·B 行相同。
    """
    if temperature == 0:
        return logits.argmax(-1)
    probs = sampling_weights(logits, temperature, top_p)
    index, n = share
    if n > 1:  # multinomial 里面也是这样做的：概率除以指数分布的随机数，取最大的
        noise = probs.new_empty(n, *probs.shape).exponential_(generator=generator)[index]
        return (probs / noise).argmax(-1)
    return torch.multinomial(probs, 1, generator=generator).squeeze(-1)


def sampling_weights(logits: torch.Tensor, temperature: float, top_p: float = 1.0) -> torch.Tensor:
    """(…, V) 的 logits → 采样时各 token 的权重 (…, V)；top_p 去掉的是 0，所以加起来不一定是 1。"""
    probs = torch.softmax(logits.float() / temperature, -1)
    if top_p < 1:
        sorted_probs, order = probs.sort(-1, descending=True)
        outside = sorted_probs.cumsum(-1) - sorted_probs >= top_p  # 前面的概率和已够 top_p 的都去掉
        probs = probs.masked_fill(outside.scatter(-1, order, outside), 0.0)
    return probs


@torch.no_grad()
def stream_tokens(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    max_new_tokens: int,
    stop_ids: list[int],
    pad_id: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    share: tuple[int, int] = (0, 1),
) -> Iterator[torch.Tensor]:
    """逐步产出 (B,) 的新 token；已经说完的行产出 pad_id，全部说完就停。

    input_ids、attention_mask：(B, T)，左填充。share 见 pick_next。
    """
    position_ids = padded_positions(attention_mask)
    stops = torch.tensor(stop_ids, device=input_ids.device)
    done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    cache = None
    for _ in range(max_new_tokens):
        out = model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = out.past_key_values
        token = pick_next(out.logits[:, -1], temperature, top_p, generator, share)  # (B,)
        token = token.masked_fill(done, pad_id)
        yield token
        done |= torch.isin(token, stops)
        if done.all():
            return
        input_ids = token[:, None]
        attention_mask = torch.cat([attention_mask, torch.ones_like(input_ids)], -1)
        position_ids = position_ids[:, -1:] + 1


@torch.no_grad()
def stream_groups(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    group: int,
    max_new_tokens: int,
    stop_ids: list[int],
    pad_id: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    share: tuple[int, int] = (0, 1),
) -> Iterator[torch.Tensor]:
    """同 stream_tokens，但一个提示写 group 个回答，逐步产出 (B·group,)；同一提示的回答相邻。

    提示只算一遍，缓存里也只有一份：同一提示的 group 个回答排在一行，每一步添 group 列，掩码让每个回答只看得到
    提示和它自己。model 的注意力要认得 4 维的掩码（见 takes_4d_masks）。
    """
    batch, device = len(input_ids), input_ids.device
    stops = torch.tensor(stop_ids, device=device)
    position_ids = padded_positions(attention_mask)
    out = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        use_cache=True,
        logits_to_keep=1,
    )
    logits = out.logits[:, -1].repeat_interleave(group, 0)  # (B·G, V)
    position_ids = position_ids[:, -1:].expand(batch, group)  # (B, G)
    seen = attention_mask.bool()[:, None].expand(batch, group, -1)  # (B, G, P)：各列看不看得到
    own = torch.eye(group, dtype=torch.bool, device=device).expand(batch, group, group)
    done = torch.zeros(batch * group, dtype=torch.bool, device=device)
    for step in range(max_new_tokens):
        token = pick_next(logits, temperature, generator=generator, share=share)  # (B·G,)
        token = token.masked_fill(done, pad_id)
        yield token
        done |= torch.isin(token, stops)
        if done.all() or step == max_new_tokens - 1:
            return
        position_ids, seen = position_ids + 1, torch.cat([seen, own], -1)
        out = model(
            input_ids=token.view(batch, group),
            attention_mask=seen[:, None],
            position_ids=position_ids,
            past_key_values=out.past_key_values,
            use_cache=True,
        )
        logits = out.logits.flatten(0, 1)


def takes_4d_masks(model: PreTrainedModel) -> bool:
    """每一层都看得到全部前文，注意力照 (B, 1, 列, 列) 的掩码算：flash attention、滑动窗口的不行。"""
    config = model.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return getattr(config, "_attn_implementation", "") in ("sdpa", "eager") and kinds == {"full_attention"}


def batches_by_length(lengths: list[int], batch_size: int) -> list[list[int]]:
    """行号分批，长度相近的在一批里，几乎没有填充。"""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 128,
) -> list[list[int]]:
    """每个提示（token 列表）生成一段回复（token 列表）；自己说完的回复以结束符结尾，被截断的没有。

    按长度排队再分批，一批里几乎没有填充；返回次序与 prompts 相同。
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    stop_ids, pad_id = stop_tokens(tokenizer), tokenizer.pad_token_id
    replies: list[list[int]] = [[] for _ in prompts]
    for batch in batches_by_length([len(prompt) for prompt in prompts], batch_size):
        ids, mask = pad_left([prompts[i] for i in batch], pad_id, device)
        steps = stream_tokens(
            model, ids, mask, max_new_tokens, stop_ids, pad_id, temperature, top_p, generator
        )
        for index, row in zip(batch, torch.stack(list(steps), 1).tolist(), strict=True):
            end = next((k + 1 for k, token in enumerate(row) if token in stop_ids), len(row))
            replies[index] = row[:end]
    model.train(was_training)
    return replies
