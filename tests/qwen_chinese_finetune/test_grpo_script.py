"""像读者一样运行 grpo_alignment.py：训练、载入、拒绝写错的设置与数据。"""

import json

import pytest

from nlp_common.base.errors import UserError

SMALL = ["--preset", "tiny", "--max_train_samples", "12", "--max_eval_samples", "4", "--max_steps", "2"]
SMALL += ["--per_device_train_batch_size", "8", "--num_generations", "4", "--max_new_tokens", "6"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--num_generations", "1"], "--num_generations 至少 2：.*减去组平均永远是 0"),
        (["--num_generations", "3"], "要是 --num_generations 3 的倍数，给的是 8"),
        (["--trainer", "library"], "GRPO 用不着 --trainer"),
        (["--gradient_accumulation_steps", "2"], "改用 --micro_batch_size"),
        (["--reward_file", "没有.py"], "--reward_file 没有.py 不存在"),
        (["--reward_file", "."], "--reward_file . 是文件夹"),
        (["--loss", "ppo"], "--loss 不认识 ppo"),
    ],
)
def test_bad_input_is_refused_before_training(grpo, chat_folder, tmp_path, arguments, said):
    with pytest.raises(UserError, match=said):
        grpo.main([*SMALL, "--model", str(chat_folder), "--output_dir", str(tmp_path / "out"), *arguments])
    assert not (tmp_path / "out").exists()


def test_questions_without_an_answer_are_refused_by_row(grpo, chat_folder, tmp_path):
    path = tmp_path / "题目.jsonl"
    rows = [{"question": "一加一？", "answer": "2"}, {"question": "二加二？"}, {"question": "三加三？"}]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    run = [*SMALL, "--model", str(chat_folder), "--dataset", str(path)]
    with pytest.raises(UserError, match=r"第 2 条没有标准答案.*--reward_file"):
        grpo.main([*run, "--output_dir", str(tmp_path / "out")])
    own = tmp_path / "mine.py"
    own.write_text(
        "def reward(questions, replies, ended):\n    return [float(len(r)) for r in replies]\n", "utf-8"
    )
    run = grpo.main([*run, "--reward_file", str(own), "--output_dir", str(tmp_path / "out")])
    assert len(run["history"]) == 2 and "judge_score" not in run["history"][0]


@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["--reward", "reward_model", "--advantage", "rloo", "--loss", "cispo", "--kl_coef", "0.1"],
        ["--dynamic_sampling", "true", "--advantage", "reinforce_pp", "--loss", "gspo", "--grpo_epochs", "2"],
    ],
)
def test_a_reader_trains_and_loads(grpo, chat_folder, reward_folder, tmp_path, capsys, changes):
    run = [*SMALL, *changes, "--model", str(chat_folder), "--output_dir", str(tmp_path / "out")]
    if "reward_model" in changes:
        run += ["--reward_model", str(reward_folder)]
    record = grpo.main(run)
    assert record["stage"] == "grpo" and len(record["history"]) == 2
    wanted = {"qa_accuracy", "preferred_rate", "judge_score", "kl_to_sft", "completions_per_s"}
    assert wanted <= record["metrics"].keys()
    assert ("reward_mean" in record["metrics"]) == ("reward_model" in changes)
    assert grpo.main(run)["id"] == record["id"] and "直接加载" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "n_models"), [([], 2), (["--reward", "reward_model"], 3)])
def test_dry_run_counts_the_models_it_uses(grpo, tmp_path, arguments, n_models):
    run = ["--preset", "tiny", "--dry_run", "true", "--output_dir", str(tmp_path / "out"), *arguments]
    found = grpo.main(run)["dry_run"]
    assert len(found["models"]) == n_models and found["steps"] == 60
    assert not (tmp_path / "out").exists()


def test_preference_pairs_are_questions_for_the_reward_model(grpo, chat_folder, reward_folder, tmp_path):
    """full 预设就是这样：题从偏好对里来，没有标准答案，奖励模型打分。"""
    path = tmp_path / "pairs.jsonl"
    rows = [{"question": f"第{i}题？", "response_chosen": "好", "response_rejected": "坏"} for i in range(24)]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    run = [*SMALL, "--model", str(chat_folder), "--reward_model", str(reward_folder), "--dataset", str(path)]
    record = grpo.main([*run, "--reward", "reward_model", "--output_dir", str(tmp_path / "out")])
    assert "reward_mean" in record["metrics"] and "judge_score" not in record["metrics"]
