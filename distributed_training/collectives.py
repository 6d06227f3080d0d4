"""集合通信：all-reduce、reduce-scatter、all-gather、broadcast、all-to-all，都从"发给下一个、收上一个"写起。

学到什么：排成一个环，每一步各发一块，n−1 步之后人人都有；all-reduce 就是 reduce-scatter 再接 all-gather，
一个进程一共发 2(n−1)/n 倍的数据，与有多少个进程几乎无关；所以几千块 GPU 也用得起。

运行：
    python collectives.py                     # 四个进程，几秒
    python collectives.py --num_processes 8 --size 1000
    python collectives.py --preset full       # 数据大些

预期输出（实测见本文件夹的 README.md）：每一种都与 torch.distributed 的一样，发出的字节等于公式。

参考：Patarasuk & Yuan 2009（环上的 all-reduce 为什么最省）；Thakur et al. 2005（各种集合通信的代价）。
"""

from nlp_common.base.cli import run_main

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from nlp_common.base.arguments import COUNT, Limits, option
from nlp_common.base.console import print_table
from nlp_common.draw.plots import bar_chart
from nlp_common.train.lesson import run_lesson
from nlp_common.train.settings import LessonSettings, parse_settings
from nlp_common.train.stage import Stage
from ranks import run_ranks

HOME = Path(__file__).resolve().parent
PRESETS = {"tiny": {"size": 10000}, "full": {"size": 10_000_000}}
NAMES = ("broadcast", "reduce_scatter", "all_gather", "all_reduce", "all_to_all")
FORMULAS = {  # 一个进程发出的，是全部数据的几倍（n 个进程）
    "broadcast": ("最多 1", lambda n: 1.0),
    "reduce_scatter": ("(n − 1)/n", lambda n: (n - 1) / n),
    "all_gather": ("(n − 1)/n", lambda n: (n - 1) / n),
    "all_reduce": ("2(n − 1)/n", lambda n: 2 * (n - 1) / n),
    "all_to_all": ("(n − 1)/n", lambda n: (n - 1) / n),
}


@dataclass
class CollectiveSettings(LessonSettings):
    NOT_IN_FINGERPRINT = LessonSettings.NOT_IN_FINGERPRINT | {"port"}

    num_processes: int = option("几个进程", 4, Limits(at_least=2, at_most=16))
    port: int = option("各进程在哪个端口碰头；0 是找一个空的", 0, Limits(at_least=0, at_most=65535))
    size: int | None = option("几个数（float64）；不能被进程数整除也行", limits=COUNT)


# ---------------------------------------------------------------- 1. 只有这两样：发给谁，收谁的


class Traffic:
    """这个进程发出去几个字节、发了几次。"""

    def __init__(self) -> None:
        self.bytes = self.times = 0

    def exchange(self, out: Tensor, to: int, sender: int, like: Tensor) -> Tensor:
        """同时：out 发给 to，收 sender 的（形状同 like）。先登记要收的，再发：两边都先发就互相等住。"""
        found = torch.empty_like(like, memory_format=torch.contiguous_format)
        receiving = dist.irecv(found, sender)
        self.send(out, to)
        receiving.wait()
        return found

    def send(self, out: Tensor, to: int) -> None:
        out = out.contiguous()
        dist.isend(out, to).wait()
        self.bytes += out.numel() * out.element_size()
        self.times += 1


def split(x: Tensor, n: int) -> list[Tensor]:
    """切成 n 块，前几块可以多一个：不必整除。"""
    return list(x.tensor_split(n))


# ---------------------------------------------------------------- 2. 五种


def broadcast(x: Tensor, root: int, traffic: Traffic) -> Tensor:
    """root 的 x 给每一个人：沿着环传下去，最后一个不必再发。"""
    rank, n = dist.get_rank(), dist.get_world_size()
    place = (rank - root) % n  # 我是从 root 起的第几个
    if place > 0:
        x = torch.empty_like(x)
        dist.recv(x, (rank - 1) % n)
    if place < n - 1:
        traffic.send(x, (rank + 1) % n)
    return x


def reduce_scatter(x: Tensor, traffic: Traffic) -> Tensor:
    """各人的 x (S,) 加起来，第 rank 个人只留第 rank 块。

    第 s 步：把手里加到一半的那一块发给下一个，收上一个的，加上自己的。每一块绕环走一圈，最后停在该停的人手里。
    """
    rank, n = dist.get_rank(), dist.get_world_size()
    blocks = split(x, n)
    carried = blocks[(rank - 1) % n]
    for step in range(1, n):
        mine = blocks[(rank - 1 - step) % n]
        carried = mine + traffic.exchange(carried, (rank + 1) % n, (rank - 1) % n, mine)
    return carried


def all_gather(mine: Tensor, sizes: list[int], traffic: Traffic) -> Tensor:
    """第 i 个人有第 i 块（sizes[i] 个数），最后人人都有全部：每一步把刚收到的那一块再往下传。"""
    rank, n = dist.get_rank(), dist.get_world_size()
    blocks = [mine.new_empty(size) for size in sizes]
    blocks[rank] = carried = mine
    for step in range(1, n):
        place = (rank - step) % n
        carried = traffic.exchange(carried, (rank + 1) % n, (rank - 1) % n, blocks[place])
        blocks[place] = carried
    return torch.cat(blocks)


