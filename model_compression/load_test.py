"""给聊天服务打压力：一个一个地答、静态批、连续批，各有多快；挂断、太忙的时候，有没有谁丢了、串了。

你会学到
  1. 每秒写几个 token（吞吐）与等多久看到第一个字（延迟）是两回事：看 p50、p95、p99，不看平均。
  2. 一个一个地答，十六个人同时来，第一个字要等前面的人全说完；坐在一起，几步之内都有。
  3. 静态批也快，可是后来的要等这一批里最长的那个；连续批随到随坐。
  4. 快不算，还要对：每个回答与自己那一题单独问的一字不差，一个不丢，一个不串；挂断的让座，忙了说忙。

怎么运行
  python load_test.py                               # 自己开服务（serve.py，另一个进程），自己打，一分钟
  python load_test.py --engines torch,openvino --output_dir outputs/engines_load
  python load_test.py --url http://127.0.0.1:11434/v1 --server_model qwen2.5:0.5b    # 打别的服务：vLLM、Ollama …

应当看到（tiny，实测见本文件夹的 README.md）：16 个客户时，连续批是一个一个地答的三倍上下，真的权重（--model smollm2）三倍半以上；丢的、串的都是 0。

参考：rag/performance_benchmark.py（开环的压力测试）；Yu et al. 2022（Orca）。
"""

from nlp_common.base.cli import run_main

import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import engines
from load_clients import Target, ask_all, hang_up_call, summary
from nlp_common.base.arguments import COUNT, Limits, option
from nlp_common.base.console import print_table
from nlp_common.base.errors import UserError
from nlp_common.base.load import check_target
from nlp_common.draw.plots import line_chart
from nlp_common.lm.loading import load_causal_lm
from nlp_common.lm.replies import MAX_REPLY, reply_to
from nlp_common.tiny import world
from nlp_common.train.chain import chain_model
from nlp_common.train.lesson import run_lesson, run_part
from nlp_common.train.settings import LessonSettings, parse_settings
from nlp_common.train.stage import Stage

HOME = Path(__file__).resolve().parent
PRESETS = {"tiny": {"n_questions": 160}, "full": {"n_questions": 640}}
CLIENTS = (1, 4, 16)
WAYS = {
    "one": (["--slots", "1"], "一个一个地答|one at a time"),
    "static": (["--batching", "static"], "静态批|static batches"),
    "continuous": ([], "连续批|continuous batching"),
}
READY = re.compile(r"服务开着：(http://\S+?/v1)")
BUSY = (2, 4)  # 太忙的那一场：几个座位，队伍多长


@dataclass
class LoadTestSettings(LessonSettings):
    NOT_IN_FINGERPRINT = LessonSettings.NOT_IN_FINGERPRINT | {"url", "server_model", "api_key_env"}

    model: str | None = option("服务用哪个模型（小世界的）；默认是 Qwen 链 tiny 预设的 SFT 模型")
    n_questions: int | None = option("16 个客户时一共问几题；客户少的，题也少", limits=Limits(at_least=16))
    engines: str = option("哪几个引擎，逗号隔开；没有装的跳过", "torch")
    threads: int = option("服务用几个线程算", 1, COUNT)
    url: str | None = option("打这个已经开着的服务（到 /v1 为止）；不在本机的，也只有这样明写才打")
    server_model: str | None = option("--url 的服务上的哪个模型")
    api_key_env: str = option("--url 的钥匙在哪个环境变量里", "OPENAI_API_KEY")

    def check(self) -> None:
        if bool(self.url) != bool(self.server_model):
            raise UserError("--url 与 --server_model 要一起给：网址，和那里的哪个模型。")
        if self.url:
            check_target(self.url, explicit=True)
        names = self.engines.replace(" ", "").split(",")
        if wrong := [name for name in names if name not in engines.PRECISIONS]:
            raise UserError(
                f"--engines 不认识 {wrong[0] or '空的一项'}，可以是 {'、'.join(engines.PRECISIONS)}，逗号隔开。"
            )


# ---------------------------------------------------------------- 1. 全课


