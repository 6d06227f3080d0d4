"""偏好对的提示只算一遍：对数概率、分数与梯度都与两行分开算时相等；没有共用的提示就不并。"""

import copy

import pytest
import torch

from nlp_common.fast.rms_norm import use_fused_norms
from nlp_common.fast.shared_prompts import merge_pairs
from nlp_common.lm.loading import load_reward_model
from nlp_common.lm.losses import IGNORE, token_logps
from nlp_common.lm.pairs import collate_pairs

PAD = 0


def random_pairs(sizes: list[tuple[int, int, int]]) -> list[dict]:
    """sizes：每对的提示、好回答、差回答各几个 token。"""
    generator = torch.Generator().manual_seed(0)

    def ids(n):
        return torch.randint(5, 500, (n,), generator=generator).tolist()

    return [{"prompt_ids": ids(p), "chosen_ids": ids(c), "rejected_ids": ids(r)} for p, c, r in sizes]


SIZES = [(20, 3, 5), (17, 6, 1), (25, 1, 2), (4, 2, 3)]


@pytest.fixture
def batch():
    pairs = random_pairs(SIZES)
    pairs[1]["rejected_ids"] = pairs[1]["chosen_ids"][:2]  # 差回答是好回答的开头：连回答也有共用的
    return collate_pairs(pairs, PAD)


def separately(model):
    """同样的权重，没有装 use_read_columns 的模型：每一行都照常算。"""
    other = type(model)(model.config).to(model.dtype)
    other.load_state_dict(model.state_dict())
    return use_fused_norms(other.eval())


def assert_same_gradients(model, reference):
    for (name, p), q in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q[1].grad, rtol=0, atol=1e-10, msg=name)


def columns_seen(model) -> list[int]:
    """骨干每次算几列。"""
    widths = []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    return widths


def test_logps_and_gradients_equal_the_separate_rows(model64, batch):
    model, reference = copy.deepcopy(model64).eval(), separately(model64)
    widths = columns_seen(model)
    both = [token_logps(each, batch["input_ids"], batch["labels"]) for each in (model, reference)]
    torch.testing.assert_close(both[0], both[1], rtol=0, atol=1e-12)
    for logps in both:
        logps.tanh().sum().backward()
    assert_same_gradients(model, reference)
    assert len(widths) == 1 and widths[0] < 2 * batch["input_ids"].shape[1] * 0.85  # 真的并了


def test_scores_and_gradients_equal_the_separate_rows(reward_folder, chat_tokenizer, batch):
    model = load_reward_model(str(reward_folder), chat_tokenizer).eval().double()
    model.config.pad_token_id = PAD
    reference, widths = separately(model), columns_seen(model)
    both = [each(input_ids=batch["input_ids"], use_cache=False).logits for each in (model, reference)]
    torch.testing.assert_close(both[0], both[1], rtol=0, atol=1e-12)
    for scores in both:
        scores.tanh().sum().backward()
    assert_same_gradients(model, reference)
    assert widths[0] < 2 * batch["input_ids"].shape[1] * 0.85


def test_where_tokens_go_and_what_they_see():
    """手算一对：提示 2 个 token，好回答 1 个，差回答 2 个；另一对提示 1 个。"""
    input_ids = torch.tensor([[7, 8, 9, 0], [7, 5, 6, 0], [7, 8, 3, 4], [7, 1, 0, 0]])
    rows = torch.tensor([0, 1, 2, 3])
    merged = merge_pairs(input_ids, rows, torch.tensor([2, 2, 3, 1]))
    # 列：提示 2 | 好回答 2 | 差回答 2
    assert merged.input_ids[0, [0, 1, 2, 4, 5]].tolist() == [7, 8, 9, 3, 4]
    assert merged.input_ids[1, [1, 2, 3, 4]].tolist() == [7, 5, 6, 1]
    assert merged.position_ids[0, [0, 1, 2, 4, 5]].tolist() == [0, 1, 2, 2, 3]
    sees = merged.attention_mask[0, 0].long()
    assert sees[5].tolist() == [1, 1, 0, 0, 1, 1]  # 差回答看不到好回答
    assert sees[2].tolist() == [1, 1, 1, 0, 0, 0]
    assert merged.attention_mask[1, 0, 2].tolist() == [False, True, True, False, False, False]  # 左填充没人看
    where = merged.locate(torch.tensor([0, 0, 2, 2]), torch.tensor([1, 2, 1, 3]))
    assert where[0].tolist() == [0, 0, 0, 0] and where[1].tolist() == [1, 2, 1, 5]


def test_rows_without_a_shared_prompt_are_left_alone(model64):
    ids = torch.randint(5, 500, (4, 12), generator=torch.Generator().manual_seed(1))
    last = torch.full((4,), 11)
    assert merge_pairs(ids, torch.arange(4), last) is None
    assert merge_pairs(ids[:3], torch.arange(3), last[:3]) is None  # 单数行
    labels = ids.clone()
    labels[:, :8] = IGNORE
    torch.testing.assert_close(
        token_logps(model64, ids, labels), token_logps(separately(model64), ids, labels), rtol=0, atol=1e-12
    )
