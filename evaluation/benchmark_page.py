"""benchmark_report.py 的网页：一个文件，不引用外部资源；来自数据和模型的文字都经过 html.escape。"""

from __future__ import annotations

import math
from html import escape
from pathlib import Path

from nlp_common.draw.pages import fill_page, html_table
from nlp_common.draw.plots import COLORS
from results import lower_is_better, shown

TEMPLATE = Path(__file__).with_name("benchmark_page.html")
KINDS = {"worse": "退步", "better": "进步", "unsure": "变了，不确定", "new": "新的", "gone": "这次没有"}
RADAR_AT_LEAST = 3  # 两根轴画不成雷达图


def page(
    results: list[dict], baseline: str, rows: list[dict], wins: dict, samples: dict, changes: list[dict]
) -> str:
    """整页的 HTML；各参数见 benchmark_report.py 的 main。"""
    parts = {
        "changes": changes_section(changes),
        "table": score_section(rows, baseline, in_order(results, baseline)),
        "radar": radar_section(rows),
        "wins": "".join(win_table(name, matrix) for name, matrix in wins.items())
        or "<p>只有一个模型，没有胜负。</p>",
        "samples": "".join(sample_table(name, rows) for name, rows in samples.items()),
        "sources": sources_table(results),
    }
    return fill_page(TEMPLATE, parts)


def in_order(results: list[dict], baseline: str) -> list[str]:
    """表里各模型的次序：baseline，再是结果多的。"""
    models = [result["model"] for result in results]
    return sorted(dict.fromkeys(models), key=lambda model: (model != baseline, -models.count(model)))


def td(content: str, css: str = "") -> str:
    return f'<td class="{css}">{content}</td>' if css else f"<td>{content}</td>"


# ---------------------------------------------------------------- 各节


def score_section(rows: list[dict], baseline: str, models: list[str]) -> str:
    """每套题主要的分一行；全部的分收起来，点开才看。"""
    note = f"▲▼：与 {escape(baseline)} 在同样的题上成对比，差的 95 % 区间不含 0；没有记号的，差多少都可能是碰巧，或不分好坏。"
    main = score_table([row for row in rows if row["main"]], models)
    return f'<p class="faint">{note}</p>{main}<details><summary>全部的分</summary>{score_table(rows, models)}</details>'


def score_table(rows: list[dict], models: list[str]) -> str:
    lines = []
    for row in rows:
        better = "，越小越好" if lower_is_better(row["score"]) else ""
        line = [
            td(escape(row["benchmark"])),
            td(escape(row["score"]) + f'<span class="faint">{better}</span>'),
        ]
        for model in models:
            line.append(score_cell(row["models"].get(model)))
        lines.append(line)
    return html_table(["题", "分", *map(escape, models)], lines, css="numbers")


def score_cell(cell: dict | None) -> str:
    if cell is None:
        return td("", "number")
    kind = cell.get("verdict", "")
    mark = {"better": "▲", "worse": "▼"}.get(kind, "")
    title = ""
    if gap := cell.get("gap"):
        title = f' title="差 {gap["value"]:+.3f}（{gap["low"]:+.3f} 到 {gap["high"]:+.3f}，{gap["n"]} 道同样的题）"'
    interval = f"{shown(cell['low'])}–{shown(cell['high'])}，n={cell['n']}"
    return (
        f'<td class="number {kind}"{title}><b>{mark}{cell["value"]:.3f}</b><br>'
        f'<span class="faint">{interval}</span></td>'
    )


def changes_section(changes: list[dict]) -> str:
    if not changes:
        return "<p>没有上次的结果，或者和上次一样。</p>"
    worse = sum(change["kind"] == "worse" for change in changes)
    said = f'<p class="worse"><b>有 {worse} 处确定的退步。</b></p>' if worse else "<p>没有确定的退步。</p>"
    lines = []
    for change in changes:
        numbers = ["", "", ""]
        if "now" in change:
            gap = f"{change['low']:+.3f} 到 {change['high']:+.3f}，n={change['n']}"
            numbers = [f"{change['before']:.3f}", f"{change['now']:.3f}", gap]
        names = [KINDS[change["kind"]], change["benchmark"], change["model"], change["score"]]
        lines.append(
            [td(escape(name), change["kind"]) for name in names] + [td(n, "number") for n in numbers]
        )
    return said + html_table(["", "题", "模型", "分", "上次", "这次", "差的区间"], lines)


def win_table(benchmark: str, matrix: dict) -> str:
    models = list(matrix)
    lines = []
    for ours in models:
        line = [td(escape(ours))]
        for theirs in models:
            cell = matrix[ours].get(theirs)
            if cell is None:
                line.append(td("—", "number faint"))
                continue
            kind = "better" if cell["low"] > 0.5 else "worse" if cell["high"] < 0.5 else ""
            numbers = f"{cell['low']:.2f}–{cell['high']:.2f}，平 {cell['tie']:.0%}，n={cell['n']}"
            line.append(
                td(f'<b>{cell["win"]:.2f}</b><br><span class="faint">{numbers}</span>', f"number {kind}")
            )
        lines.append(line)
    return f"<h3>{escape(benchmark)}</h3>" + html_table(["", *map(escape, models)], lines, css="numbers-2")


