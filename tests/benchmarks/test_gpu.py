"""benchmarks/gpu.py：没有 GPU 也跑得通；必须做的浮点运算，与 torch 数出来的一样多。"""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Config, Qwen2ForCausalLM

from nlp_common.base.errors import UserError
from nlp_common.lm.loading import make_fast
from nlp_common.lm.packing import collate_blocks
from nlp_common.lm.pairs import collate_pairs
from nlp_common.tiny import qwen

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu():
    spec = importlib.util.spec_from_file_location("benchmark_gpu", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def net():
    """分组的键值头、与宽度不同的 MLP：算式里的 A、K、I 写混了就看得出来。"""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=500,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return make_fast(Qwen2ForCausalLM(config)).train()


def step(gpu, stage: str, net, rows: list) -> None:
    """我们的循环在一步里做的前向与反向；DPO 加上参考模型的一次前向。"""
    if stage == "pretrain":
        return gpu.pretrain.causal_lm_loss(net, collate_blocks(rows, 64, 0))[0].backward()
    if stage == "sft":
        return gpu.sft.answer_loss(net, gpu.sft.collate(rows, 0))[0].backward()
    batch = collate_pairs(rows, 0)
    with torch.no_grad():
        ref = gpu.dpo.sequence_logps(net, **batch)
    loss, _ = gpu.dpo.dpo_loss(*gpu.dpo.sequence_logps(net, **batch).chunk(2), *ref.chunk(2), 0.1)
    loss.mean().backward()


@pytest.mark.parametrize(("stage", "off"), [("pretrain", 0.02), ("sft", 0.005), ("dpo", 0.005)])
def test_the_flops_are_those_torch_counts(gpu, net, stage, off, monkeypatch):
    """DPO 的算式是两条分开算的次数；一对的提示只算一遍省下的（nlp_common/fast/shared_prompts.py）不从里面减。"""
    monkeypatch.setattr("nlp_common.fast.columns.merge_pairs", lambda *_: None)
    rows = gpu.random_rows(stage, 3, SimpleNamespace(length=64), net.config.vocab_size)
    # CPU 上的融合注意力，torch 的计数器不认得，换成一步步算的
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step(gpu, stage, net, rows)
    formula = sum(gpu.row_flops(stage, net.config, row) for row in rows)
    # 预训练差一列：最后一个位置没有标签，脚本照样算了它的 logits
    assert formula == pytest.approx(counter.get_total_flops(), rel=off)


def test_the_full_size_is_close_to_six_times_the_parameters(gpu):
    config = gpu.qwen_0_5b()  # 嵌入与 LM head 共用，所以参数里的 V·H 正好是 LM head 的
    n = 463_987_712
    assert 3 * gpu.forward_flops(config, 512, 512) == pytest.approx(6 * n * 512, rel=0.1)


@pytest.mark.slow
def test_tiny_runs_every_row(gpu, capsys):
    rows = gpu.main(["--tiny", "--steps", "1", "--peak_tflops", "0.05"])
    sides = ["ours", "library", "trl_default", "trl_no_checkpointing"]
    expected = [("pretrain", "ours"), ("pretrain", "library")]
    expected += [*(("sft", s) for s in sides), *(("dpo", s) for s in sides)]
    assert [(row["stage"], row["side"]) for row in rows] == [*expected, ("ppo", "ours")]
    for row in rows[:-1]:
        assert "error" not in row
        tokens = 2 * 32 * (2 if row["stage"] == "dpo" else 1)  # 批 2，长 32；DPO 一对两条
        assert row["tokens_per_s"] * row["step_s"] == pytest.approx(tokens, rel=0.01)
        assert row["mfu"] == pytest.approx(row["model_tflops"] / 0.05) and row["mfu"] > 0
    assert rows[-1]["episodes_per_s"] > 0 and rows[-1]["update_s"] > 0
    printed = capsys.readouterr().out
    assert [json.loads(line) for line in printed.splitlines() if line.startswith('{"stage"')] == rows
    table = [line for line in printed.splitlines() if line.startswith("| ")]
    assert len(table) == 1 + len(rows)


def test_a_tokenizer_gives_text_rows(gpu):
    tokenizer = qwen.build_tokenizer()
    for stage in gpu.SIDES:
        rows = gpu.text_rows(stage, 6, SimpleNamespace(length=256), tokenizer)
        assert len(rows) == 6
        for row in rows if stage != "ppo" else ():
            assert all(0 < labels < n <= 256 for n, labels in gpu.sequences_of(stage, row))
    with pytest.raises(UserError, match="--length"):
        gpu.text_rows("sft", 6, SimpleNamespace(length=8), tokenizer)


def test_peaks_and_refusals(gpu, monkeypatch):
    cuda = torch.device("cuda")
    for name, peak in (("NVIDIA H100 PCIe", 756), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA L40S", 362)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert gpu.find_peak(cuda, None) == peak and gpu.find_peak(cuda, 7.0) == 7.0
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "没见过的卡")
    assert gpu.find_peak(cuda, None) is None
    monkeypatch.setattr(gpu, "pick_device", lambda: torch.device("cpu"))
    with pytest.raises(UserError, match="--tiny"):
        gpu.main([])
    with pytest.raises(UserError, match="--length"):
        gpu.main(["--tiny", "--length", "2"])
