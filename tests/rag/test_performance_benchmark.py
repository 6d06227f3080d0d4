"""打压力：到达的时刻由种子定；请求不丢、不串；只打本机；忙了就说忙；服务与打的人各自的坏情况。"""

import http.client
import http.server
import itertools
import json
import socket
import threading
import time

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import load_generator as load
import performance_benchmark as benchmark
from load_generator import Ask, Result
from nlp_common.base.errors import UserError
from rag_common.generate import Answer
from rag_server import Job, Parts, Service, serving

QUICK = ["--preset", "tiny", "--embedder", "hashed", "--generator", "extract", "--stories", "20", "--questions", "10",
         "--seconds", "0.3", "--rates", "20,60"]  # fmt: skip


def parsed(*more):
    return benchmark.parse_settings(benchmark.LoadSettings, benchmark.PRESETS, [*QUICK, *more])


class Slow:
    """每批用 seconds 秒的生成器；答案就是问题，串了一看便知。"""

    name = "slow"

    def __init__(self, seconds=0.0):
        self.seconds, self.sizes = seconds, []

    def answer(self, questions, passages):
        self.sizes.append(len(questions))
        time.sleep(self.seconds)
        return [Answer(f"答：{question}") for question in questions]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    parts, asks = benchmark.build(parsed(), tmp_path_factory.mktemp("load"))
    yield parts, asks
    parts.store.close()


def with_generator(parts: Parts, generator) -> Parts:
    return Parts(parts.embedder, parts.store, parts.index, parts.reranker, generator)


def own_answers(asks):
    return {ask: f"答：{ask.read}" for ask in asks}


# ---------------------------------------------------------------- 时刻与题


@hypothesis_settings(max_examples=30, deadline=None)
@given(st.floats(0.5, 200), st.floats(0.1, 5), st.integers(0, 99))
def test_arrivals_are_decided_beforehand(rate, seconds, seed):
    due = load.arrivals(rate, seconds, seed)
    assert due == load.arrivals(rate, seconds, seed) == sorted(due)
    assert all(0 < each < seconds for each in due)


