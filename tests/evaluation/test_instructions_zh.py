"""每条要求：构造的合格的过，不合格的不过（随机参数）；手算的边界；与 lm-evaluation-harness 里的 IFEval 相同。"""

import ast
import json
import random
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import chinese_counts as counts
import ifeval_peers as peers
import instruction_examples as examples
import instruction_prompts as prompts
import instructions_zh as iz


def test_there_are_enough_instructions():
    assert len(iz.RULES) >= 25
    assert set(iz.RULES) == set(prompts.WORDING)


@pytest.mark.parametrize("id", list(iz.RULES))
@given(seed=st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_constructed_pass_and_fail(id, seed):
    rng = random.Random(seed)
    topic = rng.choice(list(prompts.TOPICS))
    kwargs = prompts.draw_kwargs(id, rng, topic)
    assert iz.kwargs_fault(id, kwargs) is None
    good = examples.repair(id, kwargs, examples.start_text(topic))
    bad = examples.spoil(id, kwargs, good)
    assert iz.follows_strict(id, kwargs, good)
    assert not iz.follows_strict(id, kwargs, bad)
    assert not iz.follows_strict(id, kwargs, " \n")  # 空的回答什么也不合
    assert prompts.say(id, kwargs)


@given(st.text(alphabet="春天花园abc 123，。！\n", max_size=60), st.integers(0, 30))
@settings(max_examples=200, deadline=None)
def test_relations_split_all_texts(text, number):
    """少于与不少于恰有一个成立；正好是不少于加上不多于。"""
    for check, name in ((iz.words_number, "num_words"), (iz.sentences_number, "num_sentences")):
        said = {relation: check(text, relation=relation, **{name: number}) for relation in counts.RELATIONS}
        assert said["at least"] != said["less than"]
        assert said["exactly"] == (said["at least"] and said["at most"])
        chinese = {r: check(text, relation=counts.RELATIONS[r], **{name: number}) for r in counts.RELATIONS}
        assert chinese == said


@given(st.text(max_size=80))
@settings(max_examples=200, deadline=None)
def test_loose_is_never_stricter(text):
    """任何文字都不出错；严格合的，宽松也合。"""
    for id in iz.RULES:
        kwargs = prompts.draw_kwargs(id, random.Random(0))
        strict = iz.follows_strict(id, kwargs, text)
        assert isinstance(strict, bool)
        assert iz.follows_loose(id, kwargs, text) or not strict


@pytest.mark.parametrize(
    ("text", "words", "sentences"),
    [
        ("今天是3.14，it's OK。", 6, 1),
        ("真的吗？！真的。", 5, 2),
        ("“走吧。”他说", 4, 2),
        ("……。。。", 0, 0),
        ("一句\n两句\n\n三句", 6, 3),
        ("Dr. Li came. He left.", 5, 3),
        ("ひらがなと漢字", 7, 1),
        ("𠮷野家", 3, 1),
    ],
)
def test_counts_by_hand(text, words, sentences):
    assert counts.count_words(text) == words
    assert len(counts.sentences(text)) == sentences


@pytest.mark.parametrize(
    ("id", "kwargs", "good", "bad"),
    [
        ("punctuation:no_comma", {}, "一、二。", "一，二"),
        ("startend:quotation", {}, "「好」", "「好"),
        ("startend:quotation", {}, '"好"', '"'),
        ("startend:end_checker", {"end_phrase": "完了。"}, "“说完了。”", "完了。吗"),
        ("zh:script", {"script": "simplified"}, "台后里面发几只云干了", "發"),
        ("zh:script", {"script": "traditional"}, "台北的書，寫得好", "写"),
        ("zh:punctuation_width", {"width": "full"}, "版本3.14，a.b好。", "好.坏"),
        ("zh:numbered_list", {"num_items": 2}, "1、甲\n2、乙", "1. 甲\n3. 乙"),
        ("zh:acrostic", {"head": "平安"}, "平地起风。安然无事。", "安然。平地。"),
        ("zh:json_keys", {"keys": ["a", "b"]}, '```json\n{"b": 1, "a": 2}\n```', '{"a": 1}'),
        ("zh:divider", {"num_dividers": 1}, "上\n----\n下", "上\n--\n下"),
        (
            "keywords:frequency",
            {"keyword": "谢谢", "relation": "exactly", "frequency": 2},
            "谢谢谢谢",
            "谢谢谢",
        ),
        ("keywords:existence", {"keywords": ["A.B"]}, "见a.b", "见aXb"),  # 照字面，不是正则
        (
            "detectable_format:multiple_sections",
            {"section_spliter": "第{}节", "num_sections": 2},
            "第一节\n第 2 节",
            "第节第二节",
        ),
        ("language:response_language", {"language": "ja"}, "日本語です", "日本"),
        ("language:response_language", {"language": "zh"}, "用GPU训练模型", "train the model 好"),
        ("zh:table", {"num_columns": 2}, "|a|b|\n|-|:-:|\n|1|2|", "|a|b|\n|1|2|\n|3|4|"),
        (
            "length_constraints:number_paragraphs",
            {"num_paragraphs": 2},
            "***\n甲\n***\n乙",
            "甲\n***\n***\n乙",
        ),
        ("detectable_content:postscript", {"postscript_marker": "附言："}, "好\n 附言:见", "好 附言：见"),
    ],
)
def test_borders_by_hand(id, kwargs, good, bad):
    assert iz.kwargs_fault(id, kwargs) is None
    assert iz.follows_strict(id, kwargs, good)
    assert not iz.follows_strict(id, kwargs, bad)


def test_loose_forgives_a_preface_and_stars():
    kwargs = {"start_phrase": "春天"}
    assert not iz.follows_strict("zh:start_with", kwargs, "好的，以下是短文：\n**春天**来了")
    assert iz.follows_loose("zh:start_with", kwargs, "好的，以下是短文：\n**春天**来了")
    assert not iz.follows_loose("zh:start_with", kwargs, "好的\n以下\n春天")  # 只去掉一行


@pytest.mark.parametrize(
    ("id", "kwargs", "said"),
    [
        ("length_constraints:number_words", {"relation": "at least"}, "缺参数 num_words"),
        ("length_constraints:number_words", {"relation": "多于", "num_words": 3}, "relation 可以是"),
        ("length_constraints:number_words", {"relation": "at least", "num_words": 2.5}, "整数"),
        ("keywords:existence", {"keywords": []}, "列表"),
        ("keywords:existence", {"keywords": "花"}, "列表"),
        ("zh:start_with", {"start_phrase": " "}, "一段字"),
        ("language:response_language", {"language": "fr"}, "zh、ja"),
        ("punctuation:no_comma", {"num": 1}, "不认识的参数 num"),
    ],
)
def test_kwargs_faults_are_named(id, kwargs, said):
    assert said in iz.kwargs_fault(id, kwargs)


def test_simplified_and_traditional_agree_with_a_conversion_table():
    """snownlp 里的繁简表：两千多个字里，99% 以上判得一样。"""
    table = Path(find_spec("snownlp").origin).parent / "normal" / "zh.py"
    tree = ast.parse(table.read_text(encoding="utf-8"))
    pairs = next(
        ast.literal_eval(n.value)
        for n in tree.body
        if isinstance(n, ast.Assign) and n.targets[0].id == "zh2hans"
    )
    both = [(a, b) for a, b in pairs.items() if len(a) == len(b) == 1 and a != b]
    common = [(a, b) for a, b in both if counts.can_encode(a, "big5") and counts.can_encode(b, "gb2312")]
    told = [counts.only_in(a, "traditional") or counts.can_encode(a, "gb2312") for a, _ in common]
    assert len(common) > 2000 and sum(told) / len(told) > 0.99
    # 反过来：只在简体里用的，不会被说成繁体
    assert not any(counts.only_in(b, "traditional") for _, b in common)


@pytest.fixture(scope="module")
def harness():
    """lm-evaluation-harness 0.4.13 里的 IFEval 检查器。"""
    pytest.importorskip("lm_eval", reason="要 lm_eval：pip install lm_eval==0.4.13")
    pytest.importorskip("nltk", reason="lm_eval 的 IFEval 要 nltk")
    return peers.load_harness()


PEERS = {  # 与语言无关、两边应当一样的：id → 参数
    "length_constraints:number_paragraphs": {"num_paragraphs": 2},
    "detectable_content:number_placeholders": {"num_placeholders": 2},
    "detectable_content:postscript": {"postscript_marker": "P.S."},
    "detectable_format:number_highlighted_sections": {"num_highlights": 2},
    "detectable_format:multiple_sections": {"section_spliter": "Section", "num_sections": 2},
    "detectable_format:json_format": {},
    "detectable_format:title": {},
    "combination:two_responses": {},
    "startend:end_checker": {"end_phrase": "Bye."},
    "punctuation:no_comma": {},
    "keywords:existence": {"keywords": ["one", "two"]},
    "keywords:frequency": {"keyword": "one", "frequency": 2, "relation": "at least"},
    "detectable_format:number_bullet_lists": {"num_bullets": 2},
    "length_constraints:number_words": {"num_words": 4, "relation": "less than"},
}
PIECES = [
    "one",
    "two",
    " ",
    "\n",
    "\n***\n",
    "[name]",
    "[]",
    "P.S. x",
    "*a*",
    "**b**",
    "Section 1",
    " Section 2\n",
]
PIECES += [
    '{"a": 1}',
    "```json\n",
    "```",
    "<<t>>",
    "<<>>",
    "\n******\n",
    "Bye.",
    '"',
    ",",
    "\n* item",
    "\n- item",
    "中文",
]


@pytest.mark.parametrize("id", list(PEERS))
def test_equals_the_harness(id, harness):
    """随机拼出的文字，两边说的一样；英文的数词除外（它把一整句汉字数成一个词），那里不放汉字。"""
    kwargs = PEERS[id]
    rng = random.Random(id)
    pieces = [piece for piece in PIECES if piece != "中文" or id != "length_constraints:number_words"]
    if id == "length_constraints:number_words":
        pieces = ["one", " two", " three", "\n", ", "]
    said = set()
    for _ in range(2000):
        text = "".join(rng.choice(pieces) for _ in range(rng.randint(1, 8)))
        if not text.strip():
            continue
        theirs = peers.harness_follows(harness, id, kwargs, text)
        assert iz.follows_strict(id, kwargs, text) == theirs, text
        said.add(theirs)
    assert said == {True, False}


def test_the_harness_is_wrong_in_chinese(harness):
    """照搬过来的三条：汉字之间没有词的边界，逗号有全角的，一整句汉字数成一个词。"""
    text = "今天的天气很好，我们去公园。"
    for id, kwargs in (
        ("keywords:forbidden_words", {"forbidden_words": ["天气"]}),
        ("punctuation:no_comma", {}),
        ("length_constraints:number_words", {"num_words": 5, "relation": "less than"}),
    ):
        assert peers.harness_follows(harness, id, kwargs, text)
        assert not iz.follows_strict(id, kwargs, text)


def test_prompts_are_feasible_and_in_the_right_layout():
    rows = prompts.general_prompts(120, 0)
    assert [row["key"] for row in rows] == list(range(1, 121))
    assert {id for row in rows for id in row["instruction_id_list"]} == set(iz.RULES)
    for row in rows + prompts.tiny_prompts(40, 0):
        assert len(row["instruction_id_list"]) == len(row["kwargs"])
        json.dumps({name: row[name] for name in ("key", "prompt", "instruction_id_list", "kwargs")})
        for id, kwargs in zip(row["instruction_id_list"], row["kwargs"], strict=True):
            assert iz.kwargs_fault(id, kwargs) is None
            assert iz.follows_strict(id, kwargs, row["example"])
    assert rows == prompts.general_prompts(120, 0)
    assert rows != prompts.general_prompts(120, 1)
