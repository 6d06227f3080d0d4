"""中文分词：每个字是一个词的开头 B、中间 M、结尾 E，还是单独成词 S；再连词性一起标。

学到什么：分词怎样变成给字贴标签；没见过的词（未登录词）的召回率才分得出好坏：查词典的办法在它上面几乎是 0；
"97%" 的数字怎样来自泄漏：SnowNLP 的分词器就是在这份语料的这几行上训练的。

运行：
    python word_segmentation.py                                # 自带的《人民日报》，留出整篇的文章
    python word_segmentation.py --predict "他昨天在哈尔滨研究生命起源"
    python word_segmentation.py --leak                         # 再看看 SnowNLP 在"没见过"的词上有多好

预期输出（实测见本文件夹的 README.md）：BiLSTM-CRF 的词 F1 高过查词典和 jieba，没见过的词也认得出大半。

参考：Xue 2003（分词就是给字贴标签）；Ng & Low 2004（连词性一起标）；Sproat & Emerson 2003（SIGHAN：未登录词召回率）。
"""

from nlp_common.base.cli import run_main

import importlib.util
import json
import logging
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

from safetensors.torch import load_model, save_model

from bilstm_crf import BiLSTMSettings, BiLSTMTagger, tag_sentences, train_tagger
from labeling import all_tags, predict_text
from long_sentences import MAX_CHARS, short_sentences
from nlp_common.base.arguments import POSITIVE, SHARE, option
from nlp_common.base.console import padded
from nlp_common.base.errors import UserError
from nlp_common.base.runs import write_json
from nlp_common.draw.plots import bar_chart
from nlp_common.train.lesson import result_folder, run_lesson, run_part
from nlp_common.train.settings import parse_settings
from nlp_common.train.stage import Stage
from span_metrics import coloured, f1_standard_error, span_scores, spans_of
from tagged_files import Sentence, Span, as_words_with_pos, load_splits
from vocabulary import Vocabulary

HOME = Path(__file__).resolve().parent
LEAK_SENTENCES = 300
PRESETS = {
    "tiny": {"hidden_size": 64, "embedding_size": 32, "num_train_epochs": 2.5, "joint_epochs": 0.8},
    "full": {"hidden_size": 256, "embedding_size": 100, "num_train_epochs": 6.0, "joint_epochs": 6.0},
}
TRAINING = {
    "max_length": MAX_CHARS,
    "dataset": "people_daily",
    "per_device_train_batch_size": 64,
    "learning_rate": 8e-3,
    "warmup_steps": 0.03,
    "max_grad_norm": 5.0,
    "save_steps": 200,
}


@dataclass
class SegmentationSettings(BiLSTMSettings):
    COMMON: ClassVar[dict] = BiLSTMSettings.COMMON | TRAINING
    input_dropout: float = option("输入的 dropout：数据多，不用那么重", 0.1, limits=SHARE)
    joint_epochs: float | None = option("连词性一起标的模型训练几遍：标签多，每遍慢些", limits=POSITIVE)
    leak: bool = option("也在前 300 句上量一量 SnowNLP（它在这份语料上训练过，是泄漏的例子；很慢）", False)

    def check(self) -> None:
        super().check()
        if self.learning_curve:
            raise UserError("--learning_curve 是 bilstm_crf.py 的，这里没有。")


# ---------------------------------------------------------------- 1. 数据：词 → 标签


def without_types(sentence: Sentence) -> Sentence:
    """词性去掉：标签就只有 B、M、E、S。"""
    return Sentence(sentence.chars, [("", start, end) for _, start, end in sentence.spans])


def words_of(sentence: Sentence) -> list[str]:
    return ["".join(sentence.chars[start:end]) for _, start, end in sentence.spans]


def as_spans(words: list[str]) -> list[Span]:
    """一串词 → 每个词的位置；别的分词器给出的就是一串词。"""
    spans, at = [], 0
    for word in words:
        spans.append(("", at, at + len(word)))
        at += len(word)
    return spans


# ---------------------------------------------------------------- 2. 两个对照：查词典，jieba


def maximum_matching(text: str, dictionary: set[str], longest: int) -> list[str]:
    """正向最大匹配：从左到右，每次取词典里最长的一个词；都没有就取一个字。"""
    words, at = [], 0
    while at < len(text):
        size = min(longest, len(text) - at)
        while size > 1 and text[at : at + size] not in dictionary:
            size -= 1
        words.append(text[at : at + size])
        at += size
    return words


