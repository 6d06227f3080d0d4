"""压缩的总账：剪枝、量化、蒸馏，和它们合起来，一张表、一张图：小多少，错多少，快多少。

学到什么：同样的字节，谁答对的多（Pareto 线）；只有形状变小的（蒸馏）才在平常的乘法里快；几样合起来是不是更好。

运行：
    python compression_lab.py                        # 二十几种，三个种子，两个核上四五分钟
    python compression_lab.py --seeds 1 --methods float32,gptq4,student,student_gptq4 --output_dir outputs/four
    python compression_lab.py --student outputs/tiny/distillation/student --output_dir outputs/mine   # 学生用已有的

预期输出（实测见本文件夹的 README.md）：4 位的 GPTQ 小六倍一题不错；比它还小的，是蒸馏的学生，再量化，又小一截。

三个种子换的是校准的对话、留出的题、学生的训练；SFT 模型是同一个。剪枝在 pruning.py，量化在 quantization.py，学生在 distillation.py。
"""

from nlp_common.base.cli import run_main

import copy
import math
import statistics
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from calibration import calibration_rows
from measuring import measure, model_bytes
from nlp_common.base.arguments import COUNT, option
from nlp_common.base.errors import UserError
from nlp_common.base.runs import load_run
from nlp_common.draw.figures import render
from nlp_common.lm.chatml import prompt_ids
from nlp_common.lm.generation import generate
from nlp_common.lm.loading import load_chat_lm
from nlp_common.tiny import world
from nlp_common.train.chain import chain_model, run_script
from nlp_common.train.lesson import run_lesson, run_part
from nlp_common.train.settings import LessonSettings, parse_settings
from nlp_common.train.stage import Stage
from packed_weights import packed_bytes
from pruning import prune
from quantization import quantize_model
from sparse_weights import bytes_of

HOME = Path(__file__).resolve().parent
FULL_MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
GROUP = 64
SPEED_TOKENS, SPEED_BATCH, SPEED_REPEATS = 16, 32, 3


@dataclass(frozen=True)
class Method:
    """从哪个模型开始，剪几成，再量化成几位；没有的是 None。"""

    title: str
    start: Literal["sft", "student"] = "sft"
    prune: tuple[str, float | str] | None = None
    quantize: tuple[str, int] | None = None
    bf16: bool = False


METHODS = {
    "float32": Method("float32"),
    "bf16": Method("bf16", bf16=True),
    **{
        f"{name}{bits}": Method(f"{name.upper()} {bits} 位|{name.upper()} {bits} bits", quantize=(name, bits))
        for bits in (8, 4, 3, 2)
        for name in ("rtn", "gptq", "awq")
    },
    "prune50": Method("剪五成|pruned 50%", prune=("sparsegpt", 0.5)),
    "prune24": Method("剪 2:4|pruned 2:4", prune=("sparsegpt", "2:4")),
    "prune50_gptq4": Method("剪五成，GPTQ 4 位|50% + GPTQ 4", prune=("sparsegpt", 0.5), quantize=("gptq", 4)),
    "prune24_gptq4": Method(
        "剪 2:4，GPTQ 4 位|2:4 + GPTQ 4", prune=("sparsegpt", "2:4"), quantize=("gptq", 4)
    ),
    "student": Method("学生|student", start="student"),
    "student_gptq8": Method("学生，GPTQ 8 位|student + GPTQ 8", start="student", quantize=("gptq", 8)),
    "student_gptq4": Method("学生，GPTQ 4 位|student + GPTQ 4", start="student", quantize=("gptq", 4)),
}
KINDS = {  # 图例：方法的名字以什么开头
    "student": "蒸馏|distilled",
    "prune": "剪枝|pruned",
    "rtn": "RTN",
    "gptq": "GPTQ",
    "awq": "AWQ",
    "": "没有压|as it was",
}
PRESETS = {
    "tiny": {"n_calibration": 128, "max_eval_samples": 512, "seeds": 3},
    "full": {"n_calibration": 128, "max_eval_samples": 512, "seeds": 1},
}


