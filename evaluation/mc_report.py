"""选择题的成绩单：每个分数带区间，与瞎猜比，两个模型成对地比；再画成图。"""

from __future__ import annotations

import math
from pathlib import Path

from nlp_common.base.console import padded, width
from nlp_common.base.intervals import Interval, mean_interval, paired_difference
from nlp_common.draw.plots import bar_chart

METHODS = {"letter": "按字母", "text": "按全文", "generate": "生成"}
COLUMNS = {
    "letter_acc": "按字母",
    "text_acc": "按全文",
    "text_acc_norm": "按全文 ÷ 字数",
    "text_acc_bytes": "按全文 ÷ 字节",
    "generate_acc": "生成",
}
TURNED = {
    **{f"picks_{letter}": f"选 {letter}" for letter in "ABCD"},
    "letter_same": "四次同一个",
    "letter_rotated_acc": "四次平均",
    "letter_averaged_acc": "概率平均",
}
SHOWN = {
    "letter_acc": "按字母|by letter",
    "text_acc": "按全文|by full text",
    "generate_acc": "生成|generated",
}


# ---------------------------------------------------------------- 1. 一套题


def report(name: str, chance: float, answered: dict[str, list[dict]], seed: int) -> dict:
    """印一套题的表，返回 {"n", "chance", 模型: {分数: 值}}。"""
    n = len(next(iter(answered.values())))
    tables = {model: score_table(items, seed) for model, items in answered.items()}
    print(f"\n{name}：{n} 道题，瞎猜 {chance:.3f}（括号里是 95 % 区间；▲ 比瞎猜好，▼ 比瞎猜差，= 分不出）")
    print_table(tables, COLUMNS, lambda score: f"{span(score)} {against(score, chance)}")
    if any("picks_A" in table for table in tables.values()):
        print("  选项转四次，每个选项在四个位置上各站一次，按字母答：")
        print_table(tables, TURNED, lambda score: f"{score.value:.3f}")
    for model, table in tables.items():
        if "generate_answered" in table and table["generate_answered"].value < 1:
            print(f"  {model} 写的话，认得出答案的只有 {table['generate_answered'].value:.0%}")
    return {"n": n, "chance": chance, **{model: with_spans(table) for model, table in tables.items()}}


def with_spans(table: dict[str, Interval]) -> dict[str, float]:
    """各个分数；要紧的几个连区间的两头。"""
    values = {}
    for key, score in table.items():
        values[key] = score.value
        if key in COLUMNS:
            values |= {f"{key}_low": score.low, f"{key}_high": score.high}
    return values


def score_table(items: list[dict], seed: int) -> dict[str, Interval]:
    """各个分数的均值与区间；有的题没有的分（选项不是四个的，不算各字母选了几次）只平均有的。"""
    names = dict.fromkeys(name for each in items for name in each["scores"])
    return {
        name: mean_interval([each["scores"][name] for each in items if name in each["scores"]], seed)
        for name in names
    }


def span(score: Interval) -> str:
    return f"{score.value:.3f}（{score.low:.2f}–{score.high:.2f}）"


def against(score: Interval, chance: float) -> str:
    return "▲" if score.low > chance else "▼" if score.high < chance else "="


def print_table(tables: dict[str, dict[str, Interval]], columns: dict[str, str], write) -> None:
    """一个模型一行；哪个模型也没有的一栏不印。"""
    keys = [key for key in columns if any(key in table for table in tables.values())]
    rows = [["", *(columns[key] for key in keys)]]
    for model, table in tables.items():
        rows.append([model, *(write(table[key]) if key in table else "" for key in keys)])
    widths = [max(width(row[i]) for row in rows) for i in range(len(keys) + 1)]
    for row in rows:
        cells = (padded(text, w + 2) for text, w in zip(row, widths, strict=True))
        print("  " + "".join(cells).rstrip())


# ---------------------------------------------------------------- 2. 两个模型成对地比


def compare(answered: dict[str, list[dict]], seed: int) -> dict:
    """同样的题，一道一道地减；差的标准误与把两边当作互不相干的比。"""
    names, found = list(answered), {}
    for place, ours in enumerate(names):
        for theirs in names[:place]:
            for score in SHOWN:
                pair = [[each["scores"].get(score) for each in answered[name]] for name in (ours, theirs)]
                if None in pair[0] or None in pair[1]:
                    continue
                gap = paired_difference(*pair, seed)
                apart = math.hypot(*(mean_interval(values, seed).stderr for values in pair))
                name = f"{ours}_minus_{theirs}.{score}"
                found |= {name: gap.value, f"{name}_low": gap.low, f"{name}_high": gap.high}
                words = f"  {COLUMNS[score]}：{ours} − {theirs} = {gap.value:+.3f}"
                if not any(a != b for a, b in zip(*pair, strict=True)):
                    print(f"{words}，对错每道题都一样")
                    continue
                found[f"{name}_stderr_ratio"] = gap.stderr / apart
                print(
                    f"{words}（{gap.low:+.3f} 到 {gap.high:+.3f}）{'分得出' if gap.is_sure else '分不出'}；"
                    f"成对的标准误 {gap.stderr:.3f}，不成对 {apart:.3f}"
                )
    return found


# ---------------------------------------------------------------- 3. 图


def draw(folder: Path, metrics: dict) -> None:
    for name, table in metrics.items():
        models = {k: v for k, v in table.items() if isinstance(v, dict) and k != "paired"}
        series = {
            text: {model: scores[score] for model, scores in models.items() if score in scores}
            for score, text in SHOWN.items()
        }
        series = {text: bars for text, bars in series.items() if bars}
        series["瞎猜|chance"] = dict.fromkeys(models, table["chance"])
        title = f"{name}：三种问法|{name}: three ways to ask"
        bar_chart(folder / f"{name}.svg", series, title, "", "答对|accuracy")
        if all("picks_A" in scores for scores in models.values()):
            bars = {
                m: {letter: scores[f"picks_{letter}"] for letter in "ABCD"} for m, scores in models.items()
            }
            title = f"{name}：选项转四次，各选了哪个字母|{name}: letters picked over four rotations"
            bar_chart(folder / f"{name}_positions.svg", bars, title, "", "")
