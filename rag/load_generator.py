"""打压力：照预定的时刻发请求（开环），或者答完一个再发下一个（闭环）；量的是每个请求从该发的时刻起等了多久。

开环：到达的时刻早就定好（泊松过程，由种子定），服务再慢，请求照来，像真的用户。
闭环：只有几个客户，各自等到答案才发下一个。服务卡住一秒，他们就跟着停一秒，那一秒里本来该来的请求没有发，也就没有
量到：这叫协同遗漏（coordinated omission），p99 会好看得多。

只打本机；别的机器要明明白白写 --url，而且每次的请求数、每秒几个都有上限。
"""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from nlp_common.base.errors import UserError
from nlp_common.base.load import check_target, percentiles

MOST_RATE, MOST_REQUESTS, MOST_IN_FLIGHT = 500.0, 5000, 256
TIMEOUT = 60.0  # 秒


@dataclass(frozen=True)
class Ask:
    """一道题：检索用的话，给模型看的短问题，标准答案。"""

    question: str
    read: str = ""
    answer: str = ""


@dataclass
class Result:
    """一个请求的下场。due 是该发的时刻，sent 真的发的，first 第一片文字，end 最后一行；都是秒，从开始数起。"""

    id: str
    ask: Ask
    due: float
    sent: float = 0.0
    first: float = 0.0
    end: float = 0.0
    status: str = ""  # ok、refused（说忙）、failed（断了、超时、出错）
    line: dict = field(default_factory=dict)
    why: str = ""


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """泊松过程：间隔是平均 1/rate 的指数分布，到 seconds 为止。同一种子，同样的时刻。"""
    if not 0 < rate <= MOST_RATE or not seconds > 0 or rate * seconds > MOST_REQUESTS * 1.001:
        raise UserError(
            f"每秒 {rate:g} 个、{seconds:g} 秒：每秒要在 0 到 {MOST_RATE:g} 之间，一次平均不超过 {MOST_REQUESTS} 个。"
        )
    rng, now, times = random.Random(f"arrivals-{seed}-{float(rate)}"), 0.0, []
    while (now := now + rng.expovariate(rate)) < seconds:
        times.append(now)
    return times


def allowed(rate: float, seconds: float) -> float:
    """不超过上限的到达率：机器快，照它的快慢定的也不能没有边。"""
    return min(rate, MOST_RATE, MOST_REQUESTS / seconds)


def draw_asks(asks: Sequence[Ask], n: int, seed: int) -> list[Ask]:
    """抽 n 道题，第 r 道的机会与 1/r 成正比：真的用户总是问那几样，缓存才有用。"""
    rng = random.Random(f"asks-{seed}")
    return rng.choices(asks, [1 / place for place in range(1, len(asks) + 1)], k=n)


def open_loop(url: str, asks: Sequence[Ask], due: Sequence[float], explicit: bool = False) -> list[Result]:
    """第 i 道题在 due[i] 发出，不管前面的答完没有。在路上的超过 MOST_IN_FLIGHT 个，多的记成 refused，不发。"""
    target = check_target(url, explicit)
    results = [Result(str(i), ask, at) for i, (ask, at) in enumerate(zip(asks, due, strict=True))]
    places = threading.Semaphore(MOST_IN_FLIGHT)
    threads, started = [], time.perf_counter()

    def one(result: Result) -> None:
        try:
            send(target, result, started)
        finally:
            places.release()

    for result in results:
        time.sleep(max(0.0, result.due - (time.perf_counter() - started)))
        if not places.acquire(blocking=False):
            result.status, result.why = "refused", "在路上的太多，没有发"
            continue
        threads.append(threading.Thread(target=one, args=(result,), daemon=True))
        threads[-1].start()
    for thread in threads:
        thread.join()
    return results


def closed_loop(url: str, asks: Sequence[Ask], clients: int, explicit: bool = False) -> list[Result]:
    """clients 个客户，各自答完一个再发下一个；due 就是真的发的时刻。"""
    target = check_target(url, explicit)
    results = [Result(str(i), ask, 0.0) for i, ask in enumerate(asks)]
    started = time.perf_counter()

    def client(mine: list[Result]) -> None:
        for result in mine:
            result.due = time.perf_counter() - started
            send(target, result, started)

    threads = [threading.Thread(target=client, args=(results[i::clients],)) for i in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def send(target: tuple[str, int], result: Result, started: float) -> None:
    """发一个请求，读到最后一行；没有最后一行就是断了，不算答完。"""
    body = {"id": result.id, "question": result.ask.question, "read": result.ask.read}
    connection = http.client.HTTPConnection(*target, timeout=TIMEOUT)
    result.sent = time.perf_counter() - started
    try:
        connection.request("POST", "/ask", json.dumps(body, ensure_ascii=False).encode())
        answer = connection.getresponse()
        if answer.status != 200:
            result.status = "refused" if answer.status == 503 else "failed"
            result.why = f"{answer.status} {answer.read(200).decode('utf-8', 'replace')}"
            return
        pieces = ""
        for raw in answer:
            line = json.loads(raw)
            if "piece" in line:
                result.first = result.first or time.perf_counter() - started
                pieces += line["piece"]
            else:
                result.line = line
        if result.line.get("done") and pieces == result.line["answer"]:
            result.status = "ok"
        else:
            result.status, result.why = "failed", result.line.get("error", "没有说完就断了")
    except (OSError, http.client.HTTPException, ValueError) as error:
        result.status, result.why = "failed", f"{type(error).__name__}：{error}"
    finally:
        result.end = time.perf_counter() - started
        connection.close()


# ---------------------------------------------------------------- 一批的下场


def count_fates(results: Sequence[Result], expected: dict[Ask, str] | None = None) -> dict[str, int]:
    """每个请求都有下场；答完的，号码、问题、答案要是它自己的。expected：单独问时的答案。"""
    counts = dict.fromkeys(("sent", "ok", "refused", "failed", "lost", "mixed", "wrong"), 0)
    counts["sent"] = len(results)
    for result in results:
        counts[result.status or "lost"] += 1
        if result.status == "ok":
            line = result.line
            own = line["id"] == result.id and line["question"] == result.ask.question
            same = expected is None or line["answer"] == expected[result.ask]
            counts["mixed"] += not (own and same)
            counts["wrong"] += result.ask.answer not in line["answer"]
    return counts


def summary(results: Sequence[Result], expected: dict[Ask, str] | None = None) -> dict:
    """一批请求 → 一行：各步的 p50、p95、p99（毫秒），tokens/s，下场。"""
    good = [result for result in results if result.status == "ok"]
    row: dict = dict(count_fates(results, expected))
    row["whole"] = percentiles([1000 * (each.end - each.due) for each in good])
    row["first"] = percentiles([1000 * (each.first - each.due) for each in good])
    for step in ("wait", "embed", "search", "rerank", "generate"):
        row[step] = percentiles([e.line["times"][step] for e in good if step in e.line["times"]])
    took = max((each.end for each in good), default=0.0) - min((each.due for each in good), default=0.0)
    row["answers_per_second"] = len(good) / took if took > 0 else 0.0
    row["tokens_per_s"] = sum(each.line["tokens"] for each in good) / took if took > 0 else 0.0
    row["cached"] = sum(each.line["cached"] for each in good) / max(1, len(good))
    row["late"] = percentiles([1000 * (each.sent - each.due) for each in good])["p99"]
    return row
