"""分词器写进 GGUF：词表、合并表、切分规则的名字、控制符的编号、对话模板。llama.cpp 不读 tokenizer.json，只看这几项。

几处写错了，llama.cpp 不报错，答得对不对要看模型：

- ``token_type``：控制符是 3，llama.cpp 才把 "<|im_start|>" 认成一个 token，而不是一串字；写成平常的字，小模型的正确率从 1 掉到 0.19；
- ``tokenizer.ggml.pre``：先怎样切开再合并（正则式）的名字，llama.cpp 只认得一张表里的；写错了，数字、英文缩写会切成别的 token
  （小世界一个汉字一个 token，看不出）；
- ``eos_token_id`` 要是 <|im_end|>，不是 <|endoftext|>（基座 Qwen 的）。llama.cpp 认得这个字样，写错了也会停；只看这一项的程序停不下来；
- ``add_bos_token`` 要是 false：Qwen 的对话开头没有 bos，训练时从没见过。
"""

from __future__ import annotations

import json
import re

from nlp_common.base.errors import UserError
from nlp_common.lm.chatml import CHAT_TEMPLATE, IM_END

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # token_type：后来加的、不算特殊的是 4；词表里空着的行是 5

# 切分规则（tokenizer.json 里的 pre_tokenizer）→ llama.cpp 里的名字
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
PUNCTUATION = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
REGEXES = {
    CONTRACTIONS + r"\p{N}" + PUNCTUATION: "qwen2",
    CONTRACTIONS + r"\p{N}{1,3}" + PUNCTUATION: "llama-bpe",
}
SHAPES = {("Digits", "ByteLevel"): "smollm", ("ByteLevel",): "gpt-2"}


def tokenizer_metadata(tokenizer, config, pre: str = "auto") -> dict:
    """元数据里 tokenizer.* 的各项。不是字节级 BPE、认不出切分规则，是 UserError。"""
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    if core["model"].get("type") != "BPE" or core["model"].get("byte_fallback"):
        kind = "SentencePiece 的 BPE" if core["model"].get("byte_fallback") else core["model"].get("type")
        raise UserError(
            f"分词器是 {kind}，这里只会写字节级 BPE（Qwen、Llama 3、SmolLM2）：用 llama.cpp 的 convert_hf_to_gguf.py。"
        )
    merges = [each if isinstance(each, str) else " ".join(each) for each in core["model"]["merges"]]
    added = {token["id"]: token for token in core["added_tokens"]}
    words = {number: word for word, number in tokenizer.get_vocab().items()}
    tokens, kinds = [], []
    for number in range(config.vocab_size):
        if number in added:
            tokens.append(added[number]["content"])
            kinds.append(CONTROL if added[number]["special"] else USER_DEFINED)
        elif number in words:
            tokens.append(words[number])
            kinds.append(NORMAL)
        else:  # 嵌入表常常比词表多几行，凑成整数
            tokens.append(f"[PAD{number}]")
            kinds.append(UNUSED)
    metadata = {
        "tokenizer.ggml.model": "gpt2",  # 字节级 BPE 都叫这个名字
        "tokenizer.ggml.pre": pre_tokenizer_name(core) if pre == "auto" else pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": tokenizer.convert_tokens_to_ids(IM_END),
        "tokenizer.ggml.padding_token_id": tokenizer.pad_token_id,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": plain_template(tokenizer.chat_template or CHAT_TEMPLATE),
    }
    return metadata if merges else {k: v for k, v in metadata.items() if not k.endswith("merges")}


def pre_tokenizer_name(core: dict) -> str:
    """切分规则的名字；认不出是 UserError：猜错了，每句话都切得不对。"""
    found = core.get("pre_tokenizer") or {}
    pieces = found.get("pretokenizers") or [found]
    for piece in pieces:
        regex = (piece.get("pattern") or {}).get("Regex")
        if regex in REGEXES:
            return REGEXES[regex]
    shape = tuple(piece.get("type") for piece in pieces)
    digits = [piece.get("individual_digits") for piece in pieces if piece.get("type") == "Digits"]
    if shape in SHAPES and digits in ([], [True]):
        return SHAPES[shape]
    raise UserError(
        f"认不出分词器的切分规则（{'、'.join(map(str, shape))}）在 llama.cpp 里叫什么：用 --pre 写明，"
        "名字见 llama.cpp 的 src/llama-vocab.cpp（qwen2、llama-bpe、smollm、gpt-2 …）。"
    )


def plain_template(template: str) -> str:
    """去掉 {% generation %} 这对标记：它只标出哪些字算损失，transformers 之外的程序不认识。"""
    return re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)
