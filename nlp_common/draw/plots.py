"""折线、柱状、直方图：返回可以直接嵌进网页的 SVG 文字，也可以写成 .svg 或 .png。

文字约定：标题、坐标、图例都可以写成 ``"损失|loss"``，竖线前是中文，竖线后是英文。
SVG 里的文字是文字而不是轮廓，由浏览器挑字体，总用中文；PNG 在没装中文字体的机器上用英文
（没写英文就只留下中文以外的字符），不会变成一排空方框。

同样的数据画出同样的 SVG；里面的 id 都带内容的指纹，多张图放进一个网页不会串。
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nlp_common.draw.figures import FONT_SIZE, cjk_font, label_width, render

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["bar_chart", "cjk_font", "histogram", "line_chart"]

COLORS = ["#2563a8", "#d1602f", "#2f8f5b", "#8b5fb0", "#b3892b", "#5b6770"]
COLORS += ["#c2477f", "#2aa3ad", "#7d8f1d", "#1f2a44"]


def line_chart(
    path: str | Path | None,
    series: dict[str, tuple[Sequence[float], Sequence[float]]],
    title: str,
    xlabel: str,
    ylabel: str,
    *,
    hlines: dict[str, float] | None = None,
) -> str:
    """每条线是 ``名字: (横坐标, 纵坐标)``，NaN 处断开；hlines 是横贯全图的虚线，如理论下限。

    给了 path 就按后缀写成 .svg 或 .png（其他后缀是 UserError）；总是返回 SVG 文字。
    """
    hlines = hlines or {}

    def draw(axes: Axes, text: Callable[[str], str]) -> None:
        for color, (name, (xs, ys)) in zip(_colors(len(series)), series.items(), strict=True):
            marker = "o" if len(xs) == 1 else None  # 只有一个点时，线是看不见的
            axes.plot(xs, ys, label=text(name), color=color, linewidth=1.6, marker=marker)
        for color, (name, y) in zip(_colors(len(hlines), len(series)), hlines.items(), strict=True):
            axes.axhline(y, label=text(name), color=color, linewidth=1.2, linestyle="--")

    return render(path, draw, [*series, *hlines], (title, xlabel, ylabel))


def bar_chart(
    path: str | Path | None,
    series: dict[str, dict[str, float]],
    title: str,
    xlabel: str,
    ylabel: str,
    *,
    digits: int = 2,
) -> str:
    """成组的柱：``系列名: {类别: 高度}``，某系列缺的类别空着；柱顶写出数值，digits 位小数。其余同 line_chart。"""
    categories = list(dict.fromkeys(category for bars in series.values() for category in bars))
    width = 0.8 / max(len(series), 1)

    def draw(axes: Axes, text: Callable[[str], str]) -> None:
        for i, (color, (name, bars)) in enumerate(zip(_colors(len(series)), series.items(), strict=True)):
            xs = [categories.index(c) + (i - (len(series) - 1) / 2) * width for c in bars]
            drawn = axes.bar(xs, list(bars.values()), width * 0.92, label=text(name), color=color)
            axes.bar_label(drawn, fmt=f"{{:.{digits}f}}", fontsize=FONT_SIZE - 2, padding=1)
        axes.set_xticks(range(len(categories)), [text(c) for c in categories])
        axes.margins(y=0.1)

    slot = max([label_width(c) for c in categories] + [2.6 * len(series)], default=0) + 1
    return render(path, draw, [*series], (title, xlabel, ylabel), min_width=slot * len(categories))


def histogram(
    path: str | Path | None,
    series: dict[str, Sequence[float]],
    title: str,
    xlabel: str,
    ylabel: str,
    *,
    bins: int = 30,
) -> str:
    """几组数叠在一起的直方图，纵轴是个数，各组用同样的 bins 个区间；NaN 与无穷不计。其余同 line_chart。"""
    import numpy as np

    arrays = {name: np.asarray(values, dtype=float) for name, values in series.items()}
    arrays = {name: values[np.isfinite(values)] for name, values in arrays.items()}
    edges = np.histogram_bin_edges(np.concatenate([*arrays.values(), []]), bins=bins)

    def draw(axes: Axes, text: Callable[[str], str]) -> None:
        for color, (name, values) in zip(_colors(len(arrays)), arrays.items(), strict=True):
            counts = np.histogram(values, edges)[0]
            axes.stairs(counts, edges, fill=True, alpha=0.3, color=color)
            axes.stairs(counts, edges, label=text(name), color=color, linewidth=1.4)
        axes.locator_params(axis="y", integer=True)

    return render(path, draw, [*series], (title, xlabel, ylabel))


def _colors(count: int, skip: int = 0) -> list[str]:
    return [COLORS[(skip + i) % len(COLORS)] for i in range(count)]


def learning_curve(path: Path, history: list[dict]) -> None:
    """训练 loss、验证 loss、验证错误率随步数的变化，画成一张图。history 来自 training.curves。"""

    def points(name: str) -> tuple[list, list]:
        rows = [row for row in history if name in row]
        return [row["step"] for row in rows], [row[name] for row in rows]

    steps, accuracies = points("eval_accuracy")
    series: dict[str, tuple[Sequence[float], Sequence[float]]] = {
        "训练 loss|train loss": points("loss"),
        "验证 loss|validation loss": points("eval_loss"),
        "验证错误率|validation error": (steps, [1 - accuracy for accuracy in accuracies]),
    }
    line_chart(path, series, "学习曲线|Learning curve", "步数|step", "")
