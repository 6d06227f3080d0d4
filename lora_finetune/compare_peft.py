"""各种省参数的方法，一张表：学多少参数、多少字节、多久、学会没有、忘了多少。

学到什么：十几种方法学同一件新事，从同一个模型、同样的对话开始，各用各自的学习率；左边看学会了多少，右边看旧本领掉了多少。
参数少不等于忘得少，也不等于学不会：要量。

运行：
    python compare_peft.py                                   # 全部方法，三个种子
    python compare_peft.py --methods full,lora_r4,ia3 --seeds 1 --output_dir outputs/three
    python compare_peft.py --task reverse --output_dir outputs/reverse           # 换一件新事
    python compare_peft.py --dataset 我的对话.jsonl --output_dir outputs/mine      # 学自己的对话，看留出损失
    python compare_peft.py --preset full                     # Qwen1.5-0.5B-Chat，需要加速器

预期输出：实测的表见本文件夹的 README.md。DoRA、rsLoRA、(IA)³ 用 PEFT 的，其余是这个文件夹里手写的。

参考：Hu et al. 2021（LoRA）；Zaken et al. 2022（BitFit）；Liu et al. 2022（(IA)³）；Liu et al. 2024（DoRA）；Kalajdzievski 2023（rsLoRA）；
Biderman et al. 2024（LoRA Learns Less and Forgets Less）。
"""

from nlp_common.base.cli import run_main

import copy
import math
import statistics
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import nn

from lora_by_hand import add_lora, trainable
from nf4 import NF4Linear, quantize_model
from nlp_common.base.arguments import COUNT, option
from nlp_common.base.errors import UserError
from nlp_common.draw.plots import bar_chart
from nlp_common.lm.chatml import encode_chat
from nlp_common.train.chain import chain_model
from nlp_common.train.lesson import run_lesson, run_part
from nlp_common.train.settings import LoopSettings, parse_settings
from nlp_common.train.sft import train_on_chats
from nlp_common.train.stage import Stage
from prompts import PrefixTuned, PromptTuned, PTuned
from start import is_real, load_start, names
from tasks import NEW_TASKS, OWN, score, score_key, score_name, task_chats, use_own

HOME = Path(__file__).resolve().parent
FULL_MODEL = "Qwen/Qwen1.5-0.5B-Chat"
PRESETS = {
    "tiny": {"dataset": "tiny_world", "max_train_samples": 1200, "n_questions": 200, "seeds": 3},
    "full": {"dataset": "tiny_world", "max_train_samples": 2000, "n_questions": 200, "seeds": 1},
}


@dataclass(frozen=True)
class Method:
    title: str  # 给人看的名字，"中文|English"
    rate: float  # 学习率：小世界的模型，各自试出来的
    real_rate: float  # 真的模型：照论文里常用的
    r: int = 0


METHODS = {
    "full": Method("全参数|full", 1e-3, 2e-5),
    "biases": Method("只学偏置|BitFit", 1e-2, 1e-3),
    "lora_r1": Method("LoRA r=1", 1e-2, 2e-4, 1),
    "lora_r4": Method("LoRA r=4", 1e-2, 2e-4, 4),
    "lora_r16": Method("LoRA r=16", 1e-2, 2e-4, 16),
    "rslora_r16": Method("rsLoRA r=16", 5e-3, 1e-4, 16),
    "dora_r4": Method("DoRA r=4", 1e-2, 2e-4, 4),
    "nf4_lora_r4": Method("4 位底座 + LoRA r=4|NF4 + LoRA r=4", 1e-2, 2e-4, 4),
    "ia3": Method("(IA)³|IA3", 3e-2, 3e-3),
    "prefix": Method("前缀 8|prefix 8", 1e-1, 1e-2),
    "prompt": Method("提示 8|prompt 8", 1e-1, 1e-2),
    "p_tuning": Method("P-Tuning 8", 1e-2, 1e-3),
}
VIRTUAL_TOKENS = 8
KNOWS = 0.5  # 问答的正确率不到它，就说忘掉的一栏看不出什么


