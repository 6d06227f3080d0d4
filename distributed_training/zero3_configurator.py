"""ZeRO 怎样选：模型、几块 GPU、多长的一行 → 内存的账、用几级、挪不挪走，写成 DeepSpeed、accelerate、FSDP2 的设置文件。

学到什么：状态的账是死的（与 DeepSpeed 的估算器一个字节不差）；可是爆显存的多半不是状态，而是估算器没有算的激活、
logits、通信的缓冲；有人公布的 671B 微调八行，估算器都说装得下，其实三行爆了。

运行：
    python zero3_configurator.py                                             # Qwen2.5-7B，一台八块 80 GB
    python zero3_configurator.py --model 我的模型 --nodes 2 --gpu_memory 24    # 有 config.json 的文件夹；别的显卡
    python zero3_configurator.py --model deepseek-v3 --nodes 32 --max_length 32768 --sequence_parallel 4

预期输出（实测见本文件夹的 README.md）：选 ZeRO-1；八行里我们对八行，只照公式对七行，估算器对五行。

参考：Rajbhandari et al. 2020（ZeRO）；DeepSpeed 的 estimate_zero2/3_model_states_mem_needs；
ScienceOne-AI/DeepSeek-671B-SFT-Guide 的 README（八行）；DeepSpeed issue 4527。
"""

from nlp_common.base.cli import run_main

from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from config_files import write_configs
from memory_plan import CHOICES, GB, Choice, Machines, choose, plan, zero2_needs, zero3_needs
from model_sizes import SIZES, ModelSizes, count_params, find_sizes, largest_module
from nlp_common.base.arguments import COUNT, POSITIVE, option
from nlp_common.base.console import print_table
from nlp_common.base.errors import UserError
from nlp_common.train.lesson import run_lesson
from nlp_common.train.settings import LessonSettings, parse_settings
from nlp_common.train.stage import Stage
from plan_pictures import stacked_bars

HOME = Path(__file__).resolve().parent
PRESETS: dict[str, dict] = {"tiny": {}, "full": {}}  # 只算账，两个预设一样

# 671B 全参数微调（ScienceOne-AI/DeepSeek-671B-SFT-Guide 的 README，commit 0fcc121）：32k 的上下文，每台 8 块 H100 80GB、
# 2.0 TB 内存。列：机器、序列并行、挪走、每块几行、它写的显存（nvidia-smi 当时的读数）、爆没爆。
GUIDE = [
    (16, 8, True, 2, "~30GB", True),
    (32, 8, True, 1, "~32GB", True),
    (32, 4, True, 1, "~25GB", True),
    (32, 1, True, 1, "~30GB", True),
    (32, 4, True, 2, "~74GB", True),
    (32, 1, True, 2, "OOM", False),
    (32, 4, False, 1, "OOM", False),
    (32, 1, False, 1, "OOM", False),
]
GUIDE_LENGTH = 32_768
GUIDE_EXPERTS = 8  # 它把每八个专家放进一个模块（expert_in_one_shard=8）

PARTS = {
    "states": "状态|states",
    "largest_layer": "凑齐的一层|gathered layer",
    "activations": "激活|activations",
    "logits": "logits",
    "buffers": "通信的缓冲|buffers",
    "context": "CUDA、NCCL",
    "margin": "余量|margin",
}


@dataclass
class ConfiguratorSettings(LessonSettings):
    COMMON: ClassVar[dict] = {"model": "qwen2.5-7b"}

    model: str | None = option(f"哪个模型：有 config.json 的文件夹，或内置的 {'、'.join(SIZES)}")
    nodes: int = option("几台机器", 1, limits=COUNT)
    gpus_per_node: int = option("一台几块 GPU", 8, limits=COUNT)
    gpu_memory: float = option("一块 GPU 几 GB（10⁹ 字节；H100 80GB 是 85.5）", 85.5, limits=POSITIVE)
    node_memory: float = option("一台机器的内存几 GB", 2000.0, limits=POSITIVE)
    max_length: int = option("一行几个 token", 4096, limits=COUNT)
    per_device_train_batch_size: int = option("每块 GPU（序列并行时每一组）一次几行", 1, limits=COUNT)
    gradient_accumulation_steps: int = option("累积几次再更新", 1, limits=COUNT)
    sequence_parallel: int = option("一行切给几块 GPU", 1, limits=COUNT)
    gradient_checkpointing: bool = option("反向时重算激活", True)
    experts_together: int | None = option("几个专家在一个模块里；默认全部（transformers 5）", limits=COUNT)

    def check(self) -> None:
        gpus = self.nodes * self.gpus_per_node
        if gpus % self.sequence_parallel:
            raise UserError(
                f"{gpus} 块 GPU 分不成每组 {self.sequence_parallel} 块：--sequence_parallel 要能整除它。"
            )
        if self.max_length % self.sequence_parallel:
            raise UserError(
                f"--max_length {self.max_length} 不能平分给 {self.sequence_parallel} 块：改成它的倍数。"
            )


