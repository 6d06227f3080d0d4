"""一个 JSON 值合不合 schema：只看 schema_grammar.py 支持的那些限制。与文法是两条路，互相核对。"""

from __future__ import annotations

import datetime
import json
import math
import operator
import re
from typing import Any

from nlp_common.base.errors import UserError

BOUNDS = {  # 界限 → 值与它要怎样
    "minimum": operator.ge,
    "exclusiveMinimum": operator.gt,
    "maximum": operator.le,
    "exclusiveMaximum": operator.lt,
}
KNOWN: dict[str, set[str]] = {
    "object": {"properties", "required", "additionalProperties"},
    "array": {"items", "minItems", "maxItems"},
    "string": {"minLength", "maxLength", "format", "pattern"},
    "integer": set(BOUNDS),
    "number": set(BOUNDS),
    "boolean": set(),
    "null": set(),
}


def fits(value: Any, schema: Any, root: dict | None = None) -> bool:
    """一个 JSON 值合不合 schema；只看上面支持的那些限制。与文法是两条路，互相核对。"""
    root = schema if root is None else root
    if schema is True or schema == {} or (value is None and schema.get("nullable") is True):
        return True
    if "$ref" in schema:
        return fits(value, lookup(root or {}, schema["$ref"], "schema"), root)
    if "const" in schema and not same(value, schema["const"]):
        return False
    if "enum" in schema and not any(same(value, each) for each in schema["enum"]):
        return False
    for name in ("anyOf", "oneOf"):
        if name in schema:
            return any(fits(value, each, root) for each in schema[name])
    kinds = schema.get("type", list(KNOWN))
    return any(
        fits_kind(value, kind, schema, root) for kind in ([kinds] if isinstance(kinds, str) else kinds)
    )


def same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and a == b


def fits_kind(value: Any, kind: str, schema: dict, root: dict | None) -> bool:
    if kind == "null":
        return value is None
    if kind == "boolean":
        return isinstance(value, bool)
    if kind in ("integer", "number"):
        if isinstance(value, bool) or not isinstance(value, int if kind == "integer" else int | float):
            return False
        return all(limit(value, schema[name]) for name, limit in BOUNDS.items() if name in schema)
    if kind == "string":
        if not isinstance(value, str):
            return False
        readers = {
            "date": datetime.date.fromisoformat,
            "time": datetime.time.fromisoformat,
            "date-time": datetime.datetime.fromisoformat,
        }
        if "format" in schema:
            try:
                readers[schema["format"]](value)
            except ValueError:
                return False
        if "pattern" in schema and not re.search(schema["pattern"], value):
            return False
        return schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", float("inf"))
    if kind == "array":
        size_ok = isinstance(value, list) and schema.get("minItems", 0) <= len(value)
        size_ok = size_ok and len(value) <= schema.get("maxItems", float("inf"))
        return size_ok and all(fits(each, schema.get("items", {}), root) for each in value)
    if not isinstance(value, dict):
        return False
    if is_any_object(schema):
        return True
    fields, more = schema.get("properties", {}), schema.get("additionalProperties")
    if isinstance(more, dict) and not fields:
        return all(fits(each, more, root) for each in value.values())
    known = all(name in fields and fits(each, fields[name], root) for name, each in value.items())
    return known and all(name in value for name in schema.get("required", []))


def is_json(text: str, schema: dict) -> bool:
    """一段文字是不是合 schema 的 JSON。"""
    try:
        return fits(json.loads(text), schema)
    except ValueError:
        return False


def lookup(schema: dict, path: str, where: str) -> dict:
    """#/$defs/名字 → 那一段 schema。"""
    found = schema
    parts = path.removeprefix("#").strip("/").split("/") if path != "#" else []
    for part in [part.replace("~1", "/").replace("~0", "~") for part in parts]:
        if not isinstance(found, dict) or part not in found:
            raise UserError(f"{where} 的 $ref {path!r} 找不到：只支持同一个 schema 里的 #/$defs/…。")
        found = found[part]
    return found


def integer_bounds(schema: dict) -> tuple[int | None, int | None]:
    """最小、最大；两种写法都有时，取更紧的一个。"""
    lows = [math.ceil(schema["minimum"])] if "minimum" in schema else []
    lows += [math.floor(schema["exclusiveMinimum"]) + 1] if "exclusiveMinimum" in schema else []
    highs = [math.floor(schema["maximum"])] if "maximum" in schema else []
    highs += [math.ceil(schema["exclusiveMaximum"]) - 1] if "exclusiveMaximum" in schema else []
    return max(lows, default=None), min(highs, default=None)


def is_any_object(schema: dict) -> bool:
    free = schema.get("additionalProperties", True) in (True, {})
    return "properties" not in schema and not schema.get("required") and free
