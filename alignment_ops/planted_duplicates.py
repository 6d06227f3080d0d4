"""近重复的课上用的文字：报上的段落，各改一改再放一份；也有像而不是的。near_duplicates.py 用它。"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from nlp_common.data.people_daily import people_daily

SHORTEST, LONGEST = 100, 500  # 取这么多字的段落
FOOTER = "（转载请注明出处，欢迎关注）"


@dataclass
class Planted:
    texts: list[str]
    kinds: dict[int, str]  # 第几段 → 怎样改的；别的是原来的段落
    sources: dict[int, int]  # 第几段 → 由第几段改来


def other_punctuation(rng: random.Random, text: str) -> str:
    """标点换成半角的，句子之间添空格，数字变成全角。"""
    text = text.translate(str.maketrans("，。！？：；“”", ',.!?:;""'))
    text = re.sub(r"[,.!?;]", lambda mark: mark[0] + " " * rng.randrange(3), text)
    return re.sub("[0-9]", lambda digit: chr(ord(digit[0]) + 0xFEE0), text)


def typos(rng: random.Random, text: str) -> str:
    """每一百字错两个。"""
    letters = list(text)
    for _ in range(max(1, len(text) // 50)):
        letters[rng.randrange(len(letters))] = rng.choice("的了在是有和人这中大")
    return "".join(letters)


def sentences(text: str) -> list[str]:
    return re.findall("[^。！？]+[。！？]?", text)


def shuffled(rng: random.Random, text: str) -> str:
    """句子换了次序。"""
    parts = sentences(text)
    rng.shuffle(parts)
    return "".join(parts)


def with_footer(rng: random.Random, text: str) -> str:
    """后面多一句网站的话。"""
    return text + FOOTER


def cut(rng: random.Random, text: str) -> str:
    """末尾少了一成。"""
    return text[: len(text) * 9 // 10]


CHANGES: dict[str, tuple[str, Callable[[random.Random, str], str]]] = {
    "punctuation": ("改标点、空格、全半角", other_punctuation),
    "typos": ("一百字错两个", typos),
    "shuffled": ("句子换次序", shuffled),
    "footer": ("末尾多一句", with_footer),
    "cut": ("末尾少一成", cut),
}
SIMILAR = {"half": "前一半相同，后一半是别的", "quote": "引了三分之一"}  # 不是重复


def plant(n: int, each: int, seed: int) -> Planted:
    """报上的 n 段，每种改法与每种像而不是的各添 each 段，打乱次序（改过的可能在原来的前面）。"""
    rng = random.Random(f"duplicates-{seed}")
    paragraphs = [
        line for row in people_daily() for line in row["text"].split("\n") if SHORTEST <= len(line) <= LONGEST
    ]
    originals = rng.sample(paragraphs, min(n, len(paragraphs)))
    items: list[tuple[str, str, int]] = [(text, "", place) for place, text in enumerate(originals)]
    places = iter(rng.sample(range(len(originals)), each * (len(CHANGES) + len(SIMILAR))))
    for kind, (_, change) in CHANGES.items():
        for _ in range(each):
            place = next(places)
            items.append((change(rng, originals[place]), kind, place))
    for kind, share in (("half", 2), ("quote", 3)):
        for _ in range(each):
            place = next(places)
            text, other = originals[place], rng.choice(paragraphs)
            items.append((text[: len(text) // share] + other[len(other) // share :], kind, place))
    order = rng.sample(range(len(items)), len(items))
    position = {old: new for new, old in enumerate(order)}
    shown = [items[old] for old in order]
    kinds = {new: kind for new, (_, kind, _) in enumerate(shown) if kind}
    return Planted([text for text, _, _ in shown], kinds, {new: position[shown[new][2]] for new in kinds})
