"""工具箱：计算器与 Python 自己的算术（分数）一样，换算准确，文件出不去，超时、太长、出错都有一句话，许可只认 True。"""

import ast
import json
import operator
import os
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import file_tools
import tool_calls
import tool_world
import tools
from expressions import MOST_DEPTH, ExpressionError, evaluate, shown
from file_tools import check_folder, decode, parts_of
from nlp_common.base.errors import UserError
from nlp_common.lm.reply_parser import BrokenCall, Call
from text_search import Index, Passage, index_folder, passages_of, words_of
from tool_calls import ERROR, Tool, ToolError, run_call, short_error
from tools import fixed_clock, toolbox
from unit_table import UNITS, UnitError, convert

AGENT = Path(tool_calls.__file__).parent
BOX = toolbox(clock=fixed_clock)


def use(name, box=BOX, confirm=None, **arguments):
    return run_call(box, Call(name, arguments), confirm)


# ---------------------------------------------------------------- 计算器

OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
}  # fmt: skip


def by_python(node):
    """Python 自己读的树，用分数算。"""
    if isinstance(node, ast.Constant):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp):
        value = by_python(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    left, right = by_python(node.left), by_python(node.right)
    if isinstance(node.op, ast.Pow):
        if right.denominator != 1 or abs(right) > 30:
            raise OverflowError
        right = int(right)
    return Fraction(OPERATORS[type(node.op)](left, right))


numbers = st.one_of(st.integers(0, 50).map(str), st.decimals(0, 9, places=2).map(str))
formulas = st.recursive(
    numbers,
    lambda inside: st.one_of(
        st.tuples(inside, st.sampled_from(["+", "-", "*", "/", "//", "%", "**"]), inside).map(" ".join),
        inside.map(lambda each: f"({each})"),
        inside.map(lambda each: f"-{each}"),
        inside.map(lambda each: f"+{each}"),
    ),
    max_leaves=8,
)


@settings(max_examples=400, deadline=None)
@given(formulas)
def test_the_calculator_agrees_with_python(text):
    try:
        wanted = by_python(ast.parse(text, mode="eval").body)
    except (ZeroDivisionError, OverflowError):
        return
    try:
        assert evaluate(text) == wanted
    except ExpressionError as error:
        assert "太大" in str(error) or "层" in str(error) or "个字" in str(error)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60) | st.text("0123456789.+-*/%()×÷（）e_^,= ", max_size=60))
def test_any_text_is_a_number_or_a_sentence(text):
    try:
        assert shown(evaluate(text))
    except ExpressionError as error:
        assert 0 < len(str(error)) < 200


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("（１２.５＋7）×4÷3", "26"), ("-2**2", "-4"), ("2**-1", "0.5"), ("2**3**2", "512"), ("-7//2", "-4"),
        ("-7%3", "2"), ("1/3", "1/3（约 0.333333333333）"), ("0.1+0.2", "0.3"), ("10**400/3", "约 3.33333333333E+399"),
        ("(-1)**99999999999999999999", "-1"), ("0**0", "1"), ("5.", "5"), (".5", "0.5"), ("1-−1", "2"),
    ],
)  # fmt: skip
def test_hand_computed(text, answer):
    assert shown(evaluate(text)) == answer


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("9**9**9**9", "太大"), ("(((((9**99)**9)**9)**9)**9)**9", "太大"), ("__import__('os')", "不认识"), ("1/0", "除数是 0"),
        ("0**-1", "0 的负"), ("2**0.5", "开方"), ("1,000", "1000"), ("2^3", r"\*\*"), ("1+1=", "等号"), ("50%", "5/100"),
        ("(1", "没有关上"), ("1)", "不该在这里"), ("3××4", "不该在这里"), ("", "空的"), ("1e9", "不认识"), ("1.5.2", "不该"),
        ("(" * 60 + "1" + ")" * 60, f"{MOST_DEPTH} 层"), ("-" * 60 + "1", f"{MOST_DEPTH} 层"), ("9" * 301, "最多 300"),
        ("٣+1", "不认识"),
    ],
)  # fmt: skip
def test_what_cannot_be_computed_says_why(text, why):
    with pytest.raises(ExpressionError, match=why):
        evaluate(text)


# ---------------------------------------------------------------- 单位、时间、查表


