"""几个模型的比较怎样在终端里显示：指标表、长度分布、并排的样例。"""

from __future__ import annotations

import math

from rich.console import Console
from rich.table import Table
from rich.text import Text

from chain import MODELS
from nlp_common.base.console import printable
from report.metrics import METRICS

# 评语 → (记号, 终端颜色, 意思)；除了颜色还有记号，分不清红绿的人也能看
MARKS = {
    "good": ("✓", "green", "又对、又完整、又有礼"),
    "right": ("△", "yellow", "对，但不完整或不客气"),
    "wrong": ("✗", "red", "答错或没说完"),
}


ROLES = {"system": "系统", "user": "问", "assistant": "答", "tool": "结果"}
LONG = 300  # 终端里，一段话最多显示多少个字


def mark_of(reply: dict) -> str | None:
    """一个回复属于 MARKS 里的哪一类；没有标准答案的题是 None。"""
    verdict = reply.get("verdict")
    if verdict is None:
        return None
    if not verdict["right"]:
        return "wrong"
    return "good" if verdict["complete"] and verdict["courteous"] else "right"


def show_metrics(console: Console, metrics: dict[str, dict]) -> None:
    """一行一个指标，一列一个模型。"""
    table = Table(title="指标（留出的题）", title_justify="left")
    table.add_column("指标")
    for name in metrics:
        table.add_column(MODELS[name], justify="right")
    for key, (label, digits) in METRICS.items():
        if any(key in each for each in metrics.values()):
            values = [f"{each[key]:.{digits}f}" if key in each else "—" for each in metrics.values()]
            table.add_row(label, *values)
    console.print(table)


def length_bins(lengths: dict[str, list[int]], bins: int = 8) -> tuple[int, dict[str, list[int]]]:
    """→ (每格几个字, 模型 → 各格的个数)，各模型用同样的格。"""
    longest = max(max(values) for values in lengths.values())
    width = max(1, math.ceil((longest + 1) / bins))
    counts = {name: [0] * (longest // width + 1) for name in lengths}
    for name, values in lengths.items():
        for value in values:
            counts[name][value // width] += 1
    return width, counts


def show_lengths(console: Console, lengths: dict[str, list[int]]) -> None:
    width, counts = length_bins(lengths)
    table = Table(title="回答长度的分布", title_justify="left")
    table.add_column("字数", justify="right")
    for name in counts:
        table.add_column(MODELS[name])
    for i in range(len(next(iter(counts.values())))):
        cells = []
        for each in counts.values():
            share = each[i] / sum(each)
            bar = "█" * round(share * 12) or ("▏" if each[i] else "")
            cells.append(f"{bar} {share:.0%}" if each[i] else "")
        table.add_row(f"{i * width}–{(i + 1) * width - 1}" if width > 1 else str(i), *cells)
    console.print(table)


def show_samples(console: Console, samples: list[dict]) -> None:
    """同一道题，各模型的采样回答并排；有标准答案的按评语着色。"""
    judged = any(mark_of(reply) for sample in samples for reply in sample["replies"].values())
    legend = "  ".join(f"{mark} {meaning}" for mark, _, meaning in MARKS.values()) if judged else ""
    console.print(f"同样的题，各模型的回答（温度 1 采样）  {legend}", style="bold", highlight=False)
    for number, sample in enumerate(samples, 1):
        table = Table(show_header=False, box=None, padding=(0, 1), pad_edge=False)
        table.add_column(style="cyan", no_wrap=True)
        table.add_column(overflow="fold")
        for message in sample["messages"]:
            content = printable(message["content"])
            content = content if len(content) <= LONG else f"{content[:LONG]} …（共 {len(content)} 字）"
            table.add_row(ROLES[message["role"]], Text(content))
        if sample.get("answer"):
            table.add_row("标准", Text(sample["answer"], style="bold"))
        for name, reply in sample["replies"].items():
            mark, color, _ = MARKS.get(mark_of(reply), ("", "default", ""))
            text = Text(printable(reply["text"])[:LONG] or "（空）", style=color)
            text.append("" if reply["ended"] else " …（没说完）", style="bright_black")
            if "reward" in reply:
                text.append(f"  奖励 {reply['reward']:+.2f}", style="bright_black")
            table.add_row(f"{mark} {MODELS[name]}".strip(), text)
        console.print(f"[dim]── {number} ──[/]")
        console.print(table)
