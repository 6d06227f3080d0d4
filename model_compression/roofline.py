"""屋顶线：写一个 token 要把权重从头读一遍，所以 token/秒 × 字节 不会超过内存的带宽。处理器的指令集也在这里看。"""

from __future__ import annotations

import time
from pathlib import Path

import torch

from nlp_common.draw.figures import render
from nlp_common.draw.plots import COLORS

COPY_BYTES = 256 << 20  # 比缓存大得多，抄的才是内存
# torch.cpu.get_capabilities 的名字 → 写法，有它快在哪里
INSTRUCTIONS = {
    "avx2": ("AVX2", "一条指令算 8 个 float32；int8 要三条指令才乘加一次"),
    "avx512_f": ("AVX512", "一条算 16 个 float32"),
    "avx_vnni": ("AVX-VNNI", "int8 的乘加一条指令，8 × 4 个"),
    "avx512_vnni": ("AVX512-VNNI", "int8 的乘加一条指令，16 × 4 个：比 float32 快四倍"),
    "avx512_bf16": ("AVX512-BF16", "bf16 的乘加一条指令"),
    "amx_bf16": ("AMX-BF16", "一条指令乘两个小矩阵（bf16）：读提示快得多"),
    "amx_int8": ("AMX-INT8", "一条指令乘两个小矩阵（int8）"),
    "sve": ("SVE", "Arm 的宽指令"),
    "neon": ("NEON", "Arm：一条算 4 个 float32"),
}


def instruction_sets() -> list[str]:
    """这个处理器有的，INSTRUCTIONS 里的键。"""
    has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return [name for name in INSTRUCTIONS if has.get(name)]


def explain(found: list[str]) -> str:
    """为什么排名因机器而异。"""
    names = "、".join(INSTRUCTIONS[name][0] for name in found) or "认不出"
    lines = [f"处理器的指令集：{names}"]
    lines += [f"  {INSTRUCTIONS[name][0]:<12} {INSTRUCTIONS[name][1]}" for name in found]
    if not {"avx512_vnni", "avx_vnni"} & set(found):
        lines.append("  没有 VNNI：int8 省下的只有读内存的时间，读提示反而可能比 float32 慢。")
    if "amx_bf16" not in found and "avx512_bf16" not in found:
        lines.append("  没有 bf16 的指令：bf16 要先变回 float32 再算，比 float32 还慢。")
    return "\n".join(lines)


def copy_bandwidth(repeats: int = 5) -> float:
    """抄一大块内存，每秒几个字节；读的与写的都算。取最快的一次。"""
    source = torch.ones(COPY_BYTES // 4)
    target = torch.zeros_like(source)  # 先写一遍：页面都分到了
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - started)
    return 2 * COPY_BYTES / min(seconds)


def kv_bytes(config, length: float, width: int = 4) -> float:
    """写一个 token，还要读 length 个 token 的 K、V。"""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head * width * length


def draw_roofline(path: Path, points: dict[str, dict[str, tuple[float, float]]], bandwidth: float) -> str:
    """points：{引擎: {存法: (一步读几 MB, 每秒几个 token)}}；斜线是带宽，谁也不该在它上面多少。"""
    every = [point for each in points.values() for point in each.values()]
    low, high = min(x for x, _ in every) / 1.6, max(x for x, _ in every) * 2.2

    def draw(axes, text) -> None:
        axes.plot(
            [low, high],
            [bandwidth / 1e6 / low, bandwidth / 1e6 / high],
            "--",
            color=COLORS[5],
            label=text(ROOF),
        )
        for color, (name, each) in zip(COLORS, points.items(), strict=False):
            xs, ys = zip(*each.values(), strict=True)
            axes.plot(xs, ys, "o", color=color, label=text(name))
            for (x, y), label in zip(each.values(), each, strict=True):
                axes.annotate(
                    text(label), (x, y), xytext=(5, -3), textcoords="offset points", fontsize=7, color=color
                )
        axes.set_xscale("log")
        axes.set_yscale("log")
        for limits, set_ticks in ((axes.get_xlim(), axes.set_xticks), (axes.get_ylim(), axes.set_yticks)):
            set_ticks(ticks := round_numbers(*limits), [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.grid(axis="x", alpha=0.25)

    title = "写一个 token 要读的字节，与写得多快|Bytes read per token and decode speed"
    labels = (title, "一个 token 读几 MB|MB read per token", "token/秒（一次一个）|tokens/s, batch 1")
    return render(path, draw, [*points, ROOF], labels)


def round_numbers(low: float, high: float) -> list[float]:
    """low 到 high 之间的 1、2、5 乘 10 的几次方：对数坐标的刻度。"""
    every = [digit * 10.0**power for power in range(-6, 10) for digit in (1, 2, 5)]
    return [number for number in every if low <= number <= high]


ROOF = "内存的带宽|memory bandwidth"