def test_units_are_exact():
    assert convert(Fraction(3), "亩", "平方米") == 2000
    assert convert(Fraction(1), "里", "km") == Fraction(1, 2)
    assert convert(Fraction(1), "斤", "两") == 10
    assert convert(Fraction("98.6"), "℉", "℃") == 37 and convert(Fraction(-40), "C", "F") == -40
    assert convert(Fraction(1), "顷", "亩") == 100 and convert(Fraction(1), "丈", "尺") == 10
    for wrong in [("斤", "里"), ("斤", "斛"), ("", "里")]:
        with pytest.raises(UnitError):
            convert(Fraction(1), *wrong)
    for cold in [(Fraction("-273.16"), "℃", "K"), (Fraction(-1), "米", "里")]:
        with pytest.raises(UnitError):
            convert(*cold)
    assert use("convert", value=0.1, from_unit="千米", to_unit="米").text == "100 米"


@given(st.fractions(0, 10**6), st.sampled_from(sorted(UNITS)), st.sampled_from(sorted(UNITS)))
def test_there_and_back(value, a, b):
    if UNITS[a][0] == UNITS[b][0]:
        try:
            assert convert(convert(value, a, b), b, a) == value
        except UnitError:
            assert UNITS[a][0] == "温度"


def test_the_clock_can_be_stopped():
    assert use("now").text == "2026-11-28 12:00:00，星期六（Asia/Shanghai，UTC+08:00）"
    assert use("now", place="纽约").text.startswith("2026-11-27 23:00:00，星期五")
    for place in ("火星", "../../etc/passwd", "/etc/passwd", "", "Asia"):
        assert use("now", place=place).kind == "failed"
    assert use("days_between", start="2024-02-28", end="2024/3/1").text.startswith(
        "2024-03-01 在 2024-02-28 之后 2 天"
    )
    assert "同一天" in use("days_between", start="2024-02-28", end="2024年2月28日").text
    assert use("days_between", start="2023-02-29", end="2024-02-28").kind == "failed"


def test_a_table_of_the_readers_own(tmp_path):
    path = tmp_path / "城市.csv"
    path.write_text("城市,人口\n杭州,1237\n宁波,961\n", "utf-8-sig")
    box = toolbox(SimpleNamespace(table=str(path)))
    assert box["look_up"].schema["function"]["parameters"]["properties"]["column"]["enum"] == ["城市", "人口"]
    assert use("look_up", box, column="城市", value="杭州").text == "城市：杭州，人口：1237"
    assert "宁波" in use("look_up", box, column="城市", value="温州").text
    assert use("look_up", box, column="省", value="杭州").kind == "bad_arguments"
    with pytest.raises(UserError, match="--table"):
        toolbox(SimpleNamespace(table=str(tmp_path / "没有.csv")))


# ---------------------------------------------------------------- 找


def test_bm25_by_hand():
    """两段各三个词，"猫" 只在一段里：idf = ln(1 + 1.5/1.5)，tf = 1，长度正好平均。"""
    index = Index([Passage("a:1", "猫 dog"), Passage("b:1", "bird dog")])
    [(score, passage)] = index.search("猫", 5)
    assert passage.where == "a:1" and score == pytest.approx(0.6931471805599453)
    assert [each.where for _, each in index.search("dog", 5)] == ["a:1", "b:1"] and index.search(
        "没有", 5
    ) == []
    assert words_of("花园 GPU2") == ["花", "园", "花园", "gpu2"]


def test_search_in_a_folder(tmp_path):
    (tmp_path / "a.md").write_text("# 显存\n\n显存不够时，\n把批量改小。\n\n别的话。", "utf-8")
    (tmp_path / "b.txt").write_bytes("小狗在花园里。".encode("gb18030"))
    (tmp_path / "c.jsonl").write_text('{"text": "麻雀飞走了"}\n坏的\n{"n": 1}\n', "utf-8")
    (tmp_path / ".secret.md").write_text("显存 秘密", "utf-8")
    box = toolbox(SimpleNamespace(folder=str(tmp_path)))
    assert use("search", box, words="显存 批量").text.startswith("a.md:3\n显存不够时，\n把批量改小。")
    assert use("search", box, words="花园").text == "b.txt:1\n小狗在花园里。"
    assert (
        use("search", box, words="麻雀").text.startswith("c.jsonl:1")
        and "秘密" not in use("search", box, words="秘密").text
    )
    assert [p.where for p in passages_of("x", "长" * 700)] == ["x:1"] * 3
    assert index_folder(tmp_path).passages


# ---------------------------------------------------------------- 文件


@pytest.fixture
def place(tmp_path):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "secret.txt").write_text("秘密", "utf-8")
    (tmp_path / "in" / "sub" / "a.txt").write_text("你好\r\n", "utf-8")
    return tmp_path


