"""蒸馏：不到四分之一大的学生，是跟老师学，还是自己从标签学？

学到什么：老师能给的有三样：写好的答案（序列蒸馏）、每个位置上整个词表的概率（logits，几种 KL）、对学生自己写的答案的看法
（on-policy，GKD）。一步学到的多，一步也贵；同样的秒数谁好，温度有没有用，学生该从哪里开始，都量一遍。

运行：
    python distillation.py                                 # 两层 128 宽的 SFT 模型教一层 64 宽的，约四分钟
    python distillation.py --methods labels,greedy --output_dir outputs/two
    python distillation.py --dataset 我的对话.jsonl --output_dir outputs/mine    # 自己的对话，看留出损失
    python distillation.py --preset full                   # Qwen2.5-1.5B 教 0.5B，需要加速器
    python export_gguf.py --model outputs/tiny/distillation/student --output_dir outputs/student

预期输出（实测见本文件夹的 README.md）：学生的参数不到老师的五分之一，最好的一种留住九成以上的正确率。

参考：Hinton et al. 2015（温度）；Kim & Rush 2016（序列蒸馏）；Gu et al. 2024（MiniLLM，反向 KL）；
Agarwal et al. 2024（GKD，on-policy 与 JSD）。损失在 distil_losses.py，学生在 distil_student.py。
"""

from nlp_common.base.cli import run_main

import copy
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from transformers import get_scheduler

from distil_data import Data, chat_rows, load_data
from distil_losses import divergence
from distil_student import pretrain, small_student
from nlp_common.base.arguments import COUNT, SHARE, option
from nlp_common.base.errors import UserError
from nlp_common.draw.plots import bar_chart, line_chart
from nlp_common.fast.columns import labelled_logits
from nlp_common.hub.models import require_model
from nlp_common.lm.chat_rows import answer_loss, collate
from nlp_common.lm.chatml import prompt_ids
from nlp_common.lm.loading import load_chat_lm
from nlp_common.lm.losses import IGNORE, count_labels
from nlp_common.lm.replies import MAX_REPLY, reply_to
from nlp_common.lm.rollout import roll_out
from nlp_common.train.batches import bucketed
from nlp_common.train.chain import chain_model
from nlp_common.train.lesson import run_lesson, run_part
from nlp_common.train.loop import make_optimizer
from nlp_common.train.settings import LoopSettings, parse_settings
from nlp_common.train.stage import Stage

HOME = Path(__file__).resolve().parent
FULL_MODEL = "Qwen/Qwen2.5-1.5B-Instruct"


@dataclass(frozen=True)
class Method:
    """一种学法：学谁写的答案，与老师怎样比，学 --max_steps 的几倍。

    一步不一样贵：步数照着差不多的秒数定（老师写答案的时间也算）。
    """

    title: str
    answers: str  # data：数据里的；greedy、sampled：老师写的；student：一半是学生自己写的
    beta: float | None  # None：交叉熵，只看写出来的那个词；0 … 1：与老师的整个分布比，见 distil_losses.py
    share: float
    temperature: float = 1.0


METHODS = {
    "labels": Method("只用标签|labels only", "data", None, 1.0),
    "greedy": Method("老师的贪心答案|teacher's greedy answers", "greedy", None, 0.6),
    "sampled": Method("老师的采样答案|teacher's samples", "sampled", None, 0.6),
    "forward": Method("前向 KL|forward KL", "data", 0.0, 0.45),
    "jsd": Method("JSD 0.5", "data", 0.5, 0.45),
    "reverse": Method("反向 KL|reverse KL", "data", 1.0, 0.45),
    "on_policy": Method("on-policy（GKD）|on-policy (GKD)", "student", 0.5, 0.22),
}
COMPARED = ("labels",)  # 没有先读文档的学生，用这几种再学一遍
TEMPERATURES = (0.5, 2.0)  # 前向 KL 再试这几个温度
PRESETS = {
    "tiny": {
        "dataset": "tiny_world",
        "max_train_samples": 8000,
        "max_eval_samples": 512,
        "max_length": 256,
        "per_device_train_batch_size": 8,
        "learning_rate": 3e-3,
        "adam_beta2": 0.98,
        "max_steps": 1600,
        "n_answers": 1000,
        "n_documents": 7600,
    },
    "full": {
        "dataset": "tiny_world",
        "max_train_samples": 8000,
        "max_eval_samples": 512,
        "max_length": 512,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-5,
        "max_steps": 1000,
        "n_answers": 4000,
        "n_documents": 0,
        "student": "Qwen/Qwen2.5-0.5B-Instruct",
    },
}


