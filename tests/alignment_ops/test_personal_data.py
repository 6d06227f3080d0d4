"""personal_data.py：校验位手算、对照 python-stdnum；各种写法都找得到，像而不是的不冤枉；盖住的正好是原文。"""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from personal_data import MASKS, find_personal, id_check_digit, is_id_number, mask, passes_luhn
from planted_text import made_card, made_id_number, personal_sentence


def texts_of(text: str) -> list[tuple[str, str]]:
    return [(each.kind, text[each.start : each.end]) for each in find_personal(text)]


def test_check_digits_by_hand():
    assert id_check_digit("11010519491231002") == "X"  # GB 11643 里的例子
    assert is_id_number("11010519491231002X") and not is_id_number("110105194912310021")
    assert passes_luhn("79927398713") and not passes_luhn("79927398710")  # 维基百科里的例子


@given(st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_equal_to_stdnum(seed):
    luhn = pytest.importorskip("stdnum.luhn", reason="没有装 python-stdnum，不比")
    from stdnum.cn import ric

    rng = random.Random(seed)
    number, card = made_id_number(rng), made_card(rng)
    assert ric.calc_check_digit(number) == id_check_digit(number[:17]) == number[17]
    digits = "".join(rng.choice("0123456789") for _ in range(16))
    assert luhn.is_valid(card) and passes_luhn(card)
    assert luhn.is_valid(digits) == passes_luhn(digits)


@given(st.integers(0, 10**6), st.integers(0, 17), st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_one_wrong_digit_is_always_seen(seed, place, more):
    rng = random.Random(seed)
    number = made_id_number(rng)
    if place < 17:
        wrong = number[:place] + str((int(number[place]) + more) % 10) + number[place + 1 :]
        assert not is_id_number(wrong)
    card = made_card(rng)
    place = place % len(card)
    assert not passes_luhn(card[:place] + str((int(card[place]) + more) % 10) + card[place + 1 :])


@pytest.mark.parametrize(
    ("text", "kind", "found"),
    [
        ("打13812345678找我", "phone", "13812345678"),
        ("138-1234-5678", "phone", "138-1234-5678"),
        ("电话：+86 138 1234 5678。", "phone", "+86 138 1234 5678"),
        ("１３８１２３４５６７８", "phone", "１３８１２３４５６７８"),
        ("我是一三八一二三四五六七八", "phone", "一三八一二三四五六七八"),
        ("座机010-62345678", "phone", "010-62345678"),
        ("座机(0755) 26345678", "phone", "(0755) 26345678"),
        ("li.lei+a@mail.example.com.cn，谢谢", "email", "li.lei+a@mail.example.com.cn"),
        ("发到li＠example.com", "email", "li＠example.com"),
        ("身份证11010519491231002x", "id_number", "11010519491231002x"),
        ("证件110105 19491231 002X", "id_number", "110105 19491231 002X"),
    ],
)  # fmt: skip
def test_written_in_many_ways(text, kind, found):
    assert texts_of(text) == [(kind, found)]


@pytest.mark.parametrize(
    "text",
    [
        "订单号2026112800001234567890",  # 比哪一种都长
        "时间戳1767225600000",
        "编号110105194912310021",  # 校验位不对
        "11010519491331002X",  # 没有十三月
        "12345678901",  # 不是 1 开头的手机号段
        "圆周率3.14159265358979323846",
        "@所有人 明天交",
        "版本1.13812345678",
        "一共两千三百四十五个字，分成一二三四五六七节",
    ],
)  # fmt: skip
def test_lookalikes_are_left_alone(text):
    assert find_personal(text) == []
    assert mask(text) == (text, [])


def test_a_card_is_found_and_an_id_number_comes_first():
    rng = random.Random(0)
    card, number = made_card(rng), made_id_number(rng)
    text = f"卡{card}，证{number}，电话13900001111，邮箱a@b.cn"
    masked, found = mask(text)
    assert [each.kind for each in found] == ["bank_card", "id_number", "phone", "email"]
    assert masked == "卡[银行卡号]，证[身份证号]，电话[电话]，邮箱[邮箱]"


@given(
    st.integers(0, 10**6),
    st.text(alphabet="我你他去了。，（ab 12", max_size=12),
    st.text(alphabet="我去了。，）", max_size=8),
)
@settings(max_examples=150, deadline=None)
def test_whatever_is_planted_is_found_and_masked_once(seed, before, after):
    kind, written, _ = personal_sentence(random.Random(seed))
    text = before.rstrip("0123456789ab ") + "：" + written + "。" + after
    assert (kind, written) in texts_of(text)
    masked, _ = mask(text)
    assert MASKS[kind] in masked and written not in masked
    assert mask(masked) == (masked, [])
