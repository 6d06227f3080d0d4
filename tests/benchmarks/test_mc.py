"""benchmarks/mc.py：与 lm_eval 轮流跑一遍，两边的分数相同；快慢不在这里断言。"""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script():
    pytest.importorskip("lm_eval", reason="与它比：pip install lm_eval==0.4.13")
    spec = importlib.util.spec_from_file_location("benchmark_mc", ROOT / "benchmarks" / "mc.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("how", "shots"), [("text", "0"), ("letter", "2")])
def test_both_give_the_same_scores(script, chat_folder, how, shots, capsys):
    options = ["--model", str(chat_folder), "--how", how, "--shots", shots, "--limit", "5", "--rounds", "1"]
    row = script.main([*options, "--batch_sizes", "2"])
    assert row["questions"] == 5 and row["same"] == 1 and row["max_logp_difference"] < 1e-3
    assert '"ratio"' in capsys.readouterr().out