@dataclass
class CompareSettings(LoopSettings):
    COMMON: ClassVar[dict] = LoopSettings.COMMON | {
        "per_device_train_batch_size": 8,
        "learning_rate": 0.0,  # 各方法有自己的
        "adam_beta2": 0.98,
        "max_length": 512,
        "save_steps": 10_000,
    }
    model: str | None = option("从哪个模型开始；默认是 Qwen 链 tiny 预设的 SFT 模型")
    source: Literal["hf", "modelscope"] = option("hub 名从哪里下载", "hf")
    dataset: str | None = option(
        "学什么：tiny_world 照 --task；自己的对话给文件、文件夹或 hub 名，写法同 SFT"
    )
    task: str = option(f"小世界里学哪件新事：{'、'.join(NEW_TASKS)}", "extract")
    methods: str = option("比哪几种，逗号分开；默认全部", "")
    seeds: int | None = option("各几个种子（从 --seed 起）", limits=COUNT)
    n_questions: int | None = option("两样各留出几道题", limits=COUNT)

    def check(self) -> None:
        if self.task not in NEW_TASKS:
            raise UserError(f"--task 不认识 {self.task}，可以是 {'、'.join(NEW_TASKS)}。")
        if unknown := set(chosen_methods(self)) - set(METHODS):
            raise UserError(f"--methods 不认识 {'、'.join(sorted(unknown))}，可以是 {'、'.join(METHODS)}。")
        if self.dataset != "tiny_world":
            self.task = OWN


def chosen_methods(settings) -> list[str]:
    return [name for name in names(settings.methods) if name] or list(METHODS)


# ---------------------------------------------------------------- 1. 装上一种方法


def equip(start, name: str, example: list[int]) -> nn.Module:
    """start 的一份，照方法 name 装好；example 是一段真的文字的 token，虚拟 token 用它作初值。"""
    model, r = copy.deepcopy(start), METHODS[name].r
    if name == "full":
        return model.requires_grad_(True)
    if name == "biases":
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter_name.endswith("bias"))
        return model
    if name.startswith("lora"):
        add_lora(model, "all", r, alpha=2 * r)
        return model
    if name.startswith("nf4"):
        quantize_model(model)
        add_lora(model, "all", r, alpha=2 * r)
        return model
    if name in ("prefix", "prompt", "p_tuning"):
        kinds = {"prefix": PrefixTuned, "prompt": PromptTuned, "p_tuning": PTuned}
        model = kinds[name](model, VIRTUAL_TOKENS)
        model.start_from(example[:VIRTUAL_TOKENS])
        return model
    return from_peft(model, name, r)


def from_peft(model, name: str, r: int) -> nn.Module:
    """PEFT 自己的三种；没有装 PEFT 是 UserError。"""
    try:
        from peft import IA3Config, LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError(f"{name} 要 PEFT：pip install peft==0.21.2，或用 --methods 去掉它。") from error
    if name == "ia3":
        layers = ["k_proj", "v_proj", "down_proj"]
        config = IA3Config(target_modules=layers, feedforward_modules=["down_proj"])
    else:
        # rsLoRA 除以 √r 而不是 r：秩大了，增量不至于越来越小
        kind = {"use_dora": name.startswith("dora"), "use_rslora": name.startswith("rslora")}
        config = LoraConfig(
            r=r, lora_alpha=2 * r if kind["use_dora"] else 8, target_modules="all-linear", **kind
        )
        config.exclude_modules = ["lm_head"]
    model.requires_grad_(False)
    return inject_adapter_in_model(config, model)


def weight_bytes(model: nn.Module) -> int:
    """全部权重占多少字节；共用的只数一次，4 位的数编号与刻度。"""
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    return total + sum(m.four_bit().n_bytes() for m in model.modules() if isinstance(m, NF4Linear))


# ---------------------------------------------------------------- 2. 学一次，量一量


