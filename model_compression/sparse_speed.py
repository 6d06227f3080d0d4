"""剪过的矩阵乘起来快不快：同一个矩阵，稠密的乘法、torch 的 CSR，轮流量；2:4 的乘法在 CPU 上有没有。"""

from __future__ import annotations

import statistics
import time
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

SHARES = (0.0, 0.5, 0.8, 0.95, 0.99)
SIZE = 1024
REPEATS = 15


def sparse_speed(seed: int, size: int = SIZE, repeats: int = REPEATS) -> dict:
    """每种稀疏度 → 微秒：{"columns_1": {"50": {"dense", "csr"}, …}, "columns_64": …, "dense_speedup_50", …}。

    columns 是一次乘几个 token：1 是一个一个地写，64 是读提示。dense 是剪过的矩阵用平常的乘法。
    """
    generator = torch.Generator().manual_seed(seed)
    found: dict = {}
    for columns in (1, 64):
        x = torch.randn(columns, size, generator=generator)  # (N, in)
        its = {}
        for share in SHARES:
            w = torch.randn(size, size, generator=generator)
            w[torch.rand(size, size, generator=generator) < share] = 0
            its[f"{100 * share:g}"] = race(w, x, repeats)
        found[f"columns_{columns}"] = its
        for times in its.values():
            times["dense_speedup"] = its["0"]["dense"] / times["dense"]
            times["csr_speedup"] = its["0"]["dense"] / times["csr"]
    return found | {"two_of_four": two_of_four_here(size)}


def race(w: Tensor, x: Tensor, repeats: int) -> dict[str, float]:
    """w (out, in) 乘 x (N, in)：两种乘法轮流，各取中位数，微秒。轮流：机器忽快忽慢，两边一起受。"""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        csr = w.to_sparse_csr()
    columns = x.T.contiguous()  # (in, N)
    assert torch.allclose(csr @ columns, F.linear(x, w).T, atol=1e-3)  # 先说好：算的是同一个东西
    ways = {"dense": lambda: F.linear(x, w), "csr": lambda: csr @ columns}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, work in ways.items():
            started = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - started)
    return {name: 1e6 * statistics.median(each) for name, each in times.items()}


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