# ---------------------------------------------------------------- 全课


def learn(stage: Stage) -> dict:
    settings = stage.settings
    sizes = find_sizes(settings.model)
    machines = Machines(
        *(settings.nodes, settings.gpus_per_node, settings.gpu_memory * GB, settings.node_memory * GB)
    )
    batch = {
        "length": settings.max_length,
        "batch": settings.per_device_train_batch_size,
        "sequence_parallel": settings.sequence_parallel,
        "checkpointing": settings.gradient_checkpointing,
        "experts_together": settings.experts_together,
    }
    chosen, plans = choose(sizes, machines, **batch)
    show_plans(sizes, machines, chosen, plans)
    if chosen is None:
        advise(sizes, machines, batch)

    rows = guide_rows()
    show_guide(rows)
    metrics = {
        "total_params": count_params(sizes)["total"],
        "chosen_stage": -1 if chosen is None else chosen.stage,
        "gpu_gb": {key(choice): each["gpu_total"] / GB for choice, each in plans.items()},
        "cpu_gb": {key(choice): each["cpu"] / GB for choice, each in plans.items()},
        "guide_right": {
            name: sum(row[name] == row["fitted"] for row in rows) for name in ("ours", "formula", "deepspeed")
        },
        "guide_gb": {f"row{i + 1}": row["gb"] for i, row in enumerate(rows)},
        "guide_lengths": guide_lengths(),
        "issue_4527": issue_4527(),
    }
    difference = difference_to_deepspeed()
    if difference is not None:
        metrics["max_difference_to_deepspeed_bytes"] = difference
    data = {"train": {"name": sizes.name, "kind": "builtin", "rows": 0}}
    return stage.save(metrics, data, write=partial(write, settings, chosen, machines, plans))


def key(choice: Choice) -> str:
    return f"zero{choice.stage}" + "_optimizer" * choice.offload_optimizer + "_param" * choice.offload_param


def write(settings, chosen: Choice | None, machines: Machines, plans: dict, folder: Path) -> None:
    stacked_bars(
        folder / "plan.svg",
        {choice.name(): {PARTS[n]: b / GB for n, b in each["gpu"].items()} for choice, each in plans.items()},
        f"一块 GPU 要几 GB：{settings.model}|GB per GPU: {settings.model}",
        [settings.gpu_memory] * len(plans),
    )
    if chosen is None:
        print("没有装得下的切法，不写设置文件。")
        return
    batch, accumulation = settings.per_device_train_batch_size, settings.gradient_accumulation_steps
    write_configs(folder, chosen, machines, batch, accumulation)
    files = "、".join(sorted(path.name for path in folder.iterdir() if path.suffix != ".svg"))
    print(f"照「{chosen.name()}」写好了 {files}。")


# ---------------------------------------------------------------- 1. 读者的模型


def show_plans(sizes: ModelSizes, machines: Machines, chosen: Choice | None, plans: dict) -> None:
    counted = count_params(sizes)
    print(f"{sizes.name}：{counted['total']:,} 个参数" + active_words(counted))
    print(f"{machines.nodes} 台 × {machines.gpus_per_node} 块，一块 {machines.gpu_bytes / GB:.1f} GB")
    table = [["一块 GPU，GB", "状态", "一层", "激活", "logits", "缓冲", "余量", "一共", "每台内存", ""]]
    for choice, each in plans.items():
        gb = {name: n / GB for name, n in each["gpu"].items()} | {"total": each["gpu_total"] / GB}
        gb["buffers"] += gb["context"]
        names = ("states", "largest_layer", "activations", "logits", "buffers", "margin", "total")
        mark = "← 选它" if choice == chosen else "" if each["fits"] else "装不下"
        table.append([choice.name(), *(f"{gb[name]:.1f}" for name in names), f"{each['cpu'] / GB:.0f}", mark])
    print_table(table)


def active_words(counted: dict) -> str:
    if counted["active"] == counted["total"]:
        return ""
    return f"，一个 token 用到 {counted['active']:,} 个（{counted['active'] / 1e9:.1f} B）"


def advise(sizes: ModelSizes, machines: Machines, batch: dict) -> None:
    """都装不下：先看是状态还是激活的错，再说要几台。"""
    least = plan(sizes, CHOICES[-1], machines, **batch)
    if least["cpu"] <= machines.node_bytes:  # 全挪走了还是显存不够：是激活与 logits
        print("参数与优化器都挪走了还装不下：占地方的是激活与 logits，")
        print("  请减小 --max_length 或 --per_device_train_batch_size，或加大 --sequence_parallel。")
        return
    nodes = machines.nodes
    while nodes < 4096:
        nodes += 1
        more = Machines(nodes, machines.gpus_per_node, machines.gpu_bytes, machines.node_bytes)
        chosen, _ = choose(sizes, more, **batch)
        if chosen is not None:
            print(
                f"同样的机器至少要 {nodes} 台（{chosen.name()}）；或者换 LoRA、QLoRA，见 ../lora_finetune。"
            )
            return
    print(
        "再加机器也装不下：换 LoRA、QLoRA（../lora_finetune），或换张量、流水线并行（ds_config_builder.py）。"
    )


