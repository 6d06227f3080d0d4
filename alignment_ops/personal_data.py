"""个人信息：手机与座机号、邮箱、身份证号、银行卡号，找出来，盖住。

    find_personal(text) -> [Found(kind, start, end), …]      # 在原文的哪里
    mask(text)          -> (盖住了的文字, [Found, …])          # "我的电话是[电话]。"

只看位数会冤枉订单号、时间戳。座机要有区号和分隔（021-6234 5678、+86 21 62345678），前面不是"订单号"。身份证号与银行卡号的最后一位是由前面的算出来的（校验位），编号、流水号碰巧对上的机会
只有十一分之一、十分之一；身份证号里还有真的地区和生日。全角的、汉字写的、中间有空格或横线的，先换成半角数字再找：
换的时候一个字换一个字，位置不变，盖住的就是原文。
"""

from __future__ import annotations

import datetime
import re
from typing import NamedTuple

MASKS = {"phone": "[电话]", "email": "[邮箱]", "id_number": "[身份证号]", "bank_card": "[银行卡号]"}
NAMES = {"phone": "电话", "email": "邮箱", "id_number": "身份证号", "bank_card": "银行卡号"}
ALONE, ENDED = r"(?<![0-9A-Za-z.])", r"(?![0-9A-Za-z])(?!\.[0-9])"  # 前后不是数字、字母：不是更长的编号的一段
MOBILE = r"(?<![0-9A-Za-z.+])(?:(?:\+|00)?86[ -]?)?1[3-9]\d[ -]?\d{4}[ -]?\d{4}" + ENDED
AREA = r"(?:10|2[0-57-9]|[3-9]\d\d)"
LANDLINE = (
    r"(?<![0-9A-Za-z.+-])"
    rf"(?:\(0{AREA}\)|0{AREA}(?=[ -])|(?:\+|00)86 ?-?(?: ?\(0\))? ?\(?0?{AREA}\)?)"  # (021)、021-、+86 21
    r" ?-? ?"
    r"([2-8]\d{6,7}|[2-8]\d{2,3}[ -]\d{4})"  # 七八位，可以从中间断开
    r"(?:-\d{1,5})?(?![0-9A-Za-z-])"  # 分机
)
DATE = re.compile(r"20\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])")
NUMBERED = re.compile(
    r"(?:订单|快递|运单|编|单|流水|序列|合同|发票|货|型|工|学|批|案|版本)号(?:码)?[是为]?[：: ]*$|订单[：: ]*$"
)
PATTERNS = {
    "id_number": re.compile(ALONE + r"\d{6}[ -]?\d{8}[ -]?\d{3}[\dXx]" + ENDED),
    "bank_card": re.compile(ALONE + r"\d(?:[ -]?\d){14,18}" + ENDED),
    "phone": re.compile(f"{MOBILE}|{LANDLINE}"),
    "email": re.compile(r"[A-Za-z0-9_.%+-]+ ?@ ?[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*\.[A-Za-z]{2,}"),
}  # fmt: skip
FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {
    0x3000: 0x20,
    0x2014: 0x2D,
    0x2013: 0x2D,
}
CHINESE = FULL_WIDTH | {
    ord(han): ord(digit) for han, digit in zip("零〇一二三四五六七八九幺", "001234567891", strict=True)
}
# 身份证号的前两位：省级的代码
PROVINCES = set(re.findall("..", "1112131415212223313233343536374142434445465051525354616263646571818283"))
CARD_PREFIX = re.compile(r"62|4|5[1-5]|2[2-7]|3[47]|60|65|9[0-9]{2}")
WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)


class Found(NamedTuple):
    kind: str  # MASKS 里的一种
    start: int
    end: int


def find_personal(text: str) -> list[Found]:
    """text 里的个人信息，按先后，不重叠；重叠的取前面的种类（身份证号在银行卡号前面）。"""
    found: list[Found] = []
    for readable in (text.translate(FULL_WIDTH), text.translate(CHINESE)):
        for kind, pattern in PATTERNS.items():
            for match in pattern.finditer(readable):
                if not is_valid(kind, match[0]) or (match.lastindex and is_other_number(match)):
                    continue
                if all(match.end() <= other.start or other.end <= match.start() for other in found):
                    found.append(Found(kind, match.start(), match.end()))
    return sorted(found, key=lambda each: each.start)


def mask(text: str) -> tuple[str, list[Found]]:
    """个人信息换成 [电话] 一类的记号：句子还读得通，模型学不到号码。"""
    found = find_personal(text)
    for each in reversed(found):  # 从后往前换，前面的位置不变
        text = text[: each.start] + MASKS[each.kind] + text[each.end :]
    return text, found


def is_valid(kind: str, written: str) -> bool:
    digits = re.sub(r"[^0-9Xx]", "", written)
    if kind == "id_number":
        return is_id_number(digits)
    if kind == "bank_card":
        return bool(CARD_PREFIX.match(digits)) and passes_luhn(digits)
    return True


def is_other_number(landline: re.Match) -> bool:
    """样子像座机，其实是别的编号：前面写着"订单号"；号码断开的，正好是一个日期，或前后还有四位一组的（卡号）。"""
    local, text = landline[landline.lastindex or 0], landline.string
    before, after = text[: landline.start()], text[landline.end(landline.lastindex or 0) :]
    if NUMBERED.search(before[-12:]):
        return True
    if local.isdigit():
        return False
    is_date = DATE.fullmatch(re.sub(r"[ -]", "", local))
    in_fours = re.search(r"(?<!\d)\d{4} $", before[-6:]) or re.match(r"[ -]\d{4}(?!\d)", after)
    return bool(is_date or in_fours)


# ---------------------------------------------------------------- 校验位


def is_id_number(digits: str) -> bool:
    """十八位：省，生日，校验位（GB 11643）。"""
    if len(digits) != 18 or digits[:2] not in PROVINCES:
        return False
    try:
        birthday = datetime.date(int(digits[6:10]), int(digits[10:12]), int(digits[12:14]))
    except ValueError:
        return False
    return birthday.year >= 1900 and digits[17].upper() == id_check_digit(digits[:17])


def id_check_digit(body: str) -> str:
    """前十七位各乘一个权，加起来除以 11 的余数查表；X 是 10。一位写错、相邻两位写反，都对不上。"""
    return "10X98765432"[sum(int(d) * w for d, w in zip(body, WEIGHTS, strict=True)) % 11]


def passes_luhn(digits: str) -> bool:
    """从右往左，隔一位乘 2（超过 9 减 9），全部加起来是 10 的倍数。"""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * 2 if place % 2 else int(digit)
        total += value - 9 if value > 9 else value
    return total % 10 == 0
