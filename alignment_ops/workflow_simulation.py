"""换一批题、换一份流量再走一遍：好的候选几次能发布，坏的几次停在自己的门前，一样好的几次被冤枉。

证据是真的模型答的；换题是有放回地重抽，换流量是换一批用户。模型没有重新训练，所以这里的晃动只来自题与用户。
"""

from __future__ import annotations

from collections import Counter
from functools import partial

import numpy as np

from canary import Canary, run_canary
from candidates import STOPS
from gates import GATES, Limits, all_passed, resampled
from traffic import Request, visits

AGAIN = 3  # 错退要量得准些：一样好的多走几倍


def simulate(evidence: dict, limits: Limits, margins: dict, settings) -> dict:
    """→ 每个候选停在哪里的次数，好的发布的比例，一样好的错退的比例，温度抄错的退下的比例与几次请求。"""
    runs, found = settings.simulated_runs, {"simulated": {}, "simulated_right": {}}
    names = [name for name in evidence if "quality" in evidence[name] and name != "champion"]
    for name in names:
        stops = [gates_again(evidence, name, limits, run, settings.seed) for run in range(runs)]
        found["simulated"][name] = dict(Counter(stops))
        found["simulated_right"][name] = stops.count(STOPS[name]) / runs
    champion = evidence["champion"]
    canary = partial(canary_again, old=champion["traffic"], margins=margins, settings=settings)
    if "good" in evidence and "traffic" in evidence["good"]:
        stops = [gates_again(evidence, "good", limits, run, settings.seed) for run in range(runs)]
        decided = [canary(evidence["good"]["traffic"], run=run)["decision"] for run in range(runs)]
        released = [stop == "passed" and each == "release" for stop, each in zip(stops, decided, strict=True)]
        found["good_passes"] = sum(released) / runs
        found["good_rolled_back"] = decided.count("rollback") / runs
        bad = [canary(evidence["misdeployed"]["traffic"], run=run) for run in range(runs)]
        found["misdeployed_rolled_back"] = sum(each["decision"] == "rollback" for each in bad) / runs
        found["misdeployed_requests"] = float(np.median([each["requests"] for each in bad]))
    both = partial(same_outcome, champion["traffic"], champion["again"], list(margins))
    same = [
        one_canary(both, champion["again"]["kinds"], margins, settings, run)["decision"]
        for run in range(AGAIN * runs)
    ]
    found["false_rollbacks"] = same.count("rollback") / len(same)
    found["false_rollbacks_runs"] = len(same)
    found["same_released"] = same.count("release") / len(same)
    return found


def gates_again(evidence: dict, name: str, limits: Limits, run: int, seed: int) -> str:
    """重抽的题上，name 停在哪道门；都过了是 "passed"，量过的都过了（后面的门没有量）是 "later"。"""
    rng = np.random.default_rng([seed, run])
    for gate, judge_gate in GATES.items():
        if gate not in evidence[name]:
            return "later"
        new, old = resampled(gate, evidence[name][gate], evidence["champion"].get(gate, {}), rng)
        if not all_passed(judge_gate(new, old, limits)):
            return gate
    return "passed"


def canary_again(new: dict, old: dict, margins: dict, settings, run: int) -> dict:
    """另一份流量上的一次灰度。"""
    return one_canary(partial(outcome, new, old, list(margins)), new["kinds"], margins, settings, run)


def one_canary(answer, kinds: list[str], margins: dict, settings, run: int) -> dict:
    """第 run 份流量；用户的分组也换一批（salt）。"""
    requests = visits(kinds, settings.requests, seed=1000 * settings.seed + run + 1)
    return run_canary(requests, answer, Canary(margins), salt=f"simulated-{run}")


def outcome(new: dict, old: dict, names: list[str], arm: str, request: Request) -> dict[str, float]:
    """一次请求坏不坏：归哪一边，就看那一边的模型这道题答得怎样。"""
    side = new if arm == "canary" else old
    return {name: side[name][request.question] for name in names}


def same_outcome(first: dict, second: dict, names: list[str], arm: str, request: Request) -> dict[str, float]:
    """两边是同一个模型：它采样过两次，不论哪一边，轮着用，所以两边真的一样好。"""
    side = first if request.number % 2 else second
    return {name: side[name][request.question] for name in names}
