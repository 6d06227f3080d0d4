"""赞和踩能信几分：每人每周的上限，几个人说的对不对得上（一枚硬币的 Dawid–Skene），再变成训练的行。

只数票，一个人点一千次就是一千票；问题不在他点得多，在于没有第二个人看过他点的那些。
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np

from customers import Reply, Vote

NEWCOMER = (6.0, 4.0)  # 刚来的用户：当作点对过 6 次、点错过 4 次，几乎不信，等他和别人对上
ROUNDS = 30
STAFF = 40  # 客服每周最多替机器人写几个好回答（DPO 用）
SURE = 0.8  # 有八成把握是赞（或是踩）的才拿去训练


@dataclass(frozen=True)
class Agreement:
    """up：每个有票的回答真的该赞的概率；trust：每个用户点得准的概率；counts：每个用户到现在点对、点错各几次（估计）。"""

    up: dict[int, float]
    trust: dict[str, float]
    counts: dict[str, list[float]]


def capped(votes: list[Vote], cap: int) -> list[Vote]:
    """同一个人对同一个回答只算最后一次；每人最多算前 cap 个回答。votes 是一周的。"""
    last = {(vote.user, vote.reply): vote for vote in votes}
    used: Counter[str] = Counter()
    kept = []
    for vote in last.values():
        used[vote.user] += 1
        if used[vote.user] <= cap:
            kept.append(vote)
    return kept


def voters(votes: list[Vote]) -> dict[int, int]:
    """每个回答有几个不同的人点过。"""
    seen = defaultdict(set)
    for vote in votes:
        seen[vote.reply].add(vote.user)
    return {reply: len(users) for reply, users in seen.items()}


def agreement(votes: list[Vote], before: dict[str, list[float]] | None = None) -> Agreement:
    """EM：按每个人点得准不准给票加权，算每个回答该赞的概率；再按这些概率算每个人点得准不准；来回几遍。

    E 步  logit p_j = Σ_i ±logit a_i                         （i 给 j 点赞是 +，点踩是 −）
    M 步  a_i = (以前点对的 + Σ_j 点得与 p_j 相符的概率) / (以前点过的 + 这次点过的)
    E 步开头没有 logit π（该赞的占几成）：点错得多的时候，连 π 一起估，会滑到"全是赞、谁都不准"。
    before：以前各周的 counts；没有来过的人从 NEWCOMER 算起。只有一个人点过的回答，没有谁可以对照，不算进来：
    算进来就是自己证明自己，一个人点一千次，反而最可信。
    """
    before = before or {}
    everyone = {user: list(before.get(user, NEWCOMER)) for user in sorted({vote.user for vote in votes})}
    seen = voters(votes)
    votes = [vote for vote in votes if seen[vote.reply] > 1]
    if not votes:
        return Agreement(
            {}, {user: right / (right + wrong) for user, (right, wrong) in everyone.items()}, everyone
        )
    users = sorted({vote.user for vote in votes})
    replies = sorted({vote.reply for vote in votes})
    number = {user: i for i, user in enumerate(users)}
    who = np.array([number[vote.user] for vote in votes])  # (V,)
    which = np.searchsorted(replies, [vote.reply for vote in votes])  # (V,)
    sign = np.array([1.0 if vote.up else -1.0 for vote in votes])  # (V,)
    known = np.array([everyone[user] for user in users])  # (U, 2)
    n_votes = np.bincount(who, minlength=len(users))  # (U,)
    trust = known[:, 0] / known.sum(1)  # (U,)
    for _ in range(ROUNDS):
        up = sigmoid(np.bincount(which, sign * logit(trust)[who]))  # (R,)
        agrees = np.bincount(who, np.where(sign > 0, up[which], 1 - up[which]))  # (U,)
        trust = (known[:, 0] + agrees) / (known.sum(1) + n_votes)
    counts = known + np.stack([agrees, n_votes - agrees], 1)  # (U, 2)
    everyone |= dict(zip(users, counts.tolist(), strict=True))
    return Agreement(
        dict(zip(replies, up.tolist(), strict=True)),
        {user: right / (right + wrong) for user, (right, wrong) in everyone.items()},
        everyone,
    )


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def logit(p: np.ndarray) -> np.ndarray:
    return np.log(p / (1 - p))


def trusted_labels(found: Agreement) -> dict[int, bool]:
    """拿得准的回答 → 该赞还是该踩：至少两个人点过，而且有 SURE 的把握。"""
    return {reply: p > 0.5 for reply, p in found.up.items() if max(p, 1 - p) >= SURE}


def majority(votes: list[Vote]) -> dict[int, bool]:
    """只数票：赞的多就是赞；一样多的、只有一个人点过的不要。"""
    balance: Counter[int] = Counter()
    for vote in votes:
        balance[vote.reply] += 1 if vote.up else -1
    return {n: balance[n] > 0 for n, seen in voters(votes).items() if seen > 1 and balance[n]}


# ---------------------------------------------------------------- 训练的行


def kto_rows(labels: list[tuple[Reply, bool]]) -> list[dict]:
    """一个回答一行 ``{"prompt", "completion", "label"}``。"""
    return [
        {
            "prompt": reply.question["messages"],
            "completion": said(reply.text),
            "label": up,
        }
        for reply, up in labels
    ]


def dpo_rows(labels: list[tuple[Reply, bool]], staff: int = STAFF) -> list[dict]:
    """一对 ``{"prompt", "chosen", "rejected"}``：同一个问题的两个回答，赞的那个对踩的那个。

    只有踩的，转给人工：客服写的整句是好的那个，一周最多写 staff 个。
    """
    asked: dict[str, list[tuple[Reply, bool]]] = defaultdict(list)
    for reply, up in labels:
        asked[str(reply.question["messages"])].append((reply, up))
    rows = []
    for both in asked.values():
        question = both[0][0].question
        good = [reply.text for reply, up in both if up]
        bad = [reply.text for reply, up in both if not up]
        if bad and not good and staff:
            good, staff = [question["sentence"]], staff - 1
        for chosen, rejected in zip(good, bad, strict=False):
            if chosen != rejected:
                rows.append(
                    {"prompt": question["messages"], "chosen": said(chosen), "rejected": said(rejected)}
                )
    return rows


def said(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]
