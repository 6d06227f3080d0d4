"""文法的文字 → 树。约束解码（text_generation/constrained_decoding.py、agent/tool_schema.py）的第一步。

文法写成 GBNF（llama.cpp、xgrammar 用的那一种 EBNF）：

    root   ::= object
    object ::= "{" pair ("," pair)* "}"
    digit  ::= [0-9]        # 字符类；[^"] 是取反；x? x* x+ x{2,4} 是重复；a | b 是任选

三步，一步一个文件：
1. gbnf.py（这里）：解析成树，字拆成字节。UTF-8 的一个汉字是三个字节，token 可能从字的中间断开，所以按字节走；
2. automaton.py：下推自动机。状态是一组栈（还没写完的规则），读一个字节换一个状态；
3. token_masks.py：从一个状态出发，词表里哪些 token 走得通。
"""

import re

from nlp_common.base.errors import UserError

# ---------------------------------------------------------------- 1. 文法 → 树
# 树的节点：("bytes", frozenset) 一个字节 | ("rule", 名字) | ("seq", [节点]) | ("alt", [节点]) | ("repeat", 节点, 少, 多)

TOKENS = re.compile(
    r"""\s+|\#[^\n]*|(?P<name>[A-Za-z_][\w-]*)|(?P<text>"(?:[^"\\\n]|\\.)*")|(?P<cls>\[(?:[^\]\\]|\\.)*\])"""
    r"""|(?P<count>\{\s*\d+\s*(?:,\s*\d*\s*)?\})|(?P<mark>::=|[|()*+?.])"""
)
ESCAPES = {
    "n": "\n",
    "r": "\r",
    "t": "\t",
    "\\": "\\",
    '"': '"',
    "]": "]",
    "[": "[",
    "-": "-",
    "^": "^",
    "/": "/",
}


def parse_grammar(text: str) -> dict[str, tuple]:
    """GBNF 的文字 → {规则名: 树}；写错了是 UserError，说出第几行。"""
    items = _tokens(text)
    rules: dict[str, tuple] = {}
    place = 0
    while place < len(items):
        kind, name, line = items[place]
        if kind != "name" or place + 1 >= len(items) or items[place + 1][1] != "::=":
            raise UserError(f"文法的第 {line} 行：应当是“规则名 ::= …”，写的是 {name!r}。")
        if name in rules:
            raise UserError(f"文法的第 {line} 行：规则 {name} 定义了两次。")
        rules[name], place = _alternatives(items, place + 2)
    if "root" not in rules:
        raise UserError("文法里没有 root：从哪条规则开始？请写一条 root ::= …。")
    return rules


def _tokens(text: str) -> list[tuple[str, str, int]]:
    found, place = [], 0
    while place < len(text):
        match = TOKENS.match(text, place)
        line = text.count("\n", 0, place) + 1
        if not match:
            raise UserError(f"文法的第 {line} 行：读不懂 {text[place : place + 12]!r}。")
        place = match.end()
        if match.lastgroup:
            found.append((match.lastgroup, match[0], line))
    return found


def _alternatives(items: list, place: int) -> tuple[tuple, int]:
    options = []
    while True:
        parts: list[tuple] = []
        while place < len(items):
            kind, text, line = items[place]
            is_next_rule = kind == "name" and place + 1 < len(items) and items[place + 1][1] == "::="
            if (text in ("|", ")") and kind == "mark") or is_next_rule:
                break
            place += 1
            if kind == "name":
                parts.append(("rule", text))
            elif kind == "text":
                parts.append(literal(_unescape(text[1:-1], line)))
            elif kind == "cls":
                parts.append(char_class(text[1:-1], line))
            elif text == "(":
                inner, place = _alternatives(items, place)
                if place >= len(items) or items[place][1] != ")":
                    raise UserError(f"文法的第 {line} 行：左括号没有配上右括号。")
                parts.append(inner)
                place += 1
            elif text == ".":
                parts.append(code_points([(0, 0x10FFFF)]))
            elif parts and (kind == "count" or text in "*+?"):
                parts[-1] = ("repeat", parts[-1], *_bounds(text, line))
            else:
                raise UserError(f"文法的第 {line} 行：{text!r} 不能写在这里。")
        options.append(("seq", parts))
        if place >= len(items) or items[place][1] != "|":
            return (options[0] if len(options) == 1 else ("alt", options)), place
        place += 1


