"""BiLSTM-CRF：学得会小数据；填充不改变结果；存了再读、中断再来，都是同一个模型；长句放得回去。"""

import json

import pytest
import torch
from small_ner import small_sentences

import bilstm_crf as bc
import hmm_crf
import word_segmentation as ws
from labeling import all_tags
from nlp_common.base.errors import UserError
from tagged_files import tags_of
from vocabulary import UNKNOWN, Vocabulary, collate, neighbours

SMALL = ["--preset", "tiny", "--hidden_size", "24", "--embedding_size", "16", "--input_dropout", "0.1"]
SMALL += ["--num_train_epochs", "6", "--learning_rate", "0.02"]


def small_model(seed=0, use_crf=True):
    torch.manual_seed(seed)
    rows = small_sentences(60)
    vocabulary = Vocabulary.of(rows)
    settings = bc.BiLSTMSettings(embedding_size=8, hidden_size=6)
    return bc.BiLSTMTagger(vocabulary, all_tags(rows), settings, use_crf).eval(), vocabulary, rows


@pytest.mark.parametrize("use_crf", [False, True])
def test_padding_changes_nothing(use_crf):
    model, vocabulary, rows = small_model(use_crf=use_crf)
    number = {tag: i for i, tag in enumerate(model.tags)}
    encoded = [vocabulary.encode(s.chars) | {"tags": [number[t] for t in tags_of(s)]} for s in rows[:6]]
    together = model(**collate(encoded))
    alone = torch.cat([model(**collate([row])) for row in encoded])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    found = bc.tag_sentences(model, vocabulary, rows[:6], legal=True)
    assert found == [bc.tag_sentences(model, vocabulary, [row], legal=True)[0] for row in rows[:6]]


def test_softmax_loss_is_the_cross_entropy_of_every_character():
    model, vocabulary, rows = small_model(use_crf=False)
    row = vocabulary.encode(rows[0].chars) | {"tags": [model.tags.index(t) for t in tags_of(rows[0])]}
    batch = collate([row])
    tags = batch.pop("tags")
    log_p = model.emissions(**batch).log_softmax(-1)[0]
    by_hand = -sum(log_p[t, k] for t, k in enumerate(tags[0].tolist()))
    torch.testing.assert_close(model(**batch, tags=tags)[0], by_hand)


def test_vocabulary_and_neighbours(tmp_path):
    _, vocabulary, rows = small_model()
    assert neighbours(["甲", "乙"]) == ["\0甲", "甲乙", "乙\0"]
    encoded = vocabulary.encode(rows[0].chars)
    assert len(encoded["chars"]) == len(encoded["left"]) == len(encoded["right"]) == len(rows[0].chars)
    assert encoded["right"][:-1] == encoded["left"][1:]  # 我与右邻的组合，就是右邻与左邻的
    assert vocabulary.encode(["☃"])["chars"] == [UNKNOWN]
    vocabulary.save(tmp_path / "v.json")
    assert Vocabulary.load(tmp_path / "v.json").encode(rows[0].chars) == encoded


def test_rare_characters_are_hidden_in_training_only():
    model, vocabulary, rows = small_model()
    batch = collate([vocabulary.encode(rows[0].chars)])
    first, second = model.emissions(**batch), model.emissions(**batch)
    assert torch.equal(first, second)
    assert float(model.hide_probability[:2].max()) == 0 and float(model.hide_probability[2:].max()) < 0.1
    model.hide_probability.fill_(1.0)
    unknown = model.emissions(**batch | {"chars": torch.full_like(batch["chars"], UNKNOWN)})
    assert torch.equal(model.emissions(**batch), first)  # 预测时不藏
    assert not torch.equal(unknown, first)


def test_script_learns_and_loads(small_dataset, tmp_path, capsys):
    arguments = [*SMALL, "--dataset", str(small_dataset), "--output_dir", str(tmp_path / "out")]
    record = bc.main(arguments)
    metrics = record["metrics"]
    wanted = {"entity_f1", "entity_f1_without_crf", "illegal_transitions_without_crf", "sentences_per_s"}
    assert wanted <= set(metrics) and metrics["entity_f1"] > 0.9
    assert metrics["illegal_transitions"] == 0 and record["data"]["sha256"]
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {
        "run.json",
        "confusion.svg",
        "accuracy_or_f1.svg",
    }
    capsys.readouterr()
    text = ("王小明昨天到了上海。" * 1000)[:10_000]  # 一万字
    again = bc.main([*arguments, "--predict", text])
    said = capsys.readouterr().out
    assert again["metrics"] == metrics and "已有训练结果" in said
    line = next(line for line in said.splitlines() if "[王小明/PER]" in line)
    assert line.replace("[王小明/PER]", "王小明").replace("[上海/LOC]", "上海") == text
    assert line.count("[王小明/PER]") >= 990 and line.count("[上海/LOC]") >= 990


def test_other_settings_are_refused_and_bad_values_said(small_dataset, tmp_path):
    with pytest.raises(UserError, match="空句子"):
        bc.main([*SMALL, "--predict", "  "])
    with pytest.raises(UserError, match="--input_dropout"):
        bc.main([*SMALL, "--input_dropout", "1"])
    with pytest.raises(UserError, match="scheme"):
        bc.main([*SMALL, "--scheme", "xyz"])


