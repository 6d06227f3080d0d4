"""一行一行的 token，底色的深浅是得分：同一句话，几种看法上下对照。写成 SVG 与能单独打开的网页。"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path

from nlp_common.draw.figures import BROWSER_FONTS, label_width

SIZE, HEIGHT, GAP, WIDTH = 15, 26, 2, 980  # 字号、一格的高、格子之间、整张图最宽（像素）
BLUE, RED = (37, 99, 168), (209, 96, 47)  # 得分为正、为负的颜色

PAGE = """<!doctype html>
<html lang="zh"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>body{{font:15px/1.6 {fonts};max-width:1040px;margin:2em auto;padding:0 1em;color:#222;background:#fff}}
svg{{max-width:100%;height:auto}}p{{color:#555}}</style>
<h1>{title}</h1><p>{note}</p>
{svg}
<p>底色越深，得分越高（每一行里最高的是最深的）；橙色是负的：有它反而不像这个答案。把鼠标停在格子上看数值。</p>
</html>
"""


@dataclass
class Strip:
    """一行：label 是这种看法的名字；scores 与 pieces 等长；marked 的格子画方框（标准答案）。"""

    label: str
    pieces: list[str]
    scores: list[float]
    marked: list[bool] | None = None


def strips_svg(rows: list[Strip]) -> str:
    """几行画成一张 SVG；太长的一行折成几行。"""
    left = round(max(label_width(row.label) for row in rows) * SIZE) + 16
    shapes: list[str] = []
    y, right = GAP, 0
    for row in rows:
        top = max((abs(score) for score in row.scores), default=0.0) or 1.0
        marked = row.marked or [False] * len(row.pieces)
        shapes.append(
            f'<text x="{left - 10}" y="{y + 18}" text-anchor="end" fill="#444">{escape(row.label)}</text>'
        )
        x = left
        for piece, score, is_source in zip(row.pieces, row.scores, marked, strict=True):
            shown = piece.replace("\n", "⏎").replace(" ", "␣") or "·"
            wide = round((label_width(shown) + 0.35) * SIZE)
            if x + wide > WIDTH and x > left:
                x, y = left, y + HEIGHT + GAP
            strength = abs(score) / top
            red, green, blue = (
                round(255 + (part - 255) * strength) for part in (BLUE if score >= 0 else RED)
            )
            ink = "#fff" if strength > 0.55 else "#222"
            border = ' stroke="#111" stroke-width="2"' if is_source else ' stroke="#ddd"'
            shapes.append(
                f"<g><title>{escape(piece)} {score:.4f}</title>"
                f'<rect x="{x}" y="{y}" width="{wide}" height="{HEIGHT}" rx="3" fill="rgb({red},{green},{blue})"{border}/>'
                f'<text x="{x + wide / 2}" y="{y + 18}" text-anchor="middle" fill="{ink}">{escape(shown)}</text></g>'
            )
            x += wide + GAP
            right = max(right, x)
        y += HEIGHT + 8
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {right + 4} {y}" width="{right + 4}" height="{y}" '
        f'font-family="{escape(BROWSER_FONTS)}" font-size="{SIZE}">'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(shapes)}</svg>\n'
    )


def write_strips(path: Path, rows: list[Strip], title: str, note: str) -> None:
    """写 path.svg 与 path.html（里面就有图，不用别的文件）。"""
    svg = strips_svg(rows)
    path.with_suffix(".svg").write_text(svg, encoding="utf-8")
    page = PAGE.format(title=escape(title), note=escape(note), svg=svg, fonts=BROWSER_FONTS)
    path.with_suffix(".html").write_text(page, encoding="utf-8")
