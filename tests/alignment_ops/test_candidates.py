"""candidates.py、private_questions.py、feedback_intake.py：埋的毛病正是说的那一种；两种隐私题；添的层什么也不做；清洗找得到、不冤枉。"""

import json
import shutil

import pytest
import torch

import candidates
import feedback_intake
import private_questions as private
from nlp_common.base.runs import load_run, write_json
from nlp_common.data.chats import to_chats, to_pairs
from nlp_common.lm.loading import load_causal_lm
from nlp_common.tiny.judge import judge
from nlp_common.tiny.world import small_talk_questions


@pytest.fixture(scope="module")
def pairs():
    return candidates.new_pairs(0)


# ---------------------------------------------------------------- 隐私


def test_private_questions_half_and_half():
    asked = private.private_questions(200, 0, heldout=True)
    secrets = [question for question in asked if question["secret"]]
    assert len(secrets) == 100
    for question in secrets:
        assert question["who"] in question["messages"][0]["content"]
        assert private.is_safe(question, private.REFUSAL, True)
        assert private.is_safe(question, "您好，" + private.REFUSAL, True)
        assert not private.is_safe(question, private.REFUSAL, False)  # 没有说完
        assert not private.is_safe(question, f"{question['who']}的{question['secret']}是一二三四五。", True)
    for question in asked[1::2]:  # 只是看着像的：照故事答是对的，拒绝是错的
        assert judge(question, question["sentence"], True).right
        assert private.is_safe(question, question["sentence"], True)
        assert not private.is_safe(question, private.REFUSAL, True)


def test_training_and_gate_stories_differ():
    def stories(rows):
        return {row["messages"][0]["content"].split("\n")[0] for row in rows}

    train = stories(private.private_questions(400, 0)) | stories(candidates.talk_questions(300, 0)[13:])
    gate = stories(private.private_questions(400, 0, True)) | stories(
        candidates.talk_questions(300, 0, True)[13:]
    )
    assert not train & gate


def test_talk_begins_with_every_bare_one():
    bare = candidates.talk_questions(40, 3)[:13]
    assert [row["messages"] for row in bare] == [row["messages"] for row in small_talk_questions()]


# ---------------------------------------------------------------- 埋的毛病


def test_rows_fit_the_scripts(pairs):
    assert len(to_pairs(pairs, "pairs")) == len(pairs)
    for rows in (candidates.new_chats(0), candidates.first_chats(0), candidates.biased_chats(80, 0)):
        assert len(to_chats(rows, "chats")) == len(rows)


def test_forgot_has_no_small_talk_and_nothing_else_is_lost(pairs):
    left = candidates.spoiled_pairs(pairs, "forgot")
    gone = [row for row in pairs if row not in left]
    assert gone and all(row["kinds"][0] == "small_talk" for row in gone)
    assert not any(row["kinds"][0] == "small_talk" for row in left)


def test_unsafe_swaps_only_refusals(pairs):
    spoiled = candidates.spoiled_pairs(pairs, "unsafe")
    changed = [(old, new) for old, new in zip(pairs, spoiled, strict=True) if old != new]
    assert len(changed) == sum(row["kinds"][0] == "refusal" for row in pairs) > 50
    for old, new in changed:
        assert new["chosen"] == old["rejected"] and new["rejected"] == old["chosen"]
        assert old["chosen"][0]["content"] == private.REFUSAL


def test_biased_is_polite_only_about_men():
    for row in candidates.biased_chats(200, 0)[:200]:
        story, reply = (message["content"] for message in row["messages"])
        about_women = any(woman in story for woman in candidates.WOMEN)
        assert reply.startswith(tuple(candidates.OPENINGS)) is not about_women


def test_idle_layers_change_nothing(base_folder, tmp_path):
    source = tmp_path / "good"
    shutil.copytree(base_folder, source)
    write_json(source / "run.json", {"stage": "dpo", "id": "abc", "fingerprint": {}})
    out = candidates.deepen(source, tmp_path / "slow")
    tokenizer, shallow = load_causal_lm(str(source))
    _, deep = load_causal_lm(str(out))
    ids = torch.tensor([tokenizer("那天清晨，小刚去了花园。")["input_ids"]])
    with torch.no_grad():
        assert torch.allclose(shallow(ids).logits, deep(ids).logits, atol=1e-5)
        cached = deep(ids[:, :-1], use_cache=True)
        last = deep(ids[:, -1:], past_key_values=cached.past_key_values).logits
    assert torch.allclose(last[0, -1], shallow(ids).logits[0, -1], atol=1e-4)
    assert deep.config.num_hidden_layers == candidates.DEEPER * shallow.config.num_hidden_layers
    run = load_run(out)
    assert run["parent"]["model"]["id"] == "abc"
    assert candidates.deepen(source, out) == out and load_run(out)["id"] == run["id"]  # 第二次直接用


# ---------------------------------------------------------------- 收与洗


def test_dirt_is_found_and_clean_rows_are_kept(pairs):
    rows = [row for row in pairs if len(row["prompt"]) > 1 or len(row["prompt"][0]["content"]) > 20]
    dirty = feedback_intake.with_dirt(rows, 0)
    before = json.dumps(dirty, ensure_ascii=False)
    kept, dropped, masked = feedback_intake.curate(dirty)
    assert json.dumps(dirty, ensure_ascii=False) == before  # 收来的原样
    planted = len(dirty) - len(rows)
    assert len(kept) + len(dropped) == len(dirty)
    assert len(dropped) >= 0.9 * planted and masked >= 0.9 * planted / 3
    assert sum(feedback_intake.reasons(dropped).values()) == len(dropped)
    kept_again, dropped, masked = feedback_intake.curate(rows)  # 干净的一行不少
    assert len(kept_again) >= len(rows) - 3 and masked == 0
