"""benchmarks/crf.py：两边是同一批、同一组参数，量出来的数都在。"""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "crf.py"


def test_both_sides_do_the_same_work():
    pytest.importorskip("torchcrf", reason="要 pytorch-crf 才比得了")
    spec = importlib.util.spec_from_file_location("crf_benchmark", SCRIPT)
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    found = bench.measure((4, 7, 5), rounds=1, repeats=1)
    assert found["same_decoding"] and found["max_gradient_difference"] < 1e-4
    assert all(
        found[f"{name}_sentences_per_s"] > 0 and found[f"times_{name}"] > 0
        for name in ("training", "decoding")
    )
