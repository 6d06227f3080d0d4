"""自带的诗：一部会写对联和绝句的小语法，平仄、押韵、对仗都照规矩，一首诗有多少信息（nats）也算得出来。

词是我们自己编的，写不出好诗；它是一台仪器：什么是合律的、最低能到多少 loss，这里都知道。
读真的唐诗见 poem_gpt.py 的 --dataset。一句五言 = 两字的名词 + 三个字（两种）：

    2+2+1  清风 | 江上 | 起     名词，在哪里，怎么样
    2+1+2  清风 | 送 | 归雁     名词，做什么，名词

七言在前面再加两个字（今朝、昨夜）。四种句式的平仄（○ 是可平可仄），平声结尾的两种押韵：

    仄句  甲 ○仄○平仄   丙 ○平平仄仄         韵句  乙 平平○仄平   丁 ○仄仄平平
"""

import functools
import random
import zlib

from nlp_common.tiny.world import Draw
from poem_sounds import PING, ZE, rhyme_of, tone_of

# 名词按类分：对联的上下联，同一个位置要用同一类的词
NOUNS = {
    "天文": "明月 清风 白云 晨光 秋霜 春雨 细雨 暮雪 落日 晚霞 残星 北斗 朝阳 寒烟 夜露 彩虹 长虹 夕照 斜阳 浮云 "
    "暮烟 晓霜 月光 夕阳 晓风 斜晖 清辉 落晖 云天 碧天 流霞 雪花 春风 新月 晓雾 飞雪 黄昏 清秋 晚秋 暮春 夜雨 朝露",
    "地理": "青山 远山 碧水 大江 古道 小桥 沧海 大漠 深谷 寒潭 曲径 荒城 秋水 春江 野渡 断桥 高楼 旧院 空林 竹林 "
    "寒塘 柳塘 前川 野泉 翠峦 孤峰 翠屏 野村 远村 芳洲 画楼 小楼 柴扉 翠微 长桥 春潮 晚潮 波涛 芳郊 远郊 平沙 白沙 "
    "山庄 回廊 古寺 石径 津渡 山路",
    "植物": "桃花 绿柳 翠竹 红梅 早梅 幽兰 古松 青草 落叶 芳树 秋菊 残荷 苍苔 嫩芽 杏蕊 丹桂 落花 野花 暗香 花香 "
    "残花 新苗 柳梢 孤松 疏影 落英 古木 修竹 碧草 枯藤 老藤",
    "动物": "飞燕 黄莺 白鹭 归雁 孤鹤 寒鸦 鸣蝉 骏马 游鱼 野鹿 彩蝶 流萤 老牛 耕牛 杜鹃 沙鸥 白鸥 子规 旅雁 暮鸦 "
    "宿鸟 乳燕 啼鸟 瘦马",
    "人事": "渔翁 樵客 牧童 游子 孤舟 钓舟 玉笛 琴声 晚钟 灯火 故人 征帆 酒旗 画角 书生 游人 雨声 柳笛 渔火 钟鼓 "
    "酒家 人家 短棹 客船 远帆 归帆 旅人 浣女",
}
WHERE = "山云天江花林溪楼城月水雨雪竹石野柳夜"  # 在哪里 = 其中一个字 + 下面一个字
BESIDE = "中间边前上下里外畔"
VERBS = "照绕送伴映抱隔过带入临迎随连依摇穿藏观寻"  # 2+1+2 中间的一个字
STATES = (  # 2+2+1 末尾的一个字
    "长凉香忙苍扬藏寒闲残圆翻安还生明清轻横鸣空红新沉深闻吟春流幽收浮愁留飞归垂回微催高飘摇遥娇消"
    "落静远暗冷近动尽淡晚满老起断细碧白"
)
OPENINGS = (
    "今朝 春来 秋深 年年 时时 江南 黄昏 何时 去年 故园 清晨 几年 昨夜 日暮 处处 几度 独自 雨后 塞北 岁岁 今日 何处 "
    "山外 春晚 夜半 一片"
)
RHYMES = ["唐", "寒", "庚", "文", "尤", "微", "豪"]  # 用哪几个韵部：名词、形容词都够用的

# 句式：五个位置的平仄，None 是可平可仄（"一三不论"，但乙的第一字、丙丁的第三字要论，免得孤平、三平调）
LINES = {
    "甲": [None, ZE, None, PING, ZE],
    "乙": [PING, PING, None, ZE, PING],
    "丙": [None, PING, PING, ZE, ZE],
    "丁": [None, ZE, ZE, PING, PING],
}
QUATRAINS = ["甲乙丙丁", "丙丁甲乙", "丁乙丙丁", "乙丁甲乙"]  # 绝句的四种格式：粘、对都在里面
COUPLETS = ["甲乙", "丙丁"]
KINDS = {"五绝": (5, 4), "七绝": (7, 4), "五联": (5, 2), "七联": (7, 2)}  # 每句几个字，几句
WEIGHTS = [3, 3, 1, 1]  # 各写多少：押韵只在绝句里，又最难学，所以绝句多些


