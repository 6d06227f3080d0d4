"""BERT 主题共有的部分：字表、填充不改变 logits、按长度分批、指标、逐行检查、设置的指纹。"""

import json

import datasets
import pytest
import torch
from sklearn.metrics import f1_score
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from nlp_common.base.device import precision_flags
from nlp_common.base.errors import UserError
from nlp_common.data.labels import check_enough, labelled, text_key, unique
from nlp_common.data.rows import Rows, read_rows
from nlp_common.draw.plots import learning_curve
from nlp_common.lm.classifier import encode, predict
from nlp_common.tiny.bert import SPECIAL, character_tokenizer
from nlp_common.train.bert import BertSettings
from nlp_common.train.metrics import ClassificationMetric, classification_metrics
from nlp_common.train.settings import fingerprint
from nlp_common.train.trainer import LengthBucketSampler, curves

TEXTS = ["这家店的菜很好吃", "屏幕太暗，后悔买了。15寸 ThinkPad", "一般", "服务员态度很差，再也不来了！！！"]


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer(TEXTS, min_count=1)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
    )
    return BertForSequenceClassification(config).eval()


def test_character_vocabulary(tokenizer, tmp_path):
    assert tokenizer.tokenize("很好吃") == ["很", "好", "吃"]
    assert tokenizer.tokenize("15寸 THINK") == ["1", "##5", "寸", "t", "##h", "##i", "##n", "##k"]
    assert tokenizer.tokenize("店龘") == ["店", "[UNK]"]
    assert [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL] == [0, 1, 2, 3, 4]
    assert len(character_tokenizer(["好好坏"], min_count=2)) == 6  # 只出现一次的字不要
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]


def test_encode_cuts_and_keeps_both_ends(tokenizer):
    long, short = encode(tokenizer, [{"text": TEXTS[3], "label": 0}, {"text": "一般", "label": 1}], 8)
    assert len(long["input_ids"]) == 8 and (long["input_ids"][0], long["input_ids"][-1]) == (2, 3)
    assert len(short["input_ids"]) == 4 and short["labels"] == 1  # 还没有填充


@torch.inference_mode()
def test_padding_changes_no_logit(model, tokenizer):
    for text in TEXTS:
        alone = tokenizer(text, return_tensors="pt")
        padded = tokenizer(text, return_tensors="pt", padding="max_length", max_length=100)
        assert padded["input_ids"].shape[1] == 100
        torch.testing.assert_close(model(**padded).logits, model(**alone).logits, atol=1e-5, rtol=0)


def test_predict_keeps_the_order_and_equals_one_by_one(model, tokenizer):
    probs = predict(model, tokenizer, TEXTS, 32, batch_size=3)
    assert probs.shape == (4, 2) and torch.allclose(probs.sum(-1), torch.ones(4))
    one_by_one = torch.cat([predict(model, tokenizer, [text], 32) for text in TEXTS])
    torch.testing.assert_close(probs, one_by_one, atol=1e-5, rtol=0)


def test_batches_of_similar_length():
    lengths = [(i * 37) % 97 + 3 for i in range(1003)]
    sampler = LengthBucketSampler(lengths, 16, seed=0)
    order = list(sampler)
    assert sorted(order) == list(range(1003)) and order == list(sampler)
    batches = [[lengths[i] for i in order[start : start + 16]] for start in range(0, 1003, 16)]
    padded = sum(len(batch) * max(batch) for batch in batches)
    assert padded < 1.1 * sum(lengths)  # 不分桶时约 1.8 倍
    sampler.set_epoch(1)
    assert list(sampler) != order


def test_metric_is_an_evaluate_module_with_scikit_learns_numbers():
    guesses, truth = [0, 1, 2, 2, 1, 0], [0, 1, 2, 1, 1, 1]
    metric = ClassificationMetric()
    result = metric.compute(predictions=guesses, references=truth)
    assert result == {
        "accuracy": pytest.approx(4 / 6),
        "macro_f1": pytest.approx(f1_score(truth, guesses, average="macro")),
    }
    metric.add_batch(predictions=guesses[:3], references=truth[:3])
    metric.add_batch(predictions=guesses[3:], references=truth[3:])
    assert metric.compute() == result
    logits = torch.nn.functional.one_hot(torch.tensor(guesses)).numpy()
    assert classification_metrics((logits, truth)) == result
    assert isinstance(metric.features, datasets.Features)


