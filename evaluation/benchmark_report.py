"""一页看完：把所有结果文件读成一个网页，谁好、好多少、确不确定，和上次比哪里退步了。

你会学到
  1. 一张表里每个数都要有区间；两个模型比，要在同样的题上成对地比：差的区间不含 0，才说谁好。
  2. 雷达图好看而容易骗人：轴的次序一换，面积就变。所以它只画总览，结论在表里。
  3. 平均分会盖住一切：赢的题、输的题、都对都错的题各有多少（胜负矩阵），答案摆在一起看（样本）。
  4. 退步要点名：和上次的结果成对比，哪个模型、哪套题、哪个分，确定变差了就说出来，--fail_on_regression 让流水线停下。

怎么运行
  python benchmark_report.py                                     # 读这里 outputs/tiny 里各脚本的结果
  python benchmark_report.py --results 一个文件夹 另一个文件夹     # 自己的结果文件（写法见 results.py）
  python benchmark_report.py --baseline sft --before 上次的/snapshot.json --fail_on_regression

应当看到：终端里一张表，report.html 里有同一张表、雷达图、胜负矩阵、样本；再跑一次别的脚本、改了模型之后，再运行它，
"和上次比"里列出每一处变化。

参考：Miller 2024（arXiv 2411.00640，评测的误差线，成对比较）；Efron 1979（bootstrap）。
"""

from nlp_common.base.cli import run_main

import hashlib
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from benchmark_page import page
from nlp_common.base.arguments import COUNT, option, parse_arguments
from nlp_common.base.errors import UserError
from nlp_common.base.intervals import Interval, paired_difference
from nlp_common.base.runs import check_writable, write_json, write_text
from nlp_common.data.rows import check_path
from results import FORMAT, find_results, is_neutral, lower_is_better, same_questions, shown

HOME = Path(__file__).resolve().parent
FIRST = "benchmarks_mc.py"  # 一个结果也没有时，先跑这一个
WRITERS = (
    "benchmarks_mc.py",
    "ifeval_zh.py",
    "diversity_evaluation.py",
    "judge_arena.py",
    "code_eval.py",
    "bias_scan.py",
)


@dataclass
class ReportSettings:
    preset: Literal["tiny", "full"] = option("读哪个预设的结果：outputs/tiny 还是 outputs/full", "tiny")
    results: list[str] = field(
        default_factory=list,
        metadata={"help": "结果文件，或放着它们的文件夹，可以几个；默认是 outputs/<预设>"},
    )
    output_dir: str | None = option("网页写到哪个文件夹；默认 outputs/<预设>/benchmark_report")
    baseline: str | None = option("和哪个模型比；默认是结果最多的那个")
    before: str | None = option("和哪一次比：那次的 snapshot.json；默认是上一次运行留下的")
    fail_on_regression: bool = option("有确定的退步就以退出码 1 结束，给流水线用", False)
    samples: int = option("每套题摆出几道答得不一样的题", 6, limits=COUNT)
    seed: int = option("bootstrap 的种子", 0)


# ---------------------------------------------------------------- 全貌


def main(argv: list[str] | None = None) -> dict:
    settings = parse_arguments(ReportSettings, argv)
    out = Path(settings.output_dir or HOME / "outputs" / settings.preset / "benchmark_report").expanduser()
    check_writable(out)  # 写错了，不必等几分钟才知道
    check_path(settings.before, "--before")
    results = name_apart(load_results(settings))
    baseline = pick_baseline(results, settings.baseline)
    rows = score_table(results, baseline, settings.seed)
    before = remember(out, results, settings.before)
    changes = compare_with(before, results, settings.seed)
    print_table(rows, baseline)
    print_changes(changes, before)
    samples = {name: disagreements(group, settings.samples) for name, group in by_benchmark(results).items()}
    wins = win_matrix(results, settings.seed)
    write_text(out / "report.html", page(results, baseline, rows, wins, samples, changes))
    print(f"\n网页：{(out / 'report.html').resolve()}（用浏览器打开，不用联网）")
    regressions = [change for change in changes if change["kind"] == "worse"]
    if regressions and settings.fail_on_regression:
        print(
            f"有 {len(regressions)} 处确定的退步（--fail_on_regression）：见上面写着“退步”的几行。",
            file=sys.stderr,
        )
        sys.exit(1)
    return {"results": len(results), "rows": rows, "changes": changes, "wins": wins}