def jieba_words(sentences: list[Sentence]) -> list[list[Span]] | None:
    """jieba 的结果；没装是 None。"""
    if importlib.util.find_spec("jieba") is None:
        print("没有装 jieba，不与它比：pip install jieba==0.42.1")
        return None
    import jieba

    jieba.setLogLevel(logging.WARNING)
    return [as_spans(jieba.lcut(sentence.text, HMM=True)) for sentence in sentences]


def snownlp_words(sentences: list[Sentence]) -> list[list[Span]]:
    """SnowNLP 的结果：它的模型就是在这份语料上训练的，留出的文章它也全见过。"""
    from snownlp import SnowNLP

    return [as_spans(SnowNLP(sentence.text).words) for sentence in sentences]


# ---------------------------------------------------------------- 3. 没见过的词


def measure(sentences: list[Sentence], predicted: list[list[Span]], known: set[str]) -> dict[str, float]:
    """词的 F1，与没见过的词的召回率：标准答案里训练数据没有的词，有多少切得分毫不差。"""
    gold = [sentence.spans for sentence in sentences]
    unseen = found = 0
    for sentence, spans in zip(sentences, predicted, strict=True):
        here = set(spans)
        for span, word in zip(sentence.spans, words_of(sentence), strict=True):
            if word not in known:
                unseen += 1
                found += span in here
    return {
        "word_f1": span_scores(gold, predicted)["f1"],
        "oov_recall": found / max(1, unseen),
        "oov": unseen,
    }


def learn(stage: Stage) -> dict:
    settings = stage.settings
    splits, data = load_splits(
        settings.dataset, settings.max_train_samples, settings.scheme, convert=as_words_with_pos
    )
    tagged_train, tagged_test = short_sentences(splits["train"], settings.max_length), splits["test"]
    for sentence in tagged_test:
        if sum(end - start for _, start, end in sentence.spans) != len(sentence.chars):
            raise UserError(
                f"{settings.dataset} 里有的字不属于任何一个词（标签 O）：这是实体的数据，分词用不了。"
            )
    test = [without_types(sentence) for sentence in tagged_test]
    known = {word for sentence in tagged_train for word in words_of(sentence)}
    total = sum(len(sentence.spans) for sentence in test)
    print(f"训练 {len(tagged_train):,} 句，{len(known):,} 个词；测试 {len(test):,} 句，{total:,} 个词")

    rows: dict[str, dict] = {}
    longest = max(map(len, known))
    matched = [as_spans(maximum_matching(sentence.text, known, longest)) for sentence in test]
    rows["matching"] = measure(test, matched, known)
    if (cut := jieba_words(test)) is not None:
        rows["jieba"] = measure(test, cut, known)
    if settings.leak:  # 它很慢，只量前几句
        rows["snownlp"] = measure(test[:LEAK_SENTENCES], snownlp_words(test[:LEAK_SENTENCES]), known)

    vocabulary = Vocabulary.of(tagged_train)
    models = {}
    for name, sentences in (("words", [without_types(s) for s in tagged_train]), ("joint", tagged_train)):
        # 直接打分的表有 7 张，一个标签一列：4 个标签放得下，一百多个就太大了
        model_settings = replace(settings, direct=settings.direct and name == "words")
        models[name] = BiLSTMTagger(vocabulary, all_tags(sentences), model_settings, use_crf=True)
        epochs = settings.num_train_epochs if name == "words" else settings.joint_epochs
        work = partial(train, epochs=epochs, model=models[name], vocabulary=vocabulary, sentences=sentences)
        trained = run_part(stage, name, work, models[name])
        started = time.perf_counter()
        predicted = [spans_of(tags) for tags in tag_sentences(models[name], vocabulary, test, legal=True)]
        seconds = time.perf_counter() - started
        only_words = [[("", start, end) for _, start, end in spans] for spans in predicted]
        rows[name] = measure(test, only_words, known) | {
            "chars_per_s": sum(len(s.chars) for s in test) / seconds
        }
        rows[name]["sentences_per_s"] = trained["sentences_per_s"]
        if name == "words":
            error = f1_standard_error([s.spans for s in test], only_words)
    rows["joint"]["joint_f1"] = span_scores([s.spans for s in tagged_test], predicted)["f1"]
    show(rows, total)
    missed = most_missed(test, only_words, known)
    print("\n没见过、也没切对的词里最长的：")
    for right, wrong in missed:
        print(f"  {right} → {'/'.join(wrong)}")

    metrics = {"word_f1": rows["words"]["word_f1"], "oov_recall": rows["words"]["oov_recall"]}
    metrics |= {"word_f1_error": error, "oov_rate": rows["words"]["oov"] / total}
    metrics |= {name: {k: v for k, v in row.items() if k != "oov"} for name, row in rows.items()}

    def write(folder: Path) -> None:
        save_model(models["joint"], str(folder / "model.safetensors"))
        vocabulary.save(folder / "vocabulary.json")
        write_json(folder / "tags.json", models["joint"].tags)
        bars = {
            "词 F1|word F1": {TITLES[name]: row["word_f1"] for name, row in rows.items()},
            "没见过的词的召回率|recall of unseen words": {
                TITLES[name]: row["oov_recall"] for name, row in rows.items()
            },
        }
        bar_chart(folder / "word_segmentation.svg", bars, "分词|Word segmentation", "", "")

    return stage.save(metrics, data, write, missed=[[right, wrong] for right, wrong in missed])


