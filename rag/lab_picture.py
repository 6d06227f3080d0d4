"""账本画成图：一行一个实验，从上到下；点是量到的，颜色是判断，竖线是那时目前最好的，横线是 95% 区间。"""

from __future__ import annotations

from pathlib import Path

from nlp_common.draw.figures import render

COLORS = {"start": "#5b6770", "better": "#2f8f5b", "worse": "#c2477f", "unsure": "#b3892b"}
VERDICTS = {"start": "开始", "better": "更好，留下", "worse": "更差", "unsure": "说不上，不留"}
ENGLISH = {"start": "start", "better": "better, kept", "worse": "worse", "unsure": "cannot tell"}


def draw_ledger(path: Path, rows: list[dict], decide: str) -> str:
    """rows 是账本的各行；decide 是决定留不留下的指标。"""

    def draw(axes, text) -> None:
        axes.figure.set_figheight(1.2 + 0.24 * len(rows))
        best = [level_before(rows, place, decide) for place in range(len(rows))]
        axes.scatter(best, range(len(rows)), s=90, marker="|", color="#1f2a44", label=text(BEST), zorder=4)
        for verdict, label in VERDICTS.items():
            places = [place for place, row in enumerate(rows) if row["verdict"] == verdict]
            values = [rows[place]["metrics"][decide] for place in places]
            axes.scatter(
                values, places, color=COLORS[verdict], label=text(f"{label}|{ENGLISH[verdict]}"), zorder=3
            )
            for place, value in zip(places, values, strict=True):
                low, high = rows[place]["low"], rows[place]["high"]
                start = value - rows[place]["gain"]  # 那时最好的
                axes.plot([start + low, start + high], [place, place], color=COLORS[verdict], linewidth=1.2)
        axes.set_yticks(range(len(rows)), [row["change"] or row["name"] for row in rows], fontsize=8)
        axes.invert_yaxis()

    legend = [BEST, *(f"{label}|{ENGLISH[name]}" for name, label in VERDICTS.items())]
    return render(path, draw, legend, ("账本|The ledger", decide, ""), min_width=48)


BEST = "那时目前最好的|best so far"


def level_before(rows: list[dict], place: int, decide: str) -> float:
    """做第 place 个实验之前，目前最好的是多少。"""
    kept = [row for row in rows[:place] if row["verdict"] in ("start", "better")]
    return (kept[-1] if kept else rows[0])["metrics"][decide]
