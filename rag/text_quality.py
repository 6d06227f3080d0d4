"""文档进知识库之前的检查：空的、重复的、乱码的、带套话的、太长的；一批与从前的比，变了没有。

    find_faults({名字: 文字}) → {"empty": {名字, …}, "duplicate": {…}, "garbled": …, "boilerplate": …, "overlong": …}
    DriftGauge(从前的文字们, 一批几篇).alarms(这一批) → {"characters": (量到的, 门槛), …} 超过门槛的几样

每一样都是一条说得清的规则，没有模型：报了什么，看得出为什么。
"""

from __future__ import annotations

import hashlib
import math
import random
import re
import zlib
from collections import Counter
from collections.abc import Sequence

from rag_common.chunking import split_sentences

FAULTS = {"empty": "空的", "duplicate": "重复", "garbled": "乱码", "boilerplate": "套话", "overlong": "太长"}
FEWEST = 10  # 字母与汉字少于这么多，算空的
SHINGLE = 5  # 相邻几个字算一片，两篇相同的片越多越像
SAME = 0.6  # 两篇的片有这么多相同（Jaccard），算重复
CROWDED = 50  # 一片在这么多篇里都有，就是套话，不拿它找重复
GARBLED = 0.05  # 不该有的字占到这么多，算乱码
ROUND_TRIP = 0.6  # 按 GBK 编回字节，有这么多恰好是完整的 UTF-8，就是读错了编码
LINE = 8  # 一句至少这么多字，才算得上套话
EVERYWHERE = (5, 0.02)  # 一句话至少在 5 篇、且至少 2% 的篇里，算套话
LONGEST = 300  # 一句（两个句末标点之间）超过这么多字，算太长
DRIFT_TRIALS, DRIFT_QUANTILE = 200, 0.995


def find_faults(texts: dict[str, str]) -> dict[str, set[str]]:
    """名字 → 文字；每种毛病，是哪几篇。一篇可以有几种。"""
    faults: dict[str, set[str]] = {
        "empty": {name for name, text in texts.items() if letters(text) < FEWEST},
        "garbled": {name for name, text in texts.items() if is_garbled(text)},
        "overlong": {name for name, text in texts.items() if longest_sentence(text) > LONGEST},
    }
    solid = {name: text for name, text in texts.items() if name not in faults["empty"]}
    faults["duplicate"] = set(duplicates(solid))
    repeated = boilerplate(texts)
    faults["boilerplate"] = {name for name, text in texts.items() if repeated & set(sentence_keys(text))}
    return faults


# ---------------------------------------------------------------- 一篇自己看得出来的


def letters(text: str) -> int:
    """字母、汉字、数字有几个。"""
    return sum(char.isalnum() for char in text)


def longest_sentence(text: str) -> int:
    return max((end - start for start, end in split_sentences(text)), default=0)


def is_garbled(text: str) -> bool:
    """不该有的字太多，或者是用错了编码读进来的。"""
    if not text:
        return False
    if sum(map(is_strange, text)) / len(text) > GARBLED:
        return True
    return any(read_as_gbk(line) for line in text.split("\n"))


def is_strange(char: str) -> bool:
    """替换符 U+FFFD、控制符、私用区，和 UTF-8 当成 Latin-1 读出来的 ä ¸ 之类。"""
    code = ord(char)
    control = code < 32 and char not in "\n\t\r"
    return (
        control or code == 0xFFFD or (0x80 <= code <= 0xFF and char not in "·×°±") or 0xE000 <= code <= 0xF8FF
    )


def read_as_gbk(line: str, at_least: int = 40) -> bool:
    """UTF-8 的"中文"当成 GBK 读，出来的是"涓枃"：个个是汉字，只是不成话。

    编回 GBK 的字节再按 UTF-8 解，真的乱码大半解得开，正常的中文只有碰巧的一小半。不到 at_least 个字节的不看：
    "温馨的贺卡"这样的短句，碰巧都解得开。
    """
    raw = re.sub(r"[\x00-\x7f\ufffd]", "", line).encode("gb18030", errors="ignore")
    if len(raw) < at_least:
        return False
    return len(raw.decode("utf-8", errors="ignore").encode()) / len(raw) >= ROUND_TRIP


# ---------------------------------------------------------------- 要与别篇比才看得出来的


