"""设备、精度、种子、环境信息。没有 GPU 的机器上，GPU 的几条规则用替身验证。"""

import os
import random
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nlp_common.base import device

CPU = torch.device("cpu")


def pretend(monkeypatch, name):
    found = None if name is None else torch.device(name)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: found)


@pytest.mark.parametrize(("found", "picked"), [("cuda", "cuda"), ("mps", "mps"), (None, "cpu")])
def test_pick_device(monkeypatch, found, picked):
    pretend(monkeypatch, found)
    assert device.pick_device().type == picked
    assert device.accelerator_available() == (picked != "cpu")


@pytest.mark.parametrize(
    ("kind", "native_bf16", "expected"),
    [("cuda", True, "bf16"), ("cuda", False, "fp16"), ("mps", True, "fp32"), ("cpu", True, "fp32")],
)
def test_precision(monkeypatch, kind, native_bf16, expected):
    # T4：模拟的 bf16 “支持”，原生的不支持。
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native_bf16
    )
    assert device.precision(torch.device(kind)) == expected
    assert device.precision_flags(torch.device(kind)) == {
        "bf16": expected == "bf16",
        "fp16": expected == "fp16",
    }


def test_precision_flags_let_trl_configs_be_built_on_cpu(tmp_path):
    trl = pytest.importorskip("trl")
    config = trl.DPOConfig(output_dir=str(tmp_path), **device.precision_flags(CPU))
    assert not config.bf16 and not config.fp16


def test_describe(monkeypatch):
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert device.describe(CPU) == f"CPU（{cores} 核）"
    properties = SimpleNamespace(name="NVIDIA H100", total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    assert device.describe(torch.device("cuda")) == "NVIDIA H100（80.0 GB 显存）"
    assert "MPS" in device.describe(torch.device("mps"))


def test_same_seed_same_numbers():
    def draw(seed):
        device.seed_everything(seed)
        return random.random(), np.random.rand(), torch.rand(1).item()

    assert draw(7) == draw(7) != draw(8)
    draw(2**40)  # numpy 自己只收 32 位


def test_library_versions_come_without_importing_the_libraries():
    code = (
        "import sys; from nlp_common.base.device import library_versions as v; "
        "assert not {'transformers', 'datasets', 'trl'} & set(sys.modules); print(v()['torch'])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip().startswith(torch.__version__.split("+")[0])
    versions = device.library_versions()
    assert versions["python"].count(".") == 2 and all(versions.values())


@pytest.mark.skipif(sys.platform == "win32", reason="Windows 上不量")
def test_peak_memory_grows_with_use_and_is_not_inherited():
    before = device.peak_memory_mb()
    block = np.ones(64 * 2**20, dtype=np.uint8)
    assert device.peak_memory_mb() >= before and 1 < before < 100_000
    held = np.ones((600 if sys.platform == "linux" else 1) * 2**20, dtype=np.uint8)
    code = "import re, resource; print(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])"
    if sys.platform == "linux":
        child = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        assert int(child) / 1024 < 100 < device.peak_memory_mb()
    del block, held
