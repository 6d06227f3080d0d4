"""正则式（JSON schema 的 pattern）→ 文法的式子，写的是 JSON 字符串引号里面的那一段。schema_grammar.py 用。

认得：字、转义、``.``、``[…]``、``\\d \\w \\s``、分组、``|``、``* + ? {m,n}``，开头的 ``^``、结尾的 ``$``。没有 ^、$ 的那一头，
前面、后面可以有别的字（JSON schema 的规定：找得到就算合）。别的（\\b、前后看、反向引用……）是 UserError。
写出来的一定合；合的未必都写得出：``\\d`` 只写 0 到 9，``\\w`` 只写英文字母、数字、下划线和常用的汉字，``\\s`` 只写空格。
"""

from __future__ import annotations

import json
import re

from nlp_common.base.errors import UserError

LAST = 0x10FFFF
CLASSES = {"d": [(48, 57)], "w": [(48, 57), (65, 90), (95, 95), (97, 122), (0x4E00, 0x9FA5)], "s": [(32, 32)]}
CONTROLS = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v"}
HEXES = {"x": 2, "u": 4, "U": 8}
Ranges = list[tuple[int, int]]


def pattern_rule(pattern: str, where: str) -> str:
    """pattern → 式子。"""
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"{where} 的 pattern {pattern!r} 不是 Python 认得的正则式：{error}。") from None
    reader = _Reader(pattern, where)
    from_start = reader.take("^")
    body = reader.alternatives()
    if reader.place < len(pattern):
        raise reader.fault("多了一个 )")
    if (from_start or reader.to_end) and reader.top_options > 1:
        raise reader.fault("^、$ 与 | 写在一起：请用括号，例如 ^(a|b)$")
    return ("" if from_start else "char* ") + body + ("" if reader.to_end else " char*")


def text_of(text: str) -> str:
    """一串固定的字，照 JSON 字符串里的写法（引号、反斜杠要转义），写成 GBNF 的一串。"""
    inside = json.dumps(text, ensure_ascii=False)[1:-1]
    return json.dumps(inside, ensure_ascii=False)  # GBNF 的转义与 JSON 相同


def one_of(ranges: Ranges) -> str:
    """几段码位里的一个字：能照写的放进 […]，引号与反斜杠要转义的另列；控制字符不写。"""
    plain: Ranges = []
    for low, high in ranges:
        for first, last in ((0x20, 0x21), (0x23, 0x5B), (0x5D, 0xD7FF), (0xE000, LAST)):
            if max(low, first) <= min(high, last):
                plain.append((max(low, first), min(high, last)))
    options = ["[" + "".join(f"\\U{low:08X}-\\U{high:08X}" for low, high in plain) + "]"] if plain else []
    options += [text_of(char) for char in '"\\' if any(low <= ord(char) <= high for low, high in ranges)]
    return options[0] if len(options) == 1 else "(" + " | ".join(options) + ")" if options else ""


def without(ranges: Ranges) -> Ranges:
    """取反。"""
    found, start = [], 0
    for low, high in sorted(ranges):
        if low > start:
            found.append((start, low - 1))
        start = max(start, high + 1)
    return [*found, (start, LAST)] if start <= LAST else found


