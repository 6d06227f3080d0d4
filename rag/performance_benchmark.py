"""给一个 RAG 服务打压力：多快、撑得住每秒几个、从哪里开始垮，换一种配置差多少。

你会学到
  1. 平均数说明不了什么：要看 p50、p95、p99，一步一步地看（编码、检索、重排、第一个字、整个回答）。
  2. 到达得越快，等得越久，而且有一个拐点：过了它，队越排越长，再加一点点就垮。拐点在哪里，量出来。
  3. 闭环的压力测试会骗人：服务卡了一秒，它只记一个慢的；照真的用户那样到达（开环），那一秒里来的人都等了。
  4. 成批算、记住答案，各把拐点往后推多少，又让闲的时候慢多少。

怎么运行
  python performance_benchmark.py                                  # 自己开服务，自己打，一分多钟（hashed 向量）
  python performance_benchmark.py --embedder e5                    # 真的向量模型：编码就成了最慢的几步之一
  python performance_benchmark.py --rates 5,10,20 --seconds 10     # 自己定每秒几个、打多久
  python performance_benchmark.py --serve --port 8900 --batch 8    # 只开服务
  python performance_benchmark.py --url http://127.0.0.1:8900      # 打另一个窗口里开着的（同一种服务）

应当看到（tiny，实测见本文件夹的 README.md）：慢的配置先垮；成批的与带缓存的把拐点推后；丢的、串的都是 0；
同一个卡顿，闭环的 p95 看不见，开环的看得见。

参考：Tene 2015《How NOT to Measure Latency》；Little 1961；Kleinrock 1975（排队论）。
"""

from nlp_common.base.cli import run_main

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from load_generator import Ask, allowed, arrivals, closed_loop, draw_asks, open_loop, summary
from nlp_common.base.arguments import COUNT, NOT_NEGATIVE, POSITIVE, option
from nlp_common.base.device import peak_memory_mb
from nlp_common.base.errors import UserError
from nlp_common.base.load import check_target
from nlp_common.base.runs import write_json
from nlp_common.draw.plots import line_chart
from nlp_common.train.lesson import run_lesson, run_part
from nlp_common.train.settings import LessonSettings, parse_settings
from nlp_common.train.stage import Stage
from rag_benches import ANCHORS, can_ask, with_reading
from rag_common.bm25 import BM25
from rag_common.chunking import make_chunks
from rag_common.corpus import tiny_world_corpus
from rag_common.embed import load_embedder, torch_threads
from rag_common.fill import fill
from rag_common.generate import load_generator
from rag_common.rerank import TokenAligner
from rag_common.store import open_store
from rag_server import Parts, Server, Service, serving

HOME = Path(__file__).resolve().parent
PRESETS = {
    "tiny": {"stories": 300, "questions": 150, "seconds": 2.0, "embedder": "hashed"},
    "full": {"stories": 5000, "questions": 1000, "seconds": 20.0, "embedder": "e5"},
}
LOADS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.5)  # 到达率是一个一个算时最快的几倍
KNEE = 10.0  # 没有给 --slo_ms 时，整个回答的 p95 要在单独问一题的几倍以内
CLIENTS, STALL_S = 8, 1.0
STAGES = ("wait", "embed", "search", "rerank", "generate", "first", "whole")
CONFIGS = {  # 名字 → (一批最多几个, 记住几个答案)
    "one": (1, 0),
    "batch": (8, 0),
    "cache": (1, 64),
    "both": (8, 64),
}
LABELS = {"one": "一个一个算", "batch": "一批 8 个", "cache": "记住 64 个", "both": "一批 8 个，记住 64 个"}


@dataclass
class LoadSettings(LessonSettings):
    NOT_IN_FINGERPRINT = LessonSettings.NOT_IN_FINGERPRINT | {"serve", "port", "url"}

    stories: int | None = option("知识库里多少篇小世界的故事", limits=COUNT)
    questions: int | None = option("题库里多少题（有的题问得多，有的少）", limits=COUNT)
    seconds: float | None = option("每个到达率打几秒")
    rates: str | None = option("每秒几个，逗号隔开；默认照量到的快慢定")
    slo_ms: float | None = option("整个回答的 p95 要在多少毫秒以内；默认是单独问一题的十倍", limits=POSITIVE)
    embedder: str | None = option("hashed（只认字面，快）、e5，或 hub 名、本地文件夹")
    generator: str = option("chain（Qwen 链 tiny 的 SFT 模型）、extract、hub 名、文件夹、smollm2", "chain")
    batch: int = option("--serve 的服务一批最多几个", 8, limits=COUNT)
    cache: int = option("--serve 的服务记住几个答案", 0, limits=NOT_NEGATIVE)
    waiting: int = option("队伍最多多长，再来的就说忙", 64, limits=COUNT)
    threads: int = option("算的时候用几个线程", 1, limits=COUNT)
    serve: bool = option("只开服务，直到 Ctrl-C", False)
    port: int = option("--serve 用的端口", 8900)
    url: str | None = option("打这个已经开着的服务；不在本机的，也只有这样明写才打")

    def check(self) -> None:
        if not 0 < self.seconds <= 600:
            raise UserError(f"--seconds 要在 0 到 600 之间，给的是 {self.seconds}。")
        for rate in self.given_rates():
            arrivals(rate, self.seconds, self.seed)
        if self.url:
            check_target(self.url, explicit=True)

    def given_rates(self) -> list[float]:
        try:
            return sorted({float(each) for each in self.rates.split(",")}) if self.rates else []
        except ValueError:
            raise UserError(f"--rates 要写成 5,10,20 这样，给的是 {self.rates}。") from None


