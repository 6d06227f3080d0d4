"""PPO 的每一个零件：与独立的 float64 循环相等；更新之前概率比恰好是 1，参考模型与奖励模型从不改变。"""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from nlp_common.lm.chatml import prompt_ids
from nlp_common.lm.rollout import response_logps, response_values, score_responses
from nlp_common.tiny import world

WIDTH = 6  # 回答最多几个 token


@pytest.fixture(scope="module")
def prompts(chat_tokenizer):
    """四个长短不一的提示。"""
    prompts = [prompt_ids(chat_tokenizer, q["messages"]) for q in world.questions(4, 6)]
    prompts[1] = prompts[1][-9:]
    assert len({len(prompt) for prompt in prompts}) > 2
    return prompts


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)  # 别的测试留下的设备不算数
    return Accelerator(cpu=True)


def ragged(seed: int, width: int = WIDTH):
    """形状 (5, width) 的随机数若干，和长短不一的掩码；掩码之外也填满了数，用到了就会露馅。"""
    lengths = torch.tensor([1, 3, width, 2, width - 1]).clamp(1, width)
    mask = torch.arange(width) < lengths[:, None]
    generator = torch.Generator().manual_seed(seed)
    return lengths.tolist(), mask, [torch.randn(5, width, generator=generator) for _ in range(4)]


# ---- 奖励、优势 ----


def test_rewards_are_normalised_scores_minus_the_penalty(ppo):
    scores, ended = torch.tensor([1.0, 5.0, 5.0]), torch.tensor([True, True, False])
    rewards = ppo.response_rewards(scores, ended, mean=3.0, std=4.0, missing_end_penalty=2.0)
    assert rewards.tolist() == [-0.5, 0.5, -1.5]


def test_kl_estimators_equal_a_loop(ppo):
    _, mask, (logps, ref_logps, _, _) = ragged(1)
    formulas = {"k1": lambda d: d, "k2": lambda d: d * d / 2, "k3": lambda d: math.exp(-d) - 1 + d}
    for kind, formula in formulas.items():
        found = ppo.kl_estimate(logps, ref_logps, kind)
        for i, t in mask.nonzero().tolist():
            d = logps[i, t].double().item() - ref_logps[i, t].double().item()
            assert found[i, t].item() == pytest.approx(formula(d), abs=1e-5), kind


def test_k1_and_k3_are_unbiased_and_k2_is_not(ppo):
    """对整个分布求期望（不是抽样）：k1、k3 的期望恰好是 KL，k2 的不是；k2、k3 从不为负。"""
    generator = torch.Generator().manual_seed(0)
    logps, ref = torch.randn(2, 50, generator=generator, dtype=torch.float64).log_softmax(-1)
    exact = torch.nn.functional.kl_div(ref, logps, reduction="sum", log_target=True).item()
    expected = {
        kind: (logps.exp() * ppo.kl_estimate(logps, ref, kind)).sum().item() for kind in ("k1", "k2", "k3")
    }
    assert expected["k1"] == pytest.approx(exact, abs=1e-12)
    assert expected["k3"] == pytest.approx(exact, abs=1e-12)
    assert abs(expected["k2"] - exact) > 0.01
    assert ppo.kl_estimate(logps, ref, "k1").min() < 0
    assert min(ppo.kl_estimate(logps, ref, kind).min() for kind in ("k2", "k3")) >= 0


def test_token_rewards_equal_a_loop(ppo):
    lengths, mask, (kl, extra, _, _) = ragged(1)
    scores = extra[:, 0]
    rewards = ppo.token_rewards(scores, kl, mask, 0.3)
    expected = torch.zeros(5, WIDTH, dtype=torch.float64)
    for i, n in enumerate(lengths):
        for t in range(n):
            expected[i, t] = -0.3 * kl[i, t].double()
        expected[i, n - 1] += scores[i].double()
    torch.testing.assert_close(rewards.double(), expected, rtol=0, atol=1e-6)
    same = ppo.token_rewards(scores, torch.zeros_like(kl), mask, 0.3)  # 没有离开参考模型：只有整段的分
    torch.testing.assert_close(same.sum(1), scores)
    assert (same != 0).sum() == 5


