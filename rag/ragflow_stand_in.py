"""RAGFlow 的替身：在本机上会说同样接口的小服务器。没有 Docker 的机器上看得到全过程，测试也用它。

它不是 RAGFlow：按句切块，BM25 查，把最像的一句话抄出来当回答。接口的写法、出错的写法照 RAGFlow 的文档。
"""

from __future__ import annotations

import contextlib
import json
import threading
import uuid
from collections.abc import Iterator
from email.parser import BytesParser
from email.policy import HTTP
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from rag_common.bm25 import BM25
from rag_common.chunking import sentences, split_sentences

KEY = "ragflow-stand-in"
CHUNK = 96  # 字


class Shelf:
    """服务器里的东西：知识库、文档、助手、会话。"""

    def __init__(self) -> None:
        self.datasets: dict[str, dict] = {}
        self.chats: dict[str, dict] = {}
        self.lock = threading.Lock()

    def parse(self, dataset: dict, document: dict) -> None:
        """切块、建索引。真的 RAGFlow 在这里版面分析、编码，要几秒到几分钟；替身要等人问到第二遍才算完。"""
        text = document["data"].decode("utf-8", "replace")
        if not text.strip():
            document.update(run="FAIL", progress=-1, progress_msg="No chunk built: the file is empty.")
            return
        for number, (start, end) in enumerate(sentences(text, CHUNK)):
            chunk = {
                "id": f"{document['id']}-{number}",
                "content": text[start:end],
                "document_id": document["id"],
            }
            chunk |= {
                "document_name": document["name"],
                "document_keyword": document["name"],
                "dataset_id": dataset["id"],
            }
            dataset["chunks"][chunk["id"]] = chunk
            document["chunk_count"] += 1
        mine = [each for each in dataset["chunks"].values() if each["document_id"] == document["id"]]
        dataset["index"].add([each["id"] for each in mine], [each["content"] for each in mine])
        document.update(run="RUNNING", progress=0.5)

    def retrieve(self, ids: list[str], question: str, k: int) -> list[dict]:
        found = []
        for dataset in (self.datasets[id] for id in ids):
            best = dataset["index"].search(question, k)
            found += [dataset["chunks"][id] | {"similarity": score} for id, score in best]
        return sorted(found, key=lambda chunk: -chunk["similarity"])[:k]

    def answer(self, ids: list[str], question: str) -> dict:
        """最像的一句话，后面注上它在第几块；什么也没有查到，就说没有。"""
        chunks = self.retrieve(ids, question, 4)
        lines = [
            (number, chunk["content"][start:end])
            for number, chunk in enumerate(chunks)
            for start, end in split_sentences(chunk["content"])
        ]
        lines = [
            (number, line.strip()) for number, line in lines if line.strip() and not line.startswith("#")
        ]
        if not lines:
            return {"answer": "知识库里没有找到。", "reference": {"chunks": []}}
        index = BM25()
        index.add([str(place) for place in range(len(lines))], [line for _, line in lines])
        best = index.search(question, 1)
        number, line = lines[int(best[0][0])] if best else lines[0]
        return {"answer": f"{line} [ID:{number}]", "reference": {"chunks": chunks}}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    shelf: Shelf

    def do_GET(self) -> None:
        self.route("GET")

    def do_POST(self) -> None:
        self.route("POST")

    def do_DELETE(self) -> None:
        self.route("DELETE")

    def route(self, method: str) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Authorization") != f"Bearer {KEY}":
            return self.reply(109, message="Authentication error: API key is invalid!")
        address = urlsplit(self.path)
        parts = address.path.removeprefix("/api/v1/").split("/")
        with self.shelf.lock:
            match (method, parts):
                case ("GET", ["datasets"]):
                    self.list_datasets(parse_qs(address.query).get("name", [None])[0])
                case ("POST", ["datasets"]):
                    self.create_dataset(json.loads(data))
                case ("DELETE", ["datasets"]):
                    for id in json.loads(data)["ids"]:
                        self.shelf.datasets.pop(id, None)
                    self.reply(0)
                case (_, ["datasets", id, *_]) if id not in self.shelf.datasets:
                    self.reply(102, message=f"You don't own the dataset {id}.")
                case ("POST", ["datasets", id, "documents"]):
                    self.upload(self.shelf.datasets[id], data)
                case ("GET", ["datasets", id, "documents"]):
                    self.list_documents(self.shelf.datasets[id])
                case ("POST", ["datasets", id, "chunks"]):
                    dataset = self.shelf.datasets[id]
                    for document in json.loads(data)["document_ids"]:
                        self.shelf.parse(dataset, dataset["documents"][document])
                    self.reply(0)
                case ("POST", ["retrieval"]):
                    body = json.loads(data)
                    chunks = self.shelf.retrieve(body["dataset_ids"], body["question"], body["page_size"])
                    self.reply(0, {"chunks": chunks, "total": len(chunks)})
                case ("POST", ["chats"]):
                    chat = json.loads(data) | {"id": uuid.uuid4().hex}
                    self.shelf.chats[chat["id"]] = chat
                    self.reply(0, chat)
                case ("DELETE", ["chats"]):
                    for id in json.loads(data)["ids"]:
                        self.shelf.chats.pop(id, None)
                    self.reply(0)
                case ("POST", ["chats", id, "sessions"]):
                    self.reply(0, {"id": uuid.uuid4().hex, "chat_id": id})
                case ("POST", ["chats", id, "completions"]):
                    self.reply(
                        0,
                        self.shelf.answer(self.shelf.chats[id]["dataset_ids"], json.loads(data)["question"]),
                    )
                case _:
                    self.reply(100, message=f"<NotFound '404: Not Found'> {method} {self.path}")

    # ------------------------------------------------------------ 各个接口

    def list_datasets(self, name: str | None) -> None:
        found = [each for each in self.shelf.datasets.values() if name in (None, each["name"])]
        if name and not found:
            return self.reply(108, message=f"User lacks permission for dataset '{name}'")
        self.reply(0, [{"id": each["id"], "name": each["name"]} for each in found])

    def create_dataset(self, body: dict) -> None:
        if any(each["name"] == body["name"] for each in self.shelf.datasets.values()):
            return self.reply(103, message=f"Dataset name '{body['name']}' already exists")
        id = uuid.uuid4().hex
        self.shelf.datasets[id] = body | {"id": id, "documents": {}, "chunks": {}, "index": BM25()}
        self.reply(0, {"id": id, "name": body["name"]})

    def upload(self, dataset: dict, data: bytes) -> None:
        head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
        part = next(iter(BytesParser(policy=HTTP).parsebytes(head + data).iter_parts()))
        document = {
            "id": uuid.uuid4().hex,
            "name": part.get_filename(),
            "data": part.get_payload(decode=True),
        }
        document |= {"run": "UNSTART", "progress": 0.0, "progress_msg": "", "chunk_count": 0}
        dataset["documents"][document["id"]] = document
        self.reply(0, [{"id": document["id"], "name": document["name"]}])

    def list_documents(self, dataset: dict) -> None:
        shown = [{k: v for k, v in each.items() if k != "data"} for each in dataset["documents"].values()]
        self.reply(0, {"docs": shown, "total": len(shown)})
        for document in dataset["documents"].values():
            if document["run"] == "RUNNING":
                document.update(run="DONE", progress=1.0)

    def reply(self, code: int, data: object = None, message: str = "") -> None:
        body = json.dumps({"code": code, **({"data": data} if code == 0 else {"message": message})}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def stand_in() -> Iterator[str]:
    """开着一个替身，给出它的网址；只听本机。"""
    handler = type("StandIn", (Handler,), {"shelf": Shelf()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