# ---------------------------------------------------------------- 2. 公布的八行


def guide_rows(length: int = GUIDE_LENGTH) -> list[dict]:
    """八行各算一遍：fitted 是真的，ours、formula、deepspeed 是三种算法各说装不装得下。"""
    rows = []
    for nodes, parallel, offload, batch, memory, fitted in GUIDE:
        each = plan(
            *(SIZES["deepseek-v3"], Choice(3, offload, offload), Machines(nodes), length, batch, parallel),
            experts_together=GUIDE_EXPERTS,
        )
        rows.append(
            {
                "words": f"{nodes} 台，sp {parallel}，{'挪走' if offload else '不挪'}，{batch} 行",
                "published": memory,
                "fitted": fitted,
                "ours": each["fits"],
                "formula": each["fits_formula"],
                "deepspeed": each["deepspeed_says"],
                "gb": each["gpu_total"] / GB,
            }
        )
    return rows


def guide_lengths() -> dict[str, int]:
    """最长的一行在多少个 token 之间，八行都对：它只写了 32k，没有写数据到底多长。"""
    right = [
        length
        for length in range(1024, 65_536, 1024)
        if all(row["ours"] == row["fitted"] for row in guide_rows(length))
    ]
    return {"from": min(right, default=0), "to": max(right, default=0)}


def show_guide(rows: list[dict]) -> None:
    words = {True: "装得下", False: "爆"}
    table = [["671B 微调，公布的八行", "其实", "我们", "GB", "只照公式", "DeepSpeed 的估算器"]]
    for row in rows:
        said = [words[row[name]] for name in ("fitted", "ours", "formula", "deepspeed")]
        table.append([row["words"], *said[:2], f"{row['gb']:.1f}", *said[2:]])
    print_table(table)
    issue = issue_4527()
    print("\n估算器只算状态，没有算：激活、logits、通信的缓冲、CUDA 与 NCCL、显存的碎片。")
    print(
        f"  例如 DeepSpeed 的 issue 4527：它说 {issue['deepspeed']:.2f} GiB，其实 14.3 到 20.8；"
        f"我们的账里一个 token 也没有就有 {issue['no_tokens']:.1f}。"
    )


# ---------------------------------------------------------------- 3. DeepSpeed 的估算器


def issue_4527() -> dict[str, float]:
    """DeepSpeed issue 4527：6.805B 的模型、4 块 GPU、全挪走。估算器说 0.49 GiB，其实 14.3（刚建好）到 20.8 GiB。

    我们的账在一个 token 也没有的时候就比它多：通信的缓冲、还没放掉的参数、CUDA 的上下文。单位 GiB。
    """
    sizes, machines = SIZES["llama-2-7b"], Machines(1, 4)
    empty = plan(sizes, CHOICES[-1], machines, length=0, batch=1)
    some = plan(sizes, CHOICES[-1], machines, length=2048, batch=1)
    return {
        "deepspeed": zero3_needs(6_805_000_000, 131_000_000, 4, 1, True, True)[1] / 2**30,
        "no_tokens": empty["gpu_total"] / 2**30,
        "tokens_2048": some["gpu_total"] / 2**30,
    }


def difference_to_deepspeed() -> int | None:
    """与装着的 deepspeed 比：几百组参数，最多差几个字节。没有装是 None。"""
    if not find_spec("deepspeed"):
        print("\n没有装 deepspeed，不与它比（测试里有它的公式与手算的表）：pip install deepspeed。")
        return None
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as theirs3
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as theirs2

    worst = 0
    for sizes in SIZES.values():
        total, largest = count_params(sizes)["total"], largest_module(sizes)
        for gpus, nodes in ((1, 1), (8, 1), (3, 7), (8, 32)):
            for offload in (False, True):
                ours = zero2_needs(total, gpus, nodes, offload)
                pairs = list(zip(ours, theirs2(total, gpus, nodes, offload), strict=True))
                for offload_param in (False, True):
                    for init in (False, True):
                        ours3 = zero3_needs(total, largest, gpus, nodes, offload, offload_param, init)
                        other = theirs3(total, largest, gpus, nodes, offload, offload_param, init)
                        pairs += zip(ours3, other, strict=True)
                worst = max(worst, *(abs(a - b) for a, b in pairs))
    print(f"\n与 DeepSpeed 的估算器最多相差 {worst} 个字节。")
    return worst


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(ConfiguratorSettings, PRESETS, argv)
    return run_lesson("zero3_configurator", HOME, settings, learn)


if __name__ == "__main__":
    run_main(main)
