"""工具调用的评测：与 bfcl-eval 的检查器逐题相同（装了才比），手算的例子，自带的题自己答得对，坏文件说得清，整个脚本跑一遍。"""

import copy
import functools
import importlib
import itertools
import json
import random
import sys
import types
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import call_answers as ca
import call_questions as cq
import evaluate_tools as et
from agent_models import ServerModel
from call_report import KINDS, one_line, write_page
from call_values import own_text, value_fault
from call_variants import TITLES, text_of, variants_of
from call_world import ApiWorld, daily_world, same_effect
from nlp_common.base.errors import UserError
from nlp_common.hub.chat_server import ChatServer
from nlp_common.lm.reply_parser import BrokenCall, Call
from nlp_common.lm.tool_text import call_text
from tool_world import ERROR

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "查天气",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
ANSWER = {"weather": {"city": ["北京", "北京市"], "days": ["", 1]}}


def question(category: str = "simple", answers: list | None = None) -> cq.Question:
    turns = [[{"role": "user", "content": "北京天气"}]]
    return cq.Question(f"{category}_1", category, turns, [WEATHER], [ANSWER] if answers is None else answers)


# ---------------------------------------------------------------- 手算的


@pytest.mark.parametrize(
    ("calls", "kind"),
    [
        ([Call("weather", {"city": "北京"})], ""),
        ([Call("weather", {"days": 1, "city": "北京市"})], ""),
        ([Call("weather", {"city": "上海"})], "value"),
        ([Call("weather", {"city": "北京", "days": 2})], "value"),
        ([Call("weather", {"city": "北京", "days": "1"})], "type"),
        ([Call("weather", {"days": 1})], "missing"),
        ([Call("weather", {"city": "北京", "unit": "度"})], "unexpected"),
        ([Call("wether", {"city": "北京"})], "function"),
        ([Call("weather", {"city": "北京"})] * 2, "count"),
        ([BrokenCall("{", "坏了")], "broken"),
        ([], "no_call"),
    ],
)
def test_each_kind_of_error(calls, kind):
    verdict = et.match_calls(question(), calls)
    assert verdict.kind == kind and verdict.right == (kind == "")
    assert kind == "" or (verdict.message and kind in KINDS)


def test_no_call_is_wanted_or_any_call_is():
    call = [Call("weather", {"city": "北京"})]
    assert et.match_calls(question("irrelevance", []), []).right
    assert et.match_calls(question("irrelevance", []), [BrokenCall("{", "坏了")]).right  # BFCL 也这样
    assert et.match_calls(question("live_irrelevance", []), call).kind == "unneeded"
    assert et.match_calls(question("live_relevance", []), call).right
    assert et.match_calls(question("live_relevance", []), []).kind == "no_call"


def test_parallel_calls_in_any_order_each_used_once():
    other = {"weather": {"city": ["上海"], "days": [3]}}
    two = question("parallel", [ANSWER, other])
    calls = [Call("weather", {"city": "上海", "days": 3}), Call("weather", {"city": "北京"})]
    assert et.match_calls(two, calls).right and et.match_calls(two, calls[::-1]).right
    assert et.match_calls(two, [calls[0], calls[0]]).kind == "value"


def test_bfcl_strips_operators_and_ours_does_not():
    """BFCL 的规矩去掉 - 与 *：12-3 冒充得了 12*3；书名号、全角标点、1.0 却不认。放宽的规矩都改了。"""
    text, whole = {"type": "string"}, {"type": "integer"}
    for value, schema, accepted, bfcl, own in [
        ("12-3", text, ["12*3"], True, False),
        ("12 * 3", text, ["12*3"], True, True),
        ("12×3", text, ["12*3"], False, True),
        ("《围城》", text, ["围城"], False, True),
        ("15：00", text, ["15:00"], False, True),
        ("2025/6/9", text, ["2025-06-09"], False, True),
        ("2025.06.09", text, ["2025-06-09"], True, True),
        ("1.5", text, ["15"], True, False),
        ("2^3", text, ["23"], True, False),
        (3.0, whole, [3], False, True),
        (3.5, whole, [3], False, False),
        (True, whole, [1], False, False),
        (3, {"type": "float"}, [3.0], True, True),
        ([1.0, 2], {"type": "array", "items": whole}, [[1, 2]], False, True),
    ]:
        assert (value_fault(value, schema, accepted) is None) == bfcl, value
        assert (value_fault(value, schema, accepted, own=True) is None) == own, value


