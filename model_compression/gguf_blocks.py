"""GGUF 里权重的几种存法：f32、f16，与 32 个数一块的 q8_0、q4_0。numpy 写，与 llama.cpp 逐位相同。

    q8_0   一块 34 字节：刻度 d 的 float16（2 字节），32 个 int8                  8.5 位一个数
           d = max|w| / 127        q = round(w / d)，−127 … 127                   ŵ = d·q
    q4_0   一块 18 字节：刻度 d 的 float16，32 个 4 位的数（16 字节）              4.5 位一个数
           d = m / −8，m 是绝对值最大的那个（带着正负号）
           q = ⌊w / d + 8.5⌋，0 … 15                                               ŵ = d·(q − 8)

q4_0 能表示 −8d … 7d，一头比另一头多一格：让绝对值最大的那个正好落在 −8d，它一点误差也没有，所以 d 可以是负的。
两个数装一个字节：低四位是这一块的第 i 个，高四位是第 i + 16 个。
除的是没有舍入的 d，存的是舍入成 float16 的：llama.cpp 就是这样，写成别的样子字节就不同了。
"""

from __future__ import annotations

import numpy as np

BLOCK = 32


def encode(weight: np.ndarray, kind: str) -> np.ndarray:
    """float32 的权重 → 那种存法的字节，(字节数,)。q8_0、q4_0 要最后一维是 32 的倍数。"""
    weight = np.ascontiguousarray(weight, np.float32)
    if kind == "f32":
        return weight.view(np.uint8).reshape(-1)
    if kind == "f16":
        return weight.astype(np.float16).view(np.uint8).reshape(-1)
    blocks = weight.reshape(-1, BLOCK)  # (N, 32)
    return {"q8_0": encode_q8_0, "q4_0": encode_q4_0}[kind](blocks).reshape(-1)


def decode(raw: np.ndarray, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """字节 → float32 的权重，形状 shape。"""
    if kind in ("f32", "f16"):
        return raw.view(np.float32 if kind == "f32" else np.float16).astype(np.float32).reshape(shape)
    return {"q8_0": decode_q8_0, "q4_0": decode_q4_0}[kind](raw).reshape(shape)


def encode_q8_0(blocks: np.ndarray) -> np.ndarray:
    """(N, 32) → (N, 34)"""
    scale = np.abs(blocks).max(1, keepdims=True) / np.float32(127)  # (N, 1)
    scaled = blocks * inverse(scale)
    numbers = round_away(scaled).astype(np.int8)
    return np.concatenate([half_bytes(scale), numbers.view(np.uint8)], 1)


def decode_q8_0(raw: np.ndarray) -> np.ndarray:
    blocks = raw.reshape(-1, 34)
    return scales_of(blocks) * blocks[:, 2:].view(np.int8).astype(np.float32)


def encode_q4_0(blocks: np.ndarray) -> np.ndarray:
    """(N, 32) → (N, 18)"""
    largest = np.abs(blocks).argmax(1)[:, None]
    scale = np.take_along_axis(blocks, largest, 1) / np.float32(-8)  # (N, 1)
    numbers = np.trunc(blocks * inverse(scale) + np.float32(8.5))
    numbers = numbers.clip(0, 15).astype(np.uint8)  # 正的那一头会到 8，只有 7 格
    packed = numbers[:, :16] | numbers[:, 16:] << 4  # (N, 16)
    return np.concatenate([half_bytes(scale), packed], 1)


def decode_q4_0(raw: np.ndarray) -> np.ndarray:
    blocks = raw.reshape(-1, 18)
    packed = blocks[:, 2:]  # (N, 16)
    numbers = np.concatenate([packed & 15, packed >> 4], 1)  # (N, 32)
    return scales_of(blocks) * (numbers.astype(np.float32) - 8)


def round_away(numbers: np.ndarray) -> np.ndarray:
    """四舍五入，正好一半的往远离 0 的一边（C 的 roundf）；np.round 是往偶数的一边。"""
    size = np.abs(numbers)
    whole = np.floor(size)  # 不写 floor(x + 0.5)：0.49999997 加 0.5，float32 里就成了 1
    return np.sign(numbers) * (whole + (size - whole >= 0.5))


def inverse(scale: np.ndarray) -> np.ndarray:
    """1 / d；整块都是 0 的，d 是 0，也给 0。"""
    return np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)


def half_bytes(scale: np.ndarray) -> np.ndarray:
    """(N, 1) 的刻度 → float16 的 (N, 2) 个字节。"""
    return scale.astype(np.float16).view(np.uint8)


def scales_of(blocks: np.ndarray) -> np.ndarray:
    """每块开头两个字节 → (N, 1) 的刻度。"""
    return np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)
