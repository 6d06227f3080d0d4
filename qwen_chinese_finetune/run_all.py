"""整条链一次跑完：预训练 → SFT → 奖励模型 → DPO → PPO → 对比，最后是一张表和一份网页报告。

学到什么：同一个模型怎样一步步从续写变成聊天、再变得合人心意；每一步花了多久，换来了什么。

运行：
    python run_all.py                                      # 自动选预设
    python run_all.py --preset tiny                        # 离线小世界，2 核 CPU 三到五分钟
    python run_all.py --preset full                        # Qwen1.5-0.5B 与真实数据，需要加速器
    python run_all.py --preset tiny --until sft            # 只跑到 SFT
    python run_all.py --preset tiny --with grpo            # 再加上 GRPO（验证器打分）
    python run_all.py --preset tiny --max_steps 2          # 每个阶段只走两步，看看能不能跑通

做完的阶段直接用；Ctrl-C 之后再运行同一条命令，从最近的检查点接着来。

预期输出（tiny，实测见本文件夹的 README.md）：种子 0 各阶段的指标都达到表里的目标；
outputs/tiny/report.html 里有损失与奖励曲线、各模型的正确率、长度分布和并排的回答。
"""

from nlp_common.base.cli import run_main

import gc
import importlib.util
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table

from chain import EXTRA, FULL_MODEL, HOME, SCRIPTS, STAGES
from nlp_common.base.arguments import option, parse_arguments
from nlp_common.base.device import accelerator_available, describe, peak_memory_mb, pick_device
from nlp_common.base.environment import STARTED
from nlp_common.base.errors import UserError
from nlp_common.base.measurements import current_commit, record
from nlp_common.hub.preset import announce, choose_preset
from nlp_common.train.settings import preset_announced
from report.metrics import highlights
from report.write import write_report

WHAT = {
    "pretrain": "在文档上学续写",
    "sft": "在对话上学一问一答，学会停",
    "reward": "从偏好对学会打分",
    "dpo": "从偏好对直接调整 SFT 模型",
    "ppo": "让 SFT 模型自己回答，照奖励模型的分调整",
    "grpo": "一题写一组回答，照验证器的分调整",
    "compare": "同样的题问各个模型",
}


@dataclass
class RunAllSettings:
    preset: Literal["auto", "tiny", "full"] = option(
        "tiny：离线的小模型小世界，CPU 几分钟；full：真模型真数据；auto：有加速器又拿得到模型才用 full",
        "auto",
    )
    until: Literal["pretrain", "sft", "reward", "dpo", "ppo", "compare"] = option(
        "跑到哪个阶段为止", "compare"
    )
    extra: Literal["grpo"] | None = option("另外再跑一个阶段，在对比之前", aliases=["--with"])
    output_dir: str | None = option("各阶段的结果放在哪里；默认 outputs/<预设>，在脚本所在的文件夹里")
    model: str | None = option("预训练从哪个模型开始：hub 名或本地文件夹；默认 tiny 是内置的小模型")
    source: Literal["hf", "modelscope"] = option("hub 名从哪里下载", "hf")
    retrain: bool = option("不用已有的结果，全部重来", False)
    record: bool = option("把各阶段的数、秒数、内存记进 docs/measurements/qwen.jsonl", False)
    seed: int = option("随机种子：同一种子，结果相同", 0)
    max_steps: int | None = option("每个训练阶段最多更新几步：试运行用")
    max_train_samples: int | None = option("每个训练阶段最多用多少行数据：试运行用")
    max_eval_samples: int | None = option("每次评测最多用多少道题：试运行用")
    per_device_train_batch_size: int | None = option("每个训练阶段每步多少行：试运行用")

    def tried_out(self) -> bool:
        """只跑几步、几行的试运行：数字没有意义，不与目标比。"""
        return any((self.max_steps, self.max_train_samples, self.max_eval_samples))


# ---------------------------------------------------------------- 1. 各阶段的脚本


