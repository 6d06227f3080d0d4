"""OpenAI 聊天接口的 HTTP 那一面：认钥匙，查请求，排队，把 token 变成文字送出去。算的都在 batching.py。

    POST /v1/chat/completions   流式与不流式
    GET  /v1/models             这里的模型
    GET  /health  /metrics      活着没有；计数（不要钥匙，里面没有谁的话）

一个连接一个线程。问的人挂断了，线程看得到（写不出去，或读到了末尾），让他的座位空出来。
"""

from __future__ import annotations

import contextlib
import hmac
import http.server
import json
import queue
import secrets
import select
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from typing import Any

from batching import Closed, Full, Job
from chat_fields import Asked, Refusal, check_fields, read_body
from chat_text import TextStream
from nlp_common.base.errors import UserError
from nlp_common.lm.chatml import encode_text, prompt_ids
from serve_metrics import Metrics

MOST_DISCARDED = 64 << 20  # 字节
LOOK = 0.2  # 秒：每隔这么久看一眼，问的人还在不在
NO_THINKING = "<think>\n\n</think>\n\n"  # Qwen3：先替它写好一段空的思考，它就直接回答


@dataclass
class Service:
    """一个模型的服务：分词器，转圈的，限度。"""

    name: str
    tokenizer: Any
    batcher: Any  # batching.Batcher，或同样有 submit、close 的
    metrics: Metrics
    stops: list[int]
    context: int
    most_tokens: int  # 一个回答最多几个 token
    key: str = ""  # 空的就不要钥匙
    most_bytes: int = 1 << 20  # 一个请求最多几个字节
    most_connections: int = 128
    temperature: float = 1.0  # 请求没有写时
    thinks: bool = False  # 会思考的模型（Qwen3），让它先想
    can_think: bool = False

    def prompt(self, asked: Asked) -> list[int]:
        ids = prompt_ids(self.tokenizer, asked.turns)
        if self.can_think and not self.thinks:
            ids = ids + encode_text(self.tokenizer, NO_THINKING)
        return ids

    def job(self, asked: Asked) -> Job:
        prompt = self.prompt(asked)
        room = self.context - len(prompt)
        wanted = asked.max_tokens or min(self.most_tokens, max(1, room))
        if wanted > room:
            raise Refusal(
                400,
                f"提示有 {len(prompt)} 个 token，加上回答的 {wanted} 个，超过了一共 {self.context} 个：缩短对话，或改小 max_tokens。",
                "messages",
                "context_length_exceeded",
            )
        return Job(prompt, wanted, self.stops, asked.temperature, asked.top_p, asked.seed)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # 一个连接可以接着问
    server_version, sys_version = "chat", ""
    timeout = 30  # 秒：连上了不说话的、不收的，不占着线程
    disable_nagle_algorithm = True  # 一片文字一到手就送，不等凑成一大包
    wbufsize = 1 << 16  # 写的先攒着，flush 才送：头几行合成一次系统调用，末几行也是

    @property
    def service(self) -> Service:
        return self.server.service

    # ------------------------------------------------------------ 路

    def do_GET(self) -> None:
        path = self.path.split("?")[0].rstrip("/")
        service = self.service
        if path == "/health":
            closed = service.batcher.closed
            return self.send_json(503 if closed else 200, {"status": "closing" if closed else "ok"})
        if path == "/metrics":
            text = service.metrics.text(service.batcher).encode()
            return self.send(200, text, "text/plain; version=0.0.4; charset=utf-8")
        about = {"id": service.name, "object": "model", "created": self.server.started, "owned_by": "local"}
        answers = {"/v1/models": {"object": "list", "data": [about]}, f"/v1/models/{service.name}": about}
        with self.refusals():
            self.check_key()
            if path not in answers:
                raise Refusal(404, f"没有 {path[:80]}。", code="not_found")
            self.send_json(200, answers[path])

    def do_POST(self) -> None:
        self.unread = True  # 请求的内容还没有读：这时拒绝，连接就不能接着用了
        with self.refusals(), self.server.one_more():
            self.check_key()
            if self.path.split("?")[0].rstrip("/") != "/v1/chat/completions":
                raise Refusal(404, f"没有 {self.path[:80]}，只有 /v1/chat/completions。", code="not_found")
            raw = self.read_content()
            service = self.service
            asked = check_fields(read_body(raw), service.name, service.most_tokens, service.temperature)
            job = service.job(asked)
            try:
                service.batcher.submit(job)
            except Full:
                raise Refusal(429, "正忙，队伍满了：过一会儿再来。", code="rate_limit_exceeded") from None
            except Closed:
                raise Refusal(503, "服务正在关。", code="shutting_down") from None
            try:
                self.answer(asked, job)
            except OSError:  # 挂断了，或三十秒不收：写不出去
                self.give_up()
            finally:
                job.left = True  # 说完了的，不起作用；没有说完的，下一圈让出座位

    def check_key(self) -> None:
        """逐字比会泄露对了几个字（错得越靠后越慢）；compare_digest 的时间与对了几个无关。"""
        if self.service.key:
            # http.server 把头里的字节照 latin-1 读成字：编回去，就是原来的字节
            given = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
            if not hmac.compare_digest(given.encode("latin-1", "replace"), self.service.key.encode()):
                raise Refusal(401, "钥匙不对，或没有给：Authorization: Bearer 钥匙。", code="invalid_api_key")

    def read_content(self) -> bytes:
        if "application/json" not in self.headers.get("Content-Type", ""):
            # 别的网页里的脚本，不经许可只能发平常的表单：要求这一项，就不会有网页替人来问
            raise Refusal(415, "Content-Type 要是 application/json。")
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdigit():
            raise Refusal(411, "要有 Content-Length：请求有几个字节。")
        if len(length) > 15 or int(length) > self.service.most_bytes:
            raise Refusal(413, f"请求最多 {self.service.most_bytes} 个字节。", code="request_too_large")
        raw = self.rfile.read(int(length))
        if len(raw) < int(length):
            raise ConnectionError("请求没有发完就断了")
        self.unread = False
        return raw

    def discard(self) -> None:
        """没有读的内容读掉再关：对面还在发的时候关，它收到的是"连接重置"，看不到我们说了什么。"""
        length = self.headers.get("Content-Length", "")
        left = min(int(length), MOST_DISCARDED) if length.isascii() and length.isdigit() else 0
        self.connection.settimeout(0.5)
        while left > 0 and (piece := self.rfile.read(min(left, 1 << 16))):
            left -= len(piece)

    # ------------------------------------------------------------ 回答

    def answer(self, asked: Asked, job: Job) -> None:
        service = self.service
        thinks = service.can_think and service.thinks
        text = TextStream(service.tokenizer, asked.stop, asked.has_tools, thinks)
        number, created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())
        same = {"id": number, "created": created, "model": service.name}
        if asked.stream:
            self.stream(asked, job, text, same | {"object": "chat.completion.chunk"})
            return
        why = ""
        while not why:
            event = self.next_event(job)
            if isinstance(event, str):
                why = event
            elif not text.spoken.stopped:
                text.push(event)
                why = "stop" if text.spoken.stopped else ""
        job.finish(why)  # 碰到 stop 的字样：它还不知道
        self.raise_fault(why)
        text.finish()
        message: dict = {"role": "assistant", "content": text.spoken.content or None}
        if text.spoken.calls:
            message["tool_calls"] = text.spoken.calls
        else:
            message["content"] = text.spoken.content
        if text.spoken.thinking:
            message["reasoning_content"] = text.spoken.thinking
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason(why, text)}
        self.send_json(
            200, same | {"object": "chat.completion", "choices": [choice], "usage": usage(job, text)}
        )

    def stream(self, asked: Asked, job: Job, text: TextStream, same: dict) -> None:
        """一片文字一个 data: 行（SSE）；第一个 token 来了才回 200，在那以前出的错还有自己的状态。"""

        def send(delta: dict, why: str | None = None) -> None:
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": why}
            self.send_event(same | {"choices": [choice]})

        event = self.next_event(job)
        if isinstance(event, str):
            self.raise_fault(event)
        self.start_stream()
        send({"role": "assistant", "content": ""})
        while not isinstance(event, str):
            if piece := text.push(event):
                send({"content": piece})
            event = "stop" if text.spoken.stopped else self.next_event(job)
        job.finish(event)
        try:
            self.raise_fault(event)
        except Refusal as refusal:  # 200 已经说出口了：错误写在流里
            self.send_event(refusal.body)
            self.end_stream()
            return
        if piece := text.finish():
            send({"content": piece})
        if text.spoken.thinking:
            send({"reasoning_content": text.spoken.thinking})
        for index, call in enumerate(text.spoken.calls):
            send({"tool_calls": [{"index": index, **call}]})
        send({}, reason(event, text))
        if asked.with_usage:
            self.send_event(same | {"choices": [], "usage": usage(job, text)})
        self.write_chunk(b"data: [DONE]\n\n")
        self.end_stream()

    def next_event(self, job: Job) -> int | str:
        """下一个 token，或为什么说完了。等着的时候，隔一会儿看看问的人还在不在。"""
        now = time.monotonic()
        if now > getattr(self, "look_at", 0.0):
            self.look_at = now + LOOK
            if hung_up(self.connection):
                raise ConnectionError("挂断了")
        if job.events.empty():
            self.wfile.flush()  # 要等了：攒着的先送出去
        while True:
            try:
                return job.events.get(timeout=LOOK)
            except queue.Empty:
                if hung_up(self.connection):
                    raise ConnectionError("挂断了") from None

    def raise_fault(self, why: str) -> None:
        if why == "shutdown":
            raise Refusal(503, "服务关了，没有说完。", code="shutting_down")
        if why.startswith("error "):
            raise Refusal(500, f"算的时候出了错：{why.removeprefix('error ')[:200]}", code="engine_error")

    # ------------------------------------------------------------ 写

    @contextlib.contextmanager
    def refusals(self):
        try:
            yield
        except Refusal as refusal:
            unread = getattr(self, "unread", False)
            self.close_connection |= unread
            with contextlib.suppress(OSError):
                self.send_json(refusal.status, refusal.body)
                if unread:
                    self.discard()
        except OSError:  # 没有发完就断了、三十秒没有动静
            self.give_up()
        except Exception as error:  # 没有想到的：问的人得到 500，终端上有 traceback，服务照常
            traceback.print_exc()
            self.close_connection = True
            self.send_json(500, Refusal(500, f"服务器出了错：{type(error).__name__}。").body)

    def give_up(self) -> None:
        """这个连接不要了：攒着没有送出去的，关的时候不必再等三十秒。"""
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def send_json(self, status: int, value: dict) -> None:
        self.send(status, json.dumps(value, ensure_ascii=False).encode(), "application/json; charset=utf-8")

    def send(self, status: int, content: bytes, kind: str) -> None:
        self.service.metrics.answered(status)
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        if status in (429, 503):
            self.send_header("Retry-After", "1")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()

    def start_stream(self) -> None:
        self.service.metrics.answered(200)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Cache-Control", "no-cache")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def send_event(self, value: dict) -> None:
        self.write_chunk(b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n")

    def write_chunk(self, content: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(content), content))

    def end_stream(self) -> None:
        self.wfile.write(b"0\r\n\r\n")
        self.wfile.flush()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """http.server 自己的错（不会的方法、太长的头）：也用 OpenAI 的样子。"""
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.send_json(code, Refusal(code, f"请求不对：{message or explain or code}").body)

    def log_message(self, *_: Any) -> None:
        """一个请求一行的日志也要花时间：不印，看 /metrics。"""


