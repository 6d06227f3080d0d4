"""数据里的偏向与缺口：长度、位置、各种题各有多少。只报告，不删：删不删、补不补，要人来定。

- 长度：好的那个更长的占几成。只看长短就能猜对八成，奖励模型也会只看长短。
- 位置：标注的人先看到的那个被选中几成，应当是一半；有人总选先看到的，他标的就不是好坏。
- 覆盖：清洗前后，每一种题留下几成。去重常常把寒暄删光（"你好"本来就只有几种问法），模型就不会寒暄了。
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from statistics import NormalDist

from nlp_common.base.intervals import proportion_interval

ALPHA = 0.05
LEAST = 20  # 一个人标的不到这么多对，看不出
FEWER = 0.8  # 一种题留下的不到总的几成，就提醒
# 没有 kind 一栏的数据，照要求里的字猜是哪一种，先对上的算
KINDS = [
    ("翻译", r"翻译|译成|译为|translat"),
    ("代码", r"代码|函数|编程|脚本|程序|SQL|python|javascript|html|code"),
    ("数学", r"计算|方程|多少|面积|概率|平均|求解|等于几|\d+\s*[+×x*/÷-]\s*\d+"),
    ("改写", r"改写|润色|重写|修改|替换|语法|转换|改成|rewrite"),
    ("摘要", r"摘要|总结|概括|归纳|summar"),
    ("分类", r"分类|归类|判断|识别|情感|类别|classif"),
    ("写作", r"写一|撰写|编写|创作|生成一|作文|故事|诗|邮件|文案|口号|标题|write"),
    ("列举", r"列出|列举|举例|给出.{0,4}个|提供.{0,4}个|\d+个|list"),
    ("问答", r"什么|为什么|怎么|如何|哪|谁|吗|解释|描述|说明|介绍|是否|[?？]"),
]


def kind_of_row(row: dict) -> str:
    """一行是哪一种：有 kind（category、task、type）一栏就是它，没有就照第一句猜。"""
    for column in ("kind", "category", "task", "type"):
        if isinstance(row.get(column), str) and row[column]:
            return row[column]
    turns = row.get("messages") or row["prompt"]
    asked = next((turn["content"] for turn in turns if turn["role"] == "user"), "")
    return next((kind for kind, pattern in KINDS if re.search(pattern, asked, re.IGNORECASE)), "其他")


def coverage(before: list[dict], after: list[dict]) -> list[dict]:
    """每一种 → {"kind", "before", "after", "kept", "fewer"}；fewer：比总的少留了许多（区间都够不着），该看一眼。"""
    counts, left = (Counter(kind_of_row(row) for row in rows) for rows in (before, after))
    overall = len(after) / len(before)
    table = []
    for kind, n in counts.most_common():
        kept = proportion_interval(left[kind], n)
        table.append(
            {
                "kind": kind,
                "before": n,
                "after": left[kind],
                "kept": kept.value,
                "fewer": kept.high < FEWER * overall,
            }
        )
    return table


def length_bias(pairs: list[dict]) -> dict:
    """好的那个更长的比例；一样长的不算。还有各自平均几个字。"""
    lengths = [(len(pair["chosen"][-1]["content"]), len(pair["rejected"][-1]["content"])) for pair in pairs]
    unequal = [chosen > rejected for chosen, rejected in lengths if chosen != rejected]
    if not unequal:
        return {"n": 0}
    share = proportion_interval(sum(unequal), len(unequal))
    return {
        "n": len(unequal),
        "longer_chosen": share.value,
        "low": share.low,
        "high": share.high,
        "chosen_chars": sum(each[0] for each in lengths) / len(lengths),
        "rejected_chars": sum(each[1] for each in lengths) / len(lengths),
    }


def position_bias(pairs: list[dict]) -> dict:
    """先给看的那个被选中的比例；要有 shown_first 一栏（chosen 或 rejected），没有就量不了。"""
    first = [
        pair["shown_first"] == "chosen" for pair in pairs if pair.get("shown_first") in ("chosen", "rejected")
    ]
    if not first:
        return {"n": 0}
    share = proportion_interval(sum(first), len(first))
    return {"n": len(first), "first_chosen": share.value, "low": share.low, "high": share.high}


def biased_annotators(pairs: list[dict]) -> list[dict]:
    """哪个标注员偏：先看到的选得太多（与一半比），长的选得太多（与别人比）。要有 annotator 一栏。

    一次看许多人，线要严：0.05 除以看了几次（Bonferroni）。
    """
    by_person = defaultdict(list)
    for pair in pairs:
        if pair.get("annotator"):
            by_person[pair["annotator"]].append(pair)
    people = {name: theirs for name, theirs in by_person.items() if len(theirs) >= LEAST}
    found = []
    for name, theirs in sorted(people.items()):
        others = [pair for other, rows in by_person.items() if other != name for pair in rows]
        first = [pair["shown_first"] == "chosen" for pair in theirs if "shown_first" in pair]
        if first:
            p = binomial_tail(sum(first), len(first))
            found.append(
                {
                    "annotator": name,
                    "bias": "先看到的",
                    "share": sum(first) / len(first),
                    "n": len(first),
                    "p": p,
                }
            )
        mine, rest = length_bias(theirs), length_bias(others)
        if mine["n"] and rest["n"]:
            p = more_often(mine["longer_chosen"], mine["n"], rest["longer_chosen"], rest["n"])
            found.append(
                {"annotator": name, "bias": "长的", "share": mine["longer_chosen"], "n": mine["n"], "p": p}
            )
    return [row | {"biased": row["p"] < ALPHA / len(found)} for row in found]


def binomial_tail(right: int, n: int) -> float:
    """抛 n 次硬币，正面不少于 right 次的概率。"""
    return sum(math.comb(n, k) for k in range(right, n + 1)) / 2**n


def more_often(share: float, n: int, other: float, m: int) -> float:
    """两个比例的单侧检验：share（n 次里）真的比 other（m 次里）大吗，p 值。"""
    pooled = (share * n + other * m) / (n + m)
    spread = math.sqrt(max(pooled * (1 - pooled) * (1 / n + 1 / m), 1e-12))
    return 1 - NormalDist().cdf((share - other) / spread)
