"""真的 huggingface_hub、datasets 客户端，对着 127.0.0.1 上的假 hub：下载、缓存、断网，以及各种出错。

训练脚本的 full 预设走同一条路，见 tests/qwen_chinese_finetune/test_full_path.py。
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from fake_hub import FakeHub
from nlp_common.base.errors import UserError
from nlp_common.data.online import load_rows, read_through, save_rows
from nlp_common.hub import models as hub
from nlp_common.hub import network

NAME, REPO = "Qwen/Qwen1.5-0.5B", "models/Qwen/Qwen1.5-0.5B"
WEIGHTS = save({"w": np.arange(50_000, dtype=np.float32)})


def model_files() -> dict[str, bytes]:
    return {
        "config.json": b'{"model_type": "qwen2"}',
        "tokenizer.json": b"{}",
        "model.safetensors": WEIGHTS,
        "pytorch_model.bin": b"pickle",
        "onnx/model.onnx": b"onnx",
        "README.md": b"readme",
    }


@pytest.fixture
def server(tmp_path, monkeypatch):
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name in {"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"}:
            monkeypatch.delenv(name)
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    network._answers.cache_clear()
    with FakeHub({REPO: model_files()}) as fake:
        monkeypatch.setenv("HF_ENDPOINT", fake.url)
        yield fake
    network._answers.cache_clear()


def snapshot(folder: str) -> dict[str, bytes]:
    root = Path(folder)
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def shut_down(monkeypatch):
    """之后的一切像断了网一样：9 号端口没有人听。"""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    network._answers.cache_clear()


# ---- 下载与缓存 ----


def test_downloads_once_without_pickle_then_needs_no_network(server, monkeypatch):
    folder = hub.require_model(NAME)
    assert snapshot(folder) == {
        name: data for name, data in model_files().items() if name.endswith((".json", ".safetensors"))
    }
    assert sorted(server.downloads()) == ["config.json", "model.safetensors", "tokenizer.json"]
    seen = len(server.requests)
    assert hub.require_model(NAME) == folder and len(server.requests) == seen
    shut_down(monkeypatch)
    assert hub.require_model(NAME) == folder


def test_a_missing_model_is_said(server):
    with pytest.raises(UserError, match=f"{server.url} 上没有模型 no/such.*--model"):
        hub.require_model("no/such")


def test_a_repo_without_safetensors_is_left_to_from_pretrained(server):
    del server.repos[REPO]["model.safetensors"]
    assert hub.require_model(NAME) == NAME


def test_server_that_breaks_off_once_is_resumed(server):
    server.faults["model.safetensors"] = "cut once"
    folder = hub.require_model(NAME)
    assert (Path(folder) / "model.safetensors").read_bytes() == WEIGHTS
    assert server.downloads().count("model.safetensors") == 2


def test_truncated_download_is_never_used_and_the_next_run_goes_on(server, monkeypatch):
    from huggingface_hub import file_download

    monkeypatch.setattr(file_download.time, "sleep", lambda _: None)  # 重试之间的等待
    server.faults["model.safetensors"] = "cut"
    with pytest.raises(UserError, match=r"没有完成.*\n.*从断开的地方接着下载"):
        hub.require_model(NAME)
    assert hub.find_model(NAME) == NAME  # 半个文件不算缓存里有
    server.faults.clear()
    assert (Path(hub.require_model(NAME)) / "model.safetensors").read_bytes() == WEIGHTS


def test_server_error_is_said(server, monkeypatch):
    from huggingface_hub import utils

    monkeypatch.setattr(utils._http.time, "sleep", lambda _: None)
    server.faults["config.json"] = "500"
    with pytest.raises(UserError, match=r"没有完成：.*500"):
        hub.require_model(NAME)


def test_a_slow_answer_is_waited_for(server, monkeypatch):
    monkeypatch.setattr(
        "nlp_common.hub.download.TIMEOUT", 0.2
    )  # 问文件信息等多久；huggingface_hub 会再问一次
    server.faults["config.json"] = 0.5
    assert (Path(hub.require_model(NAME)) / "config.json").read_bytes() == model_files()["config.json"]


def test_a_server_that_is_too_slow_to_say_hello_is_named(server, monkeypatch):
    monkeypatch.setattr(hub, "hub_reachable", lambda source: network.hub_reachable(0.3, source))
    server.faults["/"] = 2.0
    started = time.monotonic()
    with pytest.raises(UserError, match=f"(?s)连不上 {server.url}.*HF_ENDPOINT.*--preset tiny"):
        hub.require_model(NAME)
    assert time.monotonic() - started < 1.5


# ---- 坏了的缓存与 --verify ----


def damage(folder: str, name: str, data: bytes) -> Path:
    path = Path(folder) / name
    path.resolve().write_bytes(data)
    return path


def test_truncated_file_in_the_cache_is_fetched_again(server, monkeypatch, capsys):
    folder = hub.require_model(NAME)
    damage(folder, "model.safetensors", WEIGHTS[:1000])
    assert hub.require_model(NAME) == folder
    assert "model.safetensors 没写完或坏了，重新下载" in capsys.readouterr().out
    assert (Path(folder) / "model.safetensors").read_bytes() == WEIGHTS
    broken = damage(folder, "model.safetensors", WEIGHTS[:1000])
    shut_down(monkeypatch)
    with pytest.raises(UserError) as caught:
        hub.require_model(NAME)
    assert str(broken) in str(caught.value) and "连上网之后再运行" in str(caught.value)


def test_verify_says_how_many_files_are_right(server, monkeypatch, capsys):
    folder = hub.require_model(NAME, verify=True)
    assert f"3 个文件与 {server.url} 上的大小和哈希一致" in capsys.readouterr().out
    hub.require_model(folder, verify=True)
    assert "本地文件夹" in capsys.readouterr().out
    shut_down(monkeypatch)
    hub.require_model(NAME, verify=True)
    assert "缓存里下载时的记录的大小和哈希一致" in capsys.readouterr().out


@pytest.mark.parametrize("online", [True, False])
@pytest.mark.parametrize(
    ("name", "change", "fault"),
    [
        (
            "model.safetensors",
            lambda data: data[:-1] + bytes([data[-1] ^ 1]),
            "sha256 应是 [0-9a-f]{64}，实际",
        ),
        ("config.json", lambda data: data.replace(b"qwen2", b"llama"), "git sha1 应是 [0-9a-f]{40}，实际"),
        ("config.json", lambda data: data + b"\n", "(应有 23 字节，实有 24 字节|git sha1 应是)"),
    ],
)
def test_verify_names_the_file_and_the_command(server, monkeypatch, name, change, fault, online):
    folder = hub.require_model(NAME)
    damage(folder, name, change((Path(folder) / name).read_bytes()))
    if not online:
        shut_down(monkeypatch)
    assert hub.require_model(NAME) == folder  # 不加 --verify 看不出来
    with pytest.raises(
        UserError, match=rf"(?s){name} 坏了：{fault}.*hf download {NAME} {name} --force-download"
    ):
        hub.require_model(NAME, verify=True)


def test_wrong_bytes_from_a_mirror_are_found(server):
    server.faults["model.safetensors"] = "wrong bytes"
    with pytest.raises(UserError, match="sha256 应是"):
        hub.require_model(NAME, verify=True)


def test_verify_when_the_list_cannot_be_had(server, monkeypatch):
    hub.require_model(NAME)
    del server.repos[REPO]
    with pytest.raises(UserError, match=r"问不到.*去掉 --verify"):
        hub.require_model(NAME, verify=True)


# ---- 数据集的行 ----


def test_rows_are_kept_as_far_as_they_were_read(tmp_path):
    everything = [{"text": f"第 {i} 行"} for i in range(10)]
    asked = []

    def read_on(skip):
        asked.append(skip)
        return iter(everything[skip:])

    def first(n):
        rows = read_through(tmp_path / "a" / "r.jsonl", read_on)
        found = [next(rows) for _ in range(n)]
        rows.close()
        return found

    assert first(3) == everything[:3] and asked == [0]
    assert first(2) == everything[:2] and asked == [0]  # 存着的够用，不去读
    assert first(5) == everything[:5] and asked == [0, 3]
    assert list(read_through(tmp_path / "a" / "r.jsonl", read_on)) == everything and asked == [0, 3, 5]
    assert list(read_through(tmp_path / "a" / "r.jsonl", read_on)) == everything and len(asked) == 3
    assert not [each for each in (tmp_path / "a").iterdir() if each.name != "r.jsonl"]


def test_rows_read_before_a_failure_are_kept(tmp_path):
    def breaks(skip):
        yield {"text": "一"}
        raise ConnectionError("断了")

    with pytest.raises(ConnectionError):
        list(read_through(tmp_path / "r.jsonl", breaks))
    assert load_rows(tmp_path / "r.jsonl") == ([{"text": "一"}], False)


@pytest.mark.parametrize(
    "damage", [lambda t: t[:-5], lambda t: t[: t.rindex("{")], lambda t: "", lambda t: "x"]
)
def test_damaged_row_cache_is_not_used(tmp_path, capsys, damage):
    path = tmp_path / "r.jsonl"
    save_rows(path, [{"text": "一"}, {"text": "二"}], True)
    path.write_text(damage(path.read_text(encoding="utf-8")), encoding="utf-8")
    assert list(read_through(path, lambda skip: [{"text": "新"}][skip:])) == [{"text": "新"}]
    assert "坏了" in capsys.readouterr().out
    assert load_rows(path) == ([{"text": "新"}], True)


def test_rows_that_cannot_be_kept_are_still_read(tmp_path, capsys):
    (tmp_path / "file").write_text("挡路", encoding="utf-8")
    for path, row in [(tmp_path / "r.jsonl", {"image": b"\x00"}), (tmp_path / "file" / "r.jsonl", {"a": 1})]:
        assert list(read_through(path, lambda skip, row=row: [row])) == [row]
        assert "没有存进缓存" in capsys.readouterr().out
    assert os.listdir(tmp_path) == ["file"]


READ = """
import json, sys
from nlp_common.base.errors import UserError
from nlp_common.data.rows import read_rows
for name, limit in json.loads(sys.argv[1]):
    try:
        found = read_rows(name, limit=limit)
        print("行", json.dumps([found.rows, found.source["sha256"]], ensure_ascii=False))
    except UserError as error:
        print("错", json.dumps(str(error), ensure_ascii=False))
