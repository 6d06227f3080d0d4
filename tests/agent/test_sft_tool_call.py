"""sft_tool_call.py：很小的一遍走得完，图、表齐全；再运行直接用；中断了接着做，结果一样；损失只在调用与回答上。"""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sft_tool_call as sc
import tool_world as tw
from nlp_common.base.errors import UserError
from nlp_common.lm.chat_rows import chat_row
from nlp_common.lm.losses import IGNORE
from tiny_agent import build_tokenizer, tool_model

SMALL = ["--preset", "tiny", "--base_documents", "24", "--digit_documents", "24", "--max_train_samples", "16",
         "--n_questions", "12"]  # fmt: skip


def test_the_lesson_and_again(tmp_path, capsys):
    arguments = [*SMALL, "--output_dir", str(tmp_path / "out")]
    record = sc.main(arguments)
    metrics = record["metrics"]
    named = {"tool_choice", "argument_exact", "final_accuracy", "no_call_when_unneeded", "two_step_accuracy"}
    assert named <= set(metrics) and {"sft", "no_digits", "no_tools"} <= set(metrics)
    assert all(metrics["sft"][name] == metrics[name] or metrics[name] != metrics[name] for name in named)
    assert (tmp_path / "out" / "tool_kinds.svg").exists()
    found = tool_model(str(tmp_path / "out"))
    assert found["stage"] == "sft_tool_call" and (Path(found["path"]) / "tokenizer.json").exists()
    said = capsys.readouterr().out
    assert "没学过数字" in said and "两步" in said
    assert sc.main(arguments)["id"] == record["id"]
    assert "直接加载" in capsys.readouterr().out
    with pytest.raises(UserError, match="max_train_samples"):
        sc.main([*arguments, "--max_train_samples", "8"])
    with pytest.raises(UserError, match="--model 用不上"):
        sc.main([*arguments, "--model", str(tmp_path / "out")])


def test_only_what_the_model_says_is_learned():
    """每个 token 看一遍：工具的结果、题目、system、写坏的调用，一个也不在标签里。"""
    tokenizer = build_tokenizer()
    for chat in tw.chats(60, 0):
        row = chat_row(tokenizer, chat["messages"])
        learned = tokenizer.decode([i for i in row["labels"] if i != IGNORE])
        said = [m["content"] for m in chat["messages"] if m["role"] == "assistant" and m.get("weight") != 0]
        assert learned == "".join(text + "<|im_end|>" for text in said)
        assert len(row["labels"]) == len(row["input_ids"])


def test_the_saved_tokenizer_reads_back_the_same(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for chat in tw.chats(20, 1):
        for message in chat["messages"]:
            ids = tokenizer(message["content"], add_special_tokens=False)["input_ids"]
            assert again(message["content"], add_special_tokens=False)["input_ids"] == ids
            assert again.decode(ids) == message["content"]
    digits = tokenizer("2394", add_special_tokens=False)["input_ids"]
    assert [tokenizer.decode([i]) for i in digits] == ["23", "94"]  # 数字两位一切


@pytest.mark.slow
def test_interrupted_then_resumed_equals_uninterrupted(tmp_path):
    """像读者那样按 Ctrl-C：接着做的与一口气做的，权重、分数都相同。"""
    script = Path(sc.__file__)
    small = [*SMALL[:2], "--base_documents", "200", "--digit_documents", "200", "--max_train_samples", "300",
             "--n_questions", "8", "--save_steps", "20"]  # fmt: skip

    def start(folder):
        command = [sys.executable, str(script), *small, "--output_dir", str(folder)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    whole = start(tmp_path / "whole")
    assert whole.communicate(timeout=300)[0] and whole.returncode == 0
    cut = start(tmp_path / "cut")
    deadline = time.time() + 200
    checkpoints = "parts/.no_digits.work/checkpoints/checkpoint-*/complete.json"
    while not list(tmp_path.glob(f".cut.work/{checkpoints}")) and time.time() < deadline:
        time.sleep(0.05)
    cut.send_signal(signal.SIGINT)
    said = cut.communicate(timeout=60)[0]
    assert "Traceback" not in said and not (tmp_path / "cut" / "run.json").exists()
    again = start(tmp_path / "cut")
    said = again.communicate(timeout=300)[0]
    assert again.returncode == 0 and "上次中断以前做完了" in said
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    records = [json.loads((tmp_path / name / "run.json").read_text("utf-8")) for name in ("whole", "cut")]
    assert records[0]["metrics"]["sft"] == records[1]["metrics"]["sft"]
