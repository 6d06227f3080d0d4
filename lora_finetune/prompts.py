"""提示微调的三种写法：前缀（每层的 K、V）、提示（输入前的几个向量）、P-Tuning（这几个向量由小网络给出）。

大模型冻住，只学这些"虚拟 token"。三种都包在模型外面，调用的写法与模型相同，所以训练循环与生成照常用。
参考：Li & Liang 2021（前缀）、Lester et al. 2021（提示）、Liu et al. 2021（P-Tuning）、Liu et al. 2022（P-Tuning v2）。
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from nlp_common.train.setup import recompute_activations


class Prompted(nn.Module):
    """三种共有的：冻住的模型、几个虚拟 token；调用的写法与模型相同。"""

    def __init__(self, base, m: int):
        super().__init__()
        self.base, self.m = base.requires_grad_(False), m
        self.config = base.config

    @property
    def device(self) -> torch.device:
        return self.base.device

    def gradient_checkpointing_enable(self) -> None:
        recompute_activations(self.base)


# ---------------------------------------------------------------- 1. 前缀：每层都有自己的 K、V


def prefix_attention(module, query, key, value, attention_mask, prefix=None, scaling=None, **kwargs):
    """softmax(q [P_k; K]ᵀ/√d) [P_v; V]（Li & Liang 2021 式 3）：每层的 K、V 前面接上学来的 m 列，谁都看得到。

    query (B, nh, T, hs)；key、value (B, n_kv, S, hs)，生成时 S 里有缓存的；prefix 是各层的 P_k、P_v，(L, n_kv, m, hs)。
    """
    batch, wide = len(query), prefix[0].shape[2]
    p_k, p_v = (each[module.layer_idx].expand(batch, -1, -1, -1) for each in prefix)  # (B, n_kv, m, hs)
    if attention_mask is None:  # 没有填充：自己写出因果的掩码，T 个位置是 S 个里的最后 T 个
        t, s = query.shape[2], key.shape[2]
        attention_mask = torch.ones(t, s, dtype=torch.bool, device=query.device).tril(s - t)
    seen = F.pad(attention_mask, (wide, 0), value=True)  # (…, T, m + S)
    out = F.scaled_dot_product_attention(
        query, torch.cat([p_k, key], 2), torch.cat([p_v, value], 2), seen, scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2).contiguous(), None  # (B, T, nh, hs)


AttentionInterface.register("prefix", prefix_attention)
AttentionMaskInterface.register("prefix", sdpa_mask)


class PrefixTuned(Prompted):
    """P-Tuning v2：每层 m 列 K、V，直接学，不经过小网络。

    前缀是参数，不在缓存里：重算激活（gradient checkpointing）时缓存会被 transformers 扔掉，PEFT 的前缀就跟着没了。
    """

    def __init__(self, base, m: int):
        super().__init__(base, m)
        config = base.config
        hs = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (config.num_hidden_layers, config.num_key_value_heads, m, hs)
        self.keys, self.values = (nn.Parameter(torch.randn(shape, device=base.device)) for _ in range(2))
        base.set_attn_implementation("prefix")

    def forward(self, input_ids, position_ids=None, **kwargs):
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        # 前缀占着位置 0…m−1，真实的 token 从 m 数起
        return self.base(
            input_ids, position_ids=position_ids + self.m, prefix=(self.keys, self.values), **kwargs
        )

    @torch.no_grad()
    def start_from(self, ids: list[int]) -> None:
        """用模型读 m 个真实的 token 得到的 K、V 开始：等于在前面真的放了这段文字。"""
        self.base.set_attn_implementation("sdpa")
        cache = self.base(torch.tensor([ids], device=self.device), use_cache=True).past_key_values
        self.base.set_attn_implementation("prefix")
        for layer, each in enumerate(cache.layers):
            self.keys[layer], self.values[layer] = each.keys[0], each.values[0]


# ---------------------------------------------------------------- 2. 提示：只在输入的前面


class PromptTuned(Prompted):
    """输入的向量前面接上学来的 m 个，(m, H)；别的层照常。"""

    def __init__(self, base, m: int):
        super().__init__(base, m)
        self.vectors = nn.Parameter(torch.randn(m, base.config.hidden_size, device=base.device))

    def prompt(self) -> Tensor:
        return self.vectors

    def forward(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        logits_to_keep=0,
        **kwargs,
    ):
        vectors = self.base.get_input_embeddings()(input_ids)  # (B, T, H)
        batch, width, _ = vectors.shape
        if position_ids is None:
            position_ids = torch.arange(width, device=self.device)[None]
        position_ids = position_ids + self.m
        if past_key_values is None:  # 缓存里已经有提示的，不再接
            vectors = torch.cat([self.prompt().expand(batch, -1, -1), vectors], 1)  # (B, m + T, H)
            first = torch.arange(self.m, device=self.device).expand(len(position_ids), -1)
            position_ids = torch.cat([first, position_ids], 1)
            if isinstance(logits_to_keep, Tensor):  # 列号跟着往右挪
                logits_to_keep = logits_to_keep + self.m
        if attention_mask is not None:
            attention_mask = F.pad(attention_mask, (self.m, 0), value=1)
        out = self.base(
            inputs_embeds=vectors,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        if isinstance(logits_to_keep, int) and logits_to_keep == 0:
            out.logits = out.logits[:, -width:]  # 虚拟 token 那几个位置的，没有人要
        return out

    @torch.no_grad()
    def start_from(self, ids: list[int]) -> None:
        """从 m 个真实 token 的嵌入开始。"""
        self.vectors.copy_(self.base.get_input_embeddings()(torch.tensor(ids, device=self.device)))


# ---------------------------------------------------------------- 3. P-Tuning：这几个向量由小网络给出


class PTuned(PromptTuned):
    """m 个向量先过一个三层的小网络：各个虚拟 token 共用它，不再各学各的。学完可以只留它给出的 m 个向量。"""

    def __init__(self, base, m: int, hidden: int = 128):
        super().__init__(base, m)
        width = base.config.hidden_size
        layers = [nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()]
        self.encoder = nn.Sequential(*layers, nn.Linear(hidden, width)).to(base.device)

    def prompt(self) -> Tensor:
        return self.encoder(self.vectors)
