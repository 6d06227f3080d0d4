"""一个训练阶段的外壳：参数与预设、上一阶段的模型、输出文件夹、运行记录。算法在各脚本里，这里没有。"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

from nlp_common.arguments import option, parse_arguments
from nlp_common.cli import UserError
from nlp_common.device import describe, library_versions, peak_memory_mb, pick_device, seed_everything
from nlp_common.hub import announce, choose_preset, require_model
from nlp_common.processes import num_processes, on_main, without_launcher
from nlp_common.rows import check_path
from nlp_common.runs import CHECKPOINT_DONE, RunFolder, file_sha256, load_run, open_run

HOME = Path(__file__).resolve().parent.parent  # qwen_chinese_finetune/
FULL_MODEL = "Qwen/Qwen1.5-0.5B"
SCRIPTS = {
    "pretrain": "pretrain_chinese-nvidia.py",
    "sft": "sft_chinese_qwen.py",
    "reward": "reward_model.py",
    "dpo": "dpo_chinese_qwen.py",
    "ppo": "ppo_alignment.py",
}
# 这些参数不影响结果，改了也可以直接用已有的结果。
NOT_IN_FINGERPRINT = {
    "preset",
    "output_dir",
    "retrain",
    "dry_run",
    "show_batch",
    "logging_steps",
    "save_steps",
    "source",
    "verify",
}


@dataclass
class StageSettings:
    """各训练脚本共有的参数，名字与 transformers 的 TrainingArguments 相同。"""

    preset: Literal["auto", "tiny", "full"] = option(
        "tiny：离线的小模型小世界，CPU 几分钟；full：真模型真数据；auto：有加速器又拿得到模型才用 full",
        "auto",
    )
    model: str | None = option("从哪个模型开始：hub 名、本地文件夹或 smollm2；默认是上一阶段的结果")
    dataset: str | None = option("训练数据：内置名、hub 名、本地文件夹或 json/jsonl/csv/tsv/parquet/txt 文件")
    eval_dataset: str | None = option(
        "留出数据，写法同 --dataset；默认用数据集自带的，没有就从训练数据里分出来"
    )
    output_dir: str | None = option("结果写到哪个文件夹；默认 outputs/<预设>/<阶段>，在脚本所在的文件夹里")
    source: Literal["hf", "modelscope"] = option("hub 名从哪里下载", "hf")
    verify: bool = option("核对下载的模型：每个文件的大小和哈希与服务器上的一不一样", False)
    dry_run: bool = option("只估算要多少内存、多少步、多久，不下载权重也不训练", False)
    retrain: bool = option("不用已有的结果，重新训练", False)
    seed: int = option("随机种子：同一种子，结果相同", 0)
    max_train_samples: int | None = option("最多用多少行训练数据")
    max_eval_samples: int | None = option("留出数据最多用多少行")
    max_length: int | None = option("每行最多多少个 token；更长的行不用，并报告有几行")
    per_device_train_batch_size: int | None = option("每个设备每步多少行")
    gradient_accumulation_steps: int | None = option("累积几步的梯度再更新一次")
    learning_rate: float | None = option("学习率的峰值")
    num_train_epochs: float | None = option("训练几遍数据")
    max_steps: int | None = option("最多更新几步；-1 表示由 num_train_epochs 决定")
    warmup_steps: float | None = option("学习率预热：步数，或小于 1 的比例")
    weight_decay: float | None = option("权重衰减")
    adam_beta2: float | None = option("Adam 二阶矩的衰减：步数少时取小些，跟得上梯度的变化")
    max_grad_norm: float | None = option("梯度裁剪的范数")
    lr_scheduler_type: str | None = option("学习率曲线：linear、cosine、constant …")
    gradient_checkpointing: bool | None = option("用时间换显存：反向时重算激活")
    dataloader_num_workers: int | None = option("读数据的进程数")
    logging_steps: int | None = option("每几步记一次 loss")
    save_steps: int | None = option("每几步存一个检查点，中断后从它继续")


COMMON = {
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 1.0,
    "max_steps": -1,
    "warmup_steps": 0.05,
    "weight_decay": 0.0,
    "adam_beta2": 0.999,
    "max_grad_norm": 1.0,
    "lr_scheduler_type": "linear",
    "gradient_checkpointing": False,
    "dataloader_num_workers": 0,
    "logging_steps": 10,
    "save_steps": 100,
    "max_eval_samples": 500,
}


_announced = ContextVar("announced", default=False)


@contextlib.contextmanager
def preset_announced() -> Iterator[None]:
    """已经说过用了哪个预设：在这里面运行的阶段不再各说一遍。"""
    token = _announced.set(True)
    try:
        yield
    finally:
        _announced.reset(token)


def parse_settings(settings_class, presets: dict[str, dict], argv: list[str] | None):
    """命令行 → 设置：先选预设（第一行就说选了哪个、为什么），再把没给的参数用预设补上。"""
    settings = parse_arguments(settings_class, argv)
    choice = on_main(
        lambda: choose_preset(
            settings.preset,
            settings.model,
            full_model=FULL_MODEL,
            needs_accelerator=True,
            source=settings.source,
        )
    )
    if not _announced.get():
        print(announce(choice))
    settings.preset = choice.preset
    for name, value in (COMMON | presets[choice.preset]).items():
        if getattr(settings, name) is None:
            setattr(settings, name, value)
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "max_length"):
        if getattr(settings, name) < 1:
            raise UserError(f"--{name} 要是正整数，给的是 {getattr(settings, name)}。")
    return settings


class Stage:
    """进行中的一个阶段；``record`` 不是 None 说明早已训练完。"""

    def __init__(self, name: str, settings: StageSettings, folder: RunFolder, parents: dict[str, dict]):
        self.name, self.settings, self.folder, self.parents = name, settings, folder, parents
        self.device = pick_device()
        self.started = time.time()
        self.record: dict | None = None

    @property
    def model_path(self) -> str:
        return self.parents["model"]["path"]

    def start(self) -> dict | None:
        """早已训练完就返回它的记录；不然备好工作文件夹。"""
        wanted = fingerprint(self.settings, self.parents)
        record = None if self.settings.retrain else self.folder.finished(wanted)
        if record is None:
            self.folder.start(wanted)
        return record

    def checkpoint(self) -> Path | None:
        """可以接着训练的检查点；之前花掉的秒数也算进这次的记录。"""
        latest = on_main(self.folder.latest_checkpoint)
        if latest:
            self.started -= json.loads((latest / CHECKPOINT_DONE).read_text())["seconds"]
            print(f"接着上次的检查点继续：{latest.name}")
        return latest

    def seconds(self) -> float:
        return time.time() - self.started

    def finish(
        self,
        model,
        tokenizer,
        metrics: dict,
        data: dict,
        history: list[dict],
        state: dict | None = None,
        **extra,
    ) -> dict:
        """把模型、分词器和 run.json 写成完成的文件夹，返回记录。state：参数分片时，收齐的那一份（full_state）。"""
        record = {
            "stage": self.name,
            "parent": self.parents,
            "data": data,
            "settings": dataclasses.asdict(self.settings),
            "fingerprint": fingerprint(self.settings, self.parents),
            "versions": library_versions(),
            "device": describe(self.device),
            "seconds": round(self.seconds(), 1),
            "peak_memory_mb": peak_memory_mb(),
            "metrics": metrics,
            "history": history,
            **extra,
        }

        def write(folder: Path) -> None:
            model.save_pretrained(folder, state_dict=state)
            tokenizer.save_pretrained(folder)

        self.record = on_main(lambda: self.folder.finish(write, record))
        show_metrics(metrics)
        print(f"已存到 {self.folder.path}（{record['seconds']:.0f} 秒）\n")
        return self.record


def show_metrics(metrics: dict) -> None:
    for name, value in metrics.items():
        if isinstance(value, float):
            print(f"  {name:<28}{value:.4f}")
        elif not isinstance(value, (dict, list)):
            print(f"  {name:<28}{value}")


def fingerprint(settings: StageSettings, parents: dict[str, dict]) -> dict:
    """决定结果的一切：设置、上游模型的编号、本地数据文件的内容。"""
    values = {k: v for k, v in dataclasses.asdict(settings).items() if k not in NOT_IN_FINGERPRINT}
    for field_name, parent in parents.items():
        values[field_name] = f"{parent['stage']}:{parent['id']}"
    if num_processes() > 1:  # 一步多少行，要乘上它
        values["num_processes"] = num_processes()
    for name in ("dataset", "eval_dataset"):
        path = Path(values[name] or "")
        if path.is_file():
            values[f"{name}_sha256"] = file_sha256(path)
    return values


def _parent(settings: StageSettings, root: Path, field_name: str, stage: str) -> dict:
    """找到上一阶段的模型：命令行给的，或同一组结果里的；tiny 缺了就先训练它，full 缺了就说该运行什么。"""
    given = getattr(settings, field_name)
    if given:
        path = require_model(given, settings.source, settings.verify)
        run_file = Path(path) / "run.json"
        run = load_run(Path(path)) if run_file.exists() else {"stage": "model", "id": given}
        return {"path": str(path), "stage": run["stage"], "id": run["id"]}
    path = root / stage
    run = load_run(path)
    if run is None:
        command = [sys.executable, str(HOME / SCRIPTS[stage]), "--preset", settings.preset]
        if settings.preset == "full":
            raise UserError(
                f"还没有上一阶段的结果 {path}。先运行：python {SCRIPTS[stage]} --preset full，"
                f"或用 --{field_name} 指定一个模型，或加 --preset tiny。"
            )
        print(f"还没有上一阶段（{stage}）的结果，先训练它 …", flush=True)
        command += ["--seed", str(settings.seed), "--output_dir", str(path)]
        if code := subprocess.run(command, env=without_launcher()).returncode:
            raise UserError(f"上一阶段没有完成（退出码 {code}）：{' '.join(command[1:])}")
        run = load_run(path)
    require_model(str(path))  # 复制、解压时坏了的文件，在这里就说出来
    return {"path": str(path), "stage": stage, "id": run["id"]}


def _tiny_base(settings: StageSettings, root: Path) -> dict:
    """tiny 预设的起点：没训练过的小模型，存成 hub 布局的文件夹 outputs/tiny/base。"""
    from . import tiny_model, tiny_world

    sources = [Path(module.__file__) for module in (tiny_model, tiny_world)]
    wanted = {"seed": settings.seed, "sources": [file_sha256(path)[:12] for path in sources]}
    with open_run(root / "base") as folder:
        run = None if settings.retrain else folder.finished(wanted)
        if run is None:
            record = {"stage": "base", "fingerprint": wanted, "versions": library_versions()}
            run = folder.finish(lambda path: tiny_model.save_tiny_base(path, settings.seed), record)
    return {"path": str(root / "base"), "stage": "base", "id": run["id"]}


def _find_parents(settings: StageSettings, root: Path, parents: dict[str, str]) -> dict[str, dict]:
    return {
        field_name: _tiny_base(settings, root)
        if stage_name == "base" and not getattr(settings, field_name)
        else _parent(settings, root, field_name, stage_name)
        for field_name, stage_name in parents.items()
    }


@contextlib.contextmanager
def open_stage(name: str, settings: StageSettings, parents: dict[str, str]) -> Iterator[Stage]:
    """打开一个阶段：锁住输出文件夹、找好上游模型、设好随机种子。

    parents：设置里的字段名 → 上游阶段名，例如 ``{"model": "sft", "reward_model": "reward"}``。
    已有同样设置的结果时，给出的 Stage 带着它的 record，脚本直接返回即可。
    """
    out = Path(settings.output_dir) if settings.output_dir else HOME / "outputs" / settings.preset / name
    out = out.expanduser().resolve()
    for name_or_path in (settings.dataset, settings.eval_dataset):
        check_path(name_or_path)  # 路径写错了，不必等上一阶段训练完才知道
    if settings.dry_run:
        from .dry_run import dry_run

        yield SimpleNamespace(record={"dry_run": dry_run(name, settings, FULL_MODEL)})
        return
    if settings.preset == "full" and "base" in parents.values() and not settings.model:
        settings.model = FULL_MODEL
    found = on_main(lambda: _find_parents(settings, out.parent, parents))
    with open_run(out) as folder:
        stage = Stage(name, settings, folder, found)
        stage.record = on_main(lambda: stage.start())
        if stage.record:
            print(f"已有训练结果，直接加载：{out}（--retrain 重新训练）")
            show_metrics(stage.record["metrics"])
        else:
            seed_everything(settings.seed)
            print(f"起点 {stage.model_path}\n数据 {settings.dataset}，设备 {describe(stage.device)}")
        yield stage
