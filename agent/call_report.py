"""evaluate_tools.py 给人看的：终端里的表与答错的例子，一页网页（report.html），一张图。"""

from __future__ import annotations

from html import escape
from pathlib import Path

from call_variants import TITLES
from nlp_common.base.console import print_table, printable
from nlp_common.draw.plots import bar_chart

RULERS = {"text": "文字", "json": "JSON", "bfcl": "AST（BFCL）", "own": "AST（放宽）", "run": "执行"}
KINDS = {
    "no_call": "没有调用",
    "broken": "写坏了，读不出来",
    "unneeded": "不该调用，调用了",
    "count": "调用的个数不对",
    "function": "叫错工具",
    "missing": "少了参数",
    "unexpected": "多了参数",
    "type": "类型不对",
    "value": "值不对",
    "state": "做完状态不对",
    "response": "没有看到该有的结果",
}
GROUP_TITLES = {
    "simple": "单个",
    "multiple": "几选一",
    "parallel": "并行",
    "parallel_multiple": "并行几选",
    "irrelevance": "不该调用",
    "relevance": "该调用",
    "multi_turn": "多轮",
}


def print_rulers(exam: dict) -> None:
    print("\n量尺的考试：各种写法，判成对的有几成（上半本来是对的，该 1.00；下半是错的，该 0.00）")
    rows = [["", "几个", *RULERS.values()]]
    for right in (True, False):
        for kind in TITLES:
            if kind in exam and exam[kind]["right"] == right:
                cells = [f"{exam[kind][ruler]:.2f}" for ruler in RULERS]
                rows.append([("√ " if right else "× ") + TITLES[kind], exam[kind]["n"], *cells])
    print_table(rows)


def shown(found: dict) -> str:
    return f"{found['value']:.3f}（{found['low']:.2f}–{found['high']:.2f}，n={found['n']}）"


def print_scores(metrics: dict) -> None:
    for name, models in metrics["sets"].items():
        groups = list(dict.fromkeys(group for scores in models.values() for group in scores["groups"]))
        print(f"\n{name}：AST 匹配（BFCL 的规矩），多轮比状态与结果；括号里是 95 % 区间")
        lines = [("总分（各类平均）", "overall"), *((GROUP_TITLES[group], group) for group in groups)]
        rows: list[list[str]] = [["", *models]]
        for title, group in lines:
            cells = [s["overall"] if group == "overall" else s["groups"].get(group) for s in models.values()]
            rows.append([title, *(shown(cell) if cell else "—" for cell in cells)])
        rows.append(["全部的题", *(shown(scores["every"]) for scores in models.values())])
        rows.append(
            ["合法的调用", *(shown(s["valid"]) if "valid" in s else "一个也没写" for s in models.values())]
        )
        for ruler, title in RULERS.items():
            if any(ruler in scores["rulers"] for scores in models.values()):
                cells = [scores["rulers"].get(ruler) for scores in models.values()]
                rows.append([f"该调用的单轮题：{title}", *(shown(cell) if cell else "—" for cell in cells)])
        print_table(rows)
    print()


def print_failures(name: str, model: str, failures: list[dict]) -> None:
    """每一种错，几道，一个例子。"""
    if not failures:
        print(f"\n{name}，{model}：全对")
        return
    print(f"\n{name}，{model}：答错 {len(failures)} 道")
    for kind, each in first_of_each(failures).items():
        count = sum(other["kind"] == kind for other in failures)
        print(f"  {KINDS[kind]}（{count} 道），例 {each['id']}：{each['message']}")
        print(f"    问  {printable(' → '.join(each['asked']))[:110]}")
        print(f"    答  {printable(one_line(each['said']))[:110] or '（空的）'}")


def first_of_each(failures: list[dict]) -> dict[str, dict]:
    found: dict[str, dict] = {}
    for kind in KINDS:
        for each in failures:
            if each["kind"] == kind:
                found.setdefault(kind, each)
    return found


def one_line(said: list[list[str]]) -> str:
    turns = [" ⏎ ".join(text for text in turn) for turn in said]
    text = " → ".join(turns).replace("\n", " ")
    return "".join(char if char.isprintable() else "·" for char in text)


# ---------------------------------------------------------------- 网页与图

STYLE = """
body{font:16px/1.6 system-ui,"Noto Sans CJK SC",sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}
table{border-collapse:collapse;margin:1rem 0;display:block;overflow-x:auto}td,th{border:1px solid #ccc;padding:.25rem .6rem;text-align:right}
td:first-child,th:first-child{text-align:left}pre{white-space:pre-wrap;background:#f5f5f5;padding:.5rem;margin:.2rem 0}
summary{cursor:pointer;margin:.4rem 0}.faint{color:#666;font-size:.85em;white-space:nowrap}.bad{background:#fde2e0}
"""
EXAMPLES = 3  # 网页里，一种错最多几个例子


