"""擂台的结果：印在终端里的几张表，三张图，结果文件。"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from judges import points_of
from matches import Match, turn_quality
from nlp_common.base.console import padded
from nlp_common.base.intervals import Interval
from nlp_common.base.runs import write_text
from nlp_common.draw.plots import bar_chart, line_chart
from results import item, write_result

if TYPE_CHECKING:
    from contamination import Overlap
    from judge_arena import ArenaSettings

PAPERS = {"right": "对的比错的", "same": "一样的，排在前面的", "wordy": "啰嗦的比不啰嗦的"}


def text(score: dict | None, digits: int = 3) -> str:
    """{"value", "low", "high", …} → 0.812（0.780–0.840）"""
    if score is None:
        return "没有结论"
    value, low, high = (f"{score[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value}（{low}–{high}）"


def show(metrics: dict) -> None:
    show_judges(metrics)
    print(f"\n排名（Bradley–Terry，{metrics['games']} 局；区间由重抽题得来，95 %）")
    print(
        "  "
        + padded("模型", 12)
        + padded("分", 24)
        + padded("区间多宽", 10)
        + padded("一局局重抽", 12)
        + "Elo 洗牌之后"
    )
    for name, row in sorted(metrics["ratings"].items(), key=lambda each: -each[1]["value"]):
        print(
            "  " + padded(name, 12) + padded(text(row, 0), 24)
            + padded(f"{row['width']:.0f}", 10) + padded(f"{row['width_by_game']:.0f}", 12)
            + f"{row['elo_lowest']:.0f} 到 {row['elo_highest']:.0f}"
        )  # fmt: skip
    print(
        f"  Elo：同样的对局只换次序，分的标准差 {metrics['elo_order_sd']:.1f}，第一名换了人的有 {metrics['elo_another_first']:.0%}"
    )
    difference = metrics["max_difference_to_choix"]
    print("  " + ("没有装 choix，没有比" if difference is None else f"与 choix 的最大差 {difference:.0e}"))

    print("\n一对一（前面的赢多少；平算半个）")
    print(
        "  "
        + padded("一对", 16)
        + padded("胜率", 24)
        + padded("长度控制的胜率", 24)
        + padded("多几个字", 10)
        + "要几道题才 95 % 拿得准"
    )
    for name, row in metrics["pairs"].items():
        print(
            "  " + padded(name, 16) + padded(text(row["win_rate"]), 24) + padded(text(row["lc"]), 24)
            + padded(f"{row['chars_more']:+.1f}", 10) + (str(row["enough"]) if row["enough"] else "3000 道还不够")
        )  # fmt: skip
    print(
        f"  两个一样强的，200 局：最后检验一次，误报 {metrics['false_alarms_once']:.3f}；"
        f"每局看一眼、显著就停，误报 {metrics['false_alarms_peeking']:.3f}"
    )
    show_world(metrics)
    if "by_truth" not in metrics:
        return
    print("\n模拟：偏爱长回答的评判，我方平均长四成五")
    for truth, row in metrics["by_truth"].items():
        print(
            f"  真相 {truth}：原始 {row['raw']:.3f}（±{row['raw_sd']:.3f}），长度控制 {row['lc']:.3f}（±{row['lc_sd']:.3f}）"
        )


def show_judges(metrics: dict) -> None:
    print(
        f"没有结论 {metrics['no_verdict_rate']:.1%}；换了次序就换了说法 {metrics['disagree_with_itself']:.1%}；"
        f"排在前面的平均得 {text(metrics['first_points'])}"
    )
    print("\n考一考评判（0.5 是不偏；第一栏越高越好）")
    print("  " + padded("评判", 16) + "".join(padded(title, 24) for title in PAPERS.values()))
    for name, row in metrics["exam"].items():
        print("  " + padded(name, 16) + "".join(padded(text(row[paper]), 24) for paper in PAPERS))


def show_world(metrics: dict) -> None:
    if "turns" not in metrics:
        return
    print("\n两轮的题（程序评分）")
    titles = {
        "turn1": "第一问",
        "turn2": "第二问",
        "turn2_after_right": "第一问答对的",
        "turn2_after_wrong": "第一问答错的",
    }
    print("  " + padded("模型", 12) + "".join(padded(title, 24) for title in titles.values()))
    for name, row in metrics["turns"].items():
        print(
            "  " + padded(name, 12) + "".join(padded(text(row[k]) if k in row else "—", 24) for k in titles)
        )
    print("\n种下的偏见，量回来（对数胜算）")
    for name, title in (("position", "位置"), ("length", "长度")):
        row = metrics[name]
        print(
            f"  {title}：种下 {row['planted']}，量到 {text(row, 2)}；种 100 遍，区间盖住的有 {row['coverage']:.0%}"
        )
    print("\n同样的回答，换个评判（胜率；最后两栏都想回到“会看错”那一栏）")
    titles = {
        "program_raw": "程序",
        "noisy_raw": "会看错",
        "biased_raw": "会看错又偏长",
        "biased_lc": "长度控制",
        "biased_knowing_quality": "知道质量再控制",
    }
    print("  " + padded("一对", 16) + "".join(padded(title, 16) for title in titles.values()))
    for name, row in metrics["biased"].items():
        print("  " + padded(name, 16) + "".join(padded(f"{row[key]:.3f}", 16) for key in titles))


def draw(folder: Path, metrics: dict) -> None:
    curves = {
        name: ([math.log10(int(n)) for n in row["curve"]], list(row["curve"].values()))
        for name, row in metrics["pairs"].items()
    }
    line_chart(
        folder / "enough.svg",
        curves,
        "几道题才分得出高下|Questions needed",
        "题数（10 的几次方）|log10 questions",
        "拿得准的机会|power",
        hlines={"95 %": 0.95},
    )
    names = list(metrics["ratings"])
    bars = {
        "Bradley–Terry": {name: metrics["ratings"][name]["value"] for name in names},
        "Elo 最低|Elo lowest": {name: metrics["ratings"][name]["elo_lowest"] for name in names},
        "Elo 最高|Elo highest": {name: metrics["ratings"][name]["elo_highest"] for name in names},
    }
    title = "同样的对局，换个次序|Same games, other orders"
    bar_chart(folder / "ratings.svg", bars, title, "模型|model", "分|rating", digits=0)
    if "by_truth" not in metrics:
        return
    truths = metrics["by_truth"]
    bars = {
        "真相|truth": {truth: float(truth) for truth in truths},
        "原始胜率|raw": {truth: row["raw"] for truth, row in truths.items()},
        "长度控制|length-controlled": {truth: row["lc"] for truth, row in truths.items()},
    }
    title = "长度控制（模拟）|Length control (simulated)"
    bar_chart(folder / "length.svg", bars, title, "真相|truth", "胜率|win rate", digits=3)


# ---------------------------------------------------------------- 结果文件


def write_all(
    folder: Path,
    questions: list[dict],
    answers: dict[str, list[list[dict]]],
    ids: dict[str, str],
    matches: list[Match],
    metrics: dict,
    settings: ArenaSettings,
    leaked: dict[str, Overlap],
) -> None:
    """图；每一次评判一行；每个模型一个结果文件（benchmark_report.py 读它）。"""
    draw(folder, metrics)
    write_games(folder / "games.jsonl", matches)
    for name in answers:
        row = metrics["ratings"][name]
        write_result(
            folder,
            "judge_arena",
            name,
            result_items(name, questions, answers[name], matches),
            model_id=ids[name],
            seed=settings.seed,
            settings={
                "judge": metrics["judge"],
                "temperature": settings.temperature,
                "against": [other for other in answers if other != name],
            },
            scores={"rating": Interval(row["value"], row["low"], row["high"], row["stderr"], row["n"])},
            leaked=leaked,
        )


def write_games(path: Path, matches: list[Match]) -> None:
    """每一次评判：哪道题、第几问、两个回答、两种次序各说什么、a 得几分。"""
    lines = []
    for match in matches:
        for ask, verdicts in zip(match.asks, match.verdicts, strict=True):
            game = {"id": ask.question["id"], "turn": ask.turn + 1, "a": match.a, "b": match.b}
            game |= {"answer_a": ask.first[ask.turn], "answer_b": ask.second[ask.turn]}
            game |= {"verdicts": verdicts, "points": points_of(verdicts)}
            lines.append(json.dumps(game, ensure_ascii=False))
    write_text(path, "\n".join(lines) + "\n")


def result_items(
    name: str, questions: list[dict], answers: list[list[dict]], matches: list[Match]
) -> list[dict]:
    """一个模型在各道题上的分：对各个对手的平均得分；小世界的题还有两问各自的程序分。"""
    points: dict[str, list[float]] = {}
    for match in matches:
        if name in (match.a, match.b):
            for question, value in match.by_question().items():
                points.setdefault(question, []).append(value if name == match.a else 1 - value)
    items = []
    for question, replies in zip(questions, answers, strict=True):
        turns, scores = question["turns"], {}
        if question["id"] in points:
            scores["win_rate"] = sum(points[question["id"]]) / len(points[question["id"]])
        if "slot" in turns[0]:
            scores |= {f"turn{turn + 1}": turn_quality(question, replies, turn) for turn in range(len(turns))}
        prompt, answer = "\n".join(t["ask"] for t in turns), "\n".join(r["text"] for r in replies)
        right = "\n".join(turn.get("sentence") or turn.get("right", "") for turn in turns)
        items.append(item(question["id"], scores, prompt, answer, right))
    return items
