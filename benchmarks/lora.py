"""LoRA 的速度与内存：我们的循环对 TRL 的 SFTTrainer(peft_config=…)，LoRA 对全参数；同样的行、同样的模型、同样的批大小。

一种大小的模型打印一行 JSON：

- lora、full：我们的循环（lora_by_hand.py 的 LoRALinear，nlp_common/train/loop.py），每秒几行；
- trl_default、trl_no_checkpointing：TRL 与 PEFT，默认的设置与关掉梯度检查点的设置，每秒几行；
- ratio：lora 是这两个 TRL 里较快者的几倍；
- step_over_full：LoRA 一步的时间是全参数一步的几成。少算的是 W 的梯度，约三分之一；多的是旁边的小矩阵；
- peak_*_mb：各自进程用过的最大内存，grown_*_mb：其中训练开始以后长出来的。

各跑一个进程，一个跑完再跑下一个，轮流几遍取中位数：两个 torch 程序同时算，会互相拖慢几十倍。
小模型（宽 128）一步里多半是调用的开销；wide（宽 512、4 层）才看得出少算的那三分之一；smollm2 是真的模型
（SmolLM2-135M，30 层，离线的权重，没有装就跳过），几步就够，只比 LoRA 与全参数。

    python benchmarks/lora.py                    # 三种大小，约 12 分钟
    python benchmarks/lora.py --sizes smollm2    # 只要真的模型，约 4 分钟
    python benchmarks/lora.py --sizes tiny --rows 160 --repeats 1     # 试一下
    python benchmarks/lora.py --record           # 记进 docs/measurements（名字 lora_finetune.speed.*）
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import ClassVar

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "lora_finetune"))  # 基准不在脚本的文件夹里，要自己找到 lora_by_hand.py

from nlp_common.base.cli import run_main  # noqa: E402  要在导入任何 Hugging Face 库之前

import torch  # noqa: E402

from lora_by_hand import ATTENTION, MLP, add_lora, trainable  # noqa: E402
from nlp_common.base.device import peak_memory_mb  # noqa: E402
from nlp_common.hub import smollm2  # noqa: E402
from nlp_common.lm.loading import end_chat_turns, load_causal_lm  # noqa: E402
from nlp_common.tiny import qwen, world  # noqa: E402
from nlp_common.train.lesson import run_lesson  # noqa: E402
from nlp_common.train.settings import LoopSettings, parse_settings  # noqa: E402
from nlp_common.train.sft import train_on_chats  # noqa: E402
from nlp_common.train.stage import Stage  # noqa: E402
from styles import fact_questions, style_chats  # noqa: E402

BATCH, R, ALPHA, RATE = 16, 8, 16, 1e-3
SIDES = ("lora", "full", "trl_default", "trl_no_checkpointing")
SIZES = {"tiny": 1.0, "wide": 1 / 8, "smollm2": 1 / 16}  # 用 --rows 的几成：大模型一步要算几十、几百倍
WIDE = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "layer_types": ["full_attention"] * 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "initializer_range": 0.02,
}


# ---------------------------------------------------------------- 1. 模型与行


def prepare(folder: Path, size: str, rows: int) -> None:
    """模型与对话：没训练过的（速度与学没学过无关）和小世界的；smollm2 是真的权重和英文的常识题。"""
    folder.mkdir(parents=True)
    if size == "smollm2":
        smollm2.export(folder / "model")
        facts = style_chats("courteous", fact_questions("en", heldout=False), "en")
        chats = list(islice(cycle(facts), rows))  # 几十道常识题，轮着用
    else:
        qwen.save_tiny_base(folder / "model", seed=0)
        chats = world.chats(rows, seed=0)
    if size == "wide":
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(folder / "model", **WIDE)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    lines = [json.dumps(row, ensure_ascii=False) for row in chats]
    (folder / "chats.jsonl").write_text("\n".join(lines), encoding="utf-8")


def load_chats(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "chats.jsonl").read_text(encoding="utf-8").splitlines()]


# ---------------------------------------------------------------- 2. 我们的循环


@dataclass
class SpeedSettings(LoopSettings):
    COMMON: ClassVar[dict] = LoopSettings.COMMON | {
        "per_device_train_batch_size": BATCH,
        "learning_rate": RATE,
        "max_length": 1024,
        "save_steps": 10**9,
    }


def run_ours(folder: Path, lora: bool) -> dict:
    settings = parse_settings(
        SpeedSettings, {"tiny": {}}, ["--preset", "tiny", "--output_dir", str(folder / "run"), "--retrain"]
    )
    return run_lesson("speed", folder, settings, partial(train_ours, folder=folder, lora=lora))["metrics"]


def train_ours(stage: Stage, folder: Path, lora: bool) -> dict:
    tokenizer, model = load_causal_lm(str(folder / "model"))
    end_chat_turns(model, tokenizer)
    model.to(stage.device)
    if lora:
        add_lora(model, "all", R, ALPHA)
    chats = load_chats(folder)
    before = memory_now_mb()
    trained = train_on_chats(stage, "lora" if lora else "full", model, tokenizer, chats)
    metrics = {
        "rows_per_s": len(chats) / trained.metrics["train_seconds"],
        "trainable": sum(p.numel() for p in trainable(model).values()),
        **memory(before),
    }
    return stage.save(metrics, {})


# ---------------------------------------------------------------- 3. TRL 与 PEFT


def run_trl(folder: Path, checkpointing: bool) -> dict:
    """TRL 自己分词、自己载入模型、自己训练；计时的只有训练。"""
    import datasets
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    rows = datasets.Dataset.from_list([{"messages": chat["messages"]} for chat in load_chats(folder)])
    config = SFTConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=BATCH,
        num_train_epochs=1,
        learning_rate=RATE,
        max_length=1024,
        gradient_checkpointing=checkpointing,
        assistant_only_loss=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    adapter = LoraConfig(
        r=R, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=[*ATTENTION, *MLP], task_type="CAUSAL_LM"
    )
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(folder / "model"),
        args=config,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        peft_config=adapter,
    )
    learned = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    before = memory_now_mb()
    seconds = trainer.train().metrics["train_runtime"]
    return {"rows_per_s": len(rows) / seconds, "trainable": learned, **memory(before)}


# ---------------------------------------------------------------- 4. 内存


def memory_now_mb() -> float:
    """进程现在占的内存；不是 Linux 给 NaN。"""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return float("nan")
    import resource

    return pages * resource.getpagesize() / 2**20


def memory(before: float) -> dict:
    peak = peak_memory_mb()
    peak = float("nan") if peak is None else peak
    return {"peak_memory_mb": peak, "grown_memory_mb": peak - before}


# ---------------------------------------------------------------- 5. 轮流跑


def run_side(side: str, folder: Path) -> dict:
    """在自己的进程里跑一边。"""
    done = subprocess.run(
        [sys.executable, __file__, "--side", side, "--folder", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{side} 没有跑完：\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(size: str, rows: int, repeats: int, folder: Path) -> dict:
    prepare(folder, size, rows)
    sides = SIDES[:2] if size == "smollm2" else SIDES
    found: dict[str, list[dict]] = {side: [] for side in sides}
    for _ in range(repeats):
        for side in sides:
            found[side].append(run_side(side, folder))
    row: dict = {"size": size, "rows": rows}
    for side, runs in found.items():
        row[side] = round(middle(runs, "rows_per_s"), 1)
        row[f"step_{side}_ms"] = round(1000 * BATCH / middle(runs, "rows_per_s"), 2)
        row[f"peak_{side}_mb"] = round(middle(runs, "peak_memory_mb"), 1)
        row[f"grown_{side}_mb"] = round(middle(runs, "grown_memory_mb"), 1)
        row[f"trainable_{side}"] = runs[0]["trainable"]
    if "trl_default" in found:
        assert row["trainable_lora"] == row["trainable_trl_default"], "两边学的参数不一样多"
        row["ratio"] = round(row["lora"] / max(row["trl_default"], row["trl_no_checkpointing"]), 2)
    row["step_over_full"] = round(row["step_lora_ms"] / row["step_full_ms"], 3)
    return row


def middle(runs: list[dict], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def units() -> dict[str, str]:
    """记下的数的单位；名字看得出的（ratio）不用写。"""
    found = dict.fromkeys(SIDES, "rows/s") | {"step_over_full": "ratio"}
    for side in SIDES:
        found |= {f"step_{side}_ms": "ms", f"peak_{side}_mb": "MB", f"grown_{side}_mb": "MB"}
    return found


def main(argv: list[str] | None = None) -> list[dict] | None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument(
        "--rows", type=int, default=1280, help="多少段对话；wide 用它的八分之一，smollm2 十六分之一"
    )
    parser.add_argument("--repeats", type=int, default=3, help="轮流跑几遍，取中位数")
    parser.add_argument("--record", action="store_true", help="记进 docs/measurements")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.rows < 8 * BATCH or args.repeats < 1:
        parser.error(f"--rows 至少 {8 * BATCH}，--repeats 至少 1。")
    if args.side:
        torch.manual_seed(0)
        if args.side in ("lora", "full"):
            print(json.dumps(run_ours(args.folder, args.side == "lora")))
        else:
            print(json.dumps(run_trl(args.folder, args.side == "trl_default")))
        return None
    from nlp_common.base.measurements import record

    found = []
    with tempfile.TemporaryDirectory() as temporary:
        for size in args.sizes:
            if size == "smollm2" and not smollm2.packages_installed():
                print(smollm2.INSTALL_HINT + "这一种跳过。", file=sys.stderr)
                continue
            started = time.perf_counter()
            rows = max(BATCH, round(args.rows * SIZES[size]))
            row = compare(size, rows, args.repeats, Path(temporary) / size)
            print(json.dumps(row), flush=True)
            print(f"{size}：{time.perf_counter() - started:.0f} 秒", file=sys.stderr)
            found.append(row)
            if args.record:
                record("lora_finetune", {f"speed.{size}": row}, unit=units())
    return found


if __name__ == "__main__":
    run_main(main)
