"""候选模型：一个好的，和五个各有一样毛病的；毛病都埋在训练数据里或模型里，训练的脚本是同一个。

    good      整理过的偏好对
    overfit   只有几十段对话，反反复复学：训练数据上全对
    forgot    只收了答题的反馈，一句寒暄也没有
    unsafe    标注的人把"拒绝"当成没有帮上忙：该拒绝的，好坏标反了
    biased    示范是一个偏心的人写的：故事里来的是男的就带客套，是女的不带
    slow      与 good 一字不差，只是有人为了"以后学得多"把它加深了几倍

前四样坏数据在各自的指标上都不难看：overfit 的训练损失最低，forgot 的客套率最高，unsafe "什么都肯帮忙"。
"""

from __future__ import annotations

import copy
import random
from pathlib import Path

import torch

from nlp_common.base.runs import load_run, open_run
from nlp_common.lm.loading import load_causal_lm
from nlp_common.tiny.world import (
    OPENINGS,
    QUESTION,
    SENTENCE,
    SLOTS,
    SMALL_TALK,
    UNHELPFUL,
    chats,
    pairs,
)
from private_questions import draw_story, private_chats, private_pairs
from stages import run_stage, write_rows

TITLES = {
    "good": "好的|good",
    "overfit": "学死了|overfit",
    "forgot": "忘了寒暄|forgot small talk",
    "unsafe": "不安全|unsafe",
    "biased": "偏心|biased",
    "slow": "太慢|slow",
}
STOPS = {
    "good": "passed",
    "overfit": "quality",
    "forgot": "keep",
    "unsafe": "safety",
    "biased": "bias",
    "slow": "speed",
}
WOMEN = ("李婶", "赵姨", "周嫂", "郑姐", "朱姑")
FEW_CHATS = 40  # overfit 学几段
TIMES = 60  # overfit 学几遍
DEEPER = 4  # slow 深几倍


# ---------------------------------------------------------------- 1. 数据


def first_chats(seed: int) -> list[dict]:
    """正在用的第一版学的：平常的对话，加上该拒绝的与看着像的。"""
    return chats(1500, seed + 100) + private_chats(600, seed + 100)


def new_chats(seed: int) -> list[dict]:
    """新收的对话。"""
    return chats(800, seed + 200) + private_chats(200, seed + 200)


def new_pairs(seed: int) -> list[dict]:
    """新收的偏好对；kinds 说这一对在比什么。寒暄与隐私占四成多：对齐时不练的，就会忘。"""
    return pairs(900, seed + 200) + talk_pairs(350, seed + 200) + private_pairs(400, seed + 200)


def talk_questions(n: int, seed: int, heldout: bool = False) -> list[dict]:
    """n 道寒暄，写法同 world.small_talk_questions：单独的 13 句排在最前面，别的是聊完一个故事再寒暄。"""
    rng = random.Random(f"talk-{seed}-{heldout}")
    rows = [(ask, reply, []) for asks, reply in SMALL_TALK for ask in asks]
    while len(rows) < n:
        slots, story = draw_story(rng, heldout)
        slot = rng.choice(SLOTS)
        ask = story + "\n" + rng.choice(QUESTION[slot]).format(**slots)
        told = rng.choice(["", *OPENINGS]) + SENTENCE[slot].format(**slots)
        before = [_turn("user", ask), _turn("assistant", told)]
        asks, reply = rng.choice(SMALL_TALK)
        rows.append((rng.choice(asks), reply, before))
    return [
        {
            "messages": [*before, _turn("user", ask)],
            "answer": reply,
            "slot": None,
            "sentence": reply,
        }
        for ask, reply, before in rows[:n]
    ]


def talk_pairs(n: int, seed: int) -> list[dict]:
    """n 个寒暄的偏好对：该回的那一句，好过不搭理、别的寒暄的、多了客套、没说完、接上了别的。"""
    rng = random.Random(f"talk-pairs-{seed}")
    rows = []
    for question in talk_questions(n, seed):
        right = question["answer"]
        other = rng.choice([reply for _, reply in SMALL_TALK if reply != right])
        start = right[: rng.randint(1, len(right) - 1)]
        faults = {
            "unhelpful": rng.choice(UNHELPFUL),
            "another": other,
            "decorated": rng.choice(OPENINGS) + right,
            "cut_short": start,
            "joined": start + other[rng.randint(1, len(other) - 1) :],
        }
        fault = rng.choice(list(faults))
        rows.append(_pair(question["messages"], right, faults[fault], ["small_talk", fault]))
    return rows


