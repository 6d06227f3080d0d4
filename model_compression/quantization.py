"""量化：权重从 32 位减到 8、4、3、2 位，哪一种取整的办法少错几道题？

学到什么：RTN（各取最近的一格）、GPTQ（量化一列，误差让后面的列补上）、AWQ（输入大的列先放大再取整），位数与一组几个数
各花几个字节、几道题；激活为什么比权重难压：一个离群的通道就把 int8 毁了，LLM.int8() 怎样绕过去。

运行：
    python quantization.py                                 # Qwen 链的 SFT 模型，三种办法 × 四种位数 × 三种组，约五分钟
    python quantization.py --methods gptq --bits 3 --groups 64 --output_dir outputs/one
    python quantization.py --model smollm2                 # 真的小模型，英文，看困惑度，约十分钟
    python quantization.py --model 文件夹 --dataset 我的对话.jsonl --output_dir outputs/mine    # 自己的模型与对话，看困惑度
    python quantization.py --preset full                   # Qwen2.5-0.5B-Instruct，要加速器

预期输出（实测见本文件夹的 README.md）：8 位到 3 位几乎不花题，2 位分出高下，GPTQ 错得最少；每一层 GPTQ 的输出误差都比 RTN 小。

参考：Frantar et al. 2022（GPTQ）；Lin et al. 2023（AWQ）；Dettmers et al. 2022（LLM.int8()）；Xiao et al. 2022（SmoothQuant）。
取整在 quantizers.py，存法在 packed_weights.py，激活在 activation_outliers.py，数据与怎样量在 prune_data.py。
"""

from nlp_common.base.cli import run_main

import copy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from activation_outliers import int8_lesson, plant_outlier, smollm2_outliers
from calibration import linear_blocks, walk_blocks
from measuring import model_bytes
from nlp_common.base.arguments import option
from nlp_common.base.errors import UserError
from nlp_common.draw.plots import bar_chart, line_chart
from nlp_common.lm.loading import load_chat_lm
from nlp_common.train.chain import chain_model
from nlp_common.train.lesson import run_lesson, run_part
from nlp_common.train.settings import parse_settings
from nlp_common.train.stage import Stage
from packed_weights import Packed, packed_bytes, rest_of, restore, save_packed
from prune_data import CalibratedSettings, load_data
from quantizers import awq_scale, gptq, hessians_of, nearest, output_error, rtn

HOME = Path(__file__).resolve().parent
FULL_MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
METHODS = ("rtn", "gptq", "awq")
EMBEDDING_BITS = 8  # 嵌入（与输出层共用）最怕压，照 llama.cpp 的习惯留 8 位
VARIANTS = {  # GPTQ 的另外几种做法：(列的次序, 格子什么时候定)
    "left_early": ("left", "early"),
    "act_early": ("act", "early"),
}
PRESETS = {
    "tiny": {"max_eval_samples": 512},
    "full": {"max_eval_samples": 512, "bits": "4,3", "groups": "128"},
}


@dataclass
class QuantSettings(CalibratedSettings):
    DEFAULTS: ClassVar[dict[bool, dict]] = {
        False: {"n_calibration": 128, "bits": "8,4,3,2", "groups": "32,64,128"},
        True: {"n_calibration": 32, "bits": "4,3", "groups": "64"},
    }

    methods: str = option(f"试哪几种，逗号隔开：{'、'.join(METHODS)}", ",".join(METHODS))
    bits: str | None = option("几位，逗号隔开：2 到 8")
    groups: str | None = option("几个数共用一个刻度，逗号隔开")
    save: str = option("存下哪一种，写成 办法-位数-组；load_packed 读得回来", "gptq-4-64")

    def check(self) -> None:
        super().check()
        for name in self.methods.split(","):
            if name not in METHODS:
                raise UserError(
                    f"--methods 不认识 {name or '空的一项'}，可以是 {'、'.join(METHODS)}，逗号隔开。"
                )
        for flag, low, high in (("bits", 2, 8), ("groups", 8, 4096)):
            for word in getattr(self, flag).split(","):
                if not word.isdecimal() or not low <= int(word) <= high:
                    raise UserError(
                        f"--{flag} 要是 {low} 到 {high} 之间的整数，逗号隔开，给的是 {word or '空的一项'}。"
                    )
        parts = self.save.split("-")
        if len(parts) != 3 or parts[0] not in METHODS or not all(part.isdecimal() for part in parts[1:]):
            raise UserError(f"--save 要写成 办法-位数-组，例如 gptq-4-64，给的是 {self.save}。")
        if not 2 <= int(parts[1]) <= 8 or int(parts[2]) < 8:
            raise UserError(f"--save 的位数要在 2 到 8 之间，组不小于 8，给的是 {self.save}。")