def sample_table(benchmark: str, rows: list[dict]) -> str:
    if not rows:
        return ""
    models = list(rows[0]["said"])
    lines = []
    for row in rows:
        first = next(iter(row["said"].values()))
        question = f'<div class="prompt">{escape(first["prompt"] or row["id"])}</div>'
        if first["right"]:
            question += f'<div class="faint">标准答案：{escape(first["right"])}</div>'
        line = [td(question)]
        for model in models:
            said = row["said"][model]
            score = said["scores"].get(row["score"], float("nan"))
            answer = escape(said["answer"]) if said["answer"].strip() else "（没有答案）"
            line.append(
                f'<td class="reply" data-model="{escape(model)}"><div class="prompt">{answer}</div>'
                f'<div class="faint">{escape(row["score"])} {score:.3f}</div></td>'
            )
        lines.append(line)
    return f"<h3>{escape(benchmark)}</h3>" + html_table(["题", *map(escape, models)], lines, css="samples")


def sources_table(results: list[dict]) -> str:
    lines = []
    for result in results:
        settings = "，".join(f"{name} {value}" for name, value in (result.get("settings") or {}).items())
        cells = [
            result["benchmark"],
            result["model"],
            result.get("model_id") or "",
            str(result.get("seed", "")),
        ]
        cells += [str(len(result["items"])), result.get("date") or "", settings]
        lines.append([td(escape(cell)) for cell in cells])
    return html_table(["题", "模型", "哪一份权重", "种子", "题数", "日期", "设置"], lines)


# ---------------------------------------------------------------- 雷达图


def radar_axes(rows: list[dict]) -> list[dict]:
    """每套题主要的分一根轴，只取各模型都在 0 到 1 之间的；越小越好的反过来。→ ``[{"name", "values": {模型: 0–1}}]``。"""
    axes, seen = [], set()
    for row in rows:
        values = {model: cell["value"] for model, cell in row["models"].items()}
        if row["benchmark"] in seen or not all(0 <= value <= 1 for value in values.values()):
            continue
        seen.add(row["benchmark"])
        if lower_is_better(row["score"]):
            values = {model: 1 - value for model, value in values.items()}
        axes.append({"name": f"{row['benchmark']} · {row['score']}", "values": values})
    return axes


def radar_section(rows: list[dict]) -> str:
    axes = radar_axes(rows)
    if len(axes) < RADAR_AT_LEAST:
        return f"<p>在 0 到 1 之间的主要分只有 {len(axes)} 个，不到 {RADAR_AT_LEAST} 根轴，不画雷达图。</p>"
    return f'<div class="chart">{radar_svg(axes)}</div>'


def radar_svg(axes: list[dict], radius: float = 130.0) -> str:
    """圆心到边是 0 到 1；哪个模型没有哪套题的分，它的线就在那根轴上断开，不当作 0。"""
    width, height = radius * 2 + 380, radius * 2 + 90
    x0, y0 = width / 2, height / 2
    models = list(dict.fromkeys(model for axis in axes for model in axis["values"]))

    def place(i: int, value: float) -> tuple[float, float]:
        angle = 2 * math.pi * i / len(axes) - math.pi / 2
        return x0 + radius * value * math.cos(angle), y0 + radius * value * math.sin(angle)

    parts = []
    for ring in (0.25, 0.5, 0.75, 1.0):
        points = " ".join("{:.1f},{:.1f}".format(*place(i, ring)) for i in range(len(axes)))
        parts.append(f'<polygon points="{points}" class="ring"/>')
        parts.append(f'<text x="{x0 + 3:.1f}" y="{y0 - radius * ring + 11:.1f}" class="tick">{ring:g}</text>')
    for i, axis in enumerate(axes):
        x, y = place(i, 1.0)
        parts.append(f'<line x1="{x0}" y1="{y0}" x2="{x:.1f}" y2="{y:.1f}" class="ring"/>')
        x, y = place(i, 1.1)
        anchor = "middle" if abs(x - x0) < 5 else "start" if x > x0 else "end"
        parts.append(
            f'<text x="{x:.1f}" y="{y + 4:.1f}" text-anchor="{anchor}">{escape(axis["name"])}</text>'
        )
    for number, model in enumerate(models):
        color = COLORS[number % len(COLORS)]
        corners = [(i, axis["values"][model]) for i, axis in enumerate(axes) if model in axis["values"]]
        for (i, here), (j, there) in zip(corners, [*corners[1:], *corners[:1]], strict=True):
            if (j - i) % len(axes) == 1:  # 相邻的两根轴才连
                (xa, ya), (xb, yb) = place(i, here), place(j, there)
                parts.append(
                    f'<line x1="{xa:.1f}" y1="{ya:.1f}" x2="{xb:.1f}" y2="{yb:.1f}" stroke="{color}" class="model"/>'
                )
        for i, here in corners:
            x, y = place(i, here)
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>')
        parts.append(f'<text x="8" y="{18 + 18 * number}" fill="{color}">● {escape(model)}</text>')
    return f'<svg viewBox="0 0 {width:.0f} {height:.0f}" class="radar" role="img">{"".join(parts)}</svg>'
