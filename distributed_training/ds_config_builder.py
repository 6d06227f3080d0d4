"""671B 怎样摆：张量 × 流水线 × 专家 × 上下文 × 数据 × ZeRO，一种摆法要多少显存、传多少字节、空等多少。

学到什么：DeepSeek-V3 的 671,026,404,352 个参数从十几个尺寸里数得出来；NVIDIA 公布的几种摆法都放得下，各自为什么；
"八块 GPU 全参数微调"差十几倍，一除就知道；八块能做什么。

运行：
    python ds_config_builder.py                              # DeepSeek-V3，256 块 H100
    python ds_config_builder.py --gpus 1024 --global_batch 8192
    python ds_config_builder.py --model 我的模型 --gpus 16     # 有 config.json 的文件夹

预期输出（实测见本文件夹的 README.md）：与 meta 设备上的模型相差 0 个参数；九行配方都放得下；八块要 1,342 GB 一块。

参考：DeepSeek-AI 2024（DeepSeek-V3）；Narayanan et al. 2021（Megatron-LM：流水线的空等）；Korthikanti et al. 2022（激活）；
NVIDIA-NeMo/Megatron-Bridge 的 docs/performance-summary.md 与 recipes/deepseek（配方）。公式在 megatron_layouts.py。
"""

from nlp_common.base.cli import run_main

import json
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import ClassVar

import torch

from megatron_layouts import Layout, check, measure
from memory_plan import CONTEXT, GB
from model_sizes import SIZES, ModelSizes, count_params, find_sizes
from nlp_common.base.arguments import COUNT, POSITIVE, option
from nlp_common.base.console import print_table
from nlp_common.base.errors import UserError
from nlp_common.train.lesson import run_lesson
from nlp_common.train.settings import LessonSettings, parse_settings
from nlp_common.train.stage import Stage
from plan_pictures import stacked_bars

HOME = Path(__file__).resolve().parent
PRESETS: dict[str, dict] = {"tiny": {}, "full": {}}  # 只算账，两个预设一样

# NVIDIA 公布的 DeepSeek-V3 预训练（都是一行 4,096、BF16 的 Adam 状态）：名字、一块 GPU 几 GB、摆法。
# lib：recipes/deepseek/h100/deepseek_v3.py（commit ce1c61a）；别的：docs/performance-summary.md（commit df0289c）的行，
# 表里没有写重算哪几样，照 deepseek_v3_perf.py（commit 79ec86a）里同一种 GPU 的。显存：H100 80GB 的 81,559 MiB；B200 180、B300 270、GB200 186、GB300 279 是规格。
V3 = {"bf16_moments": True, "mtp": 1, "global_batch": 4096}
UP = {"recompute": ("mla_up_proj",)}
RECIPES = {
    "lib_h100_1024": (85.5, Layout(1024, tp=2, pp=16, ep=64, **V3)),
    "lib_h100_256": (85.5, Layout(256, tp=2, pp=8, ep=32, recompute=("full",), **V3)),
    "2509_h100_1024": (
        85.5,
        Layout(1024, 2, 8, 4, 64, recompute=("mla_up_proj", "mlp"), **V3 | {"global_batch": 8192}),
    ),
    "2511_gb300_256": (279, Layout(256, 1, 2, 4, 32, recompute=("moe_act",), **V3 | {"mtp": 0})),
    "2511_gb200_256": (186, Layout(256, 1, 4, 4, 64, **UP, **V3 | {"mtp": 0})),
    "2511_gb200_256_fp8": (186, Layout(256, 1, 8, 4, 32, **UP, **V3 | {"mtp": 0})),
    "2511_b200_256": (180, Layout(256, 1, 16, 1, 8, **UP, **V3 | {"global_batch": 2048})),
    "2602_b300_256": (270, Layout(256, 1, 16, 1, 8, **UP, **V3)),
    "2602_gb300_256": (279, Layout(256, 1, 2, 8, 32, micro_batch=2, **UP, **V3)),
}
# 排次序用的粗略数：H100 BF16 每秒 989 T 次运算用上四成；NVLink 与 400G 的网卡，一个方向
FLOPS, NVLINK, NETWORK = 0.4 * 989e12, 450e9, 50e9


