"""ptuning_v2_demo.py：从头到尾走得完，表、图齐全；第二次直接用；写错了说得清。与 PEFT 相同见 test_prompts.py。"""

import copy

import pytest
import torch

import ptuning_v2_demo as pd
from nlp_common.base.errors import UserError
from tasks import task_chats


@pytest.fixture
def small(tmp_path, chat_folder, monkeypatch):
    monkeypatch.setattr(pd, "RATES", (1e-2, 1e-1))
    monkeypatch.setattr(pd, "WIDTHS", (1, 3))
    return [
        *("--preset", "tiny", "--model", str(chat_folder), "--output_dir", str(tmp_path / "out")),
        *("--max_train_samples", "16", "--n_questions", "4", "--virtual_tokens", "3"),
        *("--per_device_train_batch_size", "4"),  # 四步：只有一步，预热时学习率是 0
    ]


def test_the_lesson(small, tmp_path, model, capsys):
    metrics = pd.main(small)["metrics"]
    for kind in ("prefix", "prompt", "p_tuning", "lora"):
        assert {f"accuracy_{kind}", f"qa_accuracy_{kind}"} <= set(metrics)
    assert "trainable_share" in metrics
    config = model.config
    assert metrics["trainable_prompt"] == 3 * config.hidden_size
    assert metrics["trainable_prefix"] == 3 * config.hidden_size * 2 * config.num_hidden_layers
    assert set(metrics["by_rate"]["prefix"]) == {"1e-02", "1e-01"}
    assert set(metrics["by_width"]["prompt"]) == {"1", "3"}
    assert set(metrics["by_width"]["prefix_new"]) == {"1", "3", "32"}
    for name in ("prompts_by_rate.svg", "prompts_by_width.svg"):
        assert (tmp_path / "out" / name).exists()
    capsys.readouterr()
    assert pd.main(small)["metrics"] == metrics
    assert "已有训练结果" in capsys.readouterr().out


def test_the_prefix_learns_and_the_model_does_not_move(small, monkeypatch, model, chat_tokenizer):
    """重算激活时也一样：前缀没有丢。"""
    learners = []

    def measure(learner, tokenizer, task, questions):
        learners.append(learner)
        return 0.0

    monkeypatch.setattr(pd, "score", measure)
    pd.main([*small, "--gradient_checkpointing", "true"])
    learned = next(each for each in learners if isinstance(each, pd.PrefixTuned))
    text = pd.example_text(chat_tokenizer, task_chats("courteous", 16, 0), 3)
    fresh = pd.PrefixTuned(copy.deepcopy(model), 3)
    fresh.start_from(text)
    assert (learned.keys - fresh.keys).abs().max() > 1e-3
    assert (learned.values - fresh.values).abs().max() > 1e-3
    for name, p in learned.base.named_parameters():
        assert torch.equal(p, model.get_parameter(name)), name


def test_more_virtual_tokens_than_text(chat_tokenizer):
    chats = task_chats("courteous", 2, 0)
    once = pd.example_text(chat_tokenizer, chats, 1)
    many = pd.example_text(chat_tokenizer, chats, 1000)
    assert len(once) == 1 and len(many) == 1000 and many[:1] == once


def test_bad_input(small):
    for flags, said in (
        (["--task", "sing"], "sing"),
        (["--new_skill", "qa"], "qa"),
        (["--virtual_tokens", "0"], "--virtual_tokens"),
        (["--virtual_tokens", "100000"], "也占位置"),
    ):
        with pytest.raises(UserError, match=said):
            pd.main([*small, *flags])
