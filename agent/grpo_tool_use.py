"""GRPO 练用工具：一局（调用、结果、再调用、回答）从头玩到尾，程序判最后的回答对不对，对的那几局多学，错的少学。

你会学到
  1. 强化学习的"一个回答"在这里是一整局：模型说几次，工具插几次话。奖励只看结局，一局里模型说的每个 token 分到同样的优势。
  2. 工具的结果不是模型说的：算进损失，就是在教模型背工具的话。遮住它，结果那些位置的梯度恰好是 0（测试证明）；
     --learn_results 不遮，看坏在哪里。
  3. 没有人写过"应当怎样调用"：程序只会判对错，每次调用扣一点点分。
  4. 起点照着有好有坏的示范学过：有的不查就猜，有的题里就有还去查，两样它都会。强化学习不教新本领，它挑：挑出答得对的、
     不多查的。（--model outputs/tiny/sft_tool_call：示范全是好的，就没有多少可挑。）
  5. 与 ../qwen_chinese_finetune/grpo_alignment.py 同一个公式，只是采样换成了一局一局地玩。

怎么运行
  python grpo_tool_use.py                          # 小世界，CPU，约三分钟（从 sft_tool_call.py --uneven 的结果开始，没有就先训练）
  python grpo_tool_use.py --call_cost 0            # 调用不要钱
  python grpo_tool_use.py --learn_results          # 不遮工具的结果
  python grpo_tool_use.py --preset full            # Qwen3-0.6B，同样的题，需要加速器

应当看到（tiny，实测见本文件夹的 README.md）：每十步一行，这一批局里答对的、多余的调用、没信号的题；最后一张表，留出的题上 SFT → GRPO。

参考：Shao et al. 2024（GRPO）；Jin et al. 2025（Search-R1：检索的结果不算损失）；Feng et al. 2025（ReTool）。
"""

from nlp_common.base.cli import run_main

import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from episodes import LONGEST_REPLY, MOST_TURNS, Episode, measure, play
from nlp_common.base.arguments import COUNT, Limits, option
from nlp_common.base.console import print_table
from nlp_common.base.errors import UserError
from nlp_common.base.processes import num_processes
from nlp_common.draw.plots import line_chart
from nlp_common.lm.loading import end_chat_turns, load_chat_lm
from nlp_common.lm.losses import IGNORE, token_logps
from nlp_common.train.checkpoints import load_checkpoint, save_checkpoint
from nlp_common.train.lesson import run_lesson
from nlp_common.train.loop import make_optimizer
from nlp_common.train.progress import progress_bar
from nlp_common.train.settings import LessonSettings, parse_settings
from nlp_common.train.setup import make_accelerator
from nlp_common.train.stage import Stage
from tiny_agent import tool_model
from tool_world import ERROR, PASSING, is_right, run_tool, tasks

HOME = Path(__file__).resolve().parent
FULL_MODEL = "Qwen/Qwen3-0.6B"
PRESETS = {
    "tiny": {"max_steps": 60, "n_tasks": 8, "learning_rate": 3e-4, "micro_batch_size": 32, "n_questions": 200,
             "max_new_tokens": LONGEST_REPLY},
    "full": {"max_steps": 100, "n_tasks": 8, "learning_rate": 1e-6, "micro_batch_size": 4, "n_questions": 200,
             "max_new_tokens": 256},
}  # fmt: skip
EVAL_SEED = 1000  # 留出的题，与训练的种子无关；同 sft_tool_call.py
EPSILON = 1e-4  # 除以标准差时加上它
WAYS = (  # 留出的题怎样玩：名字，温度，每次调用几成失灵
    ("greedy", 0.0, 0.0),
    ("sampled", 1.0, 0.0),
    ("greedy_failing", 0.0, 0.3),
    ("sampled_failing", 1.0, 0.3),
)
FAILURES = [ERROR + each for each in PASSING]  # 工具失灵时说的；再试一次也许就好


