"""查引用：回答里的 [编号] 指不指得到一段，那一段里有没有回答说的话。毛病由程序造，所以抓出几成量得出来。"""

from __future__ import annotations

import random
import re

from rag_common.generate import MARK, Answer
from rag_common.tokenizers import characters_and_bigrams

AT_LEAST = 0.8  # 回答的字对至少几成在引的那几段里：照抄的是 1，换几个虚词的也够
FAULTS = {"other_passage": "引了另一段", "no_such_passage": "没有的一段", "changed_number": "改过的数"}
NUMBER = re.compile(r"\d+(?:\.\d+)?")  # \d 也认全角数字


def check_citation(text: str, passages: list[str]) -> str:
    """没有毛病是空的，有就说是什么。只查得出"引的段里没有这话"，查不出"段里有、却答非所问"。"""
    numbers = [int(each) for each in MARK.findall(text)]
    claim = MARK.sub("", text).strip()
    if not numbers:
        return "没有注明出处"
    if missing := [each for each in numbers if not 1 <= each <= len(passages)]:
        return f"没有第 {missing[0]} 段"
    cited = "".join(passages[each - 1] for each in dict.fromkeys(numbers))
    if strange := [each for each in NUMBER.findall(claim) if each not in NUMBER.findall(cited)]:
        return f"引的段里没有这个数：{strange[0]}"
    pairs = {each for each in characters_and_bigrams(claim) if len(each) > 1}
    there = set(characters_and_bigrams(cited))
    if not pairs or sum(each in there for each in pairs) < AT_LEAST * len(pairs):
        return "引的段里没有这些话"
    return ""


def plant_faults(
    honest: list[tuple[Answer, list[str]]], rng: random.Random
) -> dict[str, list[tuple[str, list[str]]]]:
    """对的回答 → 三种毛病各一份 [(回答, 段落)]：引了另一段，引了没有的一段，里面一个数被改过。"""
    faults: dict[str, list[tuple[str, list[str]]]] = {kind: [] for kind in FAULTS}
    for answer, passages in honest:
        others = [n for n in range(len(passages)) if n not in answer.cited]
        if others:
            faults["other_passage"].append((MARK.sub(f"[{rng.choice(others) + 1}]", answer.text), passages))
        faults["no_such_passage"].append(
            (MARK.sub(f"[{len(passages) + 1 + rng.randrange(5)}]", answer.text), passages)
        )
        claim = MARK.sub("", answer.text)
        if found := NUMBER.search(claim):
            changed = claim[: found.start()] + str(rng.randrange(100_000, 999_999)) + claim[found.end() :]
            faults["changed_number"].append((changed + f"[{answer.cited[0] + 1}]", passages))
    return faults
