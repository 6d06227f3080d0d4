"""--dataset：自己的对话也是一样活儿，去重、固定地留出，成绩是 exp(−留出损失)；各脚本从头走到尾，写错了说得清。"""

import json
import math

import pytest
import torch

import compare_peft
import incremental_lora
import lora_parameter_viz
import ptuning_v2_demo
import tasks
from nlp_common.base.errors import UserError
from nlp_common.lm.chat_rows import chat_row

FEW = ["--preset", "tiny", "--n_questions", "3", "--per_device_train_batch_size", "4"]


def write_chats(path, n: int, said: str = "好") -> str:
    chats = [
        {"messages": [{"role": "user", "content": f"第{i}天"}, {"role": "assistant", "content": said * (i % 5 + 1)}]}
        for i in range(n)
    ]  # fmt: skip
    path.write_text("\n".join(json.dumps(c, ensure_ascii=False) for c in chats), encoding="utf-8")
    return str(path)


@pytest.fixture
def mine(tmp_path) -> str:
    return write_chats(tmp_path / "mine.jsonl", 24)


@pytest.fixture
def settings(mine):
    return ptuning_v2_demo.PromptSettings(
        dataset=mine, max_train_samples=100, max_length=64, learning_rate=0.1
    )


def test_the_file_is_split_and_the_source_written_down(settings, mine):
    source = tasks.use_own(settings, mine)
    assert (source["kind"], source["path"], source["rows"]) == ("file", mine, 24)
    train, heldout = tasks.task_chats("mine", 99, 0), tasks.task_chats("mine", 99, 0, heldout=True)
    asks = [[chat["messages"][0]["content"] for chat in side] for side in (train, heldout)]
    assert asks[1] == ["第0天", "第20天"] and len(asks[0]) == 22 and not set(asks[0]) & set(asks[1])
    assert len(tasks.task_chats("mine", 5, 0)) == 5
    assert tasks.use_own(settings, "tiny_world") == {"name": "tiny_world", "kind": "builtin", "rows": 100}


def test_score_is_the_probability_of_an_answer_token(settings, mine, model, chat_tokenizer):
    """几何平均：每个回答 token 的概率连乘，开几次方；这里逐个 token 手算。"""
    tasks.use_own(settings, mine)
    heldout = tasks.task_chats("mine", 9, 0, heldout=True)
    logps = []
    for chat in heldout:
        row = chat_row(chat_tokenizer, chat["messages"])
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        logps += [logits[t - 1, y].item() for t, y in enumerate(row["labels"]) if y >= 0]
    expected = math.exp(sum(logps) / len(logps))
    assert tasks.score(model, chat_tokenizer, "mine", heldout) == pytest.approx(expected, rel=1e-4)
    assert tasks.score_key("mine") == "token_probability" and tasks.score_key("extract") == "accuracy"


def test_heldout_chats_that_are_all_too_long_are_said(settings, mine, model, chat_tokenizer):
    settings.max_length = 3
    tasks.use_own(settings, mine)
    with pytest.raises(UserError, match="留出数据：没有一行不超过 3 个 token"):
        tasks.score(model, chat_tokenizer, "mine", tasks.task_chats("mine", 9, 0, heldout=True))


def test_prompts(tmp_path, mine, chat_folder, monkeypatch):
    monkeypatch.setattr(ptuning_v2_demo, "RATES", (1e-1,))
    monkeypatch.setattr(ptuning_v2_demo, "WIDTHS", (2,))
    flags = [*FEW, "--model", str(chat_folder), "--dataset", mine, "--output_dir", str(tmp_path / "out")]
    record = ptuning_v2_demo.main([*flags, "--virtual_tokens", "2", "--max_train_samples", "24"])
    metrics = record["metrics"]
    assert all(0 < metrics[f"token_probability_{kind}"] < 1 for kind in ("before", "prefix", "lora"))
    assert "accuracy_prefix" not in metrics and "new_skill_lora" in metrics
    assert record["data"]["train"]["path"] == mine


def test_comparison(tmp_path, mine, chat_folder, capsys):
    flags = [*FEW, "--model", str(chat_folder), "--dataset", mine, "--output_dir", str(tmp_path / "out")]
    metrics = compare_peft.main([*flags, "--methods", "full,lora_r4,prompt", "--seeds", "2"])["metrics"]
    assert metrics["full"]["token_probability"] > metrics["token_probability_before"]
    assert "token_probability_error" in metrics["lora_r4"]
    assert "忘掉的一栏看不出什么" in capsys.readouterr().out  # 随机的模型不会小世界的问答


