"""KTO：损失与 TRL 的 KTOTrainer 相等，也算得上手；赞与踩照说好的取；读者自己的行、写错的设置。"""

import json
import random
import types

import pytest
import torch
from datasets import Dataset
from trl import KTOConfig, KTOTrainer

from nlp_common.base.errors import UserError
from nlp_common.data.chats import to_thumbs
from nlp_common.tiny import world
from nlp_common.train.splits import distinct_rows


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


def test_kto_loss_equals_trl(kto, dpo, model64, reference64, chat_tokenizer, trainer_args, plain_copy):
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
    with pytest.raises(UserError, match=r"全是赞.*label 是 true"):
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


def test_rows_without_a_label_are_told_what_is_missing():
    with pytest.raises(UserError, match=r"每行要有 label.*它的列是：prompt、completion"):
        to_thumbs([{"prompt": "甲", "completion": "乙"}], "rows.jsonl")


def test_kto_trains_on_the_readers_own_rows(kto, chat_folder, tmp_path, few):
    lines = [{"prompt": f"第 {i} 问", "completion": f"答 {i}。", "label": i % 3 != 0} for i in range(24)]
    data = tmp_path / "thumbs.jsonl"
    data.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8")
    out = str(tmp_path / "kto")
    arguments = [*few, "--model", str(chat_folder), "--dataset", str(data), "--output_dir", out]
    record = kto.main(arguments)
    assert 0 <= record["metrics"]["preference_accuracy"] <= 1 and "judge_score" not in record["metrics"]
    assert kto.main(arguments)["id"] == record["id"]  # 第二次直接用


def test_several_answers_to_one_prompt_are_all_kept():
    """同一个问题的几个回答、同一个回答的赞与踩，不是重复的行。"""
    prompt = [{"role": "user", "content": "问"}]
    one, two = ([{"role": "assistant", "content": text}] for text in "甲乙")
    rows = [
        {"prompt": prompt, "answer": answer, "good": good}
        for answer, good in ((one, True), (two, True), (one, False), (one, True))
    ]
    assert distinct_rows(rows, "行") == rows[:3]


def test_the_library_trainer_is_refused(kto, identity, best_of_k):
    for script in (kto, identity, best_of_k):
        with pytest.raises(UserError, match="--trainer library"):
            script.main(["--preset", "tiny", "--trainer", "library"])


def test_a_batch_of_one_is_refused(kto):
    with pytest.raises(UserError, match="参考点"):
        kto.main(["--preset", "tiny", "--per_device_train_batch_size", "1"])
