"""schema_grammar.py：JSON schema → 文法，与判 schema 的另一条路、与日历、与 xgrammar 和 llguidance 的许可集核对。"""

import datetime
import json
import random

import numpy as np
import pytest

from nlp_common.base.errors import UserError
from nlp_common.lm.automaton import Matcher
from nlp_common.lm.gbnf import parse_grammar
from nlp_common.lm.schema_fits import fits
from nlp_common.lm.schema_grammar import schema_to_grammar
from nlp_common.lm.token_masks import TokenMasks, token_bytes

NODE = {
    "type": "object",
    "properties": {"v": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
    "required": ["v", "next"],
}
RECORD = {
    "type": "object",
    "properties": {
        "地点": {"enum": ["花园", "学校", 3, None]},
        "日期": {"type": "string", "format": "date"},
        "n": {"type": "integer", "minimum": -12, "maximum": 205},
        "备注": {"type": "string", "minLength": 1, "maxLength": 5},
        "列": {"type": "array", "items": {"type": ["number", "boolean"]}, "minItems": 1, "maxItems": 3},
        "子": {"$ref": "#/$defs/node"},
    },
    "required": ["日期", "列"],
    "$defs": {"node": NODE},
}


def matcher(schema) -> Matcher:
    return Matcher(parse_grammar(schema_to_grammar(schema)))


def dumps(value) -> str:
    return json.dumps(value, ensure_ascii=False)


def walk(automaton: Matcher, rng: random.Random, limit: int = 200) -> str:
    """在自动机里随便走，走到写完；快到 limit 个字节时往写完的方向走。"""
    state, data = automaton.start, b""
    while True:
        if automaton.can_end(state) and (rng.random() < 0.3 or not automaton.row(state).any()):
            return data.decode()
        choices = np.flatnonzero(automaton.row(state))
        closing = [b for b in choices if automaton.need(int(automaton.row(state)[b])) < limit - len(data)]
        byte = rng.choice(list(closing if closing else choices))
        data, state = data + bytes([byte]), int(automaton.row(state)[byte])


@pytest.mark.parametrize(
    "schema",
    [
        RECORD,
        NODE | {"$defs": {"node": NODE}},
        {"type": "object"},
        {"type": "array"},
        {},
        {"type": ["string", "null"]},
        {"oneOf": [{"const": 'a"\\\n'}, {"type": "number"}]},
        {"type": "object", "properties": {"a": {"type": "null"}, "b": {"type": "boolean"}}},
        {"type": "string", "format": "date-time"},
        {"type": "integer", "minimum": -5},
        {"type": "integer", "exclusiveMaximum": 12.5},
        {"type": "number", "minimum": -3, "exclusiveMaximum": 10},
        {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        {"type": "number", "exclusiveMaximum": 0},
        {"type": "object", "additionalProperties": {"type": "integer", "maximum": 9}},
        {"type": "string", "enum": ["a", "b"], "nullable": True},
        {"type": "string", "pattern": r"^[A-Z]{2}-\d{3}$"},
        {"type": "string", "pattern": r"^(?:北京|上海)\s?[^\"\\,]{1,9}$"},
        {"type": "string", "pattern": r"[\w.+-]+@[\w-]+\.com$"},
        {"type": "string", "pattern": r'^["\\a]{2,3}.$'},
        {"type": "string", "pattern": r"(a|b\.c)x*?[]y]"},
    ],
)
def test_whatever_the_grammar_writes_fits_the_schema(schema):
    automaton, rng = matcher(schema), random.Random(0)
    seen = set()
    for _ in range(60):
        text = walk(automaton, rng)
        assert fits(json.loads(text), schema), text
        seen.add(text)
    assert len(seen) > 2


def test_documents_that_fit_are_accepted_and_others_not():
    good = {"地点": "花园", "日期": "2024-02-29", "n": 205, "备注": "五个字好吗", "列": [1, -2.5, True]}
    good["子"] = {"v": 1, "next": {"v": -2, "next": None}}
    automaton = matcher(RECORD)
    assert fits(good, RECORD) and automaton.matches(dumps(good))
    changes = [
        {"n": 206},
        {"n": -13},
        {"备注": ""},
        {"备注": "六个字的备注呀"},
        {"列": []},
        {"列": [1, 2, 3, 4]},
    ]
    changes += [{"日期": "2023-02-29"}, {"地点": "山顶"}, {"子": {"v": 1}}, {"子": {"v": 1.5, "next": None}}]
    for change in changes:
        assert not fits(good | change, RECORD) and not automaton.matches(dumps(good | change)), change
    for missing in ("日期", "列"):
        assert not automaton.matches(dumps({k: v for k, v in good.items() if k != missing}))
    for optional in ("地点", "n", "备注", "子"):
        assert automaton.matches(dumps({k: v for k, v in good.items() if k != optional}))


def test_only_one_way_to_write_white_space():
    automaton = matcher(RECORD)
    assert automaton.matches('{"日期": "2024-01-01", "列": [1, 2]}')
    for text in (
        '{"日期":"2024-01-01", "列": [1]}',
        '{ "日期": "2024-01-01", "列": [1]}',
        '{"日期": "2024-01-01",\n"列": [1]}',
    ):
        assert not automaton.matches(text)
    state = automaton.step(automaton.start, b"{")
    assert not automaton.row(state)[[ord(" "), ord("\n"), ord("\t")]].any()


def test_dates_are_the_calendar():
    automaton = matcher({"type": "string", "format": "date"})
    for year in (1, 4, 100, 400, 1900, 1999, 2000, 2023, 2024, 9999):
        for month in range(14):
            for day in (0, 1, 28, 29, 30, 31, 32):
                try:
                    datetime.date(year, month, day)
                    real = True
                except ValueError:
                    real = False
                assert automaton.matches(f'"{year:04}-{month:02}-{day:02}"') == real, (year, month, day)
    assert not automaton.matches('"0000-01-01"')


@pytest.mark.parametrize(
    ("low", "high"), [(0, 0), (0, 9), (7, 13), (1, 100), (99, 1234), (-20, 5), (-305, -17), (8, 8)]
)
def test_integers_in_a_range(low, high):
    automaton = matcher({"type": "integer", "minimum": low, "maximum": high})
    for value in range(low - 120, high + 120):
        assert automaton.matches(str(value)) == (low <= value <= high), value
    for text in ("00", "-0", "01", "+1", "1.0", ""):
        assert not automaton.matches(text)


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "string", "not": {}}, "'not' 还不支持"),
        ({"type": "text"}, "'text' 不认识"),
        ({"enum": []}, "enum 是空的"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "没有这样的整数"),
        ({"type": "number", "minimum": 0.2, "maximum": 0.7}, "界限之间写不出数"),
        ({"type": "number", "exclusiveMinimum": 3, "maximum": 3}, "界限之间写不出数"),
        (
            {"type": "object", "properties": {"a": {}}, "additionalProperties": {"type": "null"}},
            "旁边还有 additionalProperties",
        ),
        ({"type": "integer", "minimum": "1", "maximum": 3}, "minimum 要是数"),
        ({"type": "string", "pattern": "("}, "不是 Python 认得的正则式"),
        ({"type": "string", "pattern": "^a|b$"}, "用括号"),
        ({"type": "string", "pattern": r"a\b"}, "不认识"),
        ({"type": "string", "pattern": "a(?=b)"}, "不认识"),
        ({"type": "string", "pattern": r"(a)\1"}, "不认识"),
        ({"type": "string", "pattern": r"[\x00-\x1f]"}, "只有控制字符"),
        ({"type": "string", "pattern": "a", "maxLength": 3}, "旁边还有 maxLength"),
        ({"type": "string", "pattern": 3}, "一个正则式"),
        ({"type": "string", "minLength": 5, "maxLength": 2}, "maxLength 2 小于"),
        ({"type": "array", "minItems": 5, "maxItems": 2}, "maxItems 2 小于"),
        ({"type": "string", "format": "email"}, "'email' 还不支持"),
        ({"$ref": "#/$defs/x"}, "找不到"),
        ({"$ref": 5}, "一个名字"),
        ({"enum": "abc"}, "enum 要是列表"),
        ({"anyOf": []}, "anyOf 是空的"),
        ({"anyOf": [{"type": "null"}], "minLength": 3}, "anyOf 旁边还有 'minLength'"),
        ({"type": "string", "enum": ["a"], "minLength": 3}, "没有一个值合旁边的限制"),
        ({"type": "object", "properties": ["a"]}, "properties 要是对象"),
        ({"type": "object", "required": "a"}, "required 要是列表"),
        ({"type": "object", "required": ["a"]}, "properties 里却没有"),
        ({"type": "array", "minItems": "a"}, "minItems 要是不小于 0 的整数"),
        ({"type": "string", "maxLength": -1}, "maxLength 要是不小于 0 的整数"),
        ({"type": []}, "type 要是类型的名字"),
        ({"type": 5}, "type 要是类型的名字"),
        ({"type": "string", "format": ["date"]}, "format 要是一个名字"),
        (5, "应当是一个对象"),
        ({"type": "object", "properties": {"a": {}}, "required": ["b"]}, "'b'"),
        (
            {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "x"}}}},
            r"schema\.a\[\]",
        ),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "左递归|写不出|写不完"),
    ],
)
def test_bad_schemas_say_where(schema, said):
    with pytest.raises(UserError, match=said):
        matcher(schema)