@pytest.mark.parametrize(
    "kl, expected",
    [(0.1, 0.5), (0.11, 0.505), (0.09, 0.495), (10.0, 0.51), (0.0, 0.49)],  # 后两个在 ±0.2 处截住
)
def test_adaptive_kl_by_hand(ppo, kl, expected):
    assert ppo.next_kl_coef(0.5, kl, target=0.1, gain=0.1) == pytest.approx(expected)


def test_learning_rate_warms_up_then_falls_to_zero(ppo):
    settings = ppo.PPOSettings(learning_rate=1.0, warmup_steps=2, max_steps=4)
    assert [ppo.learning_rate(settings, step) for step in range(4)] == [0.5, 0.75, 0.5, 0.25]
    settings.warmup_steps = 0.5  # 小于 1：总步数的一半
    assert [ppo.learning_rate(settings, step) for step in range(4)] == [0.5, 0.75, 0.5, 0.25]
    settings.warmup_steps = 0
    assert [ppo.learning_rate(settings, step) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]


def loop_gae(rewards, values, n, gamma, lam):
    """定义式：A_t = Σ_l (γλ)^l δ_{t+l}，一项一项加，不用递推。"""
    advantages = []
    for t in range(n):
        total = 0.0
        for k in range(t, n):
            following = values[k + 1] if k + 1 < n else 0.0
            total += (gamma * lam) ** (k - t) * (rewards[k] + gamma * following - values[k])
        advantages.append(total)
    return advantages


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.8, 0.0)])
def test_gae_equals_its_definition(ppo, gamma, lam):
    lengths, mask, (rewards, values, _, _) = ragged(2)
    rewards = rewards * mask  # token_rewards 给的掩码之外是 0；价值在掩码之外是任意数
    advantages, returns = ppo.gae(rewards, values, mask, gamma, lam)
    for i, n in enumerate(lengths):
        expected = loop_gae(rewards[i].double().tolist(), values[i].double().tolist(), n, gamma, lam)
        assert advantages[i, :n].tolist() == pytest.approx(expected, abs=1e-5)
        assert advantages[i, n:].abs().sum() == 0
        total = [a + v for a, v in zip(expected, values[i].tolist(), strict=False)]
        assert returns[i, :n].tolist() == pytest.approx(total, abs=1e-5)
    if lam == gamma == 1:  # 蒙特卡洛：回报就是之后的奖励之和
        for i, n in enumerate(lengths):
            sums = [rewards[i, t:n].sum().item() for t in range(n)]
            assert returns[i, :n].tolist() == pytest.approx(sums, abs=1e-5)


def test_gae_of_a_single_token(ppo):
    rewards, values = torch.tensor([[2.0]]), torch.tensor([[0.5]])
    advantages, returns = ppo.gae(rewards, values, torch.tensor([[True]]), 0.9, 0.9)
    assert advantages.item() == 1.5 and returns.item() == 2.0


def test_whiten_equals_a_loop(ppo, accelerator):
    lengths, mask, (x, _, _, _) = ragged(3)
    x = 7 * x + 2
    real = [x[i, t].double().item() for i, n in enumerate(lengths) for t in range(n)]
    mean = sum(real) / len(real)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in real) / len(real))
    white = ppo.whiten(x, mask, accelerator)
    expected = [(v - mean) / deviation for v in real]
    assert white[mask].tolist() == pytest.approx(expected, abs=1e-5)
    assert (white[~mask] == 0).all()
    constant = ppo.whiten(torch.full((5, WIDTH), 3.0), mask, accelerator)
    assert constant.abs().max() == 0  # 全都一样：没有哪个更好，也不是 NaN


# ---- 损失 ----


