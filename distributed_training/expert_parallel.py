"""专家并行：专家分给几个进程，token 用 all-to-all 送到专家那里，算完再送回来。

学到什么：一个 token 只去两个专家，所以参数多了几倍，算的不多；容量定死了格子的大小，通信才是一样长的一块一块；
路由的起点偏向两个专家，五百步之后两种都匀了不少；有均衡损失的，装不下而丢掉的 token 少一半。

运行：
    python expert_parallel.py                     # 四个进程，再训练三个小模型，一两分钟
    python expert_parallel.py --capacity_factor 1.0 --output_dir outputs/tight
    python expert_parallel.py --preset full       # 同样的比较，模型大些、步数多些

预期输出（实测见本文件夹的 README.md）：输出与每一个梯度等于逐个 token 算的（float64，1e-12）；
算的一样多（激活的参数相等）的稠密模型与 MoE 比留出损失；有均衡损失的，各专家收到的差不多。

参考：Shazeer et al. 2017；Lepikhin et al. 2020（GShard，all-to-all）；Fedus et al. 2021（Switch，容量与均衡损失）。
一层 MoE 在 moe.py。
"""

from nlp_common.base.cli import run_main

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from moe import TOP, MoE, capacity_of, combine, dense_loop, dispatch, route
from nlp_common.base.arguments import COUNT, Limits, option
from nlp_common.base.console import print_table
from nlp_common.base.errors import UserError
from nlp_common.draw.plots import bar_chart, line_chart
from nlp_common.tiny import world
from nlp_common.tiny.qwen import build_tokenizer
from nlp_common.train.lesson import run_lesson, run_part
from nlp_common.train.settings import LessonSettings, parse_settings
from nlp_common.train.stage import Stage
from ranks import run_ranks
from small_gpt import Sizes, SmallGPT, make_model

HOME = Path(__file__).resolve().parent
PRESETS = {
    "tiny": {"width": 64, "inner": 128, "layers": 2, "max_steps": 500, "n_documents": 4000, "batch_size": 16},
    "full": {
        "width": 256,
        "inner": 1024,
        "layers": 6,
        "max_steps": 4000,
        "n_documents": 60000,
        "batch_size": 64,
    },
}
BLOCK = 96  # 一行几个 token
BALANCE = 0.01  # 均衡损失的系数（Fedus et al. 2021）
SKEW = 5.0  # 起点故意偏：头两个专家的路由放大几倍，看均衡损失救不救得回来
KINDS = {
    "dense": "稠密|dense",
    "moe": "MoE",
    "moe_unbalanced": "MoE，没有均衡损失|MoE, no balance loss",
}


@dataclass
class ExpertSettings(LessonSettings):
    NOT_IN_FINGERPRINT = LessonSettings.NOT_IN_FINGERPRINT | {"port"}

    num_processes: int = option("几个进程", 4, Limits(at_least=2, at_most=16))
    port: int = option("各进程在哪个端口碰头；0 是找一个空的", 0, Limits(at_least=0, at_most=65535))
    num_experts: int = option("几个专家", 8, Limits(at_least=2))
    capacity_factor: float = option("一个专家最多收平均的几倍", 1.25, Limits(above=0))
    width: int | None = option("模型多宽", limits=COUNT)
    inner: int | None = option("稠密的 MLP 中间多宽；一个专家是它的一半，两个专家加起来一样宽", limits=COUNT)
    layers: int | None = option("几层", limits=COUNT)
    tokens: int = option("比较的时候，一个进程几个 token", 24, COUNT)
    max_steps: int | None = option("训练几步", limits=COUNT)
    n_documents: int | None = option("几篇小世界的文档", limits=COUNT)
    batch_size: int | None = option("一批几行", limits=COUNT)

    def check(self) -> None:
        if self.num_experts % self.num_processes:
            raise UserError(
                f"--num_experts {self.num_experts} 分不匀给 {self.num_processes} 个进程：改成它的倍数，或换 --num_processes。"
            )
        if self.inner % 2 or self.width % 4:
            raise UserError(f"--inner 要是偶数，--width 要是 4 的倍数，给的是 {self.inner}、{self.width}。")


# ---------------------------------------------------------------- 1. 专家分给各进程


class AllToAll(torch.autograd.Function):
    """(n, …)：第 i 块送给 i 号进程，收到的第 i 块是 i 号送来的。反向是同样的一次，倒着送。"""

    @staticmethod
    def forward(ctx, x):
        x = x.contiguous()
        found = torch.empty_like(x)
        dist.all_to_all_single(found, x)
        return found

    @staticmethod
    def backward(ctx, grad):
        return AllToAll.apply(grad)


