"""DPO：不训练奖励模型、不采样，直接用偏好对调整 SFT 模型。

学到什么：DPO 的损失为什么只需要四个对数概率；参考模型为什么要冻住；隐式奖励的差（margin）怎么读。

运行：
    python dpo_chinese_qwen.py                             # 自动选预设
    python dpo_chinese_qwen.py --preset tiny               # 离线小世界
    python dpo_chinese_qwen.py --preset full               # DPO-En-Zh-20k 偏好数据，需要加速器

预期输出（tiny，实测见本文件夹的 README.md）：采样回答又对、又完整、又有礼的比例从两成多升到 95% 以上，
贪心正确率不降。

参考：Rafailov et al. 2023（DPO）式 7；Pang et al. 2024（好回答上的 SFT 项）。
"""

from nlp_common.base.cli import run_main

import time
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from chain import CHAIN
from nlp_common.base.arguments import option
from nlp_common.base.processes import gather, my_share
from nlp_common.data.chats import to_pairs
from nlp_common.lm.generation import batches_by_length
from nlp_common.lm.loading import load_chat_lm
from nlp_common.lm.losses import IGNORE, token_logps
from nlp_common.lm.pairs import collate_pairs, count_pairs, encode_pair, pair_length, pair_tokens
from nlp_common.tiny import world
from nlp_common.tiny.judge import measure_chat
from nlp_common.train.chain import run_stage
from nlp_common.train.loop import Trained, train_loop
from nlp_common.train.settings import StageSettings, parse_settings
from nlp_common.train.splits import EVAL_SEED, drop_long, load_train_and_eval
from nlp_common.train.stage import Stage
from nlp_common.train.trainer import run_library, trainer_arguments

PRESETS = {
    "tiny": {
        "dataset": "tiny_world",
        "max_train_samples": 3000,
        "max_length": 256,
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-4,
        "adam_beta2": 0.98,
        "beta": 0.3,  # 要的只是换口气：比常用的 0.1 大，margin 早些饱和，不至于越推越远、冒出怪字
        "sft_weight": 0.25,
    },
    "full": {
        "dataset": "shibing624/DPO-En-Zh-20k-Preference:zh",
        "max_train_samples": 5000,
        "max_length": 512,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "learning_rate": 5e-6,
        "beta": 0.1,
        "sft_weight": 0.2,
    },
}


@dataclass
class DPOSettings(StageSettings):
    beta: float | None = option("离参考模型多远的代价：越小走得越远")
    sft_weight: float | None = option("好回答上的 SFT 损失占多大的权重；0 是原来的 DPO")


# ---------------------------------------------------------------- 1. 数据与损失


def encode(tokenizer, row: dict) -> dict[str, list[int]]:
    """一对 → token；好回答带着结尾的 <|im_end|>，差回答不带。

    差回答差在内容，不差在"说完了"。两边都带，压低差回答时连 <|im_end|> 一起压低，模型就学会了说个没完。
    """
    pair = encode_pair(tokenizer, row)
    pair["rejected_ids"].pop()
    return pair


def collate(rows: list[dict], pad_id: int) -> dict[str, torch.Tensor]:
    """B 对 → input_ids、labels (2B, T)，前 B 行是好回答；ref_logps (2B,) 是参考模型的对数概率。"""
    ref_logps = [row["ref_chosen"] for row in rows] + [row["ref_rejected"] for row in rows]
    return collate_pairs(rows, pad_id) | {"ref_logps": torch.tensor(ref_logps)}