def pattern(form: str, length: int) -> list:
    """一句的平仄，length 是 5 或 7；七言的头两字与五言的头两字相反，只论第二个字。"""
    five = LINES[form]
    if length == 5:
        return five
    return [None, PING if five[1] == ZE else ZE, *five]


def fits(text: str, tones: tuple, rhyme: str | None = None) -> bool:
    """每个字合不合要求的平仄；给了 rhyme，最后一个字还要在这个韵部。"""
    if any(want is not None and tone_of(char) != want for char, want in zip(text, tones, strict=True)):
        return False
    return rhyme is None or rhyme_of(text[-1]) == rhyme


ALL_NOUNS = [word for words in NOUNS.values() for word in words.split()]
WORDS = {name: words.split() for name, words in NOUNS.items()} | {
    "名词": ALL_NOUNS,
    "处所": [base + side for base in WHERE for side in BESIDE],
    "动词": list(VERBS),
    "样子": list(STATES),
    "开头": OPENINGS.split(),
}


def choices(kind: str, tones: list, rhyme: str | None = None, used: str = "") -> list[str]:
    """某一类里合要求的词；末字已经押过的（used）不再用。"""
    return [word for word in fitting(kind, tuple(tones), rhyme) if word[-1] not in used]


@functools.cache
def fitting(kind: str, tones: tuple, rhyme: str | None) -> list[str]:
    return [word for word in WORDS[kind] if fits(word, tones, rhyme)]


def write_line(
    draw: Draw, form: str, length: int, rhyme: str | None, used: str, like: dict | None = None
) -> tuple[str, dict]:
    """写一句，返回（句子，它的结构）。like 是上联的结构：下联要用同样的结构、同类的名词。"""
    tones = pattern(form, length)
    opening = draw.pick(choices("开头", tones[:2])) if length == 7 else ""
    tones = tones[-5:]
    plan = like or {"cut": draw.pick(["2+2+1", "2+1+2"])}
    noun = draw.pick(choices(plan["noun"] if like else "名词", tones[:2]))
    if plan["cut"] == "2+2+1":
        rest = draw.pick(choices("处所", tones[2:4])) + draw.pick(choices("样子", tones[4:], rhyme, used))
        last = None
    else:
        verb = draw.pick(choices("动词", tones[2:3]))
        last = draw.pick(choices(plan["last"] if like else "名词", tones[3:], rhyme, used))
        rest = verb + last
    if like is None:
        plan |= {"noun": category(noun), "last": last and category(last)}
    return opening + noun + rest, plan


def category(noun: str) -> str:
    """名词属于哪一类。"""
    return next(name for name in NOUNS if noun in WORDS[name])


def write_poem(draw: Draw, kind: str) -> str:
    """一首：两句用逗号隔开、句号结束，绝句两行连着写。"""
    length, n_lines = KINDS[kind]
    lines: list[str] = []
    if n_lines == 2:
        forms = draw.pick(COUPLETS)
        upper, plan = write_line(draw, forms[0], length, None, "")
        lower, _ = write_line(draw, forms[1], length, None, "", plan)
        lines = [upper, lower]
    else:
        forms, rhyme, used = draw.pick(QUATRAINS), draw.pick(RHYMES), ""
        for form in forms:
            rhymed = form in "乙丁"
            line, _ = write_line(draw, form, length, rhyme if rhymed else None, used)
            used += line[-1] if rhymed else ""
            lines.append(line)
    return "".join(line + "，。"[i % 2] for i, line in enumerate(lines))


def poems(n: int, seed: int, heldout: bool = False) -> list[dict]:
    """n 首 ``{"kind", "text", "nats"}``，nats 是知道体裁之后的 −ln p；一首诗在训练还是留出，由它的文字决定。"""
    rng = random.Random(f"poems-{seed}-{heldout}")
    rows: list[dict] = []
    while len(rows) < n:
        draw = Draw(rng)
        kind = rng.choices(list(KINDS), WEIGHTS)[0]
        text = write_poem(draw, kind)
        if (zlib.crc32(text.encode()) % 10 == 0) == heldout:
            rows.append({"kind": kind, "text": text, "nats": draw.nats})
    return rows
