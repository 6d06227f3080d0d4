"""一件工具是什么，和怎样做一个调用：先看合不合，会改东西的先问人，再限时间、限长短地做。tools.py 的第二步。

    result = run_call(tools, Call("calculator", {"expression": "1+1"}))
    result.ok, result.kind, result.text

不成的结果都以 ERROR 开头：模型看到它，就知道没有做成。
"""

from __future__ import annotations

import copy
import json
import queue
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass

from agent_secrets import Hider
from nlp_common.base.errors import UserError
from nlp_common.lm.reply_parser import BrokenCall, Call
from schema_check import check_call

ERROR = "出错了："
TIMEOUT = "超时了，请再试一次。"
MAYBE_DONE = "超时了。这个工具会改东西，也许已经改了：先看一看，不要再做一次。"
MOST_LEFT_BEHIND = 8  # 超时了还没有停下的，最多几个；再多就不再做新的
ERROR_CHARS = 300  # 一句错误最多几个字

_left_behind: list[threading.Thread] = []  # 超时了还在做的


@dataclass
class Tool:
    """一件工具：名字，给模型看的说明（OpenAI 的写法），怎样做；writes 是会不会改东西。"""

    name: str
    schema: dict
    run: Callable[..., str]
    writes: bool = False


@dataclass
class Result:
    """一个调用的结果。text 给模型看；cut 也是成了的，只是太长、截掉了一段。"""

    text: str
    ok: bool
    kind: str  # ok、cut；unknown、bad_arguments、refused、failed、timeout


class ToolError(Exception):
    """工具自己说的错：一句话，原样给模型看，所以里面不能有路径、秘密。"""


def run_call(
    tools: dict[str, Tool],
    call: Call | BrokenCall,
    confirm: Callable[[Call], bool] | None = None,
    timeout: float = 10,
    at_most: int = 4000,
) -> Result:
    """做一个调用。怎样不成，都是一个 Result，不是异常；只有 Ctrl-C 照样出去。

    会改东西的工具，要 confirm(call) 给出 True 本身：参数、结果、模型的话里写什么都不算，连 "yes" 这样的字也不算。
    """
    if isinstance(call, BrokenCall):
        return _bad("bad_arguments", call.error)
    if call.name not in tools:
        return _bad("unknown", "；".join(check_call(call, [tool.schema for tool in tools.values()])))
    tool = tools[call.name]
    if faults := argument_faults(tool, call):
        return _bad("bad_arguments", "；".join(faults))
    arguments = copy.deepcopy(call.arguments)  # 问过的和做的是同一份：问的时候谁改了 call，也改不到它
    if tool.writes and (confirm is None or confirm(call) is not True):
        return _bad("refused", f"没有得到许可，{tool.name} 没有做。")
    kind, value = run_in_time(tool, arguments, timeout)
    if kind != "ok":
        return _bad(kind, value)
    text = as_text(value)
    if len(text) > at_most:
        return Result(cut(text, at_most), True, "cut")
    return Result(text, True, "ok")


def _bad(kind: str, message: str) -> Result:
    return Result(ERROR + message, False, kind)


def argument_faults(tool: Tool, call: Call) -> list[str]:
    """参数合不合。schema 用到子集之外的关键字（别人的工具）时这里查不了：由工具自己查，mcp_client 就这样做。"""
    try:
        return check_call(call, [tool.schema])
    except UserError:
        return []


# ---------------------------------------------------------------- 限时间


def run_in_time(tool: Tool, arguments: dict, timeout: float) -> tuple[str, str]:
    """→ ("ok", 结果)、("failed", 怎么错了)、("timeout", 一句话)。

    工具在另一个线程里做，到时间就不等了。Python 的线程停不下来：它还在后面，做完也没有人看；
    进程退出时不等它（daemon）。还没有停下的多了，就不再做新的。真要停得下来的（运行代码），放进另一个进程。
    """
    _left_behind[:] = [thread for thread in _left_behind if thread.is_alive()]
    if len(_left_behind) >= MOST_LEFT_BEHIND:
        return "failed", f"有 {len(_left_behind)} 个超时的调用还没有停下，先不做新的。"
    answers: queue.Queue = queue.Queue()
    thread = threading.Thread(target=_run, args=(tool, arguments, answers), daemon=True, name=tool.name)
    thread.start()
    try:
        return answers.get(timeout=timeout)
    except queue.Empty:
        _left_behind.append(thread)
        return "timeout", MAYBE_DONE if tool.writes else TIMEOUT


def _run(tool: Tool, arguments: dict, answers: queue.Queue) -> None:
    try:
        answers.put(("ok", tool.run(**arguments)))
    except TimeoutError:
        answers.put(("timeout", MAYBE_DONE if tool.writes else TIMEOUT))
    except BaseException as error:  # 连 SystemExit 也是：一件工具结束不了智能体
        answers.put(("failed", short_error(error)))


# ---------------------------------------------------------------- 结果与错误 → 文字


def as_text(value: object) -> str:
    """结果 → 文字；不是文字的写成 JSON，半个代理对（写不成 UTF-8）换成问号。"""
    if not isinstance(value, str):
        try:
            value = json.dumps(value, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError):
            value = f"（工具给的是 {type(value).__name__}，写不成文字）"
    return value.encode("utf-8", "replace").decode("utf-8")


def cut(text: str, at_most: int) -> str:
    """太长的只留开头，连同这句话一共 at_most 个字。"""
    note = f"……（结果太长，截掉了后面的；原来有 {len(text)} 个字）"
    return text[: max(0, at_most - len(note))] + note


PATHS = re.compile(r"(?:[A-Za-z]:)?(?:[\\/]+[^\s\\/:'\"<>|，。；、]+){2,}[\\/]?|~[\\/][^\s'\"]*")


def short_error(error: BaseException) -> str:
    """异常 → 一句话：头一行，没有路径与秘密，不太长。已经是中文的一句话，就不加异常的名字。"""
    if isinstance(error, ToolError):
        return str(error)[:ERROR_CHARS]
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    line = PATHS.sub("〔路径〕", Hider.from_environment().text(lines[0][: 10 * ERROR_CHARS] if lines else ""))
    line = line.encode("utf-8", "replace").decode("utf-8")[:ERROR_CHARS]
    if re.search(r"[\u4e00-\u9fff]", line.replace("〔路径〕", "").replace("〔已隐去〕", "")):
        return line
    return f"{type(error).__name__}：{line}" if line else f"{type(error).__name__}。"
