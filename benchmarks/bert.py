"""tiny 微调的速度：同样的行、同样的模型，我们的训练循环对 transformers 的 Trainer；以及第二次运行要多久。

用法：python benchmarks/bert.py [--rows 256] [--rounds 3] [--dataset 文件夹] [--layers 4 --hidden 256]
打印一行 JSON：各种设置的每秒行数（几轮的中位数，轮流跑，机器忽快忽慢时大家一起变）、我们是它们的几倍，
以及第二次运行从敲回车到打印预测的秒数是单单导入 BERT 类的几倍。进度写在 stderr。要空闲的机器，2 核上不到 4 分钟。
dynamic_bf16 要 CPU 有 bf16 指令（没有的话反而慢得多），没有就不跑，记作 null。

我们的和 transformers 的各在自己的进程里：我们的脚本一启动就让进程留住释放了的内存（nlp_common/fast/memory.py），
这件事整个进程都受影响，放在一个进程里就不是原样的 Trainer 了。
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
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


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def has_bf16() -> bool:
    """有没有 bf16 指令（CUDA，或 CPU 的 AMX、AVX512_BF16）；问的就是脚本自己决定用不用 bf16 的那个函数。"""
    from nlp_common.base.device import pick_device, precision_flags

    return precision_flags(pick_device(), cpu_bf16=True)["bf16"]


def give_memory_back() -> None:
    """在这个进程里不留住释放了的内存：原样的 Trainer 就是这样。"""
    os.environ["NLP_LEARNING_KEEP_MEMORY"] = "0"


def train_once(name: str, args, folder: str, n_rows: int) -> float:
    """用一种设置训练一遍：每秒几行。"""
    sys.path.insert(0, str(FOLDER))
    import torch
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        DataCollatorWithPadding,
        PrinterCallback,
        Trainer,
        TrainingArguments,
    )

    import bert_finetune_sentiment as script
    from nlp_common.base.device import precision_flags
    from nlp_common.base.runs import RunFolder
    from nlp_common.fast.bert_rows import use_read_rows
    from nlp_common.lm.classifier import attention, encode
    from nlp_common.tiny.bert import character_tokenizer
    from nlp_common.train.stage import Stage
    from nlp_common.train.trainer import BucketTrainer, trainer_arguments

    settings = script.SentimentSettings(**script.SentimentSettings.COMMON | script.PRESETS["tiny"])
    settings.dataset, settings.num_train_epochs = args.dataset, 1.0
    texts = script.load_data(settings)[0]["train"][: args.rows]
    tokenizer = character_tokenizer([row["text"] for row in texts])
    rows = encode(tokenizer, texts, settings.max_length)[:n_rows]
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=args.hidden,
            num_hidden_layers=args.layers,
            num_attention_heads=args.hidden // 64,
            intermediate_size=4 * args.hidden,
        )
    )
    if name == "ours":
        model.set_attn_implementation(attention())
        use_read_rows(model)  # 载入模型时装上的（nlp_common/lm/classifier.py）
        stage = Stage("sentiment", settings, RunFolder(Path(folder) / "run"), {}, {})
        kwargs = trainer_arguments(stage, **precision_flags(stage.device, settings.bf16, cpu_bf16=True))
    else:  # Trainer 的默认设置，只写明同样的批大小与学习率
        kwargs = {
            "output_dir": folder,
            "per_device_train_batch_size": settings.per_device_train_batch_size,
            "learning_rate": settings.learning_rate,
            "num_train_epochs": 1,
            "report_to": "none",
            "disable_tqdm": True,
        }
    if name == "dynamic_bf16":
        kwargs |= {"bf16": True, "use_cpu": not torch.cuda.is_available()}
    padding = {"padding": "max_length", "max_length": settings.max_length} if name == "max_length" else {}
    trainer = (BucketTrainer if name == "ours" else Trainer)(
        model=model,
        args=TrainingArguments(**kwargs | {"save_strategy": "no"}),
        train_dataset=rows,
        data_collator=DataCollatorWithPadding(tokenizer, **padding),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer.train().metrics["train_samples_per_second"]


def training_speed(args, folder: str) -> dict[str, float | None]:
    """每种设置每秒几行；几种设置轮流跑。"""

    names = ["ours", "max_length", "dynamic"]
    speeds: dict[str, list[float]] = {name: [] for name in names}
    if has_bf16():
        names.append("dynamic_bf16")
        speeds["dynamic_bf16"] = []
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as own, context.Pool(1, give_memory_back) as plain:
        for round_number in range(args.rounds + 1):
            for name in names:
                n_rows = 64 if round_number == 0 else args.rows  # 第 0 轮热身，不算
                pool = own if name == "ours" else plain
                speed = pool.apply(train_once, (name, args, folder, n_rows))
                what = f"第 {round_number} 轮" if round_number else "热身"
                progress(f"{what} {name}：每秒 {speed:.1f} 行")
                if round_number:
                    speeds[name].append(speed)
    found = {name: round(median(values), 1) for name, values in speeds.items()}
    return {"dynamic_bf16": None} | found


def startup(folder: str, repeat: int) -> dict[str, float]:
    """训练一个小模型，再量第二次运行的秒数。"""
    progress("训练一个小模型，量第二次运行…")
    command = [sys.executable, str(SCRIPT), "--preset", "tiny", "--output_dir", f"{folder}/model"]
    command += ["--mlm_epochs", "0", "--max_train_samples", "64", "--num_train_epochs", "1"]
    seconds: dict[str, list[float]] = {"import": [], "second_run": []}
    subprocess.run(command, check=True, capture_output=True)
    for _ in range(repeat):
        for name, arguments in (("import", [sys.executable, "-c", IMPORT]), ("second_run", command)):
            start = time.perf_counter()
            subprocess.run(arguments, check=True, capture_output=True)
            seconds[name].append(time.perf_counter() - start)
        progress(f"导入 {seconds['import'][-1]:.2f} 秒，第二次运行 {seconds['second_run'][-1]:.2f} 秒")
    return {name: round(median(values), 2) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=256, help="训练多少行")
    parser.add_argument("--rounds", type=int, default=3, help="每种设置训练几轮，取中位数")
    parser.add_argument("--repeat", type=int, default=5, help="第二次运行量几次，取中位数")
    parser.add_argument("--dataset", default="reviews", help="训练数据，写法同脚本的 --dataset")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--record", action="store_true", help="记进 docs/measurements")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seconds = startup(folder, args.repeat)
        speed = training_speed(args, folder)
    ratios = {
        "times_max_length": round(speed["ours"] / speed["max_length"], 2),
        "times_best_dynamic": round(speed["ours"] / max(speed["dynamic"], speed["dynamic_bf16"] or 0), 2),
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
    if args.record:
        from nlp_common.base.measurements import record

        names = ("rows_per_s", "seconds", "times_max_length", "times_best_dynamic", "times_import")
        record("sentiment", {"speed": {name: result[name] for name in names}})


if __name__ == "__main__":
    main()
