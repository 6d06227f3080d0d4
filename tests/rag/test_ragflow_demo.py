"""RAGFlow 的客户端与体检：对着会说它的接口的替身走一遍；钥匙、网址、解析、引用出的错说得清。"""

import json
import os
import stat
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import ragflow_demo as rd
from nlp_common.base.errors import UserError
from ragflow_client import RAGFlow
from ragflow_stand_in import KEY, stand_in


@pytest.fixture
def url():
    with stand_in() as address:
        yield address


@pytest.fixture
def server(url):
    return RAGFlow(url, KEY)


def answering(body: bytes, status: int = 200):
    """一个只会这样回答的服务器。"""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=lambda: httpd.serve_forever(0.02), daemon=True).start()
    return httpd


# ---------------------------------------------------------------- 走一遍


def test_whole_walk_against_the_stand_in(tmp_path, capsys):
    record = rd.main(["--preset", "tiny", "--output_dir", str(tmp_path / "out")])
    metrics = record["metrics"]
    assert metrics["answer_right"] == metrics["citations_right"] == metrics["recall_at_k"] == 1
    answers = json.loads((tmp_path / "out" / "answers.json").read_text("utf-8"))
    assert len(answers) == metrics["n"] == 6
    said = capsys.readouterr().out
    assert "本机的替身" in said and "体检" in said and KEY not in said
    again = rd.main(["--preset", "tiny", "--output_dir", str(tmp_path / "out")])
    assert again["id"] == record["id"] and "直接加载" in capsys.readouterr().out


def test_a_given_server_own_documents_and_cleaning(url, server, tmp_path, monkeypatch):
    kept = server.create_dataset("别人的知识库")
    monkeypatch.setenv("RAGFLOW_API_KEY", KEY)
    folder = tmp_path / "我的"
    folder.mkdir()
    (folder / "菜单.txt").write_text("牛肉面一碗二十元。炸酱面一碗十五元。", encoding="utf-8")
    record = rd.main(
        ["--preset", "tiny", "--url", url, "--documents", str(folder), "--question", "炸酱面多少钱？",
         "--output_dir", str(tmp_path / "out")]
    )  # fmt: skip
    assert record["metrics"]["n"] == 1 and "answer_right" not in record["metrics"]
    [answer] = json.loads((tmp_path / "out" / "answers.json").read_text("utf-8"))
    assert "十五元" in answer["answer"] and answer["cited"]
    assert [each["id"] for each in server.datasets()] == [kept]  # 自己建的删掉了，别人的还在
    assert KEY not in (tmp_path / "out" / "run.json").read_text("utf-8")


def test_keep_and_clean(url, server, tmp_path, monkeypatch):
    monkeypatch.setenv("RAGFLOW_API_KEY", KEY)
    rd.main(["--preset", "tiny", "--url", url, "--keep", "--output_dir", str(tmp_path / "out")])
    assert [each["name"] for each in server.datasets()] == [rd.NAME]
    assert rd.main(["--preset", "tiny", "--url", url, "--do", "clean"]) == {"deleted": 1}
    assert server.datasets() == [] and rd.clean(server) == {"deleted": 0}


