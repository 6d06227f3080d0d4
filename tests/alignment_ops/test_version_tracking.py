"""来历、对比、照样再做：动了手脚看得出来；重做的命令带着那时的每个设置；做不到的说清楚。"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parent))  # fake_runs 在这里：冒充的训练脚本也用它

from fake_runs import make_run

import run_again
import run_records
import version_commands
import version_tracking
from nlp_common.base.errors import UserError
from nlp_common.base.runs import open_run
from nlp_common.data.rows import data_sha256
from run_again import arguments, export_commit, reproduce
from run_compare import changed_rows, compare, first_parting, show_difference
from run_records import Run, faults, find_run, find_runs, lineage, show_lineage

SCRIPT = '''"""冒充一个训练脚本：权重只由设置、数据、上一次决定。"""
import hashlib, json, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if options.get("--boom") == "true":
    sys.exit("出错了：{version}")
from fake_runs import make_run
parents = {{}}
if "--model" in options:
    parents = {{"model": Path(options["--model"])}}
make_run(Path(options["--output_dir"]), options["--stage"], parents, options.get("--dataset"), seed=int(options["--seed"]), script="topic/train.py", version="{version}")
'''


@pytest.fixture
def house(tmp_path, monkeypatch):
    """一个小仓库：一个脚本，两份数据，sft → dpo。"""
    root = tmp_path / "repo"
    (root / "topic").mkdir(parents=True)
    write_script(root, "1")
    for module in (run_again, run_records, version_commands):
        monkeypatch.setattr(module, "ROOT", root)
    monkeypatch.setenv("NLP_LEARNING_TRACKING", str(tmp_path / "tracking"))
    monkeypatch.setattr(run_again, "QWEN_SCRIPTS", {})
    write_rows(root / "a.jsonl", [{"text": f"第{i}行"} for i in range(6)])
    runs = root / "topic/outputs/tiny"
    make_run(runs / "sft", "sft", {}, root / "a.jsonl", script="topic/train.py")
    make_run(runs / "dpo", "dpo", {"model": runs / "sft"}, None, script="topic/train.py")
    return root


def write_script(root: Path, version: str) -> None:
    text = SCRIPT.format(tests=str(Path(__file__).parent), version=version)
    (root / "topic/train.py").write_text(text, encoding="utf-8")


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def dpo_of(house: Path) -> Run:
    return find_run(str(house / "topic/outputs/tiny/dpo"), find_runs())


def copy_to_records(run: Run, folder: Path) -> None:
    (folder / "jsonl").mkdir(parents=True, exist_ok=True)
    line = json.dumps({"event": "finish", "run": run.record}, ensure_ascii=False)
    (folder / "jsonl" / f"{run.id}.jsonl").write_text('{"half\n' + line + "\n", encoding="utf-8")


# ---------------------------------------------------------------- 来历


def test_lineage_of_an_untouched_chain_is_clean(house, capsys):
    tree = lineage(dpo_of(house), find_runs())
    assert faults(tree) == [] and tree.parents[0].run.record["stage"] == "sft"
    show_lineage(tree)
    said = capsys.readouterr().out
    assert "↑ model：sft" in said and "a.jsonl 6 行" in said and "✗" not in said


def change_a_word(house):
    path = house / "a.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace("第3行", "第三行"), encoding="utf-8")


def delete_the_data(house):
    (house / "a.jsonl").unlink()


def swap_the_weights(house):
    save_file({"w": np.zeros(3)}, house / "topic/outputs/tiny/sft/model.safetensors")


def train_another_there(house):
    folder = house / "topic/outputs/tiny/sft"
    make_run(folder, "sft", {}, house / "a.jsonl", seed=7, script="topic/train.py", replace=True)


def delete_the_parent(house):
    folder = house / "topic/outputs/tiny/sft"
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


@pytest.mark.parametrize(
    "tamper, said",
    [
        (change_a_word, "改过了"),
        (delete_the_data, "文件没有了"),
        (swap_the_weights, "权重不是"),
        (train_another_there, "另一次训练的"),
        (delete_the_parent, "找不到"),
    ],
)
def test_every_tampering_is_found(house, tamper, said):
    run = dpo_of(house)
    tamper(house)
    found = faults(lineage(run, find_runs()))
    assert len(found) == 1 and said in found[0] and "sft" in found[0]


def test_a_parent_with_only_a_record_left_is_still_known(house, tmp_path):
    run = dpo_of(house)
    sft = find_run(str(house / "topic/outputs/tiny/sft"), find_runs())
    copy_to_records(sft, tmp_path / "tracking")
    delete_the_parent(house)
    tree = lineage(run, find_runs())
    assert tree.parents[0].run.id == sft.id and "只有记录" in tree.parents[0].fault and len(faults(tree)) == 1


def test_names_that_do_not_fit_are_explained(house, tmp_path):
    runs = find_runs()
    assert find_run(runs[0].id[:6], runs) == runs[0]
    with pytest.raises(UserError, match="编号以它开头"):
        find_run("ffffffff", runs)
    with pytest.raises(UserError, match="编号以它开头"):
        find_run(runs[0].id[:2], runs)
    twice = [runs[0], Run(runs[0].record | {"id": runs[0].id[:5] + "0" * 11}, None)]
    with pytest.raises(UserError, match="多写几位"):
        find_run(runs[0].id[:5], twice)
    (tmp_path / "别的").mkdir()
    (tmp_path / "别的/run.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="不是这里训练的"):
        find_run(str(tmp_path / "别的"), runs)
    (tmp_path / "别的/run.json").write_text("{半个", encoding="utf-8")
    with pytest.raises(UserError, match="没有可用的"):
        find_run(str(tmp_path / "别的"), runs)


# ---------------------------------------------------------------- 差在哪里


def test_difference_names_each_cause_once(house, capsys):
    write_rows(house / "b.jsonl", [{"text": f"第{i}行"} for i in range(4)] + [{"text": "新的"}])
    a = find_run(str(house / "topic/outputs/tiny/sft"), find_runs())
    b = Run(make_run(house / "b", "sft", {}, house / "b.jsonl", seed=3, script="topic/train.py"), house / "b")
    found = compare(a, b)
    assert [name for name, *_ in found["设置"]] == ["seed"] and [name for name, *_ in found["数据"]] == [
        "train"
    ]
    assert not any(found[group] for group in ("上一次", "代码", "版本", "机器"))
    assert changed_rows(a, b) == {"dataset": (2, 1)}
    assert not any(compare(a, a).values())
    show_difference(a, b)
    assert "只有左边有的 2 行，只有右边有的 1 行" in capsys.readouterr().out


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from("甲乙丙丁"), max_size=12), st.lists(st.sampled_from("甲乙丙丁"), max_size=12))
def test_changed_rows_is_the_difference_of_the_two_bags(tmp_path_factory, left, right):
    """改了几行：两袋行相减；次序不算。加一行垫底，免得文件是空的。"""
    place = tmp_path_factory.mktemp("rows")
    sides = []
    for name, words in (("a", left), ("b", right)):
        path = write_rows(place / f"{name}.jsonl", [{"text": word} for word in ["垫", *words]])
        record = {"fingerprint": {"dataset": str(path), "dataset_sha256": data_sha256(str(path))}}
        sides.append(Run(record | {"stage": "sft", "id": name}, None))
    only = [
        sum(max(0, x.count(word) - y.count(word)) for word in "甲乙丙丁")
        for x, y in ((left, right), (right, left))
    ]
    found = changed_rows(*sides)
    assert found == {"dataset": tuple(only)} if left != right else found == {}


def test_curves_part_at_the_first_different_point():
    history = [{"step": 10, "loss": 1.0}, {"step": 20, "loss": 0.5}]
    assert first_parting({"history": history}, {"history": history}) is None
    other = [history[0], {"step": 20, "loss": 0.6}]
    assert first_parting({"history": history}, {"history": other}) == 20


# ---------------------------------------------------------------- 照样再做


def test_reproduce_gives_the_same_weights(house, tmp_path):
    rebuilt = reproduce(dpo_of(house), find_runs(), tmp_path / "again")
    assert rebuilt.same and rebuilt.parents == 0 and rebuilt.causes == []


def test_a_missing_parent_is_rebuilt_from_its_record(house, tmp_path, capsys):
    run = dpo_of(house)
    copy_to_records(find_run(str(house / "topic/outputs/tiny/sft"), find_runs()), tmp_path / "tracking")
    delete_the_parent(house)
    rebuilt = reproduce(run, find_runs(), tmp_path / "again")
    assert rebuilt.same and rebuilt.parents == 1 and "先重做它" in capsys.readouterr().out


def test_what_cannot_be_reproduced_is_refused(house, tmp_path):
    run, runs = dpo_of(house), find_runs()
    sft = find_run(str(house / "topic/outputs/tiny/sft"), runs)
    delete_the_parent(house)
    with pytest.raises(UserError, match="没有它就没法照样再做"):
        reproduce(run, find_runs(), tmp_path / "x")
    change_a_word(house)
    with pytest.raises(UserError, match="改过了"):
        reproduce(sft, runs, tmp_path / "y")
    old = Run({key: value for key, value in run.record.items() if key != "script"} | {"parent": {}}, None)
    with pytest.raises(UserError, match="没有脚本"):
        reproduce(old, runs, tmp_path / "z")
    failing = Run(run.record | {"parent": {}, "settings": {"boom": True}}, None)
    with pytest.raises(UserError, match=r"没有重做成（退出码 1）[\s\S]*出错了：1[\s\S]*--at_commit"):
        reproduce(failing, runs, tmp_path / "w")


def test_a_parent_that_comes_out_different_stops_it(house, tmp_path):
    run = dpo_of(house)
    copy_to_records(find_run(str(house / "topic/outputs/tiny/sft"), find_runs()), tmp_path / "tracking")
    delete_the_parent(house)
    write_script(house, "2")  # 代码改了：同样的设置，做出来不同
    with pytest.raises(UserError, match="与那时的不同"):
        reproduce(run, find_runs(), tmp_path / "again")


def test_the_code_of_then_makes_the_weights_of_then(house, tmp_path, monkeypatch):
    """脚本后来改了：现在的代码做出来不同，--at_commit 用那时的代码，逐位相同；工作副本一个字不动。"""

    def git(*words):
        return subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *words], cwd=house, check=True, capture_output=True, text=True).stdout.strip()  # fmt: skip

    git("init", "-q")
    git("add", "-A")
    git("commit", "-q", "-m", "1")
    commit = git("rev-parse", "--short", "HEAD")
    write_script(house, "2")
    git("commit", "-q", "-am", "2")
    monkeypatch.setattr(run_again, "git", git)
    run = dpo_of(house)
    run = Run(run.record | {"commit": commit}, run.folder)
    assert not reproduce(run, find_runs(), tmp_path / "now").same
    assert reproduce(run, find_runs(), tmp_path / "then", at_commit=True).same
    assert git("status", "--short") == ""
    with pytest.raises(UserError, match="没有提交"):
        export_commit(None, tmp_path / "none")


def test_arguments_bring_back_every_setting(dpo, monkeypatch):
    """记录里的设置 → 命令行 → 设置：决定结果的一项不差（真的 DPO 脚本的设置类）。"""
    from dataclasses import asdict

    from nlp_common.train.settings import fingerprint, parse_settings

    argv = ["--preset", "tiny", "--learning_rate", "3e-4", "--gradient_checkpointing", "true", "--seed", "5"]
    before = parse_settings(dpo.DPOSettings, dpo.PRESETS, argv, "x")
    record = {"settings": asdict(before), "fingerprint": fingerprint(before)}
    words = arguments(record, {})
    assert "--output_dir" not in words and "--report_to" not in words
    after = parse_settings(dpo.DPOSettings, dpo.PRESETS, words, "x")
    assert fingerprint(after) == record["fingerprint"] and asdict(after) == asdict(before)


# ---------------------------------------------------------------- 命令行


def test_commands(house, tmp_path, capsys):
    place = house / "topic/outputs/tiny"
    version_tracking.main(["list"])
    said = capsys.readouterr().out
    assert "topic/outputs/tiny/dpo" in said and len(said.splitlines()) == 2
    assert version_tracking.main(["lineage", str(place / "dpo")]) == []
    version_tracking.main(["diff", str(place / "sft"), str(place / "dpo")])
    assert (
        version_tracking.main(["reproduce", str(place / "dpo"), "--output_dir", str(tmp_path / "r")]) is True
    )
    version_tracking.main(["upload", str(place / "sft"), "--report_to", "jsonl"])
    [path] = (tmp_path / "tracking/jsonl").glob("*.jsonl")
    assert '"event": "finish"' in path.read_text(encoding="utf-8")
    assert "补记好了" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, said",
    [
        (["redo"], "不认识 redo"),
        (["diff", "a"], "diff A B"),
        (["reproduce", "--output_dir", "x"], "reproduce 文件夹或编号"),
        (["list", "--runs", "没有这里"], "没有这个文件夹"),
        (["upload", "x", "--report_to", "nowhere"], "不认识 nowhere"),
    ],
)
def test_wrong_commands_are_one_sentence(words, said):
    with pytest.raises(UserError, match=said):
        version_tracking.main(words)


def test_reproducing_into_the_original_is_refused(house):
    folder = str(house / "topic/outputs/tiny/dpo")
    with pytest.raises(UserError, match="换一个新的文件夹"):
        version_tracking.main(["reproduce", folder, "--output_dir", folder])


# ---------------------------------------------------------------- 慢的：真的训练，真的 MLflow


@pytest.mark.slow
def test_the_whole_lesson(tmp_path):
    script = Path(version_tracking.__file__)
    small = ["--n_chats", "200", "--n_pairs", "64", "--n_questions", "8"]
    command = [sys.executable, str(script), "--preset", "tiny", *small, "--output_dir", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "out/run.json").read_text(encoding="utf-8"))["metrics"]
    assert metrics["tampering_found"] == metrics["tampered"] == 4 and metrics["false_alarms"] == 0
    assert metrics["rebuilt_same"] and metrics["rebuilt_parents"] == 1
    assert all(place["same_points"] == place["points"] > 0 for place in metrics["places"].values())
    assert (tmp_path / "out/versions.svg").exists()


@pytest.mark.slow
def test_mlflow_aliases_and_the_registry_tell_the_same_story(house, tmp_path):
    pytest.importorskip("mlflow", reason="没有装 mlflow")
    from tracking_places import alias_story

    place = house / "topic/outputs/tiny"
    found = alias_story(tmp_path, [place / "sft", place / "dpo"])
    assert found == {"alias_steps": 4, "alias_steps_same": 4, "alias_folder_same": True}


def test_open_run_still_finds_the_folder_finished(house):
    """重做的结果也是完成的结果文件夹：同一条命令再来一次直接用它。"""
    with open_run(house / "topic/outputs/tiny/dpo") as folder:
        assert folder.finished(dpo_of(house).record["fingerprint"])
