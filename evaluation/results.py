"""结果文件：这个文件夹的每个脚本都写同一种，benchmark_report.py 把它们读成一页。

一个文件是一个模型在一套题上的结果，放在 outputs/<预设>/<脚本>/results/<题>--<模型>.json：

    {"format": "nlp-learning-eval-1", "benchmark": "ifeval_zh", "model": "sft", "model_id": "sft:1f2e…", "seed": 0,
     "settings": {…}, "date": "2026-11-28",
     "scores": {"strict": {"value": 0.62, "low": 0.57, "high": 0.67, "stderr": 0.025, "n": 400}},
     "items": [{"id": "q0001", "prompt": …, "answer": …, "right": …, "group": …, "scores": {"strict": 1.0}}]}

每道题的分都在，所以两个模型可以在同样的题上成对地比，谁错在哪里也看得到。
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nlp_common.base.console import padded, width
from nlp_common.base.errors import UserError
from nlp_common.base.intervals import Interval, mean_interval
from nlp_common.base.runs import RUN_FILE, write_json

if TYPE_CHECKING:
    from contamination import Overlap
    from nlp_common.train.settings import LessonSettings
    from nlp_common.train.stage import Stage

FORMAT = "nlp-learning-eval-1"
# 越小越好的分：名字的最后一段是这些
LOWER_IS_BETTER = {
    "perplexity",
    "bits_per_char",
    "loss",
    "violations",
    "bias",
    "over_refusal",
    "contaminated",
}
# 不分好坏的分：多了少了要看别的（多样性要和对错一起看，选 A 的比例只说偏不偏）
NEUTRAL = {"different", "distinct_1", "distinct_2", "self_bleu", "entropy", "unread", "letter_same"}
NEUTRAL_PREFIXES = ("picks_",)
NEEDED = ("benchmark", "model", "scores", "items")
SHOWN = 4  # 一张表里最多几种分


def run_evaluation(
    name: str, home: Path, settings: LessonSettings, learn: Callable[[Stage], dict], **more: Any
) -> dict:
    """run_lesson；直接用已有的结果时（learn 不运行，它那些表也就不印），印出结果文件里的分。"""
    from nlp_common.train.lesson import result_folder, run_lesson  # 要 torch；只读结果文件的脚本用不着

    folder = result_folder(name, home, settings)
    loaded = (folder / RUN_FILE).exists() and not settings.retrain
    record = run_lesson(name, home, settings, learn, **more)
    if loaded:
        show_saved(folder)
    return record


def show_saved(folder: Path) -> None:
    """结果文件夹里的分：一套题一张表，一个模型一行，头几种分带 95 % 区间。"""
    by_benchmark: dict[str, list[dict]] = {}
    for result in find_results([folder]):
        by_benchmark.setdefault(result["benchmark"], []).append(result)
    for benchmark, results in by_benchmark.items():
        names = dict.fromkeys(name for result in results for name in result["scores"] if not is_neutral(name))
        names = list(names)[:SHOWN]
        rows = [["", *names]]
        for result in results:
            cells = [result["scores"].get(name) for name in names]
            rows.append(
                [result["model"], *("—" if cell is None else Interval(**cell).text() for cell in cells)]
            )
        widths = [max(map(width, column)) + 2 for column in zip(*rows, strict=True)]
        print(f"\n{benchmark}（括号里是 95 % 区间与题数）")
        for row in rows:
            print(("  " + "".join(map(padded, row, widths))).rstrip())
    if by_benchmark:
        print(f"\n每道题的分：{folder / 'results'}；合成一页：python benchmark_report.py")


def item(
    id: str, scores: dict[str, float], prompt: str = "", answer: str = "", right: str = "", group: str = ""
) -> dict:
    """一道题的结果。id 在这套题里不重复；group 是它的类别（学科、指令的种类 …）。"""
    return {
        "id": str(id),
        "prompt": prompt,
        "answer": answer,
        "right": right,
        "group": group,
        "scores": {name: float(value) for name, value in scores.items()},
    }


def write_result(
    folder: Path,
    benchmark: str,
    model: str,
    items: list[dict],
    *,
    model_id: str = "",
    seed: int = 0,
    settings: dict | None = None,
    scores: dict[str, Interval] | None = None,
    leaked: dict[str, Overlap] | None = None,
) -> dict:
    """写一个结果文件到 folder/results，返回它的内容。

    每个分数是各题的均值，区间由 bootstrap；scores 另加整批的分（如整批的 BLEU）。
    leaked 是 contamination.check_questions 查到的：每道题多一个分 contaminated。
    一道题也没有、题的 id 重复、分不是有限的数，是 ValueError：那是脚本写错了。
    """
    if not items:
        raise ValueError(f"{benchmark} 一道题也没有，写不成结果。")
    if len({each["id"] for each in items}) < len(items):
        raise ValueError(f"{benchmark} 的题有重复的 id，两个模型就对不上了。")
    if leaked:
        items = [
            each | {"scores": each["scores"] | {"contaminated": float(leaked[each["id"]].found)}}
            for each in items
        ]
    found: dict[str, Interval] = {}
    for name in dict.fromkeys(name for each in items for name in each["scores"]):
        values = [each["scores"][name] for each in items if name in each["scores"]]
        if not all(map(math.isfinite, values)):
            raise ValueError(f"{benchmark} 的 {name} 里有不是有限的数。")
        found[name] = mean_interval(values, seed)
    result = {
        "format": FORMAT,
        "benchmark": benchmark,
        "model": model,
        "model_id": model_id,
        "seed": seed,
        "settings": settings or {},
        "date": time.strftime("%Y-%m-%d"),
        "scores": {name: plain(each) for name, each in (found | (scores or {})).items()},
        "items": items,
    }
    target = folder / "results"
    target.mkdir(parents=True, exist_ok=True)
    write_json(target / f"{file_name(benchmark)}--{file_name(model)}.json", result)
    return result


def plain(interval: Interval) -> dict:
    """区间 → 写得进 JSON 的：算不出来的（一道题的标准误）是 null，JSON 里没有 NaN。"""
    values = dataclasses.asdict(interval)
    return {name: None if math.isnan(value) else value for name, value in values.items()}


def shown(value: float | None) -> str:
    return "—" if value is None else f"{value:.3f}"


def file_name(name: str) -> str:
    """能当文件名的：路径里的 / 和各系统不许用的字换成 _。"""
    return re.sub(r'[\\/:*?"<>|\s]+', "_", name).strip("._") or "model"


def read_result(path: Path) -> dict:
    """读一个结果文件；不是、不完整、分数不成样子是 UserError，说出哪个文件、缺什么。"""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} 读不出来（{error}）：不是完整的 JSON，请重新运行写出它的脚本。") from error
    if not isinstance(result, dict) or result.get("format") != FORMAT:
        raise UserError(f"{path} 不是结果文件：里面没有 format: {FORMAT}。")
    if missing := [name for name in NEEDED if not result.get(name)]:
        raise UserError(f"{path} 缺 {'、'.join(missing)}，不是完整的结果文件。")
    for name, score in result["scores"].items():
        if not isinstance(score, dict) or not isinstance(score.get("value"), (int, float)):
            raise UserError(f"{path} 的分数 {name} 没有 value。")
    for place, each in enumerate(result["items"], 1):
        if not isinstance(each, dict) or "id" not in each or not isinstance(each.get("scores"), dict):
            raise UserError(f"{path} 的 items 第 {place} 项没有 id 或 scores。")
    return result


def find_results(places: Sequence[Path]) -> list[dict]:
    """places 里（文件，或文件夹里各层的 results/*.json）的全部结果，按题、模型排好；找不到是 UserError。"""
    paths: list[Path] = []
    for place in places:
        if place.is_file():
            paths.append(place)
        elif place.is_dir():
            paths += sorted({*place.glob("**/results/*.json"), *place.glob("*--*.json")})
        else:
            raise UserError(f"没有 {place}：要结果文件，或放着它们的文件夹。")
    results = [read_result(path) | {"path": str(path)} for path in paths if not _is_unfinished(path)]
    return sorted(results, key=lambda result: (result["benchmark"], result["model"]))


def _is_unfinished(path: Path) -> bool:
    """没写完的结果文件夹（.名字.work）里的不算。"""
    return any(part.startswith(".") and part.endswith(".work") for part in path.parts)


def lower_is_better(name: str) -> bool:
    return name.rsplit(".", 1)[-1] in LOWER_IS_BETTER


def is_neutral(name: str) -> bool:
    last = name.rsplit(".", 1)[-1]
    return last in NEUTRAL or last.startswith(NEUTRAL_PREFIXES)


def same_questions(ours: dict, theirs: dict, score: str) -> tuple[list[float], list[float]]:
    """两个结果里都有、都有这个分的题：两边的分，次序相同。"""
    others = {each["id"]: each["scores"] for each in theirs["items"]}
    pairs = [
        (each["scores"][score], others[each["id"]][score])
        for each in ours["items"]
        if score in each["scores"] and score in others.get(each["id"], {})
    ]
    return [a for a, _ in pairs], [b for _, b in pairs]
