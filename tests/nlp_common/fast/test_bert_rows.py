"""BERT 的最后一层只算有人读的位置：数值与梯度和照常算的一样，存下来的文件夹也一样。"""

import copy

import pytest
import torch
from transformers import BertForMaskedLM, BertForSequenceClassification

from nlp_common.fast.bert_rows import chosen_outputs, use_read_rows
from nlp_common.lm.mean_pooled import BertForMeanPooledClassification
from nlp_common.tiny.bert import small_config


def make(kind, implementation="eager"):
    torch.manual_seed(0)
    config = small_config(60, 128, 2, initializer_range=0.2, num_labels=3)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    return kind._from_config(config, attn_implementation=implementation).double()


def batch():
    ids = torch.randint(5, 60, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return ids, mask


def assert_same_gradients(ours, reference):
    for (name, a), (_, b) in zip(ours.named_parameters(), reference.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        assert a.grad is None or torch.allclose(a.grad, b.grad, atol=1e-12), name


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("masked", [False, True])
def test_classification(implementation, masked):
    reference = make(BertForSequenceClassification, implementation).train()
    ours = use_read_rows(copy.deepcopy(reference))
    ids, mask = batch()
    inputs = {"attention_mask": mask} if masked else {}
    labels = torch.tensor([0, 1, 2])
    theirs, mine = (model(ids, labels=labels, **inputs) for model in (reference, ours))
    assert torch.allclose(mine.logits, theirs.logits, atol=1e-12)
    mine.loss.backward()
    theirs.loss.backward()
    assert_same_gradients(ours, reference)
    shapes = []
    ours.bert.encoder.layer[-1].intermediate.register_forward_hook(
        lambda *a: shapes.append(tuple(a[2].shape))
    )
    ours(ids, **inputs)
    assert shapes == [(3, 1, 512)]  # MLP 真的只算了一个位置
    assert ours(ids, output_hidden_states=True).hidden_states[-1].shape == (3, 9, 128)


def test_masked_words():
    reference = make(BertForMaskedLM).train()
    ours = use_read_rows(copy.deepcopy(reference))
    ids, mask = batch()
    chosen = torch.zeros_like(ids, dtype=torch.bool)
    chosen[0, 3] = chosen[2, 1] = chosen[2, 8] = True
    outputs = [chosen_outputs(model, ids, mask, chosen) for model in (ours, reference)]
    assert outputs[0].shape == (3, 128) and torch.allclose(*outputs, atol=1e-12)
    for model, hidden in zip((ours, reference), outputs, strict=True):
        model.cls(hidden).logsumexp(-1).sum().backward()
    assert_same_gradients(ours, reference)
    assert torch.allclose(ours(ids).logits, reference(ids).logits, atol=1e-12)  # 照常调用，照常全算


def test_a_copy_and_the_saved_folder_are_independent(tmp_path):
    ours = use_read_rows(make(BertForSequenceClassification)).eval()
    ids, _ = batch()
    other = copy.deepcopy(ours)
    with torch.no_grad():
        other.bert.encoder.layer[-1].output.dense.weight.zero_()
        assert not torch.allclose(other(ids).logits, ours(ids).logits)
    ours.save_pretrained(tmp_path)
    again = BertForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert torch.allclose(again(ids).logits, ours(ids).logits, atol=1e-12)


def test_models_that_read_every_position_are_left_alone():
    model = make(BertForMeanPooledClassification)
    assert use_read_rows(model) is model and "forward" not in vars(model.bert.encoder.layer[-1])
