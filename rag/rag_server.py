"""一个小的问答服务：问题 → 编码 → 向量检索、BM25 → 融合、重排 → 生成，答案一边写一边往外送。压力测试用它。

一个干活的线程，前面一条队伍：轮到时，队里有几个就一起算几个（最多 batch 个），不等人。队伍满了就说忙（503），
不无限地排下去。问过的问题，答案记住 cache 个（最久没用的先忘），不必排队。

POST /ask  {"id": "7", "question": "…", "read": "给模型看的短问题，可以没有"}
→ 一行一个 JSON：{"piece": "…"}，…，最后一行 {"done": true, "id", "question", "answer", "tokens", "cached", "times"}
"""

from __future__ import annotations

import contextlib
import http.server
import json
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from nlp_common.base.errors import UserError
from nlp_common.lm.chatml import prompt_ids
from nlp_common.lm.generation import pad_left, stop_tokens, stream_tokens
from rag_common.bm25 import BM25
from rag_common.embed import Embedder
from rag_common.fuse import reciprocal_rank
from rag_common.generate import FromModel, Generator, chat_messages
from rag_common.rerank import Reranker, rank
from rag_common.store import Store

HOST = "127.0.0.1"  # 只听本机
DEPTH, RERANKED = 10, 4  # 两种检索各取前 10 名；融合后的前 4 名重排，第一名递给模型
LONGEST = 65_536  # 一个请求最多几个字节
HALF = "\N{REPLACEMENT CHARACTER}"  # 一个汉字的字节还没有凑齐


@dataclass
class Parts:
    """流水线的几块；几个服务可以用同样的几块，只是不能同时。"""

    embedder: Embedder
    store: Store
    index: BM25
    reranker: Reranker
    generator: Generator


@dataclass
class Job:
    """一个请求；events 里是要送出去的：一片一片的文字，最后是完整的一行，或者出了什么错。"""

    id: str
    question: str
    read: str
    came: float = field(default_factory=time.perf_counter)
    events: queue.Queue = field(default_factory=queue.Queue)
    times: dict[str, float] = field(default_factory=dict)  # 步骤 → 毫秒


# ---------------------------------------------------------------- 服务


class Service:
    """stall_at、stall_s：干到第几批时停多久，装作卡了一下（垃圾回收、换页、别的进程抢走了 CPU）。"""

    def __init__(
        self, parts: Parts, batch: int = 1, cache: int = 0, most_waiting: int = 64, threads: int = 1,
        stall_at: int = -1, stall_s: float = 0.0,
    ):  # fmt: skip
        self.parts, self.batch, self.cache_size, self.threads = parts, batch, cache, threads
        self.stall_at, self.stall_s, self.batches = stall_at, stall_s, 0
        self.waiting: queue.Queue = queue.Queue(most_waiting)
        self.cache: OrderedDict[tuple[str, str], tuple[str, int]] = OrderedDict()
        self.lock = threading.Lock()
        self.worker = threading.Thread(target=self._work, daemon=True)
        self.worker.start()

    def submit(self, job: Job) -> bool:
        """记住的答案马上就有；不然排队。队伍满了是 False。"""
        key = (job.question, job.read)
        with self.lock:
            known = self.cache.get(key)
            if known is not None:
                self.cache.move_to_end(key)
        if known is not None:
            job.events.put({"piece": known[0]})
            job.events.put(done_line(job, *known, cached=True))
            return True
        try:
            self.waiting.put_nowait(job)
        except queue.Full:
            return False
        return True

    def close(self) -> None:
        self.waiting.put(None)
        self.worker.join()

    def _work(self) -> None:
        torch.set_num_threads(self.threads)
        while True:
            jobs, last = self._take()
            if jobs:
                try:
                    self._answer(jobs)
                except Exception as error:  # 一批出了错，等着的人都要知道，下一批照常
                    for job in jobs:
                        job.events.put({"error": f"{type(error).__name__}：{error}"})
            if last:
                return

    def _take(self) -> tuple[list[Job], bool]:
        """等第一个；队里已经有的一起拿走，最多 batch 个。"""
        jobs = [self.waiting.get()]
        while len(jobs) < self.batch and jobs[-1] is not None:
            try:
                jobs.append(self.waiting.get_nowait())
            except queue.Empty:
                break
        return [job for job in jobs if job is not None], jobs[-1] is None

    def _answer(self, jobs: list[Job]) -> None:
        clock = Clock(jobs)
        clock.lap("wait", since_came=True)
        if self.batches == self.stall_at:
            time.sleep(self.stall_s)
            clock.lap("stall")
        self.batches += 1
        parts = self.parts
        vectors = parts.embedder.queries([job.question for job in jobs])  # (B, D)
        clock.lap("embed")
        dense = parts.store.search(vectors, DEPTH)
        sparse = [parts.index.search(job.question, DEPTH) for job in jobs]
        clock.lap("search")
        passages = []
        for job, hits, found in zip(jobs, dense, sparse, strict=True):
            fused = reciprocal_rank([[hit.id for hit in hits], [name for name, _ in found]])
            texts = [chunk.text for chunk in parts.store.get([name for name, _ in fused[:RERANKED]])]
            passages.append([texts[place] for place in rank(parts.reranker, job.question, texts)[:1]])
        clock.lap("rerank")
        said, counts = [""] * len(jobs), [0] * len(jobs)
        for row, piece, tokens in stream_answers(parts.generator, [job.read for job in jobs], passages):
            if not said[row]:
                clock.first(row)
            said[row] += piece
            counts[row] += tokens
            jobs[row].events.put({"piece": piece})
        clock.lap("generate")
        for job, text, tokens in zip(jobs, said, counts, strict=True):
            if self.cache_size:
                with self.lock:
                    self.cache[job.question, job.read] = (text, tokens)
                    while len(self.cache) > self.cache_size:
                        self.cache.popitem(last=False)
            job.events.put(done_line(job, text, tokens, cached=False))


