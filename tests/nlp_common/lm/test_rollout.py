"""采样与打分：每个数都与一行一行重算的 float64 相等；填充、同伴、切成几份，都不改变结果。"""

import copy
import math
from types import SimpleNamespace

import pytest
import torch

from nlp_common.lm.chatml import answer_ids, prompt_ids
from nlp_common.lm.generation import stop_tokens
from nlp_common.lm.losses import IGNORE
from nlp_common.lm.pairs import collate_pairs, encode_pair
from nlp_common.lm.replies import score_replies
from nlp_common.lm.rollout import (
    Rollout,
    reference_scores,
    response_logps,
    response_values,
    roll_out,
    rollout_speed,
    score_responses,
    score_with_logps,
    score_with_values,
)
from nlp_common.tiny import world

WIDTH = 6  # 回答最多几个 token


@pytest.fixture(scope="module")
def value64(value_net):
    return copy.deepcopy(value_net).double()


@pytest.fixture(scope="module")
def rows(chat_tokenizer):
    """[(提示, 回答)]：一开口就说完、说了几个词说完、说到最后一格正好说完、没说完；提示长短不一。"""
    (end,) = stop_tokens(chat_tokenizer)
    prompts = [prompt_ids(chat_tokenizer, q["messages"]) for q in world.questions(4, 6)]
    prompts[1] = prompts[1][-9:]
    assert len({len(prompt) for prompt in prompts}) > 2
    said = torch.randint(5, 500, (4, WIDTH), generator=torch.Generator().manual_seed(4)).tolist()
    responses = [[end], [*said[1][:2], end], [*said[2][: WIDTH - 1], end], said[3]]
    return list(zip(prompts, responses, strict=True))


def build(rows, tokenizer, width: int | None = None):
    """不经过 roll_out，按定义拼出一批 Rollout。"""
    pad, (end,) = tokenizer.pad_token_id, stop_tokens(tokenizer)
    left = max(len(prompt) for prompt, _ in rows)
    width = width or max(len(response) for _, response in rows)
    ids, attention, positions, mask = [], [], [], []
    for prompt, response in rows:
        before, after = left - len(prompt), width - len(response)
        n = len(prompt) + len(response)
        ids.append([pad] * before + prompt + response + [pad] * after)
        attention.append([0] * before + [1] * n + [0] * after)
        positions.append([0] * before + list(range(n)) + [n - 1] * after)
        mask.append([True] * len(response) + [False] * after)
    return Rollout(
        ids=torch.tensor(ids),
        attention_mask=torch.tensor(attention),
        position_ids=torch.tensor(positions),
        mask=torch.tensor(mask),
        ended=torch.tensor([response[-1] == end for _, response in rows]),
    )


@pytest.fixture(scope="module")
def rollout(rows, chat_tokenizer):
    return build(rows, chat_tokenizer)


# ---- 采样 ----


class Scripted(torch.nn.Module):
    """第 i 行依次说出 scripts[i] 的策略。"""

    def __init__(self, scripts: list[list[int]], vocab: int):
        super().__init__()
        self.scripts, self.vocab = scripts, vocab
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, past_key_values=None, **_):
        step = past_key_values or 0
        logits = torch.zeros(len(input_ids), 1, self.vocab)
        for row, script in enumerate(self.scripts):
            logits[row, 0, script[step]] = 1e4
        return SimpleNamespace(logits=logits, past_key_values=step + 1)


