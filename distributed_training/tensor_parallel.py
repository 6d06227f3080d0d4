"""张量并行：一个矩阵切给几个进程，每层只在两处汇合；词表也切，序列也切。

学到什么：先按列切、再按行切，中间一个字节也不用传；注意力按头切；词表切开，交叉熵不必把 logits 凑齐；
序列并行把汇合（all-reduce）拆成两半（reduce-scatter 与 all-gather），传的一样多，残差与 LayerNorm 的激活也省下来。

运行：
    python tensor_parallel.py                     # 四个进程，十几秒
    python tensor_parallel.py --num_processes 2
    python tensor_parallel.py --preset full       # 同样的比较，模型大些

预期输出（实测见本文件夹的 README.md）：五步 AdamW 之后的权重与一个进程的差不到 1e-12（float64），
与 torch 的 parallelize_module 也一样；每层传的字节数等于公式。

参考：Shoeybi et al. 2019（Megatron-LM，图 3、4 的 f 与 g）；Korthikanti et al. 2022（序列并行）。
"""

from nlp_common.base.cli import run_main

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from nlp_common.base.arguments import COUNT, Limits, option
from nlp_common.base.console import print_table
from nlp_common.base.errors import UserError
from nlp_common.draw.plots import bar_chart
from nlp_common.train.lesson import run_lesson
from nlp_common.train.settings import LessonSettings, parse_settings
from nlp_common.train.stage import Stage
from ranks import run_ranks
from saved_bytes import count_saved
from small_gpt import Sizes, SmallGPT, make_batch, make_model, max_difference
from tensor_references import RATE, STEPS, one_process, torch_worker

HOME = Path(__file__).resolve().parent
PRESETS = {
    "tiny": {"width": 32, "heads": 4, "layers": 4, "vocab": 96, "rows": 8, "length": 16},
    "full": {"width": 256, "heads": 8, "layers": 8, "vocab": 4096, "rows": 8, "length": 128},
}
WAYS = {"tensor": "张量并行|tensor", "sequence": "加上序列并行|tensor + sequence"}


@dataclass
class TensorSettings(LessonSettings):
    NOT_IN_FINGERPRINT = LessonSettings.NOT_IN_FINGERPRINT | {"port"}

    num_processes: int = option("几个进程", 4, Limits(at_least=2, at_most=16))
    port: int = option("各进程在哪个端口碰头；0 是找一个空的", 0, Limits(at_least=0, at_most=65535))
    width: int | None = option("模型多宽", limits=COUNT)
    heads: int | None = option("几个注意力头", limits=COUNT)
    layers: int | None = option("几层", limits=COUNT)
    vocab: int | None = option("词表几个", limits=COUNT)
    rows: int | None = option("一批几行", limits=COUNT)
    length: int | None = option("一行几个 token", limits=COUNT)

    def check(self) -> None:
        n = self.num_processes
        cut = {"heads": self.heads, "vocab": self.vocab, "length": self.length}
        if bad := [f"--{name} {size}" for name, size in cut.items() if size % n]:
            raise UserError(f"{'、'.join(bad)} 分不匀给 {n} 个进程：改成 {n} 的倍数，或换 --num_processes。")
        if self.width % self.heads:
            raise UserError(f"--width {self.width} 要是 --heads {self.heads} 的倍数。")

    def sizes(self) -> Sizes:
        return Sizes(self.vocab, self.width, self.heads, self.layers, 2 * self.width, self.length)


# ---------------------------------------------------------------- 1. 汇合的两处：f 与 g

GRID = {"group": None}  # 切给哪一组进程：None 是全体；parallel_2d.py 换成格子的一行
# 这个进程一共发了几个字节：环上的 all-reduce 发 2(n−1)/n 倍，拆开的两半各 (n−1)/n 倍
traffic = {"bytes": 0.0}


def n_pieces() -> int:
    return dist.get_world_size(GRID["group"])


def my_place() -> int:
    return dist.get_rank(GRID["group"])


def count(x: Tensor, times: int) -> None:
    n = n_pieces()
    traffic["bytes"] += times * (n - 1) / n * x.numel() * x.element_size()


