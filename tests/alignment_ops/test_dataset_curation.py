"""dataset_curation.py：埋的毛病照数埋、各步查得准查得全、寒暄不被去重删光；自己的文件，丢掉的行连原因都在；说错的话。"""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import dataset_curation as script
from curation_report import FAULTS, precision_recall
from curation_rows import Table, drop_duplicates, mask_personal, read_table, text_of, turns_of
from nlp_common.base.errors import UserError
from nlp_common.tiny import world
from nlp_common.train.settings import parse_settings
from planted_data import ANNOTATORS, copied, kind_of, planted_chats, planted_pairs, slot_of

ASKED = world.heldout_questions(60, script.LEAKED_SEED)


@pytest.fixture(scope="module")
def tables():
    """两份埋了毛病的数据，看文字的几步都做过了。"""
    argv = ["--preset", "tiny", "--n_chats", "1200", "--n_pairs", "600"]
    settings = parse_settings(script.CurationSettings, script.PRESETS, argv)
    tables, asked = script.load(settings)
    for table in tables.values():
        script.clean_text(table, asked, settings)
    return tables


# ---------------------------------------------------------------- 埋的毛病


def test_planted_shares_and_same_again():
    chats, pairs = planted_chats(1000, 3, ASKED), planted_pairs(1000, 3, ASKED)
    assert (
        chats.rows == planted_chats(1000, 3, ASKED).rows
        and pairs.faults == planted_pairs(1000, 3, ASKED).faults
    )
    for planted in (chats, pairs):
        assert 0.17 < len(planted.faults) / 1000 < 0.24
        assert len({id(message) for row in planted.rows for message in turns_of(row)}) == sum(
            len(turns_of(row)) for row in planted.rows
        )  # 各行的消息不共用：改一行不会改到另一行
    counts = Counter(chats.faults.values())
    assert counts["wrong_answer"] == 120 and counts["garbage"] == 20 and counts["contaminated"] == 5
    assert all(copy > original for copy, original in chats.copies.items())


def test_planted_wrong_answers_are_wrong_and_the_others_are_right():
    chats = planted_chats(600, 1, ASKED)
    for number, row in enumerate(chats.rows):
        story, right = row["messages"][0]["content"], []
        for asked, reply in zip(row["messages"][::2], row["messages"][1::2], strict=True):
            slot = slot_of(asked["content"])
            said = [value for value in world.WORLD.get(slot or "", []) if value in reply["content"]]
            right += [value in story for value in said]
        if chats.faults.get(number) == "wrong_answer":
            assert right.count(False) == 1
        elif number not in chats.faults and number not in chats.lookalikes:
            assert all(right)


def test_flipped_pairs_are_the_annotators_doing():
    pairs = planted_pairs(3000, 0, ASKED)
    flips = Counter(
        pairs.rows[number]["annotator"] for number, fault in pairs.faults.items() if fault == "flipped"
    )
    assert {row["annotator"] for row in pairs.rows} == set(ANNOTATORS)
    assert flips.most_common(1)[0][0] == "标注员3"  # 偷懒时只看先看到的，一半标反
    wrong = [
        pairs.rows[n]
        for n, fault in pairs.faults.items()
        if fault == "flipped" and pairs.rows[n]["annotator"] == "标注员3"
    ]
    assert sum(row["shown_first"] == "chosen" for row in wrong) > 0.7 * len(wrong)


def test_kind_and_slot():
    for slot, wordings in world.QUESTION.items():
        for wording in wordings:
            slots = {name: values[0] for name, values in world.WORLD.items()}
            assert slot_of("故事。\n" + wording.format(**slots)) == slot
    assert slot_of("你好") is None and kind_of([{"role": "user", "content": "你好"}]) == "寒暄"


# ---------------------------------------------------------------- 看文字的几步


def test_each_step_finds_what_was_planted(tables):
    found = precision_recall(tables)
    for fault in ("duplicate", "garbage", "personal", "contaminated"):
        assert found["recall"][fault] >= 0.9 and found["precision"][fault] >= 0.9, fault
    assert found["recall"]["language"] == 1.0 and found["recall"]["near_duplicate"] >= 0.75
    assert found["precision"]["near_duplicate"] >= 0.95 and found["personal_exact"] == 1.0
    assert found["lookalikes_blamed"] <= 0.05 and found["good_dropped_share"] < 0.01
    assert found["bad_share_left"] < found["bad_share"]