def all_reduce(x: Tensor, traffic: Traffic) -> Tensor:
    """各人的 x 加起来，人人都有：先各人加好一块，再把各块传给大家。形状不变。"""
    sizes = [len(block) for block in split(x.flatten(), dist.get_world_size())]
    return all_gather(reduce_scatter(x.flatten(), traffic), sizes, traffic).view_as(x)


def all_to_all(blocks: list[Tensor], traffic: Traffic) -> list[Tensor]:
    """blocks[i] 是要给第 i 个人的；返回的第 i 块是第 i 个人给我的。第 s 步与隔 s 个的人换。各块要一样大。"""
    rank, n = dist.get_rank(), dist.get_world_size()
    found = list(blocks)  # 给自己的那一块不用发
    for step in range(1, n):
        to, sender = (rank + step) % n, (rank - step) % n
        found[sender] = traffic.exchange(blocks[to], to, sender, blocks[sender])
    return found


# ---------------------------------------------------------------- 3. 与 torch.distributed 比


def worker(rank: int, n: int, size: int, seed: int) -> dict:
    x = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed * 1000 + rank))
    total = x.clone()
    dist.all_reduce(total)
    first = x.clone()
    dist.broadcast(first, 0)
    blocks = split(x, n)
    sizes = [len(block) for block in blocks]
    even = x[: size // n * n].view(n, -1)  # all-to-all 各块一样大
    exchanged = torch.empty_like(even)
    dist.all_to_all_single(exchanged, even.contiguous())
    gathered = [torch.empty(count, dtype=x.dtype) for count in sizes]
    for place, block in enumerate(gathered):  # torch 的 all_gather 要各块一样大：一块一块地广播
        block.copy_(blocks[place]) if place == rank else None
        dist.broadcast(block, place)
    ways = {
        "broadcast": (lambda t: broadcast(x, 0, t), first),
        "reduce_scatter": (lambda t: reduce_scatter(x, t), split(total, n)[rank]),
        "all_gather": (lambda t: all_gather(blocks[rank], sizes, t), torch.cat(gathered)),
        "all_reduce": (lambda t: all_reduce(x, t), total),
        "all_to_all": (lambda t: torch.stack(all_to_all(list(even), t)), exchanged),
    }
    found = {}
    for name, (run, wanted) in ways.items():
        traffic = Traffic()
        found[name] = {"difference": (run(traffic) - wanted).abs().max().item() if size else 0.0}
        found[name] |= {"bytes": traffic.bytes, "times": traffic.times}
    return found


def learn(stage: Stage) -> dict:
    settings = stage.settings
    n, size = settings.num_processes, settings.size
    parts = run_ranks(worker, n, size, settings.seed, port=settings.port)
    metrics: dict = {"num_processes": n, "size_bytes": size * 8}
    table = [["", "与 torch 差", "一个进程最多发（字节）", "公式（字节）", "公式", "发几次"]]
    for name in NAMES:
        formula, times = FORMULAS[name]
        whole = size // n * n if name == "all_to_all" else size
        its = {
            "difference": max(part[name]["difference"] for part in parts),
            "bytes": max(part[name]["bytes"] for part in parts),
            "mean_bytes": sum(part[name]["bytes"] for part in parts) / n,
            "formula": times(n) * whole * 8,
            "times": max(part[name]["times"] for part in parts),
        }
        metrics[name] = its
        table.append(
            [name, f"{its['difference']:.1e}", f"{its['bytes']:,d}", f"{its['formula']:,.0f}", formula, str(its["times"])]
        )  # fmt: skip
    metrics["max_difference"] = max(metrics[name]["difference"] for name in NAMES)
    print(f"\n{n} 个进程，{size:,d} 个数（{size * 8:,d} 字节）")
    print_table(table)
    if size % n:
        print(f"  {size} 除不尽 {n}：有的块多一个数，各进程发的差几个字节，平均起来等于公式。")
    print()
    return stage.save(metrics, {}, partial(draw, n=n))


def draw(folder: Path, n: int) -> None:
    """all-reduce 一个进程发几份数据：环，与"都发给 0 号、再由它发回"。"""
    counts = (2, 4, 8, 16, 64)
    series = {
        "环|ring": {f"{k}": 2 * (k - 1) / k for k in counts},
        "都经过 0 号|through rank 0": {f"{k}": float(k - 1) for k in counts},
    }
    bar_chart(
        folder / "all_reduce.svg", series, "all-reduce：最忙的进程发几份数据|Copies sent by the busiest process",
        "几个进程|processes", "份|copies",
    )  # fmt: skip


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(CollectiveSettings, PRESETS, argv)
    return run_lesson("collectives", HOME, settings, learn)


if __name__ == "__main__":
    run_main(main)
