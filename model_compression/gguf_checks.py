"""导出的文件对不对、丢了多少：与原模型的 logits、回答比，与 transformers 自己读的比。"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch

from nlp_common.lm.chatml import prompt_ids
from nlp_common.lm.generation import pad_left, padded_positions
from nlp_common.tiny.judge import share_right


@torch.no_grad()
def last_logits(model, tokenizer, questions: list[dict], n: int = 32) -> torch.Tensor:
    """前 n 道题，写第一个字之前的 logits，(n, V)。"""
    prompts = [prompt_ids(tokenizer, question["messages"]) for question in questions[:n]]
    ids, mask = pad_left(prompts, tokenizer.pad_token_id, model.device)
    out = model(input_ids=ids, attention_mask=mask, position_ids=padded_positions(mask), logits_to_keep=1)
    return out.logits[:, -1].float()


def answers(questions: list[dict], replies: list[dict], reference: list[dict]) -> dict:
    """与 PyTorch 的原模型回答一字不差的比例；小世界的题还有答对的比例。"""
    n = len(questions)
    same = [
        (a["text"], a["ended"]) == (b["text"], b["ended"]) for a, b in zip(replies, reference, strict=True)
    ]
    found = {"same_answers": sum(same) / n}
    if "slot" in questions[0]:
        found["qa_accuracy"] = share_right(questions, replies)
    return found


def through_transformers(path: Path, model, tokenizer, questions: list[dict]) -> float | None:
    """transformers 自己读这个 GGUF，与我们读的（model）logits 最多差多少；没有装 gguf 是 None。"""
    if not find_spec("gguf"):
        print("没有装 gguf，不与 transformers 的读法比：pip install gguf。")
        return None
    from transformers import AutoModelForCausalLM, GgufConfig

    other = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    ).eval()
    ours, theirs = (last_logits(each, tokenizer, questions) for each in (model, other))
    return (ours - theirs).abs().max().item()
