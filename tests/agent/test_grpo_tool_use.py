"""grpo_tool_use.py：掩码（工具的结果梯度恰好是 0）、优势、奖励、一步更新，都与手算的比；中断后接着来，结果不变。"""

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

import grpo_tool_use as g
import tool_world as tw
from episodes import Episode, give_results
from nlp_common.base.errors import UserError
from nlp_common.lm.chatml import answer_ids, prompt_ids
from nlp_common.lm.losses import IGNORE
from nlp_common.lm.tool_text import call_text
from tiny_agent import build_base, build_tokenizer
from tool_format import parse_reply

AGENT = Path(g.__file__).resolve().parent


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """没训练过的小模型，存成文件夹。"""
    folder = tmp_path_factory.mktemp("agent") / "base"
    for each in (build_base(tokenizer, 0), tokenizer):
        each.save_pretrained(folder)
    return folder


def settings_of(**changes) -> g.GRPOSettings:
    given = {"max_steps": 2, "n_tasks": 2, "num_generations": 2, "micro_batch_size": 32, "max_new_tokens": 8}
    given |= {"learning_rate": 0.1, "n_questions": 4, "weight_decay": 0.0, "adam_beta2": 0.999}
    return g.GRPOSettings(**given | changes)


def scripted(tokenizer, task: dict, lines: list[str]) -> Episode:
    """照剧本玩完的一局。"""
    ids = prompt_ids(tokenizer, task["messages"])
    episode = Episode(task, list(task["messages"]), ids, [0] * len(ids))
    for line in lines:
        said = answer_ids(tokenizer, line)
        episode.ids, episode.spoken = episode.ids + said, episode.spoken + [1] * len(said)
        if calls := parse_reply(line).calls:
            episode.calls.append(calls)
            results = [tw.run_tool(task, {"name": c.name, "arguments": c.arguments}) for c in calls]
            give_results(episode, tokenizer, results)
        else:
            episode.answer = line
    return episode


@pytest.fixture(scope="module")
def task():
    return tw.tasks(1, 3, kinds={"look_up": 1})[0]


def right_lines(task: dict) -> list[str]:
    return [*(call_text(step) for step in task["steps"]), task["reply"]]


# ---- 奖励与优势 ----


def test_the_reward_is_the_answer_less_the_calls(tokenizer, task):
    right, call = right_lines(task), call_text(task["steps"][0])
    cases = [
        (right, 0.95, 0),
        ([call, *right], 0.9, 1),  # 查了两遍
        ([right[-1]], 1.0, 0),  # 没查就蒙对了：程序只看结局
        ([call, "不知道"], 0.0, 0),  # 错了的不再扣
        (["不知道"], 0.0, 0),
        ([call] * 25 + [right[-1]], 0.0, 24),
    ]
    for lines, wanted, needless in cases:
        episode = scripted(tokenizer, task, lines)
        assert g.reward(episode, 0.05) == pytest.approx(wanted) and g.needless_calls(episode) == needless
        assert g.reward(episode, 0.0) == float(lines[-1] == right[-1])
    episode = scripted(tokenizer, task, right)
    episode.answer = None  # 没有说完
    assert g.reward(episode, 0.05) == 0.0


def test_advantages_are_computed_within_each_task():
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.95, 0.95, 0.95, 0.95, 1.0, 0.0, 0.0, 0.0])
    found = g.group_advantages(rewards, 4).view(3, 4)
    std = math.sqrt(4 * 0.25 / 3)  # 除以 G−1
    assert found[0].tolist() == pytest.approx(
        [0.5 / (std + 1e-4), *[-0.5 / (std + 1e-4)] * 2, 0.5 / (std + 1e-4)]
    )
    assert found[1].tolist() == [0.0] * 4  # 全一样：没有信号
    assert found[2, 0] > 0 > found[2, 1] and found[2].sum().item() == pytest.approx(0, abs=1e-6)


def test_a_tool_that_fails_is_no_needless_call(tokenizer, task):
    call = {"name": "look_up", "arguments": task["steps"][0][0]["arguments"]}
    one, other = (task | {"luck": random.Random(3)} for _ in range(2))  # 同一道题的两局
    said = [g.shaky_tool(0.5, one, call) for _ in range(20)]
    assert said == [g.shaky_tool(0.5, other, call) for _ in range(20)]  # 运气相同
    assert {each in g.FAILURES for each in said} == {True, False}
    assert all(each in g.FAILURES or each == tw.run_tool(task, call) for each in said)
    episode = scripted(tokenizer, task, [*right_lines(task)[:1], *right_lines(task)])
    assert g.needless_calls(episode) == 1
    episode.messages = [{"role": "tool", "content": g.FAILURES[0]}]  # 头一次失灵，再来一次
    assert g.needless_calls(episode) == 0


