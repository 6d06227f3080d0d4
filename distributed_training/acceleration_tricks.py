"""训练的加速：一次只开一个开关，同一个模型、同样的文档，快了几倍，内存少了几成，损失一不一样。

学到什么：分块的注意力怎样不存 T×T 的表（手写，与整张的相差 1e-15）；重算激活用时间换内存；短的文档怎样少算填充；
以及：同一个开关，换一台机器可能反而慢。比快慢要交替着量，不然量的是别的进程。

运行：
    python acceleration_tricks.py                        # 约一分半
    python acceleration_tricks.py --tricks tiled,sdpa,packing --output_dir outputs/three
    python acceleration_tricks.py --dataset 我的文章.txt --output_dir outputs/mine    # 你的文章，一行一篇

预期输出（实测见本文件夹的 README.md）：SDPA、长短相近的一批快四分之一上下，重算激活省内存、慢一半；打包在这里反而慢。

参考：Dao et al. 2022（FlashAttention）；Milakov & Gimelshein 2018（在线 softmax）；Chen et al. 2016（重算激活）；
Krell et al. 2021（打包）。三种注意力在 tiled_attention.py，量内存在 peak_bytes.py。
"""

from nlp_common.base.cli import run_main

import math
import os
import random
import shutil
import time
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nlp_common.base.arguments import COUNT, Limits, option
from nlp_common.base.console import print_table
from nlp_common.base.errors import UserError
from nlp_common.data.rows import read_rows
from nlp_common.draw.plots import bar_chart, line_chart
from nlp_common.lm.losses import IGNORE
from nlp_common.lm.packing import collate_blocks, pack_documents
from nlp_common.tiny import world
from nlp_common.train.lesson import run_lesson, run_part
from nlp_common.train.settings import LessonSettings, parse_settings
from nlp_common.train.stage import Stage
from peak_bytes import peak_bytes
from small_gpt import Sizes, SmallGPT, make_model
from tiled_attention import math_attention, sdpa_attention, tiled_attention

HOME = Path(__file__).resolve().parent
PRESETS: dict[str, dict] = {
    "tiny": {"n_documents": 16, "context": 384, "width": 96, "layers": 2, "rounds": 8},
    "full": {"n_documents": 64, "context": 1024, "width": 512, "layers": 6, "rounds": 8},
}
ATTENTIONS = {"math": math_attention, "tiled": tiled_attention, "sdpa": sdpa_attention}
STORIES = (1, 1, 1, 2, 2, 3)  # 一篇文档几个故事：短的多，长的少
WARM_STEPS = 3  # 热身，也比这几步的损失
LENGTHS = (128, 256, 512, 1024, 2048)  # 只看注意力时的 T
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Switch:
    """一种训练的办法；默认的各项就是基线。"""

    title: str = "基线|baseline"
    attention: str = "math"
    recompute: bool = False  # 反向时重算激活
    optimizer: str = "loop"  # loop：一个参数一个参数地更新；fused：一个算子全更新
    batching: str = "random"  # random：随便凑成一批；buckets：长短相近的一批；packing：装进等长的块
    bf16: bool = False
    compiled: bool = False
    threads: int = 1


BASE = Switch()
TRICKS = {
    "tiled": replace(BASE, title="分块的注意力，手写|tiled attention", attention="tiled"),
    "sdpa": replace(BASE, title="SDPA", attention="sdpa"),
    "recompute": replace(BASE, title="重算激活|checkpointing", recompute=True),
    "fused": replace(BASE, title="fused AdamW", optimizer="fused"),
    "buckets": replace(BASE, title="长短相近的一批|length buckets", batching="buckets"),
    "packing": replace(BASE, title="打包|packing", batching="packing"),
    "bf16": replace(BASE, title="bf16", bf16=True),
    "compile": replace(BASE, title="torch.compile", compiled=True),
    "threads": replace(BASE, title=f"{CORES} 个线程|{CORES} threads", threads=CORES),
}


