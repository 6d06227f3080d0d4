"""对话里的工具：OpenAI、ShareGPT、Hermes 的写法都变成同样的文字；写错了说得清是哪一条、哪一轮、哪一项。"""

import json

import pyarrow
import pyarrow.parquet
import pytest

from nlp_common.base.errors import UserError
from nlp_common.data.chats import to_chats, to_pairs, to_questions, to_thumbs
from nlp_common.data.rows import read_rows
from nlp_common.lm.tool_text import call_text, tools_text, with_tools

FUNCTION = {
    "name": "look_up",
    "description": "查一个人某时的故事",
    "parameters": {
        "type": "object",
        "properties": {"person": {"type": "string"}, "time": {"type": "string"}},
        "required": ["person"],
    },
}
TOOLS = [{"type": "function", "function": FUNCTION}]
ARGUMENTS = {"person": "小刚", "time": "清晨"}
CALL = {"name": "look_up", "arguments": ARGUMENTS}
RESULT = '{"place": "花园"}'


def user(content):
    return {"role": "user", "content": content}


def bot(content, **more):
    return {"role": "assistant", "content": content, **more}


def result(content, **more):
    return {"role": "tool", "content": content, **more}


def openai(name, arguments, number="call_1"):
    return {"id": number, "type": "function", "function": {"name": name, "arguments": arguments}}


def human(value):
    return {"from": "human", "value": value}


SYSTEM = {"role": "system", "content": tools_text(TOOLS)}
EXPECTED = [SYSTEM, user("问"), bot(call_text([CALL])), result(RESULT), bot("答")]
ASKED = [user("问"), bot(None, tool_calls=[openai("look_up", json.dumps(ARGUMENTS))])]
ANSWERED = [result(RESULT, tool_call_id="call_1"), bot("答")]
GLAIVE = [
    human("问"),
    {"from": "function_call", "value": json.dumps(CALL)},
    {"from": "observation", "value": RESULT},
    {"from": "gpt", "value": "答"},
]
SAME = [
    {"messages": [*ASKED, *ANSWERED], "tools": TOOLS},
    {"messages": [*ASKED, *ANSWERED], "tools": json.dumps(TOOLS)},
    {"messages": [*ASKED, *ANSWERED], "tools": [FUNCTION]},  # 没有包 {"type": "function"}
    {"messages": [*ASKED, *ANSWERED], "functions": [FUNCTION]},
    {"messages": json.dumps([*ASKED, *ANSWERED]), "tools": json.dumps(TOOLS)},  # csv
    {"messages": [user("问"), bot("", tool_calls=[openai("look_up", ARGUMENTS)]), *ANSWERED], "tools": TOOLS},
    {"messages": [user("问"), bot(None, tool_calls=[CALL]), *ANSWERED], "tools": TOOLS},
    {
        "messages": [
            user("问"),
            {"role": "assistant", "tool_calls": [openai("look_up", json.dumps(ARGUMENTS))]},  # 没有 content
            {"role": "tool", "content": [{"type": "text", "text": RESULT}]},
            bot("答"),
        ],
        "tools": TOOLS,
    },
    {  # OpenAI 以前的写法
        "messages": [
            user("问"),
            bot(None, function_call={"name": "look_up", "arguments": json.dumps(ARGUMENTS)}),
            {"role": "function", "name": "look_up", "content": RESULT},
            bot("答"),
        ],
        "functions": [FUNCTION],
    },
    {"conversations": GLAIVE, "tools": json.dumps([FUNCTION])},
    {"conversations": [GLAIVE[0], {"from": "function_call", "value": CALL}, *GLAIVE[2:]], "tools": TOOLS},
    {"conversations": [GLAIVE[0], {"from": "function_call", "value": [CALL]}, *GLAIVE[2:]], "tools": TOOLS},
    {  # Hermes：调用、结果已经包好
        "conversations": [
            GLAIVE[0],
            {"from": "gpt", "value": call_text([CALL])},
            {"from": "tool", "value": f"<tool_response>\n{RESULT}\n</tool_response>\n"},
            GLAIVE[3],
        ],
        "tools": TOOLS,
    },
    {  # Hermes：system 里已经列了工具，不再列一遍
        "conversations": [{"from": "system", "value": SYSTEM["content"]}, *GLAIVE],
        "tools": json.dumps([FUNCTION]),
    },
]


@pytest.mark.parametrize("row", SAME)
def test_every_way_of_writing_a_call_is_the_same_conversation(row):
    assert to_chats([row], "x") == [{"messages": EXPECTED}]


def test_an_empty_tools_column_changes_nothing():
    for tools in ("[]", [], None, ""):
        row = {"conversations": [human("问"), GLAIVE[3]], "tools": tools}
        assert to_chats([row], "x") == [{"messages": [user("问"), bot("答")]}]


