"""hub_repo.py 对着本机的 hub：推的完整、取的完整，断了再试、不推两遍，坏了用前一个，代码不运行，令牌与路径不外漏。"""

import json
import pickle
import shutil
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hub_faults
import hub_repo
from hub_repo import HASHES, NOTE, broken_file, open_repo, refuse_code, snapshot, weights_id, without_paths
from nlp_common.base.errors import UserError
from nlp_common.base.runs import CHECKPOINT_DONE, RunFolder, write_json
from nlp_common.hub.local_hub import LocalHub

TOKEN = "hf_0123456789abcdef0123456789abcdef"
REPO = "models/learner/dpo"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # 本机的 hub 不会说 Xet
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with LocalHub({}, users={TOKEN: "learner"}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.fixture
def repo(hub):
    opened = open_repo("dpo", wait=0.0)
    opened.read_note()
    return opened


@pytest.fixture
def checkpoint(tmp_path):
    """``checkpoint(3)`` → 一个小的、写完整的检查点。"""

    def make(step: int):
        folder = tmp_path / "made" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"weights %d" % step)
        (folder / "optimizer.bin").write_bytes(b"adam %d" % step)
        write_json(folder / "history.json", [{"step": step}])
        write_json(folder / CHECKPOINT_DONE, {"seconds": 1.0})
        return folder

    return make


@pytest.fixture
def harmless(monkeypatch):
    """上面的 .bin 不是 torch 写的：不看里面有没有代码。"""
    monkeypatch.setattr(hub_repo, "refuse_code", lambda folder, name: None)


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- 推与取 ----


def test_a_checkpoint_comes_back_to_the_bit_and_two_are_kept(hub, repo, checkpoint, tmp_path, harmless):
    made = {step: checkpoint(step) for step in (1, 2, 3)}
    wanted = {step: contents(folder) for step, folder in made.items()}
    for folder in made.values():
        repo.push_checkpoint(folder)
    assert repo.name == "learner/dpo" and REPO in hub.private  # 没说公开就是私有的
    assert repo.steps() == [2, 3]
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    assert repo.fetch_checkpoint(checkpoints, newer_than=2) == 3
    assert contents(checkpoints / "checkpoint-3") == wanted[3]
    assert [path.name for path in checkpoints.iterdir()] == ["checkpoint-3"]
    assert repo.fetch_checkpoint(checkpoints, newer_than=3) is None


def test_one_push_is_one_commit(hub, repo, checkpoint):
    seen = []
    hub.on_commit = lambda made: seen.append(sorted(hub.repos[REPO]))
    repo.push_checkpoint(checkpoint(1))
    hub.faults["put"] = "503"
    hub_files = sorted(hub.repos[REPO])
    assert seen == [hub_files] and f"checkpoints/checkpoint-1/{CHECKPOINT_DONE}" in hub_files


def test_only_what_the_upload_lacks_is_sent_again(hub, repo, checkpoint):
    """同样的内容（sha256）hub 已经有了，不再传：第二次提交只多了名字。"""
    repo.push_checkpoint(checkpoint(1))
    before = len(hub.uploaded)
    again = checkpoint(2)
    (again / "model.safetensors").write_bytes(b"weights 1")
    repo.push_checkpoint(again)
    assert len(hub.uploaded) == before + 1  # 只有 optimizer.bin 是新的


def test_a_busy_hub_is_asked_again(hub, repo, checkpoint, capsys):
    hub.faults["commit"] = "503 once"
    repo.push_checkpoint(checkpoint(1))
    assert (
        repo.steps() == [1]
        and "推 checkpoint-1 的提交没有成（hub 回答 503），0 秒后再试" in capsys.readouterr().out
    )


def test_a_commit_whose_answer_was_lost_is_not_made_twice(hub, repo, checkpoint):
    hub.faults["commit"] = "lost once"
    repo.push_checkpoint(checkpoint(1))
    assert [made["title"] for made in hub.commits] == ["checkpoint-1"]
    repo.push_checkpoint(checkpoint(2))  # 自己的那次提交，不当成别的机器推的
    assert repo.steps() == [1, 2]