@dataclass
class GRPOSettings(LessonSettings):
    COMMON: ClassVar[dict] = {"weight_decay": 0.0, "adam_beta2": 0.999, "gradient_accumulation_steps": 1}

    model: str | None = option(
        "从哪个模型开始：文件夹或 hub 名；tiny 默认是 sft_tool_call.py --uneven 的结果"
    )
    source: Literal["hf", "modelscope"] = option("hub 名从哪里下载", "hf")
    max_steps: int | None = option("更新几步", limits=COUNT)
    n_tasks: int | None = option("一步几道题", limits=COUNT)
    num_generations: int = option("G：一道题玩几局", 8, Limits(at_least=2))
    temperature: float = option("采样的温度", 1.0, Limits(above=0))
    max_new_tokens: int | None = option("模型一次最多说几个 token", limits=COUNT)
    call_cost: float = option("每次调用扣几分；答对得 1 分", 0.1, Limits(at_least=0, below=0.25))
    failing: float = option(
        "练的时候，每次调用有几成失灵（留出的题，失灵的、不失灵的都量）", 0.0, Limits(at_least=0, at_most=0.9)
    )
    learn_results: bool = option("工具的结果也算损失（错的，只用来看坏在哪里）", False)
    learning_rate: float | None = option("学习率，线性降到 0", limits=Limits(above=0))
    max_grad_norm: float = option("梯度裁剪的范数", 1.0, Limits(above=0))
    micro_batch_size: int | None = option("一次前向、反向几局：梯度累加，结果与一次算完相同", limits=COUNT)
    weight_decay: float | None = option("权重衰减")
    adam_beta2: float | None = option("Adam 二阶矩的衰减")
    gradient_accumulation_steps: int | None = option("不用：见 --micro_batch_size")
    save_steps: int = option("每几步存一个检查点，中断后从它继续", 10, COUNT)
    n_questions: int | None = option("留出几道题", limits=COUNT)


# ---------------------------------------------------------------- 1. 一步：玩、打分、减去组平均、更新


