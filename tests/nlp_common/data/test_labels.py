"""分类的数据与要判断的文字：标签怎样写都认得，被引号吞掉的行、重复与矛盾的行都说出来，一行一个判断。"""

from pathlib import Path
from types import SimpleNamespace

import pytest

from nlp_common.base.errors import UserError
from nlp_common.data.labels import labelled, texts_to_predict, without_duplicates
from nlp_common.data.rows import read_rows

NAMES = ["负面", "正面"]
CODES = {"100": 0, "101": 1, "news_story": 0}


def read(path: Path, content: str | bytes, **options) -> list[dict]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return labelled(read_rows(str(path)), ("text",), NAMES, **options)


def error_of(function, *arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    "written", ["1", '"1"', "1.0", '"1.0"', '" 1 "', '"１"', '"正面"', "101", '"101"', "101.0"]
)
def test_labels_are_looked_up_as_numbers_and_as_text(tmp_path, written):
    rows = read(tmp_path / "a.jsonl", f'{{"text": "好", "label": {written}}}\n', codes=CODES)
    assert rows == [{"text": "好", "label": 1}]


@pytest.mark.parametrize("written", ["2", "true", "null", '"1.5"', "1.5", "-1", '"好"', "[1]"])
def test_labels_that_are_not_known(tmp_path, written):
    message = error_of(read, tmp_path / "a.jsonl", f'{{"text": "好", "label": {written}}}\n', codes=CODES)
    assert "第 1 行的 label" in message and "不认识。可以是：0 负面、1 正面" in message


SWALLOWED = 'text,label\n好,1\n"没有收尾,0\n位置方便,1\n价格虚高",0\n坏,0\n'


@pytest.mark.parametrize(
    "content",
    [
        SWALLOWED,
        SWALLOWED.replace("\n", "\r\n"),
        'text,label\n好,1\n"没有收尾，就吞了\n位置方便,正面\n价格虚高",0\n',
        'label,text\n1,好\n0,"没有收尾\n1,位置方便\n0,价格虚高"\n',
        'id,text,label\na,好,1\nb,"没有收尾,0\nc,价格虚高",0\n',
    ],
)
def test_a_csv_field_that_swallows_labelled_lines_is_refused(tmp_path, content):
    message = error_of(read, tmp_path / "a.csv", content)
    assert "第 3 行" in message or "第 2 行" in message or "第 4 行" in message
    assert "吞了进去" in message and "双引号" in message


def test_line_breaks_inside_a_field_are_fine(tmp_path):
    content = 'text,label\n"第一行\n第二行,""引用""",1\n"价格,5\n房间,3",0\n'
    rows = read(tmp_path / "a.csv", content)
    assert [row["text"] for row in rows] == ['第一行\n第二行,"引用"', "价格,5\n房间,3"]
    assert read(tmp_path / "a.jsonl", '{"text": "甲,1\\n乙,0", "label": 1}\n')[0]["text"] == "甲,1\n乙,0"


def test_a_quote_in_a_tsv_swallows_nothing(tmp_path):
    lines = [f"{'' if n != 3 else chr(34)}第{n}条{chr(34) if n == 7 else ''}\t{n % 2}" for n in range(10)]
    rows = read(tmp_path / "a.tsv", "text\tlabel\n" + "\n".join(lines) + "\n")
    assert [row["label"] for row in rows] == [0, 1] * 5
    assert rows[3]["text"] == '"第3条' and rows[7]["text"] == '第7条"'


# ---- 去重 ----


def rows_of(*pairs: tuple[str, int]) -> list[dict]:
    return [{"text": text, "label": label} for text, label in pairs]


def test_duplicates_and_contradictions_are_counted(capsys):
    rows = rows_of(("好", 1), ("好。", 1), ("坏", 0), ("怪", 0), ("怪", 1), ("怪", 1), ("新", 1))
    assert without_duplicates(rows, "数据.csv") == rows_of(("好", 1), ("坏", 0), ("新", 1))
    shown = capsys.readouterr().out
    assert "数据.csv：去重去掉了 4 行（共 7 行）" in shown
    assert "重复的 1 行，只留第一次出现的" in shown and "标了不同 label 的 3 行，哪一行都不要" in shown
    without_duplicates(rows_of(("好", 1), ("坏", 0)), "数据.csv")
    assert capsys.readouterr().out == ""


def test_nothing_but_contradictions():
    message = error_of(without_duplicates, rows_of(("好", 1), ("好", 0)), "数据.csv")
    assert "标了不同 label 的 2 行" in message and "一行也不剩" in message


# ---- 要判断的文字 ----


def texts(path: Path, content: str | bytes) -> list[str]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return texts_to_predict(SimpleNamespace(predict=None, predict_file=str(path)))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_one_line_one_text_whatever_the_line_ending(tmp_path, end, bom):
    lines = ["甲", "乙", "", "丙", "\u3000", "", "丁"]
    assert texts(tmp_path / "a.txt", bom + end.join(lines)) == ["甲", "乙", "丙", "丁"]
    assert texts(tmp_path / "b.txt", bom + end.join(lines) + end) == ["甲", "乙", "丙", "丁"]


def test_other_files_of_texts(tmp_path):
    assert texts(tmp_path / "a.txt", '{"text": "甲"}\n\n{"text": "乙"}\n') == ["甲", "乙"]
    assert texts(tmp_path / "a.tsv", 'text\n"甲\n乙"\n') == ['"甲', '乙"']
    assert texts(tmp_path / "a.csv", 'text\n"甲\n乙"\n') == ["甲\n乙"]
    assert "没有一行文字" in error_of(texts, tmp_path / "b.txt", "\n \n")
    assert "第 2 行不是 UTF-8" in error_of(texts, tmp_path / "c.txt", "甲乙丙丁\n".encode() + b"\xff\n")
