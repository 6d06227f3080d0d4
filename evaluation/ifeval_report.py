"""ifeval_zh.py 给人看的：终端里的表、例子，和图。"""

from __future__ import annotations

from pathlib import Path

from instruction_prompts import say
from nlp_common.draw.plots import bar_chart
from reward_gaming import REWARDS


def print_scores(metrics: dict) -> None:
    judged = "right" in next(iter(metrics["models"].values()))
    print(f"\n{metrics['n']} 道题，95 % 区间（题与要求：严格 / 宽松；换题：回答换到别的题上还合格）")
    for name, found in metrics["models"].items():
        print(f"  {name}")
        print(f"    题    {shown(found['prompt_strict'])} / {shown(found['prompt_loose'])}")
        print(f"    要求  {shown(found['instruction_strict'])} / {shown(found['instruction_loose'])}")
        print(f"    换题  {shown(found['unread'])}，高出 {shown(found['read_gap'], sign=True)}")
        if judged:
            print(f"    答对  {shown(found['right'])}，又合格又对 {shown(found['both'])}")
        if name in metrics["gap"]:
            print(f"    比第一个模型，题（严格）{shown(metrics['gap'][name]['prompt_strict'], sign=True)}")
    if "program_strict" in metrics:
        print(f"  程序写的套话：题（严格）{metrics['program_strict']:.3f}，每道题都做得到")


def shown(found: dict, sign: bool = False) -> str:
    form = "+.3f" if sign else ".3f"
    return f"{found['value']:{form}}（{found['low']:{form}} 到 {found['high']:{form}}，n={found['n']}）"


def print_instructions(kinds: dict) -> None:
    names = [name for name in next(iter(kinds.values())) if name != "n"]
    print(f"\n{'要求':<44}{'几条':>4}  " + "  ".join(names))
    for id, found in kinds.items():
        rates = "  ".join(f"{found[name]['value']:>{max(5, len(name))}.2f}" for name in names)
        print(f"{id:<46}{found['n']:>4}  {rates}")


def told(row: dict) -> str:
    return "；".join(
        say(id, kwargs) for id, kwargs in zip(row["instruction_id_list"], row["kwargs"], strict=True)
    )


def print_examples(rows: list[dict], answers: dict, scored: dict, n: int = 3) -> None:
    for place in range(min(n, len(rows))):
        print(f"\n要求：{told(rows[place])}")
        for name, (_, said) in answers.items():
            marks = "".join("√" if each else "×" for each in scored[name][place]["strict"])
            print(f"  {name}　{marks}　{said[place]['text'][:60]!r}")
    print()


def pick_examples(rows: list[dict], answers: dict, scored: dict, n: int = 4) -> list[dict]:
    """给图挑几道题：钻了空子的合格却答错了，要求各不相同。"""
    first, form, both = (
        next(name for name in answers if name.endswith(end)) for end in ("", "+form", "+both")
    )
    picked: dict[str, dict] = {}
    for place, row in enumerate(rows):
        gamed = scored[form][place]["prompt_strict"] and not scored[form][place]["right"]
        if gamed and told(row) not in picked and len(picked) < n:
            who = {"训练前": first, REWARDS["form"]: form, REWARDS["both"]: both}
            texts = {label: answers[name][1][place]["text"] for label, name in who.items()}
            picked[told(row)] = {"asks": told(row), "right": row["question"]["answer"], "answers": texts}
    return list(picked.values())


def draw_scores(path: Path, models: dict[str, dict]) -> None:
    titles = {
        "prompt_strict": "要求全合格|all followed",
        "unread": "换到别的题上|on other prompts",
        "right": "答对|right",
    }
    bars = {
        title: {name: found[score]["value"] for name, found in models.items() if score in found}
        for score, title in titles.items()
    }
    bars = {title: each for title, each in bars.items() if each}
    bar_chart(path, bars, "读了要求没有，答对没有|Followed, unread, right", "", "题的比例|share of prompts")