# ---------------------------------------------------------------- 1. 从头到尾


def learn(stage: Stage) -> dict:
    settings = stage.settings
    work = stage.folder.work / "stores"
    with torch_threads(settings.threads):
        parts, asks = build(settings, work)
        with serving(Service(parts, threads=settings.threads)) as url:
            closed_loop(url, asks[:3], 1)  # 热身：接着上次的，也要
        quiet = run_part(stage, "quiet", partial(without_pressure, parts=parts, asks=asks))
        alone, capacity = quiet["alone"], quiet["capacity"]
        expected = dict(zip(asks, quiet["answers"], strict=True))
        slo = settings.slo_ms or KNEE * alone["p50"]
        rates = settings.given_rates() or rates_for(capacity, settings.seconds)
        print(
            f"单独问一题 {alone['p50']:.0f} 毫秒；一直有人排队，每秒答 {capacity:.1f} 个；到达率试 {'、'.join(f'{rate:g}' for rate in rates)}；"
            f"要求 p95 在 {slo:.0f} 毫秒以内"
        )
        given = {"parts": parts, "asks": asks, "expected": expected}
        configs = {}
        for name in CONFIGS:
            configs[name] = run_part(
                stage, name, partial(try_config, name=name, rates=rates, slo=slo, **given)
            )
            print_config(name, configs[name])
        omission = run_part(stage, "omission", partial(coordinated_omission, rate=capacity / 2, **given))
        print_omission(omission)
    parts.store.close()
    rows = [row for config in configs.values() for row in config["rates"].values()]
    metrics = {
        "capacity": capacity,
        "alone": alone,
        "slo_ms": slo,
        "sent": sum(row["sent"] for row in rows),
        "lost": sum(row["lost"] + row["failed"] for row in rows),
        "mixed": sum(row["mixed"] for row in rows),
        "accuracy": 1 - sum(row["wrong"] for row in rows) / max(1, sum(row["ok"] for row in rows)),
        "rates": {load: row["rate"] for load, row in configs["one"]["rates"].items()},
        "configs": {name: in_short(config) for name, config in configs.items()},
        "stages": {step: configs["one"]["rates"]["load1"][step] for step in STAGES},
        "omission": {
            way: {**row["whole"], "slow": row["slow"], "n": row["ok"]} for way, row in omission.items()
        },
        "embedder": parts.embedder.name,
    }

    def write(folder: Path) -> None:
        write_json(folder / "configs.json", configs)
        draw(folder, configs)
        shutil.rmtree(work, ignore_errors=True)

    return stage.save(metrics, {"name": "tiny_world", "rows": settings.stories}, write)


def build(settings: LoadSettings, work: Path) -> tuple[Parts, list[Ask]]:
    """小世界的知识库；题都是小模型答得了的，检索用长的问法，给模型看短的。"""
    corpus = tiny_world_corpus(settings.stories, 3 * settings.questions, ANCHORS, settings.seed)
    questions = [with_reading(corpus, each) for each in corpus.questions if can_ask(each)]
    asks = list(dict.fromkeys(Ask(each.text, each.meta["read"], each.answer) for each in questions))
    embedder = load_embedder(settings.embedder, settings.threads)
    chunks = [
        chunk
        for document in corpus.documents
        for chunk in make_chunks(document.id, document.text, [(0, len(document.text))])
    ]
    print(f"\n{len(chunks)} 篇故事，向量模型 {embedder.name}", flush=True)
    store = open_store(f"faiss://{work}", embedder.fingerprint, embedder.dim)
    fill(store, embedder, chunks)
    index = BM25()
    index.add([chunk.id for chunk in chunks], [chunk.text for chunk in chunks])
    reranker = TokenAligner(seed=settings.seed)  # 没有训练过，只数一样的字：这里量的是快慢
    generator = load_generator(settings.generator, 32)
    return Parts(embedder, store, index, reranker, generator), asks[: settings.questions]