@pytest.mark.parametrize("openat", [True, False])
def test_reading_stays_inside(place, openat, monkeypatch):
    if openat and not file_tools.OPENAT:
        pytest.skip("这个系统没有 openat")
    monkeypatch.setattr(file_tools, "OPENAT", openat)
    inside = place / "in"
    try:
        (inside / "link.txt").symlink_to(place / "out" / "secret.txt")
        (inside / "linked").symlink_to(place / "out", target_is_directory=True)
    except OSError:
        pytest.skip("这里不能建链接")
    box = toolbox(SimpleNamespace(folder=str(inside)))
    assert use("read_file", box, path="sub/a.txt").text == "你好\n"
    assert (
        use("list_files", box).text == "sub/" and use("list_files", box, path="sub").text == "a.txt（8 字节）"
    )
    for path in ("link.txt", "linked/secret.txt", "../out/secret.txt", "sub/../../out/secret.txt", str(place / "out" / "secret.txt"),
                 "sub\\..\\..\\out\\secret.txt", "~", "a\0b", "C:/x", ".env", "sub/.git/x", "...", "sub", "", "没有.txt", "con", "sub/a.txt."):  # fmt: skip
        result = use("read_file", box, path=path)
        assert result.kind == "failed" and "秘密" not in result.text and str(place) not in result.text, path
    assert (
        use("list_files", box, path="linked").kind == "failed"
        and "秘密" not in use("search", box, words="秘密").text
    )


@pytest.mark.skipif(not file_tools.OPENAT, reason="这个系统没有 openat")
def test_a_file_swapped_for_a_link_is_never_followed(place):
    """一个线程不停地把文件换成链接、换回来（TOCTOU）：读到的总是里面的，或者一句错。"""
    target, stop = place / "in" / "a.txt", threading.Event()
    good, link = place / "good.txt", place / "link.txt"
    target.write_text("里面", "utf-8")

    def swap():
        while not stop.is_set():
            good.write_text("里面", "utf-8")
            os.replace(good, target)
            link.symlink_to(place / "out" / "secret.txt")
            os.replace(link, target)
            time.sleep(0.0002)

    thread = threading.Thread(target=swap)
    thread.start()
    root, said = check_folder(str(place / "in")), set()
    try:
        for _ in range(20_000):
            if len(said) > 1:
                break
            try:
                said.add(file_tools.read_text(root, "a.txt"))
            except ToolError as error:
                said.add(str(error))
    finally:
        stop.set()
        thread.join()
    assert "秘密" not in said and "里面" in said


def test_files_that_are_no_text(place):
    inside = place / "in"
    (inside / "big.txt").write_bytes(b"x" * (file_tools.MOST_BYTES + 1))
    (inside / "p.png").write_bytes(bytes(range(256)))
    box = toolbox(SimpleNamespace(folder=str(inside)))
    assert (
        "字节的" in use("read_file", box, path="big.txt").text
        and "不是文字" in use("read_file", box, path="p.png").text
    )
    if hasattr(os, "mkfifo"):
        os.mkfifo(inside / "pipe")
        assert "管道" in use("read_file", box, path="pipe").text
    assert (
        decode("好".encode("gb18030")) == "好" == decode("\ufeff好".encode()) == decode("好".encode("utf-16"))
    )
    with pytest.raises(UserError, match="--folder"):
        toolbox(SimpleNamespace(folder=str(place / "没有")))
    with pytest.raises(ToolError):
        parts_of("a/" * 30)


# ---------------------------------------------------------------- 做一个调用


def made(run, writes=False):
    return {
        "t": Tool(
            "t",
            {"type": "function", "function": {"name": "t", "parameters": {"type": "object"}}},
            run,
            writes,
        )
    }


def test_kinds():
    assert use("calculator", expression="1+1") == tool_calls.Result("2", True, "ok")
    for result, kind in [
        (use("nothing"), "unknown"), (use("calculator"), "bad_arguments"), (use("calculator", expression=1), "bad_arguments"),
        (run_call(BOX, BrokenCall("{", "少了 }")), "bad_arguments"), (use("calculator", expression="1/0"), "failed"),
        (run_call(made(lambda: time.sleep(1)), Call("t", {}), timeout=0.05), "timeout"), (use("write_note", text="x"), "refused"),
    ]:  # fmt: skip
        assert (
            (result.kind, result.ok) == (kind, False)
            and result.text.startswith(ERROR)
            and len(result.text) < 700
        )
    assert ERROR == tool_world.ERROR


