"""只训练上面几层：与冻住下面的层是同一回事；分类层直接求解；平均的句向量不看填充。"""

import copy

import numpy as np
import pytest
import torch
from transformers import BertForSequenceClassification

from nlp_common.base.errors import UserError
from nlp_common.lm.classifier import load_classifier
from nlp_common.lm.mean_pooled import BertForMeanPooledClassification
from nlp_common.tiny.bert import character_tokenizer, small_config
from nlp_common.train.bert import BertSettings
from nlp_common.train.upper import (
    PadVectors,
    fit_last_layer,
    layered_optimizer,
    lower_outputs,
    only_upper,
    with_vectors,
)

TEXTS = ["房间很干净", "太差了", "服务员态度好，早餐也好，下次还来", "后悔"]
LABELS = [1, 0, 1, 0]
KINDS = [BertForSequenceClassification, BertForMeanPooledClassification]


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer(TEXTS, min_count=1)


def make(kind, tokenizer, layers=3, labels=2):
    torch.manual_seed(0)
    config = small_config(len(tokenizer), 32, layers, num_labels=labels, initializer_range=0.3)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    return kind(config)


def encoded(tokenizer):
    ids = tokenizer(TEXTS)["input_ids"]
    return [{"input_ids": x, "labels": label} for x, label in zip(ids, LABELS, strict=True)]


def loss_with_lower_frozen(model, tokenizer, train_layers):
    """照样算整个网络，只是下面的层不更新。"""
    lower = [model.bert.embeddings, *model.bert.encoder.layer[: 3 - train_layers]]
    for module in lower:
        module.requires_grad_(False)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    return model(**batch, labels=torch.tensor(LABELS)).loss


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("train_layers", [1, 2, 3])
def test_two_steps_equal_freezing_the_lower_layers(kind, train_layers, tokenizer):
    ours, reference = make(kind, tokenizer).double(), make(kind, tokenizer).double()
    rows = encoded(tokenizer)
    vectors = lower_outputs(ours, tokenizer, rows, train_layers, dtype=torch.float64, batch_size=3)
    batch = PadVectors()([row | {"vectors": each} for row, each in zip(rows, vectors, strict=True)])
    for _ in range(2):
        theirs = loss_with_lower_frozen(reference, tokenizer, train_layers)
        with only_upper(ours, train_layers):
            mine = ours(**batch).loss
            mine.backward()
        theirs.backward()
        assert mine.item() == pytest.approx(theirs.item(), abs=1e-10)
        for model in (ours, reference):
            trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
            torch.optim.SGD(trained, lr=0.5).step()
            model.zero_grad(set_to_none=True)
    for (name, a), (_, b) in zip(ours.named_parameters(), reference.named_parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-10), name
    start = make(kind, tokenizer).double().state_dict()
    moved = {name for name, value in ours.state_dict().items() if not torch.equal(value, start[name])}
    assert any(name.startswith("bert.encoder.layer.2") for name in moved)
    assert not any(name.startswith("bert.embeddings") for name in moved)
    assert not any(
        name.startswith(f"bert.encoder.layer.{i}") for i in range(3 - train_layers) for name in moved
    )


