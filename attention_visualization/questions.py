"""知道答案抄自哪里的题：小世界的故事题，和给任何语言模型的英文事实题。

"模型看的是哪里"要有标准答案才量得出对错。小世界的语法写故事时记着每个词写在哪里；
英文事实题（车是红的、狗叫 Max）是拼出来的，位置也就知道。
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass

import numpy as np

from nlp_common.base.errors import UserError
from nlp_common.lm.chatml import encode_text, prompt_ids, whole_pieces
from nlp_common.tiny import world

FACTS = {  # 给任何语言模型的英文事实题：每样东西只说一次，词都是一个 token
    "color": ("The color of the car is", ["red", "blue", "green", "black", "white", "yellow"]),
    "dog": ("The name of the dog is", ["Max", "Bob", "Jack", "Sam", "Charlie", "Lucy"]),
    "city": ("The city of the trip is", ["Paris", "London", "Tokyo", "Rome", "Berlin", "Moscow"]),
    "day": ("The day of the party is", ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Sunday"]),
    "fruit": ("The fruit in the bag is", ["apple", "banana", "orange", "lemon", "grape", "mango"]),
}


@dataclass
class Question:
    """一道题。ids 的最后一个位置之后，就该写出 answer 这个 token。

    story：故事占的位置；source：故事里答案那个词占的位置（说了几遍都算）；others：同类的别的答案的 token。
    slot：问的是什么；word：答案这个词。
    """

    ids: list[int]
    pieces: list[str]
    story: list[int]
    source: list[int]
    answer: int
    others: list[int]
    slot: str
    word: str


def make_questions(tokenizer, kind: str, n: int, seed: int) -> list[Question]:
    """n 道题；kind 是 tiny_world 或 facts。"""
    rng = random.Random(f"source-{kind}-{seed}")
    write = tiny_world_question if kind == "tiny_world" else facts_question
    return [write(tokenizer, rng, number) for number in range(n)]


def tiny_world_question(tokenizer, rng: random.Random, number: int) -> Question:
    """小世界的一道题：故事、问题、"小刚去了"这样的半句回答，接下来第一个字就要从故事里抄。

    十个人名都是"小×"，第一个字猜也猜得到：这时把"小"也写好，要的是后一个字。
    """
    slots = {}
    while not slots or not world.is_heldout(slots):  # 训练时没有见过的组合
        draw = world.Draw(rng)
        slots = world.draw_slots(draw)
    slot = world.SLOTS[number % len(world.SLOTS)]  # 八种问题一样多
    story = world.write_story(draw, slots)
    ask = rng.choice(world.QUESTION[slot]).format(**slots)
    start = world.SENTENCE[slot].split("{" + slot + "}")[0].format(**slots)
    ids = prompt_ids(tokenizer, [{"role": "user", "content": f"{story}\n{ask}"}])
    ids += encode_text(tokenizer, start)
    answers = {word: encode_text(tokenizer, word) for word in world.WORLD[slot]}
    word = slots[slot]
    step = 0
    while len({answer[step] for answer in answers.values()}) == 1:  # 大家都一样的字，先写好
        ids.append(answers[word][step])
        step += 1
    answer = answers[word][step]
    others = {other[step] for other in answers.values()} - {answer}
    story_ids = encode_text(tokenizer, story)
    start_at = find(ids, story_ids)
    story_at = list(range(start_at, start_at + len(story_ids)))
    source = occurrences(ids, story_at, answers[word])
    return Question(ids, whole_pieces(tokenizer, ids), story_at, source, answer, sorted(others), slot, word)


def facts_question(tokenizer, rng: random.Random, number: int) -> Question:
    """一道英文题：五件事打乱了说，再问其中一件。

    故事前面先写 "Facts:"：大模型的许多头没什么可看时，就把权重放在第一个 token 上（Xiao et al. 2024 的 attention sink），
    第一个 token 要是故事里的，滚动全归给它；遮住它，整个模型都乱了。
    """
    slots = rng.sample(list(FACTS), len(FACTS))
    asked = list(FACTS)[number % len(FACTS)]
    ids = encode_text(tokenizer, "Facts:")
    start = len(ids)
    source: list[int] = []
    word = ""
    for slot in slots:
        fact, values = FACTS[slot]
        value = rng.choice(values)
        ids += encode_text(tokenizer, f" {fact}")
        tokens = encode_text(tokenizer, f" {value}")
        if slot == asked:
            word, source = value, list(range(len(ids), len(ids) + len(tokens)))
        ids += tokens + encode_text(tokenizer, ".")
    story = list(range(start, len(ids)))
    fact, values = FACTS[asked]
    ids += encode_text(tokenizer, f" Question: {fact}")
    answer = encode_text(tokenizer, f" {word}")[0]
    others = sorted({encode_text(tokenizer, f" {each}")[0] for each in values} - {answer})
    return Question(ids, whole_pieces(tokenizer, ids), story, source, answer, others, asked, word)


def swap_answer(tokenizer, question: Question, rng: random.Random) -> Question | None:
    """同一道题，只把故事里答案那个词换成同类的另一个：两个故事就差这几个 token。

    别的词 token 数都不同，或第一个字恰好相同时，换不成，是 None。
    """
    is_fact = "".join(question.pieces).startswith("Facts:")
    words = FACTS[question.slot][1] if is_fact else world.WORLD[question.slot]
    lead = " " if is_fact else ""
    old = encode_text(tokenizer, lead + question.word)
    step = old.index(question.answer)
    choices = []
    for word in words:
        new = encode_text(tokenizer, lead + word)
        taken = word in "".join(question.pieces)
        if len(new) == len(old) and new[step] != question.answer and not taken:
            choices.append((word, new))
    if not choices:
        return None
    word, new = rng.choice(choices)
    ids = list(question.ids)
    for place in range(0, len(question.source), len(old)):  # 说了几遍，就换几遍
        for offset, token in enumerate(new):
            ids[question.source[place + offset]] = token
    others = sorted({*question.others, question.answer} - {new[step]})
    return Question(
        ids,
        whole_pieces(tokenizer, ids),
        question.story,
        question.source,
        new[step],
        others,
        question.slot,
        word,
    )


def find(ids: list[int], part: list[int]) -> int:
    """part 在 ids 里第一次出现的位置。"""
    for start in range(len(ids) - len(part) + 1):
        if ids[start : start + len(part)] == part:
            return start
    raise UserError("题里找不到故事：这个分词器把同样的文字切成了不同的 token，请换小世界训练的模型。")


def occurrences(ids: list[int], within: list[int], word: list[int]) -> list[int]:
    """word 在 within 这些位置里出现的每一处，各占哪些位置。"""
    found = []
    for start in within[: len(within) - len(word) + 1]:
        if ids[start : start + len(word)] == word:
            found += range(start, start + len(word))
    return found


def chance(questions: list[Question]) -> float:
    """在故事里随手指一个 token，指中的概率。"""
    return sum(len(q.source) / len(q.story) for q in questions) / len(questions)


def describe(questions: list[Question], kind: str) -> dict:
    """写进 run.json 的数据说明。"""
    return {
        "questions": {
            "name": kind,
            "kind": "builtin",
            "rows": len(questions),
            "sha256": ids_sha256([[q.ids, q.source, q.answer] for q in questions]),
        }
    }


def ids_sha256(ids: list) -> str:
    """几行 token 的指纹。"""
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def hits(scores: list, questions: list[Question]) -> float:
    """分最高的那个故事 token 就在答案那个词里的题，占多少。scores：每题一个 (T,) 的分。"""
    right = 0
    for score, question in zip(scores, questions, strict=True):
        best = max(question.story, key=lambda place: float(score[place]))
        right += best in question.source
    return right / len(questions)


def rank_correlation(xs: list[float], ys: list[float]) -> float:
    """斯皮尔曼秩相关：两列数排出的名次有多一致，1 完全一致，0 毫无关系。并列的取平均名次。"""

    def ranks(values: list[float]) -> np.ndarray:
        return np.array([sum(v < x for v in values) + (sum(v == x for v in values) - 1) / 2 for x in values])

    a, b = ranks(xs) - (len(xs) - 1) / 2, ranks(ys) - (len(ys) - 1) / 2
    length = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / length if length else 0.0