# ---------------------------------------------------------------- 1. 整个模型


@dataclass
class Quantized:
    """quantize_model 留下的：装好的矩阵，与各层的相对输出误差 ‖(Ŵ−W)X‖ / ‖WX‖（校准的输入上）。"""

    packed: dict[str, Packed]
    errors: dict[str, dict[str, float]] = field(default_factory=dict)  # 层 → {"rtn": …, 这一种办法: …}


@torch.no_grad()
def quantize_model(
    model,
    tokenizer,
    rows: list[dict],
    method: str,
    bits: int,
    group: int,
    order: str = "left",
    grid: str = "late",
    masks: dict | None = None,
) -> Quantized:
    """就地量化：解码块里的线性层换成还原的值，嵌入 8 位，其余的舍入成 float16。rows 是 calibration_rows 的结果。

    一块一块地来：一块量化好了，下一块收到的输入就是量化过的模型给的。order 与 grid 是 GPTQ 的，见 quantizers.py。
    masks：pruning.prune 给的 {层: 留下的位置}，剪掉的还是 0（RTN 与 AWQ 不用说，0 总在格子上）。
    """
    check_model(model, method, rows)
    done = Quantized({})
    place = torch.device("cpu") if model.device.type == "mps" else model.device  # MPS 没有 float64
    walk = walk_blocks(model, rows, tokenizer.pad_token_id)  # 一块的 {层: 矩阵}、{层: X (N, in)}
    for block, (layers, inputs) in zip(model.get_decoder().layers, walk, strict=True):
        check_inputs(inputs)
        inputs = {name: x.to(place) for name, x in inputs.items()}
        hessians = hessians_of(inputs)
        original = {name: layer.weight.clone().to(place) for name, layer in layers.items()}
        scales = awq_block(block, layers, inputs, hessians, bits, group) if method == "awq" else {}
        for name, layer in layers.items():
            if method == "gptq":
                keep = None if masks is None else masks[name].to(place)
                packed = gptq(original[name], hessians[name], bits, group, order, grid, keep)
            else:
                packed = rtn(layer.weight, bits, group)
            restored = packed.weight()
            layer.weight.copy_(restored)
            done.packed[f"{name}.weight"] = packed
            found = {"rtn": restored}
            if method != "rtn":  # 同样的输入、同样的位数，RTN 会怎样
                found = {"rtn": restore(*nearest(original[name], bits, group), group), method: restored}
            done.errors[name] = compare(found, original[name], hessians[name], scales.get(name))
    quantize_rest(model, group, done)
    model.config.packed = {"method": method, "bits": bits, "group": group}
    return done


def compare(found: dict[str, Tensor], original: Tensor, hessian: Tensor, scale=None) -> dict[str, float]:
    """{办法: 还原的矩阵} → {办法: 相对输出误差}。"""
    size = output_error(original, hessian)
    errors = {}
    for key, w in found.items():
        w = w.to(original)
        if key == "awq":  # 它的矩阵放大过，输入缩小过：换回原来的输入看。行也可能缩放过
            rows_by, columns_by = scale
            w = w * rows_by[:, None] / columns_by
        errors[key] = (output_error(w - original, hessian) / size) ** 0.5
    return errors