@dataclass
class BuilderSettings(LessonSettings):
    COMMON: ClassVar[dict] = {"model": "deepseek-v3"}

    model: str | None = option(f"哪个模型：有 config.json 的文件夹，或内置的 {'、'.join(SIZES)}")
    gpus: int = option("一共几块 GPU", 256, limits=COUNT)
    gpus_per_node: int = option("一台几块", 8, limits=COUNT)
    gpu_memory: float = option("一块 GPU 几 GB（10⁹ 字节；H100 80GB 是 85.5）", 85.5, limits=POSITIVE)
    global_batch: int = option("一步一共几行", 4096, limits=COUNT)
    max_length: int = option("一行几个 token", 4096, limits=COUNT)
    bf16_moments: bool = option("Adam 的状态与梯度用 bf16（NVIDIA 的配方如此）", False)
    show: int = option("列出前几种摆法", 5, limits=COUNT)


# ---------------------------------------------------------------- 全课


def learn(stage: Stage) -> dict:
    settings = stage.settings
    sizes = find_sizes(settings.model)
    counted = count_params(sizes)
    print(f"{sizes.name}：{counted['total']:,} 个参数，一个 token 用到 {counted['active']:,} 个")
    for name, n in counted.items():
        if name not in ("total", "active"):
            print(f"  {name:<10}{n:>18,}{n / counted['total']:8.1%}")

    difference = difference_to_meta_model()
    recipes = {name: fit(SIZES["deepseek-v3"], a, gb) for name, (gb, a) in RECIPES.items()}
    show_recipes(recipes)
    found = search(sizes, settings)
    show_found(settings, found)
    metrics = {
        "total_params": counted["total"],
        "active_params": counted["active"],
        "difference_to_meta_model": difference,
        "recipes_fit": sum(each["fits"] for each in recipes.values()),
        "recipes": {
            name: {part: each[part] for part in ("gb", "states_gb", "activations_gb", "bubble")}
            for name, each in recipes.items()
        },
        "layouts": len(found),
        "eight": eight_gpus(SIZES["deepseek-v3"]),
    }
    if found:
        metrics["best"] = {part: found[0][part] for part in ("gb", "bubble")}
        metrics["best"]["layout"] = found[0]["layout"].words()
    show_eight(metrics["eight"])
    data = {"train": {"name": sizes.name, "kind": "builtin", "rows": 0}}
    return stage.save(metrics, data, write=partial(write, recipes=recipes, found=found))


def fit(sizes: ModelSizes, layout: Layout, memory_gb: float) -> dict:
    """一种摆法的账，单位 GB；fits 是最紧的一站加上 CUDA、NCCL 的还放得下。"""
    each = measure(sizes, layout)
    total = each["total"] + CONTEXT
    return {
        "layout": layout,
        "memory": memory_gb,
        "gb": total / GB,
        "states_gb": each["states"] / GB,
        "activations_gb": each["activations"] / GB,
        "context_gb": CONTEXT / GB,
        "traffic_gb": {name: n / GB for name, n in each["traffic"].items()},
        "bubble": each["bubble"],
        "fits": total <= memory_gb * GB,
    }


def write(folder: Path, recipes: dict, found: list[dict]) -> None:
    parts = {"states_gb": "状态|states", "activations_gb": "激活与 logits|activations"}
    parts["context_gb"] = "CUDA、NCCL"
    stacked_bars(
        folder / "recipes.svg",
        {name: {label: each[part] for part, label in parts.items()} for name, each in recipes.items()},
        "NVIDIA 的配方，最紧的一站|Published recipes, fullest stage",
        [each["memory"] for each in recipes.values()],
    )
    if found:
        layout = found[0]["layout"]
        (folder / "layout.json").write_text(json.dumps(asdict(layout), indent=2) + "\n", encoding="utf-8")
        (folder / "megatron_args.txt").write_text(megatron_arguments(layout), encoding="utf-8")
        print("排在第一的写进了 layout.json 与 megatron_args.txt。")


