"""BERT 分类要用的：从文字数出字表、编码、载入、批量预测、学习曲线。"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from .device import pick_device

MAX_POSITIONS = 512  # bert-base-chinese 的位置个数，小 BERT 也一样
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def character_tokenizer(texts: Sequence[str], min_count: int = 2):
    """从文字里数出字表，搭一个 BERT 分词器：一个汉字一个 token，英文和数字也逐个字符切开。

    bert-base-chinese 的字表也几乎都是单字；这里的小得多，因为小模型的大半参数都在字表上。
    """
    from transformers import BertTokenizer

    counts = Counter(char for text in texts for char in text.lower() if not char.isspace())
    chars = sorted((char for char, n in counts.items() if n >= min_count), key=lambda c: (-counts[c], c))
    vocab = {token: i for i, token in enumerate([*SPECIAL, *chars])}
    # 汉字本来就一个个切开；英文、数字是一串，按"开头 + ##后面的字符"切，不然没见过的单词整个变成 [UNK]
    for char in chars:
        if char.isalnum() and not "\u4e00" <= char <= "\u9fff":
            vocab[f"##{char}"] = len(vocab)
    return BertTokenizer(vocab=vocab, do_lower_case=True)


def small_config(vocab_size: int, hidden_size: int, num_layers: int, **more):
    """小 BERT 的尺寸：宽度之外都照 BERT 的比例，64 宽一个头，中间层是 4 倍宽。"""
    from transformers import BertConfig

    return BertConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=max(1, hidden_size // 64),
        intermediate_size=4 * hidden_size,
        max_position_embeddings=MAX_POSITIONS,
        attn_implementation=attention(),
        **more,
    )


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


def learning_curve(path: Path, history: list[dict]) -> None:
    """训练 loss、验证 loss、验证错误率随步数的变化，画成一张图。history 来自 training.curves。"""
    from .plots import line_chart

    def points(name: str, change=lambda y: y) -> tuple[list, list]:
        rows = [row for row in history if name in row]
        return [row["step"] for row in rows], [change(row[name]) for row in rows]

    series = {
        "训练 loss|train loss": points("loss"),
        "验证 loss|validation loss": points("eval_loss"),
        "验证错误率|validation error": points("eval_accuracy", lambda accuracy: 1 - accuracy),
    }
    line_chart(path, series, "学习曲线|Learning curve", "步数|step", "")