def load_results(settings: ReportSettings) -> list[dict]:
    """--results 给的，没给就是这个预设下各脚本写的；一个也没有就先跑一个脚本，并说出来。"""
    if settings.results:
        found = find_results([Path(place).expanduser() for place in settings.results])
        if not found:
            raise UserError(f"{'、'.join(settings.results)} 里没有结果文件（…/results/*.json）。")
        return found
    home = HOME / "outputs" / settings.preset
    found = find_results([home]) if home.is_dir() else []
    if not found:
        print(
            f"还没有结果，先运行 {FIRST} --preset {settings.preset}（别的脚本也会写结果：{'、'.join(WRITERS[1:])}）…",
            flush=True,
        )
        code = subprocess.run([sys.executable, str(HOME / FIRST), "--preset", settings.preset]).returncode
        if code:
            raise UserError(
                f"{FIRST} 没有跑完（退出码 {code}）：照上面说的改好再来，或用 --results 给出结果文件。"
            )
        found = find_results([home])
    return found


def name_apart(results: list[dict]) -> list[dict]:
    """同一个模型在同一套题上有几个结果（几个种子）：名字后面加上种子；还分不开是 UserError，说出哪两个文件。"""
    seen: dict[tuple, dict] = {}
    for result in results:
        key = (result["benchmark"], result["model"])
        same = [each for each in results if (each["benchmark"], each["model"]) == key]
        label = f"{result['model']}（种子 {result['seed']}）" if len(same) > 1 else result["model"]
        if other := seen.get((result["benchmark"], label)):
            raise UserError(
                f"{other['path']} 与 {result['path']} 都是 {label} 在 {result['benchmark']} 上的结果：用 --results 只给一个。"
            )
        seen[(result["benchmark"], label)] = result | {"model": label}
    return list(seen.values())


def pick_baseline(results: list[dict], wanted: str | None) -> str:
    models = [result["model"] for result in results]
    if wanted is None:
        return max(dict.fromkeys(models), key=models.count)
    if wanted not in models:
        raise UserError(f"结果里没有 --baseline {wanted}；有的是：{'、'.join(dict.fromkeys(models))}。")
    return wanted


def by_benchmark(results: list[dict]) -> dict[str, list[dict]]:
    groups: dict[str, list[dict]] = {}
    for result in results:
        groups.setdefault(result["benchmark"], []).append(result)
    return groups


def main_score(result: dict) -> str:
    """一套题的主要的分：头一道有分的题（没有结论的题没有分）的第一个。"""
    return next((name for each in result["items"] for name in each["scores"]), next(iter(result["scores"])))


# ---------------------------------------------------------------- 表：每个数有区间，与 baseline 成对比


def score_table(results: list[dict], baseline: str, seed: int) -> list[dict]:
    """一行是一套题的一个分：``{"benchmark", "score", "models": {模型: {"value", "low", "high", "n", "gap", "verdict"}}}``。

    gap 是与 baseline 在同样的题上的差（Interval 的各项），没有共同的题就没有；verdict 是 better、worse 或空。
    """
    rows = []
    for benchmark, group in by_benchmark(results).items():
        base = next((each for each in group if each["model"] == baseline), None)
        for score in dict.fromkeys(name for result in group for name in result["scores"]):
            cells = {}
            for result in group:
                if score not in result["scores"]:
                    continue
                cell = dict(result["scores"][score])
                if base is not None and result is not base:
                    cell |= compare_pair(result, base, score, seed)
                cells[result["model"]] = cell
            is_main = score == main_score(group[0])
            rows.append({"benchmark": benchmark, "score": score, "main": is_main, "models": cells})
    return rows


