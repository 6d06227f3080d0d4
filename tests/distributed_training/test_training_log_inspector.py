"""training_log_inspector.py：埋下的看得出，没有的不报，MFU 等于 torch 数的，网页自己打得开，说错的话。"""

import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import log_exam
import planted_runs
import training_log_inspector as script
from log_page import page_of
from log_readers import TrainingLog, read_log
from nlp_common.base.errors import UserError
from small_gpt import Sizes, loss_sum, make_batch, make_model
from step_flops import flops_per_token, mfu, read_shape, shape_of, step_seconds, tokens_per_s

PATH = Path(script.__file__)
DEFAULT = script.InspectSettings(steps=240)


def log_of(losses, **columns):
    points = [{"step": i + 1, "loss": float(loss)} for i, loss in enumerate(losses)]
    for name, values in columns.items():
        for point, value in zip(points, values, strict=True):
            point[name] = value
    return TrainingLog(Path("x/train.log"), "text", points)


def falling(n=200, noise=0.03, seed=0):
    rng = np.random.default_rng(seed)
    return np.exp(2 * np.exp(-np.arange(n) / 60) + noise * rng.standard_normal(n))


def kinds(log, settings=DEFAULT):
    return {finding.kind for finding in script.inspect(log, settings).findings}


# ---------------------------------------------------------------- 算法


def test_robust_z_by_hand():
    """每五点是 −0.2 … 0.2：窗口 15 的中位数是 0，MAD 是 0.1；一点改成 1，z = 1 / 0.14826。"""
    values = np.exp(np.array([-0.2, -0.1, 0.0, 0.1, 0.2] * 12))
    values[29] = math.e
    assert script.robust_z(values, 15)[29] == pytest.approx(1 / 0.14826, rel=1e-3)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 100), st.integers(40, 300))
