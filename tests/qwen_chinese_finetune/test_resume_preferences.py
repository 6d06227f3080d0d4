"""KTO、换名字、best-of-K、十种方法：训练到一半、或做完了几个对照之后被打断，再运行同一条命令，结果与不中断的完全相同。"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

HOME = Path(__file__).resolve().parents[2] / "qwen_chinese_finetune"
SMALL = ["--preset", "tiny", "--max_steps", "8", "--save_steps", "2", "--logging_steps", "2"]
SMALL += ["--max_train_samples", "60", "--max_eval_samples", "6", "--per_device_train_batch_size", "4"]
TRAINING = "checkpoints/checkpoint-*/complete.json"  # 工作文件夹里有了它，就打断
IN_A_PART = "parts/.*.work/checkpoints/checkpoint-*/complete.json"
PART_DONE = "parts/k-1/run.json"
OWN = {
    "kto_alignment": [],
    "identity_dpo": ["--n_identity", "6"],
    "best_of_k_sft": ["--k", "2", "--ks", "1,3", "--rounds", "2", "--max_new_tokens", "8"],
}


def without_times(value):
    """与时间无关的数。"""
    if isinstance(value, dict):
        timed = ("seconds", "_per_s")
        return {k: without_times(v) for k, v in value.items() if not k.endswith(timed)}
    return [without_times(v) for v in value] if isinstance(value, list) else value


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "when", "how"),
    [
        ("kto_alignment", TRAINING, signal.SIGKILL),
        ("identity_dpo", IN_A_PART, signal.SIGINT),
        ("identity_dpo", IN_A_PART, signal.SIGKILL),
        ("best_of_k_sft", PART_DONE, signal.SIGKILL),
        ("best_of_k_sft", PART_DONE, signal.SIGINT),
    ],
)
def test_interrupted_then_resumed_equals_uninterrupted(
    load_script, chat_folder, reward_folder, tmp_path, script, when, how
):
    arguments = [*SMALL, *OWN[script], "--model", str(chat_folder)]
    if script == "best_of_k_sft":
        arguments += ["--reward_model", str(reward_folder)]
    main, work = load_script(script).main, tmp_path / ".again.work"
    process = subprocess.Popen(
        [sys.executable, str(HOME / f"{script}.py"), *arguments, "--output_dir", str(tmp_path / "again")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    deadline = time.time() + 120
    while not list(work.glob(when)):
        assert process.poll() is None and time.time() < deadline, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(how)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == (-signal.SIGKILL if how == signal.SIGKILL else 130), output
    assert "Traceback" not in output and not (tmp_path / "again").exists()

    resumed = main([*arguments, "--output_dir", str(tmp_path / "again")])
    straight = main([*arguments, "--output_dir", str(tmp_path / "straight")])
    assert resumed["id"] == straight["id"]
    assert without_times(resumed["metrics"]) == without_times(straight["metrics"])
    assert without_times(resumed["history"]) == without_times(straight["history"])
    assert not work.exists()


@pytest.mark.slow
def test_the_comparison_goes_on_where_it_was(
    methods, chat_folder, reward_folder, tmp_path, monkeypatch, capsys
):
    """做完的几个点不重做，其余的与不中断的相同。"""
    paths = {"sft": chat_folder, "reward": reward_folder}
    monkeypatch.setattr(methods, "chain_model", lambda stage: {"path": str(paths[stage]), "id": stage})
    arguments = [*SMALL, "--methods", "dpo", "--seeds", "1", "--output_dir"]
    straight = methods.main([*arguments, str(tmp_path / "straight")])
    measure, calls = methods.measure, []

    def breaks(*given):
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*given)

    monkeypatch.setattr(methods, "measure", breaks)
    with pytest.raises(KeyboardInterrupt):
        methods.main([*arguments, str(tmp_path / "again")])
    capsys.readouterr()
    resumed = methods.main([*arguments, str(tmp_path / "again")])
    assert capsys.readouterr().out.count("上次中断以前做完了") == 1 and len(calls) == 2 + 2
    assert without_times(resumed["metrics"]) == without_times(straight["metrics"])