@dataclass
class DistilSettings(LoopSettings):
    model: str | None = option("老师：文件夹或 hub 名；默认是 Qwen 链 tiny 预设的 SFT 模型")
    student: str | None = option("学生：文件夹或 hub 名；没给就是老师的结构，小几号，从头开始")
    source: Literal["hf", "modelscope"] = option("hub 名从哪里下载", "hf")
    dataset: str | None = option("对话：tiny_world，或自己的文件、文件夹、hub 名，写法同 SFT")
    eval_dataset: str | None = option("自己的留出对话；没给就从 --dataset 里分出来")
    max_eval_samples: int | None = option("留出几道题（或几段对话）", limits=COUNT)
    methods: str = option(f"试哪几种，逗号隔开：{'、'.join(METHODS)}", ",".join(METHODS))
    n_answers: int | None = option("序列蒸馏：老师答几段对话", limits=COUNT)
    n_documents: int | None = option("从头开始的学生先读几篇文档；0 是不读")
    student_layers: int = option("从头开始的学生几层", 1, COUNT)
    student_width: int = option("从头开始的学生多宽", 64, COUNT)
    more: bool = option("没有先读文档的学生、前向 KL 的别的温度，也各学一遍", True)
    on_policy_share: float = option("on-policy 里，几成的步学学生自己写的答案", 0.5, SHARE)

    def check(self) -> None:
        for name in self.methods.split(","):
            if name not in METHODS:
                raise UserError(
                    f"--methods 不认识 {name or '空的一项'}，可以是 {'、'.join(METHODS)}，逗号隔开。"
                )
        if self.eval_dataset and self.dataset == "tiny_world":
            raise UserError("tiny_world 自带留出的题，--eval_dataset 用不上：与自己的 --dataset 一起给。")
        if self.max_steps < 10:
            raise UserError(f"--max_steps 要不小于 10，给的是 {self.max_steps}。")


# ---------------------------------------------------------------- 1. 一种学法，从头到尾


def distil(part: Stage, method: Method, student, teacher, tokenizer, data: Data) -> dict:
    """student 照 method 学；返回 ``{"curve": [{"step", "seconds", "score", "loss"}], …}``，量的时间不算在秒数里。"""
    settings, device = part.settings, part.device
    rng, generator = random.Random(settings.seed), torch.Generator(device).manual_seed(settings.seed)
    seconds = -clock(device)
    chats, rows = lessons_of(method, teacher, tokenizer, data, settings)
    seconds += clock(device)
    curve, recent, prepared = [], [], seconds
    n_steps = max(8, round(settings.max_steps * method.share))
    optimizer = make_optimizer(student, settings)
    schedule = get_scheduler("linear", optimizer, math.ceil(0.05 * n_steps), n_steps)
    batches = batches_of(chats, settings.per_device_train_batch_size, settings.seed)
    student.train()
    for step in range(1, n_steps + 1):
        seconds -= clock(device)
        chosen = next(batches)
        if method.answers == "student" and rng.random() < settings.on_policy_share:
            batch = student_answers(student, tokenizer, [chats[index] for index in chosen], rng, generator)
        else:
            batch = collate([rows[index] for index in chosen], tokenizer.pad_token_id)
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        n = count_labels(batch)
        if method.beta is None:
            loss = answer_loss(student, batch)[0] / n
        else:
            loss = teacher_loss(student, teacher, batch, method) / n
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        recent.append(loss.item())
        seconds += clock(device)
        if step * 4 // n_steps > (step - 1) * 4 // n_steps:  # 每四分之一量一次
            score = data.score(student, tokenizer, quick=True)
            mean = sum(recent) / len(recent)
            curve.append({"step": step, "seconds": round(seconds, 2), "score": score, "loss": mean})
            recent.clear()
    found = {"curve": curve, "steps": n_steps, "seconds": seconds, "prepare_seconds": prepared}
    return found | data.final(student, tokenizer)


def teacher_loss(student, teacher, batch: dict, method: Method) -> torch.Tensor:
    """批里每个要学的位置上，老师与学生的两个分布差多远，加起来。"""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    keep = batch["labels"][:, 1:] != IGNORE  # (B, T-1)：位置 t 的 logits 说的是位置 t+1
    logits = labelled_logits(student, keep=keep, **inputs)  # (M, V)
    with torch.no_grad():
        wanted = labelled_logits(teacher, keep=keep, **inputs)  # (M, V)
    return divergence(logits, wanted, method.beta, method.temperature)


