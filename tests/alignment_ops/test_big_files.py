"""放不进内存的文件：与在内存里做的一样，不论怎样分块；内存不随文件变大；中间的文件不留下。"""

import errno
import json
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import big_files
from big_files import bucket_pairs, find_in_files, pieces, repeated, row_text
from minhash import find_duplicates
from nlp_common.base.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
U64 = np.uint64


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """600 段，长短不一；一成一字不差，两成改了几个字，几段空的。"""
    rng = random.Random(0)

    def write(n: int) -> str:
        return "".join(chr(rng.randrange(0x4E00, 0x5E00)) for _ in range(n))

    rows = [write(rng.randrange(3, 150)) for _ in range(420)]
    rows += [row + "。" for row in rng.sample(rows, 60)]
    for row in rng.sample(rows, 115):
        letters = list(row)
        for _ in range(max(1, len(row) // 50)):
            letters[rng.randrange(len(letters))] = "改"
        rows.append("".join(letters))
    rows += ["", "", "。", "……", "!"]
    rng.shuffle(rows)
    return rows


def written(folder: Path, texts: list[str]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    return path


@pytest.mark.parametrize(("rows", "copies"), [(8192, 4), (37, 4), (9, 4), (64, 4 << 12)])
def test_the_same_as_in_memory_however_it_is_cut(texts, rows, copies, tmp_path, monkeypatch):
    expected = find_duplicates(texts)
    assert len(expected) > 100
    monkeypatch.setattr(big_files, "BLOCK_ROWS", rows)
    monkeypatch.setattr(big_files, "SORTING", copies)  # 最后一种：排序的内存小到要分几遍读
    path = written(tmp_path, texts)
    assert list(find_in_files([path], scratch=tmp_path, memory_mb=16 if copies > 4 else 256)) == expected
    assert [each.name for each in tmp_path.iterdir()] == ["rows.jsonl"]


def test_rows_are_numbered_through_several_files(texts, tmp_path):
    (tmp_path / "a.csv").write_text("id,text\n1,今天天气很好我们去公园玩\n2,别的话\n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "今天天气很好"}, {"role": "assistant", "content": "我们去公园玩！"}]}\n',
        encoding="utf-8",
    )
    found = list(find_in_files([tmp_path], threshold=0.5, text_of=lambda row: row_text({**row, "id": None})))
    assert found == [(2, 0, 1.0)]


def test_text_of_a_row_leaves_the_roles_out():
    row = {"messages": [{"role": "user", "content": "问"}, {"from": "gpt", "value": "答"}], "n": 3, "x": None}
    assert row_text(row) == "问\n答"


def test_pairs_of_a_bucket(monkeypatch):
    keys, rows = np.array([7, 5, 7, 7, 5], U64), np.array([0, 1, 2, 3, 4], U64)

    def pairs() -> set:
        return {
            pair
            for part in bucket_pairs(keys, rows)
            for pair in zip(*(p.tolist() for p in part), strict=True)
        }

    assert pairs() == {(4, 1), (2, 0), (3, 0), (3, 2)}
    monkeypatch.setattr(big_files, "MOST", 1)
    monkeypatch.setattr(big_files, "MOST_PAIRS", 1)
    assert pairs() == {(4, 1), (2, 0), (3, 0)}
    later, first = repeated(keys, rows)
    assert dict(zip(later.tolist(), first.tolist(), strict=True)) == {2: 0, 3: 0, 4: 1}


def test_pieces_are_the_whole_file_in_order(tmp_path):
    records = np.zeros(1000, big_files.KEY)
    records["key"] = np.random.default_rng(0).integers(0, 1 << 64, 1000, dtype=U64)
    records["key"][:2] = 0, (1 << 64) - 1
    records["row"] = np.arange(1000)
    records.tofile(tmp_path / "x")
    found = list(pieces(tmp_path / "x", big_files.KEY, "key", 6000))
    assert len(found) > 5 and np.array_equal(np.sort(np.concatenate(found)), np.sort(records))
    for left, right in pairwise(found):
        assert left["key"].max() < right["key"].min()
    assert all((np.diff(part["row"].astype(int)) > 0).all() for part in found)
    assert list(pieces(tmp_path / "none", big_files.KEY, "key", 6000)) == []


def test_many_copies_of_one_line_stay_cheap(tmp_path, monkeypatch):
    """一万行同一句话：一块里只留一行去排序，不会配出五千万对。"""
    monkeypatch.setattr(big_files, "BLOCK_ROWS", 500)
    path = written(tmp_path, ["好评！"] * 10_000)
    found = list(find_in_files([path], scratch=tmp_path))
    assert [each.dropped for each in found] == list(range(1, 10_000)) and {each.kept for each in found} == {0}


def test_a_fingerprint_that_is_equal_by_chance_drops_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(big_files, "digest", lambda clean: 7)
    path = written(tmp_path, ["今天天气很好", "完全不同的另一段话", "今天天气很好。"])
    assert list(find_in_files([path], scratch=tmp_path)) == [(2, 0, 1.0)]


def test_faults_are_said(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"没有 .*none\.jsonl"):
        list(find_in_files([tmp_path / "none.jsonl"]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="没有能读的数据"):
        list(find_in_files([tmp_path / "empty"]))
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "好"}\n{"text": \n', encoding="utf-8")
    with pytest.raises(UserError, match="第 2 行"):
        list(find_in_files([path]))
    path.write_text('{"text": "好"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"中间文件写不进 .*nowhere"):
        list(find_in_files([path], scratch=tmp_path / "nowhere"))

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(big_files, "append_parts", full)
    with pytest.raises(UserError, match=r"No space left on device.*换一个有地方的文件夹"):
        list(find_in_files([path], scratch=tmp_path))
    assert sorted(each.name for each in tmp_path.iterdir()) == ["bad.jsonl", "empty"]


MEASURE = """
import re, sys
from pathlib import Path
sys.path[:0] = sys.argv[3:]
from big_files import find_in_files
found = sum(1 for _ in find_in_files([sys.argv[1]], scratch=sys.argv[2], memory_mb=16))
print(found, int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="只有 Linux 说得出内存的峰值")
def test_memory_does_not_grow_with_the_file(tmp_path):
    """文件大五倍，内存的峰值相差不到 8 MB。"""
    peaks = []
    for rows in (6000, 30_000):
        rng, path = random.Random(1), tmp_path / f"{rows}.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for number in range(rows):
                if number % 5 != 1:  # 五行里有一行与前一行一样
                    text = "".join(chr(rng.randrange(0x4E00, 0x5E00)) for _ in range(400))
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
        command = [
            sys.executable,
            "-c",
            MEASURE,
            str(path),
            str(tmp_path),
            str(ROOT / "alignment_ops"),
            str(ROOT),
        ]
        found, peak = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        assert int(found) == rows // 5
        peaks.append(float(peak))
    assert peaks[1] - peaks[0] < 8, peaks


@pytest.mark.slow
def test_ray_finds_the_same(texts, tmp_path):
    pytest.importorskip("ray", reason="要 pip install 'ray[data]'")
    import ray

    from ray_duplicates import find_with_ray, running_ray

    first, second = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    first.write_text("\n".join(lines[:300]) + "\n\n", encoding="utf-8")
    second.write_text("\ufeff" + "\n".join(lines[300:]), encoding="utf-8")
    with running_ray([]):
        assert find_with_ray([tmp_path], block_bytes=50_000) == find_duplicates(texts)
        second.write_text('{"text": \n', encoding="utf-8")
        with pytest.raises(UserError, match=r"2\.jsonl 第 1 行"):
            find_with_ray([tmp_path])
    assert not ray.is_initialized()
