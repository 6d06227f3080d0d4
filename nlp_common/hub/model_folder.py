"""一个模型文件夹是不是完整的：hub 的布局，只认 safetensors。"""

from __future__ import annotations

import json
from pathlib import Path

from nlp_common.base.errors import UserError
from nlp_common.base.runs import whole_safetensors

TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model")

# 别的程序用的权重：后缀 → 它是什么
OTHER_WEIGHTS = {
    ".gguf": "GGUF，llama.cpp、Ollama 用的格式",
    ".onnx": "ONNX，只能推理的格式",
    ".bin": "PyTorch 的 pickle 格式，出于安全不读",
    ".pt": "PyTorch 的 pickle 格式，出于安全不读",
    ".pth": "PyTorch 的 pickle 格式，出于安全不读",
    ".ckpt": "PyTorch Lightning 的检查点，是 pickle 格式，出于安全不读",
    ".h5": "TensorFlow 的权重",
    ".msgpack": "Flax 的权重",
    ".zip": "压缩包，先解压",
    ".gz": "压缩包，先解压",
}


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
    return next((name for name in names if not whole_safetensors(folder / name)), None)


def has_tokenizer(folder: Path) -> bool:
    """有没有任何一种常见的分词器文件。"""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def check_model_folder(folder: Path) -> None:
    """不是完整的模型文件夹是 UserError：说出它是什么、该给什么，或缺哪个文件。"""
    missing = missing_file(folder)
    if missing is None:
        return
    lost = missing == "config.json" or (folder / "adapter_config.json").is_file()
    if lost and (what := _something_else(folder)):
        raise UserError(what)
    hint = "如果是复制或下载到一半，请重新来一遍，或用 --model 指向完整的文件夹。"
    if (folder / "pytorch_model.bin").exists():
        hint = "里面的 pytorch_model.bin 是 pickle 格式，出于安全不读，请换成 safetensors。"
    elif _is_pointer(folder / missing):
        hint = f"它是 git-lfs 的指针，真正的权重还没有下载：在 {folder} 里运行 git lfs pull。"
    elif missing == "model.safetensors" and any(folder.glob("model-*-of-*.safetensors")):
        hint = "权重分成了几片，却没有 model.safetensors.index.json：请把它也复制过来。"
    elif missing == "model.safetensors" and any(folder.glob("*.gguf")):
        hint = "里面的权重是 GGUF（llama.cpp 用的格式），请换成同一个模型的 safetensors 版。"
    raise UserError(f"模型文件夹 {folder} 不完整：{missing} 缺失或没写完。{hint}")


def _something_else(folder: Path) -> str | None:
    """没有 config.json 的文件夹是什么、该给什么；看不出来是 None。"""
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        try:
            base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
        except (OSError, ValueError, AttributeError):
            base = None
        return (
            f"{folder} 是一个 LoRA 适配器，不是完整的模型，它要接在 {base or '原来的模型'} 上：聊天用 --adapter {folder}；"
            f"别的先合并成完整的模型，python lora_finetune/merge_lora.py --adapter {folder} --export 新文件夹，"
            "再用 --model 新文件夹。"
        )
    if (folder / "model_index.json").is_file():
        return f"{folder} 是画图的模型（diffusers），不是语言模型；请用 --model 换一个模型。"
    inside = _models_inside(folder)
    if len(inside) == 1:
        return f"{folder} 不是模型文件夹，模型在它里面：请写 --model {inside[0]}。"
    if inside:
        names = "、".join(str(path.relative_to(folder)) for path in inside[:5])
        more = f" 等 {len(inside)} 个" if len(inside) > 5 else ""
        return f"{folder} 里有几个模型文件夹（{names}{more}），请写明用哪个，例如 --model {inside[-1]}。"
    for suffix, what in OTHER_WEIGHTS.items():
        if any(folder.glob(f"*{suffix}")):
            return f"{folder} 里只有 {suffix} 文件：{what}。请换成同一个模型的 safetensors 版（带 config.json 的文件夹）。"
    return None


def _models_inside(folder: Path) -> list[Path]:
    """里面几层的模型文件夹：hub 缓存的 models--…/snapshots/版本，解压多出的一层，训练的几个 checkpoint。"""
    found: list[Path] = []
    for pattern in ("*", "*/*", "*/*/*"):
        for config in sorted(folder.glob(f"{pattern}/config.json")):
            if not any(path in config.parents for path in found):  # 模型文件夹里的子文件夹不算
                found.append(config.parent)
    return found


def _is_pointer(path: Path) -> bool:
    """git-lfs 的指针文件：一百多个字节的文字，不是权重。"""
    try:
        with path.open("rb") as file:
            return file.read(40).startswith(b"version https://git-lfs")
    except OSError:
        return False


def what_file(path: Path) -> str:
    """--model 给了一个文件：说出它是什么、该给什么。"""
    what = OTHER_WEIGHTS.get(path.suffix.lower())
    if what:
        return f"{path} 是一个文件（{what}）；--model 要的是装着 config.json 和 safetensors 权重的文件夹。"
    if path.suffix.lower() in (".safetensors", ".json") and (path.parent / "config.json").is_file():
        return f"{path} 是一个文件；--model 要的是它所在的文件夹：--model {path.parent}。"
    return f"{path} 是一个文件；--model 要的是装着 config.json 和权重的文件夹。"