def test_low_rank_view(tmp_path, mine, chat_folder):
    flags = [*FEW, "--model", str(chat_folder), "--dataset", mine, "--output_dir", str(tmp_path / "out")]
    metrics = lora_parameter_viz.main(flags)["metrics"]
    assert metrics["token_probability_full"] > metrics["token_probability_before"]


def test_incremental_learns_two_files(tmp_path, mine, chat_folder, capsys):
    other = write_chats(tmp_path / "other.jsonl", 24, "小")
    flags = [*FEW, "--model", str(chat_folder), "--dataset", mine, "--third_dataset", other]
    flags += ["--methods", "lora_r16,replay_10,ewc", "--fisher_rows", "3", "--max_train_samples", "24"]
    record = incremental_lora.main([*flags, "--output_dir", str(tmp_path / "out")])
    assert record["metrics"]["lora_r16"]["task2_after"] > 0
    assert record["metrics"]["switch"]["backward_transfer"] == pytest.approx(0, abs=1e-9)
    assert record["data"]["third"]["path"] == other
    for _ in range(2):  # 第二次直接用，表照样印
        assert "第二样 mine.jsonl，第三样 other.jsonl" in capsys.readouterr().out
        tasks.TASKS.pop("mine", None)
        incremental_lora.main([*flags, "--output_dir", str(tmp_path / "out")])
    write_chats(tmp_path / "other.jsonl", 25, "小")  # 内容变了，旧的结果不能冒充
    with pytest.raises(UserError, match="third_dataset"):
        incremental_lora.main([*flags, "--output_dir", str(tmp_path / "out")])


SCRIPTS = [ptuning_v2_demo, compare_peft, lora_parameter_viz, incremental_lora]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_bad_files_are_said(script, tmp_path, chat_folder):
    one = write_chats(tmp_path / "one.jsonl", 1)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"messages": [', encoding="utf-8")
    odd = tmp_path / "odd.jsonl"
    odd.write_text('{"heading": "x"}', encoding="utf-8")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("", encoding="utf-8")
    for path, said in (
        (one, "至少要两段"),
        (broken, r"broken\.jsonl"),
        (odd, r"odd\.jsonl"),
        (empty, r"empty\.jsonl"),
        (tmp_path / "absent.jsonl", r"absent\.jsonl"),
    ):
        flags = [*FEW, "--model", str(chat_folder), "--output_dir", str(tmp_path / "out")]
        with pytest.raises(UserError, match=said):
            script.main([*flags, "--dataset", str(path)])


def test_the_same_file_twice_is_said(tmp_path, mine):
    with pytest.raises(UserError, match="同一份"):
        incremental_lora.main([*FEW, "--dataset", mine, "--third_dataset", mine])
    with pytest.raises(UserError, match="请检查 --third_dataset 的路径"):
        incremental_lora.main([*FEW, "--dataset", mine, "--third_dataset", mine + ".没有.jsonl"])


def test_a_real_model_gets_its_own_learning_rates(tmp_path, mine, chat_folder):
    """full 预设从头到尾走得完（这里用小模型的文件夹）；学习率是真的模型的，自己给的不动。"""
    flags = ["--preset", "full", "--model", str(chat_folder), "--dataset", mine, "--n_questions", "3"]
    flags += ["--max_steps", "2", "--output_dir", str(tmp_path / "out")]
    record = lora_parameter_viz.main([*flags, "--full_learning_rate", "1e-4"])
    assert record["fingerprint"]["learning_rate"] == lora_parameter_viz.REAL["learning_rate"]
    assert record["fingerprint"]["full_learning_rate"] == 1e-4
    assert record["metrics"]["trainable"] > 0
    for settings in (
        incremental_lora.IncrementalSettings(preset="tiny", model="smollm2", dataset="tiny_world"),
        ptuning_v2_demo.PromptSettings(preset="full", model="文件夹", dataset="tiny_world"),
    ):
        settings.check()
        assert settings.learning_rate < 0.05


def test_nothing_learned_is_said(tmp_path, mine, chat_folder):
    """只走一步，还在预热，学习率是 0：ΔW 全是 0，没有奇异值可看。"""
    flags = [*FEW, "--model", str(chat_folder), "--dataset", mine, "--output_dir", str(tmp_path / "out")]
    with pytest.raises(UserError, match="ΔW 全是 0"):
        lora_parameter_viz.main([*flags, "--max_steps", "1"])
