"""ZeRO：优化器的状态、梯度、参数，依次分给各个进程保管，谁也不用放整份。

学到什么：数据并行时，人人都放一整份参数、梯度、Adam 的两个动量，n 份一模一样。ZeRO-1 只分动量，ZeRO-2 再分梯度，
ZeRO-3 连参数也分，用到哪一层才凑齐哪一层；前两级通信不比数据并行多，第三级多一半。结果一个数也不变。

运行：
    python zero.py                       # 四个进程，半分钟上下
    python zero.py --num_processes 2
    python zero.py --preset full         # 同样的比较，模型大些

预期输出（实测见本文件夹的 README.md）：三级的权重，五步 AdamW 之后与一个进程的差不到 1e-12（float64）；
放的、发的字节数等于公式；torch 自己的 ZeroRedundancyOptimizer、fully_shard 也一样。

参考：Rajbhandari et al. 2020（ZeRO，第 5、7 节）；Zhao et al. 2023（FSDP：存储清空再填回）。
"""

from nlp_common.base.cli import run_main

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from collectives import Traffic, all_gather, all_reduce, reduce_scatter
from nlp_common.base.arguments import COUNT, Limits, option
from nlp_common.base.console import print_table
from nlp_common.base.errors import UserError
from nlp_common.draw.plots import bar_chart
from nlp_common.train.lesson import run_lesson
from nlp_common.train.settings import LessonSettings, parse_settings
from nlp_common.train.stage import Stage
from ranks import run_ranks
from small_gpt import Sizes, SmallGPT, loss_sum, make_batch, make_model, max_difference
from tensor_references import RATE, STEPS, one_process

HOME = Path(__file__).resolve().parent
PRESETS = {
    "tiny": {"width": 32, "layers": 4, "rows": 8, "length": 16},
    "full": {"width": 256, "layers": 8, "rows": 16, "length": 128},
}
VOCAB, HEADS = 96, 4
STAGES = {0: "数据并行|data parallel", 1: "ZeRO-1", 2: "ZeRO-2", 3: "ZeRO-3"}
PARTS = {
    "parameters": "参数|parameters",
    "gradients": "梯度|gradients",
    "states": "Adam 的两个动量|Adam states",
}


@dataclass
class ZeroSettings(LessonSettings):
    NOT_IN_FINGERPRINT = LessonSettings.NOT_IN_FINGERPRINT | {"port"}

    num_processes: int = option("几个进程", 4, Limits(at_least=2, at_most=16))
    port: int = option("各进程在哪个端口碰头；0 是找一个空的", 0, Limits(at_least=0, at_most=65535))
    width: int | None = option("模型多宽", limits=COUNT)
    layers: int | None = option("几层", limits=COUNT)
    rows: int | None = option("一批几行，全体的", limits=COUNT)
    length: int | None = option("一行几个 token", limits=COUNT)

    def check(self) -> None:
        if self.rows < self.num_processes:
            raise UserError(
                f"--rows {self.rows} 行不够 {self.num_processes} 个进程分：加行数，或减 --num_processes。"
            )
        if self.width % HEADS:
            raise UserError(f"--width 要是 {HEADS} 的倍数，给的是 {self.width}。")

    def sizes(self) -> Sizes:
        return Sizes(VOCAB, self.width, HEADS, self.layers, 2 * self.width, self.length)


# ---------------------------------------------------------------- 1. 一个参数切成 n 份


class Piece:
    """一个参数，与我管的那一份（拉直、补 0 到 n 的倍数、切开）。

    whole 是模型里的那个参数，它的存储可以清空（free）再凑齐（gather）：前向时 autograd 记下的就是这一块存储，
    反向以前填回去，它看到的还是原来的数。
    """

    def __init__(self, whole: nn.Parameter, traffic: Traffic):
        self.whole, self.traffic = whole, traffic
        n, rank = dist.get_world_size(), dist.get_rank()
        self.shard = nn.Parameter(self.cut(whole.detach(), n)[rank].clone())
        self.sizes = [len(self.shard)] * n
        self.bytes = whole.untyped_storage().nbytes()

    @staticmethod
    def cut(x: Tensor, n: int) -> list[Tensor]:
        flat = x.flatten()
        padded = torch.cat([flat, flat.new_zeros(-len(flat) % n)])
        return list(padded.chunk(n))

    def gather(self) -> None:
        """各人的一份凑成整个参数。写进 .data：不算原地修改，autograd 不会说它变了。"""
        flat = all_gather(self.shard.detach(), self.sizes, self.traffic)
        self.whole.untyped_storage().resize_(self.bytes)
        self.whole.data.copy_(flat[: self.whole.numel()].view_as(self.whole))

    def free(self) -> None:
        self.whole.untyped_storage().resize_(0)

    def reduce_gradient(self) -> None:
        """各人的梯度加起来，我只留我那一份；整份的扔掉。"""
        n = dist.get_world_size()
        flat = torch.cat(self.cut(self.whole.grad, n))
        self.shard.grad = reduce_scatter(flat, self.traffic)
        self.whole.grad = None


