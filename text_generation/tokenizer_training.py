"""训练一个分词器：BPE 手写，与 tokenizers 库逐条相同；中文该切多细，词表该多大，对 loss 有什么影响。

学到什么：BPE 就是反复合并最常见的一对；没见过的字靠字节兜底（byte fallback），一个字也不会丢；
词表从 1 千到 3 万 2 千，一个 token 装几个汉字；词表大，句子短，可是每个 token 更难猜：比 loss 要按字比。

运行：
    python tokenizer_training.py                           # 《人民日报》，两三分钟
    python tokenizer_training.py --dataset 我的.txt --vocab_size 8000
    python tokenizer_training.py --text "要切开看看的一句话"

预期输出（tiny，实测见本文件夹的 README.md）：合并表与库的完全相同；存好的分词器 AutoTokenizer 读得懂，任何文字都还原得回来。

参考：Sennrich et al. 2016（BPE）；Radford et al. 2019（字节级）；Kudo & Richardson 2018（SentencePiece，字节兜底）。
"""

from nlp_common.base.cli import run_main

import json
import math
import time
import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from bpe import decode, encode_word, train_bpe
from char_gpt import END, PAD, collate, count_targets, heldout_nats, next_token_loss, small_gpt
from nlp_common.base.arguments import Limits, option
from nlp_common.base.errors import UserError
from nlp_common.data.rows import read_rows
from nlp_common.draw.plots import line_chart
from nlp_common.train.lesson import result_folder, run_lesson, run_part
from nlp_common.train.loop import train_loop
from nlp_common.train.settings import LoopSettings, parse_settings
from nlp_common.train.stage import Stage

HOME = Path(__file__).resolve().parent
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = r"[\p{L}\p{M}]+|\p{N}|[^\s\p{L}\p{M}\p{N}]|\s+"  # 预切分：一串字、一个数字、一个标点、一串空白
HARD = ["𠮷野家的𩸽，😀👨‍👩‍👧。", "naïve Ωmega\t\n  两个空格", "龘靐齉爩"]  # 训练数据里多半没有的字
PRESETS = {
    "tiny": {
        "max_train_samples": 6000,
        "hand_chars": 100_000,
        "lm_chars": 250_000,
        "vocab_size": 8000,
        "max_length": 64,
        "per_device_train_batch_size": 32,
        "num_train_epochs": 2.0,
        "learning_rate": 3e-3,
        "adam_beta2": 0.98,
    },
    "full": {
        "max_train_samples": 100_000,
        "hand_chars": 300_000,
        "lm_chars": 3_000_000,
        "vocab_size": 32000,
        "max_length": 128,
        "per_device_train_batch_size": 64,
        "num_train_epochs": 3.0,
        "learning_rate": 2e-3,
        "adam_beta2": 0.98,
    },
}
SIZES = [1000, 2000, 4000, 8000, 16000, 32000]
LM_SIZES = [1000, 4000, 16000]  # 这几个再各训练一个小 GPT


@dataclass
class TokenizerSettings(LoopSettings):
    NOT_IN_FINGERPRINT = LoopSettings.NOT_IN_FINGERPRINT | {"text"}

    dataset: str = option("训练用的文字：people_daily，或有 text 一栏的文件（txt 一行一段）", "people_daily")
    vocab_size: int | None = option("存下来的那个分词器的词表", None, Limits(at_least=300))
    text: str = option("切开看看的一句话", "北京大学的学生在图书馆读《红楼梦》，🐼也在。")
    hand_chars: int | None = option(
        "手写的 BPE 用多少个字训练（Python 慢，库快几十倍）", None, Limits(at_least=1000)
    )
    lm_chars: int | None = option("小 GPT 用多少个字训练", None, Limits(at_least=10000))


# ---------------------------------------------------------------- 1. 数据，与一样的预切分


def load_texts(settings) -> tuple[list[str], list[str], dict]:
    """→ (训练的文字, 留出的文字, 来历)。"""
    found = read_rows(settings.dataset, limit=settings.max_train_samples)
    texts = [row.get("text") for row in found.rows]
    if not all(isinstance(text, str) for text in texts):
        line = next(i for i, text in enumerate(texts, 1) if not isinstance(text, str))
        raise UserError(f"{settings.dataset} 的第 {line} 行没有 text 一栏。")
    if settings.dataset == "people_daily":
        held = [row["text"] for row in read_rows("people_daily", split="validation", limit=300).rows]
        return texts, held, found.source
    if len(texts) < 20:
        raise UserError(f"{settings.dataset} 只有 {len(texts)} 段文字，至少要 20 段：二十分之一要留出来量。")
    return [t for i, t in enumerate(texts) if i % 20], texts[::20], found.source


def split_pieces(text: str) -> list[str]:
    """手写那一份的预切分，与 PIECES 同一个意思：Python 的 re 没有 \\p{L}，用 str 的方法。"""
    pieces, kind_before = [], None
    for char in text:
        kind = "space" if char.isspace() else "letter" if is_letter(char) else None
        if kind and kind == kind_before:
            pieces[-1] += char
        else:
            pieces.append(char)
        kind_before = kind
    return pieces


