"""lora_parameter_viz.py：有效秩、低秩近似与手算的相同；参数个数等于 PEFT 的；B = 0 什么也不变；一课走得完，中断了接着来。"""

import copy

import pytest
import torch

import lora_parameter_viz as viz
from lora_by_hand import add_lora, lora_layers, merge_lora, trainable
from nlp_common.base.errors import UserError
from tasks import task_chats

SMALL = ["--preset", "tiny", "--max_train_samples", "64", "--n_questions", "4", "--r", "2"]


def test_effective_rank_by_hand():
    """σ² 是 16、4、1：21 的九成是 18.9，两个方向 20 才够；只要七成，一个 16 就够。"""
    singular = torch.tensor([4.0, 2.0, 1.0])
    assert viz.effective_rank(singular) == 2
    assert viz.effective_rank(singular, 0.7) == 1
    assert viz.effective_rank(singular, 0.99) == 3
    assert viz.effective_rank(torch.ones(10)) == 9  # 十个一样大：九成正好是九个
    assert viz.effective_rank(torch.zeros(3)) == 0


def test_low_rank_is_the_nearest():
    """对角阵只留最大的两个；一般的矩阵，误差的平方是去掉的 σ² 之和（Eckart-Young）。"""
    diagonal = torch.diag(torch.tensor([1.0, -3.0, 2.0]))
    torch.testing.assert_close(
        viz.low_rank(torch.linalg.svd(diagonal), 2), torch.diag(torch.tensor([0.0, -3.0, 2.0]))
    )
    torch.manual_seed(0)
    delta = torch.randn(7, 5, dtype=torch.float64)
    parts = viz.decompose({"x": delta})["x"]
    singular = torch.linalg.svdvals(delta)
    for k in (0, 1, 3, 5):
        error = ((delta - viz.low_rank(parts, k)) ** 2).sum()
        torch.testing.assert_close(error, (singular[k:] ** 2).sum(), atol=1e-9, rtol=1e-9)


def test_the_count_by_hand():
    """A 是 (2, 5) 与 (2, 3)，B 是 (4, 2) 与 (3, 2)：10 + 8 + 6 + 6 = 30。"""
    assert viz.lora_count([(4, 5), (3, 3)], 2) == 30


@pytest.mark.parametrize("target", ["attention", "mlp", "all"])
@pytest.mark.parametrize("r", [1, 8])
def test_the_count_is_that_of_peft(model, target, r):
    peft = pytest.importorskip("peft", reason="要 peft 才数得了它的参数")
    ours = copy.deepcopy(model)
    names = add_lora(ours, target, r, 2 * r)
    shapes = [tuple(model.get_submodule(name).weight.shape) for name in names]
    theirs = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(r=r, target_modules=names, task_type="CAUSAL_LM")
    )
    assert viz.lora_count(shapes, r) == theirs.get_nb_trainable_parameters()[0]
    assert viz.lora_count(shapes, r) == sum(p.numel() for p in trainable(ours).values())


def test_b_zero_changes_no_logit_and_b_one_does(model, chat_tokenizer):
    learner = copy.deepcopy(model)
    add_lora(learner, "all", 2, 4)
    chats = task_chats("extract", 3, 0)
    assert viz.logits_moved(model, learner, chat_tokenizer, chats) == 0.0
    with torch.no_grad():
        for layer in lora_layers(learner).values():
            layer.B.fill_(0.1)
    assert viz.logits_moved(model, learner, chat_tokenizer, chats) > 1e-3


@pytest.fixture
def learned(model):
    """→ (start, 学过的全参数模型, 各矩阵的 ΔW, LoRA 的 ΔW)：ΔW 是随机的。"""
    torch.manual_seed(0)
    full, lora = copy.deepcopy(model), copy.deepcopy(model)
    names = add_lora(lora, "all", 2, 4)
    with torch.no_grad():
        for p in full.parameters():
            p.add_(0.02 * torch.randn_like(p))
        for layer in lora_layers(lora).values():
            layer.B.normal_(std=0.1)
    deltas = {name: layer.delta().detach() for name, layer in lora_layers(lora).items()}
    return model, full, viz.full_deltas(model, full, names), deltas, lora