def test_a_hub_that_stays_busy_is_given_up_with_a_sentence(hub, repo, checkpoint, monkeypatch):
    hub.faults["commit"] = "503"
    with pytest.raises(UserError, match=r"推 checkpoint-1 的提交没有成：hub 回答 503.*再运行同一条命令"):
        repo.push_checkpoint(checkpoint(1))
    assert repo.retried == hub_repo.TRIES - 1 and repo.steps() == []


@pytest.mark.parametrize("name", ["model.safetensors", HASHES])
def test_a_broken_checkpoint_is_passed_over(hub, repo, checkpoint, tmp_path, capsys, harmless, name):
    for step in (1, 2):
        repo.push_checkpoint(checkpoint(step))
    path = f"checkpoints/checkpoint-2/{name}"
    hub.repos[REPO][path] = hub.repos[REPO][path][:-1] + b"?"
    (tmp_path / "c").mkdir()
    assert repo.fetch_checkpoint(tmp_path / "c", 0) == 1
    assert f"checkpoint-2 的 {name} 坏了，看前一个" in capsys.readouterr().out


def test_downloads_that_break_off_are_resumed(hub, repo, checkpoint, tmp_path, harmless):
    repo.push_checkpoint(checkpoint(1))
    hub.faults["checkpoints/checkpoint-1/model.safetensors"] = "cut once"
    (tmp_path / "c").mkdir()
    assert repo.fetch_checkpoint(tmp_path / "c", 0) == 1
    assert (tmp_path / "c" / "checkpoint-1" / "model.safetensors").read_bytes() == b"weights 1"


def test_a_name_that_cannot_be(hub):
    for name in ("a/b/c", "有空格 的", "模型", "../x", ""):
        with pytest.raises(UserError, match="不像 hub 上的名字"):
            open_repo(name)


# ---- 十种错 ----


@pytest.mark.parametrize("name", hub_faults.FAULTS)
def test_each_fault_says_what_and_what_to_do(hub, name):
    said = hub_faults.cause(name)
    assert said and "Traceback" not in said and "Error:" not in said
    for token in (hub_faults.TOKEN, hub_faults.READ_ONLY, TOKEN):
        assert token[:-1] not in said
    what, cure = {
        "no_token": ("没有令牌", "export HF_TOKEN"),
        "wrong_token": ("不认 HF_TOKEN", "换一个"),
        "read_only_token": ("只能读", "write"),
        "somebody_elses": ("令牌是 learner 的", "learner/dpo"),
        "no_network": ("连不上 http://127.0.0.1:9", "HTTPS_PROXY"),
        "no_space": ("空间满了", "super_squash_history"),
        "other_contents": ("model.safetensors、README.md", "--repo"),
        "already_public": ("早已是公开的", "--public"),
        "two_machines": ("别的机器也在", "停掉一台"),
        "code_inside": ("custom_checkpoint_0.pkl", "换掉令牌"),
    }[name]
    assert what in said and cure in said


def test_without_the_check_the_code_would_have_run(tmp_path):
    """accelerate 读学习率的那个文件不只当数据读：refuse_code 不能省。"""
    from accelerate import PartialState
    from accelerate.checkpointing import load_custom_state

    PartialState(cpu=True)
    trace = tmp_path / "ran"
    (tmp_path / "custom_checkpoint_0.pkl").write_bytes(pickle.dumps(hub_faults.Evil(trace), 2))
    with pytest.raises(RuntimeError):  # 读完才发现不是 torch 写的：代码已经运行了
        load_custom_state(SimpleNamespace(load_state_dict=lambda state: None), tmp_path, 0)
    assert trace.exists()
    trace.unlink()
    with pytest.raises(UserError, match="不只是数据"):
        refuse_code(tmp_path, "a/b")
    assert not trace.exists()


def test_a_checkpoint_with_code_is_not_fetched(hub, repo, checkpoint, tmp_path):
    folder, trace = checkpoint(1), tmp_path / "ran"
    (folder / "optimizer.bin").unlink()
    (folder / "custom_checkpoint_0.pkl").write_bytes(pickle.dumps(hub_faults.Evil(trace), 2))
    repo.push_checkpoint(folder)
    (tmp_path / "c").mkdir()
    with pytest.raises(UserError, match=r"custom_checkpoint_0.pkl 里不只是数据"):
        repo.fetch_checkpoint(tmp_path / "c", 0)
    assert not trace.exists() and not (tmp_path / "c" / "checkpoint-1").exists()


