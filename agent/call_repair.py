"""差一点就对的 JSON → 它本来的值。tool_schema.py 的第二步。

    {'city': '北京', 'days': 3,}        单引号、多余的逗号
    {“city”：“北京”，"ok": True}         中文的标点、Python 的 True
    ```json\\n{"city": "北京"\\n```      代码栏、少了括号

先按真正的 JSON 读：读得成就原样返回，所以对的 JSON 不会被改成别的。读不成，再用下面这个宽松的读法，每改一处记一句；
拿不准的地方（两种读法都说得通）宁可不修：修错的调用会真的执行，修不了的还可以让模型重写。
"""

import json
import math
import re
from typing import Any

QUOTES = {
    '"': '"',
    "'": "'",
    "“": '”“"',
    "”": '”"',
    "‘": "’‘'",
    "’": "’'",
    "＂": "＂",
    "「": "」",
    "`": "`",
}  # 开 → 关
OPEN_OBJECT, CLOSE_OBJECT = "{｛", "}｝"
OPEN_ARRAY, CLOSE_ARRAY = "[［【", "]］】"
CLOSERS = CLOSE_OBJECT + CLOSE_ARRAY
COMMAS, COLONS = ",，", ":："
LONGEST, MOST_MENDED = 20_000, 100  # 再长、再坏，就不是差一点了
WORDS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
WORDS |= {"null": None, "None": None, "NULL": None}
ESCAPES = {'"': '"', "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}

BLANK = re.compile(r"(?:\s|\ufeff|//[^\n]*|\#[^\n]*|/\*.*?\*/)*", re.DOTALL)  # 空白与注释
NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
FENCE = re.compile(r"^\s*```\w*[ \t]*\n?(.*?)\n?[ \t]*(?:```\s*)?$", re.DOTALL)
MARK = "[\"'“”‘’＂「」`]"
QUOTED_KEY = rf"{MARK}[^\"'“”‘’＂「」`\n:：,，{{}}\[\]]*{MARK}\s*[{COLONS}]"  # 一个键和它的冒号，有引号
ANY_KEY = rf"(?:{QUOTED_KEY}|{MARK}?[^\W\d]\w*{MARK}?\s*[{COLONS}])"  # 引号少了一个、两个也算
CLOSER = f"[{re.escape(CLOSERS)}]"
ITEM = rf"(?:{MARK}|[\[{{｛\d\-]|true\b|false\b|null\b|True\b|False\b|None\b)"  # 列表里的一项怎样开头

# 一个引号后面跟着什么，才是字符串的结尾：不是的，是字符串里没有转义的引号
AFTER_KEY = re.compile(rf"\s*[{COLONS}]")
AFTER_VALUE = {
    "object": re.compile(
        rf"{BLANK.pattern}(?:$|{CLOSER}|(?:[{COMMAS}]{BLANK.pattern})+(?:{ANY_KEY}|{CLOSER}|[{{｛]|$)|{QUOTED_KEY})",
        re.DOTALL,
    ),
    "array": re.compile(
        rf"{BLANK.pattern}(?:$|{CLOSER}|(?:[{COMMAS}]{BLANK.pattern})+(?:{ITEM}|{CLOSER}|$)|(?<=\s){MARK})",
        re.DOTALL,
    ),
}
# 字符串里出现了这样的：多半是前面少了一个引号，把后面的也读进来了
SWALLOWED = {
    "object": re.compile(rf"[{COMMAS}]\s*{QUOTED_KEY}|{CLOSER}+\s*[{COMMAS}]\s*[\"{{\[]"),
    "array": re.compile(rf"[{COMMAS}]\s*\"|{CLOSER}+\s*[{COMMAS}]\s*[\"{{\[]"),
}


class Unclear(Exception):
    """看不出本来要写什么。"""


def repair_json(text: str) -> tuple[Any, list[str]]:
    """→ (值, [修了什么])；本来就对的，第二项是空的；修不了的是 (None, [])。"""
    try:
        return json.loads(text, parse_constant=_refuse), []
    except (ValueError, RecursionError):
        pass
    if len(text) > LONGEST:
        return None, []
    mender = Mender(text)
    try:
        value = mender.document()
    except (Unclear, RecursionError):
        return None, []
    return value, list(dict.fromkeys(mender.mended))


def _refuse(word: str) -> None:
    raise ValueError(word)  # NaN、Infinity 不是 JSON


class Mender:
    """从左读到右；place 是读到哪里，open 是还没有关上的括号（"object"、"array"）。"""

    def __init__(self, text: str):
        self.text, self.place = text, 0
        self.open: list[str] = []
        self.mended: list[str] = []

    # ------------------------------------------------ 整段

    def document(self) -> Any:
        """去掉代码栏与前后的话，读一个值。"""
        if "```" in self.text and (found := FENCE.match(self.text)):
            self.text = found[1]
            self.mended.append("去掉代码栏 ```")
        start = re.search(rf"[{re.escape(OPEN_OBJECT + OPEN_ARRAY)}]", self.text)
        if not start or re.search(MARK, self.text[: start.start()]):
            raise Unclear
        self.place = start.start()
        if self.text[: self.place].strip("\ufeff \t\r\n"):
            self.mended.append("去掉前面的话")
        value = self.object() if self.peek() in OPEN_OBJECT else self.array()
        self.skip_blank()
        rest = self.text[self.place :]
        if rest.strip(CLOSERS + " \t\r\n"):
            if re.search(rf"[{re.escape(OPEN_OBJECT + OPEN_ARRAY)}]|{MARK}", rest.replace("```", "")):
                raise Unclear  # 后面还有一个值，或者前面就读错了
            self.mended.append("去掉后面的话")
        elif len(rest.strip()) > 5:
            raise Unclear
        elif rest.strip():
            self.mended.append("去掉多余的括号")
        return value

    def value(self, inside: str) -> Any:
        """读一个值；inside 是它在哪里面："object"、"array"。"""
        self.skip_blank()
        char = self.peek()
        if char and char in OPEN_OBJECT:
            return self.object()
        if char and char in OPEN_ARRAY:
            return self.array()
        if char and char in QUOTES:
            return self.string(inside)
        return self.bare(inside)

    # ------------------------------------------------ 对象与列表

    def object(self) -> dict:
        self.take(OPEN_OBJECT, "{")
        self.open.append("object")
        found: dict[str, Any] = {}
        while not self.closed(CLOSE_OBJECT, CLOSE_ARRAY, "}", "array"):
            if "array" in self.open and self.peek() in OPEN_OBJECT:
                self.mended.append("补上 }")  # 键的地方来了一个对象：是列表的下一项，前面就该关上
                break
            key = self.key()
            self.skip_blank()
            if not self.take(COLONS, ":"):
                raise Unclear
            if key in found:
                raise Unclear  # 同一个键两次：不知道要哪一个
            found[key] = self.value("object")
            self.comma()
        self.open.pop()
        return found

    def array(self) -> list:
        self.take(OPEN_ARRAY, "[")
        self.open.append("array")
        found = []
        while not self.closed(CLOSE_ARRAY, CLOSE_OBJECT, "]", "object"):
            if "object" in self.open and re.compile(QUOTED_KEY).match(self.text, self.place):
                self.mended.append("补上 ]")  # 列表里没有键：前面就该关上
                break
            found.append(self.value("array"))
            self.comma()
        self.open.pop()
        return found

    def closed(self, right: str, wrong: str, plain: str, other: str) -> bool:
        """到结尾了吗？少了的右括号补上；写错的（] 当 }），外面没有等着它的，就当是写错了。"""
        self.skip_blank()
        if self.place == len(self.text):
            self.mended.append(f"补上 {plain}")
            return True
        if self.take(right, plain):
            return True
        if self.peek() in wrong:
            if other in self.open and self.closers_left() < len(self.open):
                self.mended.append(f"补上 {plain}")
            else:
                self.place += 1
                self.mended.append(f"右括号改成 {plain}")
            return True
        return False

    def closers_left(self) -> int:
        """后面的右括号比左括号多几个（字符串里的不算）：够数，就只是写错了；不够，才是少了一个。"""
        if len(self.mended) > MOST_MENDED:
            raise Unclear
        rest = re.sub(r'"(?:[^"\\]|\\.)*"', "", self.text[self.place :])
        return sum(rest.count(char) for char in CLOSERS) - sum(
            rest.count(char) for char in OPEN_OBJECT + OPEN_ARRAY
        )

    def comma(self) -> None:
        """值后面的逗号：一个；多了的去掉，少了的补上。"""
        count = 0
        self.skip_blank()
        while self.take(COMMAS, ","):
            count += 1
            self.skip_blank()
        is_end = self.place == len(self.text) or self.peek() in CLOSERS
        if count > 1 or (count and is_end):
            self.mended.append("去掉多余的逗号")
        if not count and not is_end:
            self.mended.append("补上逗号")

    # ------------------------------------------------ 字符串、数、单个的词

    def key(self) -> str:
        if self.peek() in QUOTES:
            return self.string("key")
        found = re.compile(rf"([^\W\d]\w*){MARK}?(?=\s*[{COLONS}])").match(self.text, self.place)
        if not found:
            raise Unclear
        self.place = found.end()
        self.mended.append("键加上引号")
        return found[1]

    def string(self, inside: str) -> str:
        """一个字符串。引号后面像是字符串完了（冒号、逗号加下一个键、右括号），才算关上；不然是没有转义的引号。"""
        start, closers = self.place + 1, QUOTES[self.peek()]
        after = AFTER_KEY if inside == "key" else AFTER_VALUE[inside]
        end = start
        while end < len(self.text):
            if self.text[end] == "\\":
                end += 1
            elif self.text[end] in closers and after.match(self.text, end + 1):
                break
            end += 1
        body, step = self.text[start:end], 1
        found = (
            SWALLOWED[inside].search(body) if inside in SWALLOWED and re.search(r'(?<!\\)"', body) else None
        )
        if inside == "key" and (end >= len(self.text) or re.search(r"[:：,，{}\[\]]", body)):
            found = re.compile(r"(\w+)\s*(?=[:：])").match(body)
            if not found:
                raise Unclear
            body, end, step = found[1], start + found.end(), 0
            self.mended.append("补上引号")
        elif found:
            body, end, step = body[: found.start()].rstrip(), start + found.start(), 0
            self.mended.append("补上引号")
        elif end >= len(self.text):
            body, end, step = *self.unclosed(start), 0
            self.mended.append("补上引号")
        if step and (self.text[start - 1] != '"' or self.text[end] != '"'):
            self.mended.append('引号改成 "')
        self.place = end + step
        return self.unescape(body, closers)

    def unclosed(self, start: int) -> tuple[str, int]:
        """没有关上的字符串：后面只剩右括号，而且正好是还开着的几个，就到它们为止。"""
        body = self.text[start:].rstrip()
        kept = body.rstrip(CLOSERS + " \t\r\n")
        closers = [char for char in body[len(kept) :] if char in CLOSERS]
        if not self.open or len(closers) != len(self.open) or not kept:
            raise Unclear
        return kept, start + len(kept)

    def unescape(self, body: str, closers: str) -> str:
        """\\n 这样的转义；字符串里直接写的换行、没有转义的引号、不认识的转义也照它的意思读。"""
        found, i = [], 0
        while i < len(body):
            char, following = body[i], body[i + 1 : i + 2]
            if char != "\\":
                if char < " ":
                    self.mended.append("字符串里的换行、制表符写成 \\n、\\t")
                elif char == '"':
                    self.mended.append("字符串里的引号加上 \\")
                found.append(char)
                i += 1
            elif following == "u" and re.fullmatch(r"[0-9a-fA-F]{4}", body[i + 2 : i + 6]):
                found.append(chr(int(body[i + 2 : i + 6], 16)))
                i += 6
            elif following in ESCAPES:
                found.append(ESCAPES[following])
                i += 2
            else:
                self.mended.append("不认识的转义")
                found.append(following if following and following in closers else "\\" + following)
                i += 2
        text = "".join(found)
        return text.encode("utf-16", "surrogatepass").decode(
            "utf-16", "replace"
        )  # 两个 \\ud83d\\ude00 合成一个字

    def bare(self, inside: str) -> Any:
        """没有引号的：数、true、None，或者忘了引号的一个词。"""
        number = NUMBER.match(self.text, self.place)
        if number and self.ends_at(number.end(), inside):
            self.place = number.end()
            return self.number(number[0])
        word = re.compile(r"[^\W\d]\w*").match(self.text, self.place)
        if not word:
            raise Unclear
        if word[0] in WORDS and self.ends_at(word.end(), inside):
            self.place = word.end()
            if word[0] not in ("true", "false", "null"):
                self.mended.append("True、False、None 写成 true、false、null")
            return WORDS[word[0]]
        quoted = re.compile(rf"([^\W\d]\w*){MARK}?").match(self.text, self.place)
        if word[0].lower() in ("nan", "infinity", "undefined", "nil", "none", "true", "false", "null"):
            raise Unclear
        if quoted and self.ends_at(quoted.end(), inside):
            self.place = quoted.end()
            self.mended.append("补上引号")
            return quoted[1]
        raise Unclear

    def number(self, written: str) -> int | float:
        plain = written.lstrip("+")
        digits = plain.lstrip("-")
        if len(digits) > 1 and digits[0] == "0" and digits[1].isdigit():
            raise Unclear  # 007：也许是字符串
        is_whole = plain.lstrip("-").isdigit()
        value: int | float = int(plain) if is_whole and len(plain) < 300 else float(plain)
        if math.isinf(value):
            raise Unclear
        try:
            json.loads(written)
        except ValueError:
            self.mended.append("数的写法")
        return value

    def ends_at(self, place: int, inside: str) -> bool:
        """一个没有引号的值到这里完了吗。"""
        return AFTER_VALUE[inside].match(self.text, place) is not None

    # ------------------------------------------------ 一个字一个字地走

    def peek(self) -> str:
        return self.text[self.place : self.place + 1]

    def take(self, chars: str, plain: str) -> bool:
        """下一个字是 chars 里的一个，就走过去；不是它的半角写法就记一句。"""
        char = self.peek()
        if not char or char not in chars:
            return False
        if char != plain:
            self.mended.append(f"标点改成 {plain}")
        self.place += 1
        return True

    def skip_blank(self) -> None:
        found = BLANK.match(self.text, self.place)
        assert found  # 空的也匹配
        if found[0].strip("\ufeff \t\r\n"):
            self.mended.append("去掉注释")
        self.place = found.end()
