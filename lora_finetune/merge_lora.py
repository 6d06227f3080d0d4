"""合并 LoRA：把 ΔW 加进 W，从此与没有装过一样快。合并会差多少，合进四位的怎样才对，两个适配器怎样合成一个。

学到什么：float64 合并一点不差，float32 差在第七位，bfloat16 合并要丢掉两位小数，所以在 float32 里合并，最后再换精度；
四位的权重走不了小步，合进去多半等于没合；线性相加、拼接、SVD、TIES、DARE 五种合法各留下多少；合并以后，共用的嵌入还要共用。

运行：
    python merge_lora.py                                               # 现场训练有礼、简短两个适配器，各合一遍
    python merge_lora.py --model smollm2                               # 真的小模型，学英文的常识题
    python merge_lora.py --adapter 适配器 --export 新文件夹             # 合并别处训练的，存成完整的模型
    python merge_lora.py --adapter 甲 --adapter 乙 --combine ties --weights 0.7,0.3 --export 新文件夹

预期输出（实测见本文件夹的 README.md）：float64 只差舍入，float32 差 1e-5 左右，bfloat16 差到 0.1 以上；cat 恰好等于两个 ΔW 相加；
四位里只有"拿没量化的合并，再量化"几乎不丢。

参考：Hu et al. 2021（LoRA）、Dettmers et al. 2023（NF4）、Yadav et al. 2023（TIES）、Yu et al. 2023（DARE）；PEFT 的 add_weighted_adapter。
"""

from nlp_common.base.cli import run_main

import copy
import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from adapter_files import (
    COMBINE,
    Adapter,
    base_name,
    combine,
    export,
    is_tied,
    load_adapter,
    merge_into,
    put_on,
    read_all,
    save_adapter,
)
from lora_by_hand import add_lora, lora_layers, merge_lora, trainable
from nf4 import VALUES, FourBit, dequantize, in_blocks, nearest, quantize, scales_of
from nlp_common.base.arguments import COUNT, POSITIVE, option
from nlp_common.base.errors import UserError
from nlp_common.draw.plots import bar_chart
from nlp_common.hub.models import require_model
from nlp_common.lm.adapters import base_of, name_adapters, weights_mark
from nlp_common.lm.chatml import prompt_ids
from nlp_common.train.chain import chain_model
from nlp_common.train.lesson import run_lesson, run_part
from nlp_common.train.settings import LoopSettings, parse_settings
from nlp_common.train.sft import train_on_chats
from nlp_common.train.stage import Stage
from start import fill_in, is_real, load_start
from styles import STYLES, language_of, measure_style, style_chats, style_questions

HOME = Path(__file__).resolve().parent
FULL_MODEL = "Qwen/Qwen1.5-0.5B-Chat"
PRESETS: dict[str, dict] = {"tiny": {}, "full": {}}
# 没给的参数：小世界的模型与真的模型各一组，与预设无关；真的模型学的是几十道常识题（styles.py）
SMALL = {"learning_rate": 5e-3, "num_train_epochs": 1.0, "per_device_train_batch_size": 16}
REAL = {"learning_rate": 2e-3, "num_train_epochs": 3.0, "per_device_train_batch_size": 8}
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class MergeSettings(LoopSettings):
    COMMON: ClassVar[dict] = {
        name: value for name, value in LoopSettings.COMMON.items() if name != "num_train_epochs"
    } | {"max_train_samples": 1600, "n_questions": 200, "adam_beta2": 0.98, "max_length": 512}
    model: str | None = option(
        "两个适配器从哪个模型学：hub 名、本地文件夹或 smollm2；默认是 Qwen 链 tiny 预设的 SFT 模型"
    )
    source: Literal["hf", "modelscope"] = option("hub 名从哪里下载", "hf")
    r: int = option("适配器的秩", 8, COUNT)
    alpha: float = option("α：ΔW 乘上 α/r", 16.0, POSITIVE)
    n_questions: int | None = option("评测用几道留出的题", None, COUNT)
    adapter: list[str] | None = field(
        default=None,
        metadata={"help": "不上课，只合并这个适配器：文件夹，或 名字=文件夹；可以给几次", "action": "extend"},
    )
    export: str | None = option("合并好的模型存到哪里（还不存在的文件夹）；要与 --adapter 一起用")
    combine: Literal["linear", "cat", "svd", "ties", "dare"] = option("几个适配器怎样合成一个", "cat")
    weights: str | None = option("几个适配器各占多少，逗号隔开；默认平分")
    dtype: Literal["float32", "bfloat16", "float16"] = option(
        "存成哪种精度；合并总在 float32 里做", "float32"
    )

    def check(self) -> None:
        fill_in(self, SMALL, REAL)
        if bool(self.adapter) != bool(self.export):
            raise UserError("--adapter 与 --export 要一起给：合并哪个，存到哪里；都不给就上课。")
        if self.weights and not self.adapter:
            raise UserError("--weights 要与 --adapter 一起给：它是那几个适配器各占多少。")