@dataclass
class TrickSettings(LessonSettings):
    tricks: str = option(f"试哪几个，逗号隔开：{'、'.join(TRICKS)}", ",".join(TRICKS))
    dataset: str | None = option("自己的文章：txt（一行一篇）、jsonl、csv（text 一列）；默认是小世界的故事")
    n_documents: int | None = option("一步学几篇", limits=COUNT)
    context: int | None = option("一篇最多几个字，也是打包的块长", limits=Limits(at_least=16))
    width: int | None = option("模型多宽", limits=COUNT)
    layers: int | None = option("几层", limits=COUNT)
    rounds: int | None = option("与基线交替着各量几步", limits=Limits(at_least=4))
    micro_batch_size: int = option("几篇拼成一批；一步里的几批累积成一次更新", 4)

    def check(self) -> None:
        for name in self.tricks.split(","):
            if name not in TRICKS:
                raise UserError(
                    f"--tricks 不认识 {name or '空的一项'}，可以是 {'、'.join(TRICKS)}，逗号隔开。"
                )
        if self.width % 4:
            raise UserError(f"--width 要是 4 的倍数（4 个头），给的是 {self.width}。")


# ---------------------------------------------------------------- 1. 一步训练，开关在里面


class Trainer:
    """一个模型、一个优化器、排好的几批；step() 学一步（几批的梯度累积成一次更新），返回平均的损失。"""

    def __init__(self, switch: Switch, documents: list[list[int]], sizes: Sizes, settings: TrickSettings):
        self.switch, self.model = switch, make_model(sizes, settings.seed, torch.float32)
        fused = switch.optimizer == "fused"
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-3, fused=fused, foreach=False)
        self.batches = batches_of(documents, switch.batching, settings)
        self.n_labels = sum(int((batch["labels"] != IGNORE).sum()) for batch in self.batches)
        self.run_block = torch.compile(run_block, dynamic=True) if switch.compiled else run_block

    def step(self) -> float:
        torch.set_num_threads(self.switch.threads)
        total = 0.0
        for batch in self.batches:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.switch.bf16):
                logits = self.forward(batch)  # (B, T, V)
            labels = batch["labels"][:, 1:].flatten()
            loss = F.cross_entropy(
                logits[:, :-1].float().flatten(0, 1), labels, ignore_index=IGNORE, reduction="sum"
            )
            (loss / self.n_labels).backward()
            total += loss.item()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total / self.n_labels

    def forward(self, batch: dict) -> Tensor:
        model: SmallGPT = self.model
        x = model.tokens(batch["input_ids"]) + model.positions(batch["position_ids"])  # (B, T, C)
        attend = ATTENTIONS[self.switch.attention]
        if "mask" in batch:  # 打包的：只看本文档
            attend = partial(attend, mask=batch["mask"])
        for block in model.blocks:
            if self.switch.recompute:  # 只留这一层的输入，反向走到这里再算一遍
                x = checkpoint(self.run_block, block, x, attend, use_reentrant=False)
            else:
                x = self.run_block(block, x, attend)
        return model.head(model.norm(x))


def run_block(block, x: Tensor, attend) -> Tensor:
    """一层：与 small_gpt.Block 相同，只是注意力由 attend 算。"""
    layer = block.attention
    b, t, _ = x.shape
    y = block.norm1(x)
    q, k, v = (
        each(y).view(b, t, layer.heads, -1).transpose(1, 2) for each in (layer.q, layer.k, layer.v)
    )  # (B, nh, T, hs)
    y = attend(q, k, v).transpose(1, 2).reshape(b, t, -1)
    x = x + layer.o(y)
    return x + block.mlp(block.norm2(x))


