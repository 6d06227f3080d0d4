"""网页的模板：样子写进去了，少一栏、多一个 $ 说得出来。"""

import pytest

from nlp_common.draw.pages import STYLE, fill_page


def test_style_and_parts_are_filled_in(tmp_path):
    template = tmp_path / "page.html"
    template.write_text("<style>$style</style>$body", encoding="utf-8")
    page = fill_page(template, {"body": "<p>5 $ 一本</p>"})
    assert page == f"<style>{STYLE}</style><p>5 $ 一本</p>"
    assert "$" not in STYLE and "url(" not in STYLE and "@import" not in STYLE  # 不引用外部的东西
    with pytest.raises(KeyError, match="body"):
        fill_page(template, {})
