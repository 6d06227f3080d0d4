"""tool_world.py：题的标准答案、工具的结果、训练的对话，互相都对得上；训练与留出不相交。"""

import itertools
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tool_world as tw
from nlp_common.tiny.world import WORLD
from tool_format import parse_reply
from tool_schema import check_call

MANY = tw.tasks(400, 0) + tw.tasks(400, 1, heldout=True)


@pytest.mark.parametrize("kind", tw.KINDS)
def test_the_right_calls_lead_to_the_answer(kind):
    """照 steps 做一遍：每个调用合规定，最后一步的结果里有答案（或能照着答）。"""
    for task in tw.tasks(40, 3, kinds={kind: 1}):
        results = [[tw.run_tool(task, call) for call in step] for step in task["steps"]]
        assert not any(text.startswith(tw.ERROR) or text == tw.NOT_FOUND for step in results for text in step)
        assert all(not check_call(call, task["tools"]) for step in task["steps"] for call in step)
        assert tw.is_right(task, task["reply"])
        if kind in tw.UNNEEDED:
            assert task["steps"] == []
        elif kind != "parallel":
            assert all(word in results[-1][-1] for word in task["answer"])


def test_two_step_needs_the_first_result():
    """第二步的参数里，有第一步的结果里才有的东西，题里没有。"""
    for task in tw.tasks(60, 4, kinds={"two_step": 1}):
        (first,), (second,) = task["steps"]
        seen = tw.run_tool(task, first)
        text = second["arguments"].get("expression") or second["arguments"]["words"]
        parts = [part for part in re.split(r"[*\s]", text) if part not in task["question"]]
        assert parts and all(part in seen for part in parts)


def test_missing_task_lists_no_tool_that_would_do():
    for task in tw.tasks(60, 5, kinds={"missing": 1}):
        assert 1 <= len(task["tools"]) < len(tw.TOOLS)
        assert task["reply"] == tw.NO_TOOL and not tw.is_right(task, "答案是12")


def test_train_and_heldout_share_no_story_and_no_pair_of_numbers():
    def sides(tasks):
        stories = {tuple(story[slot] for slot in WORLD) for task in tasks for story in task["shelf"]}
        calls = [call["arguments"] for task in tasks for step in task["steps"] for call in step]
        sums = {arguments["expression"] for arguments in calls if "expression" in arguments}
        return stories, {tuple(sorted(re.findall(r"\d+", each))) for each in sums}

    train, heldout = sides(tw.tasks(300, 0)), sides(tw.tasks(300, 0, heldout=True))
    assert not train[0] & heldout[0]
    assert not train[1] & heldout[1]
    written = {
        tuple(sorted(p)) for text in tw.documents(600, 0, True) for p in re.findall(r"(\d+)[-+*](\d+)", text)
    }
    assert len(written) > 300 and not written & heldout[1]  # 文档里也没有


def test_is_right_by_hand():
    task = {"slot": "n", "answer": ["23"], "reply": "小刚带了23个香蕉"}
    assert tw.is_right(task, "小刚带了23个香蕉")
    assert (
        not tw.is_right(task, "23或24个")
        and not tw.is_right(task, "小刚带了232个")
        and not tw.is_right(task, "")
    )
    task = {"slot": "place", "answer": ["花园"], "reply": "小刚去了花园"}
    assert tw.is_right(task, "去了花园") and not tw.is_right(task, "花园或者学校")


@given(st.integers(0, 999), st.integers(0, 999), st.sampled_from("+-*"))
def test_calculated(a, b, sign):
    assert tw.calculated(f"{a} {sign} {b}") == str(eval(f"{a}{sign}{b}"))


@pytest.mark.parametrize(
    "bad", ["", "1+", "1/2", "1+2+3", "__import__('os')", "９+1", "-1+2", "1" * 10 + "+1"]
)
def test_what_the_calculator_refuses(bad):
    task = {"tools": [tw.TOOLS["calculator"]], "shelf": []}
    assert tw.run_tool(task, {"name": "calculator", "arguments": {"expression": bad}}).startswith(tw.ERROR)


