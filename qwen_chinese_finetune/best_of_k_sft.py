"""best-of-K 与拒绝采样：每道题写 K 个回答，挑最好的一个，再照着它微调自己。

学到什么：挑（best-of-K）为什么就是最简单的强化学习；推理时挑要写 K 遍，把挑出来的练进模型，就只写一遍；K 从 1 到 16、
一轮到三轮各多好；代价是什么（越挑越像，distinct-2 一路下降）；向更强的模型学（蒸馏）又如何。

运行：
    python best_of_k_sft.py                          # 自动选预设；奖励模型来挑，自己教自己三轮
    python best_of_k_sft.py --selector judge --output_dir outputs/tiny/best-of-k-judge     # 知道标准答案的程序来挑
    python best_of_k_sft.py --teacher dpo --rounds 1 --output_dir outputs/tiny/distil-dpo  # 向 DPO 的模型学
    python best_of_k_sft.py --preset full            # 需要加速器

预期输出（tiny，实测见本文件夹的 README.md）：一轮 best-of-8 与推理时 best-of-8 的程序评分相差不到 0.03。

参考：Touvron et al. 2023（Llama 2，第 3.2.2 节的拒绝采样）；Dong et al. 2023（RAFT）；Gulcehre et al. 2023（ReST）；
Beirami et al. 2024（best-of-n 的 KL 不超过 log n − (n−1)/n）。
"""

from nlp_common.base.cli import run_main

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import torch

from chain import CHAIN
from nlp_common.base.arguments import COUNT, POSITIVE, Limits, option
from nlp_common.base.errors import UserError
from nlp_common.data.chats import to_questions
from nlp_common.draw.plots import line_chart
from nlp_common.lm.loading import load_chat_lm, load_reward_model
from nlp_common.lm.replies import distinct_n, reply_of, score_replies
from nlp_common.lm.rollout import prompt_length, roll_out, with_prompts
from nlp_common.tiny.judge import judge, measure_chat
from nlp_common.train.chain import chain_model, run_stage
from nlp_common.train.lesson import run_part
from nlp_common.train.settings import StageSettings, parse_settings
from nlp_common.train.sft import train_on_chats
from nlp_common.train.splits import drop_long, load_train_and_eval
from nlp_common.train.stage import Stage

PRESETS = {
    "tiny": {
        "dataset": "tiny_world",
        "max_train_samples": 2400,
        "max_length": 256,
        "per_device_train_batch_size": 16,
        "learning_rate": 5e-4,
        "adam_beta2": 0.98,
        "num_train_epochs": 2.0,
        "max_new_tokens": 32,
        "ks": "1,2,4,16",
    },
    "full": {
        "dataset": "shibing624/DPO-En-Zh-20k-Preference:zh",
        "max_train_samples": 3000,
        "max_length": 512,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "learning_rate": 1e-5,
        "max_new_tokens": 256,
        "ks": "",
    },
}


@dataclass
class BestOfKSettings(StageSettings):
    NOT_IN_FINGERPRINT: ClassVar[set[str]] = StageSettings.NOT_IN_FINGERPRINT | {"sample_batch"}

    reward_model: str | None = option("奖励模型的文件夹；默认是 reward_model.py 的结果")
    selector: Literal["reward_model", "judge"] = option(
        "谁来挑：reward_model 是奖励模型；judge 是知道标准答案的程序（只有小世界有）", "reward_model"
    )
    teacher: str = option(
        "谁来写回答：self 是正在练的模型自己，dpo、ppo 是链上的模型，或一个模型文件夹", "self"
    )
    k: int = option("每道题写几个，挑一个", 8, Limits(at_least=1))
    rounds: int = option("几轮：每轮由上一轮练好的模型来写", 3, COUNT)
    ks: str | None = option("另外再看哪些 K，逗号分开，各从头练一轮；空的是不看")
    max_new_tokens: int | None = option("一个回答最多多少个 token")
    temperature: float = option("采样的温度", 1.0, POSITIVE)
    sample_batch: int = option("一次写几道题", 32, COUNT)

    def check(self) -> None:
        super().check()
        self.check_loop_only()
        if self.selector == "judge" and self.dataset != "tiny_world":
            raise UserError(
                "--selector judge 只有小世界的题能用：别的题没有标准答案，请用 --selector reward_model。"
            )
        ks = [k.strip() for k in self.ks.split(",") if k.strip()]
        if not all(k.isdecimal() and int(k) > 0 for k in ks):
            raise UserError(f"--ks 要是逗号分开的正整数，给的是 '{self.ks}'。")