def test_the_tools_stand_behind_the_system_prompt():
    for row in (
        {"messages": [{"role": "system", "content": "规"}, *ASKED, *ANSWERED], "tools": TOOLS},
        {"messages": [{"role": "developer", "content": "规"}, *ASKED, *ANSWERED], "tools": TOOLS},
        {"messages": [*ASKED, *ANSWERED], "system": "规", "tools": TOOLS},
    ):
        (chat,) = to_chats([row], "x")
        assert chat["messages"][0] == {"role": "system", "content": with_tools("规", TOOLS)}
        assert chat["messages"][1:] == EXPECTED[1:]


def test_words_before_the_call_and_several_calls_are_one_turn():
    other = {"name": "look_up", "arguments": {"person": "小兰"}}
    expected = bot("我查一下。\n" + call_text([CALL, other]))
    whole = [user("问"), expected, result("甲"), result("乙"), bot("答")]
    both = [openai("look_up", ARGUMENTS), openai("look_up", {"person": "小兰"}, "call_2")]
    several = {"messages": [user("问"), bot("我查一下。", tool_calls=both), *whole[2:]]}
    written = [
        human("问"),
        {"from": "gpt", "value": "我查一下。"},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "function_call", "value": json.dumps(other)},
        {"from": "tool", "value": "<tool_response>\n甲\n</tool_response>\n<tool_response>乙</tool_response>"},
        {"from": "gpt", "value": "答"},
    ]
    for row in (several, {"conversations": written}):
        assert to_chats([row], "x")[0]["messages"] == whole


def test_results_are_put_in_the_order_of_the_calls():
    """文字里没有 id，第几个结果就是第几个调用的。"""
    both = [openai("look_up", {}, "a"), openai("look_up", {}, "b")]
    asked = [user("问"), bot(None, tool_calls=both)]
    row = {"messages": [*asked, result("乙", tool_call_id="b"), result("甲", tool_call_id="a"), bot("答")]}
    said = to_chats([row], "x")[0]["messages"]
    assert [m["content"] for m in said if m["role"] == "tool"] == ["甲", "乙"]
    assert all(m.keys() == {"role", "content"} for m in said)


def test_calls_without_their_results_are_skipped(capsys):
    both = [openai("look_up", {}, "a"), openai("look_up", {}, "b")]
    asked = [user("问"), bot(None, tool_calls=both)]
    useless = [
        {"messages": [*asked, result("甲", tool_call_id="a"), bot("答")]},
        {"messages": [*asked, result("甲", tool_call_id="a"), result("丙", tool_call_id="c"), bot("答")]},
    ]
    assert len(to_chats([SAME[0], *useless], "x")) == 1
    assert "调用与结果的 id 对不上 2 行" in capsys.readouterr().out


@pytest.mark.parametrize(
    "messages",
    [
        [user("问"), result("甲"), bot("答")],  # 没有调用就有结果
        [user("问"), bot("叫"), result("甲"), user("再问"), bot("答")],  # 结果之后没有回答
        [result("甲"), bot("答")],
        [user("问"), bot("叫"), bot("答")],
    ],
)
def test_turns_out_of_order_are_skipped(messages, capsys):
    to_chats([SAME[0], {"messages": messages, "tools": TOOLS}], "x")
    assert "不是一问一答 1 行" in capsys.readouterr().out


def test_a_conversation_may_take_many_steps_and_end_in_a_call():
    step = [bot(call_text([CALL])), result("甲"), result("")]  # 什么也没返回也是结果
    many = [user("问"), *step, *step, bot("答"), user("再问"), *step, bot("再答")]
    ends = [user("问"), bot(call_text([CALL]))]
    assert [row["messages"] for row in to_chats([{"messages": many}, {"messages": ends}], "x")] == [
        many,
        ends,
    ]
    one = [user("问"), bot(None, tool_calls=[CALL])]
    assert to_chats([{"messages": one}], "x") == [{"messages": ends}]


def test_results_that_are_not_text_are_written_as_json():
    for content, text in (({"地": "花园"}, '{"地": "花园"}'), ([1, 2], "[1, 2]"), (31, "31"), (None, "")):
        row = {"messages": [*ASKED, result(content), bot("答")], "tools": TOOLS}
        assert to_chats([row], "x")[0]["messages"][3] == result(text)


def test_a_call_can_be_context_only():
    row = {"messages": [user("问"), bot(None, tool_calls=[CALL], weight=0), *ANSWERED], "tools": TOOLS}
    (chat,) = to_chats([row], "x")
    assert chat["messages"][2] == bot(call_text([CALL]), weight=0)
    glaive = [GLAIVE[0], {**GLAIVE[1], "loss": False}, *GLAIVE[2:]]
    assert to_chats([{"conversations": glaive}], "x")[0]["messages"][1]["weight"] == 0


