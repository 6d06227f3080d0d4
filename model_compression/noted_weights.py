"""压过的权重与一张说明（各层怎样压的、sha256）放在一个文件夹里：怎样写完，怎样查，怎样读回一个普通的模型。

packed_weights.py、sparse_weights.py 各自只管一层怎样装、怎样还原。
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from nlp_common.base.errors import UserError
from nlp_common.base.runs import file_sha256
from nlp_common.lm.checks import readable_errors
from nlp_common.lm.compact import check_file, model_from_state, read_note


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
    from transformers import AutoConfig

    from nlp_common.lm.loading import end_chat_turns, load_tokenizer, make_fast

    with readable_errors(str(folder)):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    tokenizer = load_tokenizer(str(folder))
    model = model_from_state(folder, config, state, again)
    end_chat_turns(model, tokenizer)
    return tokenizer, make_fast(model).eval()


def read_about(folder: Path, weights: str, about: str, script: str, again: str) -> dict[str, list[int]]:
    """说明里的 layers；没有写完、少了文件、内容变了，都是 UserError。script 是写它的脚本。"""
    noted = read_note(folder, about, script, again)
    try:
        layers, wanted = dict(noted["layers"]), str(noted["sha256"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{folder / about} 坏了，读不出来；{again}。") from None
    check_file(folder / weights, wanted, again)
    return layers
