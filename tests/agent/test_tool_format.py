"""tool_format.py：函数 → 工具、对话 → 文字、模型的话 → 调用，与 transformers、Qwen3 的模板比，与随便切的片比。"""

import dataclasses
import enum
import json
import re
from pathlib import Path
from typing import Any, Literal, TypedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils import get_json_schema

import tool_format
from function_schema import function_schema, read_docstring
from nlp_common.base.errors import UserError
from nlp_common.lm.chatml import encode_chat, whole_pieces
from nlp_common.lm.reply_parser import (
    MARKERS,
    BrokenCall,
    Call,
    Reply,
    StreamParser,
    inside_string,
    parse_reply,
    read_values,
)
from nlp_common.lm.tool_text import call_text, with_tools
from tool_examples import TOOLS
from tool_format import chat_text, token_table

QWEN3 = Path(__file__).resolve().parents[3] / "shared" / "data" / "tokenizers" / "qwen3"


@pytest.fixture(scope="module")
def qwen3():
    if not (QWEN3 / "tokenizer.json").exists():
        pytest.skip("没有 ../shared/data/tokenizers/qwen3：Qwen3 的分词器")
    from nlp_common.lm.loading import load_tokenizer

    return load_tokenizer(str(QWEN3))


@pytest.fixture(scope="module")
def tiny():
    from tiny_agent import build_tokenizer

    return build_tokenizer()


# ---------------------------------------------------------------- 1. 函数 → 工具


class Color(enum.Enum):
    RED = "红"
    BLUE = "蓝"


def simple(a: str, b: int, c: float = 1.0, d: bool = False):
    """
    Adds things.

    Args:
        a: first one
        b: the second, which is
            written on two lines
        c: third
        d: fourth
    """


def nested(a: list[str], b: dict[str, int], c: list[list[float]], d: list, e: dict, f: Any):
    """Nested things.

    Args:
        a: words
        b: counts
        c: a table
        d: anything
        e: anything
        f: anything
    """


def choices(a: Literal["x", "y"], b: Color, c: Literal[1, "z", None], d: str = "r"):
    """Choose.

    Args:
        a: one
        b: a color
        c: mixed
        d: pick one (choices: ["r", "g"])
    """


def unions(a: int | str, b: str | None, c: list[int] | str, d: Literal["x"] | None = None):
    """Unions, on
    two lines.

    And a second paragraph.

    Args:
        a: either
        b: maybe
        c: list or word
        d: maybe x
    """


def nothing():
    """Takes nothing."""


class Box:
    def method(self, a: int):
        """A method.

        Args:
            a: number
        """


def returning(a: int) -> str:
    """Returns something.

    Args:
        a: number

    Returns:
        a word

    Raises:
        ValueError: never
    """


@pytest.mark.parametrize("function", [simple, nested, choices, unions, nothing, Box.method, Box().method])
def test_schema_equals_transformers(function):
    assert function_schema(function) == get_json_schema(function)


def test_only_the_return_value_is_left_out():
    theirs = get_json_schema(returning)
    assert theirs["function"].pop("return")
    assert function_schema(returning) == theirs


def test_chinese_docstring_says_the_same():
    def chinese(a: str, b: int, c: float = 1.0, d: bool = False):
        """Adds things.

        参数：
            a：first one
            b （整数）: the second, which is
                written on two lines
            c：third
            d：fourth

        返回：什么也没有
        """

    ours, theirs = function_schema(chinese), get_json_schema(simple)
    assert ours["function"].pop("name") == "chinese" and theirs["function"].pop("name") == "simple"
    assert ours == theirs


def test_dataclass_typed_dict_and_undocumented():
    @dataclasses.dataclass
    class Item:
        name: str
        count: int = 1

    class Place(TypedDict):
        city: str

    def order(items: list[Item], place: Place):
        pass

    found = function_schema(order)["function"]
    item = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "count": {"type": "integer"}},
        "required": ["name"],
        "additionalProperties": False,
    }
    place = {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    }
    assert found["description"] == ""
    assert found["parameters"] == {
        "type": "object",
        "properties": {"items": {"type": "array", "items": item}, "place": place},
        "required": ["items", "place"],
    }


