"""混淆矩阵、每类的指标与 scikit-learn 一致；图是真的图；最有把握的错误排得对。"""

import numpy as np
import pytest
from sklearn import metrics

from confusion import confident_mistakes, confusion_matrix, draw_confusion, per_class, print_report

LABELS = np.array([0, 0, 1, 1, 1, 2, 2, 0])
GUESSES = np.array([0, 1, 1, 1, 0, 2, 1, 0])


def test_matrix_and_scores_equal_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    labels, guesses = rng.integers(0, 14, 300), rng.integers(0, 15, 300)  # 第 14 类一条也没有，却有人猜它
    guesses[guesses == 3] = 4  # 第 3 类没有人猜
    matrix = confusion_matrix(labels, guesses, 15)
    assert (matrix == metrics.confusion_matrix(labels, guesses, labels=range(15))).all()
    theirs = metrics.precision_recall_fscore_support(labels, guesses, labels=range(15), zero_division=0)
    for i, row in enumerate(per_class(matrix)):
        assert list(row.values()) == pytest.approx([column[i] for column in theirs])


def test_report_names_the_commonest_mistake(capsys):
    print_report(confusion_matrix(LABELS, GUESSES, 3), ["故事", "文化", "娱乐"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert "0.667" in lines[1] and lines[1].endswith("文化（1）")  # 3 条故事，1 条判成文化


def test_picture(tmp_path):
    import matplotlib.image

    matrix = confusion_matrix(LABELS, GUESSES, 3)
    svg = draw_confusion(
        tmp_path / "图.png", matrix, ["故事|story", "文化|culture", "娱乐|fun"], "混淆|confusion"
    )
    assert all(word in svg for word in ("故事", "文化", "娱乐", "判成", "本是"))
    picture = matplotlib.image.imread(tmp_path / "图.png")
    assert min(picture.shape[:2]) > 300 and picture.std() > 0.05


def test_most_confident_mistakes_come_first():
    probs = np.array([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6], [0.05, 0.95]])
    found = confident_mistakes(["a", "b", "c", "d"], [0, 0, 0, 0], probs, 2)
    assert [row["text"] for row in found] == ["d", "b"]
    assert found[0] == {"text": "d", "label": 0, "guess": 1, "confidence": pytest.approx(0.95)}
    assert confident_mistakes(["a"], [0], probs[:1], 5) == []
