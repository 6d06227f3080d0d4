"""各种方法一张表：每种学的参数个数算得出来，装好时输出不变，整课走一遍。"""

import copy

import pytest
import torch

import compare_peft as compare
from lora_by_hand import trainable
from nf4 import quantize_model
from nlp_common.base.errors import UserError
from nlp_common.lm.chat_rows import answer_loss, chat_row, collate
from nlp_common.tiny import world

HAND = ["full", "biases", "lora_r1", "lora_r4", "lora_r16"]
PEFT = ["rslora_r16", "dora_r4", "ia3"]
EXAMPLE = list(range(40, 60))


@pytest.fixture(scope="module")
def batch(chat_tokenizer):
    rows = [chat_row(chat_tokenizer, row["messages"]) for row in world.chats(3, 0)]
    return collate(rows, chat_tokenizer.pad_token_id)


@pytest.mark.parametrize("name", [*HAND, *PEFT])
def test_the_start_is_the_same_model(name, model, batch):
    """还没有训练，装上什么都不改输出（4 位的底座、虚拟 token 除外）。"""
    if name in PEFT:
        pytest.importorskip("peft")
    before = answer_loss(model, batch)[0].item()
    assert answer_loss(compare.equip(model, name, EXAMPLE), batch)[0].item() == pytest.approx(
        before, rel=1e-5
    )


def linears(model):
    return [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]


def test_counts_by_hand(model):
    sides = [layer.in_features + layer.out_features for layer in linears(model)]
    outs = sum(layer.out_features for layer in linears(model))
    counted = {n: sum(p.numel() for p in trainable(compare.equip(model, n, EXAMPLE)).values()) for n in HAND}
    assert counted["full"] == sum(p.numel() for p in model.parameters())
    assert counted["biases"] == sum(p.numel() for n, p in model.named_parameters() if n.endswith("bias"))
    for r in (1, 4, 16):
        assert counted[f"lora_r{r}"] == r * sum(sides)
    pytest.importorskip("peft")
    dora = sum(p.numel() for p in trainable(compare.equip(model, "dora_r4", EXAMPLE)).values())
    assert dora == 4 * sum(sides) + outs  # 每个输出另有一个长度
    virtual = compare.equip(model, "prompt", EXAMPLE)
    assert sum(p.numel() for p in trainable(virtual).values()) == 8 * model.config.hidden_size


def test_bytes_count_shared_weights_once_and_four_bits_as_four(model):
    plain = sum(p.numel() for p in model.parameters()) * 4
    assert compare.weight_bytes(model) == plain
    small = copy.deepcopy(model)
    quantize_model(small)
    weights = sum(layer.weight.numel() for layer in linears(model))
    saved = plain - compare.weight_bytes(small)
    assert 0.84 * 4 * weights < saved < 0.875 * 4 * weights  # 32 位变成四位多


def test_summary_has_the_standard_error():
    found = compare.summary([{"accuracy": a, "forgotten": 0.1} for a in (0.7, 0.8, 0.9)])
    assert found["accuracy"] == pytest.approx(0.8) and found["accuracy_error"] == pytest.approx(0.1 / 3**0.5)


def test_unknown_methods_and_tasks_are_said():
    with pytest.raises(UserError, match=r"不认识 lora_r3.*lora_r4"):
        compare.main(["--preset", "tiny", "--methods", "lora_r3"])
    with pytest.raises(UserError, match="--task 不认识"):
        compare.main(["--preset", "tiny", "--task", "poem"])


def test_the_table_is_filled(chat_folder, tmp_path):
    out = ["--output_dir", str(tmp_path / "out"), "--model", str(chat_folder)]
    few = ["--preset", "tiny", "--max_train_samples", "8", "--n_questions", "4", "--seeds", "2"]
    record = compare.main([*few, "--methods", "lora_r1,nf4_lora_r4,prefix", *out])
    metrics = record["metrics"]
    for name in ("lora_r1", "nf4_lora_r4", "prefix"):
        keys = {
            "trainable",
            "trainable_share",
            "bytes",
            "seconds",
            "accuracy",
            "forgotten",
            "forgotten_error",
        }
        assert keys <= set(metrics[name])
    assert metrics["nf4_lora_r4"]["bytes"] < metrics["lora_r1"]["bytes"]
    assert (tmp_path / "out" / "methods.svg").exists()
    assert compare.main([*few, "--methods", "lora_r1,nf4_lora_r4,prefix", *out])["id"] == record["id"]