def test_limits_beside_each_other_all_count():
    both = matcher(
        {"type": "integer", "minimum": 5, "exclusiveMinimum": 0, "maximum": 9, "exclusiveMaximum": 8}
    )
    assert [n for n in range(-2, 12) if both.matches(str(n))] == [5, 6, 7]
    chosen = matcher({"type": "string", "enum": ["a", "abc", 3], "minLength": 2})
    assert [text for text in ('"a"', '"abc"', "3") if chosen.matches(text)] == ['"abc"']
    empty = matcher({"type": "object", "additionalProperties": False})
    assert empty.matches("{}") and not empty.matches('{"a": 1}')
    assert matcher({"type": "object", "additionalProperties": True}).matches('{"a": 1}')


# ---------------------------------------------------------------- 与别的库

PLAIN = {
    "type": "object",
    "properties": {
        "place": {"enum": ["garden", "school"]},
        "n": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 3},
        "ok": {"type": "boolean"},
    },
    "required": ["place", "n", "tags", "ok"],
    "additionalProperties": False,
}
DOCUMENT = {"place": "garden", "n": 12, "tags": ["a b", 'c"d\\', "é你"], "ok": True}


def allowed_along(tokenizer, schema, document):
    """一份文件从头到尾：我们每一步许可的 token。"""
    ids = tokenizer(dumps(document), add_special_tokens=False)["input_ids"]
    masks = TokenMasks(matcher(schema), token_bytes(tokenizer), [tokenizer.eos_token_id])
    state, found = masks.matcher.start, []
    for token in ids:
        found.append(masks.allowed(state))
        state = masks.next(state, token)
    return ids, [*found, masks.allowed(state)], masks.words


