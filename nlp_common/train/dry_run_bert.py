"""BERT 脚本的 --dry_run：不下载权重、不训练，先算一算装不装得下、要多少步、大约多久。

以 N 个 token、float32 为例，一层要为反向留下：输入、q、k、v、注意力的输出、两处 dropout 的掩码、两个归一化的输入、
第一个归一化的输出，共 10 份宽为 H 的；MLP 里激活函数的输入与输出 2 份宽为 I 的。逐步计算的注意力（CPU 上用它，见
lm/classifier.py 的 attention）还要留下 softmax 的输出、dropout 的掩码和两者的乘积，每个头 3 份宽为 T 的。入口的归一化与 dropout
另有 2H。所以激活 = 4·N·[L·(10H + 2I + 3·头数·T) + 2H] 字节。预训练时 15% 的位置还有猜字的输出层，
每个约 3 份宽为 V 的（打分、log-softmax、梯度）和 4 份宽为 H 的。
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence

import torch
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from nlp_common.base.device import describe, pick_device, precision_flags
from nlp_common.hub.models import find_model
from nlp_common.lm.classifier import attention
from nlp_common.train.bert import FULL_MODEL, BertSettings
from nlp_common.train.dry_run import (
    cannot_measure,
    count,
    device_bytes,
    fixed_bytes,
    read_config,
    seconds_per_step,
    show_fixed,
)

MASKED = 0.15  # 预训练时猜多少个位置


def bert_base_chinese() -> BertConfig:
    """bert-base-chinese 公布的尺寸；连不上 hub 时用它。其余各项就是 BertConfig 的默认值。"""
    return BertConfig(vocab_size=21128)


def saved_bytes(
    config: BertConfig, n_tokens: int, length: int, half: bool, eager: bool, mlm: bool = False
) -> int:
    """前向为反向留下多少字节。length 是每行多少个 token；half：矩阵乘的输入是 2 字节的副本，归一化仍是 float32。"""
    hidden, inner = config.hidden_size, config.intermediate_size
    each = 3 * config.num_attention_heads * length if eager else 0  # 一个 token 的注意力权重，3 份
    layer = 4 * (10 * hidden + 2 * inner + each)
    if half:  # 10 份 H 里，两个归一化的输入仍是 4 字节，其余 2 字节；softmax 的输出也是 4 字节
        layer = 24 * hidden + 4 * inner + each * 8 // 3
    head = MASKED * 4 * (3 * config.vocab_size + 4 * hidden) if mlm else 0
    return int(n_tokens * (config.num_hidden_layers * layer + 8 * hidden + head))


def lengths(texts: Sequence[str], max_length: int) -> list[int]:
    """每段文字大约多少个 token：一个汉字一个，再加 [CLS]、[SEP]。"""
    return [min(len(text) + 2, max_length) for text in texts]


def estimate(
    settings: BertSettings, config: BertConfig, per_row: Sequence[int], epochs: float, half: bool, mlm: bool
) -> dict:
    """一个阶段的各项字节数与步数。per_row：每行多少个 token；内存按每行都满 max_length 算，是上限。"""
    build = BertForMaskedLM if mlm else BertForSequenceClassification
    parameters, tensors = count(lambda: build(config))
    trained = parameters
    if settings.train_layers is not None and not mlm:
        config = upper_part(config, settings.train_layers)
        trained, tensors = count(lambda: build(config))
    rows = settings.per_device_train_batch_size
    fixed = fixed_bytes(parameters, trained, tensors, half)
    eager = attention() == "eager"
    kept = saved_bytes(config, rows * settings.max_length, settings.max_length, half, eager, mlm)
    return {
        "parameters": parameters,
        "trained": trained,
        "fixed": fixed,
        "activations": kept,
        "total": sum(fixed.values()) + kept,
        "tokens_per_step": rows * settings.max_length,
        "mean_length": math.ceil(sum(per_row) / len(per_row)),
        "steps": math.ceil(math.ceil(len(per_row) / rows) * epochs),
    }


def upper_part(config: BertConfig, train_layers: int, lower: bool = False) -> BertConfig:
    """--train_layers：要训练的那几层（lower 时是不训练的那几层）的尺寸；嵌入不训练，字表只留几个。"""
    part = copy.deepcopy(config)
    part.num_hidden_layers = config.num_hidden_layers - train_layers if lower else train_layers
    part.vocab_size = min(config.vocab_size, 100)
    return part


@torch.inference_mode()
def lower_seconds(
    settings: BertSettings, config: BertConfig, length: int, device: torch.device, amp: torch.dtype | None
) -> float:
    """不训练的那几层，前向一批要几秒。"""
    part = upper_part(config, settings.train_layers or 0, lower=True)
    model = (
        BertForSequenceClassification._from_config(part, attn_implementation=attention()).to(device).eval()
    )
    ids = torch.randint(0, part.vocab_size, (settings.per_device_train_batch_size, length), device=device)
    for step in range(3):
        if step == 1:
            started = time.perf_counter()
        with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
            model(input_ids=ids).logits.sum().item()
    return (time.perf_counter() - started) / 2


def seconds_each(
    settings: BertSettings, config: BertConfig, length: int, device: torch.device, amp: torch.dtype | None
) -> float:
    """同样尺寸、随机权重的分类模型走一步要几秒，每行 length 个 token。"""
    model = BertForSequenceClassification._from_config(config, attn_implementation=attention()).to(device)
    shape = (settings.per_device_train_batch_size, length)
    ids = torch.randint(0, config.vocab_size, shape, device=device)
    labels = torch.zeros(len(ids), dtype=torch.long, device=device)
    return seconds_per_step(model.train(), lambda: model(input_ids=ids, labels=labels).loss, device, amp)


def dry_run(
    settings: BertSettings,
    n_labels: int,
    stages: dict[str, tuple[Sequence[int], float]],
    config: BertConfig | None = None,
) -> dict:
    """打印并返回估计，不写任何文件。stages：阶段名 → (每行多少个 token, 几遍)；config 不给就去找 full 的。"""
    source = "这次要搭的小 BERT"
    if config is None:
        name = settings.model or FULL_MODEL
        found = find_model(name, settings.source)
        config, source = read_config(found, name, settings.source, FULL_MODEL, bert_base_chinese)
    config = copy.deepcopy(config)
    config.num_labels = n_labels
    device = pick_device()
    flags = precision_flags(device, settings.bf16, cpu_bf16=True)
    amp = torch.bfloat16 if flags["bf16"] else torch.float16 if flags["fp16"] else None
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", None: "fp32"}
    room = device_bytes(device)
    print(f"只估算，不训练。尺寸来自{source}；设备 {describe(device)}，精度 {names[amp]}")
    results = {}
    for stage, (per_row, epochs) in stages.items():
        result = estimate(settings, config, per_row, epochs, amp is not None, mlm=stage == "预训练")
        results[stage] = result
        print(f"{stage}：")
        show_fixed({"模型": result["parameters"]}, result["fixed"])
        print(
            f"  激活，{result['tokens_per_step']} 个 token：{result['activations'] / 2**30:.2f} GB，"
            f"合计 {result['total'] / 2**30:.2f} GB"
        )
        print(
            f"  每步 {settings.per_device_train_batch_size} 行，至多 {result['tokens_per_step']} 个 token"
            f"（平均每行约 {result['mean_length']} 个），{len(per_row):,} 行读 {epochs:g} 遍，{result['steps']} 步"
        )
        frozen = settings.train_layers is not None and stage != "预训练"
        if frozen:
            kept = len(per_row) * result["mean_length"] * config.hidden_size * 2
            result["total"] += kept
            print(
                f"  只训练上面 {settings.train_layers} 层，{result['trained']:,} 个参数；"
                f"下面各层的输出每行算一遍，存着，约 {kept / 2**30:.2f} GB"
            )
        result["fits"] = None if room is None else result["total"] <= room
        if result["fits"] is False:
            print(
                f"警告：需要 {result['total'] / 2**30:.1f} GB，这台机器只有 {room / 2**30:.1f} GB，装不下。"
                "可以减小 --per_device_train_batch_size 或 --max_length。"
            )
        if reason := cannot_measure(result["total"], result["trained"], device, room):
            print(f"  没有实测时间：{reason}。")
            continue
        length = result["mean_length"]
        if frozen:
            batches = math.ceil(len(per_row) / settings.per_device_train_batch_size)
            once = lower_seconds(settings, config, length, device, amp) * batches
            print(f"  实测：下面各层过一遍训练数据约 {once / 60:.1f} 分钟")
            if settings.train_layers == 0:
                continue  # 分类层直接求解，几秒
        timed = upper_part(config, settings.train_layers or 0) if frozen else config
        each = result["seconds_per_step"] = seconds_each(settings, timed, length, device, amp)
        print(
            f"  实测三步（随机权重，平均长度）：每步 {each:.3f} 秒，训练约 {each * result['steps'] / 60:.1f} 分钟"
            + ("（不算猜字的输出层）" if stage == "预训练" else "")
        )
    return results
