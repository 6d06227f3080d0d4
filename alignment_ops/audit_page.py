"""审计页（一个 HTML 文件，不引用外部资源）、数据卡（dataset_card.md）与几张图。来自数据的文字都经过 html.escape。"""

from __future__ import annotations

import random
from html import escape
from pathlib import Path

from curation_report import ARM_NAMES, FAULTS
from curation_rows import STEPS, TABLES, Table
from nlp_common.base.console import printable
from nlp_common.draw.pages import fill_page, html_table
from nlp_common.draw.plots import bar_chart, histogram

TEMPLATE = Path(__file__).with_name("audit_page.html")
SAID = {"user": "问", "assistant": "答", "system": "系统"}
EXAMPLES, LONGEST = 5, 400  # 每一步看几行，一行至多多少字


def page(tables: dict[str, Table], metrics: dict) -> str:
    sections = []
    for name, table in tables.items():
        sections += [
            steps_section(table),
            examples_section(table),
            coverage_section(TABLES[name], metrics[name]),
        ]
        if table.margins:
            sections.append(margins_section(table))
    if "precision" in metrics:
        sections.insert(0, scores_section(metrics))
    if "bias" in metrics:
        sections.append(bias_section(metrics["bias"]))
    summary = "；".join(
        f"{TABLES[name]}：{metrics[name]['rows']} 行，留下 {metrics[name]['kept']} 行，盖住个人信息的 {metrics[name]['masked']} 行"
        for name in tables
    )
    return fill_page(TEMPLATE, {"summary": escape(summary), "sections": "\n".join(sections)})


def steps_section(table: Table) -> str:
    rows = []
    for step in table.steps:
        dropped = step["before"] - step["after"]
        bar = f'<span class="bar" style="width:{300 * step["after"] / max(table.steps[0]["before"], 1):.0f}px"></span>'
        reasons = "、".join(f"{escape(reason)} {n}" for reason, n in step["reasons"].items())
        rows.append(
            [
                STEPS[step["step"]][0],
                str(dropped),
                f'<span class="whole">{bar} {step["after"]}</span>',
                reasons,
            ]
        )
    head = ["步骤", "丢掉", "还剩", "为什么（几行）"]
    notes = "".join(f'<p class="warn">{escape(note)}</p>' for note in table.notes)
    return f"<h2>{TABLES[table.name]}：一步一步</h2>" + html_table(head, rows, {1}) + notes


def examples_section(table: Table) -> str:
    """每一步随便看几行：规则对不对，看几行就知道。全部的在 dropped.jsonl。"""
    parts = []
    for step, (title, _) in STEPS.items():
        dropped = [row for row in table.dropped if row["step"] == step]
        if step == "personal":
            dropped = [
                {"place": table.places[number], "reason": "盖住", **table.rows[number]}
                for number in table.masked
            ]
        if not dropped:
            continue
        shown = random.Random(f"examples-{step}").sample(dropped, min(EXAMPLES, len(dropped)))
        body = "".join(
            f"<p class='faint'>第 {row['place']} 条　{escape(row['reason'])}</p><pre>{shown_text(row)}</pre>"
            for row in shown
        )
        parts.append(f"<details><summary>{title}（{len(dropped)} 行）</summary>{body}</details>")
    return f"<h2>{TABLES[table.name]}：看几行</h2>" + "".join(parts)


def shown_text(row: dict) -> str:
    if row.get("step") == "unusable":  # 什么样子都有
        return escape(printable(str(row)[:LONGEST]))
    lines = [
        f"{SAID.get(turn['role'], turn['role'])}：{turn['content']}"
        for turn in row.get("messages") or row["prompt"]
    ]
    if "chosen" in row:
        lines += [f"好：{row['chosen'][-1]['content']}", f"差：{row['rejected'][-1]['content']}"]
    text = "\n".join(lines)
    return escape(printable(text[:LONGEST])) + ("……" if len(text) > LONGEST else "")


