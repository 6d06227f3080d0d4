"""小模型：真正的 Qwen2 结构（Qwen2ForCausalLM、Qwen2Tokenizer），只是尺寸很小。

存成与 Qwen/Qwen1.5-0.5B 一样的文件夹布局，所以后面每一行 from_pretrained 都和训练大模型时一样。
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

from nlp_common.lm.chatml import CHAT_TEMPLATE, END_OF_TEXT, IM_END, IM_START
from nlp_common.tiny import world


def build_tokenizer() -> Qwen2Tokenizer:
    """字节级 BPE，但预切分把每个汉字单独切开，于是一个汉字就是一个 token（词表约 550）。

    跨字的合并会让同一个词在不同上下文里切法不同，"往回抄"就难学得多。
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{Han}|[^\p{Han}\s\w]"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,  # 用不满：每个字并成一个 token 之后就没有可合并的了
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    text = [row["text"] for row in world.documents(2000, seed=0)]
    text += [m["content"] for row in world.chats(2000, seed=0) for m in row["messages"]]
    text += world.UNHELPFUL + world.OPENINGS + ["user", "assistant", "system"]
    bpe.train_from_iterator(text, trainer)
    model = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        unk_token=None,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=512,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [IM_START, IM_END]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def share_low_frequencies(attention: Qwen2Attention, first_pair: int = 10, gain: float = 1.5) -> None:
    """让第一层第一个头的 K 在低频的维度上等于 Q：q·k 一开始就偏向"相同的字互相注意"，不论隔多远。

    判断"这句话与故事合不合"，要看刚说的字故事里有没有；全部随机初始化时，这么小的模型很难自己学出这个
    本领。RoPE 把第 i 与第 i + d/2 维作为一对，转角是 距离 · θ^(−2i/d)：编号大的几对转得慢，隔几十个字还
    对得上，所以只抄这几对；其余的留着去学位置。
    """
    half = attention.head_dim // 2
    rows = [pair + offset for offset in (0, half) for pair in range(first_pair, half)]
    with torch.no_grad():
        attention.q_proj.weight[rows] *= gain  # 略微放大，"相同"才压得过几十个别的字的噪声
        attention.k_proj.weight[rows] = attention.q_proj.weight[rows]


def build_model(tokenizer: Qwen2Tokenizer, seed: int) -> Qwen2ForCausalLM:
    """随机初始化的两层 Qwen2（约 0.5 M 参数）。

    4 个注意力头配 4 个键值头（与 Qwen1.5 相同）：换成 2 个键值头，往回抄的本领学得慢得多。
    """
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        # 宽度只有 128：大模型惯用的 0.02 太小，注意力要很久才分得出轻重；0.08 ≈ 1/√128。
        initializer_range=0.08,
        # 文档只有一百来字：转得比大模型惯用的 10000 快些，"前一个字""上一句"这样的近处更容易分清。
        rope_parameters={"rope_type": "default", "rope_theta": 2000.0},
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype=torch.float32,
    )
    model = Qwen2ForCausalLM(config)
    share_low_frequencies(model.model.layers[0].self_attn)
    return model


def save_tiny_base(folder: Path, seed: int) -> None:
    """把没训练过的小模型和分词器存成 hub 布局的文件夹。"""
    tokenizer = build_tokenizer()
    build_model(tokenizer, seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