@pytest.mark.parametrize("clip", [0.2, 0.05])
def test_policy_loss_equals_a_loop(ppo, clip):
    lengths, mask, (logps, old, advantages, _) = ragged(4)
    logps = (old + 0.3 * logps).requires_grad_()
    loss, fraction = ppo.policy_loss(logps, old, advantages, mask, clip)
    total, clipped, gradient, count = 0.0, 0, torch.zeros(5, WIDTH, dtype=torch.float64), sum(lengths)
    for i, n in enumerate(lengths):
        for t in range(n):
            advantage = advantages[i, t].double().item()
            ratio = math.exp(logps[i, t].double().item() - old[i, t].double().item())
            limited = min(max(ratio, 1 - clip), 1 + clip)
            total -= min(ratio * advantage, limited * advantage)
            if limited * advantage < ratio * advantage:
                clipped += 1  # 好处已经拿满：没有梯度
            else:
                gradient[i, t] = -ratio * advantage / count
    assert loss.item() == pytest.approx(total / count, abs=1e-5)
    assert fraction.item() == pytest.approx(clipped / count, abs=1e-6)
    assert 0 < clipped < count
    loss.backward()
    torch.testing.assert_close(logps.grad.double(), gradient, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "ratio, advantage, loss, is_clipped",
    [
        (1.5, 2.0, -2.4, 1),  # 好处封顶在 1.2
        (1.5, -2.0, 3.0, 0),  # 坏处不封顶
        (0.5, 2.0, -1.0, 0),
        (0.5, -2.0, 1.6, 1),
        (1.1, 2.0, -2.2, 0),
        (1.0, 2.0, -2.0, 0),
    ],
)
def test_policy_loss_by_hand(ppo, ratio, advantage, loss, is_clipped):
    logps, mask = torch.tensor([[math.log(ratio)]]), torch.ones(1, 1, dtype=torch.bool)
    found, fraction = ppo.policy_loss(logps, torch.zeros(1, 1), torch.tensor([[advantage]]), mask, 0.2)
    assert found.item() == pytest.approx(loss, abs=1e-6) and fraction.item() == is_clipped


def test_value_loss_equals_a_loop(ppo):
    lengths, mask, (values, old, returns, _) = ragged(5)
    values = (old + 0.4 * values).requires_grad_()
    loss = ppo.value_loss(values, old, returns, mask, 0.2)
    total, gradient, count = 0.0, torch.zeros(5, WIDTH, dtype=torch.float64), sum(lengths)
    for i, n in enumerate(lengths):
        for t in range(n):
            v, o, r = (x[i, t].double().item() for x in (values, old, returns))
            limited = o + min(max(v - o, -0.2), 0.2)
            total += 0.5 * max((v - r) ** 2, (limited - r) ** 2)
            if (v - r) ** 2 >= (limited - r) ** 2:
                gradient[i, t] = (v - r) / count
    assert loss.item() == pytest.approx(total / count, abs=1e-5)
    loss.backward()
    torch.testing.assert_close(values.grad.double(), gradient, rtol=0, atol=1e-6)
    assert (gradient[mask] == 0).any() and (gradient[mask] != 0).any()


# ---- 一整轮 ----


class Spy:
    """记下每次调用的参数与结果，照常执行。"""

    def __init__(self, function):
        self.function, self.calls = function, []

    def __call__(self, *args, **kwargs):
        result = self.function(*args, **kwargs)
        self.calls.append((args, result))
        return result


MEAN, STD = 0.3, 1.7  # SFT 的分数的均值与标准差，随便取的


@pytest.fixture
def round_of(ppo, model, reference, value_net, reward_net, prompts, chat_tokenizer, accelerator, monkeypatch):
    """走一轮 PPO，返回 (四个模型, 统计, 各函数的调用记录)。"""

    def run(
        policy=model, frozen=reference, optimizer=torch.optim.SGD, lr=0.01, seed=0, kl_coef=0.1, **changes
    ):
        spies = {name: Spy(getattr(ppo, name)) for name in ("roll_out", "policy_loss", "value_loss", "gae")}
        for name, spy in spies.items():
            monkeypatch.setattr(ppo, name, spy)
        nets = (copy.deepcopy(net) for net in (policy, value_net, frozen, reward_net))
        nets = ppo.Models(*nets, score_mean=MEAN, score_std=STD)
        for net in (nets.reference, nets.reward):
            net.requires_grad_(False)
        optimizers = {
            name: optimizer(getattr(nets, name).parameters(), lr=lr) for name in ("policy", "value")
        }
        stats = ppo.ppo_step(
            nets,
            optimizers,
            prompts,
            chat_tokenizer,
            ppo.PPOSettings(max_new_tokens=WIDTH, **{"max_grad_norm": 1e9, "micro_batch_size": 8} | changes),
            accelerator,
            torch.Generator().manual_seed(seed),
            kl_coef,
        )
        monkeypatch.undo()
        return nets, stats, {name: spy.calls for name, spy in spies.items()}

    return run