@pytest.mark.slow
def test_interrupted_in_the_second_part_ends_the_same(small_dataset, tmp_path, monkeypatch):
    """第二个模型训练到一半被打断：再运行一次，第一个不重做，结果与不中断的相同。"""
    arguments = [*SMALL, "--dataset", str(small_dataset), "--save_steps", "5"]
    whole = bc.main([*arguments, "--output_dir", str(tmp_path / "whole")])
    forward, calls = bc.CRF.forward, []

    def interrupted(self, *tensors):
        calls.append(1)
        if len(calls) == 22:
            raise KeyboardInterrupt
        return forward(self, *tensors)

    monkeypatch.setattr(bc.CRF, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bc.main([*arguments, "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    resumed = bc.main([*arguments, "--output_dir", str(tmp_path / "out")])
    for name in (
        "entity_f1",
        "entity_f1_without_crf",
        "character_accuracy",
        "illegal_transitions_without_crf",
    ):
        assert resumed["metrics"][name] == whole["metrics"][name]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


@pytest.mark.slow
def test_learning_curve(small_dataset, tmp_path):
    arguments = [*SMALL, "--dataset", str(small_dataset), "--learning_curve", "True"]
    record = bc.main([*arguments, "--output_dir", str(tmp_path / "out")])
    assert list(map(int, record["metrics"]["learning_curve"])) == [15, 30, 60, 120]
    assert (tmp_path / "out" / "learning_curve.svg").exists()


# ---------- hmm_crf.py ----------
def test_hmm_crf_script(small_dataset, tmp_path, capsys):
    arguments = ["--preset", "tiny", "--dataset", str(small_dataset), "--output_dir", str(tmp_path / "out")]
    record = hmm_crf.main([*arguments, "--num_train_epochs", "3"])
    metrics = record["metrics"]
    assert {"entity_f1", "character_accuracy", "hmm_entity_f1"} <= set(metrics)
    assert metrics["entity_f1"] > 0.9 and len(metrics["learning_curve"]["CRF"]) == 5
    capsys.readouterr()
    hmm_crf.main([*arguments, "--num_train_epochs", "3", "--predict", "李雷昨天到了巴黎"])
    assert "[李雷/PER]昨天到了[巴黎/LOC]" in capsys.readouterr().out


def test_features_and_shapes():
    found = hmm_crf.features(list("在1a。"))
    assert len(found) == 4 and all(len(at) == 11 for at in found)
    assert "C0=在" in found[0] and f"N1={hmm_crf.EDGE}" in found[0] and "P1=1" in found[0]
    assert [hmm_crf.shape(c) for c in "在1a。 \0"] == ["中", "0", "a", "。", "_", "_"]


# ---------- word_segmentation.py ----------
def test_maximum_matching_by_hand():
    dictionary = {"研究", "研究生", "生命", "起源"}
    assert ws.maximum_matching("研究生命起源", dictionary, 3) == ["研究生", "命", "起源"]
    assert ws.maximum_matching("", dictionary, 3) == []
    assert ws.as_spans(["研究生", "命"]) == [("", 0, 3), ("", 3, 4)]


def test_recall_of_unseen_words():
    from tagged_files import Sentence

    sentence = Sentence(list("甲乙丙丁"), [("", 0, 2), ("", 2, 4)])
    got = ws.measure([sentence], [[("", 0, 2), ("", 2, 3), ("", 3, 4)]], {"甲乙"})
    assert got["oov"] == 1 and got["oov_recall"] == 0 and got["word_f1"] == pytest.approx(2 * 1 / 5)
    assert ws.measure([sentence], [sentence.spans], set())["oov_recall"] == 1


@pytest.fixture
def words_folder(tmp_path):
    """分词的数据，写成 B-n 这样的 BMES 文件。"""
    from small_ner import write_tag_file

    from tagged_files import Sentence

    def sentence(i):
        words = [
            ("他", "r"),
            (("昨天", "今天", "下午")[i % 3], "t"),
            ("在", "p"),
            (("上海", "哈尔滨")[i % 2], "ns"),
            ("研究", "v"),
        ]
        words = words[i % 2 :]
        chars = [c for word, _ in words for c in word]
        at, spans = 0, []
        for word, pos in words:
            spans.append((pos, at, at + len(word)))
            at += len(word)
        return Sentence(chars, spans)

    for name, rows in (("train", range(60)), ("dev", range(6)), ("test", range(6))):
        write_tag_file(tmp_path / f"{name}.bmes", [sentence(i) for i in rows])
    return tmp_path


def test_segmentation_script(words_folder, tmp_path, capsys):
    arguments = [*SMALL, "--dataset", str(words_folder), "--output_dir", str(tmp_path / "out")]
    arguments += ["--joint_epochs", "6"]
    record = ws.main([*arguments, "--predict", "他今天在上海研究"])
    metrics = record["metrics"]
    assert metrics["word_f1"] > 0.9 and metrics["joint"]["joint_f1"] > 0.9 and "oov_recall" in metrics
    assert metrics["matching"]["word_f1"] == 1
    assert "他/r  今天/t  在/p  上海/ns  研究/v" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "tags.json").read_text(encoding="utf-8"))[0] != "O"


def test_entities_cannot_be_segmented(small_dataset, tmp_path):
    with pytest.raises(UserError, match="分词用不了"):
        ws.main([*SMALL, "--dataset", str(small_dataset), "--output_dir", str(tmp_path / "out")])
