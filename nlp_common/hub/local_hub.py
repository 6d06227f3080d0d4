"""本机的 hub：在 127.0.0.1 上说 Hugging Face hub 的那一部分话，够真的客户端下载、上传。给测试，也给没有网的读者演习。

有意做得像：提交号、文件树、LFS 的 sha256、ETag、断点续传（Range）、一次提交要么全成要么不成、令牌与私有的仓库、各种错误码；
还可以慢、可以断、可以坏。东西只在内存里，关了就没有了。
"""

from __future__ import annotations

import base64
import hashlib
import json
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LFS = (".safetensors", ".parquet", ".jsonl", ".bin", ".pkl", ".pt")
NO_SPACE = "Private repository storage limit reached, please upgrade your plan to increase your private storage limit."


class LocalHub:
    """``repos`` 是 {"models/拥有者/名字" 或 "datasets/拥有者/名字": {文件名: 内容}}。用 with 打开。

    users：令牌 → 用户名；给了它，上传、看私有的仓库就要令牌，readers 里的令牌只能读；没给，人人可读。
    quota：一个仓库的大文件最多多少字节。on_commit(一次提交)：记下之后、回答之前叫它。
    faults：文件名 → "cut"（每次都只送一半就断线）、"cut once"（头一次断，之后好）、"500"、
    "wrong bytes"（送来的内容大小对、字节不对），或者几秒（先歇这么久再回答；"/" 也可以）。
    上传的几步也可以："create"、"preupload"、"batch"、"put"、"commit" → "503"、"503 once"、"lost once"（做了，回答没有送到）。
    """

    def __init__(
        self,
        repos: dict[str, dict[str, bytes]],
        users: dict[str, str] | None = None,
        quota: int | None = None,
        on_commit: Callable[[dict], None] | None = None,
    ):
        self.repos, self.users, self.quota, self.on_commit = repos, users or {}, quota, on_commit
        self.faults: dict[str, Any] = {}
        self.private: set[str] = set()
        self.readers: set[str] = set()
        self.requests: list[str] = []  # 例如 "GET models/a/b model.safetensors"
        self.commits: list[dict] = []  # {"repo", "title", "added", "deleted", "bytes", "seconds"}
        self.uploaded: dict[str, bytes] = {}  # LFS 的内容：sha256 → 字节；提交时才进仓库
        self.lock = threading.Lock()

    def __enter__(self) -> LocalHub:
        self.server = _Server(("127.0.0.1", 0), _handler(self))
        self.server.daemon_threads = True
        self.started = time.perf_counter()
        threading.Thread(target=lambda: self.server.serve_forever(0.02), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        return self

    def __exit__(self, *_: object) -> None:
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
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": git_sha1(data)}
        if path.endswith(LFS):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return entry

    def downloads(self) -> list[str]:
        return [each.split()[-1] for each in self.requests if each.startswith("GET ")]

    def add_commit(self, repo: str, lines: list[dict]) -> dict:
        """一次提交的几行 → 仓库的新内容；在一份副本上改，全改好了才换上。"""
        files, added, deleted = dict(self.repos[repo]), [], []
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
                added.append(value["path"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.uploaded[value["oid"]]
                added.append(value["path"])
            elif line["key"] in ("deletedFile", "deletedFolder"):
                folder = value["path"].rstrip("/") + "/"
                gone = [path for path in files if path == value["path"] or path.startswith(folder)]
                deleted += gone
                for path in gone:
                    del files[path]
        self.repos[repo] = files
        made = {
            "repo": repo,
            "title": lines[0]["value"]["summary"],
            "added": added,
            "deleted": deleted,
            "bytes": sum(len(files[path]) for path in added),
            "seconds": time.perf_counter() - self.started,
        }
        self.commits.append(made)
        return made


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """客户端走了（被杀、断线）不是这里的错；别的照常印出来。"""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(*_)  # type: ignore[arg-type]


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _handler(hub: LocalHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
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

        def refuse(self, code: int, message: str) -> None:
            self.send(code, {"error": message}, X_Error_Message=message)

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data

        def broken(self, step: str) -> bool:
            """上传的这一步安排了故障：照它说的回答。"""
            fault = hub.faults.get(step)
            if fault not in ("503", "503 once"):
                return False
            if fault == "503 once":
                del hub.faults[step]
            self.refuse(503, "Service Unavailable")
            return True

        def lost(self, step: str) -> bool:
            """这一步做完了，回答却送不到：断开。"""
            if hub.faults.get(step) != "lost once":
                return False
            del hub.faults[step]
            self.close_connection = True
            return True

        # ------------------------------------------------------------ 谁

        def token(self) -> str:
            return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

        def user(self) -> str | None:
            return hub.users.get(self.token())

        def may_read(self, repo: str) -> bool:
            owner = repo.split("/")[1]
            return repo in hub.repos and (repo not in hub.private or self.user() == owner)

        def may_not_write(self, repo: str) -> bool:
            """不许写的话，说出来，返回 True。"""
            if not self.may_read(repo):
                self.missing("RepoNotFound")
            elif self.user() is None:
                self.refuse(401, "Invalid credentials in Authorization header")
            elif self.token() in hub.readers or self.user() != repo.split("/")[1]:
                self.refuse(403, "Forbidden: you must use a write token to upload to a repository")
            else:
                return False
            return True

        # ------------------------------------------------------------ 下载

        def do_GET(self) -> None:
            body = self.body()
            url = urllib.parse.unquote(self.path.partition("?")[0])
            parts = url.strip("/").split("/")
            if url == "/":
                time.sleep(hub.faults.get("/", 0))
                return self.send(200)
            if parts[:2] == ["api", "v1"]:
                return self.modelscope("/".join(parts[2:5]), "/".join(parts[5:]))
            if url == "/api/whoami-v2":
                return self.whoami()
            if parts[0] == "api":
                repo, rest = "/".join(parts[1:4]), parts[4:]
                if not self.may_read(repo):
                    return self.missing("RepoNotFound")
                if rest[:1] == ["tree"]:
                    return self.tree(repo, "/".join(rest[2:]))
                if rest[:1] == ["paths-info"]:
                    wanted = urllib.parse.parse_qs(body.decode()).get("paths", [])
                    return self.tree(repo, "", wanted)
                return self.info(repo)
            if parts[0] != "datasets":
                parts = ["models", *parts]
            repo, path = "/".join(parts[:3]), "/".join(parts[5:])
            if not self.may_read(repo):
                return self.missing("RepoNotFound")
            if parts[3:4] != ["resolve"] or path not in hub.repos[repo]:
                return self.missing("EntryNotFound")
            return self.resolve(repo, path)

        do_HEAD = do_GET

        def info(self, repo: str) -> None:
            siblings = [{"rfilename": path} for path in hub.repos[repo]]
            info = {"id": repo.split("/", 1)[1], "sha": hub.commit(repo), "siblings": siblings, "tags": []}
            self.send(200, info | {"private": repo in hub.private})

        def whoami(self) -> None:
            if self.user() is None:
                return self.refuse(401, "Invalid credentials in Authorization header")
            role = "read" if self.token() in hub.readers else "write"
            token = {"displayName": "practice", "role": role}
            self.send(200, {"type": "user", "name": self.user(), "orgs": [], "auth": {"accessToken": token}})

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

        # ------------------------------------------------------------ 上传：建仓库 → 问怎样传 → 传大文件 → 提交

        def do_POST(self) -> None:
            url = urllib.parse.unquote(self.path.partition("?")[0])
            parts = url.strip("/").split("/")
            if (parts[:1] == ["api"] and parts[4:5] == ["paths-info"]) or parts[:2] == ["api", "v1"]:
                return self.do_GET()
            body = self.body()
            if url == "/api/validate-yaml":
                return self.validate(json.loads(body)["content"])
            if url == "/api/repos/create":
                return self.create(json.loads(body))
            if url.endswith(".git/info/lfs/objects/batch"):
                name = url.strip("/").removesuffix(".git/info/lfs/objects/batch")
                return self.batch(
                    name if name.startswith("datasets/") else f"models/{name}", json.loads(body)
                )
            repo, step = "/".join(parts[1:4]), parts[4] if len(parts) > 4 else ""
            if step not in ("preupload", "commit"):
                return self.missing("EntryNotFound")
            if self.broken(step) or self.may_not_write(repo):
                return None
            if step == "preupload":
                return self.preupload(repo, json.loads(body)["files"])
            return self.commit(repo, [json.loads(line) for line in body.splitlines()])

        def create(self, wanted: dict) -> None:
            if self.broken("create"):
                return None
            if self.user() is None:
                return self.refuse(401, "Invalid credentials in Authorization header")
            owner = wanted.get("organization") or self.user()
            repo = f"{wanted.get('type') or 'model'}s/{owner}/{wanted['name']}"
            if owner != self.user() or self.token() in hub.readers:
                return self.refuse(
                    403, f'You don\'t have the rights to create a model under the namespace "{owner}"'
                )
            name = f"{owner}/{wanted['name']}"
            code = 409 if repo in hub.repos else 200
            if code == 200:
                hub.repos[repo] = {
                    ".gitattributes": "".join(f"*{each} filter=lfs\n" for each in LFS).encode()
                }
                if wanted.get("private") or wanted.get("visibility") == "private":
                    hub.private.add(repo)
            self.send(code, {"url": f"{hub.url}/{name}", "name": name, "id": name})

        def validate(self, card: str) -> None:
            """模型卡开头的 YAML 读不读得懂。"""
            import yaml

            head = card.split("---\n")[1] if card.startswith("---\n") else ""
            try:
                known = isinstance(yaml.safe_load(head), dict)
                errors = [] if known else [{"message": "empty or not a mapping"}]
            except yaml.YAMLError as error:
                errors = [{"message": str(error)}]
            self.send(400 if errors else 200, {"errors": errors, "warnings": []})

        def preupload(self, repo: str, files: list[dict]) -> None:
            answers = []
            for each in files:
                old = hub.repos[repo].get(each["path"])
                lfs = each["path"].endswith(LFS)
                oid = None
                if old is not None:
                    oid = hashlib.sha256(old).hexdigest() if lfs else git_sha1(old)
                mode = "lfs" if lfs else "regular"
                answers.append({"path": each["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
            self.send(200, {"files": answers})

        def batch(self, repo: str, wanted: dict) -> None:
            """git-lfs 的批：每个大文件往哪里传；已经有的不必再传。"""
            if self.broken("batch") or self.may_not_write(repo):
                return None
            large = sum(len(data) for path, data in hub.repos[repo].items() if path.endswith(LFS))
            if hub.quota is not None and large + sum(each["size"] for each in wanted["objects"]) > hub.quota:
                return self.refuse(403, NO_SPACE)
            objects = []
            for each in wanted["objects"]:
                answer = {"oid": each["oid"], "size": each["size"]}
                if each["oid"] not in hub.uploaded:
                    answer["actions"] = {"upload": {"href": f"{hub.url}/lfs/{each['oid']}"}}
                objects.append(answer)
            self.send(200, {"transfer": "basic", "objects": objects})

        def do_PUT(self) -> None:
            body, oid = self.body(), self.path.rsplit("/", 1)[-1]
            if self.broken("put"):
                return None
            if hashlib.sha256(body).hexdigest() != oid:
                return self.refuse(400, "sha256 mismatch")
            hub.uploaded[oid] = body
            self.send(200)

        def commit(self, repo: str, lines: list[dict]) -> None:
            with hub.lock:
                parent = lines[0]["value"].get("parentCommit")
                if parent not in (None, hub.commit(repo)):
                    return self.refuse(412, "A commit has happened since. Please refresh and try again.")
                made = hub.add_commit(repo, lines)
                oid = hub.commit(repo)
            if hub.on_commit:
                hub.on_commit(made)
            if not self.lost("commit"):
                name = repo.split("/", 1)[1]
                self.send(200, {"commitUrl": f"{hub.url}/{name}/commit/{oid}", "commitOid": oid})

    return Handler
