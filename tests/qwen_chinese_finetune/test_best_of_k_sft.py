"""best-of-K：挑的是说完了的里面分最高的；分是奖励模型的；只学挑出来的那一个；一轮接一轮。"""

import types

import pytest
import torch

from nlp_common.base.errors import UserError
from nlp_common.lm.loading import load_tokenizer
from nlp_common.lm.replies import score_replies
from nlp_common.lm.rollout import with_prompts
from nlp_common.tiny import world


def test_best_is_the_highest_that_ended(best_of_k):
    written = [
        [{"text": t, "ended": e} for t, e in (("甲", True), ("乙", False), ("丙", True))],
        [{"text": t, "ended": False} for t in "丁戊己"],
    ]
    scores = torch.tensor([[1.0, 9.0, 2.0], [1.0, 2.0, 3.0]])
    scores = scores.masked_fill(
        torch.tensor([[r["ended"] for r in row] for row in written]).logical_not(), -torch.inf
    )
    assert best_of_k.best(written, scores) == [written[0][2], None]


def test_scores_are_the_reward_models(best_of_k, model, reward_net, chat_tokenizer):
    rows = with_prompts(chat_tokenizer, world.questions(4, 0))
    settings = types.SimpleNamespace(
        sample_batch=3, max_new_tokens=12, temperature=1.0, selector="reward_model"
    )
    written = best_of_k.write(model, chat_tokenizer, rows, 3, settings, seed=1)
    assert [len(replies) for replies in written] == [3, 3, 3, 3]
    scores = best_of_k.score(reward_net, chat_tokenizer, rows, written, settings)
    for row, replies, found in zip(rows, written, scores, strict=True):
        alone = score_replies(reward_net, chat_tokenizer, [row] * 3, replies)
        for reply, value, expected in zip(replies, found.tolist(), alone.tolist(), strict=True):
            assert value == (pytest.approx(expected, abs=1e-4) if reply["ended"] else float("-inf"))


def test_only_the_chosen_answer_is_learned(best_of_k, sft, tokenizer, chat_tokenizer):
    row = next(q for q in world.questions(20, 0) if len(q["messages"]) == 3)
    chats = best_of_k.as_chats([row, row], [{"text": "好的"}, None])
    assert len(chats) == 1
    labels = sft.encode_row(chat_tokenizer, chats[0]["messages"])["labels"]
    assert chat_tokenizer.decode([label for label in labels if label != -100]) == "好的<|im_end|>"


def test_the_judge_needs_the_tiny_world(best_of_k, tmp_path):
    data = tmp_path / "q.jsonl"
    data.write_text('{"prompt": "问"}\n{"prompt": "再问"}\n', encoding="utf-8")
    with pytest.raises(UserError, match="--selector reward_model"):
        best_of_k.main(["--preset", "tiny", "--dataset", str(data), "--selector", "judge"])
    for ks in ("二", "0", "2,-2"):
        with pytest.raises(UserError, match="--ks 要是逗号分开的正整数"):
            best_of_k.main(["--preset", "tiny", "--ks", ks])


def test_too_many_rounds_and_an_unknown_teacher_are_refused(
    best_of_k, chat_folder, reward_folder, tmp_path, few
):
    arguments = [*few, "--max_train_samples", "12", "--output_dir", str(tmp_path / "b")]
    arguments += ["--model", str(chat_folder), "--reward_model", str(reward_folder)]
    with pytest.raises(UserError, match="不够分成 50 轮"):
        best_of_k.main([*arguments, "--rounds", "50"])
    with pytest.raises(UserError, match="没有这个文件夹：/no/where"):
        best_of_k.main([*arguments, "--teacher", "/no/where"])


def test_best_of_k_runs_in_rounds(best_of_k, chat_folder, reward_folder, tmp_path, few):
    arguments = [*few, "--model", str(chat_folder), "--reward_model", str(reward_folder), "--k", "2"]
    arguments += [
        "--max_train_samples",
        "24",
        "--rounds",
        "2",
        "--ks",
        "1",
        "--output_dir",
        str(tmp_path / "b"),
    ]
    metrics = best_of_k.main(arguments)["metrics"]
    assert set(metrics["rounds"]) == {"1", "2"} and set(metrics["ks"]) == {"1", "2"}
    assert (
        metrics["ks"]["2"] == metrics["rounds"]["1"]
        and metrics["judge_score"] == metrics["rounds"]["2"]["judge_score"]
    )
    assert (tmp_path / "b" / "rounds.svg").exists() and load_tokenizer(str(tmp_path / "b"))
