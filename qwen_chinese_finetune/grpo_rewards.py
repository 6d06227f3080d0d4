"""GRPO 的回答与奖励：一题写几个回答，由验证器、奖励模型或读者自己的一个 Python 文件打分：(题, 回答, 采样) → (N,) 的分数。

自己的文件里写一个函数：

    def reward(questions, replies, ended):
        \"\"\"questions：每个回答的题（数据里的一行）；replies：回答的文字；ended：自己说完了没有。返回同样多个数。\"\"\"
        return [len(reply) / 100 if end else 0.0 for reply, end in zip(replies, ended)]
"""

from __future__ import annotations

import importlib.util
import math
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from nlp_common.base.errors import UserError
from nlp_common.data.chats import to_questions
from nlp_common.lm.replies import reply_of
from nlp_common.lm.rollout import Rollout, reference_scores, roll_out, score_responses
from nlp_common.tiny.judge import judge
from ppo_alignment import response_rewards

ENDINGS = "。．.!！?？\"”』」'’ \t\r\n"  # 答案后面可以有的


@dataclass
class Answers:
    """一批回答：B 道题，每题 G 个，同题的相邻，共 N = B·G 个。"""

    rollout: Rollout
    rewards: Tensor  # (N,)
    replies: list[dict]
    questions: list[dict]  # N 个


def sample(policy, rows, score, tokenizer, settings, accelerator, generator) -> Answers:
    """每道题（带 "prompt"）写 G 个回答，打分。几个进程合起来，采出的与一个进程采一大批相同。"""
    group = settings.num_generations
    share = (accelerator.process_index, accelerator.num_processes)
    sampling = (settings.max_new_tokens, settings.temperature, generator, share, group)
    prompts = [row["prompt"] for row in rows]
    with accelerator.autocast():
        rollout = roll_out(accelerator.unwrap_model(policy), prompts, tokenizer, *sampling)
        replies = [
            reply_of(tokenizer, ids[:n])
            for ids, n in zip(rollout.responses.tolist(), rollout.mask.sum(1).tolist(), strict=True)
        ]
        questions = [row for row in rows for _ in range(group)]
        rewards = score(questions, replies, rollout)  # (N,)
    return Answers(rollout, rewards.float(), replies, questions)


def verify(question: dict, reply: str, ended: bool) -> float:
    """验证器：程序知道标准答案，对就是对。小世界的题按评语分级（0～1），别的题答对是 1，不对是 0。

    没说完的一律 0，哪怕里面已经有标准答案：不然模型会学着把可能的答案都写上，写到被截断为止。
    """
    if not ended:
        return 0.0
    if "sentence" in question:
        return judge(question, reply, ended).score
    return float(says_last(reply, str(question["answer"])))


def to_answered(rows: list[dict], where: str, needed: bool) -> list[dict]:
    """题目，连同标准答案；验证器要答案，哪一行没有就说是哪一行。"""
    for number, row in enumerate(rows, 1):
        if needed and not str(row.get("answer") or "").strip():
            raise UserError(
                f"{where} 第 {number} 条没有标准答案：--reward verifier 要每条都有 answer 一栏。"
                "没有标准答案的题，用 --reward reward_model 或 --reward_file。"
            )
    return to_questions(rows, where, keep=("answer",))


def says_last(reply: str, answer: str) -> bool:
    """回答最后说的是不是标准答案；"含有就算"会奖励把十个地方全列一遍的回答。数要整个相等：12 不是 2。"""
    said, answer = reply.rstrip(ENDINGS), answer.strip().rstrip(ENDINGS)
    before = said.removesuffix(answer)
    if before == said:
        return False
    is_word = answer[0].isascii() and answer[0].isalnum()
    return not (is_word and before and before[-1].isascii() and (before[-1].isalnum() or before[-1] in ".,-"))


def contains(question: dict, reply: str, ended: bool) -> float:
    """一个写坏的验证器，只用来看它的空子：含有标准答案就给分。"""
    return float(str(question["answer"]) in reply)


# ---------------------------------------------------------------- 打分：(题, 回答, 采样) → (N,)


def by_verifier(
    check: Callable, questions: list[dict], replies: list[dict], rollout: Rollout
) -> torch.Tensor:
    scores = [check(q, r["text"], r["ended"]) for q, r in zip(questions, replies, strict=True)]
    return torch.tensor(scores, device=rollout.ids.device)