def train(
    part: Stage, epochs: float, model: BiLSTMTagger, vocabulary: Vocabulary, sentences: list[Sentence]
) -> dict:
    """与 bilstm_crf.py 同样地训练，只是两个模型的遍数不同。"""
    part.settings = replace(part.settings, num_train_epochs=epochs)
    label = "分词" if len(model.tags) == 4 else "分词加词性"
    return train_tagger(part, label, model, vocabulary, sentences)


TITLES = {
    "matching": "查词典|matching",
    "jieba": "jieba",
    "snownlp": "SnowNLP（泄漏）|SnowNLP (leak)",
    "words": "BiLSTM-CRF",
    "joint": "连词性|with POS",
}


def show(rows: dict[str, dict], total: int) -> None:
    print(f"\n没见过的词占 {rows['words']['oov'] / total:.1%}      词 F1    没见过的词的召回率")
    for name, row in rows.items():
        print(f"  {padded(TITLES[name].split('|')[0], 20)}{row['word_f1']:8.4f}{row['oov_recall']:14.4f}")
    print(f"词与词性都对的 F1：{rows['joint']['joint_f1']:.4f}")


def most_missed(sentences: list[Sentence], predicted: list[list[Span]], known: set[str], count: int = 8):
    """没见过、又没切对的词里最长的几个，与那里切成了什么。"""
    missed = {}
    for sentence, spans in zip(sentences, predicted, strict=True):
        for (_, start, end), word in zip(sentence.spans, words_of(sentence), strict=True):
            if word not in known and ("", start, end) not in spans:
                pieces = [sentence.text[s:e] for _, s, e in spans if s < end and start < e]
                missed.setdefault(word, pieces)
    return sorted(missed.items(), key=lambda row: (-len(row[0]), row[0]))[:count]


# ---------------------------------------------------------------- 4. 预测与从头到尾


def predict(settings: SegmentationSettings) -> list[Span]:
    """读回连词性一起标的模型，切一句话。"""
    folder = result_folder("word_segmentation", HOME, settings)
    tags = json.loads((folder / "tags.json").read_text(encoding="utf-8"))
    vocabulary = Vocabulary.load(folder / "vocabulary.json")
    model = BiLSTMTagger(vocabulary, tags, replace(settings, direct=False), use_crf=True)
    load_model(model, str(folder / "model.safetensors"))

    def tag(sentences: list[Sentence]) -> list[list[Span]]:
        return [spans_of(each) for each in tag_sentences(model, vocabulary, sentences, legal=True)]

    spans = predict_text(settings.predict, tag, settings.max_length)
    print(
        "  ".join(
            coloured(list(settings.predict[s:e]), [(k, 0, e - s)], [], False)[1:-1] for k, s, e in spans
        )
    )
    return spans


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(SegmentationSettings, PRESETS, argv)
    record = run_lesson("word_segmentation", HOME, settings, learn)
    if settings.predict is not None:
        predict(settings)
    return record


if __name__ == "__main__":
    run_main(main)