@given(st.text("0123456789-/.年月日 ,，。《》()（）×÷:：aA京", max_size=20))
def test_cleaning_twice_changes_nothing(text):
    assert own_text(own_text(text)) == own_text(text)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=3), inside, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(
    JSON, st.sampled_from(["string", "integer", "float", "boolean", "array", "dict", "any"]), st.booleans()
)
def test_any_value_gets_a_verdict(value, kind, own):
    """什么样的值也不出错；标准答案自己总是对的（BFCL 的类型里有的那些）。"""
    schema = {"type": kind, "items": {"type": "string"}} if kind == "array" else {"type": kind}
    for accepted in (["", "x"], [["a"]], [{"a": ["b", ""]}], [1.5], [""], []):
        fault = value_fault(value, schema, accepted, own)
        assert fault is None or fault[0] in ("type", "value")


# ---------------------------------------------------------------- 自带的题


@functools.cache
def daily() -> list[cq.Question]:
    return cq.daily_questions()


def test_every_category_has_its_questions():
    sizes = {group: sum(q.group == group for q in daily()) for group in cq.GROUPS}
    assert sizes["relevance"] == 0 and min(n for group, n in sizes.items() if group != "relevance") >= 15
    assert len(daily()) > 150 and len({q.id for q in daily()}) == len(daily())
    asked = [q.turns[0][0]["content"] for q in daily()]
    assert len(set(asked)) == len(asked)
    simple = [q for q in daily() if q.group == "simple"]
    assert all(len(q.tools) == 1 for q in simple)
    assert all(len(q.tools) > 1 for q in daily() if q.group in ("multiple", "parallel_multiple"))


def test_the_answers_are_right_and_can_be_done():
    for q in daily():
        if q.is_multi_turn:
            said = [[text_of(calls)] if calls else ["好的，请问？"] for calls in q.truth]
            assert et.judge(q, said)["bfcl"].right, q.id
            continue
        text = text_of(q.reference) if q.answers else "我没有合适的工具。"
        for ruler, verdict in et.judge(q, [[text]]).items():
            assert verdict.right, (q.id, ruler)
        world = q.make_world()
        assert not any(world.run(call).startswith(ERROR) for call in q.reference), q.id


def test_the_listed_values_mean_the_same():
    """除了自由的文字（备注、标题），列出的每一个值做出来都一样：标准答案没有列错。"""
    free = {"title", "text", "note", "people", "expression"}
    for q in daily():
        for place, answer in enumerate(q.answers):
            ((name, accepted),) = answer.items()
            for key, values in accepted.items():
                if key in free:
                    continue
                for value in values:
                    calls = copy.deepcopy(q.reference)
                    calls[place].arguments.pop(key, None)
                    if value != "":
                        calls[place].arguments[key] = cq.plain_value(value)
                    assert same_effect(q.make_world, calls, q.reference), (q.id, name, key, value)


def test_handwritten_variants_are_what_they_say():
    for q in daily():
        for calls in q.also_right:
            assert not et.match_calls(q, calls).right, f"{q.id}：列出来了，就不是没有列出的"
            assert not any(daily_world().run(call).startswith(ERROR) for call in calls), q.id
        for calls in q.also_wrong:
            fooled = et.judge_calls(q, text_of(calls), calls)
            assert fooled["bfcl"].right or fooled["run"].right, f"{q.id}：哪把量尺也没有骗过"