class _Reader:
    """从左读到右。depth 是在几层括号里，to_end 是读到了结尾的 $，top_options 是最外面有几种。"""

    def __init__(self, pattern: str, where: str):
        self.pattern, self.where, self.place = pattern, where, 0
        self.depth, self.to_end, self.top_options = 0, False, 1

    def fault(self, why: str) -> UserError:
        return UserError(f"{self.where} 的 pattern {self.pattern!r} 写不成文法：{why}。")

    def take(self, text: str) -> bool:
        if self.pattern.startswith(text, self.place):
            self.place += len(text)
            return True
        return False

    def alternatives(self) -> str:
        options = [self.sequence()]
        while self.take("|"):
            options.append(self.sequence())
        if self.depth == 0:
            self.top_options = len(options)
        return options[0] if len(options) == 1 else "(" + " | ".join(options) + ")"

    def sequence(self) -> str:
        parts: list[str] = []
        while self.place < len(self.pattern) and self.pattern[self.place] not in "|)":
            if self.depth == 0 and self.pattern[self.place :] == "$":
                self.to_end, self.place = True, len(self.pattern)
                break
            parts.append(self.item() + self.times())
        return " ".join(parts) or '""'

    def item(self) -> str:
        char = self.pattern[self.place]
        self.place += 1
        if char in "^$":
            raise self.fault(f"{char} 只能写在整个式子的{'开头' if char == '^' else '结尾'}")
        if char in "*+?{":
            raise self.fault(f"{char} 前面没有东西可以重复")
        if char == "(":
            return self.group()
        if char == ".":
            return one_of(without([(10, 10)]))
        if char == "[":
            return self.char_class()
        if char == "\\":
            ranges = self.escape()
            return (
                one_of(ranges)
                if len(ranges) > 1 or ranges[0][0] < ranges[0][1]
                else text_of(chr(ranges[0][0]))
            )
        return text_of(char)

    def group(self) -> str:
        if self.take("?") and not self.take(":"):
            raise self.fault("不认识 (?…) 这种写法")
        self.depth += 1
        body = self.alternatives()
        self.depth -= 1
        if not self.take(")"):
            raise self.fault("少了一个 )")
        return f"({body})"

    def times(self) -> str:
        """重复几次，照原样抄给 GBNF；后面的 ?（尽量少）不改变合不合。"""
        found = ""
        if self.place < len(self.pattern) and self.pattern[self.place] in "*+?":
            found = self.pattern[self.place]
            self.place += 1
        elif self.take("{"):
            inside, closed, _ = self.pattern[self.place :].partition("}")
            low, comma, high = inside.partition(",")
            if (
                not closed
                or not all(each.isdigit() or not each for each in (low, high))
                or not inside.strip(",")
            ):
                raise self.fault("{ 后面要是次数，例如 {2,4}；要写 { 这个字，用 \\{")
            found = "{" + (low or "0") + comma + high + "}"
            self.place += len(inside) + 1
        if found and not self.take("?") and self.take("+"):
            raise self.fault("不认识 ++、*+ 这种写法")
        return found

    def escape(self) -> Ranges:
        """反斜杠后面的一个。"""
        if self.place == len(self.pattern):
            raise self.fault("末尾多了一个反斜杠")
        char = self.pattern[self.place]
        self.place += 1
        if char in CLASSES:
            return CLASSES[char]
        if char in HEXES:
            written = self.pattern[self.place : self.place + HEXES[char]]
            self.place += HEXES[char]
            return [(int(written, 16),) * 2]
        if char in CONTROLS:
            return [(ord(CONTROLS[char]),) * 2]
        if char.isalnum():
            raise self.fault(f"不认识 \\{char}")
        return [(ord(char),) * 2]

    def char_class(self) -> str:
        is_negated, ranges = self.take("^"), []
        first = True
        while first or not self.take("]"):
            if self.place >= len(self.pattern):
                raise self.fault("少了一个 ]")
            low = self.class_member()
            is_range = (
                self.pattern[self.place : self.place + 1] == "-"
                and self.pattern[self.place + 1 : self.place + 2] != "]"
            )
            if is_range and len(low) == 1:
                self.place += 1
                ranges.append((low[0][0], self.class_member()[0][1]))
            else:
                ranges += low
            first = False
        found = one_of(without(ranges) if is_negated else ranges)
        if not found:
            raise self.fault("[…] 里只有控制字符")
        return found

    def class_member(self) -> Ranges:
        if self.place >= len(self.pattern):
            raise self.fault("少了一个 ]")
        char = self.pattern[self.place]
        self.place += 1
        return self.escape() if char == "\\" else [(ord(char),) * 2]
