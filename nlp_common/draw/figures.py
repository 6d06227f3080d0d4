"""画图的底子：字体与标签、图例的位置、把 matplotlib 的 SVG 改成能嵌进网页的样子。给 plots.py 用。"""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from nlp_common.base.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    Draw = Callable[[Axes, Callable[[str], str]], None]

BROWSER_FONTS = (
    "system-ui, 'PingFang SC', 'Microsoft YaHei', 'Noto Sans CJK SC', 'Noto Sans SC', "
    "'Source Han Sans SC', 'WenQuanYi Micro Hei', sans-serif"
)
CJK_FONTS = re.compile(
    r"(Noto|Source Han) (Sans|Serif) (CJK )?(SC|CN|TC|JP|KR|HK)|PingFang|Hiragino Sans GB|Heiti|STHeiti|Songti SC"
    r"|Microsoft YaHei|SimHei|SimSun|WenQuanYi|Droid Sans Fallback|Arial Unicode MS"
)
FONT_SIZE = 10  # 磅


def cjk_font() -> str | None:
    """matplotlib 找得到的一种中文字体；没有给 None。刚装的字体要删掉 matplotlib 的缓存才认得。"""
    from matplotlib import font_manager

    names = {f.name for f in font_manager.fontManager.ttflist if CJK_FONTS.match(f.name)}
    for name in sorted(names, key=lambda name: ("SC" not in name, name)):
        entries = [f for f in font_manager.fontManager.ttflist if f.name == name]
        if any(Path(entry.fname).exists() for entry in entries):  # 缓存里的字体可能已经卸载
            return name
    return None


def label_width(label: str) -> float:
    """文字有多宽（以字号为单位，略宽松）。matplotlib 没有中文字体时量不准，所以自己估。"""
    return max(sum(1.0 if ord(c) > 0x2E7F else 0.62 for c in part) for part in label.split("|", 1))


def _chinese(label: str) -> str:
    return label.split("|", 1)[0]


def _english(label: str) -> str:
    chinese, _, english = label.partition("|")
    return english or re.sub(r"[^\x20-\u024f]+", " ", chinese).strip() or "?"


def render(
    path: str | Path | None,
    draw: Draw,
    legend: list[str],
    labels: tuple[str, str, str],
    min_width: float = 0,
) -> str:
    """画一张图，返回 SVG，给了 path 再写成文件。

    draw(axes, text) 往坐标区里画，text 把 "中文|英文" 变成这次该用的那一半；legend 是图例各项，
    labels 是标题与横纵坐标名；min_width 是坐标区至少多宽，以字号为单位。
    """
    suffix = Path(path).suffix.lower() if path is not None else ".svg"
    if suffix not in (".svg", ".png"):
        raise UserError(f"不会画 {path}：图的文件名要以 .svg 或 .png 结尾。")
    body = max(6.0, min_width * FONT_SIZE / 72)
    margin = 0.0 if len(legend) < 2 else 0.6 + max(map(label_width, legend)) * FONT_SIZE / 72  # 英寸

    def picture(kind: str, text: Callable[[str], str], fonts: list[str]) -> bytes:
        import matplotlib
        from matplotlib.figure import Figure  # 不用 pyplot：没有窗口，也不留全局状态

        style = {
            "font.family": fonts,
            "font.size": FONT_SIZE,
            "svg.fonttype": "none",
            "svg.hashsalt": "nlp",
            "text.parse_math": False,  # 名字里的 $ 就是 $
            "axes.unicode_minus": False,
        }
        with matplotlib.rc_context(style), warnings.catch_warnings():
            # SVG 里的字由浏览器去画，matplotlib 自己有没有这个字形无关紧要。
            if kind == "svg":
                warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
            figure = Figure(figsize=(body + margin, 3.6))
            split = body / (body + margin)
            figure.set_layout_engine("constrained", rect=(0, 0, split, 1))
            axes = figure.add_subplot()
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", alpha=0.25)
            axes.set_axisbelow(True)
            draw(axes, text)
            title, xlabel, ylabel = (text(label) if label else "" for label in labels)
            axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
            if margin:  # 图例放在右边自己量好的空白里：不挡数据，字再宽也不会被裁掉
                box = figure.legend(loc="upper left", bbox_to_anchor=(split, 0.95), frameon=False)
                box.set_in_layout(False)
            out = io.BytesIO()
            metadata = dict.fromkeys(("Creator", "Date", "Format", "Type")) if kind == "svg" else {}
            figure.savefig(out, format=kind, metadata=metadata, dpi=150)
        return out.getvalue()

    font = cjk_font()
    fonts = [font, "DejaVu Sans"] if font else ["DejaVu Sans"]
    svg = _embeddable(picture("svg", _chinese, ["DejaVu Sans"]).decode())
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        content = svg.encode() if suffix == ".svg" else picture("png", _chinese if font else _english, fonts)
        Path(path).write_bytes(content)
    return svg


def _embeddable(svg: str) -> str:
    """去掉 XML 声明；换成浏览器的字体；id 与样式都限定在这一张图里。"""
    svg = svg[svg.index("<svg") :].replace("*{stroke-", "#UID *{stroke-")
    uid = "g" + hashlib.sha256(svg.encode()).hexdigest()[:10]

    def rewrite(tag: re.Match) -> str:
        text = re.sub(r"'DejaVu Sans'(, [^;\"]*)?", BROWSER_FONTS, tag[0])
        text = re.sub(r'\bid="([^"]+)"', rf'id="{uid}-\1"', text)
        return re.sub(r'(href="|url\()#', rf"\1#{uid}-", text)

    svg = re.sub(r"<[^>]*>", rewrite, svg).replace("#UID ", f"#{uid} ", 1)  # 只改标签，不碰标签之间的文字
    return svg.replace("<svg ", f'<svg id="{uid}" style="max-width: 100%; height: auto" ', 1)