def grpo_step(policy, optimizer, questions: list[dict], tokenizer, settings, accelerator, seed: int) -> dict:
    """questions 是 B 道题，每道玩 G 局，一共 N = B·G 局；用它们更新一次。"""
    group = settings.num_generations
    each = [task for task in questions for _ in range(group)]  # 同一道题的几局相邻
    with accelerator.autocast():
        model = accelerator.unwrap_model(policy)
        episodes = play_with(model, tokenizer, each, settings.temperature, seed, settings.failing, settings)
    rewards = torch.tensor([reward(episode, settings.call_cost) for episode in episodes])  # (N,)
    advantages = group_advantages(rewards, group)  # (N,)
    rows = [
        {**labelled(episode, settings.learn_results), "advantage": advantage}
        for episode, advantage in zip(episodes, advantages.tolist(), strict=True)
    ]
    n_tokens = sum(label != IGNORE for row in rows for label in row["labels"])
    # 一组全对或全错，梯度恰好是 0，不必算，可是照样算进分母
    rows = [row for row in rows if row["advantage"] != 0]
    rows.sort(key=lambda row: len(row["input_ids"]))  # 长短相近的在一起
    policy.train()
    for start in range(0, len(rows), settings.micro_batch_size):
        batch = collate(rows[start : start + settings.micro_batch_size], tokenizer.pad_token_id)
        with accelerator.autocast():
            loss = policy_loss(policy, **{k: v.to(accelerator.device) for k, v in batch.items()}) / n_tokens
        accelerator.backward(loss)
    accelerator.clip_grad_norm_(policy.parameters(), settings.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    right = torch.tensor([float(is_solved(episode)) for episode in episodes])
    return {
        "reward": rewards.mean().item(),
        "right": right.mean().item(),
        "calls": sum(map(n_calls, episodes)) / len(episodes),
        "needless": sum(map(needless_calls, episodes)) / len(episodes),
        "zero_groups": 1 - len(rows) / len(episodes),
    }


def play_with(
    model, tokenizer, questions, temperature: float, seed: int, failing: float, settings
) -> list[Episode]:
    """每道题一局，每次调用有 failing 成失灵。失灵了要再试，一局可以多说几次。

    同一道题的几局运气相同（第几次调用失灵都一样）：比的是怎样做，不是谁运气好，优势里就少了一大块噪声。
    """
    lucky = [task | {"luck": random.Random(f"{seed}|{task['question']}")} for task in questions]
    turns = MOST_TURNS + 3 if failing else MOST_TURNS
    tool = partial(shaky_tool, failing)
    return play(model, tokenizer, lucky, temperature, seed, tool, turns, settings.max_new_tokens)


def shaky_tool(failing: float, task: dict, call: dict) -> str:
    luck, which = task["luck"].random(), task["luck"].choice(FAILURES)
    return which if luck < failing else run_tool(task, call)


def reward(episode: Episode, call_cost: float) -> float:
    """验证器：最后的回答不对、没有说完是 0；对是 1，每次调用扣 call_cost。怎样调用才对，它不看。

    错了的不再扣：不然一组全错的题里，什么也不查的那一局最好，模型就学会了不查。
    """
    return max(0.0, 1 - call_cost * n_calls(episode)) if is_solved(episode) else 0.0


def is_solved(episode: Episode) -> bool:
    return episode.answer is not None and is_right(episode.task, episode.answer)


def n_calls(episode: Episode) -> int:
    return sum(map(len, episode.calls))


def needless_calls(episode: Episode) -> int:
    """比这道题要的多几次，工具失灵的不算；只用来看，不进奖励。"""
    failed = sum(message["content"] in FAILURES for message in episode.messages)
    return max(0, n_calls(episode) - failed - sum(map(len, episode.task["steps"])))


def group_advantages(rewards: Tensor, group: int) -> Tensor:
    """A_i = (r_i − mean)/(std + ε)，同一道题的 G 局里算（Shao et al. 2024 第 4.1.1 节）；(N,) → (N,)。"""
    grouped = rewards.view(-1, group)  # (B, G)
    centred = grouped - grouped.mean(1, keepdim=True)
    return (centred / (grouped.std(1, keepdim=True) + EPSILON)).flatten()


def labelled(episode: Episode, learn_results: bool) -> dict:
    """一局 → input_ids 与 labels：模型说的留着；题目、工具的结果是 IGNORE。learn_results：题目之后的都留着。"""
    spoken = episode.spoken
    if learn_results and 1 in spoken:
        first = spoken.index(1)
        spoken = [0] * first + [1] * (len(spoken) - first)
    labels = [token if said else IGNORE for token, said in zip(episode.ids, spoken, strict=True)]
    return {"input_ids": episode.ids, "labels": labels}


def collate(rows: list[dict], pad_id: int) -> dict[str, Tensor]:
    """右填充：input_ids、labels (B, T)，advantages (B,)。"""
    width = max(len(row["input_ids"]) for row in rows)

    def pad(name: str, value: int) -> Tensor:
        return torch.tensor([row[name] + [value] * (width - len(row[name])) for row in rows])

    return {
        "input_ids": pad("input_ids", pad_id),
        "labels": pad("labels", IGNORE),
        "advantages": torch.tensor([row["advantage"] for row in rows]),
    }


def policy_loss(policy, input_ids: Tensor, labels: Tensor, advantages: Tensor) -> Tensor:
    """−Σ_i A_i Σ_t log π(y_t | y_<t)，t 只数模型自己说的 token。

    一批只更新一次，π/π_old 恰好是 1，GRPO 的裁剪用不着，梯度就是这个式子的（除以 token 数，见 grpo_step）。
    """
    logps = token_logps(policy, input_ids, labels)  # (B, C)，没有标签的是 0
    return -(advantages[:, None] * logps).sum()


# ---------------------------------------------------------------- 2. 训练


def learn(stage: Stage, start: dict) -> dict:
    settings = stage.settings
    accelerator = make_accelerator(stage.device, settings)
    tokenizer, policy = load_chat_lm(start["path"], accelerator.device)
    heldout = tasks(settings.n_questions, EVAL_SEED, heldout=True)
    optimizer = make_optimizer(policy, settings)
    policy, optimizer = accelerator.prepare(policy, optimizer)
    history: list[dict] = []
    if latest := stage.checkpoint():
        _, history = load_checkpoint(latest, accelerator)
    bar = progress_bar("GRPO", settings.max_steps, len(history))
    for step in range(len(history), settings.max_steps):
        for each in optimizer.param_groups:
            each["lr"] = settings.learning_rate * (1 - step / settings.max_steps)
        # 第几步用哪些题、哪个随机数，只由 (种子, step) 决定：中断后接着来，结果不变
        seed = settings.seed * 1_000_003 + step
        questions = tasks(settings.n_tasks, seed)
        stats = grpo_step(policy, optimizer, questions, tokenizer, settings, accelerator, seed)
        history.append({"step": step + 1, **stats})
        bar.update(1)
        bar.set_postfix_str(f"答对 {stats['right']:.2f}", refresh=False)
        if (step + 1) % 10 == 0:
            bar.write(
                f"  {step + 1:>4} 步  奖励 {stats['reward']:.3f}  答对 {stats['right']:.3f}  "
                f"多余的调用 {stats['needless']:.3f}  没信号的题 {stats['zero_groups']:.0%}"
            )
        if (step + 1) % settings.save_steps == 0:
            save_checkpoint(stage, accelerator, step + 1, history)
    bar.close()
    policy = accelerator.unwrap_model(policy)
    _, before = load_chat_lm(start["path"], accelerator.device)
    metrics: dict = {}
    for name, model in (("before", before), ("after", policy)):
        for how, temperature, failing in WAYS:
            metrics[f"{name}_{how}"] = score(model, tokenizer, heldout, temperature, failing, settings)
    for how, _, _ in WAYS:
        for key in ("final_accuracy", "needless_calls"):
            metrics |= {f"{key}_{how}_{name}": metrics[f"{name}_{how}"][key] for name in ("before", "after")}
    end_chat_turns(policy, tokenizer)
    picture = partial(draw, history=history)
    return stage.finish(policy, tokenizer, metrics, {"train": "tool_world"}, history, draw=picture)


def score(model, tokenizer, questions: list[dict], temperature: float, failing: float, settings) -> dict:
    """留出的题上玩一遍：episodes.measure 的各个分，另有每局几次多余的调用。"""
    episodes = play_with(model.eval(), tokenizer, questions, temperature, EVAL_SEED, failing, settings)
    needless = sum(map(needless_calls, episodes)) / len(episodes)
    return measure(episodes) | {"needless_calls": needless}


# ---------------------------------------------------------------- 3. 给人看


def show(metrics: dict) -> None:
    rows = [["", "贪心", "采样", "贪心，三成失灵", "采样，三成失灵"]]
    for name, title in (
        ("final_accuracy", "最后答对"),
        ("two_step_accuracy", "两步的题答对"),
        ("no_call_when_unneeded", "不必用就不用"),
        ("needless_calls", "每局多余的调用"),
    ):
        pairs = [(metrics[f"before_{how}"][name], metrics[f"after_{how}"][name]) for how, _, _ in WAYS]
        rows.append([title, *(f"{before:.3f} → {after:.3f}" for before, after in pairs)])
    print_table(rows)
    print(f"  SFT → GRPO，留出的 {metrics['after_greedy']['n']} 道题")


def draw(folder: Path, history: list[dict]) -> None:
    steps = [row["step"] for row in history]
    line_chart(
        folder / "grpo_tool_use.svg",
        {
            "答对|right": (steps, [row["right"] for row in history]),
            "多余的调用|needless calls": (steps, [row["needless"] for row in history]),
        },
        "GRPO 练用工具：采样的局|GRPO on tool use: sampled episodes",
        "步|step",
        "每局|per episode",
    )


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(GRPOSettings, PRESETS, argv, FULL_MODEL)
    if num_processes() > 1:
        raise UserError("这一课只用一个进程：不要用 accelerate launch。")
    if settings.preset == "full" and settings.model is None:
        settings.model = FULL_MODEL
    start = tool_model(settings.model, settings.source, "sft_uneven")
    record = run_lesson(
        "grpo_tool_use", HOME, settings, partial(learn, start=start), start=f"{start['stage']}:{start['id']}"
    )
    show(record["metrics"])
    return record


if __name__ == "__main__":
    run_main(main)
