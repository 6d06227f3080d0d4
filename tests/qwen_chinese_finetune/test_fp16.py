"""fp16 自动混合精度：梯度溢出的那一步不走，放大的倍数减半，训练照常继续；裁剪看的是除回原来倍数之后的梯度。

accelerate 只在加速器上用 fp16；这里让它在 CPU 上走同一条路：autocast 到 float16、torch.amp.GradScaler。倍数从 2²⁰ 开始，
float16 最大只到 65504，所以开头几步真的会溢出。
"""

import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from nlp_common.train import setup

SCRIPTS = {
    "pretrain": "pretrain_chinese-nvidia",
    "sft": "sft_chinese_qwen",
    "reward": "reward_model",
    "dpo": "dpo_chinese_qwen",
}
SMALL = ["--preset", "tiny", "--max_train_samples", "60", "--max_eval_samples", "2", "--max_steps", "12"]
SMALL += ["--per_device_train_batch_size", "2", "--max_grad_norm", "0.5", "--learning_rate", "1e-3"]
SMALL += ["--logging_steps", "1"]
ONLY = {"pretrain": ["--max_length", "64"]}


class Watched(torch.amp.GradScaler):
    """每一步记下：放大的倍数、裁剪后梯度的长度、参数动了没有。"""

    def __init__(self, log: list):
        super().__init__("cpu", init_scale=2.0**20)
        self.log = log

    def step(self, optimizer, *args, **kwargs):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in parameters]
        seen = SimpleNamespace(scale=self.get_scale(), norm=math.inf)
        walk = optimizer.step

        def noted(*args, **kwargs):
            seen.norm = torch.nn.utils.get_total_norm([p.grad for p in parameters]).item()
            return walk(*args, **kwargs)

        optimizer.step = noted
        result = super().step(optimizer, *args, **kwargs)
        optimizer.step = walk
        seen.moved = any(not torch.equal(p, old) for p, old in zip(parameters, before, strict=True))
        seen.finite = all(p.isfinite().all() for p in parameters)
        self.log.append(seen)
        return result


@pytest.fixture
def log(monkeypatch):
    """让 fp16 在 CPU 上可用；返回每一步的记录。"""
    steps, init = [], Accelerator.__init__

    def with_scaler(self, *args, **kwargs):
        init(self, *args, **kwargs)
        assert self.mixed_precision == "fp16"
        self.native_amp, self.scaler = True, Watched(steps)

    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(Accelerator, "__init__", with_scaler)
    monkeypatch.setattr(setup, "precision", lambda _: "fp16")
    yield steps
    AcceleratorState._reset_state(reset_partial_state=True)


def check(log: list) -> None:
    """溢出的那一步不动、倍数减半；别的每一步都走，梯度的长度是除回原来倍数、再裁剪过的。"""
    scale = 2.0**20
    for seen in log:
        assert seen.scale == scale and seen.finite and seen.moved == math.isfinite(seen.norm)
        assert not seen.moved or 1e-3 < seen.norm < 0.5 * 1.001
        scale = scale if seen.moved else scale / 2
    moved = [seen.moved for seen in log]
    assert not any(moved[:2]) and sum(moved) >= 4, "先溢出几步，再走几步"


@pytest.mark.parametrize("stage", SCRIPTS)
def test_overflow_skips_the_step_halves_the_scale_and_goes_on(
    stage, log, load_script, request, base_folder, tmp_path
):
    parent = base_folder if stage == "pretrain" else request.getfixturevalue("chat_folder")
    out = tmp_path / stage
    run = load_script(SCRIPTS[stage]).main(
        [*SMALL, *ONLY.get(stage, []), "--model", str(parent), "--output_dir", str(out)]
    )
    check(log)
    losses = [row["loss"] for row in run["history"]]
    assert len(losses) == 12 and all(map(math.isfinite, losses))
    weights = load_file(out / "model.safetensors").values()
    assert all(w.dtype == torch.float32 for w in weights)  # 主权重一直是 float32


@pytest.fixture
def ppo_arguments(ppo, monkeypatch, chat_folder, reward_folder, tmp_path) -> list[str]:
    monkeypatch.setattr(ppo, "together", lambda *tasks: [task() for task in tasks])  # 在加速器上就是这样
    arguments = ["--model", str(chat_folder), "--reward_model", str(reward_folder)]
    arguments += ["--output_dir", str(tmp_path / "ppo"), "--max_train_samples", "8", "--max_steps", "6"]
    arguments += ["--ppo_epochs", "2", "--max_new_tokens", "6", "--micro_batch_size", "2"]
    arguments += ["--clip_range", "100", "--clip_range_value", "100"]  # 裁剪掉的没有梯度，这里要都有
    return [*SMALL, *arguments, "--save_steps", "3"]


def test_ppo_policy_and_value_share_the_scale(log, ppo, ppo_arguments):
    """一个的梯度溢出、倍数减半之后，另一个的梯度仍然除回对的倍数。"""
    run = ppo.main(ppo_arguments)
    check(log)
    assert len(log) == 6 * 2 * 2 and len(run["history"]) == 6
    assert all(math.isfinite(row[name]) for row in run["history"] for name in ("value_loss", "kl", "score"))


def test_ppo_goes_on_with_the_scale_it_stopped_at(log, ppo, ppo_arguments, monkeypatch):
    """续训时倍数不从头试起：否则前几步又要溢出，结果就与不中断的不同。"""
    step = ppo.ppo_step

    def until_the_fourth(*args):
        if len(log) == 3 * 2 * 2:  # 走完三步，存过检查点
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(ppo, "ppo_step", until_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        ppo.main(ppo_arguments)
    monkeypatch.setattr(ppo, "ppo_step", step)
    ppo.main(ppo_arguments)
    check(log)  # 中断前后连起来，仍是一个倍数一路减下来
    assert len(log) == 6 * 2 * 2
