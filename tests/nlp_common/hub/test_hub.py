"""模型来源与预设的选择。全部离线：服务器都是测试自己在 127.0.0.1 上开的。"""

import contextlib
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from safetensors.numpy import save_file

from nlp_common.base.errors import UserError
from nlp_common.hub import models as hub
from nlp_common.hub import network
from nlp_common.hub import preset as presets

FULL = "Qwen/Qwen1.5-0.5B"
COMMIT = "0" * 40


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    """没有代理、没有缓存、当前目录是空的；hub 的地址指向一个拒绝连接的端口。"""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name in {"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"}:
            monkeypatch.delenv(name)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    from huggingface_hub import constants

    # huggingface_hub 在导入时就记下了缓存位置，环境变量来不及改。
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    network._answers.cache_clear()


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def serve(monkeypatch, status):
    """在 127.0.0.1 开一个总是回答 status 的服务器，HF_ENDPOINT 指向它；返回收到的请求。"""
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            requests.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    return requests


def write_model(folder, *, shards=("model.safetensors",), tokenizer=True):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}", encoding="utf-8")
    for i, shard in enumerate(shards):
        save_file({f"w{i}": np.ones(8, dtype=np.float32)}, folder / shard)
    if len(shards) > 1:
        index = {"weight_map": {f"w{i}": shard for i, shard in enumerate(shards)}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    if tokenizer:
        (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    return folder


def write_cached(cache, name=FULL, **kwargs):
    """照 huggingface_hub 的缓存布局放一个模型，返回快照文件夹。"""
    repo = cache / f"models--{name.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    return write_model(repo / "snapshots" / COMMIT, **kwargs)


# ---- 导入 ----


def test_importing_hub_imports_no_hugging_face_library_and_environment_is_only_a_default():
    code = """
import os, sys
import nlp_common.hub.models
assert not {"huggingface_hub", "transformers", "datasets", "tokenizers", "torch"} & set(sys.modules)
print(os.environ["HF_HUB_DISABLE_TELEMETRY"], os.environ["TOKENIZERS_PARALLELISM"])
"""
    env = os.environ | {"TOKENIZERS_PARALLELISM": "true"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.split() == ["1", "true"]


# ---- 连不连得上 ----


def test_refused_port_is_unreachable_at_once():
    start = time.monotonic()
    assert not hub.hub_reachable()
    assert time.monotonic() - start < 1


def test_silent_server_is_given_up_after_the_timeout(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:  # 接受连接，从不回答
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        start = time.monotonic()
        assert not hub.hub_reachable(timeout=0.5)
        assert 0.4 < time.monotonic() - start < 1.0


def test_server_that_drips_bytes_cannot_stretch_the_timeout(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")

        def drip():
            connection, _ = server.accept()
            with connection, contextlib.suppress(OSError):
                for byte in b"HTTP/1.1 200 OK":
                    connection.send(bytes([byte]))
                    time.sleep(0.2)

        threading.Thread(target=drip, daemon=True).start()
        start = time.monotonic()
        assert not hub.hub_reachable(timeout=0.5)
        assert time.monotonic() - start < 1.0


def test_slow_name_lookup_cannot_stretch_the_timeout(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")

    def slow(*_, **__):
        time.sleep(1.5)
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    start = time.monotonic()
    assert not hub.hub_reachable(timeout=0.3)
    assert time.monotonic() - start < 1.0


@pytest.mark.parametrize(("status", "reachable"), [(200, True), (401, True), (404, True), (503, False)])
def test_status(monkeypatch, status, reachable):
    serve(monkeypatch, status)
    assert hub.hub_reachable() is reachable


def test_server_is_asked_once_a_process_and_never_when_offline(monkeypatch):
    requests = serve(monkeypatch, 200)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert not hub.hub_reachable()
    assert requests == []
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert hub.hub_reachable() and hub.hub_reachable()
    assert len(requests) == 1


def test_endpoint_without_scheme(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "hf-mirror.com")
    with pytest.raises(UserError, match=r"以 https:// 开头"):
        hub.hub_reachable()


# ---- 本地文件夹 ----


@pytest.mark.parametrize("shards", [["model.safetensors"], ["model-1.safetensors", "model-2.safetensors"]])
def test_complete_folder(tmp_path, shards):
    folder = write_model(tmp_path / "m", shards=shards)
    assert hub.find_model(str(folder)) == hub.require_model(str(folder)) == str(folder)


def test_relative_and_home_folder(tmp_path, monkeypatch):
    write_model(tmp_path / "here" / "m")
    monkeypatch.setenv("HOME", str(tmp_path / "here"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "here"))
    assert hub.find_model("m") == "m"
    assert hub.find_model("~/m") == str(tmp_path / "here" / "m")


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        ("config.json", "config.json"),
        ("model-2.safetensors", "model-2.safetensors"),
        ("model.safetensors.index.json", "model.safetensors "),
    ],
)
def test_half_written_folder_names_the_missing_file(tmp_path, damage, named):
    folder = write_model(tmp_path / "m", shards=["model-1.safetensors", "model-2.safetensors"])
    (folder / damage).unlink()
    with pytest.raises(UserError, match=f"不完整：{named}.*--model"):
        hub.find_model(str(folder))


def test_truncated_weights_and_broken_index(tmp_path):
    folder = write_model(tmp_path / "m")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"model\.safetensors 缺失或没写完"):
        hub.find_model(str(folder))
    weights.unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ', encoding="utf-8")
    with pytest.raises(UserError, match=r"index\.json 缺失或没写完"):
        hub.find_model(str(folder))


def test_pickled_weights_are_not_accepted(tmp_path):
    folder = write_model(tmp_path / "m", shards=())
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="pickle"):
        hub.find_model(str(folder))


@pytest.mark.parametrize("name", ["./no", "../no", "/no/such", "~/no", r"C:\models\no", "a/b/c", r"m\no"])
def test_path_that_does_not_exist(name):
    with pytest.raises(UserError, match="没有这个文件夹"):
        hub.find_model(name)


def test_mistyped_folder_name_and_file(tmp_path):
    write_model(tmp_path / "here" / "outputs" / "tiny")
    with pytest.raises(UserError, match="outputs 里没有 tini"):
        hub.find_model("outputs/tini")
    with pytest.raises(UserError, match="是一个文件"):
        hub.find_model("outputs/tiny/config.json")


def test_invalid_names():
    with pytest.raises(UserError, match="合法的模型名"):
        hub.find_model("通义 千问")
    with pytest.raises(UserError, match="--source"):
        hub.find_model(FULL, source="baidu")


# ---- 缓存与 hub ----


def test_warm_cache_needs_no_network(tmp_path, monkeypatch):
    snapshot = write_cached(tmp_path / "cache")
    requests = serve(monkeypatch, 200)
    assert hub.find_model(FULL) == hub.require_model(FULL) == str(snapshot)
    assert requests == []
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub.require_model(FULL) == str(snapshot)


@pytest.mark.parametrize("kwargs", [{"shards": ()}, {"tokenizer": False}])
def test_half_downloaded_cache_goes_to_the_hub_or_is_nothing(tmp_path, monkeypatch, kwargs):
    write_cached(tmp_path / "cache", **kwargs)
    assert hub.find_model(FULL) is None
    serve(monkeypatch, 200)
    assert hub.find_model(FULL) == FULL  # 真的下载见 test_hub_server.py


def test_server_down_names_every_way_out(monkeypatch):
    with pytest.raises(UserError) as caught:
        hub.require_model(FULL)
    message = str(caught.value)
    for way in [
        os.environ["HF_ENDPOINT"],
        "export HF_ENDPOINT=https://hf-mirror.com",
        "set HF_ENDPOINT=https://hf-mirror.com",
        "$env:HF_ENDPOINT=",
        "--source modelscope",
        "--model",
        "--preset tiny",
    ]:
        assert way in message
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE=1"):
        hub.require_model(FULL)


# ---- ModelScope ----


def test_modelscope_not_installed(monkeypatch):
    monkeypatch.setattr(hub, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="pip install modelscope"):
        hub.find_model(FULL, source="modelscope")


@pytest.fixture
def modelscope(tmp_path, monkeypatch):
    """一个和真包同样用法的替身（1.40 核对过）：缓存里没有就抛异常，下载就写到缓存。"""
    write_model(tmp_path / "remote")
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "modelscope.py").write_text(
        f"""
import os, shutil
def snapshot_download(model_id, local_files_only=False, **_):
    cached = {str(tmp_path / "ms")!r}
    if not os.path.exists(cached):
        if local_files_only or model_id != {FULL!r}:
            raise RuntimeError("not found: " + model_id)
        shutil.copytree({str(tmp_path / "remote")!r}, cached)
    return cached
""",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.delitem(sys.modules, "modelscope", raising=False)
    yield tmp_path / "ms"
    sys.modules.pop("modelscope", None)


def test_modelscope_downloads_only_in_require_model(modelscope, monkeypatch):
    reachable = []
    monkeypatch.setattr(hub, "hub_reachable", lambda source: bool(reachable))
    assert hub.find_model(FULL, source="modelscope") is None
    with pytest.raises(UserError, match="modelscope"):
        hub.require_model(FULL, source="modelscope")
    reachable.append(True)
    assert hub.find_model(FULL, source="modelscope") == FULL
    assert not modelscope.exists()
    with pytest.raises(UserError, match="not found: no/such"):
        hub.require_model("no/such", source="modelscope")
    assert hub.require_model(FULL, source="modelscope") == str(modelscope)
    reachable.clear()
    assert hub.find_model(FULL, source="modelscope") == str(modelscope)


# ---- 预设 ----


@pytest.mark.parametrize(
    ("requested", "model", "needs_accelerator", "accelerator", "available", "preset", "reason"),
    [
        ("tiny", None, True, True, True, "tiny", "--preset tiny"),
        ("tiny", "x/y", True, True, True, "tiny", "--preset tiny"),
        ("full", None, True, False, False, "full", "--preset full"),
        ("auto", "x/y", True, False, False, "full", "--model x/y"),
        ("auto", None, True, False, True, "tiny", "没有找到 GPU"),
        ("auto", None, True, True, False, "tiny", "5 秒内也连不上"),
        ("auto", None, True, True, True, "full", "有加速器"),
        ("auto", None, False, False, True, "full", "可以从"),
        ("auto", None, False, False, False, "tiny", "5 秒内也连不上"),
    ],
)
def test_choice(monkeypatch, requested, model, needs_accelerator, accelerator, available, preset, reason):
    requests = serve(monkeypatch, 200 if available else 503)
    monkeypatch.setattr(presets, "accelerator_available", lambda: accelerator)
    choice = presets.choose_preset(requested, model, full_model=FULL, needs_accelerator=needs_accelerator)
    assert choice.preset == preset and reason in choice.reason
    asks = requested == "auto" and model is None and (accelerator or not needs_accelerator)
    assert len(requests) == asks  # 没有 GPU 的笔记本不等网络

    line = presets.announce(choice)
    other = {"tiny": "full", "full": "tiny"}[preset]
    assert line.startswith(f"预设 {preset}") and choice.reason in line and f"--preset {other}" in line
    assert "\n" not in line


def test_choice_with_local_copy_and_offline(tmp_path, monkeypatch):
    choose = {"full_model": FULL, "needs_accelerator": False}
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE=1" in presets.choose_preset("auto", None, **choose).reason
    write_cached(tmp_path / "cache")
    choice = presets.choose_preset("auto", None, **choose)
    assert choice.preset == "full" and "已在本地" in choice.reason


def test_unknown_preset():
    with pytest.raises(UserError, match="auto、tiny、full"):
        presets.choose_preset("big", None, full_model=FULL, needs_accelerator=False)


# ---- SOCKS 代理 ----


@pytest.mark.parametrize("name", ["ALL_PROXY", "all_proxy", "HTTP_PROXY"])
def test_socks_without_its_package_says_what_to_install(monkeypatch, name):
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.example")
    monkeypatch.setenv(name, "socks5://127.0.0.1:1080")
    monkeypatch.setattr(network, "find_spec", lambda _: None)
    assert not hub.hub_reachable()
    assert 'pip install "httpx[socks]"' in hub.why_not("hf") and "ALL_PROXY" not in hub.why_not("hf")
    with pytest.raises(UserError, match=r"httpx\[socks\]"):
        hub.require_model(FULL)


def test_socks_is_used_when_it_can_be(monkeypatch):
    import httpx

    asked = []

    def head(url, timeout):
        asked.append(url)
        return httpx.Response(200)

    monkeypatch.setenv("HF_ENDPOINT", "http://hub.example")
    monkeypatch.setenv("ALL_PROXY", "socks5h://127.0.0.1:1080")
    monkeypatch.setattr(network, "find_spec", lambda _: object())
    monkeypatch.setattr(httpx, "head", head)
    assert hub.hub_reachable() and asked == ["http://hub.example"]


def test_a_misspelt_socks_and_an_address_that_goes_around_it(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.example")
    monkeypatch.setenv("ALL_PROXY", "socks://127.0.0.1:1080/")
    assert not hub.hub_reachable() and "socks5://127.0.0.1:1080/" in hub.why_not("hf")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    requests = serve(monkeypatch, 200)
    assert hub.hub_reachable() and requests