def test_z_does_not_depend_on_the_scale(seed, scale, n):
    values = falling(n, seed=seed)
    np.testing.assert_allclose(script.robust_z(values), script.robust_z(values * scale), atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_smooth_runs_are_quiet(seed):
    assert kinds(log_of(falling(seed=seed))) == set()


def test_a_spike_is_found_wherever_it_is():
    for at in (5, 50, 120, 198):
        losses = falling()
        losses[at] *= 2
        report = script.inspect(log_of(losses), DEFAULT)
        assert [(f.kind, f.steps) for f in report.findings] == [("spike", [at + 1])]


def test_two_steps_in_a_row_are_one_spike():
    losses = falling()
    losses[100:102] *= 2
    assert script.inspect(log_of(losses), DEFAULT).findings[0].steps == [101]


def test_nan_divergence_plateau():
    losses = falling()
    losses[150:] = math.nan
    assert script.inspect(log_of(losses), DEFAULT).findings[0].steps == [151]
    losses = falling()
    losses[120:] *= np.linspace(1, 3, 80)
    assert "divergence" in kinds(log_of(losses))
    assert kinds(log_of(np.exp(0.03 * np.random.default_rng(0).standard_normal(200)))) == {"plateau"}


def test_repeats():
    noise = 0.05 * np.random.default_rng(0).standard_normal(40)
    losses = falling(noise=0.01) * np.exp(np.tile(noise, 5))
    report = script.inspect(log_of(losses), DEFAULT)
    assert [(f.kind, f.steps) for f in report.findings] == [("repeated", [40])]
    ids = [f"b{i % 90}" for i in range(200)]
    found = script.inspect(log_of(falling(), batch=ids), DEFAULT).findings
    assert found[0].kind == "repeated" and "第 91 步就是第 1 步的那一批" in found[0].said


def test_gradients_and_stalls():
    norms = list(0.5 * np.exp(0.1 * np.random.default_rng(0).standard_normal(200)))
    losses = falling()
    assert kinds(log_of(losses, grad_norm=norms)) == set()
    report = script.inspect(
        log_of(losses, grad_norm=norms), script.InspectSettings(steps=240, max_grad_norm=0.1)
    )
    assert report.findings[0].kind == "clipping" and report.numbers["clipped_share"] == 1.0
    norms[77] = 30.0
    assert script.inspect(log_of(losses, grad_norm=norms), DEFAULT).findings[0].steps == [78]
    assert kinds(log_of(losses, grad_norm=[0.0] * 200)) == {"gradient"}
    seconds = [0.1] * 200
    seconds[30] = 2.0
    assert script.inspect(log_of(losses, step_seconds=seconds), DEFAULT).findings[0].steps == [31]
    seconds[30] = 0.9  # 不到一秒的抖动，不算
    assert kinds(log_of(losses, step_seconds=seconds)) == set()


def test_skipped_steps_and_broken_weights():
    log = log_of(falling())
    log.facts |= {"skipped": 50, "broken_weights": ["model.safetensors 的 w"]}
    assert kinds(log) == {"skipped", "weights"}


def test_what_cannot_be_judged():
    said = "".join(script.inspect(log_of(falling(10)), DEFAULT).cannot)
    for word in ("看不出尖峰", "停住了、发散了", "喂重", "梯度的范数", "停没停过", "token"):
        assert word in said
    said = "".join(script.inspect(log_of([-0.1, 0.2] * 30), DEFAULT).cannot)
    assert "不大于 0" in said
    assert script.inspect(log_of([math.nan] * 50), DEFAULT).findings[0].kind == "nan"


# ---------------------------------------------------------------- 真的小训练


@pytest.mark.parametrize("fault", ["spike", "repeated"])
def test_planted_faults(fault, tmp_path):
    run = planted_runs.train(fault, seed=20)
    for name, write in planted_runs.WRITERS.items():
        report = script.inspect(read_log(write(run, tmp_path / name)), DEFAULT)
        found = {finding.kind for finding in report.findings}
        assert log_exam.ANSWER[fault] in found, name
        assert found <= {log_exam.ANSWER[fault]} | log_exam.FOLLOWS.get(fault, set())
        assert log_exam._right_step(report, run)


@pytest.mark.slow
def test_the_whole_exam(tmp_path):
    record = script.main(
        [
            "--preset",
            "tiny",
            "--output_dir",
            str(tmp_path / "out"),
            "--n_clean",
            "3",
            "--n_planted",
            "1",
            "--seed",
            "3",
        ]
    )
    metrics = record["metrics"]
    assert metrics["recall"] == 1.0 and metrics["false_alarms"] == 0 and metrics["right_step"] == 1.0
    assert (tmp_path / "out" / "faults.svg").exists()


# ---------------------------------------------------------------- MFU


def test_flops_equal_torchs_counter(tmp_path):
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    found = log_exam.check_flops()
    assert found["mfu_over_flop_counter"] == pytest.approx(1, abs=0.02)
    assert found["sdpa_counted_share"] < 0.9  # CPU 上的 SDPA，计数器一次也没有数
    same = {"vocab_size": 120, "attn_implementation": "eager"}
    llama = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 88}
    models = {
        "gpt2": GPT2LMHeadModel(
            GPT2Config(n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0, **same)
        ),
        "qwen": Qwen2ForCausalLM(Qwen2Config(num_key_value_heads=2, **llama, **same)),
        "llama": LlamaForCausalLM(LlamaConfig(head_dim=16, **llama, **same)),
    }
    rows = make_batch(2, 40, 120)[:, :40]
    for name, model in models.items():
        model.config.save_pretrained(tmp_path / name)
        with FlopCounterMode(display=False) as counter:
            model(input_ids=rows).logits.sum().backward()
        ours = 80 * flops_per_token(read_shape(tmp_path / name), 40)
        assert ours == pytest.approx(counter.get_total_flops(), rel=0.02), name


@settings(max_examples=12, deadline=None)
@given(
    st.integers(1, 3), st.sampled_from([1, 2, 4]), st.integers(1, 5), st.integers(1, 40), st.integers(2, 30)
)
def test_flops_of_any_size(layers, heads, inner, length, vocab):
    sizes = Sizes(vocab, 8 * heads, heads, layers, 8 * inner, length)
    model = make_model(sizes, dtype=torch.float32)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss_sum(model, make_batch(1, length, vocab)).backward()
    assert flops_per_token(shape_of(sizes), length) * length == pytest.approx(
        counter.get_total_flops(), rel=0.02
    )


