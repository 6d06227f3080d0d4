"""near_duplicates.py：课跑得通，量到的与公式一样；自己的数据，留下的与丢掉的合起来是全部。"""

import json
import random

import pytest

import near_duplicates
import planted_duplicates
from nlp_common.base.errors import UserError
from planted_duplicates import CHANGES, plant


@pytest.fixture(autouse=True)
def paragraphs(monkeypatch):
    """代替报纸与评论（读它们要几秒）：随机的字，每二十个字一句。"""
    rng = random.Random(0)

    def write(n: int) -> str:
        return "".join(
            "".join(chr(rng.randrange(0x4E00, 0x5E00)) for _ in range(20)) + "。" for _ in range(n)
        )

    rows = [{"text": write(6 + number % 10), "label": 1} for number in range(400)]
    monkeypatch.setattr(planted_duplicates, "people_daily", lambda: rows)
    monkeypatch.setattr(near_duplicates, "raw_reviews", lambda: rows + rows[:200])


def test_the_lesson(tmp_path, capsys):
    argv = ["--preset", "tiny", "--n_texts", "120", "--n_pairs", "40", "--output_dir", str(tmp_path / "out")]
    metrics = near_duplicates.main(argv)["metrics"]
    assert (metrics["bands"], metrics["rows"]) == (18, 7)
    assert metrics["found_punctuation"] == 1 and metrics["dropped_half"] == metrics["dropped_untouched"] == 0
    assert metrics["pairs_seen"] > 0.9 and metrics["families"]["small_29"]["elements_picked"] < 1.5
    assert metrics["jaccard_typos_by_spaces"] < 0.1 < 0.6 < metrics["jaccard_typos"]
    assert metrics["reviews_exact"] == pytest.approx(1 / 3)
    assert (tmp_path / "out" / "s_curve.svg").read_text(encoding="utf-8").startswith("<svg")
    assert "Traceback" not in capsys.readouterr().out


def test_planted_texts_know_where_they_come_from():
    planted = plant(200, 5, seed=1)
    assert len(planted.texts) == 200 + 5 * (len(CHANGES) + 2) and len(planted.kinds) == 35
    for place, kind in planted.kinds.items():
        source = planted.texts[planted.sources[place]]
        assert planted.sources[place] not in planted.kinds
        if kind == "footer":
            assert planted.texts[place].startswith(source)
    assert plant(200, 5, seed=1) == planted


def test_own_data(tmp_path, capsys):
    rows = [{"text": "那天下午小军去了书店，买了三本书，然后回家了。", "n": 1}, {"text": "今天下雨"}]
    rows += [
        {"text": "那天下午小军去了书店,买了三本书,然后回家了"},
        {"text": "那天下午小军去了书店，买了三本书，然后回家了啊。"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    out = tmp_path / "out"
    argv = ["--preset", "tiny", "--dataset", str(path), "--threshold", "0.6", "--output_dir", str(out)]
    metrics = near_duplicates.main(argv)["metrics"]
    assert metrics == {"rows": 4, "exact": 1, "near": 1, "kept": 2}
    kept, dropped = (
        [json.loads(line) for line in (out / name).read_text(encoding="utf-8").splitlines()]
        for name in ("kept.jsonl", "dropped.jsonl")
    )
    assert kept == rows[:2] and [each["dropped"] for each in dropped] == rows[2:]
    assert [(each["row"], each["kept_row"]) for each in dropped] == [(3, 1), (4, 1)]
    capsys.readouterr()
    assert near_duplicates.main(argv)["metrics"] == metrics and "已有训练结果" in capsys.readouterr().out


def test_faults_are_said(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"nothing\.jsonl"):
        near_duplicates.main(["--preset", "tiny", "--dataset", str(tmp_path / "nothing.jsonl")])
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "好"}\n', encoding="utf-8")
    monkeypatch.setattr("ray_duplicates.find_spec", lambda name: None)
    argv = [
        "--preset",
        "tiny",
        "--dataset",
        str(path),
        "--engine",
        "ray",
        "--output_dir",
        str(tmp_path / "o"),
    ]
    with pytest.raises(UserError, match=r'pip install "ray\[data\]"'):
        near_duplicates.main(argv)
    with pytest.raises(UserError, match="--threshold"):
        near_duplicates.main(["--preset", "tiny", "--threshold", "0"])