def test_exam_of_the_rulers():
    exam = et.examine_rulers(daily())
    assert set(exam) == set(TITLES)
    for kind in ("order", "spaces", "talk"):
        assert exam[kind]["text"] == 0 and exam[kind]["json"] == exam[kind]["bfcl"] == 1
    assert exam["float"]["bfcl"] < 0.5 and exam["float"]["own"] == exam["float"]["run"] == 1
    assert exam["marks"]["bfcl"] == 0 and exam["marks"]["own"] == 1
    assert exam["paraphrase"]["own"] == 0 and exam["paraphrase"]["run"] > 0.8
    assert exam["lookalike"]["bfcl"] > 0.5 and exam["lookalike"]["own"] == 0 < exam["lookalike"]["run"]
    for kind, row in exam.items():
        if not row["right"] and kind != "lookalike":
            assert row["bfcl"] == row["own"] == 0 and row["run"] < 0.1, kind


def test_variants_do_not_touch_the_question():
    q = daily()[0]
    before = copy.deepcopy(q.answers)
    list(variants_of(q))
    assert q.answers == before


# ---------------------------------------------------------------- 多轮


def borrowing() -> cq.Question:
    return next(q for q in daily() if q.id == "multi_turn_base_12")


def test_state_and_results_not_the_way():
    q = borrowing()
    calls = copy.deepcopy(q.truth)

    def verdict(said):
        return et.check_turns(q.make_world, said, q.truth).kind

    assert verdict(calls) == ""
    assert (
        verdict([[*calls[0], Call("search_books", {"keyword": "活着"})], *calls[1:]]) == ""
    )  # 多看一眼不算错
    assert verdict([calls[0], [], calls[2]]) == "no_call"
    assert verdict([calls[0], calls[1] * 2, calls[2]]) == "state"
    assert verdict([calls[0], calls[1], calls[2][::-1]]) == ""  # 先还哪一本都行
    assert verdict(calls[:2]) == "broken"
    looking = next(q for q in daily() if q.id == "multi_turn_base_5")
    wrong_room = [[Call("read_temperature", {"room": "书房"})], *looking.truth[1:]]
    assert et.check_turns(looking.make_world, wrong_room, looking.truth).kind == "response"
    early = [looking.truth[0] + looking.truth[1], looking.truth[1], looking.truth[2]]
    assert et.check_turns(looking.make_world, early, looking.truth).kind == "state"


def test_turns_without_calls():
    q = next(q for q in daily() if q.id == "multi_turn_miss_param_2")
    guess = [[Call("get_balance", {})], q.truth[1]]
    assert et.check_turns(q.make_world, guess, q.truth).kind == "unneeded"
    assert et.check_turns(q.make_world, guess, q.truth, silent=False).right
    moved = [[Call("transfer", {"to": "李强", "amount": 100})], q.truth[1]]
    assert et.check_turns(q.make_world, moved, q.truth, silent=False).kind == "state"


class Keeper:
    """一个会改收到的列表的接口。"""

    def __init__(self):
        self.rows = []

    def keep(self, row: list) -> list:
        self.rows.append(row)
        row.append(len(self.rows))
        return row


def test_a_call_cannot_change_its_own_arguments():
    call = Call("keep", {"row": [5]})
    world = ApiWorld({"Keeper": Keeper()})
    assert [world.run(call), world.run(call)] == ["[5, 1]", "[5, 2]"] and call.arguments == {"row": [5]}


def test_bad_calls_leave_the_world_alone():
    world = daily_world()
    before = copy.deepcopy(world.state())
    for name, arguments in [
        ("borrow_book", {"book": "没有这本"}),
        ("borrow_book", {"book": "活着", "days": -1}),
        ("transfer", {"to": "李强", "amount": 10**9}),
        ("set_air_conditioner", {"room": "卧室", "on": True, "temperature": 99}),
        ("calculator", {"expression": "1/0"}),
        ("calculator", {"expression": "__import__('os')"}),
        ("get_weather", {"city": "北京", "date": "2025-13-40"}),
        ("borrow_book", {"book": "活着", "days": 10**12}),
        ("no_such_tool", {}),
    ]:
        assert world.run(Call(name, arguments)).startswith(ERROR), name
    assert world.state() == before


