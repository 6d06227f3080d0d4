"""题：答案的位置是不是真的在那里，机会是不是算对了，只差一个词的两道题是不是只差那个词。"""

import random

import pytest

import questions as q
from nlp_common.base.errors import UserError
from nlp_common.tiny import world


def test_the_source_is_where_the_answer_stands(few):
    for question in few:
        text = "".join(question.pieces[place] for place in question.source)
        assert text == question.word * (len(text) // len(question.word))
        assert set(question.source) <= set(question.story)
        said = "".join(question.pieces[place] for place in question.story).count(question.word)
        assert said == len(text) // len(question.word) >= 1
        assert question.answer in [question.ids[place] for place in question.source]
        assert question.answer not in question.others and len(question.others) >= 5


def test_the_answer_cannot_be_guessed_from_the_prompt(few):
    """要写的那个字，故事以外的地方没有；问的人名都是"小×"，"小"已经写好。"""
    for question in few:
        outside = set(range(len(question.ids))) - set(question.story)
        if question.slot != "person":  # 故事以外的别的词也可能带着同一个字，答案这个词不会
            text = "".join(question.pieces[place] for place in sorted(outside))
            assert question.word not in text
    assert [question.slot for question in few[:8]] == world.SLOTS
    persons = [question for question in few if question.slot == "person"]
    assert all(question.pieces[-1] == "小" for question in persons)


def test_same_seed_same_questions(tokenizer, few):
    again = q.make_questions(tokenizer, "tiny_world", 16, 0)
    other = q.make_questions(tokenizer, "tiny_world", 16, 1)
    assert again == few and other != few
    assert q.describe(again, "x") == q.describe(few, "x") != q.describe(other, "x")


def test_hits_counts_the_best_story_token():
    question = q.Question([1, 2, 3, 4], list("abcd"), [1, 2], [2], 3, [9], "s", "c")
    assert q.hits([[9.0, 0.0, 1.0, 9.0]], [question]) == 1.0  # 故事以外的再高也不算
    assert q.hits([[9.0, 2.0, 1.0, 9.0]], [question]) == 0.0
    assert q.chance([question]) == 0.5


def test_a_swapped_question_differs_in_the_source_alone(tokenizer, few):
    rng = random.Random(0)
    for question in few:
        other = q.swap_answer(tokenizer, question, rng)
        changed = [n for n, (a, b) in enumerate(zip(question.ids, other.ids, strict=True)) if a != b]
        assert changed and set(changed) <= set(question.source)
        assert other.answer != question.answer and other.answer in other.ids
        assert question.answer in other.others


def test_facts_have_the_value_of_the_thing_asked(tokenizer):
    for question in q.make_questions(tokenizer, "facts", 10, 0):
        story, asked = "".join(question.pieces).split(" Question: ")
        assert asked == q.FACTS[question.slot][0] and f"{asked} {question.word}." in story
        assert story.startswith("Facts:") and question.story[0] > 0
        assert "".join(question.pieces[place] for place in question.source) == f" {question.word}"
        other = q.swap_answer(tokenizer, question, random.Random(0))
        assert other is None or "".join(other.pieces).replace(other.word, question.word) == "".join(
            question.pieces
        )


def test_a_story_that_cannot_be_found():
    with pytest.raises(UserError, match="题里找不到故事"):
        q.find([1, 2, 3], [3, 1])
