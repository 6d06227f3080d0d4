"""nf4.py：十六个值、量化、还原与 bitsandbytes 逐位相同，手算的一块，四位的线性层的前向与梯度，写不进去的权重。"""

import pytest
import torch
from torch import nn

from nf4 import (
    DYNAMIC,
    VALUES,
    NF4Linear,
    dequantize,
    dequantize_model,
    in_blocks,
    quantize,
    quantize_model,
    scales_of,
)
from nlp_common.base.errors import UserError


@pytest.fixture(scope="module")
def bnb():
    return pytest.importorskip("bitsandbytes.functional", reason="与 bitsandbytes 比：没有装它，跳过")


@pytest.fixture
def weight():
    torch.manual_seed(0)
    return 0.03 * torch.randn(96, 128)


# ---- 值 ----


def test_the_sixteen_values_are_normal_quantiles_and_equal_bitsandbytes(bnb):
    assert torch.equal(VALUES["nf4"], bnb.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(VALUES["fp4"], bnb.get_4bit_type("fp4", device="cpu"))
    assert torch.equal(DYNAMIC, bnb.create_dynamic_map())


def test_the_values_by_hand():
    """NF4 从 −1 到 1 递增，有恰好的 0；正数 8 个、负数 7 个。每两个正的相邻的分位数之间，正态分布的概率相同。"""
    values = VALUES["nf4"].double()
    assert values[0] == -1 and values[7] == 0 and values[15] == 1 and (values.diff() > 0).all()
    largest = torch.special.ndtri(torch.tensor(0.9677083, dtype=torch.float64))
    mass = torch.special.ndtr(values[7:] * largest).diff()
    assert (mass - mass[0]).abs().max() < 1e-6
    assert VALUES["int4"].tolist()[1:] == pytest.approx([i / 7 for i in range(-7, 8)])


# ---- 量化、还原 ----


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("block", [32, 64, 128])
def test_bytes_and_dequantised_equal_bitsandbytes(bnb, weight, kind, block):
    packed, state = bnb.quantize_4bit(weight, blocksize=block, quant_type=kind)
    ours = quantize(weight, kind, block, double=False)
    assert torch.equal(ours.packed, packed.flatten())
    assert torch.equal(ours.scales, state.absmax)
    assert torch.equal(dequantize(ours), bnb.dequantize_4bit(packed, state))


def test_double_quantisation_equals_bitsandbytes_but_for_near_ties(bnb):
    """它在 CPU 上把刻度先舍到 65,536 格再查表：照样舍一次，就逐位相同；不舍，不同的都恰在两个值的中间。"""
    torch.manual_seed(1)
    weight = 0.03 * torch.randn(640, 512)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    ours = quantize(weight)
    assert torch.equal(ours.packed, packed.flatten())
    assert torch.equal(ours.scales_of_scales, state.state2.absmax)
    different = (ours.scales != state.absmax).nonzero().flatten()
    assert len(different) < 0.005 * len(ours.scales)
    scaled = in_blocks(quantize(weight, double=False).scales - ours.mean_scale, 256)
    scaled = (scaled / scaled.abs().amax(1, keepdim=True)).flatten()[: len(ours.scales)]
    ours_off = (scaled - DYNAMIC[ours.scales.int()]).abs()
    theirs_off = (scaled - DYNAMIC[state.absmax.int()]).abs()
    assert (ours_off <= theirs_off + 1e-7).all()  # 我们的总是更近（或一样近）的那个
    assert (theirs_off - ours_off).max() < 2 / 65535
    ours.scales = state.absmax
    assert torch.equal(dequantize(ours), bnb.dequantize_4bit(packed, state))


def test_one_block_by_hand():
    """[7, −3.5, 0, 1]：刻度 7；除以它是 1、−0.5、0、0.143，int4 的编号 15、4 或 5、8、9，两个装一个字节。"""
    q = quantize(torch.tensor([[7.0, -3.6, 0.0, 1.0]]), "int4", 4, double=False)
    assert q.scales.tolist() == [7.0]
    assert q.packed.tolist() == [15 << 4 | 4, 8 << 4 | 9]
    assert dequantize(q).tolist() == [[7.0, -4.0, 0.0, 1.0]]


def test_double_quantised_scales_by_hand():
    """两块，刻度 1 与 3：平均 2，减去它是 −1、1，八位都存得恰好。"""
    q = quantize(torch.tensor([[1.0, 0.5, 3.0, -3.0]]), "int4", 2)
    assert q.mean_scale.item() == 2 and q.scales_of_scales.tolist() == [1.0]
    assert scales_of(q)[1].item() == 3
    assert scales_of(q)[0].item() == pytest.approx(2 + DYNAMIC[0].item())  # −1 存不了，最近的是 −0.993


def test_sizes_and_errors():
    torch.manual_seed(0)
    weight = torch.randn(2048, 512)
    errors = {}
    for kind in VALUES:
        q = quantize(weight, kind, double=False)
        assert 8 * q.n_bytes() / weight.numel() == 4.5
        errors[kind] = ((dequantize(q) - weight).norm() / weight.norm()).item()
    assert errors["nf4"] == pytest.approx(0.092, abs=5e-4)
    assert errors["int4"] == pytest.approx(0.108, abs=5e-4)
    assert errors["fp4"] == pytest.approx(0.122, abs=5e-4)
    assert 8 * quantize(weight).n_bytes() / weight.numel() == pytest.approx(4.127, abs=1e-3)


def test_every_tensor_can_be_saved():
    """没有一个是大张量的一段：safetensors 不存那样的。"""
    for tensor in quantize(torch.randn(96, 128)).tensors():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (7, 64), (65,)])