# ---------------------------------------------------------------- 与 bfcl-eval 相同


@pytest.fixture(scope="module")
def bfcl():
    """bfcl-eval 的检查器。它的 model_config 要导入各家的 SDK，这里只用到一个开关，换成一个空的。"""
    pytest.importorskip("bfcl_eval", reason="没有装 bfcl-eval：pip install --no-deps bfcl-eval")
    names = types.SimpleNamespace(underscore_to_dot=False)
    stub = types.ModuleType("bfcl_eval.constants.model_config")
    stub.MODEL_CONFIG_MAPPING = {"any": names}
    stubs = {stub.__name__: stub}
    for language in ("java", "js"):
        module = types.ModuleType(f"bfcl_eval.eval_checker.ast_eval.type_convertor.{language}_type_converter")
        setattr(module, f"{language}_type_converter", None)
        stubs[module.__name__] = module
    with pytest.MonkeyPatch.context() as patch:
        for name, module in stubs.items():
            patch.setitem(sys.modules, name, module)
        yield importlib.import_module("bfcl_eval.eval_checker.ast_eval.ast_checker")


def spoiled(value, rng):
    """把一个值改一改：类型、大小写、标点、多一项少一项，也可能没有改。"""
    kind = rng.randrange(9)
    if isinstance(value, dict) and value and kind < 6:
        key = rng.choice(list(value))
        rest = {each: value[each] for each in value if each != key}
        return rest if kind == 0 else rest | {key: spoiled(value[key], rng)}
    if isinstance(value, list) and value and kind < 6:
        i = rng.randrange(len(value))
        return (
            value[::-1]
            if kind == 1
            else [*value[:i], *([] if kind == 0 else [spoiled(value[i], rng)]), *value[i + 1 :]]
        )
    if isinstance(value, bool):
        return [not value, str(value), int(value)][kind % 3]
    if isinstance(value, int | float):
        return [value + 1, float(value), str(value), bool(value), int(value), [value]][kind % 6]
    if isinstance(value, str):
        return [
            value.upper(),
            value + ".",
            value.replace(" ", ""),
            value + "x",
            [value],
            {"a": value},
            "",
            5,
        ][kind % 8]
    return [None, "", 0, [], {}][kind % 5]


def some_value(accepted: list, rng):
    value = rng.choice(accepted) if accepted else ""
    if isinstance(value, dict):
        return {key: rng.choice(each) for key, each in value.items() if each}
    if isinstance(value, list):
        return [some_value([each], rng) for each in value]
    return value


def answered(q: cq.Question, rng) -> list[Call]:
    """照标准答案写一份，多半再写坏一处。"""
    calls = []
    for answer in q.answers:
        ((name, accepted),) = answer.items()
        drawn = {key: some_value(values, rng) for key, values in accepted.items()}
        calls.append(Call(name, {key: each for key, each in drawn.items() if each != ""}))
    call, how = rng.choice(calls), rng.randrange(10)
    if how == 0:
        call.name = rng.choice(q.tools)["function"]["name"]
    elif how == 1:
        calls.append(copy.deepcopy(call))
    elif how == 2:
        calls.remove(call)
    elif how == 3:
        call.arguments["zzz"] = 1
    elif call.arguments and how < 8:
        key = rng.choice(list(call.arguments))
        if how == 4:
            del call.arguments[key]
        else:
            call.arguments[key] = spoiled(call.arguments[key], rng)
    rng.shuffle(calls)
    return calls