def duplicates(texts: dict[str, str]) -> dict[str, str]:
    """与前面某一篇相同或相近的 → 像哪一篇。先按整篇的散列找一字不差的，再找片重合得多的。"""
    first: dict[str, str] = {}  # 整篇的散列 → 先出现的名字
    holders: dict[int, list[str]] = {}  # 片 → 有它的各篇
    shingles: dict[str, set[int]] = {}
    found: dict[str, str] = {}
    for name, text in texts.items():
        plain = re.sub(r"\W+", "", text)
        key = hashlib.sha256(plain.encode()).hexdigest()
        if key in first:
            found[name] = first[key]
            continue
        first[key] = name
        mine = shingles_of(plain)
        shared = Counter(
            other for each in mine if len(holders.get(each, ())) < CROWDED for other in holders.get(each, ())
        )
        for other, same in shared.most_common(3):
            if same / (len(mine) + len(shingles[other]) - same) >= SAME:  # Jaccard
                found[name] = other
                break
        else:
            shingles[name] = mine
            for each in mine:
                holders.setdefault(each, []).append(name)
    return found


def shingles_of(text: str) -> set[int]:
    return {zlib.crc32(text[i : i + SHINGLE].encode()) for i in range(max(len(text) - SHINGLE + 1, 1))}


def sentence_keys(text: str) -> list[str]:
    """各句去掉空白、数字都写成 0："第 3 页"与"第 17 页"是同一句套话。"""
    lines = [re.sub(r"\d+", "0", re.sub(r"\s+", "", text[a:b])) for a, b in split_sentences(text)]
    return [line for line in lines if len(line) >= LINE]


def boilerplate(texts: dict[str, str]) -> set[str]:
    """许多篇里都有的句子：页眉、页脚、版权声明。一篇里出现几次只算一次。"""
    counts: Counter[str] = Counter()
    for text in texts.values():
        counts.update(set(sentence_keys(text)))
    least = max(EVERYWHERE[0], math.ceil(EVERYWHERE[1] * len(texts)))
    return {line for line, count in counts.items() if count >= least}


def without_boilerplate(text: str, repeated: set[str]) -> str:
    """去掉套话的各句，其余原样。"""
    kept = []
    for start, end in split_sentences(text):
        if not repeated & set(sentence_keys(text[start:end])):
            kept.append(text[start:end])
    return "".join(kept)


# ---------------------------------------------------------------- 一批与从前的比


def divergence(first: Counter, second: Counter) -> float:
    """两种字频的 Jensen-Shannon 散度，以 2 为底：0 是相同，1 是没有一个相同的字。"""
    n, m = sum(first.values()) or 1, sum(second.values()) or 1
    total = 0.0
    for char in first.keys() | second.keys():
        p, q = first[char] / n, second[char] / m
        middle = (p + q) / 2
        for share in (p, q):
            if share:
                total += 0.5 * share * math.log2(share / middle)
    return total


class DriftGauge:
    """门槛不是猜的：没有变化时量出来的数有多大，就从多大起报警。

    从从前的文字里随机抽一批，与**剩下的**比，抽许多次，取它的 99.5% 处。与全部的比就错了：抽出来的那一批
    也在全部里，量出来偏小，门槛偏低，新来的每一批都报警。
    """

    def __init__(self, past: Sequence[str], size: int, seed: int = 0):
        past = list(past)
        rng = random.Random(f"drift-{seed}")
        trials = []
        for _ in range(DRIFT_TRIALS):
            rng.shuffle(past)
            size = min(size, len(past) // 2)
            self._learn(past[size:])
            trials.append(self.measure(past[:size]))
        place = int(DRIFT_QUANTILE * DRIFT_TRIALS) - 1
        self.thresholds = {name: sorted(trial[name] for trial in trials)[place] for name in trials[0]}
        self._learn(past)

    def _learn(self, past: Sequence[str]) -> None:
        self.characters = count_characters(past)
        self.mean_length = mean_log_length(past)

    def measure(self, batch: Sequence[str]) -> dict[str, float]:
        """用字变了多少，长短变了多少。"""
        return {
            "characters": divergence(count_characters(batch), self.characters),
            "length": abs(mean_log_length(batch) - self.mean_length),
        }

    def alarms(self, batch: Sequence[str]) -> dict[str, tuple[float, float]]:
        """超过门槛的几样：(量到的, 门槛)。"""
        values = self.measure(batch)
        return {n: (v, self.thresholds[n]) for n, v in values.items() if v > self.thresholds[n]}


def mean_log_length(texts: Sequence[str]) -> float:
    return sum(math.log1p(len(text)) for text in texts) / max(len(texts), 1)


def count_characters(texts: Sequence[str]) -> Counter:
    return Counter("".join(texts))
