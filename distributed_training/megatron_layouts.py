"""大模型的一种摆法（张量 × 流水线 × 专家 × 上下文 × 数据 × ZeRO）要多少显存、传多少字节、空等多少。

Megatron-LM 的写法：一层里，注意力与稠密的 MLP 按张量并行切，专家按专家并行分，层按流水线分，优化器按数据并行分。
只有算术，不建模型；公式旁边写着它从哪里来。
"""

from __future__ import annotations

from dataclasses import dataclass

from model_sizes import (
    ModelSizes,
    attention_params,
    embedding_params,
    mlp_params,
    norm_params,
    router_params,
)
from nlp_common.base.errors import UserError

MODULES = ("mla_up_proj", "moe_act", "mlp", "full")  # 反向时可以重算的几样，名字同 Megatron


@dataclass(frozen=True)
class Layout:
    gpus: int
    tp: int = 1  # 张量
    pp: int = 1  # 流水线
    vp: int = 1  # 一块 GPU 上的层再分几段（交错的流水线）
    ep: int = 1  # 专家
    cp: int = 1  # 上下文（一行切成几段）
    zero: int = 1  # 优化器按数据并行分：1；0 不分；2、3 再分梯度、参数（只在 pp = 1 时）
    global_batch: int = 1
    micro_batch: int = 1
    length: int = 4096
    recompute: tuple[str, ...] = ()
    bf16_moments: bool = False  # Adam 的两份状态用 bf16、梯度也用 bf16（NVIDIA 的 DeepSeek-V3 配方）
    mtp: int = 0  # 另加几层多 token 预测

    @property
    def dp(self) -> int:
        return self.gpus // (self.tp * self.pp * self.cp)

    @property
    def expert_dp(self) -> int:
        return self.gpus // (self.pp * self.ep)

    @property
    def micro_batches(self) -> int:
        return self.global_batch // (self.micro_batch * self.dp)

    @property
    def tokens(self) -> int:
        """一块 GPU 上、一个 micro-batch 的 token：上下文并行切过，序列并行（跟着张量并行）又切过。"""
        return self.micro_batch * self.length // (self.cp * self.tp)

    def words(self) -> str:
        names = (("TP", self.tp), ("PP", self.pp), ("VP", self.vp), ("EP", self.ep), ("CP", self.cp))
        return " ".join(f"{name}{n}" for name, n in names if n > 1) + f" DP{self.dp} ZeRO-{self.zero}"


def check(s: ModelSizes, a: Layout) -> None:
    """除不尽、自相矛盾的摆法：说出哪两个数。"""

    def divides(small: int, name: str, big: int, what: str) -> None:
        if big % small:
            raise UserError(f"{what} {big} 不能被 {name} = {small} 整除。")

    for name in ("gpus", "tp", "pp", "vp", "ep", "cp", "global_batch", "micro_batch", "length"):
        if getattr(a, name) < 1:
            raise UserError(f"{name} 要是正整数，给的是 {getattr(a, name)}。")
    divides(a.tp * a.pp * a.cp, "TP × PP × CP", a.gpus, "GPU 的块数")
    divides(a.tp, "TP", s.heads, "注意力的头数")
    if not s.mla:
        divides(a.tp, "TP", s.kv_heads, "键值的头数")
    divides(a.tp, "TP", s.vocab, "词表的大小")
    if a.ep > 1 and not s.experts:
        raise UserError(f"{s.name} 没有专家，EP 只能是 1，给的是 {a.ep}。")
    divides(a.ep, "EP", s.experts or 1, "专家的个数")
    divides(a.pp * a.ep, "PP × EP", a.gpus, "GPU 的块数")
    divides(a.cp * a.tp, "CP × TP", a.length, "一行的长度")
    divides(a.micro_batch * a.dp, "micro-batch × DP", a.global_batch, "一步的总行数")
    if a.pp * a.vp > s.layers + a.mtp:
        raise UserError(f"{s.layers} 层分不成 PP × VP = {a.pp * a.vp} 段。")
    if a.vp > 1 and a.pp == 1:
        raise UserError("VP 是把流水线的一站再分几段：PP = 1 时没有。")
    if a.vp > 1:
        divides(a.pp, "PP", a.micro_batches, "交错的流水线，micro-batch 的个数")
    if a.zero not in (0, 1, 2, 3):
        raise UserError(f"ZeRO 只有 0、1、2、3 级，给的是 {a.zero}。")
    if a.zero > 1 and a.pp > 1:
        raise UserError("PP > 1 时 ZeRO 只能到 1 级：梯度要在各个 micro-batch 上累积，切开了每次都要再收。")
    for name in a.recompute:
        if name not in MODULES:
            raise UserError(f"不会重算 {name}，可以是 {'、'.join(MODULES)}。")


