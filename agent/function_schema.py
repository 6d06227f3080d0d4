"""Python 函数 → 工具：名字、说明、参数的 JSON schema，全从函数自己的签名、类型与 docstring 里读。tool_format.py 的第一步。

    def weather(city: str, days: int = 1) -> str:
        \"\"\"查天气。

        参数：
            city: 哪座城市
            days: 往后几天
        \"\"\"

→ {"type": "function", "function": {"name": "weather", "description": "查天气。", "parameters": {…}}}
"""

import dataclasses
import enum
import importlib.util
import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Union

from nlp_common.base.errors import UserError

SIMPLE = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object"}
KIND_OF_VALUE = SIMPLE | {type(None): "null"}
CAN_BE = "可以用 str、int、float、bool、list[…]、dict[str, …]、Literal、Enum、A | B、A | None、dataclass、TypedDict"

# docstring 里一节的标题。Google 的写法是英文，也认中文的
ARGUMENTS = re.compile(r"^[ \t]*(?:Args|Arguments|参数)\s*[:：][ \t]*$", re.MULTILINE)
SECTION = re.compile(
    r"^[ \t]*(?:Args|Arguments|Returns|Raises|Yields|Examples?|Note|参数|返回|抛出|例子|示例|注意)\s*[:：]",
    re.MULTILINE,
)
ARGUMENT = re.compile(
    r"^(?P<indent>[ \t]*)(?P<name>\w+)[ \t]*(?:\([^)\n]*\)|（[^）\n]*）)?[ \t]*[:：][ \t]*(?P<text>.*)$"
)
CHOICES = re.compile(r"\(choices:\s*(\[.*?\])\)\s*$", re.IGNORECASE)


def function_schema(function: Callable) -> dict:
    """一个函数 → 一件工具（OpenAI 的写法）。参数没有写类型、类型说不成 JSON，是 UserError，说出是哪一个。

    没有默认值的参数是 required。返回值的类型不写进去：模型从不写它，OpenAI 的接口也不认它。
    """
    name = function.__name__
    description, told = read_docstring(inspect.getdoc(function) or "")
    try:
        hints = typing.get_type_hints(function)
    except NameError as error:
        raise UserError(f"函数 {name} 的类型写着 {error.name}，却没有定义（导入）它。") from None
    properties, required = {}, []
    for place, (argument, parameter) in enumerate(inspect.signature(function).parameters.items()):
        if place == 0 and argument in ("self", "cls") and argument not in hints:
            continue  # 方法的第一个参数，不由模型给
        where = f"函数 {name} 的参数 {argument}"
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise UserError(
                f"{where}：工具的参数都按名字给，不能是 *{argument}、**{argument}，也不能写在 / 前面。"
            )
        if argument not in hints:
            raise UserError(f"{where} 没有写类型：写成 {argument}: str 这样。")
        schema = type_schema(hints[argument], where)
        if argument in told:
            text = told.pop(argument)
            if found := CHOICES.search(text):  # transformers 的写法：(choices: ["红", "绿"])
                schema["enum"], text = json.loads(found[1]), text[: found.start()].strip()
            schema["description"] = text
        properties[argument] = schema
        if parameter.default is parameter.empty:
            required.append(argument)
    if told:
        raise UserError(
            f"函数 {name} 的 docstring 说到参数 {next(iter(told))}，签名里却没有它：是不是写错了名字？"
        )
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        parameters["required"] = required
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": parameters},
    }


def functions_in(path: str) -> list[Callable]:
    """一个 Python 文件里写的函数（名字不以 _ 开头）。读不了、运行不了、一个也没有，是 UserError。"""
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"没有文件 {file}。")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise UserError(f"{file} 不是 Python 文件：要以 .py 结尾。")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclass 要按名字找到它
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{file} 运行不了：{type(error).__name__}: {error}") from None
    found = [
        each for name, each in vars(module).items() if inspect.isfunction(each) and not name.startswith("_")
    ]
    found = [each for each in found if each.__module__ == spec.name]
    if not found:
        raise UserError(f"{file} 里一个函数也没有（名字以 _ 开头的不算）。")
    return found


# ---------------------------------------------------------------- docstring


def read_docstring(text: str) -> tuple[str, dict[str, str]]:
    """→ (第一节之前的说明, {参数名: 说明})。"""
    first = SECTION.search(text)
    description = (text[: first.start()] if first else text).strip()
    found = ARGUMENTS.search(text)
    if not found:
        return description, {}
    rest = text[found.end() :]
    after = SECTION.search(rest)
    told: dict[str, str] = {}
    indent, name = None, ""
    for line in (rest[: after.start()] if after else rest).splitlines():
        start = ARGUMENT.match(line)
        if start and (indent is None or len(start["indent"]) <= len(indent)):
            indent, name = start["indent"], start["name"]
            told[name] = start["text"].strip()
        elif name and line.strip():  # 一个参数的说明写了好几行：缩进得更深
            told[name] = f"{told[name]} {line.strip()}".strip()
    return description, told


# ---------------------------------------------------------------- 类型


def type_schema(hint: Any, where: str) -> dict:
    """一个类型 → JSON schema。"""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return {}
    if hint in SIMPLE:
        return {"type": SIMPLE[hint]}
    if origin is Literal:
        return choices(list(inside), where)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return choices([member.value for member in hint], where)
    if origin is list:
        return {"type": "array", "items": type_schema(inside[0], where)}
    if origin is dict:
        if inside[0] is not str:
            raise UserError(f"{where}：JSON 对象的键都是字符串，写成 dict[str, …]。")
        return {"type": "object", "additionalProperties": type_schema(inside[1], where)}
    if origin in (Union, types.UnionType):
        return union(inside, where)
    if dataclasses.is_dataclass(hint) or typing.is_typeddict(hint):
        return record(hint, where)
    raise UserError(f"{where} 的类型 {getattr(hint, '__name__', hint)} 写不成 JSON schema：{CAN_BE}。")


def choices(values: list, where: str) -> dict:
    """几个值里选一个。"""
    if not values or any(type(value) not in KIND_OF_VALUE for value in values):
        raise UserError(f"{where}：几选一的值要是字符串、数、真假，写的是 {values!r}。")
    kinds = list(dict.fromkeys(KIND_OF_VALUE[type(value)] for value in values))
    return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": values}


def union(options: tuple, where: str) -> dict:
    """A | B：都只有 type 就写成几个 type，不然是 anyOf；A | None 另记 nullable。"""
    parts = [type_schema(option, where) for option in options if option is not type(None)]
    if len(parts) == 1:
        schema = parts[0]
    elif all(part.keys() == {"type"} for part in parts):
        kinds = sorted({part["type"] for part in parts})
        schema = {"type": kinds[0] if len(kinds) == 1 else kinds}
    else:
        schema = {"anyOf": parts}
    if type(None) in options:
        schema["nullable"] = True  # OpenAPI 的写法，transformers 也这样写；jsonschema 不认它
    return schema


def record(hint: Any, where: str) -> dict:
    """dataclass、TypedDict：一栏一个属性，不许有别的栏。"""
    hints = typing.get_type_hints(hint)
    if dataclasses.is_dataclass(hint):
        missing = dataclasses.MISSING
        required = [
            each.name
            for each in dataclasses.fields(hint)
            if each.default is missing and each.default_factory is missing
        ]
    else:
        required = [name for name in hints if name in hint.__required_keys__]
    properties = {name: type_schema(inside, f"{where}.{name}") for name, inside in hints.items()}
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
