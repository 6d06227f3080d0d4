"""一个模型文件夹是不是完整的：hub 的布局，只认 safetensors。"""

from __future__ import annotations

import json
from pathlib import Path

from nlp_common.base.errors import UserError

TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model")


def missing_file(folder: Path) -> str | None:
    """模型文件夹里缺（或没写完）的第一个文件名；齐全返回 None。只认 safetensors，不读 pickle。"""
    if not (folder / "config.json").is_file():
        return "config.json"
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if not (folder / names[0]).is_file() and index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            return index.name
    return next((name for name in names if not _whole(folder / name)), None)


def _whole(path: Path) -> bool:
    """safetensors 的文件头写明了总长度，截断的文件一打开就能发现，不必读完。"""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):
            return True
    except (OSError, SafetensorError):
        return False


def has_tokenizer(folder: Path) -> bool:
    """有没有任何一种常见的分词器文件。"""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def check_model_folder(folder: Path) -> None:
    """不完整的模型文件夹是 UserError，说出缺哪个文件。"""
    missing = missing_file(folder)
    if missing is None:
        return
    hint = (
        "里面的 pytorch_model.bin 是 pickle 格式，出于安全不读，请换成 safetensors。"
        if (folder / "pytorch_model.bin").exists()
        else "如果是复制或下载到一半，请重新来一遍，或用 --model 指向完整的文件夹。"
    )
    raise UserError(f"模型文件夹 {folder} 不完整：{missing} 缺失或没写完。{hint}")
