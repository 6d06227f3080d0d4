"""README 里的数由数据填：填得对、错了说得清，以及现在每一份 README 都与数据相同。"""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nlp_common.base import measurements
from nlp_common.base.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "docs" / "readme_numbers.py"
TABLE = {
    "a.acc": {0: 0.98765, 1: 0.5, 2: 1.0},
    "a.count": {None: 144790},
    "a.wall_s": {None: 30.0},
    "b.wall_s": {None: 120.0},
}


@pytest.fixture(scope="module")
def numbers():
    spec = importlib.util.spec_from_file_location("readme_numbers", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """空的数据文件夹，不碰仓库里的。"""
    if not (ROOT / ".git").exists():
        pytest.skip("不是 git 的工作副本，记不下")
    monkeypatch.setattr(measurements, "FOLDER", tmp_path / "measurements")
    return tmp_path / "measurements"


# ---------------------------------------------------------------- 填


@pytest.mark.parametrize(
    ("cell", "filled"),
    [
        ("{a.acc@0:.3f}", "0.988"),
        ("{a.count:,}", "144,790"),
        ("{a.count}", "144790"),
        ("{a.wall_s/b.wall_s:.2f}", "0.25"),
        ("{a.wall_s/60:.1f}", "0.5"),
        ("{mean(a.acc):.3f}", "0.829"),
        ("{min(a.acc)}", "0.5"),
        ("{max(a.acc):.1f}", "1.0"),
        ("{a.acc@1:.0%} 与 {a.acc@2:+.1f}", "50% 与 +1.0"),
        ("没有数", "没有数"),
    ],
)
def test_cells(numbers, cell, filled):
    assert numbers.render(f"| {cell} |\n", TABLE) == f"| {filled} |\n"


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ("{a.none:.3f}", "没有 a.none"),
        ("{a.acc:.3f}", "要写明是哪个"),
        ("{a.acc@7}", "没有种子 7"),
        ("{a.acc@x}", "没有种子 x"),
        ("{a.count:.2q}", "写法 '.2q' 不对"),
        ("{mean(b.none)}", "没有 b.none"),
        ("{__import__('os')}", "没有"),
    ],
)
def test_wrong_cells_say_which(numbers, cell, said):
    with pytest.raises(UserError) as error:
        numbers.render(f"| {cell} |", TABLE)
    assert said in str(error.value) and str(error.value).startswith(cell)


def test_blocks_are_replaced_and_the_rest_stays(numbers):
    text = "前\n<!-- numbers:x -->\n旧\n<!-- /numbers:x -->\n中\n   <!-- numbers:y -->\n   <!-- /numbers:y -->\n后\n"
    templates = {"x": "{a.count}\n", "y": "   好\n"}
    filled, changed = numbers.fill_blocks(text, "README.md", templates, TABLE)
    assert changed == ["x", "y"]
    assert filled == text.replace("旧\n", "144790\n").replace("y -->\n   <", "y -->\n   好\n   <")
    assert numbers.fill_blocks(filled, "README.md", templates, TABLE) == (filled, [])


def test_block_without_template_or_end_is_an_error(numbers):
    with pytest.raises(UserError, match="没有模板"):
        numbers.fill_blocks("<!-- numbers:x -->\n<!-- /numbers:x -->\n", "README.md", {}, TABLE)
    with pytest.raises(UserError, match="没有配成一对"):
        numbers.fill_blocks("<!-- numbers:x -->\n<!-- /numbers:y -->\n", "README.md", {"x": ""}, TABLE)


# ---------------------------------------------------------------- 记


