"""P-Tuning v2、提示微调、P-Tuning：模型一个参数也不动，只学几个"虚拟 token"，能教会什么？

学到什么：前缀是每层前面多出的几列 K、V，提示是输入前面多出的几个向量；它们要比 LoRA 大十倍的学习率，
照库的默认值来就什么也学不会；让模型换一种口气（本来就会的）几个虚拟 token 就够，教没见过的一样，加到 32 个也不行，LoRA 行。

运行：
    python ptuning_v2_demo.py                                  # 学习率 × 几个虚拟 token × 从哪里开始，约两分钟
    python ptuning_v2_demo.py --virtual_tokens 16
    python ptuning_v2_demo.py --dataset 我的对话.jsonl --output_dir outputs/mine   # 换口气换成学自己的对话，看留出损失
    python ptuning_v2_demo.py --gradient_checkpointing true    # 重算激活：PEFT 的前缀会丢，这里的不会
    python ptuning_v2_demo.py --preset full                    # Qwen1.5-0.5B-Chat，需要加速器

预期输出（实测见本文件夹的 README.md）：换口气，前缀与 LoRA 一样好；默认的初值与学习率，正确率是 0；新的一样（抽取），只有 LoRA 学得会。

参考：Li & Liang 2021（前缀）、Lester et al. 2021（提示）、Liu et al. 2021（P-Tuning）、Liu et al. 2022（P-Tuning v2）、
Petrov et al. 2024（前缀只能引出模型会的）。
"""

from nlp_common.base.cli import run_main

import copy
import math
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import ClassVar, Literal

from lora_by_hand import add_lora, trainable
from nlp_common.base.arguments import COUNT, POSITIVE, option
from nlp_common.base.console import padded
from nlp_common.base.errors import UserError
from nlp_common.draw.plots import line_chart
from nlp_common.lm.chatml import encode_chat
from nlp_common.train.chain import chain_model
from nlp_common.train.lesson import run_lesson, run_part
from nlp_common.train.settings import LoopSettings, parse_settings
from nlp_common.train.sft import train_on_chats
from nlp_common.train.stage import Stage
from prompts import PrefixTuned, PromptTuned, PTuned
from start import fill_in, load_start
from tasks import NEW_TASKS, OWN, score, score_key, score_name, task_chats, task_title, use_own

HOME = Path(__file__).resolve().parent
FULL_MODEL = "Qwen/Qwen1.5-0.5B-Chat"
PRESETS = {
    "tiny": {"dataset": "tiny_world", "max_train_samples": 1500, "n_questions": 200},
    "full": {"dataset": "tiny_world", "max_train_samples": 2000, "n_questions": 200},
}
KINDS = {"prefix": PrefixTuned, "prompt": PromptTuned, "p_tuning": PTuned}
NAMES = {
    "prefix": "前缀|prefix",
    "prompt": "提示|prompt",
    "p_tuning": "P-Tuning",
    "lora": "LoRA r=4",
    "prefix_new": "前缀，新的一样|prefix, new task",
    "lora_new": "LoRA，新的一样|LoRA, new task",
}
RATES = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1)  # 学习率
WIDTHS = (1, 2, 4, 16)  # 几个虚拟 token
SMALL = {"learning_rate": 1e-1, "lora_learning_rate": 1e-2}  # 小世界的模型
REAL = {"learning_rate": 1e-2, "lora_learning_rate": 2e-4}  # 真的模型
P_TUNING_RATE = 1e-2  # 它学的主要是小网络的矩阵，用平常大小的学习率
DEFAULT_RATE = 5e-5  # transformers 的 TrainingArguments 的默认值


@dataclass
class PromptSettings(LoopSettings):
    COMMON: ClassVar[dict] = LoopSettings.COMMON | {
        "per_device_train_batch_size": 16,
        "adam_beta2": 0.98,
        "max_length": 512,
        "save_steps": 1000,
    }
    model: str | None = option("从哪个模型开始；默认是 Qwen 链 tiny 预设的 SFT 模型")
    source: Literal["hf", "modelscope"] = option("hub 名从哪里下载", "hf")
    dataset: str | None = option(
        "教什么：tiny_world 照 --task；自己的对话给文件、文件夹或 hub 名，写法同 SFT"
    )
    task: str = option(f"小世界里教什么：{'、'.join(NEW_TASKS)}", "courteous")
    new_skill: str = option("另教一样新的，与 LoRA 比", "extract")
    virtual_tokens: int = option("几个虚拟 token", 8, COUNT)
    learning_rate: float | None = option("前缀与提示的学习率")
    lora_learning_rate: float | None = option("旁边的 LoRA 的学习率", limits=POSITIVE)
    n_questions: int | None = option("留出几道题", limits=COUNT)

    def check(self) -> None:
        fill_in(self, SMALL, REAL)
        for name in ("task", "new_skill"):
            if getattr(self, name) not in NEW_TASKS:
                raise UserError(f"--{name} 不认识 {getattr(self, name)}，可以是 {'、'.join(NEW_TASKS)}。")
        if self.dataset != "tiny_world":
            self.task = OWN


