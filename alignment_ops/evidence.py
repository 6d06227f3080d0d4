"""五道门要看的证据：两个模型在同样的题上答得怎样，跑得多快，偏不偏。每样只在它那道门前才去量。"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

import own_questions
from candidates import talk_questions
from gates import comparison
from nlp_common.base.device import pick_device
from nlp_common.base.runs import load_run
from nlp_common.lm.chatml import prompt_ids
from nlp_common.lm.generation import pad_left, padded_positions
from nlp_common.lm.loading import load_chat_lm
from nlp_common.lm.replies import reply_to
from nlp_common.tiny.judge import judge
from nlp_common.tiny.world import heldout_questions
from private_questions import is_safe, private_questions
from stages import run_command

BIAS_SCAN = Path(__file__).resolve().parents[1] / "evaluation" / "bias_scan.py"
GATE_SEED = 5000  # 考题与训练的种子无关，训练时也没有见过（留出的那一边）
TEMPERATURE = 0.7  # 服务时的采样温度：过门时也照它采样
ROUNDS = 15  # 快慢：轮流跑几轮
PROMPTS, TOKENS = 16, 24  # 一轮：几个提示，各写几个 token


# ---------------------------------------------------------------- 1. 题


def gate_questions(n: int, own: str | None = None) -> dict[str, list[dict]]:
    """三套题，自己的文件 own 里有的换成自己的（写法见 own_questions.py）。小世界的：故事 n 道，寒暄、隐私各 4n 道（隐私里该拒绝的与看着像的各半）：好的候选也会忘掉一点，题少了常常看不清，见 README 的算式。"""
    built_in = {
        "quality": heldout_questions(n, GATE_SEED),
        "keep": talk_questions(4 * n, GATE_SEED, heldout=True),
        "safety": private_questions(4 * n, GATE_SEED, heldout=True),
    }
    return built_in | (own_questions.read_questions(own) if own else {})


# ---------------------------------------------------------------- 2. 答题


class Candidate:
    """一个等着过门的模型；用到才载入。temperature 是服务时的采样温度。"""

    def __init__(self, path: Path, temperature: float = TEMPERATURE):
        self.path, self.temperature = path, temperature
        self._loaded = None

    def load(self):
        if self._loaded is None:
            tokenizer, model = load_chat_lm(str(self.path), pick_device())
            self._loaded = tokenizer, model.eval()
        return self._loaded


def answers(candidate: Candidate, name: str, questions: list[dict], seed: int) -> dict[str, list[int]]:
    """一套题上的对错，一题一个 1 或 0。"""
    if name == "quality":
        greedy, sampled = replies(candidate, questions), replies(candidate, questions, seed)
        right = [is_right(q, r) for q, r in zip(questions, greedy, strict=True)]
        liked = [is_liked(q, r) for q, r in zip(questions, sampled, strict=True)]
        return {"right": right, "preferred": liked}
    if name == "keep":
        return {
            "right": [is_right(q, r) for q, r in zip(questions, replies(candidate, questions), strict=True)]
        }
    safe = [is_right(q, r) for q, r in zip(questions, replies(candidate, questions, seed), strict=True)]
    return {
        "refused": [ok for ok, question in zip(safe, questions, strict=True) if question["secret"]],
        "look_alike": [ok for ok, question in zip(safe, questions, strict=True) if not question["secret"]],
    }


def is_right(question: dict, reply: dict) -> int:
    """答对了是 1；该拒绝的，拒绝了才对。"""
    if question.get("own"):
        return int(own_questions.is_right(question, reply))
    if question.get("secret"):
        return int(is_safe(question, reply["text"], reply["ended"]))
    return int(judge(question, reply["text"], reply["ended"]).right)


def is_liked(question: dict, reply: dict) -> int:
    """又对、又完整、又有礼；自己的题只看对不对。"""
    if question.get("own"):
        return is_right(question, reply)
    return int(judge(question, reply["text"], reply["ended"]).preferred)


def served(candidate: Candidate, questions: dict[str, list[dict]], seed: int) -> dict[str, list]:
    """上线以后的每道题：没有解决是 1（unsolved），该拒绝的没有拒绝是 1（unsafe）；kinds 是哪一类题，给流量用。"""
    kinds = [kind for kind, rows in questions.items() for _ in rows]
    rows = [question for each in questions.values() for question in each]
    found: dict[str, list] = {"kinds": kinds, "unsolved": [], "unsafe": []}
    for question, reply in zip(rows, replies(candidate, rows, seed), strict=True):
        wrong = 1 - is_right(question, reply)
        found["unsolved"].append(wrong)
        found["unsafe"].append(wrong if question.get("secret") else 0)
    return found


def replies(candidate: Candidate, questions: list[dict], seed: int | None = None) -> list[dict]:
    """没有 seed 是贪心；有就照服务的温度采样。"""
    tokenizer, model = candidate.load()
    if seed is None:
        return reply_to(model, tokenizer, questions)
    return reply_to(model, tokenizer, questions, temperature=candidate.temperature, seed=seed)


# ---------------------------------------------------------------- 3. 快慢


def speed_ratios(new: Candidate, old: Candidate, questions: list[dict], rounds: int = ROUNDS) -> list[float]:
    """轮流跑几轮，每轮 new 的时间除以 old 的。各写 TOKENS 个 token，不看说完没有：比的是一个 token 多久。"""
    batches = {}
    for side in (new, old):
        tokenizer, _ = side.load()
        batches[side] = [prompt_ids(tokenizer, question["messages"]) for question in questions[:PROMPTS]]
        write(side, batches[side])  # 头一遍不算
    ratios = []
    for number in range(rounds):
        order = (new, old) if number % 2 else (old, new)  # 谁先谁后轮着来
        seconds = {side: write(side, batches[side]) for side in order}
        ratios.append(seconds[new] / seconds[old])
    return ratios


@torch.inference_mode()
def write(side: Candidate, prompts: list[list[int]]) -> float:
    """写 TOKENS 个 token 要几秒：CPU 上看处理器的时间，别的程序在抢也不影响；加速器上看钟。"""
    tokenizer, model = side.load()
    started = clock(model.device)
    ids, mask = pad_left(prompts, tokenizer.pad_token_id, model.device)
    out = model(input_ids=ids, attention_mask=mask, position_ids=padded_positions(mask), logits_to_keep=1)
    for _ in range(TOKENS):
        token = out.logits[:, -1:].argmax(-1)  # (B, 1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        out = model(
            input_ids=token,
            attention_mask=mask,
            position_ids=padded_positions(mask)[:, -1:],
            past_key_values=out.past_key_values,
        )
    return clock(model.device) - started


def clock(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize()
    return time.perf_counter()


# ---------------------------------------------------------------- 4. 偏见


def bias_comparisons(path: Path, out: Path, language: str) -> list[dict]:
    """evaluation/bias_scan.py 查一遍，像读者在终端里那样；结果在 out。"""
    options = ["--models", str(path), "--language", language, "--calibrate", "false"]
    command = [
        sys.executable,
        str(BIAS_SCAN),
        "--preset",
        "tiny",
        *options,
        "--output_dir",
        str(out),
        "--retrain",
    ]
    run_command("查偏见", command, out.with_name(f"{out.name}.log"))
    run = load_run(out)
    assert run is not None
    rows = run["metrics"][str(path)]["comparisons"]
    return [comparison({"name": name} | row) for name, row in rows.items()]
