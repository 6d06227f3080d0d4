"""评判：小世界里程序知道标准答案，所以每个回复的好坏是算出来的，不是估出来的。奖励模型从没见过这些分数。"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import torch

from nlp_common.together import together

from .chatml import prompt_ids
from .generation import batches_by_length, generate, pad_left, padded_positions, stop_tokens
from .tiny_world import OPENINGS, WORLD

MAX_REPLY = 32  # 小世界里最长的回复约 25 个 token


@dataclass(frozen=True)
class Verdict:
    """一个回复的评语；score 的分级：错 0.1，只答出词 0.6，整句 0.8，整句且有礼 1.0，其余（含没说完）0。"""

    right: bool
    complete: bool
    courteous: bool
    score: float

    @property
    def preferred(self) -> bool:
        return self.right and self.complete and self.courteous


def judge(question: dict, reply: str, ended: bool) -> Verdict:
    """评一个回复。question 见 tiny_world.questions；ended：回复是不是自己以 <|im_end|> 结束的。

    对：含标准答案，且不含同类的其他词。完整：去掉客套话之后正好是那一句完整的回答。
    """
    opening = next((o for o in OPENINGS if reply.startswith(o)), "")
    body = reply[len(opening) :]
    found = {value for value in WORLD[question["slot"]] if value in reply}
    right = ended and found == {question["answer"]}
    complete = ended and body == question["sentence"]
    courteous = ended and bool(opening)
    if right:
        score = (
            1.0 if complete and courteous else 0.8 if complete else 0.6 if body == question["answer"] else 0.4
        )
    else:
        score = 0.1 if ended and len(found) == 1 else 0.0
    return Verdict(right, complete, courteous, score)


def distinct_n(texts: list[str], n: int = 2) -> float:
    """不重复的 n 元字组占比（Li et al. 2016），越大用词越多样。"""
    grams = [text[i : i + n] for text in texts for i in range(len(text) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def reply_to(
    model, tokenizer, questions: list[dict], max_new_tokens: int = MAX_REPLY, **sampling
) -> list[dict]:
    """对每道题生成回复：``{"text", "ids", "ended"}``；sampling 是 generate 的 temperature、seed 等。"""
    prompts = [prompt_ids(tokenizer, question["messages"]) for question in questions]
    replies = generate(model, tokenizer, prompts, max_new_tokens, **sampling)
    return [reply_of(tokenizer, ids) for ids in replies]


def reply_of(tokenizer, ids: list[int]) -> dict:
    """生成的 token → ``{"text", "ids", "ended"}``。"""
    stops = stop_tokens(tokenizer)
    chat_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    text = tokenizer.decode([i for i in ids if i not in stops])
    return {"text": text, "ids": ids, "ended": bool(ids) and ids[-1] == chat_end}


def measure_chat(
    model, tokenizer, questions: list[dict], seed: int = 0
) -> tuple[dict, list[dict], list[dict]]:
    """小世界的对话指标，各处同一个定义。返回 (指标, 贪心回复, 采样回复)。

    - ``qa_accuracy``：贪心回复自己结束、含标准答案、不含同类其他词的比例；
    - ``ended_rate``：贪心回复自己结束的比例；
    - ``preferred_rate``：温度 1 采样的回复又对、又完整、又有礼的比例；
    - ``judge_score``：采样回复的程序评分均值；``sampled_accuracy``：采样回复答对的比例。

    同一个进程里，同一个模型、同样的题只问一次：整条链里，DPO、PPO 的"训练前"和最后的对比都是问过的。
    """
    key = _fingerprint(model, tokenizer, questions, seed)
    if key not in _MEASURED:
        _MEASURED[key] = _measure_chat(model, tokenizer, questions, seed)
    metrics, greedy, sampled = _MEASURED[key]
    return dict(metrics), [dict(reply) for reply in greedy], [dict(reply) for reply in sampled]


_MEASURED: dict[str, tuple[dict, list[dict], list[dict]]] = {}


def _fingerprint(model, tokenizer, questions: list[dict], seed: int) -> str:
    """决定回复的一切：结构、权重、结束符、题目、种子（训练前后、存盘再读，config 里别的项会变）。"""
    config = model.config
    shape = [type(model).__name__, config.num_attention_heads, str(getattr(config, "rope_parameters", None))]
    settings = [shape, len(tokenizer), stop_tokens(tokenizer), questions, seed]
    digest = hashlib.sha256(json.dumps(settings, ensure_ascii=False).encode())
    for weight in model.state_dict().values():
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _measure_chat(model, tokenizer, questions: list[dict], seed: int) -> tuple[dict, list[dict], list[dict]]:
    was_training = model.training
    model.eval()  # 两边同时用一个模型，模式先定好
    greedy, sampled = together(
        lambda: reply_to(model, tokenizer, questions),
        lambda: reply_to(model, tokenizer, questions, temperature=1.0, seed=seed),
    )
    model.train(was_training)
    on_greedy = [judge(q, r["text"], r["ended"]) for q, r in zip(questions, greedy, strict=True)]
    on_sampled = [judge(q, r["text"], r["ended"]) for q, r in zip(questions, sampled, strict=True)]
    n = len(questions)
    metrics = {
        "n": n,
        "qa_accuracy": sum(v.right for v in on_greedy) / n,
        "ended_rate": sum(r["ended"] for r in greedy) / n,
        "preferred_rate": sum(v.preferred for v in on_sampled) / n,
        "judge_score": sum(v.score for v in on_sampled) / n,
        "sampled_accuracy": sum(v.right for v in on_sampled) / n,
        "mean_chars": sum(len(r["text"]) for r in sampled) / n,
        "distinct_2": distinct_n([r["text"] for r in sampled]),
    }
    return metrics, greedy, sampled


@torch.no_grad()
def score_replies(
    reward_model, tokenizer, questions: list[dict], replies: list[dict], batch_size: int = 64
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
    policy, reference, tokenizer, questions: list[dict], replies: list[dict], batch_size: int = 8
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
        logps = [
            model(**inputs, use_cache=False, logits_to_keep=width + 1).logits[:, :-1].float().log_softmax(-1)
            for model in (policy, reference)
        ]  # (B, width, V)
        kl = (logps[0].exp() * (logps[0] - logps[1])).sum(-1)  # (B, width)
        is_reply = torch.arange(width, device=ids.device) >= width - lengths[:, None]
        total += (kl * is_reply).sum().item()
        count += is_reply.sum().item()
    return total / count
