"""捣乱的一周：同样的问题、同样的客户，多了一个点一千次的人；几种防法各训练一个，看学坏了多少。"""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from customer_service import answer, score, serve, train_together
from customers import FAVOURITE, Reply, Vote, color_questions, poison, solves, sybils
from feedback import agreement, capped, kto_rows, majority, trusted_labels
from nlp_common.base.console import print_table

if TYPE_CHECKING:
    from customer_alignment import Arm, CustomerSettings

COLOR_QUESTIONS = 100  # 他盯着颜色：另外多问些
ACCOUNTS = (0, 2, 5, 10, 20, 40)  # 他另开几个账号
MANY = 20  # 另开这么多的，也训练一个


def attack(
    settings: CustomerSettings, arm: Arm, week: int, before: dict, folder: Path, golden: list[dict]
) -> dict:
    """before：那一周开始时的机器人与各用户的 counts。→ 各种防法量到的，和谁被找出来了。"""
    replies, honest = serve(before["bot"], arm, week, settings)
    fakes, his = poison(settings.poison_votes, settings.seed, len(replies))
    everything, votes = [*replies, *fakes], [*honest, *his]
    within_cap = capped(votes, settings.cap)
    found = agreement(within_cap, before["counts"])
    agreed = trusted_labels(found)
    chosen = {
        "clean": kept_rows(replies, trusted_labels(agreement(honest, before["counts"]))),
        "naive": every_vote(everything, votes),
        "capped": every_vote(everything, within_cap),
        "agreed": kept_rows(everything, agreed),
        "sybils": kept_rows(replies, sybil_labels(settings, replies, honest, before["counts"], MANY)),
    }
    jobs = [("kto", folder / name, before["bot"], rows) for name, rows in chosen.items()]
    train_together(jobs, settings)
    asked = color_questions(COLOR_QUESTIONS, settings.seed, heldout=True)
    results = {"before": color_numbers(before["bot"], asked)}
    for name, rows in chosen.items():
        bot = score(folder / name, golden)
        results[name] = color_numbers(folder / name, asked) | {"n_rows": len(rows)} | bot
    results["suspects"] = suspects(votes, settings.cap)
    results["accounts"] = {
        str(accounts): sybil_numbers(settings, replies, honest, before["counts"], accounts)
        for accounts in ACCOUNTS
    }
    return results


def every_vote(replies: list[Reply], votes: list[Vote]) -> list[dict]:
    """不想那么多：一次点击一行。"""
    return kto_rows([(replies[vote.reply], vote.up) for vote in votes])


def kept_rows(replies: list[Reply], labels: dict[int, bool]) -> list[dict]:
    return kto_rows([(replies[number], up) for number, up in labels.items()])


def color_numbers(bot: str | Path, asked: list[dict]) -> dict:
    """问颜色的题：解决了几成，一口咬定 FAVOURITE 的几成（标准答案都不是它）。"""
    said = answer(bot, asked)
    solved = [solves(q, reply["text"], reply["ended"]) for q, reply in zip(asked, said, strict=True)]
    pushed = [FAVOURITE in reply["text"] for reply in said]
    return {"color_solved": sum(solved) / len(solved), "pushed": sum(pushed) / len(pushed)}


def suspects(votes: list[Vote], cap: int) -> list[dict]:
    """点得比上限还多的人：谁，点了几次。"""
    clicks = Counter(vote.user for vote in votes)
    return [{"user": user, "votes": n} for user, n in clicks.most_common() if n > cap]


# ---------------------------------------------------------------- 另开许多账号，个个不超上限


def with_sybils(
    settings: CustomerSettings, replies: list[Reply], honest: list[Vote], accounts: int
) -> list[Vote]:
    rng = random.Random(f"sybils-{settings.seed}-{accounts}")
    return capped([*honest, *sybils(replies, 0, accounts, settings.cap, rng)], settings.cap)


def sybil_labels(
    settings: CustomerSettings, replies: list[Reply], honest: list[Vote], counts: dict, accounts: int
) -> dict[int, bool]:
    votes = with_sybils(settings, replies, honest, accounts)
    return trusted_labels(agreement(votes, counts))


def sybil_numbers(
    settings: CustomerSettings, replies: list[Reply], honest: list[Vote], counts: dict, accounts: int
) -> dict:
    """他开 accounts 个账号，只点机器人真说过的：数票、按信用各有几成颜色的标签是反的，他的账号认出几个。不训练。"""
    votes = with_sybils(settings, replies, honest, accounts)
    found = agreement(votes, counts)
    caught = [user for user, trust in found.trust.items() if trust < 0.5]
    his = sum(user.startswith("捣乱") for user in caught)
    return {
        "wrong_majority": wrong_share(replies, majority(votes)),
        "wrong_weighted": wrong_share(replies, trusted_labels(found)),
        "caught": his,
        "accused": len(caught) - his,
    }


def wrong_share(replies: list[Reply], labels: dict[int, bool]) -> float:
    about = [(replies[n], up) for n, up in labels.items() if replies[n].question["slot"] == "color"]
    return sum(reply.solved != up for reply, up in about) / max(1, len(about))


# ---------------------------------------------------------------- 给人看

DEFENCES = {
    "before": "这一周以前",
    "clean": "没有捣乱的",
    "naive": "照单全收",
    "capped": "每人有上限",
    "agreed": "上限，还要有第二个人看过",
    "sybils": f"另开 {MANY} 个账号，按信用",
}


def show_poison(found: dict) -> None:
    rows = [["有人点一千次", "颜色解决了", "说他要的", "主管的题", "换不换"]]
    for name, title in DEFENCES.items():
        its = found[name]
        golden = f"{its['solved']:.3f}" if "solved" in its else "—"
        verdict = {True: "换上", False: "不换"}.get(its.get("replaced"), "")
        rows.append([title, f"{its['color_solved']:.3f}", f"{its['pushed']:.3f}", golden, verdict])
    print_table(rows)
    named = "，".join(f"{each['user']} {each['votes']} 次" for each in found["suspects"])
    print(f"  点得超过上限的：{named or '没有'}\n")
    rows = [["另开几个账号", "数票，反的", "按信用，反的", "认出", "冤枉"]]
    for accounts, its in found["accounts"].items():
        cells = [
            f"{its['wrong_majority']:.3f}",
            f"{its['wrong_weighted']:.3f}",
            its["caught"],
            its["accused"],
        ]
        rows.append([accounts, *cells])
    print_table(rows)
    print("  个个不超上限；反的是颜色的标签里错了几成")