def is_letter(char: str) -> bool:
    return unicodedata.category(char)[0] in "LM"


# ---------------------------------------------------------------- 2. 手写的与库的，逐条相同


def same_merges(texts: list[str], vocab_size: int) -> dict[str, float]:
    """同样的文字、同样的预切分：两边学到的合并表一样不一样，各用多久。"""
    words = Counter(piece for text in texts for piece in split_pieces(text))
    started = time.perf_counter()
    vocab, merges = train_bpe(words, vocab_size)
    hand_s = time.perf_counter() - started
    started = time.perf_counter()
    library = train_library(texts, vocab_size, byte_fallback=False)
    library_s = time.perf_counter() - started
    theirs = [tuple(pair) for pair in json.loads(library.to_str())["model"]["merges"]]
    same = sum(a == b for a, b in zip(merges, theirs, strict=False))
    ranks = {pair: i for i, pair in enumerate(merges)}
    cut = [[i for piece in split_pieces(t) for i in encode_word(piece, ranks, vocab)] for t in texts[:50]]
    return {
        "merges": len(merges),
        "merges_equal": float(len(merges) == len(theirs) and same == len(merges)),
        "encoding_equal": float(cut == [library.encode(t).ids for t in texts[:50]]),
        "hand_s": hand_s,
        "library_s": library_s,
    }


def train_library(
    texts: list[str],
    vocab_size: int,
    byte_fallback: bool = True,
    isolate: bool = False,
    byte_level: bool = False,
) -> Tokenizer:
    """tokenizers 库的 BPE。byte_fallback：生僻字不进词表，拆成字节；isolate：每个汉字单独切开；byte_level：全部从字节开始。"""
    core = Tokenizer(models.BPE(byte_fallback=byte_fallback))
    pieces = r"\p{Han}|" + PIECES if isolate else PIECES
    steps = [pre_tokenizers.Split(Regex(pieces), "isolated")]
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    options: dict = {}
    if byte_level:
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        core.decoder = decoders.ByteLevel()
        options = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    elif byte_fallback:
        # 词表小的时候，常用字先占六成，剩下的留给合并出来的词。哪些字由我们点名：一样多的字，库留哪一个，次次不同
        room = int(0.6 * max(1, vocab_size - 258))
        counts = Counter(char for text in texts for char in text)
        common = sorted(counts, key=lambda char: (-counts[char], char))[:room]
        options = {
            "special_tokens": [PAD, END, *BYTES],
            "initial_alphabet": common,
            "limit_alphabet": room,
        }
    core.pre_tokenizer = pre_tokenizers.Sequence(steps)
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, min_frequency=1, show_progress=False, **options)
    core.train_from_iterator(texts, trainer)
    return core


# ---------------------------------------------------------------- 3. 一个 token 装几个字


def chars_per_token(core: Tokenizer, texts: list[str]) -> float:
    return sum(map(len, texts)) / sum(len(core.encode(text).ids) for text in texts)


def compression(texts: list[str], heldout: list[str]) -> dict[str, dict[str, float]]:
    """三种切法、各种大小的词表：留出的文字里一个 token 平均几个字。"""
    found: dict[str, dict[str, float]] = {"char_bpe": {}, "byte_bpe": {}, "one_han": {}}
    largest = train_library(texts, SIZES[-1], byte_fallback=False, byte_level=True)
    for size in SIZES:
        ways = {
            "char_bpe": train_library(texts, size),
            "byte_bpe": smaller(largest, size),
            "one_han": train_library(texts, size, isolate=True),
        }
        for name, core in ways.items():
            found[name][str(size)] = chars_per_token(core, heldout)
        shown = "  ".join(f"{name} {found[name][str(size)]:.2f}" for name in ways)
        print(f"  词表 {size:>6,}：一个 token 几个字：{shown}")
    return found


