"""最后一层只算有人读的列，输出层只算有人读的位置：损失只看回答，提示的那些列交出 K、V 之后就再也没有人读了。

与 transformers 自带的 ``logits_to_keep`` 是同一个道理，往里多推一层：别的位置只要交出最后一层的 K、V 给人看，
Q、注意力、MLP、最后的归一都不必算。用得着的列，数值与梯度都不变（测试证明）。两层的小模型上，提示占四分之三时，
省下近四成的计算；几十层的大模型只省一层里的一部分，所以差别很小。

载入模型时装上，此后照常调用：

- 因果语言模型：``model(input_ids, use_cache=False, logits_to_keep=columns)``，columns 是升序的列号 (C,)；
- 逐 token 的价值模型：同样多收一个 ``logits_to_keep=columns``，给出 (B, C, 1)；
- 打分模型：照常，它本来就只读每行最后一个真实 token。

一列里常常只有几行带标签，所以 lm/losses.py 用的 labelled_logits 再进一步：输出层只算带标签的那些位置。
一批偏好对，提示只算一遍（shared_prompts.py）。

要缓存的、反向时要重算激活（gradient checkpointing）的，就照常全算；结构不认识的模型不装。
"""

from __future__ import annotations

from functools import partial, update_wrapper
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from transformers.modeling_outputs import CausalLMOutputWithPast, SequenceClassifierOutputWithPast

from nlp_common.fast.shared_prompts import merge_pairs

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.modeling_outputs import ModelOutput

READS_POSITIONS = "reads_positions"  # 装过的因果语言模型上有它：认得 keep
KNOWN = {"Qwen2Attention", "LlamaAttention"}  # 下面 _last_layer 照着写的结构


def use_read_columns(model: PreTrainedModel) -> PreTrainedModel:
    """装到 model 上，返回 model。"""
    backbone: Any = getattr(model, model.base_model_prefix, None)
    last: Any = backbone.layers[-1] if hasattr(backbone, "layers") else None
    ways: dict[str, Any] = {
        "ForCausalLM": _causal,
        "ForTokenClassification": _values,
        "ForSequenceClassification": _scores,
    }
    way = next((way for kind, way in ways.items() if type(model).__name__.endswith(kind)), None)
    if way is None or type(getattr(last, "self_attn", None)).__name__ not in KNOWN:
        return model
    last.forward = partial(_last_layer, last)
    if way is _causal:
        setattr(model, READS_POSITIONS, True)
    model.forward = update_wrapper(partial(way, model), type(model).forward)
    return model


# ---------------------------------------------------------------- 三种模型


def _causal(
    model: PreTrainedModel,
    *args: Any,
    logits_to_keep: int | torch.Tensor = 0,
    keep: torch.Tensor | None = None,
    **kwargs: Any,
) -> ModelOutput:
    """给了 keep (B, C)，logits 是 (M, V)：logits_to_keep 那几列里，keep 为 True 的 M 个位置，一行一行地排。"""
    columns = logits_to_keep
    if isinstance(columns, torch.Tensor) and _can_skip(model, kwargs):
        kwargs["read_columns"], columns = columns, 0
    if keep is None:
        return type(model).forward(model, *args, logits_to_keep=columns, **kwargs)
    if "read_columns" in kwargs:
        read = kwargs.pop("read_columns")
        rows, places = keep.nonzero(as_tuple=True)
        hidden = _read(model, kwargs.pop("input_ids", None), rows, read[places], **kwargs)
        return CausalLMOutputWithPast(logits=model.lm_head(hidden))
    hidden = getattr(model, model.base_model_prefix)(*args, **kwargs).last_hidden_state
    if isinstance(columns, torch.Tensor):  # 最后一层照常全算了
        hidden = hidden[:, columns]
    return CausalLMOutputWithPast(logits=model.lm_head(hidden[keep]))


def _read(
    model: PreTrainedModel, input_ids: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, **kwargs: Any
) -> torch.Tensor:
    """最后一层在 (rows, columns) 这些位置（各 (M,)）的输出，(M, H)；一批偏好对，提示只算一遍。"""
    plain = kwargs.get("attention_mask") is None and kwargs.get("position_ids") is None
    can_merge = plain and model.config._attn_implementation == "sdpa"
    if can_merge and (merged := merge_pairs(input_ids, rows, columns)):
        rows, columns = merged.locate(rows, columns)
        input_ids, kwargs["position_ids"] = merged.input_ids, merged.position_ids
        kwargs["attention_mask"] = merged.attention_mask
    read, places = columns.unique(return_inverse=True)  # (C,)、(M,)：columns 是 read 里的第几个
    backbone = getattr(model, model.base_model_prefix)
    picked = rows * len(read) + places  # (M,)：(B, C) 个位置一行一行地排，要的是第几个
    return backbone(input_ids, read_columns=read, picked=picked, **kwargs).last_hidden_state


