"""双向 LSTM 加 CRF：同一个编码器，每个字各猜各的（softmax），还是整句一起猜（CRF）？

学到什么：softmax 会留下多少接不上的标签；CRF 的转移分怎样管住它们，−∞ 的掩码怎样让它们一个也不剩；
同一份预测，为什么"字的正确率"比实体的 F1 好看得多；不用任何预训练的向量，相邻两个字的组合值多少分。

运行：
    python bilstm_crf.py                                          # 自带的《人民日报》：人名、地名、机构名
    python bilstm_crf.py --dataset ../../shared/data/resume_ner   # 自己的数据：BIO/BIOES/BMES 文件或 CLUENER 式 JSON
    python bilstm_crf.py --predict "江泽民主席昨天在上海会见了桥本龙太郎"
    python bilstm_crf.py --learning_curve                         # 再用 1/8、1/4、1/2 的句子各训练一次

预期输出（实测见本文件夹的 README.md）：softmax 留下几十处接不上的标签，CRF 加掩码是 0；CRF 的实体 F1 更高。

参考：Huang et al. 2015、Lample et al. 2016（BiLSTM-CRF）；Zhang & Yang 2018（Resume 数据，字与二字组合）；
Cheng et al. 2016（wide & deep：查表的一路与网络的一路相加）。
"""

from nlp_common.base.cli import run_main

import json
import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from safetensors.torch import load_model, save_model
from torch import nn

from crf import CRF, legal_mask
from labeling import (
    LabelSettings,
    all_tags,
    in_batches,
    predict_text,
    show_prediction,
    show_report,
    span_report,
)
from long_sentences import MAX_CHARS, short_sentences
from nlp_common.base.arguments import COUNT, Limits, option
from nlp_common.base.runs import write_json
from nlp_common.draw.plots import bar_chart, line_chart
from nlp_common.train.lesson import result_folder, run_lesson, run_part
from nlp_common.train.loop import train_loop
from nlp_common.train.settings import LoopSettings, parse_settings
from nlp_common.train.stage import Stage
from span_metrics import (
    character_accuracy,
    draw_confusion,
    f1_standard_error,
    illegal_transitions,
    span_scores,
    spans_of,
)
from tagged_files import Sentence, Span, load_splits, tags_of
from vocabulary import PAD, UNKNOWN, Vocabulary, collate

HOME = Path(__file__).resolve().parent
SHARE = Limits(at_least=0, below=1)

PRESETS = {
    "tiny": {"dataset": "people_daily", "max_train_samples": 3000, "hidden_size": 128, "embedding_size": 64},
    "full": {"dataset": "people_daily", "hidden_size": 256, "embedding_size": 100},
}
TRAINING = {
    "max_length": MAX_CHARS,
    "per_device_train_batch_size": 16,
    "learning_rate": 4e-3,
    "num_train_epochs": 7.0,
    "warmup_steps": 0.03,
    "max_grad_norm": 5.0,
    "save_steps": 200,
}


@dataclass
class BiLSTMSettings(LoopSettings, LabelSettings):
    COMMON: ClassVar[dict] = LoopSettings.COMMON | TRAINING
    NOT_IN_FINGERPRINT = LoopSettings.NOT_IN_FINGERPRINT | LabelSettings.NOT_IN_FINGERPRINT

    max_length: int | None = option("一段最多多少字；更长的在标点处切开", limits=COUNT)
    embedding_size: int | None = option("字与二字组合的向量各多宽", limits=COUNT)
    hidden_size: int | None = option("LSTM 一个方向多宽", limits=COUNT)
    input_dropout: float = option("输入的 dropout：数据这么少，它最管用", 0.5, limits=SHARE)
    output_dropout: float = option("LSTM 输出的 dropout", 0.3, limits=SHARE)
    bigrams: bool = option("输入里加上与左邻、右邻的二字组合", True)
    direct: bool = option("字与二字组合另外直接给每个标签打分，像 hmm_crf.py 那样，加到 LSTM 的分上", True)
    direct_dropout: float = option(
        "直接打的分，训练时随机丢掉一半，不然它把训练数据背下来", 0.5, limits=SHARE
    )
    learning_curve: bool = option("再用 1/8、1/4、1/2 的句子各训练一次，画学习曲线", False)


# ---------------------------------------------------------------- 1. 模型