@dataclass(frozen=True)
class Trial:
    """一次训练：哪一种，几个虚拟 token（LoRA 是秩），学习率，从哪里开始。"""

    kind: str
    width: int
    rate: float
    init: str = "text"  # text：真的文字；random：N(0, 1)，torch 与 PEFT 的默认
    task: str = "courteous"

    @property
    def name(self) -> str:
        return f"{self.task}-{self.kind}-{self.width}-{self.rate:g}-{self.init}"


# ---------------------------------------------------------------- 1. 装上虚拟 token


def equip(start, trial: Trial, tokenizer, chats: list[dict]):
    """start 的一份，冻住，装上 trial 说的。chats 是训练的对话，用它们的文字作初值。"""
    model = copy.deepcopy(start)
    if trial.kind == "lora":
        add_lora(model, "all", trial.width, alpha=2 * trial.width)
        return model
    model = KINDS[trial.kind](model, trial.width)
    if trial.init == "text":
        model.start_from(example_text(tokenizer, chats, trial.width))
    return model


def example_text(tokenizer, chats: list[dict], n: int) -> list[int]:
    """训练对话连起来的前 n 个 token：初值就像给模型看了一个例子（的开头）。"""
    ids: list[int] = []
    for chat in cycle(chats):
        ids += encode_chat(tokenizer, chat["messages"])[0]
        if len(ids) >= n:
            break
    return ids[:n]


# ---------------------------------------------------------------- 2. 训练，量一量


def train_and_measure(part: Stage, trial: Trial, start, tokenizer) -> dict:
    settings = part.settings
    chats = task_chats(trial.task, settings.max_train_samples, settings.seed)
    questions = task_chats(trial.task, settings.n_questions, seed=0, heldout=True)
    model = equip(start, trial, tokenizer, chats)
    part.settings = replace(settings, learning_rate=trial.rate)
    trained = train_on_chats(part, trial.name, model, tokenizer, chats)
    learned = sum(p.numel() for p in trainable(model).values())
    metrics = {
        "score": score(model, tokenizer, trial.task, questions),
        "loss": trained.history[-1]["loss"] if trained.history else float("nan"),
        "trainable": learned,
        "trainable_share": learned / sum(p.numel() for p in start.parameters()),
        "seconds": trained.metrics["train_seconds"],
    }
    if trial.task != OWN:  # 换了口气，故事里的题还答得对吗？
        old = task_chats("qa", settings.n_questions, seed=0, heldout=True)
        metrics["qa_accuracy"] = score(model, tokenizer, "qa", old)
    return metrics


def run_trial(stage: Stage, results: dict, trial: Trial, start, tokenizer) -> dict:
    """做一次，结果记进 results；做过的不重做。"""
    if trial not in results:
        work = partial(train_and_measure, trial=trial, start=start, tokenizer=tokenizer)
        results[trial] = run_part(stage, trial.name, work)
    return results[trial]


# ---------------------------------------------------------------- 3. 全课


