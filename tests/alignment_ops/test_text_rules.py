"""text_rules.py：每条规则一个有毛病的、一个像而不是的；题目自己要外文的不算。"""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nlp_common.tiny import world
from text_rules import (
    garbage_fault,
    is_mojibake,
    language_fault,
    language_of,
    other_languages,
    share_outside,
    share_rare,
)

STORY = "那天傍晚，小刚去了花园。一只黑色的松鼠跑了过来。"


def chat(asked: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize(
    ("text", "language"),
    [
        (STORY, "zh"),
        ("那天傍晚，小剛來到花園，忽然跑來一隻烏龜，這時候學校的鐘響了。", "zh-hant"),
        ("That evening Tom went to the garden.", "en"),
        ("たろうはこうえんにいきました。", "ja"),
        ("小刚은 공원에 갔습니다", "ko"),
        ("Вечером Анна пошла в школу.", "ru"),
        ("OK", ""),
        ("你好", ""),
        ("```python\nprint('hello world from here today')\n```", ""),
        ("我用 Python 和 PyTorch 写了一个 Transformer 模型，参数量是 7B。", "zh"),
    ],
)
def test_language(text, language):
    assert language_of(text) == language


def test_an_answer_in_english_is_right_when_it_is_asked_for():
    english = "Where did he go in the evening?"
    assert language_fault(chat("把下面这句话翻译成英文：他傍晚去了哪里？", english)) == ""
    assert language_fault(chat("他傍晚去了哪里呢？请你回答一下", english)) == "英文"
    assert language_fault(chat("Where did Tom go? Please translate this for me now.", english)) == "英文"
    assert language_fault(chat("Where did Tom go? Please tell me now.", english), ("zh", "en")) == ""


HANT = "那天傍晚，小剛來到花園，忽然跑來一隻烏龜。"


def test_one_traditional_turn_does_not_drop_a_conversation():
    """三问三答，一句繁体的留下；问的全是繁体，或答的一半以上是繁体的，才丢。"""
    three = [*chat(STORY, STORY), *chat(STORY, STORY), *chat(STORY, HANT)]
    assert language_fault(three) == "" and other_languages(three) == {5: "zh-hant"}
    assert language_fault([*chat(STORY, HANT), *chat(STORY, HANT), *chat(STORY, STORY)]) == "繁体中文"
    assert language_fault(chat(HANT, STORY)) == language_fault(chat(STORY, HANT)) == "繁体中文"
    assert language_fault(three[4:] + chat("好", "嗯")) == "繁体中文"  # 太短的看不出，不当作简体
    assert language_fault([*chat(STORY, HANT), *chat(STORY, HANT)], ("zh", "zh-hant")) == ""
    english = [{"role": "system", "content": "You are a very helpful assistant."}, *chat(STORY, STORY)]
    assert language_fault(english) == "" and other_languages(english) == {}


@pytest.mark.parametrize(
    ("asked", "answer", "fault"),
    [
        ("Hello!", "Hi, how are you?", "英文"),
        ("Good morning", "Morning", "英文"),
        ("Hello", "你好！", ""),
        ("apple pie", "苹果派", ""),
        ("2x + 3y = 7", "x = 2, y = 1", ""),
        ("sin(x)^2 + cos(x)^2 = ?", "1", ""),
        ("`git status`", "`git log`", ""),
        ("GDP", "3.5%", ""),
        ("OK", "", ""),
    ],
)
def test_short_rows_are_judged_as_a_whole(asked, answer, fault):
    assert language_fault(chat(asked, answer)) == fault
    assert language_fault(chat(asked, answer), ("zh", "en")) == ""


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (STORY.encode().decode("gb18030", errors="ignore"), "乱码"),
        (STORY.encode().decode("latin-1"), "乱码"),
        ("去了花\x00园", "控制字符"),
        ("去了���花园", "控制字符"),
        ("<div><p>去了花园</p></div>", "网页残渣"),
        ("去了花园&nbsp;&nbsp;", "网页残渣"),
        ("去了花园" + "花园" * 12, "重复"),
        ("asdkfjhgqwzxcvbnmsd", "乱打的字母"),
        ("去了花园。关注公众号领取红包！", "广告"),
        ("龘靐齉齾爩鱻麤龗灪吁", "乱字"),
    ],
)
def test_garbage(answer, fault):
    assert garbage_fault(chat("小刚去了哪里？", answer)) == fault


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        ("小刚去了哪里？", "哈哈哈哈哈哈，去了花园。"),
        ("写一段 HTML", "<div><p>花园</p></div>"),
        ("小刚去了哪里？", "```html\n<div>花园</div>\n```"),
        ("画一条线", "----------------------------------------"),
        ("圆周率的前二十位", "3.1415926535897932384"),
        ("讲讲互联网", "internationalization 是一个很长的词。"),
        ("用一句话说", "café、naïve 都是外来词。"),
        ("镧系元素有哪些？", "镧铈镨钕钷钐铕钆铽镝钬铒铥镱镥"),
    ],
)
def test_lookalikes(asked, answer):
    assert garbage_fault(chat(asked, answer)) == ""


@given(st.integers(0, 10**6))
def test_random_characters_are_garbage(seed):
    rng = random.Random(seed)
    text = "".join(chr(rng.randrange(0x4E00, 0x9FA0)) for _ in range(100))
    assert garbage_fault(chat("小刚去了哪里？", text)) == "乱字"


def test_copied_question():
    asked = "那天傍晚，小刚去了花园，后来谁也来了？"
    assert garbage_fault(chat(asked, asked)) == "回答照抄问题"


def test_mojibake_read_as_gbk_and_as_latin_1():
    for encoding in ("gb18030", "latin-1"):
        assert is_mojibake("那天傍晚小刚去了花园".encode().decode(encoding, errors="ignore"))
    assert not is_mojibake(STORY)


@given(st.integers(0, 200))
def test_clean_rows_have_no_fault(seed):
    for row in world.chats(3, seed) + [
        {"messages": pair["prompt"] + pair["chosen"]} for pair in world.pairs(3, seed)
    ]:
        assert garbage_fault(row["messages"]) == "" and language_fault(row["messages"]) == ""


def test_share_outside():
    assert share_outside("小刚小剛", "gb2312") == 0.25
    assert share_outside("小刚小剛", "gb2312", "big5") == 0.0
    assert share_rare("小刚小剛") == 0.0 and share_rare("小刚龘靐") == 0.5
    assert share_outside("abc", "gb2312") == 0.0
