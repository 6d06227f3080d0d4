"""测试用的"模型"：照定好的话一个 token 一个 token 地说，可以慢，可以出错。"""

import http.client
import json
import threading
import time
from contextlib import contextmanager

import torch

from batching import Batcher
from chat_api import ChatHTTPServer, Service
from nlp_common.lm.generation import stop_tokens
from serve_metrics import Metrics


class Parrot:
    """reply(提示) → 它要说的 token；与 slot_model.SlotModel 一样地用。wait 是每一步几秒，fails(提示) 说要不要出错。"""

    def __init__(self, reply, size, slots=4, context=512, wait=0.0, fails=lambda prompt: False):
        self.reply, self.size, self.slots, self.context = reply, size, slots, context
        self.wait, self.fails = wait, fails
        self.rows, self.most = [], 0

    def prefill(self, prompts):
        assert len(self.rows) + len(prompts) <= self.slots
        if any(map(self.fails, prompts)):
            raise RuntimeError("坏了")
        new = [[*self.reply(prompt)] for prompt in prompts]
        self.rows += [[said, 0] for said in new]
        self.most = max(self.most, len(self.rows))
        return self.logits(range(len(self.rows) - len(new), len(self.rows)))

    def step(self, tokens):
        time.sleep(self.wait)
        assert len(tokens) == len(self.rows)
        for row, token in zip(self.rows, tokens, strict=True):
            assert row[0][row[1]] == token  # 交回来的，正是自己上一步说的
            row[1] += 1
        return self.logits(range(len(self.rows)))

    def logits(self, rows):
        found = torch.zeros(len(rows), self.size)
        for place, row in enumerate(rows):
            said, at = self.rows[row]
            found[place, said[at]] = 50.0
        return found

    def drop(self, row):
        last = self.rows.pop()
        if row < len(self.rows):
            self.rows[row] = last


@contextmanager
def serving(model, tokenizer, **changes):
    """model 的服务开着，给出 (地址, 服务)；出去时关好。"""
    metrics = Metrics()
    batcher = Batcher(model, changes.pop("static", False), changes.pop("waiting", 8), metrics.finished)
    service = Service(
        "tiny",
        tokenizer,
        batcher,
        metrics,
        stop_tokens(tokenizer),
        model.context,
        changes.pop("most_tokens", 64),
    )
    for name, value in changes.items():
        setattr(service, name, value)
    server = ChatHTTPServer("127.0.0.1", 0, service)
    thread = threading.Thread(target=lambda: server.serve_forever(0.02), daemon=True)
    thread.start()
    try:
        yield server, service
    finally:
        server.shutdown()
        server.server_close()
        batcher.close()


def request(server, method, path, body=None, headers=None):
    """→ (状态, 头, 文字)。body 是对象就写成 JSON，是字节就照发。"""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    headers = {"Content-Type": "application/json"} | (headers or {})
    raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    try:
        connection.request(method, path, raw, headers)
        answer = connection.getresponse()
        return answer.status, dict(answer.headers), answer.read().decode()
    finally:
        connection.close()


def chat(server, text="你好", headers=None, **more):
    """问一句（不流式）→ (状态, JSON)。"""
    body = {"model": "tiny", "messages": [{"role": "user", "content": text}], "temperature": 0} | more
    status, _, said = request(server, "POST", "/v1/chat/completions", body, headers)
    return status, json.loads(said)


def events(text):
    """SSE 的文字 → 各个事件；最后一个要是 [DONE]。"""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def until(true, seconds=10.0):
    """等到 true() 为真。"""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if true():
            return True
        time.sleep(0.01)
    return False
