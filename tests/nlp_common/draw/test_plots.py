"""画图：SVG 里的文字与 id、确定性、PNG 在没有中文字体时的标签。"""

import re
import warnings
import xml.etree.ElementTree as ElementTree

import pytest

from nlp_common.base.errors import UserError
from nlp_common.draw import figures
from nlp_common.draw.plots import bar_chart, cjk_font, histogram, line_chart

LOSS = {"训练|train": ([0, 1, 2], [3.0, 2.0, 1.5]), "留出|held-out": ([0, 2], [3.1, float("nan")])}


def loss_chart(path=None, title="预训练损失|Pretraining loss"):
    return line_chart(path, LOSS, title, "步|step", "nats", hlines={"熵|entropy": 0.5})


def texts(svg):
    return [e.text for e in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_svg_text_is_text_with_browser_fonts_and_no_warning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svg = loss_chart(tmp_path / "new" / "loss.svg")
    assert {"训练", "留出", "预训练损失", "步", "nats", "熵"} <= set(texts(svg))
    assert "Noto Sans CJK SC" in svg and "sans-serif" in svg and "DejaVu" not in svg
    assert svg.startswith("<svg") and (tmp_path / "new" / "loss.svg").read_text(encoding="utf-8") == svg


def test_svg_is_the_same_with_and_without_a_cjk_font(monkeypatch):
    monkeypatch.setattr(figures, "cjk_font", lambda: None)
    without = loss_chart()
    monkeypatch.undo()
    assert loss_chart() == without == loss_chart()


def test_ids_of_several_svgs_do_not_clash_and_every_reference_resolves():
    charts = [
        loss_chart(),
        loss_chart(title="同样的数据，另一个标题"),
        bar_chart(None, {"SFT": {"a": 1.0}}, "t", "", ""),
        histogram(None, {"a": [1, 2]}, "t", "", ""),
    ]
    seen = set()
    for svg in charts:
        ids = re.findall(r'\bid="([^"]+)"', svg)
        assert len(ids) == len(set(ids)) and not seen & set(ids)
        seen |= set(ids)
        references = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', svg)
        assert references and {a or b for a, b in references} <= set(ids)
        assert f"#{ids[0]} *{{" in svg  # 样式不会影响网页里别的图


def test_labels_are_never_read_as_markup_or_math():
    name = 'a <b> & $x$ id="y" url(#z)'
    assert name in texts(line_chart(None, {name: ([0, 1], [0, 1]), "另": ([0], [1])}, "t", "", ""))


def test_png_without_cjk_font_uses_english_and_draws_no_empty_box(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "cjk_font", lambda: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # 缺字形时 matplotlib 会警告
        loss_chart(tmp_path / "loss.png")
        bar_chart(tmp_path / "bar.png", {"只有中文": {"类别": 1.0}}, "没有英文的标题", "", "")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("label", "english"),
    [("损失|loss", "loss"), ("loss", "loss"), ("SFT 的损失", "SFT"), ("损失", "?"), ("a|b|c", "b|c")],
)
def test_english_half_of_a_label(label, english):
    assert figures._english(label) == english


@pytest.mark.skipif(cjk_font() is None, reason="这台机器没有中文字体")
def test_png_with_cjk_font_has_the_glyphs(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_chart(tmp_path / "loss.png")


def test_bar_labels_and_missing_category():
    svg = bar_chart(None, {"SFT": {"答对": 0.5, "偏好": 0.25}, "DPO": {"偏好": 1}}, "t", "", "", digits=1)
    assert [t for t in texts(svg) if t in ("0.5", "0.2", "1.0", "答对", "偏好")].count("偏好") == 1
    assert {"0.5", "0.2", "1.0", "答对", "SFT", "DPO"} <= set(texts(svg))


def test_histogram_ignores_nan_and_infinity():
    clean = histogram(None, {"a": [1, 2, 2], "b": [3]}, "t", "", "", bins=4)
    assert (
        histogram(None, {"a": [1, float("nan"), 2, 2], "b": [3, float("inf")]}, "t", "", "", bins=4) == clean
    )


@pytest.mark.parametrize("chart", [line_chart, bar_chart, histogram])
def test_empty_data_still_draws(chart):
    assert "空图" in texts(chart(None, {}, "空图", "", ""))


def test_unknown_suffix(tmp_path):
    with pytest.raises(UserError, match=r"\.svg 或 \.png"):
        loss_chart(tmp_path / "loss.jpg")
