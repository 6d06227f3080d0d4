"""奖励模型：SFT 模型换上一个标量头，学会给好回答打更高的分。PPO 用它当老师。

学到什么：成对的偏好怎样变成一个分数（Bradley–Terry）；分数为什么只在最后一个真实 token 上读；
怎样知道奖励模型学到的是"对不对"，而不只是"客气不客气"。

运行：
    python reward_model.py                                 # 自动选预设
    python reward_model.py --preset tiny                   # 离线小世界
    python reward_model.py --preset full                   # DPO-En-Zh-20k 偏好数据，需要加速器

预期输出（tiny，实测见本文件夹的 README.md）：留出偏好对的正确率 97% 以上；
各类回答的平均分从高到低：有礼的整句、整句、单词、答错、敷衍。

参考：Ouyang et al. 2022（InstructGPT）式 1；Stiennon et al. 2020。
"""

from nlp_common.base.cli import run_main

from functools import partial
from statistics import mean

import torch
import torch.nn.functional as F

from chain import CHAIN
from nlp_common.data.chats import to_pairs
from nlp_common.lm.loading import load_reward_model, load_tokenizer
from nlp_common.lm.pairs import collate_pairs, count_pairs, encode_pair, pair_length, pair_tokens
from nlp_common.train.chain import run_stage
from nlp_common.train.loop import Trained, train_loop
from nlp_common.train.settings import StageSettings, parse_settings
from nlp_common.train.splits import drop_long, load_train_and_eval
from nlp_common.train.stage import Stage
from nlp_common.train.trainer import run_library, trainer_arguments

PRESETS = {
    "tiny": {
        "dataset": "tiny_world",
        "max_train_samples": 5000,
        "max_length": 256,
        "per_device_train_batch_size": 16,
        "learning_rate": 1e-3,
        "adam_beta2": 0.98,
    },
    "full": {
        "dataset": "shibing624/DPO-En-Zh-20k-Preference:zh",
        "max_train_samples": 5000,
        "max_length": 512,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "learning_rate": 1e-5,
    },
}

# ---------------------------------------------------------------- 1. 损失


def pairwise_loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """−log σ(r_好 − r_差)，(B,) 与 (B,) → (B,)：只要求好回答的分更高，分数的零点在哪里不管。"""
    return -F.logsigmoid(chosen - rejected)


def score_pairs(model, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(2B, T) → 好、差回答的分数各 (B,)。

    AutoModelForSequenceClassification 在最后一个不是填充的 token 上读分数：只有那里看过了整个回答。
    回答不带 <|im_end|>，这个 token 就是回答的最后一个字；有没有说完，由 PPO 的罚分去管。
    """
    scores = model(input_ids=input_ids, use_cache=False).logits.squeeze(-1).float()  # (2B,)
    return scores.chunk(2)


def reward_loss(model, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict]:
    """一批偏好对的损失之和，以及每对判对了没有。"""
    chosen, rejected = score_pairs(model, batch["input_ids"])
    return pairwise_loss(chosen, rejected).sum(), {"accuracy": chosen > rejected}


# ---------------------------------------------------------------- 2. 评测


@torch.no_grad()
def evaluate(model, rows: list[dict], pad_id: int, batch_size: int) -> dict:
    """留出对上的损失、正确率，以及各类回答（小世界里知道类别）的平均分。"""
    model.eval()
    scores: list[tuple[float, float]] = []
    for start in range(0, len(rows), batch_size):
        input_ids = collate_pairs(rows[start : start + batch_size], pad_id)["input_ids"].to(model.device)
        scores += zip(*(half.tolist() for half in score_pairs(model, input_ids)), strict=True)
    model.train()
    chosen, rejected = torch.tensor(scores).T
    metrics = {
        "heldout_loss": pairwise_loss(chosen, rejected).mean().item(),
        "pair_accuracy": (chosen > rejected).float().mean().item(),
        "margin": (chosen - rejected).mean().item(),
    }
    if "kinds" in rows[0]:
        by_kind: dict[str, list[float]] = {}
        for row, both in zip(rows, scores, strict=True):
            for kind, score in zip(row["kinds"], both, strict=True):
                by_kind.setdefault(kind, []).append(score)
        means = {kind: round(mean(values), 2) for kind, values in by_kind.items()}
        metrics["mean_score"] = dict(sorted(means.items(), key=lambda item: -item[1]))
    return metrics


# ---------------------------------------------------------------- 3. 训练


def train(stage: Stage) -> dict:
    settings = stage.settings
    tokenizer = load_tokenizer(stage.model_path)
    model = load_reward_model(stage.model_path, tokenizer)
    train_rows, heldout_rows, data = load_train_and_eval(settings, "pairs", to_pairs)
    rows = [encode_pair(tokenizer, row, with_end=False) for row in train_rows]
    rows = drop_long(rows, pair_length, settings.max_length, "训练数据")
    heldout = [row | encode_pair(tokenizer, row, with_end=False) for row in heldout_rows]
    heldout = drop_long(heldout, pair_length, settings.max_length, "留出数据")
    model.to(stage.device)
    before = evaluate(model, heldout, tokenizer.pad_token_id, settings.per_device_train_batch_size)

    lengths, tokens = [pair_length(row) for row in rows], [pair_tokens(row) for row in rows]
    if settings.trainer == "library":
        trained = train_with_trl(stage, model, tokenizer, rows, tokens)
    else:
        pad = partial(collate_pairs, pad_id=tokenizer.pad_token_id)
        trained = train_loop(
            stage, "奖励模型", model, rows, pad, reward_loss, tokens, lengths=lengths, count=count_pairs
        )

    metrics = {"pair_accuracy_before": before["pair_accuracy"]}
    metrics |= evaluate(model, heldout, tokenizer.pad_token_id, settings.per_device_train_batch_size)
    metrics |= trained.metrics
    if "mean_score" in metrics:
        print("  各类回答的平均分：", "  ".join(f"{k} {v:+.2f}" for k, v in metrics["mean_score"].items()))
    return stage.finish(model, tokenizer, metrics, data, trained.history, state=trained.state)


def train_with_trl(stage: Stage, model, tokenizer, rows: list[dict], tokens: list[int]) -> Trained:
    """--trainer library：同样的行，交给 TRL 原样的 RewardTrainer。它要的是提示与回答接好的 token。"""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    whole = [
        {
            "chosen_ids": row["prompt_ids"] + row["chosen_ids"],
            "rejected_ids": row["prompt_ids"] + row["rejected_ids"],
        }
        for row in rows
    ]
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(**trainer_arguments(stage), max_length=None),
        train_dataset=Dataset.from_list(whole),
        processing_class=tokenizer,
    )
    return run_library(trainer, stage, "奖励模型（TRL）", tokens)


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(StageSettings, PRESETS, argv, CHAIN.full_model)
    return run_stage("reward", settings, {"model": "sft"}, train, CHAIN)


if __name__ == "__main__":
    run_main(main)
