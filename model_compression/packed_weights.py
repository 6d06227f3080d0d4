"""几位的权重怎样存：格子（刻度与零点）、把编号一位不空地装进字节、整个模型的文件夹。

一个矩阵每个输出、每 group 个相邻的输入共用一个刻度（float16）与一个零点（几位的权重，它就几位）：

    ŵ = s · (q − z)        q、z ∈ 0 … 2^bits − 1
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nlp_common.base.errors import UserError
from noted_weights import load_model, read_about, save_model

WEIGHTS, ABOUT = "packed.safetensors", "packed.json"
AGAIN = "请重新复制，或重新量化"
PARTS = ("codes", "scales", "zeros")
SMALLEST = 1e-7  # 全是 0 的一组，刻度也不能是 0（float16 里还表示得出）

# ---------------------------------------------------------------- 1. 格子


def make_grid(w: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """w (out, n)：一组权重 → 每个输出的 (刻度, 零点)，各 (out,)。从最小到最大分 2^bits 格，0 总在格子上。

    刻度先舍入成 float16，再去取编号：存下来的就是用过的，读回来一个数也不差。
    """
    top = 2**bits - 1
    low, high = w.amin(1).clamp(max=0), w.amax(1).clamp(min=0)
    scale = ((high - low) / top).clamp(min=SMALLEST).half().to(w.dtype)
    return scale, (-low / scale).round().clamp(0, top)


def to_codes(w: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """最近的一格的编号，0 … 2^bits − 1；在格子外面的归最边上的一格。"""
    return (w / scale + zero).round().clamp(0, 2**bits - 1)


def restore(codes: Tensor, scales: Tensor, zeros: Tensor, group: int) -> Tensor:
    """ŵ = s · (q − z)：编号 (out, in)，刻度与零点 (out, 组数) → (out, in)。"""
    which = torch.arange(codes.shape[1]) // group  # (in,)：第几个输入在第几组
    return scales[:, which] * (codes - zeros[:, which])


# ---------------------------------------------------------------- 2. 编号装进字节


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """(n,) 里 0 … 2^bits − 1 的整数 → ⌈n·bits/8⌉ 个字节：一位接一位，低位在前，3 位的也不空着。"""
    places = torch.arange(bits, dtype=torch.uint8)
    stream = (codes.flatten().to(torch.uint8)[:, None] >> places & 1).flatten()  # (n·bits,) 0 或 1
    stream = torch.nn.functional.pad(stream, (0, -len(stream) % 8)).view(-1, 8)
    return (stream << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, bits: int, n: int) -> Tensor:
    """pack_bits 的反过来，取前 n 个，(n,) int32。"""
    stream = (packed[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten()[: n * bits]
    return (stream.view(n, bits) << torch.arange(bits, dtype=torch.uint8)).sum(1, dtype=torch.uint8).int()


@dataclass
class Packed:
    """一个矩阵量化以后留下的。"""

    codes: Tensor  # ⌈out·in·bits/8⌉ 个字节
    scales: Tensor  # (out, 组数) float16
    zeros: Tensor  # ⌈out·组数·bits/8⌉ 个字节
    shape: tuple[int, int]
    bits: int
    group: int

    @classmethod
    def of(cls, codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, group: int) -> Packed:
        """codes (out, in)、scales 与 zeros (out, 组数) → 装好的。"""
        packed = pack_bits(codes.cpu(), bits), scales.half().cpu(), pack_bits(zeros.cpu(), bits)
        return cls(*packed, tuple(codes.shape), bits, group)

    def weight(self) -> Tensor:
        """还原，(out, in) float32。"""
        n_groups = math.ceil(self.shape[1] / self.group)
        codes = unpack_bits(self.codes, self.bits, math.prod(self.shape)).view(self.shape)
        zeros = unpack_bits(self.zeros, self.bits, self.shape[0] * n_groups).view(-1, n_groups)
        return restore(codes, self.scales.float(), zeros, self.group)

    def n_bytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes + self.zeros.nbytes


def packed_bytes(model, packed: dict[str, Packed]) -> int:
    """存下来几个字节：量化的几位，刻度、零点都算；其余的（归一、偏置）float16；共用的只算一遍。"""
    rest = {p.data_ptr(): p.numel() for name, p in rest_of(model, packed)}
    return sum(each.n_bytes() for each in packed.values()) + 2 * sum(rest.values())


def rest_of(model, packed: dict[str, Packed]) -> list[tuple[str, Tensor]]:
    """没有量化的参数。"""
    done = {id(model.get_parameter(name)) for name in packed}
    return [(name, p) for name, p in model.named_parameters() if id(p) not in done]


# ---------------------------------------------------------------- 3. 整个文件夹


def save_packed(folder: str | Path, model, tokenizer, packed: dict[str, Packed]) -> None:
    """model 是 quantize_model 量化过的，packed 是它给的；packed.json 最后写，有它就是写完了。"""
    tensors = {f"{name}.{part}": getattr(each, part) for name, each in packed.items() for part in PARTS}
    tensors |= {name: p.detach().half().cpu().contiguous() for name, p in rest_of(model, packed)}
    layers = {name: [*each.shape, each.bits, each.group] for name, each in packed.items()}
    save_model(Path(folder), model, tokenizer, tensors, layers, WEIGHTS, ABOUT)


def load_packed(folder: str | Path):
    """→ (分词器, 模型)：还原成普通的 float32 模型，与存的时候 logits 相同；省的是磁盘，不是内存。"""
    folder = Path(folder)
    layers = read_about(folder, WEIGHTS, ABOUT, "quantization.py", AGAIN)
    try:
        saved = load_file(folder / WEIGHTS)
        state = {}
        for name, (n_out, n_in, bits, group) in layers.items():
            parts = [saved.pop(f"{name}.{part}") for part in PARTS]
            state[name] = Packed(*parts, (n_out, n_in), bits, group).weight()
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder} 的权重与 {ABOUT} 对不上（{error}）；{AGAIN}。") from None
    state |= {name: tensor.float() for name, tensor in saved.items()}
    return load_model(folder, state, AGAIN)
