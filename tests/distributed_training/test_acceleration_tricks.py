"""acceleration_tricks.py：分块的注意力等于照定义算的，打包、分桶、重算的损失不变，内存的最高点量得对。"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import acceleration_tricks as script
from nlp_common.base.errors import UserError
from nlp_common.lm.losses import IGNORE
from peak_bytes import peak_bytes
from small_gpt import Sizes, make_model
from tiled_attention import TILE, math_attention, sdpa_attention, tiled_attention

SIZES = Sizes(vocab=50, width=16, heads=4, layers=2, inner=32, context=24)
SETTINGS = SimpleNamespace(seed=0, micro_batch_size=2, context=24)


def some_documents():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(50, (n,), generator=generator).tolist() for n in (5, 24, 9, 2, 17, 11)]


# ---------------------------------------------------------------- 分块的注意力


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3 * TILE), st.integers(1, 3), st.integers(1, 9), st.integers(0, 10_000), st.floats(0.1, 30)
)
def test_tiled_equals_the_definition(length, heads, size, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    shape = (2, heads, length, size)
    q, k, v = (
        (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_()
        for _ in range(3)
    )
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    results = []
    for attend in (math_attention, tiled_attention):
        out = attend(q, k, v)
        results.append([out, *torch.autograd.grad((out * weight).sum(), (q, k, v))])
    for ours, wanted in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-11, atol=1e-11 * max(1.0, scale))


def test_within_1e_12_at_ordinary_sizes():
    found = script.tiled_difference(seed=0)
    assert found["tiled_difference"] < 1e-12 and found["sdpa_difference"] < 1e-12


def test_by_hand():
    """两个位置：第一个只看自己；第二个按 softmax(0, ln 3) 看，也就是 1/4 与 3/4。"""
    q = torch.tensor([[[[1.0], [1.0]]]], dtype=torch.float64)
    k = torch.tensor([[[[0.0], [torch.tensor(3.0).log().item()]]]], dtype=torch.float64)
    v = torch.tensor([[[[4.0], [8.0]]]], dtype=torch.float64)
    for attend in (math_attention, tiled_attention, sdpa_attention):
        torch.testing.assert_close(
            attend(q, k, v), torch.tensor([[[[4.0], [7.0]]]], dtype=torch.float64), atol=1e-6, rtol=0
        )


def test_tiled_keeps_no_square_table():
    def peak(attend, length):
        q, k, v = (torch.randn(1, 2, length, 8).requires_grad_() for _ in range(3))
        return peak_bytes(lambda: attend(q, k, v).sum().backward())

    assert peak(math_attention, 512) > 3 * peak(math_attention, 256)
    assert peak(tiled_attention, 512) < 2.5 * peak(tiled_attention, 256)


# ---------------------------------------------------------------- 开关


def test_every_switch_gives_the_same_loss():
    documents = some_documents()
    base = script.Trainer(script.BASE, documents, SIZES, SETTINGS)
    wanted = [base.step() for _ in range(3)]
    for name, switch in script.TRICKS.items():
        if name == "compile":  # 要编译器，另测
            continue
        trainer = script.Trainer(replace(switch, threads=1), documents, SIZES, SETTINGS)
        losses = [trainer.step() for _ in range(3)]
        assert losses == pytest.approx(wanted, abs=0.05 if name == "bf16" else 2e-5), name
        assert trainer.n_labels == base.n_labels == sum(len(row) - 1 for row in documents)


@pytest.mark.slow
def test_compiled_gives_the_same_loss():
    if why := script.cannot_try("compile"):
        pytest.skip(why)
    documents, sizes = some_documents(), replace(SIZES, layers=1)
    trainers = [
        script.Trainer(switch, documents, sizes, SETTINGS)
        for switch in (script.BASE, script.TRICKS["compile"])
    ]
    losses = [[trainer.step() for _ in range(3)] for trainer in trainers]
    assert losses[1] == pytest.approx(losses[0], abs=2e-5)


def test_the_block_is_small_gpts_own():
    model = make_model(SIZES, 0)
    trainer = script.Trainer(script.BASE, some_documents(), SIZES, SETTINGS)
    trainer.model = model
    batch = trainer.batches[0]
    full = 1  # 这一批的第二篇占满了，没有填充
    wanted = model(batch["input_ids"])[full]
    torch.testing.assert_close(trainer.forward(batch)[full], wanted, atol=1e-12, rtol=0)


def test_packed_documents_do_not_see_each_other():
    """打包以后，每一篇的 logits 与单独算的一样。"""
    documents = some_documents()
    trainer = script.Trainer(script.TRICKS["packing"], documents, SIZES, SETTINGS)
    assert len(trainer.batches[0]["input_ids"]) * len(trainer.batches) < len(documents)
    seen = 0
    for batch in trainer.batches:
        logits = trainer.forward(batch)
        for row in range(len(logits)):
            starts = [at for at, place in enumerate(batch["position_ids"][row].tolist()) if place == 0]
            for start in starts:
                labels = batch["labels"][row, start + 1 :]
                size = 1 + (int((labels == IGNORE).nonzero()[0]) if (labels == IGNORE).any() else len(labels))
                ids = batch["input_ids"][row, start : start + size]
                if ids.tolist() in documents:
                    alone = trainer.model(ids[None])[0]
                    torch.testing.assert_close(logits[row, start : start + size], alone, atol=1e-5, rtol=0)
                    seen += 1
    assert seen == len(documents)


def test_own_document_by_hand():
    mask = script.own_document([[[7, 7], [8]]], 4)[0, 0].int().tolist()
    assert mask == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


def test_buckets_pad_less():
    documents = some_documents()
    sizes = {
        batching: sum(b["input_ids"].numel() for b in script.batches_of(documents, batching, SETTINGS))
        for batching in ("random", "buckets")
    }
    assert sizes["buckets"] < sizes["random"]


def test_recomputing_keeps_less():
    documents = [row * 4 for row in some_documents()]
    sizes = replace(SIZES, layers=6, context=96)
    peaks = [
        peak_bytes(script.Trainer(switch, documents, sizes, SETTINGS).step)
        for switch in (script.BASE, script.TRICKS["recompute"])
    ]
    assert peaks[1] < 0.8 * peaks[0]


def test_peak_bytes_by_hand(capfd):
    def work():
        a = torch.zeros(250_000)  # 1 MB
        b = torch.zeros(500_000)  # 2 MB，这时一共 3 MB
        del a
        c = torch.zeros(250_000)
        return b, c

    assert 3_000_000 <= peak_bytes(work) < 3_001_000
    assert capfd.readouterr().err == ""
    with pytest.raises(ZeroDivisionError):
        peak_bytes(lambda: 1 / 0)


def test_verdicts():
    assert script.verdict({"time_low": 0.5, "time_high": 0.9}) == "快"
    assert script.verdict({"time_low": 1.1, "time_high": 1.9}) == "慢"
    assert script.verdict({"time_low": 0.9, "time_high": 1.1}) == "分不出"


def test_what_cannot_be_tried(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(script.shutil, "which", lambda name: None)
    monkeypatch.setattr(script, "CORES", 1)
    assert "编译器" in script.cannot_try("compile")
    assert "一个核" in script.cannot_try("threads")
    assert script.cannot_try("sdpa") is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tricks", "sdpa,flash"], "不认识 flash"),
        (["--width", "30"], "4 的倍数"),
        (["--rounds", "1"], "--rounds"),
    ],
)
def test_wrong_settings(arguments, said):
    with pytest.raises(UserError, match=said):
        script.main(["--preset", "tiny", *arguments])


def test_own_documents(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "LENGTHS", (16,))
    path = tmp_path / "文章.txt"
    path.write_text("从前有座山，山里有座庙。\n庙里有个老和尚\n", encoding="utf-8")
    small = ["--context", "16", "--width", "8", "--layers", "1", "--rounds", "4", "--tricks", "tiled,packing"]
    record = script.main(
        ["--preset", "tiny", "--dataset", str(path), "--output_dir", str(tmp_path / "out"), *small]
    )
    assert set(record["metrics"]["tricks"]) == {"tiled", "packing"}
    assert (tmp_path / "out" / "tricks.svg").read_text(encoding="utf-8").startswith("<svg")
    assert record["metrics"]["tricks"]["tiled"]["loss_difference"] < 1e-5
    assert "分块的注意力" in capsys.readouterr().out
    empty = tmp_path / "空.jsonl"
    empty.write_text('{"text": ""}\n', encoding="utf-8")
    with pytest.raises(UserError, match="没有文章"):
        script.main(
            ["--preset", "tiny", "--dataset", str(empty), "--output_dir", str(tmp_path / "x"), *small]
        )
