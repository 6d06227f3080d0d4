"""命令行的每个数、每个选项都在读的时候检查，一处管所有脚本。"""

import importlib
import os
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from nlp_common.base.arguments import LIMITS, Limits, option, parse_arguments
from nlp_common.base.errors import UserError
from nlp_common.train.bert import BertSettings
from nlp_common.train.settings import SCHEDULES, RunSettings, StageSettings

ROOT = Path(__file__).resolve().parents[3]


@dataclass
class OwnSettings(RunSettings):
    """一个脚本自己的设置：temperature 的范围与别的脚本不同。"""

    temperature: float = option("温度", 1.0, limits=Limits(above=0))
    strange: float = option("没有写范围的数", 1.0)


def error_of(settings_class, *argv: str) -> str:
    with pytest.raises(UserError) as caught:
        parse_arguments(settings_class, list(argv))
    assert "argument" not in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "flag, value, expected",
    [
        ("--logging_steps", "0", "--logging_steps 要是正整数，给的是 0"),
        ("--save_steps", "-5", "--save_steps 要是正整数，给的是 -5"),
        ("--save-steps", "0", "--save_steps 要是正整数"),
        ("--max_train_samples", "0", "--max_train_samples 要大于 0，给的是 0"),
        ("--max_eval_samples", "0", "--max_eval_samples 要是正整数"),
        ("--per_device_train_batch_size", "0", "--per_device_train_batch_size 要大于 0"),
        ("--gradient_accumulation_steps", "0", "--gradient_accumulation_steps 要是正整数"),
        ("--max_steps", "0", "--max_steps 要是正整数，或 -1，给的是 0"),
        ("--max_steps", "-2", "--max_steps 要是正整数，或 -1，给的是 -2"),
        ("--num_train_epochs", "0", "--num_train_epochs 要大于 0，给的是 0"),
        ("--learning_rate", "-1", "--learning_rate 要大于 0，给的是 -1"),
        ("--learning_rate", "0", "--learning_rate 要大于 0，给的是 0"),
        ("--learning_rate", "nan", "--learning_rate 要大于 0，给的是 nan"),
        ("--learning_rate", "inf", "--learning_rate 要大于 0，给的是 inf"),
        ("--weight_decay", "-0.1", "--weight_decay 不能小于 0，给的是 -0.1"),
        ("--warmup_steps", "-1", "--warmup_steps 不能小于 0"),
        ("--max_grad_norm", "nan", "--max_grad_norm 不能小于 0"),
        ("--adam_beta2", "1", "--adam_beta2 不能小于 0、小于 1，给的是 1"),
        ("--dataloader_num_workers", "-1", "--dataloader_num_workers 不能小于 0"),
        ("--seed", "-1", "--seed 要在 0 到 4294967295 之间，给的是 -1"),
        ("--seed", "99999999999", "--seed 要在 0 到 4294967295 之间"),
        ("--lr_scheduler_type", "cosin", "--lr_scheduler_type 不认识 cosin，可以是"),
        ("--lr_scheduler_type", "cosin", "是不是 cosine"),
        ("--preset", "tini", "是不是 tiny"),
    ],
)
def test_values_that_no_training_can_have(flag, value, expected):
    assert expected in error_of(StageSettings, flag, value)


def test_values_at_the_edge_are_fine():
    argv = ["--max_steps", "-1", "--warmup_steps", "0", "--weight_decay", "0", "--max_grad_norm", "0"]
    settings = parse_arguments(StageSettings, [*argv, "--seed", "4294967295", "--logging_steps", "1"])
    assert settings.max_steps == -1 and settings.logging_steps == 1 and settings.learning_rate is None


def test_a_scripts_own_limits_win_and_numbers_without_limits_are_finite():
    assert "--temperature 要大于 0，给的是 0" in error_of(OwnSettings, "--temperature", "0")
    assert "--strange 要是一个有限的数，给的是 nan" in error_of(OwnSettings, "--strange", "nan")
    assert parse_arguments(OwnSettings, ["--strange", "-3"]).strange == -3
    assert "--eval_steps 要大于 0" in error_of(BertSettings, "--eval_steps", "0")


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_on_the_list_works(name):
    import torch
    from transformers import get_scheduler

    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    schedule = get_scheduler(name, optimizer, 2, 10)
    for _ in range(10):
        optimizer.step()
        schedule.step()
    assert parse_arguments(StageSettings, ["--lr_scheduler_type", name]).lr_scheduler_type == name


def test_every_number_of_every_script_has_its_limits():
    """新加的数也要写范围：在 LIMITS 里，或在它的 option 里；随便什么有限的数都行的，列在这里。"""
    anything = {"missing_end_penalty"}
    found = [(BertSettings, "train.bert"), (StageSettings, "train.settings")]
    for topic, script, name in (
        ("sentiment_classifier", "bert_finetune_sentiment", "SentimentSettings"),
        ("news_classifier", "bert_news_multiclass", "NewsSettings"),
        ("qwen_chinese_finetune", "sft_chinese_qwen", "SFTSettings"),
        ("qwen_chinese_finetune", "dpo_chinese_qwen", "DPOSettings"),
        ("qwen_chinese_finetune", "ppo_alignment", "PPOSettings"),
        ("qwen_chinese_finetune", "grpo_alignment", "GRPOSettings"),
        ("qwen_chinese_finetune", "r1_zero", "R1Settings"),
    ):
        sys.path.insert(0, str(ROOT / topic))
        try:
            found.append((getattr(importlib.import_module(script), name), script))
        finally:
            sys.path.remove(str(ROOT / topic))
    for settings_class, where in found:
        for each in fields(settings_class):
            number = str(each.type).split(" | ")[0] in ("int", "float", "<class 'int'>", "<class 'float'>")
            if number and each.name not in anything:
                assert each.metadata.get("limits") or each.name in LIMITS, (
                    f"{where} 的 --{each.name} 没有范围"
                )


def test_words_in_another_encoding_are_said_to_be():
    word = "服务很好".encode("gbk").decode("utf-8", errors="surrogateescape")
    message = error_of(BertSettings, "--predict", "好", word)
    assert "命令行的第 3 个词" in message and "--predict_file" in message
    message.encode("utf-8")


@pytest.mark.skipif(os.name == "nt", reason="Windows 的命令行是 UTF-16")
def test_words_in_another_encoding_from_a_real_shell():
    script = ROOT / "sentiment_classifier" / "bert_finetune_sentiment.py"
    command = [sys.executable.encode(), str(script).encode(), b"--predict", "服务很好".encode("gbk")]
    done = subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONUTF8": "1"})
    shown = done.stderr.decode("utf-8")
    assert done.returncode == 2 and shown.startswith("错误：命令行的第 2 个词") and "Traceback" not in shown
