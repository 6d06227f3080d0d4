"""LoRA：等于 PEFT；合并不改输出；装不上说得清；没见过的字那几行真的学了；整课走一遍。"""

import copy

import pytest
import torch
from torch import nn

import lora_by_hand as lora
from nlp_common.base.errors import UserError
from nlp_common.lm.chat_rows import answer_loss, chat_row, collate
from nlp_common.tiny import world
from nlp_common.train.lesson import open_result
from nlp_common.train.settings import LoopSettings, parse_settings
from nlp_common.train.sft import train_on_chats
from token_rows import merge_token_rows, train_token_rows

LOOP = {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "max_length": 256, "max_train_samples": 8}


@pytest.fixture
def fresh(model):
    return copy.deepcopy(model).double()


@pytest.fixture(scope="module")
def batch(chat_tokenizer):
    rows = [chat_row(chat_tokenizer, row["messages"]) for row in world.chats(4, 0)]
    return collate(rows, chat_tokenizer.pad_token_id)


def randomise(net) -> None:
    """B 不再是 0，才看得出加没加对。"""
    for layer in lora.lora_layers(net).values():
        nn.init.normal_(layer.B, std=0.1)


def test_forward_and_delta_by_hand():
    linear = nn.Linear(2, 1, bias=True).double()
    layer = lora.LoRALinear(linear, r=1, alpha=3).double()
    with torch.no_grad():
        linear.weight[:], linear.bias[:] = torch.tensor([[1.0, 2.0]]), 0.5
        layer.A[:], layer.B[:] = torch.tensor([[1.0, -1.0]]), 2.0
    x = torch.tensor([[[3.0, 1.0]]], dtype=torch.float64)
    # Wx + b = 3 + 2 + 0.5；(α/r)·B(Ax) = 3 · 2 · (3 − 1)
    assert layer(x).item() == pytest.approx(5.5 + 12)
    assert layer.delta().tolist() == [[6.0, -6.0]]


def test_nothing_changes_at_the_start(fresh, batch):
    before = answer_loss(fresh, batch)[0]
    names = lora.add_lora(fresh, "all", r=4, alpha=8)
    fresh.double()
    assert answer_loss(fresh, batch)[0].item() == before.item()
    assert len(names) == 14 and all(not p.requires_grad for n, p in fresh.named_parameters() if ".base." in n)


def test_the_count_is_r_times_both_sides(fresh):
    lora.add_lora(fresh, "mlp", r=3, alpha=6)
    expected = sum(
        3 * (layer.base.in_features + layer.base.out_features) for layer in lora.lora_layers(fresh).values()
    )
    assert sum(p.numel() for p in lora.trainable(fresh).values()) == expected > 0


def test_merging_and_unmerging_keep_the_output(fresh, batch):
    lora.add_lora(fresh, "all", r=4, alpha=8)
    fresh.double()
    randomise(fresh)
    before = answer_loss(fresh, batch)[0].item()
    for layer in lora.lora_layers(fresh).values():
        layer.merge()
        layer.merge()  # 再合一次也只合一次
    assert answer_loss(fresh, batch)[0].item() == pytest.approx(before, abs=1e-9)
    for layer in lora.lora_layers(fresh).values():
        layer.unmerge()
    assert answer_loss(fresh, batch)[0].item() == pytest.approx(before, abs=1e-9)
    lora.merge_lora(fresh)
    assert not lora.lora_layers(fresh)
    assert answer_loss(fresh, batch)[0].item() == pytest.approx(before, abs=1e-9)


@pytest.mark.parametrize("target", ["all", "attention", "q_proj, v_proj"])
def test_equals_peft(target, model, chat_tokenizer):
    """损失、每个梯度、三步 AdamW：float64，不到 1e-9。"""
    pytest.importorskip("peft")
    import types

    from lora_peers import difference_to_peft

    settings = types.SimpleNamespace(r=4, alpha_over_r=2.0, target=target)
    ids = [5, 300, 301]
    assert difference_to_peft(model, chat_tokenizer, world.chats(4, 0), settings, ids) < 1e-9


def test_token_rows_are_the_only_rows_that_move(fresh, batch, chat_tokenizer):
    original = fresh.get_input_embeddings().weight.detach().clone()
    lora.add_lora(fresh, "all", r=2, alpha=4)
    used = batch["input_ids"].unique().tolist()[:3]
    train_token_rows(fresh, used)
    fresh.double()
    optimizer = torch.optim.AdamW(lora.trainable(fresh).values(), 1e-2, weight_decay=0.0)
    answer_loss(fresh, batch)[0].backward()
    optimizer.step()
    after = answer_loss(fresh, batch)[0].item()
    lora.merge_lora(fresh)
    merge_token_rows(fresh)
    moved = (fresh.get_input_embeddings().weight != original).any(1).nonzero().flatten().tolist()
    assert moved == sorted(used)
    assert fresh.lm_head.weight is fresh.get_input_embeddings().weight  # 仍然共用
    assert answer_loss(fresh, batch)[0].item() == pytest.approx(after, abs=1e-9)


