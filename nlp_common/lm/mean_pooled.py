"""句子的向量是各 token 向量平均的 BERT 分类模型：e5 这样的句向量模型就是这样预训练的。"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers import BertConfig, BertForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput


def mean_pool(hidden: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """(B, T, H) → (B, H)：有 token 的位置的平均，填充不算。"""
    if attention_mask is None:
        return hidden.mean(1)
    mask = attention_mask[:, :, None].to(hidden.dtype)  # (B, T, 1)
    return (hidden * mask).sum(1) / mask.sum(1)


class BertForMeanPooledClassification(BertForSequenceClassification):
    """BertForSequenceClassification，只是不用 [CLS] 那个位置的向量（和它后面的 tanh 层），用平均。

    config.json 里的 classifier_pooling 是 mean 的文件夹用这个类（lm/classifier.py 的 load_classifier）。
    """

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.bert.pooler = None

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **more: Any,
    ) -> SequenceClassifierOutput:
        hidden = self.bert(input_ids, attention_mask=attention_mask, **more).last_hidden_state  # (B, T, H)
        logits = self.classifier(self.dropout(mean_pool(hidden, attention_mask)))  # (B, C)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)
