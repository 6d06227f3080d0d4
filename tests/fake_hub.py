"""测试用的假 hub：在 127.0.0.1 上说 Hugging Face hub 的那一部分话，够真的客户端下载模型、读数据集。

有意做得像：提交号、文件树、LFS 的 sha256、ETag、断点续传（Range）、各种错误码；还可以慢、可以断、可以坏。
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LFS = (".safetensors", ".parquet", ".jsonl")


class FakeHub:
    """``repos`` 是 {"models/拥有者/名字" 或 "datasets/拥有者/名字": {文件名: 内容}}。用 with 打开。

    faults：文件名 → "cut"（每次都只送一半就断线）、"cut once"（头一次断，之后好）、"500"、
    "wrong bytes"（送来的内容大小对、字节不对），或者几秒（先歇这么久再回答；"/" 也可以）。
    """

    def __init__(self, repos: dict[str, dict[str, bytes]]):
        self.repos, self.faults = repos, {}
        self.requests: list[str] = []  # 例如 "GET models/a/b model.safetensors"

    def __enter__(self) -> FakeHub:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    def commit(self, repo: str) -> str:
        """提交号由内容决定：改了文件，版本就变。"""
        digest = hashlib.sha1()
        for path, data in sorted(self.repos[repo].items()):
            digest.update(path.encode() + b"\0" + data)
        return digest.hexdigest()

    def entry(self, repo: str, path: str) -> dict:
        """文件树里的一条。"""
        data = self.repos[repo][path]
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        entry = {"type": "file", "path": path, "size": len(data), "oid": git}
        if path.endswith(LFS):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return entry

    def downloads(self) -> list[str]:
        return [each.split()[-1] for each in self.requests if each.startswith("GET ")]


def _handler(hub: FakeHub):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def send(self, code: int, body: object = b"", **headers: str) -> None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(code)
            for name, value in {"Content_Length": str(len(data)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def missing(self, code: str) -> None:
            self.send(404, {"error": code}, X_Error_Code=code, X_Error_Message=code)

        def do_GET(self):
            if length := int(self.headers.get("Content-Length") or 0):
                body = self.rfile.read(length)
            url = urllib.parse.unquote(self.path.partition("?")[0])
            parts = url.strip("/").split("/")
            if url == "/":
                time.sleep(hub.faults.get("/", 0))
                return self.send(200)
            if parts[:2] == ["api", "v1"]:
                return self.modelscope("/".join(parts[2:5]), "/".join(parts[5:]))
            if parts[0] == "api":
                repo, rest = "/".join(parts[1:4]), parts[4:]
                if repo not in hub.repos:
                    return self.missing("RepoNotFound")
                if rest[:1] == ["tree"]:
                    return self.tree(repo, "/".join(rest[2:]))
                if rest[:1] == ["paths-info"]:
                    wanted = urllib.parse.parse_qs(body.decode()).get("paths", [])
                    return self.tree(repo, "", wanted)
                siblings = [{"rfilename": path} for path in hub.repos[repo]]
                info = {"id": "/".join(parts[2:4]), "sha": hub.commit(repo), "siblings": siblings, "tags": []}
                return self.send(200, info)
            if parts[0] != "datasets":
                parts = ["models", *parts]
            repo, path = "/".join(parts[:3]), "/".join(parts[5:])
            if repo not in hub.repos:
                return self.missing("RepoNotFound")
            if parts[3:4] != ["resolve"] or path not in hub.repos[repo]:
                return self.missing("EntryNotFound")
            return self.resolve(repo, path)

        do_HEAD = do_POST = do_GET

        def modelscope(self, repo: str, what: str) -> None:
            """魔搭社区（ModelScope）的接口：文件清单与下载。"""
            query = urllib.parse.parse_qs(self.path.partition("?")[2])
            if repo not in hub.repos:
                return self.send(404, {"Code": 10010205001, "Message": "record not found"})
            if what in ("repo/files", "repo/tree"):
                entries = [hub.entry(repo, path) for path in hub.repos[repo]]
                files = [
                    {
                        "Path": each["path"],
                        "Name": each["path"].rsplit("/", 1)[-1],
                        "Type": "blob",
                        "Size": each["size"],
                        "Sha256": hashlib.sha256(hub.repos[repo][each["path"]]).hexdigest(),
                    }
                    for each in entries
                ]
                return self.send(200, {"Code": 200, "Success": True, "Data": {"Files": files}})
            path = query.get("FilePath", [""])[0]
            if what != "repo" or path not in hub.repos[repo]:
                return self.send(404, {"Code": 404, "Message": "file not found"})
            return self.resolve(repo, path)

        def tree(self, repo: str, folder: str, only: list[str] | None = None) -> None:
            paths = [p for p in hub.repos[repo] if p in only] if only is not None else list(hub.repos[repo])
            base = folder + "/" if folder else ""
            inside = [p for p in paths if p.startswith(base)]
            if folder and not inside:
                return self.missing("EntryNotFound")
            deep = only is not None or "recursive=true" in self.path.lower()
            folders = {base + p[len(base) :].split("/")[0] for p in inside if "/" in p[len(base) :]}
            shown = inside if deep else [p for p in inside if "/" not in p[len(base) :]]
            entries = [hub.entry(repo, path) for path in shown]
            if only is None:
                entries += [
                    {"type": "directory", "path": p, "size": 0, "oid": "d" * 40} for p in sorted(folders)
                ]
            self.send(200, entries)

        def resolve(self, repo: str, path: str) -> None:
            hub.requests.append(f"{self.command} {repo} {path}")
            data, entry, fault = hub.repos[repo][path], hub.entry(repo, path), hub.faults.get(path)
            if isinstance(fault, (int, float)):
                time.sleep(fault)
            if fault == "500":
                return self.send(500, {"error": "boom"})
            etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
            headers = {
                "ETag": f'"{etag}"',
                "X_Repo_Commit": hub.commit(repo),
                "X_Linked_Size": str(len(data)),
                "Accept_Ranges": "bytes",
            }
            if self.command == "HEAD":
                return self.send(200, **{**headers, "Content_Length": str(len(data))})
            if fault == "wrong bytes":
                data = data[:-1] + bytes([data[-1] ^ 1])
            code, total, start = 200, len(data), 0
            if wanted := self.headers.get("Range"):
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                start, end = int(first or 0), min(int(last or total - 1), total - 1)
                if start >= total:
                    return self.send(416, Content_Range=f"bytes */{total}")
                data, code = data[start : end + 1], 206
                headers["Content_Range"] = f"bytes {start}-{end}/{total}"
            if fault in ("cut", "cut once") and len(data) > 1:
                if fault == "cut once":
                    del hub.faults[path]
                self.send_response(code)
                for name, value in {**headers, "Content_Length": str(len(data))}.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(data[: len(data) // 2])
                self.close_connection = True
                return None
            self.send(code, data, **headers)

    return Handler
