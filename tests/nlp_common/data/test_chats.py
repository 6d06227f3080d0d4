"""各种列名的数据都变成统一的写法；缺栏报错，废行跳过并计数。"""

from pathlib import Path

import pytest

from nlp_common.base.errors import UserError
from nlp_common.data.chats import to_chats, to_pairs, to_questions, to_texts
from nlp_common.data.rows import read_rows

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="没有 ../shared/data")


def user(content):
    return {"role": "user", "content": content}


def bot(content):
    return {"role": "assistant", "content": content}


def system(content):
    return {"role": "system", "content": content}


def human(value):
    return {"from": "human", "value": value}


def gpt(value):
    return {"from": "gpt", "value": value}


def error_of(convert, rows) -> str:
    with pytest.raises(UserError) as caught:
        convert(rows, "数据.jsonl")
    return str(caught.value)


# ---- 认得的格式 ----


@pytest.mark.parametrize("column", ["text", "completion", "content"])
def test_texts(column):
    assert to_texts([{column: "文", "source": "维基"}], "x") == [{"text": "文", "source": "维基"}]


QA = [user("问"), bot("答")]
CHATS = [
    ({"messages": QA}, QA),
    (
        {"messages": [system("规"), *QA, user("再问"), bot("再答")]},
        [system("规"), *QA, user("再问"), bot("再答")],
    ),
    ({"messages": [{**user("问"), "weight": 0}, bot("答")]}, QA),
    ({"messages": [human("问"), gpt("答")]}, QA),
    ({"messages": [system(" "), *QA]}, QA),
    (
        {"conversations": [human("问"), gpt("答"), human("再问"), gpt("再答")]},
        [*QA, user("再问"), bot("再答")],
    ),
    ({"conversations": [{"from": "system", "value": "规"}, human("问"), gpt("答")]}, [system("规"), *QA]),
    ({"conversations": [human("问"), gpt("答")], "system": "规"}, [system("规"), *QA]),
    ({"conversations": QA, "system": None}, QA),
    ({"input": "问", "target": "答"}, QA),
    ({"instruction": "问", "output": "答"}, QA),
    ({"instruction": "问", "input": "", "output": "答"}, QA),
    ({"instruction": "问", "input": None, "output": "答"}, QA),
    ({"instruction": "翻译", "input": "词", "output": "答"}, [user("翻译\n词"), bot("答")]),
    ({"instruction": "", "input": "问", "output": "答"}, QA),
    (
        {"instruction": "问", "output": "答", "system": "规", "history": [["前问", "前答"]]},
        [system("规"), user("前问"), bot("前答"), *QA],
    ),
    ({"prompt": "问", "completion": "答"}, QA),
    ({"prompt": [user("问")], "completion": [bot("答")]}, QA),
]


@pytest.mark.parametrize("row, messages", CHATS)
def test_chats(row, messages):
    assert to_chats([row], "x") == [{"messages": messages}]


PAIR = {"prompt": [user("问")], "chosen": [bot("好")], "rejected": [bot("坏")]}
LONG = [system("规"), user("前问"), bot("前答"), user("问")]
PAIRS = [
    ({"prompt": "问", "chosen": "好", "rejected": "坏"}, PAIR),
    (PAIR, PAIR),
    ({"prompt": human("问"), "chosen": gpt("好"), "rejected": gpt("坏")}, PAIR),
    ({"prompt": [human("问")], "chosen": [gpt("好")], "rejected": [gpt("坏")]}, PAIR),
    ({"prompt": LONG, "chosen": "好", "rejected": "坏"}, {**PAIR, "prompt": LONG}),
    (
        {"prompt": "问", "chosen": "好", "rejected": "坏", "system": "规"},
        {**PAIR, "prompt": [system("规"), user("问")]},
    ),
    ({"conversations": [human("问")], "chosen": gpt("好"), "rejected": gpt("坏")}, PAIR),
    ({"prompt": "问", "chosen": [user("问"), bot("好")], "rejected": [user("问"), bot("坏")]}, PAIR),
    ({"chosen": [*LONG, bot("好")], "rejected": [*LONG, bot("坏")]}, {**PAIR, "prompt": LONG}),
    ({"question": "问", "response_chosen": "好", "response_rejected": "坏"}, PAIR),
    (
        {"system": "", "history": [], "question": "问", "response_chosen": "好", "response_rejected": "坏"},
        PAIR,
    ),
    (
        {
            "system": "规",
            "history": [["前问", "前答"]],
            "question": "问",
            "response_chosen": "好",
            "response_rejected": "坏",
        },
        {**PAIR, "prompt": LONG},
    ),
]


