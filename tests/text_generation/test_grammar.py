"""gbnf.py、automaton.py、token_masks.py：许可的 token 与穷举相等；UTF-8；长度到了写得完；写错的文法说得清。"""

import itertools
import random
import re

import numpy as np
import pytest

from nlp_common.base.errors import UserError
from nlp_common.lm.automaton import Matcher
from nlp_common.lm.gbnf import parse_grammar
from nlp_common.lm.token_masks import TokenMasks, token_bytes


def matcher(text: str) -> Matcher:
    return Matcher(parse_grammar(text))


# 文法, 只用这些字, 穷举到多长, 判合不合的另一条路
SMALL = [
    ('root ::= "a"* "b" ("c" | "a" "c")?', "abc", 6, lambda s: bool(re.fullmatch(r"a*b(c|ac)?", s))),
    ('root ::= ("ab" | "a" "b"){2,3}', "ab", 7, lambda s: s in ("abab", "ababab")),
    ('root ::= "(" root ")" root | ""', "()", 8, lambda s: balanced(s)),
    ("root ::= [a-b]{1,2} x{2}\nx ::= [^ab]", "abc", 5, lambda s: bool(re.fullmatch(r"[ab]{1,2}c{2}", s))),
    ('root ::= x ("," x)*\nx ::= "a"+ | "[" root? "]"', "a,[]", 6, None),
]


def balanced(text: str) -> bool:
    depth = 0
    for char in text:
        depth += 1 if char == "(" else -1
        if depth < 0:
            return False
    return depth == 0


def sentences(text: str, alphabet: str, length: int, judge) -> set[str]:
    """不超过 length 个字的全部句子；没有另一条路的，用最笨的递归展开。"""
    if judge:
        every = ("".join(s) for n in range(length + 1) for s in itertools.product(alphabet, repeat=n))
        return {s for s in every if judge(s)}
    rules = parse_grammar(text)

    def expand(node, left: int, depth: int) -> set[str]:
        if depth > 40 or left < 0:
            return set()
        kind, body = node[0], node[1]
        if kind == "bytes":
            return {chr(byte) for byte in body} if left else set()
        if kind == "rule":
            return expand(rules[body], left, depth + 1)
        if kind == "alt":
            return set().union(*(expand(each, left, depth + 1) for each in body))
        if kind == "repeat":
            found, some, n = set(), {""}, 0
            while some and n <= left + 1:
                if n >= node[2] and (node[3] is None or n <= node[3]):
                    found |= some
                some = {a + b for a in some for b in expand(body, left - len(a), depth + 1) if b}
                n += 1
            return found
        some = {""}
        for each in body:
            some = {a + b for a in some for b in expand(each, left - len(a), depth + 1)}
        return some

    return expand(("rule", "root"), length, 0)


@pytest.mark.parametrize(("text", "alphabet", "length", "judge"), SMALL, ids=[case[0][:20] for case in SMALL])
def test_allowed_tokens_equal_brute_force(text, alphabet, length, judge):
    """从每个走得到的前缀：许可的 token 正好是"接上以后还是某个句子的开头"的那些。"""
    words = [b""] + ["".join(p).encode() for n in (1, 2, 3) for p in itertools.product(alphabet, repeat=n)]
    found = sentences(text, alphabet, length, judge)
    assert len(found) >= 2
    automaton = matcher(text)
    masks = TokenMasks(automaton, words, [0])
    longest = length - 3 - (1 if judge is None else 3)  # 再接一个 token，还要有地方写完，穷举才说了算
    prefixes = {s[:i] for s in found for i in range(len(s) + 1)}
    for prefix in sorted(p for p in prefixes if len(p) <= max(1, longest)):
        state = automaton.step(automaton.start, prefix.encode())
        mask = masks.allowed(state)
        assert mask[0] == (prefix in found) == automaton.can_end(state)
        for i, word in enumerate(words[1:], 1):
            if len(prefix) + len(word) <= max(1, longest) + 1:
                assert mask[i] == (prefix + word.decode() in prefixes), (prefix, word)
            assert masks.next(state, i) == automaton.step(state, word)


def test_matches_equals_python_for_whole_texts():
    for text, alphabet, length, judge in SMALL:
        found, automaton = sentences(text, alphabet, length, judge), matcher(text)
        for n in range(min(length, 5) + 1):
            for chars in itertools.product(alphabet, repeat=n):
                assert automaton.matches("".join(chars)) == ("".join(chars) in found)