class BiLSTMTagger(nn.Module):
    """字与二字组合的向量 → 双向 LSTM → 每个字 K 个分 → 每个字各猜各的，或者整句一起猜。"""

    def __init__(
        self, vocabulary: Vocabulary, tags: list[str], settings: BiLSTMSettings, use_crf=True, masked=True
    ):
        super().__init__()
        self.settings, self.use_crf, self.tags = settings, use_crf, tags
        width, pairs = settings.embedding_size, settings.bigrams
        self.char_embedding = nn.Embedding(len(vocabulary.chars) + 2, width, padding_idx=PAD)
        self.pair_embedding = (
            nn.Embedding(len(vocabulary.pairs) + 2, width, padding_idx=PAD) if pairs else None
        )
        self.lstm = nn.LSTM(
            width * (3 if pairs else 1), settings.hidden_size, batch_first=True, bidirectional=True
        )
        self.output = nn.Linear(2 * settings.hidden_size, len(tags))
        sizes = [len(vocabulary.chars) + 2] * 3 + [len(vocabulary.pairs) + 2] * 4
        self.direct = nn.ModuleList(
            nn.Embedding(n, len(tags), padding_idx=PAD) for n in sizes if settings.direct
        )
        for table in self.direct:
            nn.init.zeros_(table.weight)
        self.crf = CRF(len(tags), legal_mask(tags) if masked else None) if use_crf else None
        # 少见的字训练时偶尔当作没见过：不然 UNKNOWN 的向量从来没有学过
        hidden = torch.tensor([0.0, 0.0, *(0.1 / (0.1 + n) for n in vocabulary.counts)])
        self.register_buffer("hide_probability", hidden, persistent=False)

    def emissions(self, chars, left, right, lengths) -> torch.Tensor:
        """每个字每个标签的分：(B, T) → (B, T, K)。"""
        if self.training:
            chars = chars.masked_fill(
                torch.rand(chars.shape, device=chars.device) < self.hide_probability[chars], UNKNOWN
            )
        x = self.char_embedding(chars)  # (B, T, E)
        if self.pair_embedding is not None:
            x = torch.cat([x, self.pair_embedding(left), self.pair_embedding(right)], -1)  # (B, T, 3E)
        x = F.dropout(x, self.settings.input_dropout, self.training)
        # 打包：反方向的 LSTM 要从各句真正的句尾开始，不能先读一串补齐
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        hidden, _ = nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True)  # (B, T, 2H)
        scores = self.output(F.dropout(hidden, self.settings.output_dropout, self.training))
        return scores + self.direct_scores(chars, left, right) if self.direct else scores

    def direct_scores(self, chars, left, right) -> torch.Tensor:
        """不经过 LSTM 的一路：前一个、这一个、后一个字，与附近四个二字组合，各自直接给 K 个标签打分，相加。

        常见的组合（"公司""经理"）一查表就知道，LSTM 只要学剩下的（wide & deep，Cheng et al. 2016）。
        """
        features = [shifted(chars, -1), chars, shifted(chars, 1)]
        features += [shifted(left, -1), left, right, shifted(right, 1)]
        total = 0
        for table, feature in zip(self.direct, features, strict=True):
            kept = F.dropout(
                torch.ones(chars.shape, device=chars.device), self.settings.direct_dropout, self.training
            )
            total = total + table(feature) * kept[:, :, None]  # (B, T, K)：一个特征要么整个在，要么整个不在
        return total

    def forward(self, chars, left, right, lengths, tags) -> torch.Tensor:
        """每句的损失 −log p(标签 | 句子)，(B,)。softmax：各字的交叉熵相加；CRF：log Z − 这条链的分数。"""
        emissions = self.emissions(chars, left, right, lengths)
        if self.use_crf:
            return self.crf(emissions, tags, lengths)
        losses = F.cross_entropy(emissions.transpose(1, 2), tags, reduction="none")  # (B, T)
        mask = torch.arange(tags.shape[1], device=tags.device) < lengths[:, None]
        return (losses * mask).sum(1)


def shifted(ids: torch.Tensor, by: int) -> torch.Tensor:
    """(B, T)：每个位置换成它前一个（−1）或后一个（1）位置的编号，边上是 PAD。"""
    return F.pad(ids, (1, 0))[:, :-1] if by < 0 else F.pad(ids, (0, 1))[:, 1:]


def batch_loss(model: BiLSTMTagger, batch: dict) -> tuple[torch.Tensor, dict]:
    return model(**batch).sum(), {}


def count_sentences(batch: dict) -> int:
    return len(batch["lengths"])


# ---------------------------------------------------------------- 2. 训练与标注


