"""data_pipeline.py 的统计页与图：一个文件，不引用外部的东西；来自文档、模型的文字都经过 html.escape。"""

from __future__ import annotations

from collections import Counter
from html import escape
from pathlib import Path

from nlp_common.base.runs import write_text
from nlp_common.draw.pages import fill_page, html_table
from nlp_common.draw.plots import bar_chart
from pipeline_exam import EXAMS
from row_checks import REASONS

TEMPLATE = Path(__file__).with_name("pipeline_page.html")
RULE_TITLES = {
    "key_value": "名称：内容",
    "attribute": "甲的乙是丙",
    "place": "甲住在（位于）某处",
    "carer": "由某人做",
    "time": "某时做",
    "number": "多少天、多少元",
    "object": "甲吃（种、养）什么",
    "definition": "甲是……",
    "llm": "大模型出的",
}
MORE_REASONS = REASONS | {"disagrees": "大模型自己再答一遍，答得不一样", "repeated": "同一问别的文档里有了"}
BOOKS = {"open": "开卷", "closed": "闭卷", "swapped": "开卷（换了答案）"}
MOST_SHOWN = 8


def write_page(
    path: Path, metrics: dict, documents: list, faults: list[str], material, rows: dict[str, list[dict]]
) -> None:
    """material 是 data_pipeline.Material；rows 是 {"train": 行, "heldout": 行}。"""
    parts = {
        "steps": steps(metrics, rows),
        "files": files_table(documents, material.cleaned, faults),
        "removed": removed_table(material.cleaned),
        "rules": counted(Counter(pair.rule for pair in material.pairs), RULE_TITLES, "句式", "题"),
        "dropped": dropped_table(material.dropped),
        "split": split_table(metrics, rows),
        "lengths": lengths_table(rows),
        "samples": samples_table(rows),
    }
    write_text(path, fill_page(TEMPLATE, parts))


def steps(metrics: dict, rows: dict[str, list[dict]]) -> str:
    counts = {
        "份文档": metrics["documents"],
        "段": metrics["passages"],
        "题": metrics["pairs"],
        "题能要": metrics["kept_pairs"],
        "行训练": len(rows["train"]),
        "行留出": len(rows["heldout"]),
    }
    return "".join(f'<div class="card"><b>{count:,}</b>{name}</div>' for name, count in counts.items())


def files_table(documents: list, cleaned: list, faults: list[str]) -> str:
    """每种后缀：几份，洗之前、之后多少字，去掉几行；读不了的各一句。"""
    after = {each.id: each for each in cleaned}
    kinds: dict[str, list] = {}
    for document in documents:
        kinds.setdefault(document.id.rpartition(".")[2].lower(), []).append(document)
    body = []
    for kind, its in sorted(kinds.items()):
        before = sum(len(each.text) for each in its)
        left = sum(len(after[each.id].text) for each in its)
        lines = sum(len(after[each.id].removed) for each in its)
        body.append([kind, number(len(its)), number(before), number(left), number(lines)])
    shown = html_table(["后缀", "份", "读出的字", "洗完的字", "去掉的行"], body)
    bad = "".join(f'<p class="bad">没有读：{escape(fault)}</p>' for fault in faults)
    return shown + bad


def removed_table(cleaned: list) -> str:
    """去掉得最多的几种行：看一眼，有没有误伤正文。"""
    counts = Counter((line, why) for each in cleaned for line, why in each.removed)
    body = [[text(line), escape(why), number(n)] for (line, why), n in counts.most_common(MOST_SHOWN)]
    return html_table(["行", "为什么", "次"], body) if body else "<p>没有整行去掉的。</p>"


def dropped_table(dropped: list) -> str:
    """每种原因几题，各举一例。"""
    first = {}
    for pair, reason in dropped:
        first.setdefault(reason, pair)
    counts = Counter(reason for _, reason in dropped)
    body = []
    for reason, n in counts.most_common():
        pair = first[reason]
        example = f"问：{pair.questions[0]}\n答：{pair.answer}\n原文：{pair.passage}"
        body.append([escape(MORE_REASONS.get(reason, reason)), number(n), text(example)])
    return html_table(["为什么", "题", "例如"], body) if body else "<p>都能要。</p>"


