"""两样只看文字就知道的毛病：不是要的语言，垃圾（乱码、网页残渣、重复、乱打、广告）。

    language_of(text)               -> "zh"、"zh-hant"、"en"、"ja"、"ko"、"ru"；看不出是 ""
    language_fault(messages, keep)  -> 毛病，没有是 ""：问的或答的一半以上是别的语言
    other_languages(messages, keep) -> {第几句: 语言}：哪几句不是要的语言；没有毛病的对话里也可能有一两句
    garbage_fault(messages)         -> 毛病，没有是 ""

规则宁可窄些：丢错一行好的，没有人会发现；留下一行坏的，后面还有几步。题目自己要的（翻译成英文、写一段 HTML）不算。
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

LANGUAGES = {"zh": "简体中文", "zh-hant": "繁体中文", "en": "英文", "ja": "日文", "ko": "韩文", "ru": "俄文"}
ASKS_FOREIGN = re.compile(
    r"英语|英文|外语|日语|日文|法语|德语|俄语|韩语|翻译|译成|译为|单词|繁体|正体|拼写|缩写|诗|歌词|标语|口号|代码|编程|函数|脚本|程序|算法|公式|"
    r"translat|english|python|java|sql|html|css|regex|code|latex|json",
    re.IGNORECASE,
)
ASKS_CODE = re.compile(
    r"代码|编程|函数|脚本|网页|标签|程序|html|css|xml|json|javascript|python|sql|code|爬虫|正则|markdown",
    re.IGNORECASE,
)
CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]+`|https?://\S+|\$\$?[^$]+\$\$?", re.DOTALL)
HAN = re.compile(r"[\u3400-\u9fff]")
KANA, HANGUL, CYRILLIC = (
    re.compile(r"[\u3041-\u30fa]"),
    re.compile(r"[\uac00-\ud7a3]"),
    re.compile(r"[\u0400-\u04ff]"),
)
LATIN_WORD = re.compile(r"[A-Za-z][A-Za-z'’-]*")
UNIT = re.compile(r"[A-Za-z]+|[\u0400-\u04ff]+|[^\W\d_]")  # 有多长：英文、俄文数词，别的数字
PLAIN_WORD = re.compile(
    r"(?<![^\s\"'“‘])[A-Za-z][A-Za-z'’-]+(?=[\s.,!?;:\"'”’]|$)"
)  # 前后没有括号、运算符的词
FOREIGN_WORD = re.compile(r"[A-Za-z]{4}")  # 题目里有外文词：用这个词造句、改写这一句
LEAST_HAN, LEAST_WORDS = 8, 5  # 太短的看不出
LEAST_PLAIN_WORDS = 2  # 一整段没有一个汉字，又有这么多英文词：每句都短，合起来也看得出
RARE = 0.3  # 汉字里几成是生僻的，就是乱字：正常的文章里不到百分之五，随便抽的六成以上
TRADITIONAL = 0.1  # 汉字里几成是 GB2312 没有的，就是繁体：简体文章里不到百分之一

HTML = re.compile(
    r"</?(?:div|p|br|span|a|img|table|tr|td|script|style|ul|li|h[1-6]|font|iframe)\b[^<>]*>|&(?:nbsp|lt|gt|amp|quot|#\d+);",
    re.IGNORECASE,
)
REPEATED = re.compile(r"(.{1,10}?)\1{7,}", re.DOTALL)
ADVERT = re.compile(
    r"点击(?:查看|阅读|下载|领取)|(?:扫码|关注)(?:我们的?)?(?:公众号|微信)|加微信|加群|领取红包|版权归.{0,6}所有|转载请注明|本文来自网络|未经授权.{0,4}转载|责任编辑：|更多精彩内容"
)  # fmt: skip
LATIN_1 = re.compile(r"[\u0080-\u00ff]{3,}")


# ---------------------------------------------------------------- 语言


def language_of(text: str) -> str:
    """一段文字主要是什么语言；代码、网址、公式不算，太短的看不出，是 ""。"""
    text = CODE.sub(" ", text)
    han, kana = len(HAN.findall(text)), len(KANA.findall(text))
    if kana >= 4 and kana > 0.2 * (han + kana):
        return "ja"
    for pattern, language in ((HANGUL, "ko"), (CYRILLIC, "ru")):
        if (found := len(pattern.findall(text))) >= 4 and found > 0.5 * (han + found):
            return language
    words = len(LATIN_WORD.findall(text))
    if words >= LEAST_WORDS and words > 2 * han:
        return "en"
    if han < LEAST_HAN:
        return ""
    return "zh-hant" if share_outside(text, "gb2312") > TRADITIONAL else "zh"


def share_outside(text: str, *encodings: str) -> float:
    """汉字里，这几种编码都没有的占多少。"""
    characters = HAN.findall(text)
    known: set[str] = set()
    for encoding in encodings:
        known.update("".join(characters).encode(encoding, errors="ignore").decode(encoding))
    return sum(each not in known for each in characters) / max(len(characters), 1)


def language_fault(messages: list[dict], keep: tuple[str, ...] = ("zh",)) -> str:
    """这一段对话是不是别的语言。问的、答的分开看，一半以上的字在别的语言的句子里才算：夹着一句繁体的，别的句还用得上。"""
    languages = languages_of(messages, keep)
    for role in ("user", "assistant"):
        wanted, found = 0, Counter[str]()
        for message, (language, is_wanted) in zip(messages, languages, strict=True):
            length = len(UNIT.findall(message["content"])) if language and message["role"] == role else 0
            if is_wanted:
                wanted += length
            else:
                found[language] += length
        if found.total() and found.total() >= wanted:
            return LANGUAGES[found.most_common(1)[0][0]]
    return "" if "en" in keep or not is_short_english(messages) else LANGUAGES["en"]


def other_languages(messages: list[dict], keep: tuple[str, ...] = ("zh",)) -> dict[int, str]:
    """{第几句: 它的语言}，只有不是要的语言的。"""
    languages = enumerate(languages_of(messages, keep))
    return {place: language for place, (language, is_wanted) in languages if not is_wanted}


def languages_of(messages: list[dict], keep: tuple[str, ...]) -> list[tuple[str, bool]]:
    """每一句是什么语言、要不要。回答用外文、题目正是要它的，要；题目自己是外文的，不要。系统提示、工具的结果不看，看不出的都要。"""
    said: list[tuple[str, bool]] = []
    asks_foreign = False
    for message in messages:
        language = language_of(message["content"]) if message["role"] in ("user", "assistant") else ""
        if message["role"] == "user":
            about_foreign = ASKS_FOREIGN.search(message["content"]) or FOREIGN_WORD.search(message["content"])
            asks_foreign = bool(about_foreign) and language in ("", *keep)
        answers_it = message["role"] == "assistant" and asks_foreign
        said.append((language, not language or language in keep or answers_it))
    return said


def is_short_english(messages: list[dict]) -> bool:
    """一问一答都太短，分开看不出语言，合起来一个汉字也没有：Good morning! → Hi there."""
    said = "\n".join(
        CODE.sub(" ", each["content"]) for each in messages if each["role"] in ("user", "assistant")
    )
    return not HAN.search(said) and len(PLAIN_WORD.findall(said)) >= LEAST_PLAIN_WORDS


# ---------------------------------------------------------------- 垃圾


def garbage_fault(messages: list[dict]) -> str:
    """第一句有毛病的是什么毛病；没有是 ""。"""
    about_code = any(ASKS_CODE.search(each["content"]) for each in messages if each["role"] != "assistant")
    asked = ""
    for message in messages:
        text = message["content"]
        if fault := _text_fault(text, about_code):
            return fault
        if (
            message["role"] == "assistant"
            and len(text) > 15
            and "".join(text.split()) == "".join(asked.split())
        ):
            return "回答照抄问题"
        asked = text
    return ""


def _text_fault(text: str, about_code: bool) -> str:
    if is_mojibake(text):
        return "乱码"
    if "�" in text or any(unicodedata.category(c) in ("Cc", "Co", "Cn") and c not in "\n\t\r" for c in text):
        return "控制字符"
    plain = CODE.sub(" ", text)
    rare = share_rare(plain) > RARE and share_outside(plain, "gb2312", "big5") > 0.03  # 一串元素的名字不算
    if len(HAN.findall(plain)) >= LEAST_HAN and rare:
        return "乱字"
    if not about_code and HTML.search(plain):
        return "网页残渣"
    if any(len(match[0]) >= 16 and re.search(r"[^\W\d_]", match[1]) for match in REPEATED.finditer(plain)):
        return "重复"
    if any(_is_typed_at_random(word) for word in re.findall(r"[a-z;]{12,}", plain)):
        return "乱打的字母"
    return "广告" if ADVERT.search(plain) else ""


def share_rare(text: str) -> float:
    """汉字里生僻的占多少：简体的一级字（GB2312 第 16 到 55 区，3755 个）、繁体的常用字（Big5 A440 到 C67E，5401 个）里都没有。"""
    characters = HAN.findall(text)
    return sum(not _is_common(each) for each in characters) / max(len(characters), 1)


def _is_common(character: str) -> bool:
    simplified = character.encode("gb2312", errors="ignore")
    traditional = character.encode("big5", errors="ignore")
    return b"\xb0" <= simplified < b"\xd8" or b"\xa4\x40" <= traditional <= b"\xc6\x7e"


def is_mojibake(text: str) -> bool:
    """UTF-8 的字节被当成 GBK 或 Latin-1 读：照那种编码写回字节，再当 UTF-8 读，读得出汉字。"""
    for segment in LATIN_1.findall(text):
        if HAN.search(segment.encode("latin-1").decode("utf-8", errors="ignore")):
            return True
    for segment in re.findall(r"[^\x00-\x7f]{6,}", text):
        again = segment.encode("gb18030", errors="ignore").decode("utf-8", errors="replace")
        if len(HAN.findall(again)) >= 3 and again.count("�") <= 0.2 * len(again):
            return True
    return False


def _is_typed_at_random(word: str) -> bool:
    """键盘上乱按的一串：几乎没有元音。"""
    return sum(each in "aeiou" for each in word) < 0.2 * len(word)
