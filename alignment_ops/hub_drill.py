"""dpo_hf_run.py 的演习：本机开一个 hub，两台"机器"是两个文件夹，各自运行真的命令；机器一在路上被杀掉。"""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from nlp_common.base.errors import UserError
from nlp_common.base.processes import without_launcher
from nlp_common.base.runs import load_run
from nlp_common.draw.plots import line_chart
from nlp_common.hub.local_hub import LocalHub
from nlp_common.train.stage import Stage
from stages import run_stage

REPO = "learner/qwen-dpo"
OURS = ("HF_TOKEN", "HF_ENDPOINT", "HF_HOME", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
LAST_LINES = 12


def run_drill(stage: Stage, script: Path, start: str, options: dict) -> dict:
    """不中断的一次作对照 → 机器一被杀、机器二接着，权重一样不一样 → 只带走权重的 → 十种错 → 令牌漏了没有。"""
    settings, work = stage.settings, stage.folder.work / "parts"
    print("对照：从头训练到尾，不中断 …", flush=True)
    whole = run_stage("dpo", work / "whole", start, settings.dataset, "tiny", **options)

    token = f"hf_{secrets.token_hex(16)}"
    with LocalHub({}, users={token: "learner"}) as hub:
        two, drill = two_machines(hub, token, work, script, settings, options, start)
        repository = dict(hub.repos[f"models/{REPO}"])
    left = max(10, whole["history"][-1]["step"] - drill["resumed_from"])
    print(f"只带走权重：把那个检查点的权重当作新的起点，再走剩下的 {left} 步 …", flush=True)
    bare = run_stage(
        "dpo", work / "bare", work / "bare_start", settings.dataset, "tiny", **options, max_steps=left
    )
    said = ten_faults(work, script)
    leaks = [name for name, data in repository.items() if token.encode() in data]
    leaks += [str(path) for path in work.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]

    metrics = {
        "same_weights": float(two["id"] == whole["id"]),
        "same_metrics": float(quality(two["metrics"]) == quality(whole["metrics"])),
        **drill,
        "faults_explained": sum(bool(text) for text in said.values()),
        "token_leaks": len(leaks),
        **{name: two["metrics"][name] for name in SHOWN if name in two["metrics"]},
        "bare": {name: bare["metrics"][name] for name in SHOWN if name in bare["metrics"]},
    }

    def write(folder: Path) -> None:
        draw(folder, two["history"], bare["history"], drill["resumed_from"])
        shutil.copytree(work / "machine_two" / "dpo", folder / "model")

    return stage.save(
        metrics, whole["data"], write, whole["history"], repository=sorted(repository), said=said
    )


SHOWN = ("qa_accuracy_before", "qa_accuracy", "preferred_rate_before", "preferred_rate", "margin")


def quality(metrics: dict) -> dict:
    """与快慢无关的指标：两次训练该一模一样的。"""
    return {name: value for name, value in metrics.items() if not name.endswith(("_s", "seconds"))}


# ---------------------------------------------------------------- 两台机器


def two_machines(
    hub: LocalHub, token: str, work: Path, script: Path, settings, options: dict, start: str
) -> tuple[dict, dict]:
    """机器一推上第 die_at 步的检查点，马上被杀；机器二是个空文件夹，同一条命令。→ (机器二的 run.json, 量到的)。"""
    for name in ("machine_one", "machine_two"):
        shutil.rmtree(work / name, ignore_errors=True)
    command = [sys.executable, str(script), "--preset", "tiny", "--repo", REPO, "--dataset", settings.dataset]
    for name, value in options.items():
        command += [f"--{name}", str(value)]

    print(f"机器一：推上第 {settings.die_at} 步的检查点就杀掉 …", flush=True)
    hub.faults["commit"] = "503 once"  # 头一次推，hub 正忙：等一等再试
    one = begin([*command, "--model", start], work / "machine_one", hub, token)
    hub.on_commit = partial(kill_at, process=one, step=settings.die_at)
    code = wait_for(one)
    hub.on_commit = None
    if code == 0:
        raise UserError(
            f"机器一还没有推上第 {settings.die_at} 步的检查点就训练完了：--die_at 小些，或 --max_train_samples 大些。"
        )
    if not any(step_of(made) >= settings.die_at for made in hub.commits):
        raise UserError(f"机器一没有跑起来：\n  {last_lines(work / 'machine_one')}")
    killed_at = max(step_of(made) for made in hub.commits)
    take_weights_only(hub, killed_at, work / "bare_start")
    pushed_by_one = len(hub.commits)

    print("机器二：空的文件夹，同一条命令 …", flush=True)
    hub.faults["commit"] = "lost once"  # 推成了，hub 的回答没有送到：不能推两遍，也不能当成没推
    started = time.perf_counter()
    two = begin(command, work / "machine_two", hub, token)
    if wait_for(two) != 0:
        raise UserError(f"机器二没有跑完：\n  {last_lines(work / 'machine_two')}")
    log = (work / "machine_two" / "screen.log").read_text(encoding="utf-8")
    print("  机器二的屏幕：\n    " + "\n    ".join(log.splitlines()[1:]))
    checkpoints = [made for made in hub.commits if step_of(made)]
    found = {
        "killed_at": killed_at,
        "resumed_from": resumed_from(log),
        "commits_by_one": pushed_by_one,
        "commits": len(hub.commits),
        "checkpoints_pushed": len(checkpoints),
        "checkpoint_bytes": max(made["bytes"] for made in checkpoints),
        "machine_two_wall_seconds": round(time.perf_counter() - started, 1),
    }
    return load_run(work / "machine_two" / "dpo"), found


def take_weights_only(hub: LocalHub, step: int, folder: Path) -> None:
    """常见的做法：从检查点里只拿权重，优化器、学习率走到哪里、随机数、参考模型都不要。"""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    files = hub.repos[f"models/{REPO}"]
    for name, data in files.items():
        if name.startswith("start/") and name != "start/run.json":
            (folder / name.removeprefix("start/")).write_bytes(data)
    (folder / "model.safetensors").write_bytes(files[f"checkpoints/checkpoint-{step}/model.safetensors"])


def begin(command: list[str], machine: Path, hub: LocalHub, token: str) -> subprocess.Popen:
    """在 machine 这个文件夹里运行一条命令；令牌只在它的环境变量里。"""
    machine.mkdir(parents=True)
    env = {name: value for name, value in without_launcher().items() if name not in OURS}
    env |= {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": token,
        "HF_HOME": str(machine / "hf"),
        "NO_PROXY": "127.0.0.1",
    }
    env |= {"HF_HUB_DISABLE_XET": "1", "PYTHONIOENCODING": "utf-8"}  # 本机的 hub 不会说 Xet
    with (machine / "screen.log").open("w", encoding="utf-8") as screen:
        return subprocess.Popen(
            [*command, "--output_dir", str(machine / "dpo")], env=env, stdout=screen, stderr=subprocess.STDOUT
        )


def kill_at(made: dict, process: subprocess.Popen, step: int) -> None:
    """hub 刚记下第 step 步的检查点：连同它开的训练进程，立刻杀掉，一声招呼也不打。"""
    if step_of(made) >= step:
        kill_family(process)


def kill_family(process: subprocess.Popen) -> None:
    import psutil

    try:
        family = [*psutil.Process(process.pid).children(recursive=True), process]
    except psutil.NoSuchProcess:
        return
    for each in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()


def wait_for(process: subprocess.Popen) -> int:
    """等它结束；自己先被打断了，带它一起走。"""
    try:
        return process.wait()
    except BaseException:
        kill_family(process)
        raise


def step_of(made: dict) -> int:
    """一次提交推的是第几步的检查点；不是检查点是 0。"""
    name, _, step = made["title"].partition("-")
    return int(step) if name == "checkpoint" and step.isdigit() else 0


def resumed_from(log: str) -> int:
    words = "从 hub 取来第 "
    return int(log.partition(words)[2].partition(" ")[0]) if words in log else 0


def last_lines(machine: Path) -> str:
    log = (machine / "screen.log").read_text(encoding="utf-8", errors="replace")
    return "\n  ".join(log.splitlines()[-LAST_LINES:])


def ten_faults(work: Path, script: Path) -> dict[str, str]:
    """另开一个进程弄出那十种错；返回各说了什么。"""
    out = work / "faults.json"
    command = [sys.executable, str(script.with_name("hub_faults.py")), "--out", str(out)]
    done = subprocess.run(command, env=without_launcher(), capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        raise UserError(f"hub_faults.py 没有跑完：\n{done.stdout[-500:]}\n{done.stderr[-500:]}")
    return json.loads(out.read_text(encoding="utf-8"))


# ---------------------------------------------------------------- 给人看


def show(record: dict) -> None:
    metrics = record["metrics"]
    same = "逐位相同" if metrics["same_weights"] else "不同"
    print(
        f"\n机器一在第 {metrics['killed_at']} 步的检查点推上去之后被杀，机器二从第 {metrics['resumed_from']} 步接着训练；"
        f"与没有中断的那次，权重{same}。\n"
        f"一个检查点 {metrics['checkpoint_bytes'] / 1e6:.1f} MB；{metrics['commits']} 次提交；"
        f"{metrics['faults_explained']} 种错都说清了；令牌漏在 {metrics['token_leaks']} 处。"
    )
    if "preferred_rate" in metrics:
        bare = metrics["bare"]
        print(
            f"采样回答又对又完整又有礼：训练前 {metrics['preferred_rate_before']:.3f}，训练后 {metrics['preferred_rate']:.3f}，"
            f"只带走权重的 {bare['preferred_rate']:.3f}；贪心答对 {metrics['qa_accuracy']:.3f}、{bare['qa_accuracy']:.3f}"
        )
    print("\n仓库里最后是：")
    for name in record["repository"]:
        print(f"  {name}")


def draw(folder: Path, joined: list[dict], bare: list[dict], cut: int) -> None:
    """损失：机器一、机器二接起来的（没有中断的那条与它重在一起，不画），与只带走权重的。"""
    one = [row for row in joined if row["step"] <= cut]
    two = [row for row in joined if row["step"] >= cut]
    series = {
        "机器一|machine one": ([row["step"] for row in one], [row["loss"] for row in one]),
        "机器二，接着检查点|machine two": ([row["step"] for row in two], [row["loss"] for row in two]),
        "只带走权重|weights only": ([row["step"] + cut for row in bare], [row["loss"] for row in bare]),
    }
    line_chart(folder / "resumed.svg", series, "换一台机器|On another machine", "步|step", "损失|loss")