def split_table(metrics: dict, rows: dict[str, list[dict]]) -> str:
    body = []
    for name, title in (("train", "训练"), ("heldout", "留出")):
        documents = len({row["document"] for row in rows[name]})
        books = Counter(row["book"] for row in rows[name])
        counts = (books[book] for book in BOOKS)
        body.append([title, number(documents), *map(number, counts)])
    leaks = metrics["leaked"]
    note = (
        f"留出的题里，同一件事训练数据里也有的：这样分（按文档，几乎一样的算一份）{leaks['documents']:.1%}；"
        f"要是按文件分 {leaks['files']:.1%}，一行一行随机分 {leaks['rows']:.1%}。"
    )
    return html_table(["", "份文档", *(f"行{title}" for title in BOOKS.values())], body) + f"<p>{note}</p>"


def lengths_table(rows: dict[str, list[dict]]) -> str:
    sizes = [sum(len(turn["content"]) for turn in row["messages"]) for its in rows.values() for row in its]
    width = max(10, -(-max(sizes) // 100) * 10)
    counts = Counter(size // width for size in sizes)
    named = {at: f"{at * width}–{(at + 1) * width - 1}" for at in range(max(counts) + 1)}
    return counted(Counter({at: counts[at] for at in named}), named, "字", "行", by_count=False)


def samples_table(rows: dict[str, list[dict]]) -> str:
    """每种句式、开卷与闭卷各一行，原样。"""
    shown: dict[tuple, dict] = {}
    for row in rows["train"]:
        shown.setdefault((row["rule"], row["book"]), row)
    body = []
    for (rule, book), row in shown.items():
        asked, said = (turn["content"] for turn in row["messages"])
        name = f"{RULE_TITLES.get(rule, rule)}，{BOOKS[book]}"
        body.append([escape(name), text(asked), text(said)])
    return html_table(["", "用户", "助手"], body)


# ---------------------------------------------------------------- 零件


def number(value: int) -> str:
    return f'<td class="number">{value:,}</td>'


def text(value: str) -> str:
    return f'<td class="text">{escape(value)}</td>'


def counted(counts: Counter, titles: dict, what: str, unit: str, by_count: bool = True) -> str:
    """每一种几个，横条画出多少。"""
    most = max(counts.values(), default=1) or 1
    body = []
    for name, n in counts.most_common() if by_count else counts.items():
        bar = f'<td class="bar"><div class="fill" style="width: {100 * n / most:.1f}%"></div></td>'
        body.append([escape(str(titles.get(name, name))), number(n), bar])
    return html_table([what, unit, ""], body)


SHOWN = {  # 图里的名字
    "open_heldout": "开卷：没见过的文档|open, unseen documents",
    "open_heldout_other_wording": "同左，别的问法|same, new wording",
    "closed_trained": "闭卷：教过的文档|closed, trained documents",
    "closed_trained_other_wording": "同左，别的问法|same, new wording ",
    "closed_heldout": "闭卷：没见过的文档|closed, unseen documents",
}


def draw(folder: Path, metrics: dict) -> None:
    """两张图：训练前后的成绩；三种分法各漏多少、考出多少。"""
    if "sft" not in metrics:
        return
    sft = metrics["sft"]
    names = [name for name in EXAMS if name in sft["after"]]
    series = {
        "before": "训练前|before",
        "after": "训练后|after",
        "without_swap": "没有换答案的行|without swapped rows",
    }
    bars = {
        title: {SHOWN[name]: sft[when][name]["accuracy"] for name in names}
        for when, title in series.items()
        if when in sft
    }
    bar_chart(
        folder / "pipeline_gain.svg", bars, "学了这些文档，多会了什么|What SFT adds", "", "答对|accuracy"
    )
    leaks = metrics["leaked"]
    ways = {"documents": "按文档分|by document", "files": "按文件分|by file", "rows": "一行一行分|by row"}
    bars = {
        "漏进训练的|leaked": {title: leaks[way] for way, title in ways.items()},
        "闭卷答对|closed-book accuracy": {
            ways["documents"]: sft["after"]["closed_heldout"]["accuracy"],
            ways["rows"]: sft["row_split"]["accuracy"],
        },
    }
    title = "留出的题，分法不同|Held out, three ways to split"
    bar_chart(folder / "pipeline_split.svg", bars, title, "", "比例|share")