def test_arrivals_are_poisson():
    due = load.arrivals(100, 40, 0)
    gaps = [b - a for a, b in itertools.pairwise(due)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(0.01, rel=0.1)
    assert sum(gap > mean for gap in gaps) / len(gaps) == pytest.approx(0.368, abs=0.03)  # e⁻¹
    assert due != load.arrivals(100, 40, 1)


@pytest.mark.parametrize(
    ("rate", "seconds"), [(0, 1), (-1, 1), (501, 1), (10, 0), (500, 60), (float("nan"), 1)]
)
def test_bounded(rate, seconds):
    with pytest.raises(UserError, match="每秒"):
        load.arrivals(rate, seconds, 0)


@hypothesis_settings(max_examples=30, deadline=None)
@given(st.floats(1e-3, 1e6), st.floats(0.1, 600))
def test_a_fast_machine_is_not_hit_without_bound(capacity, seconds):
    rates = benchmark.rates_for(capacity, seconds)
    assert rates == sorted(set(rates)) and rates[0] > 0 and rates[-1] <= load.MOST_RATE
    load.arrivals(rates[-1], seconds, 0)  # 在许可之内


def test_popular_questions_come_more_often():
    asks = [Ask(str(n)) for n in range(20)]
    drawn = load.draw_asks(asks, 2000, 0)
    assert drawn == load.draw_asks(asks, 2000, 0)
    assert drawn.count(asks[0]) > 3 * drawn.count(asks[9]) > 0


# ---------------------------------------------------------------- 数


def test_percentiles_by_hand():
    assert load.percentiles(list(range(1, 101))) == {"p50": 50, "p95": 95, "p99": 99}
    assert load.percentiles([7]) == {"p50": 7, "p95": 7, "p99": 7}
    assert load.percentiles([]) == {"p50": 0, "p95": 0, "p99": 0}


def answered(name, ask, said, **more):
    line = {
        "id": name,
        "question": ask.question,
        "answer": said,
        "tokens": 2,
        "cached": False,
        "times": {"embed": 3.0},
    }
    return Result(name, ask, 1.0, 1.0, 1.1, 1.5, "ok", {**line, **more})


def test_fates_by_hand():
    one, two = Ask("甲", answer="对"), Ask("乙", answer="错")
    good = answered("1", one, "对的")
    results = [good, answered("2", two, "不知道"), answered("3", one, "对的", id="4"), answered("4", one, "对的", question="乙"),
               answered("5", one, "对了"), Result("6", one, 0, status="refused"), Result("7", one, 0, status="failed"), Result("8", one, 0)]  # fmt: skip
    counts = load.count_fates(results, {one: "对的", two: "不知道"})
    assert counts == {"sent": 8, "ok": 5, "refused": 1, "failed": 1, "lost": 1, "mixed": 3, "wrong": 1}
    row = load.summary([good])
    assert row["whole"]["p99"] == pytest.approx(500) and row["first"]["p50"] == pytest.approx(100)
    assert (
        row["embed"]["p50"] == 3
        and row["tokens_per_s"] == pytest.approx(4)
        and row["answers_per_second"] == pytest.approx(2)
    )


def test_knee_by_hand():
    def row(p95, refused=0, ok=10):
        return {"whole": {"p95": p95}, "refused": refused, "ok": ok}

    assert benchmark.knee({"5": row(10), "10": row(90), "20": row(101), "40": row(150)}, 100) == 10
    # 忙的机器上中间一档碰巧慢了，后面的又在要求以内：照最大的算
    assert benchmark.knee({"5": row(10), "10": row(101), "20": row(90)}, 100) == 20
    assert benchmark.knee({"5": row(10), "10": row(10, refused=1)}, 100) == 5
    assert benchmark.knee({"5": row(200)}, 100) == 0 and benchmark.knee({"5": row(0, ok=0)}, 100) == 0


# ---------------------------------------------------------------- 不丢，不串


@pytest.mark.parametrize(("batch", "cache"), [(1, 0), (8, 0), (1, 4), (8, 4)])
def test_no_answer_is_lost_or_mixed_up(built, batch, cache):
    parts, asks = built
    drawn = load.draw_asks(asks, 120, 0)
    generator = Slow(0.002)
    service = Service(with_generator(parts, generator), batch, cache, most_waiting=200)
    with serving(service) as url:
        results = load.open_loop(url, drawn, [0.001 * n for n in range(120)])
    counts = load.count_fates(results, own_answers(asks))
    assert counts["ok"] == 120 and not counts["mixed"] and not counts["lost"] and not counts["failed"]
    assert (max(generator.sizes) > 1) == (batch > 1) and max(generator.sizes) <= batch
    assert any(each.line["cached"] for each in results) == bool(cache) and len(service.cache) <= cache


def test_the_chain_of_stages_is_timed(built):
    parts, asks = built
    with serving(Service(parts)) as url:
        [result] = load.closed_loop(url, asks[:1], 1)
    assert set(result.line["times"]) == {"wait", "embed", "search", "rerank", "first", "generate"}
    inside = sum(value for step, value in result.line["times"].items() if step != "first")
    assert inside <= 1000 * (result.end - result.sent) and result.sent <= result.first <= result.end


class Held(Slow):
    """放行（free）之前不答：队伍多长，不看机器快慢。"""

    def __init__(self):
        super().__init__()
        self.started, self.free = threading.Event(), threading.Event()

    def answer(self, questions, passages):
        self.started.set()
        assert self.free.wait(60)
        return super().answer(questions, passages)


def test_a_full_queue_says_so(built):
    """一个在答，两个在等，再来的说忙；放行之后，三个都答完。"""
    parts, asks = built
    generator = Held()
    service = Service(with_generator(parts, generator), most_waiting=2)
    jobs = [Job(str(n), asks[0].question, asks[0].read) for n in range(3)]
    with serving(service) as url:
        assert service.submit(jobs[0]) and generator.started.wait(60)
        assert service.submit(jobs[1]) and service.submit(jobs[2])
        refused = load.open_loop(url, asks[:1] * 5, [0.0] * 5)
        generator.free.set()
        for job in jobs:
            while not (line := job.events.get(timeout=60)).get("done"):
                pass
            assert line["id"] == job.id
    counts = load.count_fates(refused)
    assert counts["refused"] == 5 and "队伍满了" in refused[0].why


def test_open_loop_sees_a_stall_that_closed_loop_hides(built):
    """卡 0.4 秒。闭环：30 个里只有 1 个慢，p95 看不见；开环：那 0.4 秒里来的都慢。"""
    parts, asks = built
    slow = {}
    for way in ("closed", "open"):
        service = Service(with_generator(parts, Slow()), stall_at=5, stall_s=0.4)
        with serving(service) as url:
            drawn = [asks[0]] * 30
            results = (
                load.closed_loop(url, drawn, 1)
                if way == "closed"
                else load.open_loop(url, drawn, [0.02 * n for n in range(30)])
            )
        slow[way] = sum(each.end - each.due > 0.1 for each in results)
    assert 2 * slow["closed"] < slow["open"]  # 闭环应当正好 1 个，开环二十个；忙的机器上多给几个


def test_a_fault_in_one_batch_reaches_the_asker_and_not_the_next(built):
    class Sometimes(Slow):
        def answer(self, questions, passages):
            if questions[0] == "坏":
                raise RuntimeError("坏了")
            return super().answer(questions, passages)

    parts, asks = built
    bad = Ask("坏", "坏")
    with serving(Service(with_generator(parts, Sometimes()))) as url:
        results = load.closed_loop(url, [bad, asks[0], bad, asks[1]], 1)
    assert [each.status for each in results] == ["failed", "ok", "failed", "ok"] and "坏了" in results[0].why


# ---------------------------------------------------------------- 坏的请求，坏的服务


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [("/ask", b"", 400), ("/ask", b"{", 400), ("/ask", b"[1]", 400), ("/ask", b'{"id": 1}', 400),
     ("/ask", b"\xff\xfe", 400), ("/", '{"id": 1, "question": "甲"}'.encode(), 404)],
)  # fmt: skip
def test_bad_requests(built, path, body, status):
    with serving(Service(built[0])) as url:
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
        connection.request("POST", path, body)
        answer = connection.getresponse()
        assert answer.status == status and "error" in json.loads(answer.read())


