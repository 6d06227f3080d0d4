"""两个演示：五行代码等于 pipeline，补齐不改变得分，句子从命令行和标准输入来，写错了说得清。"""

import io
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import sentiment_analysis_demo as demo
import sentiment_pipeline_chinese as chinese
from demo_settings import read_sentences
from nlp_common.base.errors import UserError

CPU = torch.device("cpu")
MIXED = ["this movie is very boring!", "nice", "to be honest the plot is not really good but i love it" * 3]


@pytest.fixture(scope="module")
def classifier(english):
    return demo.load_classifier(str(english[0]), CPU)


def test_five_lines_equal_the_pipeline(english, classifier, capsys):
    gap = demo.look_inside(classifier, str(english[0]), [*demo.SENTENCES, *MIXED], CPU)
    assert gap < 1e-6
    printed = capsys.readouterr().out
    assert "[CLS] this movie is very boring ! [SEP]" in printed and "NEGATIVE" in printed


def test_padding_changes_no_score(english):
    together = demo.by_hand(str(english[0]), MIXED, CPU)
    alone = torch.cat([demo.by_hand(str(english[0]), [sentence], CPU) for sentence in MIXED])
    assert torch.allclose(together, alone, atol=1e-6)
    assert torch.allclose(together.sum(-1), torch.ones(len(MIXED)))


def test_very_long_sentence_is_cut_not_an_error(classifier):
    assert classifier("good " * 1000)[0]["label"] in ("NEGATIVE", "POSITIVE")


def test_scores_mark_the_unsure_and_the_unknown(classifier, capsys):
    results = demo.show_scores(
        classifier, ["this movie is very boring!", "flabbergasting"], 2, unsure_below=1.1
    )
    assert [item["label"] for item in results[0]] == ["NEGATIVE", "POSITIVE"]
    assert all(sum(item["score"] for item in items) == pytest.approx(1, abs=1e-5) for items in results)
    lines = capsys.readouterr().out.splitlines()
    assert "拿不准" in lines[1] and "词表里没有：flabbergasting" in lines[3] and "词表里没有" not in lines[1]
    demo.show_scores(classifier, ["this movie is very boring!"], 1, unsure_below=0.0)
    assert "拿不准" not in capsys.readouterr().out


def test_speed_is_measured_for_each_batch_size(classifier, capsys):
    seconds = demo.compare_speed(classifier, demo.SENTENCES * 4, batch_sizes=(1, 4))
    assert list(seconds) == [1, 4] and min(seconds.values()) > 0
    assert "每批  4 句" in capsys.readouterr().out


def test_whole_english_tour(english, monkeypatch, capsys):
    from tiny_english import reviews

    many = [sentence for sentence, *_ in reviews(40, 1)]
    monkeypatch.setattr(demo, "prepare_tiny", lambda settings: (str(english[0]), many))
    demo.main(["--preset", "tiny"])
    printed = capsys.readouterr().out
    assert (
        printed.startswith("预设 tiny")
        and "'this movie is very boring!'\n      → [{'label': 'NEGATIVE'" in printed
    )
    assert [f"[{i}]" in printed for i in range(1, 6)] == [True] * 5


def test_own_sentences_from_the_command_line_and_standard_input(english, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "stdin", io.TextIOWrapper(io.BytesIO(b"i hate this film\n\n  what a lovely song \n"))
    )
    demo.main(["--model", str(english[0]), "--text", "the show is great", "-"])
    printed = capsys.readouterr().out
    assert (
        printed.index("'the show is great'")
        < printed.index("'i hate this film'")
        < printed.index("'what a lovely song'")
    )
    assert "[1]" not in printed


@pytest.mark.parametrize(
    ("given", "stdin", "said"),
    [
        (["好", "  "], b"", "第 2 句是空的"),
        (["-"], b" \n\n", "标准输入里没有一句话"),
        (["-"], "好\n很差".encode("gbk"), "标准输入第 1 行不是 UTF-8"),
    ],
)
def test_bad_sentences(given, stdin, said, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: False, buffer=io.BytesIO(stdin)))
    with pytest.raises(UserError, match=said):
        read_sentences(given)


def test_utf8_with_bom_and_no_sentences():
    assert read_sentences(None) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--batch_size", "0"], "--batch_size 要是正整数"),
        (["--txet", "a"], "是不是 --text"),
        (["--preset", "big"], "--preset 不认识 big"),
        (["--model", "没有这个/文件夹/"], "没有这个文件夹"),
        (["--preset", "tiny", "--model", "bert"], "--model 用不上"),
    ],
)
def test_bad_arguments(arguments, said):
    with pytest.raises(UserError, match=said):
        demo.main(arguments)


def test_full_without_network_says_the_ways_out(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="--preset tiny"):
        chinese.main(["--preset", "full"])


# ---------------------------------------------------------------- 中文


