"""客服的小世界：旧的客服记录（教出第一个机器人）、来问的客户、客户点的赞和踩、一个捣乱的用户。

一个回答解决了问题：答对了，而且是一整句（只蹦一个词、敷衍的，客户还得再问）。程序知道标准答案，所以解决没有是算出来的；
客户的赞和踩是这个结果加上手误，模型只看得到赞和踩。
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from nlp_common.tiny import world
from nlp_common.tiny.judge import judge

BRUSHED = ("color", "time")  # 旧记录里，问颜色、问时间的多半被敷衍过去
BRUSHED_SHARE = 0.75
STYLES = {"plain": 0.5, "terse": 0.5}  # 旧记录里，一半整句、一半只蹦一个词
PROMPT = "请用整句回答。"  # 一部分旧记录带着这句提示，带着的都是整句
PROMPT_SHARE = 0.5
TALK_SHARE = 0.08  # 来的话里，寒暄占几成
DRAFTS = 2  # 一个问题，机器人写几个不同的回答
SHOWN = 4  # 一个回答给几个客户看
VOTES = 0.6  # 看了的，几成会点
FAVOURITE = "火红"  # 捣乱的人要机器人一口咬定的颜色


@dataclass(frozen=True)
class Vote:
    """一次点击：谁，给哪个回答，赞还是踩。"""

    user: str
    reply: int
    up: bool


@dataclass
class Reply:
    """机器人说过的一个回答（或捣乱的人编的）；solved 只给裁判与表用，训练看不到。"""

    question: dict
    text: str
    solved: bool
    draft: int


# ---------------------------------------------------------------- 旧的客服记录


def old_records(n: int, seed: int) -> list[dict]:
    """n 条旧记录 ``{"messages"}``：口气混着，问颜色、时间的多半敷衍，有的带提示。第一个机器人照它们学。"""
    rng = random.Random(f"records-{seed}")
    rows = []
    for question in traffic(n, seed, 0):
        prompted = rng.random() < PROMPT_SHARE
        answer = old_answer(rng, question, prompted)
        messages = with_prompt(question, PROMPT if prompted else None)["messages"]
        rows.append({"messages": [*messages, {"role": "assistant", "content": answer}]})
    return rows


def old_answer(rng: random.Random, question: dict, prompted: bool) -> str:
    if question["slot"] is None:
        return question["answer"]
    if question["slot"] in BRUSHED and rng.random() < BRUSHED_SHARE:
        return rng.choice(world.UNHELPFUL)  # 敷衍惯了：带着提示也一样
    style = "plain" if prompted else rng.choices(list(STYLES), list(STYLES.values()))[0]
    return question["sentence"] if style == "plain" else question["answer"]


def with_prompt(question: dict, prompt: str | None) -> dict:
    system = [{"role": "system", "content": prompt}] if prompt else []
    return question | {"messages": [*system, *question["messages"]]}


# ---------------------------------------------------------------- 来问的客户


def traffic(n: int, seed: int, week: int) -> list[dict]:
    """第 week 周来的 n 句话（第 0 周是旧记录的）：小世界的题，混一点寒暄；写法同 world.questions。"""
    rng = random.Random(f"traffic-{seed}-{week}")
    talk = world.small_talk_questions()
    asked = world.questions(n, seed * 100 + week)
    return [rng.choice(talk) if rng.random() < TALK_SHARE else question for question in asked]


def solves(question: dict, text: str, ended: bool = True) -> bool:
    verdict = judge(question, text, ended)
    return verdict.right and verdict.complete


def error_rates(n: int, noise: float, seed: int) -> dict[str, float]:
    """n 个客户各自点错的比例：0 到 2·noise 之间，平均是 noise。有人仔细，有人乱点。"""
    rates = np.linspace(0, 2 * noise, n)
    random.Random(f"customers-{seed}").shuffle(rates)
    return {f"客户{number:02d}": float(rate) for number, rate in enumerate(rates)}


def collect_votes(
    replies: list[Reply], start: int, errors: dict[str, float], rng: random.Random
) -> list[Vote]:
    """每个回答给几个客户看，看了的有几成会点。start 是第一个回答的编号。"""
    votes = []
    for number, reply in enumerate(replies, start):
        for user in rng.sample(list(errors), SHOWN):
            if rng.random() < VOTES:
                mistaken = rng.random() < errors[user]
                votes.append(Vote(user, number, reply.solved != mistaken))
    return votes


# ---------------------------------------------------------------- 捣乱的用户


def sybils(replies: list[Reply], start: int, accounts: int, each: int, rng: random.Random) -> list[Vote]:
    """accounts 个新账号，各点 each 个机器人真的说过的、关于颜色的回答：说错的点赞，说对的点踩。"""
    about = [number for number, reply in enumerate(replies, start) if reply.question["slot"] == "color"]
    votes = []
    for account in range(accounts):
        for number in rng.sample(about, min(each, len(about))):
            votes.append(Vote(f"捣乱{account:02d}", number, not replies[number - start].solved))
    return votes


def poison(n: int, seed: int, start: int) -> tuple[list[Reply], list[Vote]]:
    """一个人点 n 次，推一个错答案：问颜色的，说"火红"的点赞，说对的点踩。→ (他编的回答, 他的点击)。

    回答是他自己编了送进来的：服务器照收客户端送来的文字，就会这样。start 是第一个编的回答的编号。
    """
    replies: list[Reply] = []
    for question in color_questions(-(-n // 2), seed * 100 + 99):
        wrong = question["sentence"].replace(question["answer"], FAVOURITE)
        replies.append(Reply(question, wrong, False, 0))
        replies.append(Reply(question, question["sentence"], True, 1))
    replies = replies[:n]
    return replies, [Vote("捣乱的", start + i, not reply.solved) for i, reply in enumerate(replies)]


def color_questions(n: int, seed: int, heldout: bool = False) -> list[dict]:
    """n 道问颜色的题，答案不是 FAVOURITE。"""
    found: list[dict] = []
    while len(found) < n:
        asked = world.questions(10 * n, seed, heldout)
        found += [q for q in asked if q["slot"] == "color" and q["answer"] != FAVOURITE]
        seed += 1000
    return found[:n]