@pytest.mark.parametrize("row, pair", PAIRS)
def test_pairs(row, pair):
    assert to_pairs([row], "x") == [pair]


def test_other_columns_survive_and_the_input_is_not_changed():
    row = {"messages": QA, "answer": "答", "slot": "mood", "kind": "terse"}
    before = repr(row)
    assert to_chats([row], "x") == [row] and repr(row) == before
    assert to_chats([{"kind": "Alpaca", "input": "问", "target": "答"}], "x")[0]["kind"] == "Alpaca"
    assert to_pairs([{**PAIR, "kinds": ["courteous", "wrong"]}], "x")[0]["kinds"] == ["courteous", "wrong"]


# ---- 格式错误：停下来 ----


@pytest.mark.parametrize(
    "convert, wanted", [(to_texts, "completion"), (to_chats, "input, target"), (to_pairs, "rejected")]
)
def test_unknown_schema_names_columns_found_and_wanted(convert, wanted):
    message = error_of(convert, [{"sentence": "句", "label": 1}])
    assert "数据.jsonl 的格式不认识" in message and "sentence, label" in message and wanted in message
    assert "用错了" not in message


def test_wrong_stage_is_pointed_out():
    assert "像是给偏好对齐用的" in error_of(to_chats, [PAIR])
    assert "像是给SFT用的" in error_of(to_pairs, [{"messages": QA}])


@pytest.mark.parametrize(
    "convert, bad, expected",
    [
        (to_texts, {"title": "题"}, "第 2 条缺少 text 一栏（它有 title）"),
        (to_texts, {}, "第 2 条缺少 text 一栏（它有 零栏）"),
        (to_texts, {"text": ["文"]}, "第 2 条：text 应是字符串，这里是列表"),
        (to_chats, {"messages": "问"}, "第 2 条：messages 应是消息的列表"),
        (to_chats, {"messages": [["问", "答"]]}, "这里有列表"),
        (
            to_chats,
            {"messages": [{"role": "user"}, bot("答")]},
            "要有 role 和 content（或 from 和 value），这里只有 role",
        ),
        (to_chats, {"messages": [user("问"), bot(3)]}, "第 2 条：messages 应是字符串，这里是数字"),
        (to_chats, {"messages": [user("问"), {"role": "narrator", "content": "答"}]}, "角色 narrator 不认识"),
        (to_chats, {"messages": [{"role": ["user"], "content": "问"}]}, "不认识"),
        (to_pairs, {"prompt": "问", "chosen": "好"}, "第 2 条缺少 rejected 一栏"),
        (to_pairs, {"prompt": "问", "chosen": "好", "rejected": 0}, "rejected 应是消息的列表"),
    ],
)
def test_malformed_rows_are_named(convert, bad, expected):
    good = {to_texts: {"text": "文"}, to_chats: {"messages": QA}, to_pairs: PAIR}[convert]
    message = error_of(convert, [good, bad])
    assert expected in message and message.startswith("数据.jsonl 第 2 条")


def test_malformed_history_and_no_rows():
    row = {"question": "问", "response_chosen": "好", "response_rejected": "坏", "history": [["只有问"]]}
    assert "第 1 条：history 应是 [[问, 答], …]" in error_of(to_pairs, [row])
    assert "里没有数据" in error_of(to_texts, [])


# ---- 废行：跳过并计数 ----


