"""登记簿：状态是记录算出来的；同一件事做两遍与一遍一样；文件夹换了权重看得出；几个进程一起用、被杀，都不乱。"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import registry as rg
from nlp_common.base.errors import UserError
from registry import Registry, replay

HERE = Path(__file__).resolve().parent
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="这台机器的系统不能 fork")


@pytest.fixture
def book(tmp_path):
    return Registry(tmp_path / "registry.jsonl")


@pytest.fixture
def model(tmp_path):
    import hashlib

    def make(name: str, weights: str = "") -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "model.safetensors").write_text(weights or name, encoding="utf-8")
        digest = hashlib.sha256((weights or name).encode()).hexdigest()
        run = {
            "id": hashlib.sha256(digest.encode()).hexdigest()[:16],
            "stage": "dpo",
            "parent": {"model": "x"},
        }
        (folder / "run.json").write_text(json.dumps(run | {"metrics": {"qa": 1.0}}), encoding="utf-8")
        return folder

    return make


def test_a_release_and_a_way_back(book, model):
    first = book.register("m", model("a"))
    assert (first, book.aliases("m")) == (1, {"challenger": 1})
    book.promote("m", first)
    second = book.register("m", model("b"))
    assert book.aliases("m") == {"champion": 1, "challenger": 2}
    book.promote("m", second, over=1, reason="好一些")
    assert book.aliases("m") == {"champion": 2}
    assert [row["status"] for row in book.versions("m")] == ["retired", "champion"]
    assert book.rollback("m", second, reason="答非所问") == 1
    assert book.aliases("m") == {"champion": 1}
    assert [row["status"] for row in book.versions("m")] == ["champion", "rolled_back"]
    found = book.find("m", "champion")
    assert (found["version"], found["folder"].name, found["metrics"]) == (1, "a", {"qa": 1.0})
    events = book.history("m")
    assert [event["event"] for event in events] == ["register", "promote", "register", "promote", "rollback"]
    assert [event.get("reason") for event in events[-2:]] == ["好一些", "答非所问"]


def test_doing_a_thing_twice_is_doing_it_once(book, model):
    for _ in range(2):
        assert book.register("m", model("a")) == 1
    for _ in range(2):
        book.promote("m", 1)
    assert book.register("m", model("b")) == 2
    for _ in range(2):
        book.promote("m", 2, over=1)
    for _ in range(3):
        assert book.rollback("m", 2) == 1
    book.register("m", model("c"))
    for _ in range(2):
        book.reject("m", 3, "偏")
    assert [event["event"] for event in book.history("m")] == [
        *["register", "promote", "register", "promote", "rollback", "register", "reject"]
    ]
    assert book.aliases("m") == {"champion": 1}


def test_the_same_weights_served_otherwise_are_another_version(book, model):
    wrong = book.register("m", model("a"), serving={"temperature": 1.6})
    book.reject("m", wrong, "温度抄错了")
    right = book.register("m", model("a"), serving={"temperature": 1.0})
    assert (wrong, right) == (1, 2) and book.register("m", model("a"), serving={"temperature": 1.0}) == 2
    assert book.aliases("m") == {"challenger": 2} and book.find("m", 2)["serving"] == {"temperature": 1.0}


def test_rolling_back_the_first_leaves_no_champion(book, model):
    book.promote("m", book.register("m", model("a")))
    assert book.rollback("m") is None
    assert book.aliases("m") == {}
    with pytest.raises(UserError, match="没有什么可退"):
        book.rollback("m")
    with pytest.raises(UserError, match="现在没有 champion"):
        book.find("m", "champion")


def test_what_was_compared_with_another_is_not_released(book, model):
    """两条流程都与第 1 版比过；先发布的换了 champion，后来的就不作数。"""
    book.promote("m", book.register("m", model("a")))
    second, third = book.register("m", model("b")), book.register("m", model("c"))
    book.promote("m", second, over=1)
    with pytest.raises(UserError, match=r"第 3 版是与第 1 版比的.*已经是第 2 版.*再比一次"):
        book.promote("m", third, over=1)
    assert book.aliases("m")["champion"] == second


def test_refusals_say_what_to_do(book, model):
    with pytest.raises(UserError, match=r"没有 .*nowhere.*先训练"):
        book.register("m", model("a").parent / "nowhere")
    book.promote("m", book.register("m", model("a")))
    book.promote("m", book.register("m", model("b")))
    book.rollback("m", 2)
    with pytest.raises(UserError, match=r"第 2 版是退下来的.*作为新的一版登记"):
        book.promote("m", 2)
    with pytest.raises(UserError, match="正在用：要换下它，用 rollback"):
        book.reject("m", 1)
    with pytest.raises(UserError, match="没有 m 的第 7 版；登记了的：1、2"):
        book.promote("m", 7)
    with pytest.raises(UserError, match="没有 n 的第 1 版；登记了的：一个也没有"):
        book.find("n", 1)
    book.register("m", model("c"))
    with pytest.raises(UserError, match="第 3 版不是正在用的"):
        book.rollback("m", 3)


def test_weights_that_changed_after_registration(book, model):
    book.promote("m", book.register("m", model("a")))
    second = book.register("m", model("b"))
    model("b", weights="重新训练过")
    for use in (lambda: book.find("m", second), lambda: book.promote("m", second)):
        with pytest.raises(UserError, match=r"不是 登记簿里 m 的第 2 版 记着的.*重新训练过"):
            use()
    assert book.register("m", model("b", weights="重新训练过")) == 3  # 现在的，是新的一版
    book.promote("m", 3)
    (model("a") / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"要退回的第 1 版.*不在 .* 里了"):
        book.rollback("m", 3)
    assert book.aliases("m") == {"champion": 3}  # 退不回去，就还是它


def test_run_json_that_does_not_match_the_weights(book, model):
    folder = model("a")
    (folder / "model.safetensors").write_text("半个文件", encoding="utf-8")
    with pytest.raises(UserError, match=r"run.json 记着的"):
        book.register("m", folder)
    assert book.versions("m") == []


def test_the_folder_can_be_moved_together(tmp_path, model):
    book = Registry(tmp_path / "registry.jsonl")
    book.promote("m", book.register("m", model("a")))
    there = tmp_path.with_name(tmp_path.name + "-moved")
    tmp_path.rename(there)
    assert Registry(there / "registry.jsonl").find("m", "champion")["folder"] == (there / "a").resolve()
    there.rename(tmp_path)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda lines: lines[1:], "第 1 行说的 m 第 1 版没有登记过"),
        (lambda lines: [lines[0], '{"event": "promote", "name": "m"}'], "第 2 行缺 version"),
        (lambda lines: [lines[0][:-3], *lines[1:]], "第 1 行不是一个完整的 JSON 对象"),
    ],
)
def test_a_book_edited_by_hand_names_the_line(book, model, edit, said):
    book.promote("m", book.register("m", model("a")))
    lines = book.path.read_text(encoding="utf-8").splitlines()
    book.path.write_text("\n".join(edit(lines)) + "\n", encoding="utf-8")
    for use in (book.aliases, book.history, book.rollback, lambda name: book.register(name, model("b"))):
        with pytest.raises(UserError, match=said):
            use("m")


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("register"), st.booleans()),
        st.tuples(st.sampled_from(["promote", "reject", "rollback"]), st.integers(1, 5)),
    ),
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_any_history_keeps_one_champion_and_one_challenger(steps):
    """任意次序的事（不合理的不记），与一个只用集合的写法比。"""
    events, stack, gone, n = [], [], set(), 0
    for kind, value in steps:
        if kind == "register":
            n += 1
            event = {"folder": str(n), "id": str(n), "challenge": value}
            events.append({"event": kind, "name": "m", "version": n} | event)
        elif value <= n and not (
            (kind == "promote" and (value in gone or stack[-1:] == [value]))
            or (kind == "reject" and stack[-1:] == [value])
            or (kind == "rollback" and stack[-1:] != [value])
        ):
            events.append({"event": kind, "name": "m", "version": value})
            if kind == "promote":
                stack.append(value)
            if kind == "rollback":
                gone.add(value)
                stack = [each for each in stack if each != value]
    state = replay([{"event": "register", "name": "别的", "version": 1, "challenge": True}, *events], "m")
    assert state["champions"] == stack
    statuses = [row["status"] for row in state["versions"].values()]
    assert list(state["versions"]) == list(range(1, n + 1))
    assert statuses.count("champion") == bool(stack) and statuses.count("challenger") <= 1
    assert {v for v, row in state["versions"].items() if row["status"] == "rolled_back"} == gone


def test_in_a_terminal(book, model, capsys):
    book.promote("m", book.register("m", model("a")))
    book.promote("m", book.register("m", model("b")), reason="好一些")
    where = ["--registry", str(book.path)]
    rg.main(where)
    assert "2     正在用" in capsys.readouterr().out
    rg.main([*where, "--rollback", "2", "--reason", "答非所问"])
    assert "2     退下的" in capsys.readouterr().out
    rg.main([*where, "--history", "true"])
    assert "回滚    第 2 版  答非所问" in capsys.readouterr().out
    for arguments, said in (
        (["--name", "n"], "没有 n；有的是：m"),
        (["--promote", "1", "--rollback", "1"], "一次只能做一样"),
        (["--promote", "2"], "退下来的"),
    ):
        with pytest.raises(UserError, match=said):
            rg.main([*where, *arguments])
    with pytest.raises(UserError, match=r"还什么也没有登记：先运行 qwen_alignment_workflow.py"):
        rg.main(["--registry", str(book.path.with_name("none.jsonl"))])


@needs_fork
def test_eight_processes_register_and_release_at_once(tmp_path):
    found = drive("together", tmp_path)
    assert found["codes"] == [0] * 8
    assert found["versions"] == list(range(1, 10)) and found["folders"] == 9
    assert found["refused"] == 7, "都与第 1 版比过，只有一个发布得了"
    assert found["aliases"]["champion"] in range(2, 10)


@needs_fork
def test_killed_at_every_write_the_workflow_goes_on_to_the_same_end(tmp_path):
    """每一次写盘的前、中、后 kill -9，或盘满：再来一遍，登记、发布、回滚各一次，每个请求只答一次，结果与没有打断的相同。"""
    found = drive("kill", tmp_path)
    assert found["wrong"] == []
    assert found["cases"] >= 60
    assert found["every_time"] and found["times_killed"] >= 4
    kinds = [kind for kind, _ in found["clean"]["events"]]
    assert kinds == ["register", "promote", "register", "promote", "rollback"]
    assert found["clean"]["aliases"] == {"champion": 1}


def drive(how: str, folder: Path) -> dict:
    command = [sys.executable, str(HERE / "killed_workflow.py"), how, str(folder)]
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1]), "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
