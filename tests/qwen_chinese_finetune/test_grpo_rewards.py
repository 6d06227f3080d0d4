"""GRPO 的打分：验证器没有"全列一遍"的空子，没说完的不给分；读者自己的奖励文件写错了，说得出第几行。"""

from types import SimpleNamespace

import pytest
import torch

from nlp_common.base.errors import UserError
from nlp_common.tiny import world


@pytest.fixture(scope="module")
def rewards_of():
    import grpo_rewards

    return grpo_rewards


# ---- 验证器 ----


def question_about_place():
    return next(q for q in world.questions(200, 0) if q["slot"] == "place")


def test_listing_every_place_is_rewarded_by_contains_and_not_by_ours(rewards_of):
    question = question_about_place()
    listed = "、".join(world.WORLD["place"])
    assert rewards_of.contains(question, listed, True) == 1.0
    assert rewards_of.verify(question, listed, True) == 0.0
    assert rewards_of.verify(question, question["sentence"], True) == 0.8
    assert rewards_of.verify(question, question["answer"], True) == 0.6
    assert rewards_of.verify(question, "您好，" + question["sentence"], True) == 1.0
    own = {"answer": question["answer"]}  # 读者自己的题，没有 sentence
    others = [place for place in world.WORLD["place"] if place != question["answer"]]
    assert rewards_of.verify(own, "、".join([question["answer"], *others]), True) == 0.0


def test_a_right_answer_cut_short_is_not_rewarded(rewards_of):
    question = question_about_place()
    for each in (question, {"answer": question["answer"]}):
        assert rewards_of.verify(each, question["answer"], True) > 0
        assert rewards_of.verify(each, question["answer"], False) == 0.0
        assert rewards_of.contains(each, question["answer"], False) == 1.0


@pytest.mark.parametrize(
    ("reply", "answer", "right"),
    [
        ("所以一共是 12", "12", True),
        ("所以一共是 12。", "12", True),
        ("12", "2", False),
        ("-2", "2", False),
        ("1,200", "200", False),
        ("3.5", "5", False),
        ("去了花园！", "花园", True),
        ("花园还是学校", "花园", False),
        ("", "花园", False),
        ("答案：B", "B", True),
        ("AB", "B", False),
    ],
)
def test_only_what_is_said_last_counts(rewards_of, reply, answer, right):
    assert rewards_of.says_last(reply, answer) is right


# ---- 奖励文件 ----


def score_with(rewards_of, tmp_path, text):
    path = tmp_path / "mine.py"
    path.write_text(text, encoding="utf-8")
    replies = [{"text": "好", "ended": True}, {"text": "花园", "ended": False}]
    rollout = SimpleNamespace(ids=torch.zeros(2, 1))
    reward = rewards_of.load_reward_file(str(path))
    return rewards_of.by_file(str(path), reward, [{"answer": "花园"}] * 2, replies, rollout)


def test_a_reward_file_scores(rewards_of, tmp_path):
    text = "def reward(questions, replies, ended):\n    return [len(r) + e for r, e in zip(replies, ended)]\n"
    assert score_with(rewards_of, tmp_path, text).tolist() == [2.0, 2.0]


DEF = "import math\n\ndef reward(questions, replies, ended):\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def reward(questions, replies, ended)\n    return 1\n", "mine.py 第 1 行有语法错误"),
        ("x = 1\ny = x / 0\n", "mine.py 第 2 行出错：ZeroDivisionError"),
        ("import no_such_module_at_all\n", "第 1 行出错：ModuleNotFoundError"),
        ("x = 1\n", r"要有一个函数 def reward\(questions, replies, ended\)"),
        ("def reward(replies):\n    return [1]\n", "第 1 行的 reward 要收三个参数.*现在收 1 个"),
        (DEF + "    n = len(replies)\n    return [1 / (n - 2)] * n\n", "第 5 行出错：ZeroDivisionError"),
        (DEF + "    return 1.0\n", "第 3 行的 reward 要返回 2 个数的列表，返回的是 1.0"),
        (DEF + "    return ['好', '坏']\n", "第 3 行的 reward 要返回 2 个数的列表"),
        (DEF + "    return None\n", "要返回 2 个数的列表，返回的是 None"),
        (DEF + "    return [1.0]\n", "第 3 行的 reward 收到 2 个回答，返回了 1 个数"),
        (DEF + "    return (1 / (len(r) - 1) for r in replies)\n", "第 4 行出错：ZeroDivisionError"),
        (DEF + "    raise SystemExit\n", "第 4 行出错：SystemExit"),
        ("import sys\nsys.exit(3)\n", "第 2 行出错：SystemExit"),
        (DEF + "    return [1.0, math.nan]\n", "给第 2 个回答（'花园'）的分是 nan"),
    ],
)
def test_faults_of_a_reward_file_are_named_with_their_line(rewards_of, tmp_path, text, said):
    with pytest.raises(UserError, match=said):
        score_with(rewards_of, tmp_path, text)
