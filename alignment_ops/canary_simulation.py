"""灰度的检验准不准：知道真相的模拟，量它错退多少、真坏的几次请求就退、平常的检验错在哪里。

你会学到
  1. 同样好的版本，每来一个用户就看一眼 p 值，看得越久冤枉得越多；只看最后一次不冤枉，可坏版本也要跑到最后才退。
  2. 打赌的检验（canary.py）看几眼都不超过 5 %，不靠任何近似；mSPRT 也可以天天看，它靠正态近似，要先看一批才作数。
  3. 把常客的几百次请求当成几百份证据，什么检验也守不住：分组的单位就是分析的单位。
  4. 灰度一路加大、题一路变难，直接比两边的总数就歪了（Simpson 悖论）；按到来的次序配组再比不会。
  5. 坏得越多退得越快：需要的用户数大致与差的平方成反比，而且不用事先知道差多大。

怎么运行
  python canary_simulation.py                    # 一两分钟
  python canary_simulation.py --rate 0.05        # 老版本二十次坏一次
  python canary_simulation.py --alpha 0.01 --runs 5000

应当看到（实测见本文件夹的 README.md）：每来一个就看一眼，一样好的四次里退掉一次多；打赌的不到 5 %；多坏两成的，新版本答一百来次就退了。

参考：见 canary.py。
"""

from nlp_common.base.cli import run_main

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np

from canary import RAMP, Canary, gain_if_worse, run_canary, share_at, wealth
from nlp_common.base.arguments import COUNT, Limits, option
from nlp_common.base.console import padded
from nlp_common.base.intervals import proportion_interval
from nlp_common.draw.plots import line_chart
from nlp_common.train.lesson import run_lesson
from nlp_common.train.settings import LessonSettings, parse_settings
from nlp_common.train.stage import Stage
from traffic import Request, arm_of, visits

HOME = Path(__file__).resolve().parent
SIZES = {"runs": 2000, "groups": 1000, "canaries": 100, "requests": 4000}
PRESETS = {"tiny": SIZES, "full": SIZES | {"runs": 20_000, "canaries": 1000}}
CONTROLS = 9  # 灰度给一成用户：每个用新版本的，配九个用老版本的
WARM_UP = 20  # 平常的检验至少看到这么多组才下结论
EVERY = 50
SPREAD = 0.1  # mSPRT 先猜差有多大：半个正态分布的标准差
HARMS = (0.02, 0.05, 0.1, 0.2, 0.5)
KINDS = ("容易", "难")  # 常客的模拟：有的用户总问容易的，有的总问难的
HARD = 0.6  # 难的题坏的比例


@dataclass
class CanarySettings(LessonSettings):
    rate: float = option("老版本坏的比例", 0.15, Limits(above=0, below=0.5))
    alpha: float = option("错退最多多少", 0.05, Limits(above=0, below=0.5))
    margin: float = option("差多少以内不要紧，可以放开", 0.05, Limits(above=0, below=1))
    runs: int | None = option("错退的比例，模拟多少次", limits=COUNT)
    groups: int | None = option("一次模拟几组（一组一个用新版本的用户）", limits=Limits(at_least=100))
    canaries: int | None = option("带流量的模拟，每种情形几次灰度", limits=COUNT)
    requests: int | None = option("一次灰度最多几次请求", limits=Limits(at_least=100))


# ---------------------------------------------------------------- 1. 从头到尾


def learn(stage: Stage) -> dict:
    settings = stage.settings
    curves = wrongly_rolled_back(settings, settings.rate)
    rare = wrongly_rolled_back(settings, 0.01)
    metrics = {"false_rollbacks": ends(curves), "false_rollbacks_rare": ends(rare)}
    show_wrongly(f"一样好的版本，被退掉的比例（老版本坏 {settings.rate:.0%}）", curves, settings.runs)
    show_wrongly("同上（老版本坏 1%）", rare, settings.runs)
    metrics["heavy_users"] = heavy_users(settings)
    metrics["simpson"] = simpson(settings)
    metrics["users"] = users_until_rollback(settings)
    metrics["harm"] = {f"{harm:g}": canaries_with(harm, settings) for harm in (-0.05, 0.0, *HARMS)}
    show_harms(metrics["harm"], settings)

    def write(folder: Path) -> None:
        draw_wrongly(folder / "canary_false_rollbacks.svg", curves, settings)
        draw_intervals(folder / "canary_intervals.svg", settings)
        draw_users(folder / "canary_users.svg", metrics["users"])

    return stage.save(metrics, {}, write)


# ---------------------------------------------------------------- 2. 一样好的版本，冤枉多少


