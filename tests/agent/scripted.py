"""测试用的：照剧本说话的模型，和几个工具。"""

import json

from agent_models import Said, silent
from agent_run import Agent, Budget, Run
from nlp_common.lm.tool_text import call_text
from react_agent import run_agent
from tools import Tool


class Script:
    """照剧本一轮一轮地说；剧本里可以是文字、Said，或一个函数（messages）→ 文字。最后一句一直说下去。"""

    name = "剧本"

    def __init__(self, *lines, room=100_000):
        self.lines, self.room, self.seen = list(lines), room, []

    def count(self, messages, tools):
        return sum(len(each["content"]) for each in messages)

    def say(self, messages, tools, max_tokens, deadline, stop, piece=silent):
        self.seen.append(messages)
        line = self.lines.pop(0) if len(self.lines) > 1 else self.lines[0]
        line = line(messages) if callable(line) else line
        said = line if isinstance(line, Said) else Said(line, tokens=len(line), prompt=json.dumps(messages))
        for char in said.text:
            piece(char)
        return said


def call(name, **arguments):
    return call_text([{"name": name, "arguments": arguments}])


def schema(name, *arguments, description="说明"):
    properties = {each: {"type": "string"} for each in arguments}
    parameters = {"type": "object", "properties": properties, "required": list(arguments)}
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": parameters},
    }


def tool(name, run, *arguments, writes=False, description="说明"):
    return {name: Tool(name, schema(name, *arguments, description=description), run, writes)}


def play(tools, *lines, question="问", history=None, room=100_000, budget=None, **more):
    """→ 停下了的 Run；run.agent.model.seen 是每一轮给模型看的。"""
    budget = Budget(**{"pause": 0.0, **(budget or {})})
    agent = Agent(Script(*lines, room=room), tools, budget=budget, **more)
    return run_agent(Run.begin(agent, [*(history or []), {"role": "user", "content": question}]))


def results(run):
    return [each["content"] for each in run.history if each["role"] == "tool"]


def kinds(run):
    return [each.kind for step in run.steps for each in step.calls]