def test_what_was_left_by_an_interruption_is_cleaned(url, server, tmp_path, monkeypatch):
    monkeypatch.setenv("RAGFLOW_API_KEY", KEY)
    monkeypatch.setattr(rd, "ask_all", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        rd.main(["--preset", "tiny", "--url", url, "--output_dir", str(tmp_path / "out")])
    assert server.datasets() == [] and not (tmp_path / "out").exists()
    server.create_dataset(rd.NAME)  # 被 kill -9 留下的：下次走之前也删掉，不会说"名字已有"
    monkeypatch.undo()
    monkeypatch.setenv("RAGFLOW_API_KEY", KEY)
    rd.main(["--preset", "tiny", "--url", url, "--output_dir", str(tmp_path / "out")])
    assert server.datasets() == []


# ---------------------------------------------------------------- 客户端


def test_retrieval_and_answer_point_to_the_same_chunks(server, tmp_path):
    dataset = server.create_dataset("a")
    path = tmp_path / "a.txt"
    path.write_text("张三种苹果。\n李四养山羊。\n王五修自行车。", encoding="utf-8")
    [document] = server.upload(dataset, [path])
    server.parse(dataset, [document])
    [done] = server.wait_parsed(dataset, [document])
    assert done["run"] == "DONE" and done["name"] == "a.txt" and done["chunk_count"] == 1
    chat = server.create_chat("c", [dataset])
    said = server.ask(chat, server.create_session(chat, "s"), "谁养山羊？")
    assert said["answer"] == "李四养山羊。 [ID:0]"
    assert said["chunks"][0]["content"] == server.retrieve([dataset], "谁养山羊？")[0]["content"]
    assert server.ask(chat, "s", "飞船在哪里？")["chunks"] == []


def test_an_empty_document_is_named(server, tmp_path):
    dataset = server.create_dataset("a")
    path = tmp_path / "空.txt"
    path.write_text("  \n", encoding="utf-8")
    documents = server.upload(dataset, [path])
    server.parse(dataset, documents)
    with pytest.raises(UserError, match=r"没有解析成 空\.txt：No chunk built"):
        server.wait_parsed(dataset, documents)


def test_parsing_too_long_is_said(server, tmp_path):
    dataset = server.create_dataset("a")
    path = tmp_path / "慢.txt"
    path.write_text("一句话。", encoding="utf-8")
    documents = server.upload(dataset, [path])  # 没有叫它解析，就永远不会完
    with pytest.raises(UserError, match=r"还没有解析完：慢\.txt（0%）"):
        server.wait_parsed(dataset, documents, limit_s=0.05)


def test_deleting_nothing_deletes_nothing(server):
    server.create_dataset("a")
    server.delete_datasets([])
    assert len(server.datasets()) == 1 and server.datasets("没有的") == []
    with pytest.raises(UserError, match="already exists"):
        server.create_dataset("a")


def test_wrong_key_wrong_server_no_server(url):
    wrong = RAGFlow(url, "ragflow-wrong-key")
    with pytest.raises(UserError, match="不认这把钥匙"):
        wrong.datasets()
    assert "ragflow-wrong-key" not in repr(wrong)
    with pytest.raises(UserError, match="连不上"):
        RAGFlow("http://127.0.0.1:9", "k").datasets()
    with pytest.raises(UserError, match=r"不是网址|连不上"):
        RAGFlow("没有这样的网址", "k").datasets()
    for body, status in ((b"<html>nginx</html>", 200), (b'{"ok": 1}', 200), (b"[]", 404)):
        other = answering(body, status)
        with pytest.raises(UserError, match="不是 RAGFlow 的"):
            RAGFlow(f"http://127.0.0.1:{other.server_port}", "k").datasets()
        other.shutdown()


# ---------------------------------------------------------------- 引用


CHUNKS = [{"content": "普通图书借期三十天。"}, {"content": "新书只有十天，不能续借。"}]


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("新书只有十天，不能续借 [ID:1]", True),
        ("新书只有十天，不能续借 ##1$$", True),  # 老版本的写法
        ("新书只有十天，不能续借 [ID:0]", False),  # 指错了块
        ("新书只有十天，不能续借 [ID:7]", False),  # 没有这一块
        ("新书只有十天，不能续借", False),  # 有块，没有引用
        ("普通图书借期三十天[ID:0]，新书只有十天，不能续借[ID:1]", True),
    ],
)
def test_citations(answer, right):
    assert rd.check_citations(answer, CHUNKS)["right"] is right


def test_nothing_found_needs_no_citation():
    assert rd.check_citations("知识库里没有找到。", [])["right"]
    assert rd.longest_common("甲乙丙丁", "丁乙丙甲") == 2