def parallel_moe(x: Tensor, router: Tensor, mine: nn.Module, factor: float) -> tuple[Tensor, Tensor, float]:
    """x (N, C) 是这个进程自己的 token，mine 是它管的 E/n 个专家 → (N, C)、均衡损失、发了几个字节。"""
    n, n_experts = dist.get_world_size(), len(router)
    routes = route(x, router, factor)
    capacity = capacity_of(len(x), n_experts, factor)
    boxes = dispatch(x, routes, n_experts, capacity)  # (E, K, C)，E 按进程排：前 E/n 个归 0 号
    there = AllToAll.apply(boxes.view(n, -1, capacity, x.shape[1]))  # (n 个来处, E/n, K, C)
    there = there.transpose(0, 1).flatten(1, 2)  # (E/n, n·K, C)：我的专家收到的，各进程的都有
    done = mine(there)
    back = done.unflatten(1, (n, capacity)).transpose(0, 1)  # (n, E/n, K, C)
    boxes = AllToAll.apply(back).flatten(0, 1)  # (E, K, C)
    sent = 2 * (n - 1) / n * boxes.numel() * boxes.element_size()  # 去一次，回一次；自己的那一块不用发
    return combine(boxes, routes), routes.balance, sent


def make_moe(width: int, inner: int, n_experts: int, factor: float, seed: int) -> MoE:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MoE(width, inner, n_experts, factor).double()