@pytest.mark.parametrize(
    "category",
    ["simple_python", "multiple", "parallel", "parallel_multiple", "live_simple", "live_multiple", "live_parallel", "live_parallel_multiple"],
)  # fmt: skip
def test_same_verdicts_as_bfcl(bfcl, category):
    from bfcl_eval.constants.enums import Language

    rng, seen = random.Random(0), set()
    for q in cq.bfcl_questions(f"bfcl:{category}"):
        described = [{"name": t["function"]["name"], "parameters": t["bfcl"]} for t in q.tools]
        for _ in range(3):
            calls = answered(q, rng)
            written = [{call.name: call.arguments} for call in calls]
            theirs = bfcl.ast_checker(described, written, q.answers, Language.PYTHON, category, "any")
            ours = et.match_calls(q, calls)
            assert ours.right == theirs["valid"], (q.id, written, q.answers, theirs, ours)
            seen.add(ours.right)
            assert isinstance(et.match_calls(q, calls, own=True).right, bool)
        scores, _ = et.summarise([q], {q.id: [[text_of(q.reference)]]})  # 说明里的怪栏、空的答案也量得了
        assert scores["every"]["n"] == 1
    assert seen == {True, False}


@pytest.mark.parametrize("category", ["multi_turn_base", "multi_turn_miss_param", "multi_turn_miss_func"])
def test_same_multi_turn_verdicts_as_bfcl(bfcl, category):
    """照标准的调用少做、多做、换次序、整轮不做：状态与结果的结论与 BFCL 的一样。"""
    from bfcl_eval.constants import executable_backend_config as backend
    from bfcl_eval.eval_checker.multi_turn_eval.multi_turn_checker import multi_turn_checker

    data = cq.bfcl_folder()
    tools = {
        name: [{"function": row} for _, row in cq.json_lines(data / "multi_turn_func_doc" / file)]
        for name, file in backend.MULTI_TURN_FUNC_DOC_FILE_MAPPING.items()
    }
    truths = {
        row["id"]: row["ground_truth"]
        for _, row in cq.json_lines(data / "possible_answer" / f"BFCL_v4_{category}.json")
    }
    rng, seen = random.Random(0), set()
    for number, (_, row) in enumerate(cq.json_lines(data / f"BFCL_v4_{category}.json")[::5]):
        listed = [tool for name in row["involved_classes"] for tool in tools[name]]

        def read(turns, listed=listed):
            return [[call for text in turn for call in ca.python_calls(text, listed)] for turn in turns]

        def make_world(row=row):
            instances = {}
            for name in row["involved_classes"]:
                api = getattr(importlib.import_module(backend.CLASS_FILE_PATH_MAPPING[name]), name)()
                if name not in backend.STATELESS_CLASSES:
                    api._load_scenario(copy.deepcopy(row["initial_config"].get(name, {})), long_context=False)
                instances[name] = api
            return ApiWorld(instances)

        for how in range(4):
            said = copy.deepcopy(truths[row["id"]])
            turn = rng.choice([i for i, calls in enumerate(said) if calls])
            if how == 1:
                said[turn].pop()
            elif how == 2:
                said[turn] = said[turn][::-1] + said[0]
            elif how == 3:
                said[turn] = []
            entry = row | {"id": f"{category}_{number}t{how}"}
            theirs = multi_turn_checker(
                [[calls] if calls else [] for calls in said], truths[row["id"]], entry, category, f"m{how}"
            )
            ours = et.check_turns(make_world, read(said), read(truths[row["id"]]), silent=False)
            assert ours.right == theirs["valid"], (row["id"], how, said, theirs, ours)
            seen.add(ours.right)
    assert seen == {True, False}


# ---------------------------------------------------------------- 读回答


def test_answers_in_several_spellings():
    tools = [
        WEATHER,
        {"type": "function", "function": {"name": "math.sqrt", "parameters": {"properties": {"x": {}}}}},
    ]
    wanted = [Call("weather", {"city": "北京", "days": 2}), Call("math.sqrt", {"x": -4})]
    plain = [{"name": call.name, "arguments": call.arguments} for call in wanted]
    openai = [{"type": "function", "function": {"name": "math_sqrt", "arguments": '{"x": -4}'}}]
    for text in (
        call_text(plain),
        "[weather(city='北京', days=2), math.sqrt(x=-4)]",
        "weather('北京', 2), math_sqrt(-4)".replace("math_sqrt(-4)", "math.sqrt(-4)"),
        json.dumps(plain, ensure_ascii=False),
        json.dumps([{call.name: call.arguments} for call in wanted], ensure_ascii=False),
        ca.answer_text(plain, "第 1 行"),
    ):
        assert ca.read_calls(text, tools) == wanted, text
    assert ca.read_calls(ca.answer_text({"content": "算一下", "tool_calls": openai}, ""), tools) == wanted[1:]
    for text in (
        "",
        "今天北京晴。",
        "weather",
        "weather(city=住处)",
        "weather(*x)",
        "[1, 2]",
        '{"a": 1, "b": 2}',
        "(" * 5000,
    ):
        assert ca.read_calls(text, tools) == [], text[:40]