# ---------------------------------------------------------------- 体检


def fake_docker(folder, code, said=""):
    path = folder / "docker"
    path.write_text(f"#!/bin/sh\necho '{said}' >&2\nexit {code}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.mark.skipif(os.name == "nt", reason="用 sh 写的假 docker")
def test_doctor_says_what_is_wrong_with_docker(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "没有装" in rd.check_docker()["said"]
    fake_docker(tmp_path, 1, "Cannot connect to the Docker daemon")
    assert "Cannot connect" in rd.check_docker()["said"]
    fake_docker(tmp_path, 0)
    assert rd.check_docker()["ok"]


def test_doctor_of_machine_and_kernel(tmp_path):
    rows = {row["name"]: row for row in rd.check_machine()}
    assert set(rows) == {"核", "磁盘", "内存"}
    path = tmp_path / "max_map_count"
    path.write_text("65530\n")
    assert "sysctl -w vm.max_map_count=262144" in rd.check_map_count(path)["said"]
    path.write_text("262144\n")
    assert rd.check_map_count(path)["ok"]
    assert rd.check_map_count(tmp_path / "none")["ok"] is None


def test_doctor_of_server_key_and_models(url, monkeypatch, capsys):
    monkeypatch.delenv("RAGFLOW_API_KEY", raising=False)
    rows = {row["name"]: row for row in rd.doctor(url)}
    assert not rows["钥匙"]["ok"] and "不认这把钥匙" in rows["服务器"]["said"] and "模型" not in rows
    monkeypatch.setenv("RAGFLOW_API_KEY", KEY)
    rows = {row["name"]: row for row in rd.doctor(url)}
    assert rows["服务器"]["ok"] and rows["模型"]["ok"] and RAGFlow(url, KEY).datasets() == []
    rd.main(["--preset", "tiny", "--do", "doctor"])
    said = capsys.readouterr().out
    assert "docker compose" in said and KEY not in said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--documents", "没有的文件夹"], "没有文件"),
        (["--url", "http://127.0.0.1:9"], "没有钥匙"),
        (["--do", "clean"], "要 --url"),
        (["--url", "127.0.0.1:9380"], "不是网址"),
        (["--question", ""], "没有写问题"),
    ],
)
def test_bad_settings(flags, said, tmp_path, monkeypatch):
    monkeypatch.delenv("RAGFLOW_API_KEY", raising=False)
    with pytest.raises(UserError, match=said):
        rd.main(["--preset", "tiny", "--output_dir", str(tmp_path / "out"), *flags])


def test_own_documents_need_a_question(tmp_path):
    (tmp_path / "a.txt").write_text("一句话。", encoding="utf-8")
    with pytest.raises(UserError, match="--question"):
        rd.main(["--preset", "tiny", "--documents", str(tmp_path), "--output_dir", str(tmp_path / "out")])
    (tmp_path / "b.txt").write_bytes(b"")
    with pytest.raises(UserError, match=r"空的文件：b\.txt"):
        rd.documents_of(tmp_path)


def test_a_failed_cleaning_does_not_hide_the_interruption(url, server, tmp_path, monkeypatch, capsys):
    """删不成（连接断了）时，传出去的仍是 Ctrl-C，不是"连不上"。"""
    calls = []

    def clean(each):
        calls.append(each)
        if len(calls) > 1:
            raise UserError("连不上 RAGFlow。")
        return {"deleted": 0}

    monkeypatch.setenv("RAGFLOW_API_KEY", KEY)
    monkeypatch.setattr(rd, "clean", clean)
    monkeypatch.setattr(rd, "ask_all", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        rd.main(["--preset", "tiny", "--url", url, "--output_dir", str(tmp_path / "out")])
    assert "没有删成" in capsys.readouterr().out and calls[1] is not calls[0]
