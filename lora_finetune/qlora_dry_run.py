"""qlora_trainer.py --dry_run：不载入权重，先算一算装不装得下。公式在 finetune_memory.py。"""

from __future__ import annotations

from finetune_memory import GB, SIZES, activations, lora_parameters, memory, parts_of
from nlp_common.base.device import describe, pick_device
from nlp_common.hub.models import find_model
from nlp_common.tiny.qwen import build_model, build_tokenizer
from nlp_common.train.dry_run import device_bytes, read_config


def dry_run(settings, bases: list[str], full_model: str) -> dict:
    """不载入权重：底座、适配器、梯度、优化器、激活各多少 GB。"""
    device, half = pick_device(), settings.preset == "full"
    if settings.model or settings.preset == "full":
        name = settings.model or full_model
        found = find_model(name, settings.source)
        config, source = read_config(found, name, settings.source, full_model, lambda: SIZES["7B"])
    else:
        config, source = build_model(build_tokenizer(), settings.seed).config, "内置的小模型"
    parts = parts_of(config)
    tokens = settings.per_device_train_batch_size * settings.max_length
    print(f"只估算，不训练。尺寸来自{source}；{parts.total:,} 个参数，设备 {describe(device)}")
    result: dict = {"parameters": parts.total, "adapters": lora_parameters(parts, settings.r)}
    for base in bases:
        used = memory(
            parts,
            "lora" if base == "none" else "qlora",
            settings.r,
            weight_bytes=2 if half else 4,
            eight_bit_adam=settings.optimizer != "adamw",
            double=settings.double_quant,
        )
        used["activations"] = activations(config, tokens, half, bool(settings.gradient_checkpointing))
        result[base] = used | {"total": sum(used.values())}
        print(
            f"  底座 {base}：权重 {used['weights'] / GB:.2f}，适配器 {used['adapters'] / GB:.3f}，"
            f"梯度 {used['gradients'] / GB:.3f}，优化器 {used['optimizer'] / GB:.3f}，"
            f"激活至多 {used['activations'] / GB:.2f}（{tokens} 个 token），合计 {sum(used.values()) / GB:.2f} GB"
        )
        room = device_bytes(device)
        if room and result[base]["total"] > room:
            print(
                f"  警告：这台机器只有 {room / GB:.1f} GB，装不下。减小 --per_device_train_batch_size 或 --max_length，"
                "或加 --gradient_checkpointing True。"
            )
    return result
