"""打包：不丢、不重、不乱切，也不跨文档看。"""

import copy
from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nlp_common.lm.losses import IGNORE
from nlp_common.lm.packing import collate_blocks, cut_long, pack_documents
from pretrain_chinese import causal_lm_loss, heldout_loss

BLOCK = 24
PAD = 0


def numbered(lengths: list[int]) -> list[list[int]]:
    """各文档的 token 全不相同：少一个、多一个、换了次序都看得出来。"""
    documents, start = [], 1
    for n in lengths:
        documents.append(list(range(start, start + n)))
        start += n
    return documents


def random_documents(vocab: int, lengths: list[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, vocab, (n,), generator=generator).tolist() for n in lengths]


# ---- 装块 ----


@settings(max_examples=300, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(0, 3 * BLOCK), max_size=40), block=st.integers(1, BLOCK))
def test_no_token_is_lost_and_no_document_cut_needlessly(lengths, block):
    documents = numbered(lengths)
    blocks = pack_documents(cut_long(documents, block), block)
    pieces = Counter(tuple(piece) for one in blocks for piece in one)
    expected = Counter(
        tuple(doc[i : i + block])  # 不超过一块的文档整篇都在；更长的每满一块切一次
        for doc in documents
        for i in range(0, len(doc), block)
    )
    assert pieces == expected
    assert all(0 < sum(map(len, one)) <= block for one in blocks)
    # 任意两块都并不成一块：没有白白多开的块
    totals = sorted(sum(map(len, one)) for one in blocks)
    assert len(totals) < 2 or totals[0] + totals[1] > block


def test_best_fit_finds_the_perfect_packing():
    lengths = [15, 9, 14, 10, 24, 8, 8, 8]
    blocks = pack_documents(numbered(lengths), BLOCK)
    assert sorted(sorted(map(len, one)) for one in blocks) == [[8, 8, 8], [9, 15], [10, 14], [24]]


def test_packing_is_deterministic():
    documents = random_documents(500, [7, 3, 20, 24, 5, 5, 11] * 5)
    assert pack_documents(documents, BLOCK) == pack_documents(documents, BLOCK)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, BLOCK), min_size=1, max_size=12))
def test_collate_positions_labels_and_padding(lengths):
    blocks = pack_documents(numbered(lengths), BLOCK)
    batch = collate_blocks(blocks, BLOCK, PAD)
    assert {name: tuple(t.shape) for name, t in batch.items()} == dict.fromkeys(
        ("input_ids", "position_ids", "labels"), (len(blocks), BLOCK)
    )
    for row, block in enumerate(blocks):
        ids, positions, labels = (batch[k][row].tolist() for k in ("input_ids", "position_ids", "labels"))
        flat = [token for doc in block for token in doc]
        n = len(flat)
        assert ids == flat + [PAD] * (BLOCK - n)
        assert positions == [i for doc in block for i in range(len(doc))] + [0] * (BLOCK - n)
        # 文档的第一个 token 没有前文，从不当标签；其余的 token 都是标签
        assert labels == [t if i else IGNORE for doc in block for i, t in enumerate(doc)] + [IGNORE] * (
            BLOCK - n
        )


# ---- 打包前后，模型算出来的一样 ----


@pytest.fixture(scope="module")
def packed(model):
    """(文档, 块, 拼好的批)；有装满的块、没装满的块、只有一个 token 的文档。"""
    documents = random_documents(model.config.vocab_size, [11, 13, 9, 6, 8, 24, 1, 4, 17, 1])
    blocks = pack_documents(documents, BLOCK)
    assert len(blocks) > 3 and any(sum(map(len, b)) < BLOCK for b in blocks)
    return documents, blocks, collate_blocks(blocks, BLOCK, PAD)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_packed_logits_equal_each_document_alone(model64, packed, mode):
    _, blocks, batch = packed
    net = copy.deepcopy(model64).train(mode == "train")
    with torch.no_grad():
        logits = net(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        for row, block in enumerate(blocks):
            at = 0
            for doc in block:
                alone = net(input_ids=torch.tensor([doc]), use_cache=False).logits[0]
                torch.testing.assert_close(logits[row, at : at + len(doc)], alone, rtol=0, atol=1e-5)
                at += len(doc)
        # 反例：位置不归零，就会看到前一篇文档，结果不同
        leaky = net(input_ids=batch["input_ids"], use_cache=False).logits
    second = len(next(b for b in blocks if len(b) > 1)[0])
    row = next(i for i, b in enumerate(blocks) if len(b) > 1)
    assert (leaky[row, second] - logits[row, second]).abs().max() > 1e-2


def separate_loss(net, documents) -> tuple[torch.Tensor, int]:
    """一篇一篇地算：损失之和、预测了几个 token。"""
    total, count = torch.zeros(()), 0
    for doc in documents:
        if len(doc) > 1:
            ids = torch.tensor([doc])
            logits = net(input_ids=ids, use_cache=False).logits
            total = total + F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")
            count += len(doc) - 1
    return total, count


def test_packed_loss_and_gradient_equal_the_mean_over_documents_alone(model64, packed):
    documents, blocks, batch = packed
    apart, together = copy.deepcopy(model64), copy.deepcopy(model64)
    total, count = separate_loss(apart, documents)
    (total / count).backward()
    loss = causal_lm_loss(together, batch)[0] / count
    loss.backward()
    assert loss.item() == pytest.approx((total / count).item(), abs=1e-5)
    for (name, ours), theirs in zip(together.named_parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-5, msg=name)
    collate = partial(collate_blocks, block_size=BLOCK, pad_id=PAD)
    for batch_size in (1, 3, 100):
        measured = heldout_loss(copy.deepcopy(model64), blocks, collate, batch_size)
        assert measured == pytest.approx((total / count).item(), abs=1e-5)


def test_causal_lm_loss_equals_a_float64_loop():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 5, 7, generator=generator)
    labels = torch.tensor([[IGNORE, 3, IGNORE, 6, 0], [1, 2, IGNORE, IGNORE, IGNORE]])
    total = 0.0
    for row, column in [(0, 1), (0, 3), (0, 4), (1, 1)]:  # 第 0 列没有前文，不算
        scores = logits[row, column - 1].double()
        total -= (scores[labels[row, column]] - scores.exp().sum().log()).item()

    def net(input_ids, position_ids, use_cache):
        return SimpleNamespace(logits=logits)

    batch = {"input_ids": labels, "position_ids": labels, "labels": labels}
    assert causal_lm_loss(net, batch)[0].item() == pytest.approx(total, abs=4e-6)