def wrongly_rolled_back(settings: CanarySettings, rate: float) -> dict[str, np.ndarray]:
    """各种检验：看到第 n 组时，已经把一样好的版本退掉的比例 (组,)。"""
    d = simulated_differences(settings.runs, settings.groups, rate, 0.0, settings.seed)
    z = NormalDist().inv_cdf(1 - settings.alpha)
    place = np.arange(1, settings.groups + 1)
    above = (running_z(d) > z) & (place >= WARM_UP)
    enough = -math.log(settings.alpha)
    return {
        "每组都看": ever(above),
        f"每 {EVERY} 组看一眼": ever(above & (place % EVERY == 0)),
        "只看最后一次": ever(above & (place == settings.groups)),
        "mSPRT": ever((msprt(d) >= enough) & (place >= WARM_UP)),
        "打赌": ever(bets(d) >= enough),
    }


def simulated_differences(runs: int, groups: int, rate: float, harm: float, seed: int) -> np.ndarray:
    """(次, 组)：一个用新版本的坏不坏，减九个用老版本的里坏的比例。"""
    rng = np.random.default_rng(seed)
    new = rng.random((runs, groups)) < rate + harm
    return new - rng.binomial(CONTROLS, rate, (runs, groups)) / CONTROLS


def ever(crossed: np.ndarray) -> np.ndarray:
    """(次, 组) 的"这时越过了界"→ (组,)：到这时越过过的比例。"""
    return np.logical_or.accumulate(crossed, axis=1).mean(0)


def running_z(d: np.ndarray) -> np.ndarray:
    """平常的检验：到第 n 组的均值除以它的标准误。"""
    n = np.arange(1, d.shape[1] + 1)
    total = d.cumsum(1)
    return total / np.sqrt(n * running_variance(d))


def running_variance(d: np.ndarray) -> np.ndarray:
    n = np.arange(1, d.shape[1] + 1)
    total, squares = d.cumsum(1), (d * d).cumsum(1)
    return np.maximum((squares - total**2 / n) / np.maximum(n - 1, 1), 1e-12)


def msprt(d: np.ndarray) -> np.ndarray:
    """mSPRT 的似然比（对数）：差有多大，用半个正态分布（标准差 SPREAD）平均掉；方差用到这时估的。

    ∫₀^∞ 2φ(θ/τ)/τ · e^(θS/V − nθ²/2V) dθ = 2 √(V/(V+nτ²)) · e^(τ²S²/(2V(V+nτ²))) · Φ(τS/√(V(V+nτ²)))
    """
    n, variance, total = np.arange(1, d.shape[1] + 1), running_variance(d), d.cumsum(1)
    wider = variance + n * SPREAD**2
    reach = SPREAD * total / np.sqrt(variance * wider)
    return math.log(2) + 0.5 * np.log(variance / wider) + reach**2 / 2 + log_normal_cdf(reach)


def log_normal_cdf(x: np.ndarray) -> np.ndarray:
    """ln Φ(x)。"""
    from scipy.special import log_ndtr

    return log_ndtr(x)


def bets(d: np.ndarray) -> np.ndarray:
    """canary.py 的打赌：到第 n 组的本钱（对数）。"""
    return wealth(gain_if_worse(d, np.float64(0)).cumsum(1))


def ends(curves: dict[str, np.ndarray]) -> dict[str, float]:
    names = ("peek", "peek_50", "once", "msprt", "bets")
    return {name: float(curve[-1]) for name, curve in zip(names, curves.values(), strict=True)}


# ---------------------------------------------------------------- 3. 常客


def heavy_users(settings: CanarySettings) -> dict[str, float]:
    """没有变坏。同样的流量，一次请求算一份，或者一个用户算一份：各错退多少。"""
    kinds = [KINDS[i % 2] for i in range(100)]
    found = {}
    for name, by_request in (("by_request", True), ("by_user", False)):
        wrong = 0
        for run in range(settings.canaries):
            rng = random.Random(f"{settings.seed}-{run}")
            answer = answers(rng, {"容易": settings.rate / 3, "难": HARD}, kinds, 0.0)
            canary = Canary({"unsolved": None}, settings.alpha)  # 不放开，看它退不退
            traffic = visits(kinds, settings.requests, seed=settings.seed * 100_000 + run, loyal=1.0)
            for request in traffic:
                arm = arm_of(request.user, share_at(RAMP, request.number), str(run))
                who = request.number if by_request else request.user
                if canary.see(who, arm, answer(arm, request)) == "rollback":
                    wrong += 1
                    break
        found[name] = wrong / settings.canaries
        told = proportion_interval(wrong, settings.canaries).text()
        print(f"有常客，没有变坏，{'一次请求算一份' if by_request else '一个用户算一份'}：退掉 {told}")
    return found


