"""一条链上的一个阶段：找到（或先训练好）上游的模型，再在 stage.py 的外壳里训练这一个。"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nlp_common.base.device import describe, library_versions
from nlp_common.base.errors import UserError
from nlp_common.base.processes import on_main, without_launcher
from nlp_common.base.runs import file_sha256, load_run, open_run, run_record
from nlp_common.hub.models import require_model
from nlp_common.train.settings import StageSettings, fingerprint
from nlp_common.train.stage import Stage, open_result, show_metrics

# Qwen 链各阶段的脚本；qwen_chinese_finetune/chain.py 也用这张表
QWEN_SCRIPTS = {
    "pretrain": "pretrain_chinese-nvidia.py",
    "sft": "sft_chinese_qwen.py",
    "reward": "reward_model.py",
    "dpo": "dpo_chinese_qwen.py",
    "ppo": "ppo_alignment.py",
    "grpo": "grpo_alignment.py",
}


@dataclass(frozen=True)
class Chain:
    """一条链：脚本所在的文件夹，阶段 → 训练它的脚本，full 预设从哪个模型开始。"""

    home: Path
    scripts: dict[str, str]
    full_model: str


def run_stage(
    name: str,
    settings: StageSettings,
    parents: dict[str, str],
    train: Callable[[Stage], dict],
    chain: Chain,
) -> dict:
    """跑一个阶段，返回 run.json 的内容；已有同样设置的结果就直接用，--dry_run 只估算。

    parents：设置里的字段名 → 上游阶段名，例如 ``{"model": "sft", "reward_model": "reward"}``。
    """
    if settings.dry_run:
        from nlp_common.train.dry_run_qwen import dry_run

        return {"dry_run": dry_run(name, settings, chain.full_model)}
    out = settings.output_dir or chain.home / "outputs" / settings.preset / name
    out = Path(out).expanduser().resolve()
    if settings.preset == "full" and "base" in parents.values() and not settings.model:
        settings.model = chain.full_model
    found = on_main(lambda: _find_parents(settings, out.parent, parents, chain))
    ids = {field: f"{parent['stage']}:{parent['id']}" for field, parent in found.items()}
    with open_result(out, name, settings, fingerprint(settings, **ids), found) as stage:
        if stage.record is None:
            print(f"起点 {stage.model_path}\n数据 {settings.dataset}，设备 {describe(stage.device)}")
            if record := train(stage):
                show_metrics(record["metrics"])
                print(f"已存到 {stage.path}（{record['seconds']:.0f} 秒）\n")
            return record
        show_metrics(stage.record["metrics"])
        return stage.record


def _find_parents(
    settings: StageSettings, root: Path, parents: dict[str, str], chain: Chain
) -> dict[str, dict]:
    found = {}
    for field, stage in parents.items():
        given = getattr(settings, field)
        if stage == "base" and not given:
            found[field] = _tiny_base(settings, root)
            continue
        folder = root / stage
        parent = find_trained(given, folder, settings.source, settings.verify)
        if parent is None:
            _train_first(settings, folder, field, stage, chain)
            parent = find_trained(None, folder)
        if stage == "reward":
            from nlp_common.lm.checks import check_scores  # 用到才导入：它要导入 transformers

            check_scores(parent["path"], f"--{field}")
        found[field] = {key: parent[key] for key in ("path", "stage", "id")}
    return found


def find_trained(given: str | None, folder: Path, source: str = "hf", verify: bool = False) -> dict | None:
    """命令行给的模型，没给就是 folder 里训练好的 → ``{"path", "stage", "id", "run"}``；还没有训练是 None。

    run 是运行记录，不是我们训练的没有。文件夹不完整、得不到 given 是 UserError。
    """
    run = None if given else load_run(folder)
    if run is None and not given:
        return None
    path = require_model(given or str(folder), source, verify)  # 复制、解压时坏了的文件，在这里就说出来
    run = run or run_record(path) or None
    stage, number = (run["stage"], run["id"]) if run else ("model", given)
    return {"path": str(path), "stage": stage, "id": number, "run": run}


def chain_model(stage: str = "sft", model: str | None = None, source: str = "hf") -> dict:
    """别的主题用的模型 → ``{"path", "stage", "id", "run"}``：--model 给的，没给就是 Qwen 链 tiny 预设的一个阶段。

    那个阶段还没有训练，就当场训练，并说出来。得不到 model 是 UserError。
    """
    home = Path(__file__).resolve().parents[2] / "qwen_chinese_finetune"
    folder = home / "outputs" / "tiny" / stage
    found = find_trained(model, folder, source)
    if found is None:
        script = home / QWEN_SCRIPTS[stage]
        print(f"要用 Qwen 链的 {stage} 模型，还没有训练：先运行 {script.name} --preset tiny …", flush=True)
        run_script(f"{stage} 没有训练成", script, "--preset", "tiny")
        found = find_trained(None, folder)
    assert found is not None
    return found


def _train_first(settings: StageSettings, folder: Path, field: str, stage: str, chain: Chain) -> None:
    """上一阶段还没有结果：tiny 先训练它，full 说该运行什么。"""
    script = chain.scripts[stage]
    if settings.preset == "full":
        raise UserError(
            f"还没有上一阶段的结果 {folder}。先运行：python {script} --preset full，"
            f"或用 --{field} 指定一个模型，或加 --preset tiny。"
        )
    print(f"还没有上一阶段（{stage}）的结果，先训练它 …", flush=True)
    options = ["--preset", settings.preset, "--seed", str(settings.seed), "--output_dir", str(folder)]
    run_script("上一阶段没有完成", chain.home / script, *options)


def run_script(failed: str, script: Path, *options: str) -> None:
    """另开一个进程运行一个阶段的脚本；没有跑完是 UserError，以 failed 开头。"""
    command = [sys.executable, str(script), *options]
    if code := subprocess.run(command, env=without_launcher()).returncode:
        raise UserError(f"{failed}（退出码 {code}）：{' '.join(command[1:])}")


def _tiny_base(settings: StageSettings, root: Path) -> dict:
    """tiny 预设的起点：没训练过的小模型，存成 hub 布局的文件夹 outputs/tiny/base。"""
    from nlp_common.tiny import qwen, world

    sources = [Path(module.__file__) for module in (qwen, world)]
    wanted = {"seed": settings.seed, "sources": [file_sha256(path)[:12] for path in sources]}
    with open_run(root / "base") as folder:
        run = None if settings.retrain else folder.finished(wanted)
        if run is None:
            record = {"stage": "base", "fingerprint": wanted, "versions": library_versions()}
            run = folder.finish(lambda path: qwen.save_tiny_base(path, settings.seed), record)
    return {"path": str(root / "base"), "stage": "base", "id": run["id"]}