def test_parquet_fills_every_row_with_the_same_keys(tmp_path):
    """Parquet 里一栏的对象键都补成一样的：没有的参数读回来是 None，不能当成参数。"""
    calculate = {"name": "calculator", "arguments": {"expression": "1+1"}}
    rows = [
        {"messages": [user("问"), bot(None, tool_calls=[each]), result(RESULT), bot("答")], "tools": TOOLS}
        for each in (CALL, calculate)
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    chats = to_chats(read_rows(str(tmp_path / "train.parquet"), split="train").rows, "x")
    assert chats[0]["messages"] == EXPECTED
    assert chats[1]["messages"][2] == bot(call_text([calculate]))


def test_a_null_written_in_json_is_kept():
    for calls in ([openai("f", '{"x": null}')], json.dumps([{"name": "f", "arguments": {"x": None}}])):
        row = {"messages": [user("问"), bot(None, tool_calls=calls)]}
        assert '"arguments": {"x": null}' in to_chats([row], "x")[0]["messages"][1]["content"]


# ---- 别的阶段 ----


def test_pairs_can_prefer_a_call_or_an_answer_after_a_result():
    called = bot(None, tool_calls=[CALL])
    row = {"prompt": [user("问")], "chosen": [called], "rejected": [bot("不知道")], "tools": TOOLS}
    (pair,) = to_pairs([row], "x")
    assert pair == {"prompt": EXPECTED[:2], "chosen": [EXPECTED[2]], "rejected": [bot("不知道")]}
    after = {"prompt": [*ASKED, ANSWERED[0]], "chosen": "答", "rejected": "不知道", "tools": TOOLS}
    assert to_pairs([after], "x")[0]["prompt"] == EXPECTED[:4]
    sharegpt = {"conversations": GLAIVE[:1], "chosen": GLAIVE[1], "rejected": GLAIVE[3], "tools": TOOLS}
    assert to_pairs([sharegpt], "x")[0]["chosen"] == [EXPECTED[2]]
    whole = {"chosen": [*ASKED, *ANSWERED], "rejected": [*ASKED, ANSWERED[0], bot("错")], "tools": TOOLS}
    assert to_pairs([whole], "x")[0]["prompt"] == EXPECTED[:4]


def test_questions_and_thumbs_keep_the_tools():
    assert to_questions([SAME[0]], "x") == [{"messages": EXPECTED[:4]}]
    assert to_questions([{"prompt": "问", "tools": TOOLS}], "x") == [{"messages": EXPECTED[:2]}]
    (thumb,) = to_thumbs([{**SAME[0], "label": True}], "x")
    assert thumb == {"prompt": EXPECTED[:4], "answer": EXPECTED[4:], "good": True}


# ---- 写错了 ----


def calls(*asked):
    return {"messages": [user("问"), bot(None, tool_calls=list(asked)), *ANSWERED]}


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        (
            calls(openai("look_up", '{"person": ')),
            'messages 第 2 轮 assistant 的 tool_calls 第 1 个的 arguments 不是正确的 JSON：{"person":',
        ),
        (calls(CALL, {"name": ""}), "messages 第 2 轮 assistant 的 tool_calls 第 2 个 没有 name"),
        (calls("叫"), "tool_calls 第 1 个 不是正确的 JSON"),
        (calls({"name": "f", "arguments": [1]}), "第 1 个的 arguments 应是对象，如 {'x': 1}，这里是列表"),
        (
            {"messages": [user("问"), bot(None, tool_calls=3), *ANSWERED]},
            "第 2 轮 assistant 的 tool_calls 应是列表，这里是数字",
        ),
        (
            {"messages": [user("问"), bot(None, function_call={"arguments": "{}"}), *ANSWERED]},
            "第 2 轮 assistant 的 function_call 没有 name",
        ),
        (
            {"messages": [human("问"), {"from": "function_call", "value": "查一下"}, *GLAIVE[2:]]},
            "messages 第 2 轮 function_call 的 value 不是正确的 JSON：查一下",
        ),
        (
            {"messages": [human("问"), {"from": "function_call", "value": ""}, *GLAIVE[2:]]},
            "第 2 轮 function_call 的 value 是空的",
        ),
        ({**SAME[0], "tools": "查一下"}, "tools 不是正确的 JSON：查一下"),
        ({**SAME[0], "tools": 3}, "tools 应是工具的列表（或写成 JSON 的字符串），这里是数字"),
        ({**SAME[0], "tools": [*TOOLS, {"type": "function"}]}, "tools 第 2 个没有 name"),
        (
            {"messages": [*ASKED, result([{"type": "image_url", "image_url": "x"}]), bot("答")]},
            "messages 第 3 轮 tool 的 content 里有 image_url：这里只用文字",
        ),
        (
            {"messages": [*ASKED, ANSWERED[0], bot(3)]},
            "messages 应是字符串，这里是数字：第 4 轮 assistant 的 content 是 3",
        ),
    ],
)
def test_errors_name_the_row_the_turn_and_the_field(bad, expected):
    with pytest.raises(UserError) as caught:
        to_chats([{"messages": SAME[0]["messages"], "tools": TOOLS}, bad], "数据.jsonl")
    assert str(caught.value).startswith("数据.jsonl 第 2 条：") and expected in str(caught.value)
