"""--dry_run：不下载权重、不训练，先算一算装不装得下、要多少步、大约多久。

参数在 meta 设备上建模型来数，一个字节的权重都不占。以 N 个 token、float32 为例，一层要为反向留下：
两个归一化各 3 份宽为 H 的，注意力 4 份宽为 A 的（q、k、v、输出），MLP 4 份宽为 I 的；最后是归一化 3H
和词表上的 log-softmax V。所以激活 = 4·N·[L·(6H + 4A + 4I) + 3H + V] 字节，算损失时 logits 与它的梯度再加
两份 V。重算激活（gradient checkpointing）时每层只留入口的 H，另加正在重算的那一层。
"""

from __future__ import annotations

import math
import os
import time

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Qwen2Config,
)

from nlp_common.cli import UserError
from nlp_common.device import describe, pick_device, precision
from nlp_common.hub import find_model, how_to_get

# 各阶段手里有哪些模型：(名字, 类, 训练吗)
CAUSAL, SCORE, VALUES = (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
MODELS = {
    "pretrain": [("模型", CAUSAL, True)],
    "sft": [("模型", CAUSAL, True)],
    "reward": [("奖励模型", SCORE, True)],
    "dpo": [("策略", CAUSAL, True), ("参考模型", CAUSAL, False)],
    "ppo": [
        ("策略", CAUSAL, True),
        ("价值模型", VALUES, True),
        ("参考模型", CAUSAL, False),
        ("奖励模型", SCORE, False),
    ],
}
MEASURABLE = 50_000_000  # CPU 上参数再多，三步也要等很久


def qwen_0_5b() -> Qwen2Config:
    """Qwen1.5-0.5B 公布的尺寸；连不上 hub 时用它。"""
    return Qwen2Config(
        vocab_size=151_936,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=16,
        tie_word_embeddings=True,
    )


def find_config(settings, full_model: str):
    """→ (配置, 它从哪里来)。只读 config.json，不碰权重。"""
    if settings.preset == "tiny" and not settings.model:
        from .tiny_model import build_model, build_tokenizer

        return build_model(build_tokenizer(), settings.seed).config, "内置的小模型"
    name = settings.model or full_model
    found = find_model(name, settings.source)
    if found is not None and (found != name or os.path.isdir(found) or settings.source == "hf"):
        return AutoConfig.from_pretrained(found), f"{found} 的 config.json"
    if found is None:
        why = f"本地缓存里没有 {name}，也连不上它的服务器"
    else:  # ModelScope 上有；读 config.json 要先把整个模型下载到缓存
        why = f"{name} 还没有从 ModelScope 下载到缓存，--dry_run 不去下载"
    if name == full_model:
        return qwen_0_5b(), f"内置的尺寸表（{why}）"
    if found is None:
        raise UserError(how_to_get(name, settings.source))
    raise UserError(f"{why}。先运行：modelscope download --model {name}，再运行同一条命令。")


def count_parameters(model_class, config) -> tuple[int, int]:
    """→ (参数个数, 张量个数)；共用的嵌入只数一次。"""
    config = type(config).from_dict(config.to_dict() | ({} if model_class is CAUSAL else {"num_labels": 1}))
    with torch.device("meta"):
        parameters = list(model_class.from_config(config, dtype=torch.float32).parameters())
    return sum(p.numel() for p in parameters), len(parameters)


def saved_bytes(config, n_tokens: int, half: bool, head: bool, checkpointing: bool = False) -> int:
    """前向为反向留下多少字节。half：自动混合精度，矩阵乘的输入是 2 字节的副本，归一化仍是 float32。"""
    hidden, layers = config.hidden_size, config.num_hidden_layers
    attention = (
        getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    ) * config.num_attention_heads
    if half:  # 归一化 2·8H，加 q、k、v 与 gate、up 各自的 2 字节输入 10H
        layer = 26 * hidden + 2 * 4 * attention + 2 * 4 * config.intermediate_size
    else:
        layer = 4 * (6 * hidden + 4 * attention + 4 * config.intermediate_size)
    kept = layers * 4 * hidden + layer if checkpointing else layers * layer
    last = 4 * 3 * hidden + (4 * config.vocab_size if head else 0)
    return n_tokens * (kept + last)


def logits_bytes(config, n_tokens: int) -> int:
    """log-softmax 之外，logits 与它的梯度（都按 float32）。"""
    return n_tokens * 2 * 4 * config.vocab_size


def device_bytes(device: torch.device) -> int | None:
    """设备一共有多少内存；不知道给 None。"""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def estimate(name: str, settings, config, half: bool) -> dict:
    """各项的字节数与步数；token 数按每行都满 max_length 算，是上限。"""
    models = [(label, *count_parameters(cls, config), trained) for label, cls, trained in MODELS[name]]
    total = sum(n for _, n, _, _ in models)
    trained = sum(n for _, n, _, t in models if t)
    tensors = sum(k for _, _, k, t in models if t)
    rows = settings.per_device_train_batch_size
    per_forward = getattr(settings, "micro_batch_size", rows) * (2 if name in ("dpo", "reward") else 1)
    width = settings.max_length + getattr(settings, "max_new_tokens", 0)
    tokens, head = per_forward * width, name != "reward"
    logits = logits_bytes(config, tokens) if head else 0
    activations = {
        key: saved_bytes(config, tokens, half, head, key) + logits for key in (False, True)
    }  # 键：是否重算激活
    accumulate = 1 if name == "ppo" else settings.gradient_accumulation_steps
    steps = settings.max_steps
    if steps <= 0 and settings.max_train_samples:
        steps = math.ceil(
            math.ceil(settings.max_train_samples / rows) / accumulate * settings.num_train_epochs
        )
    fixed = {
        "权重（每个参数 4 字节）": 4 * total,
        "半精度副本（2 字节）": 2 * total if half else 0,
        "梯度（4 字节）": 4 * trained,
        "AdamW（8 字节，每个张量另有 4 字节步数）": 8 * trained + 4 * tensors,
    }
    return {
        "models": {label: n for label, n, _, _ in models},
        "fixed": fixed,
        "logits": logits * 3 // 2,
        "activations": activations,
        "total": {key: sum(fixed.values()) + value for key, value in activations.items()},
        "tokens_per_forward": tokens,
        "tokens_per_step": rows * accumulate * width * (2 if name in ("dpo", "reward") else 1),
        "steps": steps if steps and steps > 0 else None,
        "forwards_per_step": accumulate,
    }


def seconds_per_forward(name: str, config, settings, device, n_tokens: int) -> float:
    """同样尺寸、随机权重的模型，真的走三步（前向、反向、AdamW），取后两步的平均。"""
    model = MODELS[name][0][1].from_config(config, dtype=torch.float32).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.randint(0, config.vocab_size, (n_tokens // settings.max_length, settings.max_length))
    ids = ids.to(device)
    amp = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision(device))
    for step in range(3):
        if step == 1:
            started = time.perf_counter()
        with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
            loss = model(input_ids=ids, use_cache=False).logits.float().logsumexp(-1).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # 等加速器算完
    return (time.perf_counter() - started) / 2


def why_not_measured(name: str, result: dict, settings, device, room: int | None) -> str | None:
    """不能量时间的原因；能量给 None。"""
    if name == "ppo":
        return "PPO 的一步大半花在采样上，单走前向与反向估不准"
    if room is None or result["total"][False] > room:
        return "装不下，没有去试"
    if device.type == "cpu" and sum(result["models"].values()) > MEASURABLE:
        return f"CPU 上模型超过 {MEASURABLE / 1e6:.0f} M 参数，三步也要等很久"
    return None


def dry_run(name: str, settings, full_model: str) -> dict:
    """打印并返回估计；不写任何文件。"""
    device = pick_device()
    config, source = find_config(settings, full_model)
    half = precision(device) != "fp32"
    result = estimate(name, settings, config, half) | {"source": source}
    room = device_bytes(device)
    print(f"只估算，不训练。尺寸来自{source}；设备 {describe(device)}，精度 {precision(device)}")
    for label, n in result["models"].items():
        print(f"  {label}：{n:,} 个参数")
    for label, size in result["fixed"].items():
        print(f"  {label}：{size / 2**30:.2f} GB")
    tokens = result["tokens_per_forward"]
    steps = f"{result['steps']} 步" if result["steps"] else "步数要看数据有几行"
    if settings.max_steps <= 0 and result["steps"]:
        if name == "pretrain":
            steps += "（按一块一篇文档算：短的装在一起会少些，长的切开会多些）"
        elif getattr(settings, "packing", False):
            steps = f"至多 {steps}（按一块一段对话算，装得越满步数越少）"
    for key, label in ((False, "不重算激活"), (True, "重算激活（--gradient_checkpointing True）")):
        print(
            f"  激活，{tokens} 个 token，{label}：{result['activations'][key] / 2**30:.2f} GB"
            f"（其中词表上的三份 {result['logits'] / 2**30:.2f} GB），合计 {result['total'][key] / 2**30:.2f} GB"
        )
    print(f"  每步至多 {result['tokens_per_step']} 个 token，{steps}")
    chosen = result["total"][bool(settings.gradient_checkpointing)]
    result["fits"] = None if room is None else chosen <= room
    if result["fits"] is False:
        print(
            f"警告：需要 {chosen / 2**30:.1f} GB，这台机器只有 {room / 2**30:.1f} GB，装不下。可以减小"
            " --per_device_train_batch_size 或 --max_length，或加 --gradient_checkpointing True。"
        )
    if reason := why_not_measured(name, result, settings, device, room):
        print(f"  没有实测时间：{reason}。")
    else:
        each = seconds_per_forward(name, config, settings, device, tokens)
        result["seconds_per_step"] = each * result["forwards_per_step"]
        shown = f"  实测三步（随机权重，每行都满）：每步 {result['seconds_per_step']:.2f} 秒"
        if result["steps"]:
            shown += f"，训练至多约 {result['seconds_per_step'] * result['steps'] / 60:.1f} 分钟"
        print(shown)
    return result
