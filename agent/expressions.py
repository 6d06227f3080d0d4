"""算式 → 准确的数：自己写的解析，从不 eval。tools.py 的计算器。

    evaluate("（1.5＋2）×4")  →  Fraction(14, 1)
    shown(evaluate("1/3"))    →  "1/3（约 0.333333333333）"

eval 认得整个 Python：``__import__("os").system(…)`` 也是一个式子。这里认得的只有数、运算符和括号，别的连读都读不进来。
运算符与结合的次序照 Python：** 最紧，从右往左，-2**2 是 -4；// 与 % 向下取整。
"""

from __future__ import annotations

import re
from decimal import Decimal, localcontext
from fractions import Fraction

MOST_CHARS = 300
MOST_DEPTH = 40  # 括号、正负号、乘方套几层
MOST_BITS = 4096  # 一个数的分子、分母最多几位（二进制）

# 中文输入法打出来的，先换成同样的半角
SAME = str.maketrans("０１２３４５６７８９．＋－−–—＊✕·／％（）【】［］＝　", "0123456789.+----*××/%()()()= ")
TOKEN = re.compile(r"\s*(?:(?P<number>[0-9]+(?:\.[0-9]*)?|\.[0-9]+)|(?P<sign>\*\*|//|[-+*/%()×÷]))")


class ExpressionError(ValueError):
    """算不了：一句话说哪里不对。"""


def evaluate(text: str) -> Fraction:
    """算式 → 准确的值；读不懂、太大、除以零是 ExpressionError。"""
    if len(text) > MOST_CHARS:
        raise ExpressionError(f"算式有 {len(text)} 个字，最多 {MOST_CHARS} 个")
    tokens = read_tokens(text.translate(SAME))
    if not tokens:
        raise ExpressionError("算式是空的")
    reader = Reader(tokens)
    value = reader.sum()
    if reader.at < len(tokens):
        raise ExpressionError(reader.unexpected())
    return value


def read_tokens(text: str) -> list[tuple[str, int]]:
    """→ [(数或运算符, 在第几个字)]；有不认识的字，说出是哪一个。"""
    tokens, place = [], 0
    text = text.rstrip()
    while place < len(text):
        found = TOKEN.match(text, place)
        if found is None:
            raise ExpressionError(strange(text, place + len(text[place:]) - len(text[place:].lstrip())))
        kind = found.lastgroup or ""
        tokens.append((found[kind], found.start(kind) + 1))
        place = found.end()
    return tokens


def strange(text: str, place: int) -> str:
    """不认识的字：说出是哪一个；常见的几种，说该怎样写。"""
    hints = {",": "数里不写逗号：1,000 写成 1000", "^": "乘方写成 **", "=": "等号不用写"}
    word = re.match(r"[^\W\d]\w*|.", text[place:], re.DOTALL)
    said = word[0] if word else ""
    hint = hints.get(said, "只认得数、+ - * / // % ** 和括号")
    return f"第 {place + 1} 个字起的“{said[:20]}”不认识：{hint}"