@dataclass
class LabSettings(LessonSettings):
    model: str | None = option("压哪个模型：文件夹或 hub 名；默认是 Qwen 链 tiny 预设的 SFT 模型")
    source: Literal["hf", "modelscope"] = option("hub 名从哪里下载", "hf")
    student: str | None = option("蒸馏好的学生：文件夹；没给就用 distillation.py 当场教，一个种子一个")
    methods: str = option(f"试哪几种，逗号隔开：{'、'.join(METHODS)}", ",".join(METHODS))
    seeds: int | None = option("几个种子：从 --seed 数起", limits=COUNT)
    n_calibration: int | None = option("校准用几段对话", limits=COUNT)
    max_eval_samples: int | None = option("用几道留出的题量")

    def check(self) -> None:
        for name in self.methods.split(","):
            if name not in METHODS:
                raise UserError(
                    f"--methods 不认识 {name or '空的一项'}，可以是 {'、'.join(METHODS)}，逗号隔开。"
                )
        if self.student and not Path(self.student).expanduser().is_dir():
            raise UserError(f"--student 没有这个文件夹：{self.student}。")


# ---------------------------------------------------------------- 1. 一种方法


def learn(stage: Stage, path: str) -> dict:
    settings = stage.settings
    tokenizer, model = load_chat_lm(path, stage.device)
    models = {"sft": model.eval()}
    found: dict[str, list[dict]] = {name: [] for name in settings.methods.split(",")}
    for seed in range(settings.seed, settings.seed + settings.seeds):
        questions = world.heldout_questions(settings.max_eval_samples, seed=seed)
        rows = calibration_rows(tokenizer, settings.n_calibration, seed)
        if any(METHODS[name].start == "student" for name in found):
            models["student"] = load_student(stage, seed, tokenizer, path)
        for name in found:
            method = METHODS[name]
            work = partial(
                one,
                method=method,
                model=models[method.start],
                tokenizer=tokenizer,
                rows=rows,
                questions=questions,
            )
            its = run_part(stage, f"{name}-{seed}", work)
            found[name].append(its)
            print(
                f"种子 {seed}  {name:<16}{its['bytes']:>10,d} 字节  答对 {its['qa_accuracy']:.3f}", flush=True
            )
    metrics = {"methods": {name: summary(its) for name, its in found.items()}}
    metrics["pareto"] = pareto(metrics["methods"])
    return stage.save(metrics, {"train": {"name": "tiny_world"}}, lambda folder: draw(folder, metrics))


def one(part: Stage, method: Method, model, tokenizer, rows: list[dict], questions: list[dict]) -> dict:
    """压，数字节，量。剪过的：只存留下的，加上一位一个的掩码；再量化，GPTQ 知道哪些剪掉了，它们还是 0。"""
    model = copy.deepcopy(model)
    masks = prune(model, tokenizer, rows, *method.prune) if method.prune else {}
    size = model_bytes(model)
    if method.quantize:
        name, bits = method.quantize
        done = quantize_model(model, tokenizer, rows, name, bits, GROUP, masks=masks or None)
        size = packed_bytes(model, done.packed)
        for layer, keep in masks.items():
            packed = done.packed[f"{layer}.weight"]
            size += math.ceil(keep.numel() / 8) + math.ceil(int(keep.sum()) * bits / 8) - packed.codes.nbytes
    elif masks:
        for keep in masks.values():
            size += (
                math.ceil(bytes_of(tuple(keep.shape), int(keep.sum()), value=4)["bitmap"]) - 4 * keep.numel()
            )
    if method.bf16:
        model = model.bfloat16()
        size = model_bytes(model)
    return {
        "bytes": size,
        **measure(model, tokenizer, questions),
        "tokens_per_s": speed(model, tokenizer, questions),
    }


def speed(model, tokenizer, questions: list[dict]) -> float:
    """一批 SPEED_BATCH 道题一起写，一秒几个 token（还原成普通的权重算：没有专门的内核），几次里最快的。"""
    prompts = [prompt_ids(tokenizer, question["messages"]) for question in questions[:SPEED_BATCH]]
    best = 0.0
    for _ in range(SPEED_REPEATS):
        started = time.perf_counter()
        replies = generate(model, tokenizer, prompts, SPEED_TOKENS)
        best = max(best, sum(map(len, replies)) / (time.perf_counter() - started))
    return best


