"""日期与时间：哪个时区、现在几点；两天隔几天。钟是可以换的，测试就能说准几点。tools.py 的 now、days_between。"""

from __future__ import annotations

import datetime
from zoneinfo import ZoneInfo

WEEKDAYS = "一二三四五六日"
# 说得出的地方；别的写 IANA 的名字，如 America/Sao_Paulo
PLACES = {
    "北京": "Asia/Shanghai", "中国": "Asia/Shanghai", "上海": "Asia/Shanghai", "香港": "Asia/Hong_Kong",
    "台北": "Asia/Taipei", "东京": "Asia/Tokyo", "首尔": "Asia/Seoul", "新加坡": "Asia/Singapore",
    "新德里": "Asia/Kolkata", "迪拜": "Asia/Dubai", "莫斯科": "Europe/Moscow", "巴黎": "Europe/Paris",
    "柏林": "Europe/Berlin", "伦敦": "Europe/London", "纽约": "America/New_York", "洛杉矶": "America/Los_Angeles",
    "悉尼": "Australia/Sydney", "UTC": "UTC",
}  # fmt: skip


class TimeError(ValueError):
    """说不出时间：一句话说为什么。"""


def utc_now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def time_in(moment: datetime.datetime, place: str) -> str:
    """moment 在 place 是几点。"""
    name = PLACES.get(place.strip(), place.strip())
    try:
        zone = ZoneInfo(name)
    except (KeyError, ValueError, OSError):  # 没有这个名字；名字里有 ..；名字是个文件夹
        raise TimeError(
            f"不认识时区“{place[:30]}”；写 {'、'.join(PLACES)}，或 IANA 的名字，如 America/Sao_Paulo"
        ) from None
    there = moment.astimezone(zone)
    offset = there.strftime("%z")
    return (
        f"{there:%Y-%m-%d %H:%M:%S}，星期{WEEKDAYS[there.weekday()]}（{name}，UTC{offset[:3]}:{offset[3:5]}）"
    )


def read_date(text: str) -> datetime.date:
    """2026-11-28、2026/11/28、2026年11月28日。"""
    plain = text.strip().replace("年", "-").replace("月", "-").replace("日", "").replace("/", "-")
    parts = plain.split("-")
    try:
        if len(parts) != 3 or not all(part.isascii() and part.isdigit() for part in parts):
            raise ValueError
        return datetime.date(*map(int, parts))
    except ValueError:
        raise TimeError(f"“{text[:20]}”不是一个日期，写成 2026-11-28 这样") from None


def days_from(start: str, end: str) -> str:
    first, last = read_date(start), read_date(end)
    days = (last - first).days
    said = (
        f"{last} 在 {first} 之{'后' if days > 0 else '前'} {abs(days)} 天"
        if days
        else f"{first} 与 {last} 是同一天"
    )
    return f"{said}；{last} 是星期{WEEKDAYS[last.weekday()]}"