# ---------------------------------------------------------------- 1. 写 K 个，打分，挑一个


@torch.no_grad()
def write(teacher, tokenizer, rows: list[dict], k: int, settings, seed: int) -> list[list[dict]]:
    """每道题 k 个回答 → 每题一个列表 ``[{"text", "ids", "ended"}]``。"""
    generator = torch.Generator(next(teacher.parameters()).device).manual_seed(seed)
    replies = []
    for start in range(0, len(rows), settings.sample_batch):
        prompts = [row["prompt"] for row in rows[start : start + settings.sample_batch]]
        rollout = roll_out(
            teacher, prompts, tokenizer, settings.max_new_tokens, settings.temperature, generator, group=k
        )
        for ids, real in zip(rollout.responses, rollout.mask, strict=True):
            replies.append(reply_of(tokenizer, ids[real].tolist()))
    return [replies[i : i + k] for i in range(0, len(replies), k)]


def score(reward, tokenizer, rows: list[dict], written: list[list[dict]], settings) -> torch.Tensor:
    """(题数, K) 的分：奖励模型的，或程序的。没有说完的回答不该学，是负无穷。"""
    if settings.selector == "judge":
        values = [
            [judge(row, reply["text"], reply["ended"]).score for reply in replies]
            for row, replies in zip(rows, written, strict=True)
        ]
        scores = torch.tensor(values)
    else:
        questions = [row for row, replies in zip(rows, written, strict=True) for _ in replies]
        flat = [reply for replies in written for reply in replies]
        scores = score_replies(reward, tokenizer, questions, flat).view(len(rows), -1)
    ended = torch.tensor([[reply["ended"] for reply in replies] for replies in written])
    return scores.masked_fill(~ended, -math.inf)


def best(written: list[list[dict]], scores: torch.Tensor) -> list[dict | None]:
    """每题分最高的；一个也没有说完，是 None。"""
    values, places = scores.max(1)
    return [
        None if math.isinf(value) else replies[place]
        for value, place, replies in zip(values.tolist(), places.tolist(), written, strict=True)
    ]


def as_chats(rows: list[dict], chosen: list[dict | None]) -> list[dict]:
    """挑出来的 → 训练的对话：只学这一个回答，上文里助手说过的话不学（weight 0）。"""
    chats = []
    for row, reply in zip(rows, chosen, strict=True):
        if reply is not None:
            context = [message | {"weight": 0} for message in row["messages"]]
            chats.append({"messages": [*context, {"role": "assistant", "content": reply["text"]}]})
    return chats


# ---------------------------------------------------------------- 2. 练一轮，量一量


def measure(model, tokenizer, questions: list[dict], written: list[list[dict]] | None, settings) -> dict:
    """小世界：各处同一个定义的指标。别的题没有标准答案，只看用词多样（written：这个模型写的回答）。"""
    if settings.dataset == "tiny_world":
        names = ("qa_accuracy", "preferred_rate", "judge_score", "small_talk", "distinct_2")
        found = measure_chat(model, tokenizer, questions)[0]
        return {name: found[name] for name in names}
    return {"distinct_2": distinct_n([replies[0]["text"] for replies in written or []])}


def at_inference(model, reward, tokenizer, questions: list[dict], settings) -> dict:
    """不训练，推理时写 K 个挑一个：程序评分与用词多样。"""
    written = write(model, tokenizer, questions, settings.k, settings, settings.seed)
    chosen = best(written, score(reward, tokenizer, questions, written, settings))
    texts = [reply["text"] for reply in chosen if reply]
    metrics = {"distinct_2_inference": distinct_n(texts)}
    if settings.dataset == "tiny_world":
        judged = [
            judge(q, r["text"], True).score if r else 0.0 for q, r in zip(questions, chosen, strict=True)
        ]
        metrics["judge_score_inference"] = sum(judged) / len(judged)
    return metrics


