"""JSON schema → 文法（gbnf.py 的 GBNF）。空白只有一种写法：逗号、冒号后面一个空格，别处没有。

支持：type（object、array、string、integer、number、boolean、null，可以写几种）、properties、required、items、
minItems/maxItems、enum、const、anyOf/oneOf、minimum/maximum（整数）、minLength/maxLength、format: date/time/date-time、
$ref（#/$defs/…，可以自己套自己）。不认识的限制是 UserError：悄悄不管，写出来的就不合 schema。
"""

import datetime
import json

from nlp_common.base.errors import UserError

NOTES = {"title", "description", "$schema", "$defs", "definitions", "default", "examples", "$comment", "$id"}
KNOWN = {
    "object": {"properties", "required", "additionalProperties"},
    "array": {"items", "minItems", "maxItems"},
    "string": {"minLength", "maxLength", "format"},
    "integer": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
    "number": set(),
    "boolean": set(),
    "null": set(),
}
COUNTS = ("minItems", "maxItems", "minLength", "maxLength")
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
LISTS = ("enum", "anyOf", "oneOf", "required")
BASE = r"""
value   ::= object | array | string | number | "true" | "false" | "null"
object  ::= "{" (member (", " member)*)? "}"
member  ::= string ": " value
array   ::= "[" (value (", " value)*)? "]"
string  ::= "\"" char* "\""
char    ::= [^"\\\x00-\x1f] | "\\" (["\\/bfnrt] | "u" [0-9a-fA-F]{4})
integer ::= "-"? ("0" | [1-9] [0-9]*)
number  ::= integer ("." [0-9]+)? ([eE] [+\-]? [0-9]+)?
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


def literal_of(value) -> str:
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
            names[path] = f"ref{len(names)}"
            waiting.append(path)
        return names[path]

    root = convert(schema, "schema", rule, ref)
    while waiting:
        path = waiting.pop()
        lines.append(f"{names[path]} ::= {convert(lookup(schema, path, path), path, rule, ref)}")
    return f"root ::= {root}\n" + "\n".join(lines) + BASE


def lookup(schema: dict, path: str, where: str) -> dict:
    """#/$defs/名字 → 那一段 schema。"""
    found = schema
    for part in path.removeprefix("#").strip("/").split("/") if path != "#" else []:
        if not isinstance(found, dict) or part not in found:
            raise UserError(f"{where} 的 $ref {path!r} 找不到：只支持同一个 schema 里的 #/$defs/…。")
        found = found[part]
    return found


def convert(schema, where: str, rule, ref) -> str:
    """一段 schema → 一个文法的式子。"""
    if schema is True or schema == {}:
        return "value"
    if not isinstance(schema, dict):
        raise UserError(f"{where} 应当是一个对象，写的是 {schema!r}。")
    check_shapes(schema, where)
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
    allowed = NOTES | {"type", "const", "enum"} | set().union(*(KNOWN[kind] for kind in kinds))
    if strange := [name for name in schema if name not in allowed]:
        raise UserError(f"{where} 的 {strange[0]!r} 还不支持：去掉它，或把要求写成文法（--grammar）。")
    if "number" in kinds and (strange := KNOWN["integer"] & schema.keys()):
        raise UserError(f"{where} 的 {min(strange)!r} 只支持整数：type 要写成 integer，不能有 number。")
    if "const" in schema or "enum" in schema:
        return choice_rule(schema, where)
    makers = {"object": object_rule, "array": array_rule, "string": string_rule, "integer": integer_rule}
    options = []
    for kind in kinds:
        if kind in makers:
            options.append(makers[kind](schema, where, rule, ref))
        else:
            options.append({"number": "number", "boolean": '("true" | "false")', "null": '"null"'}[kind])
    return options[0] if len(options) == 1 else "(" + " | ".join(options) + ")"


def check_shapes(schema: dict, where: str) -> None:
    """各个限制的值写成该有的样子；写错了是 UserError，说出是哪一个。"""
    for name, value in schema.items():
        good, shape = True, ""
        if name in COUNTS or name in BOUNDS:
            shape = "不小于 0 的整数" if name in COUNTS else "整数"
            good = type(value) is int and (name in BOUNDS or value >= 0)
        elif name in LISTS:
            good, shape = isinstance(value, list), "列表 […]"
            if good and not value and name != "required":
                raise UserError(f"{where} 的 {name} 是空的：没有一个可选。")
        elif name in ("$ref", "format"):
            good, shape = isinstance(value, str), "一个名字"
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
    kept = [value for value in values if fits(value, schema)]
    if not kept:
        raise UserError(f"{where} 的 const 或 enum 里，没有一个值合旁边的限制。")
    return "(" + " | ".join(map(literal_of, kept)) + ")"