def without_pressure(part: Stage, parts: Parts, asks: list[Ask]) -> dict:
    """没有压力的时候：一题一题单独问，各答什么、几毫秒（压力下的答案要与它一字不差，不然就是串了）；每秒最多答几个。"""
    threads = part.settings.threads
    with serving(Service(parts, threads=threads)) as url:
        results = closed_loop(url, asks, 1)
    bad = [each for each in results if each.status != "ok"]
    if bad:
        raise UserError(f"单独问也有 {len(bad)} 题没有答完：{bad[0].why}")
    answers = [each.line["answer"] for each in results]
    capacity = fastest(parts, asks, part.settings)
    return {"answers": answers, "alone": summary(results)["whole"], "capacity": capacity}


def fastest(parts: Parts, asks: list[Ask], settings: LoadSettings) -> float:
    """一个一个算、一直有人排着队，每秒答几个；试三次取最快的，别的进程正忙的那一次不算。"""
    drawn, best = draw_asks(asks, min(len(asks), 50), settings.seed), 0.0
    with serving(Service(parts, threads=settings.threads)) as url:
        for _ in range(3):
            best = max(best, summary(closed_loop(url, drawn, CLIENTS))["answers_per_second"])
    return best


def rates_for(capacity: float, seconds: float) -> list[float]:
    """到达率从闲到忙：答得完的几倍。"""
    return sorted({allowed(float(f"{capacity * load:.3g}"), seconds) for load in LOADS})


# ---------------------------------------------------------------- 2. 各种配置，各种到达率


def try_config(
    part: Stage, name: str, rates: list[float], slo: float, parts: Parts, asks: list[Ask], expected: dict
) -> dict:
    """每个到达率都从新的服务、空的缓存开始。"""
    settings, (batch, cache) = part.settings, CONFIGS[name]
    rows = {}
    for rate in rates:
        due = arrivals(rate, settings.seconds, settings.seed)
        drawn = draw_asks(asks, len(due), settings.seed)
        with serving(Service(parts, batch, cache, settings.waiting, settings.threads)) as url:
            rows[f"{rate:g}"] = summary(open_loop(url, drawn, due), expected)
    return {"rates": by_load(rows), "knee": knee(rows, slo), "memory_mb": peak_memory_mb() or 0.0}


def by_load(rows: dict[str, dict]) -> dict[str, dict]:
    """第几个到达率 → 那一行；名字与到达率的大小无关，README 的表才指得到它。"""
    return {f"load{n}": {"rate": float(rate), **row} for n, (rate, row) in enumerate(rows.items(), 1)}


def knee(rows: dict[str, dict], slo: float) -> float:
    """拐点：p95 在 slo 毫秒以内、也没有拒绝的最大到达率；一个也没有是 0。"""
    held = [
        float(rate)
        for rate, row in rows.items()
        if row["ok"] and not row["refused"] and row["whole"]["p95"] <= slo
    ]
    return max(held, default=0.0)


def in_short(config: dict) -> dict:
    """一种配置的要点：拐点、内存、最多每秒几个 token，各到达率的整个回答；每一步的在 configs.json 里。"""
    rows = config["rates"]
    short = {"knee": config["knee"], "memory_mb": config["memory_mb"]}
    short["most_tokens_per_s"] = max(row["tokens_per_s"] for row in rows.values())
    for load, row in rows.items():
        short[load] = {**row["whole"], "refused": row["refused"], "cached": row["cached"]}
    return short


# ---------------------------------------------------------------- 3. 协同遗漏


def coordinated_omission(part: Stage, rate: float, parts: Parts, asks: list[Ask], expected: dict) -> dict:
    """同样的服务，半途卡 STALL_S 秒。闭环一个客户，开环照 rate 来，题数差不多：看各自量到的 p95。"""
    settings = part.settings
    seconds = max(2 * STALL_S, 2 * settings.seconds)
    due = arrivals(allowed(rate, seconds), seconds, settings.seed)
    drawn = draw_asks(asks, len(due), settings.seed)
    rows = {}
    for way in ("closed", "open"):
        stalled = Service(
            parts, threads=settings.threads, most_waiting=1000, stall_at=len(due) // 3, stall_s=STALL_S
        )
        with serving(stalled) as url:
            results = closed_loop(url, drawn, 1) if way == "closed" else open_loop(url, drawn, due)
        rows[way] = summary(results, expected)
        rows[way]["slow"] = sum(each.end - each.due > STALL_S / 4 for each in results)
    return rows


# ---------------------------------------------------------------- 4. 看


