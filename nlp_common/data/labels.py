"""分类的数据与要判断的文字，一行行检查：每行有没有文字，标签认不认识；有错就说清是哪个文件的哪一行。"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from nlp_common.base.errors import UserError
from nlp_common.data.files import holds_json, lines_of, read_file, row_place
from nlp_common.data.rows import Rows


def labelled(
    found: Rows,
    text_fields: Sequence[str],
    names: Sequence[str],
    label_field: str = "label",
    codes: Mapping[str, int] | None = None,
) -> list[dict]:
    """read_rows 读到的数据 → ``[{"text": 去掉首尾空白的文字, "label": 编号}, …]``，次序不变。

    text_fields：文字那一栏可能的名字，依次找；names：第 i 个是编号 i 的类名；codes：别的写法 → 编号。标签可以写
    编号、类名、codes 里的写法，写成数还是写成字符串都行。缺栏、标签不认识、文字是空的，都是 UserError；
    网上的数据集读者改不了，空文字的行跳过并报告有几行。
    """
    known = {name: label for label, name in enumerate(names)}
    known |= {str(label): label for label in range(len(names))}
    known |= codes or {}
    rows, empty = [], []
    for index, row in enumerate(found.rows):
        field = next((name for name in text_fields if name in row), None)
        if field is None or label_field not in row:
            missing = " 或 ".join(text_fields) if field is None else label_field
            raise UserError(
                f"{_place(found, index)}缺少 {missing} 这一栏，有的是 {'、'.join(map(str, row))}。"
                f"每行要有 {text_fields[0]}（文字）和 {label_field}（{_choices(names)}）。"
            )
        text, label = row[field], row[label_field]
        written = _as_written(label)
        if isinstance(label, bool) or written not in known:
            raise UserError(
                f"{_place(found, index)}的 {label_field} 是 {label!r}，不认识。可以是：{_choices(names)}。"
            )
        if not (text is None or isinstance(text, str)):
            raise UserError(f"{_place(found, index)}的 {field} 是 {text!r}，要的是一段文字。")
        if text and (swallowed := _swallowed(found, row, field, label_field, known)):
            raise UserError(
                f"{_place(found, index)}的 {field} 里有一整行带着标签的数据（{swallowed[:40]!r}）："
                "这一格开头的英文双引号一直管到下一个双引号，把后面的行都吞了进去。请删去这个引号，或写成两个再整格括起来。"
            )
        if text and text.strip():
            rows.append({"text": text.strip(), "label": known[written]})
        elif found.source["kind"] == "hub":
            empty.append(index + 1)
        else:
            raise UserError(
                f"{_place(found, index)}的 {field} 是空的（或只有空白）。请补上文字，或删去这一行。"
            )
    if empty:
        print(f"{found.source['name']} 有 {len(empty)} 行没有文字，跳过（第 {empty[0]} 条等）。")
    return rows


def _as_written(label: object) -> str:
    """标签写成字符串的样子：104、104.0（有空格的列会变成小数）、"104"、全角的"１０４"都是 "104"。"""
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    text = unicodedata.normalize("NFKC", str(label)).strip()
    return re.sub(r"^([+-]?\d+)\.0+$", r"\1", text)


def _swallowed(found: Rows, row: dict, field: str, label_field: str, known: Mapping[str, int]) -> str | None:
    """csv 里一格占了几行，其中有一行自己就是完整的一条（格数对，标签也认识）：被引号吞进来的那一行。"""
    path = str(found.source.get("path") or "").lower()
    if "\n" not in row[field] or not path.endswith((".csv", ".tsv")):
        return None
    mark = "\t" if path.endswith(".tsv") else ","
    columns = list(row)
    label_at, text_at = columns.index(label_field), columns.index(field)
    lines = row[field].splitlines()
    if text_at < label_at:  # 这一格的第一行，在文件里前面还有别的格
        lines[0] = mark.join([str(row[name]) for name in columns[:text_at]] + lines[:1])
    for line in lines:
        cells = line.split(mark)
        if len(cells) == len(columns) and _as_written(cells[label_at]) in known:
            return line
    return None


def check_enough(rows: list[dict], batch_size: int, where: str) -> None:
    """训练数据至少要有一批、两个类别；不够是 UserError。"""
    classes = {row["label"] for row in rows}
    if len(classes) < 2:
        raise UserError(
            f"{where} 的 {len(rows)} 行训练数据只有 {len(classes)} 个类别（label 全是 {min(classes, default='空')}），"
            "学不到怎样区分。请检查 label 那一栏，或给出至少两个类别的数据。"
        )
    if len(rows) < batch_size:
        raise UserError(
            f"{where} 只有 {len(rows)} 行训练数据，不够一批（{batch_size} 行）。"
            f"请给多一些数据，或加 --per_device_train_batch_size {len(rows)}。"
        )


class ToPredict(Protocol):
    """设置里这里要用的两项。"""

    predict: list[str] | None
    predict_file: str | None


def texts_to_predict(settings: ToPredict, text_fields: Sequence[str] = ("text",)) -> list[str]:
    """--predict 与 --predict_file 里的文字；空的、缺栏的是 UserError，说出是哪一段、哪一行。"""
    texts = list(settings.predict or [])
    if any(not text.strip() for text in texts):
        raise UserError("--predict 后面有一段文字是空的（或只有空白）。")
    if settings.predict_file:
        path = Path(settings.predict_file).expanduser()
        if not path.is_file():
            raise UserError(f"没有这个文件：{settings.predict_file}。请检查 --predict_file 的路径。")
        if path.suffix.lower() == ".txt" and not holds_json(path):  # 一行一段：空行不是分段，只是空着
            lines = lines_of(path)
            if not lines:
                raise UserError(f"{path} 里没有一行文字。请检查 --predict_file 的内容。")
            return texts + [line for _, line in lines]
        for index, row in enumerate(read_file(path)):
            text = next((row[name] for name in text_fields if name in row), None)
            if not isinstance(text, str) or not text.strip():
                what = " 或 ".join(text_fields)
                raise UserError(
                    f"{path} {row_place(path, index)}没有可判断的文字（{what} 是空的或没有这一栏）。"
                )
            texts.append(text.strip())
    return texts


def text_key(text: str) -> str:
    """两段文字只差空格和标点就算同一段：去重、查"评测里有没有这一段"时用它来比。"""
    return re.sub(r"\W+", "", text) or text


def unique(rows: list[dict]) -> list[dict]:
    """去重：同一段文字只留第一行；同一段文字有两种标签的，哪一行都不要。"""
    labels: dict[str, set[int]] = {}
    for row in rows:
        labels.setdefault(text_key(row["text"]), set()).add(row["label"])
    kept = {text_key(row["text"]): row for row in reversed(rows) if len(labels[text_key(row["text"])]) == 1}
    return list(reversed(kept.values()))


def without_duplicates(rows: list[dict], where: str) -> list[dict]:
    """unique，并说出去掉了几行、为什么；一行也不剩是 UserError。分成训练和留出之前要先去重，免得同一段文字两边都有。"""
    labels: dict[str, set[int]] = {}
    for row in rows:
        labels.setdefault(text_key(row["text"]), set()).add(row["label"])
    conflicts = sum(len(labels[text_key(row["text"])]) > 1 for row in rows)
    kept = unique(rows)
    repeated = len(rows) - conflicts - len(kept)
    if not conflicts and not repeated:
        return kept
    reasons = []
    if repeated:
        reasons.append(f"重复的 {repeated} 行，只留第一次出现的")
    if conflicts:
        reasons.append(f"同一段文字标了不同 label 的 {conflicts} 行，哪一行都不要")
    said = f"{where}：去重去掉了 {len(rows) - len(kept)} 行（共 {len(rows)} 行）：{'；'.join(reasons)}"
    if not kept:
        raise UserError(f"{said}；一行也不剩。请检查 label 那一栏。")
    print(f"{said}。")
    return kept


def _choices(names: Sequence[str]) -> str:
    return "、".join(f"{label} {name}" for label, name in enumerate(names))


def _place(found: Rows, index: int) -> str:
    path = found.source["path"]
    if path and Path(path).expanduser().is_file():
        return f"{path} {row_place(Path(path).expanduser(), index)}"
    return f"{found.source['name']} 的 {found.source['split']} 第 {index + 1} 条"