def found(rows, kind="builtin"):
    return Rows(rows, {"name": "某数据", "kind": kind, "path": None, "split": "train"})


def test_labels_by_number_text_and_name():
    rows = [{"text": " 好 ", "label": 1}, {"text": "坏", "label": "0"}, {"text": "行", "label": " 正面 "}]
    assert labelled(found(rows), ["text"], ["负面", "正面"]) == [
        {"text": "好", "label": 1},
        {"text": "坏", "label": 0},
        {"text": "行", "label": 1},
    ]
    other = [{"sentence": "好", "label_id": 1}]
    assert labelled(found(other), ["text", "sentence"], ["a", "b"], "label_id") == [
        {"text": "好", "label": 1}
    ]


@pytest.mark.parametrize("bad", [2, -1, True, None, "2", "好评", 1.5, [1]])
def test_unknown_labels_are_refused(bad):
    with pytest.raises(UserError, match=r"某数据 的 train 第 2 条的 label 是 .*0 负面、1 正面"):
        labelled(
            found([{"text": "好", "label": 1}, {"text": "坏", "label": bad}]), ["text"], ["负面", "正面"]
        )


def test_place_is_the_line_in_the_file(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('text,label\n"两\n行",1\n好,3\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.csv 第 4 行的 label 是 '3'"):
        labelled(read_rows(str(path)), ["text"], ["负面", "正面"])


def test_empty_rows_of_a_hub_data_set_are_skipped_and_told(capsys):
    rows = [{"text": "好", "label": 1}, {"text": " ", "label": 0}]
    assert labelled(found(rows, "hub"), ["text"], ["负面", "正面"]) == [{"text": "好", "label": 1}]
    assert "1 行没有文字，跳过（第 2 条等）" in capsys.readouterr().out


def test_enough_rows():
    with pytest.raises(UserError, match="只有 1 个类别"):
        check_enough([{"label": 1}] * 9, 4, "某数据")
    with pytest.raises(UserError, match=r"不够一批（8 行）.*--per_device_train_batch_size 2"):
        check_enough([{"label": 1}, {"label": 0}], 8, "某数据")
    check_enough([{"label": 1}, {"label": 0}], 2, "某数据")


def test_unique():
    assert text_key("好，吃 ！") == text_key("好吃") and text_key("！！") == "！！"
    rows = [
        {"text": t, "label": y}
        for t, y in [("好吃", 1), ("好 吃。", 1), ("一般", 1), ("一般！", 0), ("差", 0)]
    ]
    assert unique(rows) == [rows[0], rows[4]]  # 标签矛盾的"一般"哪一条都不要


def test_fingerprint_changes_with_the_data_but_not_with_what_to_predict(tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text(json.dumps({"text": "好", "label": 1}), encoding="utf-8")
    settings = BertSettings(dataset=str(tmp_path), learning_rate=1e-3)
    first = fingerprint(settings)
    for name, value in (("predict", ["好"]), ("retrain", True), ("bf16", False), ("output_dir", "别处")):
        assert fingerprint(BertSettings(**(vars(settings) | {name: value}))) == first
    file.write_text(json.dumps({"text": "坏", "label": 0}), encoding="utf-8")
    assert fingerprint(settings) != first
    assert fingerprint(settings, more=1)["more"] == 1


def test_mixed_precision(monkeypatch):
    cpu = torch.device("cpu")
    for found, expected in (
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
        ({"avx2": True}, False),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found)
        assert precision_flags(cpu, cpu_bf16=True) == {"bf16": expected, "fp16": False}
    assert precision_flags(cpu, True, cpu_bf16=True)["bf16"]


def test_curves_and_picture(tmp_path):
    log = [
        {"step": 5, "loss": 0.7, "grad_norm": 1.0, "epoch": 0.5},
        {"step": 5, "eval_loss": 0.6, "eval_accuracy": 0.75, "eval_runtime": 1.0},
        {"step": 10, "train_runtime": 3.0},
    ]
    history = curves(log)
    assert history == [{"step": 5, "loss": 0.7}, {"step": 5, "eval_loss": 0.6, "eval_accuracy": 0.75}]
    learning_curve(tmp_path / "a.svg", history)
    svg = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert all(name in svg for name in ("训练 loss", "验证 loss", "验证错误率"))