@pytest.mark.parametrize(
    "convert, useless, reason",
    [
        (to_texts, {"text": ""}, "text 是空的"),
        (to_texts, {"text": None}, "text 是空的"),
        (to_texts, {"text": " \n\u3000"}, "text 是空的"),
        (to_chats, {"messages": None}, "有一轮是空的"),
        (to_chats, {"messages": []}, "有一轮是空的"),
        (to_chats, {"messages": [user("问"), bot(" ")]}, "有一轮是空的"),
        (to_chats, {"messages": [user("问"), bot(None)]}, "有一轮是空的"),
        (to_chats, {"messages": [*QA, user("再问")]}, "最后一轮不是回答"),
        (to_chats, {"messages": [user("问"), user("再问"), bot("答")]}, "不是一问一答"),
        (to_chats, {"messages": [bot("先说"), *QA]}, "不是一问一答"),
        (to_chats, {"messages": [user("问"), system("规"), bot("答")]}, "不是一问一答"),
        (to_pairs, {**PAIR, "rejected": PAIR["chosen"]}, "好坏两个回答相同"),
        (to_pairs, {**PAIR, "chosen": ""}, "有一个回答是空的"),
        (to_pairs, {**PAIR, "rejected": None}, "有一个回答是空的"),
        (to_pairs, {**PAIR, "prompt": ""}, "有一轮是空的"),
        (to_pairs, {**PAIR, "prompt": QA}, "提示的最后一轮不是提问"),
        (to_pairs, {**PAIR, "chosen": [bot("好"), user("问"), bot("好")]}, "回答不止一轮"),
        (
            to_pairs,
            {
                "prompt": "问",
                "chosen": [*PAIR["prompt"], bot("好")],
                "rejected": [*PAIR["prompt"], bot("好")],
            },
            "好坏两个回答相同",
        ),
    ],
)
def test_useless_rows_are_skipped_and_counted(convert, useless, reason, capsys):
    good = {to_texts: {"text": "文"}, to_chats: {"messages": QA}, to_pairs: PAIR}[convert]
    assert convert([useless, good, useless], "数据.jsonl") == [good]
    printed = capsys.readouterr().out
    assert printed.startswith("数据.jsonl：跳过 2 行（共 3 行）：") and f"{reason} 2 行" in printed
    assert f"没有一行可用：{reason} 1 行" in error_of(convert, [useless])


def test_nothing_is_printed_when_nothing_is_skipped(capsys):
    to_chats([{"messages": QA}], "x")
    assert capsys.readouterr().out == ""


# ---- 对话旁边的栏、别家的写法 ----

BEFORE = {"system": "规", "history": [["前问", "前答"]]}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": QA},
        {"conversations": [human("问"), gpt("答")]},
        {"conversation": QA},
        {"input": "问", "target": "答"},
        {"instruction": "问", "output": "答"},
        {"prompt": "问", "completion": "答"},
    ],
)
def test_system_and_history_beside_any_conversation_are_used(row, capsys):
    assert to_chats([row | BEFORE], "x") == [{"messages": [*LONG, bot("答")]}]
    asked = {name: value for name, value in row.items() if name not in ("target", "output", "completion")}
    if "target" not in row:
        assert to_questions([asked | BEFORE], "x") == [{"messages": LONG}]
    assert capsys.readouterr().out == ""


def test_history_as_messages_or_text_goes_between_the_system_turn_and_the_question():
    before = [user("前问"), bot("前答")]
    for history in (before, [human("前问"), gpt("前答")], '[["前问", "前答"]]', "[['前问', '前答']]"):
        row = {"messages": [system("规"), *QA], "history": history}
        assert to_chats([row], "x") == [{"messages": [*LONG, bot("答")]}]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "问", "chosen": "好", "rejected": "坏"},
        {"instruction": "问", "input": "", "chosen": "好", "rejected": "坏"},
        {"question": "问", "chosen": "好", "rejected": "坏"},
        {"query": "问", "chosen": "好", "rejected": "坏"},
        {"input": "问", "chosen": gpt("好"), "rejected": gpt("坏")},
        {"question": "问", "response_chosen": "好", "response_rejected": "坏"},
        {"chosen": [user("问"), bot("好")], "rejected": [user("问"), bot("坏")]},
    ],
)
def test_system_and_history_beside_any_pair_are_used(row):
    assert to_pairs([row], "x") == [PAIR]
    assert to_pairs([row | BEFORE], "x") == [{**PAIR, "prompt": LONG}]
    assert to_questions([row | BEFORE], "x") == [{"messages": LONG}]


def test_columns_that_are_not_used_are_named_once(capsys):
    row = {"messages": QA, "source": "维基", "kind": "闲聊", "empty": None}
    assert to_chats([row, {**row, "score": 1}], "数据.jsonl")[0]["source"] == "维基"
    assert capsys.readouterr().out == "数据.jsonl：没有用到的栏：source、kind、score\n"
    to_texts([{"text": "文", "label": 1}], "数据.jsonl")
    assert "没有用到的栏：label" in capsys.readouterr().out


