"""这么大的模型、这块显卡、这些数据、要伺候几样活儿：全参数、LoRA 还是 QLoRA？给出设置、要多少内存、为什么。

学到什么：内存花在权重、梯度、优化器、激活四处，每一处都数得出来；先看装不装得下，再看数据多少、活儿几样；
公式不是估出来的：小模型上与真的张量一个字节不差，QLoRA 论文公布的四行也对得上。

运行：
    python method_selector.py                                                  # 7B、24 GB、一万行、一样活儿
    python method_selector.py --parameters 32B --gpu_memory 24 --rows 500      # 换一种情形
    python method_selector.py --model 文件夹 --gpu_memory 80 --rows 200000     # 照 config.json 算
    python method_selector.py --parameters 7B --gpu_memory 80 --tasks 20       # 一个底座，二十样活儿

预期输出（实测见本文件夹的 README.md）：选出的方法、命令与理由；三种方法各要几 GB；公式与真张量相差 0 字节。

参考：Dettmers et al. 2023（QLoRA，表 6 与 r、学习率）；Biderman et al. 2024（数据多时 LoRA 赶不上全参数）。公式在 finetune_memory.py。
"""

from nlp_common.base.cli import run_main

import json
import math
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import torch
from transformers import PreTrainedConfig

from finetune_memory import (
    GB,
    LLAMA,
    METHODS,
    SIZES,
    Parts,
    activations,
    lora_parameters,
    memory,
    parts_of,
    real_bytes,
)
from lora_by_hand import add_lora
from nf4 import quantize_model
from nlp_common.base.arguments import COUNT, POSITIVE, option
from nlp_common.base.device import pick_device
from nlp_common.base.errors import UserError
from nlp_common.draw.plots import line_chart
from nlp_common.hub.models import require_model
from nlp_common.lm.checks import check_decoder
from nlp_common.tiny.qwen import build_model, build_tokenizer
from nlp_common.train.dry_run import device_bytes, read_config
from nlp_common.train.lesson import run_lesson
from nlp_common.train.settings import LessonSettings, parse_settings
from nlp_common.train.stage import Stage

HOME = Path(__file__).resolve().parent
PRESETS: dict = {"tiny": {}, "full": {}}
NAMES = {"full": "全参数|full", "lora": "LoRA", "qlora": "QLoRA"}
PARTS = {
    "weights": "权重",
    "half_copy": "半精度副本",
    "adapters": "适配器",
    "gradients": "梯度",
    "optimizer": "优化器",
    "activations": "激活",
}
MANY_ROWS = 100_000  # 数据这么多，LoRA 的那点参数开始装不下（Biderman et al. 2024）
BATCH = 16  # 一步多少行，够不着就累积
SPARE = 0.9  # 显存留一成：CUDA 自己的、碎片


@dataclass
class SelectorSettings(LessonSettings):
    COMMON: ClassVar[dict] = {}

    parameters: str = option("模型有多少参数：7B、500M、7e9；给了 --model 就不看它", "7B")
    model: str | None = option("照它的 config.json 算：hub 名或文件夹")
    source: Literal["hf", "modelscope"] = option("hub 名从哪里下载", "hf")
    gpu_memory: float | None = option("显卡有多少 GB；默认看这台机器的，没有显卡按 24", limits=POSITIVE)
    rows: int = option("训练数据有多少行", 10_000, COUNT)
    tasks: int = option("同一个底座要伺候几样活儿", 1, COUNT)
    max_length: int = option("每行最多多少个 token", 1024, COUNT)


# ---------------------------------------------------------------- 1. 模型有多大


def count_of(text: str) -> float:
    """7B、1.5b、500M、7e9、70亿 → 个数；写错了是 UserError。"""
    found = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([bm亿]?)\s*", text.lower())
    scale = {"": 1.0, "m": 1e6, "b": 1e9, "亿": 1e8}
    try:
        value = float(found[1]) * scale[found[2]] if found else 0.0
    except ValueError:
        value = 0.0
    if value < 1e5:
        raise UserError(f"--parameters 要是参数的个数，例如 7B、500M、7e9，给的是 {text}。")
    return value


def shape_of(settings) -> tuple[PreTrainedConfig, float, str]:
    """→ (照谁的形状算, 各项再乘多少, 说明)。只有参数个数时，借最接近的公布尺寸的形状，按比例折算。"""
    if settings.model:
        path = require_model(settings.model, settings.source)
        check_decoder(path)
        config, where = read_config(str(path), settings.model, settings.source, "", lambda: SIZES["7B"])
        return config, 1.0, where
    wanted = count_of(settings.parameters)
    totals = {name: parts_of(config).total for name, config in SIZES.items()}
    name = min(totals, key=lambda each: abs(math.log(totals[each] / wanted)))
    return SIZES[name], wanted / totals[name], f"{settings.parameters}，形状照公布的 {name}"


# ---------------------------------------------------------------- 2. 每种方法要多少


