"""GRPO 的一整步：按策略自己采的一批，损失恰好是 0，梯度却不是；跳过没有信号的组、切成小批，结果不变；动态采样。"""

import copy
from types import SimpleNamespace

import pytest
import torch

from nlp_common.lm.chatml import prompt_ids
from nlp_common.lm.rollout import group_logps, roll_out
from nlp_common.tiny import world

G, WIDTH = 3, 6  # 与 conftest.py 的 settings_of 相同


@pytest.fixture(scope="module")
def rows(chat_tokenizer):
    """四道题，提示长短不一。"""
    found = [q | {"prompt": prompt_ids(chat_tokenizer, q["messages"])} for q in world.questions(4, 6)]
    found[1]["prompt"] = found[1]["prompt"][-9:]
    return found


def even_first(questions, replies, rollout):
    """奖励：第一个 token 的编号是偶数；只看采样，有的组全一样，有的不。"""
    return (rollout.responses[:, 0] % 2 == 0).float()


@pytest.fixture
def step_of(grpo, model, reference, rows, chat_tokenizer, accelerator, settings_of):
    """走一步，返回 (策略, 统计)。"""

    def run(policy=model, score=even_first, lr=0.01, seed=0, optimizer=torch.optim.SGD, draw=None, **changes):
        policy = copy.deepcopy(policy)
        stats = grpo.grpo_step(
            policy,
            reference,
            optimizer(policy.parameters(), lr=lr),
            draw or (lambda number: rows),
            score,
            chat_tokenizer,
            settings_of(**changes),
            accelerator,
            torch.Generator().manual_seed(seed),
        )
        return policy, stats

    return run


