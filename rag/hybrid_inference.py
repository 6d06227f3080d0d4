"""混合推理：对齐过的模型自己会的自己答，资料里有的照着资料答，两样都没有就说不知道；哪样服务坏了，就退一步。

你会学到
  1. 模型自己、只用 RAG、两样都用，在三种问题上各对几成：资料里有的、资料里没有而模型会的（寒暄）、谁也不知道的。
     只用 RAG 的，什么问题都找得出一段"最像的"，照着答，还注明出处：错得最像真的。
  2. 两道门：问题里的字有几成在查到的那一段里（够了才算查到）；回答里的字是不是那一段里的（是才许注明出处）。
  3. 毛病一样样地造：检索断了、慢、空、乱给；生成断了、慢、乱答；两样都断。退路：本机的旧副本、原文照登、老实说现在答不了。
  4. 超时只保证等得不太久，每次还是白等；断路器记得它坏了，不再去等。手写的，三个状态。

怎么运行
  python hybrid_inference.py                        # Qwen 链 tiny 的 DPO 模型（没有就当场训练）
  python hybrid_inference.py --stage sft            # 换成没有对齐的
  python hybrid_inference.py --requests 20000 --output_dir outputs/long

应当看到（tiny，实测见本文件夹的 README.md）：两样都用的三种问题都对；不设防的可用率掉到七成上下，设防的不低于 0.999，
而且没有一次把错的说成有出处的。

参考：Nygard 2007《Release It!》（断路器）；Kadavath et al. 2022（arXiv 2207.05221，模型知道自己知道什么）。
"""

from nlp_common.base.cli import run_main

import math
import random
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from circuit_breaker import CircuitBreaker, Clock
from hybrid_services import LABELS, RUBBISH, WINDOWS, Down, Services, Table, prepare
from nlp_common.base.arguments import COUNT, POSITIVE, Limits, option
from nlp_common.base.console import print_table
from nlp_common.draw.plots import bar_chart
from nlp_common.tiny.world import UNHELPFUL
from nlp_common.train.chain import chain_model
from nlp_common.train.lesson import run_lesson
from nlp_common.train.settings import LessonSettings, parse_settings
from nlp_common.train.stage import Stage
from rag_common.corpus import ASKED
from rag_common.generate import FromModel

HOME = Path(__file__).resolve().parent
PRESETS = {
    "tiny": {"stories": 120, "questions": 200, "requests": 3400},
    "full": {"stories": 1000, "questions": 2000, "requests": 34_000},
}
KINDS = {"inside": "资料里有", "chat": "模型会的", "unknown": "都不知道"}
SYSTEMS = {"model": "模型自己", "rag": "只用 RAG", "both": "两样都用"}
WAYS = {"bare": "不设防", "timeouts": "超时加退路", "breaker": "再加断路器"}
CAUGHT = {
    "rubbish": "乱码、空话",
    "other_passage": "照着别的段答的",
    "other_question": "别的题的回答",
    "false_alarms": "对的回答，误拦",
}
PATIENCE = 3.0  # 等过这么多秒，人就走了
TIMEOUT = {"retriever": 0.3, "generator": 1.5}
QUESTION_WORDS = set("".join(ASKED.values()))  # 问法里的字，不是问的东西
DECLINED = "资料里没有，我也不知道。"
LATER = "现在查不了，已经记下，好了再答您。"


@dataclass
class HybridSettings(LessonSettings):
    stories: int | None = option("资料里多少篇故事", limits=Limits(at_least=20))
    questions: int | None = option(
        "资料里有的、都不知道的各多少题（一半用来定门槛）", limits=Limits(at_least=10)
    )
    requests: int | None = option("出毛病的那一天一共多少次请求", limits=COUNT)
    stage: str = option("用 Qwen 链的哪个模型", "dpo", choices=("sft", "dpo", "ppo", "grpo"))
    gap: float = option("一次答完，过几秒来下一次", 0.1, limits=POSITIVE)
    rest: float = option("断路器断开以后歇几秒再试", 5.0, limits=POSITIVE)
    limit: int = option("接连错几次就断开", 3, limits=COUNT)


@dataclass
class Gates:
    """两道门的门槛与要用的东西，都在另一半题上定的。"""

    weights: dict[str, float]  # 资料里的每个字 → ln(段数 / 有它的段数)：到处都有的近 0
    rare: set[str]  # 资料里少见的字：人名、东西
    furniture: set[str]  # 照着资料答的时候，资料之外还用的字（"的""是"…）
    support: float = 0.0
    sure: float = 0.0


