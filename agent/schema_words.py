"""JSON schema 里认得的关键字：写法对不对，$ref 指着哪一段。tool_schema.py 校验之前先看。"""

import re
from typing import Any

from nlp_common.base.errors import UserError

# 只是说明，不限制值；format 在 JSON schema 里本来就只是说明
NOTES = {"title", "description", "default", "examples", "format", "deprecated", "readOnly", "writeOnly"}
NOTES |= {"$schema", "$id", "$comment", "contentEncoding", "contentMediaType"}
KINDS = ("object", "array", "string", "integer", "number", "boolean", "null")
SCHEMAS = {"items", "additionalProperties"}  # 里面是一个 schema
SCHEMA_LISTS = {"anyOf", "oneOf", "allOf"}  # 里面是几个
SCHEMA_TABLES = {"properties", "$defs", "definitions"}  # 里面是 {名字: schema}
COUNTS = {"minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"}
BOUNDS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
OTHERS = {"type", "required", "enum", "const", "pattern", "uniqueItems", "$ref", "nullable"}
KNOWN = SCHEMAS | SCHEMA_LISTS | SCHEMA_TABLES | COUNTS | BOUNDS | OTHERS


def check_schema(schema: Any, where: str, root: Any = None) -> None:
    """schema 只用了认得的关键字，每个都写得对；不然是 UserError，说出在哪里、是哪一个。"""
    root = schema if root is None else root
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise UserError(f"{where} 应当是一个对象 {{…}}，写的是 {schema!r}。")
    for name, value in schema.items():
        if name in NOTES:
            continue
        if name not in KNOWN:
            known = "、".join(sorted(KNOWN - {"$defs", "definitions"}))
            raise UserError(f"{where} 里的关键字 {name!r} 不支持：去掉它，或换一种写法。支持的是：{known}。")
        if wanted := wrong_shape(name, value):
            raise UserError(f"{where} 的 {name} 要是{wanted}，写的是 {value!r}。")
        if name in SCHEMAS:
            check_schema(value, f"{where}.{name}", root)
        elif name in SCHEMA_LISTS:
            for i, each in enumerate(value):
                check_schema(each, f"{where}.{name}[{i}]", root)
        elif name in SCHEMA_TABLES:
            for key, each in value.items():
                check_schema(each, f"{where}.{name}.{key}", root)
        elif name == "pattern":
            check_pattern(value, where)
        elif name == "$ref":
            check_reference(root, value, where)


def wrong_shape(name: str, value: Any) -> str:
    """这个关键字的值写得对不对：对是空的，不对说应当是什么。"""
    if name in SCHEMA_LISTS:
        return "" if isinstance(value, list) and value else "几个 schema 的列表，至少一个"
    if name in SCHEMA_TABLES:
        return "" if isinstance(value, dict) else "对象 {名字: schema}"
    if name in COUNTS:
        return "" if type(value) is int and value >= 0 else "不小于 0 的整数"
    if name in BOUNDS:
        return "" if isinstance(value, int | float) and not isinstance(value, bool) else "数"
    if name in ("uniqueItems", "nullable"):
        return "" if isinstance(value, bool) else "true 或 false"
    if name in ("pattern", "$ref"):
        return "" if isinstance(value, str) else "字符串"
    if name == "enum":
        return "" if isinstance(value, list) and value else "几个值的列表，至少一个"
    if name == "required":
        return (
            "" if isinstance(value, list) and all(isinstance(each, str) for each in value) else "参数名的列表"
        )
    if name == "type":
        kinds = value if isinstance(value, list) else [value]
        return (
            ""
            if kinds and all(kind in KINDS for kind in kinds)
            else f"{'、'.join(KINDS)} 之一，或其中几个的列表"
        )
    return ""


def check_pattern(pattern: str, where: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"{where} 的 pattern {pattern!r} 不是 Python 认得的正则式：{error}。") from None


def check_reference(root: Any, path: str, where: str) -> None:
    """$ref 找得到；一个接一个指下去，不会又指回自己。"""
    seen = {path}
    found = referred(root, path, where)
    while isinstance(found, dict) and "$ref" in found:
        path = found["$ref"]
        if path in seen:
            raise UserError(f"{where} 的 $ref {path!r} 指来指去又指回自己。")
        seen.add(path)
        found = referred(root, path, where)


def referred(root: Any, path: str, where: str = "schema") -> Any:
    """#/$defs/名字 → 那一段 schema。"""
    found = root
    parts = path.removeprefix("#").strip("/").split("/") if path != "#" else []
    for part in [part.replace("~1", "/").replace("~0", "~") for part in parts]:
        if not path.startswith("#") or not isinstance(found, dict) or part not in found:
            raise UserError(f"{where} 的 $ref {path!r} 找不到：只支持同一个 schema 里的 #/$defs/…。")
        found = found[part]
    return found
