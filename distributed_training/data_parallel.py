"""数据并行：人人一份模型，各算各的数据，梯度加起来。桶、边算边传、梯度累加，与人人都容易错的那个分母。

学到什么：一个参数一个参数地传太碎，攒成桶再传；反向还在往前走，后面的层的梯度已经在路上了；梯度累加时，前几个小批不必传；
几份数据长短不同的时候，"各自求平均，再平均"不等于一起求平均：短的那一份里的每个 token 分到的更多，这个错不会报错。

运行：
    python data_parallel.py                     # 四个进程，半分钟左右
    python data_parallel.py --bucket_kb 1 --output_dir outputs/small_buckets
    python data_parallel.py --preset full       # 同样的比较，模型大些

预期输出（实测见本文件夹的 README.md）：几步之后的权重与一个进程的差不到 1e-12（float64）；错的分母差得多；
每个桶的时间画在时间线上：传与算叠在一起。

参考：Li et al. 2020（PyTorch Distributed，桶与重叠）；transformers 34191（梯度累加的分母）。
"""

from nlp_common.base.cli import run_main

import time
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from nlp_common.base.arguments import COUNT, POSITIVE, Limits, option
from nlp_common.base.console import print_table
from nlp_common.base.errors import UserError
from nlp_common.lm.losses import IGNORE
from nlp_common.train.lesson import run_lesson
from nlp_common.train.settings import LessonSettings, parse_settings
from nlp_common.train.stage import Stage
from ranks import run_ranks
from small_gpt import Sizes, SmallGPT, make_batch, make_model, max_difference
from time_line import time_line

HOME = Path(__file__).resolve().parent
PRESETS = {
    "tiny": {"width": 64, "layers": 4, "rows": 32, "length": 32, "bucket_kb": 200.0},
    "full": {"width": 512, "layers": 8, "rows": 64, "length": 256, "bucket_kb": 25_000.0},
}
VOCAB, HEADS = 96, 4
STEPS, RATE = 4, 1e-2
SLOW = 0.01  # 秒：画时间线时，一层的反向、一个桶的传，都当作这么久


@dataclass
class DataSettings(LessonSettings):
    NOT_IN_FINGERPRINT = LessonSettings.NOT_IN_FINGERPRINT | {"port"}

    num_processes: int = option("几个进程", 4, Limits(at_least=2, at_most=16))
    port: int = option("各进程在哪个端口碰头；0 是找一个空的", 0, Limits(at_least=0, at_most=65535))
    bucket_kb: float | None = option("一个桶攒到多少 KB 就传；DDP 默认是 25 MB", limits=POSITIVE)
    gradient_accumulation_steps: int = option("几个小批更新一次", 2, COUNT)
    width: int | None = option("模型多宽", limits=COUNT)
    layers: int | None = option("几层", limits=COUNT)
    rows: int | None = option("一步几行，全体进程、全部小批的", limits=COUNT)
    length: int | None = option("一行最多几个 token", limits=COUNT)

    def check(self) -> None:
        least = self.num_processes * self.gradient_accumulation_steps
        if self.rows < least:
            raise UserError(
                f"--rows {self.rows} 行不够分：{self.num_processes} 个进程、各 {self.gradient_accumulation_steps} 个小批，至少要 {least} 行。"
            )
        if self.width % HEADS:
            raise UserError(f"--width 要是 {HEADS} 的倍数，给的是 {self.width}。")
        if self.length < 2:
            raise UserError(f"--length 要不小于 2，给的是 {self.length}。")

    def sizes(self) -> Sizes:
        return Sizes(VOCAB, self.width, HEADS, self.layers, 2 * self.width, self.length)


# ---------------------------------------------------------------- 1. 桶：反向里边算边传


@dataclass
class Bucket:
    """几个参数的梯度，攒齐了一起传。"""

    parameters: list[nn.Parameter]
    waiting: int = 0
    flat: Tensor | None = None
    work: dist.Work | None = None
    span: list[float] = field(default_factory=list)  # 什么时候开始传、传完


def make_buckets(model: nn.Module, limit: float) -> list[Bucket]:
    """从后往前装：反向先算完后面的层。一个桶最多 limit 字节，大过它的参数自己一桶。"""
    buckets: list[Bucket] = [Bucket([])]
    size = 0.0
    for parameter in reversed(list(model.parameters())):
        bytes_ = parameter.numel() * parameter.element_size()
        if buckets[-1].parameters and size + bytes_ > limit:
            buckets.append(Bucket([]))
            size = 0.0
        buckets[-1].parameters.append(parameter)
        size += bytes_
    return buckets


