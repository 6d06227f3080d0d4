"""gguf_blocks.py：Q8_0、Q4_0 与 gguf 包逐位相同，手算的一块，误差不超过半格，整块是 0 的。"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from gguf_blocks import decode, encode, round_away

FLOATS = st.floats(-1e4, 1e4, width=32)


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("scale", [1e-8, 1e-3, 0.02, 1.0, 1e3])
def test_bytes_equal_the_gguf_package(kind, scale):
    gguf = pytest.importorskip("gguf", reason="没有装 gguf")
    weight = np.random.default_rng(0).standard_normal((64, 96)).astype(np.float32) * np.float32(scale)
    weight[0], weight[1, :32] = 0, 0  # 整块是 0
    weight[2] = np.round(weight[2] / scale * 4) / 4 * scale  # 正好落在一半上的
    theirs = gguf.quants.quantize(weight, gguf.GGMLQuantizationType[kind.upper()])
    ours = encode(weight, kind)
    assert np.array_equal(ours, theirs.view(np.uint8).reshape(-1))
    back = gguf.quants.dequantize(theirs, gguf.GGMLQuantizationType[kind.upper()])
    assert np.array_equal(decode(ours, kind, weight.shape), back)


@settings(max_examples=60, deadline=None)
@given(arrays(np.float32, (2, 32), elements=FLOATS), st.sampled_from(["q8_0", "q4_0"]))
def test_any_block_equals_the_gguf_package(weight, kind):
    gguf = pytest.importorskip("gguf", reason="没有装 gguf")
    with np.errstate(all="ignore"):
        theirs = gguf.quants.quantize(weight, gguf.GGMLQuantizationType[kind.upper()])
        assert np.array_equal(encode(weight, kind), theirs.reshape(-1))


def test_a_block_by_hand():
    block = np.zeros((1, 32), np.float32)
    block[0, :4] = [-1.0, 0.5, 0.26, 1.0]  # 绝对值最大的是 −1：d = −1 / −8 = 0.125，它正好是第 0 格
    raw = encode(block, "q4_0")
    assert raw[:2].view(np.float16)[0] == 0.125
    assert [number & 15 for number in raw[2:6]] == [
        0,
        12,
        10,
        15,
    ]  # −8 + 8、4 + 8、2 + 8；+1 要第 16 格，没有
    assert decode(raw, "q4_0", (32,))[:4].tolist() == [-1.0, 0.5, 0.25, 0.875]
    raw = encode(block * 127, "q8_0")
    assert raw[:2].view(np.float16)[0] == 1.0
    assert raw[2:6].view(np.int8).tolist() == [-127, 64, 33, 127]  # 63.5 往远离 0 的一边


@settings(max_examples=60, deadline=None)
@given(arrays(np.float32, (3, 32), elements=st.floats(-8, 8, width=32)))
def test_error_is_at_most_one_step(weight):
    for kind, steps, most in (("q8_0", 127, 0.51), ("q4_0", 8, 1.01)):  # q4_0 正的一头少一格，最多差一格
        step = np.abs(weight).max(1, keepdims=True) / steps
        with np.errstate(all="ignore"):  # 小得倒数要溢出的刻度，存成 float16 是 0，编号是几都还原成 0
            error = np.abs(decode(encode(weight, kind), kind, weight.shape) - weight)
        assert (error <= most * step + steps * step * 2**-10 + steps * 2**-24).all()  # 刻度是 float16


def test_sizes():
    weight = np.ones((4, 64), np.float32)
    sizes = {kind: len(encode(weight, kind)) for kind in ("f32", "f16", "q8_0", "q4_0")}
    assert sizes == {"f32": 1024, "f16": 512, "q8_0": 272, "q4_0": 144}


def test_round_away():
    numbers = np.array([0.5, -0.5, 1.5, 2.5, 0.49999997, -2.4], np.float32)
    assert round_away(numbers).tolist() == [1, -1, 2, 3, 0, -2]
