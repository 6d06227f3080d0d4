"""一条链的报告：读各阶段的 run.json 和比较结果，写出 report.json 与一个可以离线打开的 report.html。"""

from __future__ import annotations

import json
from pathlib import Path

from nlp_common.base.runs import load_run, write_json
from report.charts import save_pictures
from report.metrics import highlights
from report.page import render_page


def load_records(root: Path, stages: list[str]) -> tuple[dict[str, dict], list[dict]]:
    """→ (阶段 → run.json，只含 stages 里已完成的；比较的全部回答，没有比较过是空的)"""
    records = {name: record for name in stages if (record := load_run(root / name))}
    answers = root / "compare" / "compare.json"
    return records, json.loads(answers.read_text(encoding="utf-8")) if "compare" in records else []


def build_report(records: dict[str, dict], preset: str, **extra) -> dict:
    """report.json 的内容。seconds 是各阶段记录的秒数之和，哪怕这次全是直接加载的。"""
    stages = {
        name: {"seconds": record["seconds"], **record["metrics"]}
        for name, record in records.items()
        if name != "compare"
    }
    compare = records.get("compare")
    if compare:
        stages["compare"] = {"seconds": compare["seconds"]}
    return {
        "preset": preset,
        "seconds": round(sum(stage["seconds"] for stage in stages.values()), 1),
        "stages": stages,
        "models": compare["metrics"] if compare else {},
        **extra,
    }


def write_report(root: Path, stages: list[str], preset: str, with_targets: bool, **extra) -> dict:
    """在 root 里写 report.json、report.html 与几张图（pictures/），返回 report.json 的内容。

    stages：写哪些阶段；只跑到一半的一次，不把文件夹里以前留下的后几个阶段混进来。

    with_targets：数字旁边写不写目标；真数据、只跑几步的试运行没有目标可言。
    """
    records, answers = load_records(root, stages)
    report = build_report(records, preset, **extra)
    write_json(root / "report.json", report)
    save_pictures(root / "pictures", records)
    page = render_page(report, records, answers, highlights(report["stages"], with_targets))
    temporary = root / ".report.html.tmp"
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(root / "report.html")
    return report
