"""困惑度：与逐段的 transformers 损失相同，窗口的数一遍不漏，语法的下限，n 元模型的概率和为 1。"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import language_metrics as lm
from nlp_common.tiny import world

ROWS = [[5, 9, 30, 7, 12, 40], [3, 8], [11, 4, 4, 60, 21, 33, 2, 19, 70, 6, 15]]


def test_losses_equal_transformers(model64):
    losses = lm.token_losses(model64, ROWS, batch_size=2)
    for ids, row in zip(ROWS, losses, strict=True):
        theirs = model64(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss
        assert len(row) == len(ids) - 1
        assert row.mean().item() == pytest.approx(theirs.item(), abs=1e-6)  # 交叉熵里转成了 float32


def test_three_averages_by_hand():
    losses = [torch.tensor([1.0, 1.0, 1.0, 1.0]).double(), torch.tensor([3.0]).double()]
    found = lm.perplexities(losses)
    assert found["token_weighted"] == pytest.approx(math.exp(7 / 5))
    assert found["mean_of_losses"] == pytest.approx(math.exp(2))
    assert found["mean_of_perplexities"] == pytest.approx((math.e + math.exp(3)) / 2)
    assert lm.corpus_perplexity([(4.0, 4), (3.0, 1)]) == pytest.approx(found["token_weighted"])
    assert lm.bits_per_char([(math.log(2) * 6, 3)]) == pytest.approx(2.0)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 40), st.integers(2, 12), st.data())
def test_every_token_once(model64, length, window, data):
    """窗口怎样挪，每个 token 都正好算一次；与逐个 token、自己截好前文的算法相同。"""
    stride = data.draw(st.integers(1, window - 1))
    ids = torch.randint(0, 100, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    losses, forwarded = lm.strided_losses(model64, ids, window, stride)
    assert len(losses) == length - 1 and forwarded >= length
    for t in range(1, length):
        # 第 t 个 token 是哪个窗口里新来的：它看得见的前文从那个窗口的头开始
        number = 0 if t < window else (t - window) // stride + 1
        start = number * stride
        context = torch.tensor([ids[start : t + 1]])
        logits = model64(input_ids=context).logits[0, -2].float()
        assert losses[t - 1].item() == pytest.approx(-logits.log_softmax(-1)[ids[t]].item(), abs=1e-5)


def test_wide_window_is_the_whole(model64):
    ids = ROWS[2]
    whole = lm.token_losses(model64, [ids])[0]
    assert torch.allclose(lm.strided_losses(model64, ids, 50, 10)[0], whole)
    cut, _ = lm.cut_losses(model64, ids, 4)
    assert len(cut) == len(ids) - 3  # 三块，块头的 token 不算
    assert torch.allclose(cut[:3], whole[:3])
    with pytest.raises(ValueError, match="stride"):
        lm.strided_losses(model64, ids, 4, 4)


def test_grammar_knows_its_entropy():
    """第一句的信息量 = 时间、人、地点与两种写法的选择；整篇的来自 world。"""
    rows = lm.mixed_documents(40, 0)
    assert [row["kind"] for row in rows] == ["document"] * 20 + ["opening"] * 20
    wanted = math.log(6 * 10 * 10 * 2)
    for row in rows:
        if row["kind"] == "opening":
            assert row["nats"] == pytest.approx(wanted) and row["text"].endswith("。")
    assert rows[:20] == [row | {"kind": "document"} for row in world.documents(20, 0, heldout=True)]


def test_ngram_probabilities_sum_to_one():
    model = lm.NgramModel(3, 5).learn(["ababc", "abd"])
    for context in ("", "a", "ab", "cd", "zz"):
        total = sum(model.probability(context + unit, len(context)) for unit in "abcde")
        assert total == pytest.approx(1.0)
    # 手算：没有前文时 p(a)：a b c d 共 4 种、8 次，a 3 次 → (3 + 4/5) / (8 + 4)
    assert model.probability("a", 0) == pytest.approx((3 + 4 / 5) / 12)


def test_ngram_never_beats_the_grammar():
    """没见过的文档上，任何模型的每字比特都不低于语法的熵；单位小，每单位的困惑度就小，不说明模型好。"""
    train = [row["text"] for row in world.documents(300, 0)]
    rows = world.documents(30, 5, heldout=True)
    chars = sum(len(row["text"]) for row in rows)
    floor = sum(row["nats"] for row in rows) / chars
    by_char = lm.NgramModel(4, 600).learn(train)
    by_byte = lm.NgramModel(4, 256).learn([text.encode() for text in train])
    nats_char = sum(by_char.nats(row["text"]) for row in rows)
    nats_byte = sum(by_byte.nats(row["text"].encode()) for row in rows)
    assert floor < nats_char / chars < nats_byte / chars
    assert nats_byte / (3 * chars) < nats_char / chars  # 每字节的困惑度反而低
