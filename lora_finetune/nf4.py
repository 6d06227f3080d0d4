"""四位的数：NF4、FP4、int4 的十六个值，分块量化与还原，双重量化，和放在 LoRA 底下的 NF4Linear。

字节的排法与 bitsandbytes 的相同：两个四位的编号装一个字节，前一个在高四位。
参考：Dettmers et al. 2023（QLoRA：NF4、双重量化）；Dettmers et al. 2022（八位的动态小数）。
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nlp_common.base.errors import UserError

BLOCK = 64  # 几个权重共用一个刻度
BLOCK_OF_SCALES = 256  # 双重量化：几个刻度再共用一个
INSTALL = "pip install bitsandbytes==0.50.2"


# ---------------------------------------------------------------- 1. 四位能表示哪些值


def normal_float_values() -> Tensor:
    """NF4 的十六个值，(16,)：正态分布的分位数，除以最大的（QLoRA 式 4）。

    权重差不多是正态分布，所以每个值分到的权重差不多一样多，四位没有一格是白占的。
    两边各取分位数，正的 8 个、负的 7 个，再加上恰好是 0 的一个：0（填充、剪掉的）要能不差地存。
    """
    offset = 0.9677083  # 1 − (1/32 + 1/30)/2：最外面的分位数不能取 1，那是无穷大
    normal_quantile = torch.special.ndtri
    positive = normal_quantile(torch.linspace(offset, 0.5, 9)[:-1].double())  # 8 个，从大到小
    negative = -normal_quantile(torch.linspace(offset, 0.5, 8)[:-1].double())  # 7 个，从小到大
    values = torch.cat([negative, torch.zeros(1, dtype=torch.float64), positive.flip(0)]).float()
    return values / values.max()


def four_bit_float_values() -> Tensor:
    """FP4（1 位符号、2 位指数、1 位尾数）的十六个值，按编号排，(16,)；最大的是 1。"""
    half = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3]) / 12
    return torch.cat([half, -half])


VALUES = {
    "nf4": normal_float_values(),
    "fp4": four_bit_float_values(),
    "int4": torch.arange(-8, 8) / 7,  # 等距；刻度让最大的是 7，所以 −8 用不上
}


def dynamic_values() -> Tensor:
    """八位动态小数的 256 个值，从小到大：1 位符号，指数越小，剩给小数的位越多（Dettmers et al. 2022 图 2）。"""
    sizes = [torch.zeros(1)]
    for power in range(7):  # 10⁻⁶ … 10⁰：小数部分有 1、2、4 … 64 个，取各小段的中点
        edges = torch.linspace(0.1, 1, 2**power + 1)
        sizes.append(10 ** (power - 6) * (edges[:-1] + edges[1:]) / 2)
    positive = torch.cat(sizes)  # 0 与 127 个正数
    return torch.cat([-positive[1:], positive, torch.ones(1)]).sort().values


DYNAMIC = dynamic_values()

# ---------------------------------------------------------------- 2. 分块量化与还原


@dataclass
class FourBit:
    """一个矩阵量化成四位之后留下的。"""

    packed: Tensor  # (n/2,) uint8：两个编号一个字节
    scales: Tensor  # (块数,) 每块最大的绝对值，float32；双重量化的是 uint8
    scales_of_scales: Tensor | None  # (块数/256,) float32，双重量化才有
    mean_scale: Tensor | None  # () float32，双重量化才有
    shape: tuple[int, ...]
    kind: str = "nf4"
    block: int = BLOCK

    def tensors(self) -> list[Tensor]:
        return [
            t for t in (self.packed, self.scales, self.scales_of_scales, self.mean_scale) if t is not None
        ]

    def n_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())


def nearest(x: Tensor, values: Tensor) -> Tensor:
    """x 里每个数最近的是 values 的第几个，形状同 x；恰好在两个中间的，归小的那个。"""
    order = values.argsort()
    ordered = values[order]
    middles = (ordered[:-1] + ordered[1:]) / 2
    return order[torch.bucketize(x, middles)]


def in_blocks(x: Tensor, block: int) -> Tensor:
    """x 拉平，切成一块一块，(块数, block)；最后一块不满的补 0。"""
    x = x.flatten().float()
    return F.pad(x, (0, -len(x) % block)).view(-1, block)


def quantize(weight: Tensor, kind: str = "nf4", block: int = BLOCK, double: bool = True) -> FourBit:
    """weight 量化成四位：每块除以自己最大的绝对值，落进 [−1, 1]，再取最近的一个值（QLoRA 式 1）。

    double：刻度再量化成八位。kind：nf4、fp4、int4。
    """
    if kind not in VALUES:
        raise UserError(f"不认识四位的写法 {kind}，可以是 {'、'.join(VALUES)}。")
    if block < 2 or block % 2:
        raise UserError(f"块的大小要是 2 以上的偶数（两个四位的数装一个字节），给的是 {block}。")
    blocks = in_blocks(weight.detach(), block)
    scales = blocks.abs().amax(1)  # (块数,)
    scaled = (blocks * (1 / scales.clamp(min=1e-38))[:, None]).clamp(-1, 1)
    index = nearest(scaled, VALUES[kind].to(weight.device)).to(torch.uint8).flatten()
    index = index[: weight.numel() + weight.numel() % 2]
    packed = index[::2] << 4 | index[1::2]
    shape = tuple(weight.shape)
    if not double:
        return FourBit(packed, scales, None, None, shape, kind, block)
    mean = scales.mean()  # 刻度都是正数，先减去平均，八位才不浪费一半
    eight_bit, scales_of_scales = quantize_scales(scales - mean)
    return FourBit(packed, eight_bit, scales_of_scales, mean, shape, kind, block)


def dequantize(q: FourBit, dtype: torch.dtype = torch.float32) -> Tensor:
    """四位 → 一个普通的矩阵：编号换成值，乘上它那一块的刻度。"""
    table, byte = VALUES[q.kind].to(q.packed.device), torch.arange(256, device=q.packed.device)
    pairs = torch.stack([table[byte >> 4], table[byte & 15]], 1)  # (256, 2)：一个字节是哪两个值
    values = in_blocks(pairs.index_select(0, q.packed.int()), q.block)  # (块数, block)
    weight = (values * scales_of(q)[:, None]).flatten()
    return weight[: math.prod(q.shape)].view(q.shape).to(dtype)


def quantize_scales(scales: Tensor) -> tuple[Tensor, Tensor]:
    """双重量化：刻度每 256 个一块，存成八位的动态小数 → (编号 uint8, 每块的刻度 float32)。"""
    blocks = in_blocks(scales, BLOCK_OF_SCALES)
    largest = blocks.abs().amax(1)
    scaled = blocks / largest.clamp(min=1e-38)[:, None]
    index = nearest(scaled, DYNAMIC.to(scales.device)).to(torch.uint8)
    return index.flatten()[: len(scales)].clone(), largest  # 不带着补的 0：不然存不进 safetensors


def scales_of(q: FourBit) -> Tensor:
    """每块的刻度，(块数,) float32；双重量化的先还原。"""
    if q.scales_of_scales is None:
        return q.scales
    values = in_blocks(DYNAMIC.to(q.scales.device)[q.scales.int()], BLOCK_OF_SCALES)
    scales = (values * q.scales_of_scales[:, None]).flatten()[: len(q.scales)]
    return scales + q.mean_scale


# ---------------------------------------------------------------- 3. 四位的线性层


class FourBitMatmul(torch.autograd.Function):
    """y = xWᵀ，W 用的时候才还原。反向要用 W 时再还原一次：留着它，省下的内存就又花出去了。"""

    @staticmethod
    def forward(ctx, x: Tensor, q: FourBit) -> Tensor:  # (B, T, d_in) → (B, T, d_out)
        ctx.q = q
        return F.linear(x, dequantize(q, x.dtype))

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad @ dequantize(ctx.q, grad.dtype), None  # W 冻住，没有梯度


class NF4Linear(nn.Linear):
    """权重是四位的线性层：只给 LoRA 当底座。读 weight 得到还原的矩阵；四位的数没有梯度，写不进去。"""

    def __init__(self, linear: nn.Linear, kind: str = "nf4", block: int = BLOCK, double: bool = True):
        nn.Module.__init__(self)  # 不要 nn.Linear 的 weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.kind, self.block = kind, block
        q = quantize(linear.weight, kind, block, double)
        self.register_buffer("packed", q.packed)
        self.register_buffer("scales", q.scales)
        self.register_buffer("scales_of_scales", q.scales_of_scales)
        self.register_buffer("mean_scale", q.mean_scale)
        self.bias = linear.bias

    def four_bit(self) -> FourBit:
        shape = (self.out_features, self.in_features)
        return FourBit(
            self.packed, self.scales, self.scales_of_scales, self.mean_scale, shape, self.kind, self.block
        )

    def forward(self, x: Tensor) -> Tensor:
        y = FourBitMatmul.apply(x, self.four_bit())
        return y if self.bias is None else y + self.bias

    @property
    def weight(self) -> Tensor:
        return dequantize(self.four_bit())

    @weight.setter
    def weight(self, value) -> None:
        raise UserError(
            "底座的权重是四位的，不能直接改：要合并 LoRA，先还原成普通的 Linear（nf4.py 的 dequantize_model），合并，再量化。"
        )

    def _apply(self, fn, recurse: bool = True):
        """换设备就跟着换；换精度（model.half()）不动刻度，它们总是 float32。"""
        kept = [(name, tensor) for name, tensor in self._buffers.items() if tensor is not None]
        super()._apply(fn, recurse)
        for name, tensor in kept:
            self._buffers[name] = tensor.to(self._buffers[name].device)
        return self


def quantize_model(model: nn.Module, kind: str = "nf4", block: int = BLOCK, double: bool = True) -> list[str]:
    """model 里除输出层外的每个 Linear 换成 NF4Linear，返回换了哪些；已经装了 LoRA 的，换的是它的底座。"""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    chosen = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not isinstance(module, NF4Linear) and module is not head
    ]
    for name in chosen:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, NF4Linear(model.get_submodule(name), kind, block, double))
    return chosen


def dequantize_model(model: nn.Module) -> nn.Module:
    """NF4Linear 都还原成普通的 Linear（量化的误差留着）：此后可以合并 LoRA、照常存盘。返回 model。"""
    for name, module in list(model.named_modules()):
        if isinstance(module, NF4Linear):
            linear = nn.Linear(
                module.in_features, module.out_features, module.bias is not None, device=module.packed.device
            )
            linear.weight.data = dequantize(module.four_bit())
            linear.bias = module.bias
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, linear)
    return model


def import_bitsandbytes():
    """用到才导入 bitsandbytes；没有装是 UserError。"""
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise UserError(f"要用 bitsandbytes，没有装：{INSTALL}。") from error