def smaller(core: Tokenizer, size: int) -> Tokenizer:
    """词表小些的同一个字节级 BPE：只留头几条合并。合并是一条一条学的，与重新训练一个小的完全相同。"""
    state = json.loads(core.to_str())
    model = state["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)[:size]
    model["merges"] = model["merges"][: max(0, len(tokens) - 256)]
    model["vocab"] = {token: i for i, token in enumerate(tokens)}
    return Tokenizer.from_str(json.dumps(state))


# ---------------------------------------------------------------- 4. 按字比 loss


def loss_per_char(stage: Stage, texts: list[str], heldout: list[str], size: int) -> dict[str, float]:
    """同样的字数、同样的模型宽度，只换分词器：留出文字每个字的 nats。每个 token 的 loss 不能比：token 不一样长。"""
    settings = stage.settings
    core = train_library(texts, size)
    end = core.token_to_id(END)
    stream = [i for text in texts for i in [*core.encode(text).ids, end]]
    rows = [stream[i : i + settings.max_length] for i in range(0, len(stream) - 1, settings.max_length)]
    test = []
    for text in heldout:
        ids = [end, *core.encode(text).ids, end]
        test += [ids[i : i + settings.max_length + 1] for i in range(0, len(ids) - 1, settings.max_length)]
    torch.manual_seed(settings.seed)
    tokenizer = wrap(core)
    model = small_gpt(tokenizer, settings.max_length + 1, 128, 2).to(stage.device)

    def work(part: Stage) -> dict:
        pad = partial(collate, pad_id=tokenizer.pad_token_id)
        lengths = [len(row) for row in rows]
        label = f"词表 {size:,}"
        speeds = train_loop(
            part, label, model, rows, pad, next_token_loss, lengths, lengths, count_targets
        ).metrics
        nats, tokens = heldout_nats(model, test, tokenizer.pad_token_id)
        chars = sum(map(len, heldout))
        return {
            "nats_per_char": nats / chars,
            "nats_per_token": nats / tokens,
            "chars_per_token": chars / tokens,
            "parameters": model.num_parameters(),
            "train_seconds": speeds["train_seconds"],
        }

    return run_part(stage, f"lm_{size}", work, model)


# ---------------------------------------------------------------- 5. 存成 AutoTokenizer 读得懂的


def wrap(core: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, eos_token=END, clean_up_tokenization_spaces=False
    )


def check_saved(folder: Path, core: Tokenizer, texts: list[str]) -> dict[str, float]:
    """AutoTokenizer 读回来：切得一样，拼得回原文，生僻字、emoji 也在内。手写的切法也一样。"""
    loaded = AutoTokenizer.from_pretrained(folder)
    names = loaded.convert_ids_to_tokens(range(len(loaded)))
    same = back = by_hand = 0
    for text in texts:
        ids = loaded(text, add_special_tokens=False)["input_ids"]
        same += ids == core.encode(text).ids
        back += loaded.decode(ids) == text
        by_hand += decode(ids, names) == text
    n = len(texts)
    return {"auto_tokenizer_equal": same / n, "round_trip": back / n, "round_trip_by_hand": by_hand / n}


def learn(stage: Stage) -> dict:
    settings = stage.settings
    texts, heldout, source = load_texts(settings)
    small, used = [], 0
    for text in texts:
        if used >= settings.hand_chars:
            break
        small.append(text)
        used += len(text)
    print(f"{len(texts):,} 段、{sum(map(len, texts)):,} 个字；手写的一份用 {used:,} 个字")
    metrics: dict = same_merges(small, 4000)
    said = "相同" if metrics["merges_equal"] else "不同"
    print(
        f"手写的与库的：{metrics['merges']:,} 条合并{said}；{metrics['hand_s']:.1f} 秒与 {metrics['library_s']:.2f} 秒"
    )
    metrics["chars_per_token"] = compression(texts, heldout)

    part, used = [], 0
    for text in texts:
        if used >= settings.lm_chars:
            break
        part.append(text)
        used += len(text)
    metrics["lm"] = {str(size): loss_per_char(stage, part, heldout[:100], size) for size in LM_SIZES}
    for size, row in metrics["lm"].items():
        print(
            f"  词表 {int(size):>6,}：每字 {row['nats_per_char']:.3f} nats，每 token {row['nats_per_token']:.3f}"
        )

    core = train_library(texts, settings.vocab_size)

    def save(folder: Path) -> None:
        wrap(core).save_pretrained(folder)
        metrics.update(check_saved(folder, core, [*heldout[:50], *HARD]))
        draw(folder / "vocabulary.svg", metrics)

    return stage.save(metrics, {"train": source}, save)


def draw(path: Path, metrics: dict) -> None:
    titles = {
        "char_bpe": "字的 BPE＋字节兜底|char BPE + byte fallback",
        "byte_bpe": "字节级 BPE|byte-level BPE",
        "one_han": "一个汉字一个 token|one Han a token",
    }
    series = {
        titles[name]: ([math.log2(int(size)) for size in row], list(row.values()))
        for name, row in metrics["chars_per_token"].items()
    }
    line_chart(
        path,
        series,
        "词表多大，一个 token 装几个字|Characters per token",
        "log2 词表|log2 vocabulary",
        "字|characters",
    )


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(TokenizerSettings, PRESETS, argv)
    record = run_lesson("tokenizer_training", HOME, settings, learn)
    folder = result_folder("tokenizer_training", HOME, settings)
    loaded = AutoTokenizer.from_pretrained(folder)
    tokens = loaded.tokenize(settings.text)
    print(f"\n{settings.text}\n切成 {len(tokens)} 个：{' | '.join(tokens)}")
    print(f"拼回来：{loaded.decode(loaded(settings.text, add_special_tokens=False)['input_ids'])}")
    return record


if __name__ == "__main__":
    run_main(main)
