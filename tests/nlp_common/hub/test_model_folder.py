"""给错的文件夹：说出它是什么、该给什么。"""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from nlp_common.base.errors import UserError
from nlp_common.hub.models import find_model


def model_in(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}", encoding="utf-8")
    save_file({"w": np.ones(2, dtype=np.float32)}, folder / "model.safetensors")
    return folder


def error_of(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        find_model(str(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("base", ["Qwen/Qwen1.5-0.5B", None])
def test_an_adapter_names_its_base(tmp_path, base):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    save_file({"lora_A.weight": np.ones(2, dtype=np.float32)}, tmp_path / "adapter_model.safetensors")
    message = error_of(tmp_path)
    assert "LoRA 适配器" in message and f"接在 {base or '原来的模型'} 上" in message
    (tmp_path / "config.json").write_text("{}")  # 有的训练器把原模型的配置也抄一份
    assert "LoRA 适配器" in error_of(tmp_path)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("qwen-q4_0.gguf", "llama.cpp"),
        ("model.onnx", "ONNX"),
        ("pytorch_model.bin", "pickle"),
        ("model.pth", "pickle"),
        ("tf_model.h5", "TensorFlow"),
        ("qwen.zip", "先解压"),
    ],
)
def test_weights_of_other_programs(tmp_path, name, expected):
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / name).write_bytes(b"x" * 64)
    message = error_of(folder)
    assert expected in message and "safetensors" in message
    assert f"{name} 是一个文件" in error_of(folder / name) and expected in error_of(folder / name)


def test_the_weights_file_itself_names_its_folder(tmp_path):
    folder = model_in(tmp_path / "m")
    assert f"--model {folder}" in error_of(folder / "model.safetensors")


@pytest.mark.parametrize("inner", ["inner", "models--Qwen--Qwen1.5-0.5B/snapshots/abc", "snapshots/abc"])
def test_a_folder_around_the_model_names_the_one_inside(tmp_path, inner):
    folder = model_in(tmp_path / inner)
    assert f"请写 --model {folder}" in error_of(tmp_path)


def test_a_folder_of_several_models_lists_them(tmp_path):
    for step in (100, 200):
        model_in(tmp_path / f"checkpoint-{step}")
    message = error_of(tmp_path)
    assert "checkpoint-100、checkpoint-200" in message and f"--model {tmp_path / 'checkpoint-200'}" in message


def test_pointers_and_shards_without_an_index(tmp_path):
    pointer, shards, gguf = (model_in(tmp_path / name) for name in ("pointer", "shards", "gguf"))
    (pointer / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "git lfs pull" in error_of(pointer)
    (shards / "model.safetensors").rename(shards / "model-00001-of-00001.safetensors")
    assert "model.safetensors.index.json" in error_of(shards)
    (gguf / "model.safetensors").rename(gguf / "model.gguf")
    assert "GGUF" in error_of(gguf)
