"""内存的账画成叠起来的横条：一种切法一条，短的竖线是那一块 GPU 有多大。"""

from __future__ import annotations

from pathlib import Path

from nlp_common.draw.figures import label_width, render
from nlp_common.draw.plots import COLORS

LIMIT = "一块 GPU 有的|GPU memory"


def stacked_bars(path: Path, rows: dict[str, dict[str, float]], title: str, limits: list[float]) -> None:
    """rows：名字 → {部分: 几 GB}；limits：各条的 GPU 有几 GB。比最大的 GPU 长一倍还多的截断，写上数。"""
    parts = list(dict.fromkeys(part for row in rows.values() for part in row))
    end = min(max(limits + [sum(row.values()) for row in rows.values()]), 2 * max(limits))

    def draw(axes, text) -> None:
        for place, (row, limit) in enumerate(zip(rows.values(), limits, strict=True)):
            left = 0.0
            for part, color in zip(parts, COLORS, strict=False):
                width = min(row.get(part, 0.0), max(end - left, 0.0))
                if width > 0:
                    axes.barh(place, width, left=left, color=color, height=0.6)
                left += row.get(part, 0.0)
            edge = min(left, end)
            beside = limit if edge <= limit < 1.08 * edge else edge  # 别写在竖线上
            axes.text(beside + 0.01 * end, place, f"{left:,.0f}", va="center", fontsize=8)
            axes.plot([limit, limit], [place - 0.42, place + 0.42], color="#1f2a44", linewidth=1.8)
        for part, color in zip(parts, COLORS, strict=False):
            axes.barh(0, 0, color=color, label=text(part))
        axes.plot([], [], color="#1f2a44", linewidth=1.8, label=text(LIMIT))
        axes.set_yticks(range(len(rows)), [text(name) for name in rows])
        axes.set_xlim(0, end * 1.1)
        axes.invert_yaxis()

    widest = max(label_width(name) for name in rows)
    render(path, draw, [*parts, LIMIT], (title, "GB", ""), min_width=widest + 40)
