"""GPTQ 的检查点：一个线性层在文件里是 qweight、qzeros、scales、g_idx 四个张量；读写整个文件夹，用 sha256 核对。"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nlp_common.base.errors import UserError
from nlp_common.base.runs import file_sha256
from nlp_common.lm.checks import readable_errors
from nlp_common.lm.compact import check_file, model_from_state, read_note

WEIGHTS, SUMS = "model.safetensors", "sha256.json"
AGAIN = "请重新复制，或重新运行 save_quantized.py --retrain"

# ---------------------------------------------------------------- 1. 八个四位数，一个 int32


def pack(codes: Tensor) -> Tensor:
    """(8n, m) 里 0 … 15 的整数 → (n, m) int32：相邻八行合成一行，第 j 行放在第 4j 到 4j+3 位。"""
    rows = codes.int().view(-1, 8, codes.shape[1])  # (n, 8, m)
    packed = torch.zeros(len(rows), codes.shape[1], dtype=torch.int32)
    for j in range(8):
        packed |= rows[:, j] << 4 * j
    return packed


def unpack(packed: Tensor) -> Tensor:
    """pack 的反过来，(n, m) int32 → (8n, m)；右移带来的符号位用 & 15 去掉。"""
    rows = [packed >> 4 * j & 15 for j in range(8)]
    return torch.stack(rows, 1).view(-1, packed.shape[1])


# ---------------------------------------------------------------- 2. 一个线性层


def quantize_linear(weight: Tensor, group: int) -> dict[str, Tensor]:
    """weight (d_out, d_in) → 四个张量。每个输出、每 group 个相邻的输入共用一个刻度：q = round(w/s) + 8，对称。

    文件里输入在前，所以先转置；零点 8 存成 7：GPTQ 最早的格式少 1，后来的库都照着（gptq_v2 才不减）。
    """
    d_out, d_in = weight.shape
    if d_out % 8 or d_in % 8:
        raise UserError(f"矩阵 {d_out}×{d_in} 的两边要都是 8 的倍数，才能八个装一个 int32。")
    g_idx = torch.arange(d_in) // group  # (d_in,)：第几个输入归第几组
    n_groups = int(g_idx[-1]) + 1
    w = weight.detach().float().cpu().T  # (d_in, d_out)
    largest = torch.stack([w[g_idx == g].abs().amax(0) for g in range(n_groups)])  # (组数, d_out)
    scales = (largest / 7).clamp(min=1e-7).half()
    codes = (torch.round(w / scales.float()[g_idx]) + 8).clamp(0, 15)
    zeros = torch.full((n_groups, d_out), 8 - 1)
    return {
        "qweight": pack(codes),  # (d_in/8, d_out)
        "qzeros": pack(zeros.T).T.contiguous(),  # (组数, d_out/8)：零点沿着输出装
        "scales": scales,  # (组数, d_out) float16
        "g_idx": g_idx.int(),
    }


def dequantize_linear(tensors: dict[str, Tensor]) -> Tensor:
    """W[o, i] = s[g(i), o] · (q[i, o] − (z[g(i), o] + 1))，(d_out, d_in) float32。"""
    g_idx = tensors["g_idx"].long()
    zeros = unpack(tensors["qzeros"].T).T + 1  # (组数, d_out)
    codes = unpack(tensors["qweight"])  # (d_in, d_out)
    return (tensors["scales"].float()[g_idx] * (codes - zeros[g_idx])).T.contiguous()


# ---------------------------------------------------------------- 3. 整个文件夹


def save_gptq(folder: Path, model, tokenizer, group: int) -> dict[str, float]:
    """把 model 存成 GPTQ 的文件夹 → 线性层的名字 → 小到几分之一（float32 的字节 ÷ 四个张量的字节）。"""
    head = model.get_output_embeddings()
    tensors: dict[str, Tensor] = {}
    shrunk: dict[str, float] = {}
    quantized: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            parts = quantize_linear(module.weight, group)
            tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
            shrunk[name] = 4 * module.weight.numel() / sum(t.nbytes for t in parts.values())
            quantized.add(f"{name}.weight")
    for name, tensor in model.state_dict().items():
        tied = model.config.tie_word_embeddings and name == "lm_head.weight"
        if name not in quantized and not tied:  # 嵌入、归一化、偏置照旧，存 float16
            tensors[name] = tensor.detach().half().cpu().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = model.config.to_dict() | {
        "architectures": [type(model).__name__],
        "dtype": "float16",
        "quantization_config": {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": group,
            "sym": True,
            "desc_act": False,
            "lm_head": False,
            "checkpoint_format": "gptq",
            "pack_dtype": "int32",
        },
    }
    text = json.dumps(config, ensure_ascii=False, indent=2, default=str)
    (folder / "config.json").write_text(text, encoding="utf-8")
    tokenizer.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    write_sums(folder)
    return shrunk


def load_gptq(folder: Path):
    """核对 sha256，读回来，还原成普通的 float32 模型：没有装 GPTQ 的内核也能用，只是不省内存。"""
    from transformers import AutoConfig

    check_sums(folder)
    saved = load_file(folder / WEIGHTS)
    layers = sorted(name.removesuffix(".qweight") for name in saved if name.endswith(".qweight"))
    if not layers:
        raise UserError(f"{folder} 里没有 qweight，不是 GPTQ 的文件夹。")
    state = {}
    for name in layers:
        parts = {part: saved.pop(f"{name}.{part}") for part in ("qweight", "qzeros", "scales", "g_idx")}
        state[f"{name}.weight"] = dequantize_linear(parts)
    state |= {name: tensor.float() for name, tensor in saved.items()}
    with readable_errors(str(folder)):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    del config.quantization_config  # 已经还原成普通的权重了
    return model_from_state(folder, config, state, AGAIN).eval()


def write_sums(folder: Path) -> dict[str, str]:
    """文件夹里每个文件的 sha256 写进 sha256.json；最后才写它，有它就是写完了。"""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != SUMS)
    sums = {path.name: file_sha256(path) for path in files}
    (folder / SUMS).write_text(json.dumps(sums, indent=2), encoding="utf-8")
    return sums


def check_sums(folder: Path) -> None:
    """没有写完、少了文件、内容变了，都是 UserError。"""
    sums = read_note(folder, SUMS, "save_quantized.py", AGAIN)
    if not isinstance(sums, dict):
        raise UserError(f"{folder / SUMS} 坏了，读不出来；{AGAIN}。")
    for name, wanted in sums.items():
        check_file(folder / name, str(wanted), AGAIN)