# ---- 掩码 ----


class Logits(torch.nn.Module):
    """logits 自己就是参数的"模型"：损失对每个位置的 logits 的梯度，一看便知。"""

    def __init__(self, rows: int, width: int, vocabulary: int):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.randn(rows, width, vocabulary, dtype=torch.float64))

    def forward(self, input_ids, use_cache, logits_to_keep):
        return SimpleNamespace(logits=self.logits[:, logits_to_keep])


def two_episodes(tokenizer, task):
    call = call_text(task["steps"][0])
    return [scripted(tokenizer, task, right_lines(task)), scripted(tokenizer, task, [call, call, "不知道"])]


def batch_of(episodes, tokenizer, advantages, learn_results=False):
    rows = [
        g.labelled(e, learn_results) | {"advantage": a} for e, a in zip(episodes, advantages, strict=True)
    ]
    return g.collate(rows, tokenizer.pad_token_id)


def test_the_gradient_on_tool_results_is_exactly_zero(tokenizer, task):
    episodes = two_episodes(tokenizer, task)
    batch = batch_of(episodes, tokenizer, [1.0, -0.5])
    torch.manual_seed(0)
    model = Logits(*batch["input_ids"].shape, len(tokenizer))
    g.policy_loss(model, **batch).backward()
    touched = model.logits.grad.abs().sum(-1) != 0  # (B, T)：位置 t 的 logits 猜的是 t+1
    results = 0
    for row, episode in enumerate(episodes):
        n = len(episode.ids)
        said = torch.tensor(episode.spoken, dtype=torch.bool)
        assert torch.equal(touched[row, : n - 1], said[1:])  # 每一个：学的都是模型说的，一个不漏
        assert not touched[row, n - 1 :].any()  # 填充
        results += int((~said[1:] & torch.tensor(episode.spoken).cumsum(0)[1:].bool()).sum())
    assert results > 40  # 工具的结果真的有那么多 token
    wrong = batch_of(episodes, tokenizer, [1.0, -0.5], learn_results=True)
    model.logits.grad = None
    g.policy_loss(model, **wrong).backward()
    more = model.logits.grad.abs().sum(-1) != 0
    assert int(more.sum()) == int(touched.sum()) + results


def test_the_labels_spell_what_the_model_said(tokenizer, task):
    for episode in two_episodes(tokenizer, task):
        labels = g.labelled(episode, False)["labels"]
        said = [m["content"] for m in episode.messages if m["role"] == "assistant"]
        lines = said or [
            *(call_text([{"name": c.name, "arguments": c.arguments}]) for s in episode.calls for c in s)
        ]
        lines = lines + ([episode.answer] if episode.answer and not said else [])
        kept = tokenizer.decode([token for token in labels if token != IGNORE])
        assert kept == "".join(line + "<|im_end|>" for line in lines)
        story = next(m["content"] for m in episode.messages if m["role"] == "tool")
        assert story not in kept


def test_the_loss_equals_a_hand_computation():
    """两局，各五个 token；A = 2 与 −1，logits 只在两个词里分：log π 用纸笔算得出来。"""
    ids = torch.tensor([[0, 1, 1, 0, 1], [0, 0, 1, 1, 0]])
    labels = torch.tensor([[IGNORE, 1, IGNORE, 0, 1], [IGNORE, IGNORE, 1, IGNORE, IGNORE]])
    model = Logits(2, 5, 2)
    with torch.no_grad():
        model.logits[:] = 0.0
        model.logits[0, 2, 0] = math.log(3.0)  # 猜第 3 个 token：0 的概率 3/4
        model.logits[1, 1, 1] = math.log(4.0)  # 猜第 2 个 token：1 的概率 4/5
    loss = g.policy_loss(model, ids, labels, torch.tensor([2.0, -1.0]))
    by_hand = -(2.0 * (math.log(0.5) + math.log(0.75) + math.log(0.5)) - 1.0 * math.log(0.8))
    assert loss.item() == pytest.approx(by_hand, abs=1e-6)
    loss.backward()
    # ∂L/∂z = −A(1[y] − π)
    assert model.logits.grad[0, 2].tolist() == pytest.approx([-2 * 0.25, 2 * 0.25], abs=1e-6)
    assert model.logits.grad[1, 1].tolist() == pytest.approx([-0.2, 0.2], abs=1e-6)
    assert model.logits.grad[0, 1].abs().sum() == 0  # 猜的是工具的结果


