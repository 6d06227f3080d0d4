"""学生：老师的结构，小几号，从头开始；先在预训练的文档上学说话、学往回看，再去学答题。"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

from nlp_common.base.errors import UserError
from nlp_common.lm.loading import make_fast
from nlp_common.lm.losses import IGNORE
from nlp_common.lm.packing import collate_blocks, cut_long, pack_documents
from nlp_common.tiny import world
from nlp_common.tiny.qwen import share_low_frequencies
from nlp_common.train.loop import train_loop
from nlp_common.train.stage import Stage

BLOCK = 224  # 正好装得下两篇文档


def small_student(teacher, n_layers: int, width: int, seed: int):
    """teacher 的结构、词表，n_layers 层、width 宽，随机初始化（与 nlp_common/tiny/qwen.py 同一个办法）。"""
    config = type(teacher.config).from_dict(teacher.config.to_dict())
    n_heads = config.num_attention_heads
    if width % (2 * n_heads):
        raise UserError(
            f"--student_width {width} 要是 {2 * n_heads} 的倍数：{n_heads} 个头平分，每个头的维数是偶数。"
        )
    config.num_hidden_layers, config.hidden_size = n_layers, width
    config.layer_types = ["full_attention"] * n_layers
    config.intermediate_size = width * teacher.config.intermediate_size // teacher.config.hidden_size
    config.initializer_range = width**-0.5
    config.head_dim = width // n_heads
    torch.manual_seed(seed)
    student = type(teacher)(config)
    share_low_frequencies(student.model.layers[0].self_attn, first_pair=10 * width // n_heads // 32)
    return make_fast(student)


def document_loss(model, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict]:
    """文档里每个 token 的 −log p 的和；position_ids 归零处是文档的边界，注意力不会越过。"""
    labels = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE)  # (B, T)
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    logits = model(**inputs, use_cache=False).logits  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum"), {}


def pretrain(part: Stage, student, tokenizer) -> dict:
    """在小世界的文档上预训练；与 Qwen 链的 pretrain 同样的文档、同样的循环，学习率大些。"""
    settings = part.settings
    texts = [row["text"] for row in world.documents(settings.n_documents, settings.seed)]
    ids = tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    blocks = pack_documents(cut_long([[*each, end] for each in ids], BLOCK), BLOCK)
    part.settings = replace(settings, per_device_train_batch_size=4, max_steps=-1)
    trained = train_loop(
        part,
        "学生先读文档",
        student,
        blocks,
        partial(collate_blocks, block_size=BLOCK, pad_id=tokenizer.pad_token_id),
        document_loss,
        tokens=[sum(map(len, block)) for block in blocks],
    )
    part.settings = settings
    last = {"loss": trained.history[-1]["loss"]} if trained.history else {}  # 几步就学完的，一次也没有记
    return last | trained.metrics