def test_a_target_that_matches_nothing_lists_what_there_is(fresh):
    with pytest.raises(UserError, match=r"c_attn 一个线性层也不合.*q_proj"):
        lora.add_lora(fresh, "c_attn", r=4, alpha=8)
    with pytest.raises(UserError, match=r"--target 里的 v_porj 一个线性层也不合"):
        lora.add_lora(fresh, "q_proj，v_porj", r=4, alpha=8)
    assert {name.rsplit(".", 1)[-1] for name in lora.matching_linears(fresh, "q_proj， v_proj")} == {
        "q_proj", "v_proj",
    }  # fmt: skip


def test_a_rank_above_the_matrix_is_refused(fresh):
    with pytest.raises(UserError, match=r"--r 500 比 .* 的秩还大"):
        lora.add_lora(fresh, "all", r=500, alpha=8)


@pytest.mark.parametrize("recompute", ["false", "true"])
def test_the_adapter_really_trains(recompute, model, chat_tokenizer, tmp_path):
    """B 离开了 0，重算激活时也一样（冻住的嵌入曾经把图切断）；底座一个数也没有变。"""
    settings = parse_settings(
        LoopSettings, {"tiny": LOOP, "full": {}}, ["--preset", "tiny", "--gradient_checkpointing", recompute]
    )
    net = copy.deepcopy(model)
    frozen = {name: p.detach().clone() for name, p in net.named_parameters()}
    lora.add_lora(net, "all", r=2, alpha=4)
    with open_result(tmp_path / "r", "r", settings, {"x": 1}) as stage:
        train_on_chats(stage, "LoRA", net, chat_tokenizer, world.chats(8, 0))
        stage.save({}, {})
    assert all(layer.B.abs().max() > 0 for layer in lora.lora_layers(net).values())
    for name, p in net.named_parameters():
        if not p.requires_grad:
            assert torch.equal(p, frozen[name.replace(".base", "")]), name


def test_the_same_adapter_with_and_without_recomputing(model, batch):
    """重算激活，梯度不变。"""
    gradients = []
    for recompute in (False, True):
        net = copy.deepcopy(model).train()
        lora.add_lora(net, "all", r=2, alpha=4)
        net.double()
        torch.manual_seed(1)
        for layer in lora.lora_layers(net).values():
            nn.init.normal_(layer.A)
            nn.init.normal_(layer.B, std=0.1)
        if recompute:
            from nlp_common.train.setup import recompute_activations

            recompute_activations(net)
        answer_loss(net, batch)[0].backward()
        gradients.append([p.grad for p in lora.trainable(net).values()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again, rtol=1e-6, atol=1e-5)


def test_numbers_written_wrong_are_said():
    with pytest.raises(UserError, match="--ranks 要是逗号分开的数"):
        lora.main(["--preset", "tiny", "--ranks", "四"])
    for flags in (["--ranks", "0"], ["--full_rates=-1"], ["--lora_rates", "1e-2,0"]):
        with pytest.raises(UserError, match="都要大于 0"):
            lora.main(["--preset", "tiny", *flags])


def test_a_rank_too_large_is_said_before_the_sweep(chat_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(lora, "run_part", lambda *_: pytest.fail("已经开始训练了"))
    flags = ["--preset", "tiny", "--model", str(chat_folder), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(UserError, match=r"--r 500 比 .* 的秩还大"):
        lora.main([*flags, "--max_train_samples", "4", "--ranks", "4，500"])


def test_the_lesson_runs_and_loads(chat_folder, tmp_path):
    out = str(tmp_path / "out")
    few = [
        "--preset",
        "tiny",
        "--model",
        str(chat_folder),
        "--max_train_samples",
        "16",
        "--max_eval_samples",
        "4",
    ]
    few += [
        "--full_rates",
        "2e-3",
        "--lora_rates",
        "1e-2",
        "--ranks",
        "1,2",
        "--targets",
        "all",
        "--output_dir",
        out,
    ]
    record = lora.main(few)
    metrics = record["metrics"]
    assert {"qa_accuracy_full", "qa_accuracy_lora", "trainable_share"} <= set(metrics)
    assert metrics["table"]["all"]["2"]["trainable"] > metrics["table"]["all"]["1"]["trainable"]
    assert (tmp_path / "out" / "ranks.svg").exists()
    assert lora.main(few)["id"] == record["id"]
    with pytest.raises(UserError, match="没有 --dry_run"):
        lora.main([*few, "--dry_run"])
