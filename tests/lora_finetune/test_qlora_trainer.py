"""qlora_trainer.py：损失等于 bitsandbytes + PEFT，四位的底座没有动、B 学到了，重算激活也学，只算内存，中断续跑，说错的话。"""

import copy

import pytest
import torch
from safetensors.torch import load_file

import qlora_dry_run
import qlora_trainer as script
from adapter_files import load_adapter
from finetune_memory import four_bit_bytes
from lora_by_hand import add_lora, lora_layers, trainable
from nf4 import NF4Linear, quantize_model
from nlp_common.base.errors import UserError
from nlp_common.lm.adapters import check_base
from nlp_common.lm.chat_rows import answer_loss, chat_row, collate
from nlp_common.lm.loading import load_causal_lm
from nlp_common.lm.losses import count_labels
from nlp_common.tiny import world
from nlp_common.train import loop
from qlora_peers import BLOCK, copy_scales, losses, peft_model

FEW = ["--preset", "tiny", "--max_train_samples", "24", "--max_eval_samples", "8", "--n_questions", "4"]


@pytest.fixture(scope="module")
def start(base_folder):
    return load_causal_lm(str(base_folder))


@pytest.fixture(scope="module")
def batches(start):
    rows = [chat_row(start[0], chat["messages"]) for chat in world.chats(12, 0)]
    return [collate(rows[i : i + 4], start[0].pad_token_id) for i in (0, 4, 8)]


def mean_loss(model, batch):
    return answer_loss(model, batch)[0] / count_labels(batch)


# ---- 与 bitsandbytes + PEFT 比 ----


@pytest.mark.parametrize("double", [False, True])
def test_losses_equal_bitsandbytes_and_peft(start, batches, double):
    pytest.importorskip("bitsandbytes", reason="与它的 Linear4bit 比：没有装，跳过")
    pytest.importorskip("peft", reason="与 PEFT 比：没有装，跳过")
    torch.manual_seed(0)
    ours = copy.deepcopy(start[1])
    quantize_model(ours, "nf4", BLOCK, double)
    add_lora(ours, "all", 4, alpha=8)
    theirs = peft_model(start[1], ours, "nf4", double)
    if double:
        copy_scales(ours, theirs)
    ours_losses, their_losses = (losses(model, batches, mean_loss, 1e-2) for model in (ours, theirs))
    assert ours_losses == pytest.approx(their_losses, abs=1e-5)
    assert ours_losses[2] < ours_losses[0]  # 真的在学


# ---- 底座不动，适配器学 ----


def test_only_the_adapters_move(start, batches):
    torch.manual_seed(0)
    model = copy.deepcopy(start[1])
    quantize_model(model)
    add_lora(model, "all", 4, alpha=8)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    losses(model, batches, mean_loss, 1e-2)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert all(layer.B.any() for layer in lora_layers(model).values())
    assert all(isinstance(layer.base, NF4Linear) for layer in lora_layers(model).values())
    assert sum(p.numel() for p in trainable(model).values()) == sum(
        4 * (layer.base.in_features + layer.base.out_features) for layer in lora_layers(model).values()
    )


def test_bytes_of_the_base(start):
    model = copy.deepcopy(start[1])
    add_lora(model, "all", 4, alpha=8)
    plain = script.linear_bytes(model)
    quantize_model(model)  # 先装 LoRA 再量化也行：换的是它的底座
    weights = [layer.base for layer in lora_layers(model).values()]
    assert script.linear_bytes(model) == sum(four_bit_bytes(w.in_features * w.out_features) for w in weights)
    assert plain / script.linear_bytes(model) > 7.5


def test_learning_with_recomputed_activations(start, batches):
    """嵌入冻住、又重算激活：走出的几步与不重算的相同，A、B 都学。"""
    settings = script.parse_settings(
        script.QLoRASettings, script.PRESETS, [*FEW, "--gradient_checkpointing", "True"]
    )
    models = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = copy.deepcopy(start[1])
        quantize_model(model)
        settings.gradient_checkpointing = recompute
        script.equip(model, settings, [])
        if recompute:
            model.gradient_checkpointing_enable()
        models.append(model)
    plain, recomputed = (losses(model, batches, mean_loss, 1e-2) for model in models)
    assert recomputed == pytest.approx(plain, abs=1e-5)


def test_unseen_tokens_are_the_chat_ones(start):
    tokenizer = start[0]
    rows = [chat_row(tokenizer, chat["messages"]) for chat in world.chats(50, 0)]
    found = script.unseen_tokens(tokenizer, rows)
    assert tokenizer.convert_tokens_to_ids("<|im_start|>") in found
    assert tokenizer("小", add_special_tokens=False).input_ids[0] not in found


# ---- 像读者一样运行 ----


def test_run_second_run_and_files(tmp_path, base_folder, capsys):
    argv = [*FEW, "--model", str(base_folder), "--output_dir", str(tmp_path / "out")]
    metrics = script.main(argv)["metrics"]
    assert set(metrics["bases"]) == {"none", "nf4"}
    assert metrics["base_shrunk"] > 7.5 and metrics["step_time_ratio"] > 0
    assert metrics.get("max_difference_to_bitsandbytes", 0.0) < 1e-5
    assert {"qa_accuracy_lora", "qa_accuracy_nf4"} <= set(metrics)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"adapter-none.safetensors", "adapter-nf4.safetensors", "qlora.svg", "run.json"} <= names
    check_base(tmp_path / "out" / "adapter-nf4", load_causal_lm(str(base_folder))[1], str(base_folder))
    layers = load_adapter(tmp_path / "out" / "adapter-nf4").layers  # PEFT 的布局，与另一份相同
    tensors = load_file(tmp_path / "out" / "adapter-nf4.safetensors")
    assert len(layers) == 14
    assert all(torch.equal(layer.A, tensors[f"{name}.A"]) for name, layer in layers.items())
    capsys.readouterr()
    assert script.main(argv)["metrics"] == metrics
    assert "直接加载" in capsys.readouterr().out


