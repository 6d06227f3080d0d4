"""拿来对照的：一个进程训练同样五步（张量并行、ZeRO、叠起来的都与它比）；torch 自己的 parallelize_module 也训练同样五步。"""

from __future__ import annotations

import torch

from saved_bytes import count_saved
from small_gpt import Sizes, loss_sum, make_batch, make_model

STEPS = 5
RATE = 1e-2


def one_process(sizes: Sizes, rows: int, length: int, seed: int) -> dict:
    model = make_model(sizes, seed)
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    losses, saved = [], 0
    for step in range(STEPS):
        with count_saved(model) as kept:
            loss = loss_sum(model, make_batch(rows, length, sizes.vocab, seed + step)) / (rows * length)
        loss.backward()
        saved = kept.bytes
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    weights = {name: p.detach() for name, p in model.named_parameters()}
    held = sum(p.numel() * p.element_size() for p in weights.values())
    return {"weights": weights, "losses": losses, "saved": saved, "held": held}


def torch_worker(rank: int, n: int, sizes: Sizes, rows: int, length: int, seed: int) -> dict:
    """同样五步，用 torch 自己的 parallelize_module。"""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = make_model(sizes, seed)
    plan = {
        "tokens": RowwiseParallel(input_layouts=Replicate()),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }
    for i, block in enumerate(model.blocks):
        block.attention.heads //= n
        columns = ("attention.q", "attention.k", "attention.v", "mlp.up")
        plan |= {f"blocks.{i}.{name}": ColwiseParallel() for name in columns}
        plan |= {f"blocks.{i}.{name}": RowwiseParallel() for name in ("attention.o", "mlp.down")}
    parallelize_module(model, init_device_mesh("cpu", (n,)), plan)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, foreach=False)
    for step in range(STEPS):
        (loss_sum(model, make_batch(rows, length, sizes.vocab, seed + step)) / (rows * length)).backward()
        optimizer.step()
        optimizer.zero_grad()
    whole = {}
    for name, p in model.named_parameters():
        whole[name] = (p.full_tensor() if hasattr(p, "full_tensor") else p).detach()
    return {"weights": whole}
