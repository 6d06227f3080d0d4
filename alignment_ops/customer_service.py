"""客服一周里的几件事：机器人回答、客户点击、几个训练一起做、在主管的题上打分。"""

from __future__ import annotations

import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from customers import BRUSHED, DRAFTS, Reply, Vote, collect_votes, error_rates, solves, traffic, with_prompt
from feedback import capped
from nlp_common.base.device import accelerator_available, pick_device
from nlp_common.lm.loading import load_chat_lm
from nlp_common.lm.replies import reply_to
from nlp_common.tiny import world
from stages import run_stage, write_rows

if TYPE_CHECKING:
    from customer_alignment import Arm, CustomerSettings

WATCHED = ("color", "time", "food")  # 网页上各跟着看一道题
FEW = 16  # 一样不到这么多行，这一周就不训练


def serve(bot: str, arm: Arm, week: int, settings: CustomerSettings) -> tuple[list[Reply], list[Vote]]:
    """一周的回答，和过了上限的点击。各条线的问题相同，客户也相同，只是点错的多少不同。"""
    questions = traffic(settings.n_questions, settings.seed, week)
    replies = []
    for draft in range(DRAFTS):
        said = answer(bot, questions, seed=week * DRAFTS + draft)
        for question, reply in zip(questions, said, strict=True):
            replies.append(
                Reply(question, reply["text"], solves(question, reply["text"], reply["ended"]), draft)
            )
    errors = error_rates(settings.n_customers, arm.noise, settings.seed)
    votes = collect_votes(replies, 0, errors, random.Random(f"votes-{settings.seed}-{week}"))
    return replies, capped(votes, settings.cap)


def answer(
    bot: str | Path, questions: list[dict], seed: int = 0, prompt: str | None = None, temperature: float = 1.0
) -> list[dict]:
    """机器人回答一批题；温度 1 采样，每次说的不一样，客户才有得挑。"""
    tokenizer, model = load_chat_lm(str(bot), pick_device())
    model.eval()
    asked = [with_prompt(question, prompt) for question in questions]
    return reply_to(model, tokenizer, asked, temperature=temperature, seed=seed)


def train_together(jobs: list[tuple], settings: CustomerSettings) -> None:
    """jobs：（阶段，结果的文件夹，从哪个机器人学起，行）。CPU 上两个一起训练，各用一个核；做完了的不重做。"""
    at_once = 1 if accelerator_available() else min(2, os.cpu_count() or 1)
    with ThreadPoolExecutor(at_once) as pool:
        running = [pool.submit(train_one, *job, settings, at_once) for job in jobs]
    for each in running:
        each.result()  # 没有训练成的，错误在这里抛出来


def train_one(
    stage: str, out: Path, bot: str, rows: list[dict], settings: CustomerSettings, at_once: int
) -> dict:
    """几百行，没有几行可以留出；好不好看主管的题，不看留出的行。"""
    data = write_rows(out.with_name(f"{out.name}.jsonl"), rows)
    return run_stage(
        stage, out, bot, data, settings.preset, threads=1 if at_once > 1 else None, seed=settings.seed,
        learning_rate=settings.learning_rate, eval_dataset=data, max_eval_samples=FEW,
    )  # fmt: skip


def enough(stage: str, rows: list[dict]) -> bool:
    """这一周的行够不够训练：KTO 要赞、踩都有。"""
    if stage == "dpo":
        return len(rows) >= FEW
    n_up = sum(row["label"] for row in rows)
    return min(n_up, len(rows) - n_up) >= FEW // 2


def score(bot: Path, golden: list[dict]) -> dict:
    """在主管的题上：每题解决了没有（right 只看答对）、旧记录敷衍的那两种、寒暄还会不会。"""
    said = answer(bot, golden)
    each = [solves(q, reply["text"], reply["ended"]) for q, reply in zip(golden, said, strict=True)]
    brushed = [ok for ok, question in zip(each, golden, strict=True) if question["slot"] in BRUSHED]
    talk = world.small_talk_questions()
    known = [
        solves(q, reply["text"], reply["ended"])
        for q, reply in zip(talk, answer(bot, talk, temperature=0.0), strict=True)
    ]
    return {
        "bot": str(bot),
        "solved": sum(each) / len(each),
        "solved_brushed": sum(brushed) / max(1, len(brushed)),
        "small_talk": sum(known) / len(known),
        "each": [int(ok) for ok in each],
        "watched": {str(n): {"text": said[n]["text"], "solved": each[n]} for n in watched(golden)},
    }


def watched(golden: list[dict]) -> list[int]:
    """跟着看的那几道题在 golden 里的位置：WATCHED 里每一种的第一道。"""
    slots = [question["slot"] for question in golden]
    return [slots.index(slot) for slot in WATCHED if slot in slots]
