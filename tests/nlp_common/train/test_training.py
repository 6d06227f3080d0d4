"""按长度分批：一行不多一行不少，次序只由种子与轮数决定，一批之内长短相近。"""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TrainingArguments

from nlp_common.lm.losses import IGNORE
from nlp_common.train.trainer import LengthBucketSampler
from nlp_common.train.trainer_qwen import loss_curve


def random_lengths(n: int, seed: int = 0) -> list[int]:
    return torch.randint(20, 200, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def order(lengths, batch_size=8, seed=0, epoch=0, **kwargs) -> list[int]:
    sampler = LengthBucketSampler(lengths, batch_size, seed, **kwargs)
    sampler.set_epoch(epoch)
    assert len(sampler) == len(lengths)
    return list(sampler)


def padding(lengths: list[int], indices: list[int], batch_size: int) -> float:
    """填充占全部格子的比例。"""
    batches = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
    cells = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    return 1 - sum(lengths) / cells


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 50), max_size=70),
    batch_size=st.integers(1, 9),
    pool=st.integers(1, 4),
    epoch=st.integers(0, 3),
)
def test_every_row_exactly_once(lengths, batch_size, pool, epoch):
    indices = order(lengths, batch_size, epoch=epoch, pool=pool)
    assert sorted(indices) == list(range(len(lengths)))
    # 每一批（最后不满的一批除外）都是某一池里按长度排好的连续一段
    full = len(lengths) // batch_size * batch_size
    for start in range(0, full, batch_size):
        batch = [lengths[i] for i in indices[start : start + batch_size]]
        assert batch == sorted(batch)


def test_order_depends_on_seed_and_epoch_only():
    lengths = random_lengths(300)
    assert order(lengths, seed=1, epoch=2) == order(lengths, seed=1, epoch=2)
    torch.manual_seed(5)
    assert order(lengths, seed=1, epoch=2) == order(lengths, seed=1, epoch=2)
    several = {tuple(order(lengths, seed=seed, epoch=epoch)) for seed in range(3) for epoch in range(3)}
    assert len(several) == 9
    sampler = LengthBucketSampler(lengths, 8, 0)
    assert list(sampler) == list(sampler)  # 同一轮里重来一遍，次序不变


def test_epochs_mix_rows_into_different_batches():
    lengths = random_lengths(1600)
    first, second = (
        {frozenset(indices[i : i + 8]) for i in range(0, 1600, 8)}
        for indices in (order(lengths, epoch=0), order(lengths, epoch=1))
    )
    assert len(first & second) < 5


def test_lengths_within_a_batch_are_close():
    lengths = random_lengths(1600)
    bucketed = order(lengths)
    assert padding(lengths, bucketed, 8) < 0.05
    assert padding(lengths, list(range(1600)), 8) > 0.3  # 不分批，三成多是填充
    spreads = [
        max(batch) - min(batch)
        for batch in ([lengths[i] for i in bucketed[start : start + 8]] for start in range(0, 1600, 8))
    ]
    assert max(spreads) <= 40 and sum(spreads) / len(spreads) < 8


def test_batches_do_not_come_in_order_of_length():
    """先短后长会让学习率与长度纠缠在一起。"""
    lengths = random_lengths(1600)
    means = [lengths[i] for i in order(lengths)[::8]]
    pairs = torch.tensor([means[:-1], means[1:]], dtype=torch.float)
    assert abs(torch.corrcoef(pairs)[0, 1]) < 0.25


def test_the_short_batch_comes_last():
    lengths = random_lengths(8 * 7 + 3)
    tail = order(lengths, pool=2)[-3:]
    assert len(set(tail)) == 3
    full = order(lengths, pool=2)[:-3]
    for start in range(0, len(full), 8):
        batch = [lengths[i] for i in full[start : start + 8]]
        assert batch == sorted(batch)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_trainer_uses_the_sampler_and_a_new_order_each_epoch(sft, model, trainer_args, accumulation):
    lengths = [4 + (7 * i) % 13 for i in range(12)]
    rows = [{"input_ids": [5 + i] * n, "labels": [IGNORE] + [5 + i] * (n - 1)} for i, n in enumerate(lengths)]
    seen = []

    def collate(batch):
        seen.extend(row["input_ids"][0] - 5 for row in batch)
        return sft.collate(batch, 0)

    args = trainer_args(
        TrainingArguments,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=accumulation,
        max_steps=-1,
        num_train_epochs=2,
        seed=11,
        learning_rate=0.01,
    )
    trainer = sft.SFTTrainer(
        copy.deepcopy(model), TrainingArguments(**args), train_dataset=rows, data_collator=collate
    )
    trainer.row_lengths = lengths
    trainer.train()
    assert seen == order(lengths, 3, seed=11, epoch=0) + order(lengths, 3, seed=11, epoch=1)
    assert seen[:12] != seen[12:]
    assert trainer.state.global_step == 8 // accumulation


def test_loss_curve_keeps_what_a_plot_needs():
    log = [
        {"loss": 2.0, "grad_norm": 1.0, "learning_rate": 1e-3, "epoch": 0.5, "step": 10},
        {"loss": 1.0, "rewards/margins": 0.3, "epoch": 1.0, "step": 20},
        {"train_runtime": 3.0, "epoch": 1.0, "step": 20},
    ]
    assert loss_curve(log) == [{"loss": 2.0, "step": 10}, {"loss": 1.0, "rewards/margins": 0.3, "step": 20}]
