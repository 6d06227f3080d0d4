"""distillation.py：损失等于 TRL 的 GKD，移位与填充不差一格，老师的答案接得上，中断了接着来，自己的对话，说错的话。"""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import distillation as script
from distil_data import Data
from distil_losses import divergence
from distil_student import small_student
from nlp_common.base.errors import UserError
from nlp_common.lm.chat_rows import chat_row, collate
from nlp_common.lm.loading import load_causal_lm, load_chat_lm
from nlp_common.lm.losses import IGNORE
from nlp_common.lm.replies import reply_to
from nlp_common.tiny import world

SMALL = ["--preset", "tiny", "--max_steps", "10", "--n_answers", "4", "--n_documents", "16"]
SMALL += ["--max_train_samples", "24", "--max_eval_samples", "8", "--per_device_train_batch_size", "4"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny(base_folder):
    return load_chat_lm(str(base_folder), CPU)


@pytest.fixture(scope="module")
def student(tiny):
    return small_student(tiny[1], 1, 64, seed=1)


def gkd_loss():
    gkd = pytest.importorskip("trl.experimental.gkd", reason="没有装 trl，或它没有 GKD")
    return gkd.GKDTrainer.generalized_jsd_loss


# ---------------------------------------------------------------- 损失


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_losses_equal_trl(beta, temperature):
    theirs = gkd_loss()
    generator = torch.Generator().manual_seed(0)
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 1e-6)):
        q, p = (3 * torch.randn(1, 7, 50, generator=generator, dtype=dtype) for _ in range(2))
        labels = torch.zeros(1, 7, dtype=torch.long)
        wanted = theirs(q, p, labels=labels, beta=beta, temperature=temperature)
        ours = divergence(q[0], p[0], beta, temperature) / 7
        assert ours.item() == pytest.approx(wanted.item(), rel=tolerance, abs=tolerance)


def test_by_hand():
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    forward = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    reverse = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert divergence(q, p, 0.0).item() == pytest.approx(forward, abs=1e-6)
    assert divergence(q, p, 1.0).item() == pytest.approx(reverse, abs=1e-6)
    m = (0.375, 0.625)
    half = sum(
        0.5 * (a * math.log(a / c) + b * math.log(b / c))
        for a, b, c in zip((0.5, 0.5), (0.25, 0.75), m, strict=True)
    )
    assert divergence(q, p, 0.5).item() == pytest.approx(half, abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 1), st.floats(0.2, 5))