def no_hint(a):
    """x"""


def star(*words: str):
    """x"""


def keywords(**more: str):
    """x"""


def positional(a: int, /):
    """x"""


def odd_type(a: re.Pattern):
    """x"""


def odd_keys(a: dict[int, str]):
    """x"""


def odd_choice(a: Literal[b"x"]):
    """x"""


def unknown(a: "Nowhere"):  # noqa: F821
    """x"""


def renamed(city: str):
    """x

    参数：
        town: 哪里
    """


@pytest.mark.parametrize(
    "function, said",
    [
        (no_hint, "参数 a 没有写类型"),
        (star, "不能是 .words"),
        (keywords, "不能是 .more"),
        (positional, "写在 / 前面"),
        (odd_type, "Pattern 写不成 JSON schema"),
        (odd_keys, "键都是字符串"),
        (odd_choice, "几选一的值"),
        (unknown, "Nowhere，却没有定义"),
        (renamed, "说到参数 town"),
    ],
)
def test_functions_that_cannot_be_tools(function, said):
    with pytest.raises(UserError, match=said):
        function_schema(function)


def test_docstring_without_arguments():
    assert read_docstring("只有一句。\n\n返回：别的") == ("只有一句。", {})
    assert read_docstring("") == ("", {})


# ---------------------------------------------------------------- 2. 对话 → 文字

TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "做事", "parameters": {"type": "object"}},
}
CALLS = [{"name": "f", "arguments": {"x": "北京"}}, {"name": "f", "arguments": {}}]
# 自己写下的，不从模板算：没有 Qwen3 的分词器，也知道应当是什么
STORED = """<|im_start|>system
请帮忙。

# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{"type": "function", "function": {"name": "f", "description": "做事", "parameters": {"type": "object"}}}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call><|im_end|>
<|im_start|>user
早<|im_end|>
<|im_start|>assistant
早！<|im_end|>
<|im_start|>user
做两次<|im_end|>
<|im_start|>assistant
<think>
要两次。
</think>

好：
<tool_call>
{"name": "f", "arguments": {"x": "北京"}}
</tool_call>
<tool_call>
{"name": "f", "arguments": {}}
</tool_call><|im_end|>
<|im_start|>user
<tool_response>
一
</tool_response>
<tool_response>
二
</tool_response><|im_end|>
<|im_start|>assistant
"""
STORED_MESSAGES = [
    {"role": "system", "content": with_tools("请帮忙。", [TOOL])},
    {"role": "user", "content": "早"},
    {"role": "assistant", "content": "<think>\n打招呼。\n</think>\n\n早！"},
    {"role": "user", "content": "做两次"},
    {"role": "assistant", "content": "<think>\n要两次。\n</think>\n\n" + call_text(CALLS, "好：")},
    {"role": "tool", "content": "一"},
    {"role": "tool", "content": "二"},
]


def test_text_is_what_we_stored():
    assert chat_text(STORED_MESSAGES) == STORED
    assert chat_text(STORED_MESSAGES, thinking=False) == STORED + "<think>\n\n</think>\n\n"


WORDS = st.sampled_from(["好", "去花园", "a < b", "第一行\n第二行", "3.5", '他说"好"'])
ASKED = st.fixed_dictionaries({"name": st.just("f"), "arguments": st.dictionaries(WORDS, WORDS, max_size=2)})


