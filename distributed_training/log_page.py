"""training_log_inspector.py 给人看的：终端里的几行，一页能单独打开的网页，README 里的图。"""

from __future__ import annotations

import math
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from nlp_common.draw.figures import BROWSER_FONTS, render
from nlp_common.draw.plots import COLORS, line_chart
from step_flops import step_seconds

if TYPE_CHECKING:
    from training_log_inspector import Report

KINDS = {
    "nan": "NaN",
    "spike": "损失的尖峰",
    "divergence": "发散",
    "plateau": "停住了",
    "repeated": "数据喂重了",
    "gradient": "梯度忽然变大",
    "clipping": "步步都裁剪",
    "stall": "停顿",
    "skipped": "溢出的步太多",
    "weights": "权重坏了",
}
NUMBERS = {  # 名字 → (中文, 写法)
    "points": ("记下几点损失", "{:.0f}"),
    "last_step": ("最后一步", "{:.0f}"),
    "first_loss": ("第一点的损失", "{:.4g}"),
    "last_loss": ("最后一点的损失", "{:.4g}"),
    "largest_z": ("损失最大的 z（超过 8 算尖峰）", "{:.1f}"),
    "grad_norm": ("梯度范数的中位数", "{:.3g}"),
    "largest_gradient_z": ("梯度范数最大的 z", "{:.1f}"),
    "clipped_share": ("被裁剪的步", "{:.1%}"),
    "repeat_score": ("起伏重演的显著程度（超过 5 算喂重）", "{:.1f}"),
    "step_seconds": ("一步几秒（中位数）", "{:.4g}"),
    "tokens_per_s": ("每秒几个 token", "{:,.0f}"),
    "mfu": ("MFU", "{:.1%}"),
}
PLOTS = {  # 项 → (标题, 纵坐标)
    "loss": ("训练损失|Training loss", "损失|loss"),
    "eval_loss": ("留出损失|Held-out loss", "损失|loss"),
    "grad_norm": ("梯度的范数（裁剪之前）|Gradient norm", "范数|norm"),
    "learning_rate": ("学习率|Learning rate", ""),
    "step_seconds": ("一步几秒|Seconds per step", "秒|seconds"),
}
MARKED = {
    "loss": ("spike", "nan", "divergence", "plateau"),
    "grad_norm": ("gradient",),
    "step_seconds": ("stall",),
}
MOST_POINTS = 1200  # 一条线最多画几点，再长网页就太大
PAGE = """<!doctype html>
<html lang="zh"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>训练日志体检：{name}</title>
<style>
body{{font:15px/1.65 {fonts};max-width:920px;margin:2em auto;padding:0 1em;color:#222;background:#fff}}
h1{{font-size:1.5em;margin-bottom:.2em;overflow-wrap:anywhere}}h2{{font-size:1.15em;margin-top:1.8em}}
.sub{{color:#667;margin-top:0;overflow-wrap:anywhere}}
.card{{border-left:4px solid #d1602f;background:#fdf5f1;padding:.6em 1em;margin:.8em 0;border-radius:0 6px 6px 0}}
.card b{{color:#a8431a}}.card p{{margin:.25em 0}}.fine{{border-color:#2f8f5b;background:#f1f9f4}}.fine b{{color:#23714a}}
table{{border-collapse:collapse}}td{{padding:.2em 1.2em .2em 0;border-bottom:1px solid #eee}}td+td{{text-align:right;font-variant-numeric:tabular-nums}}
li{{overflow-wrap:anywhere}}figure{{margin:1em 0}}svg{{max-width:100%;height:auto}}
</style>
<h1>{title}</h1><p class="sub">{sub}</p>
{cards}
<h2>量到的</h2><table>{numbers}</table>
{plots}
{cannot}{notes}
<h2>怎样判断的</h2>
<ul><li>尖峰：log 损失减去前后 15 点的中位数，除以 MAD × 1.4826，z 超过 8、又高出一成以上。尖峰自己抬不高 MAD，所以不会把自己藏起来。</li>
<li>发散、停住：分成十段比中位数，差得比噪声（标准误）多才算。训练到了底，也是"停住"：要不要紧，看它是不是到了该到的地方。</li>
<li>喂重：去了趋势的起伏与自己错开 P 步，相关的 Fisher z 超过 5。每一遍都重新打乱的，看不出来，也不该算毛病。</li>
<li>停顿：一步比平常多用 1 秒以上，又在平常的 5 倍以上。</li>
<li>MFU = 每秒 token 数 × 每个 token 的浮点运算（6 × 矩阵参数 + 12 × 层 × 宽 × 长）÷ 峰值。</li></ul>
</html>
"""


