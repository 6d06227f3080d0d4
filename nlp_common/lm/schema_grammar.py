"""JSON schema → 文法（gbnf.py 的 GBNF）。空白只有一种写法：逗号、冒号后面一个空格，别处没有。
\\u 后面不许写半个代理对（那不是一个字）；整数部分至多 18 位（64 位整数装得下），指数至多两位（再大，读出来是无穷大）。

支持：type（object、array、string、integer、number、boolean、null，可以写几种）、properties、required、items、
additionalProperties（没有 properties 时）、minItems/maxItems、enum、const、anyOf/oneOf、minimum/maximum、minLength/maxLength、
pattern、format: date/time/date-time、nullable、$ref（#/$defs/…，可以自己套自己）。不认识的限制是 UserError：悄悄不管，写出来的就不合 schema。
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any

from nlp_common.base.errors import UserError
from nlp_common.lm.pattern_grammar import pattern_rule
from nlp_common.lm.schema_fits import BOUNDS, KNOWN, fits, integer_bounds, is_any_object, lookup

NOTES = {"title", "description", "$schema", "$defs", "definitions", "default", "examples", "$comment", "$id"}
Rule = Callable[[str], str]  # 式子 → 起好的规则名
Ref = Callable[[str, str], str]  # $ref 与它在哪里 → 规则名
COUNTS = ("minItems", "maxItems", "minLength", "maxLength")
LISTS = ("enum", "anyOf", "oneOf", "required")
BASE = r"""
value   ::= object | array | string | number | "true" | "false" | "null"
object  ::= "{" (member (", " member)*)? "}"
member  ::= string ": " value
array   ::= "[" (value (", " value)*)? "]"
string  ::= "\"" char* "\""
char    ::= [^"\\\x00-\x1f] | "\\" (["\\/bfnrt] | "u" escaped)
escaped ::= [0-9abcefABCEF] hex{3} | [dD] [0-7] hex{2} | [dD] [89abAB] hex{2} "\\u" [dD] [c-fC-F] hex{2}
hex     ::= [0-9a-fA-F]
integer ::= "0" | "-"? [1-9] [0-9]{0,17}
number  ::= "-"? ("0" | [1-9] [0-9]{0,17}) ("." [0-9]+)? ([eE] [+\-]? [0-9]{1,2})?
year    ::= "000" [1-9] | "00" [1-9] [0-9] | "0" [1-9] [0-9]{2} | [1-9] [0-9]{3}
leap    ::= [0-9]{2} ("0" [48] | [2468] [048] | [13579] [26]) | ("0" [48] | [2468] [048] | [13579] [26]) "00"
day28   ::= "0" [1-9] | "1" [0-9] | "2" [0-8]
long    ::= ("01" | "03" | "05" | "07" | "08" | "10" | "12") "-" (day28 | "29" | "30" | "31")
short   ::= ("04" | "06" | "09" | "11") "-" (day28 | "29" | "30")
date    ::= year "-" (long | short | "02-" day28) | leap "-02-29"
time    ::= ([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9] ":" [0-5] [0-9]
datetime ::= date "T" time ("Z" | [+\-] ([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9])
"""


def quoted(text: str) -> str:
    """一串文字 → GBNF 里带引号的写法。"""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\r", "\\r")
    return f'"{escaped}"'


def literal_of(value: Any) -> str:
    """一个固定的 JSON 值。"""
    return quoted(json.dumps(value, ensure_ascii=False))


def schema_to_grammar(schema: dict) -> str:
    """JSON schema → GBNF 文字；有不认识的限制、互相矛盾的限制，是 UserError，说出在哪里。"""
    lines: list[str] = []
    names: dict[str, str] = {}  # $ref → 规则名
    waiting: list[str] = []

    def rule(body: str) -> str:
        lines.append(f"r{len(lines)} ::= {body}")
        return f"r{len(lines) - 1}"

    def ref(path: str, where: str) -> str:
        if path not in names:
            lookup(schema, path, where)
            name = path.rpartition("/")[2]
            names[path] = name if is_free(name) and name not in names.values() else f"ref{len(names)}"
            waiting.append(path)
        return names[path]

    root = convert(schema, "schema", rule, ref)
    while waiting:
        path = waiting.pop(0)
        lines.append(f"{names[path]} ::= {convert(lookup(schema, path, path), path, rule, ref)}")
    return f"root ::= {root}\n" + "\n".join(lines) + BASE


def is_free(name: str) -> bool:
    """能不能用作规则的名字：是一个词，这里没有用过。"""
    used = re.fullmatch(r"root|call|ref\d+|r\d+", name) or re.search(
        rf"^{re.escape(name)}\s", BASE, re.MULTILINE
    )
    return name.isidentifier() and not used


def convert(schema: Any, where: str, rule: Rule, ref: Ref) -> str:
    """一段 schema → 一个文法的式子。"""
    if schema is True or schema == {}:
        return "value"
    if not isinstance(schema, dict):
        raise UserError(f"{where} 应当是一个对象，写的是 {schema!r}。")
    check_shapes(schema, where)
    if schema.get("nullable") is True:
        rest = {name: value for name, value in schema.items() if name != "nullable"}
        return f'({convert(rest, where, rule, ref)} | "null")'
    if "$ref" in schema:
        only(schema, "$ref", where)
        return ref(schema["$ref"], where)
    for name in ("anyOf", "oneOf"):
        if name in schema:
            only(schema, name, where)
            options = [
                convert(each, f"{where}.{name}[{i}]", rule, ref) for i, each in enumerate(schema[name])
            ]
            return "(" + " | ".join(options) + ")"
    kinds = schema.get("type", list(KNOWN))
    kinds = [kinds] if isinstance(kinds, str) else list(kinds)
    if strange := [kind for kind in kinds if kind not in KNOWN]:
        raise UserError(f"{where} 的 type {strange[0]!r} 不认识：可以是 {'、'.join(KNOWN)}。")
    allowed = NOTES | {"type", "const", "enum", "nullable"} | set().union(*(KNOWN[kind] for kind in kinds))
    if strange := [name for name in schema if name not in allowed]:
        raise UserError(f"{where} 的 {strange[0]!r} 还不支持：去掉它，或把要求写成文法（--grammar）。")
    if "const" in schema or "enum" in schema:
        return choice_rule(schema, where)
    makers = {"object": object_rule, "array": array_rule, "string": string_rule}
    makers |= {"integer": integer_rule, "number": number_rule}
    options = []
    for kind in kinds:
        if kind in makers:
            options.append(makers[kind](schema, where, rule, ref))
        else:
            options.append({"boolean": '("true" | "false")', "null": '"null"'}[kind])
    return options[0] if len(options) == 1 else "(" + " | ".join(options) + ")"


def check_shapes(schema: dict, where: str) -> None:
    """各个限制的值写成该有的样子；写错了是 UserError，说出是哪一个。"""
    for name, value in schema.items():
        good, shape = True, ""
        if name in COUNTS or name in BOUNDS:
            shape = "不小于 0 的整数" if name in COUNTS else "数"
            good = type(value) is int and value >= 0 if name in COUNTS else type(value) in (int, float)
        elif name in LISTS:
            good, shape = isinstance(value, list), "列表 […]"
            if good and not value and name != "required":
                raise UserError(f"{where} 的 {name} 是空的：没有一个可选。")
        elif name in ("$ref", "format", "pattern"):
            good, shape = isinstance(value, str), "一个名字" if name != "pattern" else "一个正则式"
        elif name == "properties":
            good, shape = isinstance(value, dict), '对象 {"栏名": {…}}'
        elif name == "type":
            kinds = value if isinstance(value, list) else [value]
            good, shape = (
                bool(kinds) and all(isinstance(each, str) for each in kinds),
                "类型的名字，或几个名字的列表",
            )
        if not good:
            raise UserError(f"{where} 的 {name} 要是{shape}，写的是 {value!r}。")


def only(schema: dict, name: str, where: str) -> None:
    """$ref、anyOf、oneOf 旁边还写了别的限制，是 UserError：两样要同时满足，这里做不到。"""
    if more := sorted(schema.keys() - NOTES - {name}):
        raise UserError(f"{where} 的 {name} 旁边还有 {more[0]!r}，还不支持：把它写进 {name} 里面的每一种。")


def choice_rule(schema: dict, where: str) -> str:
    """const、enum：列出的值里，合旁边别的限制（type、minLength……）的那几个。"""
    values = [schema["const"]] if "const" in schema else schema["enum"]
    kept = [literal_of(value) for value in values if fits(value, schema)]
    if not kept:
        raise UserError(f"{where} 的 const 或 enum 里，没有一个值合旁边的限制。")
    return kept[0] if len(kept) == 1 else "(" + " | ".join(kept) + ")"


def object_rule(schema: dict, where: str, rule: Rule, ref: Ref) -> str:
    """各栏按写下的次序；没有列在 required 里的可有可无。什么也没有限制的，就是任意的对象。"""
    if is_any_object(schema):
        return "object"
    more = schema.get("additionalProperties")
    if isinstance(more, dict) and more:
        if schema.get("properties") or schema.get("required"):
            raise UserError(
                f"{where} 的 properties 旁边还有 additionalProperties，还不支持：把各栏写进 properties。"
            )
        one = rule(f"string {quoted(': ')} {convert(more, f'{where}[]', rule, ref)}")
        return f'"{{" ({one} (", " {one})*)? "}}"'
    fields_of = schema.get("properties", {})
    required = set(map(str, schema.get("required", [])))
    if missing := required - set(fields_of):
        raise UserError(f"{where} 的 required 里有 {sorted(missing)[0]!r}，properties 里却没有它。")
    fields = [
        (
            f"{quoted(json.dumps(name, ensure_ascii=False) + ': ')} {convert(each, f'{where}.{name}', rule, ref)}",
            name in required,
        )
        for name, each in fields_of.items()
    ]
    if not fields:
        return '"{}"'
    if not fields[0][1]:
        return f'"{{" {_fields_rule(fields, rule)} "}}"'
    parts = [fields[0][0]]  # 第一栏非写不可：后面的都是先写逗号，要么有、要么没有
    for body, is_required in fields[1:]:
        parts.append(f'", " {body}' if is_required else f'(", " {body})?')
    return f'"{{" {" ".join(parts)} "}}"'


def _fields_rule(fields: list[tuple[str, bool]], rule: Rule) -> str:
    """各栏 (式子, 非写不可) → 规则；第一栏可有可无，所以要记着前面写过没有：写过了，先写逗号。"""
    first, rest = '""', '""'  # 从第 i 栏起：前面还一栏也没写；前面已经写了
    for body, is_required in reversed(fields):
        one = rule(body)
        tail = rule(rest)
        if is_required:
            first, rest = f"{one} {tail}", f'", " {one} {tail}'
        else:
            first, rest = f"({one} {tail} | {rule(first)})", f'(", " {one})? {tail}'
    return rule(first)


def array_rule(schema: dict, where: str, rule: Rule, ref: Ref) -> str:
    item = convert(schema.get("items", {}), f"{where}[]", rule, ref)
    if not item.isidentifier():  # 下面要写两遍，给它起个名字
        item = rule(item)
    low, high = schema.get("minItems", 0), schema.get("maxItems")
    if high is not None and high < low:
        raise UserError(f"{where} 的 maxItems {high} 小于 minItems {low}：写不出这样的数组。")
    if high == 0:
        return '"[]"'
    times = "*" if low <= 1 and high is None else f"{{{max(0, low - 1)},{'' if high is None else high - 1}}}"
    some = f'{item} (", " {item}){times}'
    return f'"[" {some} "]"' if low else f'"[" ({some})? "]"'


def string_rule(schema: dict, where: str, rule: Rule, ref: Ref) -> str:
    kinds = {"date": "date", "time": "time", "date-time": "datetime"}
    if "pattern" in schema:
        if more := {"format", "minLength", "maxLength"} & schema.keys():
            raise UserError(f"{where} 的 pattern 旁边还有 {min(more)}，还不支持：把长短写进 pattern。")
        return f'"\\"" {pattern_rule(schema["pattern"], where)} "\\""'
    if "format" in schema:
        if schema["format"] not in kinds:
            raise UserError(f"{where} 的 format {schema['format']!r} 还不支持：可以是 {'、'.join(kinds)}。")
        return f'"\\"" {kinds[schema["format"]]} "\\""'
    low, high = schema.get("minLength", 0), schema.get("maxLength")
    if high is not None and high < low:
        raise UserError(f"{where} 的 maxLength {high} 小于 minLength {low}：写不出这样的文字。")
    if low == 0 and high is None:
        return "string"
    return f'"\\"" char{{{low},{"" if high is None else high}}} "\\""'


def integer_rule(schema: dict, where: str, rule: Rule, ref: Ref) -> str:
    low, high = integer_bounds(schema)
    if low is None and high is None:
        return "integer"
    if low is not None and high is not None and high < low:
        raise UserError(f"{where} 的 maximum {high} 小于 minimum {low}：没有这样的整数。")
    options = []
    if low is None or low < 0:
        most = None if low is None else -low
        options += [f'"-" {each}' for each in digits(1 if high is None else max(1, -high), most)]
    if high is None or high >= 0:
        options += digits(max(0, low or 0), high)
    return "(" + " | ".join(options) + ")"


def number_rule(schema: dict, where: str, rule: Rule, ref: Ref) -> str:
    """有界限的数：小数至多六位，不用科学记数。界限不是整数的，往里收成整数：少了几个值，不会多。"""
    if not set(BOUNDS) & schema.keys():
        return "number"
    lows = [
        (math.ceil(schema[name]), name == "exclusiveMinimum")
        for name in ("minimum", "exclusiveMinimum")
        if name in schema
    ]
    highs = [
        (math.floor(schema[name]), name == "exclusiveMaximum")
        for name in ("maximum", "exclusiveMaximum")
        if name in schema
    ]
    low, open_low = max(lows, default=(None, False))
    high, open_high = min(highs, key=lambda each: (each[0], not each[1]), default=(None, False))
    options = []
    if low is None or low < 0:  # 负的：减号后面的大小
        ends_below_zero = high is not None and high <= 0
        nearest, nearest_open = (-high, open_high) if high is not None and ends_below_zero else (0, True)
        options += [
            f'"-" {each}' for each in decimals(nearest, nearest_open, low if low is None else -low, open_low)
        ]
    if high is None or high >= 0:
        starts_above = low is not None and low >= 0
        options += decimals(max(0, low or 0), open_low and starts_above, high, open_high)
    if not options:
        raise UserError(f"{where} 的界限之间写不出数（不是整数的界限，往里收成了整数）。")
    return "(" + " | ".join(options) + ")"


def decimals(low: int, open_low: bool, high: int | None, open_high: bool) -> list[str]:
    """low 到 high（都不小于 0）之间的数；open：不含这一头。"""
    found = []
    if high is None or low < high:
        if open_low:
            found.append(f'"{low}." [0-9]{{0,5}} [1-9]')
        inside = digits(low + open_low, None if high is None else high - 1)
        found += [f'{each} ("." [0-9]{{1,6}})?' for each in inside]
    if high is not None and low <= high and not open_high and not (low == high and open_low):
        found.append(f'"{high}" ("." "0"{{1,6}})?')
    return found


def digits(low: int, high: int | None) -> list[str]:
    """low 到 high（都不小于 0；None 是没有上限）的十进制写法：按位数分段，每段再按最高位分。"""
    found = []
    if high is None:
        size = len(str(low))
        found.append(f"[1-9] [0-9]{{{size},{max(size, 17)}}}")
        high = 10**size - 1
    while low <= high:
        end = min(high, 10 ** len(str(low)) - 1)  # 同样多位的最后一个
        found += same_digits(str(low), str(end))
        low = end + 1
    return found


def same_digits(low: str, high: str) -> list[str]:
    if len(low) == 1:
        return [f"[{low}-{high}]"]
    n = len(low) - 1
    if low[0] == high[0]:
        return [f'"{low[0]}" {rest}' for rest in same_digits(low[1:], high[1:])]
    found, first, last, tail = [], int(low[0]), int(high[0]), []
    if low[1:] != "0" * n:
        found += [f'"{low[0]}" {rest}' for rest in same_digits(low[1:], "9" * n)]
        first += 1
    if high[1:] != "9" * n:
        tail = [f'"{high[0]}" {rest}' for rest in same_digits("0" * n, high[1:])]
        last -= 1
    if first <= last:
        found.append(f"[{first}-{last}] [0-9]{{{n}}}")
    return found + tail
