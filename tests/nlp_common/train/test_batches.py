"""按长度分批：一行不多一行不少，次序只由种子与轮数决定，一批之内长短相近。"""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nlp_common.train.batches import LengthBucketSampler, bucketed


def random_lengths(n: int, seed: int = 0) -> list[int]:
    return torch.randint(20, 200, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def order(lengths, batch_size=8, seed=0, epoch=0, **kwargs) -> list[int]:
    indices = bucketed(lengths, batch_size, seed, epoch, **kwargs)
    if not kwargs:  # 给 Trainer 用的采样器是同样的次序
        sampler = LengthBucketSampler(lengths, batch_size, seed)
        sampler.set_epoch(epoch)
        assert len(sampler) == len(lengths) and list(sampler) == indices
    return indices


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
