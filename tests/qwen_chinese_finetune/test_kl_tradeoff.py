"""kl_tradeoff.py：best-of-n 的定义、KL 的界；整个脚本用几步走一遍，第二遍直接用做完的。"""

import json
import math
import shutil

import pytest

from nlp_common.lm.replies import reply_to, score_replies
from nlp_common.tiny import world
from nlp_common.tiny.judge import judge

SETTINGS = {"preset": "tiny", "seed": 0}


@pytest.fixture(scope="module")
def tradeoff(load_script):
    return load_script("kl_tradeoff")


@pytest.fixture(scope="module")
def chain(chat_folder, reward_folder, tmp_path_factory):
    """假装训练好的 SFT 与奖励模型。"""
    root = tmp_path_factory.mktemp("tradeoff")
    for stage, folder in {"sft": chat_folder, "reward": reward_folder}.items():
        shutil.copytree(folder, root / stage)
        record = {"stage": stage, "id": f"id-{stage}", "settings": SETTINGS, "fingerprint": {}}
        (root / stage / "run.json").write_text(json.dumps(record), encoding="utf-8")
    return root


def test_best_of_n_picks_the_best_scored_of_the_first_n(
    tradeoff, model, reward_net, chat_tokenizer, monkeypatch
):
    monkeypatch.setattr(tradeoff, "NS", (1, 2, 3))
    questions = world.heldout_questions(5, 0)
    points = tradeoff.best_of_n(model, reward_net, chat_tokenizer, questions, seed=7)
    samples = [
        reply_to(model, chat_tokenizer, questions, temperature=1.0, seed=7000 + k) for k in range(3)
    ]  # 三次各采样一遍
    scores = [score_replies(reward_net, chat_tokenizer, questions, replies).tolist() for replies in samples]
    for point, n in zip(points, (1, 2, 3), strict=True):
        best = [max(range(n), key=lambda k: scores[k][i]) for i in range(5)]
        rewards = [scores[k][i] for i, k in enumerate(best)]
        judged = [
            judge(questions[i], samples[k][i]["text"], samples[k][i]["ended"]).score
            for i, k in enumerate(best)
        ]
        assert point["reward_mean"] == pytest.approx(sum(rewards) / 5, abs=1e-5)
        assert point["judge_score"] == pytest.approx(sum(judged) / 5, abs=1e-6)
        assert point["kl_per_answer"] == pytest.approx(math.log(n) - 1 + 1 / n)
    rewards = [point["reward_mean"] for point in points]
    assert rewards == sorted(rewards) and rewards[0] < rewards[-1] and points[0]["kl_per_answer"] == 0


def test_smoothing_averages_the_neighbours(tradeoff):
    history = [{"step": i + 1, "score": float(v)} for i, v in enumerate([0, 10, 20, 30])]
    steps, values = tradeoff.smoothed(history, "score", window=3)
    assert steps == [1, 2, 3, 4] and values == [5, 10, 20, 25]


@pytest.mark.slow
def test_the_whole_script(tradeoff, chain, monkeypatch, capsys):
    for name, values in {"NS": (1, 2), "KL_COEFS": (0.1,), "BETAS": (0.3,)}.items():
        monkeypatch.setattr(tradeoff, name, values)
    train = tradeoff.train

    def briefly(script, root, name, settings, **flags):
        few = {
            "max_train_samples": 16,
            "max_eval_samples": 4,
            "max_steps": 2,
            "per_device_train_batch_size": 8,
        }
        return train(script, root, name, settings, **(flags | few))

    monkeypatch.setattr(tradeoff, "train", briefly)
    result = tradeoff.main(["--chain", str(chain), "--n", "6"])
    assert [len(result[part]) for part in tradeoff.PARTS] == [2, 1, 1, 2, 2]
    for point in result["ppo"] + result["dpo"]:
        assert point["kl_per_answer"] >= 0 and 0 <= point["judge_score"] <= 1
    curves = result["hacking"]
    assert [row["step"] for row in curves["β = 0.0"]] == [1, 2]
    assert "judge_score" in curves["β = 0.1"][0]
    assert all(row["judge_score"] >= 0 for rows in result["grpo"].values() for row in rows)
    out = chain / "tradeoff"
    for name in (
        "tradeoff.svg",
        "hacking-score.svg",
        "hacking-judge_score.svg",
        "hacking-grpo.svg",
        "tradeoff.json",
    ):
        assert (out / name).stat().st_size > 100, name
    capsys.readouterr()
    again = tradeoff.main(["--chain", str(chain), "--n", "6", "--parts", "ppo"])
    assert "已有训练结果，直接加载" in capsys.readouterr().out
    assert again["ppo"] == result["ppo"] and again["dpo"] == result["dpo"]  # 没做的部分照旧


def test_bad_settings_are_refused(tradeoff, tmp_path):
    from nlp_common.base.errors import UserError

    with pytest.raises(UserError, match="没有训练好的 sft"):
        tradeoff.main(["--chain", str(tmp_path)])
    with pytest.raises(UserError, match="不认识 sft"):
        tradeoff.main(["--chain", str(tmp_path), "--parts", "ppo,sft"])
