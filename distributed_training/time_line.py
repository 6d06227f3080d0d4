"""时间线：一行一个进程，一段一份活。"""

from __future__ import annotations

from pathlib import Path

from nlp_common.draw.figures import render

COLORS = ("#4c78a8", "#f58518", "#54a24b", "#b8b8b8")


def time_line(
    path: Path,
    rows: dict[str, list[tuple[float, float, str, str]]],
    kinds: dict[str, str],
    title: str,
    xlabel: str,
) -> str:
    """rows：{行的标题: [(开始, 多久, 哪一种, 写在上面的字)]}；kinds：{哪一种: 图例}；标签写"中文|English"。"""
    color = dict(zip(kinds, COLORS, strict=False))

    def draw(axes, text) -> None:
        for place, spans in enumerate(rows.values()):
            for start, length, kind, label in spans:
                axes.barh(place, length, left=start, color=color[kind], edgecolor="white", height=0.8)
                axes.text(
                    start + length / 2, place, label, ha="center", va="center", fontsize=7, color="white"
                )
        for kind, name in kinds.items():
            axes.barh(0, 0, color=color[kind], label=text(name))
        axes.set_yticks(range(len(rows)), [text(label) for label in rows])
        axes.invert_yaxis()

    return render(path, draw, list(kinds.values()), (title, xlabel, ""), min_width=70)
