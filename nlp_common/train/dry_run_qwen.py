"""--dry_run：不下载权重、不训练，先算一算装不装得下、要多少步、大约多久。

参数在 meta 设备上建模型来数，一个字节的权重都不占。以 N 个 token、float32 为例，一层要为反向留下：
两个归一化各 3 份宽为 H 的，注意力 4 份宽为 A 的（q、k、v、输出），MLP 4 份宽为 I 的；最后是归一化 3H
和词表上的 log-softmax V。所以激活 = 4·N·[L·(6H + 4A + 4I) + 3H + V] 字节，算损失时 logits 与它的梯度再加
两份 V。重算激活（gradient checkpointing）时每层只留入口的 H，另加正在重算的那一层。

最后一层与词表只算有人读的列（fast/columns.py）：PPO 是回答的那几列，奖励模型是各行的最后一个字，都算得出来；
SFT、DPO 是回答占的列，要看数据，所以按全部的列算，是上限。
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    Qwen2Config,
)

from nlp_common.base.device import describe, pick_device, precision
from nlp_common.hub.models import find_model
from nlp_common.train.dry_run import (
    cannot_measure,
    count,
    device_bytes,
    fixed_bytes,
    read_config,
    seconds_per_step,
    show_fixed,
)
from nlp_common.train.settings import StageSettings

# 各阶段手里有哪些模型：(名字, 类, 训练吗)
CAUSAL, SCORE, VALUES = (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
MODELS: dict[str, list[tuple[str, Any, bool]]] = {
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
    "grpo": [("策略", CAUSAL, True), ("参考模型", CAUSAL, False), ("奖励模型", SCORE, False)],
}
SAMPLING = ("ppo", "grpo")  # 边训练边采样的：用 micro_batch_size，不重算激活
MODELS["kto"] = MODELS["identity"] = MODELS["dpo"]
MODELS["best_of_k"] = MODELS["sft"]
PAIRED = ("reward", "dpo", "kto", "identity")  # 一行数据是两个回答


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


def find_config(settings: StageSettings, full_model: str) -> tuple[PreTrainedConfig, str]:
    """→ (配置, 它从哪里来)。只读 config.json，不碰权重。"""
    if settings.preset == "tiny" and not settings.model:
        from nlp_common.tiny.qwen import build_model, build_tokenizer

        return build_model(build_tokenizer(), settings.seed).config, "内置的小模型"
    name = settings.model or full_model
    found = find_model(name, settings.source)
    return read_config(found, name, settings.source, full_model, qwen_0_5b)


def count_parameters(model_class: Any, config: PreTrainedConfig) -> tuple[int, int]:
    """→ (参数个数, 张量个数)；共用的嵌入只数一次。"""
    config = copy.deepcopy(config)
    if model_class is not CAUSAL:
        config.num_labels = 1
    return count(lambda: model_class.from_config(config, dtype=torch.float32))


def layer_bytes(config: PreTrainedConfig, n_tokens: int, n_read: int, half: bool) -> int:
    """一层为反向留下多少字节；除了 K、V 和它们的输入，只算 n_read 个 token。

    half：自动混合精度，矩阵乘的输入是 2 字节的副本，归一化仍是 float32。
    """
    hidden, wide = config.hidden_size, config.intermediate_size
    attention = (
        getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    ) * config.num_attention_heads
    if half:  # 两个归一化各 8H，q、k、v 与 gate、up 各自的 2 字节输入 2H
        return n_tokens * (12 * hidden + 4 * attention) + n_read * (14 * hidden + 4 * attention + 8 * wide)
    return 4 * (n_tokens * (3 * hidden + 2 * attention) + n_read * (3 * hidden + 2 * attention + 4 * wide))


def saved_bytes(
    config: PreTrainedConfig,
    n_tokens: int,
    half: bool,
    head: bool,
    checkpointing: bool = False,
    n_read: int | None = None,
) -> int:
    """前向为反向留下多少字节。n_read：最后一层与词表只算其中几个 token，默认全算。"""
    hidden, layers = config.hidden_size, config.num_hidden_layers
    n_read = n_tokens if n_read is None else n_read
    vocabulary = 4 * config.vocab_size * n_read if head else 0
    whole = layer_bytes(config, n_tokens, n_tokens, half)
    if checkpointing:  # 重算时最后一层照常全算
        return n_tokens * (layers * 4 + 4 * 3) * hidden + whole + vocabulary
    last = layer_bytes(config, n_tokens, n_read, half) + 4 * 3 * hidden * n_read
    return (layers - 1) * whole + last + vocabulary


def logits_bytes(config: PreTrainedConfig, n_tokens: int) -> int:
    """log-softmax 之外，logits 与它的梯度（都按 float32）。"""
    return n_tokens * 2 * 4 * config.vocab_size


def models_of(name: str, settings: StageSettings) -> list[tuple[str, Any, bool]]:
    """这个阶段手里的模型；GRPO 由验证器或自己的文件打分时，没有奖励模型。"""
    uses_it = getattr(settings, "reward", "reward_model") == "reward_model"
    if name == "grpo" and (not uses_it or getattr(settings, "reward_file", None)):
        return [each for each in MODELS[name] if each[1] is not SCORE]
    return MODELS[name]


def estimate(
    name: str, settings: StageSettings, config: PreTrainedConfig, half: bool, cpu: bool = False
) -> dict:
    """各项的字节数与步数；token 数按每行都满 max_length 算，是上限。"""
    models = [
        (label, *count_parameters(cls, config), trained) for label, cls, trained in models_of(name, settings)
    ]
    total = sum(n for _, n, _, _ in models)
    trained = sum(n for _, n, _, t in models if t)
    tensors = sum(k for _, _, k, t in models if t)
    rows = settings.per_device_train_batch_size
    per_forward = getattr(settings, "micro_batch_size", rows) * (2 if name in PAIRED else 1)
    width = settings.max_length + getattr(settings, "max_new_tokens", 0)
    tokens, head = per_forward * width, name != "reward"
    answers = per_forward * getattr(settings, "max_new_tokens", 0)
    read = {**dict.fromkeys(SAMPLING, answers), "reward": per_forward**2}
    n_read = min(read.get(name, tokens), tokens)
    logits = logits_bytes(config, n_read) if head else 0
    activations = {
        key: saved_bytes(config, tokens, half, head, key, n_read) + logits
        for key in ((False,) if name in SAMPLING else (False, True))
    }  # 键：是否重算激活
    if name == "ppo" and cpu:  # 策略与价值模型同时更新；在加速器上是一个接一个，策略那份大些
        activations[False] += saved_bytes(config, tokens, half, head=False, n_read=n_read)
    accumulate = 1 if name in SAMPLING else settings.gradient_accumulation_steps
    steps = settings.max_steps
    if steps <= 0 and settings.max_train_samples:
        steps = math.ceil(
            math.ceil(settings.max_train_samples / rows) / accumulate * settings.num_train_epochs
        )
    fixed = fixed_bytes(total, trained, tensors, half)
    return {
        "models": {label: n for label, n, _, _ in models},
        "fixed": fixed,
        "logits": logits * 3 // 2,
        "activations": activations,
        "total": {key: sum(fixed.values()) + value for key, value in activations.items()},
        "tokens_per_forward": tokens,
        "tokens_per_step": rows * accumulate * width * (2 if name in PAIRED else 1),
        "steps": steps if steps and steps > 0 else None,
        "forwards_per_step": accumulate,
    }


def seconds_per_forward(
    name: str, config: PreTrainedConfig, settings: StageSettings, device: torch.device, n_tokens: int
) -> float:
    """同样尺寸、随机权重的模型走一步（一次前向、反向）要几秒。"""
    model = MODELS[name][0][1].from_config(config, dtype=torch.float32).to(device).train()
    ids = torch.randint(0, config.vocab_size, (n_tokens // settings.max_length, settings.max_length))
    ids = ids.to(device)
    amp = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision(device))

    def loss() -> torch.Tensor:
        return model(input_ids=ids, use_cache=False).logits.float().logsumexp(-1).mean()

    return seconds_per_step(model, loss, device, amp)


def why_not_measured(name: str, result: dict, device: torch.device, room: int | None) -> str | None:
    """不能量时间的原因；能量给 None。"""
    if name in SAMPLING:
        return f"{name.upper()} 的一步大半花在采样上，单走前向与反向估不准"
    return cannot_measure(result["total"][False], sum(result["models"].values()), device, room)


def dry_run(name: str, settings: StageSettings, full_model: str) -> dict:
    """打印并返回估计；不写任何文件。"""
    device = pick_device()
    config, source = find_config(settings, full_model)
    half = precision(device) != "fp32"
    result = estimate(name, settings, config, half, device.type == "cpu") | {"source": source}
    room = device_bytes(device)
    print(f"只估算，不训练。尺寸来自{source}；设备 {describe(device)}，精度 {precision(device)}")
    show_fixed(result["models"], result["fixed"])
    tokens = result["tokens_per_forward"]
    steps = f"{result['steps']} 步" if result["steps"] else "步数要看数据有几行"
    if settings.max_steps <= 0 and result["steps"]:
        if name == "pretrain":
            steps += "（按一块一篇文档算：短的装在一起会少些，长的切开会多些）"
        elif getattr(settings, "packing", False):
            steps = f"至多 {steps}（按一块一段对话算，装得越满步数越少）"
    labels = {False: "不重算", True: "重算（--gradient_checkpointing True）"}
    for key, size in result["activations"].items():
        vocabulary = f"（其中词表上的三份 {result['logits'] / 2**30:.2f} GB）" if result["logits"] else ""
        label = f"，{labels[key]}" if name not in SAMPLING else ""
        print(
            f"  激活，{tokens} 个 token{label}：{size / 2**30:.2f} GB{vocabulary}，合计 {result['total'][key] / 2**30:.2f} GB"
        )
    if name in ("sft", "dpo"):
        print("  （词表和最后一层其实只算回答占的那些列，要看数据；这里按每列都算，是上限。）")
    print(f"  每步至多 {result['tokens_per_step']} 个 token，{steps}")
    chosen = result["total"][bool(settings.gradient_checkpointing) and name not in SAMPLING]
    result["fits"] = None if room is None else chosen <= room
    if result["fits"] is False:
        print(
            f"警告：需要 {chosen / 2**30:.1f} GB，这台机器只有 {room / 2**30:.1f} GB，装不下。可以减小 "
            + (
                "--micro_batch_size 或 --max_length。"
                if name in SAMPLING
                else "--per_device_train_batch_size 或 "
            )
            + ("" if name in SAMPLING else "--max_length，或加 --gradient_checkpointing True。")
        )
    if reason := why_not_measured(name, result, device, room):
        print(f"  没有实测时间：{reason}。")
    else:
        each = seconds_per_forward(name, config, settings, device, tokens)
        result["seconds_per_step"] = each * result["forwards_per_step"]
        shown = f"  实测三步（随机权重，每行都满）：每步 {result['seconds_per_step']:.2f} 秒"
        if result["steps"]:
            shown += f"，训练至多约 {result['seconds_per_step'] * result['steps'] / 60:.1f} 分钟"
        print(shown)
    return result
