"""数实体：与 seqeval 的严格模式相同（它认得的标记法上）；残缺的不算；混淆、错得最长的、上色。"""

import random

import pytest

import span_metrics as sm
from nlp_common.base.errors import UserError
from tagged_files import Sentence, tags_of


def random_tags(rng, length, letters, kinds=("A", "B")):
    """随便写的标签，多半接不上。"""
    return [
        rng.choice(["O", *(f"{letter}-{kind}" for letter in letters for kind in kinds)])
        for _ in range(length)
    ]


@pytest.mark.parametrize("letters", ["BIES", "BI"])
def test_equal_to_seqeval_strict(letters):
    metrics = pytest.importorskip("seqeval.metrics", reason="要 seqeval 才比得了")
    from seqeval.scheme import IOB2, IOBES

    rng = random.Random(0)
    gold = [random_tags(rng, 12, letters) for _ in range(400)]
    # 预测：大半照抄，否则没有几个对的
    predicted = [
        [t if rng.random() < 0.9 else rng.choice(random_tags(rng, 1, letters)) for t in row] for row in gold
    ]
    ends = letters == "BIES"
    scores = sm.span_scores([sm.spans_of(t, ends) for t in gold], [sm.spans_of(t, ends) for t in predicted])
    how = {"average": "micro", "mode": "strict", "scheme": IOBES if ends else IOB2, "zero_division": 0}
    theirs = [
        f(gold, predicted, **how) for f in (metrics.precision_score, metrics.recall_score, metrics.f1_score)
    ]
    assert 0.3 < scores["f1"] < 0.95
    assert [scores["precision"], scores["recall"], scores["f1"]] == pytest.approx(theirs, abs=1e-12)


def test_what_seqeval_does_with_our_tags():
    pytest.importorskip("seqeval", reason="要 seqeval 才看得见")
    rows = {row["case"]: row for row in sm.seqeval_cases()}
    assert rows["BIOES，全对"]["ours"] == rows["BIOES，全对"]["strict"] == 1
    cut = rows["BMES，没有结尾"]
    assert cut["ours"] == 0 and cut["default"] == 1 and cut["strict"] == "KeyError: 'M'"
    headless = rows["BIOES，没有开头"]
    assert headless["ours"] == headless["strict"] == 0 and headless["default"] == 1


@pytest.mark.parametrize(
    ("tags", "spans"),
    [
        ("B-A M-A E-A O S-B", [("A", 0, 3), ("B", 4, 5)]),
        ("B-A E-A B-A E-A", [("A", 0, 2), ("A", 2, 4)]),
        ("M-A E-A O", []),
        ("B-A M-A", []),
        ("B-A M-B E-A", []),
        ("B-A E-B", []),
        ("B-A O E-A", []),
        ("B-A B-A E-A", [("A", 1, 3)]),
        ("B E S", [("", 0, 2), ("", 2, 3)]),
        ("B-A I-A E-A", [("A", 0, 3)]),
        ("B-A I-A L-A U-B", [("A", 0, 3), ("B", 3, 4)]),
        ("", []),
    ],
)
def test_only_whole_entities_count(tags, spans):
    assert sm.spans_of(tags.split()) == spans


def test_bio_ends_by_itself_and_needs_a_beginning():
    assert sm.spans_of(["B-A", "I-A", "B-A", "O", "I-A", "B-B", "I-A"], has_ends=False) == [
        ("A", 0, 2),
        ("A", 2, 3),
        ("B", 5, 6),
    ]


def test_illegal_transitions_are_counted_at_the_edges_too():
    assert sm.illegal_transitions(["B-A", "M-A", "E-A", "O", "S-A"]) == 0
    assert sm.illegal_transitions(["M-A", "E-A"]) == 1
    assert sm.illegal_transitions(["B-A"]) == 1
    assert sm.illegal_transitions(["B-A", "M-B", "E-B"]) == 1
    assert sm.illegal_transitions(["B-A", "O"]) == 1
    assert sm.illegal_transitions([]) == 0


def test_scores_by_hand():
    gold = [[("A", 0, 2), ("B", 3, 4)], [("A", 1, 2)], []]
    predicted = [[("A", 0, 2), ("A", 3, 4)], [], [("B", 0, 1)]]
    scores = sm.span_scores(gold, predicted)
    assert (scores["precision"], scores["recall"], scores["entities"]) == (1 / 3, 1 / 3, 3)
    assert sm.span_scores([[]], [[]])["f1"] == 0
    assert sm.scores_by_type(gold, predicted)["A"]["f1"] == pytest.approx(0.5)
    assert sm.character_accuracy([["O", "S-A"]], [["O", "O"]]) == 0.5
    confusion = {kind: dict(row) for kind, row in sm.type_confusion(gold, predicted).items()}
    assert confusion == {"A": {"A": 1, "没找到": 1}, "B": {"A": 1}, "多找的": {"B": 1}}
    touching = sm.type_confusion([[("A", 0, 3)]], [[("A", 0, 2)]])
    assert dict(touching["A"]) == {"边界不对": 1}


