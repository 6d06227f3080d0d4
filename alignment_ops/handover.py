"""训练之外的两样：换一句提示能到哪里；拿不准就转给人工，转几成能到哪里。"""

from __future__ import annotations

import numpy as np
import torch

from customer_service import answer
from customers import PROMPT, solves, with_prompt
from nlp_common.base.device import pick_device
from nlp_common.lm.chatml import prompt_ids
from nlp_common.lm.generation import batches_by_length, pad_left, padded_positions
from nlp_common.lm.loading import load_chat_lm
from nlp_common.lm.losses import IGNORE, token_logps
from nlp_common.tiny.world import UNHELPFUL

PROMPTS = {
    "none": None,
    "known": PROMPT,  # 旧记录里有这一句，机器人知道什么意思
    "unknown": "请认真回答，不要说不知道。",  # 从来没有见过
}
TARGET = 0.95  # 转人工的要把解决的比例抬到这里
BATCH = 64


def compare_bots(part, bots: dict[str, str], golden: list[dict]) -> dict:
    """第一个机器人与八周之后的：各种提示各解决几成；各要转几成给人工，解决的才到 TARGET。"""
    results = {}
    for name, bot in bots.items():
        results[name] = {"prompts": {}}
        for label, prompt in PROMPTS.items():
            said = answer(bot, golden, prompt=prompt)
            solved = solved_of(golden, said)
            results[name]["prompts"][label] = float(solved.mean())
            if label in ("none", "known"):
                sure = confidence(bot, golden, said, prompt)
                results[name][f"handover_{label}"] = handover(golden, said, solved, sure)
    return results


def solved_of(questions: list[dict], said: list[dict]) -> np.ndarray:
    return np.array(
        [solves(q, reply["text"], reply["ended"]) for q, reply in zip(questions, said, strict=True)]
    )


def handover(questions: list[dict], said: list[dict], solved: np.ndarray, sure: np.ndarray) -> dict:
    """两条规则，一前一后：敷衍的、只蹦一个词的转；剩下的，把握不到门槛的转。转了的，人工都解决。

    门槛在前一半题上挑（转得最少而到 TARGET 的），转几成、解决几成在后一半题上量：挑和量用同样的题，成绩会偏高。
    """
    by_rule = np.array([not is_sentence(q, reply["text"]) for q, reply in zip(questions, said, strict=True)])
    half = len(solved) // 2
    threshold = pick_threshold(solved[:half], sure[:half], by_rule[:half])
    handed = by_rule | (sure < threshold)
    later = slice(half, None)
    return {
        "threshold": float(threshold),
        "rule_handed": float(by_rule[later].mean()),
        "rule_solved": float((solved | by_rule)[later].mean()),
        "handed": float(handed[later].mean()),
        "solved": float((solved | handed)[later].mean()),
        "wasted": float((solved & handed)[later].mean()),  # 机器人本来就答好了，白转的
    }


def is_sentence(question: dict, text: str) -> bool:
    """这条规则不看标准答案：不是敷衍的话，也不只是一个词（小世界里的词都是两个字）。"""
    return text not in UNHELPFUL and len(text) > 3


def pick_threshold(solved: np.ndarray, sure: np.ndarray, handed: np.ndarray) -> float:
    """从不转开始，一个一个往上挪门槛，到解决的（人工的也算）有 TARGET 为止。"""
    for threshold in [0.0, *np.sort(sure)]:
        if (solved | handed | (sure < threshold)).mean() >= TARGET:
            return float(threshold)
    return float("inf")


@torch.no_grad()
def confidence(bot: str, questions: list[dict], said: list[dict], prompt: str | None) -> np.ndarray:
    """每个回答的把握 (N,)：各 token 概率的几何平均，1 是一点也不犹豫。"""
    tokenizer, model = load_chat_lm(str(bot), pick_device())
    model.eval()
    rows = [
        (prompt_ids(tokenizer, with_prompt(q, prompt)["messages"]), reply["ids"])
        for q, reply in zip(questions, said, strict=True)
    ]
    sure = np.zeros(len(rows))
    for batch in batches_by_length([len(ask) + len(ids) for ask, ids in rows], BATCH):
        ids, mask = pad_left([rows[i][0] + rows[i][1] for i in batch], tokenizer.pad_token_id, model.device)
        labels = torch.full_like(ids, IGNORE)
        for row, i in enumerate(batch):
            if n := len(rows[i][1]):
                labels[row, -n:] = ids[row, -n:]
        logps = token_logps(
            model, ids, labels, attention_mask=mask, position_ids=padded_positions(mask)
        )  # (B, C)
        lengths = (labels != IGNORE).sum(1).clamp(min=1)
        sure[batch] = (logps.sum(1) / lengths).exp().cpu().numpy()
    return sure
