"""剪过的矩阵乘起来快不快：同一个矩阵，稠密的乘法、torch 的 CSR，轮流量；2:4 的乘法在 CPU 上有没有。"""

from __future__ import annotations

import math
import time
import warnings
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

SHARES = (0.5, 0.8, 0.95, 0.99)
SIZE = 1024
REPEATS = 30


def sparse_speed(seed: int, size: int = SIZE, repeats: int = REPEATS) -> dict:
    """每种稀疏度 → 微秒与快几倍：{"columns_1": {"50": {"full", "dense", "csr", "dense_speedup", …}, …}, "columns_64": …}。

    columns 是一次乘几个 token：1 是一个一个地写，64 是读提示。
    """
    generator = torch.Generator().manual_seed(seed)
    found: dict = {}
    for columns in (1, 64):
        x = torch.randn(columns, size, generator=generator)  # (N, in)
        its = found[f"columns_{columns}"] = {}
        for share in SHARES:
            w = torch.randn(size, size, generator=generator)
            keep = torch.rand(size, size, generator=generator) >= share
            its[f"{100 * share:g}"] = race(w, keep, x, repeats)
    return found | {"two_of_four": two_of_four_here(size)}


def race(w: Tensor, keep: Tensor, x: Tensor, repeats: int) -> dict[str, float]:
    """w (out, in)、keep 是留下的位置、x (N, in)：没剪的（full）、剪过的（dense）、剪过的存成 CSR（csr），各乘一次 x。

    轮流乘，各取最快的一次，微秒：机器忽快忽慢，三种一起受；别的程序只会让它慢。
    """
    pruned = w * keep
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        csr = pruned.to_sparse_csr()
    columns = x.T.contiguous()  # (in, N)
    assert torch.allclose(csr @ columns, F.linear(x, pruned).T, atol=1e-3)  # 先看清：算的是同一个东西
    ways = {
        "full": partial(F.linear, x, w),
        "dense": partial(F.linear, x, pruned),
        "csr": partial(torch.matmul, csr, columns),
    }
    fastest = dict.fromkeys(ways, math.inf)
    for _ in range(repeats):
        for name, work in ways.items():
            started = time.perf_counter()
            work()
            fastest[name] = min(fastest[name], 1e6 * (time.perf_counter() - started))
    speedups = {f"{name}_speedup": fastest["full"] / fastest[name] for name in ("dense", "csr")}
    return fastest | speedups


def two_of_four_here(size: int) -> str:
    """torch 的 2:4 乘法在这台机器的 CPU 上能不能用：空的是能，不能就是它自己说的话。"""
    from torch.sparse import to_sparse_semi_structured

    w = torch.randn(size, size, dtype=torch.float16).view(-1, 4)
    w[:, 2:] = 0
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The PyTorch API of SparseSemiStructuredTensor")
            sparse = to_sparse_semi_structured(w.view(size, size))
            F.linear(torch.randn(64, size, dtype=torch.float16), sparse)
    except (RuntimeError, NotImplementedError) as error:
        return str(error).strip().splitlines()[0]
    return ""
