"""两种并行叠起来：2×2 个进程，横着切模型，竖着分数据。

学到什么：进程排成一张格子，每一行、每一列各是一组，通信只在组里；数据并行那一组加梯度，张量（或流水线）那一组传激活；
损失除以全体的 token 数，不是自己那一份的：不然几份长短不同时，结果就与一个进程的不一样。

运行：
    python parallel_2d.py                      # 数据 × 张量、数据 × 流水线，各四个进程，十几秒
    python parallel_2d.py --preset full

预期输出（实测见本文件夹的 README.md）：两种叠法，五步 AdamW 之后的权重与一个进程的差不到 1e-12（float64）。

参考：Narayanan et al. 2021（PTD-P：三种并行怎样叠）。
"""

from nlp_common.base.cli import run_main

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

import tensor_parallel
from nlp_common.base.arguments import COUNT, Limits, option
from nlp_common.base.console import print_table
from nlp_common.base.errors import UserError
from nlp_common.draw.plots import bar_chart
from nlp_common.train.lesson import run_lesson
from nlp_common.train.settings import LessonSettings, parse_settings
from nlp_common.train.stage import Stage
from pipeline_parallel import Part, bytes_sent, run_schedule
from ranks import run_ranks
from small_gpt import Sizes, make_batch, make_model, max_difference
from tensor_parallel import ParallelGPT, put_together, split_cross_entropy
from tensor_references import RATE, STEPS, one_process

HOME = Path(__file__).resolve().parent
PRESETS = {
    "tiny": {"width": 32, "layers": 4, "rows": 8, "length": 16},
    "full": {"width": 256, "layers": 8, "rows": 16, "length": 128},
}
VOCAB, HEADS = 96, 4
WAYS = {"data_tensor": "数据 × 张量|data × tensor", "data_pipeline": "数据 × 流水线|data × pipeline"}


@dataclass
class GridSettings(LessonSettings):
    NOT_IN_FINGERPRINT = LessonSettings.NOT_IN_FINGERPRINT | {"port"}

    data: int = option("格子几行：数据分成几份", 2, Limits(at_least=2, at_most=4))
    columns: int = option("格子几列：模型切成几份", 2, Limits(at_least=2, at_most=4))
    port: int = option("各进程在哪个端口碰头；0 是找一个空的", 0, Limits(at_least=0, at_most=65535))
    micro_batches: int = option("流水线：一份数据拆成几个小批", 4, COUNT)
    width: int | None = option("模型多宽", limits=COUNT)
    layers: int | None = option("几层", limits=COUNT)
    rows: int | None = option("一批几行，全体的", limits=COUNT)
    length: int | None = option("一行几个 token", limits=COUNT)

    def check(self) -> None:
        if self.rows % (self.data * self.micro_batches):
            raise UserError(
                f"--rows {self.rows} 分不匀：要是 --data × --micro_batches（{self.data * self.micro_batches}）的倍数。"
            )
        if self.layers % self.columns or HEADS % self.columns or VOCAB % self.columns or self.width % HEADS:
            raise UserError(
                f"--layers {self.layers}、头数 {HEADS}、词表 {VOCAB} 要能匀分给 --columns {self.columns} 份，--width 要是 {HEADS} 的倍数。"
            )

    def sizes(self) -> Sizes:
        return Sizes(VOCAB, self.width, HEADS, self.layers, 2 * self.width, self.length)


# ---------------------------------------------------------------- 1. 格子：谁和谁一组


def make_grid(data: int, model: int) -> tuple[list[list[int]], list[list[int]]]:
    """(各行, 各列)：第 d 行第 t 列是 d·model + t 号进程。一行一起切模型，一列各拿一份数据。"""
    rows = [[d * model + t for t in range(model)] for d in range(data)]
    columns = [[d * model + t for d in range(data)] for t in range(model)]
    return rows, columns


def my_groups(rank: int, data: int, model: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """(我那一行, 我那一列)。每个进程都要把每一组都建一遍，次序相同，不然就互相等到超时。"""
    mine = []
    for lines in make_grid(data, model):
        groups = [dist.new_group(line) for line in lines]
        mine.append(next(group for group, line in zip(groups, lines, strict=True) if rank in line))
    return mine[0], mine[1]


def add_gradients(model: torch.nn.Module, column: dist.ProcessGroup) -> float:
    """数据并行：一列的几个进程管着同一块权重，梯度加起来（损失已经除以全体的 token 数，不必再平均）；返回发了几个字节。"""
    numbers = 0
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad, group=column)
        numbers += parameter.grad.numel()
    n = dist.get_world_size(column)
    return 2 * (n - 1) / n * numbers * 8


# ---------------------------------------------------------------- 2. 两种叠法


def data_tensor(
    rank: int, n: int, data: int, model: int, sizes: Sizes, rows: int, length: int, seed: int
) -> dict:
    row, column = my_groups(rank, data, model)
    tensor_parallel.GRID["group"] = row  # 张量并行的通信都在这一行里
    net = ParallelGPT(make_model(sizes, seed), sequence=False)
    optimizer = torch.optim.AdamW(net.parameters(), RATE)
    for step in range(STEPS):
        tensor_parallel.traffic["bytes"] = 0.0
        batch = make_batch(rows, length, sizes.vocab, seed + step).chunk(data)[dist.get_rank(column)]
        (split_cross_entropy(net(batch[:, :-1]), batch[:, 1:]) / (rows * length)).backward()
        in_column = add_gradients(net, column)
        optimizer.step()
        optimizer.zero_grad()
    weights = {name: p.detach() for name, p in net.named_parameters()}
    return {"weights": weights, "in_row": tensor_parallel.traffic["bytes"], "in_column": in_column}


