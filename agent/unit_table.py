"""单位换算：每个单位是基本单位的几倍，都是准确的分数；温度另有一个起点。tools.py 的 convert。

convert("3", "亩", "平方米")  →  Fraction(2000)
"""

from __future__ import annotations

from fractions import Fraction

# 量 → 单位 → 是第一个单位的几倍。市制照 1930 年起的定义：1 尺 = 1/3 米，1 斤 = 500 克，1 亩 = 60 平方丈
LENGTH = {
    "米": "1", "千米": "1000", "公里": "1000", "分米": "0.1", "厘米": "0.01", "毫米": "0.001", "微米": "0.000001",
    "里": "500", "丈": "10/3", "尺": "1/3", "寸": "1/30",
    "英寸": "0.0254", "英尺": "0.3048", "码": "0.9144", "英里": "1609.344", "海里": "1852",
}  # fmt: skip
WEIGHT = {
    "克": "1", "千克": "1000", "公斤": "1000", "毫克": "0.001", "吨": "1000000",
    "斤": "500", "两": "50", "钱": "5", "担": "50000", "磅": "453.59237", "盎司": "28.349523125",
}  # fmt: skip
AREA = {
    "平方米": "1", "平方千米": "1000000", "平方公里": "1000000", "平方分米": "0.01", "平方厘米": "0.0001",
    "公顷": "10000", "亩": "2000/3", "顷": "200000/3", "分地": "200/3", "平方尺": "1/9", "平方丈": "100/9",
    "平方英尺": "0.09290304", "英亩": "4046.8564224",
}  # fmt: skip
TEMPERATURE = {"开": ("1", "0"), "摄氏度": ("1", "273.15"), "华氏度": ("5/9", "45967/180")}  # 几倍，起点
ALSO = {
    "m": "米", "km": "千米", "dm": "分米", "cm": "厘米", "mm": "毫米", "um": "微米", "in": "英寸", "ft": "英尺",
    "yd": "码", "mi": "英里", "华里": "里", "市里": "里", "市尺": "尺", "市寸": "寸",
    "g": "克", "kg": "千克", "mg": "毫克", "t": "吨", "lb": "磅", "oz": "盎司", "市斤": "斤", "市两": "两",
    "平方": "平方米", "m2": "平方米", "m²": "平方米", "㎡": "平方米", "km2": "平方千米", "km²": "平方千米",
    "ha": "公顷", "市亩": "亩", "K": "开", "开尔文": "开", "°C": "摄氏度", "℃": "摄氏度", "C": "摄氏度",
    "°F": "华氏度", "℉": "华氏度", "F": "华氏度",
}  # fmt: skip


class UnitError(ValueError):
    """换算不了：一句话说为什么。"""


def _table() -> dict[str, tuple[str, Fraction, Fraction]]:
    """单位 → (哪一种量, 几倍, 起点)。"""
    table = {}
    for kind, units in (("长度", LENGTH), ("重量", WEIGHT), ("面积", AREA)):
        for name, times in units.items():
            table[name] = (kind, Fraction(times), Fraction(0))
    for name, (times, start) in TEMPERATURE.items():
        table[name] = ("温度", Fraction(times), Fraction(start))
    return table


UNITS = _table()


def find_unit(name: str) -> tuple[str, Fraction, Fraction]:
    name = name.strip()
    name = ALSO.get(name) or ALSO.get(name.lower(), name)
    if name not in UNITS:
        raise UnitError(f"不认识单位“{name[:20]}”；有的是：{'、'.join(UNITS)}")
    return UNITS[name]


def convert(value: Fraction, from_unit: str, to_unit: str) -> Fraction:
    """先换成基本单位，再换成要的；不是同一种量的、冷过绝对零度的、负的长度，是 UnitError。"""
    kind, times, start = find_unit(from_unit)
    kind_to, times_to, start_to = find_unit(to_unit)
    if kind != kind_to:
        raise UnitError(f"{from_unit}是{kind}，{to_unit}是{kind_to}，换算不了")
    base = value * times + start
    if base < 0:
        raise UnitError("比绝对零度还冷" if kind == "温度" else f"{kind}不能是负的")
    return (base - start_to) / times_to