class Watch:
    """整份的梯度、整份的参数，同时最多有过几个字节。"""

    def __init__(self, pieces: list[Piece]):
        self.pieces, self.gradients, self.parameters = pieces, 0, 0

    def look(self) -> None:
        gradients = sum(size_of(p.whole.grad) for p in self.pieces if p.whole.grad is not None)
        parameters = sum(p.whole.untyped_storage().nbytes() for p in self.pieces)
        self.gradients, self.parameters = max(self.gradients, gradients), max(self.parameters, parameters)


def size_of(x: Tensor) -> int:
    return x.numel() * x.element_size()


# ---------------------------------------------------------------- 2. 四级，各走五步


def train(model: SmallGPT, stage: int, settings: ZeroSettings) -> dict:
    """stage 0 是数据并行。各进程的数据不同，损失除以全体的 token 数，梯度加起来就是整批的。"""
    n, rank = dist.get_world_size(), dist.get_rank()
    traffic = Traffic()
    pieces = [Piece(p, traffic) for p in model.parameters()]
    watch = Watch(pieces)
    if stage == 0:
        optimizer = torch.optim.AdamW(model.parameters(), RATE)
    else:
        optimizer = torch.optim.AdamW([piece.shard for piece in pieces], RATE)  # 动量只有我那一份的
    if stage == 2:
        reduce_while_backward(pieces, watch)
    if stage == 3:
        gather_when_needed(model, pieces, watch)
    for step in range(STEPS):
        traffic.bytes = 0
        rows = make_batch(settings.rows, settings.length, VOCAB, settings.seed + step)
        loss = loss_sum(model, rows.tensor_split(n)[rank]) / (settings.rows * settings.length)
        loss.backward()
        watch.look()
        if stage == 0:
            for p in model.parameters():
                p.grad = all_reduce(p.grad, traffic)
        if stage == 1:
            for piece in pieces:
                piece.reduce_gradient()
        optimizer.step()
        optimizer.zero_grad()
        if stage in (1, 2):
            for piece in pieces:
                piece.gather()
        sent = traffic.bytes
    states = sum(size_of(s) for state in optimizer.state.values() for s in state.values() if s.dim())
    shards = sum(size_of(piece.shard) for piece in pieces)
    rest = sum(piece.whole.untyped_storage().nbytes() for piece in pieces)  # 两步之间
    held = {
        "parameters": rest if stage < 3 else shards,
        "gradients": watch.gradients if stage < 2 else shards,
        "states": states,
    }
    for piece in pieces if stage == 3 else ():
        piece.gather()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    whole = {"gradients": watch.gradients, "parameters": watch.parameters}  # 整份的，最多时
    return {"weights": weights, "held": held, "most": whole, "sent": sent}


def reduce_while_backward(pieces: list[Piece], watch: Watch) -> None:
    """ZeRO-2：反向走到哪个参数，就马上加起来分掉，整份的梯度从来不凑在一起。"""
    for piece in pieces:

        def reduce(_parameter: Tensor, piece: Piece = piece) -> None:
            watch.look()
            piece.reduce_gradient()

        piece.whole.register_post_accumulate_grad_hook(reduce)


def gather_when_needed(model: SmallGPT, pieces: list[Piece], watch: Watch) -> None:
    """ZeRO-3：一个单元（嵌入、一层、输出层）前向以前凑齐，用完清空；反向以前再凑齐，梯度加完又清空。"""
    of = {piece.whole: piece for piece in pieces}
    reduce_while_backward(pieces, watch)
    for unit in (model.tokens, model.positions, *model.blocks, model.norm, model.head):
        mine = [of[p] for p in unit.parameters()]
        waiting: set[Piece] = set()

        def fill(*_, mine=mine) -> None:
            for piece in mine:
                piece.gather()
            watch.look()

        def clear(*_, mine=mine) -> None:
            for piece in mine:
                piece.free()

        def again(_gradient: Tensor, mine=mine, waiting=waiting, fill=fill) -> None:
            fill()
            waiting.update(mine)

        def after_forward(_unit, _inputs, output: Tensor, clear=clear, again=again) -> None:
            clear()
            output.register_hook(again)  # 反向走到这个单元的输出，才轮到它

        unit.register_forward_pre_hook(fill)
        unit.register_forward_hook(after_forward)
        for piece in mine:  # 挂在 reduce_while_backward 的后面：单元里最后一个梯度加完，清空

            def done(_parameter: Tensor, piece: Piece = piece, waiting=waiting, clear=clear) -> None:
                waiting.discard(piece)
                if not waiting:
                    clear()

            piece.whole.register_post_accumulate_grad_hook(done)
        clear()


def worker(rank: int, n: int, settings: ZeroSettings) -> dict:
    found = {}
    for stage in STAGES:
        found[str(stage)] = train(make_model(settings.sizes(), settings.seed), stage, settings)
    return found


