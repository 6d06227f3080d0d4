"""一个模型有多大：只看 config.json 里的几个尺寸，逐块数出参数，不建模型、不下载权重。

认得 Llama、Mistral、Qwen2、Qwen3（稠密），Qwen3-MoE 与 DeepSeek-V3（专家混合，后者的注意力是 MLA）。
数得对不对：test_model_sizes.py 用 transformers 在 meta 设备上建同样的模型，一个不差。
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from nlp_common.base.errors import UserError


@dataclass(frozen=True)
class ModelSizes:
    """一个解码器的尺寸；q_rank、kv_rank、nope、rope、v_dim 只有 MLA 用，experts 起的只有 MoE 用。"""

    name: str
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int  # 稠密的 MLP 的中间
    tied: bool = False  # 词嵌入与输出层共用一份
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3
    q_rank: int = 0
    kv_rank: int = 0
    nope: int = 0
    rope: int = 0
    v_dim: int = 0
    experts: int = 0
    top_k: int = 0
    expert_inner: int = 0
    shared: int = 0  # 每个 token 都要过的专家有几个
    dense_layers: int = 0  # 前几层没有专家

    @property
    def mla(self) -> bool:
        return self.kv_rank > 0

    def has_experts(self, layer: int) -> bool:
        return self.experts > 0 and layer >= self.dense_layers


# ---------------------------------------------------------------- 逐块数


def embedding_params(s: ModelSizes) -> int:
    return s.vocab * s.hidden


def attention_params(s: ModelSizes) -> dict[str, int]:
    """一层注意力：split 是张量并行能按头切开的，whole 是每块卡都要有一份的。"""
    if s.mla:
        query = s.heads * (s.nope + s.rope)
        whole = s.hidden * (s.kv_rank + s.rope) + s.kv_rank  # kv_a 与它的归一化
        split = s.kv_rank * s.heads * (s.nope + s.v_dim) + s.heads * s.v_dim * s.hidden  # kv_b、o
        if s.q_rank:
            whole += s.hidden * s.q_rank + s.q_rank  # q_a 与它的归一化
            split += s.q_rank * query
        else:
            split += s.hidden * query
        return {"split": split, "whole": whole}
    wide, narrow = s.heads * s.head_dim, s.kv_heads * s.head_dim
    split = s.hidden * (2 * wide + 2 * narrow) + (wide + 2 * narrow if s.qkv_bias else 0)
    return {"split": split, "whole": 2 * s.head_dim if s.qk_norm else 0}


def mlp_params(s: ModelSizes, inner: int) -> int:
    return 3 * s.hidden * inner  # gate、up、down


def router_params(s: ModelSizes) -> int:
    return s.experts * s.hidden


def norm_params(s: ModelSizes) -> int:
    return 2 * s.hidden  # 一层里两个 RMSNorm


def layer_params(s: ModelSizes, layer: int) -> dict[str, int]:
    """第 layer 层：attention、norms，再加 mlp，或者 router、shared、experts。"""
    parts = {"attention": sum(attention_params(s).values()), "norms": norm_params(s)}
    if not s.has_experts(layer):
        return parts | {"mlp": mlp_params(s, s.inner)}
    return parts | {
        "router": router_params(s),
        "shared": mlp_params(s, s.shared * s.expert_inner),
        "experts": s.experts * mlp_params(s, s.expert_inner),
    }


def count_params(s: ModelSizes) -> dict[str, int]:
    """整个模型，按块加起来；total 是参数个数，active 是一个 token 用到的。"""
    parts = {"embedding": embedding_params(s), "head": 0 if s.tied else embedding_params(s)}
    for layer in range(s.layers):
        for name, n in layer_params(s, layer).items():
            parts[name] = parts.get(name, 0) + n
    parts["norms"] += s.hidden  # 最后一个
    total = sum(parts.values())
    idle = parts.get("experts", 0) * (s.experts - s.top_k) // max(s.experts, 1)
    return parts | {"total": total, "active": total - idle}


def largest_module(s: ModelSizes, experts_together: int | None = None) -> int:
    """参数最多的一个模块（ZeRO-3 一次要凑齐这么多）。

    experts_together：几个专家的权重放在一个模块里；transformers 5 是一层的全部，每个专家各是几个 Linear 的写 1。
    """
    sizes = [embedding_params(s), max(s.hidden * s.inner, s.heads * max(s.head_dim, s.v_dim) * s.hidden)]
    if s.experts:
        together = s.experts if experts_together is None else experts_together
        one = s.hidden * s.expert_inner if together == 1 else mlp_params(s, s.expert_inner)
        sizes.append(together * one)
    return max(sizes)


# ---------------------------------------------------------------- 从哪里来

SIZES = {
    "qwen2.5-0.5b": ModelSizes("Qwen2.5-0.5B", 151_936, 896, 24, 14, 2, 64, 4864, tied=True, qkv_bias=True),
    "qwen2.5-7b": ModelSizes("Qwen2.5-7B", 152_064, 3584, 28, 28, 4, 128, 18_944, qkv_bias=True),
    "llama-2-7b": ModelSizes("Llama-2-7B", 32_000, 4096, 32, 32, 32, 128, 11_008),
    "llama-3-70b": ModelSizes("Llama-3-70B", 128_256, 8192, 80, 64, 8, 128, 28_672),
    "qwen3-30b-a3b": ModelSizes(
        *("Qwen3-30B-A3B", 151_936, 2048, 48, 32, 4, 128, 6144),
        qk_norm=True,
        experts=128,
        top_k=8,
        expert_inner=768,
    ),
    "deepseek-v3": ModelSizes(
        *("DeepSeek-V3", 129_280, 7168, 61, 128, 128, 64, 18_432),
        q_rank=1536,
        kv_rank=512,
        nope=128,
        rope=64,
        v_dim=128,
        experts=256,
        top_k=8,
        expert_inner=2048,
        shared=1,
        dense_layers=3,
    ),
}
KINDS = {"llama": {}, "mistral": {}, "qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": True}}
KINDS |= {"qwen3_moe": {"qk_norm": True}, "deepseek_v3": {}}


def find_sizes(model: str) -> ModelSizes:
    """内置的名字（SIZES），或一个文件夹、一个 config.json。"""
    if model.lower() in SIZES:
        return SIZES[model.lower()]
    path = Path(model).expanduser()
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise UserError(
            f"没有 {path}。--model 要是有 config.json 的文件夹、一个 config.json，或内置的：{'、'.join(SIZES)}。"
        )
    return read_sizes(path)


def read_sizes(path: Path) -> ModelSizes:
    """读 config.json；缺哪一项、哪一项不是正整数，都说出名字。"""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise UserError(f"{path} 读不成 JSON（{error}）：重新下载它。") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} 里不是一个 JSON 对象（{{…}}）。")
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in KINDS:
        raise UserError(f"{path}：model_type 是 {kind!r}，这里会数的有：{'、'.join(KINDS)}。")

    def number(name: str, default: int | None = None, least: int = 1) -> int:
        value = config.get(name, default)
        if value is None and default is not None:
            value = default
        if value is None:
            raise UserError(f"{path} 里缺 {name}（{kind} 的尺寸少了它数不出参数）。")
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UserError(f"{path}：{name} 要是不小于 {least} 的整数，写的是 {value!r}。")
        return value

    def switch(name: str, default: bool) -> bool:
        value = config.get(name, default)
        if not isinstance(value, bool):
            raise UserError(f"{path}：{name} 要是 true 或 false，写的是 {value!r}。")
        return value

    heads = number("num_attention_heads")
    hidden = number("hidden_size")
    sizes = ModelSizes(
        name=path.parent.name if path.name == "config.json" else path.stem,
        vocab=number("vocab_size"),
        hidden=hidden,
        layers=number("num_hidden_layers"),
        heads=heads,
        kv_heads=number("num_key_value_heads", heads),
        head_dim=number("head_dim", hidden // heads or None),
        inner=number("intermediate_size"),
        tied=switch("tie_word_embeddings", False),
        **KINDS[kind],
    )
    if kind == "deepseek_v3":
        sizes = replace(
            sizes,
            q_rank=number("q_lora_rank", 0, least=0),
            kv_rank=number("kv_lora_rank"),
            nope=number("qk_nope_head_dim"),
            rope=number("qk_rope_head_dim"),
            v_dim=number("v_head_dim"),
            experts=number("n_routed_experts"),
            top_k=number("num_experts_per_tok"),
            expert_inner=number("moe_intermediate_size"),
            shared=number("n_shared_experts", 0, least=0),
            dense_layers=number("first_k_dense_replace", 0, least=0),
        )
    elif kind == "qwen3_moe":
        # transformers 5 存成 num_local_experts，hub 上的写 num_experts
        experts = number("num_local_experts" if "num_local_experts" in config else "num_experts")
        top_k, inner = number("num_experts_per_tok"), number("moe_intermediate_size")
        sizes = replace(sizes, experts=experts, top_k=top_k, expert_inner=inner)
    elif "head_dim" not in config and hidden % heads:
        raise UserError(f"{path}：hidden_size {hidden} 不能被 num_attention_heads {heads} 整除。")
    if sizes.heads % sizes.kv_heads:
        raise UserError(f"{path}：{sizes.heads} 个头不能平分给 num_key_value_heads = {sizes.kv_heads}。")
    if sizes.top_k > sizes.experts:
        raise UserError(f"{path}：num_experts_per_tok {sizes.top_k} 比专家的个数 {sizes.experts} 还多。")
    return sizes
