"""客服的八周：旧记录、客户、换不换、提示与转人工、网页；整个脚本走一遍，中断了接着来。"""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import customer_alignment
import handover
from customer_alignment import CustomerSettings, arms_of, replace_or_keep
from customers import BRUSHED, FAVOURITE, PROMPT, color_questions, error_rates, old_records, solves, traffic
from nlp_common.base.errors import UserError
from nlp_common.lm.chatml import prompt_ids
from nlp_common.tiny import world
from nlp_common.tiny.world import UNHELPFUL
from poisoned_week import DEFENCES, suspects
from weeks_page import write_page

SCRIPT = Path(__file__).resolve().parents[2] / "alignment_ops" / "customer_alignment.py"


# ---------------------------------------------------------------- 模拟的客户


def test_old_records_have_their_planted_faults():
    rows, asked = old_records(800, 0), traffic(800, 0, 0)
    brushed = {slot: [] for slot in world.SLOTS}
    for row, question in zip(rows, asked, strict=True):
        said = row["messages"][-1]["content"]
        prompted = row["messages"][0] == {"role": "system", "content": PROMPT}
        if question["slot"] is None:
            assert said == question["answer"]
            continue
        brushed[question["slot"]].append(said in UNHELPFUL)
        if prompted and said not in UNHELPFUL:
            assert said == question["sentence"]  # 带着提示的都是整句
    for slot, each in brushed.items():
        share = np.mean(each)
        assert (0.6 < share < 0.9) if slot in BRUSHED else share == 0


def test_customers_differ_but_are_wrong_as_often_as_told():
    rates = list(error_rates(80, 0.3, 0).values())
    assert np.mean(rates) == pytest.approx(0.3) and min(rates) == 0 and max(rates) == pytest.approx(0.6)
    assert set(error_rates(80, 0.0, 0).values()) == {0.0}


def test_a_solved_question_is_a_whole_right_sentence():
    question = color_questions(1, 0)[0]
    assert solves(question, question["sentence"]) and solves(question, "您好，" + question["sentence"])
    wrong = question["sentence"].replace(question["answer"], FAVOURITE)
    for text in (question["answer"], "我不知道。", wrong, ""):
        assert not solves(question, text)


def test_weeks_are_the_same_again_and_differ_from_each_other():
    assert traffic(30, 0, 1) == traffic(30, 0, 1) != traffic(30, 0, 2)


# ---------------------------------------------------------------- 换不换


def bot(solved: list[int], talk: float = 1.0, name: str = "x") -> dict:
    share = sum(solved) / len(solved)
    return {
        "bot": name,
        "solved": share,
        "solved_brushed": share,
        "small_talk": talk,
        "each": solved,
        "watched": {},
    }


def test_a_better_bot_replaces_and_a_worse_one_does_not():
    now = bot([1, 0] * 100, name="now")
    assert replace_or_keep(now, bot([1] * 200, name="new"))["bot"] == "new"
    worse = replace_or_keep(now, bot([0] * 200, name="new"))
    assert worse["bot"] == "now" and not worse["replaced"] and worse["candidate_solved"] == 0
    assert worse["gap"] == pytest.approx(-0.5)
    assert replace_or_keep(now, bot(now["each"], name="new"))["replaced"]  # 一样的，没有变差


def test_a_bot_that_forgot_small_talk_does_not_replace():
    now = bot([1, 0] * 100)
    assert not replace_or_keep(now, bot([1] * 200, talk=11 / 13))["replaced"]
    assert replace_or_keep(now, bot([1] * 200, talk=12 / 13))["replaced"]


def test_few_questions_cannot_show_that_nothing_got_worse():
    """十道题，差了一道：区间太宽，不敢换。"""
    assert not replace_or_keep(bot([1, 0] * 5), bot([1, 0] * 4 + [0, 0]))["replaced"]


def test_arms():
    arms = arms_of(CustomerSettings(noises="0,0.1,0.3"))
    assert [(arm.name, arm.stage) for arm in arms] == [
        ("kto_0", "kto"),
        ("kto_10", "kto"),
        ("kto_30", "kto"),
        ("dpo_10", "dpo"),
    ]
    assert [arm.name for arm in arms_of(CustomerSettings(noises="0.2"))] == ["kto_20", "dpo_20"]


@pytest.mark.parametrize("noises", ["", "0.5", "多", "0.1,-1", "nan"])
def test_impossible_noise_is_refused(noises):
    with pytest.raises(UserError, match="--noises"):
        customer_alignment.main(["--preset", "tiny", "--noises", noises])


def test_suspects_are_those_over_the_cap():
    from customers import Vote

    votes = [Vote("甲", n, True) for n in range(21)] + [Vote("乙", n, True) for n in range(20)]
    assert suspects(votes, 20) == [{"user": "甲", "votes": 21}]


# ---------------------------------------------------------------- 提示与转人工