def need(config, parts: Parts, method: str, r: int, n_tokens: int, checkpointing: bool) -> dict[str, float]:
    """各项几 GB，在显卡上：全参数是 float32 加半精度副本；LoRA 的底座 bfloat16；QLoRA 四位，优化器八位。"""
    used: dict[str, float] = dict(
        memory(
            parts,
            method,
            r,
            weight_bytes=4 if method == "full" else 2,
            half_copy=method == "full",
            eight_bit_adam=method == "qlora",
        )
    )
    used["activations"] = activations(config, n_tokens, True, checkpointing)
    return {name: size / GB for name, size in used.items()}


def fit(config, parts: Parts, method: str, r: int, ratio: float, settings, room: float) -> dict | None:
    """装得下的最快的设置：先不重算激活，再重算；批从大到小。装不下是 None。"""
    for checkpointing in (False, True):
        rows = BATCH
        while rows >= 1:
            used = need(config, parts, method, r, rows * settings.max_length, checkpointing)
            total = ratio * sum(used.values())
            if total <= SPARE * room:
                return {
                    "gb": total,
                    "per_device_train_batch_size": rows,
                    "gradient_accumulation_steps": BATCH // rows,
                    "gradient_checkpointing": checkpointing,
                    "parts_gb": {name: ratio * size for name, size in used.items()},
                }
            rows //= 2
    return None


# ---------------------------------------------------------------- 3. 选


def rank_for(rows: int) -> int:
    """数据越多，要装下的越多：QLoRA 论文在大数据上用 64，几百行 8 就够。"""
    return 8 if rows < 1000 else 16 if rows < 50_000 else 64


def choose(fits: dict[str, dict | None], settings) -> tuple[str | None, list[str]]:
    """→ (方法, 理由)。装不下的先划掉；再看活儿几样、数据多少。都装不下是 None。"""
    reasons = [f"{NAMES[m].split('|')[0]} 装不下" for m in METHODS if fits[m] is None]
    if settings.tasks > 1:
        reasons.append(
            f"{settings.tasks} 样活儿：全参数要存 {settings.tasks} 个整模型，适配器几十 MB 一份，用时切换"
        )
    elif settings.rows >= MANY_ROWS and fits["full"]:
        reasons.append(f"{settings.rows:,} 行、一样活儿，又装得下：数据这么多，全参数学得更多")
        return "full", reasons
    elif settings.rows < MANY_ROWS and any(fits.values()):
        reasons.append(f"{settings.rows:,} 行：LoRA 够用，梯度与优化器只有适配器的那一点")
    if fits["lora"]:
        if fits["qlora"]:
            reasons.append("LoRA 装得下，就不必量化：没有还原的误差，一步也快些")
        return "lora", reasons
    if fits["qlora"]:
        reasons.append("底座压成四位才装得下")
        return "qlora", reasons
    return None, reasons


def advise(settings) -> dict:
    """一种情形 → 方法、设置、内存、理由。"""
    room = settings.gpu_memory or gpu_memory() or 24.0
    config, ratio, where = shape_of(settings)
    parts, r = parts_of(config), rank_for(settings.rows)
    fits = {method: fit(config, parts, method, r, ratio, settings, room) for method in METHODS}
    method, reasons = choose(fits, settings)
    least = {m: ratio * sum(need(config, parts, m, r, settings.max_length, True).values()) for m in METHODS}
    advice = {
        "method": method,
        "shape": where,
        "gpu_memory_gb": room,
        "reasons": reasons,
        "least_gb": least,  # 一次一行、重算激活
        "adapter_mb": ratio * 4 * lora_parameters(parts, r) / 2**20,
    }
    if method is None:
        reasons.append(
            f"QLoRA 至少要 {least['qlora'] / SPARE:.1f} GB：换小些的模型、减小 --max_length，或换大些的显卡"
        )
        return advice
    found = fits[method]
    assert found is not None
    chosen = {k: v for k, v in found.items() if k not in ("gb", "parts_gb")}
    chosen["learning_rate"] = 2e-5 if method == "full" else 1e-4 if ratio * parts.total > 3e10 else 2e-4
    if method != "full":
        chosen |= {"r": r, "alpha": 2 * r, "target": "all"}
    if method == "qlora":
        chosen |= {"bases": "nf4", "optimizer": "paged_adamw_8bit"}
    return advice | {"expected_gb": found["gb"], "parts_gb": found["parts_gb"], "settings": chosen}


def gpu_memory() -> float | None:
    device = pick_device()
    room = device_bytes(device) if device.type == "cuda" else None
    return room / GB if room else None


# ---------------------------------------------------------------- 4. 公式对不对


def formula_differences(seed: int) -> dict[str, int]:
    """小模型上三种方法各真的走一步：公式与真张量各项相差几个字节（取最大）。"""
    tokenizer = build_tokenizer()
    found = {}
    for method in METHODS:
        model = build_model(tokenizer, seed)
        expected = memory(parts_of(model.config), method, r=4)
        if method == "qlora":
            quantize_model(model)
        if method != "full":
            add_lora(model, "all", 4, alpha=8)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained)
        model(input_ids=torch.arange(8)[None]).logits.square().mean().backward()
        optimizer.step()
        real = real_bytes(model, optimizer)
        found[method] = max(abs(real[name] - expected[name]) for name in expected)
    return found


