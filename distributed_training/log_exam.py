"""考一考 training_log_inspector.py：真的小训练里埋毛病，写成各家的日志，再让它看。

每一次训练写成五种日志。一样毛病，日志里有没有记下看它要的东西，看出来没有，第几步对不对，都记下。
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from log_readers import read_log
from nlp_common.base.console import print_table
from nlp_common.train.lesson import run_part
from nlp_common.train.stage import Stage
from planted_runs import BATCH, FAULTS, LENGTH, WRITERS, Run, sizes, train
from small_gpt import loss_sum, make_batch, make_model
from step_flops import flops_per_token, measured_peak, mfu, shape_of

ANSWER = {name: name for name in FAULTS} | {"restarted": "repeated"}
# 一样毛病，看它要日志里有哪一项
NEEDS = {"gradient": "grad_norm", "clipping": "grad_norm", "stall": "time"}
HAS = {
    "run.json": set(),
    "trainer_state.json": {"grad_norm"},
    "TensorBoard": {"grad_norm", "time"},
    "DeepSpeed": {"grad_norm", "time"},
    "text": {"time"},
}
# 一样毛病，免不了连带看出的别的；不在这里的，是误报
FOLLOWS = {
    "spike": {"gradient"},
    "nan": {"gradient"},
    "divergence": {"spike", "gradient", "clipping", "plateau"},
    "gradient": {"spike"},
}
INSTANT = ("spike", "nan", "gradient", "stall")  # 有确定的一步的


def exam(stage: Stage, inspect: Callable) -> dict:
    """返回 ``{"metrics": …, "curves": 每样毛病的一条损失}``。"""
    settings = stage.settings
    torch.set_num_threads(1)
    parts: dict[str, dict] = {}
    for fault in (None, *FAULTS):
        name = fault or "clean"
        n = settings.n_planted if fault else settings.n_clean
        parts[name] = run_part(stage, name, lambda part, fault=fault, n=n: _one(part, fault, n, inspect))
        print(f"  {name}：{n} 次，{_said(name, parts[name])}")
    flops = check_flops()
    planted = {fault: parts[fault] for fault in FAULTS}
    metrics = {
        "recall": _mean(part["found"] for part in planted.values()),
        "right_step": _mean(part["right_step"] for name, part in planted.items() if name in INSTANT),
        "false_alarms": parts["clean"]["alarms"],
        "other_alarms": sum(part["others"] for part in planted.values()),
        "n_clean": settings.n_clean,
        "n_planted": settings.n_planted * len(FAULTS),
        "faults": {name: {"found": part["found"], **part["by_format"]} for name, part in planted.items()},
        "clean": {name: parts["clean"][name] for name in ("largest_z", "largest_gradient_z", "repeat_score")},
        **flops,
        "tokens_per_s": parts["clean"]["tokens_per_s"],
        "mfu": mfu(parts["clean"]["tokens_per_s"], flops["flops_per_token"], flops["peak_flops"]),
    }
    show(metrics)
    return {"metrics": metrics, "curves": {name: part["curve"] for name, part in parts.items()}}


def _one(part: Stage, fault: str | None, n: int, inspect: Callable) -> dict:
    """一样毛病（或没有毛病），n 个种子，五种写法。"""
    found: dict[str, list[float]] = {name: [] for name in WRITERS}
    numbers: list[dict] = []
    right, alarms, others, curve, speeds = [], 0, 0, [], []
    for index in range(n):
        run = train(fault, part.settings.seed * 1000 + index, part.settings.steps)
        curve = curve or [point["loss"] for point in run.points]
        seconds = run.points[-1]["time"] - run.settings["started"]
        speeds.append(run.points[-1]["tokens"] / seconds)
        for name, write in WRITERS.items():
            folder = part.folder.work / "logs" / f"{index}-{name}"
            settings = replace(part.settings, max_grad_norm=run.settings["max_grad_norm"])
            report = inspect(read_log(write(run, folder)), settings)
            kinds = {finding.kind for finding in report.findings}
            numbers.append(report.numbers)
            if fault is None:
                alarms += len(kinds)
                continue
            others += len(kinds - {ANSWER[fault]} - FOLLOWS.get(fault, set()))
            if NEEDS.get(fault) is None or NEEDS[fault] in HAS[name]:
                found[name].append(float(ANSWER[fault] in kinds))
                right.append(float(_right_step(report, run)))
    result = {
        "found": _mean(hit for hits in found.values() for hit in hits) if fault else 0.0,
        "right_step": _mean(right) if fault else 0.0,
        "by_format": {name: _mean(hits) for name, hits in found.items() if hits},
        "alarms": alarms,
        "others": others,
        "curve": [value if value == value and abs(value) < 1e30 else None for value in curve],
        "tokens_per_s": sorted(speeds)[len(speeds) // 2],
    }
    for name in ("largest_z", "largest_gradient_z", "repeat_score"):
        result[name] = max((each[name] for each in numbers if name in each), default=0.0)
    return result


def _right_step(report, run: Run) -> bool:
    """说的步数里有没有埋的那一步：损失坏在下一步才看得见的，差一步也算。"""
    if run.fault not in INSTANT:
        return True
    steps = [
        step for finding in report.findings if finding.kind == ANSWER[run.fault] for step in finding.steps
    ]
    return any(0 <= step - run.at <= 1 for step in steps)


def check_flops() -> dict[str, float]:
    """数出来的乘加与 torch 的计数器比；机器的峰值量一量。

    CPU 上的 SDPA 是一个整块的算子，FlopCounterMode 不认得，一次也不数：让它用 MATH 那一路，拆成矩阵乘再数。
    """
    shape = shape_of(sizes())
    model, rows = make_model(sizes(), 0, torch.float32), make_batch(BATCH, LENGTH, sizes().vocab)
    ours = flops_per_token(shape, LENGTH)
    counted = {}
    for name, backends in (
        ("counted", [SDPBackend.MATH]),
        ("counted_sdpa", list(SDPBackend.__members__.values())),
    ):
        backends = [each for each in backends if each != SDPBackend.ERROR]
        with FlopCounterMode(display=False) as counter, sdpa_kernel(backends):
            loss_sum(model, rows).backward()
        counted[name] = counter.get_total_flops() / (BATCH * LENGTH)
    return {
        "flops_per_token": ours,
        "mfu_over_flop_counter": ours / counted["counted"],
        "sdpa_counted_share": counted["counted_sdpa"] / ours,
        "peak_flops": measured_peak(),
    }


def _mean(values) -> float:
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def _said(name: str, part: dict) -> str:
    if name == "clean":
        return f"报了 {part['alarms']} 样"
    return f"看出 {part['found']:.0%}" + (f"，另外报了 {part['others']} 样不相干的" if part["others"] else "")


def show(metrics: dict) -> None:
    rows = [["埋的毛病（看出的比例；— 是日志里没有记）", *WRITERS]]
    for name, title in FAULTS.items():
        found = metrics["faults"][name]
        rows.append([title, *(f"{found[each]:.2f}" if each in found else "—" for each in WRITERS)])
    print_table(rows)
    print(
        f"\n没有毛病的 {metrics['n_clean']} 次 × {len(WRITERS)} 种日志，误报 {metrics['false_alarms']} 次。"
    )
