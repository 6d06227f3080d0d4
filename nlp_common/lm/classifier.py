"""BERT 分类要用的：从文字数出字表、编码、载入、批量预测、学习曲线。"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nlp_common.base.device import pick_device
from nlp_common.base.errors import UserError
from nlp_common.fast.bert_rows import use_read_rows
from nlp_common.lm.checks import (
    check_config,
    check_tokenizer,
    check_vocabulary,
    load_weights,
    quiet,
    readable_errors,
)
from nlp_common.lm.generation import batches_by_length

if TYPE_CHECKING:
    from transformers import BertForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase


def encode(tokenizer: PreTrainedTokenizerBase, rows: list[dict], max_length: int) -> list[dict]:
    """``{"text", "label"}`` → ``{"input_ids": [CLS] … [SEP], "labels": 编号}``，还没有填充。"""
    ids = tokenizer([row["text"] for row in rows], truncation=True, max_length=max_length)["input_ids"]
    return [{"input_ids": x, "labels": row["label"]} for x, row in zip(ids, rows, strict=True)]


def attention() -> str:
    """训练用哪种注意力的实现，结果相同，快慢不同。CPU 上融合的 sdpa 反向很慢，逐步计算的 eager 快得多。"""
    return "eager" if pick_device().type == "cpu" else "sdpa"


def load_classifier(
    path: str | Path, names: Sequence[str] | None = None, dropout: float | None = None
) -> tuple[PreTrainedTokenizerBase, BertForSequenceClassification]:
    """→ (分词器, BertForSequenceClassification)。names 是类名：要微调时给，从预训练模型换上新的分类层。

    dropout：微调时各层的 dropout，默认照模型自己的。
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # 只关"载入权重"的进度条，警告照常显示
    config = check_config(path)
    if (kind := config.get("model_type") or "bert") != "bert":
        raise UserError(
            f"{path} 的结构是 {kind}，这里要 BERT（config.json 的 model_type 是 bert）："
            "bert-base-chinese、hfl/chinese-roberta-wwm-ext、hfl/chinese-macbert-base 都可以，用 --model 换一个。"
        )
    changes: dict[str, Any] = {}
    new: tuple[str, ...] = ()
    if names:
        changes = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
        changes["attn_implementation"] = attention()
        changes["problem_type"] = "single_label_classification"  # 原来是打分（回归）的，也照分类训练
        new = ("classifier.", "bert.pooler.")
        if dropout is not None:
            changes |= {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    model, fresh = load_weights(_model_class(config), path, new=new, **changes)
    use_read_rows(model)
    if names:
        _say_head(config, fresh, names)
    with readable_errors(str(path)), quiet():
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    check_tokenizer(tokenizer, path)
    check_vocabulary(model, tokenizer, path)
    return tokenizer, model


def _model_class(config: dict) -> type[BertForSequenceClassification]:
    """config.json 写着 "classifier_pooling": "mean" 的，句子的向量是平均，其余的是 [CLS]。"""
    if config.get("classifier_pooling") == "mean":
        from nlp_common.lm.mean_pooled import BertForMeanPooledClassification

        return BertForMeanPooledClassification
    from transformers import BertForSequenceClassification

    return BertForSequenceClassification


def _say_head(config: dict, fresh: list[str], names: Sequence[str]) -> None:
    """说出分类层是新的还是沿用的：微调过的模型类别个数不同时，只能换新的。"""
    if not any(name.startswith("classifier.") for name in fresh):
        print(f"（沿用它已有的分类层，{len(names)} 类：接着训练）")
        return
    old = len(config.get("id2label") or {}) or int(config.get("num_labels") or 0)
    was = (
        f"原来的分类层是 {old} 类，不要了；"
        if old and "Classification" in str(config.get("architectures"))
        else ""
    )
    print(f"（{was}分类层是新的，{len(names)} 类，从随机的权重开始训练）")


@torch.inference_mode()
def predict(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    max_length: int,
    batch_size: int = 64,
) -> torch.Tensor:
    """每段文字各类的概率 (N, C)，次序与 texts 相同。先按长度排好再分批，少算填充。"""
    model.eval()
    logits = torch.empty(len(texts), model.config.num_labels)
    for chosen in batches_by_length([len(text) for text in texts], batch_size):
        batch = [texts[i] for i in chosen]
        inputs = tokenizer(batch, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
        logits[chosen] = model(**inputs.to(model.device)).logits.float().cpu()
    return logits.softmax(-1)
