"""小世界的工具，和故意让它们出错：报错、超时、给一串乱码；把模型写对的调用故意写坏。"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from functools import partial

import tool_world
from nlp_common.lm.tool_text import CALL, CALL_END, call_text
from tools import Tool

WAYS = ("error", "timeout", "rubbish")


def world_tools(task: dict) -> dict[str, Tool]:
    """一道题里列出来的工具，照 tools.Tool 的样子。"""
    named = {tool["function"]["name"]: tool for tool in task["tools"]}
    return {name: Tool(name, schema, partial(_run, task, name)) for name, schema in named.items()}


def _run(task: dict, name: str, /, **arguments: object) -> str:
    return tool_world.run_tool(task, {"name": name, "arguments": arguments})


class Unreliable:
    """每次有 rate 的机会不成；failures 记着几次没有成。"""

    def __init__(self, rate: float, seed: str):
        self.rate, self.rng, self.failures = rate, random.Random(seed), 0

    def wrap(self, tools: dict[str, Tool]) -> dict[str, Tool]:
        return {name: replace(tool, run=partial(self.run, tool)) for name, tool in tools.items()}

    def run(self, tool: Tool, /, **arguments: object) -> str:
        if self.rng.random() >= self.rate:
            return tool.run(**arguments)
        self.failures += 1
        how = self.rng.choice(WAYS)
        if how == "error":
            raise ConnectionError(self.rng.choice(tool_world.PASSING[1:]))
        if how == "timeout":
            raise TimeoutError
        return tool_world.rubbish(self.rng)


def spoiled_text(task: dict, rng: random.Random) -> str:
    """第一步该有的调用，故意写坏：tool_world.spoil 的五种，再加一种写坏了 JSON 的。"""
    calls = task["steps"][0]
    if rng.random() < 1 / 6:
        written = json.dumps(calls[0], ensure_ascii=False)
        broken = written.replace('"arguments"', "arguments", 1).replace("}", "", 1)
        rest = "\n" + call_text(calls[1:]) if calls[1:] else ""
        return f"{CALL}\n{broken}\n{CALL_END}{rest}"
    return call_text([tool_world.spoil(call, task, rng) for call in calls])