def test_record_replaces_the_same_name_and_seed(folder, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(ROOT / "benchmarks" / "stages.py"), "--stages", "sft", "--record"])
    measurements.record("t", {"b": {"rows_per_s": 1.0}, "a": 2, "text": "字", "yes": True}, seed=1)
    measurements.record("t", {"a": 3}, seed=0)
    measurements.record("t", {"a": 4}, unit="MB", seed=1, command="python x.py")
    rows = [json.loads(line) for line in (folder / "t.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["name"], row["seed"], row["value"]) for row in rows] == [
        ("t.a", 0, 3),
        ("t.a", 1, 4),
        ("t.b.rows_per_s", 1, 1.0),
    ]
    assert [row["unit"] for row in rows] == ["", "MB", "rows/s"]
    assert [row["command"] for row in rows] == [
        "python benchmarks/stages.py --stages sft",
        "python x.py",
        "python benchmarks/stages.py --stages sft",
    ]
    for row in rows:
        assert tuple(row) == measurements.FIELDS
        assert re.fullmatch(r"[0-9a-f]{7,}\+?", row["commit"]) and re.search(
            r"\d 核|GPU|NVIDIA", row["processor"]
        )


def test_command_has_no_paths_of_this_machine(monkeypatch, tmp_path):
    words = ["--data", f"{tmp_path}/chnsenticorp", "--record", "qwen.x", f"--model={ROOT}/m", "--seed", "1"]
    words += ["--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [str(ROOT / "simple_demo" / "compare_models.py"), *words])
    assert measurements.current_command() == (
        "python simple_demo/compare_models.py --data chnsenticorp --model=m --seed 1"
    )


def test_names_and_prefixes_are_checked(folder):
    with pytest.raises(UserError, match="不能用的字：a b"):
        measurements.record("t", {"a b": 1})
    with pytest.raises(UserError, match=r"主题\.名字"):
        measurements.record_run("qwen", {"seconds": 1.0, "metrics": {}, "settings": {"seed": 0}})
    measurements.record_run("t.x", {"seconds": 1.0, "metrics": {"qa_accuracy": 0.5}, "settings": {"seed": 3}})
    assert [(row["name"], row["seed"]) for row in measurements.load_rows("t")] == [
        ("t.x.qa_accuracy", 3),
        ("t.x.seconds", 3),
    ]


def test_a_stage_records_this_run_only(folder, tmp_path, reward, base_folder):
    few = ["--preset", "tiny", "--max_steps", "1", "--max_train_samples", "16", "--max_eval_samples", "4"]
    few += ["--per_device_train_batch_size", "4", "--model", str(base_folder), "--seed", "3"]
    few += ["--output_dir", str(tmp_path / "reward"), "--record"]
    with pytest.raises(UserError, match=r"主题\.名字"):
        reward.main([*few, "qwen"])
    reward.main([*few, "qwen.try"])
    rows = {row["name"]: row for row in measurements.load_rows("qwen")}
    assert {"qwen.try.pair_accuracy", "qwen.try.seconds", "qwen.try.train_tokens_per_s"} <= set(rows)
    assert {row["seed"] for row in rows.values()} == {3}
    with pytest.raises(UserError, match="以前的结果"):
        reward.main([*few, "qwen.try"])


def test_outside_a_checkout_is_a_chinese_error(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(measurements, "ROOT", tmp_path)
    with pytest.raises(UserError, match="不是 git 的工作副本"):
        measurements.record("t", {"a": 1}, command="python x.py")
    assert not folder.exists()


def test_record_from_a_json_file(numbers, folder, tmp_path):
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"hand": {"accuracy": 0.818, "note": "字"}}), encoding="utf-8")
    numbers.record("t", str(file), "reviews", "python simple_demo/compare_models.py", 0)
    (row,) = measurements.load_rows("t")
    assert row["name"] == "t.reviews.hand.accuracy" and row["unit"] == "fraction"
    file.write_text("[1]", encoding="utf-8")
    with pytest.raises(UserError, match="名字: 数"):
        numbers.record("t", str(file), "", "python x.py", None)


def test_trim_keeps_what_is_used(numbers, folder):
    """模板用到的（几个种子都留）、一课的总指标、说好要量的留下；别的细数去掉；再做一次什么也不变。"""
    (folder / "templates").mkdir(parents=True)
    cells = "{t.a.grid.x@0:.2f} {mean(t.a.grid.y):.1f} {t.a.p.q.r/t.a.p.q.s:.2f}"
    (folder / "templates" / "x.md").write_text(cells, encoding="utf-8")
    grid = {"x": 1, "y": 2, "z": 3, "recall_at_1": 4}
    for seed in (0, 1):
        values = {"a": {"total": 9, "grid": grid, "p": {"q": {"r": 1, "s": 2, "t": 3}}}}
        measurements.record("t", values, seed=seed, command="python x.py")
    numbers.trim("t")
    left = ["grid.recall_at_1", "grid.x", "grid.y", "p.q.r", "p.q.s", "total"]
    rows = measurements.load_rows("t")
    assert [(row["name"], row["seed"]) for row in rows] == [(f"t.a.{n}", s) for n in left for s in (0, 1)]
    assert "grid.z" not in (folder / "README.md").read_text(encoding="utf-8")
    numbers.trim("t")
    assert measurements.load_rows("t") == rows
    with pytest.raises(UserError, match=r"nothing\.jsonl"):
        numbers.trim("nothing")


# ---------------------------------------------------------------- 仓库里的


def test_readmes_match_the_data():
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "check"], capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_check_names_the_readme_and_the_block(numbers, monkeypatch, capsys):
    table = numbers.load_table()
    table["qwen.sft.qa_accuracy"][0] += 0.5
    monkeypatch.setattr(numbers, "load_table", lambda: table)
    with pytest.raises(SystemExit):
        numbers.check()
    assert "qwen_chinese_finetune/README.md 与数据不同：qwen_stages" in capsys.readouterr().out


def test_rows_are_whole():
    paths = sorted((ROOT / "docs" / "measurements").glob("*.jsonl"))
    assert paths
    for path in paths:
        rows = measurements.load_rows(path.stem)
        keys = [(row["name"], -1 if row["seed"] is None else row["seed"]) for row in rows]
        assert keys == sorted(set(keys)), path
        for row in rows:
            assert tuple(row) == measurements.FIELDS
            assert row["name"].startswith(f"{path.stem}.")
            assert isinstance(row["value"], (int, float))
            assert row["command"] and row["commit"] and row["processor"] and row["date"], row
            assert not re.search(r"(^|[\s=])/(home|tmp|work|root|Users)", row["command"]), row


def test_no_lesson_names_a_commit(numbers):
    """哪个提交、哪台机器量的是数据，不写在课文里。"""
    wrong = []
    for path in numbers.readmes():
        if path.name.startswith("README") and path.parent.name != "docs":
            for word in re.findall(r"\b[0-9a-f]{7}\b", path.read_text(encoding="utf-8")):
                if re.search(r"\d", word) and re.search(r"[a-f]", word):
                    wrong.append(f"{path.relative_to(ROOT)}：{word}")
    assert not wrong