def _bounds(text: str, line: int) -> tuple[int, int | None]:
    if text in "*+?":
        return {"*": (0, None), "+": (1, None), "?": (0, 1)}[text]
    low, comma, high = text.strip("{} ").partition(",")
    most = int(high) if high.strip() else (None if comma else int(low))
    if most is not None and most < int(low):
        raise UserError(f"文法的第 {line} 行：{text} 的上限小于下限。")
    return int(low), most


def _unescape(text: str, line: int) -> str:
    def one(match: re.Match) -> str:
        code = match[1]
        if len(code) > 1:  # \xHH、\uHHHH、\UHHHHHHHH
            number = int(code[1:], 16)
            if number > 0x10FFFF or 0xD800 <= number <= 0xDFFF:
                raise UserError(f"文法的第 {line} 行：\\{code} 不是一个字（没有这个码位）。")
            return chr(number)
        if code in "xuU":
            raise UserError(
                f"文法的第 {line} 行：\\{code} 后面要写 {dict(x=2, u=4, U=8)[code]} 位十六进制数。"
            )
        if code not in ESCAPES:
            raise UserError(f"文法的第 {line} 行：不认识 \\{code}。")
        return ESCAPES[code]

    return re.sub(r"\\(x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}|.)", one, text)


def literal(text: str) -> tuple:
    """一串固定的文字。"""
    return ("seq", [("bytes", frozenset([byte])) for byte in text.encode()])


def char_class(text: str, line: int = 1) -> tuple:
    """[a-z你]、[^"\\\\] 里面的一段 → 一个字。"""
    negated = text.startswith("^")
    body = text[1:] if negated else text
    chars = re.findall(r"\\(?:x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}|.)|[^\\]", body, re.DOTALL)
    ranges, i = [], 0
    while i < len(chars):
        low = _unescape(chars[i], line)
        high = low
        if i + 2 < len(chars) and chars[i + 1] == "-":
            high, i = _unescape(chars[i + 2], line), i + 2
        if high < low:
            raise UserError(f"文法的第 {line} 行：[{text}] 里 {low}-{high} 的次序反了。")
        ranges.append((ord(low), ord(high)))
        i += 1
    if not ranges:
        raise UserError(f"文法的第 {line} 行：[{text}] 是空的。")
    if negated:
        ranges = _complement(ranges)
    return code_points(ranges)


def _complement(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    found, start = [], 0
    for low, high in sorted(ranges):
        if low > start:
            found.append((start, low - 1))
        start = max(start, high + 1)
    return [*found, (start, 0x10FFFF)] if start <= 0x10FFFF else found


def code_points(ranges: list[tuple[int, int]]) -> tuple:
    """几段码位 → UTF-8 的字节：每段拆成"每个字节各有一个范围"的小段。"""
    options = []
    for low, high in ranges:
        for first, last in ((0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)):
            if max(low, first) <= min(high, last):  # 同样长的一段；代理区的码位不是字
                options += _same_length(
                    list(chr(max(low, first)).encode()), list(chr(min(high, last)).encode())
                )
    nodes = [("seq", [("bytes", frozenset(range(a, b + 1))) for a, b in option]) for option in options]
    return nodes[0] if len(nodes) == 1 else ("alt", nodes)


def _same_length(low: list[int], high: list[int]) -> list[list[tuple[int, int]]]:
    """字节序列 low 到 high 之间的全部 → 几个"每个字节一个范围"的序列。"""
    if len(low) == 1:
        return [[(low[0], high[0])]]
    if low[0] == high[0]:
        return [[(low[0], low[0]), *rest] for rest in _same_length(low[1:], high[1:])]
    least, most = [0x80] * (len(low) - 1), [0xBF] * (len(low) - 1)
    found, first, last = [], low[0], high[0]
    if low[1:] != least:
        found += [[(first, first), *rest] for rest in _same_length(low[1:], most)]
        first += 1
    tail = []
    if high[1:] != most:
        tail = [[(last, last), *rest] for rest in _same_length(least, high[1:])]
        last -= 1
    if first <= last:
        found.append([(first, last), *[(0x80, 0xBF)] * len(least)])
    return found + tail
