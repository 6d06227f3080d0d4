"""各训练阶段的速度：同样的行、同样的模型、同样的批大小，我们的脚本对 TRL 的训练器。

每个阶段打印一行 JSON，都是每秒行数（SFT 是对话，奖励模型与 DPO 是偏好对）：

- rows_per_s、tokens_per_s：读者运行的那个脚本，看得见的训练循环；
- library：同一个脚本加 ``--trainer library``，训练器换成 TRL 的，模型、分好词的行都不变；
- trl_default、trl_no_checkpointing：不用我们的脚本，TRL 自己载入模型、自己分词，默认的设置与关掉梯度检查点的设置；
- ratio：rows_per_s 是这两个 TRL 里较快者的几倍。

各跑一个进程，一个跑完再跑下一个：两个 torch 程序同时算，会互相拖慢几十倍。

    python benchmarks/stages.py                    # 三个阶段，约 6 分钟
    python benchmarks/stages.py --stages dpo       # 只测 DPO
    python benchmarks/stages.py --model DIR --chats chats.jsonl --pairs pairs.jsonl
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
QWEN = ROOT / "qwen_chinese_finetune"
sys.path.insert(0, str(QWEN))  # 基准不在脚本的文件夹里，要自己找到 chain.py 等

SCRIPTS = {"sft": "sft_chinese_qwen.py", "reward": "reward_model.py", "dpo": "dpo_chinese_qwen.py"}
BATCH = 16


def prepare(folder: Path, args) -> tuple[str, dict[str, str]]:
    """没给模型和数据时，用没训练过的小模型和小世界的行。"""
    from nlp_common.tiny import qwen, world

    model = args.model or str(folder / "model")
    if not args.model:
        qwen.save_tiny_base(Path(model), seed=0)
    files = {"chats": args.chats, "pairs": args.pairs}
    for kind, rows in (("chats", world.chats(2400, seed=0)), ("pairs", world.pairs(1500, seed=0))):
        if not files[kind]:
            files[kind] = str(folder / f"{kind}.jsonl")
            text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
            Path(files[kind]).write_text(text, encoding="utf-8")
    return model, {"sft": files["chats"], "reward": files["pairs"], "dpo": files["pairs"]}


def ours(stage: str, trainer: str, model: str, data: str, folder: Path) -> dict:
    """运行读者运行的那个脚本，从 run.json 里读速度。trainer 是 loop 或 library。"""
    out = folder / f"{trainer}-{stage}"
    command = [sys.executable, str(QWEN / SCRIPTS[stage]), "--preset", "tiny", "--trainer", trainer]
    command += ["--model", model, "--dataset", data]
    command += ["--output_dir", str(out), "--per_device_train_batch_size", str(BATCH), "--max_length", "1024"]
    command += ["--max_train_samples", "100000", "--max_eval_samples", "16", "--num_train_epochs", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{SCRIPTS[stage]} --trainer {trainer} 没有跑完：\n{done.stderr[-2000:]}")
    return json.loads((out / "run.json").read_text(encoding="utf-8"))["metrics"]


def peer(stage: str, model: str, data: str, checkpointing: bool, folder: str) -> None:
    """TRL 的训练器跑一遍同样的行（在自己的进程里），打印它自己报告的每秒行数。"""
    import datasets
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

    rows = datasets.load_dataset("json", data_files=data, split="train", cache_dir=f"{folder}/cache")
    keep = {"sft": ["messages"]}.get(stage, ["prompt", "chosen", "rejected"])
    rows = rows.select_columns(keep)
    tokenizer = AutoTokenizer.from_pretrained(model)
    common = {
        "output_dir": f"{folder}/trl-{stage}",
        "per_device_train_batch_size": BATCH,
        "num_train_epochs": 1,
        "gradient_checkpointing": checkpointing,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "learning_rate": 1e-4,
    }
    if stage == "reward":
        network = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
        trainer = RewardTrainer(
            network, RewardConfig(**common), train_dataset=rows, processing_class=tokenizer
        )
    else:
        network = AutoModelForCausalLM.from_pretrained(model)
        if stage == "sft":
            config, kind = SFTConfig(**common, assistant_only_loss=True), SFTTrainer
        else:
            config, kind = DPOConfig(**common), DPOTrainer
        trainer = kind(network, args=config, train_dataset=rows, processing_class=tokenizer)
    print(json.dumps({"rows_per_s": trainer.train().metrics["train_samples_per_second"]}))


def run_peer(stage: str, model: str, data: str, checkpointing: bool, folder: Path) -> float:
    command = [sys.executable, __file__, "--peer", stage, "--model", model, "--data", data]
    command += ["--folder", str(folder)] + (["--checkpointing"] if checkpointing else [])
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"TRL 的 {stage} 没有跑完：\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])["rows_per_s"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", nargs="+", default=list(SCRIPTS), choices=list(SCRIPTS))
    parser.add_argument("--model", help="模型文件夹；默认是没训练过的小模型")
    parser.add_argument("--chats", help="SFT 的行（jsonl）；默认用小世界的 2400 段对话")
    parser.add_argument("--pairs", help="偏好对（jsonl）；默认用小世界的 1500 对")
    parser.add_argument("--record", action="store_true", help="记进 docs/measurements")
    for hidden in ("--peer", "--data", "--folder"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        return peer(args.peer, args.model, args.data, args.checkpointing, args.folder)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model, data = prepare(folder, args)
        from nlp_common.base.measurements import record

        for stage in args.stages:
            metrics = ours(stage, "loop", model, data[stage], folder)
            library = ours(stage, "library", model, data[stage], folder)["train_samples_per_s"]
            trl = {
                name: run_peer(stage, model, data[stage], on, folder)
                for name, on in (("trl_default", True), ("trl_no_checkpointing", False))
            }
            # DPO 的参考对数概率，循环在训练前算一遍，TRL（library 也是）边训练边算：也算进来才公平
            extra = metrics.get("reference_seconds", 0.0)
            share = metrics["train_seconds"] / (metrics["train_seconds"] + extra)
            speed = round(metrics["train_samples_per_s"] * share, 1)
            tokens = round(metrics["train_tokens_per_s"] * share)
            row = {"stage": stage, "rows_per_s": speed, "tokens_per_s": tokens, "library": library, **trl}
            row["ratio"] = round(speed / max(trl.values()), 2)
            print(json.dumps(row), flush=True)
            if args.record:
                names = ("library", "trl_default", "trl_no_checkpointing")
                record("qwen", {f"speed.{stage}": row}, unit=dict.fromkeys(names, "rows/s"))


if __name__ == "__main__":
    main()