def published_errors() -> dict[str, float]:
    """QLoRA 论文表 6 的四行：(公式 − 公布的) / 公布的。它的适配器 r = 64、嵌入是 float32。"""
    errors = {}
    for name, (config, published) in LLAMA.items():
        used = memory(parts_of(config), "qlora", r=64, weight_bytes=4)
        errors[name.replace(" ", "_")] = (used["weights"] + used["adapters"]) / 1e9 / published - 1
    return errors


# ---------------------------------------------------------------- 5. 全课


def learn(stage: Stage, advice: dict) -> dict:
    differences, published = formula_differences(stage.settings.seed), published_errors()
    metrics = {
        "formula_difference_bytes": differences,
        "published_error": published,
        "published_error_worst": max(abs(error) for error in published.values()),
        "advice": advice,
    }
    print("\n公式与真张量（小模型走一步）相差：" + "，".join(f"{m} {n} 字节" for m, n in differences.items()))
    print("与 QLoRA 公布的相差：" + "，".join(f"{n} {e:+.1%}" for n, e in published.items()))
    return stage.save(metrics, {}, partial(draw, length=stage.settings.max_length))


def show(advice: dict, settings) -> None:
    print(
        f"模型：{advice['shape']}；显存 {advice['gpu_memory_gb']:.0f} GB；{settings.rows:,} 行；{settings.tasks} 样活儿"
    )
    print(
        "至少要几 GB（一次一行、重算激活）："
        + "，".join(f"{NAMES[m].split('|')[0]} {g:.1f}" for m, g in advice["least_gb"].items())
    )
    title = NAMES[advice["method"]].split("|")[0] if advice["method"] else "没有一种装得下"
    print(f"选：{title}")
    for reason in advice["reasons"]:
        print(f"  · {reason}。")
    if advice["method"]:
        print(
            f"预计 {advice['expected_gb']:.1f} GB："
            + "，".join(f"{PARTS[n]} {g:.2f}" for n, g in advice["parts_gb"].items() if g)
        )
        script = (
            "../qwen_chinese_finetune/sft_chinese_qwen.py"
            if advice["method"] == "full"
            else "qlora_trainer.py"
        )
        if advice["method"] == "lora":
            advice["settings"]["bases"] = "none"
        flags = " ".join(f"--{name} {value}" for name, value in advice["settings"].items())
        model = f" --model {settings.model}" if settings.model else ""
        if not model:
            print("命令（后面再加上 --model 和 --dataset，换成你的）：")
        print(f"  python {script} --preset full{model} --max_length {settings.max_length} {flags}")
    for line in measured():
        print(line)


def measured() -> list[str]:
    """这里自己量到的：有 qlora_trainer.py 的结果就摆在旁边。"""
    file = HOME / "outputs" / "tiny" / "qlora_trainer" / "run.json"
    try:
        bases = json.loads(file.read_text(encoding="utf-8"))["metrics"]["bases"]
    except (OSError, ValueError, KeyError):
        return ["我们在小模型上量到的：还没有，先运行 python qlora_trainer.py --preset tiny。"]
    rows = [
        f"  底座 {base:<5} 正确率 {row.get('qa_accuracy', float('nan')):.3f}，线性层 {row['linear_bytes']:,} 字节，一步 {row.get('step_ms', float('nan')):.0f} 毫秒"
        for base, row in bases.items()
    ]
    return ["我们在小模型上量到的（qlora_trainer.py）：", *rows]


def draw(folder: Path, length: int) -> None:
    """模型多大，三种方法至少要几 GB：一次一行，重算激活。"""
    series = {}
    totals = {name: parts_of(config).total for name, config in SIZES.items()}
    xs = [math.log10(total / 1e9) for total in totals.values()]
    for method in METHODS:
        gigabytes = [
            sum(need(config, parts_of(config), method, 16, length, True).values())
            for config in SIZES.values()
        ]
        series[NAMES[method]] = (xs, [math.log2(gb) for gb in gigabytes])
    cards = {f"{gb} GB": math.log2(gb) for gb in (8, 24, 80)}
    line_chart(
        folder / "memory_by_size.svg",
        series,
        "模型多大，微调至少要多少显存|Memory to fine-tune",
        "参数（10 亿）是 10 的几次方|log10 of billions of parameters",
        "GB 是 2 的几次方|log2 GB",
        hlines=cards,
    )


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(SelectorSettings, PRESETS, argv)
    advice = advise(settings)
    show(advice, settings)
    settings.retrain = True  # 几秒钟的事，换了情形就重算
    return run_lesson("method_selector", HOME, settings, partial(learn, advice=advice))


if __name__ == "__main__":
    run_main(main)