@st.composite
def conversations(draw):
    """一段对话，OpenAI 的写法；工具的结果总在调用后面。"""
    turns = [{"role": "system", "content": draw(WORDS)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        turns.append({"role": "user", "content": draw(WORDS)})
        for _ in range(draw(st.integers(0, 2))):
            calls = draw(st.lists(ASKED, min_size=1, max_size=3))
            thought = draw(st.sampled_from(["", "想一想"]))
            asked = {"role": "assistant", "content": draw(st.sampled_from(["", "我查一下"]))}
            if thought:
                asked["reasoning_content"] = thought
            asked["tool_calls"] = [{"type": "function", "function": call} for call in calls]
            turns.append(asked)
            turns += [{"role": "tool", "content": draw(WORDS)} for _ in calls]
        if draw(st.booleans()):
            turns.append({"role": "assistant", "content": draw(WORDS)})
    return turns


def flat(turns: list[dict], tools: list[dict]) -> list[dict]:
    """OpenAI 的写法 → 这里的写法。"""
    turns = [dict(turn) for turn in turns]
    if tools:
        system = turns.pop(0)["content"] if turns[0]["role"] == "system" else ""
        turns.insert(0, {"role": "system", "content": with_tools(system, tools)})
    for turn in turns:
        calls = [each["function"] for each in turn.pop("tool_calls", [])]
        turn["content"] = call_text(calls, turn["content"]) if calls else turn["content"]
        if thought := turn.pop("reasoning_content", ""):
            turn["content"] = f"<think>\n{thought}\n</think>\n\n{turn['content']}"
    return turns


@settings(max_examples=60, deadline=None)
@given(conversations(), st.booleans(), st.integers(0, 2))
def test_text_equals_qwen3_template(qwen3, turns, thinking, n_tools):
    tools = TOOLS[:n_tools]
    theirs = qwen3.apply_chat_template(
        turns, tools=tools or None, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
    )
    assert chat_text(flat(turns, tools), thinking) == theirs


def test_tokens_decode_to_the_text_and_only_the_assistant_is_learned(tiny):
    messages = tool_format.example_chat(TOOLS[:1])
    rows = token_table(tiny, messages)
    ids, is_answer = encode_chat(tiny, messages)
    assert [row[0] for row in rows] == ids
    text = "".join(row[1] for row in rows)
    assert text + "<|im_start|>assistant\n" == "".join([tiny.decode(ids), "<|im_start|>assistant\n"])
    learned = {row[2] for row in rows if row[3]}
    assert learned == {"思考", "调用", "话", "标记"}  # 标记：助手那两轮的 <|im_end|>
    assert sum(row[1] == "<|im_end|>" and row[3] for row in rows) == 2
    assert {row[2] for row in rows if not row[3]} == {"系统", "工具", "用户", "结果", "标记"}
    assert sum(row[1] == "<tool_call>" and row[2] == "调用" for row in rows) == 2
    assert sum(is_answer) == sum(row[3] for row in rows)


# ---------------------------------------------------------------- 3. 模型的话 → 调用

GOOD = '{"name": "f", "arguments": {"x": 1}}'


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("你好", Reply("你好")),
        ("", Reply()),
        ("  \n你好 \n", Reply("你好")),
        (f"<tool_call>\n{GOOD}\n</tool_call>", Reply("", "", [Call("f", {"x": 1})])),
        (f"好：\n<tool_call>\n{GOOD}\n</tool_call>", Reply("好：", "", [Call("f", {"x": 1})])),
        (f"甲<tool_call>{GOOD}</tool_call>乙", Reply("甲\n乙", "", [Call("f", {"x": 1})])),
        ("<think>\n想\n</think>\n\n答", Reply("答", "想")),
        ("<think>没写完", Reply("", "没写完")),
        (f"<think><tool_call>{GOOD}</tool_call></think>答", Reply("答", f"<tool_call>{GOOD}</tool_call>")),
        ("<think>甲</think>乙<think>丙</think>", Reply("乙", "甲丙")),
        ("多出来的</think>结尾</tool_call>", Reply("多出来的\n结尾")),
        (f"<tool_call>{GOOD}\n{GOOD}</tool_call>", Reply("", "", [Call("f", {"x": 1})] * 2)),
        (f"<tool_call>[{GOOD}, {GOOD}]</tool_call>", Reply("", "", [Call("f", {"x": 1})] * 2)),
        (
            '<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>',
            Reply("", "", [Call("f", {"x": 1})]),
        ),
        ('<tool_call>{"name": "f"}</tool_call>', Reply("", "", [Call("f", {})])),
        ('<tool_call>{"name": "f", "arguments": null}</tool_call>', Reply("", "", [Call("f", {})])),
        (f"<tool_call>\n{GOOD}", Reply("", "", [Call("f", {"x": 1})])),  # 没关上，JSON 却写完了
        (
            f"<tool_call>\n<tool_call>\n{GOOD}\n</tool_call>\n</tool_call>",
            Reply("", "", [Call("f", {"x": 1})]),
        ),
        ("<tool_response>\n编的\n</tool_response>答", Reply("答")),
        ("<tool_call>\n</tool_call>", Reply()),
        ("1 < 2 <tool 与 <b>", Reply("1 < 2 <tool 与 <b>")),
    ],
)
def test_replies(text, wanted):
    assert parse_reply(text) == wanted


