"""工具，和怎样做一个调用。（这里先只有共用的 Tool、run_call，与两个最简单的工具。）

tools = toolbox(settings)
result = run_call(tools, Call("calculator", {"expression": "23*48"}))     → Result("1104", True, "ok")
"""

from __future__ import annotations

import ast
import copy
import operator
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from function_schema import function_schema
from reply_parser import Call
from tool_schema import check_call

ERROR = "出错了："  # 不成的结果都这样开头，同 tool_world.py
Kind = Literal["ok", "unknown", "bad_arguments", "failed", "timeout", "refused", "cut"]


@dataclass
class Tool:
    """一个工具。schema 是 OpenAI 的写法；writes：会改东西的，每次都要人许可。"""

    name: str
    schema: dict
    run: Callable[..., str]
    writes: bool = False


@dataclass
class Result:
    """给模型看的文字；kind 是怎样成的、怎样不成的。"""

    text: str
    ok: bool
    kind: Kind


def tool(function: Callable[..., str], writes: bool = False) -> Tool:
    """一个 Python 函数 → 工具：名字、说明、参数从函数自己来。"""
    return Tool(function.__name__, function_schema(function), function, writes)


# ---------------------------------------------------------------- 做一个调用


def run_call(
    tools: dict[str, Tool],
    call: Call,
    confirm: Callable[[Call], bool] | None = None,
    timeout: float = 10,
    at_most: int = 4000,
) -> Result:
    """做一个调用，怎样不成都有一句话。会改东西的，confirm(call) 返回 True 才做：只有人能许可，文字不算。"""
    schemas = [each.schema for each in tools.values()]
    if faults := check_call(call, schemas):
        kind: Kind = "bad_arguments" if call.name in tools else "unknown"
        return Result(ERROR + "；".join(faults), False, kind)
    chosen = tools[call.name]
    if chosen.writes and (confirm is None or confirm(call) is not True):
        return Result("没有得到许可，没有做。", False, "refused")
    done: list[tuple[Kind, str]] = []
    job = threading.Thread(target=_run, args=(chosen, copy.deepcopy(call.arguments), done), daemon=True)
    job.start()
    job.join(timeout)  # 超时的线程结束不了，随它去；要真的杀得掉，工具自己开子进程
    if not done:
        return Result(ERROR + "超时了，请再试一次。", False, "timeout")
    kind, text = done[0]
    text = text.encode("utf-8", "replace").decode("utf-8")  # 半个代理对写不成 UTF-8
    if kind != "ok":
        return Result(ERROR + text[:at_most], False, kind)
    if len(text) > at_most:
        return Result(f"{text[:at_most]}……（太长，一共 {len(text)} 个字，后面的截掉了）", True, "cut")
    return Result(text, True, "ok")


def _run(chosen: Tool, arguments: dict, done: list[tuple[Kind, str]]) -> None:
    try:
        text: Any = chosen.run(**arguments)
    except TimeoutError:
        done.append(("timeout", "超时了，请再试一次。"))
    except BaseException as error:  # 工具怎样坏，都不能带走智能体
        done.append(("failed", str(error) or type(error).__name__))
    else:
        is_text = isinstance(text, str)
        done.append(("ok", text) if is_text else ("failed", f"工具给的不是文字（{type(text).__name__}）"))


# ---------------------------------------------------------------- 工具


def toolbox(settings: Any = None) -> dict[str, Tool]:
    return {each.name: each for each in (tool(calculator), tool(now))}


OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


def calculator(expression: str) -> str:
    """算一个算式：加减乘除、取整、取余、括号。

    Args:
        expression: 算式，例如 (23+4)*5
    """
    if len(expression) > 200:
        raise ValueError("算式太长，最多 200 个字")
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ZeroDivisionError, OverflowError, RecursionError) as error:
        raise ValueError(f"算不了 {expression[:40]}（{error}）") from None
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def _value(node: ast.AST) -> float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_value(node.operand))
    raise ValueError("只认数、+ - * / // % 与括号")


def now() -> str:
    """现在的日期、星期与时间。"""
    moment = datetime.now().astimezone()
    return f"{moment:%Y-%m-%d %H:%M:%S %Z} 星期{'一二三四五六日'[moment.weekday()]}"
