"""再学一样，忘不忘前一样？全参数、LoRA、回放、EWC、O-LoRA、缩放、分开存、合并，各学了多少，忘了多少。

学到什么：只教新活儿，旧活儿一下子丢掉一半（灾难性遗忘），LoRA 也一样；"LoRA 忘得少"要在学得一样多的时候比；
旧数据混进一成，忘的就少得多；分开存、用的时候切换，忘记恰好是 0；EWC 与 O-LoRA 的罚是怎样写的，护得住什么。

运行：
    python incremental_lora.py                                    # SFT 的问答 → 抽取 → 回顾，全部方法，约两分钟
    python incremental_lora.py --methods full,lora_r4,replay_5    # 只要几种
    python incremental_lora.py --tasks recap,extract              # 换个次序
    python incremental_lora.py --dataset 甲.jsonl --third_dataset 乙.jsonl --output_dir outputs/mine   # 接着学自己的
    python incremental_lora.py --preset full                      # Qwen1.5-0.5B，需要加速器

预期输出（实测见本文件夹的 README.md）：全参数和 LoRA 学会抽取，问答丢掉三成多到一半多；混进 10% 的旧对话，只掉几个百分点；
EWC 一点不忘问答，却护不住后学的抽取；分开存，忘记恰好是 0。

参考：Kirkpatrick et al. 2017（EWC）、Wang et al. 2023（O-LoRA）、Lopez-Paz & Ranzato 2017（正确率矩阵与 BWT）、
Biderman et al. 2024（LoRA 学得少也忘得少）。
"""

from nlp_common.base.cli import run_main

import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import torch

from forgetting import (
    ewc_penalty,
    fisher_diagonal,
    main_directions,
    orthogonality_penalty,
    own_replies,
    penalised_loss,
)
from forgetting_picture import draw_learned_forgotten, show_rows, show_scaled
from lora_by_hand import add_lora, lora_layers, merge_lora, trainable
from nlp_common.base.arguments import COUNT, NOT_NEGATIVE, POSITIVE, option
from nlp_common.base.errors import UserError
from nlp_common.data.rows import check_path
from nlp_common.lm.chat_rows import answer_loss
from nlp_common.train.chain import chain_model
from nlp_common.train.lesson import run_lesson, run_part
from nlp_common.train.settings import LoopSettings, parse_settings
from nlp_common.train.sft import train_on_chats
from nlp_common.train.stage import Stage
from start import fill_in, load_start, names
from tasks import BUILT_IN, NEW_TASKS, OWN, OWN_THIRD, score, score_name, task_chats, task_title, use_own

HOME = Path(__file__).resolve().parent
FULL_MODEL = "Qwen/Qwen1.5-0.5B"
PRESETS = {
    "tiny": {"dataset": "tiny_world", "max_train_samples": 2000, "n_questions": 200},
    "full": {"dataset": "tiny_world", "max_train_samples": 4000, "n_questions": 200},
}
SMALL = {"learning_rate": 1e-2, "full_learning_rate": 2e-3}  # 小世界的模型
REAL = {"learning_rate": 2e-4, "full_learning_rate": 2e-5}  # 真的模型
KNOWS = 0.9  # 给的模型第一样（问答）的正确率不到它，就先教
SCALES = (0.25, 0.5, 0.75, 1.0)  # 学到的乘上几成
EQUAL = 0.75  # 在第二样学到这么多的地方比忘了多少：几种都到得了


@dataclass(frozen=True)
class Method:
    title: str  # "中文|English"
    r: int  # LoRA 的秩；0 是全参数
    replay: float = 0.0  # 混进旧活儿的对话：每样旧活儿，新活儿的几成
    penalty: Literal["", "ewc", "olora"] = ""


METHODS = {
    "full": Method("全参数|full", 0),
    "lora_r1": Method("LoRA r=1", 1),
    "lora_r4": Method("LoRA r=4", 4),
    "lora_r16": Method("LoRA r=16", 16),
    "replay_1": Method("回放 1%|replay 1%", 16, replay=0.01),
    "replay_5": Method("回放 5%|replay 5%", 16, replay=0.05),
    "replay_10": Method("回放 10%|replay 10%", 16, replay=0.1),
    "ewc": Method("EWC", 0, penalty="ewc"),
    "olora": Method("O-LoRA", 16, penalty="olora"),
}


