"""分类结果怎么看：每一类的精确率与召回率、混淆矩阵（文字与图）、最有把握的错误。"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nlp_common.draw.figures import render


def confusion_matrix(labels: np.ndarray, guesses: np.ndarray, classes: int) -> np.ndarray:
    """(C, C)：第 i 行第 j 列是“本是 i 类、判成 j 类”的条数。"""
    matrix = np.zeros((classes, classes), dtype=int)
    np.add.at(matrix, (labels, guesses), 1)
    return matrix


def per_class(matrix: np.ndarray) -> list[dict]:
    """每一类的 precision（判成它的有多少真是它）、recall（它有多少被找了出来）、F1、条数。

    分母是 0 时没有定义，这里和 scikit-learn 一样记作 0。
    """
    found = []
    for i in range(len(matrix)):
        right, guessed, support = matrix[i, i], matrix[:, i].sum(), matrix[i].sum()
        precision = right / guessed if guessed else 0.0
        recall = right / support if support else 0.0
        f1 = 2 * right / (guessed + support) if guessed + support else 0.0
        found.append({"precision": precision, "recall": recall, "f1": f1, "support": int(support)})
    return found


def print_report(matrix: np.ndarray, names: list[str]) -> None:
    """每类一行；最后一列是它最常被错判成哪一类。"""
    print("  类别    精确率  召回率    F1    条数  最常被错判成")
    for i, row in enumerate(per_class(matrix)):
        wrong = np.where(np.arange(len(names)) == i, 0, matrix[i])
        most = f"{names[wrong.argmax()]}（{wrong.max()}）" if wrong.max() else "—"
        print(
            f"  {names[i]}    {row['precision']:6.3f}  {row['recall']:6.3f}  {row['f1']:6.3f}"
            f"  {row['support']:5d}  {most}"
        )


def draw_confusion(path: str | Path, matrix: np.ndarray, names: list[str], title: str) -> str:
    """混淆矩阵图：颜色是占这一类（这一行）的比例，格子里写条数。names 写成“中文|English”。返回 SVG。"""
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)  # 每行加起来是 1

    def draw(axes, text) -> None:
        side = 2.2 + 0.42 * len(names)  # 英寸
        axes.figure.set_size_inches(side * 1.12, side)
        axes.grid(False)
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        ticks = range(len(names))
        axes.set_xticks(ticks, [text(name) for name in names], rotation=90)
        axes.set_yticks(ticks, [text(name) for name in names])
        for i, j in zip(*matrix.nonzero(), strict=True):
            color = "white" if shares[i, j] > 0.5 else "black"
            axes.text(j, i, str(matrix[i, j]), ha="center", va="center", fontsize=8, color=color)

    return render(path, draw, [], (title, "判成|predicted", "本是|true"))


def confident_mistakes(sentences, labels, probs: np.ndarray, count: int) -> list[dict]:
    """判错的里面，模型最有把握的 count 条：``[{"text", "label", "guess", "confidence"}]``。"""
    labels, guesses = np.asarray(labels), probs.argmax(1)
    wrong = np.flatnonzero(guesses != labels)
    wrong = wrong[np.argsort(-probs[wrong, guesses[wrong]], kind="stable")][:count]
    return [
        {
            "text": sentences[i],
            "label": int(labels[i]),
            "guess": int(guesses[i]),
            "confidence": float(probs[i, guesses[i]]),
        }
        for i in wrong.tolist()
    ]