@dataclass
class Served:
    """给出去的：sourced 有出处的回答，quoted 原文照登，own 模型自己的，declined 不知道，later 现在答不了，error 出错页。"""

    kind: str
    text: str
    seconds: float = 0.0


# ---------------------------------------------------------------- 1. 从头到尾


def learn(stage: Stage, found: dict) -> dict:
    settings = stage.settings
    generator = FromModel(found["path"], 32)
    tables, texts = prepare(stage, generator)
    calibration, test = tables[::2], tables[1::2]
    gates = set_gates(calibration, texts)
    print(
        f"门槛：问题的字有 {gates.support:.2f} 在段里才算查到；模型自己的把握要 {gates.sure:.2f}", flush=True
    )

    accuracy = {}
    for name, answer in (("model", alone), ("rag", only_rag), ("both", guarded)):
        accuracy[name] = accuracy_of(test, [healthy(answer, row, gates) for row in test])
    day = {way: one_day(test, gates, way, settings) for way in WAYS}
    caught = caught_rubbish(test, gates, settings.seed)

    metrics = {
        "accuracy": accuracy,
        "availability": day["breaker"]["availability"],
        "availability_bare": day["bare"]["availability"],
        "wrong_sourced": day["breaker"]["wrong_sourced"],
        "wrong_sourced_bare": day["bare"]["wrong_sourced"],
        "day": day,
        "caught": caught,
        "gates": {"support": gates.support, "sure": gates.sure},
    }
    report(metrics)
    data = {"stories": len(texts), "questions": len(test)}
    return stage.save(metrics, data, lambda folder: draw(folder, metrics))


# ---------------------------------------------------------------- 2. 两道门


def set_gates(rows: list[Table], texts: list[str]) -> Gates:
    """门槛定在校准的题上：不该过的最高的一题，与该过的（去掉最低的百分之二）的中间。"""
    counts = Counter(char for text in texts for char in set(text))
    gates = Gates(
        weights={char: math.log(len(texts) / count) for char, count in counts.items()},
        rare={char for char, count in counts.items() if count < 0.4 * len(texts)},
        furniture=set(),
    )
    inside = [row for row in rows if row.kind == "inside"]
    used = Counter(
        char for row in inside for passage, text in row.replies.items() for char in set(text) - set(passage)
    )
    gates.furniture = {char for char, count in used.items() if count >= 2} - gates.rare
    supports = {kind: [support(row, row.found, gates) for row in rows if row.kind == kind] for kind in KINDS}
    gates.support = between(supports["unknown"] + supports["chat"], supports["inside"])
    sure = {kind: [row.sure for row in rows if row.kind == kind] for kind in KINDS}
    gates.sure = between(sure["unknown"] + sure["inside"], sure["chat"])
    return gates


def between(below: list[float], above: list[float]) -> float:
    return float((max(below) + np.quantile(above, 0.02)) / 2)


def support(row: Table, passage: str | None, gates: Gates) -> float:
    """问题里资料也用的字（问法不算），有几成（少见的算得重）在这一段里；一个少见的字也没有（寒暄）是 0。"""
    asked = (set(row.question.text) - QUESTION_WORDS) & set(gates.weights)
    total = sum(gates.weights[char] for char in asked)
    if not passage or not asked & gates.rare:
        return 0.0
    return sum(gates.weights[char] for char in asked & set(passage)) / total


def is_supported(text: str, row: Table, passage: str, gates: Gates) -> bool:
    """回答的字，除了虚字，都在这一段里，而且说出了问题里没有的东西。查不出"段里有、却答非所问"。"""
    strange = set(text) - set(passage) - gates.furniture
    new = set(text) & set(passage) & gates.rare - set(row.question.meta["read"])
    return not strange and bool(new)


# ---------------------------------------------------------------- 3. 几种答法


def alone(row: Table, services: Services, gates: Gates, breakers=None) -> Served:
    text, _ = services.say(row, None)
    return Served("own", text)


def only_rag(row: Table, services: Services, gates: Gates, breakers=None) -> Served:
    """教程里的样子：查到什么就照着答什么。"""
    passage = services.retrieve(row, None)
    if passage is None:
        return alone(row, services, gates)
    return Served("sourced", services.read(row, passage, None))


