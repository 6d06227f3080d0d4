"""审计页与数据卡、统计页、反馈文件的表、工作流的表与图：数字、次序对，别人写的文字变不成标签。"""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

import audit_page
import feedback_file
import pipeline_page
import workflow_report
from canary import HarmTest
from curation_rows import Table
from customers import Vote
from feedback import agreement
from nlp_common.data.documents import Document
from text_cleaning import Cleaned


def chat(asked: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}


# ---------------------------------------------------------------- 清洗的审计页与数据卡


@pytest.fixture
def curated():
    """三行，第二行是垃圾，丢了；表的名字里有会撑破 Markdown 的字符。"""
    table = Table(
        "chats",
        [chat("一", "甲"), chat("<b>二</b>", "<p>乙</p>"), chat("三", "丙")],
        {"name": "a/自己.jsonl"},
    )
    table.drop("garbage", {1: "网页|残渣：<p>"})
    table.notes.append("要<i>人</i>知道的")
    row = {"kind": "寒|暄", "before": 3, "after": 1, "kept": 1 / 3, "fewer": True}
    return {"chats": table}, {"chats": {"rows": 3, "kept": 2, "masked": 0, "coverage": [row]}}


def test_audit_page_shows_what_was_dropped_and_escapes_it(curated):
    page = audit_page.page(*curated)
    assert "3 行，留下 2 行" in page and "垃圾（1 行）" in page and "比别的少留了许多" in page
    assert "&lt;b&gt;二&lt;/b&gt;" in page and "<b>二" not in page and "<i>人" not in page
    assert "第 2 条" in page  # 文件里的第几条，从 1 数
    assert 'width:200px"' in page and 'width:300px"' not in page  # 条的长短：三行里剩两行


def test_card_leaves_to_people_what_only_people_know(curated):
    settings = SimpleNamespace(languages="zh", threshold=0.7, short_copies=100, overlap=0.8, seed=0)
    card = audit_page.card(*curated, settings)
    assert "license: 待填" in card and "自己.jsonl，3 行，清洗后 2 行" in card
    assert "| 对话 | 垃圾 | 1 | 网页\\|残渣 1 |" in card and "| 对话 | 寒\\|暄 | 3 | 1 |" in card
    assert "没有用模型找标错的" in card and "没有查评测的题" in card and "只留下 33%" in card


# ---------------------------------------------------------------- 文档的统计页


def test_counts_are_bars_in_proportion():
    found = pipeline_page.counted(Counter({"time": 1, "llm": 4}), pipeline_page.RULE_TITLES, "句式", "题")
    assert found.index("大模型出的") < found.index("某时做")  # 多的在前
    assert "width: 100.0%" in found and "width: 25.0%" in found and found.count('class="number"') == 3
    assert "<table" in pipeline_page.counted(Counter(), {}, "句式", "题")


def test_files_are_counted_by_their_endings():
    documents = [Document("a.TXT", "甲乙丙丁"), Document("b.txt", "子丑"), Document("c.html", "寅")]
    cleaned = [
        Cleaned("a.TXT", "甲乙", [("丙丁", "页码")]),
        Cleaned("b.txt", "子丑"),
        Cleaned("c.html", "寅"),
    ]
    found = pipeline_page.files_table(documents, cleaned, ["<坏>.pdf 读不了"])
    rows = [row.split("</tr>")[0] for row in found.split("<tr>")[2:]]
    numbers = [[cell.split("</td>")[0] for cell in row.split('class="number">')[1:]] for row in rows]
    assert numbers[:2] == [["1", "1", "1", "0"], ["2", "6", "4", "1"]]
    assert "&lt;坏&gt;.pdf" in found and "<坏>" not in found


# ---------------------------------------------------------------- 自己的反馈


def test_the_same_answer_is_one_reply_and_labels_may_be_written_in_many_ways():
    row = {"prompt": "问", "completion": "答"}
    rows = [row | {"user": user, "label": label} for user, label in (("甲", True), ("乙", "FALSE "), (3, 1))]
    votes, replies = feedback_file.read_votes([*rows, rows[0] | {"completion": "别的"}], "f.jsonl")
    assert votes == [Vote("甲", 0, True), Vote("乙", 0, False), Vote("3", 0, True), Vote("甲", 1, True)]
    assert [reply["completion"] for reply in replies] == ["答", "别的"]


def test_the_suspicious_come_first():
    votes = [Vote("多", n, False) for n in range(5)] + [Vote("准", n, True) for n in range(3)]
    votes += [Vote("也准", n, True) for n in range(3)]
    users = feedback_file.describe_users(votes, agreement(votes), cap=4)
    assert [user["user"] for user in users] == ["多", *sorted(["准", "也准"])]
    assert users[0]["over_cap"] and users[0]["votes"] == 5 and users[0]["shared"] == 3
    assert users[0]["trust"] < users[1]["trust"]


# ---------------------------------------------------------------- 工作流的表与图


def test_the_table_says_where_each_candidate_stopped(capsys):
    metrics = {
        "stopped_at": {"good": "passed", "unsafe": "safety"},
        "simulated": {"good": {"keep": 1, "passed": 3}, "unsafe": {"safety": 4}},
        "false_rollbacks": 0.25,
        "false_rollbacks_runs": 12,
    }
    workflow_report.show(metrics)
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[1] == ["好的", "都过了", "都过了", "3/4，不能丢的", "1/4"]  # 多的在前
    assert lines[2] == ["不安全", "安全", "安全", "4/4"]
    assert "错退" in " ".join(lines[3]) and "0.250" in " ".join(lines[3])
    workflow_report.show_canary(
        "good", {"decision": "undecided", "requests": 7, "reason": "unsafe +0.1"}, 3, 0.7
    )
    assert "第 7 次请求流量来完了还没有定：不发布：不安全的 +0.1" in capsys.readouterr().out


def test_the_curve_is_thinned_but_keeps_its_numbers():
    test = HarmTest(0.05, 0.05, 0.05, 0.0)
    assert workflow_report.curve_of(test) == {"groups": [], "low": [], "high": []}
    for difference in np.random.default_rng(0).choice([0.0, 0.0, 1.0], 400):
        test.add(float(difference))
    curve, (low, high) = workflow_report.curve_of(test), test.bounds()
    assert 70 <= len(curve["groups"]) <= 90 and curve["groups"][0] == 1
    for at, group in enumerate(curve["groups"]):
        assert (curve["low"][at], curve["high"][at]) == (low[group - 1], high[group - 1])