def moved(net, start) -> float:
    return max((p - q).abs().max().item() for p, q in zip(net.parameters(), start.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["grpo", "gspo"])
def test_on_policy_the_loss_is_zero_and_the_gradient_is_not(step_of, model, kind):
    """组里的优势加起来是 0，ρ = 1：损失恰好是 0；∇ρ = ∇log π，所以梯度不是 0。看损失看不出在不在学。"""
    policy, stats = step_of(loss=kind)
    assert abs(stats["loss"]) < 1e-7 and stats["clip_fraction"] == 0 and stats["update_kl"] == 0
    assert stats["advantage"] > 0.1 and moved(policy, model) > 1e-5


def test_one_step_is_the_plain_policy_gradient(grpo, step_of, model, chat_tokenizer, rows, accelerator):
    """独立重算：ρ = 1 时 dapo 的梯度是 −Σ A·∇log π / token 数。"""
    policy, stats = step_of(loss="dapo", lr=0.1)
    answers, alone = stats["answers"], copy.deepcopy(model)
    rollout = answers.rollout
    again = roll_out(
        model,
        [row["prompt"] for row in rows for _ in range(G)],
        chat_tokenizer,
        WIDTH,
        1.0,
        torch.Generator().manual_seed(0),
    )
    assert torch.equal(again.ids, rollout.ids)
    r = answers.rewards.view(-1, G)
    advantages = ((r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-4)).flatten()
    assert (advantages == 0).any() and (advantages != 0).any()  # 有的组没有信号，跳过了
    total = 0.0
    for i in range(len(rollout.ids)):
        ids, n = rollout.ids[i][rollout.attention_mask[i].bool()], int(rollout.mask[i].sum())
        logps = alone(ids[None], use_cache=False).logits[0, -n - 1 : -1].log_softmax(-1)
        total = total - advantages[i] * logps.gather(1, ids[-n:, None]).sum()
    (total / rollout.mask.sum()).backward()
    for (name, p), q, start in zip(
        policy.named_parameters(), alone.parameters(), model.parameters(), strict=True
    ):
        torch.testing.assert_close(start - p, 0.1 * q.grad, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", ["grpo", "dapo", "dr_grpo", "gspo", "cispo"])
def test_skipping_groups_without_signal_changes_nothing(grpo, step_of, model, monkeypatch, kind):
    skipped, stats = step_of(loss=kind, grpo_epochs=2)
    assert 0 < stats["zero_groups"] < 1
    monkeypatch.setattr(grpo, "useful_answers", lambda rewards, *_: torch.arange(len(rewards)))
    every, again = step_of(loss=kind, grpo_epochs=2)
    assert moved(skipped, every) < 1e-6 < moved(every, model)
    assert again["update_kl"] > 0 and stats["loss"] == pytest.approx(again["loss"], abs=1e-6)


def test_micro_batches_change_nothing_but_rounding(step_of, model):
    whole, stats = step_of(grpo_epochs=2)
    for size in (1, 2 * G):
        parts, again = step_of(grpo_epochs=2, micro_batch_size=size)
        assert moved(parts, whole) < 1e-6 < moved(parts, model)
        assert again["loss"] == pytest.approx(stats["loss"], abs=1e-6)


def test_a_batch_without_signal_leaves_the_policy_alone(step_of, model):
    def all_the_same(questions, replies, rollout):
        return torch.full((len(replies),), 0.7)

    policy, stats = step_of(score=all_the_same, optimizer=torch.optim.AdamW)
    assert stats["zero_groups"] == 1 and stats["advantage"] == 0 and moved(policy, model) == 0


def test_kl_needs_every_group_and_pulls_back(step_of, model, reference):
    """优势全是 0 时，KL 项仍有梯度：一步之后离参考模型近了。"""

    def all_the_same(questions, replies, rollout):
        return torch.zeros(len(replies))

    policy, stats = step_of(score=all_the_same, kl_coef=1.0, lr=0.02, temperature=1.0)
    assert moved(policy, model) > 1e-6 and stats["loss"] > 0
    rollout = stats["answers"].rollout
    with torch.no_grad():
        ref, before, after = (group_logps(net, rollout, G) for net in (reference, model, policy))
    gap = [((x - ref) * rollout.mask).abs().sum() for x in (before, after)]
    assert gap[1] < gap[0]


def test_clipping_limits_later_epochs(step_of):
    _, once = step_of(grpo_epochs=1, lr=0.5)
    _, many = step_of(grpo_epochs=4, lr=0.5)
    assert once["clip_fraction"] == 0 < many["clip_fraction"] and many["update_kl"] > 0


def test_dynamic_sampling_refills_with_other_questions(grpo, step_of, rows, chat_tokenizer):
    """没有信号的组换成另采的；采够了就停；一组也没有，就还是原来的一批。"""
    asked = []

    def draw(number):
        asked.append(number)
        return rows

    _, plain = step_of()
    kept = round((1 - plain["zero_groups"]) * 4)
    assert 0 < kept < 4
    _, stats = step_of(dynamic_sampling=True, max_rounds=8, draw=draw)
    assert len(asked) > 1 and asked == list(range(len(asked)))
    assert stats["zero_groups"] == plain["zero_groups"]  # 统计的是第一轮
    assert stats["advantage"] > plain["advantage"]  # 更新用的，组组有信号


def test_draws_depend_on_step_round_and_process_only(grpo, settings_of):
    rows = list(range(100))
    settings = settings_of(dynamic_sampling=True, max_rounds=2)
    two = [SimpleNamespace(num_processes=2, process_index=i) for i in range(2)]
    one = SimpleNamespace(num_processes=1, process_index=0)
    settings.per_device_train_batch_size = 8 * G
    whole = grpo.draw_rows(rows, 3, settings, one, 1)
    settings.per_device_train_batch_size = 4 * G
    halves = [grpo.draw_rows(rows, 3, settings, each, 1) for each in two]
    assert halves[0] + halves[1] == whole
    assert grpo.draw_rows(rows, 3, settings, one, 0) != grpo.draw_rows(rows, 3, settings, one, 1)


def test_repeated_steps_raise_the_reward(grpo, model, rows, chat_tokenizer, accelerator, settings_of):
    policy, settings = copy.deepcopy(model), settings_of(num_generations=8, max_new_tokens=2)
    settings.max_grad_norm = 1.0
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-3)
    scores = []
    for step in range(12):
        generator = torch.Generator().manual_seed(step)
        draw = lambda number: rows[1:2] * 4  # noqa: E731
        stats = grpo.grpo_step(
            policy, None, optimizer, draw, even_first, chat_tokenizer, settings, accelerator, generator
        )
        scores.append(stats["score"])
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 0.15
