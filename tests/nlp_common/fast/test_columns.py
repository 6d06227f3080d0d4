"""只算有人读的列：数值与梯度都与全算时相等；要缓存、要重算的照常全算；不认识的结构不动。"""

import copy
import inspect

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from nlp_common.fast.columns import labelled_logits, use_read_columns
from nlp_common.fast.rms_norm import use_fused_norms
from nlp_common.lm.loading import load_value_model

COLUMNS = torch.tensor([2, 5, 6, 11])


@pytest.fixture
def ids():
    return torch.randint(5, 500, (3, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def values64(reward_folder, chat_tokenizer):
    return load_value_model(str(reward_folder), chat_tokenizer).eval().double()


def plain(model):
    """同样的权重，没有装 use_read_columns 的 transformers 模型。它的归一化总用 float32 算，所以也换成 float64 的。"""
    other = type(model)(model.config).to(model.dtype)
    other.load_state_dict(model.state_dict())
    return use_fused_norms(other.train(model.training))


def logits_and_gradients(model, ids, **inputs):
    """logits，和它们的一个损失对每个参数的梯度。"""
    model.zero_grad()
    logits = model(input_ids=ids, use_cache=False, **inputs).logits
    logits.tanh().sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same(part, full):
    torch.testing.assert_close(part[0], full[0], rtol=0, atol=1e-12)
    for name, grad in full[1].items():
        torch.testing.assert_close(part[1][name], grad, rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize("padded", [False, True])
def test_causal_lm_equals_the_full_computation(model64, ids, padded):
    model = copy.deepcopy(model64)
    inputs = {}
    if padded:  # 左填充：掩码与位置都照给
        mask = torch.ones_like(ids)
        mask[0, :4] = mask[1, :1] = 0
        inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    full = logits_and_gradients(plain(model), ids, logits_to_keep=COLUMNS, **inputs)
    assert_same(logits_and_gradients(model, ids, logits_to_keep=COLUMNS, **inputs), full)


@pytest.mark.parametrize("installed", [True, False])
def test_labelled_positions_equal_the_full_computation(model64, ids, installed):
    """只算带标签的位置：与全算之后再挑，数值与梯度都相等；没装过的模型也一样。"""
    keep = torch.rand(3, 11, generator=torch.Generator().manual_seed(1)) < 0.3
    model = copy.deepcopy(model64) if installed else plain(model64)
    model.zero_grad()
    logits = labelled_logits(model, ids, keep)
    assert logits.shape == (keep.sum(), model.config.vocab_size)
    logits.tanh().sum().backward()
    reference = plain(model64)
    whole = reference(input_ids=ids, use_cache=False).logits[:, :11][keep]
    whole.tanh().sum().backward()
    torch.testing.assert_close(logits, whole, rtol=0, atol=1e-12)
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-10, msg=name)


def test_the_head_really_sees_only_labelled_positions(model64, ids):
    seen = []
    handle = model64.lm_head.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:-1])))
    keep = torch.zeros(3, 11, dtype=torch.bool)
    keep[0, 2] = keep[1, 2] = keep[2, 7] = True
    labelled_logits(model64, ids, keep)
    handle.remove()
    assert seen == [(3,)]


def test_value_model_equals_the_full_computation(values64, ids):
    reference = plain(values64)
    logits = reference(input_ids=ids, use_cache=False).logits[:, COLUMNS]
    logits.tanh().sum().backward()
    full = logits.detach(), {name: p.grad for name, p in reference.named_parameters()}
    assert_same(logits_and_gradients(values64, ids, logits_to_keep=COLUMNS), full)


@pytest.mark.parametrize("side", ["right", "left"])
def test_reward_model_equals_the_full_computation(reward64, ids, side):
    model = copy.deepcopy(reward64)
    pad = model.config.pad_token_id
    mask = torch.ones_like(ids)
    hidden = slice(9, None) if side == "right" else slice(0, 4)
    mask[0, hidden] = 0
    ids = ids.masked_fill(mask == 0, pad)
    inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    full = logits_and_gradients(plain(model), ids, **inputs)
    assert_same(logits_and_gradients(model, ids, **inputs), full)


def test_the_last_mlp_really_sees_fewer_positions(model64, reward64, ids):
    some = torch.zeros(3, 4, dtype=torch.bool)
    some[0, 1] = some[2, 0] = True
    for model, inputs, expected in (
        (model64, {"logits_to_keep": COLUMNS}, 3 * 4),
        (model64, {"logits_to_keep": COLUMNS, "keep": some}, 2),
        (model64, {}, 3 * 12),
        (reward64, {}, 3),  # 每行只有最后一个 token
    ):
        seen = []
        handle = model.model.layers[-1].mlp.gate_proj.register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(args[0][..., 0].numel())
        )
        model(input_ids=ids, use_cache=False, **inputs)
        handle.remove()
        assert seen == [expected]


@pytest.mark.parametrize("kind", ["model64", "values64"])
def test_gradient_checkpointing_computes_everything(request, kind, ids):
    model = copy.deepcopy(request.getfixturevalue(kind))
    full = logits_and_gradients(model, ids, logits_to_keep=COLUMNS)
    model.train()
    new_name = getattr(model, "activation_checkpointing_enable", None)  # transformers 5.23 起改名
    (new_name or model.gradient_checkpointing_enable)()
    assert_same(logits_and_gradients(model, ids, logits_to_keep=COLUMNS), full)


def test_generation_with_a_cache_is_untouched(model64, ids):
    reference = plain(model64)
    ours = model64.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(ours, reference.generate(ids, max_new_tokens=5, do_sample=False))
    assert "logits_to_keep" in inspect.signature(model64.forward).parameters


def test_a_copy_reads_its_own_weights(model64, ids):
    other = copy.deepcopy(model64)
    with torch.no_grad():
        other.model.layers[-1].mlp.up_proj.weight.zero_()
    inputs = {"input_ids": ids, "use_cache": False, "logits_to_keep": COLUMNS}
    torch.testing.assert_close(other(**inputs).logits, plain(other)(**inputs).logits, rtol=0, atol=1e-12)
    assert not torch.allclose(other(**inputs).logits, model64(**inputs).logits)


def test_other_architectures_are_left_alone():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=500, n_embd=16, n_layer=1, n_head=2, n_positions=16)).eval()
    before = model.forward
    assert use_read_columns(model).forward == before
