"""手写反向的 RMSNorm：数值与梯度都与 transformers 的相等。"""

import copy

import pytest
import torch
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from nlp_common.fast.rms_norm import RMSNorm, use_fused_norms


@pytest.fixture
def norm():
    module = Qwen2RMSNorm(16, eps=1e-6).double()
    with torch.no_grad():
        module.weight.copy_(torch.randn(16, generator=torch.Generator().manual_seed(0)))
    return module


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e3])  # 很小的输入，ε 才起作用
def test_equals_transformers(norm, size):
    x = (size * torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))).double()
    results = []
    for forward in (
        use_fused_norms(copy.deepcopy(norm)),
        lambda x: torch.nn.functional.rms_norm(x, (16,), norm.weight, 1e-6),
        lambda x: Qwen2RMSNorm.forward(norm, x),
    ):
        inputs = x.clone().requires_grad_()
        out = forward(inputs)
        out.tanh().sum().backward()
        weight = (forward if isinstance(forward, torch.nn.Module) else norm).weight
        results.append((out.detach(), inputs.grad, weight.grad))
        norm.zero_grad()
    ours, torchs, transformers = results
    torch.testing.assert_close(ours, torchs, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ours, transformers, rtol=1e-5, atol=1e-6)  # 它里面先转成 float32


def test_gradient_is_the_derivative(norm):
    x = torch.randn(
        2, 3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    ).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: RMSNorm.apply(x, w, 1e-6), (x, norm.weight))


def test_every_norm_of_the_model_is_replaced(model64):
    model = use_fused_norms(copy.deepcopy(model64))
    seen = []
    for module in model.modules():
        if type(module).__name__ == "Qwen2RMSNorm":
            module.register_forward_hook(lambda *args: seen.append(type(args[2].grad_fn).__name__))
    model(input_ids=torch.tensor([[5, 6, 7]]))
    assert seen == ["RMSNormBackward"] * 5  # 两层各两个，最后一个


def test_mixed_precision_falls_back(norm):
    module = use_fused_norms(copy.deepcopy(norm).float())
    x = torch.randn(2, 16, generator=torch.Generator().manual_seed(3)).bfloat16()
    assert torch.equal(module(x), Qwen2RMSNorm.forward(module, x))