def one_round(
    part: Stage,
    model,
    teacher,
    reward,
    tokenizer,
    rows: list[dict],
    heldout: list[dict],
    k: int,
    written: list[list[dict]] | None = None,
) -> dict:
    """teacher 写，挑，model 照着学。written：早已写好的，每题至少 k 个，只看前 k 个。"""
    settings = part.settings
    if written is None:
        written = write(teacher, tokenizer, rows, k, settings, settings.seed + 1)
    written = [replies[:k] for replies in written]
    scores = score(reward, tokenizer, rows, written, settings)  # (题数, k)
    chosen = best(written, scores)
    chats = as_chats(rows, chosen)
    if not chats:
        raise UserError("没有一个回答说完了：把 --max_new_tokens 调大，或把 --temperature 调小。")
    mean = scores[scores.isfinite()].mean().item()
    picked = scores.max(1).values
    kept = picked[picked.isfinite()].mean().item()
    print(f"  {len(rows)} 题各写 {k} 个，平均 {mean:+.2f} 分；挑出 {len(chats)} 个，平均 {kept:+.2f} 分")
    train_on_chats(part, f"K={k}", model, tokenizer, chats)
    return measure(model, tokenizer, heldout, written, settings) | {"selected_score": kept}


def train(stage: Stage) -> dict:
    settings = stage.settings
    tokenizer, model = load_chat_lm(stage.model_path, stage.device)
    reward = None
    if settings.selector == "reward_model":
        reward = load_reward_model(stage.parents["reward_model"]["path"], tokenizer).to(stage.device).eval()
    teacher = model
    if settings.teacher != "self":
        if settings.teacher in CHAIN.scripts:
            found = chain_model(settings.teacher)
        else:
            found = chain_model(model=settings.teacher, source=settings.source)
        _, teacher = load_chat_lm(found["path"], stage.device)
    questions, heldout, data = load_train_and_eval(settings, "questions", to_questions)
    rows = drop_long(with_prompts(tokenizer, questions), prompt_length, settings.max_length, "题")
    heldout = drop_long(with_prompts(tokenizer, heldout), prompt_length, settings.max_length, "留出的题")
    share = len(rows) // settings.rounds  # 每轮一批新的题
    if not share:
        raise UserError(
            f"只有 {len(rows)} 道题，不够分成 {settings.rounds} 轮：把 --rounds 调小，或多给些题。"
        )
    shared = {"reward": reward, "tokenizer": tokenizer, "heldout": heldout}

    metrics = {f"{name}_before": v for name, v in measure(model, tokenizer, heldout, None, settings).items()}
    metrics |= at_inference(model, reward, tokenizer, heldout, settings)
    ks = [int(k) for k in settings.ks.split(",") if k.strip()]
    # 第一轮的回答只写一遍，最多的那个 K；小些的 K 就看前几个
    written = write(teacher, tokenizer, rows[:share], max([settings.k, *ks]), settings, settings.seed + 1)
    by_k = {}
    for k in ks:
        _, other = load_chat_lm(stage.model_path, stage.device)
        work = partial(
            one_round, model=other, teacher=teacher, rows=rows[:share], k=k, written=written, **shared
        )
        by_k[k] = run_part(stage, f"k-{k}", work)
    by_round = {}
    for number in range(1, settings.rounds + 1):
        some = rows[(number - 1) * share : number * share]
        mine = written if number == 1 else None
        work = partial(
            one_round, model=model, teacher=teacher, rows=some, k=settings.k, written=mine, **shared
        )
        by_round[number] = run_part(stage, f"round-{number}", work, model)
    by_k[settings.k] = by_round[1]
    metrics |= by_round[settings.rounds]
    metrics["rounds"] = {str(number): found for number, found in by_round.items()}
    metrics["ks"] = {str(k): by_k[k] for k in sorted(by_k)}
    draw = partial(draw_rounds, metrics=metrics)
    return stage.finish(model, tokenizer, metrics, data, [], draw=draw)


def draw_rounds(folder: Path, metrics: dict) -> None:
    """程序评分与用词多样，随轮数、随 K。"""
    if "judge_score" not in metrics:
        return
    for name, xlabel in (("rounds", "第几轮|round"), ("ks", "K")):
        found = metrics[name]
        xs = [int(x) for x in found]
        start = [0, *xs] if name == "rounds" else xs
        series = {}
        for key, label in (("judge_score", "程序评分|judge score"), ("distinct_2", "distinct-2")):
            ys = [found[x][key] for x in found]
            series[label] = (start, [metrics[f"{key}_before"], *ys] if name == "rounds" else ys)
        level = {"推理时挑|best-of-K at inference": metrics["judge_score_inference"]}
        line_chart(folder / f"{name}.svg", series, "best-of-K", xlabel, "", hlines=level)


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(BestOfKSettings, PRESETS, argv, CHAIN.full_model)
    parents = {"model": "sft"}
    if settings.selector == "reward_model":
        parents["reward_model"] = "reward"
    return run_stage("best_of_k", settings, parents, train, CHAIN)


if __name__ == "__main__":
    run_main(main)
