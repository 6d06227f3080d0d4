"""剪过的权重怎样存才真的小：一个权重一位说是不是 0，后面只存不是 0 的。还有别的几种存法各要几个字节。"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nlp_common.base.errors import UserError
from noted_weights import load_model, read_about, save_model
from packed_weights import pack_bits, unpack_bits

WEIGHTS, ABOUT = "sparse.safetensors", "sparse.json"
AGAIN = "请重新复制，或重新运行 pruning.py"


def bytes_of(shape: tuple[int, int], kept: int, value: int = 2) -> dict[str, float]:
    """shape (out, in) 的矩阵留下 kept 个，一个数 value 个字节（默认 16 位），各种存法几个字节。

    dense   0 也照存
    bitmap  一个位置一位，加上留下的
    csr16   每个留下的记一个 16 位的列号（in 不超过 65536），每行记一个 32 位的起点
    torch   torch.sparse_csr_tensor 默认的 CSR：列号与起点都是 64 位
    2of4    2:4：每四个留两个，每个记 2 位的位置（只有正好是 2:4 的才行，与 kept 无关）
    """
    n_out, n_in = shape
    n = n_out * n_in
    return {
        "dense": n * value,
        "bitmap": math.ceil(n / 8) + kept * value,
        "csr16": kept * (value + 2) + 4 * (n_out + 1),
        "torch": kept * (value + 8) + 8 * (n_out + 1),
        "2of4": n / 2 * value + n / 8,
    }


def total_bytes(masks: dict[str, Tensor], value: int = 2) -> dict[str, float]:
    """各层加起来：各种存法几个字节，不算没有剪的嵌入与归一；不是 2:4 的没有 2of4 一项。"""
    total: dict[str, float] = {}
    for keep in masks.values():
        for name, n in bytes_of(tuple(keep.shape), int(keep.sum()), value).items():
            total[name] = total.get(name, 0) + n
    if not all(k.shape[1] % 4 == 0 and (k.unflatten(1, (-1, 4)).sum(-1) <= 2).all() for k in masks.values()):
        del total["2of4"]
    return total


# ---------------------------------------------------------------- 存与读


def save_sparse(folder: str | Path, model, tokenizer, masks: dict[str, Tensor]) -> None:
    """masks 是 prune 给的 {线性层的全名: 留下的位置}；sparse.json 最后写，有它就是写完了。数的精度不变。"""
    tensors, layers = {}, {}
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for name, parameter in model.state_dict().items():
        layer = name.removesuffix(".weight")
        if layer in masks:
            keep = masks[layer].cpu()
            tensors[f"{name}.mask"] = pack_bits(keep, 1)
            tensors[f"{name}.values"] = parameter.cpu()[keep]  # 从左到右、从上到下
            layers[name] = list(keep.shape)
        elif not (tied and name == "lm_head.weight"):
            tensors[name] = parameter.cpu().contiguous()
    save_model(Path(folder), model, tokenizer, tensors, layers, WEIGHTS, ABOUT)


def load_sparse(folder: str | Path):
    """→ (分词器, 模型)：0 都补回去，是普通的稠密模型，logits 与存的时候一位不差；省的是磁盘与下载，不是内存。"""
    folder = Path(folder)
    layers = read_about(folder, WEIGHTS, ABOUT, "pruning.py", AGAIN)
    try:
        state = load_file(folder / WEIGHTS)
        for name, shape in layers.items():
            mask, values = state.pop(f"{name}.mask"), state.pop(f"{name}.values")
            keep = unpack_bits(mask, 1, math.prod(shape)).bool().view(shape)
            state[name] = torch.zeros(shape, dtype=values.dtype).masked_scatter(keep, values)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder} 的权重与 {ABOUT} 对不上（{error}）；{AGAIN}。") from None
    return load_model(folder, state, AGAIN)
