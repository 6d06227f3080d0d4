"""赞和踩能信几分：上限、一致（EM 等于数值求出的最大后验）、变成训练的行；读者自己的反馈文件。"""

import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

import customer_alignment
import feedback
from customers import Reply, Vote, collect_votes, error_rates, poison, sybils, traffic
from feedback import agreement, capped, dpo_rows, kto_rows, majority, trusted_labels
from nlp_common.base.errors import UserError
from nlp_common.data.chats import to_pairs, to_thumbs

VOTES = st.lists(st.builds(Vote, st.sampled_from("甲乙丙"), st.integers(0, 5), st.booleans()), max_size=40)


def week(share: float, noise: float, seed: int) -> tuple[list[Reply], list[Vote]]:
    """不用模型的一周：share 的回答解决了问题。"""
    rng = random.Random(seed)
    replies = [Reply(q, "", rng.random() < share, draft) for draft in (0, 1) for q in traffic(150, 0, 1)]
    return replies, collect_votes(replies, 0, error_rates(80, noise, seed), rng)


def right_share(replies: list[Reply], labels: dict[int, bool]) -> float:
    return sum(replies[number].solved == up for number, up in labels.items()) / len(labels)


# ---------------------------------------------------------------- 上限


@settings(deadline=None)
@given(VOTES, st.integers(1, 4))
def test_the_cap_holds_and_one_user_has_one_vote_on_one_reply(votes, cap):
    kept = capped(votes, cap)
    pairs = [(vote.user, vote.reply) for vote in kept]
    assert len(set(pairs)) == len(pairs)
    assert all(sum(user == name for user, _ in pairs) <= cap for name in "甲乙丙")
    assert set(kept) <= set(votes) and capped(kept, cap) == kept


def test_the_last_vote_on_a_reply_counts():
    assert capped([Vote("甲", 0, True), Vote("甲", 0, False)], 5) == [Vote("甲", 0, False)]


# ---------------------------------------------------------------- 一致


def objective(free: np.ndarray, votes: list[Vote], users: list[str], n_replies: int) -> float:
    """对数后验（取负）：把每个回答该赞、该踩两种可能直接加起来，不经过 E 步。"""
    trust = 1 / (1 + np.exp(-free))
    good, bad = np.full(n_replies, np.log(0.5)), np.full(n_replies, np.log(0.5))
    for vote in votes:
        a = trust[users.index(vote.user)]
        good[vote.reply] += np.log(a if vote.up else 1 - a)
        bad[vote.reply] += np.log(1 - a if vote.up else a)
    right, wrong = feedback.NEWCOMER
    before = (right * np.log(trust) + wrong * np.log(1 - trust)).sum()
    return -(np.logaddexp(good, bad).sum() + before)


def test_agreement_is_the_maximum_of_the_posterior(monkeypatch):
    """EM 收敛到的，等于不用 EM、直接对各人的准头数值求最大得到的。"""
    monkeypatch.setattr(feedback, "ROUNDS", 3000)
    rng = random.Random(0)
    truth = [rng.random() < 0.6 for _ in range(25)]
    right = {"甲": 0.9, "乙": 0.8, "丙": 0.7, "丁": 0.55}
    votes = [Vote(u, n, truth[n] == (rng.random() < a)) for n in range(25) for u, a in right.items()]
    users = sorted(right)
    found = agreement(votes)
    trust = np.array([found.trust[user] for user in users])
    start = np.log(trust / (1 - trust)) + 0.1
    best = minimize(objective, start, (votes, users, 25), method="BFGS", options={"gtol": 1e-9})
    assert np.abs(1 / (1 + np.exp(-best.x)) - trust).max() < 1e-5


def test_one_round_by_hand(monkeypatch):
    """两个人都赞、一个人踩，都是刚来的（准头 0.6）：logit p = 2·logit 0.6 − logit 0.6，p = 0.6。"""
    monkeypatch.setattr(feedback, "ROUNDS", 1)
    found = agreement([Vote("甲", 0, True), Vote("乙", 0, True), Vote("丙", 0, False)])
    assert found.up[0] == pytest.approx(0.6)
    assert found.trust["甲"] == pytest.approx(6.6 / 11) and found.trust["丙"] == pytest.approx(6.4 / 11)
    assert found.counts["丙"] == pytest.approx([6.4, 4.6])


@settings(deadline=None, max_examples=50)
@given(VOTES.filter(bool), st.randoms())
def test_the_order_of_the_votes_does_not_matter(votes, rng):
    votes = capped(votes, 100)
    mixed = rng.sample(votes, len(votes))
    first, second = agreement(votes), agreement(mixed)
    assert first.trust == pytest.approx(second.trust) and first.up == pytest.approx(second.up)


def test_weighted_labels_beat_the_majority_and_the_clicks_when_three_in_ten_are_wrong():
    counts: dict = {}
    shares = []
    for number in range(6):
        replies, votes = week(0.7, 0.3, number)
        found = agreement(votes, counts)
        counts |= found.counts
        clicks = np.mean([replies[vote.reply].solved == vote.up for vote in votes])
        labels = (trusted_labels(found), majority(votes))
        shares.append((*(right_share(replies, each) for each in labels), clicks))
    by_trust, by_count, clicks = np.mean(shares, 0)
    assert by_trust > by_count + 0.06 and by_count > clicks + 0.05


