"""两个 BERT 主题共有的部分：参数与预设、结果文件夹、训练参数。微调本身在各脚本里。

导入它不会导入 Trainer、scikit-learn、matplotlib：第二次运行只加载模型、预测，用不着它们。
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from .arguments import option, parse_arguments
from .bert_model import (
    MAX_POSITIONS,
    character_tokenizer,
    encode,
    learning_curve,
    load_classifier,
    predict,
    small_config,
)
from .cli import UserError
from .device import describe, library_versions, peak_memory_mb, pick_device, precision_flags, seed_everything
from .hub import announce, choose_preset, prepare_environment
from .labelled import texts_to_predict
from .row_files import READERS
from .rows import check_path
from .runs import CHECKPOINT_DONE, RunFolder, differences, file_sha256, load_run, open_run

__all__ = [  # 脚本只从这里导入，其中字表、编码、预测写在 bert_model.py
    "FULL_MODEL",
    "BertRun",
    "BertSettings",
    "character_tokenizer",
    "encode",
    "fingerprint",
    "learning_curve",
    "load_classifier",
    "open_bert_run",
    "parse_settings",
    "predict",
    "small_config",
    "texts_to_predict",
    "training_kwargs",
]
FULL_MODEL = "bert-base-chinese"
# 这些参数不影响训练结果，改了也可以直接用已有的模型。
NOT_IN_FINGERPRINT = {"preset", "output_dir", "source", "retrain", "dry_run", "predict", "predict_file"}
NOT_IN_FINGERPRINT |= {"bf16"}

POSITIVE = ("per_device_train_batch_size", "max_length", "num_train_epochs", "eval_steps", "learning_rate")
POSITIVE += ("max_train_samples", "hidden_size", "num_layers", "mlm_learning_rate")


@dataclass
class BertSettings:
    """两个微调脚本共有的参数；训练的那些与 transformers 的 TrainingArguments 同名。"""

    preset: Literal["auto", "tiny", "full"] = option(
        "tiny：离线的小 BERT 和自带数据，CPU 几分钟；full：bert-base-chinese；auto：有加速器又拿得到模型才用 full",
        "auto",
    )
    model: str | None = option(f"从哪个模型开始：hub 名或本地文件夹；full 默认 {FULL_MODEL}")
    dataset: str | None = option("数据：hub 名、本地文件夹或 json/jsonl/csv/tsv/parquet 文件")
    output_dir: str | None = option("模型存到哪个文件夹；默认在脚本所在的文件夹里")
    source: Literal["hf", "modelscope"] = option("hub 名从哪里下载", "hf")
    retrain: bool = option("不用已有的模型，重新训练", False)
    predict: list[str] | None = field(
        default=None, metadata={"help": "要判断的文字，可以写几段；已有训练好的模型就直接用它"}
    )
    predict_file: str | None = option("一个文件里的文字都判断：txt 每行一段，或 jsonl/csv 的 text 栏")
    dry_run: bool = option("只估算要多少内存、多少步、多久，不下载权重也不训练", False)
    seed: int = option("随机种子：同一种子，结果相同", 0)
    max_train_samples: int | None = option("最多用多少行训练数据")
    max_length: int | None = option("每段最多多少个 token，超出的截掉")
    per_device_train_batch_size: int | None = option("每个设备每步多少行")
    learning_rate: float | None = option("学习率的峰值")
    num_train_epochs: float | None = option("训练几遍数据")
    warmup_steps: float | None = option("学习率预热：步数，或小于 1 的比例")
    weight_decay: float | None = option("权重衰减")
    eval_steps: float | None = option("每几步在验证集上评测一次并存检查点；小于 1 是总步数的比例")
    bf16: bool | None = option("bf16 自动混合精度；默认看设备：CUDA 或 CPU 有 bf16 指令时用")


COMMON = {"warmup_steps": 0.1, "weight_decay": 0.01, "eval_steps": 0.25}


def parse_settings(settings_class, presets: dict[str, dict], argv: list[str] | None):
    """命令行 → 设置：先选预设（第一行就说选了哪个、为什么），再把没给的参数用预设补上。"""
    prepare_environment()  # HF_ENDPOINT 等要在导入 Hugging Face 的库之前设好
    settings = parse_arguments(settings_class, argv)
    choice = choose_preset(
        settings.preset, settings.model, full_model=FULL_MODEL, needs_accelerator=True, source=settings.source
    )
    print(announce(choice))
    settings.preset = choice.preset
    for name, value in (COMMON | presets[choice.preset]).items():
        if getattr(settings, name) is None:
            setattr(settings, name, value)
    check_sizes(settings)
    check_path(settings.dataset)  # 路径写错了，训练之前就说
    return settings


def check_sizes(settings: BertSettings) -> None:
    """训练到一半才会出错的数，现在就说。有的参数只有一个脚本有，有的预设用不着（None），都跳过。"""
    values = {name: value for name, value in dataclasses.asdict(settings).items() if value is not None}
    for name in POSITIVE:
        if values.get(name, 1) <= 0:
            raise UserError(f"--{name} 要大于 0，给的是 {values[name]}。")
    for name in ("mlm_epochs", "mlm_news"):
        if values.get(name, 0) < 0:
            raise UserError(f"--{name} 不能小于 0，给的是 {values[name]}；0 是不用。")
    if not 3 <= settings.max_length <= MAX_POSITIONS:
        raise UserError(
            f"--max_length 要在 3 到 {MAX_POSITIONS} 之间（[CLS]、[SEP] 占两个，BERT 只有 {MAX_POSITIONS} 个位置），"
            f"给的是 {settings.max_length}。"
        )
    if (width := values.get("hidden_size", 64)) > 64 and width % 64:
        raise UserError(f"--hidden_size 超过 64 时要是 64 的倍数（64 一个注意力头），给的是 {width}。")


# ---------------------------------------------------------------- 结果文件夹


class BertRun:
    """打开着的结果文件夹；``record`` 不是 None 说明早已训练完，直接用 ``path`` 里的模型。"""

    def __init__(self, folder: RunFolder, settings: BertSettings, fingerprint: dict):
        self.folder, self.settings, self.fingerprint = folder, settings, fingerprint
        self.path, self.device, self.started = folder.path, pick_device(), time.time()
        self.record: dict | None = None

    def seconds(self) -> float:
        return time.time() - self.started

    def checkpoint(self) -> Path | None:
        """可以接着训练的检查点；之前花掉的秒数也算进这次的记录。"""
        latest = self.folder.latest_checkpoint()
        if latest:
            self.started -= json.loads((latest / CHECKPOINT_DONE).read_text())["seconds"]
            print(f"接着上次的检查点继续：{latest.name}")
        return latest

    def finish(
        self,
        model,
        tokenizer,
        metrics: dict,
        data: dict,
        history: list[dict],
        *,
        draw: Callable[[Path], object] | None = None,
        **extra,
    ) -> dict:
        """把模型、分词器和 run.json 写成完成的文件夹，返回记录。draw(文件夹) 往里面画图，可以不给。"""
        record = {
            "data": data,
            "settings": dataclasses.asdict(self.settings),
            "fingerprint": self.fingerprint,
            "versions": library_versions(),
            "device": describe(self.device),
            "seconds": round(self.seconds(), 1),
            "peak_memory_mb": peak_memory_mb(),
            "metrics": metrics,
            "history": history,
            **extra,
        }

        def write(folder: Path) -> None:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            if draw:
                draw(folder)

        self.record = self.folder.finish(write, record)
        return self.record


@contextlib.contextmanager
def open_bert_run(
    path: Path, settings: BertSettings, fingerprint: dict, *, derived: bool = False
) -> Iterator[BertRun]:
    """锁住并打开结果文件夹。已有同样设置的结果时 BertRun 带着它的 record；只有 ``run.record is None`` 才要训练。

    设置不同的旧结果是 UserError，列出每一项不同；但读者只是要 --predict 时照用它，同时说明哪些不同。
    derived：中间结果，设置相同就用（--retrain 也用，重做一遍还是它），不同就说明哪些不同，重新做。
    """
    with open_run(path.expanduser().resolve()) as folder:
        run = BertRun(folder, settings, fingerprint)
        found = load_run(folder.path)
        changed = "；".join(differences(found["fingerprint"], fingerprint)) if found else ""
        if derived and changed:
            print(f"{path.name} 的设置和这次的不同，重新做（{changed}）。")
        elif derived or (found and not settings.retrain and (settings.predict or settings.predict_file)):
            run.record = found
            if changed:
                print(f"用 {path.name} 里已有的模型，它的设置和这次的不同（{changed}）。")
        elif not settings.retrain:
            run.record = folder.finished(fingerprint)
        if run.record is None:
            folder.start(fingerprint)
            seed_everything(settings.seed)
        yield run


def fingerprint(settings: BertSettings, drop: Sequence[str] = (), **more) -> dict:
    """决定结果的一切：设置（drop 里的除外）、本地数据文件的内容，以及 more（如上游模型的编号）。"""
    skip = NOT_IN_FINGERPRINT | set(drop)
    values = {k: v for k, v in dataclasses.asdict(settings).items() if k not in skip} | more
    place = Path(settings.dataset or "").expanduser()
    if settings.dataset and place.exists():
        files = [place] if place.is_file() else sorted([*place.glob("*.*"), *place.glob("data/*.*")])
        shas = [file_sha256(file)[:16] for file in files if file.suffix.lower() in READERS]
        values["dataset_sha256"] = " ".join(shas)
    return values


# ---------------------------------------------------------------- 训练参数


def mixed_precision(settings: BertSettings, device: torch.device) -> dict[str, bool]:
    """给 TrainingArguments 的 bf16 与 fp16。CPU 要有 bf16 指令（Intel AMX、AVX512_BF16），否则 bf16 反而慢。"""
    flags = precision_flags(device)
    if device.type == "cpu":
        has = getattr(torch.cpu, "get_capabilities", dict)()  # 旧版 torch 没有它
        flags["bf16"] = bool(has.get("amx_bf16") or has.get("avx512_bf16"))
    return flags if settings.bf16 is None else {"bf16": settings.bf16, "fp16": False}


def training_kwargs(run: BertRun) -> dict:
    """settings → TrainingArguments 的参数；脚本可以再改其中的几个。"""
    names = ["per_device_train_batch_size", "learning_rate", "num_train_epochs", "warmup_steps"]
    names += ["weight_decay", "seed"]
    return {
        **{name: getattr(run.settings, name) for name in names},
        **mixed_precision(run.settings, run.device),
        "use_cpu": run.device.type == "cpu",
        "output_dir": str(run.folder.checkpoints),
        "save_total_limit": 2,  # 最好的一个加上最近的一个
        "report_to": "none",
        "disable_tqdm": True,  # 进度由 Progress 显示
        "remove_unused_columns": False,
        "dataloader_pin_memory": run.device.type == "cuda",
    }