def learn(stage: Stage, path: str) -> dict:
    settings = stage.settings
    questions = world.heldout_questions(settings.n_questions, seed=settings.seed)
    expected = alone(path, questions)
    metrics: dict = {"n": len(questions)}
    for engine in dict.fromkeys(settings.engines.replace(" ", "").split(",")):
        if command := engines.missing(engine):
            print(f"没有装 {engines.NAMES[engine]}，跳过它：{command}。")
            continue
        ways = [way for way in WAYS if not (engine == "llama" and way == "static")]  # 它自己排座位
        metrics[engine] = {}
        for way in ways:
            work = partial(try_way, path=path, engine=engine, way=way, questions=questions, expected=expected)
            metrics[engine][way] = run_part(stage, f"{engine}_{way}", work)
        show(engine, metrics[engine])
    if not (tried := [name for name in engines.PRECISIONS if name in metrics]):
        raise UserError("这几个引擎一个也没有装。")
    first = metrics[tried[0]]
    metrics["times_continuous"] = (
        first["continuous"]["clients16"]["tokens_per_s"] / first["one"]["clients16"]["tokens_per_s"]
    )
    metrics["hang_up"] = hang_ups(path, tried[0], questions, expected, settings)
    metrics["busy"] = too_busy(path, tried[0], questions, expected, settings)
    show_faults(metrics)
    return stage.save(metrics, {"name": "tiny_world"}, partial(draw, ways=first))


def alone(path: str, questions: list[dict]) -> dict[int, str]:
    """每道题单独的贪心回答：压力下的要与它一字不差。"""
    tokenizer, model = load_causal_lm(path)
    replies = reply_to(model, tokenizer, questions, MAX_REPLY)
    return {id(question): reply["text"] for question, reply in zip(questions, replies, strict=True)}


# ---------------------------------------------------------------- 2. 一种做法，几个客户


