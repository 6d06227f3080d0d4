"""流水线并行：层切成几段，一段一个进程，一批拆成几个小批，像流水线一样往下传。

学到什么：GPipe 与 1F1B 走的次序不同，梯度一模一样；两种的空闲（气泡）都是 (p−1)/(m+p−1)，小批越多越小；
1F1B 早早开始反向，所以手里最多只留 p 个小批的激活，GPipe 要留全部 m 个。

运行：
    python pipeline_parallel.py                     # 四段、八个小批，约半分钟
    python pipeline_parallel.py --micro_batches 16 --output_dir outputs/m16
    python pipeline_parallel.py --preset full       # 同样的比较，模型大些

预期输出（实测见本文件夹的 README.md）：两种次序的梯度与一个进程的差不到 1e-12（float64）；气泡 3/11。

参考：Huang et al. 2019（GPipe）；Narayanan et al. 2021（1F1B，Megatron-LM 第 2.2 节）。
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

from nlp_common.base.arguments import COUNT, Limits, option
from nlp_common.base.console import print_table
from nlp_common.base.errors import UserError
from nlp_common.draw.plots import bar_chart
from nlp_common.train.lesson import run_lesson
from nlp_common.train.settings import LessonSettings, parse_settings
from nlp_common.train.stage import Stage
from ranks import run_ranks
from saved_bytes import count_saved
from small_gpt import Sizes, SmallGPT, loss_sum, make_batch, make_model
from time_line import time_line

HOME = Path(__file__).resolve().parent
PRESETS = {
    "tiny": {"width": 32, "layers": 4, "rows": 16, "length": 16},
    "full": {"width": 256, "layers": 8, "rows": 16, "length": 128},
}
VOCAB, HEADS = 96, 4
TITLES = {"gpipe": "GPipe", "1f1b": "1F1B"}
FORWARD, BACKWARD = "F", "B"
COST = {FORWARD: 1, BACKWARD: 2}  # 反向约是前向的两倍：权重的梯度、输入的梯度各一遍
UNIT = 0.03  # 秒：量气泡时，一份前向当作这么久


@dataclass
class PipelineSettings(LessonSettings):
    NOT_IN_FINGERPRINT = LessonSettings.NOT_IN_FINGERPRINT | {"port"}

    num_processes: int = option("几段，一段一个进程", 4, Limits(at_least=2, at_most=16))
    port: int = option("各进程在哪个端口碰头；0 是找一个空的", 0, Limits(at_least=0, at_most=65535))
    micro_batches: int = option("一批拆成几个小批", 8, COUNT)
    width: int | None = option("模型多宽", limits=COUNT)
    layers: int | None = option("几层", limits=COUNT)
    rows: int | None = option("一批几行", limits=COUNT)
    length: int | None = option("一行几个 token", limits=COUNT)

    def check(self) -> None:
        if self.layers % self.num_processes:
            raise UserError(
                f"--layers {self.layers} 分不匀给 {self.num_processes} 段：改成它的倍数，或换 --num_processes。"
            )
        if self.rows % self.micro_batches:
            raise UserError(
                f"--rows {self.rows} 分不匀成 {self.micro_batches} 个小批：改成它的倍数，或换 --micro_batches。"
            )
        if self.width % HEADS:
            raise UserError(f"--width 要是 {HEADS} 的倍数，给的是 {self.width}。")

    def sizes(self) -> Sizes:
        return Sizes(VOCAB, self.width, HEADS, self.layers, 2 * self.width, self.length)


# ---------------------------------------------------------------- 1. 两种次序


def gpipe(stage: int, p: int, m: int) -> list[tuple[str, int]]:
    """先把 m 个小批都往前走完，再倒着往回走。"""
    return [(FORWARD, i) for i in range(m)] + [(BACKWARD, i) for i in reversed(range(m))]


def one_f_one_b(stage: int, p: int, m: int) -> list[tuple[str, int]]:
    """先走几个前向（越靠前的段越多），然后一前一后地交替，最后把剩下的反向做完。"""
    warm = min(m, p - 1 - stage)
    steps = [(FORWARD, i) for i in range(warm)]
    for i in range(warm, m):
        steps += [(FORWARD, i), (BACKWARD, i - warm)]
    return steps + [(BACKWARD, i) for i in range(m - warm, m)]


SCHEDULES = {"gpipe": gpipe, "1f1b": one_f_one_b}


def simulate(schedule: str, p: int, m: int) -> list[list[tuple[str, int, float, float]]]:
    """每段每一份活什么时候开始、多久，[[(F 或 B, 小批, 开始, 多久)]]：前一段算完前向才能前向，后一段算完反向才能反向。"""
    plans = [SCHEDULES[schedule](stage, p, m) for stage in range(p)]
    ends: dict[tuple[int, str, int], float] = {}
    done: list[list[tuple[str, int, float, float]]] = [[] for _ in range(p)]
    free, places = [0.0] * p, [0] * p
    while any(places[s] < len(plans[s]) for s in range(p)):
        for s in range(p):
            while places[s] < len(plans[s]):
                kind, i = plans[s][places[s]]
                before = (s - 1, FORWARD, i) if kind == FORWARD else (s + 1, BACKWARD, i)
                if 0 <= before[0] < p and before not in ends:
                    break  # 要的还没有来：先看别的段
                start = max(free[s], ends.get(before, 0.0))
                free[s] = ends[s, kind, i] = start + COST[kind]
                done[s].append((kind, i, start, COST[kind]))
                places[s] += 1
    return done


def bubble_of(spans: list[list[tuple[str, int, float, float]]]) -> float:
    """闲着的时间占几成：1 − 干活的时间 /（段数 × 从头到尾）。"""
    every = [span for stage in spans for span in stage]
    whole = max(start + length for _, _, start, length in every) - min(start for _, _, start, _ in every)
    return 1 - sum(length for *_, length in every) / (len(spans) * whole)


# ---------------------------------------------------------------- 2. 一段：它的层，它的活


class Part(nn.Module):
    """SmallGPT 的第 stage 段：几层；第一段另有嵌入，最后一段另有输出层。参数的名字与整个的相同。"""

    def __init__(self, whole: SmallGPT, stage: int, p: int):
        super().__init__()
        per = len(whole.blocks) // p
        self.names = range(stage * per, (stage + 1) * per)
        self.blocks = nn.ModuleDict({str(i): whole.blocks[i] for i in self.names})
        self.first, self.last = stage == 0, stage == p - 1
        if self.first:
            self.tokens, self.positions = whole.tokens, whole.positions
        if self.last:
            self.norm, self.head = whole.norm, whole.head

    def forward(self, x: Tensor) -> Tensor:
        if self.first:  # x 是 token (B, T)
            x = self.tokens(x) + self.positions(torch.arange(x.shape[1]))
        for block in self.blocks.values():
            x = block(x)  # (B, T, C)
        return self.head(self.norm(x)) if self.last else x


def run_schedule(part: Part, schedule: str, rows: Tensor, m: int, line: list[int], n_tokens: int) -> dict:
    """照次序做完一批：收、算、发；返回梯度、损失，与手里最多留过几个小批、几个字节的激活。

    line：各段是哪几号进程；n_tokens：损失除以几个 token（整批的，不是小批的：各小批的梯度加起来才等于整批的）。
    发出去不等（isend）：1F1B 里两边会同时要发，等着就谁也动不了。
    """
    stage, p = line.index(dist.get_rank()), len(line)
    micro = rows.chunk(m)  # m 份 (B/m, T+1)
    shape = (len(micro[0]), rows.shape[1] - 1, part.blocks[str(part.names[0])].norm1.weight.numel())
    inputs: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}
    bytes_of: dict[int, int] = {}
    sending, losses, most, most_bytes = [], [], 0, 0
    for kind, i in SCHEDULES[schedule](stage, p, m):
        if kind == FORWARD:
            inputs[i] = micro[i][:, :-1] if part.first else receive(shape, line[stage - 1]).requires_grad_()
            with count_saved(part) as saved:
                outputs[i] = part(inputs[i])
                if part.last:
                    loss = F.cross_entropy(
                        outputs[i].flatten(0, 1), micro[i][:, 1:].flatten(), reduction="sum"
                    )
                    outputs[i] = loss / n_tokens
            bytes_of[i] = saved.bytes
            most, most_bytes = max(most, len(bytes_of)), max(most_bytes, sum(bytes_of.values()))
            if part.last:
                losses.append(outputs[i].item())
            else:
                sending.append(send(outputs[i].detach(), line[stage + 1]))
        else:
            grad = None if part.last else receive(shape, line[stage + 1])
            outputs.pop(i).backward(grad)  # 参数的梯度累加在 .grad 里
            del bytes_of[i]
            x = inputs.pop(i)
            if not part.first:
                sending.append(send(x.grad, line[stage - 1]))
    for work, _ in sending:
        work.wait()
    grads = {name: p.grad for name, p in part.named_parameters()}
    sent = sum(x.numel() * x.element_size() for _, x in sending)
    return {"grads": grads, "loss": sum(losses), "most": most, "saved": most_bytes, "sent": sent}


def send(x: Tensor, to: int) -> tuple:
    x = x.contiguous()
    return dist.isend(x, to), x  # 发完以前，x 不能没了


def receive(shape: tuple[int, ...], sender: int) -> Tensor:
    x = torch.empty(shape, dtype=torch.float64)
    dist.recv(x, sender)
    return x


def worker(rank: int, p: int, sizes: Sizes, rows: int, length: int, m: int, seed: int) -> dict:
    found = {}
    for schedule in SCHEDULES:
        part = Part(make_model(sizes, seed), rank, p)
        batch = make_batch(rows, length, sizes.vocab, seed)
        found[schedule] = run_schedule(part, schedule, batch, m, list(range(p)), rows * length)
    return found


def timing_worker(rank: int, p: int, schedule: str, m: int) -> list:
    """真的传、真的等，算的部分换成睡：几个进程挤在几个核上，算起来有快有慢，睡不会。"""
    sending, spans = [], []
    token = torch.zeros(1, dtype=torch.float64)
    dist.barrier()
    begin = time.monotonic()
    for kind, i in SCHEDULES[schedule](rank, p, m):
        sender, to = (rank - 1, rank + 1) if kind == FORWARD else (rank + 1, rank - 1)
        if 0 <= sender < p:
            receive((1,), sender)
        start = time.monotonic() - begin
        time.sleep(COST[kind] * UNIT)
        spans.append((kind, i, start, time.monotonic() - begin - start))
        if 0 <= to < p:
            sending.append(send(token, to))
    for work, _ in sending:
        work.wait()
    return spans


# ---------------------------------------------------------------- 3. 比较


def bytes_sent(rows: int, length: int, width: int, p: int) -> int:
    """一步里各段一共发几个字节（float64）：p − 1 个接缝，前向传激活、反向传它的梯度，各 (B, T, C)，与拆成几个小批无关。"""
    return 2 * (p - 1) * rows * length * width * 8


def learn(stage: Stage) -> dict:
    settings = stage.settings
    p, m, sizes = settings.num_processes, settings.micro_batches, settings.sizes()
    model = make_model(sizes, settings.seed)
    rows = make_batch(settings.rows, settings.length, VOCAB, settings.seed)
    loss = loss_sum(model, rows) / rows[:, 1:].numel()
    loss.backward()
    wanted = {name: parameter.grad for name, parameter in model.named_parameters()}
    shape = (sizes, settings.rows, settings.length, m, settings.seed)
    parts = run_ranks(worker, p, *shape, port=settings.port)
    formula = (p - 1) / (m + p - 1)
    metrics: dict = {"num_processes": p, "micro_batches": m, "bubble_formula": formula}
    metrics["bytes_formula"] = bytes_sent(settings.rows, settings.length, settings.width, p)
    table = [
        [
            "",
            "梯度差",
            "气泡，照次序算",
            "气泡，量到的",
            "最多留几个小批",
            "激活（字节，最多的一段）",
            "一共发（字节）",
        ]
    ]
    measured = {}
    for name in SCHEDULES:
        grads = {key: grad for part in parts for key, grad in part[name]["grads"].items()}
        assert grads.keys() == wanted.keys()
        measured[name] = run_ranks(timing_worker, p, name, m, port=settings.port)
        its = {
            "max_difference": max((grads[key] - wanted[key]).abs().max().item() for key in wanted),
            "loss_difference": abs(parts[-1][name]["loss"] - loss.item()),
            "bubble": bubble_of(simulate(name, p, m)),
            "bubble_measured": bubble_of(measured[name]),
            "most_micro_batches": max(part[name]["most"] for part in parts),
            "activation_bytes": max(part[name]["saved"] for part in parts),
            "bytes_sent": sum(part[name]["sent"] for part in parts),
        }
        metrics[name] = its
        table.append(
            [TITLES[name], f"{its['max_difference']:.1e}", f"{its['bubble']:.4f}", f"{its['bubble_measured']:.3f}",
             str(its["most_micro_batches"]), f"{its['activation_bytes']:,d}",
             f"{its['bytes_sent']:,d}"]
        )  # fmt: skip
    metrics["max_difference"] = max(metrics[name]["max_difference"] for name in SCHEDULES)
    metrics["bubbles"] = {
        str(k): {name: bubble_of(simulate(name, p, k)) for name in SCHEDULES} for k in (1, 2, 4, 8, 16, 32)
    }
    print()
    print_table(table)
    print(f"  公式：气泡 (p − 1)/(m + p − 1) = {formula:.4f}，一共发 {metrics['bytes_formula']:,d} 字节\n")
    return stage.save(metrics, {}, partial(draw, p=p, m=m, measured=measured, metrics=metrics))


def draw(folder: Path, p: int, m: int, measured: dict, metrics: dict) -> None:
    for name, title in TITLES.items():
        rows = {
            f"第 {s} 段|stage {s}": [(start, length, kind, str(i)) for kind, i, start, length in spans]
            for s, spans in enumerate(measured[name])
        }
        kinds = {FORWARD: "前向|forward", BACKWARD: "反向|backward"}
        time_line(
            folder / f"pipeline_{name}.svg", rows, kinds, f"{title}：{p} 段 {m} 个小批|{title}", "秒|seconds"
        )
    series = {
        title: {
            "最多留几个小批|micro-batches held": metrics[name]["most_micro_batches"],
        }
        for name, title in TITLES.items()
    }
    bar_chart(folder / "pipeline_held.svg", series, "手里最多留几个小批的激活|Activations held", "", "")


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(PipelineSettings, PRESETS, argv)
    return run_lesson("pipeline_parallel", HOME, settings, learn)


if __name__ == "__main__":
    run_main(main)
