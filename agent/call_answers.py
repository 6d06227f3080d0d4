"""evaluate_tools.py 的回答从哪里来：本机的模型、OpenAI 接口的服务器、一个文件；和怎样从回答里读出调用。

一道题的回答是 ``[[文字, …], …]``：每一轮用户的话，模型说了几次（做了调用、看了结果，再说）。单轮的题只有一次。
"""

from __future__ import annotations

import ast
import json
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent_models import LocalModel, Model
from call_grammar import CallGrammar, generate_call
from call_questions import Question, json_lines
from nlp_common.base.errors import UserError
from nlp_common.lm.reply_parser import BrokenCall, Call, parse_reply, read_values
from nlp_common.lm.tool_text import CALL, call_text

MOST_STEPS = 6  # 多轮的题，一轮里最多说几次（BFCL 是 20）
ANSWER_NAMES = ("result", "answer", "response")


# ---------------------------------------------------------------- 1. 文字 → 调用


def read_calls(text: str, tools: list[dict]) -> list[Call | BrokenCall]:
    """一次回答 → 调用；一个也没有就是空的。

    认三种写法：Qwen 的 <tool_call>{…}</tool_call>；BFCL 常见的 [工具(参数=值), …]；JSON 的列表。
    有的服务器不许工具名里有点，写成下划线的还原回来。
    """
    calls = parse_reply(text).calls if CALL in text else python_calls(text, tools) or json_calls(text)
    real = {tool["function"]["name"].replace(".", "_"): tool["function"]["name"] for tool in tools}
    return [
        Call(real.get(call.name, call.name), call.arguments) if isinstance(call, Call) else call
        for call in calls
    ]