def test_allowed_sets_equal_xgrammar(tokenizer):
    pytest.importorskip("tvm_ffi", reason="xgrammar 要 apache-tvm-ffi")
    pytest.importorskip("xgrammar", reason="没有装 xgrammar")
    from grammar_peers import follow_xgrammar

    ids, ours, words = allowed_along(tokenizer, PLAIN, DOCUMENT)
    theirs = follow_xgrammar(tokenizer, len(tokenizer), PLAIN, ids)["masks"]
    assert len(theirs) == len(ours)
    special = np.array([not word for word in words])
    special[tokenizer.eos_token_id] = False
    for mine, other in zip(ours, theirs, strict=True):
        # 引号里面，xgrammar 把 <|im_start|> 这样的特殊符号也当作文字许可：我们从不许可
        assert (mine == (other & ~special)).all()


def test_allowed_sets_equal_llguidance(tokenizer):
    pytest.importorskip("llguidance", reason="没有装 llguidance")
    from grammar_peers import follow_llguidance

    ids, ours, words = allowed_along(tokenizer, PLAIN, DOCUMENT)
    theirs = follow_llguidance(tokenizer, len(tokenizer), PLAIN, ids)["masks"]
    assert len(theirs) == len(ours)
    text = b""
    for mine, other, token in zip(ours, theirs, [*ids, 0], strict=True):
        assert not (other & ~mine).any()  # 它许可的我们都许可
        if other.sum() > 1:  # 下面的文字只有一种时，它只留最长的那个 token，不比
            more = [words[i] for i in np.flatnonzero(mine & ~other)]
            # JSON 的标准许可、它不许可的两样：引号里的 DEL，转义的 \\/
            assert all(b"\x7f" in word or (text.endswith(b"\\") and word == b"/") for word in more)
        text += words[token]


def test_fits_agrees_with_jsonschema():
    jsonschema = pytest.importorskip("jsonschema", reason="没有装 jsonschema")
    automaton, rng = matcher(RECORD), random.Random(1)
    for _ in range(30):
        jsonschema.validate(json.loads(walk(automaton, rng)), RECORD)