def student_answers(student, tokenizer, chats: list[dict], rng: random.Random, generator) -> dict:
    """on-policy：每段对话抽一问，学生自己答（温度 1）；学的就是它自己会走到的那些前文。

    它答错了，老师在错的前文之后给的概率，教它怎样收场；数据里的答案从来没有这样的前文。
    """
    prompts = []
    for chat in chats:
        turns = [place for place, message in enumerate(chat["messages"]) if message["role"] == "assistant"]
        prompts.append(prompt_ids(tokenizer, chat["messages"][: rng.choice(turns)]))
    rollout = roll_out(student, prompts, tokenizer, MAX_REPLY, 1.0, generator)
    student.train()
    return {
        "input_ids": rollout.ids,
        "labels": rollout.labels,
        "attention_mask": rollout.attention_mask,
        "position_ids": rollout.position_ids,
    }


def lessons_of(method: Method, teacher, tokenizer, data: Data, settings) -> tuple[list[dict], list[dict]]:
    """学的对话，与它们分好词的行：数据里的，或老师重新答过的。"""
    if method.answers not in ("greedy", "sampled"):
        return data.train, data.rows
    temperature = 0.0 if method.answers == "greedy" else 1.0
    asked = data.train[: settings.n_answers]
    chats = teacher_answers(teacher, tokenizer, asked, temperature, settings.seed)
    return chats, chat_rows(tokenizer, chats)


def teacher_answers(teacher, tokenizer, chats: list[dict], temperature: float, seed: int) -> list[dict]:
    """序列蒸馏：问题照旧，每一轮的回答换成老师的；后一轮接着老师前一轮的回答问。"""
    written: list[list[dict]] = [[] for _ in chats]
    for turn in range(max(len(chat["messages"]) for chat in chats)):
        asked = []
        for place, chat in enumerate(chats):
            if turn >= len(chat["messages"]):
                continue
            if chat["messages"][turn]["role"] == "assistant":
                asked.append(place)
            else:
                written[place].append(chat["messages"][turn])
        questions = [{"messages": written[place]} for place in asked]
        options = {"temperature": temperature, "seed": seed + turn, "batch_size": 256}
        replies = reply_to(teacher, tokenizer, questions, MAX_REPLY, **options) if asked else []
        for place, reply in zip(asked, replies, strict=True):
            written[place].append({"role": "assistant", "content": reply["text"]})
    return [{"messages": messages} for messages in written]


def batches_of(chats: list[dict], size: int, seed: int) -> Iterator[list[int]]:
    """一批一批的行号，长短相近的在一批里，一遍一遍没有完。"""
    lengths = [sum(len(message["content"]) for message in chat["messages"]) for chat in chats]
    size, epoch = min(size, len(chats)), 0
    while True:
        order = bucketed(lengths, size, seed, epoch)
        for start in range(0, len(order) - size + 1, size):
            yield order[start : start + size]
        epoch += 1


def clock(device: torch.device) -> float:
    """CPU 上看处理器用了几秒：别的程序在抢，也不影响谁快谁慢；加速器上看钟。"""
    return time.process_time() if device.type == "cpu" else time.perf_counter()


# ---------------------------------------------------------------- 2. 全课


def learn(stage: Stage, path: str) -> dict:
    settings = stage.settings
    tokenizer, teacher = load_chat_lm(path, stage.device)
    teacher.eval()
    data = load_data(settings, tokenizer)
    methods = settings.methods.split(",")
    blank = make_student(settings, teacher, tokenizer, stage)
    check_vocabularies(blank, teacher, methods)
    n_teacher, n_student = (sum(p.numel() for p in model.parameters()) for model in (teacher, blank))
    student = copy.deepcopy(blank)
    metrics: dict = {
        "teacher_accuracy": data.score(teacher, tokenizer),
        "teacher_parameters": n_teacher,
        "student_parameters": n_student,
        "student_share": n_student / n_teacher,
    }
    reads = settings.n_documents > 0 and not settings.student
    if metrics["teacher_accuracy"] == 0:
        print("老师一题也答不对，学生跟它学不到什么：--model 换一个学好了的。")
    if reads:
        work = partial(pretrain, student=student, tokenizer=tokenizer)
        metrics["documents"] = run_part(stage, "documents", work, student)
    results: dict = {}
    students: dict = {}
    for name in methods:
        results[name], students[name] = run(stage, name, METHODS[name], student, teacher, tokenizer, data)
    more = methods if settings.more else []
    for name in [name for name in COMPARED if reads and name in more]:
        key = f"{name}_from_nothing"
        results[key], _ = run(stage, key, METHODS[name], blank, teacher, tokenizer, data)
    for temperature in TEMPERATURES if "forward" in more else ():
        key = f"forward_at_{temperature:g}"
        method = replace(METHODS["forward"], temperature=temperature)
        results[key], _ = run(stage, key, method, student, teacher, tokenizer, data)
    best = max(methods, key=lambda name: results[name]["curve"][-1]["score"])  # 不看最后的成绩挑
    metrics |= {"student_accuracy": results[best]["accuracy"], "best": best}
    metrics["kept_accuracy"] = metrics["student_accuracy"] / (metrics["teacher_accuracy"] or math.inf)
    metrics |= {"methods": results}

    def write(folder: Path) -> None:
        students[best].save_pretrained(folder / "student")
        tokenizer.save_pretrained(folder / "student")
        draw(folder, metrics, methods)

    return stage.save(metrics, data.source, write)


