"""这个文件夹的脚本共用：载入一个交得出注意力的模型，找到它的各个部件，关掉几个头。

部件的名字各家不同（o_proj、c_proj、dense；norm、ln_f），在这里认一次，脚本里就只有算法。
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from nlp_common.base.arguments import option
from nlp_common.base.errors import UserError
from nlp_common.lm.chatml import encode_text
from nlp_common.lm.checks import (
    check_config,
    check_tokenizer,
    check_vocabulary,
    load_weights,
    quiet,
    readable_errors,
)
from nlp_common.train.chain import chain_model
from nlp_common.train.settings import LessonSettings

HOME = Path(__file__).resolve().parent
FULL_MODEL = "Qwen/Qwen1.5-0.5B"
OTHER = "请用 --model 换一个 Transformer"


@dataclass
class ReaderSettings(LessonSettings):
    """看一个模型的脚本都有的参数。"""

    model: str | None = option(
        "看哪个模型：hub 名、本地文件夹或 smollm2；默认是 Qwen 链 tiny 预设的 SFT 模型"
    )
    source: str = option("hub 名从哪里下载", "hf", choices=("hf", "modelscope"))


@dataclass
class Reader:
    """载入好的一个模型；trained_on 是训练它的数据（是这里的小世界，才知道答案在哪里），认不出是空的。"""

    tokenizer: object
    model: nn.Module
    id: str
    trained_on: str

    @property
    def layers(self) -> int:
        return self.model.config.num_hidden_layers

    @property
    def heads(self) -> int:
        return self.model.config.num_attention_heads


def find_reader(settings: ReaderSettings) -> dict:
    """--model 给的，没给就是这个预设的模型 → ``{"path", "stage", "id", "run"}``。"""
    if settings.preset == "full" and not settings.model:
        settings.model = FULL_MODEL
    return chain_model("sft", settings.model, settings.source)


def lesson_name(name: str, settings: ReaderSettings) -> str:
    """看自己的一句、自己存的注意力、手写的编码器，结果另放一处，不与默认的那一课争一个文件夹。

    自己的一句、自己的文件每次都重新看（几秒），换一句不必加 --retrain；给了 --output_dir 的照平常的规矩。
    """
    for flag in ("text", "attention", "hand"):
        if getattr(settings, flag, None) not in (None, False):
            if flag != "hand" and not settings.output_dir:
                settings.retrain = True
            return f"{name}-{flag}"
    return name


def load_reader(found: dict) -> Reader:
    """载入模型，eval 状态，权重不求梯度。交不出注意力的（Mamba 这样没有注意力的）是 UserError。

    attn_implementation="eager"：sdpa、flash 这些快的写法从不写出 (T, T) 的权重，要了也没有；
    eager 是照公式一步步算的，权重就在中间。
    """
    logging.disable_progress_bar()  # 只关"载入权重"的进度条，警告照常显示
    path = found["path"]
    config = check_config(path)
    if not config.get("num_attention_heads") and not config.get("n_head"):
        raise UserError(f"{path} 是 {config.get('model_type')}：没有注意力，没有权重可看。{OTHER}。")
    causal = "CausalLM" in str(config.get("architectures")) or "LMHead" in str(config.get("architectures"))
    model_class, new = (AutoModelForCausalLM, ()) if causal else (AutoModel, ("pooler.",))
    with readable_errors(path), quiet():
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    check_tokenizer(tokenizer, path)
    tokenizer.model_max_length = 10**9  # 太长的由 encode 用中文说，不要库的英文警告
    try:
        model, _ = load_weights(model_class, path, new, attn_implementation="eager")
    except UserError as error:
        if "eager" in str(error):
            raise UserError(f"{path} 不能用 eager 的注意力载入，看不到权重。{OTHER}。") from error
        raise
    check_vocabulary(model, tokenizer, path)
    model.eval().requires_grad_(False)
    run = found.get("run") or {}
    trained_on = str((run.get("settings") or {}).get("dataset") or "")
    return Reader(tokenizer, model, f"{found['stage']}:{found['id']}", trained_on)


def is_causal_lm(reader: Reader) -> bool:
    return reader.model.get_output_embeddings() is not None


def need_language_model(reader: Reader) -> None:
    """要看"下一个词"的脚本用：编码器（BERT）没有下一个词，是 UserError。"""
    if not is_causal_lm(reader):
        name = type(reader.model).__name__
        raise UserError(
            f"{name} 没有写字的输出层（编码器、分类或奖励模型），没有“下一个词”可看。请用 --model 换一个自回归的语言模型，例如 smollm2。"
        )


def encode(reader: Reader, text: str, at_most: int | None = None) -> list[int]:
    """一段文字 → token。空的、长过模型的上下文（或 at_most）的是 UserError，说出长了多少。"""
    if not text.strip():
        raise UserError("--text 是空的：写一句话。")
    ids = encode_text(reader.tokenizer, text)
    if not is_causal_lm(reader):
        ids = reader.tokenizer(text)["input_ids"]  # BERT 要前后的 [CLS] 与 [SEP]
    config = reader.model.config
    room = getattr(config, "max_position_embeddings", None) or len(ids)
    limit = min(room, at_most or room)
    if len(ids) > limit:
        why = "模型的上下文只有" if limit == room else "这里最多看"
        raise UserError(
            f"--text 有 {len(ids)} 个 token，{why} {limit} 个：请截短到约 {len(text) * limit // len(ids)} 个字。"
        )
    return ids


@torch.no_grad()
def attention_maps(model: nn.Module, ids: list[int]) -> list[torch.Tensor]:
    """每层的注意力，各 (H, T, T)：[h, i, j] 是第 h 个头里，第 i 个位置放在第 j 个上的权重，每行和为 1。"""
    inputs = torch.tensor([ids], device=model.device)  # (1, T)
    maps = model(inputs, output_attentions=True).attentions
    if not maps or any(each is None for each in maps):
        raise UserError(
            f"{type(model).__name__} 没有交出注意力权重（有的层不是注意力，或用的不是 eager）。{OTHER}。"
        )
    return [each[0].float().cpu() for each in maps]  # (1, H, T, T) → (H, T, T)


# ---------------------------------------------------------------- 部件


def _first(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    for name in names:
        if isinstance(found := getattr(module, name, None), nn.Module):
            return found
    return None


def layers_of(model: nn.Module) -> list[nn.Module]:
    """从下到上的各层。"""
    for module in model.modules():
        for name in ("layers", "h", "layer", "blocks"):
            found = getattr(module, name, None)
            if isinstance(found, nn.ModuleList) and len(found) == model.config.num_hidden_layers:
                return list(found)
    raise UserError(f"认不出 {type(model).__name__} 的各层在哪里。{OTHER}，例如 Qwen、Llama、GPT-2 一类。")


def mixer_of(layer: nn.Module) -> nn.Module:
    """一层里把各个头合在一起的那个线性层：它的输入 (B, T, H·d) 里，第 h 个头占第 h 段。"""
    attention = _first(layer, ("self_attn", "attn", "attention"))
    mixer = _first(attention, ("o_proj", "c_proj", "out_proj", "dense")) if attention else None
    if mixer is None:
        raise UserError(
            f"认不出 {type(layer).__name__} 里合并各个头的线性层。{OTHER}，例如 Qwen、Llama、GPT-2 一类。"
        )
    return mixer


def norm_of(model: nn.Module) -> nn.Module:
    """最后一层之后、输出层之前的那一次归一。"""
    norm = _first(model.base_model, ("norm", "ln_f", "final_layer_norm", "final_layernorm"))
    if norm is None:
        raise UserError(
            f"认不出 {type(model).__name__} 最后的归一层。{OTHER}，例如 Qwen、Llama、GPT-2 一类。"
        )
    return norm


@contextlib.contextmanager
def without_heads(model: nn.Module, heads: list[tuple[int, int]]) -> Iterator[None]:
    """里面运行的模型没有这几个头（层, 头）：合并之前，把它们那几段换成 0。"""
    size = model.config.hidden_size // model.config.num_attention_heads
    size = getattr(model.config, "head_dim", None) or size
    hooks = []
    for number, layer in enumerate(layers_of(model)):
        removed = [head for at, head in heads if at == number]
        if removed:
            hooks.append(mixer_of(layer).register_forward_pre_hook(_zeroing(removed, size)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _zeroing(removed: list[int], size: int):
    def clear(module: nn.Module, inputs: tuple) -> tuple:
        mixed = inputs[0].clone()  # (B, T, H·d)
        for head in removed:
            mixed[..., head * size : (head + 1) * size] = 0
        return (mixed, *inputs[1:])

    return clear


def model_name(found: dict, settings: ReaderSettings) -> str:
    """给人看的名字。"""
    return settings.model or f"Qwen 链 tiny 的 {found['stage']}"