def write_lines(path: Path, rows: list) -> Path:
    path.write_text(
        "\n".join(each if isinstance(each, str) else json.dumps(each, ensure_ascii=False) for each in rows),
        encoding="utf-8",
    )
    return path


def bfcl_row(**changes) -> dict:
    function = {
        "name": "weather",
        "description": "查天气",
        "parameters": {
            "type": "dict",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    }
    row = {
        "id": "simple_python_0",
        "question": [[{"role": "user", "content": "北京天气"}]],
        "function": [function],
    }
    return row | changes


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{坏的", "第 2 行第 2 个字不是合法的 JSON"),
        ("[1]", "第 2 行要是一个 JSON 对象"),
        (bfcl_row(id=3), "第 2 行没有 id"),
        (bfcl_row(id="simple_java_1"), "Java"),
        (bfcl_row(id="multi_turn_base_1"), "多轮"),
        (bfcl_row(id="chatty_1"), "类别 chatty 不认识"),
        (bfcl_row(id="simple_python_1", question="北京"), "第 2 行的 question"),
        (bfcl_row(id="simple_python_1", function=[]), "第 2 行没有 function"),
        (bfcl_row(id="simple_python_1", function=[{"name": "f"}]), "第 2 行有一个函数不成样子"),
        (bfcl_row(id="simple_python_1"), "没有答案"),
        (bfcl_row(), "与第 1 行的重复"),
    ],
)
def test_malformed_question_lines_are_named(tmp_path, row, said):
    path = write_lines(tmp_path / "题.json", [bfcl_row(), row])
    answers = write_lines(tmp_path / "答案.json", [{"id": "simple_python_0", "ground_truth": [ANSWER]}])
    with pytest.raises(UserError, match=said):
        cq.bfcl_questions(str(path), str(answers))


@pytest.mark.parametrize(
    ("truth", "said"),
    [
        ([], "是空的"),
        ([{"weather": {"city": "北京"}}], "要写成"),
        ([{"rain": {"city": ["北京"]}}], "没有这个函数"),
        ("北京", "第 1 行要有 id"),
    ],
)
def test_malformed_answers_are_named(tmp_path, truth, said):
    path = write_lines(tmp_path / "题.json", [bfcl_row()])
    answers = write_lines(tmp_path / "答案.json", [{"id": "simple_python_0", "ground_truth": truth}])
    with pytest.raises(UserError, match=said):
        cq.bfcl_questions(str(path), str(answers))


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="没有这个题目文件"):
        cq.bfcl_questions(str(tmp_path / "无.json"))
    empty = write_lines(tmp_path / "空.json", [""])
    with pytest.raises(UserError, match="是空的"):
        cq.bfcl_questions(str(empty))
    path = write_lines(tmp_path / "题.json", [bfcl_row()])
    with pytest.raises(UserError, match="没有这个答案文件"):
        cq.bfcl_questions(str(path), str(tmp_path / "无.json"))
    with pytest.raises(UserError, match="没有这个回答文件"):
        ca.read_answers(str(tmp_path / "无.jsonl"), [question()])


