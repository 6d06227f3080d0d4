"""读者的题目文件：错误里的行号就是编辑器里的，csv 的表头、一格里的换行、空行都算。"""

import pytest

import cbbq
from answer_files import read_answers
from nlp_common.base.errors import UserError
from question_files import place_of, places_of, read_questions

CSV = 'prompt,answer\n"一格里\n有两行",好\n\n第三条, \n最后,坏\n'


def test_lines_are_the_editors(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(CSV, encoding="utf-8")
    lines = CSV.split("\n")
    assert len(read_questions(str(path), ("prompt",))) == 3
    assert [place_of(path, n) for n in (1, 2, 3)] == ["第 2 行", "第 5 行", "第 6 行"]
    assert lines[4].startswith("第三条") and lines[5].startswith("最后")
    assert places_of(path, [1, 3]) == "第 2 行、第 6 行"
    with pytest.raises(UserError, match="第 5 行的 answer 是空的"):
        read_questions(str(path), ("answer",))


def test_every_reader_says_the_editors_line(tmp_path, capsys):
    for name in "ab":
        (tmp_path / f"{name}.csv").write_text(CSV, encoding="utf-8")
    read_answers([str(tmp_path / "a.csv"), str(tmp_path / "b.csv")])
    assert "第 5 行的回答是空的（共 1 行）" in capsys.readouterr().out
    (tmp_path / "a.csv").write_text(CSV + "最后,又是它\n", encoding="utf-8")
    with pytest.raises(UserError, match="第 7 行与第 6 行是同一道题"):
        read_answers([str(tmp_path / "a.csv"), str(tmp_path / "b.csv")])
    bad = tmp_path / "cbbq.csv"
    columns = "context,question,ans0,ans1,ans2,label,question_polarity,context_condition"
    row = "事,谁,甲,乙,不知道,{},neg,ambiguous"
    bad.write_text("\n".join([columns, row.format(2), row.format(7)]), encoding="utf-8")
    with pytest.raises(UserError, match="第 3 行的 label 要是 0、1、2，给的是 7"):
        cbbq.read_cbbq(str(bad))


def test_a_folder_and_blank_lines(tmp_path):
    with pytest.raises(UserError, match="是文件夹"):
        read_questions(str(tmp_path))
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "问"}\n\n\n{"prompt": " "}\n', encoding="utf-8")
    with pytest.raises(UserError, match="第 4 行的 prompt 是空的"):
        read_questions(str(path), ("prompt",))
