"""evaluation_metrics.py 印的表与画的图；没有算法。"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from answer_scores import NAMES
from nlp_common.base.console import padded
from nlp_common.base.intervals import Interval
from nlp_common.draw.plots import bar_chart, line_chart
from rating_tables import paradox_table

KINDS = {
    "courteous": "有礼的整句",
    "plain": "整句",
    "terse": "只答词",
    "wrong": "整句，词答错",
    "unhelpful": "不搭理",
}
ENGLISH = {
    "courteous": "courteous",
    "plain": "plain",
    "terse": "terse",
    "wrong": "wrong word",
    "unhelpful": "unhelpful",
}
UNITS = {
    "qwen": "小 Qwen（token）",
    "ngram_char": "5 元，按字",
    "ngram_byte": "5 元，按字节",
    "grammar": "语法自己（字）",
}
LEVELS = {"nominal": "名目", "ordinal": "次序", "interval": "间隔"}
PICTURED = ("em", "f1", "bleu", "chrf", "rouge_l")


def plain(value: Any) -> Any:
    """Interval 换成 dict，好写进 run.json。"""
    if isinstance(value, Interval):
        return dict(vars(value))
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    return value


def row(name: str, cells: list[str], first: int = 20, each: int = 12) -> str:
    return ("  " + padded(name, first) + "".join(padded(cell, each) for cell in cells)).rstrip()


# ---------------------------------------------------------------- 1. 印


def show_all(metrics: dict) -> None:
    show_perplexity(metrics["perplexity"])
    show_traps(metrics["traps"])
    show_constructed(metrics["constructed"])
    show_systems(metrics)
    show_agreement(metrics["agreement"], "自带的打分表（两个人看得准，一个手紧，一个随手打）")
    print("\nκ 的悖论：两个人判对的概率都是 0.95，只是好的占得越来越多")
    print(row("好的占", ["一致", "Cohen κ", "AC1"]))
    for share, each in metrics["paradox"].items():
        print(row(share, [f"{each[name]:.3f}" for name in ("agreement", "kappa", "ac1")]))
    print()


def show_perplexity(found: dict) -> None:
    averages = found["averages"]
    print("\n困惑度（小世界留出的文字，一半整篇、一半只有第一句）")
    print(row("按 token 加权", [found["interval"].text()], 26))
    print(row("各段平均损失再平均", [f"{averages['mean_of_losses']:.3f}（错）"], 26))
    print(row("各段困惑度的平均", [f"{averages['mean_of_perplexities']:.3f}（错）"], 26))
    print(row("语法自己（下限）", [f"{found['grammar']:.3f}"], 26))
    print("\n窗口 96、文档更长：每次挪多少")
    print(row("挪", ["困惑度", "前向的 token"]))
    for name, each in found["stride"].items():
        label = {"cut": "切断，不重叠", "whole": "一次看全"}.get(name, name)
        print(row(label, [f"{each['perplexity']:.3f}", f"{each['forwarded']:,}"]))
    print("\n切法不同：每个单位的困惑度不能比，每个字几比特能比")
    print(row("模型", ["困惑度", "每字比特"]))
    for name, each in found["units"].items():
        print(row(UNITS[name], [f"{each['perplexity']:.3f}", each["bits_per_char"].text()]))


def show_traps(traps: dict) -> None:
    print("\n同样的中文回答，各库的默认与该用的（×100）")
    print(row("", ["默认", "按字"]))
    for name, label in (("bleu", "BLEU"), ("rouge_l", "ROUGE-L"), ("f1", "F1（SQuAD）")):
        each = traps[name]
        print(row(label, [f"{100 * each['default']:.1f}", f"{100 * each['right']:.1f}"]))


def show_constructed(found: dict) -> None:
    print("\n造出来的回答，标准答案只有那句完整的话：指标给多少，真的评判给多少")
    print(row("", [*(NAMES[name] for name in PICTURED), "真的评判"], 20, 15))
    for kind, each in found.items():
        cells = [f"{each[name]:.3f}" for name in (*PICTURED, "judge")]
        print(row(KINDS[kind], cells, 20, 15))


def show_systems(metrics: dict) -> None:
    print("\n各模型的回答（贪心、温度 1），BLEU 一栏的标准答案：一句 / 四种开头都算")
    print(row("", ["真的评判", "BLEU", "chrF", "完全一致"], 22, 16))
    for name, each in metrics["systems"].items():
        one, several = each["one_reference"], each["all_references"]
        cells = [f"{one[m]:.3f} / {several[m]:.3f}" for m in ("bleu", "chrf", "em")]
        print(row(name, [f"{each['judge']:.3f}", *cells], 22, 16))
    for name, each in metrics["paired"].items():
        print(f"  {name} − sft，同样的题成对地减：")
        for label, key in (
            ("真的评判", "judge"),
            ("BLEU，一句", "bleu_one_reference"),
            ("BLEU，四种开头", "bleu_all_references"),
        ):
            print(row("  " + label, [signed(each[key])]))
    print("\n与真的评判的相关（95% 区间；重抽的是题）")
    for kind, label in (
        ("one_reference", "标准答案一句"),
        ("one_reference_without_pretrain", "一句，不算 pretrain"),
        ("all_references", "四种开头都算"),
    ):
        print(row(label, ["Pearson", "Spearman", "Kendall τ-b", "各份回答的名次"], 20, 26))
        for name, each in metrics["correlation"][kind].items():
            cells = [bounds(each[method]) for method in ("pearson", "spearman", "kendall", "systems")]
            print(row(NAMES[name], cells, 20, 26))


def bounds(interval: Interval) -> str:
    """两位小数；有负数的区间写"到"，免得连字符与负号挤在一起。"""
    if math.isnan(interval.value):  # 全都一样的数，相关没有定义
        return "—"
    dash = "–" if interval.low >= 0 else " 到 "
    return f"{interval.value:z.2f}（{interval.low:z.2f}{dash}{interval.high:z.2f}）"


def signed(interval: Interval) -> str:
    sure = "" if interval.is_sure else "，还不能说不同"
    return f"{interval.value:+.3f}（{interval.low:+.3f} 到 {interval.high:+.3f}{sure}）"


def show_agreement(table: dict, title: str) -> None:
    print(f"\n{title}")
    for level, each in table["alpha"].items():
        print(row(f"Krippendorff α，{LEVELS[level]}", [f"{bounds(each)}，n={each.n}"], 26))
    if "fleiss" in table:
        print(row("Fleiss κ", ["—" if math.isnan(table["fleiss"]) else f"{table['fleiss']:z.2f}"], 26))
    else:
        print(row("Fleiss κ", ["有缺的，不能算"], 26))
    if all(math.isnan(each.value) for each in table["alpha"].values()):
        print("  所有的分都一样：没有碰巧可言，κ 与 α 没有定义（—），只能说一致的比例。")
    print(row("两个人", ["一致", "Cohen κ", "平方加权 κ", "AC1"], 26, 26))
    for name, pair in table["pairs"].items():
        weighted = bounds(pair["kappa_quadratic"]) if "kappa_quadratic" in pair else "—"
        cells = [
            f"{pair['agreement']:.2f}（n={pair['n']}）",
            bounds(pair["kappa"]),
            weighted,
            f"{pair['ac1']:z.2f}",
        ]
        print(row(name, cells, 26, 26))
    for name, alpha in table["without"].items():
        print(row(f"去掉 {name} 之后的 α", [f"{alpha:.3f}"], 26))


def show_file(metrics: dict) -> None:
    print("\n各分都是 0–1；论文里的 BLEU、chrF 是它的 100 倍。")
    for label, each in metrics["files"].items():
        print(
            f"\n{label}：{metrics['n']} 题"
            + (f"，其中 {each['empty']} 题是空的（得 0 分）" if each["empty"] else "")
        )
        for name, interval in each["scores"].items():
            title = {"bleu_corpus": "BLEU（整批）", "chrf_corpus": "chrF（整批）"}.get(name) or NAMES[name]
            print(row(title, [interval.text()]))
        traps = each["traps"]
        print(
            f"  同样的回答，默认切法的 BLEU 是 {100 * traps['bleu']['default']:.1f}，ROUGE-L {100 * traps['rouge_l']['default']:.1f}。"
        )
    if metrics["difference"]:
        first, second = metrics["files"]
        print(f"\n{first} − {second}，同样的题成对地减")
        for name, interval in metrics["difference"].items():
            print(row(NAMES[name], [signed(interval)]))
    print()


# ---------------------------------------------------------------- 2. 画


def draw_pictures(folder: Path, metrics: dict) -> None:
    stride = metrics["perplexity"]["stride"]
    bar_chart(
        folder / "stride.svg",
        {"困惑度|perplexity": {stride_label(name): each["perplexity"] for name, each in stride.items()}},
        "窗口 96，每次往前挪多少|Window 96, stride",
        "",
        "困惑度|perplexity",
    )
    constructed = metrics["constructed"]
    shown = {
        "judge": "真的评判|true judge",
        "bleu": "BLEU",
        "chrf": "chrF",
        "rouge_l": "ROUGE-L",
        "em": "完全一致|exact match",
    }
    bar_chart(
        folder / "constructed.svg",
        {
            label: {f"{KINDS[kind]}|{ENGLISH[kind]}": each[name] for kind, each in constructed.items()}
            for name, label in shown.items()
        },
        "同一道题的五种回答|Five answers to one question",
        "",
        "分|score",
    )
    correlation = metrics["correlation"]
    bar_chart(
        folder / "correlation.svg",
        {
            label: {
                NAMES[name].replace("（字）", "") + f"|{name}": correlation[kind][name]["spearman"].value
                for name in NAMES
            }
            for kind, label in (
                ("one_reference", "标准答案一句|one reference"),
                ("one_reference_without_pretrain", "一句，不算 pretrain|one, without pretrain"),
                ("all_references", "四种开头都算|four references"),
            )
        },
        "一个回答一个点，与真的评判的 Spearman 相关|Spearman with the true judge",
        "",
        "相关|correlation",
    )
    shares = [0.5 + 0.01 * step for step in range(50)]
    tables = [paradox_table(share, 0.95) for share in shares]
    line_chart(
        folder / "paradox.svg",
        {
            label: (shares, [table[name] for table in tables])
            for name, label in (
                ("agreement", "一致的比例|agreement"),
                ("kappa", "Cohen κ"),
                ("ac1", "Gwet AC1"),
            )
        },
        "κ 的悖论：两个人判对的概率都是 0.95|The kappa paradox",
        "好的占多少|share of good",
        "",
    )


def stride_label(name: str) -> str:
    return {"cut": "切断|cut", "whole": "看全|whole"}.get(name, name)
