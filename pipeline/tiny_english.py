"""拿不到真模型时用的英文情感小模型：自己编的影评语法、DistilBERT 的小号、十几秒的训练。

模型用的是和真模型一样的类（DistilBertForSequenceClassification），存成 hub 的文件夹布局，所以
``pipeline("sentiment-analysis", model=文件夹)`` 这一行不必改。它只认得下面这些词；没见过的词一律是 [UNK]。
"""

from __future__ import annotations

import random
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch.nn import functional as F
from tqdm import tqdm
from transformers import DistilBertConfig, DistilBertForSequenceClassification, PreTrainedTokenizerFast
from transformers.utils import logging

from nlp_common.base.device import describe, library_versions, pick_device, seed_everything
from nlp_common.base.runs import file_sha256, open_run

LABELS = ["NEGATIVE", "POSITIVE"]
# 每一种词都写成一行用空格隔开的字；下面的 pick 从里面挑一个。
GOOD = (
    "good great wonderful amazing funny touching beautiful excellent brilliant lovely exciting clever fresh "
    "charming moving perfect enjoyable fantastic nice superb warm delightful"
)
BAD = (
    "bad boring awful terrible dull ugly stupid slow weak annoying silly poor horrible disappointing messy "
    "empty cheap painful cold tedious dreadful noisy"
)
ADJECTIVES = [BAD, GOOD]  # 下标是标签
VERBS = ["hate dislike regret despise avoid", "love like enjoy adore recommend"]
NEUTRAL = "okay average ordinary normal"
NOUNS = "movie film story book show song actor ending plot music game novel album"
DETERMINERS = "this the that"
ADVERBS = ["", "very", "really", "so", "quite"]
OPENINGS = ["", "", "i think", "to be honest", "well"]
ENDS = ["", ".", "!"]
BUT_FOLLOWS_SECOND = 0.7  # “A 好 but B 坏”这样的句子，标签跟着后半句的比例
KINDS = ["is", "not", "verb", "noun", "but", "neutral"]


def write_review(rng: random.Random, kind: str | None = None) -> tuple[str, int, str]:
    """写一句 → (句子, 标签, 写法)。“but”七三开、“neutral”对半开：人也说不准的句子，标签就该有分歧。"""
    kind = kind or rng.choices(KINDS, [4, 3, 2, 2, 2, 1])[0]
    label = rng.randrange(2)

    def pick(words: str) -> str:
        return rng.choice(words.split())

    determiner, noun, adverb = pick(DETERMINERS), pick(NOUNS), rng.choice(ADVERBS)
    if kind == "is":
        words = f"{determiner} {noun} is {adverb} {pick(ADJECTIVES[label])}"
    elif kind == "not":
        words = f"{determiner} {noun} is not {adverb} {pick(ADJECTIVES[1 - label])}"
    elif kind == "verb":
        words = f"i {adverb} {pick(VERBS[label])} {determiner} {noun}"
    elif kind == "noun":
        words = f"what a {pick(ADJECTIVES[label])} {noun}"
    elif kind == "but":
        first, second = rng.sample(NOUNS.split(), 2)
        last = label if rng.random() < BUT_FOLLOWS_SECOND else 1 - label
        words = (
            f"the {first} is {pick(ADJECTIVES[1 - last])} but the {second} is"
            f" {adverb} {pick(ADJECTIVES[last])}"
        )
    else:
        words = f"{determiner} {noun} is {adverb} {pick(NEUTRAL)}"
    sentence = " ".join(f"{rng.choice(OPENINGS)} {words}".split()) + rng.choice(ENDS)
    return sentence, label, kind


def reviews(count: int, seed: int, exclude: frozenset[str] = frozenset()) -> list[tuple[str, int, str]]:
    """count 句不重复的影评；exclude 里的句子不要（留出的句子，训练时一次也不出现）。"""
    rng, rows = random.Random(seed), {}
    while len(rows) < count:
        sentence, label, kind = write_review(rng)
        if sentence not in exclude:
            rows.setdefault(sentence, (sentence, label, kind))
    return list(rows.values())


def build_tokenizer() -> PreTrainedTokenizerFast:
    """一个词一个编号，标点单独成词；不认识的词是 [UNK]。首尾加 [CLS]、[SEP]，和 BERT 一样。"""
    grammar = [*ADJECTIVES, *VERBS, NEUTRAL, NOUNS, DETERMINERS, *ADVERBS, *OPENINGS]
    words = set(" ".join([*grammar, "i is not what a but . , ! ?"]).split())
    vocab = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", vocab["[SEP]"]), ("[CLS]", vocab["[CLS]"]))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=64,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "attention_mask"],  # DistilBERT 不分上下句，没有 token_type_ids
    )