def test_counts_add_up_and_no_number_is_left(tables):
    for table in tables.values():
        assert len(table.alive) + len(table.dropped) == len(table.raw)
        assert {row["row"] for row in table.dropped}.isdisjoint(table.alive)
        written = [written for _, written in table.planted.personal.values()]
        everything = json.dumps([table.curated(), table.dropped], ensure_ascii=False)
        assert not [number for number in written if number in everything]
        assert table.raw != table.rows  # 原样的那一份没有动


def greetings(n: int) -> list[dict]:
    said = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！有什么想问我的吗？"}]
    return [copied({"messages": said}) for _ in range(n)]


@pytest.mark.parametrize(("copies", "left"), [(1, 1), (5, 5), (100, 30)])
def test_short_rows_keep_some_copies(copies, left):
    table = Table("chats", greetings(30), {})
    drop_duplicates(table, 0.7, copies)
    assert len(table.alive) == left


def test_deduplicating_greetings_away_is_noticed():
    rows = greetings(100) + world.chats(300, 0)
    table = Table(
        "chats", [{"messages": row["messages"], "kind": kind_of(row["messages"])} for row in rows], {}
    )
    drop_duplicates(table, 0.7, 1)
    kinds = {row["kind"]: row for row in script.coverage(table.raw, table.curated())}
    assert kinds["寒暄"]["fewer"] and not any(row["fewer"] for kind, row in kinds.items() if kind != "寒暄")


# ---------------------------------------------------------------- 从头到尾


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return str(path)


def test_own_chats(tmp_path, base_folder, capsys):
    story = text_of(world.chats(1, 5)[0])
    rows = [{"instruction": text_of(row), "output": "好的，我看完了这个故事。"} for row in world.chats(12, 0)]
    rows += [
        {"instruction": "怎么联系你？", "output": "打13812345678，<b>谢谢</b>"},
        {"instruction": "再问一次，怎么联系你？", "output": "我不会说<div>这个</div>"},
        {"instruction": "这一行没有回答", "output": ""},
        {"instruction": story, "output": "这是评测里的题"},
        rows[3],
    ]
    data = write(tmp_path / "mine.jsonl", rows)
    test = write(tmp_path / "test.jsonl", [{"question": story}])
    out = tmp_path / "out"
    argv = ["--preset", "tiny", "--dataset", data, "--eval_files", test, "--output_dir", str(out)]
    argv += ["--model", str(base_folder), "--folds", "2", "--doubt", "1"]  # 余地不会小于 −1：不丢答错的
    record = script.main(argv)
    steps = record["metrics"]["chats"]["steps"]
    wanted = {"unusable": 1, "personal": 0, "garbage": 1, "language": 0, "duplicate": 1, "near_duplicate": 0,
              "contaminated": 1, "wrong_answer": 0}  # fmt: skip
    assert {name: row["dropped"] for name, row in steps.items()} == wanted
    kept = [json.loads(line) for line in (out / "chats.jsonl").read_text("utf-8").splitlines()]
    dropped = [json.loads(line) for line in (out / "dropped.jsonl").read_text("utf-8").splitlines()]
    assert len(kept) == record["metrics"]["chats"]["kept"] == 13 and len(dropped) == 4
    assert {row["step"] for row in dropped} == {"unusable", "garbage", "duplicate", "contaminated"}
    assert kept[12]["messages"][1]["content"] == "打[电话]，<b>谢谢</b>"
    audit, card = ((out / name).read_text("utf-8") for name in ("audit.html", "dataset_card.md"))
    assert (
        "&lt;div&gt;" in audit
        and "<b>谢谢" not in audit
        and "http" not in audit.replace("http://www.w3.org", "")
    )
    assert "13812345678" not in audit + card + (out / "dropped.jsonl").read_text("utf-8")
    assert "| 对话 | 评测的题 | 1 |" in card and "待填" in card
    assert "17 行，留下 13 行" in capsys.readouterr().out
    assert script.main(argv)["id"] == record["id"]


def test_own_pairs_without_a_model(tmp_path, capsys):
    rows = [{"question": text_of({"messages": p["prompt"]}), "response_chosen": p["chosen"][0]["content"],
             "response_rejected": p["rejected"][0]["content"]} for p in world.pairs(30, 0)]  # fmt: skip
    out = tmp_path / "out"
    argv = ["--preset", "tiny", "--dataset", write(tmp_path / "p.jsonl", rows), "--output_dir", str(out)]
    metrics = script.main(argv)["metrics"]
    assert metrics["pairs"]["kept"] >= 28 and metrics["bias"]["raw"]["position"] == {"n": 0}
    assert "没有给 --model" in capsys.readouterr().out
    assert "没有用模型找标错的" in (out / "dataset_card.md").read_text("utf-8")


