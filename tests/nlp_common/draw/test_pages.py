"""网页的模板：样子写进去了，少一栏、多一个 $ 说得出来。"""

import pytest

from nlp_common.draw.pages import STYLE, fill_page, html_table


def test_style_and_parts_are_filled_in(tmp_path):
    template = tmp_path / "page.html"
    template.write_text("<style>$style</style>$body", encoding="utf-8")
    page = fill_page(template, {"body": "<p>5 $ 一本</p>"})
    assert page == f"<style>{STYLE}</style><p>5 $ 一本</p>"
    assert "$" not in STYLE and "url(" not in STYLE and "@import" not in STYLE  # 不引用外部的东西
    with pytest.raises(KeyError, match="body"):
        fill_page(template, {})


def test_columns_of_numbers_and_their_heads_stand_to_the_right():
    rows = [["甲", '<td class="number">3</td>', "4"], ["乙", "5", '<td class="text">td</td>']]
    page = html_table(["名字td", "几个", "几次"], rows, {2}, "small")
    head, body = page.split("</thead>")
    assert (
        '<table class="small">' in head
        and "<th>名字td</th>" in head
        and head.count('<th class="number">') == 2
    )
    assert (
        body.count('<td class="number">') == 3
        and '<td class="text">td</td>' in body
        and "<td>甲</td>" in body
    )
    assert html_table(["空"], []).count("<tr>") == 1
