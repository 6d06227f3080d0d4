"""每个训练阶段：中途被 kill -9 或 Ctrl-C，再运行同一条命令，结果与不中断的完全相同。"""

import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

HOME = Path(__file__).resolve().parents[2] / "qwen_chinese_finetune"
pytestmark = pytest.mark.slow
SCRIPTS = {
    "pretrain": "pretrain_chinese-nvidia.py",
    "sft": "sft_chinese_qwen.py",
    "reward": "reward_model.py",
    "dpo": "dpo_chinese_qwen.py",
    "ppo": "ppo_alignment.py",
    "grpo": "grpo_alignment.py",
}
SMALL = [
    *("--preset", "tiny", "--max_train_samples", "200", "--max_eval_samples", "8"),
    *(
        "--max_steps",
        "8",
        "--save_steps",
        "2",
        "--per_device_train_batch_size",
        "4",
    ),
]
# 只比与时间无关的数
TIMED = {"train_samples_per_s", "train_tokens_per_s", "train_seconds", "reference_seconds", "episodes_per_s"}
TIMED |= {"rollout_s", "scoring_s", "update_s", "completions_per_s"}


def run_in_process(stage: str, arguments: list[str]) -> dict:
    spec = importlib.util.spec_from_file_location(f"stage_{stage}", HOME / SCRIPTS[stage])
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.main(arguments)


def outcome(run: dict) -> dict:
    return {"id": run["id"]} | {k: v for k, v in run["metrics"].items() if k not in TIMED}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """一条只训练几步的链：够各阶段当起点用。"""
    root = tmp_path_factory.mktemp("chain")
    for stage in ("pretrain", "sft", "reward"):
        run_in_process(stage, [*SMALL, "--output_dir", str(root / stage)])
    return root


def arguments_of(stage: str, root: Path) -> list[str]:
    parents = {
        "pretrain": [],
        "sft": ["--model", str(root / "pretrain")],
        "reward": ["--model", str(root / "sft")],
        "dpo": ["--model", str(root / "sft")],
        # 自适应 KL 的 β 逐步在变，续训要接得上
        "ppo": [
            *("--model", str(root / "sft"), "--reward_model", str(root / "reward")),
            *("--kl_target", "0.02", "--kl_gain", "1.0"),
        ],
        # 没训练几步的模型一题也答不对：用奖励模型，每一组才有信号
        "grpo": [
            *("--model", str(root / "sft"), "--reward", "reward_model"),
            *("--reward_model", str(root / "reward"), "--num_generations", "2", "--grpo_epochs", "2"),
        ],
    }
    return [*SMALL, *parents[stage]]


@pytest.fixture(scope="module")
def uninterrupted(root, tmp_path_factory):
    """``uninterrupted(stage)`` → 不中断的结果；每个阶段只训练一次。"""

    @functools.cache
    def run(stage: str) -> dict:
        out = tmp_path_factory.mktemp("straight") / stage
        return run_in_process(stage, [*arguments_of(stage, root), "--output_dir", str(out)])

    return run


@pytest.mark.parametrize(
    ("stage", "how"),
    [
        ("pretrain", signal.SIGKILL),
        ("sft", signal.SIGINT),
        ("reward", signal.SIGKILL),
        ("dpo", signal.SIGKILL),
        ("ppo", signal.SIGKILL),
        ("ppo", signal.SIGINT),
        ("grpo", signal.SIGKILL),
    ],
)
def test_interrupted_then_resumed_equals_uninterrupted(root, uninterrupted, tmp_path, stage, how):
    out = tmp_path / stage
    arguments = arguments_of(stage, root)
    process = subprocess.Popen(
        [sys.executable, str(HOME / SCRIPTS[stage]), *arguments, "--output_dir", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    checkpoints = tmp_path / f".{stage}.work" / "checkpoints"
    deadline = time.time() + 120
    while not list(checkpoints.glob("checkpoint-*/complete.json")):
        assert process.poll() is None and time.time() < deadline, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(how)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == (-signal.SIGKILL if how == signal.SIGKILL else 130), output
    if how == signal.SIGINT:
        assert "已中断" in output and "Traceback" not in output
    assert not out.exists(), "没训练完的文件夹不能出现在最终位置"

    resumed = run_in_process(stage, [*arguments, "--output_dir", str(out)])
    straight = uninterrupted(stage)
    assert outcome(resumed) == outcome(straight)
    assert [row["step"] for row in resumed["history"]] == [row["step"] for row in straight["history"]]
    assert not (tmp_path / f".{stage}.work").exists()
    saved = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert saved["id"] == resumed["id"]


def test_second_run_loads_and_changed_settings_are_named(root, capsys):
    from nlp_common.base.errors import UserError

    first = run_in_process("sft", [*SMALL, "--output_dir", str(root / "sft")])
    assert "已有训练结果" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"learning_rate：已有 \S+，这次 0\.5[\s\S]*--retrain"):
        run_in_process("sft", [*SMALL, "--output_dir", str(root / "sft"), "--learning_rate", "0.5"])
    again = json.loads((root / "sft" / "run.json").read_text(encoding="utf-8"))
    assert again["id"] == first["id"]