def write_page(path: Path, metrics: dict, failures: dict) -> None:
    """一个文件，不引用外部资源；来自题目与模型的文字都经过 html.escape。"""
    parts = [
        f"<!doctype html><html lang=zh><meta charset=utf-8><title>工具调用的评测</title><style>{STYLE}</style>"
    ]
    parts.append("<h1>工具调用的评测</h1>")
    for name, models in metrics["sets"].items():
        parts.append(f"<h2>{escape(name)}</h2>" + score_table(models))
        for model, each in failures.get(name, {}).items():
            parts.append(failure_section(model, each))
    if "exam" in metrics:
        parts.append("<h2>量尺的考试</h2>" + exam_table(metrics["exam"]))
    path.write_text("\n".join(parts) + "</html>", encoding="utf-8")


def score_table(models: dict) -> str:
    groups = list(dict.fromkeys(group for scores in models.values() for group in scores["groups"]))
    head = ["模型", "总分（各类平均）", *(GROUP_TITLES[group] for group in groups), "全部的题", "合法的调用"]
    rows = []
    for model, scores in models.items():
        found = [scores["overall"], *(scores["groups"].get(group) for group in groups)]
        found += [scores["every"], scores.get("valid")]
        rows.append([escape(model), *map(cell, found)])
    return html_table(head, rows)


def cell(found: dict | None) -> str:
    if found is None:
        return "—"
    return f"{found['value']:.3f}<br><span class=faint>{found['low']:.2f}–{found['high']:.2f}，n={found['n']}</span>"


def exam_table(exam: dict) -> str:
    rows = []
    for right in (True, False):
        for kind in TITLES:
            if kind in exam and exam[kind]["right"] == right:
                marks = []
                for ruler in RULERS:
                    wrong = abs(exam[kind][ruler] - right) > 1e-9
                    marks.append(f"<span{' class=bad' if wrong else ''}>{exam[kind][ruler]:.2f}</span>")
                rows.append([("√ " if right else "× ") + TITLES[kind], str(exam[kind]["n"]), *marks])
    return html_table(["写法", "几个", *RULERS.values()], rows)


def html_table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["<tr>" + "".join(f"<td>{each}</td>" for each in row) + "</tr>" for row in rows]
    return (
        "<table><tr>" + "".join(f"<th>{each}</th>" for each in head) + "</tr>" + "".join(lines) + "</table>"
    )


def failure_section(model: str, failures: list[dict]) -> str:
    parts = [f"<h3>{escape(model)}：答错 {len(failures)} 道</h3>"]
    for kind, title in KINDS.items():
        found = [each for each in failures if each["kind"] == kind]
        if not found:
            continue
        shown_ones = "".join(example(each) for each in found[:EXAMPLES])
        parts.append(f"<details><summary>{title}：{len(found)} 道</summary>{shown_ones}</details>")
    return "".join(parts)


def example(each: dict) -> str:
    asked, wanted = escape("\n→ ".join(each["asked"])), escape("\n→ ".join(each["wanted"])) or "（不调用）"
    said = escape("\n→ ".join("\n⏎ ".join(turn) for turn in each["said"]))
    return (
        f"<p><b>{escape(each['id'])}</b>　{escape(each['message'])}</p>"
        f"<pre>问：{asked}</pre><pre>该：{wanted}</pre><pre>答：{said}</pre>"
    )


def draw_rulers(path: Path, exam: dict) -> None:
    """几种写法，五把量尺判成对的比例。"""
    picked = {
        "order": "参数次序|argument order",
        "float": "1.0|1.0 for 1",
        "other": "另一个值|another value",
        "marks": "全角标点|full-width",
        "paraphrase": "没列出的|unlisted",
        "value": "值不对|wrong value",
        "lookalike": "看着像|lookalike",
    }
    titles = {
        "text": "文字|text",
        "json": "JSON|JSON",
        "bfcl": "AST（BFCL）|AST (BFCL)",
        "own": "AST（放宽）|AST (own)",
        "run": "执行|execution",
    }
    series = {
        title: {label: exam[kind][ruler] for kind, label in picked.items() if kind in exam}
        for ruler, title in titles.items()
    }
    bar_chart(
        path,
        series,
        "判成对的比例：前五种本来对，后两种本来错|Judged right (the last two are wrong)",
        "",
        "比例|share",
    )