def test_roll_out_marks_exactly_the_real_tokens(rows, chat_tokenizer):
    scripts = [response + [7] * (WIDTH - len(response)) for _, response in rows]
    policy = Scripted(scripts, len(chat_tokenizer))
    prompts = [prompt for prompt, _ in rows]
    found = roll_out(policy, prompts, chat_tokenizer, WIDTH)
    expected = build(rows, chat_tokenizer, WIDTH)
    for name in ("ids", "attention_mask", "mask", "ended"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    real = expected.attention_mask.bool()
    assert torch.equal(found.position_ids[real], expected.position_ids[real])
    assert found.ended.tolist() == [True, True, True, False]
    assert found.mask.sum(1).tolist() == [1, 3, WIDTH, WIDTH]
    assert torch.equal(found.responses, expected.ids[:, -WIDTH:])


def test_roll_out_stops_when_every_answer_has_ended(rows, chat_tokenizer):
    policy = Scripted([[*rows[1][1], 7, 7, 7], [*rows[0][1], 7, 7, 7, 7, 7]], len(chat_tokenizer))
    found = roll_out(policy, [[3], [3, 4]], chat_tokenizer, WIDTH)
    assert found.responses.shape == (2, 3) and found.mask.sum(1).tolist() == [3, 1]


def test_roll_out_is_determined_by_the_generator(model, rows, chat_tokenizer):
    prompts = [prompt for prompt, _ in rows]
    ids = [
        roll_out(model, prompts, chat_tokenizer, WIDTH, 1.0, torch.Generator().manual_seed(seed)).ids
        for seed in (1, 1, 2)
    ]
    assert torch.equal(ids[0], ids[1])
    assert ids[0].shape != ids[2].shape or not torch.equal(ids[0], ids[2])


# ---- 对数概率、价值、分数 ----


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_response_logps_equal_a_float64_loop(model64, rows, rollout, temperature):
    with torch.no_grad():
        logps = response_logps(model64, rollout, temperature)
    assert logps.shape == rollout.mask.shape
    for i, (prompt, response) in enumerate(rows):
        with torch.no_grad():
            logits = model64(input_ids=torch.tensor([prompt + response])).logits[0] / temperature
        for t, token in enumerate(response):
            scores = logits[len(prompt) + t - 1].tolist()
            expected = scores[token] - math.log(math.fsum(math.exp(s) for s in scores))
            assert logps[i, t].item() == pytest.approx(expected, rel=2e-6, abs=1e-5)


def test_sampled_tokens_have_the_logps_they_were_sampled_with(model, rows, chat_tokenizer):
    """采样时（有 KV 缓存）与打分时（整段重算）看到的是同一个分布：贪心采出的每个 token 都是最大的那个。"""
    prompts = [prompt for prompt, _ in rows]
    found = roll_out(model, prompts, chat_tokenizer, WIDTH, 1e-4, torch.Generator().manual_seed(0))
    with torch.no_grad():
        logps = response_logps(model, found, 1e-4)
    assert logps[found.mask].exp().min() > 0.9


def test_response_values_equal_one_row_at_a_time(value64, rows, rollout):
    with torch.no_grad():
        values = response_values(value64, rollout)
        assert values.shape == rollout.mask.shape
        for i, (prompt, response) in enumerate(rows):
            alone = value64(input_ids=torch.tensor([prompt + response])).logits[0, :, 0]
            expected = alone[len(prompt) - 1 : -1]  # 写出第 t 个 token 之前的位置
            torch.testing.assert_close(values[i, : len(response)], expected.float(), rtol=0, atol=1e-5)
    assert values[rollout.mask].std() > 1e-2


def test_value_before_a_token_does_not_see_it(model, value_net, rollout):
    """换掉第 t 个回答 token：V_0…V_t 不变，之后的变；log π(a_t) 变，更早的不变。"""
    t, column = 3, rollout.ids.shape[1] - WIDTH + 3
    changed = copy.deepcopy(rollout)
    row = 3  # 没说完的那一行，六格都是真的
    changed.ids[row, column] = 400 if changed.ids[row, column] != 400 else 401
    with torch.no_grad():
        for function, first in (
            (lambda r: response_values(value_net, r), t + 1),
            (lambda r: response_logps(model, r, 1.0), t),
        ):
            before, after = function(rollout), function(changed)
            assert torch.equal(before[:row], after[:row])
            torch.testing.assert_close(before[row, :first], after[row, :first], rtol=0, atol=1e-6)
            assert ((before[row, first:] - after[row, first:]).abs() > 1e-4).all()


def test_left_padding_and_batch_mates_change_nothing(
    model64, value64, reward64, rows, rollout, chat_tokenizer
):
    with torch.no_grad():
        for function in (
            lambda r: response_logps(model64, r, 1.0),
            lambda r: response_values(value64, r),
            lambda r: score_responses(reward64, r, chat_tokenizer.pad_token_id),
        ):
            together = function(rollout)
            for i, row in enumerate(rows):
                alone = function(build([row], chat_tokenizer))[0]
                mine = together[i][: len(row[1])] if together.dim() == 2 else together[i]
                torch.testing.assert_close(mine, alone, rtol=0, atol=1e-5)


def test_scores_are_the_reward_models_view_without_the_end_token(reward64, rows, rollout, chat_tokenizer):
    """与训练奖励模型时一样，不给它看结束符：分数读在最后一个字上。"""
    before = copy.deepcopy(rollout)
    scores = score_responses(reward64, rollout, chat_tokenizer.pad_token_id)
    assert not scores.requires_grad and scores.shape == (4,)
    assert torch.equal(rollout.ids, before.ids)  # 之后还要用它算概率，不许改
    for i, (prompt, response) in enumerate(rows):
        said = response[:-1] if rollout.ended[i] else response
        with torch.no_grad():
            hidden = reward64.model(input_ids=torch.tensor([prompt + said])).last_hidden_state[0, -1]
        assert scores[i].item() == pytest.approx((hidden @ reward64.score.weight[0]).item(), abs=1e-5)


def test_reference_scores_are_the_mean_and_spread_over_the_first_prompts(
    model, reward_net, rows, chat_tokenizer
):
    """分批量出来的均值与标准差，与逐个回答重算的一致；只用前 n 个提示。"""
    prompts = [prompt for prompt, _ in rows] * 2
    n = 6  # 两批
    given = (model, reward_net, prompts, chat_tokenizer, 4, 1.0, 5, 3)
    mean, std = reference_scores(*given, n=n)
    generator = torch.Generator().manual_seed(5)
    scores = []
    for start in (0, 3):
        rollout = roll_out(model, prompts[start : start + 3], chat_tokenizer, 4, 1.0, generator)
        scores += score_responses(reward_net, rollout, chat_tokenizer.pad_token_id).tolist()
    expected = sum(scores) / n
    assert mean == pytest.approx(expected, abs=1e-5)
    assert std == pytest.approx((sum((x - expected) ** 2 for x in scores) / n) ** 0.5, abs=1e-5)
    assert reference_scores(*given, n=1)[1] > 0


def test_ppo_scores_what_the_reward_model_was_trained_on(reward, reward64, chat_tokenizer):
    """同一个回答，训练奖励模型时、PPO 里、评测里，三处的分数相同。"""
    pairs, pad = world.pairs(6, 9), chat_tokenizer.pad_token_id
    batch = collate_pairs([encode_pair(chat_tokenizer, pair, with_end=False) for pair in pairs], pad)
    with torch.no_grad():
        trained, _ = reward.score_pairs(reward64, batch["input_ids"])
    prompts = [prompt_ids(chat_tokenizer, pair["prompt"]) for pair in pairs]
    responses = [answer_ids(chat_tokenizer, pair["chosen"][0]["content"]) for pair in pairs]
    rollout = build(list(zip(prompts, responses, strict=True)), chat_tokenizer)
    assert rollout.ended.all()
    in_ppo = score_responses(reward64, rollout, pad)
    questions = [{"messages": pair["prompt"]} for pair in pairs]
    measured = score_replies(reward64, chat_tokenizer, questions, [{"ids": ids} for ids in responses])
    torch.testing.assert_close(in_ppo, trained, rtol=0, atol=1e-4)
    torch.testing.assert_close(measured, trained, rtol=0, atol=1e-4)
    assert trained.std() > 1e-2


# ---- 切成几份 ----


def test_micro_batches_hold_every_row_without_needless_padding(rollout):
    parts = list(rollout.micro_batches(2))
    assert sorted(torch.cat([index for index, _ in parts]).tolist()) == [0, 1, 2, 3]
    for index, part in parts:
        n = part.mask.shape[1]
        assert part.mask.any(0).all() and part.attention_mask.any(0).all()  # 没有一列全是填充
        for k, i in enumerate(index.tolist()):
            assert torch.equal(
                part.ids[k][part.attention_mask[k].bool()], rollout.ids[i][rollout.attention_mask[i].bool()]
            )
            assert torch.equal(part.responses[k][part.mask[k]], rollout.responses[i][rollout.mask[i]])
            assert part.mask[k].sum() == rollout.mask[i].sum() and n >= part.mask[k].sum()
            assert part.ended[k] == rollout.ended[i]
    lengths = torch.cat([part.attention_mask.sum(1) for _, part in parts])
    assert torch.equal(lengths, lengths.sort().values)


def test_numbers_of_each_token_are_cut_like_the_rollout(rollout):
    numbers = torch.arange(rollout.mask.numel()).view(rollout.mask.shape).float()
    for index, part, mine in rollout.micro_batches(3, numbers):
        assert mine.shape == part.mask.shape
        for k, i in enumerate(index.tolist()):
            assert torch.equal(mine[k][part.mask[k]], numbers[i][rollout.mask[i]])
    ((_, whole),) = rollout.micro_batches(None)
    assert whole.ids.shape == rollout.ids.shape


def test_micro_batches_change_nothing_but_rounding(
    model64, reference64, value64, reward64, rollout, chat_tokenizer
):
    """一次一行、一次三行、一次全算，三种分数都相等；不要梯度的合用就是它们自己。"""
    mask, pad = rollout.mask, chat_tokenizer.pad_token_id
    with torch.no_grad():
        whole = [response_logps(net, rollout, 0.7) for net in (model64, reference64)]
    for size in (1, 3, None):
        logps = score_with_logps((model64, reference64), rollout, 0.7, size)
        values, scores = score_with_values(value64, reward64, rollout, pad, size)
        for found, expected in zip(logps, whole, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        with torch.no_grad():
            expected = response_values(value64, rollout)
        torch.testing.assert_close(values[mask], expected[mask], rtol=0, atol=1e-5)
        torch.testing.assert_close(scores, score_responses(reward64, rollout, pad), rtol=0, atol=1e-5)
        assert not any(x.requires_grad for x in (*logps, values, scores))


def test_labels_are_the_real_response_tokens(rows, rollout):
    for i, (_, response) in enumerate(rows):
        labelled = rollout.labels[i] != IGNORE
        assert rollout.labels[i][labelled].tolist() == response
        assert torch.equal(rollout.labels[i][labelled], rollout.ids[i][labelled])


def test_speed_by_hand():
    history = [
        {"rollout_s": 1.0, "scoring_s": 0.5, "update_s": 2.5, "length": 10.0},
        {"rollout_s": 2.0, "scoring_s": 0.5, "update_s": 1.5, "length": 20.0},
    ]
    speed = rollout_speed(history, batch=8)
    assert speed["rollout_s"] == 1.5 and speed["scoring_s"] == 0.5 and speed["update_s"] == 2.0
    assert speed["episodes_per_s"] == speed["train_samples_per_s"] == 2.0
    assert speed["train_tokens_per_s"] == 30.0
