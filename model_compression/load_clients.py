"""打压力的客户：几个人同时问，各自读完（或读一片就挂断）再问下一个。什么说 OpenAI 接口的服务器都能打。

量的是：从发出到第一片文字、到说完各多久；每个请求的下场；答案是不是它自己那一题的。
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from nlp_common.base.load import check_target, percentiles

TIMEOUT = 60.0  # 秒


@dataclass
class Call:
    """一个请求和它的下场；时刻是秒，从这一批开始数起。"""

    question: dict  # 小世界的一题：messages、answer …
    sent: float = 0.0
    first: float = 0.0
    end: float = 0.0
    status: int = 0  # HTTP 状态；0 是断了、超时
    text: str = ""
    finished: str = ""  # finish_reason；空的是没有说完
    tokens: int = 0
    number: str = ""  # 服务器给的编号
    why: str = ""


@dataclass(frozen=True)
class Target:
    """打谁。url 到 /v1 为止；explicit 是明写的 --url；said 是我们自己开的服务开起来时说的话。"""

    url: str
    model: str
    key: str = ""
    explicit: bool = False
    said: str = ""

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(*check_target(self.url, self.explicit), timeout=TIMEOUT)

    def send(self, connection: http.client.HTTPConnection, body: dict) -> http.client.HTTPResponse:
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        path = urlsplit(self.url).path.rstrip("/") + "/chat/completions"
        connection.request("POST", path, json.dumps(body, ensure_ascii=False).encode(), headers)
        return connection.getresponse()


def ask_all(
    target: Target, questions: Sequence[dict], clients: int, one: Callable | None = None, **params
) -> list[Call]:
    """clients 个客户分这些题，各自答完一个再问下一个；one 默认是 stream_call。"""
    calls = [Call(question) for question in questions]
    started = time.perf_counter()

    def client(mine: list[Call]) -> None:
        connection = target.connect()  # 一个客户一个连接，一题接一题地用，与 openai 的客户端一样
        for call in mine:
            (one or stream_call)(target, connection, call, started, params)
        connection.close()

    threads = [
        threading.Thread(target=client, args=(calls[i::clients],), daemon=True) for i in range(clients)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return calls


def stream_call(
    target: Target,
    connection: http.client.HTTPConnection,
    call: Call,
    started: float,
    params: dict,
    at_most: int | None = None,
) -> None:
    """流式地问一题，读到 [DONE]；at_most 是读到几片文字就挂断。断了的连接，下一题自己重新连。"""
    body = {"model": target.model, "messages": call.question["messages"], "stream": True,
            "stream_options": {"include_usage": True}, **params}  # fmt: skip
    call.sent = time.perf_counter() - started
    pieces = 0
    try:
        answer = target.send(connection, body)
        call.status = answer.status
        if answer.status != 200:
            call.why = answer.read().decode("utf-8", "replace")[:500]  # 读完，这个连接才能接着用
            return
        for line in answer:
            if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                continue
            event = json.loads(line[len(b"data: ") :])
            if "error" in event:
                call.why = event["error"]["message"]
                connection.close()
                return
            call.number = event["id"]
            if event.get("usage"):
                call.tokens = event["usage"]["completion_tokens"]
            for choice in event["choices"]:
                if piece := choice["delta"].get("content"):
                    call.first = call.first or time.perf_counter() - started
                    call.text += piece
                    pieces += 1
                call.finished = choice["finish_reason"] or call.finished
            if at_most is not None and pieces >= at_most:
                connection.close()
                return
    except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
        call.status, call.why = 0, f"{type(error).__name__}：{error}"
        connection.close()
    finally:
        call.end = time.perf_counter() - started


def hang_up_call(
    target: Target, connection: http.client.HTTPConnection, call: Call, started: float, params: dict
) -> None:
    """读到第一片文字就挂断。"""
    stream_call(target, connection, call, started, params, at_most=1)


def summary(calls: Sequence[Call], expected: dict[int, str]) -> dict:
    """一批 → 一行。expected：题的 id() → 单独问时的答案；答的不是它、而是别人那一题的，就是串了。"""
    good = [call for call in calls if call.status == 200 and call.finished]
    others = set(expected.values())
    row: dict = {
        "sent": len(calls),
        "ok": len(good),
        "busy": sum(call.status == 429 for call in calls),
        "lost": sum(
            call.status not in (200, 429) or (call.status == 200 and not call.finished) for call in calls
        ),
        "mixed": sum(call.text != expected[id(call.question)] and call.text in others for call in good),
        "same": sum(call.text == expected[id(call.question)] for call in good) / max(1, len(good)),
        "right": sum(call.question["answer"] in call.text for call in good) / max(1, len(good)),
        "repeated_ids": len(good) - len({call.number for call in good}),
    }
    row["first_ms"] = percentiles([1000 * (call.first - call.sent) for call in good if call.first])
    row["whole_ms"] = percentiles([1000 * (call.end - call.sent) for call in good])
    took = max((call.end for call in calls), default=0.0) - min((call.sent for call in calls), default=0.0)
    row["tokens_per_s"] = sum(call.tokens for call in good) / took if took else 0.0
    row["answers_per_s"] = len(good) / took if took else 0.0
    return row
