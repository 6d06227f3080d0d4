"""tool_schema.py：校验与 jsonschema 比；修补不改对的、不修拿不准的；约束写出的都合法，许可的 token 与 xgrammar 相同。"""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tool_schema
from call_grammar import CallGrammar, call_schema, generate_call
from call_repair import repair_json
from json_faults import FAULTS
from nlp_common.base.errors import UserError
from nlp_common.lm.automaton import Matcher
from nlp_common.lm.gbnf import parse_grammar
from nlp_common.lm.reply_parser import BrokenCall, Call, parse_reply, read_values
from nlp_common.lm.schema_grammar import schema_to_grammar
from schema_check import check_call, check_value
from schema_words import check_schema
from tool_examples import TOOLS, random_call

QWEN3 = Path(__file__).resolve().parents[3] / "shared" / "data" / "tokenizers" / "qwen3"


@pytest.fixture(scope="module")
def tiny():
    from tiny_agent import build_tokenizer

    return build_tokenizer()


@pytest.fixture(scope="module")
def qwen3():
    if not (QWEN3 / "tokenizer.json").exists():
        pytest.skip("没有 ../shared/data/tokenizers/qwen3：Qwen3 的分词器")
    from nlp_common.lm.loading import load_tokenizer

    return load_tokenizer(str(QWEN3))


def tool(parameters: dict, name: str = "f") -> dict:
    return {"type": "function", "function": {"name": name, "description": "", "parameters": parameters}}


# ---------------------------------------------------------------- 1. 校验

SCALARS = st.sampled_from([None, True, False, 0, 1, -1, 2, 1.0, 1.5, "", "a", "ab", "abc", "北京", "1"])
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=6,
)
KINDS = st.sampled_from(["object", "array", "string", "integer", "number", "boolean", "null"])
SMALL = st.integers(0, 3)
LIMITS = {
    "type": KINDS | st.lists(KINDS, min_size=1, max_size=3, unique=True),
    "required": st.lists(st.sampled_from("abc"), max_size=2, unique=True),
    "enum": st.lists(VALUES, min_size=1, max_size=4),
    "const": VALUES,
    "minLength": SMALL,
    "maxLength": SMALL,
    "minItems": SMALL,
    "maxItems": SMALL,
    "minProperties": SMALL,
    "maxProperties": SMALL,
    "minimum": st.sampled_from([-1, 0, 1, 1.5]),
    "maximum": st.sampled_from([0, 1, 1.5, 2]),
    "exclusiveMinimum": st.sampled_from([-1, 0, 1]),
    "exclusiveMaximum": st.sampled_from([0, 1, 2]),
    "pattern": st.sampled_from(["^a", "b$", "[0-9]+", "北"]),
    "uniqueItems": st.booleans(),
    "description": st.just("说明"),
}


def grown(inner):
    more = {
        "properties": st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
        "additionalProperties": inner | st.booleans(),
        "items": inner | st.booleans(),
        "anyOf": st.lists(inner, min_size=1, max_size=3),
        "oneOf": st.lists(inner, min_size=1, max_size=3),
        "allOf": st.lists(inner, min_size=1, max_size=2),
        "$ref": st.just("#/$defs/shared"),
    }
    return st.fixed_dictionaries({}, optional=LIMITS | more).filter(lambda schema: len(schema) <= 5)


PLAIN = st.fixed_dictionaries({}, optional=LIMITS).filter(lambda schema: len(schema) <= 3)
SHARED = {"type": ["string", "integer"], "maxLength": 2}
SCHEMAS = st.one_of(PLAIN, grown(PLAIN), grown(grown(PLAIN)))


@settings(max_examples=150, deadline=None)
@given(SCHEMAS, st.lists(VALUES, min_size=1, max_size=6))
def test_verdicts_equal_jsonschema(schema, values):
    jsonschema = pytest.importorskip("jsonschema", reason="没有 jsonschema")
    schema = schema | {"$defs": {"shared": SHARED}}
    check_schema(schema, "schema")
    validator = jsonschema.Draft202012Validator
    validator.check_schema(schema)
    for value in values:
        assert (not check_value(value, schema)) == validator(schema).is_valid(value), value


