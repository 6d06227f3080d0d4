"""用 ZeRO 训练一个模型，每块 GPU、每台机器的内存要多少：状态、激活、logits、缓冲，一样一样列出来。

状态（权重、梯度、优化器）照 DeepSpeed 自己的估算器，一个字节不差；它没有算的几样在 plan() 里。
单位都是字节；打印时 1 GB = 10⁹ 字节（nvidia-smi 的 MiB 是 2²⁰，DeepSpeed 打印的 "GB" 其实是 2³⁰）。
"""

from __future__ import annotations

from dataclasses import dataclass

from model_sizes import ModelSizes, count_params, largest_module

GB = 10**9
# DeepSpeed 的默认值（zero/config.py），以元素计
REDUCE_BUCKET, ALLGATHER_BUCKET, PREFETCH_BUCKET, MAX_LIVE = 5 * 10**8, 5 * 10**8, 5 * 10**7, 10**9
CONTEXT = 2 * 2**30  # CUDA 的上下文与 NCCL 的缓冲，几百块 GPU 时大约这么多
BUFFER_FACTOR = 1.5  # DeepSpeed 的估算器给内存乘的 additional_buffer_factor；我们给显存里的状态也乘上


@dataclass(frozen=True)
class Machines:
    nodes: int = 1
    gpus_per_node: int = 8
    gpu_bytes: float = 85.5 * GB  # H100 80GB：nvidia-smi 写 81,559 MiB
    node_bytes: float = 2000 * GB

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Choice:
    """ZeRO 几级（0 是平常的数据并行），什么挪到 CPU 的内存里。"""

    stage: int
    offload_optimizer: bool = False
    offload_param: bool = False

    def name(self) -> str:
        words = {0: "DDP"}.get(self.stage, f"ZeRO-{self.stage}")
        moved = [
            word for word, on in (("优化器", self.offload_optimizer), ("参数", self.offload_param)) if on
        ]
        return words + ("，挪走" + "与".join(moved) if moved else "")


# 从快到慢：通信越来越多，再往后还要过 PCIe。装得下的第一个就是最好的
CHOICES = [
    Choice(0),
    Choice(1),
    Choice(2),
    Choice(3),
    Choice(2, offload_optimizer=True),
    Choice(3, offload_optimizer=True),
    Choice(3, offload_optimizer=True, offload_param=True),
]

# ---------------------------------------------------------------- 1. DeepSpeed 的估算器


def zero2_needs(total: int, gpus_per_node: int, nodes: int, offload: bool) -> tuple[int, int]:
    """estimate_zero2_model_states_mem_needs：→ (一台机器的内存, 一块 GPU 的显存)，字节。

    一块 GPU：16 位的权重整份（2），加上分到的 2 梯度 + 4 梯度 + 4 主权重 + 8 Adam = 18。
    """
    gpus = nodes * gpus_per_node
    if offload:
        return int(total * max(4 * gpus, 16) * BUFFER_FACTOR), 2 * total
    return int(total * 4 * gpus_per_node * BUFFER_FACTOR), 2 * total + int(18 * total / gpus)


def zero3_needs(
    total: int,
    largest: int,
    gpus_per_node: int,
    nodes: int,
    offload: bool,
    offload_param: bool,
    zero_init: bool = True,
) -> tuple[int, int, int]:
    """estimate_zero3_model_states_mem_needs：→ (一台机器的内存, 一块 GPU 的显存, 其中最大的一层)，字节。

    最大的一层要凑齐：权重 2 + 梯度 2；别的都只有自己的一份：18 ÷ GPU 数。
    """
    gpus, share, layer = nodes * gpus_per_node, 1 / nodes, 4 * largest
    if not offload:
        cpu = largest * 4 * gpus_per_node if zero_init else total * 4 * gpus_per_node
        return int(cpu * BUFFER_FACTOR), layer + int(18 * total / gpus), layer
    kept = 18 if offload_param else 16  # 每个参数在内存里几个字节，一台机器分到 1/nodes
    gpu = layer if offload_param else layer + int(2 * total / gpus)
    if zero_init:  # 乘的次序照它的写：浮点数的末位才一样
        return int(total * kept * share * BUFFER_FACTOR), gpu, layer
    return int(total * max(4 * gpus_per_node, kept * share) * BUFFER_FACTOR), gpu, layer


def states(choice: Choice, total: int, largest: int, machines: Machines) -> tuple[int, int, int]:
    """→ (一台机器的内存, 一块 GPU 常驻的状态, 凑齐最大一层的)。DDP 与 ZeRO-1 估算器不管，同样的账自己算。"""
    gpus, nodes = machines.gpus, machines.nodes
    if choice.stage == 3:
        cpu, gpu, layer = zero3_needs(
            *(total, largest, machines.gpus_per_node, nodes),
            offload=choice.offload_optimizer,
            offload_param=choice.offload_param,
        )
        return cpu, gpu - layer, layer
    if choice.stage == 2:
        return *zero2_needs(total, machines.gpus_per_node, nodes, choice.offload_optimizer), 0
    load = int(total * 4 * machines.gpus_per_node * BUFFER_FACTOR)  # 每个进程先在内存里建一份 float32
    if choice.stage == 1:  # 权重 2 + 梯度 2 整份；4 + 4 + 8 分着
        return load, 4 * total + int(16 * total / gpus), 0
    return load, 18 * total, 0  # float32 的权重 4、梯度 4、Adam 8，自动混合精度的副本 2