def data_pipeline(
    rank: int, n: int, data: int, model: int, sizes: Sizes, rows: int, length: int, seed: int, m: int
) -> dict:
    _, column = my_groups(rank, data, model)
    line = make_grid(data, model)[0][rank // model]
    part = Part(make_model(sizes, seed), line.index(rank), model)
    optimizer = torch.optim.AdamW(part.parameters(), RATE)
    for step in range(STEPS):
        batch = make_batch(rows, length, sizes.vocab, seed + step).chunk(data)[dist.get_rank(column)]
        in_row = run_schedule(part, "1f1b", batch, m, line, rows * length)["sent"]
        in_column = add_gradients(part, column)
        optimizer.step()
        optimizer.zero_grad()
    weights = {name: p.detach() for name, p in part.named_parameters()}
    return {"weights": weights, "in_row": in_row, "in_column": in_column}


# ---------------------------------------------------------------- 3. 比较


def learn(stage: Stage) -> dict:
    settings = stage.settings
    sizes = settings.sizes()
    shape = (sizes, settings.rows, settings.length, settings.seed)
    grid = (settings.data, settings.columns)
    wanted = one_process(*shape)["weights"]
    n = settings.data * settings.columns
    found = {
        "data_tensor": run_ranks(data_tensor, n, *grid, *shape, port=settings.port),
        "data_pipeline": run_ranks(
            data_pipeline, n, *grid, *shape, settings.micro_batches, port=settings.port
        ),
    }
    metrics: dict = {"data": settings.data, "model": settings.columns}
    table = [["", "与一个进程差", "各行之间差", "行里发（字节）", "公式", "列里发（字节）", "公式"]]
    for way, title in WAYS.items():
        parts = [part["weights"] for part in found[way]]
        first_row = parts[: settings.columns]
        if way == "data_tensor":
            weights = put_together(first_row)
        else:
            weights = {name: value for part in first_row for name, value in part.items()}
        its = {
            "max_difference": max_difference(weights, wanted),
            "between_rows": rows_apart(parts, settings.columns),
            "row_bytes": sum(part["in_row"] for part in found[way][: settings.columns]),
            "row_formula": row_bytes(settings, way),
            "column_bytes": found[way][0]["in_column"],
            "column_formula": column_bytes(settings, way, wanted),
        }
        metrics[way] = its
        table.append(
            [title.split("|")[0], f"{its['max_difference']:.1e}", f"{its['between_rows']:.1e}",
             *(f"{its[name]:,.0f}" for name in ("row_bytes", "row_formula", "column_bytes", "column_formula"))]
        )  # fmt: skip
    metrics["max_difference"] = max(metrics[way]["max_difference"] for way in WAYS)
    print(f"\n{settings.data} 行（数据）× {settings.columns} 列（模型），一步里：")
    print_table(table)
    print("  行里是一行的几个进程一共发的，列里是 0 号进程发的。\n")
    return stage.save(metrics, {}, partial(draw, metrics=metrics))


def row_bytes(settings: GridSettings, way: str) -> float:
    """一行的几个进程一共该发几个字节：各自那一份数据的张量并行（或流水线）。公式见那两个脚本。"""
    model, rows = settings.columns, settings.rows // settings.data
    tokens = rows * settings.length
    if way == "data_pipeline":
        return bytes_sent(rows, settings.length, settings.width, model)
    numbers = (4 * settings.layers + 2) * tokens * settings.width + 3 * tokens
    return model * 2 * (model - 1) / model * numbers * 8


def column_bytes(settings: GridSettings, way: str, weights: dict[str, torch.Tensor]) -> float:
    """0 号进程在它那一列里该发几个字节：它管的参数的 2(d−1)/d 倍。"""
    numbers = 0
    for name, weight in weights.items():
        if way == "data_tensor":  # 切成 model 份，只有这几样人人都有
            share = (
                1 if "norm" in name or "positions" in name or name.endswith("down.bias") else settings.columns
            )
            numbers += weight.numel() // share
        elif name.startswith(("tokens", "positions")) or name.startswith(first_blocks(settings)):
            numbers += weight.numel()
    return 2 * (settings.data - 1) / settings.data * numbers * 8


def first_blocks(settings: GridSettings) -> tuple[str, ...]:
    return tuple(f"blocks.{i}." for i in range(settings.layers // settings.columns))


def rows_apart(parts: list[dict], model: int) -> float:
    """同一列的几个进程，权重差多少：该一模一样。"""
    return max(
        (part[name] - parts[rank % model][name]).abs().max().item()
        for rank, part in enumerate(parts)
        for name in part
    )


def draw(folder: Path, metrics: dict) -> None:
    """0 号进程一步里往哪里发：行里的按一行的平均。"""
    series = {
        title: {
            "行里：激活|rows: activations": metrics[way]["row_bytes"] / metrics["model"] / 1e3,
            "列里：梯度|columns: gradients": metrics[way]["column_bytes"] / 1e3,
        }
        for way, title in WAYS.items()
    }
    bar_chart(
        folder / "grid_bytes.svg",
        series,
        "一个进程一步发多少|Sent by one process",
        "",
        "千字节|KB",
    )


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(GridSettings, PRESETS, argv)
    return run_lesson("parallel_2d", HOME, settings, learn)


if __name__ == "__main__":
    run_main(main)