def moved(net, start) -> float:
    return max((p - q).abs().max().item() for p, q in zip(net.parameters(), start.parameters(), strict=True))


def test_ratio_is_exactly_one_before_the_first_update(round_of):
    _, stats, calls = round_of(ppo_epochs=3, optimizer=torch.optim.AdamW)
    assert len(calls["policy_loss"]) == len(calls["value_loss"]) == 3 and len(calls["roll_out"]) == 1
    ratios = [torch.equal(logps, old) for (logps, old, *_), _ in calls["policy_loss"]]
    assert ratios == [True, False, False]
    assert [torch.equal(values, old) for (values, old, *_), _ in calls["value_loss"]] == [True, False, False]
    assert calls["policy_loss"][0][1][1].item() == 0  # 还没动，谈不上裁剪
    _, stats, _ = round_of(ppo_epochs=1)
    assert stats["ratio_max"] == 1.0 and stats["clip_fraction"] == 0.0


def test_only_policy_and_value_are_updated(round_of, model, reference, value_net, reward_net):
    nets, _, _ = round_of(ppo_epochs=2)
    assert moved(nets.reference, reference) == 0 and moved(nets.reward, reward_net) == 0
    assert moved(nets.policy, model) > 1e-5 and moved(nets.value, value_net) > 1e-5
    assert all(p.grad is None for net in (nets.reference, nets.reward) for p in net.parameters())


def test_stats_describe_the_rollout(ppo, round_of, model, reward_net, chat_tokenizer):
    _, stats, calls = round_of(frozen=model, ppo_epochs=1)
    ((_, rollout),) = calls["roll_out"]
    assert stats["kl"] == 0.0  # 参考模型就是策略自己
    assert stats["score"] == pytest.approx(
        score_responses(reward_net, rollout, chat_tokenizer.pad_token_id).mean().item(), abs=1e-6
    )
    assert stats["length"] == pytest.approx(rollout.mask.sum().item() / 4)
    assert stats["ended"] == rollout.ended.float().mean().item()
    real = [ids[mask].tolist() for ids, mask in zip(rollout.responses, rollout.mask, strict=True)]
    assert stats["replies"] == real
    _, stats, _ = round_of(ppo_epochs=1)
    assert stats["kl"] != 0.0


def test_one_epoch_is_one_step_of_the_plain_policy_gradient(
    ppo, round_of, model, reference, value_net, reward_net, chat_tokenizer
):
    """独立重算一轮：ρ = 1 时裁剪损失的梯度就是 −E[A·∇log π]；价值走的是均方误差的一步。"""
    nets, _, calls = round_of(ppo_epochs=1, lr=0.01, kl_coef=0.2)
    ((_, rollout),) = calls["roll_out"]
    mask = rollout.mask
    policy, value = copy.deepcopy(model), copy.deepcopy(value_net)
    logps, values = response_logps(policy, rollout, 1.0), response_values(value, rollout)
    with torch.no_grad():
        ref_logps = response_logps(reference, rollout, 1.0)
    scores = score_responses(reward_net, rollout, chat_tokenizer.pad_token_id)
    scores = (scores - MEAN) / STD - 3.0 * (~rollout.ended)
    advantages, returns = torch.zeros_like(logps), torch.zeros_like(logps)
    for i, n in enumerate(mask.sum(1).tolist()):
        rewards = [-0.2 * (logps[i, t] - ref_logps[i, t]).item() for t in range(n)]
        rewards[-1] += scores[i].item()
        row = loop_gae(rewards, values[i].tolist(), n, 1.0, 0.95)
        advantages[i, :n] = torch.tensor(row)
        returns[i, :n] = advantages[i, :n] + values[i, :n].detach()
    real = advantages[mask]
    white = (advantages - real.mean()) / real.std(unbiased=False)
    (-(white * logps)[mask].mean()).backward()
    (0.5 * ((values - returns) ** 2)[mask].mean()).backward()
    for start, net in ((policy, nets.policy), (value, nets.value)):
        for (name, p), q in zip(start.named_parameters(), net.parameters(), strict=True):
            if p.grad is not None:
                torch.testing.assert_close(q, p - 0.01 * p.grad, rtol=0, atol=1e-5, msg=name)
        assert moved(net, start) > 1e-4


