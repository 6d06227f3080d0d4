"""会说 OpenAI 接口的服务器：超时、胡说、断线都是"没有回答"，不是一种回答；钥匙不对当场就说。"""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from nlp_common.base.errors import UserError
from nlp_common.hub.chat_server import ChatServer


@pytest.fixture
def server():
    """一个本机的服务器；replies 里放每次怎样回答，最后一个一直用下去。"""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.asked.append((self.path, dict(self.headers), body))
            reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
            code, data, pause = reply
            time.sleep(pause)
            try:
                self.send_response(code)
                self.end_headers()
                self.wfile.write(data)
            except OSError:
                pass

        def log_message(self, *_):
            pass

    Handler.replies, Handler.asked = [], []
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=lambda: httpd.serve_forever(0.02), daemon=True).start()
    httpd.handler, httpd.url = Handler, f"http://127.0.0.1:{httpd.server_port}/v1"
    yield httpd
    httpd.shutdown()
    httpd.server_close()


def said(text):
    return 200, json.dumps({"choices": [{"message": {"content": text}}]}).encode(), 0


def ask(server, **settings):
    answerer = ChatServer(server.url, "m", **{"timeout": 0.5, "wait": 0, **settings})
    return answerer, answerer.chat([{"role": "user", "content": "问"}], temperature=0)


def test_server_gives_its_answer_and_gets_the_key(server, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret-1")
    server.handler.replies = [said("答")]
    answerer, text = ask(server, api_key_env="MY_KEY")
    assert text == "答" and answerer.faults == {}
    path, headers, body = server.handler.asked[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret-1"
    assert body == {"model": "m", "messages": [{"role": "user", "content": "问"}], "temperature": 0}
    assert "secret-1" not in repr(answerer)


@pytest.mark.parametrize(
    ("bad", "fault"),
    [
        ((200, b"not json", 0), "回答不成样子"),
        ((200, b'{"choices": []}', 0), "回答不成样子"),
        ((200, b'{"choices": [{"message": {"content": null}}]}', 0), "回答不成样子"),
        ((503, b"busy", 0), "服务器错误 503"),
        ((429, b"slow down", 0), "服务器错误 429"),
        ((200, b"", 1.2), "0.5 秒没有回答"),
    ],
)
def test_a_bad_answer_is_asked_again_and_then_no_answer(server, bad, fault):
    server.handler.replies = [bad, said("好了")]
    answerer, text = ask(server)
    assert text == "好了" and answerer.faults == {fault: 1}
    server.handler.replies = [bad]
    answerer, text = ask(server, retries=1)
    assert text is None and answerer.faults == {fault: 2}


def test_refused_key_is_said_at_once(server):
    server.handler.replies = [(401, b"bad key", 0)]
    with pytest.raises(UserError, match=r"401.*bad key"):
        ask(server)
    assert len(server.handler.asked) == 1


def test_nobody_there():
    answerer = ChatServer("http://127.0.0.1:9", "m", timeout=0.5, retries=0)
    assert answerer.chat([{"role": "user", "content": "问"}]) is None
    with pytest.raises(UserError, match="没有回答：连不上"):
        answerer.check()
    with pytest.raises(UserError, match="不是网址"):
        ChatServer("127.0.0.1:8000", "m")
