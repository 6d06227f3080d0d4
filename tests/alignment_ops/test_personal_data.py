"""personal_data.py：校验位手算、对照 python-stdnum；各种写法都找得到，像而不是的不冤枉；盖住的正好是原文。"""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from personal_data import MASKS, find_personal, id_check_digit, is_id_number, mask, passes_luhn
from planted_text import full_width, made_card, made_id_number, personal_sentence


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
        ("座机021-6234 5678", "phone", "021-6234 5678"),
        ("电话 021 6234 5678，谢谢", "phone", "021 6234 5678"),
        ("（０２１）６２３４－５６７８", "phone", "（０２１）６２３４－５６７８"),
        ("+86 (0)21 6234 5678", "phone", "+86 (0)21 6234 5678"),
        ("拨0086-755-2634 5678", "phone", "0086-755-2634 5678"),
        ("+862162345678。", "phone", "+862162345678"),
        ("零二一-六二三四 五六七八", "phone", "零二一-六二三四 五六七八"),
        ("0755-2634567-801转张三", "phone", "0755-2634567-801"),
        ("电话号码：021-62345678 2026年起", "phone", "021-62345678"),
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
        "订单号021-62345678",
        "编号：0512-3456-7890",
        "020-2026-1128",
        "010 2026 1128",
        "卡6222 0213 2345 6789 123",
        "0512 3456 7890 1234",
        "ISBN 978-7-020-23456789",
        "021-62345678-20261128",
        "026-62345678",  # 没有这个区号
        "021-12345678",  # 号码没有 1 开头的
        "比分021-23",
        "一共两千三百四十五个字，分成一二三四五六七节",
    ],
)  # fmt: skip
def test_lookalikes_are_left_alone(text):
    assert find_personal(text) == []
    assert mask(text) == (text, [])


@given(st.integers(0, 10**6))
@settings(max_examples=300, deadline=None)
def test_a_landline_is_found_however_it_is_written(seed):
    rng = random.Random(seed)
    area, length = rng.choice([("10", 8), ("21", 8), ("28", 8), ("755", 8), ("512", 7), ("931", 7)])
    local = rng.choice("345678") + "".join(rng.choice("0123456789") for _ in range(length - 1))
    local = rng.choice([local, f"{local[:-4]} {local[-4:]}", f"{local[:-4]}-{local[-4:]}"])
    front = rng.choice(
        ["0{}-", "0{} ", "0{} - ", "(0{})", "(0{}) ", "+86 {} ", "+86-{}-", "0086 {} ", "+86({})", "+86{}"]
    )
    written = front.format(area) + local
    written = rng.choice([written, full_width(written)])
    assert texts_of(f"座机{written}，请打") == [("phone", written)]


@given(st.integers(0, 10**6))
@settings(max_examples=300, deadline=None)
def test_order_numbers_dates_and_scores_are_no_landlines(seed):
    rng = random.Random(seed)

    def digits(n: int) -> str:
        return "".join(rng.choice("0123456789") for _ in range(n))

    date = f"20{rng.randint(10, 39)}{rng.choice(['-', '/', '.', ' '])}{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"
    number = rng.choice(
        [
            f"{digits(4)}-{digits(4)}-{digits(4)}-{digits(4)}",
            f"DD{digits(3)}-{digits(8)}",
            f"{digits(8)}-{digits(3)}-{digits(8)}",
            f"订单号：0{digits(2)}-{digits(8)}",
            f"0{digits(3)} {digits(4)} {digits(4)} {digits(4)}",
            f"{date} {digits(2)}:{digits(2)}",
            f"{date} 至 {date}",
            f"0{digits(2)}-{date.replace('/', '-').replace('.', '-').replace(' ', '-')}",
            f"{digits(2)}-{digits(2)}，{digits(3)} {digits(3)}",
            f"0{digits(2)}{digits(8)}",
        ]
    )
    landlines = [found for found in find_personal(f"看{number}。") if found.kind == "phone"]
    assert not [each for each in landlines if number[each.start - 1 : each.end - 1].startswith(("0", "+"))]


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
