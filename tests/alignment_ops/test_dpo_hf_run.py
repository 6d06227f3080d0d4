"""dpo_hf_run.py：检查点随写随推，换一台机器接着同一次训练，做完了只下载，推不上去不耽误训练，令牌不外漏。"""

import json
import os
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest

import dpo_hf_run as script
import hub_repo
from hub_drill import begin, kill_at
from nlp_common.base.errors import UserError
from nlp_common.base.runs import CHECKPOINT_DONE, RunFolder, open_run, write_json
from nlp_common.hub.local_hub import LocalHub
from nlp_common.tiny import world

HOME = Path(__file__).resolve().parents[2] / "alignment_ops"
TOKEN, REPO = "hf_0123456789abcdef0123456789abcdef", "models/learner/dpo"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # 本机的 hub 不会说 Xet
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(script, "LOOK_EVERY", 0.02)
    monkeypatch.setattr(hub_repo, "refuse_code", lambda folder, name: None)  # 假的检查点不是 torch 写的
    with LocalHub({}, users={TOKEN: "learner"}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


class FakeDPO:
    """代替 DPO 脚本：从最近的检查点走到第 n 步，每步写一个检查点，等它推上去；结果由起点、设置、每一步决定。"""

    def __init__(self, hub: LocalHub, steps: int = 3, stop_after: int | None = None, wait: bool = True):
        self.hub, self.steps, self.stop_after, self.wait = hub, steps, stop_after, wait
        self.began_at: int | None = None

    def __call__(self, stage, out, model, dataset, preset, **settings) -> dict:
        folder = RunFolder(out)
        if out.exists():
            return json.loads((out / "run.json").read_text(encoding="utf-8"))
        latest = folder.latest_checkpoint()
        self.began_at = script.step_of(latest)
        state = (
            (latest / "model.safetensors").read_bytes()
            if latest
            else Path(model, "model.safetensors").read_bytes()
        )
        for step in range(self.began_at + 1, self.steps + 1):
            if self.stop_after is not None and step > self.stop_after:
                raise KeyboardInterrupt
            state += b"|%d" % step
            made = folder.checkpoints / f"checkpoint-{step}"
            made.mkdir()
            (made / "model.safetensors").write_bytes(state)
            write_json(made / CHECKPOINT_DONE, {"seconds": 1.0})
            self.wait_for(step)
        record = {"stage": "dpo", "parent": {"model": {"path": str(model), "stage": "sft", "id": "7"}}}
        record |= {
            "data": {"train": {"name": str(dataset), "rows": 9, "sha256": "5"}},
            "settings": {"preset": preset},
        }
        record |= {"versions": {}, "device": "CPU", "seconds": 1.0, "metrics": {"qa_accuracy": 1.0}}
        return folder.finish(lambda path: (path / "model.safetensors").write_bytes(state), record)

    def wait_for(self, step: int) -> None:
        name = f"checkpoints/checkpoint-{step}/{CHECKPOINT_DONE}"
        until = time.monotonic() + 20
        while self.wait and name not in self.hub.repos[REPO] and time.monotonic() < until:
            time.sleep(0.01)


@pytest.fixture
def start(tmp_path) -> Path:
    folder = tmp_path / "sft"
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    from safetensors.numpy import save_file

    save_file({}, folder / "model.safetensors")
    return folder


@pytest.fixture
def machine(hub, monkeypatch, tmp_path, start):
    """``machine("one", dpo)`` 在一个空的文件夹里运行一遍；第一台给 --model，别的不给。"""

    def run(name: str, dpo: FakeDPO, *more: str):
        monkeypatch.setattr(script, "run_stage", dpo)
        argv = ["--preset", "tiny", "--repo", "dpo", "--output_dir", str(tmp_path / name / "dpo"), *more]
        if name == "one":
            argv += ["--model", str(start)]
        return script.main(argv)

    return run


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_the_second_machine_goes_on_to_the_same_weights(hub, machine, tmp_path, start):
    one, two = FakeDPO(hub, stop_after=2), FakeDPO(hub)
    with pytest.raises(KeyboardInterrupt):
        machine("one", one)
    assert REPO in hub.private
    run = machine("two", two)
    assert (one.began_at, two.began_at) == (0, 2)
    assert weights(tmp_path / "two" / "dpo") == weights(start) + b"|1|2|3"
    files = hub.repos[REPO]
    assert files["model.safetensors"] == weights(tmp_path / "two" / "dpo")
    assert not [name for name in files if name.startswith("checkpoints/")]
    assert json.loads(files["hub_run.json"])["finished"] == run["id"]
    assert files["README.md"].decode().startswith("---\nlanguage: zh")
    assert (tmp_path / "two" / "dpo" / "README.md").read_bytes() == files["README.md"]


def test_no_token_and_no_place_of_this_machine_leaves(hub, machine, tmp_path):
    machine("one", FakeDPO(hub))
    for name, data in hub.repos[REPO].items():
        assert TOKEN.encode() not in data and str(tmp_path).encode() not in data, name
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path


def test_a_finished_training_is_only_downloaded(hub, machine, tmp_path, capsys):
    machine("one", FakeDPO(hub))
    for _ in range(2):  # 第二次，本机也有了
        dpo = FakeDPO(hub)
        run = machine("two", dpo)
        assert dpo.began_at is None and run["metrics"] == {"qa_accuracy": 1.0}
    assert weights(tmp_path / "two" / "dpo") == weights(tmp_path / "one" / "dpo")
    left = [path.name for path in (tmp_path / "two").iterdir() if not path.name.endswith(".lock")]
    assert left == ["dpo"]  # 下载、检查点的临时文件夹都收拾了
    assert not (tmp_path / "two" / "dpo" / "start").exists()
    assert "早已做完" in capsys.readouterr().out


def test_another_setting_is_named(hub, machine):
    with pytest.raises(KeyboardInterrupt):
        machine("one", FakeDPO(hub, stop_after=1))
    with pytest.raises(UserError, match=r"(?s)beta：已有 None，这次 0.7.*--retrain"):
        machine("two", FakeDPO(hub), "--beta", "0.7")
    machine("two", FakeDPO(hub), "--save_steps", "7", "--public", "true")  # 不影响结果的可以不同


def test_another_start_is_refused(hub, machine, tmp_path, start):
    with pytest.raises(KeyboardInterrupt):
        machine("one", FakeDPO(hub, stop_after=1))
    other = tmp_path / "other"
    other.mkdir()
    for path in start.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    import numpy as np
    from safetensors.numpy import save_file

    save_file({"w": np.zeros(3)}, other / "model.safetensors")
    with pytest.raises(UserError, match="另一个起点模型"):
        machine("two", FakeDPO(hub), "--model", str(other))


def test_retrain_starts_over_and_forgets_the_old_checkpoints(hub, machine, tmp_path, start):
    with pytest.raises(KeyboardInterrupt):
        machine("one", FakeDPO(hub, stop_after=2))
    again = FakeDPO(hub, stop_after=1)
    with pytest.raises(KeyboardInterrupt):
        machine("one", again, "--beta", "0.7", "--retrain", "true")
    assert again.began_at == 0
    third = FakeDPO(hub)
    machine("three", third, "--beta", "0.7")
    assert third.began_at == 1  # 不是以前那次的第 2 步


@pytest.mark.parametrize("more", [[], ["--retrain", "true"]])
def test_a_repository_of_something_else_is_left_alone(hub, machine, more):
    hub.repos[REPO] = {"model.safetensors": b"precious"}
    hub.private.add(REPO)
    with pytest.raises(UserError, match="里是别的东西"):
        machine("one", FakeDPO(hub), *more)
    assert hub.repos[REPO] == {"model.safetensors": b"precious"}


@pytest.mark.parametrize("note", [b"{", b"[]", b'{"settings": {}}', b'{"settings": {}, "start": 3}'])
def test_a_note_that_is_not_ours(hub, machine, note):
    hub.repos[REPO] = {"hub_run.json": note}
    hub.private.add(REPO)
    with pytest.raises(UserError, match=r"hub_run.json 不像是这里写的"):
        machine("one", FakeDPO(hub))


def test_two_processes_with_one_result_folder(hub, machine, tmp_path):
    with open_run(tmp_path / "one" / "dpo"), pytest.raises(UserError, match="正被另一个进程使用"):
        machine("one", FakeDPO(hub))


def test_the_same_machine_uses_its_own_newer_checkpoint(hub, machine, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        machine("one", FakeDPO(hub, stop_after=1))
    made = RunFolder(tmp_path / "one" / "dpo").checkpoints / "checkpoint-2"
    made.mkdir()
    (made / "model.safetensors").write_bytes(b"newer")
    write_json(made / CHECKPOINT_DONE, {"seconds": 1.0})
    dpo = FakeDPO(hub, wait=False)
    machine("one", dpo)
    assert dpo.began_at == 2


def test_a_push_that_fails_does_not_stop_the_training(hub, machine, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(hub_repo.HubRepo, "wait", 0.0)

    refused = threading.Event()
    push = script.Pusher.push

    def push_once(pusher, *given):
        push(pusher, *given)
        refused.set()

    monkeypatch.setattr(script.Pusher, "push", push_once)

    class Full(FakeDPO):
        def __call__(self, *given, **settings):
            hub.quota = 0
            return super().__call__(*given, **settings)

        def wait_for(self, step):
            assert refused.wait(20)  # 不等的话，训练可能在推之前就完了

    with pytest.raises(UserError, match="空间满了"):  # 最后的模型也推不上去：说出来，退出码 2
        machine("one", Full(hub))
    assert "训练照旧：learner/dpo 的空间满了" in capsys.readouterr().out
    assert (tmp_path / "one" / "dpo" / "run.json").exists()  # 结果在本机，一点没丢
    hub.quota = None
    dpo = FakeDPO(hub)
    machine("one", dpo)  # 同一条命令：不再训练，只补推
    assert dpo.began_at is None and "model.safetensors" in hub.repos[REPO]


def test_a_half_written_checkpoint_is_never_pushed(hub, machine):
    class Half(FakeDPO):
        def wait_for(self, step):
            if step == 2:
                half = next(RunFolder(self.out).checkpoints.glob("checkpoint-2"))
                (half / CHECKPOINT_DONE).unlink()
                time.sleep(0.1)
            else:
                super().wait_for(step)

        def __call__(self, stage, out, *given, **settings):
            self.out = out
            return super().__call__(stage, out, *given, **settings)

    machine("one", Half(hub))
    assert "checkpoint-2" not in [made["title"] for made in hub.commits]


def test_full_without_a_start_or_a_repository(hub, tmp_path):
    with pytest.raises(UserError, match="full 预设要说从哪个 SFT 模型开始"):
        script.main(["--preset", "full", "--repo", "dpo", "--output_dir", str(tmp_path / "o")])
    with pytest.raises(UserError, match="加 --repo"):
        script.main(["--preset", "full"])


def test_the_pushing_thread_is_gone_at_the_end(hub, machine):
    machine("one", FakeDPO(hub))
    assert not [each.name for each in threading.enumerate() if "watch" in each.name]


@pytest.mark.slow
def test_the_drill(tmp_path, chat_folder):
    """读者敲的那一条命令：真的 DPO、真的杀进程；第二次运行直接用。"""
    env = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, str(HOME / "dpo_hf_run.py"), "--output_dir", str(tmp_path / "drill")]
    command += ["--model", str(chat_folder), "--max_train_samples", "640", "--max_eval_samples", "16"]
    command += ["--save_steps", "20", "--die_at", "40"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = json.loads((tmp_path / "drill" / "run.json").read_text(encoding="utf-8"))["metrics"]
    assert metrics["same_weights"] == metrics["same_metrics"] == 1.0
    assert metrics["resumed_from"] == metrics["killed_at"] >= 40
    assert metrics["faults_explained"] == 10 and metrics["token_leaks"] == 0
    assert (tmp_path / "drill" / "model" / "README.md").exists() and (
        tmp_path / "drill" / "resumed.svg"
    ).exists()
    again = subprocess.run(command, env=env, capture_output=True, text=True, encoding="utf-8", timeout=60)
    assert again.returncode == 0 and "已有训练结果" in again.stdout and "逐位相同" in again.stdout


@pytest.mark.slow
def test_full_from_a_model_and_data_on_the_hub(tmp_path, chat_folder):
    """full 预设：起点与数据都在 hub 上，只记名字，不再推一份；机器一被杀，机器二不给 --model 也接得上。"""
    pairs = [
        {
            "system": "",
            "history": [],
            "question": row["prompt"][-1]["content"],
            "response_chosen": row["chosen"][-1]["content"],
            "response_rejected": row["rejected"][-1]["content"],
        }
        for row in world.pairs(700, seed=0)
    ]
    card = "---\nconfigs:\n- config_name: zh\n  data_files: dpo_zh.json\n---\n"
    rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in pairs)
    repos = {
        "models/learner/sft": {path.name: path.read_bytes() for path in chat_folder.iterdir()},
        "datasets/shibing624/DPO-En-Zh-20k-Preference": {
            "README.md": card.encode(),
            "dpo_zh.json": rows.encode(),
        },
    }
    command = [sys.executable, str(HOME / "dpo_hf_run.py"), "--preset", "full", "--repo", "dpo"]
    command += ["--max_train_samples", "640", "--max_eval_samples", "8", "--save_steps", "5"]
    with LocalHub(repos, users={TOKEN: "learner"}) as server:
        one = begin([*command, "--model", "learner/sft"], tmp_path / "one", server, TOKEN)
        server.on_commit = partial(kill_at, process=one, step=5)
        assert one.wait(120) != 0
        server.on_commit = None
        two = begin(command, tmp_path / "two", server, TOKEN)
        assert two.wait(120) == 0, (tmp_path / "two" / "screen.log").read_text(encoding="utf-8")
        files = server.repos[REPO]
    screen = (tmp_path / "two" / "screen.log").read_text(encoding="utf-8")
    assert "步的检查点，接着训练" in screen and not [name for name in files if name.startswith("start/")]
    assert "base_model: learner/sft" in files["README.md"].decode()
    assert "- shibing624/DPO-En-Zh-20k-Preference" in files["README.md"].decode()
    assert json.loads(files["run.json"])["parent"]["model"]["id"] == "learner/sft"
