"""RAGFlow 服务器的客户端：只有这个文件夹用得到的几个接口，照它的 HTTP API 文档写。

RAGFlow 的规矩：出了错，HTTP 的状态多半还是 200，要看正文里的 code，0 才是成功。
接口见 https://ragflow.io/docs/http_api_reference（v0.20 以后的写法）。
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from nlp_common.base.errors import UserError

BAD_KEY = {109}  # 钥匙不对
ENDED = {"DONE", "FAIL", "CANCEL"}  # 解析到这里就不再变了


@dataclass
class RAGFlow:
    """一个服务器。url 写到端口为止，例如 http://127.0.0.1:9380；key 不打印，也不进运行记录。"""

    url: str
    key: str
    timeout: float = 60.0

    def __post_init__(self) -> None:
        self._client = httpx.Client(headers={"Authorization": f"Bearer {self.key}"}, timeout=self.timeout)

    def __repr__(self) -> str:
        return f"RAGFlow({self.url})"

    # ------------------------------------------------------------ 知识库与文档

    def create_dataset(self, name: str, chunk_method: str = "naive", chunk_tokens: int = 128) -> str:
        """建一个知识库，返回它的 id。chunk_tokens：一块最多多少个 token；中文按句末标点切。"""
        body: dict = {"name": name, "chunk_method": chunk_method}
        if chunk_method == "naive":
            body["parser_config"] = {"chunk_token_num": chunk_tokens, "delimiter": "\n!?;。；！？"}
        return self._call("POST", "datasets", json=body)["id"]

    def datasets(self, name: str | None = None) -> list[dict]:
        """现有的知识库；给了 name 只要叫这个名字的。没有叫这个名字的，服务器说是错，这里是空的。"""
        try:
            return self._call("GET", "datasets", params={"name": name} if name else None) or []
        except NotThere:
            return []

    def delete_datasets(self, ids: list[str]) -> None:
        if ids:  # 什么也不给，服务器会当成全部
            self._call("DELETE", "datasets", json={"ids": ids})

    def upload(self, dataset: str, paths: list[Path]) -> list[str]:
        """上传几个文件，返回文档的 id，次序相同。"""
        documents = []
        for path in paths:
            files = {"file": (path.name, path.read_bytes())}
            documents.append(self._call("POST", f"datasets/{dataset}/documents", files=files)[0]["id"])
        return documents

    def parse(self, dataset: str, documents: list[str]) -> None:
        """开始切块、编码；要等一会儿，见 wait_parsed。"""
        self._call("POST", f"datasets/{dataset}/chunks", json={"document_ids": documents})

    def documents(self, dataset: str) -> list[dict]:
        """每篇文档到哪一步：``{"id", "name", "run", "progress", "progress_msg", "chunk_count"}``。"""
        return self._call("GET", f"datasets/{dataset}/documents", params={"page": 1, "page_size": 100})[
            "docs"
        ]

    def wait_parsed(self, dataset: str, documents: list[str], limit_s: float = 600) -> list[dict]:
        """等到每篇都解析完，返回它们；有一篇没有成、或等得太久是 UserError，说出哪一篇、服务器怎么说。"""
        started, pause = time.monotonic(), 0.05
        while True:
            mine = [each for each in self.documents(dataset) if each["id"] in documents]
            failed = [each for each in mine if each["run"] in ENDED - {"DONE"}]
            if failed:
                said = (failed[0].get("progress_msg") or "").strip().splitlines()
                raise UserError(
                    f"RAGFlow 没有解析成 {failed[0]['name']}：{said[-1] if said else '没有说原因'}。"
                    "多半是还没有配置嵌入模型：网页里 头像 → 模型提供商，加一个，再设成默认的嵌入模型。"
                )
            if len(mine) == len(documents) and all(each["run"] == "DONE" for each in mine):
                return mine
            if time.monotonic() - started > limit_s:
                slow = "、".join(
                    f"{each['name']}（{each['progress']:.0%}）" for each in mine if each["run"] != "DONE"
                )
                raise UserError(
                    f"等了 {limit_s:g} 秒，RAGFlow 还没有解析完：{slow}。文档大就把 --wait_seconds 加大。"
                )
            time.sleep(pause)
            pause = min(2.0, pause * 2)

    # ------------------------------------------------------------ 查与问

    def retrieve(self, datasets: list[str], question: str, k: int = 5) -> list[dict]:
        """只查不答：``{"content", "document_id", "document_keyword", "similarity"}``，分高的在前。"""
        body = {"question": question, "dataset_ids": datasets, "page": 1, "page_size": k}
        return self._call("POST", "retrieval", json=body)["chunks"]

    def create_chat(self, name: str, datasets: list[str]) -> str:
        return self._call("POST", "chats", json={"name": name, "dataset_ids": datasets})["id"]

    def delete_chats(self, ids: list[str]) -> None:
        if ids:
            self._call("DELETE", "chats", json={"ids": ids})

    def create_session(self, chat: str, name: str) -> str:
        return self._call("POST", f"chats/{chat}/sessions", json={"name": name})["id"]

    def ask(self, chat: str, session: str, question: str) -> dict:
        """问一句 → ``{"answer", "chunks"}``；answer 里的 [ID:0] 指 chunks 的第 0 块。"""
        body = {"question": question, "stream": False, "session_id": session}
        said = self._call("POST", f"chats/{chat}/completions", json=body)
        return {
            "answer": said.get("answer") or "",
            "chunks": (said.get("reference") or {}).get("chunks") or [],
        }

    # ------------------------------------------------------------ 一次请求

    def _call(self, method: str, path: str, **request: Any) -> Any:
        """一次请求，返回正文里的 data；不成是 UserError，说出服务器怎么说。"""
        try:
            answer = self._client.request(
                method,
                f"{self.url.rstrip('/')}/api/v1/{path}",
                **request,
            )
            body = answer.json()
            code, said = body["code"], str(body.get("message") or "")
        except httpx.InvalidURL as error:
            raise UserError(f"--url {self.url} 不是网址：要像 http://127.0.0.1:9380。") from error
        except httpx.TimeoutException as error:
            raise UserError(f"{self.url} {self.timeout:g} 秒没有回答 {method} {path}。") from error
        except httpx.HTTPError as error:
            raise UserError(
                f"连不上 RAGFlow（{self.url}）：{error}。先运行 python ragflow_demo.py --do doctor。"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.url} 的回答不是 RAGFlow 的（{method} {path}，HTTP {answer.status_code}）：网址是不是少了端口（默认 9380）？"
            ) from error
        if code == 0:
            return body.get("data")
        if code in BAD_KEY or answer.status_code == 401:
            raise UserError(
                f"RAGFlow 不认这把钥匙：{said}。网页里 头像 → API，建一把，放进环境变量 RAGFLOW_API_KEY。"
            )
        if method == "GET" and path == "datasets":
            raise NotThere(f"RAGFlow：{said}")
        raise UserError(f"RAGFlow 没有做 {method} {path}（code {code}）：{said}")


class NotThere(UserError):
    """按名字找，没有找到。"""
