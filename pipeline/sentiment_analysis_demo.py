"""pipeline：一行代码做情感分析，再拆开看看这一行里有什么。

你会学到
  1. ``pipeline("sentiment-analysis")`` 怎样用：一句、一批、全部类别的得分。
  2. 它里面只有三步：分词 → 模型给出 logits → softmax。自己写五行，得到一样的数。
  3. 一句一句地喂和一批一批地喂，差多少时间；什么样的句子模型拿不准。

怎么运行
  python sentiment_analysis_demo.py                              # 拿得到真模型就用真的，否则用自带的小模型
  python sentiment_analysis_demo.py --preset tiny                # 离线：第一次先训练小模型，十几秒
  python sentiment_analysis_demo.py --text "i love it" "so dull" # 判断自己的句子
  cat reviews.txt | python sentiment_analysis_demo.py --text -   # 从标准输入读，一行一句

应当看到（tiny，实测见 README）
  'this movie is very boring!' → NEGATIVE（0.99）；五行代码和 pipeline 的得分相差 1e-6 以内；
  "A is good but B is bad" 的把握只有 0.5 上下，因为训练它的数据里，这样的句子标签七三开。

参考
  Sanh et al. 2019（DistilBERT）；Socher et al. 2013（SST-2）；transformers 文档 “Pipelines”。
"""

from nlp_common.base.cli import run_main

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from demo_settings import DemoSettings, parse_demo, read_sentences
from nlp_common.base.device import describe, pick_device

HERE = Path(__file__).resolve().parent
FULL_MODEL = "distilbert/distilbert-base-uncased-finetuned-sst-2-english"

SENTENCES = [
    "this movie is very boring!",
    "i really love this book.",
    "what a beautiful song",
    "the plot is not good",
    "the plot is not bad",
]
# 拿不准的几种：前后矛盾、不褒不贬、没有线索、不认识的词。
HARD_SENTENCES = [
    "the movie is good but the ending is bad",
    "the ending is bad but the movie is good",
    "the story is okay",
    "this is a movie",
    "the music is flabbergasting",
]


@dataclass
class Settings(DemoSettings):
    """英文情感分析的设置；全部参数见 demo_settings.py。"""


# ---------- 1. 拿到一个 pipeline ----------
def load_classifier(path: str, device: torch.device):
    """path 是 hub 上的名字或本地文件夹。truncation：超过模型最大长度的句子截断，不然会报错。"""
    from transformers import (  # HF_ENDPOINT 是导入时读的，所以等 parse_demo 设好环境再导入
        AutoModelForSequenceClassification,
        AutoTokenizer,
        pipeline,
    )
    from transformers.utils import logging

    from nlp_common.lm.checks import check_config, check_tokenizer, check_vocabulary, load_weights

    logging.disable_progress_bar()  # 只关"载入权重"的进度条，警告照常显示
    check_config(path)
    # 平时写 pipeline("sentiment-analysis", model=path) 就行；没有分类层的模型，那样会悄悄补上一个随机的
    model, _ = load_weights(AutoModelForSequenceClassification, path)
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    check_tokenizer(tokenizer, path)
    check_vocabulary(model, tokenizer, path)
    return pipeline("sentiment-analysis", model=model, tokenizer=tokenizer, device=device, truncation=True)


# ---------- 2. 拆开看：pipeline 里的五行 ----------
@torch.no_grad()
def by_hand(path: str, sentences: list[str], device: torch.device) -> torch.Tensor:
    """每一类的概率 (B, C)，和 pipeline 的得分相等。"""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForSequenceClassification.from_pretrained(path).to(device).eval()
    inputs = tokenizer(sentences, padding=True, truncation=True, return_tensors="pt").to(device)  # (B, T)
    logits = model(**inputs).logits  # (B, C)：任意的实数，越大越像这一类
    return logits.softmax(dim=-1)  # (B, C)：每行加起来是 1


def look_inside(classifier, path: str, sentences: list[str], device: torch.device) -> float:
    """把第一句的每一步打印出来；返回五行代码与 pipeline 的得分最大相差多少。"""
    tokenizer, first = classifier.tokenizer, sentences[0]
    ids = tokenizer(first, truncation=True).input_ids
    print(
        f"  分词     {first!r}\n           → {' '.join(tokenizer.convert_ids_to_tokens(ids))}\n           → {ids}"
    )
    probs = by_hand(path, sentences, device)
    names = classifier.model.config.id2label
    shown = "  ".join(f"{names[i]} {p:.4f}" for i, p in enumerate(probs[0].tolist()))
    print(f"  模型 → logits → softmax：{shown}")
    scores = classifier(sentences, top_k=None)  # top_k=None：全部类别的得分，从高到低
    gap = max(
        abs(row[classifier.model.config.label2id[item["label"]]].item() - item["score"])
        for row, items in zip(probs, scores, strict=True)
        for item in items
    )
    print(f"  {len(sentences)} 句话、全部类别，五行代码与 pipeline 最大相差 {gap:.1e}")
    return gap


