"""incremental_lora.py 的表与图：每种方法学了多少，忘了多少。"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from nlp_common.base.console import padded
from nlp_common.draw.plots import COLORS, render

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLES = {
    "full": "全参数|full",
    "lora_r1": "LoRA r=1",
    "lora_r4": "LoRA r=4",
    "lora_r16": "LoRA r=16",
    "replay_1": "回放 1%|replay 1%",
    "replay_5": "回放 5%|replay 5%",
    "replay_10": "回放 10%|replay 10%",
    "ewc": "EWC",
    "olora": "O-LoRA",
    "switch": "分开存，切换|switch",
    "merge_half": "合并 ×0.5|merge 0.5",
    "merge_sum": "合并 ×1|merge 1",
}


def show_rows(rows: dict[str, dict], tasks: list[str]) -> None:
    """tasks：三样各叫什么。"""
    print(f"\n第一样 {tasks[0]}，第二样 {tasks[1]}，第三样 {tasks[2]}")
    print("方法              第一样 前→后   第二样   学完第三样：第一样  第二样  第三样     BWT")
    for name, row in rows.items():
        title = padded(TITLES[name].split("|")[0], 16)
        print(
            f"{title}{row['task1_before']:8.3f} → {row['task1_after']:.3f}{row['task2_after']:9.3f}"
            f"{row['task1_end']:18.3f}{row['task2_end']:8.3f}{row['task3_end']:8.3f}{row['backward_transfer']:9.3f}"
        )


def show_scaled(rows: dict[str, dict], equal: float) -> None:
    """缩放：W + s·ΔW 的几个 s 上，第二样学了多少、第一样还剩多少；学得一样多（equal）时忘了多少。"""
    print("\n只用几成 s（第二样 / 第一样）")
    for name, row in rows.items():
        if "scaled" in row:
            points = [f"{s}：{point['task2']:.3f}/{point['task1']:.3f}" for s, point in row["scaled"].items()]
            lost = row[f"forgotten_at_{100 * equal:.0f}"]
            told = f"学到 {equal:g} 时忘了 {lost:.3f}" if lost is not None else f"学不到 {equal:g}"
            print(f"  {TITLES[name].split('|')[0]}  {'  '.join(points)}  {told}")


def draw_learned_forgotten(folder: Path, rows: dict[str, dict], what: str) -> None:
    """what 是第二样的成绩叫什么。横轴是第二样学了多少，纵轴是第一样还剩多少：右上角最好。线是同一次训练只用几成。"""

    def draw(axes: Axes, text: Callable[[str], str]) -> None:
        axes.figure.set_figheight(4.6)
        for i, (name, row) in enumerate(rows.items()):
            color = COLORS[i % len(COLORS)]
            marker = "osD^vP*X"[i // len(COLORS)]
            if "scaled" in row:
                points = [(0.0, row["task1_before"])]
                points += [(point["task2"], point["task1"]) for point in row["scaled"].values()]
                axes.plot(*zip(*points, strict=True), color=color, linewidth=1, alpha=0.6)
            x, y = row["task2_after"], row["task1_after"]
            axes.scatter([x], [y], s=50, marker=marker, color=color, label=text(TITLES[name]), zorder=3)
        axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))

    zh, en = what.split("|")
    labels = (
        "学了多少，忘了多少|Learned and kept",
        f"第二样的{zh}|task 2 {en}",
        "第一样的正确率|task 1 accuracy",
    )
    render(folder / "learned_forgotten.svg", draw, [TITLES[name] for name in rows], labels)