def test_standard_error_of_f1():
    rng = random.Random(0)
    gold = [[("A", 0, 1)] for _ in range(1000)]
    predicted = [[("A", 0, 1)] if rng.random() < 0.8 else [("B", 0, 1)] for _ in range(1000)]
    error = sm.f1_standard_error(gold, predicted)
    assert error == pytest.approx((0.8 * 0.2 / 1000) ** 0.5, rel=0.25)  # 每句一个实体：就是二项分布的


def test_longest_wrong_and_colours():
    sentence = Sentence(list("王小明在哈尔滨工业大学"), [("PER", 0, 3), ("ORG", 4, 11)])
    wrong = sm.longest_wrong([sentence], [[("PER", 0, 3), ("LOC", 4, 7)]])
    assert wrong == [{"type": "ORG", "text": "哈尔滨工业大学", "predicted": [("LOC", "哈尔滨")]}]
    plain = sm.coloured(sentence.chars, sentence.spans, ["ORG", "PER"], use_color=False)
    assert plain == "[王小明/PER]在[哈尔滨工业大学/ORG]"
    coloured = sm.coloured(sentence.chars, sentence.spans, ["ORG", "PER"], use_color=True)
    assert "\033[1;4;34m王小明\033[0m" in coloured and "在" in coloured


def test_script_on_two_files(tmp_path, capsys):
    sentence = Sentence(list("王小明在上海"), [("PER", 0, 3), ("LOC", 4, 6)])
    for scheme, ruined in (("BMES", "O"), ("BIO", "O")):
        tags = tags_of(sentence, scheme)
        gold, predicted = tmp_path / "gold.txt", tmp_path / "predicted.txt"
        gold.write_text(
            "".join(f"{c} {t}\n" for c, t in zip(sentence.chars, tags, strict=True)), encoding="utf-8"
        )
        tags = [*tags[:4], ruined, tags[5]]
        predicted.write_text(
            "".join(f"{c} {t}\n" for c, t in zip(sentence.chars, tags, strict=True)), encoding="utf-8"
        )
        arguments = [
            "--gold",
            str(gold),
            "--predicted",
            str(predicted),
            "--output_dir",
            str(tmp_path / scheme),
        ]
        metrics = sm.main(arguments)["metrics"]
        assert metrics["entity_precision"] == 1 and metrics["entity_recall"] == 0.5
        assert metrics["character_accuracy"] == pytest.approx(5 / 6)
        assert (tmp_path / scheme / "span_metrics.svg").exists()
    predicted.write_text("王 B-PER\n大 I-PER\n明 I-PER\n在 O\n上 O\n海 O\n", encoding="utf-8")
    with pytest.raises(UserError, match="第 2 行与标准答案第 2 行的字不同"):
        sm.main([*arguments[:4], "--output_dir", str(tmp_path / "other")])
    with pytest.raises(UserError, match="要一起给"):
        sm.main(["--gold", str(gold)])
    with pytest.raises(UserError, match="没有 nowhere"):
        sm.main(["--gold", str(gold), "--predicted", "nowhere", "--output_dir", str(tmp_path / "x")])


def test_two_files_of_one_scheme(tmp_path):
    """IOB1 的不能当作 BIO 数；两个文件写法不同、标签不认识，要说出来，不给一个 0 分。"""
    gold, predicted = tmp_path / "gold.txt", tmp_path / "predicted.txt"
    arguments = ["--gold", str(gold), "--predicted", str(predicted), "--output_dir", str(tmp_path / "out")]
    gold.write_text("李 I-PER\n雷 I-PER\n韩 B-PER\n梅 I-PER\n在 O\n", encoding="utf-8")
    predicted.write_text("李 I-PER\n雷 I-PER\n韩 I-PER\n梅 I-PER\n在 O\n", encoding="utf-8")
    metrics = sm.main(arguments)["metrics"]
    assert metrics["entity_recall"] == 0 and metrics["character_accuracy"] == 0.8
    predicted.write_text(gold.read_text(encoding="utf-8"), encoding="utf-8")
    assert sm.main([*arguments, "--retrain"])["metrics"]["entity_f1"] == 1
    predicted.write_text("李 B-PER\n雷 E-PER\n韩 B-PER\n梅 E-PER\n在 O\n", encoding="utf-8")
    with pytest.raises(UserError, match="标记法不同"):
        sm.main([*arguments, "--retrain"])
    predicted.write_text("李 X-PER\n雷 I-PER\n韩 B-PER\n梅 I-PER\n在 O\n", encoding="utf-8")
    with pytest.raises(UserError, match="第 1 行的标签 'X-PER' 不认识"):
        sm.main([*arguments, "--retrain"])


def test_the_example_shows_what_the_docstring_says(tmp_path, capsys):
    metrics = sm.main(["--preset", "tiny", "--output_dir", str(tmp_path / "out")])["metrics"]
    assert round(metrics["character_accuracy"], 2) == 0.89 and round(metrics["entity_f1"], 2) == 0.70
    again = sm.main(["--preset", "tiny", "--output_dir", str(tmp_path / "out")])["metrics"]
    assert again == metrics and "已有训练结果" in capsys.readouterr().out