@pytest.mark.parametrize(
    "body, said",
    [
        ("{'name': 'f'}", "不是合法的 JSON"),
        ('{"name": "f", "arguments": {"x": 1}', "不是合法的 JSON"),
        ('```json\n{"name": "f"}\n```', "不是合法的 JSON"),
        ('{"name": 5, "arguments": {}}', "要写成"),
        ('{"function": "f"}', "要写成"),
        ('"f"', "要写成"),
        ('{"name": "f", "arguments": [1]}', "要是一个对象"),
        ('{"name": "f", "arguments": "x=1"}', "是一个字符串"),
        ('{"name": "f", "arguments": {"x": NaN}}', "不是 JSON 的数"),
        ('{"name": "f", "arguments": {"x": 1e999}}', "太大"),
        ('{"name": "f", "name": "g", "arguments": {}}', "键 name 写了两次"),
        ('{"name": "f", "arguments": {"x": "\\ud800"}}', "代理对"),
        ("[" * 100_000, "太深"),
        ('{"name": "f", "arguments": {"x": ' + "9" * 5000 + "}}", "太大"),
    ],
)
def test_broken_calls_say_what_is_wrong(body, said):
    (call,) = parse_reply(f"<tool_call>\n{body}\n</tool_call>").calls
    assert isinstance(call, BrokenCall) and call.text == body and said in call.error


def test_repair_mends_closed_calls_only():
    from call_repair import repair_json

    broken = "<tool_call>\n{'name': 'f', 'arguments': {'path': '/home/a'}}\n</tool_call>"
    assert parse_reply(broken, repair=repair_json).calls == [Call("f", {"path": "/home/a"})]
    cut = '<tool_call>\n{"name": "f", "arguments": {"path": "/home/a"'  # 也许本来要写 /home/a/tmp
    (call,) = parse_reply(cut, repair=repair_json).calls
    assert isinstance(call, BrokenCall) and "没有写完" in call.error


def test_repair_is_no_way_around_what_is_refused():
    from call_repair import repair_json

    for body in ('{"name": "f", "name": "g", "arguments": {}}', '{"name": "f", "arguments": {"x": 1e999}}'):
        for text in (body, body[:-1] + ",}"):
            (call,) = parse_reply(f"<tool_call>{text}</tool_call>", repair=repair_json).calls
            assert isinstance(call, BrokenCall), text


def test_a_prompt_that_opened_the_thinking():
    assert parse_reply("想\n</think>\n\n答", thinking=True) == Reply("答", "想")


def test_inside_string():
    assert inside_string('{"a": "b') and not inside_string('{"a": "b"')
    assert inside_string(r'{"a": "b\"') and not inside_string('{"a": "b\n')


SCRAPS = st.one_of(
    st.sampled_from(
        [*MARKERS, GOOD, "好", " ", "\n", '"', "<", "</", "tool_call>", "{", "}", "\\", "<think", "，", "𠮷"]
    ),
    st.text(max_size=3),
)
REPLIES = st.lists(SCRAPS, max_size=14).map("".join)