def learn(stage: Stage, path: str) -> dict:
    settings = stage.settings
    source = use_own(settings, settings.dataset)
    tokenizer, start = load_start(path, stage.device)
    longest = start.config.max_position_embeddings
    if settings.virtual_tokens >= longest:
        raise UserError(
            f"--virtual_tokens {settings.virtual_tokens} 太多：虚拟 token 也占位置，这个模型只有 {longest} 个。"
        )
    m, rate, task = settings.virtual_tokens, settings.learning_rate, settings.task
    results: dict[Trial, dict] = {}
    run = partial(run_trial, stage, results, start=start, tokenizer=tokenizer)

    questions = task_chats(task, settings.n_questions, seed=0, heldout=True)
    key = score_key(task)
    metrics: dict = {f"{key}_before": score(start, tokenizer, task, questions)}
    best = {kind: Trial(kind, m, rate, task=task) for kind in KINDS}
    best["p_tuning"] = Trial("p_tuning", m, P_TUNING_RATE, "random", task)  # 嵌入太小，小网络学得慢
    best["lora"] = Trial("lora", 4, settings.lora_learning_rate, task=task)
    for kind, trial in best.items():
        found = run(trial)
        metrics[f"{key}_{kind}"] = found["score"]
        metrics[f"trainable_{kind}"] = found["trainable"]
        if "qa_accuracy" in found:
            metrics[f"qa_accuracy_{kind}"] = found["qa_accuracy"]
    metrics["trainable_share"] = run(best["prefix"])["trainable_share"]
    # 照默认的来：初值 N(0, 1)，学习率 5e-5
    failing = Trial("prefix", m, DEFAULT_RATE, "random", task)
    metrics[f"{key}_prefix_default"] = run(failing)["score"]
    metrics[f"{key}_prefix_random"] = run(replace(failing, rate=rate))["score"]

    by_rate: dict = {}
    by_width: dict = {}
    for kind in ("prefix", "prompt"):
        by_rate[kind] = {f"{r:.0e}": run(replace(best[kind], rate=r))["score"] for r in RATES}
        widths = sorted({*WIDTHS, m})
        by_width[kind] = {str(w): run(replace(best[kind], width=w))["score"] for w in widths}
    new = {kind: replace(best[kind], task=settings.new_skill) for kind in ("prefix", "lora")}
    widths = sorted({1, m, 32})
    by_width["prefix_new"] = {str(w): run(replace(new["prefix"], width=w))["score"] for w in widths}
    metrics |= {"by_rate": by_rate, "by_width": by_width}
    for kind, trial in new.items():
        metrics[f"new_skill_{kind}"] = run(trial)["score"]
    return stage.save(metrics, {"train": source}, partial(draw, metrics=metrics, task=task))


def show(metrics: dict, settings: PromptSettings) -> None:
    key, what = score_key(settings.task), score_name(settings.task).split("|")[0]
    print(f"\n{task_title(settings.task, settings)}（学之前 {metrics[f'{key}_before']:.3f}）")
    print(f"                  参数      {what}" + ("    问答" if "qa_accuracy_prefix" in metrics else ""))
    for kind in (*KINDS, "lora"):
        title = padded(NAMES[kind].split("|")[0], 14)
        qa = f"{metrics[f'qa_accuracy_{kind}']:8.3f}" if f"qa_accuracy_{kind}" in metrics else ""
        print(f"  {title}{metrics[f'trainable_{kind}']:7,d}{metrics[f'{key}_{kind}']:11.3f}{qa}")
    print(
        f"前缀，初值 N(0, 1)：学习率 {DEFAULT_RATE:g} 是 {metrics[f'{key}_prefix_default']:.3f}，"
        f"{settings.learning_rate:g} 是 {metrics[f'{key}_prefix_random']:.3f}"
    )
    for title, name in (("学习率", "by_rate"), ("几个虚拟 token", "by_width")):
        for kind, points in metrics[name].items():
            line = "  ".join(f"{x}：{y:.3f}" for x, y in points.items())
            print(f"{NAMES[kind].split('|')[0]}，{title}  {line}")
    new = task_title(settings.new_skill, settings)
    print(f"新的一样（{new}）：前缀 {metrics['new_skill_prefix']:.3f}，LoRA {metrics['new_skill_lora']:.3f}")


def draw(folder: Path, metrics: dict, task: str) -> None:
    for name, title, xlabel in (
        ("by_rate", "学习率|Learning rate", "学习率（10 的几次方）|log10 learning rate"),
        ("by_width", "几个虚拟 token|Virtual tokens", "几个虚拟 token（2 的几次方）|log2 virtual tokens"),
    ):
        log = math.log10 if name == "by_rate" else math.log2
        series = {
            NAMES[kind]: ([log(float(x)) for x in points], list(points.values()))
            for kind, points in metrics[name].items()
        }
        lines = {NAMES["lora"]: metrics[f"{score_key(task)}_lora"]}
        if name == "by_width":
            lines[NAMES["lora_new"]] = metrics["new_skill_lora"]
        line_chart(folder / f"prompts_{name}.svg", series, title, xlabel, score_name(task), hlines=lines)


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(PromptSettings, PRESETS, argv, FULL_MODEL)
    if settings.preset == "full" and settings.model is None:
        settings.model = FULL_MODEL
    found = chain_model("sft", settings.model, settings.source)
    learn_it = partial(learn, path=found["path"])
    record = run_lesson("ptuning_v2_demo", HOME, settings, learn_it, start=f"{found['stage']}:{found['id']}")
    show(record["metrics"], settings)
    return record


if __name__ == "__main__":
    run_main(main)