def answers(
    rng: random.Random, rates: dict[str, float], kinds: list[str], harm: float
) -> Callable[[str, Request], dict[str, float]]:
    """一题坏的比例由它的类定，新版本的再加 harm。"""

    def answer(arm: str, request: Request) -> dict[str, float]:
        rate = rates[kinds[request.question]] + (harm if arm == "canary" else 0.0)
        return {"unsolved": float(rng.random() < rate)}

    return answer


# ---------------------------------------------------------------- 4. 灰度加大，题也变难


def simpson(settings: CanarySettings) -> dict[str, float]:
    """没有变坏，可是题一路变难，灰度一路加大：新版本的请求多在难的时候。直接比总数，与按次序配组比。"""
    pooled, grouped, wrong_pooled, wrong_bets = [], [], 0, 0
    z = NormalDist().inv_cdf(1 - settings.alpha)
    for run in range(settings.canaries):
        rng = random.Random(f"{settings.seed}-drift-{run}")
        canary = Canary({"unsolved": None}, settings.alpha)
        seen: dict[str, list[float]] = {"canary": [], "champion": []}
        for request in visits(["题"], settings.requests, settings.seed * 100_000 + run, new=1.0):
            arm = arm_of(request.user, share_at(RAMP, request.number), str(run))
            rate = settings.rate + 0.3 * request.number / settings.requests  # 越来越难，两边一样
            bad = float(rng.random() < rate)
            seen[arm].append(bad)
            canary.see(request.user, arm, {"unsolved": bad})
        new, old = (np.asarray(seen[arm]) for arm in ("canary", "champion"))
        pooled.append(new.mean() - old.mean())
        error = math.sqrt(new.var() / len(new) + old.var() / len(old))
        wrong_pooled += int(pooled[-1] / error > z)
        grouped.append(canary.tests["unsolved"].harm)
        wrong_bets += canary.decision == "rollback"
    n = settings.canaries
    found = {"pooled_harm": float(np.mean(pooled)), "grouped_harm": float(np.mean(grouped))}
    found |= {"pooled_false_rollbacks": wrong_pooled / n, "grouped_false_rollbacks": wrong_bets / n}
    print(
        f"灰度加大、题变难，没有变坏：直接比总数差 {found['pooled_harm']:+.3f}，退掉 {wrong_pooled / n:.1%}（只看最后一次）；"
        f"配组再比差 {found['grouped_harm']:+.3f}，退掉 {wrong_bets / n:.1%}\n"
    )
    return found


# ---------------------------------------------------------------- 5. 真坏的，几次请求就退


def canaries_with(harm: float, settings: CanarySettings) -> dict[str, float]:
    """新版本坏的比例多 harm：退掉、放开各占多少，中位数是几次请求。"""
    kinds, found = ["题"], []
    for run in range(settings.canaries):
        rng = random.Random(f"{settings.seed}-{harm}-{run}")
        answer = answers(rng, {"题": settings.rate}, kinds, harm)
        canary = Canary({"unsolved": settings.margin}, settings.alpha)
        traffic = visits(kinds, settings.requests, seed=settings.seed * 100_000 + run)
        found.append(run_canary(traffic, answer, canary, salt=str(run)))
    result = {}
    for decision in ("rollback", "release"):
        chosen = [one for one in found if one["decision"] == decision]
        result[decision] = len(chosen) / len(found)
        for name in ("requests", "requests_canary", "users_canary") if chosen else ():
            result[f"{decision}_{name}"] = float(np.median([one[name] for one in chosen]))
    return result


def users_until_rollback(settings: CanarySettings) -> dict[str, dict]:
    """不带流量的模拟：多坏 harm 的，中位数第几个用新版本的用户用过就退；只看一次的要多少个是算出来的。"""
    print("几个人用过新版本才退（中位数）：")
    print("  多坏      打赌    mSPRT   只看一次（事先知道差多大，八成把握）")
    users, enough = {}, -math.log(settings.alpha)
    for harm in (0.05, 0.1, 0.2, 0.3, 0.5):
        d = simulated_differences(min(settings.runs, 300), 1500, settings.rate, harm, settings.seed)
        row = {"bets": bets(d) >= enough, "msprt": msprt(d) >= enough}
        row["msprt"][:, : WARM_UP - 1] = False
        row = {name: float(np.median(first_place(crossed))) for name, crossed in row.items()}
        users[f"{harm:g}"] = row = row | {"fixed": users_needed(harm, settings)}
        print(f"  {harm:+.2f}     {row['bets']:<8.0f}{row['msprt']:<8.0f}{row['fixed']:.0f}")
    print()
    return users