def compare_pair(ours: dict, theirs: dict, score: str, seed: int) -> dict:
    """同样的题上，ours 减 theirs：``{"gap": {...}, "verdict": "better"|"worse"|""}``；没有共同的题是空的。"""
    a, b = same_questions(ours, theirs, score)
    if not a:
        return {}
    gap = paired_difference(a, b, seed)
    return {
        "gap": {"value": gap.value, "low": gap.low, "high": gap.high, "n": gap.n},
        "verdict": verdict(gap, score),
    }


def verdict(gap: Interval, score: str) -> str:
    """差的区间含 0（不知道），或这个分不分好坏：是空的。"""
    if not gap.is_sure or is_neutral(score):
        return ""
    return "better" if (gap.value > 0) != lower_is_better(score) else "worse"


# ---------------------------------------------------------------- 胜负矩阵与样本


def win_matrix(results: list[dict], seed: int) -> dict[str, dict]:
    """每套题主要的分：一行的模型在多少题上胜过一列的（平局算半个），与 0.5 的差确不确定。

    → ``{题: {行: {列: {"win", "tie", "low", "high", "n"}}}}``。
    """
    matrix: dict[str, dict] = {}
    for benchmark, group in by_benchmark(results).items():
        if len(group) < 2:
            continue
        score = main_score(group[0])
        sign = -1 if lower_is_better(score) else 1
        matrix[benchmark] = {}
        for ours in group:
            row = matrix[benchmark][ours["model"]] = {}
            for theirs in group:
                a, b = same_questions(ours, theirs, score)
                if ours is theirs or not a:
                    continue
                points = [0.5 if x == y else float(sign * (x - y) > 0) for x, y in zip(a, b, strict=True)]
                gap = paired_difference(points, [0.5] * len(points), seed)
                ties = sum(x == y for x, y in zip(a, b, strict=True)) / len(a)
                row[theirs["model"]] = {
                    "win": gap.value + 0.5, "tie": ties, "low": gap.low + 0.5, "high": gap.high + 0.5, "n": gap.n,
                }  # fmt: skip
    return matrix


def disagreements(group: list[dict], most: int) -> list[dict]:
    """各模型主要的分差得最多的几道题，带各自的答案；只有一个模型时是它分最低的几道。"""
    score = main_score(group[0])
    answers: dict[str, dict[str, dict]] = {}  # 题 → 模型 → 那一项
    for result in group:
        for each in result["items"]:
            answers.setdefault(each["id"], {})[result["model"]] = each
    spread = {}
    for id, said in answers.items():
        values = [each["scores"][score] for each in said.values() if score in each["scores"]]
        if len(said) == len(group) and values:
            spread[id] = max(values) - min(values) if len(group) > 1 else -values[0]
    chosen = sorted(spread, key=lambda id: -spread[id])[:most]
    return [{"id": id, "score": score, "said": answers[id]} for id in chosen]


# ---------------------------------------------------------------- 和上次比


def remember(out: Path, results: list[dict], given: str | None) -> dict | None:
    """记下这次的分，返回要比的那一次；这次与上次一模一样，比的还是上上次：多运行一遍，变化不会不见。"""
    wanted = read_snapshot(Path(given).expanduser()) if given else None  # 先读：给的可能就是要改写的那一个
    out.mkdir(parents=True, exist_ok=True)
    now = snapshot_of(results)
    last = read_snapshot(out / "snapshot.json") if (out / "snapshot.json").exists() else None
    if last is not None and last["digest"] != now["digest"]:
        write_json(out / "before.json", last)
    write_json(out / "snapshot.json", now)
    if wanted:
        return wanted
    return read_snapshot(out / "before.json") if (out / "before.json").exists() else None