def load_student(stage: Stage, seed: int, tokenizer, teacher: str):
    """这个种子的学生：--student 给的，没给就从数据里的标签学（distillation.py，一分钟）。"""
    folder = stage.settings.student
    if folder is None:
        # 放在结果文件夹旁边：中断了，接着来的时候还在
        folder = stage.path.parent / f"{stage.path.name}_students" / f"seed{seed}"
        if load_run(folder) is None:  # 中断以前教好了的，不重教
            print(f"学生还没有教，先教一个（种子 {seed}）…", flush=True)
            options = [
                "--preset",
                stage.settings.preset,
                "--methods",
                "labels",
                "--no_more",
                "--seed",
                str(seed),
            ]
            run_script(
                "学生没有教成",
                HOME / "distillation.py",
                *options,
                "--model",
                teacher,
                "--output_dir",
                str(folder),
            )
        folder = folder / "student"
    own, student = load_chat_lm(str(folder), stage.device)
    if len(own) != len(tokenizer):
        raise UserError(
            f"学生 {folder} 的词表有 {len(own)} 个，老师的有 {len(tokenizer)} 个：校准的对话要同一种分词。"
        )
    return student.eval()


# ---------------------------------------------------------------- 2. 合起来看


def summary(its: list[dict]) -> dict[str, float]:
    """几个种子的平均，与答对几成的标准差。"""
    means = {name: statistics.fmean(each[name] for each in its) for name in its[0]}
    return means | {"qa_accuracy_std": statistics.pstdev(each["qa_accuracy"] for each in its)}


def pareto(methods: dict[str, dict]) -> list[str]:
    """不比别的大、答对又比所有更小的都多的，从小到大：其余的，总有一个又小又好（或一样好）的。"""
    line, best = [], -1.0
    for name in sorted(methods, key=lambda name: (methods[name]["bytes"], -methods[name]["qa_accuracy"])):
        if methods[name]["qa_accuracy"] > best:
            best = methods[name]["qa_accuracy"]
            line.append(name)
    return line


def show(metrics: dict) -> None:
    full = metrics["methods"].get("float32", {}).get("bytes")
    print("\n方法                    字节    小几倍   答对（± 标准差）   留出损失   tokens/s   Pareto")
    for name, its in sorted(metrics["methods"].items(), key=lambda pair: -pair[1]["bytes"]):
        smaller = f"{full / its['bytes']:7.1f}" if full else "      –"
        star = "  ★" if name in metrics["pareto"] else ""
        print(
            f"{name:<16}{its['bytes']:>12,.0f}  {smaller}   {its['qa_accuracy']:.3f} ± {its['qa_accuracy_std']:.3f}"
            f"     {its['heldout_loss']:8.4f}  {its['tokens_per_s']:9,.0f}{star}"
        )


def draw(folder: Path, metrics: dict) -> None:
    """横轴字节（对数），纵轴答对几成；Pareto 线连起来，线上的写名字。"""
    from nlp_common.draw.plots import COLORS

    methods, line = metrics["methods"], metrics["pareto"]
    groups: dict[str, list[str]] = {}
    for name in methods:
        groups.setdefault(next(label for start, label in KINDS.items() if name.startswith(start)), []).append(
            name
        )

    def paint(axes, text) -> None:
        points = [methods[name] for name in line]
        xs, ys = [its["bytes"] / 1000 for its in points], [its["qa_accuracy"] for its in points]
        axes.plot(xs, ys, color="#888888", linewidth=1.2, linestyle="--", label="Pareto", zorder=1)
        for color, (label, names) in zip(COLORS, groups.items(), strict=False):
            its = [methods[name] for name in names]
            axes.scatter(
                [each["bytes"] / 1000 for each in its],
                [each["qa_accuracy"] for each in its],
                s=26,
                color=color,
                label=text(label),
            )
        for place, name in enumerate(line):  # 一上一下，名字不叠在一起
            its = methods[name]
            offset = (5, 6) if place % 2 else (5, -12)
            axes.annotate(
                name,
                (its["bytes"] / 1000, its["qa_accuracy"]),
                offset,
                textcoords="offset points",
                fontsize=8,
            )
        axes.set_xscale("log")
        ticks = [
            tick
            for tick in (30, 50, 100, 200, 500, 1000, 2000)
            if min(its["bytes"] for its in methods.values()) / 1500 < tick
        ]
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()

    labels = ("小了多少，错了多少|Size and accuracy", "千字节（对数）|kB (log)", "答对|accuracy")
    render(folder / "lab_pareto.svg", paint, [*groups, "Pareto"], labels)


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(LabSettings, PRESETS, argv, FULL_MODEL)
    if settings.preset == "full" and settings.model is None:
        settings.model = FULL_MODEL
    found = chain_model("sft", settings.model, settings.source)
    learn_it = partial(learn, path=found["path"])
    record = run_lesson("compression_lab", HOME, settings, learn_it, start=f"{found['stage']}:{found['id']}")
    show(record["metrics"])
    return record


if __name__ == "__main__":
    run_main(main)