def test_never_negative_and_zero_when_equal(seed, beta, temperature):
    generator = torch.Generator().manual_seed(seed)
    q, p = (4 * torch.randn(3, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    if 0 < beta < 1e-3 or 1 - 1e-3 < beta < 1:
        beta = round(beta)
    assert divergence(q, p, beta, temperature).item() >= -1e-12
    assert divergence(p, p + 5.0, beta, temperature).item() == pytest.approx(
        0, abs=1e-9
    )  # 加一个常数还是同一个分布
    assert divergence(q, p, 0.5, temperature).item() == pytest.approx(
        divergence(p, q, 0.5, temperature).item()
    )


def test_a_high_temperature_matches_logits():
    """τ 很大时，τ² 倍的梯度是 (学生 − 老师) / V，两边先减去各自的均值（Hinton et al. 2015 式 4）。"""
    generator = torch.Generator().manual_seed(0)
    q, p = (torch.randn(1, 20, generator=generator, dtype=torch.float64) for _ in range(2))
    q.requires_grad_()
    divergence(q, p, 0.0, 1000.0).backward()
    wanted = ((q - q.mean()) - (p - p.mean())) / 20
    assert torch.allclose(1000.0**2 * q.grad, wanted, atol=1e-3)


def test_a_batch_of_chats_equals_trl(tiny, student):
    theirs = gkd_loss()
    tokenizer, teacher = tiny
    rows = [chat_row(tokenizer, chat["messages"]) for chat in world.chats(4, seed=3)]
    batch = collate(rows, tokenizer.pad_token_id)
    for name in ("forward", "jsd", "reverse"):
        method = script.METHODS[name]
        with torch.no_grad():
            logits = [
                model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
                for model in (student, teacher)
            ]
            wanted = theirs(*logits, labels=batch["labels"][:, 1:], beta=method.beta, reduction="sum")
            ours = script.teacher_loss(student, teacher, batch, method)
        assert ours.item() == pytest.approx(wanted.item(), rel=1e-5)


# ---------------------------------------------------------------- 谁写的答案


def test_the_students_own_answers(tiny, student):
    """左填充、右填充都不算；一段一段单独算，是同一个损失。"""
    tokenizer, teacher = tiny
    chats = world.chats(6, seed=5)
    generator = torch.Generator().manual_seed(0)
    batch = script.student_answers(student, tokenizer, chats, script.random.Random(0), generator)
    method = script.METHODS["on_policy"]
    with torch.no_grad():
        together = script.teacher_loss(student, teacher, batch, method).item()
        alone = 0.0
        for ids, labels, mask in zip(
            batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True
        ):
            real = mask.bool()
            assert (labels != IGNORE).sum() > 0 and (labels[~real] == IGNORE).all()
            row = {"input_ids": ids[real][None], "labels": labels[real][None]}
            alone += script.teacher_loss(student, teacher, row, method).item()
    assert together == pytest.approx(alone, rel=1e-4)
    assert student.training


def test_teacher_answers(tiny):
    tokenizer, teacher = tiny
    chats = world.chats(5, seed=0)
    chats[1]["messages"].insert(0, {"role": "system", "content": "请回答。"})
    written = script.teacher_answers(teacher, tokenizer, chats, 0.0, seed=0)
    for old, new in zip(chats, written, strict=True):
        assert [m["role"] for m in new["messages"]] == [m["role"] for m in old["messages"]]
        for place, message in enumerate(new["messages"]):
            if message["role"] == "assistant":
                question = {"messages": new["messages"][:place]}  # 前面的也是老师自己的回答
                assert message["content"] == reply_to(teacher, tokenizer, [question])[0]["text"]
            else:
                assert message == old["messages"][place]


def test_batches_are_whole_and_different_each_time():
    chats = world.chats(10, seed=0)
    batches = script.batches_of(chats, 4, seed=0)
    first = [next(batches) for _ in range(2)]
    assert all(len(batch) == 4 for batch in first) and len({i for batch in first for i in batch}) == 8
    assert [next(batches) for _ in range(2)] != first
    assert len(next(script.batches_of(chats[:3], 8, seed=0))) == 3


# ---------------------------------------------------------------- 全课


@pytest.fixture(scope="module")
def done(base_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("distil") / "out"
    argv = [
        *SMALL,
        "--methods",
        "labels,greedy,jsd,on_policy",
        "--model",
        str(base_folder),
        "--output_dir",
        str(folder),
    ]
    return folder, argv, script.main(argv)["metrics"]


def without_seconds(value):
    if isinstance(value, dict):
        return {
            k: without_seconds(v) for k, v in value.items() if "second" not in k and not k.endswith("_per_s")
        }
    return [without_seconds(v) for v in value] if isinstance(value, list) else value


def test_run(done, tiny, capsys):
    folder, argv, metrics = done
    assert metrics["student_share"] < 0.25
    assert set(metrics["methods"]) == {"labels", "greedy", "jsd", "on_policy", "labels_from_nothing"}
    assert [point["step"] for point in metrics["methods"]["labels"]["curve"]] == [3, 5, 8, 10]
    for name in ("distil_seconds", "distil_step", "distil_more"):
        assert "<svg" in (folder / f"{name}.svg").read_text(encoding="utf-8")
    tokenizer, student = load_causal_lm(str(folder / "student"))
    assert student.config.num_hidden_layers == 1 and len(tokenizer) == student.config.vocab_size
    assert sum(p.numel() for p in student.parameters()) == metrics["student_parameters"]
    capsys.readouterr()
    assert script.main(argv)["metrics"] == metrics
    assert "直接加载" in capsys.readouterr().out


def test_interrupted_run_goes_on_to_the_same_result(done, tmp_path, monkeypatch, capsys):
    _, argv, metrics = done
    argv = [*argv[:-1], str(tmp_path / "again")]
    distil, calls = script.distil, []

    def stop_at_the_third(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return distil(*args, **kwargs)

    monkeypatch.setattr(script, "distil", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        script.main(argv)
    again = script.main(argv)["metrics"]
    assert capsys.readouterr().out.count("上次中断以前做完了") == 3  # 读文档、labels、greedy
    assert without_seconds(again) == without_seconds(metrics)


def test_own_chats(base_folder, tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": f"{i} 加一"}, {"role": "assistant", "content": str(i + 1)}]}
        for i in range(40)
    ]
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    argv = [*SMALL, "--methods", "labels,forward", "--no_more", "--n_documents", "0", "--dataset", str(file)]
    record = script.main([*argv, "--model", str(base_folder), "--output_dir", str(tmp_path / "out")])
    assert 0 < record["metrics"]["student_accuracy"] < 1
    assert "sampled_accuracy" not in record["metrics"]["methods"]["labels"]
    assert set(record["metrics"]["methods"]) == {"labels", "forward"}  # --no_more：别的温度不试


def test_score_of_own_chats_is_the_token_probability(tiny):
    tokenizer, teacher = tiny
    data = Data([], [], [{"messages": world.chats(1, seed=0)[0]["messages"]}], {}, tiny=False)
    assert 0 < data.score(teacher, tokenizer) < 1


# ---------------------------------------------------------------- 说错的话


def fails(argv, match):
    with pytest.raises(UserError, match=match):
        script.main(argv)


def test_wrong_arguments(base_folder, tmp_path):
    fails([*SMALL, "--methods", "labels,kd"], "不认识 kd，可以是")
    fails([*SMALL, "--methods", ""], "空的一项")
    fails([*SMALL, "--eval_dataset", "some/rows"], "--eval_dataset 用不上")
    fails([*SMALL, "--max_steps", "3"], "不小于 10")
    fails([*SMALL, "--on_policy_share", "2"], "0 到 1")
    out = ["--model", str(base_folder), "--output_dir", str(tmp_path / "out")]
    fails([*SMALL, *out, "--student_width", "30"], "--student_width 30 要是 8 的倍数")
    fails([*SMALL, *out, "--student", str(tmp_path / "none")], "没有这个文件夹")
    fails([*SMALL, *out, "--dataset", str(tmp_path / "none.jsonl")], "none.jsonl")


def test_another_vocabulary(base_folder, control_folder, tmp_path):
    argv = [
        *SMALL,
        "--model",
        str(base_folder),
        "--student",
        str(control_folder),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    fails(argv, "词表有 642 个、老师的有 636 个.*labels,greedy,sampled")
    record = script.main([*argv, "--methods", "greedy"])
    assert record["metrics"]["best"] == "greedy" and "documents" not in record["metrics"]
