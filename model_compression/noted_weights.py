"""压过的权重与一张说明（各层怎样压的、sha256）放在一个文件夹里：怎样写完，怎样查，怎样读回一个普通的模型。

packed_weights.py、sparse_weights.py 各自只管一层怎样装、怎样还原。
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from nlp_common.base.errors import UserError
from nlp_common.base.runs import file_sha256
from nlp_common.lm.checks import readable_errors


def save_model(
    folder: Path, model, tokenizer, tensors: dict[str, Tensor], layers: dict, weights: str, about: str
) -> None:
    """tensors 写进 weights，layers 与 sha256 写进 about；about 最后写，有它就是写完了。"""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / weights)
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    noted = {"layers": layers, "sha256": file_sha256(folder / weights)}
    (folder / about).write_text(json.dumps(noted, indent=1), encoding="utf-8")


def load_model(folder: Path, state: dict[str, Tensor], again: str):
    """还原好的 state → (分词器, 普通的 float32 模型)；与 config.json 对不上是 UserError，again 是怎样补救。"""
    from transformers import AutoConfig, AutoModelForCausalLM

    from nlp_common.lm.loading import end_chat_turns, load_tokenizer, make_fast

    with readable_errors(str(folder)):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    tokenizer = load_tokenizer(str(folder))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{folder} 的权重与 config.json 对不上（{reason}）；{again}。") from None
    model.tie_weights()
    if unexpected or [name for name in missing if name != "lm_head.weight"]:
        wrong = [*unexpected, *missing][0]
        raise UserError(f"{folder} 的权重与 config.json 对不上（{wrong}）；{again}。")
    end_chat_turns(model, tokenizer)
    return tokenizer, make_fast(model).eval()


def read_about(folder: Path, weights: str, about: str, script: str, again: str) -> dict[str, list[int]]:
    """说明里的 layers；没有写完、少了文件、内容变了，都是 UserError。script 是写它的脚本。"""
    if not folder.is_dir():
        raise UserError(f"没有文件夹 {folder}：先运行 python {script}。")
    if not (folder / about).is_file():
        raise UserError(f"{folder} 没有 {about}：不是 {script} 存的，或没有写完；{again}。")
    try:
        noted = json.loads((folder / about).read_text(encoding="utf-8"))
        layers, wanted = dict(noted["layers"]), str(noted["sha256"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{folder / about} 坏了，读不出来；{again}。") from None
    if not (folder / weights).is_file():
        raise UserError(f"{folder} 少了 {weights}：没有复制完；{again}。")
    if (found := file_sha256(folder / weights)) != wanted:
        raise UserError(
            f"{folder / weights} 坏了或被改过：sha256 是 {found[:12]}…，写的时候是 {wanted[:12]}…；{again}。"
        )
    return layers