@pytest.mark.parametrize(
    "schema, said",
    [
        ({"not": {}}, "关键字 'not' 不支持"),
        ({"multipleOf": 2}, "'multipleOf' 不支持"),
        ({"patternProperties": {}}, "不支持"),
        ({"properties": {"a": {"if": {}}}}, r"schema\.properties\.a 里的关键字 'if'"),
        ({"items": [{}]}, "应当是一个对象"),
        ({"type": "text"}, "type 要是"),
        ({"type": []}, "type 要是"),
        ({"enum": []}, "至少一个"),
        ({"anyOf": {}}, "至少一个"),
        ({"required": "a"}, "参数名的列表"),
        ({"properties": []}, "名字: schema"),
        ({"minLength": -1}, "不小于 0"),
        ({"minItems": True}, "不小于 0"),
        ({"maximum": "3"}, "要是数"),
        ({"exclusiveMinimum": True}, "要是数"),  # draft 4 的写法
        ({"pattern": "("}, "不是 Python 认得的正则式"),
        ({"uniqueItems": 1}, "true 或 false"),
        ({"$ref": "#/$defs/x"}, "找不到"),
        ({"$ref": "http://x/y"}, "找不到"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "又指回自己"),
        ({"anyOf": [{"$ref": "#"}]}, "套着自己"),
        ("string", "应当是一个对象"),
    ],
)
def test_schemas_outside_the_subset_are_refused(schema, said):
    with pytest.raises(UserError, match=said):
        check_value(1, schema)


def test_nullable_is_openapi_and_counts():
    schema = {"type": "string", "enum": ["a"], "nullable": True}
    assert check_value(None, schema) == [] and check_value("b", schema) != []


@pytest.mark.parametrize(
    "call, said",
    [
        ({"name": "weather", "arguments": {"city": "北京"}}, []),
        (Call("weather", {"city": "北京", "days": 3}), []),
        (BrokenCall("x", "坏了"), ["坏了"]),
        ({"name": ["now"], "arguments": {}}, ['调用要写成 {"name": 工具名, "arguments": {参数}}']),
        ({"name": "now"}, ['调用要写成 {"name": 工具名, "arguments": {参数}}']),
        (Call("wether", {}), ["没有工具 wether（是不是 weather？）；有的是：look_up、weather"]),
        (Call("weather", {}), ["weather：少了 city"]),
        (Call("weather", {"city": "北京", "day": 1}), ["weather：多了 day（是不是 days？）"]),
        (
            Call("weather", {"city": "东京"}),
            ['weather：city 要是 "北京"、"上海"、"广州"、"成都" 之一，给的是 "东京"'],
        ),
        (Call("weather", {"city": "北京", "days": "3"}), ['weather：days 要是整数，给的是 "3"']),
        (Call("weather", {"city": "北京", "days": True}), ["weather：days 要是整数，给的是 true"]),
        (Call("look_up", {"person": "小刚", "time": None}), ["look_up：time 要是字符串，给的是 null"]),
    ],
)
def test_calls(call, said):
    found = check_call(call, TOOLS[:2])
    assert found == said


def test_nested_places_are_named():
    items = [{"name": "苹果"}, {"name": 3, "n": 1}]
    found = check_call(Call("order", {"items": items, "pay": "现金"}), TOOLS)
    assert found == ["order：items[1].name 要是字符串，给的是 3", "order：items[1] 里多了 n"]


def test_unknown_arguments_are_allowed_only_when_the_schema_says_so():
    open_tool = tool({"type": "object", "additionalProperties": {"type": "integer"}})
    assert check_call(Call("f", {"x": 1}), [open_tool]) == []
    assert check_call(Call("f", {"x": "1"}), [open_tool]) == ['f：x 要是整数，给的是 "1"']
    assert check_call(Call("f", {"x": 1}), [tool({"type": "object"})]) == ["f：多了 x"]
    assert check_call(Call("f", {}), [{"type": "function", "function": {"name": "f"}}]) == []
    assert "一个也没有" in check_call(Call("f", {}), [])[0]


# ---------------------------------------------------------------- 2. 修补

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=200, deadline=None)
@given(JSON_VALUES, st.booleans(), st.sampled_from([None, 1]))
def test_right_json_is_never_changed(value, ascii_only, indent):
    assert repair_json(json.dumps(value, ensure_ascii=ascii_only, indent=indent)) == (value, [])