@dataclass
class IncrementalSettings(LoopSettings):
    COMMON: ClassVar[dict] = LoopSettings.COMMON | {
        "per_device_train_batch_size": 16,
        "adam_beta2": 0.98,
        "max_length": 512,
        "save_steps": 1000,
    }
    model: str | None = option("从哪个模型开始；默认是 Qwen 链 tiny 预设的 SFT 模型，它已经会第一样（问答）")
    source: Literal["hf", "modelscope"] = option("hub 名从哪里下载", "hf")
    tasks: str = option(f"接着学哪两样，逗号隔开：{'、'.join(NEW_TASKS)}", "extract,recap")
    dataset: str | None = option(
        "第二样换成自己的对话：文件、文件夹或 hub 名，写法同 SFT；tiny_world 照 --tasks"
    )
    third_dataset: str | None = option("第三样也换成自己的对话，写法同 --dataset")
    methods: str = option(f"试哪几种，逗号隔开：{'、'.join(METHODS)}", ",".join(METHODS))
    learning_rate: float | None = option("LoRA 的学习率")
    full_learning_rate: float | None = option("全参数的学习率，约是 LoRA 的十分之一", limits=POSITIVE)
    ewc_lambda: float = option("EWC 的 λ", 300.0, NOT_NEGATIVE)
    olora_lambda: float = option("O-LoRA 的 λ", 1.0, NOT_NEGATIVE)
    fisher_rows: int = option("EWC 用几道旧题估计 Fisher", 200, COUNT)
    n_questions: int | None = option("每样活儿留出几道题", limits=COUNT)

    def check(self) -> None:
        fill_in(self, SMALL, REAL)
        for name, given, known in (
            ("tasks", self.tasks, list(NEW_TASKS)),
            ("methods", self.methods, list(METHODS)),
        ):
            wrong = [each for each in names(given) if each not in known]
            if wrong or not given:
                raise UserError(f"--{name} 不认识 {'、'.join(wrong) or '空的'}，可以是 {'、'.join(known)}。")
        if len(set(names(self.tasks))) != 2:
            raise UserError(f"--tasks 要两样不同的活儿，给的是 {self.tasks}。")
        check_path(self.third_dataset, "--third_dataset")
        if self.third_dataset and self.third_dataset == self.dataset:
            raise UserError(f"--dataset 与 --third_dataset 是同一份（{self.dataset}）：第三样要另给一份。")
        second, third = names(self.tasks)
        second = second if self.dataset == "tiny_world" else OWN
        third = third if self.third_dataset in (None, "", "tiny_world") else OWN_THIRD
        self.tasks = f"{second},{third}"


# ---------------------------------------------------------------- 1. 一样接一样地学


def learn_in_turn(
    stage: Stage, name: str, start, before, tokenizer, questions: dict, begin: dict
) -> tuple[dict, dict]:
    """用一种方法依次学完 tasks → (这一行的数, 学完第二样时的权重)。

    before：学第一样之前的模型，没有是 None；begin：起点各样的正确率。
    """
    method, tasks = METHODS[name], names(stage.settings.tasks)
    model = copy.deepcopy(start)
    matrix = [begin]  # 第 i 行：学完第 i 样，各样的正确率
    memories: list = []  # 罚里要用的：EWC 的 (θ*, F)，O-LoRA 的各层 A
    row: dict = {}
    for number, task in enumerate(tasks):
        learned = ["qa", *tasks[:number]]
        trainable_part(model, method.r)
        remember(memories, method, stage.settings, model, tokenizer, learned[-1], before)
        row["trainable"] = sum(p.numel() for p in trainable(model).values())
        work = partial(
            train_task,
            model=model,
            tokenizer=tokenizer,
            method=method,
            task=task,
            learned=learned,
            memories=memories,
        )
        run_part(stage, f"{name}-{task}", work, model)
        if method.penalty == "olora":
            memories.append({layer: each.A.detach().clone() for layer, each in lora_layers(model).items()})
        merge_lora(model)
        matrix.append(measure(model, tokenizer, questions))
        if number == 0:
            after = copy.deepcopy(model.state_dict())
    return row | summary(matrix, ["qa", *tasks]), after


def trainable_part(model, r: int) -> None:
    """全参数，或一对新的 A、B（每样活儿一对，学完并进去）。"""
    if r:
        add_lora(model, "all", r, alpha=2 * r)
    else:
        model.requires_grad_(True)