def test_odd_shapes_come_back(shape):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    for kind in VALUES:
        back = dequantize(quantize(weight, kind))
        assert back.shape == weight.shape
        assert (back - weight).norm() < 0.25 * weight.norm()


def test_zeros_stay_zero():
    assert not dequantize(quantize(torch.zeros(4, 64), "nf4", double=False)).any()


def test_wrong_kinds_and_blocks_are_said(weight):
    with pytest.raises(UserError, match=r"nf5.*nf4、fp4、int4"):
        quantize(weight, "nf5")
    with pytest.raises(UserError, match=r"偶数.*给的是 3"):
        quantize(weight, block=3)


# ---- 四位的线性层 ----


def test_the_layer_equals_a_linear_with_the_dequantised_weight(weight):
    linear = nn.Linear(128, 96)
    linear.weight.data = weight
    layer = NF4Linear(linear)
    plain = nn.Linear(128, 96)
    plain.weight.data, plain.bias.data = layer.weight, linear.bias.data
    x = torch.randn(2, 5, 128, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    layer(x).square().sum().backward()
    plain(other).square().sum().backward()
    assert torch.allclose(layer(x), plain(other), atol=1e-6)
    assert torch.allclose(x.grad, other.grad, atol=1e-5)


def test_backward_keeps_no_dequantised_weight(weight):
    """反向要用的 W 再还原一次：图里留着的只有输入那么大的，没有 96×128 的浮点矩阵。"""
    layer = NF4Linear(nn.Linear(128, 96, bias=False))
    kept = []
    x = torch.randn(4, 128, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        layer(x)
    assert torch.Size([96, 128]) not in kept


def test_the_weight_cannot_be_written(weight):
    layer = NF4Linear(nn.Linear(128, 96))
    with pytest.raises(UserError, match="dequantize_model"):
        layer.weight += 1
    assert [name for name, _ in layer.named_parameters()] == ["bias"]


def test_half_precision_leaves_the_scales_alone(weight):
    linear = nn.Linear(128, 96, bias=False)
    linear.weight.data = weight
    layer = NF4Linear(linear, double=False)
    before = layer.weight
    layer.half()
    assert layer.scales.dtype == torch.float32 and torch.equal(layer.weight, before)
    assert layer(torch.randn(2, 128).half()).dtype == torch.float16


def test_whole_model_there_and_back(base_folder):
    from nlp_common.lm.loading import load_causal_lm

    _, model = load_causal_lm(str(base_folder))
    ids = torch.arange(20)[None]
    changed = quantize_model(model)
    assert "lm_head" not in changed and len(changed) == 14  # 两层，每层七个
    assert not [name for name, _ in model.named_parameters() if name.endswith("proj.weight")]
    with torch.no_grad():
        four_bit = model(ids).logits
        dequantize_model(model)
        assert torch.allclose(model(ids).logits, four_bit, atol=1e-5)
    assert not [m for m in model.modules() if isinstance(m, NF4Linear)]
