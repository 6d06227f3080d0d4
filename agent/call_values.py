"""一个参数的值，算不算写对了：照 BFCL 的规矩比（evaluate_tools.py 的 AST 匹配用），或照我们放宽了的规矩比。

BFCL 的规矩（bfcl-eval 的 ast_checker.py，结论逐题相同，见 tests/agent/test_evaluate_tools.py）：
  1. 先看类型：与 schema 写的一样；float 可以写成整数，整数不能写成 3.0，true 不是整数。列表再看一层里面的。
     值的类型与标准答案里写的一样，也算（标准答案里是一个变量名的时候）；这样的值要一模一样。
  2. 再看值：是可接受的几个之一。字符串去掉空格与 , . / - _ * ^，不分大小写，单引号当双引号，再比；
     列表、字典里的也这样。字典按键比，列表按次序比，列表里的字典一个一个比。

第 2 条把 12*3 与 12-3 看成一样的，把"北京，上海"与"北京,上海"看成不一样的。own=True 改这两处：
日期、全角、中文的标点与书名号不计较，算式里的运算符计较；整数写成 3.0 也认（JSON 里没有区别）。
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any

TYPES = {
    "string": str,
    "integer": int,
    "float": float,
    "number": float,
    "boolean": bool,
    "array": list,
    "tuple": list,
    "dict": dict,
    "object": dict,
    "any": str,
}
OMITTED = ""  # 可接受的值里有它：这个参数可以不写
DATE = re.compile(r"(?<!\d)(\d{4})[-/.年](\d{1,2})[-/.月](\d{1,2})(?!\d)[日号]?", re.ASCII)

Fault = tuple[str, str]  # (哪一种错："type" 或 "value"，一句话)


def bfcl_text(text: str) -> str:
    return re.sub(r"[ ,./\-_*^]", "", text).lower().replace("'", '"')


def own_text(text: str) -> str:
    """全角变半角，日期成一种写法，空白、标点、引号、书名号不要；算式的 + - * / ( ) 与小数点留着。"""
    text = unicodedata.normalize("NFKC", text).lower().replace("×", "*").replace("÷", "/")
    text = re.sub(r"[\s,、。;:!?\"'“”‘’「」《》_]", "", text)
    text = re.sub(r"(?<!\d)\.|\.(?!\d)", "", text)  # 不是小数点的点
    return DATE.sub(lambda found: f"{found[1]}-{int(found[2]):02}-{int(found[3]):02}", text)


def value_fault(value: Any, schema: dict, accepted: list, own: bool = False) -> Fault | None:
    """一个参数的值，schema 是它的说明，accepted 是可接受的几个值；对了是 None。"""
    wanted = TYPES.get(schema.get("type"), str)
    inner = None
    if schema.get("type") in ("array", "tuple"):
        inner = TYPES.get((schema.get("items") or {}).get("type"))
    if own:
        value = whole_numbers(value, schema)
    if schema.get("type") in ("float", "number") and type(value) is int:
        value = float(value)

    fits, is_variable = type_fits(value, wanted, inner, accepted)
    if not fits:
        return "type", f"类型不对：要 {schema.get('type')}，给的是 {value!r}"
    clean = own_text if own else bfcl_text
    if is_variable:
        right = value in accepted
    elif wanted is dict:
        right = any(dict_fits(value, each, clean) for each in accepted if each != OMITTED)
    elif wanted is list and inner is dict:
        right = any(dicts_fit(value, each, clean) for each in accepted)
    elif wanted is str:
        right = clean(value) in [clean(each) for each in accepted if type(each) is str]
    elif wanted is list:
        right = cleaned(value, clean) in [cleaned(each, clean) for each in accepted if has_items(each)]
    else:
        right = value in accepted
    return None if right else ("value", f"值不对：给的是 {value!r}，可以是 {accepted}")


def whole_numbers(value: Any, schema: dict) -> Any:
    """整数写成了 3.0 的，改成 3；列表里的也改。"""
    if schema.get("type") == "integer" and type(value) is float and value.is_integer():
        return int(value)
    if schema.get("type") in ("array", "tuple") and isinstance(value, list):
        return [whole_numbers(each, schema.get("items") or {}) for each in value]
    return value


def type_fits(value: Any, wanted: type, inner: type | None, accepted: list) -> tuple[bool, bool]:
    """→ (类型对不对，是不是要当变量比)。标准答案的类型与 schema 的不同，它写的就是一个变量。"""
    first = next((type(each) for each in accepted if each != OMITTED), None)
    is_variable = first is not None and first is not wanted
    if type(value) is wanted:
        if inner is None:
            return True, is_variable
        fits = any(type(each) is not list or items_fit(value, inner, each) for each in accepted)
        return fits, is_variable
    return (True, True) if type(value) is first else (False, False)


def items_fit(value: list, inner: type, accepted: list) -> bool:
    first = next((type(each) for each in accepted if each != OMITTED), None)
    return all(type(each) is inner or type(each) is first for each in value)


def has_items(value: Any) -> bool:
    """列表；BFCL 把"可以不写"（空字符串）也当成一个空列表，写 [] 就算对。"""
    return isinstance(value, list | str)


def cleaned(values: Any, clean) -> list:
    values = values if isinstance(values, list | str) else [values]
    return [clean(each) if type(each) is str else each for each in values]


def dict_fits(value: dict, accepted: dict, clean) -> bool:
    """字典：每个键都认得、值可接受；没有写的键都是可以不写的。accepted 的每个值是一列可接受的值。"""
    for key, each in value.items():
        if key not in accepted:
            return False
        if (clean(each) if type(each) is str else each) not in cleaned(accepted[key], clean):
            return False
    return all(key in value or OMITTED in each for key, each in accepted.items())


def dicts_fit(value: list, accepted: Any, clean) -> bool:
    """一列字典：一样多，按次序一个一个地合。"""
    if len(value) != len(accepted):
        return False
    pairs = zip(value, accepted, strict=True)
    return all(type(each) is dict and dict_fits(each, right, clean) for each, right in pairs)
