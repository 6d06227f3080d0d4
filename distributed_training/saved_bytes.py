"""数一数：一次前向替反向留下几个字节的激活。"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass
class Saved:
    storages: dict[int, int] = field(default_factory=dict)  # 地址 → 字节：同一块只算一遍
    kept: list[Tensor] = field(default_factory=list)  # 留着，地址就不会被别人再用

    @property
    def bytes(self) -> int:
        return sum(self.storages.values())


@contextlib.contextmanager
def count_saved(model: nn.Module) -> Iterator[Saved]:
    """with 里面的前向，autograd 留下的张量占几个字节（参数本身不算）。"""
    saved = Saved()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters and storage.data_ptr() not in saved.storages:
            saved.storages[storage.data_ptr()] = storage.nbytes()
            saved.kept.append(x.detach())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield saved
