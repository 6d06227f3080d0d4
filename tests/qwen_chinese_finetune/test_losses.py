"""各阶段的损失：与独立的 float64 循环相等，与 transformers、TRL 自己的训练器相等。训练循环本身在 test_loop.py。"""

import copy
import math

import pytest
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference as TRLDPOCollator
from trl.trainer.reward_trainer import DataCollatorForPreference as TRLRewardCollator

from nlp_common.lm.chatml import prompt_ids
from nlp_common.lm.losses import IGNORE
from nlp_common.lm.pairs import collate_pairs, encode_pair
from nlp_common.tiny import world

BETA = 0.3


@pytest.fixture(scope="module")
def pairs(chat_tokenizer):
    """8 个偏好对，长短不一。"""
    rows = [encode_pair(chat_tokenizer, row) for row in world.pairs(8, 4)]
    assert len({len(r["prompt_ids"]) for r in rows}) > 3
    return rows


@pytest.fixture(scope="module")
def reward_pairs(chat_tokenizer):
    """同样的 8 对，奖励模型的写法：回答不带结束符，分数读在最后一个字上。"""
    return [encode_pair(chat_tokenizer, row, with_end=False) for row in world.pairs(8, 4)]


@pytest.fixture(scope="module")
def chat_rows(sft, chat_tokenizer):
    """8 段对话，长短与标签数都不一。"""
    chats = [row["messages"] for row in world.chats(40, 4)]
    chats = sorted(chats, key=lambda messages: len(str(messages)))[::5]
    rows = [sft.encode_row(chat_tokenizer, messages) for messages in chats]
    counts = [sum(label != IGNORE for label in row["labels"]) for row in rows]
    assert len(rows) == 8 and max(counts) > 2 * min(counts)
    return rows


def loop_logp(net64, ids: list[int], first: int) -> float:
    """float64 循环：给定前面的，从第 first 个起每个 token 的对数概率之和。"""
    with torch.no_grad():
        logits = net64(input_ids=torch.tensor([ids])).logits[0].tolist()
    total = 0.0
    for t in range(first, len(ids)):
        row = logits[t - 1]
        top = max(row)
        total += row[ids[t]] - top - math.log(math.fsum(math.exp(x - top) for x in row))
    return total


def assert_same_gradients(ours, theirs):
    atol = 1e-5 if ours.dtype == torch.float64 else 1e-4  # 梯度有大有小，float32 的舍入也有大有小
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=atol, msg=name)
    assert any(p.grad is not None and p.grad.abs().max() > 1e-3 for p in ours.parameters())


# ---- SFT ----


def test_answer_loss_equals_transformers_own_loss(sft, model64, chat_rows, chat_tokenizer):
    batch = sft.collate(chat_rows, chat_tokenizer.pad_token_id)
    lengths = torch.tensor([len(row["input_ids"]) for row in chat_rows])
    attention_mask = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
    assert (attention_mask == 0).any()  # 有填充；我们不传 attention_mask，他们传
    n_labels = (batch["labels"] != IGNORE).sum()
    mine, other = copy.deepcopy(model64), copy.deepcopy(model64)
    ours = sft.answer_loss(mine, batch)[0] / n_labels
    theirs = other(**batch, attention_mask=attention_mask).loss
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    ours.backward()
    theirs.backward()
    assert_same_gradients(mine, other)


def test_answer_loss_equals_a_float64_loop(sft, model64, chat_rows, chat_tokenizer):
    total, count = 0.0, 0
    for row in chat_rows[:4]:
        ids, labels = row["input_ids"], row["labels"]
        with torch.no_grad():
            logits = model64(input_ids=torch.tensor([ids])).logits[0]
        for t in range(1, len(ids)):
            if labels[t] != IGNORE:
                total -= (logits[t - 1, labels[t]] - logits[t - 1].exp().sum().log()).item()
                count += 1
    batch = sft.collate(chat_rows[:4], chat_tokenizer.pad_token_id)
    loss = sft.answer_loss(model64, batch)[0].item() / count
    assert loss == pytest.approx(total / count, abs=1e-5)
    measured = sft.heldout_loss(copy.deepcopy(model64), chat_rows[:4], chat_tokenizer.pad_token_id, 3)
    assert measured == pytest.approx(total / count, abs=1e-5)


