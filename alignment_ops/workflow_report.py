"""工作流给人看的：一道门一行，一张总表，两张图。"""

from __future__ import annotations

from pathlib import Path

from candidates import TITLES
from gates import GATES, all_passed
from gates import TITLES as GATE_TITLES
from nlp_common.base.console import padded
from nlp_common.base.intervals import proportion_interval
from nlp_common.draw.figures import render
from nlp_common.draw.plots import line_chart


def chinese(title: str) -> str:
    return title.split("|")[0]


def show_gate(gate: str, tests: dict[str, dict]) -> None:
    told = []
    for test in tests.values():
        mark = "" if test["passed"] else "✗ "
        told.append(
            f"{mark}{test['what']}：{test['new']:.3f}，正在用的 {test['old']:.3f}（p = {test['p']:.2g}）"
        )
    passed = all_passed(tests)
    lead = f"  {padded(chinese(GATE_TITLES[gate]), 10)}{'过' if passed else '没过'}  "
    for number, line in enumerate(told):
        print((lead if number == 0 else " " * 16) + line, flush=True)


def show_canary(name: str, found: dict, version: int, temperature: float) -> None:
    decided = {"release": "发布", "rollback": "退回", "undecided": "流量来完了还没有定：不发布"}[
        found["decision"]
    ]
    print(f"\n灰度：第 {version} 版，温度 {temperature:g}（{name}）")
    print(f"  第 {found['requests']} 次请求{decided}：{in_chinese(found['reason'])}")


def in_chinese(reason: str) -> str:
    return reason.replace("unsolved", "没有解决的").replace("unsafe", "不安全的")


def show(metrics: dict) -> None:
    """总表：停在哪里，换了题以后各停在哪里几次。"""
    print(f"\n  {padded('候选', 12)}{padded('停在', 12)}换了题再走，停在")
    for name, stopped in metrics["stopped_at"].items():
        again = metrics["simulated"][name]
        runs, often = sum(again.values()), sorted(again.items(), key=lambda item: -item[1])
        where = "，".join(f"{shown(stop)} {n}/{runs}" for stop, n in often)
        print(f"  {padded(chinese(TITLES[name]), 12)}{padded(shown(stopped), 12)}{where}")
    print()
    if "good_passes" in metrics:
        runs = sum(metrics["simulated"]["good"].values())
        told = proportion_interval(round(metrics["good_passes"] * runs), runs)
        print(f"  好的候选，过门又在灰度里发布：{told.text()}")
        told = f"退下 {metrics['misdeployed_rolled_back']:.3f}"
        print(f"  温度抄错的：{told}，一半在第 {metrics['misdeployed_requests']:.0f} 次请求之前")
    n = metrics["false_rollbacks_runs"]
    told = proportion_interval(round(metrics["false_rollbacks"] * n), n)
    print(f"  一样好的（正在用的自己），错退 {told.text()}")


def shown(stop: str) -> str:
    return chinese(GATE_TITLES[stop]) if stop in GATES else {"passed": "都过了", "later": "这道也过了"}[stop]


# ---------------------------------------------------------------- 图

PASSED, FAILED, SKIPPED = "#cfe8d5", "#f3c6b5", "#f2f2f2"


def draw(folder: Path, metrics: dict) -> None:
    draw_gates(folder / "workflow_gates.svg", metrics["candidates"])
    if "canary" in metrics:
        draw_canary(folder / "workflow_canary.svg", metrics["canary"])


def draw_gates(path: Path, candidates: dict) -> None:
    """一个候选一行，一道门一列：过了的绿，停下的红，没有量的灰；格子里是每个检验量到的数。"""

    def grid(axes, text) -> None:
        for row, found in enumerate(candidates.values()):
            for column, gate in enumerate(GATES):
                tests = found["gates"].get(gate)
                color = SKIPPED
                if tests:
                    color = PASSED if all_passed(tests) else FAILED
                    told = " / ".join(f"{test['new']:.2f}" for test in tests.values())
                    axes.text(column, row, told, ha="center", va="center", fontsize=8)
                axes.add_patch(Rectangle((column - 0.48, row - 0.44), 0.96, 0.88, color=color, zorder=0))
        axes.set_xticks(range(len(GATES)), [text(GATE_TITLES[gate]) for gate in GATES])
        axes.set_yticks(range(len(candidates)), [text(TITLES[name]) for name in candidates])
        axes.set_xlim(-0.5, len(GATES) - 0.5)
        axes.set_ylim(len(candidates) - 0.5, -0.5)
        axes.tick_params(length=0)
        axes.grid(False)

    from matplotlib.patches import Rectangle

    title = "哪个候选停在哪道门|Which gate stops which candidate"
    render(path, grid, [], (title, "", ""), min_width=48)


def draw_canary(path: Path, canaries: dict) -> None:
    """没有解决的多了多少：量到的与随时可以看的区间，横轴是配成的组。"""
    series = {}
    for name, title in (("good", "好的|good"), ("misdeployed", "温度抄错的|wrong temperature")):
        curve = canaries[name]["curve"]
        series[f"{title.replace('|', '，下限|')}, low"] = (curve["groups"], curve["low"])
        series[f"{title.replace('|', '，上限|')}, high"] = (curve["groups"], curve["high"])
    lines = {"不要紧的界限|margin": canaries["good"]["metrics"]["unsolved"]["margin"], "0": 0.0}
    title = "灰度：没有解决的多了多少|Canary: extra unsolved requests"
    line_chart(path, series, title, "配成的组|groups", "多了多少|difference", hlines=lines)


def curve_of(test) -> dict:
    """一项"坏"的区间随组数怎样变；点太多就隔几个取一个。"""
    low, high = test.bounds() if test.differences else ([], [])
    every = max(1, len(low) // 80)
    places = [*range(0, len(low), every)]
    return {
        "groups": [place + 1 for place in places],
        "low": [float(low[place]) for place in places],
        "high": [float(high[place]) for place in places],
    }