def test_gradient_clipping_limits_the_step(round_of, model):
    nets, _, _ = round_of(ppo_epochs=1, lr=1.0, max_grad_norm=1e-3)
    both = zip(nets.policy.parameters(), model.parameters(), strict=True)
    step = sum((p - q).detach().double().square().sum().item() for p, q in both)
    assert math.sqrt(step) == pytest.approx(1e-3, rel=0.02)


def test_a_round_is_determined_by_its_generator(round_of):
    first, again, other = (round_of(ppo_epochs=2, seed=seed)[0].policy for seed in (3, 3, 4))
    assert moved(first, again) == 0 and moved(first, other) > 0


def test_dropout_is_off_while_sampling_and_updating(round_of, model):
    """采样、打分、更新必须是同一个分布：若开着 dropout，更新前的概率比就不是 1。"""
    policy = copy.deepcopy(model).train()
    for layer in policy.model.layers:
        layer.self_attn.attention_dropout = 0.5
    _, stats, calls = round_of(policy=policy, ppo_epochs=1)
    (((logps, old, *_), _),) = calls["policy_loss"]
    assert torch.equal(logps, old) and stats["ratio_max"] == 1.0


def test_micro_batches_change_nothing_but_rounding(round_of, model):
    whole, stats, _ = round_of(ppo_epochs=2, micro_batch_size=4)
    for size in (1, 3):
        parts, again, _ = round_of(ppo_epochs=2, micro_batch_size=size)
        assert moved(parts.policy, whole.policy) < 1e-5 < moved(parts.policy, model)
        assert moved(parts.value, whole.value) < 1e-5
        for name in ("score", "kl", "clip_fraction", "value_loss", "update_kl", "ratio_max"):
            assert again[name] == pytest.approx(stats[name], abs=1e-4), name


def test_an_update_stops_when_the_policy_has_moved_too_far(round_of):
    """第一遍的 KL 是 0，总会走一步；第二遍量出 KL 超了限，策略就不再动。价值网络学的是回归，照常学完。"""
    once, _, _ = round_of(ppo_epochs=1)
    stopped, stats, _ = round_of(ppo_epochs=4, max_update_kl=1e-9)
    assert stats["epochs"] == 2 and moved(stopped.policy, once.policy) == 0
    free, stats, _ = round_of(ppo_epochs=4, max_update_kl=1e9)
    assert stats["epochs"] == 4 and moved(free.policy, once.policy) > 0
    assert moved(stopped.value, free.value) == 0 < moved(free.value, once.value)


def test_two_networks_on_two_cores_equal_one_after_another(round_of, model):
    """两个核时策略与价值同时更新，一个核时先后更新：只差舍入。"""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one, stats, _ = round_of(ppo_epochs=3)
        torch.set_num_threads(2)
        two, again, _ = round_of(ppo_epochs=3)
    finally:
        torch.set_num_threads(before)
    assert moved(one.policy, two.policy) < 1e-6 < moved(one.policy, model)
    assert moved(one.value, two.value) < 1e-6
    assert again["value_loss"] == pytest.approx(stats["value_loss"], rel=1e-5)


