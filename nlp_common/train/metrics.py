"""分类的指标，照 ``evaluate`` 库的用法，但不联网：``evaluate.load("accuracy")`` 要到 hub 上取一段脚本。

    metric = ClassificationMetric()
    metric.compute(predictions=[0, 1, 1], references=[0, 1, 0])   # {"accuracy": 0.667, "macro_f1": 0.667}

``add_batch`` 分批累积等用法也与 ``evaluate`` 的指标相同；数值由 scikit-learn 计算。
"""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
from sklearn.metrics import accuracy_score, f1_score


class ClassificationMetric(evaluate.EvaluationModule):
    """正确率，与 macro F1（各类 F1 的平均，每一类同样重要，不论行数多少）。"""

    def __init__(self) -> None:
        super().__init__(keep_in_memory=True)  # 不往缓存文件夹里写中间文件

    def _info(self) -> evaluate.EvaluationModuleInfo:
        features = datasets.Features(
            {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
        )
        return evaluate.EvaluationModuleInfo(
            description="accuracy, macro F1", citation="", inputs_description="", features=features
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {
            "accuracy": float(accuracy_score(references, predictions)),
            "macro_f1": float(f1_score(references, predictions, average="macro")),
        }


def classification_metrics(evaluated: Any) -> dict[str, float]:
    """给 Trainer 的 compute_metrics：``(logits, labels)`` → ``{"accuracy", "macro_f1"}``。"""
    logits, labels = evaluated
    return ClassificationMetric().compute(predictions=logits.argmax(-1), references=labels)