class DataParallel:
    """DDP 的三十行：每个参数挂一个钩子，一桶攒齐就开始 all-reduce，不等它；更新以前才一起等。

    sync 是 False 的时候（梯度累加的前几个小批）只累加，不传。
    """

    def __init__(self, model: nn.Module, limit: float):
        for parameter in model.parameters():
            dist.broadcast(parameter.data, 0)  # 起点要一样
        self.buckets, self.sync, self.sent = make_buckets(model, limit), True, 0
        for bucket in self.buckets:
            bucket.waiting = len(bucket.parameters)
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(partial(self.ready, bucket))

    def ready(self, bucket: Bucket, _parameter: Tensor) -> None:
        if not self.sync:
            return
        bucket.waiting -= 1
        if bucket.waiting == 0:
            bucket.flat = torch.cat([p.grad.flatten() for p in bucket.parameters])
            bucket.span = [time.monotonic()]
            bucket.work = dist.all_reduce(bucket.flat, async_op=True)
            self.sent += bucket.flat.numel() * bucket.flat.element_size()

    def wait(self) -> None:
        """各桶传完，梯度放回去：加起来，不平均，损失已经除过全体的 token 数。"""
        for bucket in self.buckets:
            bucket.work.wait()
            bucket.span.append(time.monotonic())
            sizes = [p.numel() for p in bucket.parameters]
            for parameter, flat in zip(bucket.parameters, bucket.flat.split(sizes), strict=True):
                parameter.grad = flat.view_as(parameter)
            bucket.waiting, bucket.flat, bucket.work = len(bucket.parameters), None, None


# ---------------------------------------------------------------- 2. 训练：分母是全体的 token 数