def train_tagger(
    part: Stage, label: str, model: BiLSTMTagger, vocabulary: Vocabulary, sentences: list[Sentence]
) -> dict:
    """用看得见的训练循环（nlp_common/train/loop.py）训练；→ 每秒几句。"""
    number = {tag: i for i, tag in enumerate(model.tags)}
    rows = []
    for sentence in sentences:
        rows.append(vocabulary.encode(sentence.chars) | {"tags": [number[tag] for tag in tags_of(sentence)]})
    lengths = [len(sentence.chars) for sentence in sentences]
    trained = train_loop(part, label, model, rows, collate, batch_loss, lengths, lengths, count_sentences)
    model.cpu()  # 小模型，一句句地标，CPU 就够快
    return {"sentences_per_s": trained.metrics["train_samples_per_s"]}


@torch.no_grad()
def tag_sentences(
    model: BiLSTMTagger, vocabulary: Vocabulary, sentences: list[Sentence], legal: bool
) -> list[list[str]]:
    """每句的标签。legal：不合规矩的转移一律 −∞；没有 CRF 的，转移分全是 0，也一样走 Viterbi。"""
    model.eval()
    crf = CRF(len(model.tags), legal_mask(model.tags) if legal else None)
    for name in ("start", "transitions", "end"):
        getattr(crf, name).copy_(getattr(model.crf, name) if model.use_crf else torch.tensor(0.0))
    found: list[list[str]] = [[] for _ in sentences]
    for picked in in_batches(sentences, 64):
        batch = collate([vocabulary.encode(sentences[i].chars) for i in picked])
        emissions = model.emissions(**batch)
        if model.use_crf or legal:
            paths = crf.decode(emissions, batch["lengths"])
        else:
            paths = emissions.argmax(2).tolist()  # 每个字各猜各的
        for i, path in zip(picked, paths, strict=True):
            found[i] = [model.tags[k] for k in path[: len(sentences[i].chars)]]
    return found


# ---------------------------------------------------------------- 3. 比一比


def measure(sentences: list[Sentence], tags: list[list[str]]) -> dict[str, float]:
    """同一份预测的三个数：实体的 F1、字的正确率、接不上的地方。"""
    scores = span_scores([s.spans for s in sentences], [spans_of(t) for t in tags])
    return {
        "entity_f1": scores["f1"],
        "character_accuracy": character_accuracy([tags_of(s) for s in sentences], tags),
        "illegal_transitions": sum(map(illegal_transitions, tags)),
    }


def learn(stage: Stage) -> dict:
    settings = stage.settings
    splits, data = load_splits(settings.dataset, settings.max_train_samples, settings.scheme)
    train, test = short_sentences(splits["train"], settings.max_length), splits["test"]
    tags = all_tags(train)
    vocabulary = Vocabulary.of(train)
    print(f"训练 {len(train):,} 句，测试 {len(test):,} 句；{len(tags)} 个标签，{len(vocabulary.chars):,} 个字，"
          f"{len(vocabulary.pairs):,} 个二字组合")  # fmt: skip

    rows: dict[str, dict] = {}
    for name, use_crf, masked in (("softmax", False, False), ("crf", True, False), ("crf+mask", True, True)):
        model = BiLSTMTagger(vocabulary, tags, settings, use_crf, masked)
        work = partial(train_tagger, label=name, model=model, vocabulary=vocabulary, sentences=train)
        trained = run_part(stage, name.replace("+", "_"), work, model)
        tagged = tag_sentences(model, vocabulary, test, legal=masked)
        rows[name] = measure(test, tagged) | trained
        if name == "softmax":  # 训练好了再加掩码，也行
            rows["softmax+mask"] = measure(test, tag_sentences(model, vocabulary, test, legal=True)) | trained
    predicted = [spans_of(each) for each in tagged]  # CRF 加掩码的，最后一个
    show_comparison(rows)

    metrics = {
        "entity_f1": rows["crf+mask"]["entity_f1"],
        "entity_f1_error": f1_standard_error([s.spans for s in test], predicted),
        "entity_f1_without_crf": rows["softmax"]["entity_f1"],
        "entity_f1_without_crf_masked": rows["softmax+mask"]["entity_f1"],
        "entity_f1_without_mask": rows["crf"]["entity_f1"],
        "character_accuracy": rows["crf+mask"]["character_accuracy"],
        "character_accuracy_without_crf": rows["softmax"]["character_accuracy"],
        "illegal_transitions": rows["crf+mask"]["illegal_transitions"],
        "illegal_transitions_without_crf": rows["softmax"]["illegal_transitions"],
        "illegal_transitions_without_mask": rows["crf"]["illegal_transitions"],
        "sentences_per_s": rows["crf+mask"]["sentences_per_s"],
        "sentences_per_s_without_crf": rows["softmax"]["sentences_per_s"],
    }
    curve = {len(train): metrics["entity_f1"]}
    if settings.learning_curve:
        curve = learning_curve(stage, train, test, tags) | curve
        metrics["learning_curve"] = {str(n): f1 for n, f1 in curve.items()}
    report = span_report(test, predicted)
    show_report("BiLSTM-CRF", report)

    def write(folder: Path) -> None:
        save_model(model, str(folder / "model.safetensors"))
        vocabulary.save(folder / "vocabulary.json")
        write_json(folder / "tags.json", tags)
        draw_pictures(folder, rows, curve, report)

    return stage.save(metrics, data, write, **report)