def test_flipped_pairs_use_the_folds(tmp_path, base_folder, monkeypatch):
    """每一份由没见过它的模型打分；DPO 的子进程在这里不真的开。"""
    pairs = world.pairs(24, 0)
    seen, trained = [], []

    def stage(kind, out, model, dataset, preset="tiny", **settings):
        trained.append([json.loads(line) for line in dataset.read_text("utf-8").splitlines()])

    def margins(model, reference, tokenizer, rows, beta):
        seen.append(rows)
        return np.where(
            [row["prompt"][0]["content"] == pairs[5]["prompt"][0]["content"] for row in rows], -3.0, 3.0
        )

    monkeypatch.setattr(script, "run_stage", stage)
    monkeypatch.setattr(script, "load_chat_lm", lambda *_: (None, None))
    monkeypatch.setattr(script, "pair_margins", margins)
    data = write(tmp_path / "p.jsonl", pairs)
    argv = ["--preset", "tiny", "--dataset", data, "--model", str(base_folder), "--folds", "3"]
    out = tmp_path / "out"
    record = script.main([*argv, "--output_dir", str(out)])
    assert record["metrics"]["pairs"]["steps"]["flipped"]["dropped"] == 1
    assert sum(map(len, seen)) == sum(map(len, trained)) / 2 == record["metrics"]["pairs"]["kept"] + 1
    for rows, others in zip(seen, trained, strict=True):
        assert not [row for row in rows if row in others]
    dropped = [json.loads(line) for line in (out / "dropped.jsonl").read_text("utf-8").splitlines()]
    assert dropped[-1]["step"] == "flipped" and dropped[-1]["prompt"] == pairs[5]["prompt"]


def test_the_whole_lesson(tmp_path, base_folder, monkeypatch):
    """三份数据各训练一遍（这里不真的训练）：指标的名字、图、同样的一半、第二次直接用。"""
    trained = {}

    def stage(kind, out, model, dataset, preset="tiny", **settings):
        trained[f"{kind}_{Path(dataset).stem}"] = [
            json.loads(line) for line in dataset.read_text("utf-8").splitlines()
        ]
        shutil.copytree(model, out)

    monkeypatch.setattr(script, "run_stage", stage)
    measured, measure_chat = [], script.measure_chat

    def measure(*arguments):  # 六个模型都是同一个：量一次就够
        measured.append(measured[0] if measured else measure_chat(*arguments))
        return measured[0]

    monkeypatch.setattr(script, "measure_chat", measure)
    monkeypatch.setattr(script, "chain_model", lambda *_: {"path": str(base_folder), "id": "base"})
    argv = [
        "--preset",
        "tiny",
        "--n_chats",
        "140",
        "--n_pairs",
        "100",
        "--folds",
        "2",
        "--max_eval_samples",
        "6",
    ]
    argv += ["--output_dir", str(tmp_path / "out")]
    record = script.main(argv)
    metrics = record["metrics"]
    for arm in ("raw", "curated", "random"):
        assert {f"preferred_rate_{arm}", f"qa_accuracy_{arm}"} <= set(metrics)
    assert set(metrics["recall"]) == set(metrics["precision"]) == set(FAULTS)
    assert (
        len(measured) == 6
        and metrics["gain_over_raw"]["value"] == 0
        and metrics["average_precision"]["wrong_answer"] > 0
    )
    sizes = {name: len(rows) for name, rows in trained.items()}
    assert sizes["sft_sft_raw"] == 140 and sizes["dpo_dpo_raw"] == 100
    for kind in ("sft", "dpo"):
        assert sizes[f"{kind}_{kind}_curated"] == sizes[f"{kind}_{kind}_random"] < sizes[f"{kind}_{kind}_raw"]
    assert all(row in trained["sft_sft_raw"] for row in trained["sft_sft_random"])
    names = {"curation_found", "curation_arms", "curation_margins_chats", "curation_margins_pairs"}
    assert names == {path.stem for path in (tmp_path / "out").glob("*.svg")}
    assert script.main(argv)["id"] == record["id"]
    with pytest.raises(UserError, match="doubt"):
        script.main([*argv, "--doubt", "0.5"])


