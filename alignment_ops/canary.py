"""灰度发布：新版本先给一小部分用户，每来一次请求都看一眼，坏了马上退，够好了就放开。

你会学到
  1. 平常的检验只许看一次。每来一个用户就看一眼、p < 0.05 就退，一样好的版本四次里有一次被冤枉（canary_simulation.py 量给你看）。
  2. 随时可以看的检验是打赌：原假设"不比老版本差"成立时，这场赌不会赢；从 1 块钱开始，赢到 1/α 块的机会不超过 α（Ville 不等式），
     不论看几眼、什么时候停。赢到了，就是老天不该给你的运气：退。
  3. 分组的单位就是分析的单位：用户固定归一边，一个常客的几百次请求是一份证据，不是几百份。这里一个用户只算一次。
  4. 新旧两边按到来的次序配成组再相减：白天容易、晚上难，灰度的比例一路加大，都不会把账算歪。

在程序里
  canary = Canary({"unsolved": 0.05, "unsafe": 0.02, "slow": 0.05})   # 各项"坏"：差多少以内算不要紧（margin）
  decision = canary.see(user, "canary", {"unsolved": 1, "unsafe": 0, "slow": 0})   # 每次请求；坏是 1，好是 0，或中间的数
  # None：接着看；"rollback"：有一项确实变坏了；"release"：每一项都不会坏过 margin
  canary.reason                                    # 一句话：哪一项、差多少、看了多少人
  canary.report()                                  # {"unsolved": {"harm", "low", "high", "users_canary", …}, …}

  found = run_canary(visits(kinds, 5000, seed), answer, canary, salt="assistant-4", log=folder / "canary.jsonl")
  # answer(arm, request) → {"unsolved": …}；→ {"decision": "rollback" | "release" | "undecided", "reason", "requests", …}
  # 每次请求记进 log（JSONL），被 kill -9 以后再来一遍，从下一次请求接着，检验不从头算；ramp：灰度的比例怎样加大

保证（各自，不论看几眼）：不比老版本差的，错退 ≤ alpha；哪一项坏过 margin 的，错放 ≤ alpha。

参考：Ville 1939；Johari et al. 2017（mSPRT，A/B 测试天天看）；Waudby-Smith & Ramdas 2023（打赌估计有界的均值，arXiv 2010.09686）；
Deng et al. 2017（分组的单位与分析的单位）。
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

import numpy as np

import line_log
from nlp_common.base.errors import UserError
from nlp_common.base.runs import differences
from traffic import Request, arm_of

ALPHA = 0.05
RAMP = ((0, 0.1), (500, 0.25), (1500, 0.5))  # 从第几次请求起，给多少用户新版本
MOST = 0.9  # 至多押本钱的几成
BETS = np.geomspace(0.05, MOST, 5)  # 押几成；几种押法各分一份本钱，不必事先猜哪种好
MOST_AIMED = 0.5  # 很少坏的时候，上面的算式押得太多：坏一次输掉的太多
AIMED = 0.8  # 放开的那场赌：几成本钱冲着"一样好"去，余下的分给 BETS
GUESSED, GUESS = 10, 0.25  # 还没有几组的时候，当作有过这么多组，差的平方平均是这么大
DEFAULT_MARGIN = 0.05  # 没有给 margin 的，区间的上限照它押
GRID = np.round(np.arange(-0.5, 0.501, 0.01), 2)  # 区间的两头在这些数里找


# ---------------------------------------------------------------- 1. 打赌


def gain_if_worse(difference: np.ndarray, limit: np.ndarray, stakes: np.ndarray = BETS) -> np.ndarray:
    """原假设"差 ≤ limit"，押"差得更多"：这一组之后，各种押法的本钱变成几倍，取对数 (…, 押法)。

    λ·(d − limit) 的期望 ≤ 0，所以本钱的期望不会涨。d ≥ −1，λ = 成数 / (1 + limit)，最坏也不会输光。
    """
    return np.log1p(stakes / (1 + limit[..., None]) * (difference - limit)[..., None])


def gain_if_better(difference: np.ndarray, limit: np.ndarray, stakes: np.ndarray = BETS) -> np.ndarray:
    """反过来：原假设"差 ≥ limit"，押"差得没有这么多"。"""
    return gain_if_worse(-difference, -limit, stakes)


def aimed_stake(squares: np.ndarray, groups: np.ndarray, margin: float) -> np.ndarray:
    """放开的那场赌，要是新版本与老版本一样好，押几成赢得最快：λ = margin / E[(margin − d)²]，d² 的平均用以前各组的。

    以前的才行：看了这一组再定押多少，就不公平了。
    """
    variance = (squares + GUESSED * GUESS) / (groups + GUESSED)
    return np.minimum(MOST_AIMED, (1 - margin) * margin / (variance + margin**2))


def wealth(gains: np.ndarray, shares: np.ndarray | None = None) -> np.ndarray:
    """几种押法的本钱（对数，(…, 押法)）→ 合起来的本钱（对数）；shares 是各分到几成，没给就平分。"""
    top = gains.max(-1)
    money = np.exp(gains - top[..., None])
    return top + np.log(money.mean(-1) if shares is None else money @ shares)


FINE_SHARES = np.append(np.full(len(BETS), (1 - AIMED) / len(BETS)), AIMED)


class HarmTest:
    """一项"坏"，新版本比老版本多多少。两场赌：它比 tolerance 坏，它没有坏到 margin；赢到 1/alpha 就信。"""

    def __init__(self, margin: float | None, alpha_rollback: float, alpha_release: float, tolerance: float):
        self.tolerance = np.float64(tolerance)
        self.margin = None if margin is None else np.float64(margin)  # None：只管退，不管放
        self.enough_worse, self.enough_fine = -math.log(alpha_rollback), -math.log(alpha_release)
        self.worse_gains = np.zeros(len(BETS))  # 各种押法的本钱（对数）
        self.fine_gains = np.zeros(len(FINE_SHARES))
        self.is_worse = self.is_fine = False
        self._squares = 0.0
        self.differences: list[float] = []
        self.aimed: list[np.ndarray] = []  # 放开的那场赌，每一组冲着"一样好"押了几成

    def add(self, difference: float) -> None:
        """多了一组：difference 是新版本的减老版本的，在 −1 到 1 之间。"""
        squares, groups = np.float64(self._squares), np.float64(len(self.differences))
        self.aimed.append(
            aimed_stake(squares, groups, DEFAULT_MARGIN if self.margin is None else self.margin)
        )
        self.differences.append(difference)
        self._squares += difference**2
        self.worse_gains += gain_if_worse(np.float64(difference), self.tolerance)
        self.is_worse |= bool(wealth(self.worse_gains) >= self.enough_worse)
        if self.margin is not None:
            stakes = np.append(BETS, self.aimed[-1])
            self.fine_gains += gain_if_better(np.float64(difference), self.margin, stakes)
            self.is_fine |= bool(wealth(self.fine_gains, FINE_SHARES) >= self.enough_fine)

    @property
    def harm(self) -> float:
        return sum(self.differences) / max(len(self.differences), 1)

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """看到第 1、2、… 组时的区间（下限、上限各 (组,)）：已经不能信的"差 ≤ m"里最大的 m，"差 ≥ m"里最小的 m。"""
        ours = [self.tolerance] if self.margin is None else [self.tolerance, self.margin]
        limits = np.unique(np.append(GRID, ours))
        d = np.asarray(self.differences)[:, None]  # (组, 1)
        worse = wealth(gain_if_worse(d, limits).cumsum(0))  # (组, m)
        stakes = np.column_stack([np.tile(BETS, (len(d), 1)), self.aimed])[:, None]  # (组, 1, 押法)
        fine = wealth(gain_if_better(d, limits, stakes).cumsum(0), FINE_SHARES)
        low = np.where(worse >= self.enough_worse, limits, -1.0).max(1)
        high = np.where(fine >= self.enough_fine, limits, 1.0).min(1)
        return np.maximum.accumulate(low), np.minimum.accumulate(high)

    def interval(self) -> tuple[float, float]:
        """现在的区间。两头各有各的 alpha，不论看几眼。"""
        if not self.differences:
            return -1.0, 1.0
        low, high = self.bounds()
        return float(low[-1]), float(high[-1])


# ---------------------------------------------------------------- 2. 一次灰度：谁算进来，什么时候定


class Canary:
    """看着一次灰度。margins：{哪一项坏: 差多少以内不要紧}；几项分摊错退的 alpha，放开要每一项都好，不必分摊。

    margin 是 None 的，变坏了照样退，放不放开不看它；都是 None，就一直看下去。
    tolerance：差到多少以内连退也不必（默认 0：变坏就退）。per_user：一个用户头几次请求的平均算他的一份。
    """

    def __init__(
        self,
        margins: dict[str, float | None],
        alpha: float = ALPHA,
        tolerance: float = 0.0,
        per_user: int = 1,
    ):
        for name, margin in margins.items():
            if margin is not None and not tolerance < margin < 1:
                raise UserError(
                    f"{name} 的 margin 要大于 tolerance（{tolerance:g}）、小于 1，给的是 {margin:g}。"
                )
        if not margins or not 0 < alpha < 1 or per_user < 1:
            raise UserError("灰度要至少看一项，alpha 在 0 与 1 之间，per_user 至少 1。")
        self.tests = {
            name: HarmTest(margin, alpha / len(margins), alpha, tolerance) for name, margin in margins.items()
        }
        self.settings = {"margins": margins, "alpha": alpha, "tolerance": tolerance, "per_user": per_user}
        self._has_margins = any(margin is not None for margin in margins.values())
        self.per_user = per_user
        self.decision: str | None = None
        self.reason = "还没有定"
        self.requests = {"canary": 0, "champion": 0}
        self.users = {"canary": 0, "champion": 0}  # 算进来的
        self._waiting: dict[str, list[list[float]]] = {"canary": [], "champion": []}  # 等着配组的用户
        self._started: dict[object, tuple[str, list[list[float]]]] = {}  # 还没到 per_user 次的用户
        self._counted: set = set()

    def see(self, user: object, arm: str, bad: dict[str, float]) -> str | None:
        """一次请求的结果；返回 None、"rollback" 或 "release"。定了以后再看，也不再变。"""
        values = [float(bad[name]) for name in self.tests]
        if not all(0 <= value <= 1 for value in values):
            raise ValueError(f"坏的程度要在 0 与 1 之间：{bad}")
        self.requests[arm] += 1
        if self.decision is None and user not in self._counted:
            self._count(user, arm, values)
        return self.decision

    def _count(self, user: object, arm: str, values: list[float]) -> None:
        """一个用户只算一次：头 per_user 次的平均。两边都有人等着，就配成一组。"""
        before, his = self._started.pop(user, (arm, []))
        his = [*his, values] if before == arm else [values]  # 灰度的比例加大，他换了一边：从头数
        if len(his) < self.per_user:
            self._started[user] = (arm, his)
            return
        self._counted.add(user)
        self.users[arm] += 1
        self._waiting[arm].append([sum(column) / len(column) for column in zip(*his, strict=True)])
        if not (self._waiting["canary"] and self._waiting["champion"]):
            return
        new, old = (np.mean(self._waiting[side], axis=0) for side in ("canary", "champion"))
        self._waiting = {"canary": [], "champion": []}
        for test, difference in zip(self.tests.values(), new - old, strict=True):
            test.add(float(difference))
        self._decide()

    def _decide(self) -> None:
        worse = [name for name, test in self.tests.items() if test.is_worse]
        if worse:
            self.decision = "rollback"
        elif self._has_margins and all(test.is_fine or test.margin is None for test in self.tests.values()):
            self.decision = "release"
        else:
            return
        shown = worse or list(self.tests)
        told = "；".join(f"{name} {told_harm(self.tests[name])}" for name in shown)
        seen = f"看了 {self.users['canary']} 个用新版本的、{self.users['champion']} 个用老版本的用户"
        self.reason = f"{'变坏了' if worse else '不会坏过界限'}：{told}，{seen}"

    def report(self) -> dict:
        counts = {f"users_{arm}": n for arm, n in self.users.items()}
        counts |= {f"requests_{arm}": n for arm, n in self.requests.items()}
        found = {}
        for name, test in self.tests.items():
            low, high = test.interval()
            found[name] = {"harm": test.harm, "low": low, "high": high} | counts
            found[name]["margin"] = self.settings["margins"][name]
        return found


def told_harm(test: HarmTest) -> str:
    low, high = test.interval()
    return f"{test.harm:+.3f}（{low:+.2f} 到 {high:+.2f}）"


# ---------------------------------------------------------------- 3. 跑一次


def run_canary(
    requests: Iterable[Request],
    answer: Callable[[str, Request], dict[str, float]],
    canary: Canary,
    salt: str,
    log: Path | None = None,
    ramp: tuple[tuple[int, float], ...] = RAMP,
) -> dict:
    """一次次请求地走，定了就停。log 里已有的请求直接算进检验，从下一次接着；流量来完了还没定是 "undecided"。

    log 是别的灰度的（设置不同，或流量不同），是 UserError：证据不能混着算。
    """
    if log is None:
        return _serve(requests, answer, canary, salt, ramp, [], None)
    settings = json.loads(json.dumps({"salt": salt, "ramp": ramp} | canary.settings))
    with line_log.updating(Path(log), sync=False) as (events, add):
        if not events:
            add({"event": "start", "settings": settings})
        elif changed := differences(events[0].get("settings", {}), settings):
            _refuse(log, "；".join(changed))
        return _serve(requests, answer, canary, salt, ramp, events[1:], add, log)


def _serve(requests, answer, canary: Canary, salt: str, ramp, seen: list[dict], add, log=None) -> dict:
    number = 0
    for number, request in enumerate(requests, 1):
        if number <= len(seen):
            before = seen[number - 1]
            arm, bad = before["arm"], before["bad"]
            if (before["user"], before["question"]) != (request.user, request.question):
                _refuse(log, f"第 {number} 次请求：已有用户 {before['user']}，这次用户 {request.user}")
        else:
            arm = arm_of(request.user, share_at(ramp, request.number), salt)
            bad = answer(arm, request)
            if add:
                add({"user": request.user, "question": request.question, "arm": arm, "bad": bad})
        if canary.see(request.user, arm, bad):
            break
    return {
        "decision": canary.decision or "undecided",
        "reason": canary.reason,
        "requests": number,
        "requests_canary": canary.requests["canary"],
        "users_canary": canary.users["canary"],
        "metrics": canary.report(),
    }


def _refuse(log: Path, changed: str) -> NoReturn:
    raise UserError(
        f"{log} 是另一次灰度的记录（{changed}），不能接着它走：换一个文件名，或者把它移走，从头再来一次灰度。"
    )


def share_at(ramp: tuple[tuple[int, float], ...], number: int) -> float:
    """第 number 次请求时，灰度给多少用户。"""
    return [share for start, share in ramp if start <= number][-1]
