"""code_eval.py 的题从哪里来，答案由谁写：题目文件、答案文件、模型，或知道他会多少的模拟的程序员。"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from answering import load_answerer, replies, split_names
from code_tasks import TASKS
from nlp_common.base.errors import UserError
from nlp_common.base.runs import file_sha256
from nlp_common.data.rows import sha256_of_rows
from question_files import place_of, read_questions

FIELDS = ("task_id", "prompt", "entry_point", "test")
ABILITY = (0.6, 0.9)  # 模拟的程序员：每道题做对的概率从这个 Beta 分布里抽，有的题几乎总错，有的几乎总对


def load_tasks(dataset: str | None) -> tuple[list[dict], dict]:
    """题，和它从哪里来；task_id 重复、测试里没有 check 也没有断言，是 UserError。"""
    if dataset is None:
        return TASKS, {
            "name": "code_tasks",
            "kind": "builtin",
            "rows": len(TASKS),
            "sha256": sha256_of_rows(TASKS),
        }
    tasks = read_questions(dataset, FIELDS)
    seen: dict[str, int] = {}
    for place, task in enumerate(tasks, 1):
        if fault := task_fault(task):
            raise UserError(f"{dataset} {place_of(dataset, place)}的 {fault}。")
        if earlier := seen.get(task["task_id"]):
            raise UserError(
                f"{dataset} {place_of(dataset, place)}的 task_id {task['task_id']} 与{place_of(dataset, earlier)}重复。"
            )
        seen[task["task_id"]] = place
    return tasks, {
        "name": Path(dataset).name,
        "kind": "file",
        "rows": len(tasks),
        "sha256": file_sha256(Path(dataset)),
    }


def task_fault(task: dict) -> str | None:
    """一道题的毛病；没有是 None。"""
    for field in FIELDS:
        if not isinstance(task[field], str):
            return f"{field} 要是文字，不是 {type(task[field]).__name__}"
    if "assert" not in task["test"] and "def check" not in task["test"]:
        return "test 里没有 assert，也没有 def check：什么答案都会通过"
    if not re.search(rf"def {re.escape(task['entry_point'])}\b", task["prompt"]):
        return f"prompt 里没有 def {task['entry_point']}"
    return None


def answers_of_all(settings, tasks: list[dict]) -> Iterator[tuple]:
    """一个一个地给出 (名字, 编号, 每题几份答案, 知道的话：每题做对的概率)。"""
    if settings.samples:
        answers = load_samples(settings.samples, tasks)
        yield (
            Path(settings.samples).stem,
            f"samples:{file_sha256(Path(settings.samples))[:12]}",
            answers,
            None,
        )
        return
    for name in split_names(settings.models):
        if name == "simulated":
            yield name, "simulated", *simulated(tasks, settings.n, settings.seed)
        else:
            yield name, *written_by(name, tasks, settings), None


def load_samples(path: str, tasks: list[dict]) -> list[list[str]]:
    """答案文件 → 每道题的几份答案；不认识的题、没有答案的题，是 UserError。"""
    names = {task["task_id"]: place for place, task in enumerate(tasks)}
    answers: list[list[str]] = [[] for _ in tasks]
    for place, row in enumerate(read_questions(path, ("task_id",)), 1):
        if row["task_id"] not in names:
            raise UserError(f"{path} {place_of(path, place)}的 task_id {row['task_id']} 不在题目里。")
        if not isinstance(row.get("completion"), str):
            raise UserError(f"{path} {place_of(path, place)}没有 completion，或不是文字。")
        answers[names[row["task_id"]]].append(row["completion"])  # 空的也算一份：没写出来就是没过
    if missing := [task["task_id"] for task, each in zip(tasks, answers, strict=True) if not each]:
        raise UserError(f"{path} 里有 {len(missing)} 道题没有答案：{'、'.join(missing[:5])} …")
    return answers


def simulated(tasks: list[dict], n: int, seed: int) -> tuple[list[list[str]], np.ndarray]:
    """模拟的程序员：每道题有个做对的概率 p，n 份里每份以 p 写对，否则是一种常见的错法。"""
    rng = np.random.default_rng(seed)
    chances = rng.beta(*ABILITY, size=len(tasks))
    answers = []
    for task, p in zip(tasks, chances, strict=True):
        wrong = task.get("wrong") or ["    raise NotImplementedError\n"]
        if not task.get("canonical_solution"):
            raise UserError(
                f"模拟的程序员要有标准答案，题目 {task['task_id']} 没有：请用 --models 或 --samples。"
            )
        answers.append(
            [
                task["canonical_solution"] if rng.random() < p else wrong[rng.integers(len(wrong))]
                for _ in range(n)
            ]
        )
    return answers, chances


def written_by(name: str, tasks: list[dict], settings) -> tuple[str, list[list[str]]]:
    """让模型写：每道题采样 n 份 → (编号, 答案)。"""
    answerer = load_answerer(name, settings.source)
    ask = "请补全下面的 Python 函数。只写代码，不解释。\n```python\n{}```"
    questions = [
        {"messages": [{"role": "user", "content": ask.format(task["prompt"])}]}
        for task in tasks
        for _ in range(settings.n)
    ]
    print(f"{name} 写 {len(questions)} 份答案 …")
    written = replies(
        answerer, questions, settings.max_new_tokens, settings.temperature, settings.top_p, settings.seed
    )
    texts = [reply["text"] for reply in written]
    return answerer.id, [texts[i * settings.n : (i + 1) * settings.n] for i in range(len(tasks))]


def code_of(task: dict, answer: str) -> str:
    """一份回答 → 能运行的整段代码：有代码块就取它；里面没有写函数头，就接在题面后面。"""
    block = re.search(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", answer, re.DOTALL)
    code = block[1] if block else answer
    if re.search(rf"^(async )?def {re.escape(task['entry_point'])}\b", code, re.MULTILINE):
        return f"{task['prompt']}    pass\n\n\n{code}"  # 题面里的 import 与别的函数留着，这个函数由后写的代替
    return task["prompt"] + code
