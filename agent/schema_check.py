"""一个 JSON 值合不合 schema，一个调用能不能交给工具。tool_schema.py 的第一步；认得的关键字在 schema_words.py。"""

import difflib
import json
import math
import re
from typing import Any

from nlp_common.base.errors import UserError
from nlp_common.lm.reply_parser import BrokenCall, Call
from schema_words import check_schema, referred

KINDS = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
NAMES = {
    "object": "对象",
    "array": "列表",
    "string": "字符串",
    "integer": "整数",
    "number": "数",
    "boolean": "true 或 false",
    "null": "null",
}


def check_value(value: Any, schema: dict | bool, where: str = "") -> list[str]:
    """一个 JSON 值合不合 schema：每处不合一句话，空的就是合。where 是它在哪里，写在每句话的前面。

    schema 里有子集之外的关键字，是 UserError：悄悄不管，就会放过不合的。
    """
    check_schema(schema, where or "schema")
    try:
        return _faults(value, schema, where, schema)
    except RecursionError:
        raise UserError("schema 的 $ref 一层也不深入就又套着自己，或者值套得太深。") from None


def check_call(call: Call | BrokenCall | dict, tools: list[dict]) -> list[str]:
    """一个调用能不能交给工具：有没有这个工具，参数少了、多了、不合，每处一句话。

    schema 没有写 additionalProperties，JSON schema 的规定是许可别的参数；函数却接不住，所以这里当作不许可。
    """
    if isinstance(call, BrokenCall):
        return [call.error]
    if isinstance(call, dict):
        call = Call(call.get("name"), call.get("arguments"))
    name = call.name
    if not isinstance(name, str) or not isinstance(call.arguments, dict):
        return ['调用要写成 {"name": 工具名, "arguments": {参数}}']
    known = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
    if name not in known:
        return [f"没有工具 {name}{_near(name, known)}；有的是：{'、'.join(known) or '一个也没有'}"]
    schema = {"type": "object", "properties": {}, "additionalProperties": False} | known[name]
    check_schema(schema, f"工具 {name} 的 parameters")
    return [f"{name}：{fault}" for fault in _faults(call.arguments, schema, "", schema)]


def _near(name: str, known: object) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"（是不是 {close[0]}？）" if close else ""


def _faults(value: Any, schema: dict | bool, where: str, root: dict | bool) -> list[str]:
    """一层一层往下看：先看种类，再看这一种的限制。"""
    it = where or "值"
    if isinstance(schema, bool):
        return [] if schema else [f"{it} 不许有"]
    if value is None and schema.get("nullable") is True:
        return []
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(is_kind(value, kind) for kind in kinds):
        return [f"{it} 要是{'或'.join(NAMES[kind] for kind in kinds)}，给的是 {shown(value)}"]
    faults = []
    if "$ref" in schema:
        faults += _faults(value, referred(root, schema["$ref"]), where, root)
    if "const" in schema and not same(value, schema["const"]):
        faults.append(f"{it} 只能是 {shown(schema['const'])}，给的是 {shown(value)}")
    if "enum" in schema and not any(same(value, each) for each in schema["enum"]):
        options = "、".join(map(shown, schema["enum"]))
        faults.append(f"{it} 要是 {options} 之一，给的是 {shown(value)}")
    for each in schema.get("allOf", []):
        faults += _faults(value, each, where, root)
    for name in ("anyOf", "oneOf"):
        if name in schema:
            found = [_faults(value, each, where, root) for each in schema[name]]
            fitting = found.count([])
            if fitting == 0:
                faults.append(f"{it} 哪一种写法都不合：" + "；或者，".join(each[0] for each in found))
            elif fitting > 1 and name == "oneOf":
                faults.append(f"{it} 只能合一种写法，却合了 {fitting} 种")
    if isinstance(value, dict):
        faults += _object_faults(value, schema, where, root)
    elif isinstance(value, list):
        faults += _array_faults(value, schema, where, root)
    elif isinstance(value, str):
        faults += _string_faults(value, schema, it)
    elif is_kind(value, "number"):
        faults += _number_faults(value, schema, it)
    return faults


def _object_faults(value: dict, schema: dict, where: str, root: dict | bool) -> list[str]:
    inside = f"{where} 里" if where else ""
    known = schema.get("properties", {})
    faults = [f"{inside}少了 {name}" for name in schema.get("required", []) if name not in value]
    more = schema.get("additionalProperties", True)
    for name, each in value.items():
        place = f"{where}.{name}" if where else name
        if name in known:
            faults += _faults(each, known[name], place, root)
        elif more is False:
            faults.append(f"{inside}多了 {name}{_near(name, known)}")
        else:
            faults += _faults(each, more, place, root)
    for limit, fits, word in (("minProperties", int.__ge__, "至少"), ("maxProperties", int.__le__, "至多")):
        if limit in schema and not fits(len(value), int(schema[limit])):
            faults.append(f"{where or '值'} {word}要有 {schema[limit]} 栏，给的有 {len(value)} 栏")
    return faults


def _array_faults(value: list, schema: dict, where: str, root: dict | bool) -> list[str]:
    it, faults = where or "值", []
    if len(value) < schema.get("minItems", 0):
        faults.append(f"{it} 至少要有 {schema['minItems']} 项，给的有 {len(value)} 项")
    if len(value) > schema.get("maxItems", math.inf):
        faults.append(f"{it} 至多有 {schema['maxItems']} 项，给的有 {len(value)} 项")
    if schema.get("uniqueItems") and any(same(a, b) for i, a in enumerate(value) for b in value[:i]):
        faults.append(f"{it} 里不许有重复的")
    for i, each in enumerate(value):
        faults += _faults(each, schema.get("items", True), f"{where}[{i}]", root)
    return faults


def _string_faults(value: str, schema: dict, it: str) -> list[str]:
    faults = []
    if len(value) < schema.get("minLength", 0):
        faults.append(f"{it} 至少要有 {schema['minLength']} 个字，给的是 {shown(value)}")
    if len(value) > schema.get("maxLength", math.inf):
        faults.append(f"{it} 至多 {schema['maxLength']} 个字，给的有 {len(value)} 个字")
    if "pattern" in schema and not re.search(schema["pattern"], value):
        faults.append(f"{it} 要合正则式 {schema['pattern']}，给的是 {shown(value)}")
    return faults


def _number_faults(value: float, schema: dict, it: str) -> list[str]:
    faults = []
    if value < schema.get("minimum", -math.inf):
        faults.append(f"{it} 不能小于 {schema['minimum']}，给的是 {value}")
    if value > schema.get("maximum", math.inf):
        faults.append(f"{it} 不能大于 {schema['maximum']}，给的是 {value}")
    if value <= schema.get("exclusiveMinimum", -math.inf):
        faults.append(f"{it} 要大于 {schema['exclusiveMinimum']}，给的是 {value}")
    if value >= schema.get("exclusiveMaximum", math.inf):
        faults.append(f"{it} 要小于 {schema['exclusiveMaximum']}，给的是 {value}")
    return faults


def is_kind(value: Any, kind: str) -> bool:
    """JSON schema 的规定：true 不是数，1.0 是整数。"""
    if kind in ("integer", "number"):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and (kind == "number" or value == math.floor(value))
    return isinstance(value, KINDS[kind])


def same(a: Any, b: Any) -> bool:
    """两个 JSON 值相不相等：1 与 1.0 相等，1 与 true 不相等。"""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    return a == b


def shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:40] + "…"