def object_rule(schema: dict, where: str, rule, ref) -> str:
    """各栏按写下的次序；没有列在 required 里的可有可无。什么也没有限制的，就是任意的对象。"""
    if is_any_object(schema):
        return "object"
    if "properties" not in schema and isinstance(schema.get("additionalProperties"), dict):
        raise UserError(f"{where} 的 'additionalProperties' 还不支持：把各栏写进 properties。")
    fields_of = schema.get("properties", {})
    required = set(map(str, schema.get("required", [])))
    if missing := required - set(fields_of):
        raise UserError(f"{where} 的 required 里有 {sorted(missing)[0]!r}，properties 里却没有它。")
    fields = [
        (f"{literal_of(name)} {quoted(': ')} {convert(each, f'{where}.{name}', rule, ref)}", name in required)
        for name, each in fields_of.items()
    ]
    first, rest = '""', '""'  # 从第 i 栏起：前面还一栏也没写；前面已经写了，要先写逗号
    for body, is_required in reversed(fields):
        one = rule(body)
        tail = rule(rest)
        if is_required:
            first, rest = f"{one} {tail}", f'", " {one} {tail}'
        else:
            first, rest = f"({one} {tail} | {rule(first)})", f'(", " {one})? {tail}'
    return f'"{{" {rule(first)} "}}"'


def is_any_object(schema: dict) -> bool:
    free = schema.get("additionalProperties", True) in (True, {})
    return "properties" not in schema and not schema.get("required") and free


def array_rule(schema: dict, where: str, rule, ref) -> str:
    item = rule(convert(schema.get("items", {}), f"{where}[]", rule, ref))
    low, high = schema.get("minItems", 0), schema.get("maxItems")
    if high is not None and high < low:
        raise UserError(f"{where} 的 maxItems {high} 小于 minItems {low}：写不出这样的数组。")
    if high == 0:
        return '"[]"'
    most = "" if high is None else high - 1
    some = f'{item} (", " {item}){{{max(0, low - 1)},{most}}}'
    return f'"[" {some} "]"' if low else f'"[" ({some})? "]"'


def string_rule(schema: dict, where: str, rule, ref) -> str:
    kinds = {"date": "date", "time": "time", "date-time": "datetime"}
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


def integer_rule(schema: dict, where: str, rule, ref) -> str:
    low, high = integer_bounds(schema)
    if low is None and high is None:
        return "integer"
    if low is None or high is None:
        raise UserError(f"{where} 只写了一边的界限：整数请同时写 minimum 与 maximum。")
    if high < low:
        raise UserError(f"{where} 的 maximum {high} 小于 minimum {low}：没有这样的整数。")
    options = []
    if low < 0:
        options += [f'"-" {each}' for each in digits(max(1, -high), -low)]
        low = 0
    if high >= low:
        options += digits(low, high)
    return "(" + " | ".join(options) + ")"


def integer_bounds(schema: dict) -> tuple[int | None, int | None]:
    """最小、最大；两种写法都有时，取更紧的一个。"""
    lows = [schema["minimum"]] if "minimum" in schema else []
    lows += [schema["exclusiveMinimum"] + 1] if "exclusiveMinimum" in schema else []
    highs = [schema["maximum"]] if "maximum" in schema else []
    highs += [schema["exclusiveMaximum"] - 1] if "exclusiveMaximum" in schema else []
    return max(lows, default=None), min(highs, default=None)


def digits(low: int, high: int) -> list[str]:
    """low 到 high（都不小于 0）的十进制写法：按位数分段，每段再按最高位分。"""
    found = []
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


# ---------------------------------------------------------------- 核对：写出来的合不合 schema


def fits(value, schema, root: dict | None = None) -> bool:
    """一个 JSON 值合不合 schema；只看上面支持的那些限制。与文法是两条路，互相核对。"""
    root = schema if root is None else root
    if schema is True or schema == {}:
        return True
    if "$ref" in schema:
        return fits(value, lookup(root, schema["$ref"], "schema"), root)
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


def same(a, b) -> bool:
    return type(a) is type(b) and a == b


def fits_kind(value, kind: str, schema: dict, root: dict) -> bool:
    if kind == "null":
        return value is None
    if kind == "boolean":
        return isinstance(value, bool)
    if kind in ("integer", "number"):
        if isinstance(value, bool) or not isinstance(value, int if kind == "integer" else int | float):
            return False
        low, high = integer_bounds(schema)
        return kind == "number" or ((low is None or low <= value) and (high is None or value <= high))
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
        return schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", float("inf"))
    if kind == "array":
        size_ok = isinstance(value, list) and schema.get("minItems", 0) <= len(value)
        size_ok = size_ok and len(value) <= schema.get("maxItems", float("inf"))
        return size_ok and all(fits(each, schema.get("items", {}), root) for each in value)
    if not isinstance(value, dict):
        return False
    fields = schema.get("properties")
    if is_any_object(schema):
        return True
    fields = fields or {}
    known = all(name in fields and fits(each, fields[name], root) for name, each in value.items())
    return known and all(name in value for name in schema.get("required", []))


def is_json(text: str, schema: dict) -> bool:
    """一段文字是不是合 schema 的 JSON。"""
    try:
        return fits(json.loads(text), schema)
    except ValueError:
        return False