class Clock:
    """一批里每个请求的每一步几毫秒：一起算的，谁都要等整批。"""

    def __init__(self, jobs: list[Job]):
        self.jobs, self.last = jobs, time.perf_counter()

    def lap(self, step: str, since_came: bool = False) -> None:
        now = time.perf_counter()
        for job in self.jobs:
            job.times[step] = 1000 * (now - (job.came if since_came else self.last))
        self.last = now

    def first(self, row: int) -> None:
        """从开始生成到第一片文字。"""
        self.jobs[row].times["first"] = 1000 * (time.perf_counter() - self.last)


def done_line(job: Job, text: str, tokens: int, cached: bool) -> dict:
    return {
        "done": True,
        "id": job.id,
        "question": job.question,
        "answer": text,
        "tokens": tokens,
        "cached": cached,
        "times": job.times,
    }


def stream_answers(
    generator: Generator, questions: Sequence[str], passages: Sequence[Sequence[str]]
) -> Iterator[tuple[int, str, int]]:
    """一批一起生成，谁有了新的文字就给出 (第几个, 文字, 几个 token)。不会一边写一边给的生成器，写完一次给出。"""
    if not isinstance(generator, FromModel):
        for row, answer in enumerate(generator.answer(questions, passages)):
            yield row, answer.text, len(answer.text)
        return
    tokenizer, model = generator.tokenizer, generator.model
    prompts = [prompt_ids(tokenizer, m) for m in map(generator_messages(generator), questions, passages)]
    stops = stop_tokens(tokenizer)
    ids, mask = pad_left(prompts, tokenizer.pad_token_id, model.device)
    written: list[list[int]] = [[] for _ in prompts]
    shown, ended = [""] * len(prompts), [False] * len(prompts)
    for step in stream_tokens(model, ids, mask, generator.max_new_tokens, stops, tokenizer.pad_token_id):
        for row, token in enumerate(step.tolist()):  # step (B,)
            ended[row] = ended[row] or token in stops
            if ended[row]:
                continue
            written[row].append(token)
            text = tokenizer.decode(written[row])
            if not text.endswith(HALF) and len(text) > len(shown[row]):
                yield row, text[len(shown[row]) :], 1
                shown[row] = text


def generator_messages(generator: FromModel) -> Any:
    """小世界的模型只认得"故事，换行，问题"。"""
    if generator.tiny_world:
        return lambda question, texts: [{"role": "user", "content": "\n".join([*texts, question])}]
    return chat_messages


# ---------------------------------------------------------------- HTTP


class Handler(http.server.BaseHTTPRequestHandler):
    timeout = 30  # 秒：连上了不说话的，不占着线程

    def do_POST(self) -> None:
        try:
            size = int(self.headers.get("Content-Length", 0))
            if not 0 < size <= LONGEST:
                raise ValueError(f"请求要在 1 到 {LONGEST} 字节之间")
            asked = json.loads(self.rfile.read(size))
            job = Job(str(asked["id"]), str(asked["question"]), str(asked.get("read") or asked["question"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return self.reply(400, {"error": f"请求不成样子：{error}"})
        if self.path != "/ask":
            return self.reply(404, {"error": f"没有 {self.path}，只有 /ask"})
        if not self.server.service.submit(job):
            return self.reply(503, {"error": "队伍满了，等一等再来"})
        self.reply(200)
        with contextlib.suppress(ConnectionError):  # 问的人走了：答案算完就算了
            while True:
                event = job.events.get()
                self.line(event)
                if "piece" not in event:
                    return None

    def reply(self, status: int, line: dict | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/x-ndjson; charset=utf-8")
        self.end_headers()
        if line is not None:
            self.line(line)

    def line(self, value: dict) -> None:
        self.wfile.write(json.dumps(value, ensure_ascii=False).encode() + b"\n")
        self.wfile.flush()

    def log_message(self, *args: Any) -> None:
        """压力测试时一行行的日志也要花时间：不印。"""


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256  # 默认只有 5：一下子来几十个，多出来的要等一秒再连

    def __init__(self, service: Service, port: int = 0):
        try:
            super().__init__((HOST, port), Handler)
        except OSError as error:
            raise UserError(f"端口 {port} 用不了（{error.strerror}）：换一个 --port。") from error
        self.service = service

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_port}"


@contextlib.contextmanager
def serving(service: Service) -> Iterator[str]:
    """在这里面服务开着，给出网址；出去时关好。"""
    server = Server(service)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server.url
    finally:
        server.shutdown()
        server.server_close()
        service.close()
