"""预训练一个小 BERT：遮住一些字，让模型猜（MLM）。不要标签，所以文字要多少有多少。

bert_finetune_sentiment.py 的 tiny 预设先做这一步；公式在本文件夹的 README.md。
参考：Devlin et al. 2019（BERT）第 3.1 节。
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from nlp_common.base.device import precision_flags
from nlp_common.fast.bert_rows import chosen_outputs, use_read_rows
from nlp_common.lm.losses import IGNORE
from nlp_common.tiny.bert import character_tokenizer, small_config
from nlp_common.train.stage import Stage, open_result

if TYPE_CHECKING:
    from bert_finetune_sentiment import SentimentSettings

# 随机权重的标准差。BERT 的 0.02 是给 768 维的；128 维还用它，各层的输出太小，预训练很久才有起色。
INITIALIZER_RANGE = 0.08


def mask_tokens(ids: torch.Tensor, tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T) 的 token → 遮过的 token，和标签：只有要猜的位置留着原来的 token，其余是 IGNORE。

    每个字有 15% 的机会被选中；选中的 80% 换成 [MASK]，10% 换成随便一个字，10% 不动。全换成 [MASK] 的话，
    模型只会在看到 [MASK] 时动脑筋，而微调时一个 [MASK] 也没有。
    """
    n_special = len(tokenizer.all_special_ids)  # 字表的头几个，不遮
    chosen = (torch.rand(ids.shape, device=ids.device) < 0.15) & (ids >= n_special)
    labels = ids.masked_fill(~chosen, IGNORE)
    dice = torch.rand(ids.shape, device=ids.device)
    anything = torch.randint(n_special, len(tokenizer), ids.shape, device=ids.device)
    masked = torch.where(chosen & (dice < 0.8), tokenizer.mask_token_id, ids)
    masked = torch.where(chosen & (dice >= 0.9), anything, masked)
    return masked, labels


def mlm_loss(model, ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """猜被选中的字的交叉熵。只在这些位置算输出层：它要给字表里每个字打分，是小模型里最贵的一步。"""
    chosen = labels != IGNORE
    hidden = chosen_outputs(model, ids, attention_mask, chosen)  # (M, C)
    scores = model.cls(hidden)  # (M, V)
    return F.cross_entropy(scores.float(), labels[chosen])


def small_bert(settings: SentimentSettings, texts: list[str]):
    """→ (从 texts 数出字表的分词器, 小 BERT 的尺寸)。"""
    tokenizer = character_tokenizer(texts, min_count=5)
    size = (len(tokenizer), settings.hidden_size, settings.num_layers)
    return tokenizer, small_config(*size, initializer_range=INITIALIZER_RANGE)


def cut(texts: list[str], size: int) -> list[str]:
    """长文字切成不超过 size 个字的几段。"""
    return [text[i : i + size] for text in texts for i in range(0, len(text), size)]


def pretrain(settings: SentimentSettings, texts: list[str], folder: Path, whole: Stage) -> str:
    """搭一个小 BERT，用没有标签的 texts 预训练，存成和 bert-base-chinese 一样布局的文件夹；已有就直接用。

    whole 是整个微调：曲线记在它那里。
    """
    from transformers import BertForMaskedLM, DataCollatorWithPadding, TrainingArguments

    from nlp_common.train.trainer import BucketTrainer, Progress, curves, run_trainer, trainer_arguments

    names = ("seed", "max_length", "hidden_size", "num_layers", "mlm_epochs", "mlm_learning_rate")
    wanted = {name: getattr(settings, name) for name in names}
    wanted["texts_sha256"] = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
    with open_result(folder, "mlm", settings, wanted, reuse="derived") as stage:
        stage.part_of(whole)
        if stage.record:
            print(f"用已有的预训练结果 {folder.name}")
            return str(folder)
        tokenizer, config = small_bert(settings, texts)
        model = use_read_rows(BertForMaskedLM(config))
        print(f"小 BERT：{model.num_parameters():,} 个参数，字表 {len(tokenizer):,} 个")
        if settings.mlm_epochs == 0:
            stage.finish(model, tokenizer, {}, {"texts": 0}, [])
            return str(folder)

        class MLMTrainer(BucketTrainer):
            def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                ids, labels = mask_tokens(inputs["input_ids"], tokenizer)  # 每一遍遮的字都不同
                return mlm_loss(model, ids, inputs["attention_mask"], labels)

        pieces = cut(texts, settings.max_length - 2)  # 加上 [CLS]、[SEP] 正好
        ids = tokenizer(pieces, truncation=True, max_length=settings.max_length)["input_ids"]
        rows = [{"input_ids": row} for row in ids]
        print(
            f"预训练：{len(texts):,} 段没有标签的文字，切成 {len(rows):,} 行，读 {settings.mlm_epochs:g} 遍"
        )
        kwargs = trainer_arguments(
            stage,
            learning_rate=settings.mlm_learning_rate,
            num_train_epochs=settings.mlm_epochs,
            save_steps=0.2,
            logging_steps=0.02,
            **precision_flags(stage.device, settings.bf16, cpu_bf16=True),
        )
        progress = Progress("预训练", [len(row["input_ids"]) for row in rows], stage.seconds, stage.report)
        trainer = MLMTrainer(
            model=model,
            args=TrainingArguments(**kwargs),
            train_dataset=rows,
            data_collator=DataCollatorWithPadding(tokenizer),
        )
        run_trainer(trainer, progress, stage.checkpoint())
        show_guesses(model, tokenizer, "房间很干净，服务也很[MASK]。")
        data = {"texts": len(texts), "rows": len(rows)}
        stage.finish(model, tokenizer, progress.metrics, data, curves(trainer.state.log_history))
    return str(folder)


@torch.inference_mode()
def show_guesses(model, tokenizer, text: str) -> None:
    """看看预训练学到了什么：[MASK] 处它猜什么字。"""
    model.eval()
    inputs = tokenizer(text, return_tensors="pt").to(model.device)
    place = (inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero().item()
    best = model(**inputs).logits[0, place].softmax(-1).topk(5)
    guesses = "  ".join(
        f"{tokenizer.decode([i])} {p:.2f}" for p, i in zip(best.values, best.indices, strict=True)
    )
    print(f"  {text} → {guesses}")