def megatron_arguments(a: Layout) -> str:
    """Megatron-LM 的命令行参数，一行一个。"""
    lines = [
        f"--tensor-model-parallel-size {a.tp}",
        f"--pipeline-model-parallel-size {a.pp}",
        f"--expert-model-parallel-size {a.ep}",
        f"--context-parallel-size {a.cp}",
        f"--micro-batch-size {a.micro_batch}",
        f"--global-batch-size {a.global_batch}",
        f"--seq-length {a.length}",
        "--bf16",
    ]
    lines += ["--use-distributed-optimizer"] if a.zero else []
    lines += ["--sequence-parallel"] if a.tp > 1 else []
    if a.vp > 1:
        lines.append(f"--num-virtual-stages-per-pipeline-rank {a.vp}")
    if "full" in a.recompute:
        lines.append("--recompute-granularity full --recompute-method uniform --recompute-num-layers 1")
    elif a.recompute:
        lines.append(f"--recompute-granularity selective --recompute-modules {' '.join(a.recompute)}")
    if a.bf16_moments:
        lines.append("--use-precision-aware-optimizer --main-grads-dtype bf16")
        lines.append("--exp-avg-dtype bf16 --exp-avg-sq-dtype bf16")
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------- 1. 数得对不对


def difference_to_meta_model() -> int:
    """DeepSeek-V3：与 transformers 在 meta 设备上建的差几个参数（一个字节的权重也不占）。"""
    from transformers import AutoModelForCausalLM, DeepseekV3Config

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(DeepseekV3Config())
    real = sum(p.numel() for p in model.parameters())
    difference = count_params(SIZES["deepseek-v3"])["total"] - real
    print(f"\n与 transformers 在 meta 设备上建的 DeepSeek-V3 相差 {difference} 个参数。")
    return difference


# ---------------------------------------------------------------- 2. NVIDIA 的配方


def show_recipes(recipes: dict) -> None:
    table = [["NVIDIA 的配方", "摆法", "状态", "激活", "一共，GB", "一块有", "空等", ""]]
    for name, each in recipes.items():
        gb = [f"{each[part]:.1f}" for part in ("states_gb", "activations_gb", "gb", "memory")]
        words = "放得下" if each["fits"] else "放不下"
        table.append([name, each["layout"].words(), *gb, f"{each['bubble']:.1%}", words])
    print_table(table)


# ---------------------------------------------------------------- 3. 自己找


def search(sizes: ModelSizes, settings: BuilderSettings) -> list[dict]:
    """试过每一种除得尽的摆法，留下放得下的，按粗略的时间排。张量并行不出一台机器。"""
    powers = [2**i for i in range(11)]
    base = Layout(
        settings.gpus,
        global_batch=settings.global_batch,
        length=settings.max_length,
        bf16_moments=settings.bf16_moments,
    )
    recomputes = [(), ("mla_up_proj",), ("full",)] if sizes.mla else [(), ("full",)]
    shapes = product(
        [tp for tp in powers if tp <= min(8, settings.gpus_per_node)],
        [pp for pp in powers if pp <= 32],
        [1, 2, 4],
        [ep for ep in powers if ep <= max(sizes.experts, 1)],
        [1, 2, 4, 8] if settings.max_length > 8192 else [1],
        [1, 3],
        recomputes,
    )
    found, reason = [], ""
    for tp, pp, vp, ep, cp, zero, recompute in shapes:
        layout = replace(base, tp=tp, pp=pp, vp=vp, ep=ep, cp=cp, zero=zero, recompute=recompute)
        try:
            check(sizes, layout)
        except UserError as error:
            reason = reason or str(error)  # 一种也除不尽的话，就说最简单的那种为什么
            continue
        reason = f"状态与激活都算上，没有一种不超过 {settings.gpu_memory:g} GB。"
        each = fit(sizes, layout, settings.gpu_memory)
        if each["fits"]:
            found.append(each | {"seconds": seconds(sizes, each, settings.gpus_per_node)})
    if not found:
        print(f"\n{settings.gpus} 块 GPU：没有放得下的摆法。{reason}")
    return sorted(found, key=lambda each: (each["seconds"], each["layout"].pp, each["layout"].tp))


