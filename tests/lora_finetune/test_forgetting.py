"""forgetting.py：EWC 的 Fisher 与罚、O-LoRA 的罚，与手算的例子相同；罚加进训练循环的分量对。"""

import copy

import pytest
import torch
from torch import nn

from forgetting import (
    ewc_penalty,
    fisher_diagonal,
    main_directions,
    orthogonality_penalty,
    own_replies,
    penalised_loss,
)
from lora_by_hand import add_lora, lora_layers, trainable
from nlp_common.lm.chat_rows import answer_loss, chat_row, collate
from nlp_common.lm.losses import IGNORE, count_labels
from nlp_common.tiny import world


class Coin(nn.Module):
    """不看输入的"语言模型"：每个位置的 logits 都是 θ，所以一切都算得出来。"""

    def __init__(self, theta):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta))

    def forward(self, input_ids, use_cache=False, logits_to_keep=0):
        logits = self.theta.expand(*input_ids.shape, -1)
        return type("Out", (), {"logits": logits[:, logits_to_keep]})()


def coin_batch(tokens: list[int]) -> dict:
    return {"input_ids": torch.tensor([[0, *tokens]]), "labels": torch.tensor([[IGNORE, *tokens]])}


def test_fisher_of_a_coin_by_hand():
    """p = (1/4, 3/4)。∂ log p(y)/∂θ = onehot(y) − p：y=0 给 (3/4, −3/4)，y=1 给 (−1/4, 1/4)。

    按 p 采样四次恰好一次 0、三次 1：F = 1/4·9/16 + 3/4·1/16 = 3/16 = p(1 − p)，伯努利分布的 Fisher 信息。
    """
    model = Coin([0.0, torch.log(torch.tensor(3.0)).item()])
    batches = [coin_batch([y]) for y in (0, 1, 1, 1)]
    fisher = fisher_diagonal(model, batches, trainable(model))
    torch.testing.assert_close(fisher["theta"], torch.tensor([3 / 16, 3 / 16]))


def test_a_row_is_summed_before_it_is_squared():
    """一行两个 token（0、0）：梯度是 2·(3/4, −3/4)，平方 9/4；不是 2·9/16。"""
    model = Coin([0.0, torch.log(torch.tensor(3.0)).item()])
    fisher = fisher_diagonal(model, [coin_batch([0, 0])], trainable(model))
    torch.testing.assert_close(fisher["theta"], torch.tensor([9 / 4, 9 / 4]))


def test_ewc_penalty_by_hand():
    """λ/2 · Σ F (θ − θ*)² = 10/2 · (2·1² + 0.5·2²) = 20；∂/∂θ = λ F (θ − θ*) = (20, −10)。"""
    model = Coin([1.0, -2.0])
    memory = ({"theta": torch.zeros(2)}, {"theta": torch.tensor([2.0, 0.5])})
    penalty = ewc_penalty(model, [memory], strength=10.0)
    penalty.backward()
    assert penalty.item() == pytest.approx(20.0)
    torch.testing.assert_close(model.theta.grad, torch.tensor([20.0, -10.0]))
    assert ewc_penalty(model, [memory, memory], 10.0).item() == pytest.approx(40.0)


def test_orthogonality_by_hand():
    """A_旧 = (1, 0)，A = [(3, 4), (0, 1)]：A_旧 Aᵀ = (3, 0)，λ·9；∂/∂A = 2λ A A_旧ᵀ A_旧。"""
    model = nn.Sequential(nn.Linear(2, 2))
    add_lora(model, "0", 2, 2)
    (name, layer), *_ = lora_layers(model).items()
    with torch.no_grad():
        layer.A.copy_(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
    penalty = orthogonality_penalty(model, [{name: torch.tensor([[1.0, 0.0]])}], strength=2.0)
    penalty.backward()
    assert penalty.item() == pytest.approx(18.0)
    torch.testing.assert_close(layer.A.grad, torch.tensor([[12.0, 0.0], [0.0, 0.0]]))


def test_main_directions_are_the_rows_of_a_lora():
    """ΔW 真的是 BA 时，取出的方向张成 A 的行空间：投影回去一点不少；垂直的 A，罚是 0。"""
    torch.manual_seed(0)
    a, b = torch.randn(3, 10, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    directions = main_directions(b @ a, 3)
    torch.testing.assert_close(a @ directions.T @ directions, a)
    torch.testing.assert_close(directions @ directions.T, torch.eye(3, dtype=torch.float64))


def test_the_penalty_joins_the_mean_loss(model, chat_tokenizer):
    """循环把损失除以标签的个数：除完恰好是 平均损失 + 罚。"""
    learner = copy.deepcopy(model)
    add_lora(learner, "all", 2, 4)
    rows = [chat_row(chat_tokenizer, chat["messages"]) for chat in world.chats(3, seed=0)]
    batch = collate(rows, chat_tokenizer.pad_token_id)
    n = count_labels(batch)
    plain = answer_loss(learner, batch)[0] / n
    joined = penalised_loss(learner, batch, lambda model: torch.tensor(0.7))[0] / n
    assert (joined - plain).item() == pytest.approx(0.7, abs=1e-5)


def test_own_replies_label_only_the_reply(model, chat_tokenizer):
    batches = own_replies(model, chat_tokenizer, world.heldout_questions(4, 0), seed=0)
    again = own_replies(model, chat_tokenizer, world.heldout_questions(4, 0), seed=0)
    assert len(batches) == 4
    for batch, same in zip(batches, again, strict=True):
        assert torch.equal(batch["input_ids"], same["input_ids"])
        learned = batch["labels"][0] != IGNORE
        start = int(learned.nonzero()[0])
        assert learned[start:].all() and not learned[:start].any()
        assert torch.equal(batch["labels"][0, start:], batch["input_ids"][0, start:])