def learning_curve(
    stage: Stage, train: list[Sentence], test: list[Sentence], tags: list[str]
) -> dict[int, float]:
    """句数少些会怎样：1/8、1/4、1/2 的训练句子，各训练一个 CRF。"""
    points = {}
    for share in (8, 4, 2):
        some = random.Random(stage.settings.seed).sample(train, max(1, len(train) // share))
        vocabulary = Vocabulary.of(some)  # 没见过的字也跟着变多
        model = BiLSTMTagger(vocabulary, tags, stage.settings, use_crf=True)
        work = partial(train_tagger, label=f"1/{share}", model=model, vocabulary=vocabulary, sentences=some)
        run_part(stage, f"curve-{share}", work, model)
        points[len(some)] = measure(test, tag_sentences(model, vocabulary, test, legal=True))["entity_f1"]
    return points


def show_comparison(rows: dict[str, dict]) -> None:
    titles = {
        "softmax": "softmax，各猜各的",
        "softmax+mask": "训练后加掩码走 Viterbi",
        "crf": "CRF",
        "crf+mask": "CRF，训练就加掩码",
    }
    print("\n同一个编码器                 实体 F1   字的正确率   接不上的地方")
    for name, row in rows.items():
        title = titles[name] + "　" * (14 - len(titles[name]))
        print(
            f"  {title}{row['entity_f1']:8.4f}{row['character_accuracy']:12.4f}{row['illegal_transitions']:12d}"
        )


def draw_pictures(folder: Path, rows: dict, curve: dict[int, float], report: dict) -> None:
    bars = {
        "标签错了的字|wrong characters": {name: 1 - row["character_accuracy"] for name, row in rows.items()},
        "1 − 实体 F1|1 − entity F1": {name: 1 - row["entity_f1"] for name, row in rows.items()},
    }
    title = "同一份预测，错了多少|The same predictions, two errors"
    bar_chart(folder / "accuracy_or_f1.svg", bars, title, "", "", digits=3)
    draw_confusion(folder / "confusion.svg", report["confusion"])
    if len(curve) > 1:
        points = sorted(curve.items())
        series = {"BiLSTM-CRF": ([n for n, _ in points], [f1 for _, f1 in points])}
        line_chart(
            folder / "learning_curve.svg",
            series,
            "学习曲线|Learning curve",
            "训练句数|sentences",
            "实体 F1|entity F1",
        )


# ---------------------------------------------------------------- 4. 预测与从头到尾


def predict(settings: BiLSTMSettings) -> list[Span]:
    """读回训练好的模型，标一句话，打印出来。"""
    folder = result_folder("bilstm_crf", HOME, settings)
    tags = json.loads((folder / "tags.json").read_text(encoding="utf-8"))
    vocabulary = Vocabulary.load(folder / "vocabulary.json")
    model = BiLSTMTagger(vocabulary, tags, settings, use_crf=True)
    load_model(model, str(folder / "model.safetensors"))

    def tag(sentences: list[Sentence]) -> list[list[Span]]:
        return [spans_of(each) for each in tag_sentences(model, vocabulary, sentences, legal=True)]

    spans = predict_text(settings.predict, tag, settings.max_length)
    show_prediction(settings.predict, spans, tags)
    return spans


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(BiLSTMSettings, PRESETS, argv)
    record = run_lesson("bilstm_crf", HOME, settings, learn)
    if settings.predict is not None:
        predict(settings)
    return record


if __name__ == "__main__":
    run_main(main)
