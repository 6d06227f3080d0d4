"""only_columns：用得着的列，数值与梯度都与全算时相等；挂上去的钩子总会取下来。"""

import contextlib
import copy

import pytest
import torch

from nlp_common.fast.columns import only_columns

COLUMNS = torch.tensor([2, 5, 6, 11])


@pytest.fixture
def ids():
    return torch.randint(5, 500, (3, 12), generator=torch.Generator().manual_seed(0))


def run(model, ids, columns, trimmed: bool):
    """用得着的列的 logits，和它们的一个损失对每个参数的梯度。"""
    model = copy.deepcopy(model)
    with only_columns(model, columns) if trimmed else contextlib.nullcontext():
        logits = model(input_ids=ids, use_cache=False).logits[:, columns]
    logits.tanh().sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", ["model64", "reward_values64"])
def test_values_and_gradients_equal_the_full_computation(request, kind, ids):
    model = request.getfixturevalue(kind)
    full, full_grads = run(model, ids, COLUMNS, trimmed=False)
    part, part_grads = run(model, ids, COLUMNS, trimmed=True)
    torch.testing.assert_close(part, full, rtol=0, atol=1e-12)
    for name, grad in full_grads.items():
        torch.testing.assert_close(part_grads[name], grad, rtol=0, atol=1e-10, msg=name)


@pytest.fixture
def reward_values64(reward_folder, chat_tokenizer):
    from nlp_common.lm.loading import load_value_model

    return load_value_model(str(reward_folder), chat_tokenizer).eval().double()


def test_the_last_mlp_really_sees_fewer_columns(model64, ids):
    seen = []
    handle = model64.model.layers[-1].mlp.gate_proj.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].shape[1])
    )
    with only_columns(model64, COLUMNS):
        model64(input_ids=ids)
    model64(input_ids=ids)
    handle.remove()
    assert seen == [4, 12]


def test_hooks_are_removed_even_after_an_error(model64, ids):
    expected = model64(input_ids=ids).logits
    with pytest.raises(RuntimeError, match="中断"), only_columns(model64, COLUMNS):
        raise RuntimeError("中断")
    assert torch.equal(model64(input_ids=ids).logits, expected)


def test_gradient_checkpointing_computes_everything(model64, ids):
    """重算发生在反向时，那时已经不在 with 里：少算会对不上，所以照常全算。"""
    full, full_grads = run(model64, ids, COLUMNS, trimmed=False)
    model = copy.deepcopy(model64).train()
    new_name = getattr(model, "activation_checkpointing_enable", None)  # transformers 5.23 起改名
    (new_name or model.gradient_checkpointing_enable)()
    part, part_grads = run(model, ids, COLUMNS, trimmed=True)
    torch.testing.assert_close(part, full, rtol=0, atol=1e-12)
    for name, grad in full_grads.items():
        torch.testing.assert_close(part_grads[name], grad, rtol=0, atol=1e-10, msg=name)


def test_other_architectures_are_left_alone(ids):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=500, n_embd=16, n_layer=1, n_head=2, n_positions=16)).eval()
    with only_columns(model, COLUMNS):
        inside = model(input_ids=ids).logits
    assert torch.equal(inside, model(input_ids=ids).logits)
