"""指令微调（SFT）：让只会续写的预训练模型学会一问一答，并且学会停下来。

学到什么：ChatML 怎样把对话变成 token；为什么只在助手说的话上算损失；模型怎样学会自己说完。
``--show_batch`` 用颜色打印几行 token 和标签：绿色的才是模型要学的。

运行：
    python sft_chinese_qwen.py                             # 自动选预设
    python sft_chinese_qwen.py --preset tiny               # 离线小世界
    python sft_chinese_qwen.py --preset tiny --show_batch  # 看清楚每个 token 的标签
    python sft_chinese_qwen.py --preset tiny --packing     # 几段对话装进一块
    python sft_chinese_qwen.py --preset tiny --trainer library   # 同样的行，换成 TRL 的 SFTTrainer
    python sft_chinese_qwen.py --preset full               # Qwen1.5-0.5B + firefly，需要加速器

预期输出（tiny，实测见本文件夹的 README.md）：贪心回答的正确率从 0 升到 97% 以上，99% 以上自己说完。

参考：Ouyang et al. 2022（InstructGPT）第 3.5 节；ChatML（Qwen 的对话格式）。
"""

from nlp_common.base.cli import run_main

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text

from chain import CHAIN
from nlp_common.base.arguments import option
from nlp_common.base.errors import UserError
from nlp_common.data.chats import to_chats
from nlp_common.draw.tokens import token_boxes
from nlp_common.lm.chat_rows import chat_length, collate, heldout_loss
from nlp_common.lm.chatml import encode_chat, whole_pieces
from nlp_common.lm.loading import end_chat_turns, load_causal_lm
from nlp_common.lm.losses import IGNORE, token_logps
from nlp_common.lm.packing import pack_documents
from nlp_common.lm.replies import reply_to
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
        "max_train_samples": 8000,  # 平均每段三问三答
        "max_length": 256,
        "per_device_train_batch_size": 8,  # 同样的数据，一步 8 段比 16 段学得多：步数多一倍
        "learning_rate": 2e-3,
        "adam_beta2": 0.98,
    },
    "full": {
        "dataset": "YeungNLP/firefly-train-1.1M",
        "max_train_samples": 10_000,
        "max_length": 512,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2.0,
        "learning_rate": 2e-5,
    },
}


@dataclass
class SFTSettings(StageSettings):
    show_batch: bool = option("打印几行训练数据的 token 与标签（绿色算损失），然后退出", False)
    packing: bool = option("几段对话装进一块（--max_length 个 token），互相看不见；损失与分开算时相同", False)


# ---------------------------------------------------------------- 1. 数据：对话 → token 与标签


def encode_row(tokenizer, messages: list[dict]) -> dict[str, list[int]]:
    """一段对话 → input_ids 与等长的 labels：助手说的话（含结尾的 <|im_end|>）留着，其余是 IGNORE。

    结尾的 <|im_end|> 必须算损失：模型就是从这里学会"说完了就停"。
    """
    input_ids, is_answer = encode_chat(tokenizer, messages)
    labels = [token if answer else IGNORE for token, answer in zip(input_ids, is_answer, strict=True)]
    return {"input_ids": input_ids, "labels": labels}


def pack_rows(rows: list[dict], block_size: int) -> list[dict]:
    """几段对话接成一行，position_ids 在每段开头归零：不传 attention_mask，transformers 就据此隔开各段。

    每段的第一个 token 是 <|im_start|>，从来不是标签，所以没有哪个标签要靠前一段来预测。
    """
    packed = []
    for block in pack_documents(rows, block_size, length=chat_length):
        row: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": []}
        for chat in block:
            row["input_ids"] += chat["input_ids"]
            row["labels"] += chat["labels"]
            row["position_ids"] += range(len(chat["input_ids"]))
        packed.append(row)
    return packed


def show_batch(tokenizer, rows: list[dict], picture: Path, n: int = 3) -> None:
    """逐个 token 打印，并画成一张图：绿色是标签（模型要学着说的），灰色只是上文。"""
    console = Console()
    drawn = []
    for row in rows[:n]:
        pieces = whole_pieces(tokenizer, row["input_ids"])
        learned = [label != IGNORE for label in row["labels"]]
        text = Text()
        for piece, is_learned in zip(pieces, learned, strict=True):
            text.append(piece.replace("\n", "⏎\n"), style="bold green" if is_learned else "bright_black")
        console.print(text)
        console.print(f"—— {len(learned)} 个 token，其中 {sum(learned)} 个（绿色）算损失\n", style="cyan")
        drawn.append((pieces, learned))
    token_boxes(picture, drawn)
    print(f"图：{picture}")