def by_reward_model(
    model, normal: tuple[float, float, float], pad_id: int, size: int, questions, replies, rollout: Rollout
) -> torch.Tensor:
    """奖励模型的分，与 PPO 里一样按 SFT 回答的均值、标准差归一，没说完再扣几分：normal 是这三个数。"""
    scores = score_responses(model, rollout, pad_id, size)
    return response_rewards(scores, rollout.ended, *normal)


def by_file(path: str, reward: Callable, questions: list[dict], replies: list[dict], rollout: Rollout):
    """调用读者的函数；出了错、给的数不对，说出是哪一行。"""
    texts, ended = [r["text"] for r in replies], [r["ended"] for r in replies]
    try:
        scores = reward(questions, texts, ended)
        if isinstance(scores, Iterator):  # 写成生成器的，到这里才真的运行
            scores = list(scores)
    except (Exception, SystemExit) as error:
        raise UserError(f"{_line_of(path, error)}：{type(error).__name__}：{error}。") from None
    where = f"{path} 第 {reward.__code__.co_firstlineno} 行的 reward"
    try:
        numbers = [float(score) for score in scores]
    except (TypeError, ValueError):
        raise UserError(f"{where} 要返回 {len(texts)} 个数的列表，返回的是 {_short(scores)}。") from None
    if len(numbers) != len(texts):
        raise UserError(f"{where} 收到 {len(texts)} 个回答，返回了 {len(numbers)} 个数：要一个回答一个数。")
    for number, score in enumerate(numbers, 1):
        if not math.isfinite(score):
            raise UserError(f"{where} 给第 {number} 个回答（{_short(texts[number - 1])}）的分是 {score}。")
    return torch.tensor(numbers, device=rollout.ids.device)


def load_reward_file(path: str) -> Callable:
    """→ 文件里的 reward 函数；读不到、写错了是 UserError，说出第几行。"""
    file = Path(path).expanduser()
    if not file.is_file():
        what = "是文件夹，要给一个 Python 文件" if file.is_dir() else "不存在"
        raise UserError(f"--reward_file {path} {what}。")
    spec = importlib.util.spec_from_loader("reward_file", loader=None)
    module = importlib.util.module_from_spec(spec)
    try:
        exec(compile(file.read_text(encoding="utf-8"), path, "exec"), module.__dict__)
    except SyntaxError as error:
        raise UserError(f"{path} 第 {error.lineno} 行有语法错误：{error.msg}。") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} 不是 UTF-8 编码的文本：另存为 UTF-8 再用。") from None
    except (Exception, SystemExit) as error:
        raise UserError(f"{_line_of(path, error)}：{type(error).__name__}：{error}。") from None
    reward = getattr(module, "reward", None)
    if not hasattr(reward, "__code__"):
        raise UserError(f"{path} 里要有一个函数 def reward(questions, replies, ended)，返回每个回答的分。")
    if reward.__code__.co_argcount != 3:
        raise UserError(
            f"{path} 第 {reward.__code__.co_firstlineno} 行的 reward 要收三个参数（questions, replies, ended），"
            f"现在收 {reward.__code__.co_argcount} 个。"
        )
    return reward


def _line_of(path: str, error: BaseException) -> str:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return f"{path} 第 {lines[-1]} 行出错" if lines else f"{path} 出错"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"


def make_score(
    settings, tokenizer, reference, reward_model, prompts: list[list[int]], n_rows: int
) -> Callable:
    """按 --reward、--reward_file 选一种打分。n_rows：所有进程一步共几个回答，量 SFT 的分时一次写这么多。"""
    if settings.reward_file:
        print(f"  用 {settings.reward_file} 里的 reward 打分。")
        return partial(by_file, settings.reward_file, load_reward_file(settings.reward_file))
    if settings.reward == "verifier":
        return partial(by_verifier, verify)
    sampling = (settings.max_new_tokens, settings.temperature, settings.seed, n_rows)
    mean, std = reference_scores(reference, reward_model, prompts, tokenizer, *sampling)
    print(f"  SFT 的回答平均 {mean:+.2f} 分，标准差 {std:.2f}：奖励按它归一。")
    normal = (mean, std, settings.missing_end_penalty)
    return partial(by_reward_model, reward_model, normal, tokenizer.pad_token_id, settings.micro_batch_size)