def test_look_up_and_search_by_hand():
    story = {"person": "小刚", "time": "清晨", "text": "那天清晨，小刚去了花园。一只火红的松鼠跑了过来。"}
    other = {"person": "小兰", "time": "清晨", "text": "那天清晨，小兰去了花园。一只火红的野兔跑了过来。"}
    task = {"tools": list(tw.TOOLS.values()), "shelf": [story, other]}

    def run(name, **arguments):
        return tw.run_tool(task, {"name": name, "arguments": arguments})

    assert run("look_up", person="小刚", time="清晨") == story["text"]
    assert run("look_up", person="小刚", time="深夜") == tw.NOT_FOUND
    assert run("search", words="花园 野兔") == other["text"]
    assert run("search", words="花园") == story["text"] + "\n" + other["text"]
    assert run("search", words=" ") == tw.NOT_FOUND
    assert "time" in run("look_up", person="小刚") and run("delete").startswith(tw.ERROR)


def test_a_spoiled_call_is_never_valid():
    rng = random.Random(0)
    for task in MANY:
        for call in [call for step in task["steps"] for call in step]:
            for _ in range(5):
                assert check_call(tw.spoil(call, task, rng), task["tools"])
            assert not check_call(call, task["tools"])  # 原来的没有被改


def test_chats_learn_only_what_is_right():
    """写坏的一次不学；要学的调用都合规定；出错以后跟着同一步对的调用。"""
    retried = 0
    for chat in tw.chats(400, 0):
        messages = chat["messages"]
        assert [m["role"] for m in messages[:2]] == ["system", "user"] and messages[-1]["role"] == "assistant"
        for before, after in itertools.pairwise(messages):
            assert not (before["role"] == after["role"] == "assistant")
        for message in messages:
            if message["role"] == "assistant" and message.get("weight") != 0:
                for call in parse_reply(message["content"]).calls:
                    assert call.name in tw.TOOLS and set(call.arguments) <= {
                        "person",
                        "time",
                        "words",
                        "expression",
                    }
            retried += message.get("weight") == 0
    assert 5 < retried < 100
    assert all(len(chat["messages"]) == 2 for chat in tw.chats(20, 0, tools=False))


def test_documents_without_digits_have_none():
    assert not any(re.search(r"\d", text) for text in tw.documents(200, 0, digits=False))
    texts = tw.documents(200, 0, digits=True)
    assert all(re.search(r"\d", text) for text in texts)
    results = re.findall(r"算出来(\d+).*?答案是(\d+)", "".join(texts), re.DOTALL)
    assert all(said == copied for said, copied in results) and {len(said) for said, _ in results} == {
        1,
        2,
        3,
        4,
    }


def test_same_seed_same_tasks():
    assert tw.tasks(20, 7) == tw.tasks(20, 7) != tw.tasks(20, 8)


def test_uneven_demonstrations_guess_and_look_up_needlessly():
    """要用工具的约两成不查就猜，查到了的约一半再查一遍，题里就有的约一半还去查（列着 look_up 才查得成）；猜的多半是错的。"""
    tasks, rows = tw.tasks(600, 0), tw.chats(600, 0, uneven=True)
    needing = [(t, r) for t, r in zip(tasks, rows, strict=True) if t["steps"]]
    guessed = [(t, r["messages"][-1]["content"]) for t, r in needing if len(r["messages"]) == 3]
    assert 0.13 < len(guessed) / len(needing) < 0.27
    assert sum(tw.is_right(task, text) for task, text in guessed) < 0.2 * len(guessed)
    once = [r for t, r in needing if t["kind"] == "look_up" and len(r["messages"]) > 3]
    assert 0.35 < sum(r["messages"][2] in r["messages"][3:] for r in once) / len(once) < 0.65
    direct = [r for t, r in zip(tasks, rows, strict=True) if t["kind"] == "direct"]
    assert 0.15 < sum(len(r["messages"]) > 3 for r in direct) / len(direct) < 0.6
    assert all(tw.is_right(t, r["messages"][-1]["content"]) for t, r in needing if len(r["messages"]) > 3)