class Reader:
    """递归下降：sum → product → signed → power → atom，每一层认一种松紧的运算符。"""

    def __init__(self, tokens: list[tuple[str, int]]):
        self.tokens, self.at, self.depth = tokens, 0, 0

    def peek(self) -> str:
        return self.tokens[self.at][0] if self.at < len(self.tokens) else ""

    def take(self) -> str:
        self.at += 1
        return self.tokens[self.at - 1][0]

    def sum(self) -> Fraction:
        value = self.product()
        while self.peek() in ("+", "-"):
            sign, right = self.take(), self.product()
            value = bounded(value + right if sign == "+" else value - right)
        return value

    def product(self) -> Fraction:
        value = self.signed()
        while self.peek() in ("*", "×", "/", "÷", "//", "%"):
            sign, right = self.take(), self.signed()
            if sign in ("*", "×"):
                value = bounded(value * right)
                continue
            if right == 0:
                raise ExpressionError("除数是 0")
            if sign in ("/", "÷"):
                value = bounded(value / right)
            else:
                whole = Fraction(value // right)
                value = bounded(whole if sign == "//" else value - whole * right)
        return value

    def signed(self) -> Fraction:
        """-x、+x；比 ** 松：-2**2 是 -(2**2)。"""
        if self.peek() not in ("+", "-"):
            return self.power()
        sign = self.take()
        value = self.deeper(self.signed)
        return -value if sign == "-" else value

    def power(self) -> Fraction:
        base = self.atom()
        if self.peek() != "**":
            return base
        self.take()
        return raised(base, self.deeper(self.signed))  # 右边还可以有正负号、再一个 **

    def atom(self) -> Fraction:
        token = self.peek()
        if token[:1].isdigit() or token[:1] == ".":
            return bounded(Fraction(self.take().rstrip(".") or "0"))
        if token != "(":
            raise ExpressionError(self.unexpected())
        place = self.tokens[self.at][1]
        self.take()
        value = self.deeper(self.sum)
        if self.peek() != ")":
            raise ExpressionError(self.unexpected() if self.peek() else f"第 {place} 个字的括号没有关上")
        self.take()
        return value

    def deeper(self, read) -> Fraction:
        """往里一层；太深了就停，不等 Python 自己溢出。"""
        self.depth += 1
        if self.depth > MOST_DEPTH:
            raise ExpressionError(f"括号、正负号、乘方套了 {MOST_DEPTH} 层以上")
        value = read()
        self.depth -= 1
        return value

    def unexpected(self) -> str:
        before = self.tokens[self.at - 1][0] if self.at else ""
        hint = "：% 是取余数，百分之五写成 5/100" if before == "%" else ""
        if self.at >= len(self.tokens):
            return f"算式没有写完，末尾少了一个数{hint}"
        token, place = self.tokens[self.at]
        return f"第 {place} 个字“{token}”不该在这里{hint}"


def raised(base: Fraction, exponent: Fraction) -> Fraction:
    """乘方：先估多大，再算。9**9**9**9 不会真的去算。"""
    if exponent.denominator != 1:
        raise ExpressionError(f"指数要是整数，给的是 {shown(exponent)}：开方不会")
    if base == 0 and exponent < 0:
        raise ExpressionError("0 的负几次方，就是除以 0")
    if abs(base) in (0, 1):
        return base ** int(exponent % 2 if base == -1 else min(exponent, 1) if base == 0 else 0)
    bits = max(base.numerator.bit_length(), base.denominator.bit_length()) - 1
    if bits * abs(exponent) > MOST_BITS:
        raise ExpressionError("数太大了")
    return bounded(base ** int(exponent))


def bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MOST_BITS:
        raise ExpressionError("数太大了，或分母太长了")
    return value


def shown(value: Fraction, digits: int = 12) -> str:
    """准确的值 → 文字：整数、有限的小数照写；写不完的写成分数，再说约是多少。"""
    if value.denominator == 1:
        return str(value.numerator)
    places = decimal_places(value.denominator)
    if places is not None and places <= digits:
        sign, scaled = "-" if value < 0 else "", abs(value.numerator) * 10**places // value.denominator
        whole, rest = divmod(scaled, 10**places)
        return f"{sign}{whole}.{rest:0{places}d}"
    with localcontext(prec=digits):
        about = f"{(Decimal(value.numerator) / Decimal(value.denominator)).normalize()}"
    exact = f"{value.numerator}/{value.denominator}"
    return f"{exact}（约 {about}）" if len(exact) <= 40 else f"约 {about}"


def decimal_places(denominator: int) -> int | None:
    """分母只有 2 与 5 这两个因数，就是有限小数：几位；不然是 None。"""
    twos = fives = 0
    while denominator % 2 == 0:
        denominator, twos = denominator // 2, twos + 1
    while denominator % 5 == 0:
        denominator, fives = denominator // 5, fives + 1
    return max(twos, fives) if denominator == 1 else None