# ---- 一步 ----


@pytest.mark.parametrize("size", [1, 3, 32])
def test_a_step_is_the_gradient_of_the_formula(tokenizer, task, monkeypatch, size):
    """分几份算都是同一步：梯度 = −(1/Σ|o|) Σ A_i Σ_t ∇log π，没有信号的组只进分母。"""
    other = tw.tasks(1, 5, kinds={"direct": 1})[0]
    episodes = [
        *two_episodes(tokenizer, task),
        scripted(tokenizer, other, ["不知道"]),
        scripted(tokenizer, other, ["不知道的"]),
    ]
    monkeypatch.setattr(g, "play", lambda *given, **more: episodes)
    model = build_base(tokenizer, 0).double()
    settings = settings_of(micro_batch_size=size, max_grad_norm=1e9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    stats = g.grpo_step(model, optimizer, [task, other], tokenizer, settings, Accelerator(cpu=True), 0)
    assert stats["zero_groups"] == 0.5 and stats["right"] == 0.25 and stats["needless"] == 0.25

    by_hand = build_base(tokenizer, 0).double()
    advantages = g.group_advantages(torch.tensor([0.95, 0.0]), 2).tolist()
    total = sum(sum(episode.spoken) for episode in episodes)
    for episode, advantage in zip(episodes[:2], advantages, strict=True):
        logps = by_hand(torch.tensor([episode.ids])).logits[0].log_softmax(-1)  # (T, V)
        said = [t for t in range(1, len(episode.ids)) if episode.spoken[t]]
        sum(-advantage * logps[t - 1, episode.ids[t]] / total for t in said).backward()
    for new, old, other_parameter in zip(model.parameters(), before, by_hand.parameters(), strict=True):
        assert torch.allclose(new, old - 0.1 * other_parameter.grad, atol=1e-6)


# ---- 整个脚本 ----


def arguments(folder: Path, out: Path, *more: str) -> list[str]:
    small = ["--max_steps", "4", "--n_tasks", "2", "--num_generations", "2", "--max_new_tokens", "8"]
    where = ["--preset", "tiny", "--model", str(folder), "--output_dir", str(out)]
    return [*where, *small, "--n_questions", "4", "--save_steps", "2", *more]


def learnable(episode, call_cost):
    """没训练过的模型什么也答不对：换一个总有信号的奖励，只看更新。"""
    return float(len(episode.ids) % 7) + episode.ids[-1] % 5


def test_an_interrupted_run_goes_on_to_the_same_result(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(g, "reward", learnable)
    whole = g.main(arguments(folder, tmp_path / "whole"))
    save, stopped = g.save_checkpoint, []

    def save_then_stop(stage, accelerator, step, history):
        save(stage, accelerator, step, history)
        stopped.append(step)
        raise KeyboardInterrupt

    monkeypatch.setattr(g, "save_checkpoint", save_then_stop)
    with pytest.raises(KeyboardInterrupt):
        g.main(arguments(folder, tmp_path / "again"))
    monkeypatch.setattr(g, "save_checkpoint", save)
    again = g.main(arguments(folder, tmp_path / "again"))
    assert stopped == [2] and again["history"] == whole["history"] and len(whole["history"]) == 4
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    start = load_file(folder / "model.safetensors")
    assert any(not torch.equal(first[name], start[name]) for name in first)  # 真的更新了
    assert "SFT → GRPO" in capsys.readouterr().out and (tmp_path / "whole" / "grpo_tool_use.svg").exists()


def test_as_a_reader_runs_it(folder, tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            str(AGENT / "grpo_tool_use.py"),
            *arguments(folder, tmp_path / "out", "--max_steps", "1"),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))
    assert record["metrics"]["before_greedy"]["n"] == 4 and "不必用就不用" in done.stdout


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--num_generations", "1"], "--num_generations"),
        (["--call_cost", "0.5"], "--call_cost"),
        (["--learning_rate", "0"], "--learning_rate"),
        (["--model", "没有"], "没有"),
    ],
)
def test_mistakes_are_explained_in_chinese(wrong, said, tmp_path):
    with pytest.raises(UserError, match=said):
        g.main(["--preset", "tiny", "--output_dir", str(tmp_path / "out"), *wrong])