@pytest.mark.parametrize("kind", KINDS)
def test_stored_as_float16_changes_the_scores_by_less_than_a_thousandth(kind, tokenizer):
    model = make(kind, tokenizer).eval()
    rows = with_vectors(model, tokenizer, {"all": encoded(tokenizer)}, 1, bf16=False)["all"]
    assert {row["vectors"].dtype for row in rows} == {torch.float16}
    assert [len(row["vectors"]) for row in rows] == [len(row["input_ids"]) for row in rows]  # 没有填充
    with torch.inference_mode(), only_upper(model, 1):
        ours = model(**PadVectors()(rows)).logits
    with torch.inference_mode():
        theirs = model(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits
    assert (ours - theirs).abs().max() < 1e-3 * theirs.abs().max() + 1e-3


def test_the_model_is_whole_again_even_after_an_error(tokenizer):
    model = make(BertForMeanPooledClassification, tokenizer)
    before = list(model.state_dict())
    with pytest.raises(KeyboardInterrupt), only_upper(model, 1):
        assert not any("word_embeddings" in name for name in model.state_dict())
        assert sum("query.weight" in name for name in model.state_dict()) == 1
        raise KeyboardInterrupt
    assert list(model.state_dict()) == before
    with only_upper(model, None):
        assert list(model.state_dict()) == before
    with pytest.raises(UserError, match="--train_layers 最多 3"):
        with_vectors(model, tokenizer, {"all": encoded(tokenizer)}, 4, bf16=False)


def test_lower_layers_learn_slower(tokenizer):
    model = make(BertForMeanPooledClassification, tokenizer)
    settings = BertSettings(learning_rate=1.0, weight_decay=0.1, layer_decay=0.5)
    rates = {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in layered_optimizer(model, settings).param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            rates[name] = group["lr"]
            assert group["weight_decay"] == (
                0.1 if name.endswith("weight") and "LayerNorm" not in name else 0.0
            )
    assert len(rates) == len(names)
    assert rates["classifier.weight"] == 1.0
    assert [rates[f"bert.encoder.layer.{i}.output.dense.bias"] for i in (2, 1, 0)] == [0.5, 0.25, 0.125]
    assert rates["bert.embeddings.word_embeddings.weight"] == 0.0625
    assert layered_optimizer(model, BertSettings(layer_decay=1.0)) is None  # 都一样：用 Trainer 自己的


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_classes", [2, 3])
def test_last_layer_is_the_logistic_regression(kind, n_classes, tokenizer):
    from sklearn.linear_model import LogisticRegression

    model = make(kind, tokenizer, labels=4).eval()  # 四类里有的一行也没有
    rng = np.random.default_rng(0)
    labels = rng.integers(0, n_classes, 60) + 1
    rows = [
        {"vectors": torch.tensor(rng.normal(size=(1, 32)) + label, dtype=torch.float16), "labels": int(label)}
        for label in labels
    ]
    found = fit_last_layer(model, rows[:40], rows[40:])
    with torch.inference_mode(), only_upper(model, 0):
        probs = model(**PadVectors()(rows)).logits.softmax(-1)
    assert found["validation_accuracy"] == (probs.argmax(-1).numpy() == labels)[40:].mean()
    assert probs[:, [i for i in range(4) if i not in set(labels)]].max() < 1e-6
    features = torch.stack([row["vectors"][0] for row in rows]).float()
    if model.bert.pooler is not None:
        features = model.bert.pooler(features[:, None])
    features = features.detach().numpy()
    mean, scale = features[:40].mean(0), features[:40].std(0) + 1e-6
    candidates = []
    for strength in (0.001, 0.01, 0.1, 1.0):
        fitted = LogisticRegression(C=strength, max_iter=1000).fit(
            (features[:40] - mean) / scale, labels[:40]
        )
        candidates.append(fitted.predict_proba((features - mean) / scale))
    gaps = [np.abs(probs[:, sorted(set(labels))].numpy() - each).max() for each in candidates]
    assert min(gaps) < 1e-4


def test_mean_pooling_ignores_padding_and_the_folder_remembers_it(tokenizer, tmp_path):
    model = make(BertForMeanPooledClassification, tokenizer).eval()
    together = tokenizer(TEXTS, padding=True, return_tensors="pt")
    alone = [tokenizer([text], return_tensors="pt") for text in TEXTS]
    with torch.inference_mode():
        rows = torch.cat([model(**each).logits for each in alone])
        assert torch.allclose(model(**together).logits, rows, atol=1e-6)
        hidden = model.bert(**alone[0]).last_hidden_state
        assert torch.allclose(model.classifier(hidden[0].mean(0)), rows[0], atol=1e-6)
    model.config.classifier_pooling = "mean"
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = load_classifier(tmp_path)[1].eval()
    assert type(again) is BertForMeanPooledClassification
    with torch.inference_mode():
        assert torch.allclose(again(**together).logits, model(**together).logits, atol=1e-5)
    plain = copy.deepcopy(make(BertForSequenceClassification, tokenizer))
    plain.save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    assert type(load_classifier(tmp_path / "plain")[1]) is BertForSequenceClassification