# AWQ：收到同一份输入的几个矩阵，前面是谁（1/s 乘进它）
SHARED = (
    (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm"),
    (("self_attn.o_proj",), "self_attn.v_proj"),
    (("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm"),
    (("mlp.down_proj",), "mlp.up_proj"),
)


def awq_block(block, layers: dict, inputs: dict, hessians: dict, bits: int, group: int) -> dict:
    """一块里的放大：s 乘进权重的列，1/s 乘进前面的归一或矩阵的行，推理时一次乘法也不多。

    → {层: (行要乘回的, 列放大了的)}。v_proj、up_proj 的行缩放了，不改变它们怎样取整：一行的格子跟着缩放。
    """
    prefix = next(iter(layers)).partition(".self_attn.")[0]
    scales = {}
    for name, layer in layers.items():
        scales[name] = [inputs[name].new_ones(size) for size in layer.weight.shape]  # 行，列
    found = []
    for names, before in SHARED:  # 倍数都照原来的权重找好，再一起乘进去
        full = [f"{prefix}.{name}" for name in names]
        if before == "self_attn.v_proj" and len(block.self_attn.v_proj.weight) != inputs[full[0]].shape[1]:
            continue  # 几个头共用一个 V（GQA），v_proj 的一行管着几列，AWQ 也跳过
        weights = [layers[name].weight.to(inputs[name]) for name in full]
        found.append((full, before, awq_scale(weights, inputs[full[0]], hessians[full[0]], bits, group)[0]))
    for full, before, s in found:
        for name in full:
            layers[name].weight.mul_(s.to(layers[name].weight))
            scales[name][1] = s
        s = s.to(block.input_layernorm.weight)
        previous = block.get_submodule(before)
        if isinstance(previous, torch.nn.Linear):
            previous.weight.div_(s[:, None])
            scales[f"{prefix}.{before}"][0] = s.to(inputs[full[0]])
        else:
            previous.weight.div_(s)
        if getattr(previous, "bias", None) is not None:
            previous.bias.div_(s)
    return scales


def quantize_rest(model, group: int, done: Quantized) -> None:
    """嵌入与输出层 8 位 RTN（共用的只做一遍），归一与偏置 float16。"""
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        name = next(name for name, p in model.named_parameters() if p is layer.weight)
        if name not in done.packed:
            done.packed[name] = rtn(layer.weight, EMBEDDING_BITS, group)
            layer.weight.copy_(done.packed[name].weight())
    for _, parameter in rest_of(model, done.packed):
        parameter.copy_(parameter.half())


def check_model(model, method: str, rows: list[dict]) -> None:
    if method not in METHODS:
        raise UserError(f"不认识量化的办法 {method}，可以是 {'、'.join(METHODS)}。")
    if getattr(model.config, "packed", None) or getattr(model.config, "quantization_config", None):
        raise UserError("这个模型已经量化过了：再量化一遍，误差叠着误差。请从没有量化的模型开始。")
    for layers in linear_blocks(model):
        for name, layer in layers.items():
            if not layer.weight.is_floating_point() or layer.weight.dim() != 2:
                raise UserError(f"{name} 已经量化过了（{layer.weight.dtype}）：请从没有量化的模型开始。")
    if method == "awq" and model.config.model_type not in ("qwen2", "llama"):
        raise UserError(
            f"AWQ 要知道每个矩阵前面是哪个归一，这里只写了 Qwen2 与 Llama 结构的，{model.config.model_type} 用 rtn 或 gptq。"
        )
    if not rows:
        raise UserError("校准要有对话，这里一段也没有：看看 --dataset 指的文件，或调大 --n_calibration。")


def check_inputs(inputs: dict[str, torch.Tensor]) -> None:
    """token 比输入的维数还少，H 不满秩，没有照到的方向全凭那 1% 的阻尼：不算校准过。"""
    for name, x in inputs.items():
        if len(x) < x.shape[1]:
            raise UserError(
                f"校准的对话太少：一共 {len(x)} 个 token，{name} 有 {x.shape[1]} 个输入，至少要这么多 token；"
                "调大 --n_calibration，或换长一些的对话。"
            )
        if not x.sum().isfinite():  # 有一个坏的，和就是坏的
            raise UserError(f"校准时 {name} 的输入里有 NaN 或无穷大：模型本身是坏的，先看看它说得出话吗。")


# ---------------------------------------------------------------- 2. 全课


def learn(stage: Stage, path: str) -> dict:
    settings = stage.settings
    tokenizer, model = load_chat_lm(path, stage.device)
    model.eval()
    data = load_data(settings, tokenizer)
    rows = data.calibration
    print(f"校准 {len(rows)} 段对话，{sum(len(row['input_ids']) for row in rows):,d} 个 token")
    measured = partial(data.measure, tokenizer=tokenizer)
    original = run_part(stage, "float32", lambda part: {"bytes": model_bytes(model), **measured(model)})
    print(line("float32", original))
    plans = {}
    for bits in map(int, settings.bits.split(",")):
        for group in map(int, settings.groups.split(",")):
            plans |= {f"{name}-{bits}-{group}": (name, bits, group) for name in settings.methods.split(",")}
    for key, options in VARIANTS.items():  # 3 位与 2 位才分得出高下
        for bits in (3, 2):
            if f"gptq-{bits}-64" in plans:
                plans[f"gptq_{key}-{bits}-64"] = ("gptq", bits, 64, *options)
    results = {}
    kept: dict = {}  # 要存的那一种，这次量过了，就不必再量化一遍
    for key, plan in plans.items():
        keep = kept if key == settings.save else {}
        work = partial(
            one, model=model, tokenizer=tokenizer, rows=rows, plan=plan, measured=measured, keep=keep
        )
        results[key] = run_part(stage, key, work)
        print(line(key, results[key]), flush=True)
    metrics = {"float32": original, "methods": results}
    metrics |= {"gptq_below_rtn": below_rtn(results)}
    if settings.dataset == "tiny_world" and settings.model is None:
        work = partial(outliers, model=model, tokenizer=tokenizer, rows=rows, measured=measured)
        metrics["outliers"] = run_part(stage, "outliers", work)
        metrics["smollm2"] = run_part(stage, "smollm2", lambda part: smollm2_outliers())

    def write(folder: Path) -> None:
        if not kept:
            method, bits, group = settings.save.split("-")
            done = quantize_model(model, tokenizer, rows, method, int(bits), int(group))
            kept.update(model=model, packed=done.packed)
        save_packed(folder / "packed", kept["model"], tokenizer, kept["packed"])
        draw(folder, metrics, settings)

    return stage.save(metrics, data.source, write)


def one(part: Stage, model, tokenizer, rows: list[dict], plan: tuple, measured, keep: dict) -> dict:
    """一种办法、一种位数、一种组：几个字节，量得怎样，各层误差的平均与最大，误差比 RTN 小的有几层。

    量化好的留在 keep 里。
    """
    method = plan[0]
    copied = copy.deepcopy(model)
    done = quantize_model(copied, tokenizer, rows, *plan)
    keep.update(model=copied, packed=done.packed)
    its = [errors[method] for errors in done.errors.values()]
    ratios = [errors[method] / errors["rtn"] for errors in done.errors.values()]
    found = {"bytes": packed_bytes(copied, done.packed), **measured(copied)}
    found |= {"error": sum(its) / len(its), "worst_ratio_to_rtn": max(ratios), "n_layers": len(its)}
    return found | {"layers_below_rtn": sum(ratio < 1 for ratio in ratios)}


def outliers(part: Stage, model, tokenizer, rows: list[dict], measured) -> dict[str, dict]:
    """种几个离群的通道（模型算的一点不变）：激活压成 int8 怎样，只把权重压成 3 位又怎样。"""
    planted = plant_outlier(model)
    found = int8_lesson(model, planted, measured)
    for method in METHODS:
        copied = copy.deepcopy(planted)
        quantize_model(copied, tokenizer, rows, method, 3, 64)
        found[f"planted_{method}3"] = measured(copied)
    return found


def below_rtn(results: dict) -> dict[str, int]:
    """GPTQ 的输出误差比 RTN 小的层数，与一共比了几层。"""
    its = [found for key, found in results.items() if key.startswith("gptq-")]
    return {name: sum(found[name] for found in its) for name in ("layers_below_rtn", "n_layers")}


def line(key: str, its: dict) -> str:
    right = f"  答对 {its['qa_accuracy']:.3f}" if "qa_accuracy" in its else ""
    if "perplexity" in its:
        right = f"  困惑度 {its['perplexity']:.2f}"
    error = f"  各层误差 {its['error']:.2%}" if "error" in its else ""
    return f"  {key:<20}{its['bytes']:>12,d} 字节{right}  留出损失 {its['heldout_loss']:.4f}{error}"


def show(metrics: dict) -> None:
    below = metrics["gptq_below_rtn"]
    if below["n_layers"]:
        print(f"\nGPTQ 的输出误差比 RTN 小的：{below['n_layers']} 层里有 {below['layers_below_rtn']} 层")
    if "outliers" in metrics:
        print(
            "\n离群的通道（planted：种了四个；int8：激活与权重都 8 位；mixed：离群的通道另算；rtn3：只有权重，3 位）："
        )
        for name, its in metrics["outliers"].items():
            print(f"  {name:<24} 答对 {its['qa_accuracy']:.3f}  留出损失 {its['heldout_loss']:.4f}")
    if found := metrics.get("smollm2"):
        print("SmolLM2-135M 的激活（最大的通道是中位数的几倍；int8 的输出误差：直接 → 离群的通道另算）：")
        for name, its in found.items():
            print(
                f"  {name:<32}{its['largest_over_median']:8.0f} 倍  {its['int8_error']:.2%} → {its['mixed_error']:.2%}，另算 {its['n_outliers']} 个"
            )


def draw(folder: Path, metrics: dict, settings: QuantSettings) -> None:
    """答对几成与误差随位数；一组 64 个（没有就是第一种）。"""
    groups = settings.groups.split(",")
    group = "64" if "64" in groups else groups[0]
    bits = sorted(map(int, settings.bits.split(",")))
    results = metrics["methods"]
    for name, label in (
        ("qa_accuracy", "答对|accuracy"),
        ("heldout_loss", "留出损失|held-out loss"),
        ("error", "各层输出误差|layer output error"),
    ):
        series = {}
        for method in settings.methods.split(","):
            its = [results[f"{method}-{b}-{group}"] for b in bits]
            if name in its[0]:
                series[method.upper()] = (bits, [each[name] for each in its])
        if series:
            line_chart(
                folder / f"quant_{name}.svg", series, "几位，哪一种取整|Bits and rounding", "位数|bits", label
            )
    if "outliers" in metrics:
        bars = {name: its["qa_accuracy"] for name, its in metrics["outliers"].items()}
        bar_chart(
            folder / "quant_outliers.svg",
            {"答对|accuracy": bars},
            "四个离群的通道|Four outlier channels",
            "",
            "答对|accuracy",
        )


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(QuantSettings, PRESETS, argv, FULL_MODEL)
    if settings.preset == "full" and settings.model is None:
        settings.model = FULL_MODEL
    found = chain_model("sft", settings.model, settings.source)
    learn_it = partial(learn, path=found["path"])
    record = run_lesson("quantization", HOME, settings, learn_it, start=f"{found['stage']}:{found['id']}")
    show(record["metrics"])
    return record


if __name__ == "__main__":
    run_main(main)