def test_answer_files(tmp_path, capsys):
    asked = [question(), question("irrelevance", [])]
    rows = [{"id": "simple_1", "result": [{"weather": '{"city": "北京"}'}]}, {"id": "else_1", "result": ""}]
    found = ca.read_answers(str(write_lines(tmp_path / "答.jsonl", rows)), asked)
    assert et.judge(asked[0], found["simple_1"])["bfcl"].right and found["irrelevance_1"] == [[""]]
    assert "1 行的 id 不在题目里" in (said := capsys.readouterr().out) and "没有答到 1 道题" in said
    for row, fault in [
        ({"id": "simple_1"}, "第 1 行要有 id 与 result"),
        ({"id": "simple_1", "result": 5}, "第 1 行的回答不成样子"),
        ({"id": "other_1", "result": ""}, "没有一行的 id 是这里的题"),
    ]:
        with pytest.raises(UserError, match=fault):
            ca.read_answers(str(write_lines(tmp_path / "坏.jsonl", [row])), asked)
    twice = write_lines(tmp_path / "两次.jsonl", [rows[0], rows[0]])
    with pytest.raises(UserError, match="第 2 行与第 1 行答的是同一道题"):
        ca.read_answers(str(twice), asked)
    talk = write_lines(tmp_path / "多轮.jsonl", [{"id": borrowing().id, "result": "好"}])
    with pytest.raises(UserError, match="多轮的题"):
        ca.read_answers(str(talk), [borrowing()])


# ---------------------------------------------------------------- 问模型


class Scripted:
    """照稿子说话的模型；没有稿子的题，说好的。"""

    name, room = "scripted", 10**6

    def __init__(self, texts: list[str]):
        self.texts, self.asked = iter(texts), []

    def count(self, messages, tools):
        return len(messages)

    def say(self, messages, tools, max_tokens, deadline, stop, piece=None):
        self.asked.append((messages, [tool["function"]["name"] for tool in tools]))
        return types.SimpleNamespace(text=next(self.texts, "好的。"), stopped="")


def test_multi_turn_talk_gives_results_back_and_late_tools():
    q = next(q for q in daily() if q.id == "multi_turn_miss_func_2")
    book, refund = text_of(q.truth[0]), text_of(q.truth[2])
    model = Scripted([book, "买好了。", "现在没有退票的工具。", refund, "退了。"])
    found = ca.ask(model, [q], 100, False)
    assert et.judge(q, found["answers"][q.id])["bfcl"].right
    assert model.asked[1][0][-1] == {"role": "tool", "content": '{"order": "T1001", "price": 309}'}
    assert "refund_ticket" not in model.asked[2][1] and "refund_ticket" in model.asked[3][1]
    assert [message["role"] for message in model.asked[-1][0]].count("user") == 3


def test_endless_calls_and_long_prompts_stop():
    q = next(q for q in daily() if q.id == "multi_turn_base_16")
    look = text_of(q.truth[0])
    found = ca.ask(Scripted([look] * 50), [q], 100, False)
    assert [len(turn) for turn in found["answers"][q.id]] == [ca.MOST_STEPS] * 2
    narrow = Scripted([])
    narrow.room = 101
    found = ca.ask(narrow, [q], 100, False)
    assert found["too_long"] == 1 and et.judge(q, found["answers"][q.id])["bfcl"].kind == "broken"


def test_server_answers(chat_server):
    """服务器给的 tool_calls；工具名里的点换成下划线送去，读回来再还原。"""
    call = {"id": "c1", "type": "function", "function": {"name": "math_sqrt", "arguments": '{"x": 4}'}}
    answer = {"choices": [{"message": {"role": "assistant", "content": None, "tool_calls": [call]}}]}
    chat_server.answer = lambda body: json.dumps(answer).encode()
    tool = {
        "type": "function",
        "function": {
            "name": "math.sqrt",
            "description": "",
            "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]},
        },
    }
    q = cq.Question(
        "simple_1",
        "simple",
        [[{"role": "user", "content": "4 的平方根"}]],
        [tool],
        [{"math.sqrt": {"x": [4]}}],
    )
    found = ca.ask(ServerModel(ChatServer(chat_server.url, "m", retries=0)), [q], 50, False)
    assert et.judge(q, found["answers"]["simple_1"])["bfcl"].right
    sent = chat_server.asked[0][2]["tools"][0]
    assert sent["function"]["name"] == "math_sqrt" and "bfcl" not in sent