def usage(job: Job, text: TextStream) -> dict:
    n = text.spoken.tokens
    return {"prompt_tokens": len(job.prompt), "completion_tokens": n, "total_tokens": len(job.prompt) + n}


def reason(why: str, text: TextStream) -> str:
    return "tool_calls" if text.spoken.calls and why != "length" else why


def hung_up(connection: socket.socket) -> bool:
    """对面关了没有：可读，读出来却是空的。"""
    try:
        readable, _, _ = select.select([connection], [], [], 0)
        return bool(readable) and connection.recv(1, socket.MSG_PEEK) == b""
    except (OSError, ValueError):
        return True


class ChatHTTPServer(http.server.ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = sys.platform != "win32"  # Windows 上是"别人占着也拿来用"，占用了就看不出来
    request_queue_size = 256  # 默认只有 5：一下子来几十个，多出来的要等一秒再连

    def __init__(self, host: str, port: int, service: Service):
        if ":" in host:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((host, port), Handler)
        except OSError as error:
            raise UserError(
                f"{host} 的端口 {port} 用不了（{error.strerror or error}）：换一个 --port，0 是随便哪个空着的。"
            ) from error
        self.service, self.started = service, int(time.time())
        self.places = threading.Semaphore(service.most_connections)
        self.counting = threading.Lock()
        self.answering = 0  # 几个请求的回答还没有送完

    @contextlib.contextmanager
    def one_more(self):
        with self.counting:
            self.answering += 1
        try:
            yield
        finally:
            with self.counting:
                self.answering -= 1

    @property
    def url(self) -> str:
        host = self.server_address[0]
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server_port}"

    def process_request(self, request: Any, address: Any) -> None:
        """连接也有上限：一个连接一个线程，不能来多少开多少。"""
        if self.places.acquire(blocking=False):
            super().process_request(request, address)
            return
        self.service.metrics.answered(429)
        said = json.dumps(Refusal(429, "连接太多：过一会儿再来。", code="rate_limit_exceeded").body).encode()
        with contextlib.suppress(OSError):
            request.setblocking(False)
            request.send(
                b"HTTP/1.1 429 Too Many Requests\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
                b"Connection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(said), said)
            )
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, address: Any) -> None:
        try:
            super().process_request_thread(request, address)
        finally:
            self.places.release()

    def handle_error(self, request: Any, address: Any) -> None:
        """问的人断了线不值一说；别的照常印出来。"""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, address)