def all_reduce(x: Tensor) -> Tensor:
    x = x.contiguous().clone()
    dist.all_reduce(x, group=GRID["group"])
    count(x, 2)
    return x


def all_gather(x: Tensor) -> Tensor:
    """各进程的 (B, T/n, C) 接成 (B, T, C)。"""
    parts = [torch.empty_like(x) for _ in range(n_pieces())]
    dist.all_gather(parts, x.contiguous(), group=GRID["group"])
    whole = torch.cat(parts, dim=1)
    count(whole, 1)
    return whole


def reduce_scatter(x: Tensor) -> Tensor:
    """各进程的 (B, T, C) 加起来，每个进程留自己那一段 (B, T/n, C)。"""
    n, rank = n_pieces(), my_place()
    parts = [part.contiguous() for part in x.chunk(n, dim=1)]
    mine = torch.empty_like(parts[rank])
    dist.reduce_scatter(mine, parts, group=GRID["group"])
    count(x, 1)
    return mine


class Copy(torch.autograd.Function):
    """f：进并行区。前向什么也不做（人人都有 x）；反向把各进程的梯度加起来。"""

    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, grad):
        return all_reduce(grad)


class Sum(torch.autograd.Function):
    """g：出并行区。前向把各进程的一份加起来；反向什么也不做（加法的梯度，人人一样）。"""

    @staticmethod
    def forward(ctx, x):
        return all_reduce(x)

    @staticmethod
    def backward(ctx, grad):
        return grad


class Gather(torch.autograd.Function):
    """序列并行的 f：前向把各段接起来，反向加起来再分段。"""

    @staticmethod
    def forward(ctx, x):
        return all_gather(x)

    @staticmethod
    def backward(ctx, grad):
        return reduce_scatter(grad)


class Scatter(torch.autograd.Function):
    """序列并行的 g：前向加起来再分段，反向把各段接起来。"""

    @staticmethod
    def forward(ctx, x):
        return reduce_scatter(x)

    @staticmethod
    def backward(ctx, grad):
        return all_gather(grad)


# ---------------------------------------------------------------- 2. 切开的层


def piece(x: Tensor, dim: int) -> nn.Parameter:
    """完整的权重里，这个进程管的那一块。"""
    return nn.Parameter(x.detach().chunk(n_pieces(), dim)[my_place()].clone())


class ParallelAttention(nn.Module):
    """q、k、v 按列切（每个进程几个头），o 按行切：头与头之间本来就不相干，中间不用传。"""

    def __init__(self, whole, enter, leave):
        super().__init__()
        self.enter, self.leave = enter, leave
        self.heads = whole.heads // n_pieces()
        self.q, self.k, self.v = (piece(layer.weight, 0) for layer in (whole.q, whole.k, whole.v))  # (C/n, C)
        self.o = piece(whole.o.weight, 1)  # (C, C/n)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C)；序列并行时 (B, T/n, C)
        x = self.enter(x)  # (B, T, C)
        b, t, _ = x.shape
        q, k, v = ((x @ w.T).view(b, t, self.heads, -1).transpose(1, 2) for w in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, nh/n, T, hs)
        return self.leave(y.transpose(1, 2).reshape(b, t, -1) @ self.o.T)


class ParallelMLP(nn.Module):
    """up 按列切，down 按行切：GELU 一个数一个数地算，切在哪里都一样。down 的偏置加起来之后才加，只加一遍。"""

    def __init__(self, whole, enter, leave):
        super().__init__()
        self.enter, self.leave = enter, leave
        self.up, self.up_bias = piece(whole.up.weight, 0), piece(whole.up.bias, 0)  # (I/n, C)、(I/n,)
        self.down = piece(whole.down.weight, 1)  # (C, I/n)
        self.down_bias = nn.Parameter(whole.down.bias.detach().clone())  # (C,)：人人都有

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.enter(x) @ self.up.T + self.up_bias)  # (B, T, I/n)
        return self.leave(hidden @ self.down.T) + self.down_bias


