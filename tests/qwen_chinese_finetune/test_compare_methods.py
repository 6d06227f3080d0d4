"""十种方法的比较：损失与 TRL 相等；DPO 在两个回答的世界里学到公式说的；平均与标准误差。"""

import types

import pytest
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from nlp_common.base.errors import UserError
from nlp_common.tiny import world


@pytest.fixture
def numbers(methods):
    """六对的对数概率，float64。"""
    generator = torch.Generator().manual_seed(0)
    draw = [-3 * torch.rand(6, generator=generator, dtype=torch.float64) - 0.1 for _ in range(4)]
    lengths = [torch.randint(1, 9, (6,), generator=generator) for _ in range(2)]
    return methods.Pairs(*draw, *lengths)


def test_orpo_equals_trl(methods, numbers):
    chosen, rejected = numbers.chosen / numbers.n_chosen, numbers.rejected / numbers.n_rejected
    stand_in = types.SimpleNamespace(beta=0.3, accelerator=types.SimpleNamespace(device="cpu"))
    ratio = ORPOTrainer.odds_ratio_loss(stand_in, chosen, rejected)[0]
    torch.testing.assert_close(methods.orpo(numbers, 0.3), -chosen - ratio.double(), rtol=0, atol=1e-6)


def test_simpo_equals_trl(methods, numbers):
    stand_in = types.SimpleNamespace(
        alpha=0.0,
        loss_type="simpo",
        simpo_gamma=0.5,
        beta=2.0,
        label_smoothing=0.0,
        accelerator=types.SimpleNamespace(device="cpu"),
    )
    means = numbers.chosen / numbers.n_chosen, numbers.rejected / numbers.n_rejected
    torch.testing.assert_close(
        methods.simpo(numbers, 2.0), CPOTrainer.cpo_loss(stand_in, *means)[0], rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(
    "name, types_of, weights",
    [
        ("dpo", ["sigmoid"], [1.0]),
        ("ipo", ["ipo"], [1.0]),
        ("hinge", ["hinge"], [1.0]),
    ],
)
def test_pair_losses_equal_trl(
    name, types_of, weights, methods, dpo, model64, reference64, chat_tokenizer, trainer_args, plain_copy
):
    """同样的一批偏好对，同一个损失。"""
    rows = [dpo.encode(chat_tokenizer, row) for row in world.pairs(6, 4)]
    ref = dpo.logps_of(reference64, rows, chat_tokenizer.pad_token_id, 6).double()
    for row in rows:
        row["ref_chosen"] = row["ref_rejected"] = 0.0
    batch = dpo.collate(rows, chat_tokenizer.pad_token_id) | {"ref_logps": ref.T.flatten()}
    ours = methods.pair_loss(model64, batch, methods.METHODS[name][0], 0.3)[0] / 6

    text = Dataset.from_list([{"prompt": "问", "chosen": "好", "rejected": "差"}] * 6)
    config = DPOConfig(
        **trainer_args(DPOConfig), max_length=None, beta=0.3, loss_type=types_of, loss_weights=weights
    )
    plain, plain_reference = (plain_copy(each) for each in (model64, reference64))
    trainer = DPOTrainer(
        plain, plain_reference, args=config, train_dataset=text, processing_class=chat_tokenizer
    )
    mask = (batch["labels"] != -100).long()
    sizes = [len(r["prompt_ids"]) + len(r[key]) for key in ("chosen_ids", "rejected_ids") for r in rows]
    width = batch["input_ids"].shape[1]
    inputs = {
        "input_ids": batch["input_ids"],
        "completion_mask": mask,
        "attention_mask": torch.tensor([[1] * n + [0] * (width - n) for n in sizes]),
    }
    theirs = trainer._compute_loss(plain, inputs, False)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)


def test_rpo_is_dpo_and_the_sft_term(methods, numbers):
    expected = methods.dpo(numbers, 0.3) - numbers.chosen / numbers.n_chosen
    torch.testing.assert_close(methods.rpo(numbers, 0.3), expected, rtol=0, atol=0)


def test_dpo_learns_the_closed_form_on_two_answers(methods):
    for rewards, reference, beta in (((2.0, 0.0), (0.3, 0.7), 0.7), ((0.0, 0.5), (0.9, 0.1), 0.1)):
        learned, formula = methods.bandit(rewards, reference, beta)
        torch.testing.assert_close(learned, formula, rtol=0, atol=1e-6)
    naive = torch.tensor([0.3, 0.7], dtype=torch.float64)
    assert (methods.bandit((2.0, 0.0), (0.3, 0.7), 0.7)[0] - naive).abs().max() > 0.1


def test_summary_has_the_standard_error(methods):
    found = methods.summary([{"judge_score": v, "kl_per_answer": 1.0} for v in (0.8, 0.9, 1.0)])
    assert found["judge_score"] == pytest.approx(0.9)
    assert found["judge_score_error"] == pytest.approx(0.1 / 3**0.5)


def test_unknown_methods_and_full_are_refused(methods):
    with pytest.raises(UserError, match=r"不认识 abc.*simpo"):
        methods.main(["--preset", "tiny", "--methods", "dpo,abc"])
    with pytest.raises(UserError, match="--model、--eval_dataset 用不上"):
        methods.main(["--preset", "tiny", "--model", "smollm2"])
    for arguments in (["--preset", "full"], ["--preset", "tiny", "--dataset", "我的.jsonl"]):
        with pytest.raises(UserError, match="只在小世界里"):
            methods.main(arguments)
    with pytest.raises(UserError, match="METHODS"):
        methods.main(["--preset", "tiny", "--learning_rate", "1e-3"])
