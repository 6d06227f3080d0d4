"""一批题的回复：生成（reply_to），奖励模型打分（score_replies），离参考模型多远（token_kl），用词多样（distinct_n）。"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from nlp_common.lm.chatml import prompt_ids
from nlp_common.lm.generation import batches_by_length, generate, pad_left, padded_positions, stop_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_REPLY = 32  # 小世界里最长的回复约 25 个 token


def distinct_n(texts: list[str], n: int = 2) -> float:
    """不重复的 n 元字组占比（Li et al. 2016），越大用词越多样。"""
    grams = [text[i : i + n] for text in texts for i in range(len(text) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def reply_to(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[dict],
    max_new_tokens: int = MAX_REPLY,
    **sampling: Any,
) -> list[dict]:
    """对每道题生成回复：``{"text", "ids", "ended"}``；sampling 是 generate 的 temperature、seed 等。"""
    prompts = [prompt_ids(tokenizer, question["messages"]) for question in questions]
    replies = generate(model, tokenizer, prompts, max_new_tokens, **sampling)
    return [reply_of(tokenizer, ids) for ids in replies]


def reply_of(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> dict:
    """生成的 token → ``{"text", "ids", "ended"}``。"""
    stops = stop_tokens(tokenizer)
    chat_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    text = tokenizer.decode([i for i in ids if i not in stops])
    return {"text": text, "ids": ids, "ended": bool(ids) and ids[-1] == chat_end}


@torch.no_grad()
def score_replies(
    reward_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[dict],
    replies: list[dict],
    batch_size: int = 64,
) -> torch.Tensor:
    """奖励模型给每个回复的分，(N,)；与训练它时一样，不给它看结束符。"""
    stops = set(stop_tokens(tokenizer))
    rows = [
        prompt_ids(tokenizer, q["messages"]) + [i for i in r["ids"] if i not in stops]
        for q, r in zip(questions, replies, strict=True)
    ]
    scores = torch.empty(len(rows))
    for batch in batches_by_length([len(row) for row in rows], batch_size):
        ids, mask = pad_left([rows[i] for i in batch], tokenizer.pad_token_id, reward_model.device)
        logits = reward_model(
            input_ids=ids, attention_mask=mask, position_ids=padded_positions(mask), use_cache=False
        ).logits
        scores[batch] = logits.squeeze(-1).float().cpu()
    return scores


@torch.no_grad()
def token_kl(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[dict],
    replies: list[dict],
    batch_size: int = 8,
) -> float:
    """policy 采样的回复上，每个 token 的 KL(policy‖reference) 均值，单位 nats。

    每个位置对整个词表求和，是精确的 KL，不是 log π − log π_ref 的单样本估计。
    """
    policy.eval()
    prompts = [prompt_ids(tokenizer, q["messages"]) for q in questions]
    rows = [p + r["ids"] for p, r in zip(prompts, replies, strict=True)]
    total = count = 0.0
    for batch in batches_by_length([len(row) for row in rows], batch_size):
        ids, mask = pad_left([rows[i] for i in batch], tokenizer.pad_token_id, policy.device)
        lengths = torch.tensor([len(replies[i]["ids"]) for i in batch], device=ids.device)
        width = int(lengths.max())
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": padded_positions(mask)}
        logps = []  # policy 的、reference 的，都是 (B, width, V)
        for model in (policy, reference):
            logits = model(**inputs, use_cache=False, logits_to_keep=width + 1).logits[:, :-1]
            logps.append(logits.float().log_softmax(-1))
        kl = (logps[0].exp() * (logps[0] - logps[1])).sum(-1)  # (B, width)
        is_reply = torch.arange(width, device=ids.device) >= width - lengths[:, None]
        total += (kl * is_reply).sum().item()
        count += is_reply.sum().item()
    return total / count