def test_every_matrix_has_its_row(learned):
    start, _, deltas, lora, lora_model = learned
    rows = viz.examine(start, deltas, lora)
    assert len(rows) == 7 * start.config.num_hidden_layers
    for row in rows:
        assert row["lora_effective_rank"] <= 2 < row["full_effective_rank"]
        assert sum(s > 1e-5 for s in row["lora_singular"]) == 2  # 秩就是 r
    row = rows[3]
    weight = start.get_submodule(row["name"]).weight
    assert row["full_norm"] == pytest.approx((deltas[row["name"]].norm() / weight.norm()).item())
    merged = merge_lora(lora_model).get_submodule(row["name"]).weight
    torch.testing.assert_close(merged - weight, lora[row["name"]], atol=1e-6, rtol=1e-4)


def test_all_directions_are_the_model_and_none_are_the_start(learned):
    start, full, deltas, _, _ = learned
    ids, parts = torch.arange(30)[None], viz.decompose(deltas)
    with torch.no_grad():
        whole = viz.keep_directions(start, full, parts, 10_000)
        torch.testing.assert_close(whole(ids).logits, full(ids).logits, atol=1e-3, rtol=1e-3)
        none = viz.keep_directions(start, full, parts, 0)
    for name in deltas:
        torch.testing.assert_close(none.get_submodule(name).weight, start.get_submodule(name).weight)
    assert torch.equal(none.get_input_embeddings().weight, full.get_input_embeddings().weight)


def test_the_share_outside_by_hand(model):
    """一个矩阵加了平方和 3 的，嵌入加了 1：四分之一在外面。"""
    full = copy.deepcopy(model)
    name = "model.layers.0.self_attn.q_proj"
    with torch.no_grad():
        full.get_submodule(name).weight[0, :3] += 1.0
        full.get_input_embeddings().weight[0, 0] += 1.0
    deltas = viz.full_deltas(model, full, [name])
    assert viz.outside_share(model, full, deltas) == pytest.approx(0.25, abs=1e-5)


def test_layers_and_means():
    assert viz.layer_of("model.layers.11.mlp.up_proj") == 11
    assert viz.layer_of("lm_head") == -1
    rows = [{"layer": 0, "x": 1.0}, {"layer": 0, "x": 3.0}, {"layer": 2, "x": 5.0}]
    assert viz.mean(rows, "x") == 3.0
    assert viz.mean_by(rows, "layer", "x") == {"0": 2.0, "2": 5.0}
    many = [{"layer": i} for i in range(24)]
    assert viz.shown_layers(many) == [0, 12, 23]


def test_the_lesson_and_the_second_run(tmp_path, chat_folder, capsys):
    arguments = [*SMALL, "--model", str(chat_folder), "--output_dir", str(tmp_path / "out")]
    metrics = viz.main(arguments)["metrics"]
    assert metrics["start_logit_difference"] == 0.0
    assert metrics["lora_effective_rank"] <= 2 < metrics["full_effective_rank"]
    assert all(row["lora_norm"] > 0 for row in metrics["modules"])  # B 学到了东西
    assert set(metrics["accuracy_kept"]) == {"0", "1", "2", "4", "8", "16", "32"}
    for name in ("deltas.png", "spectrum.svg", "where.png"):
        assert (tmp_path / "out" / name).stat().st_size > 1000
    capsys.readouterr()
    assert viz.main(arguments)["metrics"] == metrics
    assert "已有训练结果" in capsys.readouterr().out


@pytest.mark.slow
def test_interrupted_and_started_again_ends_the_same(tmp_path, chat_folder, monkeypatch):
    common = [*SMALL, "--model", str(chat_folder)]
    whole = viz.main([*common, "--output_dir", str(tmp_path / "whole")])["metrics"]
    trained = viz.train_on_chats

    def interrupted(part, label, *rest):
        if part.name == "full":
            raise KeyboardInterrupt
        return trained(part, label, *rest)

    monkeypatch.setattr(viz, "train_on_chats", interrupted)
    with pytest.raises(KeyboardInterrupt):
        viz.main([*common, "--output_dir", str(tmp_path / "again")])
    monkeypatch.setattr(viz, "train_on_chats", trained)
    again = viz.main([*common, "--output_dir", str(tmp_path / "again")])["metrics"]
    for name in ("lora_seconds", "full_seconds"):
        whole.pop(name), again.pop(name)
    assert again == whole


def test_bad_input(tmp_path, chat_folder):
    for flags, said in (
        (["--task", "sing"], "--task"),
        (["--r", "0"], "--r"),
        (["--r", "500"], "秩"),
        (["--target", "query_key_value"], "--target"),
        (["--full_learning_rate", "-1"], "--full_learning_rate"),
    ):
        with pytest.raises(UserError, match=said):
            viz.main([*SMALL, "--model", str(chat_folder), "--output_dir", str(tmp_path / "out"), *flags])