"""


def read_in_a_process(home: Path, endpoint: str, *questions, **more: str) -> list[str]:
    """在新的进程里读：datasets 在导入时记下 HF_ENDPOINT。"""
    env = {k: v for k, v in os.environ.items() if not k.lower().endswith(("_proxy", "_offline"))}
    env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home / "hf"), "NLP_LEARNING_CACHE": str(home / "own")}
    command = [sys.executable, "-c", READ, json.dumps(questions)]
    done = subprocess.run(command, env=env | more, cwd=home, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if line[:2] in ("行 ", "错 ") or "上次存下的" in line]


def test_dataset_rows_are_read_again_without_the_network(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    rows = [{"text": f"第 {i} 篇。"} for i in range(50)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    sink = pa.BufferOutputStream()
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), sink)
    repos = {
        "datasets/a/lines": {"train.jsonl": lines.encode(), "README.md": b"# lines"},
        "datasets/a/parquet": {"data/train-00000-of-00001.parquet": sink.getvalue().to_pybytes()},
    }
    questions = [["a/lines", 7], ["a/parquet", 7], ["a/nothing", 1]]
    with FakeHub(repos) as server:
        first = read_in_a_process(tmp_path, server.url, *questions)
        wanted = len(server.requests)
        server.faults["train.jsonl"] = "500"  # 版本没变，不该再下载
        again = read_in_a_process(tmp_path, server.url, ["a/lines", 7])
        assert len(server.requests) == wanted and again == first[:1]
    assert [json.loads(line[2:])[0] for line in first[:2]] == [rows[:7]] * 2
    assert "没有数据集 a/nothing" in first[2]
    offline = read_in_a_process(tmp_path, server.url, ["a/lines", 7], ["a/lines", 8], HF_HUB_OFFLINE="1")
    assert "用上次存下的" in offline[0] and offline[1] == first[0]
    assert "--max_train_samples 7" in offline[3]


# ---- ModelScope：真的客户端 ----


MODELSCOPE = """
import sys
from pathlib import Path
from nlp_common.base.errors import UserError
from nlp_common.hub.models import require_model
from nlp_common.data.rows import read_rows
folder = Path(require_model("Qwen/Qwen1.5-0.5B", "modelscope", verify=True))
print("文件", sorted(path.name for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".bin")))
print("行", read_rows("a/lines", limit=2, source="modelscope").rows)
print("再来", require_model("Qwen/Qwen1.5-0.5B", "modelscope") == str(folder))
weights = folder / "model.safetensors"
weights.write_bytes(weights.read_bytes()[:-1] + b"?")
for name, verify in [("Qwen/Qwen1.5-0.5B", True), ("no/such", False)]:
    try:
        require_model(name, "modelscope", verify=verify)
    except UserError as error:
        print("错", str(error).replace("\\n", " "))
"""


def test_modelscope_client(tmp_path):
    pytest.importorskip("modelscope", reason="没有装 modelscope")
    repos = {REPO: model_files(), "datasets/a/lines": {"train.jsonl": b'{"text": "1"}\n{"text": "2"}\n'}}
    with FakeHub(repos) as server:
        env = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
        env |= {"MODELSCOPE_ENDPOINT": server.url, "MODELSCOPE_CACHE": str(tmp_path / "ms")}
        env |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf")}
        command = [sys.executable, "-c", MODELSCOPE]
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    out = done.stdout
    assert "文件 ['config.json', 'model.safetensors', 'tokenizer.json']" in out  # 没有 pickle
    assert "行 [{'text': '1'}, {'text': '2'}]" in out and "再来 True" in out
    assert "3 个文件与魔搭社区上的大小和哈希一致" in out
    assert "错 Qwen/Qwen1.5-0.5B 的 model.safetensors 坏了：sha256 应是" in out and "删掉" in out
    assert "错 从 ModelScope 下载 no/such 失败" in out