class ParallelGPT(nn.Module):
    """whole（SmallGPT）切成这个进程的一份；参数的名字与它相同。"""

    def __init__(self, whole: SmallGPT, sequence: bool):
        super().__init__()
        self.sequence = sequence
        self.enter, self.leave = (Gather.apply, Scatter.apply) if sequence else (Copy.apply, Sum.apply)
        self.tokens, self.positions = piece(whole.tokens.weight, 0), whole.positions
        self.blocks, self.norm = whole.blocks, whole.norm
        for block in self.blocks:
            block.attention = ParallelAttention(block.attention, self.enter, self.leave)
            block.mlp = ParallelMLP(block.mlp, self.enter, self.leave)
        self.head = piece(whole.head.weight, 0)  # (V/n, C)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) → 这个进程那一段词表的 logits (B, T, V/n)。"""
        positions = torch.arange(ids.shape[1])
        x = self.leave(self.embed(ids))  # 序列并行：这里起只有 (B, T/n, C)
        if self.sequence:
            positions = positions.chunk(n_pieces())[my_place()]
        x = x + self.positions(positions)
        for block in self.blocks:
            x = block(x)
        return self.enter(self.norm(x)) @ self.head.T

    def embed(self, ids: Tensor) -> Tensor:
        """词表里不归这个进程管的 token，先给 0：加起来就是对的。"""
        local = ids - my_place() * len(self.tokens)
        mine = (local >= 0) & (local < len(self.tokens))  # (B, T)
        return F.embedding(local.where(mine, 0), self.tokens) * mine[..., None]


def split_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """logits (B, T, V/n) 是自己那一段词表的；交叉熵加起来。每个位置只传三个数，不传 V 个。

    −log softmax(y) = log Σ e^{z − m} − (z_y − m)，m 是整个词表里最大的。
    """
    size, rank = logits.shape[-1], my_place()
    top = logits.detach().amax(-1)  # (B, T)
    dist.all_reduce(top, dist.ReduceOp.MAX, group=GRID["group"])
    count(top, 2)
    logits = logits - top[..., None]
    total = Sum.apply(logits.exp().sum(-1))
    local = targets - rank * size
    mine = (local >= 0) & (local < size)
    wanted = logits.gather(-1, local.where(mine, 0)[..., None])[..., 0] * mine
    return (total.log() - Sum.apply(wanted)).sum()


# ---------------------------------------------------------------- 3. 每个进程做的：训练五步


def worker(rank: int, n: int, sizes: Sizes, rows: int, length: int, seed: int, sequence: bool) -> dict:
    """从同一个模型切开，走 STEPS 步；返回自己那一份的权重，与传了、存了几个字节。"""
    model = ParallelGPT(make_model(sizes, seed), sequence)
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    losses, saved = [], 0
    for step in range(STEPS):
        batch = make_batch(rows, length, sizes.vocab, seed + step)  # 张量并行：各进程的数据相同
        traffic["bytes"] = 0.0
        with count_saved(model) as kept:
            loss = split_cross_entropy(model(batch[:, :-1]), batch[:, 1:]) / (rows * length)
        loss.backward()
        if sequence:
            sum_partial_gradients(model)
        sent, saved = traffic["bytes"], kept.bytes
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    weights = {name: p.detach() for name, p in model.named_parameters()}
    held = sum(p.numel() * p.element_size() for p in weights.values())
    return {"weights": weights, "losses": losses, "sent": sent, "saved": saved, "held": held}


def sum_partial_gradients(model: ParallelGPT) -> None:
    """序列并行时，人人都有的参数（LayerNorm、位置、down 的偏置）只见过自己那一段序列：梯度要加起来。漏了不会报错。"""
    for name, parameter in model.named_parameters():
        if is_replicated(name):
            parameter.grad = all_reduce(parameter.grad)


def is_replicated(name: str) -> bool:
    return "norm" in name or "positions" in name or name.endswith("down_bias")


# ---------------------------------------------------------------- 4. 比较