def test_a_model_that_cannot_judge_drops_nothing(tmp_path, base_folder, monkeypatch, capsys):
    """不认得这类数据的模型，一半的对它都疑心：一行也不丢，在哪里都说出来。"""
    monkeypatch.setattr(script, "run_stage", lambda *_, **__: None)
    monkeypatch.setattr(script, "load_chat_lm", lambda *_: (None, None))
    monkeypatch.setattr(script, "pair_margins", lambda *each: np.resize([3.0, -3.0], len(each[3])))
    data, out = write(tmp_path / "p.jsonl", world.pairs(40, 0)), tmp_path / "out"
    argv = ["--preset", "tiny", "--dataset", data, "--model", str(base_folder), "--folds", "2"]
    metrics = script.main([*argv, "--output_dir", str(out)])["metrics"]
    assert metrics["pairs"]["steps"]["flipped"]["dropped"] == 0
    for said in (
        capsys.readouterr().out,
        *((out / n).read_text("utf-8") for n in ("audit.html", "dataset_card.md")),
    ):
        assert "一行也没有丢" in said


@pytest.mark.slow
def test_run_as_a_reader_does(tmp_path, base_folder):
    """真的开子进程训练 DPO，交叉验证；没有终端的编码也印得出来。"""
    home = Path(script.__file__).parent
    command = [
        sys.executable,
        "dataset_curation.py",
        "--preset",
        "tiny",
        "--n_chats",
        "120",
        "--n_pairs",
        "100",
    ]
    command += [
        "--folds",
        "2",
        "--compare",
        "false",
        "--model",
        str(base_folder),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(
        command,
        cwd=home,
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
    )
    assert done.returncode == 0, done.stderr
    assert "标反的" in done.stdout and "查全" in done.stdout
    run = json.loads((tmp_path / "out" / "run.json").read_text("utf-8"))
    assert run["metrics"]["recall"]["duplicate"] == 1.0 and "flipped" in run["metrics"]["pairs"]["steps"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--dataset", "没有.jsonl"], "没有.jsonl"),
        (["--eval_files", "没有.jsonl"], "--eval_files"),
        (["--languages", "zh,法文"], "--languages 不认识 法文"),
        (["--folds", "1"], "--folds"),
        (["--threshold", "0"], "--threshold"),
    ],
)
def test_mistakes(options, said):
    with pytest.raises(UserError, match=said):
        script.main(["--preset", "tiny", *options])


def test_own_file_with_mistakes(tmp_path):
    for rows, said in (([{"a": 1}], "格式不认识"), ([{"instruction": "问", "output": ""}], "没有一行可用")):
        with pytest.raises(UserError, match=said):
            script.main(
                [
                    "--preset",
                    "tiny",
                    "--dataset",
                    write(tmp_path / "x.jsonl", rows),
                    "--output_dir",
                    str(tmp_path / "o"),
                ]
            )


def test_all_rows_dropped_is_said(tmp_path, base_folder):
    rows = [{"instruction": "Where did Tom go in the evening?", "output": "He went to the garden."}]
    with pytest.raises(UserError, match="一行也没有留下"):
        script.main(
            [
                "--preset",
                "tiny",
                "--dataset",
                write(tmp_path / "x.jsonl", rows),
                "--output_dir",
                str(tmp_path / "o"),
            ]
        )
    rows = [{"instruction": "小刚去了哪里？", "output": "小刚去了花园。"}]
    argv = ["--preset", "tiny", "--model", str(base_folder), "--output_dir", str(tmp_path / "o2")]
    with pytest.raises(UserError, match="只剩 1 行"):
        script.main([*argv, "--dataset", write(tmp_path / "y.jsonl", rows)])


def test_personal_data_is_masked_before_everything(tmp_path):
    table = Table(
        "chats",
        [
            {
                "messages": [
                    {"role": "user", "content": "打13812345678"},
                    {"role": "assistant", "content": "好"},
                ]
            }
        ],
        {},
    )
    mask_personal(table)
    assert table.masked == {0: ["phone"]} and table.raw[0]["messages"][0]["content"] == "打13812345678"
    assert table.rows[0]["messages"][0]["content"] == "打[电话]"


def test_numbers_in_other_columns_and_in_unusable_rows_are_masked_too(tmp_path):
    chat = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！"}]
    rows = [
        {"messages": [], "meta": {"phone": "13912345678"}},
        {"messages": chat, "phone": 13912345678, "meta": {"mails": ["a@b.com", 3]}},
    ]
    file = tmp_path / "own.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    table = read_table(str(file), None, "hf")
    mask_personal(table)
    table.drop("garbage", {0: "乱码"})
    everything = json.dumps([table.rows, table.dropped], ensure_ascii=False)
    assert "13912345678" not in everything and "a@b.com" not in everything
    assert [row["place"] for row in table.dropped] == [1, 2]  # 文件里的第几条，读不成的也数
