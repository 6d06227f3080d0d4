"""报告：表里的区间与差、胜负、雷达图、样本、和上次比；退步点名，转义，坏文件说得清。"""

import json
import random
import re
from html.parser import HTMLParser

import pytest

import benchmark_page as bp
import benchmark_report as br
import results as rs
from nlp_common.base.errors import UserError
from nlp_common.base.intervals import Interval


def write(folder, benchmark, model, scores, name="accuracy", answer="答", **more):
    items = [
        rs.item(f"q{i}", {name: score}, prompt=f"第 {i} 题", answer=f"{answer} {i}", right="对")
        for i, score in enumerate(scores)
    ]
    return rs.write_result(folder, benchmark, model, items, **more)


@pytest.fixture
def folder(tmp_path):
    """三套题，两个模型：knowledge 上 dpo 明显好，style 上一样，diversity 越小越好、dpo 差。"""
    rng = random.Random(0)
    hard = [rng.random() for _ in range(120)]
    write(tmp_path / "r", "knowledge", "sft", [float(h > 0.6) for h in hard], model_id="sft:1")
    write(tmp_path / "r", "knowledge", "dpo", [float(h > 0.3) for h in hard], model_id="dpo:1")
    same = [float(rng.random() > 0.5) for _ in range(60)]
    write(tmp_path / "r", "style", "sft", same)
    write(tmp_path / "r", "style", "dpo", same)
    write(tmp_path / "r", "variety", "sft", [0.2 + 0.1 * rng.random() for _ in range(50)], "violations")
    write(tmp_path / "r", "variety", "dpo", [0.6 + 0.1 * rng.random() for _ in range(50)], "violations")
    return tmp_path


def run(folder, *more):
    return br.main(
        ["--results", str(folder / "r"), "--output_dir", str(folder / "out"), "--baseline", "sft", *more]
    )


def rows_by_name(report):
    return {(row["benchmark"], row["score"]): row["models"] for row in report["rows"]}


def test_table_compares_on_the_same_questions(folder, capsys):
    report = run(folder)
    rows = rows_by_name(report)
    cell = rows["knowledge", "accuracy"]["dpo"]
    assert cell["verdict"] == "better" and cell["gap"]["n"] == 120
    assert cell["gap"]["value"] == pytest.approx(
        cell["value"] - rows["knowledge", "accuracy"]["sft"]["value"]
    )
    assert rows["style", "accuracy"]["dpo"]["verdict"] == ""
    assert rows["variety", "violations"]["dpo"]["verdict"] == "worse"  # 越小越好
    said = capsys.readouterr().out
    assert "▲ dpo" in said and "▼ dpo" in said and "没有上次可比" in said


def test_win_matrix_counts_questions(folder):
    wins = run(folder)["wins"]
    ours, theirs = wins["knowledge"]["dpo"]["sft"], wins["knowledge"]["sft"]["dpo"]
    assert ours["win"] + theirs["win"] == pytest.approx(1) and ours["tie"] == theirs["tie"]
    assert ours["low"] > 0.5 and ours["n"] == 120
    assert wins["style"]["dpo"]["sft"]["win"] == 0.5 and wins["style"]["dpo"]["sft"]["tie"] == 1
    assert wins["variety"]["dpo"]["sft"]["win"] == 0


def test_a_regression_is_named_and_stays_named(folder, capsys):
    assert run(folder)["changes"] == []
    assert run(folder)["changes"] == []  # 一样的结果，没有变化
    rng = random.Random(1)
    write(folder / "r", "knowledge", "dpo", [float(rng.random() > 0.7) for _ in range(120)], model_id="dpo:2")
    write(folder / "r", "variety", "dpo", [0.1] * 50, "violations")
    write(folder / "r", "extra", "dpo", [1.0, 0.0])
    (folder / "r" / "results" / "style--sft.json").unlink()
    for _ in range(2):  # 再运行一遍，变化还在
        capsys.readouterr()
        report = run(folder)
        kinds = [(change["kind"], change["benchmark"], change["model"]) for change in report["changes"]]
        assert kinds == [
            ("worse", "knowledge", "dpo"), ("better", "variety", "dpo"), ("gone", "style", "sft"), ("new", "extra", "dpo"),
        ]  # fmt: skip
        assert "退步　knowledge · dpo · accuracy" in capsys.readouterr().out
    assert "有 1 处确定的退步" in (folder / "out" / "report.html").read_text("utf-8")
    with pytest.raises(SystemExit) as done:
        run(folder, "--fail_on_regression")
    assert done.value.code == 1 and "1 处确定的退步" in capsys.readouterr().err


def test_a_change_within_chance_is_no_regression(folder):
    run(folder)
    path = folder / "r" / "results" / "knowledge--sft.json"
    result = rs.read_result(path)
    first = next(each for each in result["items"] if each["scores"]["accuracy"] == 1)
    first["scores"]["accuracy"] = 0.0
    path.write_text(json.dumps(result), encoding="utf-8")
    [change] = run(folder, "--fail_on_regression")["changes"]
    assert change["kind"] == "unsure" and change["now"] < change["before"]


