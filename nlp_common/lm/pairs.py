"""偏好对（提示、好回答、差回答）的分词与拼批；DPO 和奖励模型共用。"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from nlp_common.lm.chatml import answer_ids, encode_text, prompt_ids
from nlp_common.lm.losses import IGNORE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_pair(tokenizer: PreTrainedTokenizerBase, row: dict, with_end: bool = True) -> dict[str, list[int]]:
    """一对 → ``prompt_ids``、``chosen_ids``、``rejected_ids``。

    with_end：回答要不要带结尾的 <|im_end|>。DPO 要（说完也是回答的一部分），奖励模型不要（它在最后一个字上打分）。
    """
    encode = answer_ids if with_end else encode_text
    return {
        "prompt_ids": prompt_ids(tokenizer, row["prompt"]),
        "chosen_ids": encode(tokenizer, row["chosen"][-1]["content"]),
        "rejected_ids": encode(tokenizer, row["rejected"][-1]["content"]),
    }


def pair_length(row: dict) -> int:
    """一对里较长的那条的 token 数。"""
    return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))


def pair_tokens(row: dict) -> int:
    """一对的两条（提示各算一次）一共多少个 token，填充不算。"""
    return 2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])


def collate_pairs(rows: list[dict], pad_id: int) -> dict[str, torch.Tensor]:
    """B 对 → ``input_ids``、``labels``，形状 (2B, T)：前 B 行是好回答，后 B 行是差回答，右填充。

    labels 只在回答上有值。右填充加因果注意力：真实 token 看不到填充，不需要 attention_mask。
    """
    prompts = [row["prompt_ids"] for row in rows] * 2
    answers = [row["chosen_ids"] for row in rows] + [row["rejected_ids"] for row in rows]
    width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    input_ids = torch.full((len(prompts), width), pad_id)
    labels = torch.full((len(prompts), width), IGNORE)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        input_ids[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[i, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    return {"input_ids": input_ids, "labels": labels}


def count_pairs(batch: dict[str, torch.Tensor]) -> int:
    """collate_pairs 拼的一批里有几对。"""
    return len(batch["input_ids"]) // 2
