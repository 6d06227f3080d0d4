"""span_metrics.py 的 --gold 与 --predicted：两个标注文件，字要一一对应，标记法要相同。"""

from __future__ import annotations

from pathlib import Path

from nlp_common.base.errors import UserError
from tagged_files import SCHEMES, Sentence, read_rows, read_tag_file, recognise

ENDS = set("ESLU")  # 标出结尾的字母：BIO、IOB1 没有


def read_pair(
    gold_path: Path, predicted_path: Path
) -> tuple[list[Sentence], list[list[str]], list[list[str]]]:
    """→ (标准答案的句子, 它的标签, 预测的标签)。预测可以有接不上的标签；IOB1 的换成 BIO。"""
    for path in (gold_path, predicted_path):
        if not path.is_file():
            raise UserError(f"没有 {path} 这个文件。请检查 --gold 与 --predicted。")
    sentences = read_tag_file(gold_path)
    gold, predicted = read_rows(gold_path), read_rows(predicted_path)
    check_characters(predicted_path, gold, predicted)
    scheme = recognise(gold_path, gold)
    recognise(predicted_path, predicted)  # 不认识的标签，说出第几行
    gold_tags, predicted_tags = tags_in(gold), tags_in(predicted)
    if scheme == "IOB1":
        gold_tags, predicted_tags = (
            [iob1_to_bio(row) for row in rows] for rows in (gold_tags, predicted_tags)
        )
    a, b = letters_of(gold_tags), letters_of(predicted_tags)
    fit = any(a | b <= set(allowed) for allowed in SCHEMES.values())
    one_has_ends = bool(a & ENDS) != bool(b & ENDS) and a != {"O"} and b != {"O"}
    if not fit or one_has_ends:  # BIO 当作 BIOES 来数，会一个也不对
        raise UserError(
            f"两个文件的标记法不同：{gold_path} 用的开头字母是 {' '.join(sorted(a))}，"
            f"{predicted_path} 的是 {' '.join(sorted(b))}。请写成同一种（BIO、BIOES、BMES、BILOU）再比。"
        )
    return sentences, gold_tags, predicted_tags


def check_characters(predicted_path: Path, gold: list, predicted: list) -> None:
    """两个文件的字一个一个地对；不同的是 UserError，说出在第几行。"""
    if len(predicted) != len(gold):
        raise UserError(f"--gold 有 {len(gold)} 句，--predicted 有 {len(predicted)} 句，对不上。")
    for wanted, found in zip(gold, predicted, strict=True):
        for number, char in enumerate(char for _, char, _ in wanted):
            if number >= len(found) or found[number][1] != char:
                place = found[min(number, len(found) - 1)][0]
                raise UserError(
                    f"{predicted_path} 第 {place} 行与标准答案第 {wanted[number][0]} 行的字不同（{char!r}）。"
                )
        if len(found) > len(wanted):
            raise UserError(f"{predicted_path} 第 {found[len(wanted)][0]} 行：这一句比标准答案长。")


def tags_in(rows: list[list[tuple[int, str, str]]]) -> list[list[str]]:
    return [[tag for *_, tag in row] for row in rows]


def letters_of(tags: list[list[str]]) -> set[str]:
    return {tag[0] for row in tags for tag in row}


def iob1_to_bio(tags: list[str]) -> list[str]:
    """IOB1 → BIO：前面不是同一类的 I-x，是一个实体的开头，写成 B-x。"""
    found = []
    for before, tag in zip(["O", *tags], tags, strict=False):
        starts = tag[0] == "I" and (before == "O" or before[1:] != tag[1:])
        found.append("B" + tag[1:] if starts else tag)
    return found