# ---------------------------------------------------------------- 1. 合并，与它的误差


@torch.no_grad()
def logits_of(model, rows: list[list[int]]) -> list[Tensor]:
    return [model(torch.tensor([row], device=model.device)).logits[0].double() for row in rows]


def largest_difference(one: list[Tensor], other: list[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(one, other, strict=True))


def merge_errors(model, adapter: Adapter, rows: list[list[int]]) -> dict[str, float]:
    """各种精度：同一精度里，合并之后的 logits 与旁边挂着适配器的差多少（最大的一个）。"""
    errors = {}
    for name, dtype in DTYPES.items():
        beside = put_on(copy.deepcopy(model).to(dtype), adapter)
        kept = logits_of(beside, rows)
        errors[f"error_{name}"] = largest_difference(kept, logits_of(merge_lora(beside), rows))
    return errors


@torch.no_grad()
def rounding(model, adapter: Adapter) -> dict[str, float]:
    """存成 bfloat16 的权重离精确的 W + ΔW 多远（均方根）：在 bfloat16 里合并，与在 float32 里合并、最后才换。"""
    early = late = n = 0.0
    for name, lora in adapter.layers.items():
        weight = model.get_submodule(name).weight
        exact = weight.double() + lora.delta().double().to(weight.device)
        low = weight.bfloat16() + lora.delta().bfloat16().to(weight.device)
        early += ((low.double() - exact) ** 2).sum().item()
        late += ((exact.float().bfloat16().double() - exact) ** 2).sum().item()
        n += exact.numel()
    return {"weight_error_merged_in_bf16": (early / n) ** 0.5, "weight_error_cast_after": (late / n) ** 0.5}


# ---------------------------------------------------------------- 2. 合进四位的


def onto_old_grid(q: FourBit, delta: Tensor) -> Tensor:
    """直接合进量化好的：刻度不动，W_q + ΔW 就近取十六个值之一。ΔW 不到半格的，又回到原来那一格。"""
    blocks = in_blocks(dequantize(q) + delta, q.block)
    scales = scales_of(q)[:, None]  # (块数, 1)
    values = VALUES[q.kind].to(delta.device)
    kept = values[nearest((blocks / scales.clamp(min=1e-38)).clamp(-1, 1), values)] * scales
    return kept.flatten()[: delta.numel()].view_as(delta)


def requantised(weight: Tensor) -> Tensor:
    return dequantize(quantize(weight, double=False))


def merged_weight(way: str, weight: Tensor, delta: Tensor) -> Tensor:
    """一层在这种合法之后的权重。"""
    if way == "base":
        return requantised(weight)
    if way == "beside":  # 四位的底座，适配器另挂着；等于还原、合并、不再量化
        return requantised(weight) + delta
    if way == "old_grid":
        return onto_old_grid(quantize(weight, double=False), delta)
    if way == "requantise":
        return requantised(requantised(weight) + delta)
    return requantised(weight + delta)  # original：拿没量化的合并，再量化


FOUR_BIT = {
    "base": "不装适配器|no adapter",
    "beside": "适配器挂在四位旁边|beside 4-bit",
    "old_grid": "合进四位的格子|onto old grid",
    "requantise": "还原、合并、再量化|requantise",
    "original": "拿没量化的合并，再量化|from original",
}


@torch.no_grad()
def four_bit_rows(
    model, adapter: Adapter, style: str, tokenizer, questions: list[dict], language: str
) -> dict[str, dict]:
    """各种合法：口气学到多少、答对多少，和 ΔW 还剩多少（合并后的权重与四位底座之差，投影在 ΔW 上）。"""
    rows = {}
    for way in FOUR_BIT:
        merged = copy.deepcopy(model)
        kept = norm = 0.0
        for name, lora in adapter.layers.items():
            module = merged.get_submodule(name)
            weight, delta = module.weight.float().clone(), lora.delta().to(module.weight.device).float()
            module.weight.data = merged_weight(way, weight, delta).to(module.weight)
            kept += ((module.weight - requantised(weight)) * delta).sum().item()
            norm += (delta**2).sum().item()
        found = measure_style(merged, tokenizer, questions, language)
        rows[way] = {"style": found[style], "right": found["right"], "kept": kept / norm}
        print(f"四位，{FOUR_BIT[way].split('|')[0]}：ΔW 还剩 {kept / norm:.2f}", flush=True)
    return rows


# ---------------------------------------------------------------- 3. 两个合成一个


def combined_rows(
    model, adapters: list[Adapter], tokenizer, questions: list[dict], language: str, seed: int
) -> dict:
    """五种合法，各占一半：口气、答对，和离 Σ w ΔW 多远（相对的 Frobenius 范数）。"""
    weights = [1 / len(adapters)] * len(adapters)
    rows = {}
    for how in COMBINE:
        torch.manual_seed(seed)  # DARE 要随机数
        both = combine(adapters, weights, how)
        far = size = 0.0
        for name, lora in both.layers.items():
            exact = sum(
                w * adapter.layers[name].delta() for w, adapter in zip(weights, adapters, strict=True)
            )
            far += ((lora.delta() - exact) ** 2).sum().item()
            size += (exact**2).sum().item()
        merged = copy.deepcopy(model)
        merge_into(merged, both)
        rows[how] = {**measure_style(merged, tokenizer, questions, language), "far": (far / size) ** 0.5}
        print(f"{how} 合成一个：离 ΣwΔW {rows[how]['far']:.2f}", flush=True)
    return rows


# ---------------------------------------------------------------- 4. 全课


def train_adapter(part: Stage, style: str, model, tokenizer, chats: list[dict]) -> dict:
    """教 model 上的 LoRA 一种口气。"""
    trained = train_on_chats(part, STYLES[style].split("|")[0], model, tokenizer, chats)
    return {"seconds": trained.metrics["train_seconds"]}


def learn(stage: Stage, path: str) -> dict:
    settings = stage.settings
    tokenizer, model = load_start(path, stage.device)
    model.requires_grad_(False)
    mark, base = weights_mark(model), base_name(settings.model, path)
    language = language_of(settings)
    asked, questions = style_questions(settings)
    rows = {"base": measure_style(model, tokenizer, questions, language)}
    metrics: dict = {"tied_before": float(is_tied(model))}
    adapters, trained = {}, {}
    for style in STYLES:
        trained[style] = copy.deepcopy(model)
        add_lora(trained[style], "all", settings.r, settings.alpha)
        only = nn.ParameterList(trainable(trained[style]).values())  # 中断以后只读回 A、B
        chats = style_chats(style, asked, language)
        work = partial(train_adapter, style=style, model=trained[style], tokenizer=tokenizer, chats=chats)
        metrics[f"train_seconds_{style}"] = run_part(stage, style, work, only)["seconds"]
        assert all(layer.B.any() for layer in lora_layers(trained[style]).values()), "B 还是 0：没有训练到"
        rows[style] = measure_style(trained[style], tokenizer, questions, language)

    folder = stage.folder.work / "adapters"
    for style, each in trained.items():
        save_adapter(folder / style, each, base, mark)
        adapters[style] = load_adapter(folder / style)
    first = next(iter(STYLES))
    some = [prompt_ids(tokenizer, question["messages"]) for question in questions[:16]]
    metrics |= merge_errors(model, adapters[first], some) | rounding(model, adapters[first])
    rows |= combined_rows(model, list(adapters.values()), tokenizer, questions, language, settings.seed)
    four_bit = four_bit_rows(model, adapters[first], first, tokenizer, questions, language)
    merged = copy.deepcopy(model)
    merge_into(merged, adapters[first])
    metrics["tied_after"] = float(is_tied(merged))
    metrics |= {"styles": rows, "four_bit": four_bit}

    def write(result: Path) -> None:
        for style, each in trained.items():
            save_adapter(result / style, each, base, mark)
        for name, sha256 in export(merged, tokenizer, result / f"merged_{first}").items():
            print(f"合并好的 merged_{first}/{name}  sha256 {sha256}")
        draw(result, rows, four_bit)

    name = "facts" if is_real(settings) else "tiny_world"
    return stage.save(metrics, {"train": {"name": name, "kind": "builtin", "rows": len(asked)}}, write)


def show(metrics: dict) -> None:
    print("\n合并前后 logits 最大差多少：" + "，".join(f"{d} {metrics[f'error_{d}']:.1e}" for d in DTYPES))
    print(
        f"存成 bfloat16：在 bfloat16 里合并，权重差 {metrics['weight_error_merged_in_bf16']:.2e}；"
        f"在 float32 里合并，最后才换，{metrics['weight_error_cast_after']:.2e}"
    )
    print("\n                       有礼    简短    答对   离 ΣwΔW")
    for name, row in metrics["styles"].items():
        far = f"{row['far']:9.3f}" if "far" in row else ""
        print(f"{name:<20}{row['courteous']:8.3f}{row['terse']:8.3f}{row['right']:8.3f}{far}")
    print("\n四位（NF4）              有礼    答对   ΔW 还剩")
    for name, row in metrics["four_bit"].items():
        print(f"{name:<20}{row['style']:8.3f}{row['right']:8.3f}{row['kept']:9.3f}")


def draw(folder: Path, rows: dict[str, dict], four_bit: dict[str, dict]) -> None:
    titles = {"base": "原来|base", **STYLES, "linear": "linear", "cat": "cat", "svd": "SVD"}
    titles |= {"ties": "TIES", "dare": "DARE"}
    names = {**STYLES, "right": "答对|right"}
    series = {
        names[key]: {titles[name]: row[key] for name, row in rows.items()}
        for key in ("courteous", "terse", "right")
    }
    bar_chart(folder / "combined.svg", series, "两个适配器合成一个|Two adapters in one", "", "比例|share")
    bars = {
        "有礼|courteous": {FOUR_BIT[way]: row["style"] for way, row in four_bit.items()},
        "ΔW 还剩|share of dW left": {FOUR_BIT[way]: row["kept"] for way, row in four_bit.items()},
    }
    bar_chart(folder / "four_bit.svg", bars, "合进四位的模型|Merging into 4-bit", "", "比例|share")


# ---------------------------------------------------------------- 5. 只合并：--adapter … --export …


def shares(text: str | None, n: int) -> list[float]:
    if text is None:
        return [1 / n] * n
    try:
        found = [float(each) for each in text.replace("，", ",").split(",")]
    except ValueError:
        found = [math.nan]
    if not all(map(math.isfinite, found)):
        raise UserError(f"--weights 要是逗号隔开的数，例如 0.7,0.3，给的是 {text}。")
    if len(found) != n:
        raise UserError(f"--weights 给了 {len(found)} 个数，--adapter 给了 {n} 个：要一样多。")
    return found


def merge_only(settings: MergeSettings) -> dict:
    """合并给的适配器，存成完整的模型，印出每个文件的 sha256。"""
    folders = name_adapters(settings.adapter)
    base = settings.model or base_of(next(iter(folders.values())))
    tokenizer, model = load_start(require_model(base, settings.source), torch.device("cpu"))
    adapters = read_all(folders, model, base)
    weights = shares(settings.weights, len(adapters))
    torch.manual_seed(settings.seed)
    if len(adapters) > 1:
        adapter = combine(adapters, weights, settings.combine)
        print(f"{'、'.join(folders)} 用 {settings.combine} 合成一个，各占 {weights}。")
    else:
        adapter = adapters[0] if weights == [1] else combine(adapters, weights, "cat")
    merge_into(model, adapter)
    folder = Path(settings.export).expanduser()
    found = export(model, tokenizer, folder, getattr(torch, settings.dtype))
    for name, sha256 in found.items():
        print(f"{folder / name}  sha256 {sha256}")
    print(f"合并好了，重新载入核对过。聊天：python ../qwen_chinese_finetune/chat.py --model {folder}")
    return {"metrics": {"sha256": found}}


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(MergeSettings, PRESETS, argv, FULL_MODEL)
    if settings.adapter:
        return merge_only(settings)
    if settings.preset == "full" and settings.model is None:
        settings.model = FULL_MODEL
    found = chain_model("sft", settings.model, settings.source)
    start = f"{found['stage']}:{found['id']}"
    name = "merge_lora" + ("_smollm2" if settings.model == "smollm2" else "")
    record = run_lesson(name, HOME, settings, partial(learn, path=found["path"]), start=start)
    show(record["metrics"])
    return record


if __name__ == "__main__":
    run_main(main)