@settings(max_examples=400, deadline=None)
@given(REPLIES, st.data(), st.booleans())
def test_any_split_reads_as_the_whole_and_shows_nothing_else(text, data, thinking):
    whole = parse_reply(text, thinking)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    parser, shown = StreamParser(thinking), ""
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        shown += parser.feed(text[start:end])
        assert whole.content.startswith(shown)  # 显示出去的收不回来：一直是最后那段话的开头
    shown += parser.finish()
    assert Reply(shown, parser.thinking, parser.calls) == whole
    assert not any(marker in whole.content for marker in MARKERS)


@settings(max_examples=100, deadline=None)
@given(REPLIES)
def test_one_character_at_a_time(text):
    parser = StreamParser()
    shown = "".join(parser.feed(char) for char in text) + parser.finish()
    assert Reply(shown, parser.thinking, parser.calls) == parse_reply(text)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(max_size=8) | st.sampled_from(MARKERS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.text(min_size=1, max_size=5), st.dictionaries(st.text(max_size=5), VALUES, max_size=3)),
        min_size=1,
        max_size=3,
    )
)
def test_calls_come_back(calls):
    """写成文字再读回来，是同样的调用；参数里写着 </tool_call> 也一样，转义与否都行。"""
    wanted = [Call(name, arguments) for name, arguments in calls]
    written = [{"name": name, "arguments": arguments} for name, arguments in calls]
    assert parse_reply(call_text(written, "好")) == Reply("好", "", wanted)
    for dump in (lambda value: json.dumps(value, ensure_ascii=False), json.dumps):
        raw = "\n".join(f"<tool_call>\n{dump(call)}\n</tool_call>" for call in written)
        assert parse_reply(raw).calls == wanted


def test_fed_with_tokens_no_half_character_is_shown(tiny):
    """一个 token 一个 token 地喂：半个汉字等着，凑齐了才显示。"""
    text = '我看看 𠮷😀。\n<tool_call>\n{"name": "f", "arguments": {"x": "龘"}}\n</tool_call>'
    ids = tiny(text, add_special_tokens=False)["input_ids"]
    assert any("\ufffd" in tiny.decode([token]) for token in ids)
    parser, shown = StreamParser(), ""
    for piece in whole_pieces(tiny, ids):
        shown += parser.feed(piece)
        assert "\ufffd" not in shown
    assert (shown + parser.finish(), parser.calls) == ("我看看 𠮷😀。", [Call("f", {"x": "龘"})])


def test_values_one_after_another():
    assert read_values('1, "a"\n[2]') == [1, "a", [2]]
    assert read_values("[1, 2]") == [1, 2]
    with pytest.raises(ValueError, match="是空的"):
        read_values(" \n")


# ---------------------------------------------------------------- 4. 脚本


def test_the_lesson(tmp_path, monkeypatch, capsys, tiny):
    monkeypatch.setattr("tiny_agent.build_tokenizer", lambda: tiny)
    run = tool_format.main(["--preset", "tiny", "--n_splits", "20", "--output_dir", str(tmp_path / "out")])
    metrics = run["metrics"]
    assert metrics["different_rate"] == metrics["leaked_rate"] == 0 and metrics["leaked_naive_rate"] > 0.5
    assert 0 < metrics["learned"] < metrics["tokens"] and (tmp_path / "out" / "tokens.svg").exists()
    assert "查一个人某时的故事" in capsys.readouterr().out


def test_own_functions_and_own_reply(tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(
        'import json\ndef hello(name: str):\n    """打招呼"""\ndef _hidden(x):\n    pass\n', encoding="utf-8"
    )
    assert tool_format.main(["--functions", str(file)])["tools"][0]["function"]["name"] == "hello"
    assert tool_format.main(["--reply", f"好<tool_call>{GOOD}</tool_call>"])["reply"]["content"] == "好"
    assert 'f({"x": 1})' in capsys.readouterr().out


@pytest.mark.parametrize(
    "text, said",
    [
        (None, "没有文件"),
        ("def f(:", "运行不了"),
        ("x = 1", "一个函数也没有"),
        ("def f(a): pass", "没有写类型"),
    ],
)
def test_bad_function_files(tmp_path, text, said):
    file = tmp_path / "mine.py"
    if text is not None:
        file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=said):
        tool_format.main(["--functions", str(file)])
