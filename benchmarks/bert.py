"""tiny 微调的速度：同样的行、同样的模型，我们的训练循环对 transformers 的 Trainer；以及第二次运行要多久。

用法：python benchmarks/bert.py [--rows 640] [--rounds 3] [--dataset 文件夹] [--layers 4 --hidden 256]
打印一行 JSON：各种设置的每秒行数（几轮的中位数，轮流跑，机器忽快忽慢时大家一起变）、我们是它们的几倍，
以及第二次运行从敲回车到打印预测的秒数是单单导入 BERT 类的几倍。要空闲的机器；没有 bf16 指令的 2 核上，--rounds 2 跑 280 秒还没完。
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

FOLDER = Path(__file__).resolve().parents[1] / "sentiment_classifier"
SCRIPT = FOLDER / "bert_finetune_sentiment.py"
GOALS = {"times_max_length": 2.0, "times_best_dynamic": 1.3, "times_import": 1.3}
IMPORT = "from transformers import AutoTokenizer, BertForSequenceClassification"


def training_speed(args, folder: str) -> dict[str, float]:
    """每种设置训练一遍同样的行：每秒几行。"""
    sys.path.insert(0, str(FOLDER))
    import bert_finetune_sentiment as script
    import torch
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        DataCollatorWithPadding,
        PrinterCallback,
        Trainer,
        TrainingArguments,
    )

    from nlp_common.bert import BertRun, attention, character_tokenizer, encode, training_kwargs
    from nlp_common.runs import RunFolder
    from nlp_common.training import BucketTrainer

    settings = script.SentimentSettings(**script.PRESETS["tiny"], warmup_steps=0.1, weight_decay=0.01)
    settings.dataset, settings.num_train_epochs = args.dataset, 1.0
    texts = script.load_data(settings)[0]["train"][: args.rows]
    tokenizer = character_tokenizer([row["text"] for row in texts])
    rows = encode(tokenizer, texts, settings.max_length)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        intermediate_size=4 * args.hidden,
    )
    ours = training_kwargs(BertRun(RunFolder(Path(folder) / "run"), settings, {}))
    plain = {  # Trainer 的默认设置，只写明同样的批大小与学习率
        "output_dir": folder,
        "per_device_train_batch_size": settings.per_device_train_batch_size,
        "learning_rate": settings.learning_rate,
        "num_train_epochs": 1,
        "report_to": "none",
        "disable_tqdm": True,
    }
    dynamic = DataCollatorWithPadding(tokenizer)
    longest = DataCollatorWithPadding(tokenizer, padding="max_length", max_length=settings.max_length)
    ways = {
        "ours": (BucketTrainer, ours, dynamic),
        "max_length": (Trainer, plain, longest),
        "dynamic": (Trainer, plain, dynamic),
        "dynamic_bf16": (Trainer, plain | {"bf16": True, "use_cpu": not torch.cuda.is_available()}, dynamic),
    }
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for round_number in range(args.rounds + 1):
        for name, (kind, kwargs, collator) in ways.items():
            torch.manual_seed(0)
            model = BertForSequenceClassification(config)
            if name == "ours":
                model.set_attn_implementation(attention())
            train = rows[:64] if round_number == 0 else rows  # 第 0 轮热身，不算
            trainer = kind(
                model=model,
                args=TrainingArguments(**kwargs | {"save_strategy": "no"}),
                train_dataset=train,
                data_collator=collator,
            )
            trainer.remove_callback(PrinterCallback)
            result = trainer.train()
            if round_number > 0:
                speeds[name].append(result.metrics["train_samples_per_second"])
    return {name: round(median(values), 1) for name, values in speeds.items()}


def startup(folder: str, repeat: int) -> dict[str, float]:
    """训练一个小模型，再量第二次运行的秒数。"""
    command = [sys.executable, str(SCRIPT), "--preset", "tiny", "--output_dir", f"{folder}/model"]
    command += ["--mlm_epochs", "0", "--max_train_samples", "64", "--num_train_epochs", "1"]
    seconds: dict[str, list[float]] = {"import": [], "second_run": []}
    subprocess.run(command, check=True, capture_output=True)
    for _ in range(repeat):
        for name, arguments in (("import", [sys.executable, "-c", IMPORT]), ("second_run", command)):
            start = time.perf_counter()
            subprocess.run(arguments, check=True, capture_output=True)
            seconds[name].append(time.perf_counter() - start)
    return {name: round(median(values), 2) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=640, help="训练多少行")
    parser.add_argument("--rounds", type=int, default=3, help="每种设置训练几轮，取中位数")
    parser.add_argument("--repeat", type=int, default=5, help="第二次运行量几次，取中位数")
    parser.add_argument("--dataset", default="reviews", help="训练数据，写法同脚本的 --dataset")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seconds = startup(folder, args.repeat)
        speed = training_speed(args, folder)
    ratios = {
        "times_max_length": round(speed["ours"] / speed["max_length"], 2),
        "times_best_dynamic": round(speed["ours"] / max(speed["dynamic"], speed["dynamic_bf16"]), 2),
        "times_import": round(seconds["second_run"] / seconds["import"], 2),
    }
    within = all(
        ratio <= GOALS[name] if name == "times_import" else ratio >= GOALS[name]
        for name, ratio in ratios.items()
    )
    result = {
        "benchmark": "bert",
        "model": f"{args.layers} 层 × {args.hidden}",
        "dataset": args.dataset,
        "rows": args.rows,
        "rows_per_s": speed,
        "seconds": seconds,
        **ratios,
        "goals": GOALS,
        "within_goals": within,
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch": version("torch"),
        "transformers": version("transformers"),
    }
    print(json.dumps(result, ensure_ascii=False))


if __name__ == "__main__":
    main()
