"""压过的权重放在一个文件夹里（量化、剪枝的几种）：怎样核对，怎样变回一个普通的模型。

说明（一个 JSON，最后才写，有它就是写完了）里有各文件的 sha256；装与还原各家不同，在各自的脚本里。
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nlp_common.base.errors import UserError
from nlp_common.base.runs import file_sha256

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def read_note(folder: Path, name: str, script: str, again: str) -> Any:
    """folder 里的说明 name；没有写完、读不出来是 UserError。script 是写它的脚本，again 是怎样补救。"""
    if not folder.is_dir():
        raise UserError(f"没有文件夹 {folder}：先运行 python {script}。")
    if not (folder / name).is_file():
        raise UserError(f"{folder} 没有 {name}：没有写完，或不是 {script} 写的；{again}。")
    try:
        return json.loads((folder / name).read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{folder / name} 坏了，读不出来；{again}。") from None


def check_file(path: Path, wanted: str, again: str) -> None:
    """少了文件、内容变了，都是 UserError；wanted 是写的时候的 sha256。"""
    if not path.is_file():
        raise UserError(f"{path.parent} 少了 {path.name}：没有写完，或没有复制完；{again}。")
    if (found := file_sha256(path)) != wanted:
        raise UserError(f"{path} 坏了或被改过：sha256 是 {found[:12]}…，写的时候是 {wanted[:12]}…；{again}。")


def model_from_state(
    folder: Path, config: PretrainedConfig, state: dict[str, Tensor], again: str
) -> PreTrainedModel:
    """还原好的权重 → 普通的 float32 模型；与 config 对不上（少了、多了、形状不同）是 UserError。"""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{folder} 的权重与 config.json 对不上（{reason}）；{again}。") from None
    model.tie_weights()
    tied = model.config.tie_word_embeddings
    if wrong := [*unexpected, *(name for name in missing if not (tied and name == "lm_head.weight"))]:
        raise UserError(f"{folder} 的权重与 config.json 对不上（{wrong[0]}）；{again}。")
    return model