def make_tokens(n: int, width: int, seed: int) -> Tensor:
    return torch.randn(n, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loss_of(y: Tensor, balance: Tensor) -> Tensor:
    return (y**2).sum() + balance


def worker(
    rank: int, n: int, width: int, inner: int, n_experts: int, factor: float, tokens: int, seed: int
) -> dict:
    moe = make_moe(width, inner, n_experts, factor, seed)
    experts = moe.experts
    for name in ("up", "down"):  # 只留自己的 E/n 个
        setattr(experts, name, nn.Parameter(getattr(experts, name).detach().chunk(n)[rank].clone()))
    x = make_tokens(n * tokens, width, seed).chunk(n)[rank].requires_grad_()
    y, balance, sent = parallel_moe(x, moe.router, experts, factor)
    loss_of(y, balance).backward()
    dist.all_reduce(moe.router.grad)  # 路由人人都有一份，各见过自己的 token：梯度加起来；专家的不用
    grads = {"router": moe.router.grad, "up": experts.up.grad, "down": experts.down.grad, "x": x.grad}
    held = sum(p.numel() * p.element_size() for p in experts.parameters())
    return {"y": y.detach(), "grads": grads, "sent": sent, "held": held}


def compare(stage: Stage) -> dict:
    """n 个进程算的，与一个进程里逐个 token 算的，差多少。容量按各进程自己的 token 算，所以对照也一份一份地路由。"""
    settings = stage.settings
    n, factor = settings.num_processes, settings.capacity_factor
    shape = (settings.width, settings.inner // 2, settings.num_experts, factor)
    parts = run_ranks(worker, n, *shape, settings.tokens, settings.seed, port=settings.port)
    moe = make_moe(*shape, settings.seed)
    x = make_tokens(n * settings.tokens, settings.width, settings.seed).requires_grad_()
    wanted = []
    for share in x.chunk(n):
        wanted.append(dense_loop(share, moe))
        loss_of(wanted[-1], route(share, moe.router, factor).balance).backward(retain_graph=True)
    its = {"router": moe.router.grad, "up": moe.experts.up.grad, "down": moe.experts.down.grad, "x": x.grad}
    found = {name: torch.cat([part["grads"][name] for part in parts]) for name in ("up", "down", "x")}
    found["router"] = parts[0]["grads"]["router"]
    y = torch.cat([part["y"] for part in parts])
    capacity = capacity_of(settings.tokens, settings.num_experts, factor)
    return {
        "output_difference": (y - torch.cat(wanted)).abs().max().item(),
        "gradient_difference": max((found[name] - its[name]).abs().max().item() for name in its),
        "bytes_sent": parts[0]["sent"],
        "bytes_formula": 2 * (n - 1) / n * settings.num_experts * capacity * settings.width * 8,
        "expert_bytes": parts[0]["held"],
        "expert_bytes_alone": sum(p.numel() * p.element_size() for p in moe.experts.parameters()),
    }


# ---------------------------------------------------------------- 2. 训练：同样多的计算，稠密的与 MoE


def build(kind: str, settings, vocab: int) -> SmallGPT:
    """稠密的 MLP 中间 inner 宽；MoE 的一个专家是它的一半，一个 token 去两个：算的一样多。"""
    sizes = Sizes(vocab, settings.width, 4, settings.layers, settings.inner, BLOCK)
    model = make_model(sizes, settings.seed, torch.float32)
    if kind != "dense":
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            for block in model.blocks:
                block.mlp = MoE(
                    settings.width, settings.inner // TOP, settings.num_experts, settings.capacity_factor
                )
                block.mlp.router.data[:TOP] *= SKEW
    return model


def train(part: Stage, kind: str, model: SmallGPT, blocks: Tensor, heldout: Tensor) -> dict:
    """next-token 损失，MoE 另加均衡损失；量留出损失、各专家收到几成、丢了几成。"""
    settings = part.settings
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.0)
    steps = settings.max_steps
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(settings.seed)
    history, recent, started = [], [], time.process_time()
    for step in range(1, steps + 1):
        rows = blocks[torch.randint(len(blocks), (settings.batch_size,), generator=generator)]
        loss = next_token_loss(model, rows)
        recent.append(loss.item())
        if kind == "moe":
            loss = loss + BALANCE * sum(layer.routes.balance for layer in layers)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % max(1, steps // 20) == 0:
            history.append([step, sum(recent) / len(recent)])
            recent.clear()
    seconds = time.process_time() - started
    with torch.no_grad():
        losses, loads, dropped = [], [], []
        for rows in heldout.split(settings.batch_size):
            losses.append(next_token_loss(model, rows).item() * len(rows))
            loads.append([layer.routes.loads(settings.num_experts) for layer in layers])
            dropped += [layer.routes.dropped for layer in layers]
    found: dict = {
        "heldout_loss": sum(losses) / len(heldout),
        "parameters": sum(p.numel() for p in model.parameters()),
        "active_parameters": active_parameters(model, layers),
        "seconds": seconds,
        "history": history,
    }
    if layers:
        shares = torch.stack([torch.stack(each) for each in loads]).mean(0)  # (L, E)
        found |= {
            "loads": shares.tolist(),
            "busiest": (shares.max() * settings.num_experts).item(),
            "dropped": sum(dropped) / len(dropped),
        }
    return found


def next_token_loss(model: SmallGPT, rows: Tensor) -> Tensor:
    logits = model(rows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def active_parameters(model: SmallGPT, layers: list[MoE]) -> int:
    """一个 token 真用到的：每层 E 个专家里只有两个。"""
    idle = sum(
        p.numel() * (1 - TOP / len(layer.router)) for layer in layers for p in layer.experts.parameters()
    )
    return round(sum(p.numel() for p in model.parameters()) - idle)


def read_blocks(n: int, seed: int, heldout: bool) -> tuple[Tensor, int]:
    """小世界的文档接起来，切成 BLOCK + 1 个 token 一行；另给词表多大。"""
    tokenizer = build_tokenizer()
    texts = [row["text"] for row in world.documents(n, seed, heldout)]
    stream = [i for ids in tokenizer(texts)["input_ids"] for i in [*ids, tokenizer.eos_token_id]]
    rows = len(stream) // (BLOCK + 1)
    return torch.tensor(stream[: rows * (BLOCK + 1)]).view(rows, BLOCK + 1), len(tokenizer)


# ---------------------------------------------------------------- 3. 全课


def learn(stage: Stage) -> dict:
    settings = stage.settings
    metrics: dict = compare(stage)
    metrics["max_difference"] = max(metrics["output_difference"], metrics["gradient_difference"])
    show_compare(metrics)
    blocks, vocab = read_blocks(settings.n_documents, settings.seed, False)
    heldout, _ = read_blocks(200, 0, True)
    for kind in KINDS:
        print(f"{kind} …", flush=True)
        model = build(kind, settings, vocab)
        metrics[kind] = run_part(
            stage, kind, partial(train, kind=kind, model=model, blocks=blocks, heldout=heldout)
        )
    show_training(metrics)
    return stage.save(metrics, {"train": "tiny_world"}, partial(draw, metrics=metrics))


def show_compare(metrics: dict) -> None:
    print(
        f"\n输出差 {metrics['output_difference']:.1e}，梯度差 {metrics['gradient_difference']:.1e}（与逐个 token 算的比）"
    )
    print(f"一层前向，一个进程发 {metrics['bytes_sent']:,.0f} 字节，公式 {metrics['bytes_formula']:,.0f}")
    print(
        f"专家的权重，一个进程放 {metrics['expert_bytes']:,d} 字节，全部是 {metrics['expert_bytes_alone']:,d}\n"
    )


def show_training(metrics: dict) -> None:
    table = [["", "参数", "一个 token 用到的", "留出损失", "最忙的专家（平均的几倍）", "丢了"]]
    for kind, title in KINDS.items():
        its = metrics[kind]
        more = [f"{its['busiest']:.2f}", f"{its['dropped']:.1%}"] if "busiest" in its else ["", ""]
        table.append(
            [title.split("|")[0], f"{its['parameters']:,d}", f"{its['active_parameters']:,d}", f"{its['heldout_loss']:.4f}", *more]
        )  # fmt: skip
    print()
    print_table(table)
    print()


def draw(folder: Path, metrics: dict) -> None:
    curves = {
        title: (
            [step for step, _ in metrics[kind]["history"]],
            [loss for _, loss in metrics[kind]["history"]],
        )
        for kind, title in KINDS.items()
    }
    line_chart(folder / "moe_loss.svg", curves, "训练损失|Training loss", "步|step", "nats/token")
    series = {}
    for kind, title in KINDS.items():
        if "loads" in metrics[kind]:
            last = metrics[kind]["loads"][-1]
            series[title] = {f"专家 {e}|expert {e}": share for e, share in enumerate(last)}
    bar_chart(
        folder / "moe_loads.svg",
        series,
        "最后一层：各专家收到几成|Share of tokens by expert",
        "",
        "份额|share",
    )


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(ExpertSettings, PRESETS, argv)
    return run_lesson("expert_parallel", HOME, settings, learn)


if __name__ == "__main__":
    run_main(main)