@pytest.fixture(scope="module")
def small_bert(tmp_path_factory):
    """没训练过的 1 层小 BERT，存成 sentiment_classifier 的结果文件夹的样子。"""
    from transformers import BertConfig, BertForSequenceClassification

    from nlp_common.tiny.bert import character_tokenizer

    folder = tmp_path_factory.mktemp("sentiment_classifier") / "my_bert_model-tiny"
    tokenizer = character_tokenizer(chinese.SENTENCES + chinese.HARD_SENTENCES, min_count=1)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
        id2label={0: "负面", 1: "正面"},
        label2id={"负面": 0, "正面": 1},
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "run.json").write_text(json.dumps({"settings": {"seed": 0, "mlm_epochs": 0}}))
    return folder


def test_chinese_uses_the_local_model(small_bert, monkeypatch, capsys):
    monkeypatch.setattr(chinese, "SENTIMENT", small_bert.parent)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("不该训练"))
    chinese.main(["--preset", "tiny"])
    printed = capsys.readouterr().out
    assert f"用 sentiment_classifier 训练好的模型：{small_bert}" in printed
    assert "[CLS] 这 个 电 影" in printed and "[5]" in printed


def test_the_full_model_comes_first_and_half_written_ones_do_not_count(small_bert, monkeypatch, tmp_path):
    monkeypatch.setattr(chinese, "SENTIMENT", tmp_path)
    assert chinese.local_model() is None
    for name in ("my_bert_model-tiny", "my_bert_model"):
        (tmp_path / name).mkdir()
    assert chinese.local_model() is None
    (tmp_path / "my_bert_model-tiny" / "run.json").write_text("{}")
    assert chinese.local_model() == tmp_path / "my_bert_model-tiny"
    (tmp_path / "my_bert_model" / "run.json").write_text("{}")
    assert chinese.local_model() == tmp_path / "my_bert_model"


def test_chinese_trains_when_there_is_no_model(small_bert, monkeypatch, tmp_path, capsys):
    """没有模型时运行 sentiment_classifier 的脚本；训练好的第二次直接用；种子不同要说出来；失败了说清命令。"""
    monkeypatch.setattr(chinese, "SENTIMENT", tmp_path)
    commands, code = [], 1

    def train(command):
        commands.append(command)
        if code == 0:
            import shutil

            shutil.copytree(small_bert, command[command.index("--output_dir") + 1])
        return SimpleNamespace(returncode=code)

    monkeypatch.setattr(subprocess, "run", train)
    settings = SimpleNamespace(output_dir=str(tmp_path / "out"), retrain=False, seed=0)
    with pytest.raises(UserError, match=r"没有训练完（退出码 1）：python .*bert_finetune_sentiment\.py"):
        chinese.prepare_tiny(settings)
    code = 0
    assert chinese.prepare_tiny(settings) == str(tmp_path / "out")
    assert "不到一分钟" in capsys.readouterr().out
    assert len(commands) == 2 and {"--preset", "tiny", "--seed"} <= set(commands[0])
    assert chinese.prepare_tiny(settings) == str(tmp_path / "out") and len(commands) == 2
    with pytest.raises(UserError, match="种子 0 训练的，这次要的是 1"):
        chinese.prepare_tiny(SimpleNamespace(output_dir=str(tmp_path / "out"), retrain=False, seed=1))
    (tmp_path / "english").mkdir()
    (tmp_path / "english" / "run.json").write_text('{"stage": "tiny_english"}')
    with pytest.raises(UserError, match=r"english 里的不是 bert_finetune_sentiment\.py 训练的模型"):
        chinese.prepare_tiny(SimpleNamespace(output_dir=str(tmp_path / "english"), retrain=False, seed=0))


@pytest.mark.parametrize(
    ("record", "ours"),
    [
        ({"stage": "sentiment", "settings": {"seed": 0, "mlm_epochs": 2.0}}, True),
        ({"settings": {"seed": 0, "mlm_epochs": 2.0}}, True),  # 早先的记录没有 stage
        ({"stage": "mlm", "settings": {"seed": 0, "mlm_epochs": 2.0}}, False),  # 预训练的，还没有微调
        ({"stage": "news", "settings": {"seed": 0}}, False),
        ({"settings": {"seed": 0}}, False),
    ],
)
def test_only_the_sentiment_script_s_own_models_are_loaded(record, ours, monkeypatch, tmp_path):
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("不该训练"))
    (tmp_path / "run.json").write_text(json.dumps(record))
    settings = SimpleNamespace(output_dir=str(tmp_path), retrain=False, seed=0)
    if ours:
        assert chinese.prepare_tiny(settings) == str(tmp_path)
    else:
        with pytest.raises(UserError, match=r"里的不是 bert_finetune_sentiment\.py 训练的模型"):
            chinese.prepare_tiny(settings)