@pytest.mark.parametrize(
    "text, value",
    [
        ("{'city': '北京', 'days': 3,}", {"city": "北京", "days": 3}),
        ('{“city”：“北京，上海”，"ok"：True}', {"city": "北京，上海", "ok": True}),
        ('```json\n{"a": 1}\n```', {"a": 1}),
        ('```\n{"a": 1', {"a": 1}),
        ('{"a": {"b": [1, 2', {"a": {"b": [1, 2]}}),
        ('{"a": [1, 2}', {"a": [1, 2]}),
        ('{"a": [1, 2}}', {"a": [1, 2]}),
        ('{"a": ["x", "y", "b": 1}', {"a": ["x", "y"], "b": 1}),
        ('{"a": [{"x": 1, {"x": 2}]}', {"a": [{"x": 1}, {"x": 2}]}),
        ('{"a": 1}}', {"a": 1}),
        ('{"a": 1 "b": 2}', {"a": 1, "b": 2}),
        ('["a" "b"]', ["a", "b"]),
        ('{"a": 1,, "b": 2}', {"a": 1, "b": 2}),
        ('{a: 1, 名字: "x"}', {"a": 1, "名字": "x"}),
        ('{"a": "他说"你好"，走了", "b": 1}', {"a": '他说"你好"，走了', "b": 1}),
        ("{'a': 'it's'}", {"a": "it's"}),
        ('{"a": "第一行\n第二行"}', {"a": "第一行\n第二行"}),
        ('{"a": "C:\\Users"}', {"a": "C:\\Users"}),
        ('{"a": "x, "b": "y"}', {"a": "x", "b": "y"}),
        ('{"a: "x"}', {"a": "x"}),
        ('{a": "x"}', {"a": "x"}),
        ('{"a": x"}', {"a": "x"}),
        ('{"a": "x}', {"a": "x"}),
        ('{"a": 1, // 说明: x, y\n "b": 2 /* z */}', {"a": 1, "b": 2}),
        ('{"u": "http://x.y/z#1", "b": 1,}', {"u": "http://x.y/z#1", "b": 1}),
        ('好的：{"a": 1} 请稍等', {"a": 1}),
        ("{'a': None, 'b': [True, False]}", {"a": None, "b": [True, False]}),
        ('{"a": +3, "b": .5}', {"a": 3, "b": 0.5}),
        ('\ufeff{"a": "\\ud83d\\ude00",}', {"a": "😀"}),
        ("{}}", {}),
    ],
)
def test_nearly_right_json(text, value):
    found, mended = repair_json(text)
    assert found == value and mended


@pytest.mark.parametrize(
    "text",
    [
        "",
        "你好",
        '{"a": 007}',  # 是 7 还是 "007"
        '{"a": NaN}',
        '{"a": undefined}',
        '{"a": 1} {"b": 2}',  # 要哪一个
        '{"a": 1, "a": 2,}',  # 同一个键两次
        '{"a": "北',  # 后面还有什么
        '{"a": 3天}',
        '{"a" 1}',
        "{[}",
        "[" * 30_000,
        '"' * 5000,
        "}" * 5000,
        "[]" * 9000,
        "{" + "]" * 9000,
    ],
)
def test_unclear_json_is_left_alone(text):
    assert repair_json(text) == (None, [])


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="{}[],:\"'“”，：\\/#*n1 \n`aTrue", max_size=25))
def test_anything_comes_back_as_json_or_not_at_all(text):
    value, _ = repair_json(text)
    json.dumps(value, allow_nan=False)


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults(name):
    """每种写坏的样子，修好的远比修错的多；写到一半的一个也修不好（谁也不知道后面是什么）。"""
    rng, right, wrong, tried = random.Random(7), 0, 0, 0
    while tried < 40:
        call = random_call(rng)
        text = FAULTS[name](json.dumps(call, ensure_ascii=False), rng)
        if text is None:
            continue
        value, tried = repair_json(text)[0], tried + 1
        right += value == call
        wrong += value is not None and value != call
    if name == "写到一半":
        assert right == 0 and wrong < 20
    else:
        assert right >= 30 and wrong <= 4


# ---------------------------------------------------------------- 3. 约束


def walk_tokens(masks, rng: random.Random, budget: int) -> str:
    """许可的里面随便挑，直到写完；每一步都有得挑。"""
    state, data = masks.matcher.start, b""
    for step in range(budget):
        allowed = np.flatnonzero(masks.allowed(state, budget - step - 1))
        assert len(allowed), data  # 没有死路
        token = int(rng.choice(list(allowed)))
        data, state = data + masks.words[token], masks.next(state, token)
        if masks.matcher.can_end(state):
            return data.decode()
    raise AssertionError(f"{budget} 个 token 没有写完：{data[:80]!r}")