def python_calls(text: str, tools: list[dict]) -> list[Call]:
    """[f(a=1), g(b="x")] → 调用；不是这样写的是空的。没有写参数名的，照说明里的次序。"""
    try:
        tree = ast.parse(text.strip().strip("`").strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    nodes = tree.elts if isinstance(tree, ast.List | ast.Tuple) else [tree]
    names = {
        tool["function"]["name"]: list((tool["function"].get("parameters") or {}).get("properties", {}))
        for tool in tools
    }
    calls = []
    for node in nodes:
        if not isinstance(node, ast.Call):
            return []
        name = ast.unparse(node.func)
        order = names.get(name, [])
        if len(node.args) > len(order):
            return []
        try:
            arguments = {key: ast.literal_eval(each) for key, each in zip(order, node.args, strict=False)} | {
                each.arg: ast.literal_eval(each.value) for each in node.keywords if each.arg
            }
        except (ValueError, TypeError, SyntaxError):
            return []
        calls.append(Call(name, arguments))
    return calls


def json_calls(text: str) -> list[Call]:
    """[{"name": …, "arguments": …}] 或 [{工具名: 参数}] → 调用；不是这样写的是空的。"""
    try:
        values = read_values(text.strip())
    except ValueError:
        return []
    calls = []
    for value in values:
        call = as_call(value)
        if call is None:
            return []
        calls.append(call)
    return calls


def as_call(value: Any) -> Call | None:
    """一个对象 → 调用：我们的、OpenAI 的 tool_calls、BFCL 的 {工具名: 参数}。"""
    if not isinstance(value, dict):
        return None
    if isinstance(value.get("function"), dict):
        value = value["function"]
    if isinstance(value.get("name"), str):
        name, arguments = value["name"], value.get("arguments", value.get("parameters", {}))
    elif len(value) == 1:
        ((name, arguments),) = value.items()
    else:
        return None
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            return None
    return Call(name, arguments) if isinstance(arguments, dict) else None


# ---------------------------------------------------------------- 2. 问模型


@dataclass
class Talk:
    """一道题的对话：heard 听到一次回答，做掉里面的调用，走到下一轮；done 是完了。"""

    question: Question
    world: Any = None
    messages: list[dict] = field(default_factory=list)
    said: list[list[str]] = field(default_factory=list)
    done: bool = False

    def __post_init__(self) -> None:
        if self.question.system:
            self.messages = [{"role": "system", "content": self.question.system}]
        if self.question.is_multi_turn:
            self.world = self.question.make_world()
        self.next_turn()

    @property
    def tools(self) -> list[dict]:
        listed = self.question.tools_at(len(self.said) - 1)
        return [{key: each for key, each in tool.items() if key != "bfcl"} for tool in listed]

    def next_turn(self) -> None:
        if len(self.said) == len(self.question.turns):
            self.done = True
            return
        self.messages = self.messages + self.question.turns[len(self.said)]
        self.said.append([])

    def heard(self, text: str) -> None:
        self.said[-1].append(text)
        if not self.question.is_multi_turn:
            self.done = True
            return
        self.messages = [*self.messages, {"role": "assistant", "content": text}]
        calls = read_calls(text, self.tools)
        if not calls or len(self.said[-1]) == MOST_STEPS:
            self.next_turn()
            return
        for call in calls:
            result = self.world.run(call) if isinstance(call, Call) else f"出错了：{call.error}"
            self.messages.append({"role": "tool", "content": result})


def ask(model: Model, questions: list[Question], max_tokens: int, constrained: bool) -> dict:
    """→ {"answers": {题: 回答}, "too_long": 几次提示太长、没有问, "silent": 服务器几次没有回答}。"""
    talks = [Talk(question) for question in questions]
    grammars: dict[tuple, Any] = {}
    found = {"answers": {}, "too_long": 0, "silent": 0}
    while live := [talk for talk in talks if not talk.done]:
        fitting = []
        for talk in live:
            if model.count(talk.messages, talk.tools) + max_tokens > model.room:
                found["too_long"] += 1
                talk.done = True
            else:
                fitting.append(talk)
        if constrained:
            texts = [say_call(model, talk, max_tokens, grammars) for talk in fitting]
        else:
            texts = say_all(model, [(talk.messages, talk.tools) for talk in fitting], max_tokens)
        for talk, text in zip(fitting, texts, strict=True):
            found["silent"] += text is None
            talk.heard(text or "")
    found["answers"] = {talk.question.id: talk.said for talk in talks}
    return found


def say_all(model: Model, prompts: list[tuple], max_tokens: int) -> list[str | None]:
    if isinstance(model, LocalModel):
        return [said.text for said in model.say_many(prompts, max_tokens)] if prompts else []
    texts: list[str | None] = []
    stop = threading.Event()
    for messages, tools in prompts:
        said = model.say(messages, plain_names(tools), max_tokens, time.monotonic() + 3600, stop)
        if said.stopped == "stopped":
            raise KeyboardInterrupt
        texts.append(None if said.stopped == "no_answer" else said.text)
    return texts


def plain_names(tools: list[dict]) -> list[dict]:
    """OpenAI 的接口不许工具名里有点：math.sqrt → math_sqrt，read_calls 再还原。"""
    return [
        tool | {"function": tool["function"] | {"name": tool["function"]["name"].replace(".", "_")}}
        for tool in tools
    ]


def say_call(model: LocalModel, talk: Talk, max_tokens: int, grammars: dict) -> str:
    """只许它写一个合法的调用（call_grammar.py）；同样的几件工具，文法只做一次。"""
    if not talk.tools:  # 没有工具，写不出调用
        return ""
    key = tuple(tool["function"]["name"] for tool in talk.tools)
    if key not in grammars:
        size = model.model.get_output_embeddings().weight.shape[0]
        grammars[key] = CallGrammar(talk.tools).masks(model.tokenizer, size)
    prompt = model.prompt(talk.messages, talk.tools)
    return generate_call(model.model, model.tokenizer, prompt, grammars[key], max_tokens)


# ---------------------------------------------------------------- 3. 现成的回答


def read_answers(path: str, questions: list[Question]) -> dict[str, list[list[str]]]:
    """回答的文件 → {题: 回答}。一行一个 id 与 result（BFCL 的结果文件就是这样），result 可以是文字、调用的列表；

    多轮的题是 [[一次, …], …]。缺栏、重复、不成样子是 UserError，说出行号；没有答到的题算没有调用，并说出几道。
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"没有这个回答文件：{path}。请检查 --answers 的路径。")
    by_id = {question.id: question for question in questions}
    found, lines, extra = {}, {}, 0
    for line, row in json_lines(file):
        where = f"{file.name} 第 {line} 行"
        name = next((name for name in ANSWER_NAMES if name in row), None)
        if not isinstance(row.get("id"), str) or name is None:
            raise UserError(f"{where}要有 id 与 result；这一行有的是：{'、'.join(map(str, row))}。")
        if row["id"] in lines:
            raise UserError(f"{where}与第 {lines[row['id']]} 行答的是同一道题（{row['id']}），请删去一行。")
        lines[row["id"]] = line
        if row["id"] not in by_id:
            extra += 1
            continue
        if by_id[row["id"]].is_multi_turn:
            turns = row[name]
            if not isinstance(turns, list) or not all(isinstance(turn, list) for turn in turns):
                raise UserError(
                    f"{where}（{row['id']}）是多轮的题，{name} 要写成 [[第一轮说的, …], [第二轮说的, …]]。"
                )
            found[row["id"]] = [[answer_text(each, where) for each in turn] for turn in turns]
        else:
            found[row["id"]] = [[answer_text(row[name], where)]]
    missing = [question.id for question in questions if question.id not in found]
    if len(missing) == len(questions):
        raise UserError(f"{file.name} 里没有一行的 id 是这里的题；题的 id 像 {questions[0].id}。")
    if extra:
        print(f"{file.name}：{extra} 行的 id 不在题目里，不用。")
    if missing:
        shown = "、".join(missing[:5]) + (" 等" if len(missing) > 5 else "")
        print(f"{file.name}：没有答到 {len(missing)} 道题（{shown}），当作没有调用。")
    return found | {id: [[""] for _ in by_id[id].turns] for id in missing}


def answer_text(value: Any, where: str) -> str:
    """一次回答 → 文字：文字照写，调用的列表写成 <tool_call>。"""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, dict) and "tool_calls" in value:  # OpenAI 的一条 message
        return (value.get("content") or "") + answer_text(value["tool_calls"] or [], where)
    if isinstance(value, list):
        calls = [as_call(each) for each in value]
        if None not in calls:
            return call_text([{"name": call.name, "arguments": call.arguments} for call in calls if call])
    raise UserError(
        f'{where}的回答不成样子：要是文字，或 [{{"name": …, "arguments": {{…}}}}] 这样的列表，给的是 {str(value)[:60]}。'
    )
