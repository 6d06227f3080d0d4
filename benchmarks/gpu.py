"""一块 GPU 上的速度：Qwen1.5-0.5B 的尺寸、随机权重，我们的训练循环对库自带的训练器，同样的行、同一次运行。

每行打印一个 JSON：每秒 token 数（不算填充）、每秒行数、显存峰值、MFU；PPO 是每秒回答数。最后是一张 Markdown 表。哪一边：

- ours：我们的循环（``train_loop``），损失、拼批与各脚本里的相同；PPO 是 ``ppo_step``；
- library：各脚本的 ``--trainer library``，预训练是 transformers 的 Trainer，SFT、DPO 是 TRL 的，模型与 ours 的相同；
- trl_default、trl_no_checkpointing：同样的 TRL 训练器，模型是原样的（没有装 nlp_common/fast），DPO 没有 SFT 项；
  前者照它的默认重算激活，后者关掉。

MFU（model FLOP utilisation）= 这个模型必须做的浮点运算 ÷ 秒数 ÷ 设备的峰值。宽 H、L 层、注意力宽 A、键值宽 K、MLP 宽 I、
词表 V，一行 T 个 token、其中 C 个要算损失，前向是

    4·L·T·H·K + ((L−1)·T + C)·(4·A·H + 6·H·I + 4·T·A) + 2·C·H·V

依次是 k、v，再是 q 与输出投影、MLP、注意力（每个 query 对满 T 列算，不因因果而减半；最后一层只有 C 列用得着），LM head。训练是前向的
3 倍；DPO 的两条再加参考模型的一次前向，共 4 倍。填充、重算激活都不算必须做的，所以它们只会压低 MFU。
DPO 的秒数，ours 加上训练前算参考对数概率的时间（TRL 边训练边算）。峰值是各卡公布的 bf16 稠密算力（T4、V100 是
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
from functools import partial
from pathlib import Path
from statistics import median
from unittest import mock

QWEN = Path(__file__).resolve().parent.parent / "qwen_chinese_finetune"
sys.path.insert(0, str(QWEN))  # 基准不在脚本的文件夹里，要自己找到 chain.py 等

from nlp_common.base.cli import run_main  # noqa: E402

import torch  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import dpo_chinese_qwen as dpo  # noqa: E402
import ppo_alignment as ppo  # noqa: E402
import pretrain_chinese as pretrain  # noqa: E402
import sft_chinese_qwen as sft  # noqa: E402
from nlp_common.base.device import describe, peak_gpu_memory_mb, pick_device, precision  # noqa: E402
from nlp_common.base.errors import UserError  # noqa: E402
from nlp_common.base.runs import RunFolder  # noqa: E402
from nlp_common.lm.chatml import prompt_ids  # noqa: E402
from nlp_common.lm.loading import end_chat_turns, load_tokenizer, make_fast  # noqa: E402
from nlp_common.lm.losses import IGNORE  # noqa: E402
from nlp_common.lm.packing import collate_blocks, pack_documents  # noqa: E402
from nlp_common.lm.pairs import count_pairs, pair_length, pair_tokens  # noqa: E402
from nlp_common.tiny import qwen, world  # noqa: E402
from nlp_common.train.dry_run_qwen import qwen_0_5b  # noqa: E402
from nlp_common.train.loop import make_optimizer, train_loop  # noqa: E402
from nlp_common.train.settings import StageSettings  # noqa: E402
from nlp_common.train.setup import make_accelerator  # noqa: E402
from nlp_common.train.stage import Stage  # noqa: E402
from nlp_common.train.trainer import run_library  # noqa: E402

SCRIPTS = {"pretrain": pretrain, "sft": sft, "dpo": dpo}
TRL_SIDES = ("trl_default", "trl_no_checkpointing")
SIDES = {
    "pretrain": ("ours", "library"),
    "sft": ("ours", "library", *TRL_SIDES),
    "dpo": ("ours", "library", *TRL_SIDES),
    "ppo": ("ours",),
}
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
    """训练一行必须做的：前向的 3 倍；DPO 另有参考模型的一次前向，一对的两条各算各的（共用提示省下的不减）。"""
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
        rows = pack_documents(pretrain.encode_documents(tokenizer, documents), args.length)
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
    n = args.batch * (args.warmup + args.steps + 1)  # 最后一步只为看清前一步何时结束
    if args.tokenizer:
        return text_rows(stage, n, args, tokenizer)
    return random_rows(stage, n, args, config.vocab_size)


# ---------------------------------------------------------------- 3. 训练：预训练、SFT、DPO


class Clock:
    """每步前向开始的时刻（先等加速器算完），和各批的行：第 k 步从 ticks[k] 到 ticks[k+1]，用的是 batches[k]。"""

    def __init__(self, model: torch.nn.Module, device: torch.device):
        self.device, self.ticks, self.batches = device, [], []
        model.register_forward_pre_hook(self.tick)

    def tick(self, *_) -> None:
        self.ticks.append(now(self.device))

    def collate(self, inner, rows: list):
        """inner(rows)，并记下这一批的行。"""
        self.batches.append(rows)
        return inner(rows)


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


def make_settings(stage: str, side: str, args) -> StageSettings:
    """脚本的设置，用 full 预设的 β 与 SFT 权重；TRL 的两行没有 SFT 项，也就是它的默认损失。"""
    values = StageSettings.COMMON | {
        "max_length": args.length,
        "per_device_train_batch_size": args.batch,
        "learning_rate": 1e-6,
        "save_steps": 10**9,
        "gradient_checkpointing": side == "trl_default",
    }
    if stage == "sft":
        return sft.SFTSettings(**values)
    if stage == "dpo":
        full = dpo.PRESETS["full"]
        weight = 0.0 if side in TRL_SIDES else full["sft_weight"]
        return dpo.DPOSettings(**values, beta=full["beta"], sft_weight=weight)
    return StageSettings(**values)


def train_ours(stage: str, run: Stage, model, reference, rows: list, tokenizer, clock: Clock) -> float:
    """我们的循环，调用与各脚本的 train 里的相同。→ 训练前算参考对数概率的秒数。"""
    pad_id, size = tokenizer.pad_token_id, run.settings.per_device_train_batch_size
    if stage == "pretrain":
        pad = partial(
            clock.collate, partial(collate_blocks, block_size=run.settings.max_length, pad_id=pad_id)
        )
        tokens = [sum(map(len, block)) for block in rows]
        train_loop(run, stage, model, rows, pad, pretrain.causal_lm_loss, tokens)
        return 0.0
    if stage == "sft":
        pad = partial(clock.collate, partial(sft.collate, pad_id=pad_id))
        lengths = [sft.chat_length(row) for row in rows]
        train_loop(run, stage, model, rows, pad, sft.answer_loss, tokens=lengths, lengths=lengths)
        return 0.0
    dpo.logps_of(reference, rows[:size], pad_id, size)  # 热身
    started = now(clock.device)
    logps = dpo.logps_of(reference, rows, pad_id, size).tolist()
    seconds = now(clock.device) - started
    for row, (chosen, rejected) in zip(rows, logps, strict=True):
        row["ref_chosen"], row["ref_rejected"] = chosen, rejected
    pad = partial(clock.collate, partial(dpo.collate, pad_id=pad_id))
    loss = partial(dpo.pair_loss, beta=run.settings.beta, sft_weight=run.settings.sft_weight)
    lengths, tokens = [pair_length(row) for row in rows], [pair_tokens(row) for row in rows]
    train_loop(run, stage, model, rows, pad, loss, tokens, lengths=lengths, count=count_pairs)
    return seconds


def train_library(stage: str, run: Stage, model, reference, rows: list, tokenizer, clock: Clock) -> None:
    """各脚本的 --trainer library：训练器由脚本来建，这里只在开始训练前装上计时用的拼批。"""

    def watched(trainer, *rest):
        trainer.data_collator = partial(clock.collate, trainer.data_collator)
        trainer.args.save_strategy = "no"  # 不然最后一步要存一个检查点，好几 GB
        return run_library(trainer, *rest)

    with mock.patch.object(SCRIPTS[stage], "run_library", watched):
        if stage == "pretrain":
            pad = partial(collate_blocks, block_size=run.settings.max_length, pad_id=tokenizer.pad_token_id)
            pretrain.train_with_transformers(run, model, rows, pad, [sum(map(len, block)) for block in rows])
        elif stage == "sft":
            sft.train_with_trl(run, model, tokenizer, rows, [sft.chat_length(row) for row in rows])
        else:
            tokens = [pair_tokens(row) for row in rows]
            dpo.train_with_trl(run, model, reference, tokenizer, rows, tokens)


def train_row(stage: str, side: str, config, tokenizer, args, device, peak) -> dict:
    """训练 warmup + steps + 1 步，只计热身之后的 steps 步。"""
    rows = make_rows(stage, args, config, tokenizer)
    model = new_model(AutoModelForCausalLM, config, tokenizer, device)
    end_chat_turns(model, tokenizer)
    if side not in TRL_SIDES:
        make_fast(model)  # 脚本载入模型时装的
    reference = copy.deepcopy(model) if stage == "dpo" else None
    clock, reference_s = Clock(model, device), 0.0
    with tempfile.TemporaryDirectory() as folder:
        run = Stage(stage, make_settings(stage, side, args), RunFolder(Path(folder) / stage), {}, {})
        if side == "ours":
            reference_s = train_ours(stage, run, model, reference, rows, tokenizer, clock)
        else:
            train_library(stage, run, model, reference, rows, tokenizer, clock)
    total = args.warmup + args.steps + 1
    if len(clock.ticks) != total:
        raise RuntimeError(f"{stage} {side} 走了 {total} 步，前向却有 {len(clock.ticks)} 次：计时不准。")
    last = args.warmup + args.steps
    seconds = clock.ticks[last] - clock.ticks[args.warmup] + reference_s * args.steps / total
    timed = [row for batch in clock.batches[args.warmup : last] for row in batch]
    tokens = sum(n for row in timed for n, _ in sequences_of(stage, row))
    tflops = sum(row_flops(stage, config, row) for row in timed) / seconds / 1e12
    return {
        "tokens_per_s": round(tokens / seconds, 1),
        "rows_per_s": round(len(timed) / seconds, 2),
        "step_s": round(seconds / args.steps, 5),
        "model_tflops": tflops,
        "mfu": tflops / peak if peak else None,
    }


# ---------------------------------------------------------------- 4. PPO


def ppo_row(config, tokenizer, args, device) -> dict:
    """每轮采样一批、更新四遍；第 warmup 轮之后的中位数。"""
    heads = {"num_labels": 1, "classifier_dropout": 0.0}
    policy = make_fast(new_model(AutoModelForCausalLM, config, tokenizer, device))
    value = make_fast(new_model(AutoModelForTokenClassification, config, tokenizer, device, **heads))
    reward = make_fast(new_model(AutoModelForSequenceClassification, config, tokenizer, device, **heads))
    end_chat_turns(policy, tokenizer)
    reference = copy.deepcopy(policy).eval().requires_grad_(False)
    changes = {"max_new_tokens": args.new_tokens, "micro_batch_size": args.micro_batch, "learning_rate": 1e-6}
    settings = ppo.PPOSettings(**StageSettings.COMMON | changes)
    accelerator = make_accelerator(device, settings)
    on_policy, on_value = make_optimizer(policy, settings), make_optimizer(value, settings)
    policy, value, on_policy, on_value = accelerator.prepare(policy, value, on_policy, on_value)
    optimizers = {"policy": on_policy, "value": on_value}
    models = ppo.Models(policy, value, reference, reward.eval().requires_grad_(False), 0.0, 1.0)
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
    parser.add_argument("--stages", nargs="+", default=list(SIDES), choices=list(SIDES))
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
    parser.add_argument("--record", action="store_true", help="记进 docs/measurements")
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
        for side in SIDES[stage]:
            rows.append(measure(stage, side, config, tokenizer, args, device, peak))
            print(json.dumps(rows[-1], ensure_ascii=False), flush=True)
            if args.record:
                from nlp_common.base.measurements import record

                record("qwen", {f"gpu.{stage}.{side}": rows[-1]}, unit={"mfu": "fraction"})
    print("\n" + markdown(rows))
    return rows


if __name__ == "__main__":
    run_main(main)