EXTRA = [
    tool({"type": "object", "properties": {"n": {"type": "integer", "minimum": 3}}}, "optional_only"),
    tool({"type": "object", "properties": {"p": {"type": "number", "minimum": 0, "maximum": 1}}, "required": ["p"]}, "share"),
    tool({"$defs": {"T": {"type": "object", "properties": {"v": {"type": "null"}, "next": {"$ref": "#/$defs/T"}}, "required": ["v"]}},
          "type": "object", "properties": {"t": {"allOf": [{"$ref": "#/$defs/T"}]}}, "required": ["t"]}, "tree/深"),
    tool({"type": "object", "properties": {"d": {"type": "string", "format": "date"}, "mail": {"type": "string", "format": "email"}},
          "required": ["d", "mail"]}, "string"),
    tool({"type": "object", "properties": {"id": {"type": "string", "pattern": r"^[A-Z]\d{2}$"}}, "required": ["id"]}, "by_id"),
    {"type": "function", "function": {"name": "bare"}},
]  # fmt: skip


@pytest.mark.parametrize("tools", [TOOLS, EXTRA], ids=["examples", "extra"])
def test_whatever_the_masks_allow_is_a_valid_call(tiny, tools):
    """随便挑许可的 token，写出的都读得懂、合 schema；核对走的是另一条路（read_values 与 check_call）。"""
    masks, rng = CallGrammar(tools).masks(tiny, len(tiny) + 3), random.Random(0)
    names = set()
    for number in range(60):
        text = walk_tokens(masks, rng, 60 + 10 * number)
        (value,) = read_values(text)
        assert check_call(value, tools) == [], text
        names.add(value["name"])
    assert len(names) >= 4


def test_right_calls_are_allowed(tiny):
    grammar, rng = CallGrammar(TOOLS), random.Random(1)
    for _ in range(50):
        call = random_call(rng)
        assert check_call(call, TOOLS) == []
        assert grammar.matcher.matches(json.dumps(call, ensure_ascii=False) + "\n")
    for wrong in ({"name": "now", "arguments": {"x": 1}}, {"name": "nope", "arguments": {}}, {"name": "now"}):
        assert not grammar.matcher.matches(json.dumps(wrong) + "\n")


def test_tokens_across_a_boundary_are_allowed(tiny):
    """'",'、' "' 这样跨过值的结尾的 token：只要它的全部字节走得通。"""
    masks = CallGrammar(TOOLS).masks(tiny, len(tiny))
    text = '{"name": "weather", "arguments": {"city": "北京"'
    state = masks.matcher.step(masks.matcher.start, text[:-1].encode())
    allowed = {masks.words[token] for token in np.flatnonzero(masks.allowed(state))}
    assert allowed == {b'"', b'",', b'"}', b'"}}', b'"}}\n'} & set(masks.words)
    assert len(allowed) == 5


def test_control_tokens_are_never_text(tiny):
    masks = CallGrammar(TOOLS).masks(tiny, len(tiny))
    inside = masks.matcher.step(masks.matcher.start, b'{"name": "remind", "arguments": {"text": "')
    allowed = masks.allowed(inside)
    assert allowed.sum() > 500
    assert not any(allowed[number] for number in tiny.added_tokens_decoder)


def follow_xgrammar(compiled, ids: list[int], size: int) -> list[np.ndarray]:
    import xgrammar

    matcher, words = xgrammar.GrammarMatcher(compiled), xgrammar.allocate_token_bitmask(1, size)
    masks = []
    for token in [*ids, None]:
        matcher.fill_next_token_bitmask(words)
        bits = words[0].numpy().view(np.uint8)
        masks.append(np.unpackbits(bits, bitorder="little")[:size].astype(bool))
        assert token is None or matcher.accept_token(token)
    return masks


@pytest.mark.parametrize(
    "which, source",
    [
        ("tiny", "grammar"),
        ("tiny", "schema"),
        ("qwen3", "schema"),
        pytest.param("qwen3", "grammar", marks=pytest.mark.slow),  # 它编译一份大词表上的文法要十来秒
    ],
)
def test_allowed_sets_equal_xgrammar(which, source, request):
    """一个 token 一个 token 地比：它读我们的文法；它自己读同一份 schema（那里没有最后的换行）。特殊符号除外，它当文字许可。"""
    xgrammar = pytest.importorskip(
        "xgrammar", reason="没有 xgrammar：pip install --no-deps xgrammar apache-tvm-ffi"
    )
    tokenizer = request.getfixturevalue(which)
    size, grammar = len(tokenizer), CallGrammar(TOOLS)
    masks = grammar.masks(tokenizer, size)
    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=size)
    compiler = xgrammar.GrammarCompiler(info, max_threads=1)
    if source == "grammar":
        compiled = compiler.compile_grammar(grammar.text)
    else:
        masks.matcher = Matcher(parse_grammar(schema_to_grammar(grammar.schema)))
        schema = json.dumps(grammar.schema, ensure_ascii=False)
        compiled = compiler.compile_json_schema(schema, any_whitespace=False, separators=(", ", ": "))
    added = np.zeros(size, dtype=bool)
    added[list(tokenizer.added_tokens_decoder)] = True
    rng, seen = random.Random(0), 0
    for _ in range(12 if which == "tiny" else 3):
        text = json.dumps(random_call(rng), ensure_ascii=False) + ("\n" if source == "grammar" else "")
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        state = masks.matcher.start
        for theirs, token in zip(follow_xgrammar(compiled, ids, size), [*ids, None], strict=True):
            ours = masks.allowed(state)
            assert np.array_equal(ours & ~added, theirs & ~added), tokenizer.decode(ids)
            seen += 1
            state = masks.next(state, token) if token is not None else state
    assert seen > 60


