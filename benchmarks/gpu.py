"""一块 GPU 上的速度：Qwen1.5-0.5B 的尺寸、随机权重，我们的各阶段对 TRL 的 SFTTrainer 与 DPOTrainer，同样的行、同一次运行。

每行打印一个 JSON：每秒 token 数（不算填充）、每秒行数、显存峰值、MFU；PPO 是每秒回答数。最后是一张 Markdown 表。
我们的一边用各脚本自己的训练器与 ppo_step；TRL 一边是它的默认设置（重算激活），和关掉重算激活的设置。

MFU（model FLOP utilisation）= 这个模型必须做的浮点运算 ÷ 秒数 ÷ 设备的峰值。宽 H、L 层、注意力宽 A、键值宽 K、MLP 宽 I、
词表 V，一行 T 个 token、其中 C 个要算损失，前向是

    4·L·T·H·K + ((L−1)·T + C)·(4·A·H + 6·H·I + 4·T·A) + 2·C·H·V

依次是 k、v，再是 q 与输出投影、MLP、注意力（每个 query 对满 T 列算，不因因果而减半；最后一层只有 C 列用得着），LM head。训练是前向的
3 倍；DPO 的两条再加参考模型的一次前向，共 4 倍。填充、重算激活都不算必须做的，所以它们只会压低 MFU。
DPO 的秒数，我们的一边加上训练前算参考对数概率的时间（TRL 边训练边算）。峰值是各卡公布的 bf16 稠密算力（T4、V100 是
fp16），不在表里的卡用 --peak_tflops 给。

    python benchmarks/gpu.py                          # 一块 24 GB 以上的 CUDA 卡
    python benchmarks/gpu.py --tokenizer 文件夹        # 用它切小世界的行，长短不一；默认是等长的随机 token
    python benchmarks/gpu.py --stages sft --batch 16 --length 1024
    python benchmarks/gpu.py --tiny                   # 两层的小模型，CPU 上几秒，只看跑不跑得通
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace

QWEN = Path(__file__).resolve().parent.parent / "qwen_chinese_finetune"
sys.path.insert(0, str(QWEN))  # 基准不在脚本的文件夹里，要自己找到 chain.py 等

from nlp_common.base.cli import UserError, run_main  # noqa: E402

import sft_chinese_qwen as sft  # noqa: E402
import torch  # noqa: E402
import trl  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
)

import dpo_chinese_qwen as dpo  # noqa: E402
import ppo_alignment as ppo  # noqa: E402
import pretrain_chinese  # noqa: E402
from nlp_common.base.device import describe, peak_gpu_memory_mb, pick_device, precision  # noqa: E402
from nlp_common.lm.chatml import prompt_ids  # noqa: E402
from nlp_common.lm.loading import end_chat_turns, load_tokenizer  # noqa: E402
from nlp_common.lm.losses import IGNORE  # noqa: E402
from nlp_common.lm.packing import collate_blocks, pack_documents  # noqa: E402
from nlp_common.lm.pairs import collate_pairs, pair_length  # noqa: E402
from nlp_common.tiny import qwen, world  # noqa: E402
from nlp_common.train.dry_run_qwen import qwen_0_5b  # noqa: E402
from nlp_common.train.stage import COMMON  # noqa: E402
from nlp_common.train.trainer_qwen import training_kwargs  # noqa: E402

STAGES = ("pretrain", "sft", "dpo", "ppo")
TRL_SIDES = {"trl_default": True, "trl_no_checkpointing": False}  # 值：用不用它的默认（重算激活）
SIZES = {"length": 512, "batch": 8, "steps": 10, "warmup": 3, "new_tokens": 128, "micro_batch": 4}
TINY = {"length": 32, "batch": 2, "steps": 2, "warmup": 1, "new_tokens": 8, "micro_batch": 2}
# 公布的稠密算力（TFLOP/s）；从上往下，名字里含有它的第一个
PEAK_TFLOPS = {
    "B200": 2250,
    "H200": 989,
    "H100 PCIe": 756,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "A10G": 70,
    "A10": 125,
    "RTX 4090": 165,
    "RTX 3090": 71,
    "V100": 125,
    "T4": 65,
}


# ---------------------------------------------------------------- 1. 必须做的浮点运算


def forward_flops(config, n_tokens: int, n_labels: int) -> int:
    """一行 n_tokens 个 token、n_labels 个位置要算损失，前向的浮点运算次数（算式在文件开头）。"""
    hidden, layers = config.hidden_size, config.num_hidden_layers
    head_dim = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    queries, keys = head_dim * config.num_attention_heads, head_dim * config.num_key_value_heads
    kv = 4 * layers * n_tokens * hidden * keys
    columns = (layers - 1) * n_tokens + n_labels
    per_column = 4 * queries * hidden + 6 * hidden * config.intermediate_size + 4 * n_tokens * queries
    return kv + columns * per_column + 2 * n_labels * hidden * config.vocab_size


def sequences_of(stage: str, row) -> list[tuple[int, int]]:
    """一行里互相看不见的几段：[(几个 token, 几个算损失)]。"""
    if stage == "pretrain":
        return [(len(document), len(document) - 1) for document in row]
    if stage == "sft":
        return [(len(row["input_ids"]), sum(label != IGNORE for label in row["labels"]))]
    answers = [len(row[key]) for key in ("chosen_ids", "rejected_ids")]
    return [(len(row["prompt_ids"]) + n, n) for n in answers]


def row_flops(stage: str, config, row) -> int:
    """训练一行必须做的：前向的 3 倍；DPO 另有参考模型的一次前向。"""
    return (4 if stage == "dpo" else 3) * sum(forward_flops(config, *s) for s in sequences_of(stage, row))


def find_peak(device: torch.device, given: float | None) -> float | None:
    """峰值（TFLOP/s）；不认识的设备给 None，MFU 就不算。"""
    if given or device.type != "cuda":
        return given
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_TFLOPS.items() if key in name), None)


# ---------------------------------------------------------------- 2. 行


def random_rows(stage: str, n: int, args, vocab_size: int) -> list:
    """等长的随机 token：一半是提示，一半是回答；预训练一块一篇文档，PPO 只有提示。"""
    rng = random.Random(0)
    half = args.length // 2

    def ids(count: int) -> list[int]:
        return [rng.randrange(vocab_size) for _ in range(count)]

    if stage == "pretrain":
        return [[ids(args.length)] for _ in range(n)]
    if stage == "ppo":
        return [ids(half) for _ in range(n)]
    pairs = [{"prompt_ids": ids(half), "chosen_ids": ids(half), "rejected_ids": ids(half)} for _ in range(n)]
    if stage == "dpo":
        return pairs
    return [
        {"input_ids": p["prompt_ids"] + p["chosen_ids"], "labels": [IGNORE] * half + p["chosen_ids"]}
        for p in pairs
    ]


def text_rows(stage: str, n: int, args, tokenizer) -> list:
    """小世界的行，用真的分词器与各脚本自己的编码。"""
    if stage == "pretrain":
        documents = world.documents(n * max(2, args.length // 20), seed=0)
        rows = pack_documents(pretrain_chinese.encode_documents(tokenizer, documents), args.length)
    elif stage == "ppo":
        rows = [prompt_ids(tokenizer, q["messages"]) for q in world.questions(n, seed=0)]
    elif stage == "sft":
        rows = [sft.encode_row(tokenizer, row["messages"]) for row in world.chats(n, seed=0)]
        rows = [row for row in rows if len(row["input_ids"]) <= args.length]
    else:
        rows = [dpo.encode(tokenizer, row) for row in world.pairs(n, seed=0)]
        rows = [row for row in rows if pair_length(row) <= args.length]
    if len(rows) < n:
        raise UserError(
            f"{stage} 只有 {len(rows)} 行不超过 {args.length} 个 token，要 {n} 行：加大 --length。"
        )
    return rows[:n]


def make_rows(stage: str, args, config, tokenizer) -> list:
    n = args.batch * (args.warmup + args.steps)
    if args.tokenizer:
        return text_rows(stage, n, args, tokenizer)
    return random_rows(stage, n, args, config.vocab_size)


# ---------------------------------------------------------------- 3. 训练：预训练、SFT、DPO


class Clock(TrainerCallback):
    """每步结束的时刻；先等加速器算完。"""

    def __init__(self, device: torch.device):
        self.device, self.ticks = device, []

    def on_step_end(self, *_, **__):
        self.ticks.append(now(self.device))


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def new_model(auto_class, config, tokenizer, device, **changes):
    """同样的尺寸，随机权重，直接建在设备上；float32 的主权重，与各脚本一样。"""
    config = copy.deepcopy(config)
    for name, value in {"pad_token_id": tokenizer.pad_token_id, **changes}.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    with torch.device(device):
        return auto_class.from_config(config, dtype=torch.float32)


class TokenizedDPOTrainer(trl.DPOTrainer):
    """TRL 的 DPOTrainer，只是行已经分好词：两边用一模一样的 token。"""

    def _prepare_dataset(self, dataset, *_):
        return dataset


def make_trainer(stage: str, side: str, rows: list, model, tokenizer, args, folder: str):
    """→ (训练器, 训练前算参考对数概率的秒数)。"""
    device, pad_id = model.device, tokenizer.pad_token_id
    changes = {"per_device_train_batch_size": args.batch, "learning_rate": 1e-6, "seed": 0}
    settings = SimpleNamespace(**COMMON | changes | {"save_steps": 10**9})
    kwargs = training_kwargs(
        SimpleNamespace(settings=settings, device=device, folder=SimpleNamespace(checkpoints=folder))
    )
    common = {"model": model, "processing_class": tokenizer}
    if TRL_SIDES.get(side):
        kwargs = {k: v for k, v in kwargs.items() if not k.endswith("_checkpointing")}
    if stage == "sft" and side != "ours":
        return trl.SFTTrainer(
            **common, args=trl.SFTConfig(**kwargs, max_length=None), train_dataset=Dataset.from_list(rows)
        ), 0.0
    if stage == "dpo":
        common["ref_model"] = copy.deepcopy(model)
        if side != "ours":
            config = trl.DPOConfig(**kwargs, max_length=None)
            return TokenizedDPOTrainer(**common, args=config, train_dataset=Dataset.from_list(rows)), 0.0
        dpo.logps_of(common["ref_model"], rows[: args.batch], pad_id, args.batch)  # 热身
        started = now(device)
        logps = dpo.logps_of(common["ref_model"], rows, pad_id, args.batch)
        seconds = now(device) - started
        rows = [
            row | {"ref_chosen": a, "ref_rejected": b}
            for row, (a, b) in zip(rows, logps.tolist(), strict=True)
        ]

        def collate(batch: list[dict]) -> dict[str, torch.Tensor]:
            refs = [row["ref_chosen"] for row in batch] + [row["ref_rejected"] for row in batch]
            return collate_pairs(batch, pad_id) | {"ref_logps": torch.tensor(refs)}

        config = trl.DPOConfig(**kwargs, max_length=None, beta=dpo.PRESETS["full"]["beta"])
        trainer = dpo.PairDPOTrainer(
            **common, args=config, train_dataset=Dataset.from_list(rows), data_collator=collate
        )
        trainer.sft_weight = dpo.PRESETS["full"]["sft_weight"]
        trainer.row_lengths = [pair_length(row) for row in rows]
        return trainer, seconds
    common["args"] = TrainingArguments(**kwargs)
    if stage == "pretrain":
        return pretrain_chinese.PretrainTrainer(
            **common,
            train_dataset=pretrain_chinese.Blocks(rows),
            data_collator=lambda batch: collate_blocks(batch, args.length, pad_id),
        ), 0.0
    trainer = sft.SFTTrainer(
        **common, train_dataset=rows, data_collator=lambda batch: sft.collate(batch, pad_id)
    )
    trainer.row_lengths = [len(row["input_ids"]) for row in rows]
    return trainer, 0.0


def train_row(stage: str, side: str, config, tokenizer, args, device, peak) -> dict:
    """训练 warmup + steps 步，只计后 steps 步。"""
    rows = make_rows(stage, args, config, tokenizer)
    model = new_model(AutoModelForCausalLM, config, tokenizer, device)
    end_chat_turns(model, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        trainer, reference_s = make_trainer(stage, side, rows, model, tokenizer, args, folder)
        batches, collate, clock = [], trainer.data_collator, Clock(device)

        def count(batch):  # 按步记下这一批的 token 数与必须做的运算
            tokens = sum(n for row in batch for n, _ in sequences_of(stage, row))
            batches.append((tokens, sum(row_flops(stage, config, row) for row in batch)))
            return collate(batch)

        trainer.data_collator = count
        trainer.add_callback(clock)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    timed = batches[args.warmup : args.warmup + args.steps]
    share = args.steps / (args.warmup + args.steps)
    seconds = clock.ticks[-1] - clock.ticks[args.warmup - 1] + reference_s * share
    tflops = sum(flops for _, flops in timed) / seconds / 1e12
    return {
        "tokens_per_s": round(sum(tokens for tokens, _ in timed) / seconds, 1),
        "rows_per_s": round(args.batch * args.steps / seconds, 2),
        "step_s": round(seconds / args.steps, 5),
        "model_tflops": tflops,
        "mfu": tflops / peak if peak else None,
    }


# ---------------------------------------------------------------- 4. PPO


def ppo_row(config, tokenizer, args, device) -> dict:
    """每轮采样一批、更新四遍；第 warmup 轮之后的中位数。"""
    end_chat_turns(policy := new_model(AutoModelForCausalLM, config, tokenizer, device), tokenizer)
    heads = {"num_labels": 1, "classifier_dropout": 0.0}
    value = new_model(AutoModelForTokenClassification, config, tokenizer, device, **heads)
    reward = new_model(AutoModelForSequenceClassification, config, tokenizer, device, **heads)
    reference = copy.deepcopy(policy).eval().requires_grad_(False)
    accelerator = Accelerator(mixed_precision={"fp32": "no"}.get(p := precision(device), p))
    optimizers = {
        name: accelerator.prepare(torch.optim.AdamW(model.parameters(), 1e-6, fused=True))
        for name, model in (("policy", policy), ("value", value))
    }
    policy, value = accelerator.prepare(policy, value)
    models = ppo.Models(policy, value, reference, reward.eval().requires_grad_(False), 0.0, 1.0)
    settings = ppo.PPOSettings(
        max_new_tokens=args.new_tokens, micro_batch_size=args.micro_batch, max_grad_norm=1.0
    )
    rows, parts, seconds = make_rows("ppo", args, config, tokenizer), [], []
    for step in range(args.warmup + args.steps):
        prompts = rows[step * args.batch : (step + 1) * args.batch]
        generator = torch.Generator(device).manual_seed(step)
        started = now(device)
        parts.append(
            ppo.ppo_step(models, optimizers, prompts, tokenizer, settings, accelerator, generator, 0.1)
        )
        seconds.append(now(device) - started)
    names = ("rollout_s", "scoring_s", "update_s")
    times = {name: round(median(part[name] for part in parts[args.warmup :]), 4) for name in names}
    return {"episodes_per_s": round(args.batch / median(seconds[args.warmup :]), 2), **times}


# ---------------------------------------------------------------- 5. 逐行运行


def measure(stage: str, side: str, config, tokenizer, args, device, peak) -> dict:
    """一行；显存不够只坏这一行。上一行的显存先还回去，峰值才是这一行的。"""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    row = {"stage": stage, "side": side}
    try:
        if stage == "ppo":
            row |= ppo_row(config, tokenizer, args, device)
        else:
            row |= train_row(stage, side, config, tokenizer, args, device, peak)
    except torch.OutOfMemoryError:
        row["error"] = "显存不够：减小 --batch 或 --length"
    megabytes = peak_gpu_memory_mb()
    return row | {"peak_memory_gb": None if megabytes is None else round(megabytes / 1024, 2)}


def markdown(rows: list[dict]) -> str:
    def cell(row: dict, key: str, form: str) -> str:
        return "—" if row.get(key) is None else format(row[key], form)

    lines = [
        "| 阶段 | 哪一边 | 每秒 token | 每秒行（PPO：回答） | 显存峰值 GB | MFU |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        speed = cell(row, "episodes_per_s" if row["stage"] == "ppo" else "rows_per_s", ".2f")
        cells = [row["stage"], row["side"], cell(row, "tokens_per_s", ",.0f"), row.get("error", speed)]
        cells += [cell(row, "peak_memory_gb", ".2f"), cell(row, "mfu", ".1%")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--tokenizer", help="分词器文件夹（Qwen 一类，词表不超过 151,936）")
    parser.add_argument("--peak_tflops", type=float, help="设备的峰值；表里有的卡不必给")
    parser.add_argument("--tiny", action="store_true", help="两层的小模型、很短的行，CPU 上几秒")
    helps = {
        "length": "一行多少个 token",
        "batch": "一步多少行",
        "steps": "计时多少步",
        "warmup": "先走几步不计时",
        "new_tokens": "PPO 的回答最多多少个 token",
        "micro_batch": "PPO 一次前向几行",
    }
    for name, text in helps.items():
        parser.add_argument(f"--{name}", type=int, help=f"{text}（默认 {SIZES[name]}）")
    args = parser.parse_args(argv)
    for name, value in (TINY if args.tiny else SIZES).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
        least = 4 if name == "length" else 1
        if getattr(args, name) < least:
            raise UserError(f"--{name} 至少是 {least}，给的是 {getattr(args, name)}。")
    return args


def main(argv: list[str] | None = None) -> list[dict]:
    args = parse(argv)
    device = pick_device()
    if device.type != "cuda" and not args.tiny:
        raise UserError("没有找到 CUDA。在有 NVIDIA GPU 的机器上运行；只想看跑不跑得通，加 --tiny。")
    if device.type == "cuda":
        if torch.cuda.device_count() > 1:
            raise UserError("这个基准只用一块卡：先 export CUDA_VISIBLE_DEVICES=0，再运行同一条命令。")
        device = torch.device("cuda", 0)
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else qwen.build_tokenizer()
    config = qwen_0_5b()
    if args.tiny:
        config = qwen.build_model(qwen.build_tokenizer() if args.tokenizer else tokenizer, seed=0).config
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"{args.tokenizer} 有 {len(tokenizer)} 个 token，模型的词表只有 {config.vocab_size}。"
        )
    peak = find_peak(device, args.peak_tflops)
    head = {"device": describe(device), "precision": precision(device), "peak_tflops": peak}
    head |= {name: getattr(args, name) for name in SIZES}
    print(json.dumps(head, ensure_ascii=False), flush=True)
    if peak is None:
        print("不知道这台设备的峰值，MFU 不算；用 --peak_tflops 给出。", file=sys.stderr)
    rows = []
    for stage in args.stages:
        for side in ("ours", *(TRL_SIDES if stage in ("sft", "dpo") else ())):
            rows.append(measure(stage, side, config, tokenizer, args, device, peak))
            print(json.dumps(rows[-1], ensure_ascii=False), flush=True)
    print("\n" + markdown(rows))
    return rows


if __name__ == "__main__":
    run_main(main)