def train_task(
    part: Stage, model, tokenizer, method: Method, task: str, learned: list[str], memories: list
) -> dict:
    """在 task 上训练；method 说混不混旧对话、加不加罚。"""
    settings = part.settings
    n = settings.max_train_samples
    chats = task_chats(task, n, settings.seed)
    for old in learned if method.replay else []:
        chats += task_chats(old, round(method.replay * n), settings.seed + 1)
    if not method.r:
        part.settings = replace(settings, learning_rate=settings.full_learning_rate)
    loss = answer_loss
    if method.penalty == "ewc":
        loss = partial(
            penalised_loss, penalty=partial(ewc_penalty, memories=memories, strength=settings.ewc_lambda)
        )
    if method.penalty == "olora":
        penalty = partial(orthogonality_penalty, old=memories, strength=settings.olora_lambda)
        loss = partial(penalised_loss, penalty=penalty)
    trained = train_on_chats(part, f"{method.title.split('|')[0]} {task}", model, tokenizer, chats, loss)
    return {"seconds": trained.metrics["train_seconds"]}


def remember(memories: list, method: Method, settings, model, tokenizer, last: str, before) -> None:
    """学新的之前，记下罚里要用的：刚学完的那一样（last）在意哪些参数、哪些方向。"""
    if method.penalty == "ewc":
        parameters = trainable(model)
        replies = own_replies(model, tokenizer, old_questions(last, settings), settings.seed)
        anchor = {name: p.detach().clone() for name, p in parameters.items()}
        memories.append((anchor, fisher_diagonal(model, replies, parameters)))
    if method.penalty == "olora" and last == "qa" and before is not None:  # 第一样是全参数学的，没有 A
        memories.append(
            {
                name: main_directions(layer.base.weight - before.get_submodule(name).weight, method.r)
                for name, layer in lora_layers(model).items()
            }
        )


def old_questions(task: str, settings) -> list[dict]:
    """旧活儿训练时的题，不带回答：EWC 不需要旧的答案。"""
    chats = task_chats(task, settings.fisher_rows, settings.seed)
    return [{"messages": chat["messages"][:-1]} for chat in chats]


def measure(model, tokenizer, questions: dict) -> dict[str, float]:
    return {task: score(model, tokenizer, task, each) for task, each in questions.items()}


def summary(matrix: list[dict[str, float]], order: list[str]) -> dict:
    """正确率矩阵 R → 表里的一行。

    BWT = 1/(T−1) Σ_{i<T} (R_{T,i} − R_{i,i})（Lopez-Paz & Ranzato 2017）：学到最后，旧的各样比刚学完时差多少。
    """
    first, second, third = order
    last = len(order) - 1
    changes = [matrix[last][task] - matrix[i][task] for i, task in enumerate(order[:-1])]
    return {
        "task1_before": matrix[0][first],
        "task1_after": matrix[1][first],
        "task2_after": matrix[1][second],
        "forgotten": matrix[0][first] - matrix[1][first],
        "task1_end": matrix[2][first],
        "task2_end": matrix[2][second],
        "task3_end": matrix[2][third],
        "backward_transfer": sum(changes) / len(changes),
        "matrix": [[row[task] for task in order] for row in matrix],
    }


# ---------------------------------------------------------------- 2. 学完以后：缩放、切换、合并


@torch.no_grad()
def moved(start, after: dict[str, torch.Tensor], scale: float):
    """W + s·ΔW：学到的只用 s 成。LoRA 就是把 α/r 乘上 s，全参数也一样做。"""
    model = copy.deepcopy(start)
    weights = start.state_dict()
    model.load_state_dict({name: torch.lerp(w, after[name], scale) for name, w in weights.items()})
    return model


def scaled(start, after: dict, tokenizer, questions: dict, second: str) -> dict[str, dict]:
    """s → 第一样还剩多少，第二样学了多少。"""
    both = {task: questions[task] for task in ("qa", second)}
    points = {}
    for scale in SCALES:
        found = measure(moved(start, after, scale), tokenizer, both)
        points[f"{scale:g}"] = {"task1": found["qa"], "task2": found[second]}
    return points


def forgotten_at(points: dict[str, dict], before: float, level: float = EQUAL) -> float | None:
    """学到 level 时忘了多少：沿着 s 的折线，第一次够 level 的地方；到不了是 None。"""
    last = {"task1": before, "task2": 0.0}
    for point in points.values():
        if point["task2"] >= level:
            share = (level - last["task2"]) / (point["task2"] - last["task2"])
            return before - (last["task1"] + share * (point["task1"] - last["task1"]))
        last = point
    return None


