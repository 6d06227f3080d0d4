"""中文预训练：在文档上学"下一个 token 是什么"。

学到什么：文档怎样打包成块而不互相偷看；因果语言模型的损失；怎样知道预训练已经到头。

运行（nvidia、mac 两个文件是它的两套硬件配置，同一段代码）：
    python pretrain_chinese-nvidia.py                      # 自动选预设
    python pretrain_chinese-nvidia.py --preset tiny        # 离线小世界，CPU 约一分钟
    python pretrain_chinese-nvidia.py --preset full        # Qwen1.5-0.5B + 中文维基，CUDA
    python pretrain_chinese-nvidia.py --preset tiny --dataset people_daily   # 真实语料，不用下载
    python pretrain_chinese-nvidia.py --preset tiny --trainer library        # 换成 transformers 的 Trainer

预期输出（tiny，实测见本文件夹的 README.md）：留出损失降到语法熵的 1.03 倍以内，回顾题全对，
但问它问题一题也答不对：它只会续写，还不会对话。

参考：Radford et al. 2018（GPT）；Krell et al. 2021（无跨文档污染的打包）。
"""

from nlp_common.base.cli import run_main

import math
from functools import partial

import torch
import torch.nn.functional as F

from chain import CHAIN
from nlp_common.base.device import pick_device
from nlp_common.data.chats import to_texts
from nlp_common.lm.generation import generate
from nlp_common.lm.loading import load_causal_lm
from nlp_common.lm.losses import IGNORE
from nlp_common.lm.packing import collate_blocks, cut_long, pack_documents
from nlp_common.tiny import world
from nlp_common.tiny.judge import measure_chat
from nlp_common.train.chain import run_stage
from nlp_common.train.loop import Trained, train_loop
from nlp_common.train.settings import StageSettings, parse_settings
from nlp_common.train.splits import EVAL_SEED, load_train_and_eval
from nlp_common.train.stage import Stage
from nlp_common.train.trainer import run_library, trainer_arguments

PRESETS = {
    "tiny": {
        "dataset": "tiny_world",
        "max_train_samples": 7600,  # 约 0.80 M token，每篇只看一遍
        "max_length": 224,  # 正好装得下两篇文档
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-3,
        "adam_beta2": 0.98,
        "save_steps": 250,
        "logging_steps": 20,
    },
    "full": {
        "dataset": "pleisto/wikipedia-cn-20230720-filtered",
        "max_train_samples": 3000,
        "max_length": 512,
        "per_device_train_batch_size": 8,
        "learning_rate": 2e-5,
    },
}

# ---------------------------------------------------------------- 1. 数据：文档 → token → 等长的块


def encode_documents(tokenizer, rows: list[dict]) -> list[list[int]]:
    """每篇文档的 token，末尾加结束符。正文里写着 <|endoftext|> 也只当普通文字切开，不会从中间断成两篇。"""
    texts = [row["text"] for row in rows]
    encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [[*ids, tokenizer.eos_token_id] for ids in encoded]


# ---------------------------------------------------------------- 2. 损失


def causal_lm_loss(model, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict]:
    """一批块里每个 token 的交叉熵 −log p(x_t | x_<t)（Radford et al. 2018 式 1），加起来；x_<t 只含同一篇文档里的。

    batch：input_ids、position_ids、labels 都是 (B, T)。位置 t 的 logits 预测位置 t+1 的 token。
    训练循环会把它除以整个更新步的标签数。
    """
    # 不传 attention_mask：position_ids 的归零处就是文档边界，注意力不会越过它。
    logits = model(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
    ).logits  # (B, T, V)
    labels = F.pad(
        batch["labels"][:, 1:], (0, 1), value=IGNORE
    )  # 移标签而不移 logits：后者大得多，切一刀就要抄一遍
    loss = F.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    return loss, {}


# ---------------------------------------------------------------- 3. 训练