def first_place(crossed: np.ndarray) -> np.ndarray:
    """(次, 组) → 各次第几组越过的；没有越过的是最后一组。"""
    return np.where(crossed.any(1), crossed.argmax(1) + 1, crossed.shape[1])


def users_needed(harm: float, settings: CanarySettings) -> float:
    """只看一次的检验，功效 80 % 要几个用新版本的用户：(z_α + z_0.8)² · 方差 / 差²。"""
    normal, worse = NormalDist(), min(settings.rate + harm, 1.0)
    z = normal.inv_cdf(1 - settings.alpha) + normal.inv_cdf(0.8)
    variance = worse * (1 - worse) + settings.rate * (1 - settings.rate) / CONTROLS
    return z**2 * variance / harm**2


# ---------------------------------------------------------------- 6. 给人看


def show_wrongly(title: str, curves: dict[str, np.ndarray], runs: int) -> None:
    print(f"{title}，看 {len(next(iter(curves.values())))} 组，模拟 {runs} 次：")
    for name, curve in curves.items():
        print(f"  {padded(name, 18)}{proportion_interval(round(curve[-1] * runs), runs).text()}")
    print()


def show_harms(harms: dict[str, dict], settings: CanarySettings) -> None:
    print(f"灰度（{settings.requests} 次请求为限，界限 {settings.margin:g}，每种 {settings.canaries} 次）：")
    print("  多坏      退掉     放开     没定     退：几次请求（其中新版本答的）   放开：几次请求")
    for name, row in harms.items():
        rest = max(0.0, 1 - row["rollback"] - row["release"])
        rolled = (
            f"{row['rollback_requests']:.0f}（{row['rollback_requests_canary']:.0f}）"
            if row["rollback"]
            else "－"
        )
        released = f"{row['release_requests']:.0f}" if row["release"] else "－"
        cells = [f"{value:.1%}" for value in (row["rollback"], row["release"], rest)]
        print(
            f"  {float(name):+.2f}     {''.join(padded(cell, 9) for cell in cells)}{padded(rolled, 33)}{released}"
        )


def draw_wrongly(path: Path, curves: dict[str, np.ndarray], settings: CanarySettings) -> None:
    english = ("looking at every group", f"every {EVERY} groups", "once, at the end", "mSPRT", "betting")
    xs = list(range(1, settings.groups + 1))
    series = {
        f"{name}|{other}": (xs, curve.tolist())
        for (name, curve), other in zip(curves.items(), english, strict=True)
    }
    title = "一样好的新版本，被退掉的比例|A version just as good, rolled back"
    limit = {f"{settings.alpha:.0%}": settings.alpha}
    line_chart(path, series, title, "看到第几组|groups seen", "比例|share", hlines=limit)


def draw_intervals(path: Path, settings: CanarySettings) -> None:
    """两次灰度：一样好的、多坏一成的，区间怎样收窄。"""
    series = {}
    for label, harm in (("一样好|equal", 0.0), ("多坏一成|worse by 0.1", 0.1)):
        canary = Canary({"unsolved": settings.margin}, settings.alpha)
        for d in simulated_differences(1, 600, settings.rate, harm, settings.seed)[0]:
            canary.tests["unsolved"].add(float(d))
        low, high = canary.tests["unsolved"].bounds()
        xs = list(range(1, len(low) + 1))
        chinese, english = label.split("|")
        series[f"{chinese}：下限|{english}, lower"] = (xs, np.maximum(low, -0.3).tolist())
        series[f"{chinese}：上限|{english}, upper"] = (xs, np.minimum(high, 0.3).tolist())
    title = "随时可看的区间：差有多大|Confidence sequence"
    lines = {"不比老版本差|no worse": 0.0, "界限|margin": settings.margin}
    line_chart(path, series, title, "看到第几组|groups seen", "坏的比例之差|difference", hlines=lines)


def draw_users(path: Path, users: dict[str, dict]) -> None:
    xs = [float(harm) for harm in users]
    labels = {
        "bets": "打赌|betting",
        "msprt": "mSPRT",
        "fixed": "只看一次（事先知道差多大）|fixed size, one look",
    }
    series = {label: (xs, [row[name] for row in users.values()]) for name, label in labels.items()}
    title = "坏得越多退得越快：几个人用过新版本|Users of the new version before it is rolled back"
    line_chart(path, series, title, "多坏多少|harm", "用户（中位数）|users (median)")


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(CanarySettings, PRESETS, argv)
    return run_lesson("canary_simulation", HOME, settings, learn)


if __name__ == "__main__":
    run_main(main)