def seconds(sizes: ModelSizes, each: dict, gpus_per_node: int) -> float:
    """一步的粗略秒数，只为排次序：计算、空等、没有藏起来的通信相加。"""
    a: Layout = each["layout"]
    work = 6 * count_params(sizes)["active"] * a.global_batch * a.length / a.gpus / FLOPS
    work *= {(): 1, ("full",): 4 / 3}.get(a.recompute, 1.05)  # 重算一遍前向：6 变 8
    outside = NVLINK if a.gpus <= gpus_per_node else NETWORK
    wires = {
        "tensor": NVLINK,
        "context": NVLINK if a.tp * a.cp <= gpus_per_node else NETWORK,
        "expert": NVLINK if a.ep <= gpus_per_node else NETWORK,
        "pipeline": outside,
        "data": outside,
    }
    talk = sum(1e9 * gb / wires[name] for name, gb in each["traffic_gb"].items())
    return work / (1 - each["bubble"]) + talk


def show_found(settings: BuilderSettings, found: list[dict]) -> None:
    if not found:
        return
    print(f"\n{settings.gpus} 块 GPU，放得下的有 {len(found)} 种；排在前面的，与一块 GPU 一步发出的 GB：")
    table = [["摆法", "重算", "一共，GB", "空等", "数据", "张量", "流水线", "专家", "上下文"]]
    for each in found[: settings.show]:
        sent = [f"{gb:.0f}" for gb in each["traffic_gb"].values()]
        recompute = "+".join(each["layout"].recompute) or "不"
        table.append([each["layout"].words(), recompute, f"{each['gb']:.1f}", f"{each['bubble']:.1%}", *sent])
    print_table(table)


# ---------------------------------------------------------------- 4. 只有八块


def eight_gpus(sizes: ModelSizes) -> dict[str, float]:
    """八块 GPU 平分，一块几 GB（10⁹ 字节）：什么做不成，什么做得成。"""
    total = count_params(sizes)["total"]
    per_gpu = total / 8 / GB
    return {
        "full_gb": 16 * per_gpu,  # 权重 2 + 梯度 2 + 主权重 4 + Adam 8
        "weights_bf16_gb": 2 * per_gpu,  # LoRA 的底座
        "weights_fp8_gb": per_gpu,  # 推理
        "weights_4bit_gb": 4.127 / 8 * per_gpu,  # QLoRA 的底座（NF4，双重量化）
        "offload_tb": 18 * total / 1e12,  # 全挪到一台机器的内存或硬盘里
        "times_too_big": 16 * per_gpu / 85.5,
    }


def show_eight(eight: dict[str, float]) -> None:
    def can(gb: float) -> str:
        cards = {"H100 80GB": 85.5, "H200": 150.8, "B300": 270}
        fits = [name for name, memory in cards.items() if gb * 1.1 <= memory]  # 留一成给激活
        return f"八块 {fits[0]} 起" if fits else "没有这么大的 GPU"

    print("\n八块 GPU、DeepSeek-V3，一块要几 GB：")
    for key, words in (
        ("full_gb", "全参数微调（16 字节一个参数）"),
        ("weights_bf16_gb", "LoRA：bf16 的底座"),
        ("weights_fp8_gb", "推理：FP8 的权重"),
        ("weights_4bit_gb", "QLoRA：四位的底座"),
    ):
        print(f"  {eight[key]:8,.1f}  {words}：{can(eight[key])}")
    print(
        f"  全挪走也要 {eight['offload_tb']:.1f} TB 的内存或 NVMe；或者改教小的：见 zero3_configurator.py。"
    )


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(BuilderSettings, PRESETS, argv)
    return run_lesson("ds_config_builder", HOME, settings, learn)


if __name__ == "__main__":
    run_main(main)
