"""deepspeed_peer.py：没有装、没有几个进程，都说怎么办；手写的那一半（一个进程）是平常的 AdamW。"""

from importlib.util import find_spec

import pytest
import torch

import deepspeed_peer as script
from nlp_common.base.errors import UserError
from small_gpt import loss_sum, make_batch, make_model


def test_without_deepspeed_or_processes_it_says_so(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    said = "torchrun" if find_spec("deepspeed") else "pip install deepspeed"
    with pytest.raises(UserError, match=said):
        script.main([])


def test_one_process_moves_every_weight():
    batches = [make_batch(8, 16, 96, seed=i) for i in range(2)]
    model, start = script.one_process(0, batches), make_model(seed=0, dtype=torch.float32)
    moved = [(a - b).abs().max().item() for a, b in zip(model.parameters(), start.parameters(), strict=True)]
    assert min(moved) > 0 and max(moved) < 3 * script.RATE
    assert loss_sum(model, batches[0]) < loss_sum(start, batches[0])
