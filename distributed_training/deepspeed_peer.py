"""DeepSpeed 自己，在 CPU 的两个进程上（gloo）：ZeRO-1、2、3 五步以后的权重，与一个进程的 AdamW 比。

不是一课，是对照：要另装 deepspeed（它不在依赖里），第一次运行要现场编译通信的小程序，两三分钟。

运行：
    pip install deepspeed ninja
    DS_ACCELERATOR=cpu torchrun --standalone --nproc-per-node 2 deepspeed_peer.py --record distributed.deepspeed

预期输出（实测见本文件夹的 README.md）：三级都与一个进程相差 1e-6 以下（float32：DeepSpeed 的 ZeRO 不做 float64）。
"""

from nlp_common.base.cli import run_main

import os
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torch.distributed as dist
from torch import nn

from nlp_common.base.arguments import option, parse_arguments
from nlp_common.base.errors import UserError
from nlp_common.base.measurements import numbers_in, record, split_prefix
from small_gpt import Sizes, loss_sum, make_batch, make_model

ROWS, LENGTH, STEPS, RATE = 8, 16, 5, 1e-3


@dataclass
class PeerSettings:
    record: str | None = option("把量到的数记进 docs/measurements，名字以它开头")
    seed: int = option("随机种子", 0)


def one_process(seed: int, batches: list[torch.Tensor]) -> nn.Module:
    model = make_model(seed=seed, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    for rows in batches:
        optimizer.zero_grad()
        (loss_sum(model, rows) / (ROWS * LENGTH)).backward()
        optimizer.step()
    return model


def with_deepspeed(
    stage: int, offload: bool, seed: int, batches: list[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """DeepSpeed 走同样几步；→ 收齐的权重。"""
    import deepspeed

    rank, n = dist.get_rank(), dist.get_world_size()
    model = make_model(seed=seed, dtype=torch.float32)
    zero: dict = {"stage": stage} | ({"offload_optimizer": {"device": "cpu"}} if offload else {})
    config = {
        "train_micro_batch_size_per_gpu": ROWS // n,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # 用 torch 的 AdamW：它自己的要编译
        "zero_force_ds_cpu_optimizer": False,
    }
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for rows in batches:
        mine = rows[rank::n]
        engine.backward(loss_sum(engine, mine) / (len(mine) * LENGTH))
        engine.step()
    weights = {}
    for name, parameter in model.named_parameters():
        if stage == 3:  # 平时手里只有一份碎片
            with deepspeed.zero.GatheredParameters([parameter]):
                weights[name] = parameter.detach().clone()
        else:
            weights[name] = parameter.detach().clone()
    return weights


def main(argv: list[str] | None = None) -> dict:
    settings = parse_arguments(PeerSettings, argv)
    if not find_spec("deepspeed"):
        raise UserError("要 deepspeed：pip install deepspeed ninja，装完看一眼 torch.__version__ 变没变。")
    if "RANK" not in os.environ:
        raise UserError(
            "要几个进程：DS_ACCELERATOR=cpu torchrun --standalone --nproc-per-node 2 deepspeed_peer.py"
        )
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
    if ROWS % dist.get_world_size():
        raise UserError(f"一步 {ROWS} 行不能平分给 {dist.get_world_size()} 个进程。")
    vocab = Sizes().vocab
    batches = [make_batch(ROWS, LENGTH, vocab, seed=settings.seed * 1000 + i) for i in range(STEPS)]
    alone = dict(one_process(settings.seed, batches).named_parameters())
    differences = {}
    for stage in (1, 2, 3):
        for offload in (False, True):
            weights = with_deepspeed(stage, offload, settings.seed, batches)
            worst = max((weights[name] - alone[name]).abs().max().item() for name in alone)
            differences[f"zero{stage}" + "_offload" * offload] = worst
            if dist.get_rank() == 0:
                print(f"ZeRO-{stage}{'，挪走优化器' * offload}：权重与一个进程最多相差 {worst:.1e}")
    if settings.record and dist.get_rank() == 0:
        topic, rest = split_prefix(settings.record)
        record(topic, numbers_in(differences, f"{rest}."), seed=settings.seed)
    dist.barrier()
    return differences


if __name__ == "__main__":
    run_main(main)
