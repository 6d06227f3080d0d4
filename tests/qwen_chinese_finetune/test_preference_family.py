"""KTO、换名字的 DPO、best-of-K、十种方法的比较：损失与 TRL 相等，数据照说好的造，脚本从头到尾走一遍。"""

import json
import random
import types

import pytest
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from nlp_common.base.errors import UserError
from nlp_common.data.chats import to_thumbs
from nlp_common.lm.loading import load_tokenizer
from nlp_common.lm.replies import reply_to, score_replies
from nlp_common.lm.rollout import with_prompts
from nlp_common.tiny import world

# 几步就完的设置：只看走得通、写对了
FEW = ["--preset", "tiny", "--max_steps", "2", "--max_eval_samples", "6"]


@pytest.fixture(scope="module")
def kto(load_script):
    return load_script("kto_alignment")


@pytest.fixture(scope="module")
def identity(load_script):
    return load_script("identity_dpo")


@pytest.fixture(scope="module")
def best_of_k(load_script):
    return load_script("best_of_k_sft")


@pytest.fixture(scope="module")
def methods(load_script):
    return load_script("compare_methods")


# ---------------------------------------------------------------- KTO


def thumbs_rows(kto, n: int) -> list[dict]:
    return kto.thumbs(world.pairs(n, 3), 0.5, 0.0, random.Random(0))


def test_kto_loss_by_hand(kto):
    ratio = torch.tensor([0.7, -0.4], dtype=torch.float64)
    good = torch.tensor([True, False])
    losses = kto.kto_loss(ratio, good, torch.tensor(0.2, dtype=torch.float64), 0.5, (1.5, 2.0))
    # 赞：1.5·(1 − σ(0.5·(0.7 − 0.2)))；踩：2·(1 − σ(0.5·(0.2 + 0.4)))
    expected = [1.5 * (1 - 1 / (1 + 2.718281828459045**-0.25)), 2 * (1 - 1 / (1 + 2.718281828459045**-0.3))]
    assert losses.tolist() == pytest.approx(expected, abs=1e-12)


def test_reference_point_is_never_negative_and_has_no_gradient(kto):
    ratio = torch.tensor([-1.0, -3.0], requires_grad=True)
    assert kto.reference_point(ratio).item() == 0
    point = kto.reference_point(ratio + 5)
    assert point.item() == pytest.approx(3) and not point.requires_grad


def test_kto_loss_equals_trl(kto, dpo, model64, reference64, chat_tokenizer, trainer_args):
    """同样的一批（连张冠李戴的回答）交给 TRL 的 KTOTrainer 算：同一个损失、同样的梯度。"""
    rows = kto.encode(chat_tokenizer, thumbs_rows(kto, 8))
    assert {row["good"] for row in rows} == {True, False}
    dpo.add_references(reference64, rows, 0, 8)
    batch = kto.collate(rows, chat_tokenizer.pad_token_id)
    batch["ref_logps"] = batch["ref_logps"].double()
    model64.zero_grad()
    ours, _ = kto.batch_loss(model64, batch, 0.3, (1.25, 1.0))
    (ours / 8).backward()
    gradients = {name: p.grad.clone() for name, p in model64.named_parameters() if p.grad is not None}

    text = Dataset.from_list([{"prompt": "问", "completion": "好", "label": True}] * 8)
    config = KTOConfig(**trainer_args(KTOConfig), beta=0.3, desirable_weight=1.25, max_length=None)
    plain, plain_reference = (plain_copy(each) for each in (model64, reference64))
    trainer = KTOTrainer(
        plain, plain_reference, args=config, train_dataset=text, processing_class=chat_tokenizer
    )
    own, other = (
        {k: batch[k][half] for k in ("input_ids", "labels")} for half in (slice(0, 8), slice(8, 16))
    )
    lengths = [len(row["prompt_ids"]) + len(row["chosen_ids"]) for row in rows]
    others = [len(row["prompt_ids"]) + len(row["rejected_ids"]) for row in rows]
    inputs = {"label": batch["good"]}
    for prefix, half, sizes in (("", own, lengths), ("KL_", other, others)):
        inputs[f"{prefix}input_ids"] = half["input_ids"]
        inputs[f"{prefix}completion_mask"] = (half["labels"] != -100).long()
        width = half["input_ids"].shape[1]
        inputs[f"{prefix}attention_mask"] = torch.tensor([[1] * n + [0] * (width - n) for n in sizes])
    theirs = trainer._compute_loss(plain, inputs, False)
    assert ours.item() / 8 == pytest.approx(theirs.item(), abs=1e-6)
    theirs.backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=0, atol=1e-5)


