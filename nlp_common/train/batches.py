"""这一遍怎样打乱、怎样分批：次序只由 (种子, 第几遍) 决定，所以中断后继续，看到的与不中断完全相同。"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import torch
from torch.utils.data import DataLoader, Sampler

from nlp_common.base.errors import UserError
from nlp_common.base.processes import num_processes, process_index
from nlp_common.train.settings import LoopSettings


def shuffled(n_rows: int, seed: int, epoch: int) -> list[int]:
    """打乱的行号（与 transformers 的 Trainer 同样的次序）。"""
    return torch.randperm(n_rows, generator=torch.Generator().manual_seed(seed + epoch)).tolist()


def bucketed(lengths: list[int], batch_size: int, seed: int, epoch: int, pool: int = 50) -> list[int]:
    """打乱，但长度相近的行排在同一批，少算填充：打乱 → 每 pool 批为一池，池内按长度排 → 再打乱各批的次序。"""
    rng = random.Random(seed * 100_003 + epoch)
    order = list(range(len(lengths)))
    rng.shuffle(order)
    size = batch_size * pool
    batches = []
    for start in range(0, len(order), size):
        similar = sorted(order[start : start + size], key=lengths.__getitem__)
        batches += [similar[i : i + batch_size] for i in range(0, len(similar), batch_size)]
    last = batches.pop() if batches and len(batches[-1]) < batch_size else []
    rng.shuffle(batches)  # 不满的一批留在最后，别让它打乱后面的分批
    return [index for batch in [*batches, last] for index in batch]


def my_batches(n_rows: int, lengths: list[int] | None, settings: LoopSettings, epoch: int) -> list[list[int]]:
    """这一遍里，这个进程的各批行号。n 个进程合起来的一批，恰好是一个进程 n 倍大的一批。

    最后不满的一批也尽量平分；不够每个进程一行的，才不要了。
    """
    parts, mine = num_processes(), process_index()
    size = settings.per_device_train_batch_size * parts
    order = shuffled(n_rows, settings.seed, epoch)
    if lengths is not None:
        order = bucketed(lengths, size, settings.seed, epoch)
    batches = []
    for start in range(0, n_rows, size):
        whole = order[start : start + size]
        if len(whole) >= parts:
            batches.append(whole[len(whole) * mine // parts : len(whole) * (mine + 1) // parts])
    if not batches:
        raise UserError(f"训练数据只有 {n_rows} 行，不够 {parts} 个进程分。")
    return batches


def micro_batches_of(
    rows: list,
    collate: Callable[[list], dict],
    lengths: list[int] | None,
    settings: LoopSettings,
    epoch: int,
    done: int,
    device: torch.device,
) -> Iterator[list[dict]]:
    """第 epoch 遍从第 done 步起，每一步要的几批（gradient_accumulation_steps 批，最后一步可能不满），拼好，搬到 device 上。"""
    size = settings.gradient_accumulation_steps
    loader = DataLoader(
        rows,
        batch_sampler=my_batches(len(rows), lengths, settings, epoch)[done * size :],
        collate_fn=collate,
        num_workers=settings.dataloader_num_workers,
        pin_memory=device.type == "cuda",
        # DataLoader 开始时从全局的随机数里取一个；从一遍的中间接着训练，那一个早取过了，再取 dropout 就错位
        generator=torch.Generator() if done else None,
    )
    group = []
    for batch in loader:
        group.append({name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()})
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


class LengthBucketSampler(Sampler[int]):
    """给 transformers 的 Trainer 用：按 bucketed 的次序给出行号。"""

    def __init__(self, lengths: list[int], batch_size: int, seed: int):
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        yield from bucketed(self.lengths, self.batch_size, self.seed, self.epoch)
