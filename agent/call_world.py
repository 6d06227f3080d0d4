"""真的做一个调用：几个接口的实例（daily_apis.py 的，小世界的，别处的类也行），做完看结果与状态。

BFCL 第三版的多轮题这样评：照模型的调用做一遍，照标准的做一遍，每一轮之后比状态，再看结果里有没有该有的。
"""

from __future__ import annotations

import copy
import itertools
import json

from daily_apis import ToolError, all_tools, fresh_world, methods_of
from nlp_common.lm.reply_parser import Call
from schema_check import check_call
from tool_world import ERROR, run_tool

MOST_ORDERS = 4  # 几个调用以内，才试全部的次序


class ApiWorld:
    """几个接口的实例。tools 是说明（校验参数用）；None 就不校验，直接做。"""

    def __init__(self, instances: dict[str, object], tools: dict[str, dict] | None = None):
        self.instances = instances
        self.methods = {name: each for api in instances.values() for name, each in methods_of(api).items()}
        self.tools = tools

    def run(self, call: Call) -> str:
        """→ 结果的文字；做不了的以 ERROR 开头，状态不变。"""
        if call.name not in self.methods:
            return f"{ERROR}没有工具 {call.name}"
        if self.tools and (faults := check_call(call, [self.tools[call.name]])):
            return ERROR + "；".join(faults)
        arguments = as_typed(call.arguments, self.tools[call.name]) if self.tools else call.arguments
        try:
            result = self.methods[call.name](**copy.deepcopy(arguments))  # 接口收下的列表，以后会改
        except ToolError as error:
            return f"{ERROR}{error}"
        except Exception as error:  # 别处的类：参数不对、它自己出错
            return f"{ERROR}{type(error).__name__}：{error}"
        return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)

    def state(self) -> dict[str, dict]:
        """各接口的公开属性。"""
        return {
            name: {key: each for key, each in vars(api).items() if not key.startswith("_")}
            for name, api in self.instances.items()
        }


def as_typed(arguments: dict, tool: dict) -> dict:
    """JSON 里 3 与 3.0 没有区别：照 schema，整数的成整数，数的成小数，做出来的就一样。"""
    properties, found = tool["function"]["parameters"]["properties"], {}
    for key, value in arguments.items():
        kind = properties[key].get("type")
        if kind in ("integer", "number") and not isinstance(value, bool):
            value = int(value) if kind == "integer" else float(value)
        found[key] = value
    return found


class TinyWorld:
    """小世界的一道题：只查，不改，没有状态。"""

    def __init__(self, task: dict):
        self.task = task

    def run(self, call: Call) -> str:
        return run_tool(self.task, {"name": call.name, "arguments": call.arguments})

    def state(self) -> dict:
        return {}


TOOLS = all_tools()


def daily_world(names: list[str] | None = None) -> ApiWorld:
    return ApiWorld(fresh_world(names), TOOLS)


def effect(make_world, calls: list[Call]) -> tuple[list[str], dict]:
    """在新的世界里做几个调用 → (排好的结果, 最后的状态)。"""
    world = make_world()
    return sorted(world.run(call) for call in calls), world.state()


def same_effect(make_world, calls: list[Call], wanted: list[Call]) -> bool:
    """执行匹配：两组调用做完，结果与状态都一样。标准的那几个以什么次序做都行。出了错的不算对。"""
    results, state = effect(make_world, calls)
    if any(each.startswith(ERROR) for each in results) or len(calls) != len(wanted):
        return False
    orders = itertools.permutations(wanted) if len(wanted) <= MOST_ORDERS else [wanted]
    return any(effect(make_world, list(order)) == (results, state) for order in orders)
