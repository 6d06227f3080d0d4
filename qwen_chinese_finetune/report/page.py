"""report.html：一个文件，不引用任何外部资源；中文用系统字体，手机和深色模式也能看。

所有来自数据和模型的文字都经过 html.escape：模型写出的 <script> 只是几个字。
"""

from __future__ import annotations

from html import escape
from pathlib import Path
from string import Template

from chain import MODELS, STAGES
from nlp_common.base.console import printable
from report.charts import accuracy_chart, grpo_charts, length_chart, loss_charts, ppo_charts
from report.comparison import MARKS, mark_of
from report.metrics import METRICS

TEMPLATE = Path(__file__).with_name("template.html")
JUDGED = "奖励模型的分只是老师的看法；程序的评分知道标准答案，奖励模型从没见过它。两样都升，才是真的变好。"
PPO_NOTE = '奖励升、KL 也升：分数是用"离 SFT 多远"换来的，KL 惩罚管着这笔账。'
GRPO_NOTE = "一组回答的分全一样，就没有谁比谁好，学不到什么：|A| 变小、没有信号的组变多，是快学完了。"
NOT_JUDGED = "真实的问题没有唯一的答案：奖励模型的分只是老师的看法，长度、用词和 KL 说出它是怎样换来的。"
SETTINGS = {
    "max_train_samples": "训练行数",
    "per_device_train_batch_size": "批大小",
    "learning_rate": "学习率",
    "num_train_epochs": "遍数",
    "max_steps": "最多几步",
    "max_length": "最长 token",
    "seed": "种子",
}


def _number(value) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return escape(str(value))
    return f"{value:.3f}" if 0.001 <= abs(value) < 1000 or value == 0 else f"{value:.3g}"


def _setting(value) -> str:
    """1.0 遍写 1；-1 是不限。"""
    return (
        ""
        if value is None
        else "不限"
        if value == -1
        else escape(f"{value:g}" if isinstance(value, float) else str(value))
    )