def test_a_long_result_is_cut_and_says_so():
    result = run_call(made(lambda: "字" * 1_000_000), Call("t", {}), at_most=100)
    assert result.ok and result.kind == "cut" and len(result.text) == 100 and "1000000 个字" in result.text


def test_results_that_are_no_text():
    for value, text in [
        ({"a": "好"}, '{"a": "好"}'),
        (None, "null"),
        (object(), "（工具给的是 object，写不成文字）"),
        ("\ud800", "?"),
    ]:
        assert run_call(made(lambda value=value: value), Call("t", {})).text == text


def test_errors_tell_neither_paths_nor_secrets(monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "abcdef123456")
    for error in [OSError(2, "No such file", "/home/alice/x"), RuntimeError("/home/alice/.ssh/id_rsa: abcdef123456\n下一行"),
                  ValueError("C:\\Users\\alice\\key.txt"), KeyError("~/alice")]:  # fmt: skip
        said = short_error(error)
        assert "alice" not in said and "abcdef" not in said and "下一行" not in said and said
    assert short_error(ConnectionError("连不上，请再试一次。")) == "连不上，请再试一次。"
    assert run_call(made(lambda: sys.exit(3)), Call("t", {})).text == f"{ERROR}SystemExit：3"
    assert len(short_error(RuntimeError("x" * 10**6))) < 400


@pytest.mark.parametrize("answer", ["yes", 1, "True", [True], None, False, object()])
def test_only_true_is_a_permission(answer, tmp_path):
    box = toolbox(SimpleNamespace(notes=str(tmp_path / "n.md")), fixed_clock)
    assert (
        use("write_note", box, lambda call: answer, text="已许可").kind == "refused"
        and not (tmp_path / "n.md").exists()
    )


def test_what_was_confirmed_is_what_is_done(tmp_path):
    """问的时候改了 call，做的还是问之前的那一份。"""
    path = tmp_path / "n.md"

    def sly(call):
        call.arguments["text"] = "别的"
        return True

    box = toolbox(SimpleNamespace(notes=str(path)), fixed_clock)
    assert use("write_note", box, sly, text="买\x1b[2J苹果\n两个").ok
    assert path.read_text("utf-8") == "- 2026-11-28 04:00:00 UTC  买[2J苹果\n  两个\n"
    assert use("write_note", box, lambda call: True, text="长" * 1001).kind == "failed"


def test_hanging_tools_are_bounded(monkeypatch):
    """超时的还没有停下，满了就不做新的；停下了又能做。"""
    monkeypatch.setattr(tool_calls, "_left_behind", [])
    go = threading.Event()
    hanging = made(go.wait)
    for _ in range(tool_calls.MOST_LEFT_BEHIND):
        assert run_call(hanging, Call("t", {}), timeout=0.01).kind == "timeout"
    assert "还没有停下" in run_call(hanging, Call("t", {}), timeout=0.01).text
    go.set()
    for thread in tool_calls._left_behind:
        thread.join(5)
    assert use("calculator", expression="1+1").ok


def test_python_runs_in_the_sandbox():
    box = toolbox(SimpleNamespace(allow_python=True))
    assert "run_python" not in BOX and box["run_python"].writes
    assert use("run_python", box, code="print(1)").kind == "refused"
    assert (
        run_call(box, Call("run_python", {"code": "print(2**100)"}), lambda call: True, 60).text
        == f"{2**100}\n"
    )
    assert (
        run_call(
            box, Call("run_python", {"code": "import os\nos.system('true')"}), lambda call: True, 60
        ).kind
        == "failed"
    )


def test_every_tool_has_a_valid_schema():
    box = toolbox(SimpleNamespace(folder=str(AGENT), allow_python=True))
    assert len(box) == 10
    for tool in box.values():
        function = tool.schema["function"]
        assert function["description"] and all(
            each["description"] for each in function["parameters"]["properties"].values()
        )


# ---------------------------------------------------------------- 脚本


def test_the_script():
    command = [
        sys.executable,
        str(AGENT / "tools.py"),
        "--call",
        "calculator",
        json.dumps({"expression": "(23+48)*2"}),
    ]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    assert (done.returncode, done.stdout) == (0, "142\n"), done.stderr


def test_bad_arguments_of_the_script(tmp_path):
    for arguments in (
        ["--call", "calculator", "[1]"],
        ["--call", "calculator", "{"],
        ["--folder", str(tmp_path / "x"), "--call", "now"],
        ["--folder", str(tmp_path)],
    ):
        with pytest.raises(UserError, match="--"):
            tools.main(arguments)