def learn_once(part: Stage, name: str, seed: int, start, tokenizer, before: float) -> dict:
    """学会的（新事的正确率），与忘掉的（问答掉了多少）。"""
    rate = METHODS[name].real_rate if is_real(part.settings) else METHODS[name].rate
    settings = replace(part.settings, seed=seed, learning_rate=rate)
    part.settings = settings
    torch.manual_seed(seed)
    chats = task_chats(settings.task, settings.max_train_samples, seed)
    example = [i for chat in chats[:4] for i in encode_chat(tokenizer, chat["messages"])[0]]
    model = equip(start, name, example)
    learned = sum(p.numel() for p in trainable(model).values())
    trained = train_on_chats(part, name, model, tokenizer, chats)
    new = task_chats(settings.task, settings.n_questions, seed=0, heldout=True)
    old = task_chats("qa", settings.n_questions, seed=0, heldout=True)
    return {
        "trainable": learned,
        "trainable_share": learned / sum(p.numel() for p in start.parameters()),
        "bytes": weight_bytes(model) + 3 * 4 * learned,  # 权重；梯度与 AdamW 的两个状态只有在学的才有
        "seconds": trained.metrics["train_seconds"],
        score_key(settings.task): score(model, tokenizer, settings.task, new),
        "forgotten": before - score(model, tokenizer, "qa", old),
    }


def summary(points: list[dict]) -> dict:
    """几个种子：平均；学会的、忘掉的另有平均的标准误差。"""
    result = {key: statistics.mean(point[key] for point in points) for key in points[0]}
    for key in ("accuracy", "token_probability", "forgotten"):
        if len(points) > 1 and key in result:
            spread = statistics.stdev(point[key] for point in points)
            result[f"{key}_error"] = spread / math.sqrt(len(points))
    return result


# ---------------------------------------------------------------- 3. 全课


def learn(stage: Stage, path: str) -> dict:
    settings = stage.settings
    source = use_own(settings, settings.dataset)
    tokenizer, start = load_start(path, stage.device)
    old = task_chats("qa", settings.n_questions, seed=0, heldout=True)
    new = task_chats(settings.task, settings.n_questions, seed=0, heldout=True)
    before = score(start, tokenizer, "qa", old)
    metrics: dict = {
        "qa_accuracy_before": before,
        f"{score_key(settings.task)}_before": score(start, tokenizer, settings.task, new),
    }
    for name in chosen_methods(settings):
        points = []
        for seed in range(settings.seed, settings.seed + settings.seeds):
            work = partial(learn_once, name=name, seed=seed, start=start, tokenizer=tokenizer, before=before)
            points.append(run_part(stage, f"{name}-{seed}", work))
        metrics[name] = summary(points)
    return stage.save(metrics, {"train": source}, partial(draw, metrics=metrics, task=settings.task))


def show(metrics: dict, task: str) -> None:
    print(
        f"\n学会：{score_name(task).split('|')[0]}，学之前 {metrics[f'{score_key(task)}_before']:.3f}；"
        f"忘掉：问答的正确率少了多少，学之前 {metrics['qa_accuracy_before']:.3f}"
    )
    if metrics["qa_accuracy_before"] < KNOWS:
        print("（这个模型本来就答不好小世界的问答，忘掉的一栏看不出什么。）")
    print(f"{'':<14}{'参数':>9}{'占':>8}{'字节':>10}{'秒':>6}{'学会':>8}{'忘掉':>8}")
    for name in METHODS:
        if name in metrics:
            m = metrics[name]
            print(
                f"{name:<14}{m['trainable']:>11,.0f}{m['trainable_share']:>9.2%}{m['bytes']:>12,.0f}"
                f"{m['seconds']:>7.1f}{m[score_key(task)]:>10.3f}{m['forgotten']:>10.3f}"
            )


def draw(folder: Path, metrics: dict, task: str) -> None:
    chosen = [name for name in METHODS if name in metrics]
    series = {
        label: {METHODS[name].title: metrics[name][key] for name in chosen}
        for key, label in ((score_key(task), "学会|learned"), ("forgotten", "忘掉|forgotten"))
    }
    bar_chart(folder / "methods.svg", series, "学会多少，忘掉多少|Learned and forgotten", "", "")


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(CompareSettings, PRESETS, argv, FULL_MODEL)
    if settings.preset == "full" and settings.model is None:
        settings.model = FULL_MODEL
    found = chain_model("sft", settings.model, settings.source)
    learn_it = partial(learn, path=found["path"])
    record = run_lesson("compare_peft", HOME, settings, learn_it, start=f"{found['stage']}:{found['id']}")
    show(record["metrics"], settings.task)
    return record


if __name__ == "__main__":
    run_main(main)