def print_report(report: Report) -> None:
    log = report.log
    print(f"{log.path}（{log.kind}）：{len(log.points)} 点，到第 {log.points[-1]['step']} 步。")
    if not report.findings:
        print("没有看出毛病。")
    for finding in report.findings:
        print(f"\n  ● {KINDS[finding.kind]}：{finding.said}\n    怎么办：{finding.advice}")
    print()
    for name, (title, form) in NUMBERS.items():
        if name in report.numbers:
            print(f"  {title}：{form.format(report.numbers[name])}")
    if report.cannot:
        print("\n看不了的：\n  " + "\n  ".join(report.cannot))
    if log.notes:
        print("\n读的时候：\n  " + "\n  ".join(log.notes))


def write_page(path: Path, report: Report) -> None:
    """一个文件，里面就有图，不联网也打得开。"""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page_of(report), encoding="utf-8")


def page_of(report: Report) -> str:
    log = report.log
    cards = [
        f'<div class="card"><b>{KINDS[each.kind]}</b><p>{escape(each.said)}</p><p>怎么办：{escape(each.advice)}</p></div>'
        for each in report.findings
    ]
    if not cards:
        cards = ['<div class="card fine"><b>没有看出毛病</b><p>看不了的在下面，没有看不等于没有。</p></div>']
    numbers = "".join(
        f"<tr><td>{title}</td><td>{form.format(report.numbers[name])}</td></tr>"
        for name, (title, form) in NUMBERS.items()
        if name in report.numbers
    )
    plots = "".join(f"<figure>{_plot(report, name)}</figure>" for name in PLOTS if _has(report, name))
    return PAGE.format(
        name=escape(log.path.name),
        fonts=BROWSER_FONTS,
        title=f"训练日志体检：{escape(log.path.name)}",
        sub=escape(f"{log.path}（{log.kind}），到第 {log.points[-1]['step']} 步"),
        cards="\n".join(cards),
        numbers=numbers,
        plots=plots,
        cannot=_list("看不了的", report.cannot),
        notes=_list("读的时候", log.notes),
    )


def _list(title: str, lines: list[str]) -> str:
    if not lines:
        return ""
    return f"<h2>{title}</h2><ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>\n"


def _values(report: Report, name: str) -> list[tuple[int, float]]:
    return step_seconds(report.log) if name == "step_seconds" else report.log.column(name)


def _has(report: Report, name: str) -> bool:
    return sum(math.isfinite(value) for _, value in _values(report, name)) > 1


def _plot(report: Report, name: str) -> str:
    title, ylabel = PLOTS[name]
    values = [(s, v if math.isfinite(v) else math.nan) for s, v in _values(report, name)]
    at = dict(values)
    finite = [v for v in at.values() if v == v]
    marks: dict[str, list[int]] = {}
    for finding in report.findings:
        if finding.kind in MARKED.get(name, ()):
            marks[KINDS[finding.kind]] = finding.steps
    shown = _thinned(values)

    def draw(axes, text) -> None:
        axes.plot([s for s, _ in shown], [v for _, v in shown], color=COLORS[0], linewidth=1.2)
        if min(finite) > 0 and max(finite) > 30 * min(finite):
            axes.set_yscale("log")
        for color, (kind, steps) in zip(COLORS[1:], marks.items(), strict=False):
            heights = [at[step] if at.get(step, math.nan) == at.get(step) else max(finite) for step in steps]
            axes.scatter(steps, heights, color=color, s=38, zorder=3, label=text(kind))
        if marks:
            axes.legend(frameon=False)

    return render(None, draw, [], (title, "步数|step", ylabel))


def _thinned(values: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """太长的：每一小段留最高、最低的两点，尖峰不会丢。"""
    if len(values) <= MOST_POINTS:
        return values
    size = math.ceil(2 * len(values) / MOST_POINTS)
    kept = []
    for start in range(0, len(values), size):
        part = [each for each in values[start : start + size] if each[1] == each[1]]
        if part:
            kept += sorted({min(part, key=_height), max(part, key=_height)})
    return kept


def _height(pair: tuple[int, float]) -> float:
    return pair[1]


def draw_faults(folder: Path, found: dict) -> None:
    """埋了毛病的几条损失，与没有毛病的画在一起。"""
    curves = found["curves"]
    names = {"spike": "坏数据|bad batch", "divergence": "发散|divergence", "plateau": "停住|plateau"}
    names["clean"] = "没有毛病|clean"  # 画在最上面：埋了毛病的，出事以前与它是同一条
    series = {}
    for name, label in names.items():
        ys = [math.nan if value is None else math.log10(value) for value in curves[name]]
        series[label] = (list(range(1, len(ys) + 1)), ys)
    title = "埋了毛病的小训练|Planted faults"
    line_chart(folder / "faults.svg", series, title, "步数|step", "损失的 log₁₀|log10 loss")
