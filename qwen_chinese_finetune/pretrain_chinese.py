"""预训练：在文档上学"下一个 token 是什么"。两个 pretrain_chinese-*.py 是它的两套硬件配置。

损失是因果语言模型的交叉熵（Radford et al. 2018, 式 1）：L = −Σ log p(x_t | x_<t) / N，
其中 x_<t 只含同一篇文档里、前面的 token。
"""

from __future__ import annotations

from nlp_common.base.cli import run_main

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from chain import CHAIN
from nlp_common.base.device import pick_device
from nlp_common.data.chats import to_texts
from nlp_common.lm.generation import generate
from nlp_common.lm.loading import load_causal_lm
from nlp_common.lm.losses import IGNORE
from nlp_common.lm.packing import collate_blocks, pack_documents
from nlp_common.tiny import world
from nlp_common.tiny.judge import measure_chat
from nlp_common.train.splits import EVAL_SEED, load_train_and_eval
from nlp_common.train.stage import Stage, StageSettings, parse_settings, run_stage
from nlp_common.train.trainer import ExactTrainer, full_state, run_trainer, trainer_arguments
from nlp_common.train.trainer_qwen import Progress, loss_curve

TINY = {
    "dataset": "tiny_world",
    "max_train_samples": 7600,  # 约 0.80 M token，每篇只看一遍
    "max_length": 224,  # 正好装得下两篇文档
    "per_device_train_batch_size": 4,
    "learning_rate": 2e-3,
    "adam_beta2": 0.98,
    "save_steps": 250,
    "logging_steps": 20,
}
PRESETS = {
    "tiny": TINY,
    "full": {
        "dataset": "pleisto/wikipedia-cn-20230720-filtered",
        "max_train_samples": 3000,
        "max_length": 512,
        "per_device_train_batch_size": 8,
        "learning_rate": 2e-5,
    },
}


def check_hardware(wanted: str, other: str) -> None:
    """脚本的硬件配置与这台机器不符时说一声，然后用机器上有的。"""
    device = pick_device()
    if device.type != wanted:
        print(
            f"这份配置是给 {wanted.upper()} 的，这台机器用 {device.type.upper()}，照常训练（另一份配置：{other}）。"
        )


def encode_documents(tokenizer, rows: list[dict]) -> list[list[int]]:
    """每篇文档的 token，末尾加结束符。正文里写着 <|endoftext|> 也只当普通文字切开，不会从中间断成两篇。"""
    texts = [row["text"] for row in rows]
    encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [[*ids, tokenizer.eos_token_id] for ids in encoded]


class Blocks(Dataset):
    """打包好的块；一块是几篇完整的文档。"""

    def __init__(self, blocks: list[list[list[int]]]):
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> list[list[int]]:
        return self.blocks[index]


def causal_lm_loss(logits: torch.Tensor, labels: torch.Tensor, n_labels) -> torch.Tensor:
    """logits (B, T, V)、labels (B, T) → 标量：位置 t 的 logits 预测位置 t+1 的 token。

    除以整个更新步的标签数 n_labels 而不是各批各自求平均：梯度累积 8×1 才与 1×8 相同。
    """
    labels = F.pad(labels[:, 1:], (0, 1), value=IGNORE)  # 移标签而不移 logits：后者大得多，切一刀就要抄一遍
    shifted = F.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    return shifted / n_labels


class PretrainTrainer(ExactTrainer, Trainer):
    """只换掉损失：算式写在上面，看得见。"""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"]
        # 不传 attention_mask：position_ids 的归零处就是文档边界，注意力不会越过它。
        logits = model(
            input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False
        ).logits
        n_labels = num_items_in_batch if num_items_in_batch is not None else (labels != IGNORE).sum()
        return causal_lm_loss(logits, labels, n_labels)


@torch.no_grad()
def heldout_loss(model, blocks: list, collate, batch_size: int) -> float:
    """留出文档上每个 token 的平均损失（nats）。"""
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(blocks), batch_size):
        batch = {k: v.to(model.device) for k, v in collate(blocks[start : start + batch_size]).items()}
        labels = batch.pop("labels")
        total += causal_lm_loss(model(**batch, use_cache=False).logits, labels, 1).item()
        count += (labels[:, 1:] != IGNORE).sum().item()
    model.train()
    return total / count