def separate(
    stage: Stage, start, first_after: dict, tokenizer, questions: dict, begin: dict
) -> dict[str, dict]:
    """每样活儿一个适配器，都从起点学。切换：做哪样用哪个；合并：几个 ΔW 加起来用。→ 两行的数。"""
    tasks = names(stage.settings.tasks)
    third = copy.deepcopy(start)
    trainable_part(third, 16)
    work = partial(
        train_task,
        model=third,
        tokenizer=tokenizer,
        method=METHODS["lora_r16"],
        task=tasks[1],
        learned=[],
        memories=[],
    )
    run_part(stage, f"separate-{tasks[1]}", work, third)
    for layer in lora_layers(third).values():  # 关掉：α/r 乘 0，与从来没有装过逐位相同
        layer.scaling, on = 0.0, layer.scaling
    off = measure(third, tokenizer, {"qa": questions["qa"]})["qa"]
    for layer in lora_layers(third).values():
        layer.scaling = on
    third_after = merge_lora(third).state_dict()
    one = measure(moved(start, first_after, 1.0), tokenizer, questions)
    other = measure(third, tokenizer, questions)
    matrix = [begin, {**begin, "qa": off, tasks[0]: one[tasks[0]]}]
    matrix.append({"qa": off, tasks[0]: one[tasks[0]], tasks[1]: other[tasks[1]]})
    rows = {"switch": summary(matrix, ["qa", *tasks])}
    weights = start.state_dict()
    for name, share in (("merge_half", 0.5), ("merge_sum", 1.0)):
        both = {key: first_after[key] + third_after[key] - w for key, w in weights.items()}
        found = measure(moved(start, both, share), tokenizer, questions)
        rows[name] = summary([begin, one, found], ["qa", *tasks])
        rows[name] |= {"task1_after": found["qa"], "task2_after": found[tasks[0]]}  # 合并以后只有这一个模型
        rows[name]["forgotten"] = begin["qa"] - found["qa"]
    return rows


# ---------------------------------------------------------------- 3. 全课


def learn(stage: Stage, path: str, before_path: str | None) -> dict:
    settings = stage.settings
    data = {"train": use_own(settings, settings.dataset)}
    if settings.third_dataset:
        data["third"] = use_own(settings, settings.third_dataset, OWN_THIRD)
    tokenizer, start = load_start(path, stage.device)
    before = load_start(before_path, stage.device)[1] if before_path else None
    tasks = names(settings.tasks)
    questions = {
        task: task_chats(task, settings.n_questions, seed=0, heldout=True) for task in ("qa", *tasks)
    }
    if before is None and measure(start, tokenizer, {"qa": questions["qa"]})["qa"] < KNOWS:
        before = copy.deepcopy(start)
        learn_first_task(stage, start, tokenizer)

    begin = measure(start, tokenizer, questions)
    rows: dict[str, dict] = {}
    for name in names(settings.methods):
        rows[name], after = learn_in_turn(stage, name, start, before, tokenizer, questions, begin)
        if name == "full" or name.startswith("lora_"):
            points = scaled(start, after, tokenizer, questions, tasks[0])
            rows[name]["scaled"] = points
            rows[name][f"forgotten_at_{100 * EQUAL:.0f}"] = forgotten_at(points, begin["qa"])
        if name == "lora_r16":
            rows |= separate(stage, start, after, tokenizer, questions, begin)
    what = score_name(tasks[0])
    return stage.save(rows, data, partial(draw_learned_forgotten, rows=rows, what=what))


def learn_first_task(stage: Stage, start, tokenizer) -> None:
    """给的模型不是 Qwen 链的：先全参数教会第一样（问答），改的就是 start。"""
    work = partial(
        train_task,
        model=start,
        tokenizer=tokenizer,
        method=METHODS["full"],
        task="qa",
        learned=[],
        memories=[],
    )
    run_part(stage, "task1", work, start)
    start.requires_grad_(False)


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(IncrementalSettings, PRESETS, argv, FULL_MODEL)
    if settings.preset == "full" and settings.model is None:
        settings.model = FULL_MODEL
    found = chain_model("sft", settings.model, settings.source)
    before_path = chain_model("pretrain")["path"] if settings.model is None else None
    learn_it = partial(learn, path=found["path"], before_path=before_path)
    start = f"{found['stage']}:{found['id']}"
    record = run_lesson("incremental_lora", HOME, settings, learn_it, start=start)
    tasks = names(settings.tasks)
    show_rows(record["metrics"], [task_title(task, settings) for task in ("qa", *tasks)])
    show_scaled(record["metrics"], EQUAL)
    if any(task not in BUILT_IN for task in tasks):
        print("自己的对话没有程序判对错：表里是 exp(−留出损失)，每个 token 平均给对的几成概率。")
    return record


if __name__ == "__main__":
    run_main(main)