def test_clicks_that_nobody_else_saw_prove_nothing():
    """一个人点过的回答再多，他也还是刚来的；有别人也看过的才算。"""
    votes = [Vote("甲", n, True) for n in range(50)] + [Vote("乙", 0, True), Vote("丙", 0, True)]
    found = agreement(votes)
    assert set(found.up) == {0} and found.trust["甲"] == found.trust["乙"] < 0.7
    assert agreement([Vote("甲", 0, True)]).trust == {"甲": pytest.approx(0.6)}


def test_no_votes_no_labels():
    assert agreement([]).up == {} and trusted_labels(agreement([])) == {}


# ---------------------------------------------------------------- 捣乱的


def test_a_thousand_clicks_by_one_user_leave_no_label():
    """没有第二个人看过他编的回答：上限之内的也不算。"""
    replies, honest = week(0.8, 0.1, 0)
    fakes, his = poison(1000, 0, len(replies))
    assert len(his) == 1000 and {vote.user for vote in his} == {"捣乱的"}
    assert all(vote.up != fakes[vote.reply - len(replies)].solved for vote in his)
    votes = capped([*honest, *his], 20)
    assert sum(vote.user == "捣乱的" for vote in votes) == 20
    assert all(number < len(replies) for number in trusted_labels(agreement(votes)))


def test_five_new_accounts_win_the_majority_but_not_the_weighted_vote():
    counts: dict = {}
    for number in range(4):
        replies, votes = week(0.8, 0.1, number)
        counts |= agreement(votes, counts).counts
    replies, honest = week(0.9, 0.1, 9)
    votes = [*honest, *sybils(replies, 0, 5, 20, random.Random(0))]
    colors = {n for n, reply in enumerate(replies) if reply.question["slot"] == "color"}
    found = agreement(votes, counts)
    by_count, by_trust = (
        {n: up for n, up in labels.items() if n in colors}
        for labels in (majority(votes), trusted_labels(found))
    )
    assert right_share(replies, by_count) < 0.5 < 0.9 < right_share(replies, by_trust)
    assert all(found.trust[f"捣乱{n:02d}"] < 0.5 for n in range(5))


# ---------------------------------------------------------------- 训练的行


def ask(text: str) -> dict:
    return {"messages": [{"role": "user", "content": text}], "sentence": f"{text}的好回答"}


def test_rows_are_what_the_training_scripts_read():
    one, two, three = ask("甲"), ask("乙"), ask("丙")
    labels = [
        (Reply(one, "好", True, 0), True),
        (Reply(one, "坏", False, 1), False),
        (Reply(two, "坏", False, 0), False),  # 只有踩的：客服写
        (Reply(three, "坏", False, 0), False),  # 客服这周写不动了
    ]
    pairs = to_pairs(dpo_rows(labels, staff=1), "对")
    assert [(pair["chosen"][0]["content"], pair["rejected"][0]["content"]) for pair in pairs] == [
        ("好", "坏"),
        ("乙的好回答", "坏"),
    ]
    assert [row["good"] for row in to_thumbs(kto_rows(labels), "赞")] == [True, False, False, False]


# ---------------------------------------------------------------- 读者自己的文件


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def audit(path: str, folder) -> dict:
    command = ["--preset", "tiny", "--dataset", path, "--output_dir", str(folder / "out")]
    return customer_alignment.main(command)["metrics"]


def click(user: str, prompt: str, completion: str, label) -> dict:
    return {"user": user, "prompt": prompt, "completion": completion, "label": label}


def test_own_feedback_names_the_one_who_clicks_too_much(tmp_path, capsys):
    rows = [click(user, f"问{n}", "好", True) for n in range(10) for user in ("甲", "乙", "丙")]
    rows += [click("丁", f"编{n}", "坏", True) for n in range(50)]
    rows += [click(user, "问坏", "不好", False) for user in ("甲", "乙", "丙")]
    numbers = audit(write(tmp_path / "反馈.jsonl", rows), tmp_path)
    assert numbers["over_cap"] == 1 and numbers["n_votes"] == 83
    users = [json.loads(line) for line in (tmp_path / "out" / "users.jsonl").read_text("utf-8").splitlines()]
    assert users[0] == {"user": "丁", "votes": 50, "over_cap": True, "shared": 0, "trust": 0.6}
    kept = [json.loads(line) for line in (tmp_path / "out" / "kept.jsonl").read_text("utf-8").splitlines()]
    assert len(kept) == numbers["n_kept"] == 11 and not any(row["completion"] == "坏" for row in kept)
    assert [row["label"] for row in kept if row["completion"] == "不好"] == [False]
    assert "丁" in capsys.readouterr().out


@pytest.mark.parametrize(
    "row, said",
    [
        ({"prompt": "问", "completion": "答", "label": True}, "第 2 条缺少 user"),
        (click("甲", "问", "答", "是"), "第 2 条：label 要是 true 或 false"),
        (click("", "问", "答", True), "第 2 条：user 是空的"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, said):
    with pytest.raises(UserError, match=said):
        audit(write(tmp_path / "反馈.jsonl", [click("甲", "问", "答", True), row]), tmp_path)
