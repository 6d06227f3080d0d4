"""BERT 分类要用的：从文字数出字表、编码、载入、批量预测、学习曲线。"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from nlp_common.base.device import pick_device


def encode(tokenizer, rows: list[dict], max_length: int) -> list[dict]:
    """``{"text", "label"}`` → ``{"input_ids": [CLS] … [SEP], "labels": 编号}``，还没有填充。"""
    ids = tokenizer([row["text"] for row in rows], truncation=True, max_length=max_length)["input_ids"]
    return [{"input_ids": x, "labels": row["label"]} for x, row in zip(ids, rows, strict=True)]


def attention() -> str:
    """训练用哪种注意力的实现，结果相同，快慢不同。CPU 上融合的 sdpa 反向很慢，逐步计算的 eager 快得多。"""
    return "eager" if pick_device().type == "cpu" else "sdpa"


def load_classifier(path: str | Path, names: Sequence[str] | None = None):
    """→ (分词器, BertForSequenceClassification)。names 是类名：要微调时给，从预训练模型换上新的分类层。"""
    from transformers import AutoTokenizer, BertForSequenceClassification
    from transformers.utils import logging

    logging.disable_progress_bar()  # 只关"载入权重"的进度条，警告照常显示
    changes = {}
    if names:
        changes = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
        changes["attn_implementation"] = attention()
    model = BertForSequenceClassification.from_pretrained(path, dtype=torch.float32, **changes)
    if names:
        print("（若上面有一张表：UNEXPECTED 是预训练时猜字的输出层，不要了；MISSING 是新的分类层，正要训练）")
    return AutoTokenizer.from_pretrained(path), model


@torch.inference_mode()
def predict(model, tokenizer, texts: Sequence[str], max_length: int, batch_size: int = 64) -> torch.Tensor:
    """每段文字各类的概率 (N, C)，次序与 texts 相同。先按长度排好再分批，少算填充。"""
    model.eval()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    logits = torch.empty(len(texts), model.config.num_labels)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = [texts[i] for i in chosen]
        inputs = tokenizer(batch, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
        logits[chosen] = model(**inputs.to(model.device)).logits.float().cpu()
    return logits.softmax(-1)