# ---------------------------------------------------------------- 2. 估算器没有算的


def layer_activation(s: ModelSizes, layer: int) -> int:
    """一层的前向为反向留下几个字节，一个 token 的（bfloat16，分块的注意力，transformers 的写法）。

    两个归一化各留 float32 的输入 4H、除过的 2H、乘过的（下一个 Linear 的输入）2H。
    """
    norms = 2 * (8 * s.hidden + 4)
    if s.mla:
        query = s.heads * (s.nope + s.rope)
        latent = 8 * s.q_rank + 4 + 8 * s.kv_rank + 4  # q_a、kv_a 与它们的归一化
        kept = 2 * (2 * query + s.heads * (s.nope + s.v_dim) + s.heads * s.v_dim)  # q、k、kv_b 的输出、结果
        attention = latent + kept + 4 * s.heads
    else:
        attention = 4 * s.heads * s.head_dim + 4 * s.kv_heads * s.head_dim + 4 * s.heads
        if s.qk_norm:
            attention += (s.heads + s.kv_heads) * (6 * s.head_dim + 4)
    if not s.has_experts(layer):
        return norms + attention + 8 * s.inner  # gate、silu(gate)、up、它们的积
    chosen = s.top_k * (4 * s.hidden + 8 * s.expert_inner)  # 送去的 token、专家里的四样、送回的
    router = 16 * s.experts + (4 * s.hidden if s.mla else 0)  # DeepSeek 的路由用 float32 算，输入多一份
    return norms + attention + chosen + router + 8 * s.shared * s.expert_inner


def activations(s: ModelSizes, tokens: int, checkpointing: bool) -> tuple[int, int]:
    """→ (各层留下的, 正在算的那一层的)，字节。重算激活时每层只留入口 2H。"""
    per_layer = [layer_activation(s, layer) for layer in range(s.layers)]
    if checkpointing:
        return tokens * s.layers * 2 * s.hidden, tokens * max(per_layer)
    return tokens * sum(per_layer), 0


def logits_bytes(s: ModelSizes, tokens: int) -> int:
    """词表上的一刻：bf16 的 logits 2 + 转成 float32 的 4 + log-softmax 的 4。"""
    return 10 * s.vocab * tokens


def buffers(choice: Choice, total: int) -> int:
    """DeepSpeed 为通信备下的：归约的桶两份（边算边传），ZeRO-3 另有预取的与还没放掉的参数。"""
    bucket = min(REDUCE_BUCKET, total)
    if choice.stage == 3:
        return 2 * (2 * bucket + min(PREFETCH_BUCKET, total) + min(MAX_LIVE, total))
    if choice.stage == 0:
        return 2 * bucket
    return 2 * (2 * bucket + min(ALLGATHER_BUCKET, total))


# ---------------------------------------------------------------- 3. 合起来


def plan(
    s: ModelSizes,
    choice: Choice,
    machines: Machines,
    length: int,
    batch: int,
    sequence_parallel: int = 1,
    checkpointing: bool = True,
    experts_together: int | None = None,
) -> dict:
    """一块 GPU 与一台机器各要几个字节，装不装得下；batch 是每块 GPU（序列并行时每一组）几行。"""
    total, largest = count_params(s)["total"], largest_module(s, experts_together)
    tokens = batch * length // sequence_parallel
    cpu, resident, layer = states(choice, total, largest, machines)
    kept, working = activations(s, tokens, checkpointing)
    head = logits_bytes(s, tokens)
    gpu = {
        "states": resident,
        "largest_layer": layer,
        "activations": kept,
        # 词表与正在重算的那一层不同时在，取大的
        "logits": max(head, working),
        "buffers": buffers(choice, total),
        "context": CONTEXT,
        "margin": int((BUFFER_FACTOR - 1) * resident) if choice.stage else 0,
    }
    formula = sum(n for name, n in gpu.items() if name != "margin")
    return {
        "gpu": gpu,
        "gpu_total": sum(gpu.values()),
        "gpu_formula": formula,
        "cpu": cpu,
        "fits_formula": formula <= machines.gpu_bytes and cpu <= machines.node_bytes,
        "fits": sum(gpu.values()) <= machines.gpu_bytes and cpu <= machines.node_bytes,
        "deepspeed_says": resident + layer <= machines.gpu_bytes and cpu <= machines.node_bytes,
        "tokens": tokens,
    }


def choose(s: ModelSizes, machines: Machines, **batch) -> tuple[Choice | None, dict[Choice, dict]]:
    """→ (装得下的里面最快的，都装不下是 None; 每一种的账)。"""
    plans = {choice: plan(s, choice, machines, **batch) for choice in CHOICES}
    return next((choice for choice, each in plans.items() if each["fits"]), None), plans
