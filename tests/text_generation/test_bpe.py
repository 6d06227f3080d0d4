"""bpe.py：合并表、切分与 tokenizers 库逐条相同；字节兜底；存下来的分词器 AutoTokenizer 读得懂。"""

import json
import random
from collections import Counter

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import tokenizer_training as tt
from bpe import decode, encode_word, train_bpe
from nlp_common.base.errors import UserError


def library_merges(words: dict[str, int], vocab_size: int, specials=(), alphabet=()):
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=1,
        special_tokens=list(specials),
        initial_alphabet=list(alphabet),
        show_progress=False,
    )
    core.train_from_iterator([" ".join([word] * count) for word, count in words.items()], trainer)
    model = json.loads(core.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]], core


@pytest.mark.parametrize("seed", range(12))
def test_merges_equal_the_library_on_random_words(seed):
    """字母很少，所以处处是并列、重叠（aaaa），也有两条路并出同一个词的。"""
    rng = random.Random(seed)
    letters = "ab" if seed % 3 == 0 else "abc" if seed % 3 == 1 else "天地人abc"
    words = Counter("".join(rng.choices(letters, k=rng.randint(1, 9))) for _ in range(rng.randint(5, 200)))
    specials, alphabet = (["<pad>"], "xyz") if seed % 2 else ([], "")
    vocab, merges = train_bpe(words, 60, specials, set(alphabet))
    their_vocab, theirs, core = library_merges(words, 60, specials, alphabet)
    assert merges == theirs and vocab == their_vocab
    ranks = {pair: i for i, pair in enumerate(merges)}
    for word in list(words)[:40]:
        assert encode_word(word, ranks, vocab) == core.encode(word).ids


def test_merges_equal_the_library_on_chinese_bytes():
    texts = [
        t for t in ["春眠不觉晓", "处处闻啼鸟。夜来风雨声", "花落知多少。春风又绿江南岸", "明月何时照我还。"]
    ] * 3
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = Counter(piece for text in texts for piece, _ in level.pre_tokenize_str(text))
    vocab, merges = train_bpe(words, 320, [], set(pre_tokenizers.ByteLevel.alphabet()))
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = level
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    model = json.loads(core.to_str())["model"]
    assert merges == [tuple(pair) for pair in model["merges"]] and vocab == model["vocab"]


def test_pieces_equal_the_librarys_regex():
    texts = ["北京大学1998年的《新闻》，GDP增长7.8%！", "a  b\n\tç你好é٣", "，。", "𠮷😀x"]
    library = tt.train_library(texts, 400).pre_tokenizer
    for text in texts:
        assert tt.split_pieces(text) == [piece for piece, _ in library.pre_tokenize_str(text)]


@pytest.fixture(scope="module")
def core():
    return tt.train_library(["春眠不觉晓，处处闻啼鸟。", "夜来风雨声，花落知多少。"] * 5, 300)


def test_byte_fallback_loses_nothing(core, tmp_path):
    tt.wrap(core).save_pretrained(tmp_path)
    texts = ["春眠龘靐，😀𠮷。", "a\x00b\u200d", *tt.HARD]
    assert tt.check_saved(tmp_path, core, texts) == {
        "auto_tokenizer_equal": 1.0,
        "round_trip": 1.0,
        "round_trip_by_hand": 1.0,
    }
    tokens = core.encode("龘").tokens
    assert tokens == [f"<0x{byte:02X}>" for byte in "龘".encode()]


def test_byte_fallback_by_hand_equals_the_library(core):
    model = json.loads(core.to_str())["model"]
    ranks = {tuple(pair): i for i, pair in enumerate(model["merges"])}
    for text in ["春眠龘晓", "处处闻😀啼鸟", "abc花落"]:
        mine = [i for piece in tt.split_pieces(text) for i in encode_word(piece, ranks, model["vocab"])]
        assert mine == core.encode(text).ids


def test_broken_bytes_become_a_replacement_character():
    names = ["a", "<0xE6>", "<0x98>", "<0xA5>"]
    assert decode([0, 1, 2, 3, 0], names) == "a春a"
    assert decode([0, 1, 2, 0], names) == "a\N{REPLACEMENT CHARACTER}a"


def test_a_larger_vocabulary_packs_more_characters():
    texts = ["人民日报今天报道了人民生活", "人民的生活越来越好", "今天的人民日报"] * 10
    sizes = [tt.chars_per_token(tt.train_library(texts, size), texts) for size in (270, 300, 400)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]


def test_a_prefix_of_the_merges_is_the_smaller_tokenizer():
    texts = ["人民日报今天报道了人民生活", "人民的生活越来越好", "今天的人民日报"] * 3
    options = {"byte_fallback": False, "byte_level": True}
    large, small = tt.train_library(texts, 320, **options), tt.train_library(texts, 280, **options)
    assert json.loads(tt.smaller(large, 280).to_str())["model"] == json.loads(small.to_str())["model"]


def test_ties_are_broken_the_same_way_every_time():
    """六成的位置放不下所有的字，而它们出现得一样多：留下的总是编号小的那几个。"""
    chars = [chr(0x4E00 + i) for i in range(200)]
    texts = ["".join(chars), "".join(reversed(chars))]
    for _ in range(5):
        kept = [token for token in tt.train_library(texts, 258 + 100).get_vocab() if token in chars]
        assert sorted(kept) == chars[:60]


def test_bad_input(tmp_path):
    few = tmp_path / "few.txt"
    few.write_text("只有一段\n两段\n", encoding="utf-8")
    with pytest.raises(UserError, match="至少要 20 段"):
        tt.main(["--dataset", str(few), "--output_dir", str(tmp_path / "out")])
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"text": "好"}\n{"label": 1}\n', encoding="utf-8")
    with pytest.raises(UserError, match="第 2 行"):
        tt.main(["--dataset", str(wrong), "--output_dir", str(tmp_path / "out")])
    with pytest.raises(UserError, match="--vocab_size"):
        tt.main(["--vocab_size", "10"])


@pytest.mark.slow
def test_the_lesson(tmp_path):
    arguments = [
        "--max_train_samples",
        "300",
        "--hand_chars",
        "5000",
        "--lm_chars",
        "10000",
        "--vocab_size",
        "1000",
    ]
    metrics = tt.main([*arguments, "--preset", "tiny", "--output_dir", str(tmp_path / "out")])["metrics"]
    assert metrics["merges_equal"] == metrics["round_trip"] == metrics["auto_tokenizer_equal"] == 1.0
    assert set(metrics["lm"]) == {"1000", "4000", "16000"}