def print_config(name: str, config: dict) -> None:
    print(f"\n{LABELS[name]}（毫秒；拐点 每秒 {config['knee']:g} 个；内存最多 {config['memory_mb']:.0f} MB）")
    print(
        "  每秒来  答完/拒绝   整个回答 p50/p95/p99     第一个字 p95  编码 p95  检索 p95  重排 p95  tokens/s  缓存命中"
    )
    for row in config["rates"].values():
        whole = row["whole"]
        print(
            f"{row['rate']:>8g}{row['ok']:>7}/{row['refused']:<5}{whole['p50']:>9.0f}/{whole['p95']:>6.0f}/{whole['p99']:<8.0f}"
            f"{row['first']['p95']:>9.0f}{row['embed']['p95']:>12.1f}{row['search']['p95']:>10.1f}{row['rerank']['p95']:>10.1f}"
            f"{row['tokens_per_s']:>10.0f}{row['cached']:>10.2f}"
        )


def print_omission(rows: dict) -> None:
    print(f"\n服务卡了 {STALL_S:g} 秒，两种打法量到的整个回答（毫秒）：")
    for way, label in (("closed", "闭环，一个客户"), ("open", "开环，照时刻来")):
        row = rows[way]
        whole = "　".join(f"{key} {value:.0f}" for key, value in row["whole"].items())
        print(f"  {label}：{row['ok']} 个，{whole}；等了 {STALL_S / 4:g} 秒以上的 {row['slow']} 个")
    print()


def draw(folder: Path, configs: dict) -> None:
    for key, title in (
        ("p95", "整个回答的 p95|p95 of the whole answer"),
        ("p50", "整个回答的 p50|p50 of the whole answer"),
    ):
        lines = {}
        for name, config in configs.items():
            rows = list(config["rates"].values())
            lines[f"{LABELS[name]}|{name}"] = ([r["rate"] for r in rows], [r["whole"][key] for r in rows])
        line_chart(folder / f"{key}.svg", lines, title, "每秒来几个|arrivals per second", "ms")
    lines = {}
    for name, config in configs.items():
        rows = list(config["rates"].values())
        lines[f"{LABELS[name]}|{name}"] = ([r["rate"] for r in rows], [r["answers_per_second"] for r in rows])
    line_chart(
        folder / "throughput.svg",
        lines,
        "每秒答完几个|Answers per second",
        "每秒来几个|arrivals per second",
        "每秒答完|answers",
    )


# ---------------------------------------------------------------- 5. 只开服务，只打别的服务


def serve(settings: LoadSettings) -> dict:
    work = HOME / "outputs" / settings.preset / "performance_benchmark-serve"
    shutil.rmtree(work, ignore_errors=True)
    parts, asks = build(settings, work)
    service = Service(parts, settings.batch, settings.cache, settings.waiting, settings.threads)
    server = Server(service, settings.port)
    print(
        f"服务开着：{server.url}/ask（只有这台机器连得上）。题例：{asks[0].question}\n按 Ctrl-C 关掉。",
        flush=True,
    )
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print("\n关了。")
    finally:
        server.server_close()
        service.close()
        parts.store.close()
        shutil.rmtree(work, ignore_errors=True)
    return {}


def measure_url(settings: LoadSettings) -> dict:
    corpus = tiny_world_corpus(settings.stories, 3 * settings.questions, ANCHORS, settings.seed)
    questions = [with_reading(corpus, each) for each in corpus.questions if can_ask(each)]
    asks = [Ask(each.text, each.meta["read"], each.answer) for each in questions][: settings.questions]
    few = closed_loop(settings.url, asks[:5], 1, explicit=True)
    if first := next((each for each in few if each.status != "ok"), None):
        raise UserError(f"{settings.url} 没有好好回答：{first.why}。先在另一个窗口用 --serve 开一个。")
    rows = {}
    for rate in settings.given_rates() or [2.0, 5.0, 10.0, 20.0]:
        due = arrivals(rate, settings.seconds, settings.seed)
        drawn = draw_asks(asks, len(due), settings.seed)
        rows[f"{rate:g}"] = summary(open_loop(settings.url, drawn, due, explicit=True))
    slo = settings.slo_ms or KNEE * summary(few)["whole"]["p50"]
    config = {"rates": by_load(rows), "knee": knee(rows, slo), "memory_mb": peak_memory_mb() or 0.0}
    LABELS["url"] = settings.url
    print_config("url", config)
    return config


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(LoadSettings, PRESETS, argv)
    if settings.url:
        return measure_url(settings)
    if settings.serve:
        return serve(settings)
    return run_lesson("performance_benchmark", HOME, settings, learn)


if __name__ == "__main__":
    run_main(main)
