"""结果的网页：一个文件，不引用外部的东西。各页的样子在这里写一次，各自另有的写在自己的模板里。"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from string import Template

STYLE = """
:root {
  --ink: #1d2430; --faint: #667085; --line: #e1e5ea; --page: #f6f7f9; --card: #fff;
  --good: #1a7f47; --bad: #b42318; --bar: #2563a8;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e4e7ec; --faint: #98a2b3; --line: #343b46; --page: #14171c; --card: #1d2229;
    --good: #6fd39b; --bad: #ff9a8f; --bar: #6ea8e8;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 1080px; padding: 24px 16px 48px; background: var(--page); color: var(--ink);
  font: 15px/1.6 system-ui, -apple-system, "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "Noto Sans SC",
    "Source Han Sans SC", "WenQuanYi Micro Hei", sans-serif;
}
h1 { font-size: 26px; margin: 0 0 4px; }
h2 { font-size: 19px; margin: 0 0 6px; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px; margin-top: 18px; }
p { margin: 4px 0 12px; }
.faint { color: var(--faint); font-size: 13px; }
.good { color: var(--good); }
.bad { color: var(--bad); }
.scroll { overflow-x: auto; }
.chart { text-align: center; }
.cards { display: flex; flex-wrap: wrap; gap: 12px; margin-top: 14px; }
.card { flex: 1 1 160px; background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 10px 14px; }
.card b { display: block; font-size: 24px; line-height: 1.3; font-variant-numeric: tabular-nums; }
summary { cursor: pointer; color: var(--faint); padding: 10px 0 4px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { padding: 6px 10px; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--faint); font-weight: 600; white-space: nowrap; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
@media print { section { break-inside: avoid; } }
"""


def fill_page(template: Path, parts: dict[str, object]) -> str:
    """模板里的 $名字 换成 parts 里的（已经是 HTML），$style 换成共同的样子。"""
    return Template(template.read_text(encoding="utf-8")).substitute(parts, style=STYLE)


def html_table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    numbers: Collection[int] = (),
    css: str = "",
) -> str:
    """head、rows 的内容已经是 HTML，一格也可以写成整个 <td …>；numbers 里的栏、头一行写成 number 的栏靠右。"""
    first = rows[0] if rows else ()
    right = {*numbers, *(at for at, cell in enumerate(first) if cell.startswith('<td class="number'))}
    top = "".join(_cell("th", cell, at in right) for at, cell in enumerate(head))
    lines = ("".join(_cell("td", cell, at in right) for at, cell in enumerate(row)) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table class="{css}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(tag: str, content: str, is_number: bool) -> str:
    if content.startswith("<td"):
        return content
    return f'<{tag} class="number">{content}</{tag}>' if is_number else f"<{tag}>{content}</{tag}>"