# ---------------------------------------------------------------- 2. 损失


def answer_loss(model, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict]:
    """一批对话里，助手的每个 token 的交叉熵 −log π(y_t | x, y_<t)，加起来。

    batch：input_ids、labels 都是 (B, T)；一行装了几段对话时（pack_rows）还有 position_ids。
    训练循环会把它除以整个更新步的标签数，所以累积几批、几个进程，走出的都是同一步。
    """
    return -token_logps(model, **batch).sum(), {}


# ---------------------------------------------------------------- 3. 评测


def show_samples(model, tokenizer, rows: list[dict], n: int = 4) -> list[dict]:
    """打印几个留出问题的贪心回答，返回 ``[{"question", "reference", "reply"}]``。"""
    questions = [{"messages": row["messages"][:-1]} for row in rows[:n]]
    samples = []
    for row, reply in zip(rows, reply_to(model, tokenizer, questions, max_new_tokens=64), strict=False):
        sample = {
            "question": row["messages"][-2]["content"],
            "reference": row["messages"][-1]["content"],
            "reply": reply["text"] + ("" if reply["ended"] else " …（没有说完）"),
        }
        samples.append(sample)
        print(
            f"  问：{sample['question'][-60:]}\n  答：{sample['reply']}\n  参考：{sample['reference'][:60]}"
        )
    return samples


# ---------------------------------------------------------------- 4. 训练


def train(stage: Stage) -> dict:
    settings = stage.settings
    tokenizer, model = load_causal_lm(stage.model_path)
    end_chat_turns(model, tokenizer)
    train_rows, heldout_rows, data = load_train_and_eval(settings, "chats", to_chats)
    rows = [encode_row(tokenizer, row["messages"]) for row in train_rows]
    rows = drop_long(rows, chat_length, settings.max_length, "训练数据")
    if settings.show_batch:
        show_batch(tokenizer, rows, stage.path.parent / "sft-mask.svg")
        return {}
    heldout = [encode_row(tokenizer, row["messages"]) for row in heldout_rows]
    heldout = drop_long(heldout, chat_length, settings.max_length, "留出数据")
    model.to(stage.device)
    before = evaluate(model, tokenizer, heldout, settings)

    if settings.packing:
        n_chats, rows = len(rows), pack_rows(rows, settings.max_length)
        print(f"{n_chats} 段对话装成 {len(rows)} 块")
    lengths = [chat_length(row) for row in rows]
    if settings.trainer == "library":
        trained = train_with_trl(stage, model, tokenizer, rows, lengths)
    else:
        pad = partial(collate, pad_id=tokenizer.pad_token_id)
        trained = train_loop(stage, "SFT", model, rows, pad, answer_loss, tokens=lengths, lengths=lengths)

    metrics = {f"{k}_before": v for k, v in before.items() if k in ("heldout_loss", "qa_accuracy")}
    metrics |= evaluate(model, tokenizer, heldout, settings) | trained.metrics
    samples = show_samples(model, tokenizer, heldout_rows)
    return stage.finish(
        model, tokenizer, metrics, data, trained.history, state=trained.state, samples=samples
    )


def train_with_trl(stage: Stage, model, tokenizer, rows: list[dict], lengths: list[int]) -> Trained:
    """--trainer library：同样的行，交给 TRL 原样的 SFTTrainer。它不按长度分批，别的都与上面的循环相同。"""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    if stage.settings.packing:
        raise UserError("--packing 只用于 --trainer loop：TRL 的打包要 flash attention。")
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**trainer_arguments(stage), max_length=None),
        train_dataset=Dataset.from_list(rows),  # 有 input_ids 与 labels，TRL 就不再分词
        processing_class=tokenizer,
    )
    return run_library(trainer, stage, "SFT（TRL）", lengths)


def evaluate(model, tokenizer, heldout: list[dict], settings) -> dict:
    """留出对话上的损失；小世界里还有答对多少。"""
    batch_size = settings.per_device_train_batch_size
    metrics = {"heldout_loss": heldout_loss(model, heldout, tokenizer.pad_token_id, batch_size)}
    if settings.dataset == "tiny_world":
        questions = world.heldout_questions(settings.max_eval_samples, EVAL_SEED)
        metrics |= measure_chat(model, tokenizer, questions)[0]
    return metrics


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(SFTSettings, PRESETS, argv, CHAIN.full_model)
    return run_stage("sft", settings, {"model": "pretrain"}, train, CHAIN)


if __name__ == "__main__":
    run_main(main)