@pytest.mark.parametrize(
    "cls", ["[a-z]", "[^a-z]", "[一-龥]", '[^\\x00-\\x1f"]', "[é-ü]", "[😀-😂x]", "[\\u00ff-\\u0801]"]
)
def test_character_classes_in_utf8(cls):
    """边上的字一个一个地试，与 Python 的 re 相同。"""
    automaton = matcher(f"root ::= {cls}")
    edges = [
        0,
        0x1F,
        0x20,
        0x22,
        0x60,
        0x61,
        0x7A,
        0x7F,
        0x80,
        0xE9,
        0xFC,
        0xFF,
        0x7FF,
        0x800,
        0x801,
        0x802,
        0x4E00,
    ]
    edges += [0x9FA5, 0x9FA6, 0xD7FF, 0xE000, 0xFFFF, 0x10000, 0x1F600, 0x1F602, 0x1F603, 0x10FFFF]
    for code in edges:
        assert automaton.matches(chr(code)) == bool(re.fullmatch(cls, chr(code))), hex(code)
    state = automaton.step(automaton.start, "一".encode()[:1])
    assert not automaton.can_end(state)  # 半个字不算写完


def test_a_token_may_end_inside_a_character():
    automaton = matcher('root ::= "你好"')
    data = "你好".encode()
    words = [b"", data[:1], data[:4], data[1:], data[4:], data]
    mask = TokenMasks(automaton, words, [0]).allowed(automaton.start)
    assert mask.tolist() == [False, True, True, False, False, True]


def test_the_budget_always_closes():
    """随便乱写的"模型"，长度卡得再死，写出来的也完整。"""
    automaton = matcher('root ::= "[" (x ("," x)*)? "]"\nx ::= [0-9]+ | root | "\\"" [^"]* "\\""')
    words = [b""] + [bytes([b]) for b in b'[],0123456789"ab'] + [b'","', b"[[", b"]]", "你".encode()]
    masks = TokenMasks(automaton, words, [0])
    rng = random.Random(0)
    for limit in (4, 7, 12, 40):
        for _ in range(60):
            state, text = automaton.start, b""
            for step in range(limit):
                allowed = np.flatnonzero(masks.allowed(state, limit - step - 2))
                assert len(allowed)
                token = int(rng.choice(list(allowed)))
                if token == 0:
                    break
                text, state = text + words[token], masks.next(state, token)
            else:
                raise AssertionError("没有写完")
            assert automaton.matches(text.decode())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('x ::= "a"', "没有 root"),
        ("root ::= y", "没有定义"),
        ('root ::= root "a" | "b"', "左递归"),
        ('root ::= x "b"\nx ::= "c"? root | "d"', "左递归"),
        ('root ::= "a" root', "写不出任何一句话"),
        ('root ::= "a" | x\nx ::= "b" x', "x 总也写不完"),
        ('root ::= "a" )', "第 1 行"),
        ('root ::= ("a"', "左括号"),
        ('root ::= "a"\nroot ::= "b"', "第 2 行.*两次"),
        ("root ::= [z-a]", "次序反了"),
        ('root ::= "a"{3,2}', "上限小于下限"),
        ('root ::= "a\n"', "读不懂"),
        ("root ::= *", "不能写在这里"),
        (r'root ::= "\xZZ"', "后面要写 2 位十六进制数"),
        (r"root ::= [\u12]", "后面要写 4 位十六进制数"),
        (r'root ::= "\U00110000"', "没有这个码位"),
        (r'root ::= "\ud800"', "没有这个码位"),
    ],
)
def test_bad_grammars_say_what_is_wrong(text, said):
    with pytest.raises(UserError, match=said):
        matcher(text)


def test_too_many_states_is_said(monkeypatch):
    from nlp_common.lm import automaton

    monkeypatch.setattr(automaton, "MAX_STATES", 50)
    with pytest.raises(UserError, match="太复杂"):
        m = matcher('root ::= "a"{100}')
        m.step(m.start, b"a" * 100)


def test_bytes_of_tokens(chat_tokenizer):
    """各 token 的字节接起来就是原文；控制符不是文字。"""
    words = token_bytes(chat_tokenizer)
    text = "小刚去了 garden，𠮷😀\n"
    ids = chat_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert b"".join(words[i] for i in ids).decode() == text
    assert all(words[i] == b"" for i in chat_tokenizer.all_special_ids)
