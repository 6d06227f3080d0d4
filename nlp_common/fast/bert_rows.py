"""BERT 的最后一层只算有人读的位置：分类只读 [CLS] 那一个，猜字只读遮住的那些（columns.py 的道理，换成 BERT 的层）。

别的位置在最后一层只要交出 K、V。读得到的位置，数值与梯度都不变（tests/nlp_common/fast/test_bert_rows.py）。
两层的小 BERT，分类省下四成的计算，猜字省下近三成；12 层的只省最后一层里的一部分。

装到模型上以后照常调用：分类模型 ``model(...)``；猜字的用 chosen_outputs。句子的向量取平均的模型，每个位置都有人读，不装。
"""

from __future__ import annotations

from functools import partial, update_wrapper
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FIRST = "first"  # read 的值：只读 [CLS]


def use_read_rows(model: PreTrainedModel) -> PreTrainedModel:
    """装到 BertForMaskedLM 或 BertForSequenceClassification 上，返回 model；别的模型原样返回。"""
    kind = type(model).__name__
    if kind not in ("BertForMaskedLM", "BertForSequenceClassification"):
        return model
    last: Any = model.bert.encoder.layer[-1]
    last.forward = partial(_last_layer, last)
    if kind == "BertForSequenceClassification":
        model.forward = update_wrapper(partial(_classify, model), type(model).forward)
    return model


def chosen_outputs(
    model: PreTrainedModel, ids: torch.Tensor, attention_mask: torch.Tensor, chosen: torch.Tensor
) -> torch.Tensor:
    """chosen (B, T) 为 True 的 M 个位置的输出，(M, H)，一行一行地排。没装过的模型算完再挑。"""
    if isinstance(model.bert.encoder.layer[-1].forward, partial):
        return model.bert(ids, attention_mask=attention_mask, read=chosen).last_hidden_state
    return model.bert(ids, attention_mask=attention_mask).last_hidden_state[chosen]


def _classify(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    wanted = kwargs.get("output_hidden_states") or kwargs.get("output_attentions")
    if not wanted and model.config._attn_implementation in ("sdpa", "eager"):
        kwargs["read"] = FIRST
    return type(model).forward(model, *args, **kwargs)


def _last_layer(
    layer: Any,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *args: Any,
    read: torch.Tensor | str | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """(B, T, H) → 只读 [CLS]：(B, 1, H)；读 (B, T) 为 True 的：(M, H)；没写明就照常 (B, T, H)。"""
    if read is None:
        return type(layer).forward(layer, hidden_states, attention_mask, *args, **kwargs)
    if isinstance(read, torch.Tensor):
        return layer.feed_forward_chunk(layer.attention(hidden_states, attention_mask, **kwargs)[0][read])
    attn, (batch, _, width) = layer.attention.self, hidden_states.shape
    first = hidden_states[:, :1]  # (B, 1, H)

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.view(batch, x.shape[1], -1, attn.attention_head_size).transpose(1, 2)  # (B, nh, ·, hs)

    mask = None if attention_mask is None else attention_mask[:, :, :1]  # (B, 1, 1, T)
    q, k, v = heads(attn.query(first)), heads(attn.key(hidden_states)), heads(attn.value(hidden_states))
    dropout = attn.dropout.p if layer.training else 0.0
    out = F.scaled_dot_product_attention(q, k, v, mask, dropout)  # (B, nh, 1, hs)
    out = out.transpose(1, 2).reshape(batch, 1, width)
    return layer.feed_forward_chunk(layer.attention.output(out, first))
