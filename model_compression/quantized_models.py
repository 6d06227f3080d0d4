"""量化好的模型怎样坐进 serve.py 的座位：每一种怎样载入，占几个字节。"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

import engines
from calibration import calibration_rows
from engine_slots import EngineSlots
from measuring import model_bytes
from nlp_common.base.device import pick_device
from nlp_common.base.errors import UserError
from nlp_common.lm.loading import load_causal_lm, load_tokenizer
from packed_weights import ABOUT, load_packed, packed_bytes
from quantization import quantize_model
from slot_model import SlotModel, TorchSlots

BLOCK = 64  # bitsandbytes 的 NF4 一块几个数
N_CALIBRATION = 128
BITS, GROUP = 4, 32
INSTALL_BNB = "pip install bitsandbytes==0.50.2"


@dataclass
class Loaded:
    """坐好的一种：座位、分词器，权重占几个字节（在哪里、怎样数，见各自的 where）。"""

    slots: SlotModel
    tokenizer: object
    n_bytes: int
    where: str


@dataclass(frozen=True)
class Variant:
    label: str  # 中文|英文
    load: Callable[[str, int, int], Loaded]
    missing: Callable[[], str | None]  # 没有装：pip 的命令


def nothing() -> None:
    return None


def missing_bnb() -> str | None:
    return None if find_spec("bitsandbytes") else INSTALL_BNB


def missing_openvino() -> str | None:
    return engines.missing("openvino")


def load_plain(path: str, slots: int, context: int) -> Loaded:
    tokenizer, model = load_causal_lm(path)
    model = model.to(pick_device())
    return seated(model, tokenizer, model_bytes(model), "内存", slots, context)


def seated(model, tokenizer, n_bytes: int, where: str, slots: int, context: int) -> Loaded:
    context = min(context, model.config.max_position_embeddings)
    return Loaded(TorchSlots(model, slots, context), tokenizer, n_bytes, where)


# ---------------------------------------------------------------- bitsandbytes


def load_bnb(path: str, slots: int, context: int, four_bits: bool) -> Loaded:
    """输出层不量化（与嵌入共用）。CPU 上的 NF4 只会宽是 64 的倍数的矩阵，别的留着。"""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    device = pick_device()
    kept = ["lm_head", *(odd_widths(path) if four_bits and device.type == "cpu" else [])]
    # int8 把 float32 的输入变成 float16 再量化，每一层每一步都说一遍：几分钟就是几兆字
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if four_bits:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=kept,
        )
    else:
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    model = AutoModelForCausalLM.from_pretrained(
        path,
        quantization_config=config,
        device_map={"": device},
        dtype=torch.float32,
        trust_remote_code=False,
    )
    return seated(
        model, load_tokenizer(path), model_bytes(model) + scale_bytes(model), "内存", slots, context
    )


def scale_bytes(model) -> int:
    """刻度不在 parameters 里：int8 每行一个，NF4 每块一个。"""
    total = 0
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if (rows := getattr(weight, "SCB", None)) is not None:
            total += rows.nbytes
        if (state := getattr(weight, "quant_state", None)) is not None:
            total += state.absmax.nbytes
    return total


def load_int8(path: str, slots: int, context: int) -> Loaded:
    return load_bnb(path, slots, context, four_bits=False)


def load_nf4(path: str, slots: int, context: int) -> Loaded:
    return load_bnb(path, slots, context, four_bits=True)


def odd_widths(path: str) -> list[str]:
    """宽不是 64 的倍数的线性层叫什么。"""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path, trust_remote_code=False))
    linears = {name.rsplit(".", 1)[-1]: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    return sorted(name for name, linear in linears.items() if linear.in_features % BLOCK)


# ---------------------------------------------------------------- 手写的 int4、OpenVINO 的 int4


def load_int4(path: str, slots: int, context: int) -> Loaded:
    """手写的 GPTQ（quantization.py）：省的是磁盘与传输，算的时候还原成 float32。path 已经是量化好的就直接读。"""
    if (Path(path) / ABOUT).exists():
        tokenizer, model = load_packed(path)
        n_bytes = (Path(path) / "packed.safetensors").stat().st_size
    else:
        tokenizer, model = load_causal_lm(path)
        rows = calibration_rows(tokenizer, N_CALIBRATION, seed=0)
        done = quantize_model(model, tokenizer, rows, "gptq", BITS, GROUP)
        n_bytes = packed_bytes(model, done.packed)
    return seated(model.to(pick_device()), tokenizer, n_bytes, "磁盘", slots, context)


def load_openvino(path: str, slots: int, context: int) -> Loaded:
    engine = engines.load(path, "openvino", "int4", context=context)
    return Loaded(EngineSlots(engine, slots, engine.context), engine.tokenizer, engine.bytes_read, "每步读")


VARIANTS = {
    "fp32": Variant("float32|float32", load_plain, nothing),
    "bnb_int8": Variant("bitsandbytes int8|bitsandbytes int8", load_int8, missing_bnb),
    "bnb_nf4": Variant("bitsandbytes NF4|bitsandbytes NF4", load_nf4, missing_bnb),
    "int4": Variant("手写的 int4（GPTQ）|our int4 (GPTQ)", load_int4, nothing),
    "openvino_int4": Variant("OpenVINO int4|OpenVINO int4", load_openvino, missing_openvino),
}


def load_variant(name: str, path: str, slots: int, context: int = engines.CONTEXT) -> Loaded:
    if command := VARIANTS[name].missing():
        raise UserError(f"没有装 {VARIANTS[name].label.split('|')[0].split()[0]}：{command}。")
    return VARIANTS[name].load(path, slots, context)