@pytest.mark.parametrize("mark", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss": False}])
def test_a_turn_of_weight_zero_is_context_only(mark, capsys):
    rows = [{"messages": [user("问"), bot("坏答") | mark, user("再问"), bot("好答") | {"weight": 1}]}]
    assert to_chats(rows, "x") == [
        {"messages": [user("问"), bot("坏答") | {"weight": 0}, user("再问"), bot("好答")]}
    ]
    assert to_questions(rows, "x") == [{"messages": [user("问"), bot("坏答"), user("再问")]}]
    message = error_of(to_chats, [{"messages": [user("问"), bot("坏答") | mark]}])
    assert "没有一轮回答要学（weight 全是 0） 1 行" in message
    assert "weight 是 0.5，只能是 0（不学）或 1（学）" in error_of(
        to_chats, [{"messages": [user("问"), bot("答") | {"weight": 0.5}]}]
    )


@pytest.mark.parametrize("column", ["label", "kto_tag", "desirable"])
@pytest.mark.parametrize("good, bad", [(True, False), (1, 0), ("true", "False"), ("1", "0")])
def test_answers_marked_bad_are_not_learned(column, good, bad, capsys):
    rows = [
        {"prompt": "问", "completion": "好", column: good},
        {"prompt": "问", "completion": "坏", column: bad},
    ]
    assert [row["messages"] for row in to_chats(rows, "x")] == [[user("问"), bot("好")]]
    assert f"{column} 是 false（不好的回答，不能照着学） 1 行" in capsys.readouterr().out
    assert len(to_questions(rows, "x")) == 2  # 题目没有好坏


def test_a_label_that_is_a_class_is_only_named(capsys):
    rows = [{"prompt": "问", "completion": "答", "label": name} for name in ("翻译", "闲聊")]
    assert len(to_chats(rows, "x")) == 2
    assert "没有用到的栏：label" in capsys.readouterr().out
    assert "weight 是 0 1 行" in error_of(to_chats, [{"messages": QA, "weight": 0}])


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "text", "text": "问"}],
        [{"type": "text", "text": ""}, {"type": "input_text", "text": "问"}],
        ["问"],
        {"content_type": "text", "parts": ["问"]},
    ],
)
def test_text_parts_are_joined(content):
    assert to_chats([{"messages": [user(content), bot("答")]}], "x") == [{"messages": QA}]


@pytest.mark.parametrize(
    "content, expected",
    [
        (
            [{"type": "text", "text": "看"}, {"type": "image_url", "image_url": {}}],
            "第 1 轮 user 的 content 里有 image_url",
        ),
        ([{"type": "text", "text": None}], "第 1 轮 user 的 content 里有 text"),
        ([3], "第 1 轮 user 的 content 里有 数字"),
        (4, '第 1 轮 user 的 content 是 4，请加上引号写成 "4"'),
        (True, "这里是真假值：第 1 轮 user"),
    ],
)
def test_other_parts_name_the_turn_and_the_field(content, expected):
    assert expected in error_of(to_chats, [{"messages": [user(content), bot("答")]}])


def test_messages_written_as_text():
    for text in (
        '[{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]',
        "[{'role': 'user', 'content': '问'}, {'role': 'assistant', 'content': '答'}]",  # pandas 存的 csv
        ' [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}]',
    ):
        assert to_chats([{"messages": text}], "x") == [{"messages": QA}]
    pair = {"prompt": '[{"role": "user", "content": "问"}]', "chosen": "好", "rejected": "坏"}
    assert to_pairs([pair], "x") == [PAIR]
    asked = {"prompt": "[1, 2] 是什么", "completion": "[]"}  # 提问、回答里的方括号不是消息
    assert to_chats([asked], "x") == [{"messages": [user("[1, 2] 是什么"), bot("[]")]}]


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": "\n\nHuman: 问\n\nAssistant: 好", "rejected": "\n\nHuman: 问\n\nAssistant: 坏"},
        {"chosen": "Human：问\n\nAssistant：好\n", "rejected": "Human：问\n\nAssistant：坏"},
        {"chosen": "用户：问\n\n助手：好", "rejected": "用户：问\n\n助手：坏"},
        {"prompt": "\n\nHuman: 问\n\nAssistant:", "chosen": " 好", "rejected": " 坏"},
    ],
)
def test_hh_rlhf_strings(row):
    (pair,) = to_pairs([row], "x")
    stripped = {side: [bot(pair[side][0]["content"].strip())] for side in ("chosen", "rejected")}
    assert pair | stripped == PAIR
    longer = "\n\nHuman: 前问\n\nAssistant: 前答\n\nHuman: 问\n\nAssistant: "
    (pair,) = to_pairs([{"chosen": longer + "好", "rejected": longer + "坏"}], "x")
    assert pair == {**PAIR, "prompt": LONG[1:]}