def build_model(vocab_size: int) -> DistilBertForSequenceClassification:
    config = DistilBertConfig(
        vocab_size=vocab_size,
        max_position_embeddings=64,
        dim=64,
        n_layers=2,
        n_heads=4,
        hidden_dim=128,
        dropout=0.1,
        id2label=dict(enumerate(LABELS)),
        label2id={name: i for i, name in enumerate(LABELS)},
    )
    return DistilBertForSequenceClassification(config)


def train(model, tokenizer, rows, seed: int, epochs: int = 2, batch_size: int = 32, lr: float = 1e-3) -> None:
    """最朴素的训练循环。每个词有 5% 变成 [UNK]：没见过的词来了，模型也知道该怎么办。"""
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    steps = epochs * (len(rows) // batch_size)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    order = [i for _ in range(epochs) for i in rng.sample(range(len(rows)), len(rows))]
    model.train()
    for step in tqdm(range(steps), desc="  训练", unit="步", mininterval=1):
        batch = [rows[i] for i in order[step * batch_size : (step + 1) * batch_size]]
        inputs = tokenizer([sentence for sentence, *_ in batch], padding=True, return_tensors="pt")
        is_word = (inputs.input_ids > tokenizer.mask_token_id) & (torch.rand(inputs.input_ids.shape) < 0.05)
        inputs["input_ids"] = inputs.input_ids.masked_fill(is_word, tokenizer.unk_token_id)  # (B, T)
        labels = torch.tensor([label for _, label, _ in batch], device=model.device)  # (B,)
        loss = F.cross_entropy(model(**inputs.to(model.device)).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    model.eval()


@torch.no_grad()
def accuracy(model, tokenizer, rows) -> float:
    inputs = tokenizer([sentence for sentence, *_ in rows], padding=True, return_tensors="pt").to(
        model.device
    )
    guesses = model(**inputs).logits.argmax(-1).tolist()  # (N,)
    return sum(guess == label for guess, (_, label, _) in zip(guesses, rows, strict=True)) / len(rows)


def tiny_english(folder: Path, seed: int, retrain: bool = False, count: int = 8000) -> dict:
    """folder 里有训练好的就读它的记录，没有就训练。返回 run.json 的内容。"""
    wanted = {"seed": seed, "count": count, "tiny_english.py": file_sha256(Path(__file__))[:12]}
    with open_run(folder) as run:
        if not retrain and (record := run.finished(wanted)):
            print(f"已有训练结果，直接加载：{folder}（--retrain 重新训练）")
            return record
        print(f"还没有英文小模型，用自己编的 {count} 句影评训练一个（十几秒，只此一次）…", flush=True)
        run.start(wanted)
        started = time.perf_counter()
        seed_everything(seed)
        heldout = reviews(1000, seed + 1_000_003)
        rows = reviews(count, seed, frozenset(sentence for sentence, *_ in heldout))
        tokenizer, device = build_tokenizer(), pick_device()
        model = build_model(len(tokenizer)).to(device)
        train(model, tokenizer, rows, seed)
        metrics = {
            f"accuracy_{name}": round(accuracy(model, tokenizer, [r for r in heldout if r[2] in kinds]), 4)
            for name, kinds in (("clear", KINDS[:4]), ("but", ["but"]), ("neutral", ["neutral"]))
        }
        record = {
            "stage": "tiny_english",
            "fingerprint": wanted,
            "versions": library_versions(),
            "device": describe(device),
            "seconds": round(time.perf_counter() - started, 1),
            "metrics": metrics,
        }

        logging.disable_progress_bar()  # 只关"写出权重"的进度条

        def write(path: Path) -> None:
            model.save_pretrained(path)
            tokenizer.save_pretrained(path)

        record = run.finish(write, record)
    print(
        f"  训练用了 {record['seconds']:.0f} 秒；没见过的句子：意思清楚的判对 {metrics['accuracy_clear']:.1%}，"
        f"“A 好 but B 坏”判对 {metrics['accuracy_but']:.1%}（标签只有 {BUT_FOLLOWS_SECOND:.0%} 跟着后半句，再好也就这么多）"
    )
    return record
