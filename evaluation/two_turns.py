"""两轮的题（MT-Bench 的样子）：同一个故事连问两次，第二问要靠第一轮里的故事，第一轮答的是模型自己的话。"""

from __future__ import annotations

import random

from answering import Answerer, replies
from nlp_common.tiny.world import (
    QUESTION,
    SENTENCE,
    SLOTS,
    Draw,
    draw_slots,
    is_heldout,
    write_story,
)


def two_turn_questions(n: int, seed: int) -> list[dict]:
    """n 道留出的题：``{"id", "turns": [{"ask", "answer", "sentence", "slot"}, …]}``，两轮问的是不同的槽位。"""
    rng = random.Random(f"two-turns-{seed}")
    questions: list[dict] = []
    while len(questions) < n:
        draw = Draw(rng)
        slots = draw_slots(draw)
        if not is_heldout(slots):
            continue
        story, turns = write_story(draw, slots) + "\n", []
        for slot in rng.sample(SLOTS, 2):
            ask = story + rng.choice(QUESTION[slot]).format(**slots)
            sentence = SENTENCE[slot].format(**slots)
            turns.append({"ask": ask, "answer": slots[slot], "sentence": sentence, "slot": slot})
            story = ""  # 第二问不再说一遍故事
        questions.append({"id": f"q{len(questions) + 1:04d}", "turns": turns})
    return questions


def conversation(question: dict, texts: list[str]) -> list[dict]:
    """问到第 len(texts) + 1 轮为止的对话；texts 是前面各轮模型自己的回答。"""
    messages = []
    for turn, text in zip(question["turns"], [*texts, None], strict=False):
        messages.append({"role": "user", "content": turn["ask"]})
        if text is not None:
            messages.append({"role": "assistant", "content": text})
    return messages


def answer_both_turns(
    answerer: Answerer, questions: list[dict], max_new_tokens: int, temperature: float, seed: int
) -> list[list[dict]]:
    """每道题两轮的回答 ``[{"text", "ids", "ended"}, …]``：先答完所有的第一问，再带着自己的回答答第二问。"""
    first = replies(
        answerer,
        [{"messages": conversation(question, [])} for question in questions],
        max_new_tokens,
        temperature=temperature,
        seed=seed,
    )
    asked = [
        {"messages": conversation(question, [reply["text"]])}
        for question, reply in zip(questions, first, strict=True)
    ]
    second = replies(answerer, asked, max_new_tokens, temperature=temperature, seed=seed + 1)
    return [list(pair) for pair in zip(first, second, strict=True)]