def test_mfu_by_hand(tmp_path):
    assert mfu(1000, 2e9, 4e12) == 0.5
    config = tmp_path / "config.json"
    config.write_text(
        '{"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 10}'
    )
    # 注意力 4·8·8，MLP 2·8·32，输出 8·10：848 个参数；注意力的乘法 12·1·5·8
    assert flops_per_token(read_shape(tmp_path), 5) == 6 * 848 + 480
    log = log_of(falling(), step_seconds=[0.5] * 200)
    told = script.InspectSettings(
        steps=240, model=str(tmp_path), length=5, peak_tflops=1e-6, tokens_per_step=10
    )
    assert script.inspect(log, told).numbers["mfu"] == pytest.approx(20 * 5568 / 1e6)
    told.peak_tflops = 1e-9
    assert "大于 1" in "".join(script.inspect(log, told).cannot)


def test_speeds():
    log = log_of([3, 2, 1], time=[10.0, 12.0, 16.0], tokens=[100, 200, 300])
    assert step_seconds(log) == [(2, 2.0), (3, 4.0)]
    assert tokens_per_s(log, step_seconds(log), None) == pytest.approx(100 / 3)
    assert tokens_per_s(log, step_seconds(log), 30) == 10


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "不是完整的 JSON"),
        ('{"num_experts": 8}', "MoE"),
        ('{"hidden_size": 8}', "num_hidden_layers"),
    ],
)
def test_wrong_configs(text, said, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=said):
        read_shape(tmp_path)


# ---------------------------------------------------------------- 读者看到的


def test_the_page_stands_alone():
    losses = falling()
    losses[100] *= 3
    log = log_of(losses)
    log.notes.append("<script>alert(1)</script>")
    page = page_of(script.inspect(log, DEFAULT))
    assert "<svg" in page and "损失的尖峰" in page and "看不了的" in page
    assert "<script" not in page and "&lt;script&gt;" in page
    links = set(re.findall(r"https?://[^\s\"'<]+", page))
    assert all("w3.org" in link or "purl.org" in link for link in links)  # 只有 SVG 的名字空间
    assert not re.search(r"(src|href)=\"(?!#)", page)


def test_long_logs_make_small_pages():
    losses = falling(30_000)
    losses[20_000] *= 5
    page = page_of(script.inspect(log_of(losses), DEFAULT))
    assert len(page) < 400_000


def run(folder, *words):
    return subprocess.run(
        [sys.executable, str(PATH), *words],
        cwd=folder,
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_a_readers_own_log(tmp_path):
    (tmp_path / "我的.log").write_text(
        "\n".join(f"step {i + 1} loss {loss:.4f}" for i, loss in enumerate(falling())), encoding="utf-8"
    )
    done = run(tmp_path, "--log", "我的.log", "--page", "看.html")
    assert done.returncode == 0, done.stderr
    assert "没有看出毛病" in done.stdout and "预设" not in done.stdout
    assert (tmp_path / "看.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_wrong_arguments(tmp_path):
    with pytest.raises(UserError, match=r"没有 .*none"):
        script.main(["--log", str(tmp_path / "none")])
    (tmp_path / "x.log").write_text("step 1 loss 2.0\n")
    with pytest.raises(UserError, match="网页写不到"):
        script.main(["--log", str(tmp_path / "x.log"), "--page", str(tmp_path)])
    with pytest.raises(UserError, match="--gpu"):
        script.main(["--log", str(tmp_path), "--gpu", "h1000"])
    with pytest.raises(UserError, match="--steps"):
        script.main(["--preset", "tiny", "--steps", "50"])


@pytest.mark.slow
def test_the_page_in_a_browser(tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("没有 chromium")
    losses = falling()
    losses[100] *= 3
    path = tmp_path / "page.html"
    path.write_text(page_of(script.inspect(log_of(losses), DEFAULT)), encoding="utf-8")
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", path.as_uri()]
    done = subprocess.run([browser, *words], capture_output=True, text=True, encoding="utf-8", timeout=120)
    assert "损失的尖峰" in done.stdout and done.stdout.count("<svg") == 1