def load_script(stage: str) -> ModuleType:
    """按路径载入阶段脚本：文件名里有连字符，不能 import；在同一个进程里跑，大库只导入一次。"""
    file = {**SCRIPTS, "compare": "compare_alignment.py"}[stage]
    if stage == "pretrain" and pick_device().type == "mps":
        file = "pretrain_chinese-mac.py"
    name = Path(file).stem.replace("-", "_")
    spec = importlib.util.spec_from_file_location(name, HOME / file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclass 要能从模块名找到模块
    spec.loader.exec_module(module)
    return module


def arguments(stage: str, settings: RunAllSettings, root: Path) -> list[str]:
    """这个阶段的命令行参数，与单独运行它的脚本时写的一样。"""
    passed = {"max_eval_samples": settings.max_eval_samples, "source": settings.source}
    if stage == "compare":
        passed |= {"output_root": root, "samples": 3}  # 更多的在 report.html 里
        if settings.extra:
            passed |= {"mode": f"all-{settings.extra}", "output_dir": root / stage}
    else:
        passed |= {"preset": settings.preset, "seed": settings.seed, "output_dir": root / stage}
        names = ("max_steps", "max_train_samples", "per_device_train_batch_size")
        passed |= {name: getattr(settings, name) for name in names}
    if stage == "pretrain":
        passed["model"] = settings.model
    argv = [text for name, value in passed.items() if value is not None for text in (f"--{name}", str(value))]
    return argv + ["--retrain"] * settings.retrain


def free_memory() -> None:
    """上一阶段的模型和优化器已经没有用，让出内存和显存。"""
    gc.collect()
    if accelerator_available():
        torch.accelerator.empty_cache()


# ---------------------------------------------------------------- 2. 一个个跑


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def run_stages(settings: RunAllSettings, stages: list[str], root: Path, console: Console) -> None:
    for number, stage in enumerate(stages, 1):
        title = f"[bold]{number}/{len(stages)} {STAGES[stage]}[/]：{WHAT[stage]}"
        console.rule(f"{title}　已用 {clock(time.perf_counter() - STARTED)}", align="left")
        with preset_announced():
            load_script(stage).main(arguments(stage, settings, root))
        free_memory()


def show_summary(console: Console, report: dict, with_targets: bool) -> None:
    table = Table(title="各阶段训练前后（留出数据）", title_justify="left")
    for name in ("阶段", "秒", "指标"):
        table.add_column(name)
    for name in ("之前", "之后", "目标"):
        table.add_column(name, justify="right")
    last = None
    for row in highlights(report["stages"], with_targets):
        stage = row["stage"]
        seconds = f"{report['stages'][stage]['seconds']:.0f}"
        before = "" if row["before"] is None else f"{row['before']:.3f}"
        color, mark = {True: ("green", " ✓"), False: ("red", " ✗"), None: ("default", "")}[row["reached"]]
        table.add_row(
            STAGES[stage] if stage != last else "",
            seconds if stage != last else "",
            row["label"],
            before,
            f"{row['value']:.3f}",
            f"[{color}]{row['target'] or ''}{mark}[/]",
        )
        last = stage
    console.print(table)


# ---------------------------------------------------------------- 3. 主程序


def check_machine(settings: RunAllSettings) -> None:
    """full 要训练真模型五次；没有加速器就说清楚，不让人等上几天。"""
    if settings.preset == "full" and not accelerator_available() and not settings.max_steps:
        raise UserError(
            f"--preset full 要在真实数据上训练 {settings.model or FULL_MODEL} 五个阶段，这台机器没有加速器"
            "（CUDA 或 Apple MPS），要跑好几天。用 --preset tiny 在 CPU 上几分钟跑完整条链；"
            "只想试试能不能跑通，加 --max_steps 2；或者一个阶段一个阶段地运行各脚本。"
        )


def check_record(settings: RunAllSettings, stages: list[str], root: Path) -> None:
    """--record 只记这一次从头到尾量到的；不能记的，跑之前就说。"""
    current_commit()
    changed = settings.tried_out() or settings.model or settings.per_device_train_batch_size
    if settings.preset != "tiny" or changed:
        raise UserError(
            "--record 记的是 --preset tiny 默认的整条链，不要与 --max_steps、--model 一类的参数一起用。"
        )
    if not settings.retrain and any((root / stage).exists() for stage in stages):
        raise UserError(
            f"{root} 里有以前的结果，--record 只记这次量到的：再加上 --retrain，或换一个 --output_dir。"
        )


def record_report(report: dict) -> None:
    """名字与 report.json、run.json 里的相同：qwen.sft.qa_accuracy、qwen.sft.seconds……"""
    whole = {name: report[name] for name in ("seconds", "wall_seconds", "peak_memory_mb")}
    record("qwen", {**report["stages"], "run_all": whole}, seed=report["seed"])


def main(argv: list[str] | None = None) -> dict:
    settings = parse_arguments(RunAllSettings, argv)
    choice = choose_preset(
        settings.preset, settings.model, full_model=FULL_MODEL, needs_accelerator=True, source=settings.source
    )
    print(announce(choice))
    settings.preset = choice.preset
    check_machine(settings)
    root = Path(settings.output_dir or HOME / "outputs" / settings.preset).expanduser().resolve()
    stages = [stage for stage in STAGES if stage not in EXTRA or stage == settings.extra]
    stages = stages[: stages.index(settings.until) + 1]
    if settings.extra and settings.extra not in stages:
        raise UserError(
            f"--with {settings.extra} 在 PPO 之后、对比之前跑，不要与 --until {settings.until} 一起用。"
        )
    if settings.record:
        check_record(settings, stages, root)
    console = Console()
    print(f"共 {len(stages)} 个阶段，设备 {describe(pick_device())}，结果放在 {root}")
    run_stages(settings, stages, root, console)

    console.rule(f"[bold]完成[/]　共用 {clock(time.perf_counter() - STARTED)}", align="left")
    with_targets = settings.preset == "tiny" and not settings.tried_out()
    report = write_report(
        root,
        stages,
        settings.preset,
        with_targets,
        seed=settings.seed,
        device=describe(pick_device()),
        wall_seconds=round(time.perf_counter() - STARTED, 1),
        peak_memory_mb=peak_memory_mb(),
    )
    show_summary(console, report, with_targets)
    print(
        f"各阶段共 {report['seconds']:.0f} 秒；这次用了 {report['wall_seconds']:.0f} 秒（含导入和直接加载）。"
    )
    print(f"报告：{root / 'report.html'}（用浏览器打开，不用联网）")
    if settings.record:
        record_report(report)
    return report


if __name__ == "__main__":
    run_main(main)
