"""version_tracking.py 的几条命令：list、lineage、diff、reproduce、upload。"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nlp_common.base.arguments import option, parse_arguments
from nlp_common.base.console import padded
from nlp_common.base.errors import UserError
from nlp_common.base.measurements import ROOT
from nlp_common.train.tracking import PLACES
from run_again import reproduce
from run_compare import show_difference
from run_records import Run, faults, find_run, find_runs, lineage, show_lineage
from tracking_places import upload

HEADLINE = ("preferred_rate", "qa_accuracy", "test_accuracy", "heldout_loss", "accuracy")  # 列表里给看一个
NO_WEIGHTS = hashlib.sha256(b"").hexdigest()[:16]


@dataclass
class Where:
    runs: str | None = option("再到这个文件夹里找运行记录；仓库里各主题的 outputs 总是找的")


@dataclass
class Again(Where):
    output_dir: str | None = option("重做的结果写到哪个文件夹（还不存在的）")
    at_commit: bool = option("用那时的提交的代码，不用现在的", False)


@dataclass
class To(Where):
    report_to: str = option("补记到哪里", "mlflow", choices=PLACES[1:])


def split_names(words: list[str], wanted: int, usage: str) -> tuple[list[str], list[str]]:
    """命令后面的几个名字，和剩下的参数。"""
    names = words[:wanted]
    if len(names) < wanted or any(name.startswith("-") for name in names):
        raise UserError(f"要这样写：python version_tracking.py {usage}")
    return names, words[wanted:]


def all_runs(settings: Where) -> list[Run]:
    folder = Path(settings.runs).expanduser() if settings.runs else None
    if folder and not folder.is_dir():
        raise UserError(f"--runs 没有这个文件夹：{settings.runs}。")
    return find_runs(folder)


def list_runs(words: list[str]) -> list[Run]:
    """各阶段训练好的，旧的在前。"""
    runs = all_runs(parse_arguments(Where, words))
    if not runs:
        print(
            "还没有训练好的：先运行一个训练脚本，例如 python qwen_chinese_finetune/sft_chinese_qwen.py --preset tiny"
        )
    for run in sorted(runs, key=lambda run: (run.record["stage"], run.id)):
        metrics = run.record.get("metrics", {})
        shown = next(
            (f"{name} {metrics[name]:.3f}" for name in HEADLINE if isinstance(metrics.get(name), float)), ""
        )
        parents = "、".join(f"{p['stage']} {p['id'][:8]}" for p in run.record.get("parent", {}).values())
        folder = "（只有记录）"
        if run.folder:
            folder = (
                run.folder.relative_to(ROOT).as_posix()
                if run.folder.is_relative_to(ROOT)
                else str(run.folder)
            )
        print(
            f"{padded(run.record['stage'], 22)} {number_of(run)}  {padded(parents, 32)} {padded(shown, 22)} {folder}"
        )
    return runs


def number_of(run: Run) -> str:
    """编号的前八位；没有权重的一课（图、表）没有编号可言。"""
    return "—".ljust(8) if run.id == NO_WEIGHTS else run.id[:8]


def lineage_of(words: list[str]) -> list[str]:
    [name], rest = split_names(words, 1, "lineage 文件夹或编号")
    runs = all_runs(parse_arguments(Where, rest))
    tree = lineage(find_run(name, runs), runs)
    show_lineage(tree)
    found = faults(tree)
    print("一切还与训练时一样。" if not found else "与训练时不一样的：\n  " + "\n  ".join(found))
    return found


def diff(words: list[str]) -> None:
    names, rest = split_names(words, 2, "diff A B（各是文件夹或编号）")
    runs = all_runs(parse_arguments(Where, rest))
    show_difference(*(find_run(name, runs) for name in names))


def reproduce_one(words: list[str]) -> bool:
    [name], rest = split_names(words, 1, "reproduce 文件夹或编号 --output_dir 新文件夹")
    settings = parse_arguments(Again, rest)
    runs = all_runs(settings)
    run = find_run(name, runs)
    if settings.output_dir is None and run.folder is None:
        raise UserError("文件夹没有了，只有记录：用 --output_dir 说重做到哪里。")
    out = Path(settings.output_dir or run.folder.with_name(f"{run.folder.name}-again")).expanduser().resolve()
    if out == run.folder:
        raise UserError(f"--output_dir 就是原来的 {out}：换一个新的文件夹，才好比。")
    rebuilt = reproduce(run, runs, out, settings.at_commit)
    print(f"重做的在 {out}，编号 {rebuilt.run.id}")
    if rebuilt.same:
        print("与原来的逐位相同。")
    else:
        print(
            "与原来的不同。条件差在：" + ("；".join(rebuilt.causes) or "没有（可能是同样的设置在别的机器上）")
        )
        show_difference(run, rebuilt.run)
    return rebuilt.same


def upload_one(words: list[str]) -> None:
    [name], rest = split_names(words, 1, "upload 文件夹或编号 --report_to mlflow")
    settings = parse_arguments(To, rest)
    run = find_run(name, all_runs(settings))
    if not upload(run, settings.report_to).lost:  # 没有记上的，它自己说了
        print(f"{run.title} 补记好了。")


COMMANDS: dict[str, Callable[[list[str]], object]] = {
    "list": list_runs,
    "lineage": lineage_of,
    "diff": diff,
    "reproduce": reproduce_one,
    "upload": upload_one,
}