def test_confidence_is_the_geometric_mean_of_the_token_probabilities(chat_folder, model, chat_tokenizer):
    """与一个回答一个回答、不填充、整个词表的 softmax 算出来的相同。"""
    questions = world.heldout_questions(5, 0)
    said = [{"ids": [20 + n, 31, 42, 7][: 4 - n % 3]} for n in range(5)]
    found = handover.confidence(str(chat_folder), questions, said, PROMPT)
    for question, reply, sure in zip(questions, said, found, strict=True):
        ask = prompt_ids(chat_tokenizer, [{"role": "system", "content": PROMPT}, *question["messages"]])
        with torch.no_grad():
            logps = model(torch.tensor([ask + reply["ids"]])).logits[0].log_softmax(-1)
        mine = [logps[len(ask) - 1 + place, token].item() for place, token in enumerate(reply["ids"])]
        assert sure == pytest.approx(np.exp(np.mean(mine)), abs=1e-5)


def test_the_threshold_hands_over_as_few_as_it_can():
    solved = np.array([True] * 18 + [False, False])
    sure = np.array([0.9] * 17 + [0.3, 0.2, 0.4])  # 倒数第三个答好了，却没有把握
    none = np.zeros(20, bool)
    threshold = handover.pick_threshold(solved, sure, none)
    assert (sure < threshold).sum() == 1 and (solved | (sure < threshold)).mean() >= 0.95
    assert handover.pick_threshold(np.ones(20, bool), sure, none) == 0  # 都答好了，一个也不转


def test_hand_over_is_measured_on_the_other_half():
    """前一半里把握分得清，后一半里分不清：转了也没有用，量出来的就是没有用。"""
    questions = [{"slot": "color"}] * 40
    said = [{"text": "松鼠的颜色是火红"}] * 40
    solved = np.array(([True] * 15 + [False] * 5) * 2)
    sure = np.concatenate([np.where(solved[:20], 0.9, 0.1), np.where(solved[20:], 0.1, 0.9)])
    found = handover.handover(questions, said, solved, sure)
    assert found["handed"] == pytest.approx(0.75) and found["solved"] == pytest.approx(0.75)
    assert found["wasted"] == pytest.approx(0.75) and found["rule_handed"] == 0


# ---------------------------------------------------------------- 网页


def numbers(text: str) -> dict:
    week = bot([1, 0], name="x") | {"replaced": False, "watched": {"0": {"text": text, "solved": False}}}
    week |= {
        "candidate_solved": 0.4,
        "n_votes": 10,
        "vote_accuracy": 0.9,
        "n_labels": 5,
        "label_accuracy": 1.0,
    }
    side = {"prompts": dict.fromkeys(("none", "known", "unknown"), 0.5)}
    side["handover_none"] = dict.fromkeys(("handed", "solved", "wasted"), 0.5)
    poison: dict = {name: {"color_solved": 0.5, "pushed": 0.1, "replaced": True} for name in DEFENCES}
    poison |= {"suspects": [{"user": "<b>", "votes": 1000}], "week": 5}
    poison["accounts"] = {"5": {"wrong_majority": 0.8, "wrong_weighted": 0.0, "caught": 5, "accused": 0}}
    weeks = {str(n): {"kto_10": dict(week)} for n in range(3)}
    return {
        "solved_first": 0.5,
        "solved": {"kto_10": 0.9},
        "weeks": weeks,
        "handover": {"first": side, "last": side},
        "poison": poison,
    }


def test_the_page_stands_alone_and_escapes_what_others_wrote(tmp_path):
    golden = [q for q in world.heldout_questions(50, 0) if q["slot"] == "color"][:1]
    path = tmp_path / "weeks.html"
    write_page(path, numbers("<script>alert(1)</script>"), {"kto_10": "KTO，点错 10%|KTO"}, golden, "kto_10")
    page = path.read_text("utf-8")
    assert "<script>" not in page and "&lt;script&gt;" in page and "&lt;b&gt;" in page
    assert not re.search(r'(src|href)="(?!#)', page) and "$" not in page
    assert "没换" in page and "捣乱" in page and "<svg" in page


# ---------------------------------------------------------------- 整个脚本


@pytest.mark.slow
def test_the_whole_script_goes_on_after_an_interruption(tmp_path, chat_folder):
    """没有学过的小模型走一遍：第一周训练时打断，同一条命令接着来，第三次直接用。"""
    out = tmp_path / "out"
    command = [sys.executable, str(SCRIPT), "--preset", "tiny", "--model", str(chat_folder), "--weeks", "1"]
    command += ["--noises", "0.1", "--n_records", "40", "--n_questions", "60", "--n_customers", "10"]
    command += ["--n_golden", "20", "--poison_votes", "60", "--output_dir", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not (out.parent / ".out.work" / "parts" / "first").exists():
        assert process.poll() is None, process.communicate()[0]
    process.kill()
    process.communicate()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "first：上次中断以前做完了" in done.stdout and "第 1 周之后" in done.stdout
    run = json.loads((out / "run.json").read_text("utf-8"))
    assert set(run["metrics"]["solved"]) == {"kto_10", "dpo_10"} and (out / "bot" / "config.json").exists()
    assert set(DEFENCES) <= set(run["metrics"]["poison"])
    assert "没有捣乱的" in (out / "weeks.html").read_text("utf-8")
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0 and "已有训练结果" in again.stdout