def _table(head: list[str], rows: list[list[str]], css: str = "") -> str:
    """head 与 rows 的内容已经是 HTML。"""
    cells = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join("<tr>" + "".join(row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table class="{css}"><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'


def _td(content: str, css: str = "") -> str:
    return f'<td class="{css}">{content}</td>' if css else f"<td>{content}</td>"


def highlight_table(rows: list[dict]) -> str:
    with_targets = any(row["target"] for row in rows)
    body = []
    for previous, row in zip([None, *rows], rows, strict=False):
        first = previous is None or previous["stage"] != row["stage"]
        cells = [
            _td(STAGES[row["stage"]] if first else ""),
            _td(escape(row["label"])),
            _td(_number(row["before"]), "number"),
            _td(f"<b>{_number(row['value'])}</b>", "number"),
        ]
        if with_targets:
            verdict = {True: ("✓", "good"), False: ("✗", "wrong"), None: ("", "")}[row["reached"]]
            cells.append(_td(f"{escape(row['target'] or '')} {verdict[0]}", f"number {verdict[1]}"))
        body.append(cells)
    return _table(["阶段", "指标（留出数据）", "之前", "之后"] + ["目标"] * with_targets, body, "numbers")


def model_table(models: dict[str, dict]) -> str:
    rows = [
        [_td(escape(label))]
        + [_td(f"{each[key]:.{digits}f}" if key in each else "—", "number") for each in models.values()]
        for key, (label, digits) in METRICS.items()
        if any(key in each for each in models.values())
    ]
    return _table(["指标", *(MODELS[name] for name in models)], rows, "numbers-2") if models else ""


def _reply(name: str, reply: dict) -> str:
    mark = mark_of(reply)
    symbol, _, meaning = MARKS.get(mark, ("", "", ""))
    tail = "" if reply["ended"] else '<span class="faint"> …（没说完）</span>'
    reward = f'<div class="faint">奖励 {reply["reward"]:+.2f}</div>' if "reward" in reply else ""
    return (
        f'<td class="reply {mark or ""}" data-model="{MODELS[name]}" title="{meaning}">'
        f"{symbol} {escape(printable(reply['text'])) or '（空）'}{tail}{reward}</td>"
    )


def sample_table(samples: list[dict]) -> str:
    if not samples:
        return ""
    rows = []
    for sample in samples:
        turns = "".join(
            f'<div class="{escape(m["role"])}">{escape(printable(m["content"]))}</div>'
            for m in sample["messages"]
        )
        answer = (
            f'<div class="answer">标准答案：{escape(sample["answer"])}</div>' if "answer" in sample else ""
        )
        cells = [_reply(name, reply) for name, reply in sample["replies"].items()]
        rows.append([f'<td class="question">{turns}{answer}</td>', *cells])
    names = [MODELS[name] for name in samples[0]["replies"]]
    return _table(["题目", *names], rows, "samples")


def stage_table(records: dict[str, dict]) -> str:
    rows = []
    for name, record in records.items():
        settings, metrics = record["settings"], record["metrics"]
        speed = metrics.get("train_tokens_per_s") if name != "compare" else None
        cells = [STAGES[name], f"{record['seconds']:.0f}", f"{speed:,.0f}" if speed else ""]
        data = record["data"].get("train") or {"name": record["data"].get("dataset")}
        cells += [escape(str(data["name"])), *(_setting(settings.get(key)) for key in SETTINGS)]
        rows.append([_td(cells[0]), *(_td(cell, "number") for cell in cells[1:])])
    return _table(["阶段", "秒", "token/秒", "数据", *SETTINGS.values()], rows, "numbers-2")


def _charts(charts: list[str]) -> str:
    if not charts:
        return '<p class="faint">步数太少，没有可画的。</p>'
    return '<div class="charts">' + "".join(f'<div class="chart">{svg}</div>' for svg in charts) + "</div>"


def _section(title: str, note: str, *parts: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n<p>{note}</p>\n" + "\n".join(parts) + "\n</section>\n"


def _later(report: dict, records: dict[str, dict], answers: list[dict]) -> str:
    """PPO 与比较的几节：没有跑到的阶段不占地方。"""
    sections = []
    if "ppo" in records:
        sections.append(_section("PPO", PPO_NOTE, _charts(ppo_charts(records))))
    if "grpo" in records:
        sections.append(_section("GRPO", GRPO_NOTE, _charts(grpo_charts(records))))
    if "compare" in records:
        samples = records["compare"].get("samples", [])
        judged = any("verdict" in r for s in samples for r in s["replies"].values())
        marks = "　".join(
            f'<span class="{css}">{mark} {text}</span>' for css, (mark, _, text) in MARKS.items()
        )
        charts = _charts([*accuracy_chart(report["models"]), *length_chart(answers)])
        note = JUDGED if judged else NOT_JUDGED
        sections.append(_section("同样的题，各个模型", note, charts, model_table(report["models"])))
        title = f"样例（{len(samples)} 道，温度 1 采样）"
        sections.append(_section(title, marks if judged else "", sample_table(samples)))
    return "\n".join(sections)


def _environment(report: dict, records: dict[str, dict]) -> str:
    last = list(records.values())[-1] if records else {}
    versions = last.get("versions", {})
    names = [f"{n} {versions[n]}" for n in ("python", "torch", "transformers", "trl") if n in versions]
    return escape("，".join([last.get("device", ""), *names]))


def render_page(report: dict, records: dict[str, dict], answers: list[dict], highlights: list[dict]) -> str:
    """→ 完整的 HTML。highlights 见 names.highlights。"""
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        preset=escape(report["preset"]),
        seconds=f"{report['seconds']:.0f}",
        environment=_environment(report, records),
        highlights=highlight_table(highlights),
        losses=_charts(loss_charts(records)),
        later=_later(report, records, answers),
        stages=stage_table(records),
        where_answers="；全部回答在 compare/compare.json 里" if "compare" in records else "",
    )
