"""run_all.py：每个阶段走两步的整条链；再跑一遍全部跳过；被杀之后接着来；与单独运行各脚本的结果相同。"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nlp_common.base.errors import UserError
from nlp_common.base.runs import load_run

HOME = Path(__file__).resolve().parents[2] / "qwen_chinese_finetune"
STAGES = ["pretrain", "sft", "reward", "dpo", "ppo"]
FEW = {"max_steps": 2, "max_train_samples": 64, "max_eval_samples": 16, "per_device_train_batch_size": 8}
SMALL = ["--preset", "tiny", *(text for name, value in FEW.items() for text in (f"--{name}", str(value)))]
MODEL_METRICS = {
    "qa_accuracy",
    "preferred_rate",
    "judge_score",
    "reward_mean",
    "mean_chars",
    "distinct_2",
    "kl_to_sft",
    "n",
}


def start(*arguments: str, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(HOME / "run_all.py"), *SMALL, *arguments], text=True, **options
    )


def ids(root: Path) -> dict[str, str]:
    return {stage: load_run(root / stage)["id"] for stage in STAGES}


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> tuple[Path, str]:
    root = tmp_path_factory.mktemp("chain") / "结果"
    process = start("--output_dir", str(root), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    return root, out


@pytest.fixture(scope="module")
def run_all(load_script):
    return load_script("run_all")


@pytest.mark.slow
def test_whole_chain_leaves_a_report(chain):
    root, out = chain
    for number, title in enumerate(("预训练", "SFT", "奖励模型", "DPO", "PPO", "对比"), 1):
        assert f"{number}/6 {title}：" in out
    assert out.startswith("预设 tiny") and out.count("预设 tiny") == 1
    report = json.loads((root / "report.json").read_text(encoding="utf-8"))
    assert report["preset"] == "tiny" and report["seed"] == 0
    assert list(report["stages"]) == [*STAGES, "compare"]
    assert report["seconds"] == pytest.approx(sum(s["seconds"] for s in report["stages"].values()), abs=0.11)
    assert report["wall_seconds"] > report["seconds"]
    assert {"loss_over_floor", "recap_accuracy"} <= report["stages"]["pretrain"].keys()
    assert {"pair_accuracy", "train_samples_per_s"} <= report["stages"]["reward"].keys()
    assert {"rollout_s", "scoring_s", "update_s", "reward_mean_before"} <= report["stages"]["ppo"].keys()
    assert list(report["models"]) == ["base", "sft", "dpo", "ppo"]
    for name, metrics in report["models"].items():
        assert metrics.keys() >= MODEL_METRICS and metrics["n"] == 16, name
    # 各阶段自己量的与最后对比量的是同一个数
    for name, metrics in report["models"].items():
        stage = report["stages"]["pretrain" if name == "base" else name]
        for key in metrics.keys() & stage.keys():
            assert metrics[key] == pytest.approx(stage[key], abs=1e-6), (name, key)
    assert "目标" in out and "≤ 1.03" not in out  # 只走两步，不与目标比
    page = (root / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and "<svg" in page


@pytest.mark.slow
def test_second_run_skips_everything(chain, run_all, capsys):
    root, _ = chain
    before, compared = ids(root), load_run(root / "compare")
    run_all.main([*SMALL, "--output_dir", str(root)])
    out = capsys.readouterr().out
    assert out.count("已有训练结果，直接加载") == 5 and "已有比较结果，直接加载" in out
    assert ids(root) == before and load_run(root / "compare") == compared


@pytest.mark.slow
def test_one_process_gives_the_same_models_as_separate_scripts(chain, load_script):
    """前面的阶段用掉的随机数、改过的全局状态，都不影响后面的阶段。"""
    root, _ = chain
    before = ids(root)
    load_script("ppo_alignment").main([*SMALL, "--output_dir", str(root / "ppo"), "--retrain"])
    assert ids(root) == before


@pytest.mark.slow
def test_killed_chain_goes_on(chain, run_all, tmp_path, capsys):
    root = tmp_path / "again"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = start("--output_dir", str(root), start_new_session=True, **quiet)
    deadline = time.time() + 120
    while not (root / "sft").exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (root / "report.json").exists()
    run_all.main([*SMALL, "--output_dir", str(root)])
    assert "已有训练结果" in capsys.readouterr().out and ids(root) == ids(chain[0])


@pytest.mark.slow
def test_until_stops_early_and_reports_only_that(run_all, tmp_path, capsys):
    root = tmp_path / "part"
    run_all.main([*SMALL, "--output_dir", str(root), "--until", "pretrain"])
    assert "1/1 预训练" in capsys.readouterr().out and not (root / "sft").exists()
    report = json.loads((root / "report.json").read_text(encoding="utf-8"))
    assert list(report["stages"]) == ["pretrain"] and report["models"] == {}


def test_full_needs_an_accelerator(run_all, monkeypatch):
    monkeypatch.setattr(run_all, "accelerator_available", lambda: False)
    with pytest.raises(UserError, match="--preset tiny"):
        run_all.main(["--preset", "full"])


def test_bad_arguments(run_all):
    for arguments, hint in ((["--until", "rlhf"], "compare"), (["--steps", "2"], "--steps")):
        with pytest.raises(UserError, match=hint):
            run_all.main(arguments)


def test_record_takes_only_a_whole_fresh_chain(run_all, tmp_path):
    whole = ["--preset", "tiny", "--record", "--output_dir", str(tmp_path)]
    for arguments in (["--max_steps", "2"], ["--model", "smollm2"], ["--per_device_train_batch_size", "4"]):
        with pytest.raises(UserError, match="默认的整条链"):
            run_all.main([*whole, *arguments])
    (tmp_path / "sft").mkdir()
    with pytest.raises(UserError, match="以前的结果"):
        run_all.main(whole)


def test_record_keeps_the_names_of_the_report(run_all, monkeypatch):
    recorded = {}
    monkeypatch.setattr(
        run_all, "record", lambda topic, values, seed: recorded.update({topic: (values, seed)})
    )
    stages = {"sft": {"seconds": 33.0, "qa_accuracy": 1.0}, "compare": {"seconds": 5.0}}
    report = {"stages": stages, "seconds": 38.0, "wall_seconds": 45.0, "peak_memory_mb": 1000.0, "seed": 3}
    run_all.record_report(report)
    whole = {"seconds": 38.0, "wall_seconds": 45.0, "peak_memory_mb": 1000.0}
    assert recorded == {"qwen": ({**stages, "run_all": whole}, 3)}


def test_mac_configuration_on_apple_silicon(run_all, monkeypatch):
    monkeypatch.setattr(run_all, "pick_device", lambda: type("Device", (), {"type": "mps"}))
    assert run_all.load_script("pretrain").PRESETS["full"]["gradient_accumulation_steps"] == 4


@pytest.mark.slow
def test_with_grpo_comes_between_ppo_and_compare(run_all, load_script, monkeypatch, tmp_path, capsys):
    """--with grpo 只添一个阶段；比较时也带上它。不加就与以前一样。"""
    asked = []

    class Script:
        def __init__(self, stage):
            self.stage = stage

        def main(self, arguments):
            asked.append((self.stage, arguments))

    monkeypatch.setattr(run_all, "load_script", Script)
    monkeypatch.setattr(
        run_all, "write_report", lambda *_, **__: {"seconds": 0, "wall_seconds": 0, "stages": {}}
    )
    run_all.main([*SMALL, "--output_dir", str(tmp_path), "--with", "grpo"])
    assert [stage for stage, _ in asked] == [*STAGES, "grpo", "compare"]
    arguments = asked[-1][1]
    assert arguments[arguments.index("--mode") + 1] == "all-grpo"
    assert arguments[arguments.index("--output_dir") + 1] == str(tmp_path / "compare")
    asked.clear()
    run_all.main([*SMALL, "--output_dir", str(tmp_path)])
    assert [stage for stage, _ in asked] == [*STAGES, "compare"] and "--mode" not in asked[-1][1]
    with pytest.raises(UserError, match="不要与 --until sft 一起用"):
        run_all.main([*SMALL, "--output_dir", str(tmp_path), "--with", "grpo", "--until", "sft"])
    with pytest.raises(UserError, match="--with 不认识 dpo"):
        run_all.main([*SMALL, "--with", "dpo"])