def test_an_untrained_model_writes_valid_calls(tiny):
    from tiny_agent import build_base

    model = build_base(tiny, 0).eval()
    masks = CallGrammar(TOOLS).masks(tiny, model.config.vocab_size)
    prompt = tiny("现在几点？")["input_ids"]
    for seed in range(4):
        text = generate_call(model, tiny, prompt, masks, 60, temperature=1.0, seed=seed)
        assert tool_schema.is_valid(text, TOOLS), text
        assert not tool_schema.is_valid(generate_call(model, tiny, prompt, None, 60, 1.0, seed), TOOLS)
    (call,) = parse_reply(text).calls
    assert text == generate_call(
        model, tiny, prompt, masks, 60, temperature=1.0, seed=3
    )  # 同一种子，同一个调用
    assert isinstance(call, Call)
    with pytest.raises(UserError, match="最短的调用也要"):
        generate_call(model, tiny, prompt, masks, 5)


@pytest.mark.parametrize(
    "tools, said",
    [
        ([], "一件工具也没有"),
        (
            [tool({"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}})],
            "uniqueItems",
        ),
        ([tool({"type": "object", "properties": {"a": {"type": "string", "pattern": r"a\b"}}})], "pattern"),
        ([tool({"type": "object", "properties": {"a": {"not": {}}}})], "不支持"),
        ([tool({"type": "object", "required": ["a"]})], "properties 里却没有"),
    ],
)
def test_tools_that_cannot_become_a_grammar(tools, said):
    with pytest.raises(UserError, match=said):
        CallGrammar(tools)


def test_two_tools_with_the_same_name():
    with pytest.raises(UserError, match="两件工具都叫 f"):
        call_schema([tool({}), tool({})])


# ---------------------------------------------------------------- 4. 脚本


def test_the_lesson(tmp_path, monkeypatch, capsys, tiny):
    monkeypatch.setattr("tiny_agent.build_tokenizer", lambda: tiny)
    options = [
        "--n_calls",
        "4",
        "--n_faults",
        "5",
        "--max_new_tokens",
        "60",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    run = tool_schema.main(["--preset", "tiny", *options])
    metrics = run["metrics"]
    assert metrics["valid_before"] == 0 and metrics["valid"] == 1 and metrics["right"] > 0.9
    assert (tmp_path / "out" / "allowed.svg").exists()
    assert "没有工具 wether" in capsys.readouterr().out


def test_own_call_and_tools(tmp_path, capsys):
    file = tmp_path / "tools.json"
    file.write_text(
        json.dumps([tool({"type": "object", "properties": {"x": {"type": "integer"}}})]), encoding="utf-8"
    )
    run = tool_schema.main(["--tools", str(file), "--call", "{'name': 'f', 'arguments': {'x': '1'}}"])
    assert run["faults"] == ['f：x 要是整数，给的是 "1"'] and "修了：" in capsys.readouterr().out
    assert tool_schema.main(["--call", "不是"])["value"] is None
    assert tool_schema.main(["--call", "[1]"])["faults"] == ["调用要有 name 与 arguments"]
    assert tool_schema.main(["--call", '{"name": "now"}'])["faults"] == []


@pytest.mark.parametrize(
    "text, said",
    [(None, "没有这个文件"), ("{", "第 1 行不是合法的 JSON"), ("[1]", "第 1 件工具"), ("{}", "第 1 件工具")],
)
def test_bad_tool_files(tmp_path, text, said):
    file = tmp_path / "tools.json"
    if text is not None:
        file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=said):
        tool_schema.main(["--tools", str(file), "--call", "{}"])