def batches_of(documents: list[list[int]], batching: str, settings: TrickSettings) -> list[dict[str, Tensor]]:
    """同样的几篇文档，三种排法；每个字都学到一次，所以损失应当一样。"""
    size = settings.micro_batch_size
    if batching == "packing":
        blocks = pack_documents(documents, settings.context)
        # 一批的格子数不超过不打包的：比的是填充，不是谁的批大
        size = max(1, size * max(map(len, documents)) // settings.context)
        groups = [blocks[at : at + size] for at in range(0, len(blocks), size)]
        batches = [collate_blocks(group, settings.context, 0) for group in groups]
        for batch, group in zip(batches, groups, strict=True):
            batch["mask"] = own_document(group, settings.context)
        return batches
    order = sorted(documents, key=len) if batching == "buckets" else documents
    groups = [order[at : at + size] for at in range(0, len(order), size)]
    return [collate_blocks([[row] for row in group], max(map(len, group)), 0) for group in groups]


def own_document(blocks: list[list[list[int]]], length: int) -> Tensor:
    """(B, 1, T, T)：在前面（或就是自己），而且是同一篇。填充的自成一篇。"""
    owner = torch.full((len(blocks), length), -1)
    for row, block in enumerate(blocks):
        at = 0
        for number, document in enumerate(block):
            owner[row, at : at + len(document)] = number
            at += len(document)
    same = owner[:, :, None] == owner[:, None, :]
    return (same & torch.ones(length, length, dtype=torch.bool).tril())[:, None]


# ---------------------------------------------------------------- 2. 量：与基线交替


def compare(part: Stage, name: str, documents: list[list[int]], sizes: Sizes) -> dict:
    """开了一个开关，与基线比：一步的时间之比（交替着量）、内存的最高点、几步的损失差多少。"""
    settings = part.settings
    base, trick = (Trainer(each, documents, sizes, settings) for each in (BASE, TRICKS[name]))
    losses = [[base.step() for _ in range(WARM_STEPS)], []]
    started = time.perf_counter()
    losses[1].append(trick.step())
    first_seconds = time.perf_counter() - started  # torch.compile 在第一步里编译
    losses[1] += [trick.step() for _ in range(WARM_STEPS - 1)]
    difference = max(abs(a - b) for a, b in zip(*losses, strict=True))
    peaks = [peak_bytes(trainer.step) for trainer in (base, trick)]
    seconds: list[list[float]] = [[], []]
    for turn in range(settings.rounds):
        for which in (0, 1) if turn % 2 == 0 else (1, 0):  # 谁先谁后轮流
            started = time.perf_counter()
            (base, trick)[which].step()
            seconds[which].append(time.perf_counter() - started)
    ratios = sorted(b / a for a, b in zip(*seconds, strict=True))
    edge = max(0, len(ratios) // 4 - 1)
    torch.set_num_threads(1)
    return {
        "time_ratio": median(ratios),
        "time_low": ratios[edge],
        "time_high": ratios[-1 - edge],
        "base_seconds": median(seconds[0]),
        "step_seconds": median(seconds[1]),
        "base_peak_bytes": peaks[0],
        "peak_bytes": peaks[1],
        "peak_ratio": peaks[1] / peaks[0],
        "loss_difference": difference,
        "first_seconds": first_seconds,
        "tokens": sum(batch["input_ids"].numel() for batch in trick.batches),
    }


def verdict(found: dict) -> str:
    """区间整个在 1 的一边才说快或慢。"""
    if found["time_high"] < 1:
        return "快"
    return "慢" if found["time_low"] > 1 else "分不出"


def attention_by_length(seed: int) -> dict[str, dict[str, dict]]:
    """只看注意力，一句、四个头：T 加倍，内存与时间怎样长。"""
    found: dict[str, dict[str, dict]] = {}
    for length in LENGTHS:
        generator = torch.Generator().manual_seed(seed)
        q, k, v = (torch.randn(1, 4, length, 24, generator=generator).requires_grad_() for _ in range(3))
        for name, attend in ATTENTIONS.items():
            run = partial(forward_and_back, attend, q, k, v)
            run()
            seconds = []
            for _ in range(3):
                started = time.perf_counter()
                run()
                seconds.append(time.perf_counter() - started)
            found.setdefault(name, {})[f"T{length}"] = {"seconds": min(seconds), "bytes": peak_bytes(run)}
    return found


def forward_and_back(attend, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    out = attend(q, k, v)
    return (out, *torch.autograd.grad(out.square().sum(), (q, k, v)))


def tiled_difference(seed: int) -> dict[str, float]:
    """float64：分块的、SDPA 的输出与三个梯度，和照定义算的最多差多少；长度特意不是块的整数倍。"""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(2, 4, 333, 24, generator=generator, dtype=torch.float64).requires_grad_()
        for _ in range(3)
    )
    wanted = forward_and_back(math_attention, q, k, v)
    found = {}
    for name in ("tiled", "sdpa"):
        got = forward_and_back(ATTENTIONS[name], q, k, v)
        found[f"{name}_difference"] = max(
            (a - b).abs().max().item() for a, b in zip(got, wanted, strict=True)
        )
    return found


# ---------------------------------------------------------------- 3. 全课


@cache
def own_texts(path: str) -> list[str]:
    texts = [str(row.get("text") or "") for row in read_rows(path).rows]
    texts = [text for text in texts if len(text) > 1]
    if not texts:
        raise UserError(f"{path} 里没有文章：txt 一行一篇，jsonl、csv 要有 text 一列。")
    return texts


def documents_of(settings: TrickSettings) -> tuple[list[list[int]], int]:
    """长短不一的文档（一到三个故事，短的多），一个字一个 token：(编号, 字表多大)。"""
    rng = random.Random(settings.seed)
    if settings.dataset:
        texts = own_texts(settings.dataset)[: settings.n_documents]
    else:
        stories = iter(world.documents(max(STORIES) * settings.n_documents, seed=settings.seed))
        texts = [
            "".join(next(stories)["text"] for _ in range(rng.choice(STORIES)))
            for _ in range(settings.n_documents)
        ]
    number = {letter: index for index, letter in enumerate(sorted(set("".join(texts))))}
    return [[number[letter] for letter in text[: settings.context]] for text in texts], len(number)


def learn(stage: Stage) -> dict:
    settings = stage.settings
    torch.set_num_threads(1)
    documents, vocab = documents_of(settings)
    sizes = Sizes(vocab, settings.width, 4, settings.layers, 4 * settings.width, settings.context)
    found = {}
    for name in settings.tricks.split(","):
        if why := cannot_try(name):
            print(f"{TRICKS[name].title.split('|')[0]}：{why}，跳过。")
            continue
        found[name] = run_part(stage, name, lambda part, name=name: compare(part, name, documents, sizes))
        print(f"  {TRICKS[name].title.split('|')[0]}：时间 × {found[name]['time_ratio']:.2f}")
    real = sum(map(len, documents))
    padded = sum(batch["input_ids"].numel() for batch in batches_of(documents, "random", settings))
    metrics = {
        **tiled_difference(settings.seed),
        "tricks": found,
        "attention": attention_by_length(settings.seed),
        "real_tokens": real,
        "padding_share": 1 - real / padded,
    }
    show(metrics)
    data = {"train": {"name": settings.dataset or "tiny_world", "rows": len(documents)}}
    return stage.save(metrics, data, write=partial(draw, metrics=metrics))


def cannot_try(name: str) -> str | None:
    if name == "threads" and CORES == 1:
        return "只有一个核"
    if name == "compile" and not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")):
        return "没有 C++ 编译器（装 g++ 或 clang）"
    return None


def show(metrics: dict) -> None:
    rows = [["开了一个开关", "一步的时间", "（区间）", "内存最高点", "损失差", "这里"]]
    for name, each in metrics["tricks"].items():
        rows.append(
            [
                TRICKS[name].title.split("|")[0],
                f"× {each['time_ratio']:.2f}",
                f"{each['time_low']:.2f}–{each['time_high']:.2f}",
                f"× {each['peak_ratio']:.2f}",
                f"{each['loss_difference']:.1e}",
                verdict(each),
            ]
        )
    print_table(rows)
    print(f"\n分块的与照定义算的（float64，输出与梯度）最多差 {metrics['tiled_difference']:.1e}。")


def draw(folder: Path, metrics: dict) -> None:
    names = {name: TRICKS[name].title for name in metrics["tricks"]}
    series = {
        "一步的时间|step time": {names[n]: each["time_ratio"] for n, each in metrics["tricks"].items()},
        "内存最高点|peak bytes": {names[n]: each["peak_ratio"] for n, each in metrics["tricks"].items()},
    }
    bar_chart(folder / "tricks.svg", series, "与基线之比，1 以下是好|Ratio to the baseline", "", "倍|ratio")
    labels = {"math": "整张|math", "tiled": "分块，手写|tiled", "sdpa": "SDPA"}
    lines = {
        label: (
            [math.log2(length) for length in LENGTHS],
            [math.log2(metrics["attention"][name][f"T{length}"]["bytes"] / 2**20) for length in LENGTHS],
        )
        for name, label in labels.items()
    }
    title = "注意力前向加反向，内存的最高点|Peak memory of attention"
    line_chart(folder / "attention_bytes.svg", lines, title, "log₂ T", "log₂ MB")


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(TrickSettings, PRESETS, argv)
    return run_lesson("acceleration_tricks", HOME, settings, learn)


if __name__ == "__main__":
    run_main(main)
