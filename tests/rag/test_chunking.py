"""切块：一个字不少，不超过大小，重叠的正是说好的，id 只随文字变。"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nlp_common.base.errors import UserError
from rag_common import chunking
from rag_common.chunking import SPLITTERS, make_chunks, split_sentences

TEXTS = st.text(st.sampled_from("一二三四五。！？，、；”\n# a.第章"), max_size=200)


@given(TEXTS, st.integers(1, 40), st.integers(0, 10), st.sampled_from(sorted(SPLITTERS)))
def test_nothing_is_lost_and_nothing_is_too_long(text, size, overlap, name):
    overlap = min(overlap, size - 1)
    spans = SPLITTERS[name](text, size, overlap)
    covered = set()
    for start, end in spans:
        assert 0 < end - start <= size and text[start:end] == text[start:end].strip()
        covered |= set(range(start, end))
    assert all(n in covered for n, char in enumerate(text) if not char.isspace())
    assert spans == sorted(spans)


@given(TEXTS)
def test_sentences_put_together_are_the_text(text):
    assert "".join(text[a:b] for a, b in split_sentences(text)) == text


def pieces(text, spans):
    return [text[a:b] for a, b in spans]


def test_fixed_overlaps_by_exactly_as_much():
    assert pieces("一二三四五六七八", chunking.fixed("一二三四五六七八", 4, 1)) == [
        "一二三四",
        "四五六七",
        "七八",
    ]
    assert pieces("一二三四", chunking.fixed("一二三四", 4, 2)) == ["一二三四"]
    assert chunking.fixed("", 4) == []


def test_sentences_are_kept_whole():
    text = "天亮了。“走吧！”他说。\n小刚去了花园，在那里看见一只松鼠，松鼠跑了。"
    assert pieces(text, split_sentences(text)) == [
        "天亮了。",
        "“走吧！”",
        "他说。",
        "\n",
        "小刚去了花园，在那里看见一只松鼠，松鼠跑了。",
    ]
    got = pieces(text, chunking.sentences(text, 12))
    assert got == ["天亮了。“走吧！”他说。", "小刚去了花园，", "在那里看见一只松鼠，", "松鼠跑了。"]
    assert "3.14" in pieces("圆周率是 3.14，够用了。", chunking.sentences("圆周率是 3.14，够用了。", 30))[0]


def test_overlap_repeats_whole_sentences():
    text = "一一一。二二二。三三三。四四四。"
    assert pieces(text, chunking.sentences(text, 8, 4)) == [
        "一一一。二二二。",
        "二二二。三三三。",
        "三三三。四四四。",
    ]


def test_default_separators_cut_chinese_anywhere():
    """没有空格的一段，默认的分隔符退到逐字切，句子从中间断开；中文的分隔符在标点处切。"""
    text = "小刚去了花园。松鼠跑了过来。王伯也来了。"
    default = pieces(text, chunking.recursive(text, 9, separators=chunking.DEFAULT_SEPARATORS))
    assert default == ["小刚去了花园。松鼠", "跑了过来。王伯也来", "了。"]
    assert pieces(text, chunking.recursive(text, 9)) == ["小刚去了花园。", "松鼠跑了过来。", "王伯也来了。"]


def test_structure_never_joins_two_sections():
    text = "# 借书\n一次五本。\n\n期限三十天。\n\n# 还书\n放进还书箱。"
    got = pieces(text, chunking.structure(text, 100))
    assert got == ["# 借书\n一次五本。", "期限三十天。", "# 还书\n放进还书箱。"]


def test_ids_follow_the_text_not_the_place():
    text = "天亮了。天亮了。走吧。"
    first = make_chunks("a.txt", text, split_sentences(text), tenant="甲")
    assert first[1].id == first[0].id + "-2" and len({chunk.id for chunk in first}) == 3
    assert first[2].meta == {"tenant": "甲"} and text[first[2].start : first[2].end] == "走吧。"
    longer = "新的一句。" + text
    later = make_chunks("a.txt", longer, split_sentences(longer))
    assert [chunk.id for chunk in later[1:]] == [chunk.id for chunk in first]
    assert make_chunks("b.txt", text, split_sentences(text))[0].id != first[0].id


def test_refused():
    for size, overlap in ((0, 0), (4, 4), (4, -1)):
        with pytest.raises(UserError, match="重叠"):
            chunking.fixed("字", size, overlap)
    with pytest.raises(UserError, match="sentences"):
        chunking.splitter_named("词")