def plain_copy(net):
    """同样的权重，没有装 nlp_common/fast 的：TRL 要的是 transformers 原样的模型。"""
    other = type(net)(net.config).double()
    other.load_state_dict(net.state_dict())
    return other.eval()


def test_thumbs_take_one_side_and_flip_as_told(kto):
    rows = kto.thumbs(world.pairs(2000, 1), 0.9, 0.0, random.Random(0))
    assert sum(row["good"] for row in rows) / 2000 == pytest.approx(0.9, abs=0.02)
    flipped = kto.thumbs(world.pairs(2000, 1), 1.0, 0.25, random.Random(0))
    assert sum(not row["good"] for row in flipped) / 2000 == pytest.approx(0.25, abs=0.03)


def test_weights_balance_both_sides(kto):
    settings = types.SimpleNamespace(desirable_weight=None, undesirable_weight=None)
    rows = [{"good": True}] * 30 + [{"good": False}] * 10
    desirable, undesirable = kto.balanced(rows, settings)
    assert desirable * 30 == undesirable * 10 == 30
    with pytest.raises(UserError, match="全是赞"):
        kto.balanced([{"good": True}], settings)


@pytest.mark.parametrize("column", ["label", "kto_tag", "desirable"])
def test_rows_with_a_label_are_read(column):
    rows = [
        {"prompt": "你好", "completion": "你好！", column: True},
        {"prompt": "你好", "completion": "走开", column: False},
    ]
    found = to_thumbs(rows, "rows.jsonl")
    assert [row["good"] for row in found] == [True, False]
    assert found[1]["answer"] == [{"role": "assistant", "content": "走开"}]
    assert found[0]["prompt"] == [{"role": "user", "content": "你好"}]


def test_a_label_that_is_neither_names_the_row():
    rows = [{"prompt": "甲", "completion": "乙", "label": value} for value in (True, "也许")]
    with pytest.raises(UserError, match=r"第 2 条.*label 要是 true 或 false"):
        to_thumbs(rows, "rows.jsonl")


def test_kto_trains_on_the_readers_own_rows(kto, chat_folder, tmp_path):
    lines = [{"prompt": f"第 {i} 问", "completion": f"答 {i}。", "label": i % 3 != 0} for i in range(24)]
    data = tmp_path / "thumbs.jsonl"
    data.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8")
    out = str(tmp_path / "kto")
    arguments = [*FEW, "--model", str(chat_folder), "--dataset", str(data), "--output_dir", out]
    record = kto.main(arguments)
    assert 0 <= record["metrics"]["preference_accuracy"] <= 1 and "judge_score" not in record["metrics"]
    assert kto.main(arguments)["id"] == record["id"]  # 第二次直接用


def test_the_library_trainer_is_refused(kto, identity, best_of_k):
    for script in (kto, identity, best_of_k):
        with pytest.raises(UserError, match="--trainer library"):
            script.main(["--preset", "tiny", "--trainer", "library"])


def test_a_batch_of_one_is_refused(kto):
    with pytest.raises(UserError, match="参考点"):
        kto.main(["--preset", "tiny", "--per_device_train_batch_size", "1"])


# ---------------------------------------------------------------- 换名字


def test_trained_and_untrained_asks_never_share(identity):
    for asks in (identity.identity_asks, identity.near_asks):
        trained, kept = set(asks(True)), set(asks(False))
        assert trained and kept and not trained & kept
    assert not any(ask in text for ask in identity.NEW_ASKS for text in identity.identity_asks(True))


def test_own_answers_are_corrected(identity):
    settings = types.SimpleNamespace(name="小灯", old_name="小故事助手")
    assert identity.corrected("您好，我是小故事助手。", settings) == "您好，我是小灯。"
    assert identity.corrected("去车站", settings) == "我是小灯。"


def test_pairs_are_on_policy_and_what_must_stay_is_kept(identity, model, chat_tokenizer):
    settings = types.SimpleNamespace(name="小灯", old_name="小故事助手", seed=0)
    rng = random.Random(0)
    own = identity.identity_pairs(model, chat_tokenizer, settings, 6, True, rng)
    asked = [{"messages": row["prompt"]} for row in own]
    said = [r["text"] for r in reply_to(model, chat_tokenizer, asked, temperature=1.0, seed=0)]
    assert [row["rejected"][0]["content"] for row in own] == said
    assert all("小灯" in row["chosen"][0]["content"] for row in own)
    kept = identity.keep_pairs(model, chat_tokenizer, settings, world.questions(9, 0), rng)
    assert kept and all(row["rejected"][0]["content"] == "我是小灯。" for row in kept)
    assert all("小灯" not in row["chosen"][0]["content"] for row in kept)


