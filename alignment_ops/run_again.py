"""照一份运行记录，把那次训练再做一遍，看是不是逐位相同：数据、上一次、设置、线程数都照那时的。"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

from nlp_common.base.errors import UserError
from nlp_common.base.measurements import ROOT, git
from nlp_common.base.processes import without_launcher
from nlp_common.base.runs import load_run
from nlp_common.train.chain import QWEN_SCRIPTS
from run_compare import compare, same_weights
from run_records import Run, check_data, check_weights, data_places, find_parent

# 不决定结果的，不照抄
LEFT_OUT = {
    "output_dir",
    "retrain",
    "record",
    "report_to",
    "dry_run",
    "show_batch",
    "verify",
    "predict",
    "predict_file",
}
LAST_LINES = 12


@dataclass
class Rebuilt:
    run: Run
    same: bool  # 权重逐位相同，指标也相同（快慢除外）
    causes: list[str]  # 不同时，两边的条件差在哪里
    parents: int  # 为了它，又重做了几次上游


def reproduce(run: Run, runs: list[Run], out: Path, at_commit: bool = False) -> Rebuilt:
    """在 out 里把 run 再做一遍。上一次的文件夹没有了，照它的记录先重做它；数据不在了、改过了是 UserError。

    at_commit：用那时的提交的代码（git archive 取出来，不动工作副本）。
    """
    record = run.record
    if "settings" not in record:
        raise UserError(f"{run.title} 的记录里没有设置，没法照样再做。")
    for name, (path, recorded) in data_places(record).items():
        if fault := check_data(path, recorded):
            raise UserError(f"{run.title} 用的 --{name} {path}：{fault}。找回那时的文件，才能照样再做。")
    given, rebuilt_parents = {}, 0
    for field, parent in record.get("parent", {}).items():
        folder, count = ready_parent(field, parent, runs, out, at_commit)
        rebuilt_parents += count
        if folder:
            given[field] = str(folder)
    script, code = find_script(record, out, at_commit)
    print(f"重做 {run.title}：{script.name} …", flush=True)
    run_again(script, code, record, given, out)
    again = load_run(out)
    assert again is not None, f"{script.name} 结束了，却没有 {out}"
    new = Run(again, out)
    found = compare(run, new)
    causes = [
        f"{name}：{left} → {right}"
        for group in ("设置", "数据", "上一次", "代码", "版本", "机器")
        for name, left, right in found[group]
    ]
    return Rebuilt(new, same_weights(run, new) and not found["指标"], causes, rebuilt_parents)


def ready_parent(
    field: str, parent: dict, runs: list[Run], out: Path, at_commit: bool
) -> tuple[Path | None, int]:
    """→ (上一次的文件夹, 重做了几次)。文件夹还在、权重没变就用它，不然照记录重做。"""
    found, problem = find_parent(parent, runs)
    if found and found.folder and not check_weights(found.folder, found.record):
        return found.folder, 0
    if parent["stage"] == "base":  # 没训练过的小模型：脚本自己会按种子再搭一个
        return None, 0
    if found is None:
        raise UserError(
            f"上一次（--{field}）{parent['stage']} {parent['id'][:8]} 用不了：{problem}。没有它就没法照样再做。"
        )
    print(f"上一次 {found.title} 的文件夹没有了，或权重变了：照记录先重做它")
    place = out.with_name(f"{out.name}-parents") / f"{found.record['stage']}-{found.id[:8]}"
    rebuilt = reproduce(found, runs, place, at_commit)
    if rebuilt.run.id != parent["id"]:
        raise UserError(
            f"重做出来的 {found.title} 与那时的不同（{'；'.join(rebuilt.causes) or '条件都相同'}），从它往下做不会相同，停在这里。"
        )
    return place, rebuilt.parents + 1


def find_script(record: dict, out: Path, at_commit: bool) -> tuple[Path, Path]:
    """→ (脚本, 代码的根)。"""
    name = record.get("script")
    if record["stage"] in QWEN_SCRIPTS:
        name = f"qwen_chinese_finetune/{QWEN_SCRIPTS[record['stage']]}"
    if not name:
        raise UserError(f"{record['stage']} 的记录里没有脚本（它是旧版本训练的），不知道该运行什么。")
    code = export_commit(record.get("commit"), out) if at_commit else ROOT
    if not (code / name).is_file():
        raise UserError(f"没有脚本 {name}：代码已经改了，加 --at_commit true 用那时的代码。")
    return code / name, code


def export_commit(commit: str | None, out: Path) -> Path:
    """那时的代码，放在 out 旁边；工作副本不动。"""
    if not commit:
        raise UserError("记录里没有提交，没法取出那时的代码：去掉 --at_commit。")
    if commit.endswith("+"):
        print(f"那时的代码在 {commit[:-1]} 之后还有没提交的改动，取不回来：用 {commit[:-1]} 的。")
    commit = commit.rstrip("+")
    folder = out.with_name(f"{out.name}-code")
    if not folder.exists():
        git("rev-parse", "--verify", f"{commit}^{{commit}}")
        packed = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=True).stdout
        with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            archive.extractall(folder, filter="data")
    return folder


def arguments(record: dict, given: dict[str, str]) -> list[str]:
    """记录里的设置 → 命令行；相对的数据路径换成绝对的。"""
    settings = {name: value for name, value in record["settings"].items() if name not in LEFT_OUT} | given
    settings |= {name: str(path) for name, (path, _) in data_places(record).items()}
    words: list[str] = []
    for name, value in settings.items():
        if value is None or value == []:
            continue
        shown = value if isinstance(value, list) else [value]
        words += [
            f"--{name}",
            *(str(each).lower() if isinstance(each, bool) else str(each) for each in shown),
        ]
    return words


def run_again(script: Path, code: Path, record: dict, given: dict[str, str], out: Path) -> None:
    command = [sys.executable, str(script), *arguments(record, given), "--output_dir", str(out)]
    environment = without_launcher() | {"PYTHONIOENCODING": "utf-8", "PYTHONPATH": str(code)}
    if record.get("threads"):  # 线程数不同，加法的次序就不同
        environment["OMP_NUM_THREADS"] = str(record["threads"])
    log = out.with_name(f"{out.name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(
            command, env=environment, stdout=file, stderr=subprocess.STDOUT, cwd=os.getcwd()
        )
    if done.returncode in (130, -2):
        raise KeyboardInterrupt
    if done.returncode:
        said = "\n  ".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:])
        raise UserError(
            f"没有重做成（退出码 {done.returncode}），全部输出在 {log}，最后几行：\n  {said}\n"
            "代码改过、参数不认识的，加 --at_commit true 用那时的代码。"
        )
