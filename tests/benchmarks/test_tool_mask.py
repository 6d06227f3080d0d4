"""benchmarks/tool_mask.py：与 xgrammar 轮流跑一遍，许可的 token 相同；快慢不在这里断言。"""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_both_allow_the_same(capsys):
    pytest.importorskip("xgrammar", reason="与它比：pip install --no-deps xgrammar apache-tvm-ffi")
    spec = importlib.util.spec_from_file_location("benchmark_tool_mask", ROOT / "benchmarks" / "tool_mask.py")
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script
    spec.loader.exec_module(script)
    row = script.main(["--n", "4", "--rounds", "1"])
    assert row["different"] == 0 and row["tokens"] > 100
    assert '"xgrammar_mean_ms"' in capsys.readouterr().out
