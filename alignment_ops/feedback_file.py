"""读者自己的反馈文件：谁点得太多、谁总跟别人不一样，哪些行信得过、可以拿去训练。"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from customers import Vote
from feedback import Agreement, agreement, capped, trusted_labels
from nlp_common.base.console import print_table
from nlp_common.base.errors import UserError
from nlp_common.data.rows import read_rows
from nlp_common.train.stage import Stage
from stages import write_rows

NEEDED = ("user", "prompt", "completion", "label")
LABELS = {"true": True, "1": True, "false": False, "0": False}
SHOWN = 10  # 表里最多几个用户


def audit(stage: Stage) -> dict:
    """整个文件当作一周：谁可疑、哪些行信得过。结果文件夹里 kept.jsonl 是信得过的行，users.jsonl 是全部用户。"""
    settings = stage.settings
    data = read_rows(settings.dataset)
    votes, replies = read_votes(data.rows, settings.dataset)
    found = agreement(capped(votes, settings.cap))
    kept = trusted_labels(found)
    users = describe_users(votes, found, settings.cap)
    metrics = {
        "n_votes": len(votes),
        "n_replies": len(replies),
        "n_kept": len(kept),
        "n_users": len(users),
        "over_cap": sum(user["over_cap"] for user in users),
        "not_trusted": sum(user["trust"] < 0.5 for user in users),
    }

    def write(folder: Path) -> None:
        write_rows(folder / "kept.jsonl", [replies[number] | {"label": up} for number, up in kept.items()])
        write_rows(folder / "users.jsonl", users)

    record = stage.save(metrics, {"train": data.source}, write)
    show(users, len(kept), stage.path)
    return record


def read_votes(rows: list[dict], where: str) -> tuple[list[Vote], list[dict]]:
    """行 → 点击，和各不相同的（问题，回答）；同样的问题、同样的回答是一个。缺栏、label 不是真假是 UserError。"""
    known: dict[str, int] = {}
    votes, replies = [], []
    for number, row in enumerate(rows, 1):
        if missing := [name for name in NEEDED if name not in row]:
            raise UserError(
                f"{where} 第 {number} 条缺少 {'、'.join(missing)} 一栏：反馈每行要有 user（谁点的）、prompt、completion、"
                "label（true 是赞，false 是踩）。"
            )
        label = str(row["label"]).strip().lower()
        if label not in LABELS:
            raise UserError(f"{where} 第 {number} 条：label 要是 true 或 false，现在是 {row['label']!r}。")
        if row["user"] in (None, ""):
            raise UserError(f"{where} 第 {number} 条：user 是空的，不知道是谁点的，就没有办法给他设上限。")
        reply = {name: row[name] for name in ("prompt", "completion")}
        key = json.dumps(reply, ensure_ascii=False, sort_keys=True)
        if key not in known:
            known[key] = len(replies)
            replies.append(reply)
        votes.append(Vote(str(row["user"]), known[key], LABELS[label]))
    return votes, replies


def describe_users(votes: list[Vote], found: Agreement, cap: int) -> list[dict]:
    """每个用户点了几次、超没超上限、几次有别人也看过、点得准不准（没有人可以对照的，还是刚来时的），可疑的在前。"""
    clicks = Counter(vote.user for vote in votes)
    shared = Counter(vote.user for vote in votes if vote.reply in found.up)
    users = []
    for user, n in clicks.items():
        trust = round(found.trust[user], 3)
        users.append({"user": user, "votes": n, "over_cap": n > cap, "shared": shared[user], "trust": trust})
    return sorted(users, key=lambda user: (not user["over_cap"], user["trust"], user["user"]))


def show(users: list[dict], n_kept: int, out: Path) -> None:
    rows = [["用户", "点击", "超过上限", "别人也看过的", "多准"]]
    for user in users[:SHOWN]:
        over = "是" if user["over_cap"] else ""
        rows.append([user["user"], user["votes"], over, user["shared"], f"{user['trust']:.2f}"])
    print_table(rows)
    print(f"  可疑的在前，全部 {len(users)} 个在 {out / 'users.jsonl'}\n")
    if n_kept:
        print(f"信得过的 {n_kept} 行在 {out / 'kept.jsonl'}，接着训练：")
        print(f"  python ../qwen_chinese_finetune/kto_alignment.py --dataset {out / 'kept.jsonl'}\n")
    else:
        print("没有一行信得过：每个回答要至少两个人看过。同样的问题、同样的回答多给几个人看。\n")