def coverage_section(title: str, counts: dict) -> str:
    rows = []
    for row in counts["coverage"]:
        warning = ' <span class="warn">比别的少留了许多</span>' if row["fewer"] else ""
        rows.append(
            [escape(row["kind"]) + warning, str(row["before"]), str(row["after"]), f"{row['kept']:.1%}"]
        )
    return f"<h2>{title}：各种题留下几成</h2>" + html_table(
        ["种类", "清洗前", "清洗后", "留下"], rows, {1, 2, 3}
    )


def margins_section(table: Table) -> str:
    return f"<h2>{TABLES[table.name]}：交叉验证的余地</h2>" + margins_chart(None, table)


def margins_chart(path: Path | None, table: Table) -> str:
    """知道答案的分两堆画；不知道的画一堆。"""
    fault = "wrong_answer" if table.name == "chats" else "flipped"
    series: dict[str, list[float]] = {"全部|all": list(table.margins.values())}
    if table.planted:
        bad = {number for number in table.margins if table.planted.faults.get(number) == fault}
        name = {"wrong_answer": "答错的|wrong answers", "flipped": "标反的|flipped"}[fault]
        series = {
            "没有毛病的|clean": [margin for number, margin in table.margins.items() if number not in bad],
            name: [table.margins[number] for number in sorted(bad)],
        }
    title = (
        "答错的：余地|Margins of answers"
        if table.name == "chats"
        else "标反的：隐式奖励之差|Margins of pairs"
    )
    xlabel = "p(写着的) − p(别的里最大的)|margin" if table.name == "chats" else "β·差|implicit reward margin"
    return histogram(path, series, title, xlabel, "行|rows", bins=40)


def scores_section(metrics: dict) -> str:
    rows = [
        [FAULTS[fault], f"{metrics['precision'][fault]:.3f}", f"{metrics['recall'][fault]:.3f}"]
        for fault in metrics["recall"]
    ]
    said = (
        f"坏行：清洗前 {metrics['bad_share']:.1%}，清洗后 {metrics['bad_share_left']:.1%}；"
        f"好行冤枉了 {metrics['good_dropped_share']:.1%}。"
    )
    return "<h2>查得准不准</h2>" + html_table(["埋的毛病", "查准", "查全"], rows, {1, 2}) + f"<p>{said}</p>"


def bias_section(bias: dict) -> str:
    rows = []
    for when, title in (("raw", "清洗前"), ("curated", "清洗后")):
        length, position = bias[when]["length"], bias[when]["position"]
        people = "、".join(
            f"{escape(row['annotator'])}偏爱{row['bias']}"
            for row in bias[when]["annotators"]
            if row["biased"]
        )
        rows.append(
            [
                title,
                f"{length['longer_chosen']:.1%}" if length["n"] else "—",
                f"{position['first_chosen']:.1%}" if position["n"] else "没有记",
                people or "没有看出",
            ]
        )
    return "<h2>偏好对：偏向</h2>" + html_table(
        ["", "长的被标为好的", "先看到的被标为好的", "谁偏"], rows, {1, 2}
    )


# ---------------------------------------------------------------- 图


def draw(folder: Path, tables: dict[str, Table], metrics: dict) -> None:
    for name, table in tables.items():
        if table.margins:
            margins_chart(folder / f"curation_margins_{name}.svg", table)
    if "precision" in metrics:
        english = {fault: f"{title}|{fault.replace('_', ' ')}" for fault, title in FAULTS.items()}
        series = {
            "查准|precision": {english[fault]: value for fault, value in metrics["precision"].items()},
            "查全|recall": {english[fault]: value for fault, value in metrics["recall"].items()},
        }
        bar_chart(folder / "curation_found.svg", series, "每种毛病查出几成|Precision and recall", "", "")
    if "preferred_rate_curated" in metrics:
        names = {arm: f"{title}|{arm}" for arm, title in ARM_NAMES.items()}
        series = {
            "SFT 采样答对|SFT sampled accuracy": {
                names[arm]: metrics["sft"][arm]["sampled_accuracy"] for arm in names
            },
            "DPO 又对又全又有礼|DPO preferred rate": {
                names[arm]: metrics["dpo"][arm]["preferred_rate"] for arm in names
            },
        }
        bar_chart(folder / "curation_arms.svg", series, "训练在哪一份上|Trained on", "", "")