# ---------------------------------------------------------------- 1. 每一站有什么


def stage_layers(s: ModelSizes, a: Layout) -> list[list[int]]:
    """每一站放哪几层：分成 PP × VP 段，段尽量一样长，多的在前（最后一段还有词表），轮流给各站。-1 是 MTP。"""
    layers = [*range(s.layers), *([-1] * a.mtp)]
    chunks = a.pp * a.vp
    longest = -(-len(layers) // chunks)
    sizes = [longest] * chunks
    for i in range(longest * chunks - len(layers)):  # 少的几层从最后一段起往前少放
        sizes[-1 - i % chunks] -= 1
    if longest * (chunks - 1) < len(layers):  # 前面都放满、最后一段放剩下的（NVIDIA 的摆法）
        sizes = [longest] * (chunks - 1) + [len(layers) - longest * (chunks - 1)]
    stages: list[list[int]] = [[] for _ in range(a.pp)]
    at = 0
    for chunk, size in enumerate(sizes):
        stages[chunk % a.pp] += layers[at : at + size]
        at += size
    return stages


def stage_params(s: ModelSizes, a: Layout, stage: int) -> dict[str, float]:
    """第 stage 站的一块 GPU 上有几个参数：dense 在数据并行的各组里都一样，experts 在专家的各组里。"""
    attention = attention_params(s)
    one_attention = attention["split"] / a.tp + attention["whole"]
    dense = experts = 0.0
    for layer in stage_layers(s, a)[stage]:
        dense += one_attention + norm_params(s)
        if layer < 0:  # MTP：一个 MoE 层，加一个 2H → H 的投影与三个归一化
            dense += 2 * s.hidden * s.hidden / a.tp + 3 * s.hidden
        if layer < 0 or s.has_experts(layer):
            dense += router_params(s) + mlp_params(s, s.shared * s.expert_inner) / a.tp
            experts += s.experts / a.ep * mlp_params(s, s.expert_inner)
        else:
            dense += mlp_params(s, s.inner) / a.tp
    if stage == 0:
        dense += embedding_params(s) / a.tp
    if stage == a.pp - 1:
        dense += s.hidden + (embedding_params(s) / a.tp if not s.tied or a.pp > 1 else 0)
    return {"dense": dense, "experts": experts}


def state_bytes(a: Layout, params: dict[str, float]) -> float:
    """权重、梯度、优化器。平常：2 + 4 + 12/分的份数；bf16_moments：2 + 2 + (主权重 4 + 2 + 2)/份数。"""
    gradient, optimizer = (2, 8) if a.bf16_moments else (4, 12)
    total = 0.0
    for name, shared in (("dense", a.dp * a.cp), ("experts", a.expert_dp)):
        n = params[name]
        total += n * 2 / (shared if a.zero >= 3 else 1)
        total += n * gradient / (shared if a.zero >= 2 else 1)
        total += n * optimizer / (shared if a.zero >= 1 else 1)
    return total


# ---------------------------------------------------------------- 2. 激活


def token_bytes(s: ModelSizes, layer: int, recompute: tuple[str, ...] = ()) -> int:
    """一层为反向留下几个字节，一个 token 的：bf16、融合的核（归一化不留 float32 的副本）。"""
    if "full" in recompute:
        return 2 * s.hidden
    kept = 8 * s.hidden  # 两个归一化的输入与输出
    if s.mla:
        kept += 4 * s.q_rank + 4 * s.kv_rank + 2 * s.rope  # 压缩过的，归一化前后
        expanded = 2 * s.heads * (2 * (s.nope + s.rope) + s.v_dim)  # q、k、v
        kept += 0 if "mla_up_proj" in recompute else expanded
        kept += 2 * s.heads * s.v_dim
    else:
        kept += 4 * s.heads * s.head_dim + 4 * s.kv_heads * s.head_dim
    if layer >= 0 and not s.has_experts(layer):
        return kept + (0 if "mlp" in recompute else 6 * s.inner)
    kept += s.top_k * (2 * s.hidden + 4 * s.expert_inner)  # 送来的 token、gate 与 up
    kept += 0 if "moe_act" in recompute else s.top_k * 2 * s.expert_inner
    return kept + 6 * s.shared * s.expert_inner


def chunks_in_flight(a: Layout, stage: int) -> int:
    """第 stage 站最多同时留着几段的激活：1F1B 是 p − i 个 micro-batch，交错的（Megatron）多一些。"""
    if a.vp == 1:
        return min(a.micro_batches, a.pp - stage)
    return min(a.micro_batches * a.vp, 2 * (a.pp - stage - 1) + (a.vp - 1) * a.pp + 1)


def activation_bytes(s: ModelSizes, a: Layout, stage: int) -> float:
    layers = stage_layers(s, a)[stage]
    kept = sum(token_bytes(s, layer, a.recompute) for layer in layers) / a.vp
    total = kept * a.tokens * chunks_in_flight(a, stage)
    if "full" in a.recompute and layers:  # 正在重算的那一层
        total += max(token_bytes(s, layer) for layer in layers) * a.tokens
    if stage == a.pp - 1:  # 词表：bf16 的 logits 与 float32 的一份，按 TP 切
        total += 6 * s.vocab / a.tp * a.micro_batch * a.length / a.cp
    return total


# ---------------------------------------------------------------- 3. 传多少，空等多少


def traffic_bytes(s: ModelSizes, a: Layout) -> dict[str, float]:
    """一块 GPU 一步发出几个字节（最忙的一站），按用途：环形的集合通信 (n−1)/n 的那些公式见 collectives.py。"""
    worst = dict.fromkeys(("data", "tensor", "pipeline", "expert", "context"), 0.0)
    for stage, layers in enumerate(stage_layers(s, a)):
        params = stage_params(s, a, stage)
        for name, n in _stage_traffic(s, a, params, layers).items():
            worst[name] = max(worst[name], n)
    return worst


def _stage_traffic(s: ModelSizes, a: Layout, params: dict[str, float], layers: list[int]) -> dict[str, float]:
    gradient = 2 if a.bf16_moments else 4
    m = a.micro_batches
    data = 0.0
    for name, shared in (("dense", a.dp * a.cp), ("experts", a.expert_dp)):
        ring = (shared - 1) / shared
        gathers = (
            2 if a.zero == 3 else 1
        )  # ZeRO-3 前向、反向各收一次参数；1、2 级更新以后收一次；0 级都在归约里
        reduce = gradient if a.zero else 2 * gradient
        each = ring * params[name] * (reduce + (2 * gathers if a.zero else 0))
        data += each * (m if a.zero >= 2 else 1)
    whole = a.tokens * a.tp * 2 * s.hidden  # 一个 micro-batch 的一份激活，字节
    # 序列并行：一层里注意力、MLP 各一次 all-gather、一次 reduce-scatter，反向再来一遍；专家不按 TP 切
    splits = sum(1 if layer < 0 or s.has_experts(layer) else 2 for layer in layers)
    tensor = m * splits * 4 * (a.tp - 1) / a.tp * whole
    pipeline = 0.0 if a.pp == 1 else m * a.vp * 2 * a.tokens * 2 * s.hidden  # 前向一份、反向一份
    moe = sum(layer < 0 or s.has_experts(layer) for layer in layers)
    # 送去、送回，前向、反向：四次 all-to-all，每次 top_k 份，其中 (n−1)/n 要出门
    expert = m * moe * 4 * (a.ep - 1) / a.ep * a.tokens * s.top_k * 2 * s.hidden
    kv = 2 * (s.kv_rank + s.rope) if s.mla else 4 * s.kv_heads * s.head_dim
    context = m * len(layers) * 3 * (a.cp - 1) * a.tokens * kv  # K、V 转一圈；反向再转一圈、带着梯度
    return {"data": data, "tensor": tensor, "pipeline": pipeline, "expert": expert, "context": context}


def bubble(a: Layout) -> float:
    """流水线空等的时间占一步的几成：(p − 1) / (v·m + p − 1)。"""
    return (a.pp - 1) / (a.vp * a.micro_batches + a.pp - 1)


def measure(s: ModelSizes, a: Layout) -> dict:
    """一种摆法的全部：最紧的一站的显存（字节）、每步传的字节、空等的比例。"""
    check(s, a)
    stages = []
    for stage in range(a.pp):
        states = state_bytes(a, stage_params(s, a, stage))
        stages.append({"states": states, "activations": activation_bytes(s, a, stage)})
    worst = max(stages, key=lambda each: sum(each.values()))
    return worst | {
        "total": sum(worst.values()),
        "stages": [sum(each.values()) for each in stages],
        "traffic": traffic_bytes(s, a),
        "bubble": bubble(a),
    }
