"""tasks.py：每样活儿的答案是对的，训练与留出不共用组合，正确率只给一字不差的。"""

import pytest

from nlp_common.lm.chatml import answer_ids
from nlp_common.tiny import world
from tasks import NEW_TASKS, TASKS, accuracy, task_chats


@pytest.mark.parametrize("task", NEW_TASKS)
def test_rows_are_repeatable_and_heldout_stories_are_new(task):
    rows, heldout = task_chats(task, 60, 0), task_chats(task, 60, 0, heldout=True)
    assert rows == task_chats(task, 60, 0) != task_chats(task, 60, 1)
    stories = {row["messages"][0]["content"].split("\n")[0] for row in rows}
    assert not stories & {row["messages"][0]["content"].split("\n")[0] for row in heldout}
    assert all(row["messages"][-1]["content"] == row["answer"] for row in rows)


def test_judgements_tell_whether_the_word_is_in_the_story():
    marks = []
    for row in task_chats("judge", 200, 0):
        story, ask = row["messages"][0]["content"].split("\n判断一下，")
        assert (row["answer"] == world.RIGHT) == (ask[2:] in story)
        marks.append(row["answer"])
    assert 0.4 < marks.count(world.RIGHT) / len(marks) < 0.6


def test_extraction_and_reversal_come_from_the_story():
    for row in task_chats("extract", 50, 0):
        story, ask = row["messages"][0]["content"].split("\n")
        parts = row["answer"].split("，")
        assert [part[:2] for part in parts] == ask.split("，")
        assert all(part[2:] in story for part in parts)
    for row in task_chats("reverse", 50, 0):
        story, _ = row["messages"][0]["content"].split("\n")
        assert row["answer"][::-1] in story


@pytest.mark.parametrize("task", NEW_TASKS)
def test_every_answer_fits_in_what_is_generated(chat_tokenizer, task):
    longest = max(len(answer_ids(chat_tokenizer, row["answer"])) for row in task_chats(task, 200, 0))
    assert longest <= TASKS[task].longest


def test_accuracy_wants_the_answer_to_the_letter(monkeypatch, model, chat_tokenizer):
    import tasks

    questions = task_chats("judge", 4, 0, heldout=True)
    said = [{"text": q["answer"], "ended": True} for q in questions]
    said[0]["ended"] = False
    said[1]["text"] += "。"
    monkeypatch.setattr(tasks, "reply_to", lambda model, tokenizer, asks, longest: said)
    assert accuracy(model, chat_tokenizer, "judge", questions) == 0.5