# ---------------------------------------------------------------- 数据卡


def table_cell(text: str) -> str:
    """Markdown 的一格：竖线、换行、标签都不许把表格撑破。"""
    return escape(str(text)).replace("|", "\\|").replace("\n", " ")


def card(tables: dict[str, Table], metrics: dict, settings) -> str:
    """dataset_card.md：数据从哪里来、怎样清洗的、还有什么问题。人要补的写"待填"，不替人编。"""
    lines = ["---", "language: zh", "license: 待填", "---", "", "# 数据卡", ""]
    lines += ["许可证、采集的经过、本人同意与否，程序不知道：请补上写着“待填”的地方。", "", "## 来源", ""]
    for name, table in tables.items():
        sha256 = table.source.get("sha256")
        lines.append(
            f"- {TABLES[name]}：{Path(table.source['name']).name}，{metrics[name]['rows']} 行，清洗后 {metrics[name]['kept']} 行"
            + (f"；sha256 {sha256}" if sha256 else "")
        )
    lines += [
        "- 采集的时间、经过、同意：待填",
        "",
        "## 清洗",
        "",
        "| 数据 | 步骤 | 丢掉 | 为什么 |",
        "|---|---|---|---|",
    ]
    for name, table in tables.items():
        for step in table.steps:
            reasons = table_cell("、".join(f"{reason} {n}" for reason, n in step["reasons"].items()))
            lines.append(
                f"| {TABLES[name]} | {STEPS[step['step']][0]} | {step['before'] - step['after']} | {reasons} |"
            )
    lines += [
        "",
        f"留下的语言 {settings.languages}；近重复的线 {settings.threshold}；短的行一样的至多留 {settings.short_copies} 份；"
        f"评测的题盖住 {settings.overlap:.0%} 算混进来；种子 {settings.seed}。",
        "丢掉的每一行与原因在 dropped.jsonl；同样的输入、同样的设置，清洗出来的一样。",
        "",
        "## 个人信息",
        "",
        "电话、邮箱、身份证号、银行卡号换成了记号（[电话] 等），丢掉的行里也换了；姓名、住址、微信号没有查：待人工看。",
        "",
        "## 各种题",
        "",
        "| 数据 | 种类 | 清洗前 | 清洗后 |",
        "|---|---|---|---|",
    ]
    for name in tables:
        lines += [
            f"| {TABLES[name]} | {table_cell(row['kind'])} | {row['before']} | {row['after']} |"
            for row in metrics[name]["coverage"]
        ]
    lines += ["", "## 已知的问题", ""]
    lines += known_limits(tables, metrics)
    return "\n".join(lines) + "\n"


def known_limits(tables: dict[str, Table], metrics: dict) -> list[str]:
    limits = []
    for name, table in tables.items():
        limits += [f"- {TABLES[name]}：{note}" for note in table.notes]
        steps = {step["step"] for step in table.steps}
        if not steps & {"wrong_answer", "flipped"}:
            limits.append(f"- {TABLES[name]}：没有用模型找标错的（没有给 --model）。")
        if "contaminated" not in steps:
            limits.append(f"- {TABLES[name]}：没有查评测的题（没有给 --eval_files）。")
        limits += [
            f"- {TABLES[name]}：{row['kind']} 只留下 {row['kept']:.0%}，比别的少得多。"
            for row in metrics[name]["coverage"]
            if row["fewer"]
        ]
    if "bias" in metrics and metrics["bias"]["curated"]["length"]["n"]:
        length = metrics["bias"]["curated"]["length"]
        limits.append(
            f"- 偏好对：长的那个被标为好的占 {length['longer_chosen']:.0%}；只看长短的奖励模型也能猜对这么多。"
        )
        people = [row["annotator"] for row in metrics["bias"]["raw"]["annotators"] if row["biased"]]
        limits += [f"- 偏好对：{'、'.join(people)}标的有偏向，该请人重标。"] if people else []
    if "bad_share_left" in metrics:
        limits.append(f"- 知道答案的数据：清洗后还有 {metrics['bad_share_left']:.1%} 的坏行。")
    return limits
