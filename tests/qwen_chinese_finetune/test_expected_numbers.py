"""README 里的数字：从头完整跑一遍 tiny 的整条链，每个目标都要达到。"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HOME = Path(__file__).resolve().parents[2] / "qwen_chinese_finetune"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    root = tmp_path_factory.mktemp("tiny")
    command = [sys.executable, str(HOME / "run_all.py"), "--preset", "tiny", "--output_dir", str(root)]
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=900)
    assert done.returncode == 0, done.stdout
    table = done.stdout.split("各阶段训练前后")[1]
    assert table.count("✓") >= 14 and "✗" not in table, table  # 表里的目标与下面的是一回事
    return json.loads((root / "report.json").read_text(encoding="utf-8"))


def test_every_stage_reaches_its_number(report):
    stages, models = report["stages"], report["models"]
    assert report["seed"] == 0 and all(each["n"] >= 500 for each in models.values())

    pretrain = stages["pretrain"]
    assert pretrain["heldout_loss"] <= 1.03 * pretrain["entropy_floor"]
    assert pretrain["recap_accuracy"] >= 0.98
    assert models["base"]["qa_accuracy"] <= 0.05

    sft = models["sft"]
    assert sft["qa_accuracy"] >= 0.97 and stages["sft"]["ended_rate"] >= 0.99
    assert sft["preferred_rate"] <= 0.5

    assert stages["reward"]["pair_accuracy"] >= 0.97

    dpo = models["dpo"]
    assert dpo["preferred_rate"] >= 0.95
    assert dpo["qa_accuracy"] >= sft["qa_accuracy"] - 0.02

    ppo = models["ppo"]
    assert ppo["reward_mean"] >= sft["reward_mean"] + sft["reward_std"]
    assert ppo["judge_score"] > sft["judge_score"]
    assert ppo["preferred_rate"] >= 0.90
    assert ppo["qa_accuracy"] >= sft["qa_accuracy"] - 0.03
    assert 0 < ppo["kl_to_sft"] < 0.6


def test_memory_stays_small(report):
    assert report["peak_memory_mb"] <= 2048
