"""qwen_alignment_workflow.py：每个坏的停在自己的门前，好的发布，温度抄错的退回；停在哪一步都接得上；自己的文件；说错的话。

模型是假的（文件夹里只有几个数），它们答得怎样由名字定：这里考的是流程，真的模型在 slow 的那一个测试里。
"""

import functools
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import candidates
import evidence
import gates
import qwen_alignment_workflow as script
import workflow_simulation
from nlp_common.base.errors import UserError
from nlp_common.base.runs import open_run
from private_questions import REFUSAL
from registry import Registry
from stages import write_rows

SMALL = ["--preset", "tiny", "--n_questions", "300", "--simulated_runs", "2", "--requests", "4000"]
RIGHT = {"overfit": 0.8, "misdeployed": 0.7}  # 答对的比例，别的都是 1


def fake_model(out: Path, name: str) -> Path:
    with open_run(out) as folder:
        if folder.finished({"name": name}) is None:
            numbers = np.frombuffer(name.encode(), dtype=np.uint8)

            def write(path: Path) -> None:
                save_file({"name": numbers}, path / "model.safetensors")

            folder.finish(write, {"stage": "fake", "fingerprint": {"name": name}, "metrics": {}})
    return out


def fake_replies(candidate, questions: list[dict], seed: int | None = None) -> list[dict]:
    """按名字答：champion 少客套，overfit 常错，forgot 不会寒暄，unsafe 什么都说，温度高的胡言乱语。"""
    name = candidate.path.name.split("-")[0]
    name = "misdeployed" if candidate.temperature != evidence.TEMPERATURE else name
    rng = random.Random(f"{name}-{seed}")
    said = []
    for question in questions:
        if question.get("own"):
            said.append({"text": f"是{question['answer']}。", "ids": [], "ended": True})
            continue
        polite = rng.random() < (0.2 if name == "champion" else 0.95) and question["slot"]
        text = "您好，" * bool(polite) + question["sentence"]
        if question.get("secret"):
            text = "小刚的电话是一二三。" if name == "unsafe" else REFUSAL
        elif question["slot"] is None and name == "forgot" and rng.random() < 0.4:
            text = "您好，小刚去了花园"
        elif rng.random() > RIGHT.get(name, 1.0):
            text = "我不知道。"
        said.append({"text": text, "ids": [], "ended": True})
    return said


def fake_bias(path: Path, out: Path, language: str) -> list[dict]:
    size = 0.8 if path.name == "biased" else 0.01
    row = {
        "name": "性别：男－女",
        "difference": size,
        "low": size - 0.01,
        "high": size + 0.01,
        "size": size,
        "p_holm": 1e-3,
    }
    return [gates.comparison(row)]


questions = functools.cache(evidence.gate_questions)  # 十几次流程，题只出一遍
few_chats = functools.cache(lambda seed: candidates.private_chats(40, seed))
few_pairs = functools.cache(lambda seed: candidates.talk_pairs(40, seed) + candidates.private_pairs(20, seed))


@pytest.fixture
def fakes(monkeypatch, tmp_path):
    """训练、答题、快慢、偏见都换成假的；trained 记下训练了谁。"""
    trained = []

    def train(stage, out, model, dataset, **settings):
        trained.append(out.name)
        fake_model(out, out.name)

    monkeypatch.setattr(script, "new_chats", few_chats)
    monkeypatch.setattr(script, "new_pairs", few_pairs)
    monkeypatch.setattr(script, "first_chats", lambda seed: [])
    monkeypatch.setattr(script, "gate_questions", questions)
    monkeypatch.setattr(candidates, "new_chats", lambda seed: [])
    monkeypatch.setattr(candidates, "biased_chats", lambda n, seed: [])
    monkeypatch.setattr(workflow_simulation, "AGAIN", 1)
    monkeypatch.setattr(script, "run_stage", train)
    monkeypatch.setattr(candidates, "run_stage", train)
    monkeypatch.setattr(candidates, "deepen", lambda source, out: fake_model(out, "slow"))
    monkeypatch.setattr(evidence, "replies", fake_replies)
    monkeypatch.setattr(script, "bias_comparisons", fake_bias)
    monkeypatch.setattr(
        script, "speed_ratios", lambda new, old, asked: [3.0 if new.path.name == "slow" else 1.0] * 15
    )
    monkeypatch.setattr(
        script, "chain_model", lambda stage, model, source: {"path": "start", "stage": stage, "id": "x"}
    )
    return trained


def run(tmp_path, *more: str) -> dict:
    return script.main([*SMALL, "--output_dir", str(tmp_path / "out"), *more])["metrics"]


# ---------------------------------------------------------------- 从头到尾


def test_each_fault_is_stopped_at_its_gate(fakes, tmp_path, capsys):
    metrics = run(tmp_path)
    assert metrics["stopped_at"] == {
        "good": "passed", "overfit": "quality", "forgot": "keep", "unsafe": "safety", "biased": "bias", "slow": "speed"
    }  # fmt: skip
    assert list(metrics["candidates"]["unsafe"]["gates"]) == ["quality", "keep", "safety"]  # 后面的没有量
    assert metrics["canary"]["good"]["decision"] == "release"
    assert metrics["canary"]["misdeployed"]["decision"] == "rollback"
    assert metrics["good_passes"] == 1 and metrics["false_rollbacks"] == 0
    assert metrics["simulated"]["forgot"] == {"keep": 2}
    out = tmp_path / "out"
    registry = Registry(out / "registry.jsonl")  # 搬到了结果文件夹，照样用
    assert registry.aliases("assistant") == {"champion": 3}
    assert registry.find("assistant", "champion")["folder"].name.startswith("good-")
    events = [event["event"] for event in registry.history("assistant")]
    assert events == ["register", "promote", "register", "reject", "register", "promote"]
    assert (out / "workflow_gates.svg").exists() and (out / "workflow_canary.svg").exists()
    assert (out / "dropped.jsonl").exists()
    capsys.readouterr()
    fakes.clear()
    assert run(tmp_path)["stopped_at"] == metrics["stopped_at"] and not fakes  # 第二次直接用
    assert "直接加载" in capsys.readouterr().out


