"""customer_alignment.py 的网页：八周一页，一个文件，不引用外部资源；模型说的话都经过 html.escape。"""

from __future__ import annotations

from html import escape
from pathlib import Path

from customer_service import watched
from nlp_common.base.console import printable
from nlp_common.base.runs import write_text
from nlp_common.draw.pages import fill_page, html_table
from nlp_common.draw.plots import line_chart
from poisoned_week import DEFENCES

SAID = {"user": "客户", "assistant": "机器人"}
TEMPLATE = Path(__file__).with_name("weeks_page.html")


def write_page(
    path: Path, metrics: dict, titles: dict[str, str], golden: list[dict], watched_arm: str
) -> None:
    """titles：每条线的名字 → 标题；watched_arm：跟着看哪一条线的回答。"""
    weeks = list(metrics["weeks"].values())
    parts = {
        "n_weeks": len(weeks) - 1,
        "n_golden": len(golden),
        "cards": cards(metrics, titles),
        "chart": weeks_chart(None, metrics, titles),
        "weeks": weeks_table(weeks, titles),
        "labels": labels_table(weeks, titles),
        "watched_arm": escape(title(titles[watched_arm])),
        "talk": talk_table(weeks, watched_arm, golden),
        "handover": handover_table(metrics["handover"]),
        "poison": poison_section(metrics["poison"]) if "poison" in metrics else "",
    }
    write_text(path, fill_page(TEMPLATE, parts))


def weeks_chart(path: Path | None, metrics: dict, titles: dict[str, str]) -> str:
    numbers = list(range(len(metrics["weeks"])))
    series = {}
    for name, shown in titles.items():
        series[shown] = (numbers, [week[name]["solved"] for week in metrics["weeks"].values()])
    only_prompt = {"只换提示|prompt only": metrics["handover"]["first"]["prompts"]["known"]}
    return line_chart(
        path, series, "解决了几成|Share solved", "几周之后|weeks", "解决|solved", hlines=only_prompt
    )


def title(both: str) -> str:
    """图里的 "中文|英文" 取中文。"""
    return both.split("|")[0]


def percent(share: float) -> str:
    return f"{share:.1%}"


# ---------------------------------------------------------------- 各节


def cards(metrics: dict, titles: dict[str, str]) -> str:
    shown = [
        ("第一个机器人", metrics["solved_first"]),
        ("只换提示", metrics["handover"]["first"]["prompts"]["known"]),
    ]
    shown += [(f"{title(titles[name])}，最后", solved) for name, solved in metrics["solved"].items()]
    return "".join(f'<div class="card">{escape(name)}<b>{percent(value)}</b></div>' for name, value in shown)


def weeks_table(weeks: list[dict], titles: dict[str, str]) -> str:
    rows = [["几周之后", *(escape(title(each)) for each in titles.values())]]
    for number, week in enumerate(weeks):
        cells = [str(number)]
        for name in titles:
            kept = note(week[name])
            cells.append(
                percent(week[name]["solved"]) + (f' <span class="bad">{kept}</span>' if kept else "")
            )
        rows.append(cells)
    return html_table(rows[0], rows[1:])


def note(week: dict) -> str:
    """没有换上新的：是训练了、没有比过现在的，还是踩（或赞）太少、没有训练。"""
    if week["replaced"]:
        return ""
    return "没换" if "candidate_solved" in week else "没训练"


def labels_table(weeks: list[dict], titles: dict[str, str]) -> str:
    rows = [["", "点击", "点击点对的", "挑出的标签", "标签对的"]]
    for name, shown in titles.items():
        those = [week[name] for week in weeks[1:]]
        n_votes, n_labels = (sum(its[key] for its in those) for key in ("n_votes", "n_labels"))
        right_votes = sum(its["n_votes"] * its["vote_accuracy"] for its in those) / max(1, n_votes)
        right_labels = sum(its["n_labels"] * its["label_accuracy"] for its in those) / max(1, n_labels)
        rows.append(
            [
                escape(title(shown)),
                f"{n_votes:,}",
                percent(right_votes),
                f"{n_labels:,}",
                percent(right_labels),
            ]
        )
    return html_table(rows[0], rows[1:])


def talk_table(weeks: list[dict], arm: str, golden: list[dict]) -> str:
    asked = watched(golden)
    stories, rows = [], [["几周之后"]]
    for place, n in enumerate(asked, 1):
        said = [f"{SAID[turn['role']]}：{escape(turn['content'])}" for turn in golden[n]["messages"]]
        stories.append(
            f'<p class="faint">第 {place} 题　{"　".join(said)}（{escape(golden[n]["answer"])}）</p>'
        )
        rows[0].append(f"第 {place} 题")
    for number, week in enumerate(weeks):
        cells = [str(number)]
        for n in asked:
            said = week[arm]["watched"][str(n)]
            css = "good" if said["solved"] else "bad"
            cells.append(f'<span class="{css}">{escape(printable(said["text"])) or "（没有说话）"}</span>')
        rows.append(cells)
    return "".join(stories) + html_table(rows[0], rows[1:], css="talk")


def handover_table(found: dict) -> str:
    rows = [["", "解决", "加学过的提示", "加没见过的提示", "转人工", "转了以后解决", "白转"]]
    for name, shown in (("first", "第一个机器人"), ("last", "最后的机器人")):
        its = found[name]
        cells = [its["prompts"][prompt] for prompt in ("none", "known", "unknown")]
        cells += [its["handover_none"][key] for key in ("handed", "solved", "wasted")]
        rows.append([shown, *map(percent, cells)])
    return html_table(rows[0], rows[1:])


def poison_section(found: dict) -> str:
    rows = [["", "颜色的题解决了", "说「火红」的", "换上吗"]]
    for name, shown in DEFENCES.items():
        its = found[name]
        verdict = {True: "换上", False: "不换"}.get(its.get("replaced"), "")
        rows.append([shown, percent(its["color_solved"]), percent(its["pushed"]), verdict])
    named = "、".join(f"{escape(each['user'])}（{each['votes']} 次）" for each in found["suspects"])
    more = [["另开几个账号", "数票：颜色的标签反了几成", "按信用：反了几成", "认出", "冤枉"]]
    for accounts, its in found["accounts"].items():
        shares = [percent(its["wrong_majority"]), percent(its["wrong_weighted"])]
        more.append([accounts, *shares, str(its["caught"]), str(its["accused"])])
    return (
        f"<section><h2>第 {found['week']} 周，有人捣乱</h2><p>一个人要机器人见了颜色就说「火红」。"
        f"点得超过上限的：{named or '没有'}。</p>"
        f"{html_table(rows[0], rows[1:])}<p>他另开许多账号，个个不超上限：</p>"
        f"{html_table(more[0], more[1:])}</section>"
    )
