"""模型的话 → 给用户看的话、思考、调用；整段读，或一片一片地读。agent/tool_format.py 的第三步，model_compression/serve.py 也用它。

读的是 Qwen（Hermes）的写法：<think>…</think>话<tool_call>\\n{"name": …, "arguments": {…}}\\n</tool_call>。
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field

# 助手的话里，用户不该看到的几段：开头 → 结尾
HIDDEN = {"<think>": "</think>", "<tool_call>": "</tool_call>", "<tool_response>": "</tool_response>"}
MARKERS = (*HIDDEN, *HIDDEN.values())


@dataclass
class Call:
    """一个读得懂的调用；参数合不合 schema，tool_schema.check_call 看。"""

    name: str
    arguments: dict


@dataclass
class BrokenCall:
    """一个读不懂的调用：原文，和坏在哪里（可以原样告诉模型）。"""

    text: str
    error: str


@dataclass
class Reply:
    """助手的一轮：给用户看的话，思考，调用。"""

    content: str = ""
    thinking: str = ""
    calls: list[Call | BrokenCall] = field(default_factory=list)


# ---------------------------------------------------------------- 一段话 → 话、思考、调用

Repair = Callable[[str], tuple[object, list[str]]]


def parse_reply(text: str, thinking: bool = False, repair: Repair | None = None) -> Reply:
    """整段一次读完：就是把它当作一片喂给 StreamParser，所以两种读法总是一样的。

    thinking：提示里已经写了 <think>，这一段从思考写起。repair（如 tool_schema.repair_json）：坏了的 JSON 先修一修。
    """
    parser = StreamParser(thinking, repair)
    content = parser.feed(text) + parser.finish()
    return Reply(content, parser.thinking, parser.calls)


class StreamParser:
    """一片一片地读模型的话：feed 给出现在可以给用户看的字。

    state 是现在在哪里：""（给用户看的话），或还没有关上的那个标记（<think>、<tool_call>、<tool_response>）。
    rest 是还没有处置的字：话里，是可能正在变成标记的几个字（"<tool_c"）；别处，是这一段到现在的全部。
    """

    def __init__(self, thinking: bool = False, repair: Repair | None = None):
        self.state = "<think>" if thinking else ""
        self.rest = ""
        self.fresh = True  # 一段话的开头：前面的空白不要
        self.blank = ""  # 留着的空白：后面还有话才给出，调用之前的换行就不会留在话的末尾
        self.shown = False  # 给出过话没有
        self.thinking = ""
        self.calls: list[Call | BrokenCall] = []
        self.repair = repair

    def feed(self, piece: str) -> str:
        self.rest += piece
        shown = ""
        while found := self._next_marker():
            at, marker = found
            before, self.rest = self.rest[:at], self.rest[at + len(marker) :]
            shown += self._leave(before, marker)
        if self.state == "":
            keep = unfinished_marker(self.rest)
            shown += self._show(self.rest[: len(self.rest) - keep])
            self.rest = self.rest[len(self.rest) - keep :]
        return shown

    def finish(self) -> str:
        """模型说完了：留着的字是话就给出，是没有关上的思考、调用就收好。"""
        rest, self.rest = self.rest, ""
        if self.state == "":
            return self._show(rest)
        if self.state == "<think>":
            self.thinking += rest.strip("\n")
        elif self.state == "<tool_call>" and rest.strip():
            self.calls += read_calls(rest, False, self.repair)
        self.state = ""
        return ""

    def _next_marker(self) -> tuple[int, str] | None:
        """rest 里下一个有用的标记在哪里。思考、工具结果里只认自己的结尾；调用里的标记写在 JSON 的字符串里就不算。"""
        if self.state in ("<think>", "<tool_response>"):
            wanted: tuple[str, ...] = (HIDDEN[self.state],)
        else:
            wanted = MARKERS
        start = 0
        while True:
            places = [(at, marker) for marker in wanted if (at := self.rest.find(marker, start)) >= 0]
            if not places:
                return None
            at, marker = min(places)
            if self.state != "<tool_call>" or not inside_string(self.rest[:at]):
                return at, marker
            start = at + 1

    def _leave(self, before: str, marker: str) -> str:
        """读到一个标记：before 是它前面的字。返回可以给出的话。"""
        state, shown = self.state, ""
        if state == "":
            shown = self._show(before)
        elif state == "<think>":
            self.thinking += before.strip("\n")
        elif state == "<tool_call>" and before.strip():
            self.calls += read_calls(before, marker == HIDDEN[state], self.repair)
        self.state = marker if marker in HIDDEN else ""  # 多出来的结尾标记，丢掉
        self.fresh, self.blank = True, "\n" if self.shown else ""  # 两段话中间隔着别的，另起一行
        return shown

    def _show(self, text: str) -> str:
        """话 → 现在可以给出的：结尾的空白先留着。"""
        if self.fresh:
            text = text.lstrip()
        body = text.rstrip()
        if not body:
            self.blank += text
            return ""
        shown = self.blank + body
        self.blank, self.fresh, self.shown = text[len(body) :], False, True
        return shown


def unfinished_marker(text: str) -> int:
    """结尾有几个字可能正在变成一个标记："好的<tool_c" → 7。"""
    for size in range(min(len(text), max(map(len, MARKERS)) - 1), 0, -1):
        if any(marker.startswith(text[-size:]) for marker in MARKERS):
            return size
    return 0


def inside_string(text: str) -> bool:
    """读完 text，是不是正在一个 JSON 字符串里面。字符串里不能有换行：有，就是少了一个引号，不算在里面。"""
    inside, escaped = False, False
    for char in text:
        if escaped:
            escaped = False
        elif char == "\\" and inside:
            escaped = True
        elif char == '"':
            inside = not inside
        elif char == "\n":
            inside = False
    return inside


# ---------------------------------------------------------------- 一段 JSON → 调用


def read_calls(text: str, closed: bool = True, repair: Repair | None = None) -> list[Call | BrokenCall]:
    """一对 <tool_call> 中间的文字 → 调用；平常是一个，也有模型把几个 JSON 写在一起。

    没有关上的不修：补上括号就像写完了，参数却可能只写了一半（删除 /home/a，本来要写 /home/a/tmp）。
    """
    text = text.strip()
    try:
        values = read_values(text)
    except ValueError as error:
        value, mended = repair(text) if repair and closed else (None, [])
        if value is None or not mended:  # 没有修，就是 JSON 写得对、这里不认（同一个键写了两次）：不能绕过去
            unclosed = "" if closed else "调用没有写完（没有 </tool_call>）："
            return [BrokenCall(text, unclosed + str(error))]
        values = value if isinstance(value, list) else [value]
    return [as_call(value, text) for value in values]


def as_call(value: object, text: str) -> Call | BrokenCall:
    """{"name": …, "arguments": {…}} → Call。arguments 写成字符串（OpenAI 的写法）也认；没有参数的可以不写。"""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return BrokenCall(text, '调用要写成 {"name": 工具名, "arguments": {参数}}')
    arguments = value.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            (arguments,) = read_values(arguments)
        except ValueError as error:
            return BrokenCall(text, f"arguments 是一个字符串，里面{error}")
    if not isinstance(arguments, dict):
        return BrokenCall(text, f"arguments 要是一个对象 {{参数名: 值}}，写的是 {json.dumps(arguments)}")
    return Call(value["name"], arguments)


def read_values(text: str) -> list:
    """一个接一个的 JSON 值，中间可以有逗号、换行；外面套着 […] 就是里面的几个。不是的，ValueError 说出哪里不对。

    比 json.loads 严：同一个键写了两次、NaN、大得成了无穷的数、半个代理对（写不成 UTF-8）都不认，免得这里与别处读出的不一样。
    """
    decoder = json.JSONDecoder(
        object_pairs_hook=_no_repeats, parse_constant=_no_constants, parse_float=_float, parse_int=_int
    )
    values, place, text = [], 0, text.strip()
    while place < len(text):
        try:
            value, place = decoder.raw_decode(text, place)
        except json.JSONDecodeError as error:
            near = text[max(0, error.pos - 8) : error.pos + 8].replace("\n", "⏎")
            raise ValueError(f"第 {error.pos + 1} 个字（…{near}…）不是合法的 JSON") from None
        except RecursionError:
            raise ValueError("括号套得太深") from None
        values.append(value)
        while place < len(text) and text[place] in " \t\r\n,":
            place += 1
    if not values:
        raise ValueError("是空的")
    if any("\ud800" <= char <= "\udfff" for char in json.dumps(values, ensure_ascii=False)):
        raise ValueError("有半个代理对（\\ud800 到 \\udfff），不是一个字")
    return values[0] if len(values) == 1 and isinstance(values[0], list) else values


def _no_repeats(pairs: list[tuple[str, object]]) -> dict:
    names = [name for name, _ in pairs]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"键 {repeated[0]} 写了两次")
    return dict(pairs)


def _no_constants(word: str) -> None:
    raise ValueError(f"{word} 不是 JSON 的数")


def _float(written: str) -> float:
    if math.isinf(value := float(written)):
        raise ValueError(f"数 {written[:20]} 太大")
    return value


def _int(written: str) -> int:
    if len(written) > 300:
        raise ValueError(f"数 {written[:20]}… 太大")
    return int(written)
