"""要学的几样活儿。小世界里的答案都是知道的：问答（SFT 已经教过）、判断、抽取、回顾、倒着说，和换一种口气回答；

自己的对话（--dataset）也是一样活儿，没有程序判对错，看留出的损失。
一行是 ``{"messages": 以助手的回答结尾, "answer": 那句回答}``；留出的题也是它，只是不给模型看最后一句。
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nlp_common.lm.replies import reply_to
from nlp_common.tiny import world
from nlp_common.tiny.judge import qa_accuracy
from start import heldout_loss, own_chats


def draw_story(rng: random.Random, heldout: bool) -> tuple[str, dict[str, str]]:
    """→ (故事, 槽位)；训练与留出不共用一种组合，与 world.py 同一条界线。"""
    while True:
        draw = world.Draw(rng)
        slots = world.draw_slots(draw)
        if world.is_heldout(slots) == heldout:
            return world.write_story(draw, slots), slots


def judgement(rng: random.Random, heldout: bool) -> tuple[str, str]:
    """判断一句话与故事合不合：预训练的文档里有这样的题，对话里没有。"""
    story, slots = draw_story(rng, heldout)
    slot, mark = rng.choice(world.SLOTS), rng.choice([world.RIGHT, world.WRONG])
    said = slots if mark == world.RIGHT else world.mistaken(rng.choice, slots, slot)
    return f"{story}\n判断一下，{world.LABEL[slot]}{said[slot]}", mark


def extraction(rng: random.Random, heldout: bool) -> tuple[str, str]:
    """把故事里的两样填成表。"""
    story, slots = draw_story(rng, heldout)
    first, second = rng.sample(world.SLOTS, 2)
    ask = f"{world.LABEL[first]}，{world.LABEL[second]}"
    return f"{story}\n{ask}", f"{world.LABEL[first]}{slots[first]}，{world.LABEL[second]}{slots[second]}"


def recap(rng: random.Random, heldout: bool) -> tuple[str, str]:
    """把故事里的一样说成整句，是预训练里回顾的那一句。"""
    story, slots = draw_story(rng, heldout)
    slot = rng.choice(world.SLOTS)
    return f"{story}\n回想一下，{world.LABEL[slot]}", world.SENTENCE[slot].format(**slots)


def reversal(rng: random.Random, heldout: bool) -> tuple[str, str]:
    """倒着说出答案：模型从来没有这样抄过，是新本领。"""
    story, slots = draw_story(rng, heldout)
    slot = rng.choice(world.SLOTS)
    ask = rng.choice(world.QUESTION[slot]).format(**slots)
    return f"{story}\n倒着说，{ask}", slots[slot][::-1]


def courteous(rng: random.Random, heldout: bool) -> tuple[str, str]:
    """问题与问答的相同，只许一种口气：先道谢，再说整句。"""
    story, slots = draw_story(rng, heldout)
    slot = rng.choice(world.SLOTS)
    ask = rng.choice(world.QUESTION[slot]).format(**slots)
    return f"{story}\n{ask}", "谢谢您的提问，" + world.SENTENCE[slot].format(**slots)


@dataclass(frozen=True)
class Task:
    title: str  # 给人看的名字，"中文|English"
    write: Callable[[random.Random, bool], tuple[str, str]] | None  # None：问答，用 world.py 里的；或自己的
    longest: int  # 回答最多几个 token：评测时写到这里为止；自己的是整段对话最多几个
    own: tuple[list[dict], list[dict]] | None = None  # 自己的对话：训练的、留出的


TASKS = {
    "qa": Task("问答|QA", None, 32),
    "judge": Task("判断|judgement", judgement, 3),
    "extract": Task("抽取|extraction", extraction, 16),
    "recap": Task("回顾|recap", recap, 16),
    "reverse": Task("倒着说|reversal", reversal, 5),
    "courteous": Task("换口气|courteous", courteous, 32),
}
BUILT_IN = tuple(TASKS)
NEW_TASKS = BUILT_IN[1:]  # 模型还不会的：--task 可以是这些
OWN, OWN_THIRD = "mine", "mine_third"  # --dataset、--third_dataset 给的那一样叫什么


def use_own(settings, dataset: str | None, name: str = OWN) -> dict:
    """--dataset 是自己的对话，就成为叫 name 的一样活儿；返回数据的来历，好写进 run.json。"""
    if dataset in (None, "tiny_world"):
        return {"name": "tiny_world", "kind": "builtin", "rows": settings.max_train_samples}
    train, heldout, source = own_chats(dataset, settings.max_train_samples, settings.source)
    TASKS[name] = Task(f"{Path(dataset).name}|own chats", None, settings.max_length, (train, heldout))
    return source


def task_chats(task: str, n: int, seed: int, heldout: bool = False) -> list[dict]:
    """n 段对话；问答就是 world.py 的（训练的几轮一段，留出的是要回答的题）；自己的从头取，不够 n 段就全要。"""
    write, own = TASKS[task].write, TASKS[task].own
    if own is not None:
        return own[heldout][:n]
    if write is None:
        return world.heldout_questions(n, seed) if heldout else world.chats(n, seed)
    rng = random.Random(f"{task}-{seed}-{heldout}")
    rows = []
    for _ in range(n):
        ask, answer = write(rng, heldout)
        messages = [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]
        rows.append({"messages": messages, "answer": answer})
    return rows


def score(model, tokenizer, task: str, questions: list[dict]) -> float:
    """学得怎样，0 到 1。小世界的是正确率；自己的对话没有程序判对错，是 exp(−留出损失)：每个 token 平均给对的几成概率。"""
    if TASKS[task].own is None:
        return accuracy(model, tokenizer, task, questions)
    return math.exp(-heldout_loss(model, tokenizer, questions, TASKS[task].longest))


def task_title(task: str, settings) -> str:
    """给人看的名字；自己的对话是文件名（直接用已有的结果时，文件没有读）。"""
    if task in BUILT_IN:
        return TASKS[task].title.split("|")[0]
    return Path(settings.dataset if task == OWN else settings.third_dataset).name


def score_key(task: str) -> str:
    """score 在 run.json 里叫什么。"""
    return "accuracy" if task in BUILT_IN else "token_probability"


def score_name(task: str) -> str:
    """score 是什么，给人看的，"中文|English"。"""
    return "正确率|accuracy" if task in BUILT_IN else "exp(−留出损失)|exp(-held-out loss)"


def accuracy(model, tokenizer, task: str, questions: list[dict]) -> float:
    """留出的题，贪心回答对了多少。问答的定义同 judge.py；别的要一字不差，自己说完。"""
    if TASKS[task].write is None:
        return qa_accuracy(model, tokenizer, questions)
    asks = [{"messages": question["messages"][:-1]} for question in questions]
    replies = reply_to(model, tokenizer, asks, TASKS[task].longest)
    right = [r["ended"] and r["text"] == q["answer"] for r, q in zip(replies, questions, strict=True)]
    return sum(right) / len(right)