def test_sft_gradient_ignores_padding(sft, model64, chat_rows, chat_tokenizer):
    """同一行，右边再多填一些，损失不变。"""
    batch = sft.collate(chat_rows[:1], chat_tokenizer.pad_token_id)
    wide = sft.collate(chat_rows[:1] + chat_rows[-1:], chat_tokenizer.pad_token_id)
    wide = {name: tensor[:1] for name, tensor in wide.items()}
    assert wide["labels"].shape[1] > batch["labels"].shape[1]
    losses = [sft.answer_loss(model64, b)[0].item() for b in (batch, wide)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# ---- DPO ----


def test_dpo_loss_equals_a_float64_loop(dpo):
    generator = torch.Generator().manual_seed(5)
    logps = -50 * torch.rand(4, 9, generator=generator)
    loss, margin = dpo.dpo_loss(*logps, beta=BETA)
    for i in range(9):
        chosen, rejected, ref_chosen, ref_rejected = logps[:, i].double().tolist()
        expected = BETA * ((chosen - ref_chosen) - (rejected - ref_rejected))
        assert margin[i].item() == pytest.approx(expected, abs=1e-5)
        assert loss[i].item() == pytest.approx(math.log1p(math.exp(-expected)), abs=1e-5)
    zero = torch.zeros(1)
    assert dpo.dpo_loss(zero, zero, zero, zero, BETA)[0].item() == pytest.approx(math.log(2))
    extreme = dpo.dpo_loss(zero - 1e4, zero, zero, zero, 1.0)[0]
    assert extreme.item() == pytest.approx(1e4)  # 差得再远也不溢出


def test_sequence_logps_equal_a_float64_loop(dpo, model64, pairs, chat_tokenizer):
    batch = collate_pairs(pairs[:3], chat_tokenizer.pad_token_id)
    with torch.no_grad():
        logps = dpo.sequence_logps(model64, **batch)
    assert logps.shape == (6,)
    rows = [r["prompt_ids"] + r["chosen_ids"] for r in pairs[:3]]
    rows += [r["prompt_ids"] + r["rejected_ids"] for r in pairs[:3]]
    for ids, prompt, logp in zip(rows, [r["prompt_ids"] for r in pairs[:3]] * 2, logps.tolist(), strict=True):
        assert logp == pytest.approx(loop_logp(model64, ids, len(prompt)), rel=1e-5)
    for batch_size in (1, 2, 32):  # 分批、排序都不改变各行的值与次序
        table = dpo.logps_of(copy.deepcopy(model64), pairs[:3], chat_tokenizer.pad_token_id, batch_size)
        torch.testing.assert_close(table, logps.view(2, 3).T, rtol=1e-5, atol=1e-5)


def text_pairs() -> Dataset:
    """TRL 的 DPOTrainer 总要自己分词一遍，给它原文；比较时用的批由它自己的拼批函数造。"""
    return Dataset.from_list(
        [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in world.pairs(8, 4)]
    )


def our_dpo_batch(dpo, frozen, pairs, pad_id) -> dict[str, torch.Tensor]:
    refs = dpo.logps_of(copy.deepcopy(frozen), pairs, pad_id, 8)
    return collate_pairs(pairs, pad_id) | {"ref_logps": refs.T.flatten()}


def test_chosen_sft_loss_averages_each_answer_over_its_own_tokens(dpo):
    labels = torch.full((4, 6), IGNORE)  # 两对；好回答各有 2 个、4 个 token
    labels[0, 3:5] = labels[1, 1:5] = labels[2:, 5] = 7
    loss = dpo.chosen_sft_loss(torch.tensor([-3.0, -2.0]), labels)
    assert loss.tolist() == [1.5, 0.5]


# TRL 的 "sft" 项按整批的 token 平均，我们按每个回答平均：一批只有一对时两者是同一个数。
@pytest.mark.parametrize("sft_weight, n_pairs", [(0.0, 8), (0.3, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dpo_loss_equals_trl(
    dtype, sft_weight, n_pairs, dpo, model64, reference64, pairs, chat_tokenizer, trainer_args
):
    mine, other, frozen = (copy.deepcopy(net).to(dtype) for net in (model64, model64, reference64))
    pad_id, pairs = chat_tokenizer.pad_token_id, pairs[:n_pairs]
    losses = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, sft_weight]} if sft_weight else {}
    trl = DPOTrainer(
        model=other.train(),
        ref_model=copy.deepcopy(frozen),
        args=DPOConfig(**trainer_args(DPOConfig), beta=BETA, max_length=None, **losses),
        train_dataset=text_pairs(),
        processing_class=copy.deepcopy(chat_tokenizer),
    )
    theirs = trl.compute_loss(trl.model, TRLDPOCollator(pad_token_id=pad_id)(pairs))
    total, notes = dpo.pair_loss(
        mine.train(), our_dpo_batch(dpo, frozen, pairs, pad_id), beta=BETA, sft_weight=sft_weight
    )
    ours = total / n_pairs
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert abs(ours.item() - math.log(2)) > 1e-3  # 参考模型确实不同
    for name in ("rewards/margins", "rewards/accuracies"):
        (b,) = trl._metrics["train"][name]
        assert notes[name].float().mean().item() == pytest.approx(b, abs=1e-5)
    ours.backward()
    theirs.backward()
    assert_same_gradients(mine, other)


def test_heldout_dpo_metrics(dpo, model64, reference64, pairs, chat_tokenizer):
    pad_id = chat_tokenizer.pad_token_id
    ref = dpo.logps_of(copy.deepcopy(reference64), pairs, pad_id, 8)
    settings = dpo.DPOSettings(per_device_train_batch_size=3, beta=BETA)
    metrics = dpo.heldout_metrics(copy.deepcopy(model64), pairs, ref, pad_id, settings)
    now = dpo.logps_of(copy.deepcopy(model64), pairs, pad_id, 8)
    margins = [BETA * ((now[i, 0] - ref[i, 0]) - (now[i, 1] - ref[i, 1])).item() for i in range(8)]
    assert metrics["margin"] == pytest.approx(sum(margins) / 8, abs=1e-4)
    assert metrics["preference_accuracy"] == sum(m > 0 for m in margins) / 8
    loss = sum(math.log1p(math.exp(-m)) for m in margins) / 8
    assert metrics["heldout_loss"] == pytest.approx(loss, abs=1e-4)


# ---- 奖励模型 ----


def test_pairwise_loss_equals_a_float64_loop(reward):
    generator = torch.Generator().manual_seed(6)
    chosen, rejected = 5 * torch.randn(2, 9, generator=generator)
    loss = reward.pairwise_loss(chosen, rejected)
    for i in range(9):
        difference = chosen[i].double().item() - rejected[i].double().item()
        assert loss[i].item() == pytest.approx(math.log1p(math.exp(-difference)), abs=1e-5)
    shifted = reward.pairwise_loss(chosen + 3, rejected + 3)
    torch.testing.assert_close(shifted, loss, rtol=0, atol=1e-5)


def test_scores_are_read_at_the_last_real_token(reward, reward64, reward_pairs, chat_tokenizer):
    """一批里右填充着算，与一行一行、没有填充地从最后一个字的隐状态手算相同。"""
    batch = collate_pairs(reward_pairs, chat_tokenizer.pad_token_id)
    with torch.no_grad():
        chosen, rejected = reward.score_pairs(reward64, batch["input_ids"])
        for i, row in enumerate(reward_pairs):
            for kind, score in (("chosen_ids", chosen[i]), ("rejected_ids", rejected[i])):
                ids = torch.tensor([row["prompt_ids"] + row[kind]])
                hidden = reward64.model(input_ids=ids, use_cache=False).last_hidden_state[0, -1]
                expected = (hidden.double() @ reward64.score.weight[0].double()).item()
                assert score.item() == pytest.approx(expected, abs=1e-5)
    assert chosen.std() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reward_loss_equals_trl(dtype, reward, reward64, reward_pairs, chat_tokenizer, trainer_args):
    mine, other, pad_id = *(copy.deepcopy(reward64).to(dtype) for _ in range(2)), chat_tokenizer.pad_token_id
    full = [{k: row["prompt_ids"] + row[k] for k in ("chosen_ids", "rejected_ids")} for row in reward_pairs]
    trl = RewardTrainer(
        model=other.train(),
        args=RewardConfig(**trainer_args(RewardConfig), max_length=None),
        train_dataset=Dataset.from_list(full),
        processing_class=copy.deepcopy(chat_tokenizer),
    )
    total, notes = reward.reward_loss(mine.train(), collate_pairs(reward_pairs, pad_id))
    ours = total / len(reward_pairs)
    theirs = trl.compute_loss(trl.model, TRLRewardCollator(pad_token_id=pad_id)(full))
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    assert notes["accuracy"].float().mean().item() == pytest.approx(trl._metrics["train"]["accuracy"][0])
    ours.backward()
    theirs.backward()
    assert_same_gradients(mine, other)


def test_reward_evaluate_counts_pairs_and_kinds(reward, reward64, chat_tokenizer):
    rows = [
        row | encode_pair(chat_tokenizer, row, with_end=False) for row in world.pairs(20, 6, heldout=True)
    ]
    pad_id = chat_tokenizer.pad_token_id
    metrics = reward.evaluate(copy.deepcopy(reward64), rows, pad_id, 7)
    with torch.no_grad():
        both = [
            [reward64(input_ids=torch.tensor([r["prompt_ids"] + r[k]])).logits.item() for r in rows]
            for k in ("chosen_ids", "rejected_ids")
        ]
    margins = [a - b for a, b in zip(*both, strict=True)]
    assert metrics["pair_accuracy"] == pytest.approx(sum(m > 0 for m in margins) / 20)
    assert metrics["margin"] == pytest.approx(sum(margins) / 20, abs=1e-4)
    loss = sum(math.log1p(math.exp(-m)) for m in margins) / 20
    assert metrics["heldout_loss"] == pytest.approx(loss, abs=1e-4)
    kinds = [kind for i in (0, 1) for kind in (row["kinds"][i] for row in rows)]
    for kind, mean in metrics["mean_score"].items():
        scores = [s for k, s in zip(kinds, both[0] + both[1], strict=True) if k == kind]
        assert mean == pytest.approx(sum(scores) / len(scores), abs=0.006)
    assert set(metrics["mean_score"]) == set(kinds)
    assert list(metrics["mean_score"].values()) == sorted(metrics["mean_score"].values(), reverse=True)


# ---- 偏好对 ----


def test_chosen_and_rejected_rows_keep_their_halves(pairs, chat_tokenizer):
    batch = collate_pairs(pairs, chat_tokenizer.pad_token_id)
    for i, row in enumerate(pairs):
        for offset, kind in ((0, "chosen_ids"), (len(pairs), "rejected_ids")):
            ids, labels = (batch[k][i + offset].tolist() for k in ("input_ids", "labels"))
            p, n = len(row["prompt_ids"]), len(row["prompt_ids"]) + len(row[kind])
            assert ids[:n] == row["prompt_ids"] + row[kind]
            assert labels[:p] == [IGNORE] * p and labels[p:n] == row[kind]
            assert set(ids[n:]) <= {chat_tokenizer.pad_token_id} and set(labels[n:]) <= {IGNORE}


def test_dpo_sees_the_end_only_after_the_chosen_answer(dpo, chat_tokenizer):
    row = world.pairs(1, 4)[0]
    pair = dpo.encode(chat_tokenizer, row)
    chosen, rejected = (row[k][-1]["content"] for k in ("chosen", "rejected"))
    assert chat_tokenizer.decode(pair["chosen_ids"]) == chosen + "<|im_end|>"
    assert chat_tokenizer.decode(pair["rejected_ids"]) == rejected


def test_pairs_are_generated_from_the_prompt_a_chat_would_use(pairs, chat_tokenizer):
    for row, pair in zip(world.pairs(8, 4), pairs, strict=True):
        assert pair["prompt_ids"] == prompt_ids(chat_tokenizer, row["prompt"])


def test_sft_packed_losses_and_gradients_equal_the_chats_apart(sft, model64, chat_rows):
    packed = sft.pack_rows(chat_rows, 256)
    assert len(packed) < len(chat_rows) and max(r["position_ids"].count(0) for r in packed) > 1
    assert sum(len(r["input_ids"]) for r in packed) == sum(len(r["input_ids"]) for r in chat_rows)
    apart, together = copy.deepcopy(model64), copy.deepcopy(model64)
    count = sum(label != IGNORE for row in chat_rows for label in row["labels"])
    total = 0.0
    for row in chat_rows:  # 一段一段地算
        loss = sft.answer_loss(apart, sft.collate([row], 0))[0] / count
        loss.backward()
        total += loss.item()
    batch = sft.collate(packed, 0)
    loss = sft.answer_loss(together, batch)[0] / count
    loss.backward()
    assert loss.item() == pytest.approx(total, abs=1e-6)
    for (name, ours), theirs in zip(together.named_parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-6, msg=name)
    del batch["position_ids"]  # 反例：位置不归零，后一段看得见前一段
    assert abs(sft.answer_loss(together, batch)[0].item() / count - total) > 1e-4
