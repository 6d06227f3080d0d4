"""label_errors.py：余地手算、等于 cleanlab 的 normalized margin；画线一行不差地等于 cleanlab；标反的对找得出来。"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from label_errors import (
    answer_doubts,
    batches_of,
    confident_errors,
    flipped_pairs,
    fold_of,
    pair_margins,
    token_margins,
)
from nlp_common.lm.chat_rows import chat_row
from nlp_common.lm.loading import load_chat_lm
from nlp_common.lm.losses import IGNORE
from nlp_common.tiny import world


@pytest.fixture(scope="module")
def tiny(base_folder):
    return load_chat_lm(str(base_folder), torch.device("cpu"))


def test_token_margins_by_hand():
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.05, 0.15, 0.8]])
    margins, choice = token_margins(probabilities, torch.tensor([0, 1]))
    assert margins.tolist() == pytest.approx([0.5, -0.65])
    assert choice.tolist() == [1, 2]


def some_labels(seed: int, n: int, k: int, noise: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """真的类，标的类（noise 成标错了），概率：多半信真的类。"""
    rng = np.random.default_rng(seed)
    truth = np.arange(n) % k
    labels = np.where(rng.random(n) < noise, (truth + rng.integers(1, k, n)) % k, truth)
    logits = rng.normal(size=(n, k)) + 3 * np.eye(k)[truth]
    return truth, labels, np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


@pytest.mark.parametrize(
    ("seed", "k", "noise"), [(0, 2, 0.1), (1, 2, 0.3), (2, 3, 0.2), (3, 5, 0.1), (4, 4, 0.0)]
)
def test_lines_equal_cleanlab(seed, k, noise):
    cleanlab = pytest.importorskip("cleanlab.filter", reason="没有装 cleanlab，不比")
    _, labels, probabilities = some_labels(seed, 400, k, noise)
    wanted = cleanlab.find_label_issues(labels, probabilities, filter_by="confident_learning", n_jobs=1)
    assert (confident_errors(labels, probabilities) == wanted).all()


def test_token_margins_equal_cleanlab():
    rank = pytest.importorskip("cleanlab.rank", reason="没有装 cleanlab，不比")
    _, labels, probabilities = some_labels(0, 200, 6, 0.2)
    wanted = rank.get_normalized_margin_for_each_label(labels, probabilities)  # 换算到 0 … 1
    ours = token_margins(torch.tensor(probabilities), torch.tensor(labels))[0].numpy()
    assert np.abs((ours + 1) / 2 - wanted).max() < 1e-9


def test_confident_errors_find_most_of_them():
    truth, labels, probabilities = some_labels(5, 2000, 2, 0.15)
    found, wrong = confident_errors(labels, probabilities), labels != truth
    assert (found & wrong).sum() > 0.85 * wrong.sum() and (found & wrong).sum() > 0.85 * found.sum()
    assert not confident_errors(np.zeros(5, int), np.full((5, 2), 0.5)).any()  # 只有一类，也算得出


def test_flipped_pairs():
    margins = np.array([2.0] * 40 + [-2.0] * 4 + [0.1] * 4)
    shown = np.arange(48) % 2 == 0
    assert np.flatnonzero(flipped_pairs(margins, shown)).tolist() == [40, 41, 42, 43]


@given(st.integers(2, 200), st.integers(2, 7), st.integers(0, 50))
@settings(max_examples=50, deadline=None)
def test_folds_are_equal_in_size(n, folds, seed):
    which = fold_of(n, folds, seed)
    sizes = np.bincount(which, minlength=folds)
    assert len(which) == n and sizes.max() - sizes.min() <= 1
    assert (which == fold_of(n, folds, seed)).all()


def test_doubts_equal_one_row_at_a_time(tiny):
    """拼批、填充、移位都不差一格：与一段一段、一个 token 一个 token 算的一样。"""
    tokenizer, model = tiny
    chats = world.chats(6, 0)
    doubts = answer_doubts(model, tokenizer, chats)
    for chat, doubt in zip(chats, doubts, strict=True):
        row = chat_row(tokenizer, chat["messages"])
        with torch.no_grad():
            probabilities = model(torch.tensor([row["input_ids"]])).logits[0].softmax(-1)  # (T, V)
        margins = []
        for place, label in enumerate(row["labels"]):
            if label != IGNORE:
                others = probabilities[place - 1].clone()
                others[label] = -1
                margins.append((probabilities[place - 1, label] - others.max()).item())
        assert doubt.margin == pytest.approx(min(margins), abs=1e-5)


def test_pair_margins_equal_dpo(tiny, dpo):
    """与 dpo_chinese_qwen.py 的 margin 一样；模型就是参考模型时是 0。"""
    tokenizer, model = tiny
    pairs = world.pairs(5, 0)
    assert np.abs(pair_margins(model, model, tokenizer, pairs, 0.3)).max() < 1e-6
    torch.manual_seed(0)
    import copy

    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    rows = [dpo.encode(tokenizer, pair) for pair in pairs]
    ours = dpo.logps_of(other, rows, tokenizer.pad_token_id, 2)
    theirs = dpo.logps_of(model, rows, tokenizer.pad_token_id, 2)
    wanted = dpo.dpo_loss(*ours.T, *theirs.T, 0.3)[1]
    assert pair_margins(other, model, tokenizer, pairs, 0.3) == pytest.approx(wanted.tolist(), abs=1e-4)


@given(st.lists(st.integers(1, 500), max_size=200), st.sampled_from([600, 150_000]))
@settings(max_examples=50, deadline=None)
def test_batches_hold_every_row_once_and_are_small(lengths, vocab_size):
    batches = list(batches_of(lengths, vocab_size))
    assert sorted(place for batch in batches for place in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[place] for place in batch)
        assert len(batch) == 1 or (len(batch) <= 64 and len(batch) * longest * vocab_size <= 1 << 26)