def run(stage: Stage, key: str, method: Method, start, teacher, tokenizer, data: Data) -> tuple[dict, object]:
    """start 的一份照 method 学 → (量到的, 学好的学生)；中断以前做完了的不重做。"""
    student = copy.deepcopy(start)
    print(f"{key} …", flush=True)
    work = partial(distil, method=method, student=student, teacher=teacher, tokenizer=tokenizer, data=data)
    return run_part(stage, key, work, student), student


def make_student(settings: DistilSettings, teacher, tokenizer, stage: Stage):
    if settings.student:
        found = require_model(settings.student, settings.source)
        return load_chat_lm(found, stage.device)[1]
    student = small_student(teacher, settings.student_layers, settings.student_width, settings.seed)
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.to(stage.device)


def check_vocabularies(student, teacher, methods: list[str]) -> None:
    """与老师的分布比，两边的词表要一样大；只学老师写的字，不必。"""
    sizes = student.config.vocab_size, teacher.config.vocab_size
    compares = [name for name in methods if METHODS[name].beta is not None]
    if sizes[0] != sizes[1] and compares:
        raise UserError(
            f"学生的词表有 {sizes[0]} 个、老师的有 {sizes[1]} 个，{'、'.join(compares)} 没法一个一个地比："
            "换一个词表相同的学生，或加 --methods labels,greedy,sampled（只学老师写的字）。"
        )


def show(metrics: dict, settings: DistilSettings) -> None:
    what = "答对" if settings.dataset == "tiny_world" else "e^−L"
    share = metrics["student_share"]
    print(
        f"\n老师 {metrics['teacher_parameters']:,d} 个参数，{what} {metrics['teacher_accuracy']:.3f}；"
        f"学生 {metrics['student_parameters']:,d} 个（{share:.1%}）"
    )
    print(f"                        步数      秒      {what}   采样也对")
    for name, its in metrics["methods"].items():
        sampled = f"{its['sampled_accuracy']:10.3f}" if "sampled_accuracy" in its else ""
        print(f"  {name:<20}{its['steps']:6d}{its['seconds']:9.1f}{its['accuracy']:10.3f}{sampled}")
    print(f"最好的是 {metrics['best']}：留住老师的 {metrics['kept_accuracy']:.1%}，参数是老师的 {share:.1%}")


MORE = {  # 第三张图里的名字
    "labels": "只用标签|labels",
    "labels_from_nothing": "只用标签，没有先读文档|labels, no documents",
    "forward_at_0.5": "前向 KL，τ = 0.5|forward KL, τ=0.5",
    "forward": "前向 KL，τ = 1|forward KL, τ=1",
    "forward_at_2": "前向 KL，τ = 2|forward KL, τ=2",
}


def draw(folder: Path, metrics: dict, methods: list[str]) -> None:
    results = metrics["methods"]
    for axis, label in (("seconds", "秒|seconds"), ("step", "步数|steps")):
        series = {}
        for name in methods:
            curve = results[name]["curve"]
            series[METHODS[name].title] = ([p[axis] for p in curve], [p["score"] for p in curve])
        lines = {"老师的九成|0.9 of teacher": 0.9 * metrics["teacher_accuracy"]}
        title = "跟谁学，学多久|Distillation"
        line_chart(folder / f"distil_{axis}.svg", series, title, label, "答对|accuracy", hlines=lines)
    bars = {shown: results[name]["accuracy"] for name, shown in MORE.items() if name in results}
    if len(results) > len(methods):  # 有换了起点、换了温度的才画
        title = "从哪里开始，什么温度|Start and temperature"
        bar_chart(folder / "distil_more.svg", {"答对|accuracy": bars}, title, "", "答对|accuracy")


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(DistilSettings, PRESETS, argv, FULL_MODEL)
    if settings.preset == "full" and settings.model is None:
        settings.model = FULL_MODEL
    found = chain_model("sft", settings.model, settings.source)
    learn_it = partial(learn, path=found["path"])
    record = run_lesson("distillation", HOME, settings, learn_it, start=f"{found['stage']}:{found['id']}")
    show(record["metrics"], settings)
    return record


if __name__ == "__main__":
    run_main(main)