def uneven_rows(n: int, length: int, vocab: int, seed: int) -> tuple[Tensor, Tensor]:
    """长短不一的 n 行：(输入, 标签) 各 (n, length)，行尾补的标签是 IGNORE。越往后的行越短。"""
    rows = make_batch(n, length, vocab, seed)
    inputs, labels = rows[:, :-1], rows[:, 1:].clone()
    for i in range(n):
        labels[i, max(1, length - i * (length - 1) // n) :] = IGNORE
    return inputs, labels


def token_loss(model: nn.Module, inputs: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """(每个 token 的损失加起来, 几个 token)。"""
    logits = model(inputs)
    total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")
    return total, int((labels != IGNORE).sum())


def train(rank: int, n: int, model: SmallGPT, settings: DataSettings, how: str) -> dict:
    """how：tokens，除以全体进程、全部小批的 token 数（对的）；means，各小批各自求平均，再平均（人人都这样写过）。"""
    parallel = DataParallel(model, settings.bucket_kb * 1024)
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    pieces = settings.gradient_accumulation_steps
    for step in range(STEPS):
        inputs, labels = uneven_rows(settings.rows, settings.length, VOCAB, settings.seed + step)
        mine = [x.tensor_split(n)[rank].tensor_split(pieces) for x in (inputs, labels)]
        n_tokens = torch.tensor(float(sum((part != IGNORE).sum() for part in mine[1])))
        dist.all_reduce(n_tokens)  # 先数清楚，再算：每一步多传一个数
        parallel.sent = 0
        for i, (x, y) in enumerate(zip(*mine, strict=True)):
            parallel.sync = i == pieces - 1  # 前几个小批只累加
            total, count = token_loss(model, x, y)
            loss = total / n_tokens if how == "tokens" else total / count / pieces / n
            loss.backward()
        parallel.wait()
        optimizer.step()
        optimizer.zero_grad()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return {"weights": weights, "buckets": len(parallel.buckets), "sent": parallel.sent}


def torch_ddp(rank: int, n: int, model: SmallGPT, settings: DataSettings) -> dict:
    """torch 的 DistributedDataParallel，同样的分母；它求平均，所以先乘上进程数。"""
    ddp = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    for step in range(STEPS):
        inputs, labels = uneven_rows(settings.rows, settings.length, VOCAB, settings.seed + step)
        n_tokens = int((labels != IGNORE).sum())
        total, _ = token_loss(ddp, inputs.tensor_split(n)[rank], labels.tensor_split(n)[rank])
        (total * n / n_tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"weights": {name: p.detach() for name, p in model.named_parameters()}}


def worker(rank: int, n: int, settings: DataSettings) -> dict:
    def model() -> SmallGPT:
        return make_model(settings.sizes(), settings.seed + rank)  # 起点各不相同：DataParallel 先广播 0 号的

    found = {how: train(rank, n, model(), settings, how) for how in ("tokens", "means")}
    return found | {
        "ddp": torch_ddp(rank, n, model(), settings),
        "line": time_one_step(rank, n, model(), settings),
    }


# ---------------------------------------------------------------- 3. 时间线：传与算叠在一起


def time_one_step(rank: int, n: int, model: SmallGPT, settings: DataSettings) -> dict:
    """一次反向：每一层的反向多睡一会儿（几个进程挤在几个核上，不睡就看不清），桶照样攒齐就传。"""
    parallel = DataParallel(model, settings.bucket_kb * 1024)
    done: list[float] = []

    def slow(_module, _inputs, output: Tensor) -> None:
        def sleep(_gradient: Tensor) -> None:
            done.append(time.monotonic())
            time.sleep(SLOW)

        output.register_hook(sleep)

    for unit in (model.tokens, *model.blocks, model.head):
        unit.register_forward_hook(slow)
    inputs, labels = uneven_rows(settings.rows, settings.length, VOCAB, settings.seed)
    total, count = token_loss(model, inputs, labels)
    dist.barrier()
    begin = time.monotonic()
    (total / count).backward()
    end = time.monotonic()
    starts = [bucket.span[0] - begin for bucket in parallel.buckets]
    parallel.wait()
    marks = [each - begin for each in done] + [end - begin]
    units = [[a, b - a] for a, b in pairwise(marks)]
    return {
        "units": units,
        "starts": starts,
        "ends": [b.span[1] - begin for b in parallel.buckets],
        "backward": end - begin,
    }


# ---------------------------------------------------------------- 4. 比较


def one_process(settings: DataSettings) -> dict[str, Tensor]:
    model = make_model(settings.sizes(), settings.seed)
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    for step in range(STEPS):
        total, count = token_loss(
            model, *uneven_rows(settings.rows, settings.length, VOCAB, settings.seed + step)
        )
        (total / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in model.named_parameters()}


def learn(stage: Stage) -> dict:
    settings = stage.settings
    n = settings.num_processes
    wanted = one_process(settings)
    parts = run_ranks(worker, n, settings, port=settings.port)
    differences = {
        how: max(max_difference(part[how]["weights"], wanted) for part in parts)
        for how in ("tokens", "means", "ddp")
    }
    line = parts[0]["line"]
    last = line["units"][-1][0]  # 反向走到最后一个单元（嵌入）的时候：装着它的那一桶，只能等它
    early = sum(start < last for start in line["starts"])
    metrics: dict = {
        "num_processes": n,
        "max_difference": differences["tokens"],
        "wrong_difference": differences["means"],
        "torch_difference": differences["ddp"],
        "buckets": parts[0]["tokens"]["buckets"],
        "gradient_bytes": parts[0]["tokens"]["sent"],
        "parameter_bytes": sum(w.numel() * w.element_size() for w in wanted.values()),
        "overlapped": early / len(line["starts"]),
    }
    names = {
        "tokens": "除以全体的 token 数",
        "means": "各小批求平均，再平均（错的）",
        "ddp": "torch 的 DDP，同样的分母",
    }
    print(f"\n{n} 个进程，各 {settings.gradient_accumulation_steps} 个小批，{metrics['buckets']} 个桶")
    print_table([["", "与一个进程差"], *([title, f"{differences[how]:.1e}"] for how, title in names.items())])
    print(f"  一步传 {metrics['gradient_bytes']:,d} 字节的梯度，正好是参数的大小：累加几个小批也只传一遍")
    print(f"  反向走到最后一个单元（嵌入）以前，已经开始传的桶：{early} / {len(line['starts'])}\n")
    return stage.save(metrics, {}, partial(draw, line=line))


def draw(folder: Path, line: dict) -> None:
    units = [(start, length, "backward", "") for start, length in line["units"]]
    buckets = [
        (a, b - a, "send", str(i)) for i, (a, b) in enumerate(zip(line["starts"], line["ends"], strict=True))
    ]
    rows = {"反向|backward": units}
    rows |= {f"桶 {span[3]}|bucket {span[3]}": [span] for span in buckets}
    kinds = {"backward": "一层的反向|backward of a layer", "send": "传，到用的时候为止|sending until needed"}
    time_line(
        folder / "data_parallel.svg", rows, kinds, "边算边传|Overlap of backward and all-reduce", "秒|seconds"
    )


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(DataSettings, PRESETS, argv)
    return run_lesson("data_parallel", HOME, settings, learn)


if __name__ == "__main__":
    run_main(main)