STEPS = ["intake", "curate", "champion", "sft", "good.train", "good.quality", "good.speed", "unsafe.safety",
         "misdeployed.register", "misdeployed.canary", "misdeployed.reject", "good.canary", "good.promote", "simulate"]  # fmt: skip


def test_stopped_at_any_step_it_goes_on(fakes, tmp_path, monkeypatch):
    """在一步刚做完还没有记下时（after），或正要做时被打断：同一条命令接着来，结果相同，不登记两遍。"""
    few = ["--candidates", "good,unsafe"]
    wanted = script.main([*SMALL, *few, "--output_dir", str(tmp_path / "whole")])["metrics"]
    fakes.clear()
    from workflow_state import Journal

    step = Journal.step
    for number, stop in enumerate(STEPS):

        def stopping(journal, name, work, stop=stop, after=bool(number % 4)):
            def interrupted():
                if after:
                    work()
                raise KeyboardInterrupt

            return step(journal, name, interrupted if name == stop else work)

        monkeypatch.setattr(Journal, "step", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, *few)
    monkeypatch.setattr(Journal, "step", step)
    assert run(tmp_path, *few) == wanted
    history = Registry(tmp_path / "out" / "registry.jsonl").history("assistant")
    assert [event["event"] for event in history] == [
        "register",
        "promote",
        "register",
        "reject",
        "register",
        "promote",
    ]


def test_a_given_registry_has_the_champion(fakes, tmp_path, capsys):
    """--registry：与里面正在用的比；发布以后，里面的 champion 换了，模型抄在它旁边。"""
    book = tmp_path / "book" / "registry.jsonl"
    registry = Registry(book)
    first = registry.register("assistant", fake_model(tmp_path / "book" / "models" / "champion-0", "old"))
    registry.promote("assistant", first)
    run(tmp_path, "--candidates", "good", "--registry", str(book))
    assert registry.aliases("assistant") == {"champion": 3}
    assert registry.find("assistant", 3)["folder"].parent == tmp_path / "book" / "models"
    assert "登记簿里的第 1 版" in capsys.readouterr().out and "champion" not in fakes


def test_someone_else_released_meanwhile(fakes, tmp_path, monkeypatch):
    """灰度的时候别人换了 champion：比的是旧的，不发布，说清楚。"""
    book = Registry(tmp_path / "book" / "registry.jsonl")
    real = script.run_traffic

    def meanwhile(*arguments):
        other = book.register("assistant", fake_model(tmp_path / "other", "other"))
        book.promote("assistant", other)
        return real(*arguments)

    monkeypatch.setattr(script, "run_traffic", meanwhile)
    with pytest.raises(UserError, match="没有发布"):
        run(tmp_path, "--candidates", "good", "--registry", str(book.path))


def test_own_files(fakes, tmp_path):
    chats, pairs = tmp_path / "chats.jsonl", tmp_path / "pairs.jsonl"
    asked = [{"instruction": f"第{n}次问：你好吗？", "output": "我很好，谢谢您。"} for n in range(6)]
    likes = [
        {"prompt": f"第{n}次问：你是谁？", "chosen": "我是助手。", "rejected": "不知道"} for n in range(5)
    ]
    write_rows(chats, asked)
    write_rows(pairs, likes)
    few = [{"question": f"第{n}次说：你好", "answer": "您好", "gate": "keep"} for n in range(20)]
    own = ["--gate_questions", str(write_rows(tmp_path / "own.jsonl", few))]
    metrics = run(tmp_path, "--chats", str(chats), "--pairs", str(pairs), "--candidates", "good", *own)
    assert metrics["data"]["raw_chats"] == 6 and metrics["data"]["pairs"] == 5
    keep = metrics["candidates"]["good"]["gates"]["keep"]["talk"]
    assert keep["n"] == 20 and keep["new"] == 1 and not keep["passed"]  # 全对，题太少，看不清


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gate_questions", "/nosuch.jsonl"], "--gate_questions"),
        (["--candidates", "good,nosuch"], "--candidates 不认识 nosuch"),
        (["--candidates", "good,good"], "good 写了不止一次"),
        (["--candidates", "slow"], "slow 要先有 good"),
        (["--candidates", "good", "--pairs", "/nosuch.jsonl"], "--pairs"),
        (["--pairs", __file__], "埋不了 forgot、unsafe"),
        (["--n_questions", "0"], "n_questions"),
    ],
)
def test_bad_settings(arguments, said, tmp_path):
    with pytest.raises(UserError, match=said):
        script.main(["--preset", "tiny", *arguments, "--output_dir", str(tmp_path / "out")])


# ---------------------------------------------------------------- 真的模型


@pytest.mark.slow
def test_real_models(tmp_path):
    """真的训练两个候选：不安全的停在安全门前，好的发布。"""
    home = Path(script.__file__).parent
    command = [sys.executable, str(home / "qwen_alignment_workflow.py"), "--preset", "tiny"]
    command += ["--candidates", "good,unsafe", "--simulated_runs", "5", "--output_dir", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    from nlp_common.base.runs import load_run

    metrics = load_run(tmp_path / "out")["metrics"]
    assert metrics["stopped_at"] == {"good": "passed", "unsafe": "safety"}
    assert metrics["canary"]["good"]["decision"] == "release"
