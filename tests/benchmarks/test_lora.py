"""benchmarks/lora.py：两边学的参数一样多、算的是同一件事；量出来的数都在。"""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "lora.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("lora_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclass 要从这里找到它的类型
    spec.loader.exec_module(module)
    return module


def test_our_side_trains_and_says_what(bench, tmp_path, capsys):
    folder = tmp_path / "tiny"
    bench.prepare(folder, "tiny", 20)
    found = {side: bench.run_ours(folder, side == "lora") for side in ("lora", "full")}
    for row in found.values():
        assert row["rows_per_s"] > 0 and row["peak_memory_mb"] >= row["grown_memory_mb"]
    _, model = bench.load_causal_lm(str(folder / "model"))
    assert found["full"]["trainable"] == sum(p.numel() for p in model.parameters())
    linears = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layers" in n]
    assert found["lora"]["trainable"] == sum(bench.R * (m.in_features + m.out_features) for m in linears)


def test_the_wide_model_is_wide(bench, tmp_path):
    bench.prepare(tmp_path / "wide", "wide", 2)
    _, model = bench.load_causal_lm(str(tmp_path / "wide" / "model"))
    assert model.config.hidden_size == 512 and len(model.model.layers) == 4
    assert len(bench.load_chats(tmp_path / "wide")) == 2


def test_trl_learns_the_same_adapter(bench, tmp_path):
    for name in ("peft", "trl", "datasets"):
        pytest.importorskip(name, reason=f"要 {name} 才比得了")
    folder = tmp_path / "tiny"
    bench.prepare(folder, "tiny", 8)
    theirs = bench.run_trl(folder, checkpointing=False)
    assert theirs["rows_per_s"] > 0
    assert theirs["trainable"] == bench.run_ours(folder, lora=True)["trainable"]


def test_the_row_is_made_of_medians(bench, tmp_path, monkeypatch):
    """LoRA 100、110、400 行，取 110；TRL 较快的是 55：2 倍。全参数 77 行：LoRA 一步是 0.7。"""
    speeds = {
        "lora": [100.0, 400.0, 110.0],
        "full": [77.0] * 3,
        "trl_default": [20.0] * 3,
        "trl_no_checkpointing": [55.0] * 3,
    }
    runs = {side: iter(each) for side, each in speeds.items()}

    def run_side(side, folder):
        return {
            "rows_per_s": next(runs[side]),
            "peak_memory_mb": 500.0,
            "grown_memory_mb": 100.0,
            "trainable": 1000 if side == "full" else 10,
        }

    monkeypatch.setattr(bench, "run_side", run_side)
    row = bench.compare("tiny", 16, 3, tmp_path / "tiny")
    assert row["ratio"] == 2.0 and row["step_over_full"] == 0.7
    assert row["step_lora_ms"] == pytest.approx(1000 * 16 / 110, abs=0.01)
    assert json.loads(json.dumps(row)) == row
    numbers = {name for name in row if name.startswith(("step_", "peak_", "grown_"))}
    assert numbers <= set(bench.units())


def test_the_real_model_runs_against_full_only(bench, tmp_path, monkeypatch):
    """英文的常识题轮着用；一步也有一批；没有 TRL 的一边。"""
    monkeypatch.setattr(bench.smollm2, "export", lambda folder: folder.mkdir())
    asked = []

    def run_side(side, folder):
        asked.append(side)
        speed = 3.0 if side == "lora" else 2.0
        return {"rows_per_s": speed, "peak_memory_mb": 9.0, "grown_memory_mb": 5.0, "trainable": 10}

    monkeypatch.setattr(bench, "run_side", run_side)
    row = bench.compare("smollm2", 80, 1, tmp_path / "smollm2")
    assert asked == ["lora", "full"] and row["step_over_full"] == 0.667 and "ratio" not in row
    chats = bench.load_chats(tmp_path / "smollm2")
    assert len(chats) == 80 and chats[0]["messages"][0]["content"].isascii()


def test_a_missing_package_skips_the_real_model(bench, monkeypatch, capsys):
    monkeypatch.setattr(bench.smollm2, "packages_installed", lambda: False)
    assert bench.main(["--sizes", "smollm2"]) == []
    assert "pip install" in capsys.readouterr().err


def test_too_few_rows_is_said(bench, capsys):
    with pytest.raises(SystemExit):
        bench.main(["--rows", "16"])
    assert "--rows" in capsys.readouterr().err