def test_a_real_checkpoint_is_harmless(tmp_path):
    import torch
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(schedule)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    accelerator.save_state(str(tmp_path / "checkpoint-1"))
    refuse_code(tmp_path / "checkpoint-1", "a/b")
    assert len(list((tmp_path / "checkpoint-1").glob("*.pkl"))) == 2


# ---- 不外漏 ----


def test_run_records_lose_the_places_of_this_machine():
    record = {
        "path": "/home/li ming/nlp/outputs/sft",
        "settings": {
            "dataset": "C:\\Users\\li\\pairs.jsonl",
            "model": "Qwen/Qwen1.5-0.5B",
            "eval": "../d/e.json",
        },
        "command": "python /home/li/nlp/dpo.py --dataset ~/pairs.jsonl --model Qwen/Qwen1.5-0.5B",
        "see": ["https://huggingface.co/a/b", "和/或", 3, None, 0.5],
    }
    assert without_paths(record) == {
        "path": "sft",
        "settings": {"dataset": "pairs.jsonl", "model": "Qwen/Qwen1.5-0.5B", "eval": "e.json"},
        "command": "python dpo.py --dataset pairs.jsonl --model Qwen/Qwen1.5-0.5B",
        "see": ["https://huggingface.co/a/b", "和/或", 3, None, 0.5],
    }


part = st.text(st.characters(categories=("L", "N"), include_characters="-_."), min_size=1, max_size=8).filter(
    lambda text: text.strip(".")
)


@given(
    st.lists(part, min_size=1, max_size=4),
    part,
    st.sampled_from(["/{}", "~/{}", "../{}", "D:/{}", "x --d=/{}"]),
)
def test_no_folder_of_any_path_is_left(folders, name, form):
    secret = [f"秘密{each}" for each in folders]
    left = without_paths(form.format("/".join([*secret, name])))
    assert left.endswith(name) and "秘密" not in left


def test_the_token_is_nowhere_in_what_is_pushed(hub, repo, checkpoint, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"final")
    write_json(model / "run.json", {"id": "1", "parent": {"model": {"path": "/home/li/sft"}}})
    repo.push_note({"settings": {}}, model)
    repo.push_checkpoint(checkpoint(1))
    repo.publish(model, "---\nlanguage: zh\n---\n卡", {"finished": "1"}, keep_checkpoints=False)
    files = hub.repos[REPO]
    assert not [name for name, data in files.items() if TOKEN.encode() in data or b"/home/li" in data]
    assert not [name for name in files if name.startswith("checkpoints/")] and "start/run.json" in files
    assert json.loads(files[NOTE]) == {"finished": "1"} and files["README.md"].decode().endswith("卡")


def test_a_card_the_hub_cannot_read_is_refused(hub, repo, tmp_path):
    write_json(tmp_path / "run.json", {})
    with pytest.raises(UserError, match="Invalid metadata"):
        repo.publish(tmp_path, "---\nlanguage: [zh\n---\n卡", {}, keep_checkpoints=True)
    assert "README.md" not in hub.repos[REPO]


# ---- 本机的文件 ----


def test_a_snapshot_survives_the_deletion_of_what_it_shows(checkpoint, tmp_path):
    folder = checkpoint(1)
    wanted = contents(folder)
    photo = snapshot(folder, tmp_path / "photo" / "checkpoint-1")
    shutil.rmtree(folder)
    assert contents(photo) == wanted and broken_file(photo) == HASHES  # 还没有写 sha256.json
    assert snapshot(folder, tmp_path / "photo" / "checkpoint-1") is None
    half = checkpoint(2)
    (half / CHECKPOINT_DONE).unlink()
    assert snapshot(half, tmp_path / "photo" / "checkpoint-2") is None


def test_the_number_of_weights_is_that_of_run_json(tmp_path):
    def write(folder):
        (folder / "b.safetensors").write_bytes(b"2")
        (folder / "a.safetensors").write_bytes(b"1")

    record = RunFolder(tmp_path / "out").finish(write, {})
    assert weights_id(tmp_path / "out") == record["id"]