def test_an_answer_that_begins_with_a_speaker_is_still_an_answer():
    row = {"prompt": "问", "chosen": "用户：这样写", "rejected": "坏"}
    assert to_pairs([row], "x")[0]["chosen"] == [bot("用户：这样写")]


def test_pairs_without_a_question_name_what_is_missing():
    message = error_of(to_pairs, [{"chosen": "好", "rejected": "坏", "title": "题"}])
    assert "chosen 只是一个回答，而没有问题：要有 prompt、instruction 或 question 一栏" in message


@pytest.mark.parametrize(
    "row, reason",
    [
        (
            {"prompt": "问", "chosen": [user("甲"), bot("好")], "rejected": [user("乙"), bot("坏")]},
            "chosen 和 rejected 的问题不同",
        ),
        (
            {"chosen": [user("甲"), bot("好")], "rejected": [user("乙"), bot("坏")]},
            "chosen 和 rejected 的问题不同",
        ),
        (
            {"prompt": "问", "chosen": [user("甲"), bot("好")], "rejected": [user("甲"), bot("坏")]},
            "prompt 与 chosen、rejected 里的问题不同",
        ),
        (
            {"chosen": "Human: 甲\n\nAssistant: 好", "rejected": "Human: 乙\n\nAssistant: 坏"},
            "chosen 和 rejected 的问题不同",
        ),
    ],
)
def test_questions_that_differ_are_said_to_differ(row, reason):
    assert f"{reason} 1 行" in error_of(to_pairs, [row])


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "问"},
        {"prompt": [user("问")]},
        {"messages": [user("问")]},
        {"messages": QA},
        {"conversations": [human("问")]},
        {"question": "问"},
        {"query": "问"},
        {"instruction": "问", "input": ""},
        {"instruction": "问", "output": "答"},
        {"prompt": "问", "completion": "答"},
    ],
)
def test_questions_alone_are_enough_for_ppo(row):
    assert to_questions([row], "x") == [{"messages": [user("问")]}]


def test_a_classifiers_file_is_refused_for_ppo():
    for row in ({"sentence": "题", "label": 3}, {"text": "题", "label": 3}):
        message = error_of(to_questions, [row])
        assert "格式不认识" in message and "PPO要下面任意一组列" in message and "prompt" in message


# ---- 真实数据 ----


@needs_data
@pytest.mark.parametrize(
    "folder, convert, count",
    [
        ("firefly_schema", to_chats, 1000),
        ("sharegpt_zh", to_chats, 298),
        ("wikipedia_cn_schema", to_texts, 848),
        ("dpo_en_zh_schema", to_pairs, 429),
        ("chnsenticorp", to_texts, 9600),
    ],
)
def test_real_data(folder, convert, count):
    rows = read_rows(str(DATA / folder)).rows
    results = convert(rows, folder)
    assert len(results) == count
    for row in results:
        if convert is to_texts:
            assert row["text"].strip()
        else:
            turns = row["messages"] if convert is to_chats else row["prompt"] + row["chosen"]
            spoken = [turn["role"] for turn in turns if turn["role"] != "system"]
            assert spoken == ["user", "assistant"] * (len(spoken) // 2)


@needs_data
def test_real_multi_turn_and_system():
    chats = to_chats(read_rows(str(DATA / "sharegpt_zh")).rows, "sharegpt_zh")
    assert max(len(row["messages"]) for row in chats) > 4
    pairs = to_pairs(read_rows(str(DATA / "dpo_en_zh_schema")).rows, "dpo")
    assert sum(row["prompt"][0]["role"] == "system" for row in pairs) == 68


@needs_data
def test_real_data_of_another_kind_is_refused():
    message = error_of(to_chats, read_rows(str(DATA / "tnews")).rows)
    assert "idx, sentence, label" in message and "messages" in message
