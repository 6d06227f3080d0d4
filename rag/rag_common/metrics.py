"""检索与回答的指标，都按定义手写。ranked 是一题查到的 id，分高的在前；gold 是有答案的文档的 id 的集合。"""

from __future__ import annotations

import math
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Sequence

# ---------------------------------------------------------------- 找得到吗


def recall_at(ranked: Sequence[str], gold: Collection[str], k: int) -> float:
    """前 k 个里有没有一个有答案：有是 1，没有是 0。

    一个问题有一处答案就够了，所以这里问的是"有没有"（也叫 hit rate）；只有一处 gold 时与课本的召回率相同。
    """
    return float(any(name in gold for name in ranked[:k]))


def reciprocal_rank_of(ranked: Sequence[str], gold: Collection[str]) -> float:
    """第一个有答案的排在第 r 名，就是 1/r；一个也没有是 0。各题的平均就是 MRR。"""
    for rank, name in enumerate(ranked, 1):
        if name in gold:
            return 1 / rank
    return 0.0


def ndcg_at(ranked: Sequence[str], gold: Collection[str], k: int) -> float:
    """前 k 个的 Σ [有答案] / log2(名次 + 1)，除以最好的排法能得的：gold 全排在最前面。"""
    gained = sum(1 / math.log2(rank + 1) for rank, name in enumerate(ranked[:k], 1) if name in gold)
    ideal = sum(1 / math.log2(rank + 1) for rank in range(1, min(len(gold), k) + 1))
    return gained / ideal if ideal else 0.0


def retrieval_row(ranked: Sequence[Sequence[str]], gold: Sequence[Collection[str]], depth: int = 10) -> dict:
    """一种检索在一批题上的一行：recall_at_1、recall_at_5、recall_at_10、mrr、ndcg_at_10、n。"""
    n = len(ranked)
    pairs = list(zip(ranked, gold, strict=True))
    row = {f"recall_at_{k}": sum(recall_at(r, g, k) for r, g in pairs) / max(n, 1) for k in (1, 5, 10)}
    row["mrr"] = sum(reciprocal_rank_of(r[:depth], g) for r, g in pairs) / max(n, 1)
    row["ndcg_at_10"] = sum(ndcg_at(r, g, 10) for r, g in pairs) / max(n, 1)
    return {**row, "n": n}


# ---------------------------------------------------------------- 答得对吗


def simplify(answer: str) -> str:
    """比较答案之前：全角变半角，小写，去掉标点与空白。"""
    return re.sub(r"[\W_]+", "", unicodedata.normalize("NFKC", answer).lower())


def exact_match(answer: str, gold: str | Sequence[str]) -> float:
    """与某一个标准答案完全相同（不计标点）。"""
    golds = [gold] if isinstance(gold, str) else gold
    return float(any(simplify(answer) == simplify(each) for each in golds))


def f1(answer: str, gold: str | Sequence[str]) -> float:
    """逐字的 F1：一样的字占回答的多少（精确率）、占标准答案的多少（召回率），两者的调和平均；几个标准答案取最高的。

    字母与数字连成的词算一个字，次序不管（SQuAD、CMRC 的评测也不管，CMRC 用的是最长的公共部分）。
    """
    golds = [gold] if isinstance(gold, str) else gold
    return max((_f1(answer, each) for each in golds), default=0.0)


def _f1(answer: str, gold: str) -> float:
    mine, theirs = Counter(_units(answer)), Counter(_units(gold))
    if not mine or not theirs:
        return float(mine == theirs)
    same = sum((mine & theirs).values())
    if not same:
        return 0.0
    precision, recall = same / sum(mine.values()), same / sum(theirs.values())
    return 2 * precision * recall / (precision + recall)


def _units(text: str) -> list[str]:
    text = unicodedata.normalize("NFKC", text).lower()
    return re.findall(r"[a-z0-9]+|[^\W_]", text)


# ---------------------------------------------------------------- 差别是真的吗


def paired_bootstrap(
    first: Sequence[float], second: Sequence[float], rounds: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """同一批题上两种做法的得分 → (first 比 second 高多少, 95% 区间的低, 高)。

    有放回地抽题，同一题的两个得分一起抽；区间不含 0，差别才不像是抽题的运气。
    """
    differences = [a - b for a, b in zip(first, second, strict=True)]
    n = len(differences)
    if n == 0:
        return 0.0, 0.0, 0.0
    rng = random.Random(seed)
    means = sorted(sum(rng.choices(differences, k=n)) / n for _ in range(rounds))
    return sum(differences) / n, means[int(0.025 * rounds)], means[int(0.975 * rounds) - 1]
