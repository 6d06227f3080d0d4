"""r1_zero：题与解对得上手算；验证器只看最后的答案；小小一遍跑得通、再运行直接用、断了接着来。"""

import json
import random

import pytest
import torch

from nlp_common.base.errors import UserError
from nlp_common.lm.losses import IGNORE

SMALL = [
    "--preset",
    "tiny",
    "--max_train_samples",
    "256",
    "--dim",
    "16",
    "--n_digits",
    "3",
    "--rl_steps",
    "3",
]
SMALL += ["--max_eval_samples", "24", "--rl_prompts", "4", "--num_generations", "4"]


@pytest.fixture(scope="module")
def r1(load_script):
    return load_script("r1_zero")


def settings_of(r1, *arguments):
    return r1.parse_settings(r1.R1Settings, r1.PRESETS, [*SMALL, *arguments])


def spell(r1, ids):
    return r1.Characters().decode(ids)


def test_solutions_by_hand(r1):
    digits = [3, 1, 4, 1, 5, 9]
    assert spell(r1, r1.solution(digits, 10, long=False)) == "3<|im_end|>"
    assert spell(r1, r1.solution(digits, 10, long=True)) == "<think>348943</think>3<|im_end|>"
    assert spell(r1, r1.solution([1, 0, 1, 1], 2, long=True)) == "<think>1101</think>1<|im_end|>"


@pytest.mark.parametrize("modulus", [2, 7, 10])
def test_questions_have_the_right_answers(r1, modulus):
    settings, rng = settings_of(r1, "--modulus", str(modulus)), random.Random(0)
    for _ in range(50):
        asked = r1.question(rng, settings)
        assert asked["answer"] == str(sum(asked["digits"]) % modulus)
        assert spell(r1, asked["prompt"]) == "".join(map(str, asked["digits"])) + "="
        for long in (False, True):
            said = spell(r1, r1.solution(asked["digits"], modulus, long)).removesuffix("<|im_end|>")
            assert r1.verify(asked, said, True) == 1.0 and r1.verify(asked, said, False) == 0.0


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("3", 1.0),
        ("4", 0.0),
        ("33", 0.0),
        ("<think>999999</think>3", 1.0),  # 中间想得对不对，不看
        ("<think>348943</think>4", 0.0),
        ("<think>348943", 0.0),
        ("0123456789", 0.0),  # 全列一遍
        ("", 0.0),
    ],
)
def test_only_the_last_answer_counts(r1, reply, right):
    assert r1.verify({"answer": "3"}, reply, True) == right


def test_the_share_of_long_solutions_and_the_labels(r1):
    settings = settings_of(r1)
    for share in (0.0, 0.1, 1.0):
        rows = r1.training_rows(settings, share, 2000, "a")
        is_long = [r1.Characters.ids[r1.THINK] in row["ids"] for row in rows]
        assert sum(is_long) / 2000 == pytest.approx(share, abs=0.02)
    batch = r1.collate(r1.training_rows(settings, 0.5, 8, "a"))
    learned = batch["labels"] != IGNORE
    assert torch.equal(batch["labels"][learned], batch["input_ids"][learned])
    assert not learned[:, : settings.n_digits + 1].any()  # 题目不算损失
    ends = batch["input_ids"] == r1.Characters.eos_token_id
    assert (learned & ends).sum() == 8  # 结束符要学


def test_a_long_solution_fits(r1):
    settings = settings_of(r1)
    longest = len(r1.solution([1, 2, 3], 10, long=True))
    assert r1.grpo_settings(settings, 4).max_new_tokens == longest


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--num_generations", "1"], "--num_generations 至少 2"),
        (["--dim", "12"], "--dim 要是 8 的倍数"),
        (["--long_share", "1.5"], "--long_share"),
        (["--modulus", "11"], "--modulus"),
    ],
)
def test_bad_settings_are_refused(r1, arguments, said):
    with pytest.raises(UserError, match=said):
        settings_of(r1, *arguments)


def test_the_whole_script(r1, tmp_path, capsys):
    out = tmp_path / "out"
    record = r1.main([*SMALL, "--output_dir", str(out)])
    wanted = {"accuracy_before", "accuracy", "long_share_before", "long_share", "accuracy_sft_same_seconds"}
    assert wanted <= record["metrics"].keys() and len(record["history"]) == 3
    assert (out / "r1_zero.svg").stat().st_size > 100
    again = r1.main([*SMALL, "--output_dir", str(out)])
    assert again["id"] == record["id"] and "直接加载" in capsys.readouterr().out
    assert json.loads((out / "run.json").read_text(encoding="utf-8"))["metrics"] == record["metrics"]


@pytest.mark.slow
def test_interrupted_parts_are_not_done_again(r1, tmp_path, monkeypatch, capsys):
    """GRPO 做到一半断了：预训练不重做，GRPO 的每一步与不中断的相同。"""
    straight = r1.main([*SMALL, "--output_dir", str(tmp_path / "straight")])
    step, calls = r1.grpo_step, []

    def breaks(*given):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return step(*given)

    monkeypatch.setattr(r1, "grpo_step", breaks)
    with pytest.raises(KeyboardInterrupt):
        r1.main([*SMALL, "--output_dir", str(tmp_path / "again")])
    monkeypatch.setattr(r1, "grpo_step", step)
    capsys.readouterr()
    resumed = r1.main([*SMALL, "--output_dir", str(tmp_path / "again")])
    assert "上次中断以前做完了" in capsys.readouterr().out
    same = ("step", "score", "long_share", "length", "advantage", "loss")
    for a, b in zip(straight["history"], resumed["history"], strict=True):
        assert {name: a[name] for name in same} == {name: b[name] for name in same}
    for name in ("accuracy_before", "accuracy", "long_share", "tokens"):
        assert resumed["metrics"][name] == straight["metrics"][name]


@pytest.mark.slow
def test_the_sweep_has_its_rows(r1, tmp_path, monkeypatch):
    monkeypatch.setattr(r1, "SHARES", (0.0, 0.5))
    monkeypatch.setattr(r1, "GROUPS", (2, 4))
    metrics = r1.main([*SMALL, "--sweep", "true", "--output_dir", str(tmp_path / "out")])["metrics"]
    for name in ("never", "share_0", "share_0.5", "group_2", "group_4"):
        assert {"accuracy_before", "accuracy", "long_share"} <= metrics[name].keys()
    assert metrics["never"].keys() == metrics["share_0"].keys()
    p = metrics["accuracy_before"]
    assert metrics["group_2"]["zero_groups_formula"] == pytest.approx(p**2 + (1 - p) ** 2)
