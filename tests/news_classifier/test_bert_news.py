"""新闻分类脚本：训练、存、再加载、接着训练，标签的各种写法，写错的数据说清是哪一行。"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import bert_news_multiclass as news
import headlines as grammar
from headlines import LABELS, headlines
from nlp_common.base.errors import UserError
from nlp_common.base.runs import load_run

SMALL = ["--preset", "tiny", "--num_layers", "1", "--hidden_size", "32", "--max_length", "40"]
SMALL += ["--per_device_train_batch_size", "8", "--num_train_epochs", "1", "--eval_steps", "4"]


@pytest.fixture(scope="module", autouse=True)
def few_rows():
    """训练 96 条、验证 60 条、测试 80 条，只看脚本转不转得动。"""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grammar, "SIZES", {"train": 96, "validation": 60, "test": 80})
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """→ (文件夹, main 返回的记录)。"""
    folder = tmp_path_factory.mktemp("模型 文件夹") / "tnews"
    return folder, news.main([*SMALL, "--output_dir", str(folder)])


def test_folder_holds_a_normal_model_with_class_names(trained):
    folder, record = trained
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert [config["id2label"][str(i)] for i in range(15)] == LABELS
    assert load_run(folder)["id"] == record["id"] and record["stage"] == "news"
    assert (folder / "confusion.png").stat().st_size > 10_000 and (
        folder / "learning_curve.png"
    ).stat().st_size > 5_000


def test_metrics_belong_to_the_confusion_matrix(trained):
    metrics, matrix = trained[1]["metrics"], np.array(trained[1]["confusion"])
    assert matrix.shape == (15, 15) and matrix.sum() == 80
    assert metrics["test_accuracy"] == pytest.approx(matrix.trace() / 80)
    assert 0.85 < metrics["bayes_accuracy_here"] <= 1 and metrics["bayes_accuracy"] == pytest.approx(
        0.929, abs=1e-3
    )
    assert 0 < metrics["tfidf_test_accuracy"] <= metrics["bayes_accuracy_here"]
    assert {"step", "eval_loss"} <= set().union(*trained[1]["history"])
    assert trained[1]["data"]["train"]["rows"] == 96 and trained[1]["data"]["test"]["rows"] == 80


def test_second_run_loads_and_predicts(trained, monkeypatch, capsys):
    folder, record = trained
    monkeypatch.setattr(news, "finetune", lambda run: pytest.fail("不该再训练"))
    assert news.main([*SMALL, "--output_dir", str(folder)])["id"] == record["id"]
    printed = capsys.readouterr().out
    assert "已有训练结果，直接加载" in printed and f"测试标题：'{news.EXAMPLE}' 预测：" in printed
    with pytest.raises(UserError, match="hidden_size：已有 32，这次 64"):
        news.main([*SMALL, "--output_dir", str(folder), "--hidden_size", "64"])
    news.main([*SMALL, "--output_dir", str(folder), "--predict", "油价迎来拐点", "国足公布大名单"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("'")[1] for line in lines[-2:]] == ["油价迎来拐点", "国足公布大名单"]


def test_second_run_imports_no_trainer(trained):
    """第二次运行只加载模型就预测：不导入 Trainer、scikit-learn、matplotlib、datasets，所以快。"""
    arguments = [*SMALL, "--output_dir", str(trained[0])]
    code = (
        f"import sys; sys.path.insert(0, {str(Path(news.__file__).parent)!r}); import bert_news_multiclass as s; "
        f"s.main({arguments!r}); heavy = {{'transformers.trainer', 'sklearn', 'matplotlib', 'datasets'}}; "
        "print('heavy:', heavy & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("heavy: set()")


def test_predict_file_and_its_errors(trained, tmp_path, capsys):
    folder, _ = trained
    good, bad = tmp_path / "标题.txt", tmp_path / "bad.jsonl"
    good.write_text("小米发布财报\n樱桃迎来丰收\n", encoding="utf-8")
    news.main([*SMALL, "--output_dir", str(folder), "--predict_file", str(good)])
    assert "'樱桃迎来丰收' 预测：" in capsys.readouterr().out
    bad.write_text('{"sentence": "好"}\n{"sentence": "   "}\n', encoding="utf-8")
    with pytest.raises(UserError, match="第 2 行"):
        news.main([*SMALL, "--output_dir", str(folder), "--predict_file", str(bad)])


def test_padding_changes_no_prediction(trained):
    tokenizer, model = news.load_classifier(trained[0])
    texts = ["小米发布财报", "重磅：老父亲卖掉房子只为一个承诺，看完泪目", "樱桃迎来丰收"]
    together = news.predict(model, tokenizer, texts, 40)
    alone = torch.cat([news.predict(model, tokenizer, [text], 40) for text in texts])
    assert torch.allclose(together, alone, atol=1e-6)


def test_continues_after_an_interruption_to_the_same_weights(trained, tmp_path, monkeypatch, capsys):
    """第 8 步存了检查点，第 10 步被打断；再运行一次，和没被打断的一模一样。"""
    from nlp_common.train import trainer as training

    on_step_end = training.Progress.on_step_end

    def interrupted(self, args, state, control, **kwargs):
        on_step_end(self, args, state, control, **kwargs)
        if state.global_step == 10:
            raise KeyboardInterrupt

    folder = tmp_path / "tnews"
    with monkeypatch.context() as patch:
        patch.setattr(training.Progress, "on_step_end", interrupted)
        with pytest.raises(KeyboardInterrupt):
            news.main([*SMALL, "--output_dir", str(folder)])
    assert not folder.exists()
    record = news.main([*SMALL, "--output_dir", str(folder)])
    assert "接着上次的检查点继续：checkpoint-8" in capsys.readouterr().out
    assert record["id"] == trained[1]["id"]
    assert record["metrics"]["test_accuracy"] == trained[1]["metrics"]["test_accuracy"]


# ---------------------------------------------------------------- 数据


def settings_for(path, **changes):
    settings = news.NewsSettings(dataset=str(path), preset="tiny", per_device_train_batch_size=2)
    for name, value in changes.items():
        setattr(settings, name, value)
    return settings


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_labels_by_number_name_and_clue_code(tmp_path):
    labels = [3, "3", "体育", "news_sports", "103"]
    path = write(tmp_path / "a.jsonl", [{"sentence": f"标题{i}", "label": x} for i, x in enumerate(labels)])
    rows, source = news.read_split(settings_for(path), "train")
    assert [row["label"] for row in rows] == [3] * 5 and source["rows"] == 5
    assert news.CLUE_NAMES[6] == "car" and LABELS[6] == "汽车" and news.CLUE_CODES[6] == "107"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"sentence": "好", "label": 15}, r"第 3 行.*15.*14 电竞"),
        ({"sentence": "好", "label": -1}, r"第 3 行.*-1"),
        ({"sentence": "好", "label": "社会"}, r"第 3 行.*'社会'.*6 汽车"),
        ({"sentence": "好", "label": "news_social"}, r"第 3 行.*news_social"),
        ({"sentence": "", "label": 1}, r"第 3 行.*空"),
        ({"sentence": " \u3000 ", "label": 1}, r"第 3 行.*空"),
        ({"sentence": "好"}, r"第 3 行.*缺少 label"),
        ({"label": 1}, r"第 3 行.*缺少 sentence"),
    ],
)
def test_bad_rows_are_named(tmp_path, row, said):
    good = [{"sentence": "甲", "label": 0}, {"sentence": "乙", "label": 1}]
    path = write(tmp_path / "train.jsonl", [*good, row])
    with pytest.raises(UserError, match=said):
        news.load_data(settings_for(path))


def test_one_class_few_rows_and_wrong_encoding(tmp_path):
    path = write(tmp_path / "one.jsonl", [{"sentence": f"标题{i}", "label": 4} for i in range(40)])
    with pytest.raises(UserError, match="只有 1 个类别"):
        news.load_data(settings_for(path))
    path = write(tmp_path / "few.jsonl", [{"sentence": f"标题{i}", "label": i % 2} for i in range(20)])
    with pytest.raises(UserError, match="不够一批"):
        news.load_data(settings_for(path, per_device_train_batch_size=32))
    path = tmp_path / "gbk.csv"
    path.write_bytes("sentence,label\n股价大涨,12\n".encode("gbk"))
    with pytest.raises(UserError, match=r"第 2 行不是 UTF-8"):
        news.load_data(settings_for(path))


def test_one_file_is_split_by_the_text_alone(tmp_path):
    rows = [{"sentence": row["sentence"], "label": row["label"]} for row in headlines("train", 400)]
    data, sources = news.load_data(settings_for(write(tmp_path / "a.jsonl", rows)))
    texts = {split: {row["text"] for row in data[split]} for split in data}
    assert not texts["train"] & texts["validation"] and data["test"] == data["validation"]
    assert 0.04 < len(data["validation"]) / 400 < 0.18 and set(sources) == {"train"}
    again, _ = news.load_data(settings_for(write(tmp_path / "b.jsonl", rows[::-1])))
    assert {row["text"] for row in again["validation"]} == texts["validation"]


def test_folder_with_a_validation_file(tmp_path):
    write(tmp_path / "train.jsonl", [{"sentence": f"训练{i}", "label": i % 3} for i in range(9)])
    write(tmp_path / "dev.jsonl", [{"sentence": "验证", "label": 2}])
    data, sources = news.load_data(settings_for(tmp_path))
    assert len(data["train"]) == 9 and data["validation"] == data["test"] == [{"text": "验证", "label": 2}]
    assert sources["validation"]["split"] == "validation"


def test_second_source_of_tnews_when_the_first_cannot_be_read(monkeypatch, capsys):
    asked = []

    def read_rows(name, *, split, **_):
        asked.append((name, split))
        if name == news.FULL_DATASETS[0]:
            raise UserError("没有这个数据集")
        rows = [{"text": f"标题{i}", "label": i % 15} for i in range(30)]
        return news.Rows(rows, {"name": name, "kind": "hub", "path": None, "split": split, "rows": 30})

    monkeypatch.setattr(news, "read_rows", read_rows)
    data, sources = news.load_data(settings_for(news.FULL_DATASETS[0]))
    assert asked == [("clue/clue:tnews", "train"), ("mteb/TNews", "train"), ("mteb/TNews", "validation")]
    assert len(data["train"]) == 30 and sources["train"]["name"] == "mteb/TNews"
    assert "改用内容相同的 mteb/TNews" in capsys.readouterr().out


def test_full_settings_start_from_a_pretrained_folder(tmp_path, capsys):
    """full 的路：从一个预训练（猜字）模型的文件夹开始，数据是 CLUE 那样的 jsonl；这里用没训练过的 1 层小 BERT 代替。"""
    from transformers import BertConfig, BertForMaskedLM

    rows = headlines("train", 60)
    tokenizer = news.character_tokenizer([row["sentence"] for row in rows], min_count=1)
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **size)).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    for split, part in (("train", rows[:40]), ("dev", rows[40:])):
        clue = [{"label": news.CLUE_CODES[row["label"]], "sentence": row["sentence"]} for row in part]
        write(tmp_path / f"{split}.json", clue)
    arguments = ["--model", str(tmp_path / "bert"), "--dataset", str(tmp_path), "--eval_steps", "0.5"]
    record = news.main([*arguments, "--output_dir", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert printed.startswith("预设 full") and "test 就是 validation" in printed
    assert (
        record["settings"]["learning_rate"] == 2e-5
        and record["settings"]["per_device_train_batch_size"] == 16
    )
    assert sum(map(sum, record["confusion"])) == 20 and "bayes_accuracy" not in record["metrics"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["id2label"]["6"] == "汽车"

    def word_vectors(folder):
        from safetensors.torch import load_file

        return load_file(tmp_path / folder / "model.safetensors")["bert.embeddings.word_embeddings.weight"]

    for layers in ("0", "1"):  # 只训练分类层；训练一层。嵌入都不变
        out = f"out{layers}"
        record = news.main([*arguments, "--train_layers", layers, "--output_dir", str(tmp_path / out)])
        assert sum(map(sum, record["confusion"])) == 20
        assert torch.equal(word_vectors(out), word_vectors("bert"))
    assert not torch.equal(word_vectors("out"), word_vectors("bert"))


@pytest.mark.parametrize("code", [104, "104", 104.0, "104.0", "news_finance", "财经", 4, "4"])
def test_codes_are_looked_up_as_numbers_and_as_text(tmp_path, code):
    rows = [{"text": "银行理财新规", "label": code}, {"text": "联赛冠军诞生", "label": 103}]
    found, _ = news.read_split(settings_for(write(tmp_path / "a.jsonl", rows)), "train")
    assert [row["label"] for row in found] == [4, 3]


def test_duplicated_titles_and_contradictions_are_dropped_before_the_split(tmp_path, capsys):
    rows = [{"sentence": f"标题{n % 30}", "label": n % 3} for n in range(60)]
    rows += [{"sentence": "矛盾", "label": 0}, {"sentence": "矛盾", "label": 1}]
    data, _ = news.load_data(settings_for(write(tmp_path / "a.jsonl", rows)))
    texts = [row["text"] for row in data["train"] + data["validation"]]
    assert len(texts) == len(set(texts)) == 30 and data["validation"]
    shown = capsys.readouterr().out
    assert "重复的 30 行" in shown and "标了不同 label 的 2 行" in shown


def test_few_rows_still_leave_one_for_validation(tmp_path):
    rows = [{"sentence": title, "label": n % 2} for n, title in enumerate(["甲一", "乙二", "丙三", "丁四"])]
    data, _ = news.load_data(settings_for(write(tmp_path / "a.jsonl", rows), per_device_train_batch_size=2))
    assert len(data["validation"]) >= 1 and len(data["train"]) >= 2