@pytest.mark.slow
def test_an_interrupted_run_goes_on(tmp_path, base_folder, monkeypatch, capsys):
    argv = [*FEW, "--max_steps", "2", "--model", str(base_folder), "--output_dir", str(tmp_path / "out")]
    real = script.train_one

    def interrupted(part, base, *args, **more):
        if base == "nf4":
            raise KeyboardInterrupt
        return real(part, base, *args, **more)

    monkeypatch.setattr(script, "train_one", interrupted)
    with pytest.raises(KeyboardInterrupt):
        script.main(argv)
    monkeypatch.setattr(script, "train_one", real)
    capsys.readouterr()
    resumed = script.main(argv)["metrics"]
    assert "none：上次中断以前做完了" in capsys.readouterr().out
    whole = script.main([*argv[:-1], str(tmp_path / "whole")])["metrics"]
    for base in ("none", "nf4"):
        assert resumed["bases"][base]["heldout_loss"] == whole["bases"][base]["heldout_loss"]


def test_a_run_killed_within_a_training_goes_on_from_the_checkpoint(
    tmp_path, base_folder, monkeypatch, capsys
):
    argv = [*FEW, "--model", str(base_folder), "--bases", "nf4", "--save_steps", "1"]
    argv += ["--per_device_train_batch_size", "4", "--output_dir"]
    real, steps = loop.update, []

    def killed(*args):
        if len(steps) == 3:
            raise KeyboardInterrupt
        steps.append(0)
        return real(*args)

    monkeypatch.setattr(loop, "update", killed)
    with pytest.raises(KeyboardInterrupt):
        script.main([*argv, str(tmp_path / "out")])
    monkeypatch.setattr(loop, "update", real)
    capsys.readouterr()
    script.main([*argv, str(tmp_path / "out")])
    assert "checkpoint-3" in capsys.readouterr().out
    script.main([*argv, str(tmp_path / "whole")])
    resumed, whole = (load_file(tmp_path / name / "adapter-nf4.safetensors") for name in ("out", "whole"))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_dry_run_of_the_small_and_the_seven_billion(capsys, monkeypatch):
    found = script.main([*FEW, "--dry_run"])["dry_run"]
    assert found["nf4"]["weights"] < found["none"]["weights"]
    monkeypatch.setattr(qlora_dry_run, "find_model", lambda *_: None)  # 不联网
    monkeypatch.setattr(script, "import_bitsandbytes", lambda: None)
    found = script.main(["--preset", "full", "--dry_run"])["dry_run"]
    assert found["parameters"] == 7_615_616_512
    assert 8e9 < found["nf4"]["total"] < 16e9
    assert "内置的尺寸表" in capsys.readouterr().out


@pytest.mark.parametrize(
    "extra, said",
    [
        (["--bases", "nf5"], r"--bases 不认识 nf5，可以是 none、nf4、fp4、int4"),
        (["--bases", "int4", "--backend", "bitsandbytes"], "没有 int4"),
        (["--trainer", "library"], "去掉 --trainer library"),
        (["--r", "0"], "--r 要是正整数"),
    ],
)
def test_wrong_settings_are_said(extra, said):
    with pytest.raises(UserError, match=said):
        script.main([*FEW, *extra])


def test_wrong_targets_and_ranks_are_said(tmp_path, base_folder):
    argv = [*FEW, "--model", str(base_folder), "--bases", "nf4", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(UserError, match=r"一个线性层也不合.*q_proj"):
        script.main([*argv, "--target", "c_attn"])
    with pytest.raises(UserError, match=r"--r 500 比 .* 的秩还大"):
        script.main([*argv, "--r", "500"])


def test_a_run_that_learned_nothing_is_said(tmp_path, base_folder):
    """只走一步：预热的第一步学习率是 0。"""
    argv = [*FEW, "--model", str(base_folder), "--bases", "nf4", "--max_steps", "1"]
    with pytest.raises(UserError, match=r"14 层的 B 还是 0.*--max_steps"):
        script.main([*argv, "--output_dir", str(tmp_path / "out")])


def test_bitsandbytes_on_the_cpu_refuses_odd_widths(tmp_path, base_folder):
    """宽 352 的 down_proj 不是 64 的倍数，它在 CPU 上还原不对。"""
    pytest.importorskip("bitsandbytes", reason="要用它的底座：没有装，跳过")
    argv = [*FEW, "--model", str(base_folder), "--bases", "nf4", "--backend", "bitsandbytes"]
    with pytest.raises(UserError, match=r"还原不对宽 352 的矩阵.*--backend ours"):
        script.main([*argv, "--output_dir", str(tmp_path / "out")])


def test_without_bitsandbytes_it_says_what_to_install(monkeypatch):
    import nf4

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(nf4.importlib, "import_module", missing)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        script.main([*FEW, "--optimizer", "adamw_8bit"])