def try_way(part: Stage, path: str, engine: str, way: str, questions: list[dict], expected: dict) -> dict:
    rows = {}
    with running(path, part.settings.threads, "--engine", engine, *WAYS[way][0]) as target:
        ask_all(target, questions[:4], 2, temperature=0, max_tokens=MAX_REPLY)  # 热身
        for clients in CLIENTS:
            some = questions[: len(questions) if clients == max(CLIENTS) else len(questions) // 4]
            before = counters(target)
            calls = ask_all(target, some, clients, temperature=0, max_tokens=MAX_REPLY)
            rows[f"clients{clients}"] = summary(calls, expected) | {
                "rows_a_step": rows_a_step(before, counters(target))
            }
    return rows


@contextmanager
def running(path: str, threads: int, *options: str, script: str = "serve.py") -> Iterator[Target]:
    """服务另开一个进程：打的人与答的人不抢同一个 Python。出去时关掉它。"""
    command = [sys.executable, script, "--model", path, "--name", "tiny"]
    options = ("--port", "0", "--threads", str(threads), *options)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": str(threads)}
    server = subprocess.Popen(
        [*command, *options], cwd=HOME, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, encoding="utf-8",
    )  # fmt: skip
    try:
        said = ""
        for line in server.stdout:
            said += line
            if found := READY.search(line):
                break
        else:
            raise UserError(f"{script} 没有开起来：{said.strip()[-500:]}")
        # 后面它再说什么也要读走：管道满了，它就停在那里等
        threading.Thread(target=server.stdout.read, daemon=True).start()
        yield Target(found[1], "tiny", said=said)
    finally:
        server.terminate()
        try:
            server.wait(15)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        server.stdout.close()


def counters(target: Target) -> dict[str, float]:
    """/metrics 里没有标签的那些数。"""
    with urllib.request.urlopen(target.url.removesuffix("/v1") + "/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return {line.split()[0]: float(line.split()[1]) for line in lines if line[0] != "#" and "{" not in line}


def rows_a_step(before: dict, after: dict) -> float:
    """每一圈平均几个人在座。"""
    steps, rows = (
        after[f"chat_{name}"] - before[f"chat_{name}"] for name in ("steps_total", "step_rows_total")
    )
    return rows / steps if steps else 0.0


# ---------------------------------------------------------------- 3. 挂断、太忙


def hang_ups(path: str, engine: str, questions: list[dict], expected: dict, settings) -> dict:
    """16 个客户说到一半就挂断（温度 2，要写很长），接着 16 个正经问的：座位都空出来了，答案还是自己的。"""
    with running(path, settings.threads, "--engine", engine) as target:
        ask_all(target, questions[:32], 16, hang_up_call, temperature=2, max_tokens=300, seed=settings.seed)
        started = time.perf_counter()
        calls = ask_all(target, questions[:32], 16, temperature=0, max_tokens=MAX_REPLY)
        found = summary(calls, expected)
        found["after_ms"] = 1000 * (time.perf_counter() - started)
        for _ in range(40):
            now = counters(target)
            if not now["chat_running"]:
                break
            time.sleep(0.05)
        return found | {"cancelled": now["chat_cancelled_total"], "still_seated": now["chat_running"]}


def too_busy(path: str, engine: str, questions: list[dict], expected: dict, settings) -> dict:
    """两个座位、队伍四个长，64 个人同时来：答的都对，答不了的马上说忙（429），没有谁一直等着。"""
    slots, waiting = BUSY
    many = (questions * 4)[:64]
    with running(
        path, settings.threads, "--engine", engine, "--slots", str(slots), "--waiting", str(waiting)
    ) as target:
        started = time.perf_counter()
        calls = ask_all(target, many, 64, temperature=0, max_tokens=MAX_REPLY)
        return summary(calls, expected) | {"all_ms": 1000 * (time.perf_counter() - started)}


# ---------------------------------------------------------------- 4. 给人看


def show(engine: str, ways: dict) -> None:
    print(f"\n{engines.NAMES[engine]}（等第一个字：毫秒，p50／p95／p99）")
    head = [
        "",
        "客户",
        "每秒 token",
        "第一个字",
        "整个回答 p50",
        "每圈几人",
        "答完",
        "丢",
        "串",
        "与单独问的相同",
    ]
    rows = [head]
    for way, by_clients in ways.items():
        for name, row in by_clients.items():
            first = "／".join(f"{row['first_ms'][p]:.0f}" for p in ("p50", "p95", "p99"))
            rows.append(
                [WAYS[way][1].split("|")[0], name.removeprefix("clients"), f"{row['tokens_per_s']:,.0f}", first,
                 f"{row['whole_ms']['p50']:.0f}", f"{row['rows_a_step']:.1f}", row["ok"], row["lost"], row["mixed"],
                 f"{row['same']:.3f}"]
            )  # fmt: skip
    print_table(rows)


def show_faults(metrics: dict) -> None:
    gone, busy = metrics["hang_up"], metrics["busy"]
    print(f"\n16 个客户，连续批是一个一个地答的 {metrics['times_continuous']:.1f} 倍。")
    print(
        f"32 个说到一半挂断（{gone['cancelled']:.0f} 个还没有说完）：之后还占着座位的 {gone['still_seated']:.0f} 个；"
        f"接着问的 {gone['ok']} 个答完，丢 {gone['lost']}，串 {gone['mixed']}。"
    )
    print(
        f"{BUSY[0]} 个座位、队伍 {BUSY[1]} 个长，64 个人同时来：答完 {busy['ok']}，说忙（429）{busy['busy']}，"
        f"丢 {busy['lost']}，串 {busy['mixed']}；{busy['all_ms']:.0f} 毫秒之内都有了下文。"
    )


def draw(folder: Path, ways: dict) -> None:
    for name, pick, title, unit in (
        ("throughput", lambda row: row["tokens_per_s"], "每秒写几个 token|Throughput", "token/s"),
        ("first_token", lambda row: row["first_ms"]["p95"], "第一个字的 p95|p95 time to first token", "ms"),
    ):
        lines = {
            WAYS[way][1]: (CLIENTS, [pick(rows[f"clients{n}"]) for n in CLIENTS])
            for way, rows in ways.items()
        }
        line_chart(folder / f"serve_{name}.svg", lines, title, "几个客户同时问|clients", unit)


# ---------------------------------------------------------------- 5. 打别的服务


def try_other(settings: LoadTestSettings) -> dict:
    """--url：别处开着的服务。不知道它单独怎样答，只看答对没有、快不快。"""
    questions = world.heldout_questions(settings.n_questions, seed=settings.seed)
    target = Target(settings.url, settings.server_model, os.environ.get(settings.api_key_env, ""), True)
    rows = [["客户", "每秒 token", "第一个字 p50", "p95", "p99", "答完", "说忙", "丢", "答对"]]
    found = {}
    for clients in CLIENTS:
        calls = ask_all(target, questions[: 4 * clients], clients, temperature=0, max_tokens=64)
        row = summary(calls, {id(question): "" for question in questions})
        found[f"clients{clients}"] = row
        first = [f"{row['first_ms'][p]:.0f}" for p in ("p50", "p95", "p99")]
        rows.append(
            [
                clients,
                f"{row['tokens_per_s']:,.0f}",
                *first,
                row["ok"],
                row["busy"],
                row["lost"],
                f"{row['right']:.3f}",
            ]
        )
        if why := next((call.why for call in calls if call.why), ""):
            print(f"{clients} 个客户时有没答成的：{why[:200]}")
    print_table(rows)
    return found


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(LoadTestSettings, PRESETS, argv)
    if settings.url:
        return try_other(settings)
    found = chain_model("sft", settings.model)
    start = f"{found['stage']}:{found['id']}"
    return run_lesson("load_test", HOME, settings, partial(learn, path=found["path"]), start=start)


if __name__ == "__main__":
    run_main(main)
