"""一串 token 画成一格一格：算损失的是绿的，其余是灰的。"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from nlp_common.draw.figures import BROWSER_FONTS

SIZE, HEIGHT, GAP, WIDTH = 15, 26, 3, 760  # 字号、一格的高、格子之间、整张图的宽（像素）
LEARNED, CONTEXT = ("#d3f0dc", "#14622f"), ("#eceff1", "#6b7780")  # 底色与字的颜色


def token_boxes(path: str | Path, rows: Sequence[tuple[Sequence[str], Sequence[bool]]]) -> str:
    """rows：每行是（各 token 的文字，它算不算损失）。写成 SVG 文件，返回 SVG 文字；换行符之后另起一行。"""
    shapes: list[str] = []
    y = GAP
    for texts, learned in rows:
        x = GAP
        for text, is_learned in zip(texts, learned, strict=True):
            shown = text.replace("\n", "⏎").replace(" ", "␣")
            wide = round((sum(1.0 if ord(c) > 0x2E7F else 0.62 for c in shown) + 0.5) * SIZE)  # 汉字宽一倍
            if x + wide > WIDTH:
                x, y = GAP, y + HEIGHT + GAP
            fill, color = LEARNED if is_learned else CONTEXT
            shapes.append(
                f'<rect x="{x}" y="{y}" width="{wide}" height="{HEIGHT}" rx="4" fill="{fill}"/>'
                f'<text x="{x + wide / 2}" y="{y + HEIGHT * 0.7:.1f}" fill="{color}">{escape(shown)}</text>'
            )
            x += wide + GAP
            if text.endswith("\n"):
                x, y = GAP, y + HEIGHT + GAP
        y += (HEIGHT + GAP if x > GAP else 0) + 4 * GAP
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}" '
        f'font-family="{escape(BROWSER_FONTS)}" font-size="{SIZE}" text-anchor="middle">'
        f"{''.join(shapes)}</svg>\n"
    )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(svg, encoding="utf-8")
    return svg
