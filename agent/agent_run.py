"""一次运行记着什么：限度、每一步、每个调用；提示太长了怎样缩短。循环在 react_agent.py。"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from agent_models import Model, Said
from agent_secrets import Hider
from nlp_common.lm.reply_parser import BrokenCall, Call
from tools import Tool

WHY = {
    "answered": "答完了。",
    "empty": "模型什么也没说。",
    "steps": "步数用完了。",
    "time": "时间用完了。",
    "tokens": "token 用完了。",
    "loop": "原地打转：同样的调用，同样的结果，一再地来。",
    "length": "这一轮太长，没有说完（--max_new_tokens）。",
    "too_long": "提示太长，缩短了也放不下。",
    "stopped": "有人叫停。",
    "no_answer": "服务器没有回答。",
}
CUT = "……（提示太长，这里缩短了；原来有 {n} 个字）"
KEEP = 80  # 缩短的结果留几个字


@dataclass(frozen=True)
class Budget:
    """一次运行的限度。"""

    steps: int = 8  # 模型最多说几轮
    seconds: float = 120.0
    tokens: int = 4096  # 一共最多写几个
    reply_tokens: int = 512  # 一轮最多写几个
    calls: int = 8  # 一轮最多几个调用
    repeats: int = 3  # 同样的调用、同样的结果，第几次就不再继续
    retries: int = 1  # 工具出错、超时，循环替它再试几次（会改东西的工具不替）
    pause: float = 0.5  # 秒；再试之前等多久，每次加倍
    tool_seconds: float = 10.0
    result_chars: int = 4000


@dataclass
class CallRecord:
    """一个调用和它的结果。kind 同 tools.Result，另有 broken（读不出）、skipped（没有做）、stopped（被打断）。"""

    name: str
    arguments: dict
    written: str  # 坏了的调用，原文
    kind: str
    result: str
    seconds: float = 0.0
    attempts: int = 1


@dataclass
class Step:
    """模型说的一轮，和它叫做的事。"""

    number: int
    prompt: str
    text: str  # 模型写的，原样
    thinking: str
    content: str
    prompt_tokens: int
    tokens: int
    seconds: float
    shortened: str = ""
    mended: list[str] = field(default_factory=list)  # JSON 修了哪里
    calls: list[CallRecord] = field(default_factory=list)


class Watcher:
    """在旁边看着的：终端、网页各写一个。这一个什么也不做。"""

    def piece(self, text: str) -> None:
        """模型又写了几个字，原样。"""

    def calling(self, call: Call | BrokenCall) -> None: ...

    def called(self, record: CallRecord) -> None: ...

    def said(self, step: Step) -> None: ...


def refuse(call: Call) -> bool:
    """没有人可问的时候：会改东西的都不许。"""
    return False


@dataclass
class Agent:
    """模型、工具、限度，和该问的那个人。"""

    model: Model
    tools: dict[str, Tool]
    system: str = ""
    budget: Budget = field(default_factory=Budget)
    confirm: Callable[[Call], bool] = refuse  # 只有它能许可：文字里写什么都不算
    hider: Hider = field(default_factory=Hider)
    watcher: Watcher = field(default_factory=Watcher)

    @property
    def schemas(self) -> list[dict]:
        return [tool.schema for tool in self.tools.values()]


@dataclass
class Run:
    """一次运行：从用户的一句话，到停下。history 是整段对话，接着变长。"""

    agent: Agent
    history: list[dict]
    question: str
    model: str
    stop: threading.Event = field(default_factory=threading.Event)
    steps: list[Step] = field(default_factory=list)
    seen: Counter = field(default_factory=Counter)  # (调用, 结果) → 几轮里有它
    answer: str = ""
    why: str = ""  # 为什么停下，WHY 里的一个；"" 是还没有停
    tokens: int = 0
    seconds: float = 0.0
    started: float = field(default_factory=time.monotonic)
    waited: float = 0.0  # 等人许可的时间，不算在限度里

    @classmethod
    def begin(cls, agent: Agent, history: list[dict], stop: threading.Event | None = None) -> Run:
        return cls(agent, history, history[-1]["content"], agent.model.name, stop or threading.Event())

    @property
    def deadline(self) -> float:
        return self.started + self.agent.budget.seconds + self.waited

    def finish(self, why: str, answer: str = "") -> None:
        self.why, self.answer, self.seconds = why, answer, time.monotonic() - self.started

    def out_of_budget(self) -> str:
        """有没有哪一样用完了。"""
        budget = self.agent.budget
        if self.stop.is_set():
            return "stopped"
        if max(self.seen.values(), default=0) >= budget.repeats:
            return "loop"
        if len(self.steps) >= budget.steps:
            return "steps"
        if time.monotonic() > self.deadline:
            return "time"
        return "tokens" if self.tokens >= budget.tokens else ""

    def ask(self, call: Call) -> bool:
        """问那个人；等他的时间不算。"""
        started = time.monotonic()
        try:
            return self.agent.confirm(call) is True
        finally:
            self.waited += time.monotonic() - started


# ---------------------------------------------------------------- 提示太长


def fit_prompt(run: Run) -> tuple[list[dict] | None, str]:
    """→ (给模型看的对话, 缩短了什么)；怎样也放不下，是 (None, …)。history 本身不动。

    先缩短旧的结果（这一步刚拿到的留着），再不够就把最早的几问整个不带，最后连刚拿到的结果也缩短。
    """
    agent = run.agent
    room = agent.model.room - agent.budget.reply_tokens
    system = [{"role": "system", "content": agent.system}] if agent.system else []
    for turns, note in shorter_and_shorter(run.history):
        messages = [*system, *turns]
        if agent.model.count(messages, agent.schemas) <= room:
            return messages, note
    return None, "缩短了结果、只留这一问，还是放不下"


def shorter_and_shorter(history: list[dict]):
    """一段比一段短的对话，和缩短了什么。"""
    yield history, ""
    fresh = len(history)  # 这一步刚拿到的结果从哪里开始
    while fresh and history[fresh - 1]["role"] == "tool":
        fresh -= 1
    old = [i for i, turn in enumerate(history[:fresh]) if turn["role"] == "tool" and is_long(turn)]
    turns = list(history)
    for count, i in enumerate(old, 1):
        turns[i] = cut(history[i])
        yield list(turns), f"旧的 {count} 个结果缩短了"
    note = f"旧的 {len(old)} 个结果缩短了" if old else ""
    starts = [i for i, turn in enumerate(history) if turn["role"] == "user"]
    for dropped, start in enumerate(starts[1:], 1):
        note = "，".join(
            filter(None, [f"旧的 {len(old)} 个结果缩短了" if old else "", f"最早的 {dropped} 问没有带上"])
        )
        yield turns[start:], note
    turns = [cut(turn) if turn["role"] == "tool" and is_long(turn) else turn for turn in turns]
    yield turns[starts[-1] :], "，".join(filter(None, [note, "刚拿到的结果也缩短了"]))


def is_long(turn: dict) -> bool:
    return len(turn["content"]) > KEEP + len(CUT)


def cut(turn: dict) -> dict:
    text = turn["content"]
    return turn | {"content": text[:KEEP] + CUT.format(n=len(text))}


def signature(call: Call | BrokenCall, record: CallRecord) -> tuple[str, str]:
    """认出"同样的调用、同样的结果"：参数的次序不算。"""
    if isinstance(call, BrokenCall):
        return call.text, record.result
    return call.name + json.dumps(call.arguments, ensure_ascii=False, sort_keys=True), record.result


def step_of(run: Run, said: Said, thinking: str, content: str, shortened: str, mended: list[str]) -> Step:
    """said 的一步，记进 run。"""
    step = Step(
        len(run.steps) + 1, said.prompt, said.text, thinking, content,
        said.prompt_tokens, said.tokens, round(said.seconds, 4), shortened, mended,
    )  # fmt: skip
    run.steps.append(step)
    run.tokens += said.tokens
    run.agent.watcher.said(step)
    return step