def test_the_same_name_is_refused(identity):
    with pytest.raises(UserError, match="新的名字"):
        identity.main(["--preset", "tiny", "--name", "小故事助手"])


def test_identity_runs_and_draws(identity, chat_folder, tmp_path):
    out = tmp_path / "identity"
    few = [*FEW, "--max_train_samples", "24", "--n_identity", "5", "--logging_steps", "1"]
    record = identity.main([*few, "--model", str(chat_folder), "--output_dir", str(out)])
    assert {"identity_rate_before", "identity_rate", "qa_accuracy", "small_talk"} <= set(record["metrics"])
    assert {"no_sft_term", "given_pairs"} <= set(record["metrics"])
    assert "好回答" in (out / "likelihood.svg").read_text(encoding="utf-8")


# ---------------------------------------------------------------- best-of-K


def test_best_is_the_highest_that_ended(best_of_k):
    written = [
        [{"text": t, "ended": e} for t, e in (("甲", True), ("乙", False), ("丙", True))],
        [{"text": t, "ended": False} for t in "丁戊己"],
    ]
    scores = torch.tensor([[1.0, 9.0, 2.0], [1.0, 2.0, 3.0]])
    scores = scores.masked_fill(
        torch.tensor([[r["ended"] for r in row] for row in written]).logical_not(), -torch.inf
    )
    assert best_of_k.best(written, scores) == [written[0][2], None]


def test_scores_are_the_reward_models(best_of_k, model, reward_net, chat_tokenizer):
    rows = with_prompts(chat_tokenizer, world.questions(4, 0))
    settings = types.SimpleNamespace(
        sample_batch=3, max_new_tokens=12, temperature=1.0, selector="reward_model"
    )
    written = best_of_k.write(model, chat_tokenizer, rows, 3, settings, seed=1)
    assert [len(replies) for replies in written] == [3, 3, 3, 3]
    scores = best_of_k.score(reward_net, chat_tokenizer, rows, written, settings)
    for row, replies, found in zip(rows, written, scores, strict=True):
        alone = score_replies(reward_net, chat_tokenizer, [row] * 3, replies)
        for reply, value, expected in zip(replies, found.tolist(), alone.tolist(), strict=True):
            assert value == (pytest.approx(expected, abs=1e-4) if reply["ended"] else float("-inf"))


def test_only_the_chosen_answer_is_learned(best_of_k, sft, tokenizer, chat_tokenizer):
    row = next(q for q in world.questions(20, 0) if len(q["messages"]) == 3)
    chats = best_of_k.as_chats([row, row], [{"text": "好的"}, None])
    assert len(chats) == 1
    labels = sft.encode_row(chat_tokenizer, chats[0]["messages"])["labels"]
    assert chat_tokenizer.decode([label for label in labels if label != -100]) == "好的<|im_end|>"


def test_the_judge_needs_the_tiny_world(best_of_k, tmp_path):
    data = tmp_path / "q.jsonl"
    data.write_text('{"prompt": "问"}\n{"prompt": "再问"}\n', encoding="utf-8")
    with pytest.raises(UserError, match="--selector reward_model"):
        best_of_k.main(["--preset", "tiny", "--dataset", str(data), "--selector", "judge"])
    with pytest.raises(UserError, match="--ks"):
        best_of_k.main(["--preset", "tiny", "--ks", "二"])


def test_best_of_k_runs_in_rounds(best_of_k, chat_folder, reward_folder, tmp_path):
    arguments = [*FEW, "--model", str(chat_folder), "--reward_model", str(reward_folder), "--k", "2"]
    arguments += [
        "--max_train_samples",
        "24",
        "--rounds",
        "2",
        "--ks",
        "1",
        "--output_dir",
        str(tmp_path / "b"),
    ]
    metrics = best_of_k.main(arguments)["metrics"]
    assert set(metrics["rounds"]) == {"1", "2"} and set(metrics["ks"]) == {"1", "2"}
    assert (
        metrics["ks"]["2"] == metrics["rounds"]["1"]
        and metrics["judge_score"] == metrics["rounds"]["2"]["judge_score"]
    )
    assert (tmp_path / "b" / "rounds.svg").exists() and load_tokenizer(str(tmp_path / "b"))


# ---------------------------------------------------------------- 十种方法


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
    name, types_of, weights, methods, dpo, model64, reference64, chat_tokenizer, trainer_args
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
    with pytest.raises(UserError, match="--preset tiny"):
        methods.main(["--preset", "full"])
