"""说一小部分 Elasticsearch 或 OpenSearch 的话的服务器，给约定的测试用：索引、_bulk、_search（精确与 knn）、_count，和密码。

两家不同的地方（栏的类型、查法、分数）照各自的文档；别家的写法不认，与真的一样说 HTTP 400。"""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MOST = 10_000
PASSWORD = "Basic " + base64.b64encode("学生:秘密 密码".encode()).decode()


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, opensearch: bool = False):
        super().__init__(("127.0.0.1", 0), Handler)
        self.opensearch = opensearch
        self.indices: dict[str, dict] = {}
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def answer(self, value: dict, code: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def handle_one(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        if self.headers.get("Authorization") != PASSWORD:
            return self.answer({"error": "unauthorized"}, 401)
        name, _, action = self.path.strip("/").partition("/")
        with self.server.lock:
            index = self.server.indices.get(name)
            if self.command == "PUT":
                if index is not None:
                    return self.answer({"error": "resource_already_exists_exception"}, 400)
                definition = json.loads(body)
                if fault := wrong_definition(name, definition, self.server.opensearch):
                    return self.answer({"error": fault}, 400)
                self.server.indices[name] = {**definition, "rows": {}}
                return self.answer({"acknowledged": True})
            if index is None:
                return self.answer({"error": "index_not_found_exception"}, 404)
            if action == "_mapping":
                return self.answer({name: {"mappings": index["mappings"]}})
            if action.startswith("_bulk"):
                assert "refresh=wait_for" in action
                return self.answer(
                    bulk(index["rows"], [json.loads(line) for line in body.split("\n") if line])
                )
            query = json.loads(body)
            if action == "_count":
                return self.answer({"count": len(found(index["rows"], query["query"]))})
            if query.get("size", 10) > MOST or query.get("knn", {}).get("num_candidates", 0) > MOST:
                return self.answer({"error": "Result window is too large"}, 400)
            hits = (search_opensearch if self.server.opensearch else search)(index, query)
            return self.answer({"hits": {"hits": hits}})

    do_GET = do_POST = do_PUT = handle_one


def wrong_definition(name: str, definition: dict, opensearch: bool) -> str:
    """照各自的文档，这样的索引建不建得了；建不了是一句话。"""
    if name != name.lower():
        return "invalid_index_name_exception"
    fields = definition["mappings"]["properties"]
    vector = fields["vector"]
    if opensearch:
        indexed = "method" in vector
        if (
            fields["meta"]["type"] != "flat_object"
            or vector["type"] != "knn_vector"
            or "dimension" not in vector
        ):
            return "mapper_parsing_exception"
        if indexed != definition["settings"]["index.knn"]:
            return "index.knn"
    elif (
        fields["meta"]["type"] != "flattened" or vector["type"] != "dense_vector" or "settings" in definition
    ):
        return "mapper_parsing_exception"
    return ""


def bulk(rows: dict, lines: list[dict]) -> dict:
    while lines:
        action = lines.pop(0)
        if "delete" in action:
            rows.pop(action["delete"]["_id"], None)
        else:
            rows[action["index"]["_id"]] = lines.pop(0)
    return {"errors": False, "items": []}


def found(rows: dict, query: dict) -> list[tuple[str, dict]]:
    """filter 里的各个 terms 都满足的；flattened 的栏按字符串比。"""
    if "ids" in query:
        return [(key, row) for key, row in rows.items() if key in query["ids"]["values"]]
    kept = list(rows.items())
    for term in query.get("bool", {}).get("filter", []):
        ((field, allowed),) = term["terms"].items()
        head, _, name = field.partition(".")
        kept = [
            (key, row)
            for key, row in kept
            if as_text(row["meta"].get(name) if head == "meta" else row[head]) in allowed
        ]
    return kept


def as_text(value) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value)


def search(index: dict, query: dict) -> list[dict]:
    hits, rows = [], index["rows"]
    if "knn" in query:
        assert index["mappings"]["properties"]["vector"]["index"]
        knn = query["knn"]
        for key, row in found(rows, knn["filter"]):
            hits.append((key, row, (1 + product(knn["query_vector"], row["vector"])) / 2))
    elif "script_score" in query["query"]:
        inner = query["query"]["script_score"]
        assert inner["script"]["source"] == "dotProduct(params.query, 'vector') + 1.0"
        for key, row in found(rows, inner["query"]):
            hits.append((key, row, 1 + product(inner["script"]["params"]["query"], row["vector"])))
    else:
        hits = [(key, row, 1.0) for key, row in found(rows, query["query"])]
    return cut(hits, query)


def search_opensearch(index: dict, query: dict) -> list[dict]:
    """分数总是正的：内积 p ≥ 0 时是 1 + p，p < 0 时是 1 / (1 − p)。"""
    hits, rows = [], index["rows"]
    if "knn" in query["query"]:
        assert index["settings"]["index.knn"]
        knn = query["query"]["knn"]["vector"]
        wanted, near = knn["vector"], found(rows, knn["filter"])
    elif "script_score" in query["query"]:
        inner = query["query"]["script_score"]
        script = inner["script"]
        assert (script["lang"], script["source"]) == ("knn", "knn_score")
        assert script["params"]["field"] == "vector" and script["params"]["space_type"] == "innerproduct"
        wanted, near = script["params"]["query_value"], found(rows, inner["query"])
    else:
        return cut([(key, row, 1.0) for key, row in found(rows, query["query"])], query)
    for key, row in near:
        p = product(wanted, row["vector"])
        hits.append((key, row, 1 + p if p >= 0 else 1 / (1 - p)))
    return cut(hits, query)


def cut(hits: list, query: dict) -> list[dict]:
    """排好次序，取前 size 条。"""
    if "sort" in query:
        hits.sort(key=lambda hit: hit[1]["id"])
        hits = [hit for hit in hits if hit[1]["id"] > query.get("search_after", [""])[0]]
    else:
        hits.sort(key=lambda hit: -hit[2])
    hits = hits[: query.get("size", 10)]
    return [
        {
            "_id": key,
            "_score": score,
            "_source": {k: v for k, v in row.items() if k != "vector"},
            "sort": [row["id"]],
        }
        for key, row, score in hits
    ]


def product(first: list[float], second: list[float]) -> float:
    return sum(a * b for a, b in zip(first, second, strict=True))
