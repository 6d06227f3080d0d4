"""内存的账画成叠起来的横条：一种切法一条，虚线是一块 GPU 有多大。"""

from __future__ import annotations

from pathlib import Path

from nlp_common.draw.figures import label_width, render
from nlp_common.draw.plots import COLORS


def stacked_bars(path: Path, rows: dict[str, dict[str, float]], title: str, limit: float) -> None:
    """rows：名字 → {部分: 几 GB}；比两倍 limit 还长的截断，写上数。"""
    parts = list(dict.fromkeys(part for row in rows.values() for part in row))
    end = 2 * limit

    def draw(axes, text) -> None:
        names = [text(name) for name in rows]
        for place, row in enumerate(rows.values()):
            left = 0.0
            for part, color in zip(parts, COLORS, strict=False):
                width = min(row.get(part, 0.0), max(end - left, 0.0))
                if width > 0:
                    axes.barh(place, width, left=left, color=color, height=0.6)
                left += row.get(part, 0.0)
            axes.text(min(left, end) + 0.01 * end, place, f"{left:,.0f}", va="center", fontsize=8)
        for part, color in zip(parts, COLORS, strict=False):
            axes.barh(0, 0, color=color, label=text(part))
        axes.axvline(limit, color="#1f2a44", linestyle="--", linewidth=1.2, label=text(f"{limit:g} GB"))
        axes.set_yticks(range(len(rows)), names)
        axes.set_xlim(0, end * 1.1)
        axes.invert_yaxis()

    widest = max(label_width(name) for name in rows)
    render(path, draw, [*parts, f"{limit:g} GB"], (title, "GB", ""), min_width=widest + 40)