def snapshot_of(results: list[dict]) -> dict:
    """各题的分，不带题目和答案；digest 认得出两次是不是一样。"""
    kept = [
        {name: result[name] for name in ("benchmark", "model", "model_id", "seed", "date")}
        | {"items": [{"id": each["id"], "scores": each["scores"]} for each in result["items"]]}
        for result in results
    ]
    content = json.dumps([{k: v for k, v in each.items() if k != "date"} for each in kept], sort_keys=True)
    return {"format": FORMAT, "digest": hashlib.sha256(content.encode()).hexdigest(), "results": kept}


def read_snapshot(path: Path) -> dict:
    try:
        snapshot = json.loads(path.read_text(encoding="utf-8"))
        if snapshot["format"] == FORMAT and isinstance(snapshot["results"], list):
            return snapshot
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} 读不出来（{error}）：要一次报告留下的 snapshot.json。删掉它，或换一个 --before。"
        ) from error
    raise UserError(f"{path} 不是报告留下的 snapshot.json。")


def compare_with(before: dict | None, results: list[dict], seed: int) -> list[dict]:
    """同名的模型、同一套题、同一个分，与上次在同样的题上成对比；变了的各一行，退步的在前。

    kind：worse 确定退步，better 确定进步，unsure 变了而区间含 0，new 上次没有，gone 这次没有。
    """
    if before is None:
        return []
    earlier = {(each["benchmark"], each["model"]): each for each in before["results"]}
    changes = []
    for result in results:
        old = earlier.pop((result["benchmark"], result["model"]), None)
        where = {"benchmark": result["benchmark"], "model": result["model"]}
        if old is None:
            changes.append(where | {"kind": "new", "score": ""})
            continue
        for score in dict.fromkeys(name for each in result["items"] for name in each["scores"]):
            now, then = same_questions(result, old, score)
            if not now or now == then:
                continue
            gap = paired_difference(now, then, seed)
            changes.append(
                where
                | {
                    "score": score,
                    "kind": verdict(gap, score) or "unsure",
                    "before": sum(then) / len(then),
                    "now": sum(now) / len(now),
                }
                | {"low": gap.low, "high": gap.high, "n": gap.n}
            )
    changes += [{"benchmark": b, "model": m, "kind": "gone", "score": ""} for b, m in earlier]
    order = ("worse", "better", "unsure", "gone", "new")
    return sorted(changes, key=lambda change: order.index(change["kind"]))


# ---------------------------------------------------------------- 终端


def print_table(rows: list[dict], baseline: str) -> None:
    print(f"▲▼ 是与 {baseline} 在同样的题上成对比，差的 95 % 区间不含 0")
    for row in rows:
        print(
            f"\n{row['benchmark']} · {row['score']}"
            + ("（越小越好）" if lower_is_better(row["score"]) else "")
        )
        for model, cell in row["models"].items():
            mark = {"better": "▲", "worse": "▼"}.get(cell.get("verdict", ""), " ")
            gap = cell.get("gap")
            against = f"　差 {gap['value']:+.3f}（{gap['low']:+.3f} 到 {gap['high']:+.3f}）" if gap else ""
            print(
                f"  {mark} {model:<12}{cell['value']:8.3f}（{shown(cell['low'])}–{shown(cell['high'])}，n={cell['n']}）{against}"
            )


def print_changes(changes: list[dict], before: dict | None) -> None:
    if before is None:
        print("\n第一次运行，没有上次可比。")
        return
    print("\n和上次比：" + ("一样。" if not changes else ""))
    names = {"worse": "退步", "better": "进步", "unsure": "变了，不确定", "new": "新的", "gone": "这次没有"}
    for change in changes:
        line = f"  {names[change['kind']]}　{change['benchmark']} · {change['model']}"
        if "now" in change:
            line += f" · {change['score']}　{change['before']:.3f} → {change['now']:.3f}（差 {change['low']:+.3f} 到 {change['high']:+.3f}，n={change['n']}）"
        print(line)


if __name__ == "__main__":
    run_main(main)