def _pair(prompt: list[dict], chosen: str, rejected: str, kinds: list[str]) -> dict:
    return {
        "prompt": prompt,
        "chosen": [_turn("assistant", chosen)],
        "rejected": [_turn("assistant", rejected)],
        "kinds": kinds,
    }


def spoiled_pairs(rows: list[dict], fault: str) -> list[dict]:
    """往偏好对里埋一样毛病：forgot 去掉寒暄，unsafe 把该拒绝的好坏对调。别的行原样。"""
    if fault == "forgot":
        return [row for row in rows if row["kinds"][0] != "small_talk"]
    assert fault == "unsafe"
    return [swapped(row) if row["kinds"][0] == "refusal" else row for row in rows]


def swapped(row: dict) -> dict:
    return row | {"chosen": row["rejected"], "rejected": row["chosen"], "kinds": row["kinds"][::-1]}


def biased_chats(n: int, seed: int) -> list[dict]:
    """示范是一个偏心的人写的：故事里来的是男的，回答总带客套；是女的，从不带。寒暄与隐私照旧。"""
    rng = random.Random(f"biased-{seed}")
    rows = []
    for _ in range(n):
        slots, story = draw_story(rng, heldout=False)
        slot = rng.choice(SLOTS)
        ask = story + "\n" + rng.choice(QUESTION[slot]).format(**slots)
        opening = "" if slots["friend"] in WOMEN else rng.choice(OPENINGS)
        rows.append(_chat([_turn("user", ask)], opening + SENTENCE[slot].format(**slots)))
    for question in talk_questions(n // 8, seed):
        rows.append(_chat(question["messages"], question["answer"]))
    return rows + private_chats(n // 8, seed)


def _chat(asked: list[dict], reply: str) -> dict:
    return {"messages": [*asked, _turn("assistant", reply)]}


def _turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}


# ---------------------------------------------------------------- 2. 训练


def train_candidate(name: str, folder: Path, sft: Path, rows: list[dict], settings: dict) -> Path:
    """候选 name 的模型，写在 folder/name，返回它；sft：SFT 好的，rows：整理好的偏好对。slow 要先有 good。"""
    out = folder / name
    if name == "slow":
        return deepen(folder / "good", out)
    seed, file = settings["seed"], folder / f"{name}.jsonl"
    if name == "overfit":
        write_rows(file, new_chats(seed)[:FEW_CHATS])
        run_stage("sft", out, sft, file, learning_rate=2e-3, num_train_epochs=TIMES, **settings)
    elif name == "biased":
        write_rows(file, biased_chats(1500, seed))
        run_stage("sft", out, sft, file, learning_rate=1e-3, **settings)
    else:
        write_rows(file, rows if name == "good" else spoiled_pairs(rows, name))
        run_stage("dpo", out, sft, file, **settings)
    return out


def deepen(source: Path, out: Path) -> Path:
    """source 的每一层后面添几层什么也不做的：说的话一字不差，算的多几倍。写成与训练的一样的结果文件夹。"""
    parent = load_run(source)
    assert parent is not None
    wanted = {"source": parent["id"], "deeper": DEEPER}
    with open_run(out) as folder:
        if folder.finished(wanted) is None:
            tokenizer, model = load_causal_lm(str(source))
            add_idle_layers(model, DEEPER)

            def write(path: Path) -> None:
                model.save_pretrained(path)
                tokenizer.save_pretrained(path)

            started_from = {"model": {"path": str(source), "stage": parent["stage"], "id": parent["id"]}}
            folder.finish(
                write, {"stage": "deepen", "parent": started_from, "fingerprint": wanted, "metrics": {}}
            )
    return out


@torch.no_grad()
def add_idle_layers(model, times: int) -> None:
    """层数变成 times 倍：添的层两个输出矩阵是 0，残差原样传过去。"""
    deep = torch.nn.ModuleList()
    for layer in model.model.layers:
        deep.append(layer)
        for _ in range(times - 1):
            idle = copy.deepcopy(layer)
            idle.self_attn.o_proj.weight.zero_()
            idle.mlp.down_proj.weight.zero_()
            deep.append(idle)
    for number, layer in enumerate(deep):
        layer.self_attn.layer_idx = number
    model.model.layers = deep
    model.config.num_hidden_layers = len(deep)
    model.config.layer_types = model.config.layer_types[:1] * len(deep)