# ---------- 3. 一句一句，还是一批一批 ----------
def compare_speed(classifier, sentences: list[str], batch_sizes=(1, 8, 32)) -> dict[int, float]:
    """同样的句子，每批 1、8、32 句各要多少秒。长度相近的排在一起，补齐时少算许多 [PAD]。"""
    sentences = sorted(sentences, key=len)
    classifier(sentences[-32:], batch_size=32)  # 热身：第一次调用要多花时间，不算
    seconds = {}
    for batch_size in batch_sizes:
        started = time.perf_counter()
        classifier(sentences, batch_size=batch_size)
        seconds[batch_size] = time.perf_counter() - started
    slowest = seconds[batch_sizes[0]]
    for batch_size, spent in seconds.items():
        rate = len(sentences) / spent
        print(
            f"  每批 {batch_size:2d} 句：{spent:6.2f} 秒，每秒 {rate:6.0f} 句，是一句一句的 {slowest / spent:.1f} 倍"
        )
    return seconds


# ---------- 4. 得分与把握 ----------
def show_scores(
    classifier, sentences: list[str], batch_size: int, unsure_below: float = 0.75
) -> list[list[dict]]:
    """每句全部类别的得分，从高到低；最高的也不到 unsure_below 就标出来。"""
    results = classifier(sentences, top_k=None, batch_size=batch_size)
    tokenizer = classifier.tokenizer
    for sentence, items in zip(sentences, results, strict=True):
        notes = ["← 拿不准"] if items[0]["score"] < unsure_below else []
        unknown = unknown_words(tokenizer, sentence)
        notes += [f"（词表里没有：{' '.join(unknown)}）"] if unknown else []
        shown = "  ".join(f"{item['label']} {item['score']:.4f}" for item in items)
        print(f"  {sentence!r}\n      {shown}  {' '.join(notes)}".rstrip())
    return results


def unknown_words(tokenizer, sentence: str) -> list[str]:
    """变成 [UNK] 的那些词：模型根本没看见它们。"""
    encoded = tokenizer(sentence, return_offsets_mapping=True, truncation=True)
    pairs = zip(encoded.input_ids, encoded.offset_mapping, strict=True)
    return [sentence[start:end] for token, (start, end) in pairs if token == tokenizer.unk_token_id]


def tour(classifier, path: str, sentences: list[str], hard: list[str], many: list[str], settings) -> None:
    """走一遍：一句、一批、里面的三步、快慢、拿不准的句子。中文脚本走的也是这一遍，只有模型和句子不同。"""
    print("\n[1] 一句：classifier(句子)")
    print(f"  {sentences[0]!r}\n      → {classifier(sentences[0])}")
    print("\n[2] 一批：classifier(句子的列表, batch_size=…, top_k=None)，top_k=None 给出全部类别的得分")
    show_scores(classifier, sentences, settings.batch_size)
    print("\n[3] 拆开看：分词 → logits → softmax")
    look_inside(classifier, path, sentences, classifier.device)
    print(f"\n[4] {len(many)} 句话，一句一句地喂，还是一批一批地喂")
    compare_speed(classifier, many)
    print("\n[5] 哪些句子模型拿不准（最高的得分不到 0.75）")
    show_scores(classifier, hard, settings.batch_size)


def prepare_tiny(settings) -> tuple[str, list[str]]:
    """自带的小模型所在的文件夹，和一些它没见过的句子。"""
    from tiny_english import reviews, tiny_english

    folder = Path(settings.output_dir or HERE / "outputs" / "tiny-english")
    tiny_english(folder, settings.seed, settings.retrain)
    return str(folder), [sentence for sentence, *_ in reviews(256, settings.seed + 1_000_003)]


def main(argv: list[str] | None = None) -> None:
    settings, model_path = parse_demo(Settings, FULL_MODEL, argv)
    own = read_sentences(settings.text)  # 句子有问题，训练前就说
    many = [f"{sentence} {other}" for sentence in SENTENCES for other in SENTENCES * 2]
    if model_path is None:
        model_path, many = prepare_tiny(settings)
    device = pick_device()
    print(f"模型 {model_path}，设备 {describe(device)}")
    classifier = load_classifier(model_path, device)
    if own:
        show_scores(classifier, own, settings.batch_size)
    else:
        tour(classifier, model_path, SENTENCES, HARD_SENTENCES, many, settings)


if __name__ == "__main__":
    run_main(main)
