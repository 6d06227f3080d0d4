"""往终端里写字：汉字占两格，补空格到同样的格数。"""

from nlp_common.base.console import padded, print_table, printable, width


def test_width_counts_chinese_and_full_width_marks_twice():
    assert width("") == 0 and width("pass@1") == 6
    assert width("按全文 ÷ 字数") == 6 + 3 + 4  # ÷ 是一格
    assert width("（一）") == 6 and width("“引号”") == 6  # 弯引号算一格


def test_padded_cells_line_up():
    assert {width(padded(name, 12)) for name in ("模型", "sft", "有礼的整句")} == {12}
    assert padded("模型", 6, right=True) == "  模型"
    assert padded("太长的名字", 4) == "太长的名字 " and padded("太长的名字", 4, right=True) == "太长的名字"


def test_printable_keeps_lines_and_hides_control_characters():
    assert printable("好\n\t\x1b[2J\x00") == "好\n\t�[2J�"


def test_table_columns_line_up(capsys):
    print_table([["名字", "对", "seconds"], ["一", 0.5, "1.25"], ["很长的名字", "", 10]])
    lines = capsys.readouterr().out.splitlines()[1:]
    assert len({width(line) for line in lines}) == 1 and lines[1].endswith("   1.25")
