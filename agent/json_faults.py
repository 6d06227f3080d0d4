"""模型常把 JSON 写坏的样子，一种一个函数：(对的文字, 随机数) → 写坏的文字；这段文字里没有地方可坏，就是 None。

tool_schema.py 用它量 repair_json 修得好多少、修错多少。
"""

import json
import random
import re
from collections.abc import Callable

TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:]|[^\s{}\[\],:"]+|\s+')  # 字符串、标点、别的词、空白


def pieces(text: str) -> list[str]:
    return TOKEN.findall(text)


def places(parts: list[str], wanted: str) -> list[int]:
    """哪几片是 wanted 里的一种（一个字的标点）。"""
    return [i for i, part in enumerate(parts) if part in wanted]


def change_one(text: str, rng: random.Random, wanted: str, change: Callable[[str], str]) -> str | None:
    """随便挑一个标点，改掉。"""
    parts = pieces(text)
    found = places(parts, wanted)
    if not found:
        return None
    place = rng.choice(found)
    parts[place] = change(parts[place])
    return "".join(parts)


def python_style(text: str, rng: random.Random) -> str | None:
    return repr(json.loads(text))


def trailing_comma(text: str, rng: random.Random) -> str | None:
    return change_one(text, rng, "}]", lambda closer: "," + closer)


def double_comma(text: str, rng: random.Random) -> str | None:
    return change_one(text, rng, ",", lambda comma: ",,")


def no_comma(text: str, rng: random.Random) -> str | None:
    return change_one(text, rng, ",", lambda comma: "")


def unclosed_end(text: str, rng: random.Random) -> str | None:
    ending = len(text) - len(text.rstrip("}]"))
    return text[: -rng.randint(1, ending)]


def unclosed_inside(text: str, rng: random.Random) -> str | None:
    ending = len(text.rstrip("}]"))
    head = change_one(text[:ending], rng, "}]", lambda closer: "")
    return None if head is None else head + text[ending:]


def wrong_closer(text: str, rng: random.Random) -> str | None:
    return change_one(text, rng, "}]", lambda closer: {"}": "]", "]": "}"}[closer])


def extra_closer(text: str, rng: random.Random) -> str | None:
    return text + "}" * rng.randint(1, 2)


def chinese_marks(text: str, rng: random.Random) -> str | None:
    return "".join({",": "，", ":": "："}.get(part, part) for part in pieces(text))


def chinese_quotes(text: str, rng: random.Random) -> str | None:
    return "".join(f"“{part[1:-1]}”" if part.startswith('"') else part for part in pieces(text))


def comments(text: str, rng: random.Random) -> str | None:
    written = rng.choice([", // 说明，还有: 标点\n", ", /* 说明 */", ", # 说明\n"])
    return change_one(text, rng, ",", lambda comma: written)


def code_fence(text: str, rng: random.Random) -> str | None:
    return f"```{rng.choice(['json', ''])}\n{text}\n```"


def talking(text: str, rng: random.Random) -> str | None:
    return f"好的，我来调用：\n{text}\n请稍等。"


def bare_keys(text: str, rng: random.Random) -> str | None:
    return re.sub(r'"(\w+)":', r"\1:", text)


def bare_quotes(text: str, rng: random.Random) -> str | None:
    return text.replace('\\"', '"') if '\\"' in text else None


def bare_newline(text: str, rng: random.Random) -> str | None:
    return text.replace("\\n", "\n") if re.search(r"(?<!\\)\\n", text) and "\\\\" not in text else None


def one_quote(text: str, rng: random.Random) -> str | None:
    """少了一个引号：哪个都有可能。"""
    parts = pieces(text)
    place = rng.choice([i for i, part in enumerate(parts) if part.startswith('"') and len(part) > 2])
    parts[place] = rng.choice([parts[place][1:], parts[place][:-1]])
    return "".join(parts)


def cut_short(text: str, rng: random.Random) -> str | None:
    """写到一半：谁也不知道后面是什么，该不修。"""
    return text[: rng.randint(len(text) // 3, len(text) - 4)]


FAULTS: dict[str, Callable[[str, random.Random], str | None]] = {
    "Python 的写法（单引号、True）": python_style,
    "多余的逗号": trailing_comma,
    "两个逗号": double_comma,
    "少了逗号": no_comma,
    "结尾少了括号": unclosed_end,
    "中间少了括号": unclosed_inside,
    "括号写错": wrong_closer,
    "多了括号": extra_closer,
    "全角的逗号、冒号": chinese_marks,
    "中文的引号": chinese_quotes,
    "注释": comments,
    "代码栏": code_fence,
    "前后有话": talking,
    "键没有引号": bare_keys,
    "字符串里的引号没有转义": bare_quotes,
    "字符串里直接换行": bare_newline,
    "少了一个引号": one_quote,
    "写到一半": cut_short,
}