def guarded(row: Table, services: Services, gates: Gates, breakers: dict | None = None) -> Served:
    """查（坏了用本机的副本）→ 过第一道门就照着答 → 过第二道门才注明出处，不过就原文照登；没查到，有把握才自己答。"""
    ok, passage = attempt("retriever", services.retrieve, breakers, row)
    blind = not ok
    if support(row, passage, gates) < gates.support:  # 坏了、空的、乱给的，都再看一眼本机的副本
        passage = services.retrieve_local(row)
    if support(row, passage, gates) >= gates.support:
        ok, text = attempt("generator", services.read, breakers, row, passage, check=partial(is_supported, row=row, passage=passage, gates=gates))  # fmt: skip
        return Served("sourced", text) if ok else Served("quoted", f"模型现在答不了，查到的原文是：{passage}")
    ok, said = attempt("generator", services.say, breakers, row)
    if ok and said[1] >= gates.sure:
        return Served("own", said[0])
    return Served("later", LATER) if blind or not ok else Served("declined", DECLINED)


def attempt(part: str, call, breakers: dict | None, *given, check=None) -> tuple[bool, object]:
    """去问一样服务 → (成没成, 结果)。断路器断开时不去问；超时、连不上、通不过 check 的都算没成。"""
    breaker = breakers[part] if breakers else None
    if breaker and not breaker.allow():
        return False, None
    try:
        value = call(*given, TIMEOUT[part])
        ok = check is None or check(value)
    except (Down, TimeoutError):
        value, ok = None, False
    if breaker:
        breaker.record(ok)
    return ok, value


def healthy(answer, row: Table, gates: Gates) -> Served:
    """服务都好的时候。"""
    return answer(row, Services(Clock(), 0), gates)


# ---------------------------------------------------------------- 4. 量


def is_right(row: Table, served: Served) -> bool:
    """都不知道的题，说不知道（或现在答不了）才对；寒暄要回那一句；资料里有的，答案在回答里。"""
    if row.kind == "unknown":
        return served.kind in ("declined", "later") or served.text in UNHELPFUL
    if row.kind == "chat":
        return served.text == row.question.answer
    return row.question.answer in served.text


def accuracy_of(rows: list[Table], served: list[Served]) -> dict[str, float]:
    pairs = list(zip(rows, served, strict=True))
    shares = {}
    for kind in KINDS:
        right = [is_right(row, each) for row, each in pairs if row.kind == kind]
        shares[kind] = sum(right) / max(1, len(right))
    wrong = [each.kind == "sourced" and not is_right(row, each) for row, each in pairs]
    return {**shares, "all": sum(is_right(*pair) for pair in pairs) / len(pairs), "wrong_sourced": sum(wrong)}