def sequence_logps(model, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """整个回答的对数概率 log π(y|x) = Σ_t log π(y_t | x, y_<t)。(N, T) 与 (N, T) → (N,)。"""
    return token_logps(model, input_ids, labels).sum(1)


def dpo_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    ref_chosen: torch.Tensor,
    ref_rejected: torch.Tensor,
    beta: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """四个 (B,) 的对数概率 → (每对的损失, 隐式奖励的差)，都是 (B,)。

    隐式奖励 r(x, y) = β·[log π(y|x) − log π_ref(y|x)]，损失是 −log σ(r_好 − r_差)。
    """
    margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    return -F.logsigmoid(margin), margin


def chosen_sft_loss(chosen: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """好回答的 SFT 损失，按各自的 token 数平均，(B,)；chosen：(B,) 的对数概率，labels：(2B, T)，前 B 行是好回答。

    DPO 只管好坏之差：好回答自己的概率往往也跟着降（likelihood displacement），降多了就冒出怪字。
    加上这一项就拉住了它（Pang et al. 2024 式 1；Llama 3 也这样做）。
    """
    return -chosen / (labels[: len(chosen), 1:] != IGNORE).sum(1)


def pair_loss(
    model, batch: dict[str, torch.Tensor], beta: float, sft_weight: float
) -> tuple[torch.Tensor, dict]:
    """一批偏好对的损失之和，以及每对的隐式奖励差、差得对不对。"""
    chosen, rejected = sequence_logps(model, batch["input_ids"], batch["labels"]).chunk(2)
    loss, margin = dpo_loss(chosen, rejected, *batch["ref_logps"].chunk(2), beta)
    loss = loss + sft_weight * chosen_sft_loss(chosen, batch["labels"])
    return loss.sum(), {"rewards/margins": margin, "rewards/accuracies": margin > 0}


# ---------------------------------------------------------------- 2. 参考模型与评测


@torch.no_grad()
def logps_of(model, rows: list[dict], pad_id: int, batch_size: int) -> torch.Tensor:
    """每对的 (log π(好), log π(差))，形状 (N, 2)。长度相近的排在一批里算。"""
    model.eval()
    result = torch.empty(len(rows), 2)
    for batch in batches_by_length([pair_length(row) for row in rows], batch_size):
        inputs = {k: v.to(model.device) for k, v in collate_pairs([rows[i] for i in batch], pad_id).items()}
        result[batch] = torch.stack(sequence_logps(model, **inputs).chunk(2), 1).cpu()
    model.train()
    return result


def add_references(reference, rows: list[dict], pad_id: int, batch_size: int) -> None:
    """每行添上 ref_chosen、ref_rejected。参考模型不动，算一遍就够，不必每步重算；几个进程各算一段。"""
    found = gather(logps_of(reference, my_share(rows), pad_id, batch_size).tolist())
    for row, logps in zip(rows, found, strict=True):
        row["ref_chosen"], row["ref_rejected"] = logps


def heldout_metrics(model, rows: list[dict], ref: torch.Tensor, pad_id: int, settings) -> dict:
    """留出对上的损失、隐式奖励的差、以及差大于 0（偏好对了）的比例。"""
    logps = logps_of(model, rows, pad_id, settings.per_device_train_batch_size)
    loss, margin = dpo_loss(*logps.T, *ref.T, settings.beta)
    return {
        "heldout_loss": loss.mean().item(),
        "margin": margin.mean().item(),
        "preference_accuracy": (margin > 0).float().mean().item(),
    }


# ---------------------------------------------------------------- 3. 训练


def train(stage: Stage) -> dict:
    settings = stage.settings
    tokenizer, model = load_chat_lm(stage.model_path, stage.device)
    _, reference = load_chat_lm(stage.model_path, stage.device)  # 冻住的 SFT 模型
    pad_id, batch = tokenizer.pad_token_id, settings.per_device_train_batch_size

    train_rows, heldout_rows, data = load_train_and_eval(settings, "pairs", to_pairs)
    rows = [encode(tokenizer, row) for row in train_rows]
    rows = drop_long(rows, pair_length, settings.max_length, "训练数据")
    heldout = [encode(tokenizer, row) for row in heldout_rows]
    heldout = drop_long(heldout, pair_length, settings.max_length, "留出数据")

    started = time.perf_counter()
    add_references(reference, rows, pad_id, batch)
    reference_seconds = round(time.perf_counter() - started, 2)
    heldout_ref = logps_of(reference, heldout, pad_id, batch)

    lengths, tokens = [pair_length(row) for row in rows], [pair_tokens(row) for row in rows]
    if settings.trainer == "library":
        trained = train_with_trl(stage, model, reference, tokenizer, rows, tokens)
    else:
        pad = partial(collate, pad_id=pad_id)
        loss = partial(pair_loss, beta=settings.beta, sft_weight=settings.sft_weight)
        trained = train_loop(stage, "DPO", model, rows, pad, loss, tokens, lengths=lengths, count=count_pairs)

    metrics = heldout_metrics(model, heldout, heldout_ref, pad_id, settings) | trained.metrics
    metrics["reference_seconds"] = reference_seconds  # 不在 train_seconds 里
    if settings.dataset == "tiny_world":
        questions = world.heldout_questions(settings.max_eval_samples, EVAL_SEED)
        before = measure_chat(reference, tokenizer, questions)[0]
        metrics |= {f"{k}_before": before[k] for k in ("qa_accuracy", "preferred_rate")}
        metrics |= measure_chat(model, tokenizer, questions)[0]
    return stage.finish(model, tokenizer, metrics, data, trained.history, state=trained.state)


def train_with_trl(stage: Stage, model, reference, tokenizer, rows: list[dict], tokens: list[int]) -> Trained:
    """--trainer library：同样的行，交给 TRL 原样的 DPOTrainer；参考模型的对数概率它每步自己算。

    它的 SFT 项按整批的 token 平均，我们的按每个回答平均；--sft_weight 0 时两边是同一个损失。
    """
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    weight = stage.settings.sft_weight
    args = DPOConfig(
        **trainer_arguments(stage),
        max_length=None,
        beta=stage.settings.beta,
        loss_type=["sigmoid", "sft"] if weight else ["sigmoid"],
        loss_weights=[1.0, weight] if weight else [1.0],
    )
    text = [{"prompt": "问", "chosen": "好", "rejected": "差"}]  # TRL 1.16 总要自己分词：给一行应付它
    trainer = DPOTrainer(
        model, reference, args=args, train_dataset=Dataset.from_list(text), processing_class=tokenizer
    )
    trainer.train_dataset = Dataset.from_list(rows)  # 换成分好词的，与上面的循环训练同样的行
    return run_library(trainer, stage, "DPO（TRL）", tokens)


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(DPOSettings, PRESETS, argv, CHAIN.full_model)
    return run_stage("dpo", settings, {"model": "sft"}, train, CHAIN)


if __name__ == "__main__":
    run_main(main)
