"""自己编的影评：标签与意思一致、留出的不在训练里；小模型学得会，第二次直接加载，没写完的不算。"""

import random

import pytest

import tiny_english as tiny
from nlp_common.base.errors import UserError
from nlp_common.base.runs import load_run
from tiny_english import ADJECTIVES, KINDS, LABELS, VERBS, build_tokenizer, reviews, write_review


def meaning(sentence: str) -> int:
    """按词判断：正面词多还是负面词多，有 not 就反过来。"""
    words = sentence.rstrip(".!").split()
    score = sum((word in f"{ADJECTIVES[1]} {VERBS[1]}".split()) for word in words)
    score -= sum((word in f"{ADJECTIVES[0]} {VERBS[0]}".split()) for word in words)
    assert score in (1, -1), sentence
    return int((score > 0) != ("not" in words))


def test_clear_reviews_carry_the_label_they_mean():
    rng = random.Random(0)
    for kind in KINDS[:4]:
        for _ in range(200):
            sentence, label, written = write_review(rng, kind)
            assert written == kind and label == meaning(sentence), sentence


def test_but_reviews_follow_the_second_half_seven_times_in_ten():
    rng, follows = random.Random(1), 0
    for _ in range(4000):
        sentence, label, _ = write_review(rng, "but")
        follows += meaning(sentence.split(" but ")[1]) == label
        assert meaning(sentence.split(" but ")[0]) != meaning(sentence.split(" but ")[1])
    assert follows / 4000 == pytest.approx(tiny.BUT_FOLLOWS_SECOND, abs=0.03)


def test_reviews_are_distinct_repeatable_and_keep_the_held_out_ones_out():
    held = reviews(200, 5)
    assert held == reviews(200, 5) and held != reviews(200, 6)
    rows = reviews(2000, 0, frozenset(sentence for sentence, *_ in held))
    texts = {sentence for sentence, *_ in rows}
    assert len(texts) == 2000 and not texts & {sentence for sentence, *_ in held}


def test_tokenizer_knows_every_word_of_the_grammar():
    tokenizer = build_tokenizer()
    for sentence, *_ in reviews(500, 3):
        ids = tokenizer(sentence).input_ids
        assert tokenizer.unk_token_id not in ids
        assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)
    assert tokenizer.unk_token_id in tokenizer("this movie is flabbergasting").input_ids
    assert tokenizer("THIS Movie").input_ids == tokenizer("this movie").input_ids


def test_it_learns_the_clear_sentences_and_cannot_beat_the_noise(english):
    folder, record = english
    assert record["metrics"]["accuracy_clear"] > 0.99
    assert 0.5 < record["metrics"]["accuracy_but"] < tiny.BUT_FOLLOWS_SECOND + 0.1
    assert load_run(folder)["fingerprint"] == record["fingerprint"]
    assert {path.name for path in folder.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}


def test_second_time_loads_and_changed_settings_are_named(english, monkeypatch, capsys):
    folder, record = english
    monkeypatch.setattr(tiny, "train", lambda *args, **kwargs: pytest.fail("不该再训练"))
    assert tiny.tiny_english(folder, seed=0) == record
    assert "已有训练结果" in capsys.readouterr().out
    with pytest.raises(UserError, match="seed：已有 0，这次 1"):
        tiny.tiny_english(folder, seed=1)


def test_an_interrupted_training_leaves_nothing_to_load(tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    folder = tmp_path / "model"
    with monkeypatch.context() as patch:
        patch.setattr(tiny, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tiny.tiny_english(folder, seed=0, count=64)
    assert not folder.exists()
    assert tiny.tiny_english(folder, seed=0, count=64)["stage"] == "tiny_english"
    assert folder.is_dir()


def test_the_same_seed_gives_the_same_weights(tmp_path):
    ids = {tiny.tiny_english(tmp_path / name, seed=3, count=64)["id"] for name in ("a", "b")}
    assert len(ids) == 1 and LABELS == ["NEGATIVE", "POSITIVE"]