def test_the_last_snapshot_itself_can_be_given(folder):
    run(folder)
    write(folder / "r", "style", "sft", [0.0] * 60)
    report = run(folder, "--before", str(folder / "out" / "snapshot.json"))
    assert [c["kind"] for c in report["changes"]] == ["worse"]


def test_a_question_without_a_verdict_has_no_score(tmp_path):
    items = [rs.item("q0", {}), rs.item("q1", {"win_rate": 1.0})]
    rs.write_result(tmp_path, "judge_arena", "sft", items)
    report = br.main(["--results", str(tmp_path), "--output_dir", str(tmp_path / "out")])
    assert [row["main"] for row in report["rows"]] == [True]


def test_before_can_be_given(folder, tmp_path):
    run(folder)
    kept = tmp_path / "kept.json"
    kept.write_bytes((folder / "out" / "snapshot.json").read_bytes())
    write(folder / "r", "style", "dpo", [0.0] * 60)
    assert [c["kind"] for c in run(folder, "--before", str(kept))["changes"]] == ["worse"]
    kept.write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="读不出来"):
        run(folder, "--before", str(kept))


def test_samples_are_those_where_models_differ_most(folder):
    group = br.by_benchmark(rs.find_results([folder / "r"]))["knowledge"]
    chosen = br.disagreements(group, 5)
    assert len(chosen) == 5
    assert all({s["scores"]["accuracy"] for s in row["said"].values()} == {0.0, 1.0} for row in chosen)
    alone = br.disagreements(group[:1], 3)
    assert all(row["said"]["dpo"]["scores"]["accuracy"] == 0 for row in alone)


# ---------------------------------------------------------------- 网页


class Tags(HTMLParser):
    """开了的都关上，次序对；留下用到的外部地址。"""

    def __init__(self):
        super().__init__()
        self.open, self.scripts, self.links = [], 0, []

    def handle_starttag(self, tag, attrs):
        self.scripts += tag == "script"
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_stands_alone_and_escapes(folder):
    write(folder / "r", "knowledge", "<script>alert(1)</script>", [1.0] * 120, answer="<b>$x</b>")
    run(folder)
    html = (folder / "out" / "report.html").read_text("utf-8")
    tags = Tags()
    tags.feed(html)
    assert tags.open == [] and tags.scripts == 0 and tags.links == []
    assert "&lt;script&gt;" in html and "&lt;b&gt;$x&lt;/b&gt;" in html
    assert html.count('class="radar"') == 1


def test_radar_reverses_what_is_better_low_and_does_not_draw_what_is_missing():
    def row(benchmark, score, **values):
        return {
            "benchmark": benchmark,
            "score": score,
            "models": {m: {"value": v} for m, v in values.items()},
        }

    rows = [
        row("a", "accuracy", sft=0.4, dpo=0.9),
        row("a", "second", sft=0.1, dpo=0.1),  # 一套题只取第一个
        row("b", "violations", sft=0.2, dpo=0.7),
        row("c", "bleu", sft=45.0, dpo=50.0),  # 不在 0 到 1 之间
        row("d", "accuracy", sft=1.0),
    ]
    axes = bp.radar_axes(rows)
    assert [axis["name"] for axis in axes] == ["a · accuracy", "b · violations", "d · accuracy"]
    assert axes[1]["values"] == pytest.approx({"sft": 0.8, "dpo": 0.3})
    svg = bp.radar_svg(axes, radius=100)
    assert len(re.findall("<circle", svg)) == 5  # dpo 没有 d 的分
    assert len(re.findall('class="model"', svg)) == 3 + 1
    assert "不画雷达图" in bp.radar_section(rows[:2])


# ---------------------------------------------------------------- 找结果


def test_two_seeds_are_told_apart_and_two_same_files_refused(folder):
    write(folder / "r" / "again", "style", "sft", [1.0] * 60, seed=1)
    names = {r["model"] for r in br.name_apart(rs.find_results([folder / "r"])) if r["benchmark"] == "style"}
    assert names == {"sft（种子 0）", "sft（种子 1）", "dpo"}
    write(folder / "r" / "third", "style", "sft", [1.0] * 60, seed=1)
    with pytest.raises(UserError, match="只给一个"):
        br.name_apart(rs.find_results([folder / "r"]))


def test_what_is_missing_is_said(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="没有结果文件"):
        br.main(["--results", str(tmp_path / "empty"), "--output_dir", str(tmp_path)])
    with pytest.raises(UserError, match="没有 --baseline ppo；有的是：dpo、sft"):
        run(folder, "--baseline", "ppo")
    with pytest.raises(UserError, match="nowhere"):
        br.main(["--results", str(tmp_path / "nowhere")])


def test_a_score_without_an_interval_is_shown_with_a_dash(folder, capsys):
    nan = float("nan")
    items = [rs.item(f"q{i}", {"accuracy": 1.0}) for i in range(3)]
    rs.write_result(folder / "r", "rank", "sft", items, scores={"kendall": Interval(0.5, nan, nan, nan, 3)})
    run(folder)
    assert "0.500（—–—，n=3）" in capsys.readouterr().out
    assert "—–—，n=3" in (folder / "out" / "report.html").read_text("utf-8")
