"""几个标注脚本共用的：参数、全部标签、评测时打印与画出的、对命令行给的句子作预测。"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from long_sentences import tag_long
from nlp_common.base.arguments import option
from nlp_common.base.errors import UserError
from nlp_common.lm.generation import batches_by_length
from nlp_common.train.settings import LessonSettings
from span_metrics import (
    coloured,
    longest_wrong,
    print_confusion,
    print_longest_wrong,
    scores_by_type,
    type_confusion,
)
from tagged_files import Sentence, Span

SCHEMES = ("auto", "bio", "iob1", "bioes", "bmes", "bilou")


@dataclass
class LabelSettings(LessonSettings):
    """读标注数据、对句子作预测的脚本都有的参数。"""

    NOT_IN_FINGERPRINT: ClassVar[set[str]] = LessonSettings.NOT_IN_FINGERPRINT | {"predict"}

    dataset: str | None = option(
        "people_daily（自带），或标注文件、装着 train/dev/test 的文件夹：BIO/BIOES/BMES 一行一个字，或 CLUENER 式 JSON"
    )
    scheme: Literal[SCHEMES] = option("标注文件的标记法，默认看文件自己认", "auto")
    max_train_samples: int | None = option("训练最多用几句（打乱之后的前几句）")
    predict: str | None = option("要标注的一句话；长的在标点处切开，标完放回原处")

    def check(self) -> None:
        super().check()
        if self.predict is not None and not self.predict.strip():
            raise UserError("--predict 给的是空句子，没有字可以标。")


def all_tags(sentences: list[Sentence]) -> list[str]:
    """训练数据里的类型，每类的 B、M、E、S 四个标签；有实体以外的字才有 O，它在最前。"""
    kinds = sorted({kind for sentence in sentences for kind, _, _ in sentence.spans})
    covered = all(sum(e - s for _, s, e in each.spans) == len(each.chars) for each in sentences)
    tags = [f"{letter}-{kind}" if kind else letter for kind in kinds for letter in "BMES"]
    return tags if covered else ["O", *tags]


def in_batches(sentences: list[Sentence], size: int) -> list[list[int]]:
    """每批 size 句，长短相近：→ 各批是第几句。"""
    return batches_by_length([len(sentence.chars) for sentence in sentences], size)


def span_report(sentences: list[Sentence], predicted: list[list[Span]]) -> dict:
    """评测时要看的：各类的成绩、混淆、最长的几个错的实体；都能写进 run.json。"""
    gold = [sentence.spans for sentence in sentences]
    confusion = {kind: dict(counts) for kind, counts in type_confusion(gold, predicted).items()}
    return {
        "by_type": scores_by_type(gold, predicted),
        "confusion": confusion,
        "longest_wrong": longest_wrong(sentences, predicted),
    }


def show_report(title: str, report: dict, max_types: int = 12) -> None:
    print(f"\n{title}：各类的实体")
    for kind, row in list(report["by_type"].items())[:max_types]:
        shown = f"P {row['precision']:.3f}  R {row['recall']:.3f}  F1 {row['f1']:.3f}"
        print(f"  {kind or '词':<8}{shown}  {row['entities']:5d} 个")
    print("\n标的是什么，认成了什么")
    print_confusion(report["confusion"])
    print("\n没认对的实体里最长的：")
    print_longest_wrong(report["longest_wrong"])


def predict_text(text: str, tag: Callable[[list[Sentence]], list[list[Span]]], limit: int) -> list[Span]:
    """一句话（多长都行）→ 实体。"""
    return tag_long([Sentence(list(text))], tag, limit)[0]


def show_prediction(text: str, spans: list[Span], tags: list[str]) -> None:
    """终端里实体上色，每类一种颜色（tags 是模型的全部标签）；接到管道、文件里用方括号。"""
    kinds = sorted({tag[2:] for tag in tags if tag != "O"})
    print(coloured(list(text), spans, kinds, use_color=sys.stdout.isatty()))
    if not spans:
        print("（没有找到实体）")