def test_a_server_that_breaks_off_is_a_failure():
    class Half(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write('{"piece": "半"}\n'.encode())

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Half)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    [result] = load.closed_loop(f"http://127.0.0.1:{server.server_port}", [Ask("甲")], 1)
    server.shutdown()
    assert result.status == "failed" and "断了" in result.why


def test_nobody_listens(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    [result] = load.closed_loop(f"http://127.0.0.1:{port}", [Ask("甲")], 1)
    assert result.status == "failed"
    with pytest.raises(UserError, match="没有好好回答"):
        benchmark.main([*QUICK, "--url", f"http://127.0.0.1:{port}"])


@pytest.mark.parametrize("url", ["http://192.0.2.1:80", "http://[2001:db8::1]:80", "http://0.0.0.0:80"])
def test_only_this_machine(url):
    with pytest.raises(UserError, match="不是这台机器"):
        load.open_loop(url, [Ask("甲")], [0.0])
    with pytest.raises(UserError, match="不是这台机器"):
        load.closed_loop(url, [Ask("甲")], 1)
    assert load.check_target(url, explicit=True)[1] == 80


def test_this_machine_is_fine():
    for url in ("http://127.0.0.1:1", "http://localhost:1", "http://[::1]:1"):
        assert load.check_target(url, explicit=False)[1] == 1


def test_a_cached_answer_needs_no_place_in_the_queue(built):
    parts, asks = built
    service = Service(with_generator(parts, Slow()), cache=2, most_waiting=1)
    for ask in asks[:3]:
        job = Job("1", ask.question, ask.read)
        assert service.submit(job)
        while not job.events.get(timeout=10).get("done"):
            pass
    assert [key[0] for key in service.cache] == [ask.question for ask in asks[1:3]]  # 最久没用的忘了
    service.close()


# ---------------------------------------------------------------- 整个脚本


def test_script(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "STALL_S", 0.2)
    out = ["--output_dir", str(tmp_path / "out")]
    record = benchmark.main([*QUICK, *out])
    metrics = record["metrics"]
    assert metrics["lost"] == 0 and metrics["mixed"] == 0  # 抄一句的生成器答不对几题，不看对错
    per_config = len(load.arrivals(20, 0.3, 0)) + len(load.arrivals(60, 0.3, 0))
    assert metrics["sent"] == per_config * len(benchmark.CONFIGS)
    assert {each.name for each in (tmp_path / "out").iterdir()} == {
        "run.json", "configs.json", "p50.svg", "p95.svg", "throughput.svg",
    }  # fmt: skip
    assert "拐点" in capsys.readouterr().out
    assert benchmark.main([*QUICK, *out]) == record


def test_url_measures_a_running_server(built, capsys):
    with serving(Service(built[0])) as url:
        found = benchmark.main([*QUICK, "--url", url])
    assert [row["rate"] for row in found["rates"].values()] == [20, 60]
    assert all(row["ok"] == row["sent"] and not row["mixed"] for row in found["rates"].values())


@pytest.mark.parametrize(
    ("flags", "said"),
    [(["--rates", "a"], "rates"), (["--rates", "0"], "每秒"), (["--rates", "1000"], "每秒"), (["--seconds", "0"], "seconds"),
     (["--url", "ftp://127.0.0.1"], "不是网址"), (["--url", "http://127.0.0.1:x"], "端口"), (["--slo_ms", "0"], "slo_ms")],
)  # fmt: skip
def test_bad_settings(flags, said):
    with pytest.raises(UserError, match=said):
        benchmark.main([*QUICK, *flags])
