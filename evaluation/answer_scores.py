"""一个回答对几个标准答案：全部指标，一律 0–1；一批的整批分；与 sacrebleu、rouge-score 差多少。"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import numpy as np

import text_metrics as tm
from nlp_common.base.intervals import Interval, statistic_interval

# 指标 → 给人看的名字；次序就是表里的次序
NAMES = {
    "em": "完全一致",
    "f1": "F1（字）",
    "f1_cmrc": "F1（CMRC）",
    "bleu": "BLEU（zh）",
    "chrf": "chrF",
    "rouge_1": "ROUGE-1（字）",
    "rouge_2": "ROUGE-2（字）",
    "rouge_l": "ROUGE-L（字）",
}


def item_scores(prediction: str, references: Sequence[str]) -> dict[str, float]:
    """一个回答的各项分，0–1；有几个标准答案就取最好的。"""
    return {
        "em": tm.exact_match(prediction, references),
        "f1": tm.f1_answer(prediction, references),
        "f1_cmrc": tm.f1_cmrc(prediction, references),
        "bleu": tm.bleu(tm.bleu_counts(prediction, references), short=True) / 100,
        "chrf": tm.chrf(tm.chrf_counts(prediction, references)) / 100,
        "rouge_1": tm.rouge_n(prediction, references, 1),
        "rouge_2": tm.rouge_n(prediction, references, 2),
        "rouge_l": tm.rouge_l(prediction, references),
    }


def corpus_bleu(counts: Sequence[np.ndarray]) -> float:
    return tm.bleu(np.sum(counts, axis=0)) / 100


def corpus_chrf(counts: Sequence[np.ndarray]) -> float:
    return tm.chrf(np.sum(counts, axis=0)) / 100


def corpus_scores(
    predictions: Sequence[str], references: Sequence[Sequence[str]], seed: int = 0, draws: int = 200
) -> dict[str, Interval]:
    """整批的 BLEU 与 chrF，0–1：计数先加起来再算，论文里报的是这个；区间重抽的是题。"""
    pairs = list(zip(predictions, references, strict=True))
    bleus = [tm.bleu_counts(said, wanted) for said, wanted in pairs]
    chrfs = [tm.chrf_counts(said, wanted) for said, wanted in pairs]
    return {
        "bleu_corpus": statistic_interval(bleus, corpus_bleu, seed, draws),
        "chrf_corpus": statistic_interval(chrfs, corpus_chrf, seed, draws),
    }


# ---------------------------------------------------------------- 默认的设置量中文


def default_scores(predictions: Sequence[str], references: Sequence[str]) -> dict[str, dict[str, float]]:
    """同样的回答，各库的默认切法与该用的切法：``{指标: {"default", "right"}}``，0–1。"""
    pairs = [(said, [wanted]) for said, wanted in zip(predictions, references, strict=True)]

    def bleu(split: tm.Split) -> float:
        return corpus_bleu([tm.bleu_counts(said, wanted, split) for said, wanted in pairs])

    def mean(scores: list[float]) -> float:
        return float(np.mean(scores))

    return {
        "bleu": {"default": bleu(tm.split_13a), "right": bleu(tm.split_zh)},
        "rouge_l": {
            "default": mean([tm.rouge_l(*pair, tm.split_rouge) for pair in pairs]),
            "right": mean([tm.rouge_l(*pair) for pair in pairs]),
        },
        "f1": {
            "default": mean([tm.f1_spaces(*pair) for pair in pairs]),
            "right": mean([tm.f1_answer(*pair) for pair in pairs]),
        },
    }


# ---------------------------------------------------------------- 与参考实现差多少


def differences_to_peers(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """手写的与库的最大相差（库的单位）；没装的库不在里面。"""
    found = {}
    longest = max(map(len, references))
    # 库要的是"第 k 个标准答案"一列一列；不够的重复第一个，重复不改变分数
    columns = [[row[k] if k < len(row) else row[0] for row in references] for k in range(longest)]
    if importlib.util.find_spec("sacrebleu"):
        from sacrebleu.metrics import BLEU, CHRF

        for name, split in (("zh", tm.split_zh), ("char", tm.split_char), ("13a", tm.split_13a)):
            counts = [tm.bleu_counts(*pair, split) for pair in zip(predictions, references, strict=True)]
            ours = tm.bleu(np.sum(counts, axis=0))
            theirs = BLEU(tokenize=name).corpus_score(list(predictions), columns).score
            found[f"bleu_{name}"] = abs(ours - theirs)
        counts = [tm.chrf_counts(*pair) for pair in zip(predictions, references, strict=True)]
        theirs = CHRF().corpus_score(list(predictions), columns).score
        found["chrf"] = abs(tm.chrf(np.sum(counts, axis=0)) - theirs)
    if importlib.util.find_spec("rouge_score"):
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=Characters())
        for said, wanted in zip(predictions, references, strict=True):
            theirs = scorer.score_multi(list(wanted), said)
            ours = {
                "rouge1": tm.rouge_n(said, wanted, 1),
                "rouge2": tm.rouge_n(said, wanted, 2),
                "rougeL": tm.rouge_l(said, wanted),
            }
            for name, value in ours.items():
                gap = abs(value - theirs[name].fmeasure)
                found[name] = max(found.get(name, 0.0), gap)
    return found


class Characters:
    """给 rouge-score 的分词器：一个字符一个。不给它，它的默认分词器把汉字全丢掉。"""

    def tokenize(self, text: str) -> list[str]:
        return tm.split_char(text)