def train(stage: Stage) -> dict:
    settings = stage.settings
    tokenizer, model = load_causal_lm(stage.model_path)
    train_rows, heldout_rows, data = load_train_and_eval(settings, "documents", to_texts)

    # 每篇文档末尾加结束符，再装进等长的块
    block = settings.max_length
    documents, heldout = (encode_documents(tokenizer, rows) for rows in (train_rows, heldout_rows))
    if long := sum(len(ids) > block for ids in documents):
        print(f"{long} 篇文档超过 {block} 个 token，切成几块接着用，不丢 token。")
    blocks, heldout_blocks = (pack_documents(cut_long(each, block), block) for each in (documents, heldout))
    tokens = [sum(map(len, each)) for each in blocks]
    padding = 1 - sum(tokens) / len(blocks) / block
    print(f"{len(documents)} 篇文档、{sum(tokens)} 个 token，装成 {len(blocks)} 块，填充 {padding:.1%}")
    collate = partial(collate_blocks, block_size=block, pad_id=tokenizer.pad_token_id)

    model.to(stage.device)
    measure = partial(heldout_loss, model, heldout_blocks, collate, settings.per_device_train_batch_size)
    before = measure()
    if settings.trainer == "library":
        trained = train_with_transformers(stage, model, blocks, collate, tokens)
    else:
        trained = train_loop(stage, "预训练", model, blocks, collate, causal_lm_loss, tokens)
    metrics = describe_loss(before, measure(), heldout_rows, heldout_blocks) | trained.metrics
    if settings.dataset == "tiny_world":
        metrics |= tiny_metrics(
            model, tokenizer, metrics["heldout_loss"], heldout_rows, heldout_blocks, settings
        )
    return stage.finish(model, tokenizer, metrics, data, trained.history, state=trained.state)


def train_with_transformers(stage: Stage, model, blocks: list, collate, tokens: list[int]) -> Trained:
    """--trainer library：同样的块，交给 transformers 原样的 Trainer；损失是 Qwen2ForCausalLM 自带的。"""
    from transformers import Trainer, TrainingArguments

    trainer = Trainer(
        model=model,
        args=TrainingArguments(**trainer_arguments(stage)),
        train_dataset=blocks,
        data_collator=collate,
    )
    return run_library(trainer, stage, "预训练（Trainer）", tokens)


# ---------------------------------------------------------------- 4. 评测


@torch.no_grad()
def heldout_loss(model, blocks: list, collate, batch_size: int) -> float:
    """留出文档上每个 token 的平均损失（nats）。"""
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(blocks), batch_size):
        batch = {k: v.to(model.device) for k, v in collate(blocks[start : start + batch_size]).items()}
        total += causal_lm_loss(model, batch)[0].item()
        count += (batch["labels"][:, 1:] != IGNORE).sum().item()
    model.train()
    return total / count


def n_predicted(blocks: list) -> int:
    """要预测几个 token：每篇的第一个没有前文，不算。"""
    return sum(len(document) - 1 for block in blocks for document in block)


def describe_loss(before: float, after: float, rows: list[dict], blocks: list) -> dict[str, float]:
    """留出损失、困惑度，以及平均每个字要多少比特（分词器不同也能相比）。"""
    tokens_per_char = n_predicted(blocks) / sum(len(row["text"]) for row in rows)
    metrics = {}
    for suffix, loss in (("_before", before), ("", after)):
        metrics[f"heldout_loss{suffix}"] = loss
        metrics[f"heldout_perplexity{suffix}"] = math.exp(min(loss, 50))
        metrics[f"bits_per_char{suffix}"] = loss * tokens_per_char / math.log(2)
    return metrics


def tiny_metrics(model, tokenizer, loss: float, rows: list[dict], blocks: list, settings) -> dict[str, float]:
    """小世界里才算得出的：损失离语法的熵多远，回顾题接对多少，问它问题答对多少。"""
    floor = sum(row["nats"] for row in rows) / n_predicted(blocks)
    questions = world.heldout_questions(settings.max_eval_samples, EVAL_SEED)
    return {
        "entropy_floor": floor,
        "loss_over_floor": loss / floor,
        "recap_accuracy": recap_accuracy(model, tokenizer),
        "qa_accuracy": measure_chat(model, tokenizer, questions)[0]["qa_accuracy"],
    }


def recap_accuracy(model, tokenizer, n: int = 500) -> float:
    """留出故事的回顾题："回想一下，小刚去了" 后面，贪心接出来的是不是"花园"。"""
    rows = world.recap_prompts(n, EVAL_SEED)
    replies = generate(model, tokenizer, [tokenizer(row["prompt"])["input_ids"] for row in rows], 4)
    right = [tokenizer.decode(ids).startswith(row["answer"]) for row, ids in zip(rows, replies, strict=True)]
    return sum(right) / n


# ---------------------------------------------------------------- 5. 主程序


def check_hardware(wanted: str, other: str) -> None:
    """硬件配置与这台机器不符时说一声，然后用机器上有的。"""
    device = pick_device()
    if device.type != wanted:
        print(
            f"这份配置是给 {wanted.upper()} 的，这台机器用 {device.type.upper()}，照常训练（另一份配置：{other}）。"
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
