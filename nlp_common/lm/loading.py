"""载入模型和分词器，并检查它们能不能用来聊天。"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import logging

from nlp_common.base.errors import UserError
from nlp_common.fast.columns import use_read_columns
from nlp_common.fast.rms_norm import use_fused_norms
from nlp_common.lm.chatml import CHAT_TEMPLATE, END_OF_TEXT, IM_END, IM_START
from nlp_common.lm.checks import (
    check_config,
    check_decoder,
    check_tokenizer,
    check_vocabulary,
    load_weights,
    quiet,
    readable_errors,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logging.disable_progress_bar()  # 只关"载入权重"的进度条，警告照常显示


def _read_tokenizer(path: str) -> PreTrainedTokenizerBase:
    check_config(path)
    with readable_errors(path), quiet():
        # AutoTokenizer 见到 Qwen2 的 config，不管分词器自己写着什么，都换成 Qwen2 的切法
        declared = get_tokenizer_config(path).get("tokenizer_class")
        kind = PreTrainedTokenizerFast if declared == "TokenizersBackend" else AutoTokenizer
        tokenizer = kind.from_pretrained(path, trust_remote_code=False)
    check_tokenizer(tokenizer, path)
    return tokenizer


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """聊天用的分词器：没有 ChatML 的控制符是 UserError。"""
    tokenizer = _read_tokenizer(path)
    # 填充不能与 <|im_end|> 同一个 token：奖励模型靠"不是填充"找最后一个真实 token。
    if tokenizer.pad_token in (None, IM_END):
        tokenizer.pad_token = END_OF_TEXT
    missing = [t for t in (IM_START, IM_END, END_OF_TEXT) if t not in tokenizer.get_vocab()]
    if missing:
        raise UserError(f"{path} 的分词器没有 ChatML 的控制符 {'、'.join(missing)}；请换用 Qwen 一类的模型。")
    return tokenizer


def load_causal_lm(path: str) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """→ (分词器, 模型)。权重一律用 float32 载入：混合精度训练要 float32 的主权重。"""
    check_decoder(path)
    tokenizer = load_tokenizer(path)
    model, _ = load_weights(AutoModelForCausalLM, path)
    check_vocabulary(model, tokenizer, path)
    return tokenizer, make_fast(model)


def load_plain_lm(path: str) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """只续写、不聊天的模型（GPT-2 等）→ (分词器, 模型)；分词器不必有 ChatML 的控制符。"""
    check_decoder(path)
    tokenizer = _read_tokenizer(path)
    model, _ = load_weights(AutoModelForCausalLM, path)
    check_vocabulary(model, tokenizer, path)
    return tokenizer, model


def make_fast(model: PreTrainedModel) -> PreTrainedModel:
    """装上只为快、结果不变的部分（nlp_common/fast），返回 model；此后照常调用。"""
    return use_read_columns(use_fused_norms(model))


def end_chat_turns(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """聊天模型一轮的结束是 <|im_end|>：基座 Qwen 的 eos 是 <|endoftext|>，不改它，生成就停不下来。"""
    tokenizer.eos_token = IM_END
    tokenizer.chat_template = CHAT_TEMPLATE
    model.config.eos_token_id = tokenizer.eos_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id


def load_chat_lm(path: str, device: torch.device) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """聊天的模型 → (分词器, 模型)：float32，在 device 上，一轮在 <|im_end|> 结束。"""
    tokenizer, model = load_causal_lm(path)
    end_chat_turns(model, tokenizer)
    return tokenizer, model.to(device)


def load_reward_model(path: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """骨干来自 path 的标量打分模型；path 是 SFT 模型时，打分头是新初始化的。"""
    return _load_with_head(AutoModelForSequenceClassification, path, tokenizer)


def load_value_model(path: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """每个位置给出一个价值的模型，骨干和头都从奖励模型 path 开始。"""
    return _load_with_head(AutoModelForTokenClassification, path, tokenizer)


def _load_with_head(auto_class: Any, path: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    check_decoder(path, scores=True)
    with readable_errors(path), quiet():
        config = AutoConfig.from_pretrained(path, num_labels=1, trust_remote_code=False)
    config.pad_token_id = tokenizer.pad_token_id
    config.classifier_dropout = 0.0  # 打分和估值都要确定的数
    model, _ = load_weights(auto_class, path, new=("score.",), config=config)  # 只有打分头可以是新的
    check_vocabulary(model, tokenizer, path)
    return make_fast(model)