def put_together(parts: list[dict]) -> dict[str, Tensor]:
    """各进程的一份接成完整的权重，名字换成 SmallGPT 的。"""
    whole = {}
    for name in parts[0]:
        pieces = [part[name] for part in parts]
        last = name.rsplit(".", 1)[-1]
        if is_replicated(name):
            whole[name.replace("down_bias", "down.bias")] = pieces[0]
        elif last in ("o", "down"):  # 按行切的，接在第二维
            whole[f"{name}.weight"] = torch.cat(pieces, dim=1)
        elif last == "up_bias":
            whole[name.replace("up_bias", "up.bias")] = torch.cat(pieces)
        else:
            whole[f"{name}.weight"] = torch.cat(pieces)
    return whole


def bytes_sent(settings: TensorSettings, sequence: bool) -> float:
    """一步里一个进程该发几个字节（float64）。

    每层前向、反向各两次，嵌入前向一次、输出层反向一次，传 (B, T, C)；交叉熵三次，传 (B, T)。
    序列并行把每次拆成两半，一样多；另外，人人都有的参数（LayerNorm、位置、down 的偏置）的梯度要加起来。
    """
    n, width, layers = settings.num_processes, settings.width, settings.layers
    tokens = settings.rows * settings.length
    numbers = (4 * layers + 2) * tokens * width + 3 * tokens
    if sequence:
        numbers += (2 * layers + 1) * 2 * width + settings.length * width + layers * width
    return 2 * (n - 1) / n * numbers * 8


def learn(stage: Stage) -> dict:
    settings = stage.settings
    n, sizes = settings.num_processes, settings.sizes()
    shape = (sizes, settings.rows, settings.length, settings.seed)
    alone = one_process(*shape)
    metrics: dict = {"num_processes": n, "parameter_bytes": alone["held"], "activation_bytes": alone["saved"]}
    rows = [["", "与一个进程差", "参数（字节）", "激活（字节）", "一步发（字节）", "公式"]]
    rows.append(["一个进程", "", f"{alone['held']:,d}", f"{alone['saved']:,d}", "", ""])
    for way, title in WAYS.items():
        parts = run_ranks(worker, n, *shape, way == "sequence", port=settings.port)
        difference = max_difference(put_together([part["weights"] for part in parts]), alone["weights"])
        its = {
            "max_difference": difference,
            "loss_difference": max(
                abs(a - b) for a, b in zip(parts[0]["losses"], alone["losses"], strict=True)
            ),
            "parameter_bytes": parts[0]["held"],
            "activation_bytes": parts[0]["saved"],
            "bytes_sent": parts[0]["sent"],
            "bytes_formula": bytes_sent(settings, way == "sequence"),
        }
        metrics[way] = its
        rows.append(
            [title.split("|")[0], f"{difference:.1e}", f"{its['parameter_bytes']:,d}", f"{its['activation_bytes']:,d}",
             f"{its['bytes_sent']:,.0f}", f"{its['bytes_formula']:,.0f}"]
        )  # fmt: skip
    parts = run_ranks(torch_worker, n, *shape, port=settings.port)
    metrics["torch_difference"] = max_difference(parts[0]["weights"], alone["weights"])
    metrics["max_difference"] = max(metrics[way]["max_difference"] for way in WAYS)
    print()
    print_table(rows)
    print(f"  torch 的 parallelize_module 与一个进程差 {metrics['torch_difference']:.1e}\n")
    return stage.save(metrics, {}, partial(draw, metrics=metrics))


def draw(folder: Path, metrics: dict) -> None:
    rows = {"一个进程|one process": metrics} | {title: metrics[way] for way, title in WAYS.items()}
    series = {
        title: {
            "参数|parameters": its["parameter_bytes"] / 1000,
            "激活|activations": its["activation_bytes"] / 1000,
        }
        for title, its in rows.items()
    }
    bar_chart(folder / "tensor_parallel.svg", series, "一个进程放多少|Held by one process", "", "千字节|KB")


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(TensorSettings, PRESETS, argv)
    return run_lesson("tensor_parallel", HOME, settings, learn)


if __name__ == "__main__":
    run_main(main)