def test_repeated_rounds_raise_the_reward(ppo, model, value_net, prompts, chat_tokenizer, accelerator):
    """奖励"第一个 token 的编号是偶数"（原本约一半是）：几轮之后，策略真的更常这样开口。"""
    prompt = prompts[1]

    class LikesEven(torch.nn.Module):
        def forward(self, input_ids, **_):
            return SimpleNamespace(logits=(input_ids[:, len(prompt), None] % 2 == 0).float())

    policy, value = copy.deepcopy(model), copy.deepcopy(value_net)
    nets = ppo.Models(policy, value, copy.deepcopy(model), LikesEven(), score_mean=0.5, score_std=0.5)
    optimizers = {
        k: torch.optim.AdamW(net.parameters(), 1e-3) for k, net in (("policy", policy), ("value", value))
    }
    settings = ppo.PPOSettings(
        max_new_tokens=2, max_grad_norm=1.0, missing_end_penalty=0.0, micro_batch_size=32
    )
    history = []
    for step in range(12):
        generator = torch.Generator().manual_seed(step)
        batch = [prompt] * 32
        history.append(
            ppo.ppo_step(nets, optimizers, batch, chat_tokenizer, settings, accelerator, generator, 0.0)
        )
    scores = [stats["score"] for stats in history]
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 0.15
    assert history[0]["kl"] == 0.0 and history[-1]["kl"] > 0.0


# ---- 两臂老虎机：最优的策略写得出来 ----

PROBS = torch.tensor([0.7, 0.3])  # 参考策略
PAYOFF = torch.tensor([0.0, 1.0])  # 两个 token 各值多少分


class BanditPolicy(torch.nn.Module):
    """不管提示是什么，下一个 token 的分布都是 softmax(logits)。"""

    def __init__(self):
        super().__init__()
        self.logits = torch.nn.Parameter(PROBS.log())

    def forward(self, input_ids, logits_to_keep, **_):
        keep = slice(-1, None) if logits_to_keep == 1 else logits_to_keep
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, 2)[:, keep], past_key_values=None)


class BanditValue(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.value = torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, logits_to_keep, **_):
        return SimpleNamespace(logits=self.value.expand(len(input_ids), len(logits_to_keep), 1))


class BanditReward(torch.nn.Module):
    def forward(self, input_ids, **_):
        return SimpleNamespace(logits=PAYOFF[input_ids[:, -1:]])


def play_bandit(ppo, accelerator, kl_coef: float, steps: int = 200) -> float:
    """用 ppo_step 玩两臂老虎机，每个回答恰好一个 token；返回学到的 π(第二个 token)。"""
    nobody_ends = SimpleNamespace(
        pad_token_id=0, eos_token_id=-1, convert_tokens_to_ids=lambda _: -1, decode=lambda _: ""
    )
    policy, value = BanditPolicy(), BanditValue()
    nets = ppo.Models(policy, value, BanditPolicy().requires_grad_(False), BanditReward(), 0.0, 1.0)
    settings = ppo.PPOSettings(
        max_new_tokens=1,
        max_grad_norm=1.0,
        micro_batch_size=256,
        missing_end_penalty=0.0,
        learning_rate=0.05,
        warmup_steps=0,
        max_steps=steps,
    )
    optimizers = {k: torch.optim.Adam(net.parameters()) for k, net in (("policy", policy), ("value", value))}
    for step in range(steps):
        for optimizer in optimizers.values():
            optimizer.param_groups[0]["lr"] = ppo.learning_rate(settings, step)
        generator = torch.Generator().manual_seed(step)
        ppo.ppo_step(nets, optimizers, [[0]] * 256, nobody_ends, settings, accelerator, generator, kl_coef)
    return policy.logits.softmax(-1)[1].item()


def test_bandit_without_kl_finds_the_optimal_policy(ppo, accelerator):
    assert play_bandit(ppo, accelerator, kl_coef=0.0) > 0.98


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_bandit_with_kl_finds_the_closed_form(ppo, accelerator, beta):
    """有 KL 惩罚时，最优策略是 π ∝ π_ref·exp(r/β)（Ziegler et al. 2019；Rafailov et al. 2023 式 4）。"""
    best = PROBS * (PAYOFF / beta).exp()
    best = (best / best.sum())[1].item()
    assert play_bandit(ppo, accelerator, beta) == pytest.approx(best, abs=0.02)
    assert abs(best - PROBS[1].item()) > 0.05  # 与起点差得远，原地不动过不了
