"""训练与留出：先去重再分，同一行不会两边都有；只有一行说要两行；数据文件夹改了就是另一份数据。"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from nlp_common.base.errors import UserError
from nlp_common.data.chats import to_chats, to_pairs, to_questions, to_texts
from nlp_common.data.rows import data_sha256
from nlp_common.train.settings import StageSettings, fingerprint
from nlp_common.train.splits import load_train_and_eval


def settings(dataset: Path, **more):
    return SimpleNamespace(
        **{"dataset": str(dataset), "eval_dataset": None, "max_train_samples": None, "max_eval_samples": 500}
        | {"source": "hf", "seed": 0}
        | more
    )


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def chat(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.mark.parametrize(
    "convert, row",
    [
        (to_texts, lambda n: {"text": f"第{n}篇", "id": n}),
        (to_chats, lambda n: chat(f"问{n}", f"答{n}")),
        (to_pairs, lambda n: {"prompt": f"问{n}", "chosen": "好", "rejected": "坏"}),
        (to_questions, lambda n: {"prompt": f"问{n}"}),
    ],
)
def test_no_row_is_on_both_sides(tmp_path, capsys, convert, row):
    rows = [row(n % 10) for n in range(40)]
    train, heldout, _ = load_train_and_eval(settings(write(tmp_path / "a.jsonl", rows)), "chats", convert)
    assert len(train) == 9 and len(heldout) == 1 and heldout[0] not in train
    assert "去掉重复的 30 行，剩 10 行" in capsys.readouterr().out


def test_blanks_do_not_make_another_row_but_other_words_do(tmp_path, capsys):
    rows = [chat("问", "答"), chat("问 ", "答\n"), chat("问", "另答"), chat("1 1", "答"), chat("11", "答")]
    train, heldout, _ = load_train_and_eval(settings(write(tmp_path / "a.jsonl", rows)), "chats", to_chats)
    assert len(train) + len(heldout) == 5 - 1
    assert "重复的 1 行" in capsys.readouterr().out


def test_rows_without_duplicates_are_split_as_before(tmp_path, capsys):
    rows = [chat(f"问{n}", "答") for n in range(60)]
    train, heldout, data = load_train_and_eval(settings(write(tmp_path / "a.jsonl", rows)), "chats", to_chats)
    assert len(train) == 57 and len(heldout) == 3 and data["eval"]["rows"] == 3
    assert "重复" not in capsys.readouterr().out


@pytest.mark.parametrize("rows", [[chat("问", "答")], [chat("问", "答")] * 30])
def test_one_row_needs_another(tmp_path, rows):
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError, match=r"只有 1 行，至少要两行：一行训练，一行留出.*--eval_dataset"):
        load_train_and_eval(settings(path), "chats", to_chats)
    train, heldout, _ = load_train_and_eval(settings(path, eval_dataset=str(path)), "chats", to_chats)
    assert train and heldout


def test_one_document_says_the_same_and_two_train(tmp_path):
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_text("他走进屋子。" * 50, encoding="utf-8")
    two.write_text("他走进屋子。\n他走出屋子。\n", encoding="utf-8")
    with pytest.raises(UserError, match="至少要两行"):
        load_train_and_eval(settings(one), "documents", to_texts)
    train, heldout, _ = load_train_and_eval(settings(two), "documents", to_texts)
    assert len(train) == len(heldout) == 1


def test_an_evaluation_file_that_holds_training_rows_is_said_to(tmp_path, capsys):
    rows = [chat(f"问{n}", "答") for n in range(5)]
    train = write(tmp_path / "train.jsonl", rows)
    heldout = write(tmp_path / "eval.jsonl", [*rows[:2], chat("新问", "答")])
    load_train_and_eval(settings(train, eval_dataset=str(heldout)), "chats", to_chats)
    assert "留出的 3 行里有 2 行训练数据里也有" in capsys.readouterr().out


def test_a_changed_data_folder_is_another_run(tmp_path):
    write(tmp_path / "train.jsonl", [chat("问", "答")])
    write(tmp_path / "validation.jsonl", [chat("问", "答")])
    wanted = StageSettings(dataset=str(tmp_path))
    first = fingerprint(wanted)
    assert first["dataset_sha256"] == data_sha256(str(tmp_path)) and fingerprint(wanted) == first
    write(tmp_path / "validation.jsonl", [chat("问", "改了的答")])
    second = fingerprint(wanted)
    assert second != first and second | {"dataset_sha256": first["dataset_sha256"]} == first
    (tmp_path / "README.md").write_text("说明", encoding="utf-8")  # 不是数据
    assert fingerprint(wanted) == second