def one_day(rows: list[Table], gates: Gates, way: str, settings: HybridSettings) -> dict:
    """一天的请求，一段一段地出毛病。可用：没有出错页，等得不超过 PATIENCE 秒。"""
    clock = Clock()
    services = Services(clock, settings.seed)
    parts = ("retriever", "generator")
    breakers = {part: CircuitBreaker(clock.now, settings.limit, settings.rest) for part in parts}
    rng = random.Random(f"day-{settings.seed}")
    served: list[tuple[Table, Served, int]] = []
    for number in range(settings.requests):
        window = min(number * len(WINDOWS) // settings.requests, len(WINDOWS) - 1)
        services.faults = WINDOWS[window]
        row, start = rng.choice(rows), clock.now()
        try:
            if way == "bare":
                reply = only_rag(row, services, gates)
            else:
                reply = guarded(row, services, gates, breakers if way == "breaker" else None)
        except (Down, TimeoutError):
            reply = Served("error", "")
        reply.seconds = clock.now() - start
        served.append((row, reply, window))
        clock.pass_by(settings.gap)
    return summary(served, services)


def summary(served: list[tuple[Table, Served, int]], services: Services) -> dict:
    fine = [reply.kind != "error" and reply.seconds <= PATIENCE for _, reply, _ in served]
    seconds = [reply.seconds for _, reply, _ in served]
    windows = {}
    for place, window in enumerate(WINDOWS):
        here = [
            (row, reply, ok)
            for (row, reply, each), ok in zip(served, fine, strict=True)
            if each == place and window
        ]
        if here:
            windows[window_key(window)] = {
                "availability": sum(ok for _, _, ok in here) / len(here),
                "right": sum(ok and is_right(row, reply) for row, reply, ok in here) / len(here),
                "wrong_sourced": sum(r.kind == "sourced" and not is_right(row, r) for row, r, _ in here),
                "mean_seconds": sum(reply.seconds for _, reply, _ in here) / len(here),
            }
    return {
        "availability": sum(fine) / len(fine),
        "right": sum(ok and is_right(row, r) for (row, r, _), ok in zip(served, fine, strict=True))
        / len(fine),
        "wrong_sourced": sum(r.kind == "sourced" and not is_right(row, r) for row, r, _ in served),
        "p50": float(np.quantile(seconds, 0.5)),
        "p99": float(np.quantile(seconds, 0.99)),
        "kinds": {kind: count / len(served) for kind, count in Counter(r.kind for _, r, _ in served).items()},
        "calls": dict(services.calls),
        "windows": windows,
    }


def window_key(window: dict[str, str]) -> str:
    return "_and_".join(f"{part}_{fault}" for part, fault in window.items())


def window_name(window: dict[str, str]) -> str:
    return "、".join(f"{LABELS[part]}{LABELS[fault]}" for part, fault in window.items())


def window_label(window: dict[str, str]) -> str:
    """图上的：英文要短，不然柱子很宽。"""
    english = (
        "both down"
        if len(window) > 1
        else window_key(window).replace("retriever", "R").replace("generator", "G")
    )
    return f"{'都断了' if len(window) > 1 else window_name(window)}|{english}"


def caught_rubbish(rows: list[Table], gates: Gates, seed: int) -> dict[str, float]:
    """乱答的几种，第二道门各拦下几成。最后一种拦不全：别的题的回答，有时碰巧每个字都在这一段里。"""
    inside = [row for row in rows if row.kind == "inside" and row.question.answer in row.found]
    rng = random.Random(f"rubbish-{seed}")
    others = [rng.choice([each for each in inside if each is not row]) for row in inside]
    said = {
        "rubbish": [rng.choice(RUBBISH) for _ in inside],
        "other_passage": [row.replies[row.wrong] for row in inside],
        "other_question": [each.replies[each.found] for each in others],
    }
    caught = {}
    for name, texts in said.items():
        wrong = [(r, t) for r, t in zip(inside, texts, strict=True) if r.question.answer not in t]
        caught[name] = sum(not is_supported(t, r, r.found, gates) for r, t in wrong) / max(1, len(wrong))
    honest = [is_supported(row.replies[row.found], row, row.found, gates) for row in inside]
    caught["false_alarms"] = 1 - sum(honest) / max(1, len(honest))
    return caught


# ---------------------------------------------------------------- 5. 看


def report(metrics: dict) -> None:
    print_table([
        ["答对几成", *KINDS.values(), "错的说成有出处"],
        *([SYSTEMS[name], *(f"{row[kind]:.3f}" for kind in KINDS), row["wrong_sourced"]] for name, row in metrics["accuracy"].items()),
    ])  # fmt: skip
    head = ["出毛病的一天", "可用率", "答对", "错的说成有出处", "p50 秒", "p99 秒", "检索被问", "生成被问"]
    rows = [
        [WAYS[way], f"{row['availability']:.4f}", f"{row['right']:.3f}", row["wrong_sourced"], f"{row['p50']:.2f}",
         f"{row['p99']:.2f}", row["calls"]["retriever"], row["calls"]["generator"]]
        for way, row in metrics["day"].items()
    ]  # fmt: skip
    print_table([head, *rows])
    rows = []
    for window in filter(None, WINDOWS):
        found = [metrics["day"][way]["windows"].get(window_key(window)) for way in WAYS]
        cells = [f"{each['availability']:.3f} / {each['right']:.3f}" if each else "" for each in found]
        rows.append([window_name(window), *cells])
    print_table([["可用率 / 答对", *WAYS.values()], *rows])
    shares = "，".join(f"{CAUGHT[name]} {share:.3f}" for name, share in metrics["caught"].items())
    print(f"\n第二道门拦下：{shares}\n")


def draw(folder: Path, metrics: dict) -> None:
    english = {"inside": "in documents", "chat": "model knows", "unknown": "nobody knows"}
    bars = {
        f"{SYSTEMS[name]}|{name}": {f"{KINDS[kind]}|{english[kind]}": row[kind] for kind in KINDS}
        for name, row in metrics["accuracy"].items()
    }
    bar_chart(folder / "systems.svg", bars, "三种问题，三种答法|Accuracy by system", "", "答对几成|accuracy")
    right = {
        way: {
            window_label(w): metrics["day"][way]["windows"].get(window_key(w), {}).get("right", 0.0)
            for w in WINDOWS
            if w
        }
        for way in ("bare", "breaker")
    }
    bars = {f"{WAYS[way]}|{way}": row for way, row in right.items()}
    bar_chart(folder / "faults.svg", bars, "每种毛病下答对几成|Accuracy by fault", "", "答对几成|accuracy")


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(HybridSettings, PRESETS, argv)
    found = chain_model(settings.stage)
    work = partial(learn, found=found)
    return run_lesson("hybrid_inference", HOME, settings, work, generator_id=found["id"])


if __name__ == "__main__":
    run_main(main)