def labelled_logits(
    model: PreTrainedModel, input_ids: torch.Tensor, keep: torch.Tensor, **inputs: Any
) -> torch.Tensor:
    """keep (B, T 或更少的列) 为 True 的 M 个位置的 logits，(M, V)，一行一行地排。没装过的模型算完再挑。"""
    columns = keep.any(0).nonzero().squeeze(1)  # (C,)
    inside = keep[:, columns]  # (B, C)
    inputs = {"input_ids": input_ids, "use_cache": False, "logits_to_keep": columns, **inputs}
    if hasattr(getattr(model, "module", model), READS_POSITIONS):  # DistributedDataParallel 的外壳里面
        return model(keep=inside, **inputs).logits
    return model(**inputs).logits[inside]


def _values(
    model: PreTrainedModel, *args: Any, logits_to_keep: torch.Tensor | None = None, **kwargs: Any
) -> ModelOutput:
    if logits_to_keep is not None and _can_skip(model, kwargs):
        return type(model).forward(model, *args, read_columns=logits_to_keep, **kwargs)
    out = type(model).forward(model, *args, **kwargs)
    if logits_to_keep is not None:
        out.logits = out.logits[:, logits_to_keep]
    return out


def _scores(
    model: PreTrainedModel,
    input_ids: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    **kwargs: Any,
) -> ModelOutput:
    if input_ids is None or labels is not None or not _can_skip(model, kwargs):
        return type(model).forward(model, input_ids=input_ids, labels=labels, **kwargs)
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    last = torch.where(input_ids != model.config.pad_token_id, positions, 0).amax(1)  # (B,)
    rows = torch.arange(len(input_ids), device=input_ids.device)
    return SequenceClassifierOutputWithPast(logits=model.score(_read(model, input_ids, rows, last, **kwargs)))


def _can_skip(model: PreTrainedModel, kwargs: dict) -> bool:
    """掩码要是 (B, 1, T, T) 或没有（flash attention 的不是），没有滑动窗口，不要缓存，反向时不重算。"""
    last = getattr(model, model.base_model_prefix).layers[-1]
    attn = last.self_attn
    recomputes = last.training and getattr(last, "gradient_checkpointing", False)
    wanted = kwargs.get("output_hidden_states") or kwargs.get("output_attentions")
    return (
        kwargs.get("use_cache") is False
        and attn.config._attn_implementation in ("sdpa", "eager")
        and not getattr(attn, "sliding_window", None)
        and not recomputes
        and not wanted
    )


# ---------------------------------------------------------------- 最后一层


def _last_layer(
    layer: Any,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    read_columns: torch.Tensor | None = None,
    picked: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """一层 decoder，(B, T, H) → (B, C, H)，只有 read_columns 那些列；K、V 仍来自所有的列。没给列号就照常。

    picked (M,)：那 B·C 个位置里只要这几个 → (M, H)。每行要的列不同，注意力按列算，此后的 MLP 只算要的。
    """
    if read_columns is None:
        return type(layer).forward(
            layer,
            hidden_states,
            attention_mask=attention_mask,
            position_embeddings=position_embeddings,
            **kwargs,
        )
    attn, (batch, width, _) = layer.self_attn, hidden_states.shape
    normed = layer.input_layernorm(hidden_states)
    some = normed[:, read_columns]  # (B, C, H)

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.view(batch, x.shape[1], -1, attn.head_dim).transpose(1, 2)  # (B, nh, ·, hs)

    assert position_embeddings is not None
    cos, sin = position_embeddings  # (B, T, hs)
    q = _rotate(heads(attn.q_proj(some)), cos[:, read_columns], sin[:, read_columns])
    k = _rotate(heads(attn.k_proj(normed)), cos, sin)
    v = heads(attn.v_proj(normed))
    if attention_mask is None:
        seen = read_columns[:, None] >= torch.arange(width, device=read_columns.device)  # (C, T)
    else:
        seen = attention_mask[:, :, read_columns]  # (B, 1, C, T)
    out = F.scaled_dot_product_attention(
        q, k, v, seen, scale=attn.scaling, enable_gqa=q.shape[1] != k.shape[1]
    )
    out = out.transpose(1, 2).reshape(batch, len(read_columns), -1)  # (B, C, H)
    x = hidden_states[:, read_columns]
    if picked is not None:
        out, x = out.flatten(0, 1).index_select(0, picked), x.flatten(0, 1).index_select(0, picked)
    x = x + attn.o_proj(out)
    return x + layer.mlp(layer.post_attention_layernorm(x))


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE（Su et al. 2021 式 34；Qwen2 把前一半与后一半的维度配成对）。x：(B, nh, T, hs)；cos、sin：(B, T, hs)。"""
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]