# ---------------------------------------------------------------- 分、网页、整个脚本


def test_overall_is_the_mean_of_categories():
    asked = [question(), *(question("irrelevance", []) for _ in range(3))]
    for number, q in enumerate(asked):
        q.id = f"{q.category}_{number}"
    answers = {q.id: [["今天不行"]] for q in asked}
    scores, failures = et.summarise(asked, answers)
    assert scores["overall"]["value"] == 0.5 and scores["every"]["value"] == 0.75
    assert scores["errors"] == {"no_call": 1} and [each["id"] for each in failures] == ["simple_0"]
    assert scores["groups"]["irrelevance"]["n"] == 3 and scores["groups"]["irrelevance"]["low"] < 0.5


def test_page_escapes_and_stands_alone(tmp_path):
    q = question()
    scores, failures = et.summarise([q], {q.id: [["<script>alert(1)</script>\x07"]]})
    write_page(tmp_path / "r.html", {"sets": {"<b>": {"<i>": scores}}}, {"<b>": {"<i>": failures}})
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<script>" not in page and "<i>" not in page and "http" not in page and "&lt;script&gt;" in page
    assert one_line([["a\x07b"]]) == "a·b"


@pytest.mark.parametrize("category", ["irrelevance", "live_irrelevance", "live_relevance"])
def test_bfcl_rows_without_answers_are_read(bfcl, category):
    found = cq.bfcl_questions(f"bfcl:{category}")
    scores, _ = et.summarise(found, {q.id: [["不行。"]] for q in found})
    assert scores["overall"]["value"] == (0 if category == "live_relevance" else 1)


def test_some_of_keeps_the_categories():
    picked = cq.some_of(daily(), 24)
    assert len(picked) == 24 and {q.group for q in picked} == {q.group for q in daily()}
    assert cq.some_of(daily(), 10**6) == daily()


def test_tiny_questions_are_answered_by_their_truth():
    found = cq.tiny_questions(200, 3)
    assert {q.group for q in found} == {"simple", "multiple", "parallel", "irrelevance", "multi_turn"}
    for q in found:
        calls = list(itertools.chain(*q.truth)) or q.reference
        said = [[text_of(calls) if calls else "好"]]
        assert et.judge(q, said)["bfcl"].right, q.id


def test_script_on_local_files(tmp_path, capsys):
    path = write_lines(tmp_path / "题.json", [bfcl_row(), bfcl_row(id="irrelevance_0")])
    answers = write_lines(tmp_path / "答案.json", [{"id": "simple_python_0", "ground_truth": [ANSWER]}])
    rows = [
        {"id": "simple_python_0", "result": "[weather(city='上海')]"},
        {"id": "irrelevance_0", "result": "没有。"},
    ]
    ready = write_lines(tmp_path / "甲.jsonl", rows)
    record = et.main(
        ["--preset", "tiny", "--dataset", str(path), "--possible_answer", str(answers), "--answers", str(ready),
         "--output_dir", str(tmp_path / "out")]
    )  # fmt: skip
    scores = record["metrics"]["sets"]["题"]["甲"]
    assert scores["overall"]["value"] == 0.5 and scores["errors"] == {"value": 1}
    assert "值不对" in capsys.readouterr().out
    assert (tmp_path / "out" / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--base_url", "http://127.0.0.1:9/v1"], "--server_model"),
        (["--server_model", "m"], "--base_url"),
        (["--possible_answer", "a.json"], "去掉 --possible_answer"),
        (["--answers", "a", "--base_url", "http://x", "--server_model", "m"], "只给一个"),
        (["--constrained", "--answers", "a"], "--constrained"),
        (["--answers", "a"], "一套题"),
        (["--dataset", "无.json"], "没有这个文件"),
    ],
)
def test_wrong_arguments(arguments, said, tmp_path):
    with pytest.raises(UserError, match=said):
        et.main(["--preset", "tiny", "--output_dir", str(tmp_path / "out"), *arguments])
