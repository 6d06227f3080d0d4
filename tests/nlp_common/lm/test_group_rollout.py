"""一个提示写 G 个回答：采样、对数概率、梯度都与把提示写 G 遍时相等，只是提示只算一遍。"""

import copy
from types import SimpleNamespace

import pytest
import torch

from nlp_common.fast.shared_prompts import merge_groups
from nlp_common.lm.chatml import prompt_ids
from nlp_common.lm.generation import padded_positions, takes_4d_masks
from nlp_common.lm.rollout import group_logps, join_rollouts, response_logps, roll_out
from nlp_common.tiny import world

G, WIDTH = 3, 6


@pytest.fixture(scope="module")
def prompts(chat_tokenizer):
    prompts = [prompt_ids(chat_tokenizer, q["messages"]) for q in world.questions(4, 6)]
    prompts[1] = prompts[1][-9:]
    assert len({len(prompt) for prompt in prompts}) > 2
    return prompts


def sampled(model, prompts, tokenizer, seed=0, **more):
    return roll_out(model, prompts, tokenizer, WIDTH, 1.0, torch.Generator().manual_seed(seed), **more)


@pytest.fixture(scope="module")
def whole(model64, prompts, chat_tokenizer):
    return sampled(model64, prompts, chat_tokenizer, group=G)


@pytest.fixture(scope="module")
def rollout(whole, chat_tokenizer):
    """同一批回答，截成有长有短的：一个 token 的、写满的都有。"""
    lengths = torch.tensor([1, 6, 3, 2, 2, 1, 6, 5, 4, 3, 1, 6])
    cut = copy.deepcopy(whole)
    cut.mask = torch.arange(WIDTH) < lengths[:, None]
    cut.attention_mask[:, -WIDTH:] = cut.mask.long()
    cut.ids[:, -WIDTH:][~cut.mask] = chat_tokenizer.pad_token_id
    cut.position_ids = padded_positions(cut.attention_mask)
    return cut


def test_groups_sample_what_repeated_prompts_would(model64, prompts, chat_tokenizer, whole):
    repeated = [prompt for prompt in prompts for _ in range(G)]
    one_by_one = sampled(model64, repeated, chat_tokenizer)
    for name in ("ids", "attention_mask", "position_ids", "mask", "ended"):
        assert torch.equal(getattr(whole, name), getattr(one_by_one, name)), name


def test_the_prompt_is_read_once(model, prompts, chat_tokenizer):
    policy, seen = copy.deepcopy(model), []
    policy.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:2])))
    found = sampled(policy, prompts, chat_tokenizer, group=G)
    assert seen[0] == (4, max(map(len, prompts)))
    assert seen[1:] == [(4, G)] * (found.mask.shape[1] - 1)


def test_shares_of_two_processes_equal_one(model64, prompts, chat_tokenizer, whole):
    halves = [
        sampled(model64, prompts[2 * i : 2 * i + 2], chat_tokenizer, group=G, share=(i, 2)) for i in range(2)
    ]
    both = join_rollouts(halves, chat_tokenizer.pad_token_id)
    assert torch.equal(both.mask, whole.mask) and torch.equal(both.ended, whole.ended)
    assert torch.equal(both.responses[both.mask], whole.responses[whole.mask])
    assert torch.equal(both.attention_mask, whole.attention_mask)


def test_attention_without_4d_masks_repeats_the_prompts(model, prompts, chat_tokenizer, whole, monkeypatch):
    from nlp_common.lm import rollout as module

    merged = group_logps(model, whole, G)
    monkeypatch.setattr(module, "takes_4d_masks", lambda _: False)
    found = sampled(model, prompts, chat_tokenizer, group=G)
    assert torch.equal(found.mask, whole.mask) and torch.equal(found.ids, whole.ids)
    torch.testing.assert_close(group_logps(model, found, G), merged, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("attention", "layers", "takes"),
    [
        ("sdpa", ["full_attention"] * 2, True),
        ("eager", None, True),
        ("flash_attention_2", ["full_attention"], False),
        ("sdpa", ["full_attention", "sliding_attention"], False),
    ],
)
def test_which_attention_takes_4d_masks(attention, layers, takes):
    config = SimpleNamespace(_attn_implementation=attention, layer_types=layers)
    assert takes_4d_masks(SimpleNamespace(config=config)) is takes


@pytest.mark.parametrize("size", [None, 3, 7])
def test_group_logps_and_gradients_equal_row_by_row(model64, rollout, size):
    model, alone = copy.deepcopy(model64), copy.deepcopy(model64)
    assert merge_groups(rollout.ids, rollout.attention_mask, rollout.mask, G) is not None
    logps = group_logps(model, rollout, G, 0.7, size)
    weights = torch.randn(logps.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (logps * weights).sum().backward()
    for i in range(len(rollout.ids)):  # 一行一行，没有填充，没有同伴
        real = rollout.attention_mask[i].bool()
        ids, n = rollout.ids[i][real], int(rollout.mask[i].sum())
        logits = alone(ids[None], use_cache=False).logits[0, -n - 1 : -1] / 0.7
        expected = logits.log_softmax(-1).gather(1, ids[-n:, None])[:, 0]
        torch.testing.assert_close(logps[i, :n], expected, rtol=0, atol=1e-10)
        (expected * weights[i, :n]).sum().backward()
    assert (logps[~rollout.mask] == 0).all()
    for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-10, msg=name)


def test_short_prompts_with_long_answers_are_not_merged(model64, rollout):
    part = copy.deepcopy(rollout)
    n = WIDTH + 1  # 提示只剩一个 token
    part.ids, part.attention_mask = part.ids[:, -n:], part.attention_mask[:, -n:]
    part.position_ids = part.position_ids[:, -n:] - part.position_ids[:, -n : -n + 1]
    assert merge_groups(part.ids, part.attention_mask, part.mask, G) is None  # 只省一列，不值得
    torch.testing.assert_close(
        group_logps(model64, part, G).double(), response_logps(model64, part).double(), rtol=0, atol=1e-6
    )


def test_micro_batches_keep_groups_together(rollout):
    seen = []
    for index, part, numbers in rollout.micro_batches(6, rollout.mask.float(), group=G):
        assert len(index) % G == 0 and part.mask.shape == numbers.shape
        assert all(index[k] // G == index[k - k % G] // G for k in range(len(index)))
        seen += index.tolist()
    assert sorted(seen) == list(range(len(rollout.ids)))


def test_join_pads_both_sides(model64, prompts, chat_tokenizer, rollout):
    short, long = (
        rollout.rows(torch.tensor([3, 4, 5])),
        rollout.rows(torch.tensor([0, 1, 2])),
    )  # 提示、回答都更短
    assert short.ids.shape[1] < long.ids.shape[1]
    both = join_rollouts([short, long], chat_tokenizer.pad_token_id)
    found = group_logps(model64, both, G)
    for k, part in ((0, short), (3, long)):
        alone = group_logps(model64, part, G)
        width = alone.shape[1]
        torch.testing.assert_close(found[k : k + 3, :width], alone, rtol=0, atol=1e-10)
        assert (found[k : k + 3, width:] == 0).all()
