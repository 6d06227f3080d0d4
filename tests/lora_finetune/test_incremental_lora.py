"""incremental_lora.py：矩阵与 BWT、学得一样多时忘了多少，与手算的相同；缩放与切换；各方法走得完，中断了接着来。"""

import copy

import pytest
import torch

import incremental_lora as il
from lora_by_hand import add_lora, lora_layers, merge_lora
from nlp_common.base.errors import UserError

SMALL = ["--preset", "tiny", "--max_train_samples", "24", "--n_questions", "6", "--fisher_rows", "3"]


def test_the_matrix_by_hand():
    """R 的三行；BWT = ((0.6 − 1.0) + (0.7 − 0.9)) / 2 = −0.3。"""
    matrix = [
        {"qa": 1.0, "judge": 0.0, "extract": 0.0},
        {"qa": 0.8, "judge": 0.9, "extract": 0.1},
        {"qa": 0.6, "judge": 0.7, "extract": 0.95},
    ]
    row = il.summary(matrix, ["qa", "judge", "extract"])
    assert row["backward_transfer"] == pytest.approx(-0.3)
    assert (row["task1_before"], row["task1_after"], row["task2_after"]) == (1.0, 0.8, 0.9)
    assert row["forgotten"] == pytest.approx(0.2)
    assert (row["task1_end"], row["task2_end"], row["task3_end"]) == (0.6, 0.7, 0.95)
    assert row["matrix"][2] == [0.6, 0.7, 0.95]


def test_forgotten_at_equal_learning_by_hand():
    """第二样从 0.6 到 0.9，0.75 在正中间；第一样从 0.7 到 0.3，那里是 0.5：忘了 1 − 0.5。"""
    points = {"0.5": {"task1": 0.7, "task2": 0.6}, "1": {"task1": 0.3, "task2": 0.9}}
    assert il.forgotten_at(points, before=1.0) == pytest.approx(0.5)
    assert il.forgotten_at({"0.5": points["0.5"]}, before=1.0) is None


@pytest.fixture
def adapted(model):
    torch.manual_seed(0)
    learner = copy.deepcopy(model)
    add_lora(learner, "all", 2, 4)
    with torch.no_grad():
        for layer in lora_layers(learner).values():
            layer.B.normal_(std=0.1)
    return learner


IDS = torch.arange(40)[None]


def test_scaling_the_change_is_scaling_the_adapter(model, adapted):
    """W + s·ΔW 与把 α/r 乘上 s，是一回事。"""
    after = merge_lora(copy.deepcopy(adapted)).state_dict()
    for layer in lora_layers(adapted).values():
        layer.scaling *= 0.25
    with torch.no_grad():
        torch.testing.assert_close(
            il.moved(model, after, 0.25)(IDS).logits, adapted(IDS).logits, atol=1e-4, rtol=1e-4
        )
        assert torch.equal(il.moved(model, after, 0.0)(IDS).logits, model(IDS).logits)


def test_switched_off_is_the_model_bit_by_bit(model, adapted):
    with torch.no_grad():
        on = adapted(IDS).logits
        for layer in lora_layers(adapted).values():
            layer.scaling = 0.0
        assert torch.equal(adapted(IDS).logits, model(IDS).logits)
        assert not torch.equal(on, model(IDS).logits)


def test_every_method_and_the_second_run(tmp_path, chat_folder, capsys):
    arguments = [*SMALL, "--model", str(chat_folder), "--output_dir", str(tmp_path / "out")]
    arguments += ["--methods", "full,lora_r16,replay_10,ewc,olora"]
    metrics = il.main(arguments)["metrics"]
    assert set(metrics) == {
        "full", "lora_r16", "switch", "merge_half", "merge_sum", "replay_10", "ewc", "olora",
    }  # fmt: skip
    for row in metrics.values():
        assert {"task1_before", "task1_after", "task2_after", "backward_transfer"} <= set(row)
    assert metrics["switch"]["task1_after"] == metrics["switch"]["task1_before"]
    assert set(metrics["full"]["scaled"]) == {"0.25", "0.5", "0.75", "1"}
    assert metrics["full"]["scaled"]["1"]["task2"] == metrics["full"]["task2_after"]
    assert metrics["full"]["trainable"] > metrics["lora_r16"]["trainable"] > 0
    assert (tmp_path / "out" / "learned_forgotten.svg").exists()
    capsys.readouterr()
    assert il.main(arguments)["metrics"] == metrics
    assert "已有训练结果" in capsys.readouterr().out


@pytest.mark.slow
def test_interrupted_and_started_again_ends_the_same(tmp_path, chat_folder, monkeypatch):
    common = [*SMALL, "--model", str(chat_folder), "--methods", "full,olora"]
    whole = il.main([*common, "--output_dir", str(tmp_path / "whole")])["metrics"]

    trained = il.train_on_chats

    def interrupted(part, label, *rest):
        if part.name == "olora-recap":
            raise KeyboardInterrupt
        return trained(part, label, *rest)

    monkeypatch.setattr(il, "train_on_chats", interrupted)
    with pytest.raises(KeyboardInterrupt):
        il.main([*common, "--output_dir", str(tmp_path / "again")])
    monkeypatch.setattr(il, "train_on_chats", trained)
    assert il.main([*common, "--output_dir", str(tmp_path / "again")])["metrics"] == whole


def test_bad_input(tmp_path):
    for flags, said in (
        (["--methods", "full,lora_r3"], "lora_r3"),
        (["--tasks", "judge"], "两样"),
        (["--tasks", "judge,sing"], "sing"),
        (["--tasks", "qa,judge"], "qa"),
        (["--fisher_rows", "0"], "--fisher_rows"),
    ):
        with pytest.raises(UserError, match=said):
            il.main([*SMALL, "--output_dir", str(tmp_path / "out"), *flags])
