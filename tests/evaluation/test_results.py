"""结果文件：写了读得回，区间是各题均值的；坏的文件说出哪里坏；成对取同样的题。"""

import json

import pytest

import results as rs
from nlp_common.base.errors import UserError
from nlp_common.base.intervals import Interval


def items(scores):
    return [rs.item(f"q{i}", {"accuracy": score}, prompt=f"题 {i}") for i, score in enumerate(scores)]


def test_written_result_reads_back(tmp_path):
    extra = {"bleu": Interval(45.8, 40.0, 50.0, 2.0, 4)}
    written = rs.write_result(
        tmp_path, "knowledge", "Qwen/Qwen3 0.6B", items([1, 0, 1, 1]), model_id="m", seed=2, scores=extra
    )
    [path] = (tmp_path / "results").glob("*.json")
    assert path.name == "knowledge--Qwen_Qwen3_0.6B.json"
    read = rs.read_result(path)
    assert read == written
    assert read["scores"]["accuracy"]["value"] == 0.75 and read["scores"]["accuracy"]["n"] == 4
    assert read["scores"]["accuracy"]["low"] < 0.75 < read["scores"]["accuracy"]["high"]
    assert read["scores"]["bleu"]["value"] == 45.8


def test_find_results_reads_folders_and_leaves_unfinished_ones(tmp_path):
    rs.write_result(tmp_path / "a", "two", "m", items([1]))
    rs.write_result(tmp_path / "a" / ".b.work", "half", "m", items([1]))
    rs.write_result(tmp_path / "c" / "d", "one", "m", items([0]))
    assert [r["benchmark"] for r in rs.find_results([tmp_path])] == ["one", "two"]
    with pytest.raises(UserError, match="nowhere"):
        rs.find_results([tmp_path / "nowhere"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r.pop("format"), "不是结果文件"),
        (lambda r: r.pop("items"), "缺 items"),
        (lambda r: r["scores"].update(accuracy=1), "没有 value"),
        (lambda r: r["items"][1].pop("id"), "第 2 项"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, change, said):
    result = rs.write_result(tmp_path, "b", "m", items([1, 0]))
    change(result)
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(result), encoding="utf-8")
    with pytest.raises(UserError, match=said):
        rs.read_result(path)


def test_cut_file_is_not_taken_for_a_result(tmp_path):
    rs.write_result(tmp_path, "b", "m", items([1, 0]))
    [path] = (tmp_path / "results").glob("*.json")
    path.write_text(path.read_text("utf-8")[:100], encoding="utf-8")
    with pytest.raises(UserError, match="读不出来"):
        rs.read_result(path)


def test_scripts_cannot_write_what_cannot_be_compared(tmp_path):
    with pytest.raises(ValueError, match="一道题也没有"):
        rs.write_result(tmp_path, "b", "m", [])
    with pytest.raises(ValueError, match="重复"):
        rs.write_result(tmp_path, "b", "m", items([1]) * 2)
    with pytest.raises(ValueError, match="有限"):
        rs.write_result(tmp_path, "b", "m", items([float("nan")]))


def test_pairs_take_the_questions_both_have(tmp_path):
    ours = rs.write_result(tmp_path, "b", "x", items([1, 0, 1]))
    theirs = rs.write_result(tmp_path, "b", "y", items([0, 0, 1])[::-1][:2])
    assert rs.same_questions(ours, theirs, "accuracy") == ([0, 1], [0, 1])


def test_direction_is_read_from_the_last_part():
    assert rs.lower_is_better("story.perplexity") and not rs.lower_is_better("perplexity.kept")
    assert rs.is_neutral("diversity.entropy") and rs.is_neutral("picks_A") and not rs.is_neutral("right")


def test_saved_scores_are_shown_as_one_table_a_benchmark(tmp_path, capsys):
    rs.write_result(tmp_path, "题一", "sft", items([1, 0, 1, 1]))
    rs.write_result(tmp_path, "题一", "dpo", items([1, 1, 1, 1]), scores={"entropy": Interval(1, 0, 2, 1, 4)})
    rs.write_result(tmp_path, "题二", "sft", [rs.item("a", {"loss": 0.5})])
    rs.show_saved(tmp_path)
    said = capsys.readouterr().out
    assert "entropy" not in said  # 不分好坏的分不印
    assert said.index("题一") < said.index("dpo  1.000（0.510–1.000，n=4）") < said.index("sft  0.750（")
    assert said.index("题二") < said.index("sft  0.500（0.500–0.500，n=1）")


def test_nothing_is_shown_where_no_result_was_written(tmp_path, capsys):
    rs.show_saved(tmp_path)
    assert not capsys.readouterr().out


def test_one_question_has_no_standard_error_and_the_file_is_strict_json(tmp_path):
    rs.write_result(tmp_path, "b", "m", items([1]))
    [path] = (tmp_path / "results").glob("*.json")

    def refuse(word):
        raise ValueError(word)

    result = json.loads(path.read_text("utf-8"), parse_constant=refuse)
    assert result["scores"]["accuracy"]["stderr"] is None and rs.read_result(path) == result
