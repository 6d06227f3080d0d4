"""一块一块地清洗：与一次读完的留下同样的行；行号、盖住的、别的样子的数据。"""

import json

import pytest

import curation_stream
import dataset_curation as script
from nlp_common.base.errors import UserError
from nlp_common.tiny import world
from planted_data import planted_chats, planted_pairs


def run(file, out, *more):
    argv = ["--preset", "tiny", "--dataset", str(file), "--output_dir", str(out), *more]
    return script.main(argv)["metrics"]


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


@pytest.mark.parametrize(("name", "plant"), [("chats", planted_chats), ("pairs", planted_pairs)])
def test_the_same_rows_as_when_read_at_once(tmp_path, monkeypatch, name, plant):
    rows = plant(400, 0, world.heldout_questions(20, 9)).rows + [{"messages": []}] * (name == "chats")
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    monkeypatch.setattr(curation_stream, "BLOCK", 64)
    whole = run(file, tmp_path / "whole", "--short_copies", "3")
    stream = run(file, tmp_path / "stream", "--short_copies", "3", "--stream", "true")
    assert lines(tmp_path / "stream" / f"{name}.jsonl") == lines(tmp_path / "whole" / f"{name}.jsonl")
    assert stream[name]["masked"] == whole[name]["masked"] > 0
    places = [
        {(row["place"], row["step"]) for row in lines(tmp_path / out / "dropped.jsonl")}
        for out in ("whole", "stream")
    ]
    assert places[0] == places[1]
    assert stream[name]["kept"] + len(places[1]) == stream[name]["rows"] == len(rows)


def test_two_kinds_in_one_folder_and_what_cannot_be_streamed(tmp_path, monkeypatch):
    monkeypatch.setattr(curation_stream, "BLOCK", 4)
    data = tmp_path / "data"
    data.mkdir()
    for name, plant in (("a", planted_chats), ("b", planted_pairs)):
        rows = plant(100, 0, world.heldout_questions(20, 9)).rows[:8]
        (data / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(UserError, match="第 9 条起是 pairs"):
        run(data, tmp_path / "out", "--stream", "true")
    with pytest.raises(UserError, match="--stream 要给 --dataset"):
        script.main(["--preset", "tiny", "--stream", "true"])