# ---------------------------------------------------------------- 3. torch 自己的


def torch_worker(rank: int, n: int, settings: ZeroSettings) -> dict:
    """同样五步：DDP + ZeroRedundancyOptimizer（ZeRO-1），fully_shard（ZeRO-3，FSDP2）。"""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(make_model(settings.sizes(), settings.seed))
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=RATE)
    torch_steps(model, optimizer, settings)
    one = {name: p.detach().clone() for name, p in model.module.named_parameters()}
    model = make_model(settings.sizes(), settings.seed)
    mesh = init_device_mesh("cpu", (n,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    torch_steps(model, torch.optim.AdamW(model.parameters(), RATE, foreach=False), settings)
    three = {name: p.full_tensor().detach() for name, p in model.named_parameters()}
    return {"ZeroRedundancyOptimizer": one, "fully_shard": three}


def torch_steps(model: nn.Module, optimizer, settings: ZeroSettings) -> None:
    """它们都把梯度求平均，不是加起来：损失先乘上进程数。"""
    n, rank = dist.get_world_size(), dist.get_rank()
    for step in range(STEPS):
        rows = make_batch(settings.rows, settings.length, VOCAB, settings.seed + step)
        loss = loss_sum(model, rows.tensor_split(n)[rank]) * n / (settings.rows * settings.length)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


# ---------------------------------------------------------------- 4. 比较


def formulas(stage: int, n: int, sizes: list[int], item: int = 8) -> dict[str, float]:
    """一个进程放的、一步发的字节数。sizes 是各参数几个数，每个补到 n 的倍数再切。"""
    whole = item * sum(sizes)
    share = item * sum((size + n - 1) // n for size in sizes)
    sent = (2 if stage < 3 else 3) * (n - 1) * share  # all-reduce 也是加一遍、传一遍
    return {
        "parameters": share if stage == 3 else whole,
        "gradients": share if stage >= 2 else whole,
        "states": 2 * (share if stage >= 1 else whole),
        "sent": sent if stage else 2 * (n - 1) / n * whole,
    }


def learn(stage: Stage) -> dict:
    settings = stage.settings
    n = settings.num_processes
    wanted = one_process(settings.sizes(), settings.rows, settings.length, settings.seed)["weights"]
    parts = run_ranks(worker, n, settings, port=settings.port)
    metrics: dict = {
        "num_processes": n,
        "parameters": sum(w.numel() for w in wanted.values()),
        "bytes_per_rank": {},
    }
    titles = "与一个进程差 参数 梯度 动量 合计（字节） 公式 一步发（字节） 公式 整份的梯度最多"
    table = [["", *titles.split()]]
    for level, title in STAGES.items():
        runs = [part[str(level)] for part in parts]
        formula = formulas(level, n, [w.numel() for w in wanted.values()])
        held = runs[0]["held"]
        its = {
            "max_difference": max(max_difference(run["weights"], wanted) for run in runs),
            "held": held,
            "bytes": sum(held.values()),
            "bytes_formula": sum(formula[part] for part in PARTS),
            "sent": sum(run["sent"] for run in runs) / n,
            "sent_formula": formula["sent"],
            "most_gradients": runs[0]["most"]["gradients"],
            "most_parameters": runs[0]["most"]["parameters"],
        }
        metrics[f"stage{level}"] = its
        metrics["bytes_per_rank"][str(level)] = its["bytes"]
        table.append(
            [title.split("|")[0], f"{its['max_difference']:.1e}", *(f"{held[part]:,d}" for part in PARTS), f"{its['bytes']:,d}",
             f"{its['bytes_formula']:,.0f}", f"{its['sent']:,.0f}", f"{its['sent_formula']:,.0f}", f"{its['most_gradients']:,d}"]
        )  # fmt: skip
    metrics["max_difference"] = max(metrics[f"stage{level}"]["max_difference"] for level in STAGES)
    print(f"\n{n} 个进程，{metrics['parameters']:,d} 个参数，float64")
    print_table(table)
    theirs = run_ranks(torch_worker, n, settings, port=settings.port)[0]
    metrics["torch"] = {name: max_difference(weights, wanted) for name, weights in theirs.items()}
    for name, difference in metrics["torch"].items():
        print(f"  torch 的 {name} 与一个进程差 {difference:.1e}")
    print()
    return stage.save(metrics, {}, partial(draw, metrics=metrics))


def draw(folder: Path, metrics: dict) -> None:
    series = {
        label: {title: metrics[f"stage{level}"]["held"][part] / 1000 for level, title in STAGES.items()}
        for part, label in PARTS.items()
    }
    n = metrics["num_processes"]
    bar_chart(
        folder / "zero.svg", series, f"{n} 个进程，一个进程放多少|Held by one of {n} processes",
        "", "千字节|KB", digits=0,
    )  # fmt: skip


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(ZeroSettings, PRESETS, argv)
    return run_lesson("zero", HOME, settings, learn)


if __name__ == "__main__":
    run_main(main)