def recap_accuracy(model, tokenizer, n: int = 500) -> float:
    """留出故事的回顾题："回想一下，小刚去了" 后面，贪心接出来的是不是"花园"。"""
    rows = world.recap_prompts(n, EVAL_SEED)
    replies = generate(model, tokenizer, [tokenizer(row["prompt"])["input_ids"] for row in rows], 4)
    right = [tokenizer.decode(ids).startswith(row["answer"]) for row, ids in zip(rows, replies, strict=True)]
    return sum(right) / n


def train(stage: Stage) -> dict:
    settings = stage.settings
    tokenizer, model = load_causal_lm(stage.model_path)

    # 1. 数据：每篇文档末尾加结束符，再装进等长的块
    train_rows, heldout_rows, data = load_train_and_eval(settings, "documents", to_texts)

    block = settings.max_length
    documents, heldout = (encode_documents(tokenizer, rows) for rows in (train_rows, heldout_rows))
    if long := sum(len(ids) > block for ids in documents):
        print(f"{long} 篇文档超过 {block} 个 token，切成几块接着用，不丢 token。")
    blocks, heldout_blocks = pack_documents(documents, block), pack_documents(heldout, block)
    n_tokens = sum(map(len, documents))
    print(
        f"{len(documents)} 篇文档、{n_tokens} 个 token，装成 {len(blocks)} 块，填充 {1 - n_tokens / len(blocks) / block:.1%}"
    )
    collate = partial(collate_blocks, block_size=block, pad_id=tokenizer.pad_token_id)

    # 2. 训练前先量一次留出损失
    measure = partial(heldout_loss, model, heldout_blocks, collate, settings.per_device_train_batch_size)
    model.to(stage.device)
    before = measure()

    # 3. 训练
    progress = Progress(stage, "预训练", [sum(map(len, block)) for block in blocks])
    trainer = PretrainTrainer(
        model=model,
        args=TrainingArguments(**trainer_arguments(stage)),
        train_dataset=Blocks(blocks),
        data_collator=collate,
        processing_class=tokenizer,
    )
    run_trainer(trainer, progress, stage.checkpoint())

    # 4. 训练后再量
    after = measure()
    n_chars = sum(len(row["text"]) for row in heldout_rows)
    n_predicted = sum(len(piece) - 1 for b in heldout_blocks for piece in b)
    metrics = {
        "heldout_loss_before": before,
        "heldout_loss": after,
        "heldout_perplexity_before": math.exp(min(before, 50)),
        "heldout_perplexity": math.exp(min(after, 50)),
        "bits_per_char_before": before * n_predicted / n_chars / math.log(2),
        "bits_per_char": after * n_predicted / n_chars / math.log(2),
        **progress.metrics,
    }
    if settings.dataset == "tiny_world":
        floor = sum(row["nats"] for row in heldout_rows) / n_predicted
        metrics |= {
            "entropy_floor": floor,
            "loss_over_floor": after / floor,
            "recap_accuracy": recap_accuracy(model, tokenizer),
        }
        chat, _, _ = measure_chat(
            model, tokenizer, world.heldout_questions(settings.max_eval_samples, EVAL_SEED)
        )
        metrics["qa_accuracy"] = chat["qa_accuracy"]
    return stage.finish(
        model, tokenizer, metrics, data, loss_curve(trainer.state.log_history), full_state(trainer)
    )


def main(
    argv: list[str] | None = None, presets: dict = PRESETS, wanted: str | None = None, other: str = ""
) -> dict:
    """presets、wanted、other：哪一份硬件配置、给哪种设备、另一份在哪个文件（pretrain_chinese-*.py 给）。"""
    settings = parse_settings(StageSettings, presets, argv, CHAIN.full_model)
    if wanted:
        check_hardware(wanted, other)
    return run_stage("pretrain", settings, {"model": "base"}, train, CHAIN)


if __name__ == "__main__":
    run_main(main)
