"""集合通信：等于 torch.distributed 的，除不尽、只有一个数也对；发出的字节等于公式。"""

import pytest
import torch
import torch.distributed as dist

import collectives
from collectives import Traffic, all_gather, all_reduce, all_to_all, broadcast, reduce_scatter, split
from nlp_common.base.errors import UserError
from ranks import run_ranks

SIZES = (1, 2, 3, 7, 30, 1000)  # 比进程少的、除不尽的都有


def worker(rank, n):
    """各种大小、各个根，一次开进程都比完：返回最大的差与发出的字节。"""
    worst, sent = 0.0, {}
    for size in SIZES:
        x = torch.arange(size, dtype=torch.float64) * (rank + 1) + rank
        total = x.clone()
        dist.all_reduce(total)
        traffic = Traffic()
        worst = max(worst, (all_reduce(x, traffic) - total).abs().max().item())
        sent[size] = traffic.bytes
        mine = reduce_scatter(x, Traffic())
        wanted = split(total, n)[rank]
        assert mine.shape == wanted.shape
        worst = max(worst, (mine - wanted).abs().max().item() if len(wanted) else 0.0)
        sizes = [len(block) for block in split(x, n)]
        whole = all_gather(split(total, n)[rank], sizes, Traffic())
        worst = max(worst, (whole - total).abs().max().item())
        for root in range(n):
            wanted = torch.arange(size, dtype=torch.float64) * (root + 1) + root
            worst = max(worst, (broadcast(x, root, Traffic()) - wanted).abs().max().item())
    blocks = [torch.full((2, 3), float(10 * rank + to)) for to in range(n)]
    for sender, block in enumerate(all_to_all(blocks, Traffic())):
        assert (block == 10 * sender + rank).all()
    matrix = all_reduce(torch.ones(3, 5), Traffic())
    assert matrix.shape == (3, 5) and (matrix == n).all()
    return {"worst": worst, "sent": {str(size): count for size, count in sent.items()}}


@pytest.mark.parametrize("n", [2, 3])
def test_equal_to_torch_for_every_size_and_root(n):
    for part in run_ranks(worker, n):
        assert part["worst"] < 1e-12
        assert part["sent"]["30"] == 2 * (n - 1) / n * 30 * 8


def test_the_script(tmp_path):
    folder = tmp_path / "out"
    metrics = collectives.main(["--preset", "tiny", "--size", "60", "--output_dir", str(folder)])["metrics"]
    assert metrics["max_difference"] < 1e-12
    for name in collectives.NAMES:
        assert metrics[name]["bytes"] == metrics[name]["formula"]
    assert metrics["all_reduce"]["times"] == 6 and (folder / "all_reduce.svg").exists()


@pytest.mark.parametrize("flags", [["--num_processes", "1"], ["--size", "0"], ["--port", "70000"]])
def test_bad_numbers(flags):
    with pytest.raises(UserError, match=flags[0]):
        collectives.main(["--preset", "tiny", *flags])
