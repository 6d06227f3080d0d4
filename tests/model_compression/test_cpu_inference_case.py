"""cpu_inference_case.py：每种引擎一行，KL 与答对的比例；没有装的跳过，坏了的不连累别的；屋顶线的算法。"""

import sys

import pytest
import torch

import cpu_inference_case as script
import engine_probe
import engines
import roofline
from nlp_common.base.errors import UserError
from nlp_common.lm.loading import load_causal_lm

SMALL = ["--preset", "tiny", "--prompt_tokens", "8", "--new_tokens", "3", "--n_questions", "2"]


@pytest.fixture
def in_process(monkeypatch):
    """不另开进程：同样的 engine_probe，在这里面跑。"""

    class Done:
        returncode, stderr = 0, ""

    def run(command, **_):
        monkeypatch.setattr(sys, "argv", command[1:])
        done = Done()
        try:
            engine_probe.main()
        except UserError as error:
            done.returncode, done.stderr = 2, f"错误：{error}"
        return done

    monkeypatch.setattr(script.subprocess, "run", run)
    monkeypatch.setattr(script, "copy_bandwidth", lambda: 1e10)


def test_a_row_for_every_engine(base_folder, tmp_path, in_process, monkeypatch, capsys):
    if engines.missing("onnx"):
        pytest.skip("没有装 onnxruntime")
    monkeypatch.setitem(script.PRECISIONS, "onnx", ("fp32",))
    monkeypatch.setitem(script.PRECISIONS, "torch", ("fp32", "int8"))
    argv = [*SMALL, "--model", str(base_folder), "--engines", "torch,onnx"]
    argv += ["--output_dir", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    metrics = script.main(argv)["metrics"]
    assert abs(metrics["torch_fp32"]["kl"]) < 1e-6 > abs(metrics["onnx_fp32"]["kl"])
    assert metrics["onnx_fp32"]["max_difference"] < 1e-3
    assert metrics["torch_int8"]["kl"] > 1e-7
    for name in ("torch_fp32", "torch_int8", "onnx_fp32"):
        row = metrics[name]
        assert min(row["prefill_tokens_per_s"], row["decode_tokens_per_s"], row["load_seconds"]) > 0
        assert {
            "qa_accuracy",
            "peak_memory_mb",
            "model_memory_mb",
            "batch_8",
            "bandwidth_share",
        } <= row.keys()
    row = metrics["torch_fp32"]
    share = row["decode_tokens_per_s"] * row["bytes_per_token"] / 1e10
    assert row["bandwidth_share"] == pytest.approx(share)
    assert set(metrics["our_loop"]) == {"batch_1", "batch_8"}
    assert "roofline" in (tmp_path / "out" / "roofline.svg").name
    out = capsys.readouterr().out
    assert "指令集" in out and "transformers.generate" in out
    assert script.main(argv)["metrics"] == metrics  # 第二次直接用


def test_one_that_fails_does_not_stop_the_others(base_folder, tmp_path, in_process, monkeypatch, capsys):
    for name in ("onnx", "openvino", "llama"):
        monkeypatch.setitem(script.PRECISIONS, name, ("fp32",))
    monkeypatch.setattr(script, "installed", lambda: ["torch", "onnx"])
    monkeypatch.setitem(script.PRECISIONS, "torch", ("fp32",))
    monkeypatch.setattr(script, "prepare", broken)
    argv = [*SMALL, "--model", str(base_folder), "--output_dir", str(tmp_path / "out")]
    metrics = script.main(argv)["metrics"]
    out = capsys.readouterr().out
    assert "torch_fp32" in metrics and "onnx_fp32" not in metrics
    assert "ONNX Runtime fp32 没有量成：盘坏了" in out
    assert "没有装 OpenVINO" in out and "pip install xllamacpp" in out


def broken(_folder, engine, _precision, _cache):
    if engine == "onnx":
        raise UserError("盘坏了")


def test_wrong_arguments():
    for argv, said in (
        (["--engines", "torch,tvm"], "tvm.*可以是"),
        (["--engines", "torch,"], "空的一项"),
        (["--prompt_tokens", "600"], "要小于 512"),
        (["--new_tokens", "0"], "正整数"),
    ):
        with pytest.raises(UserError, match=said):
            script.main(["--preset", "tiny", *argv])


@pytest.mark.slow
def test_in_processes_of_their_own(base_folder, tmp_path):
    argv = [*SMALL, "--model", str(base_folder), "--engines", "torch", "--output_dir", str(tmp_path / "out")]
    metrics = script.main(argv)["metrics"]
    assert 0 < metrics["torch_fp32"]["model_memory_mb"] < metrics["torch_fp32"]["peak_memory_mb"]


# ---------------------------------------------------------------- 小的部分


def test_reference_logits(base_folder, tmp_path):
    """float32 的标准是一段一段算的；与一批左填充的一样。"""
    tokenizer, model = load_causal_lm(str(base_folder))
    found = script.next_logits(model, tokenizer, [[5, 6, 7], [8]])
    engine = engines.load(str(base_folder), "torch")
    assert torch.allclose(found, engine.logits([[5, 6, 7], [8]]), atol=1e-4)


def test_kv_bytes_by_hand(base_folder):
    _, model = load_causal_lm(str(base_folder))
    config = model.config  # 2 层，4 个键值头，一头 32 维：一个 token 2 · 2 · 4 · 32 个数
    assert roofline.kv_bytes(config, 10) == 4 * 512 * 10
    assert roofline.kv_bytes(config, 10, 2) == 2 * 512 * 10


def test_explain():
    said = roofline.explain(["avx2"])
    assert "没有 VNNI" in said and "没有 bf16" in said
    said = roofline.explain(["avx512_f", "avx512_vnni", "amx_bf16"])
    assert "没有 VNNI" not in said and "AMX" in said
    assert "认不出" in roofline.explain([])


def test_speed_is_the_difference():
    """写 1 个 token 的时间是读提示的；多写的几个，时间是多出来的那一段。"""
    asked = []

    class Fake:
        def generate(self, prompts, n, stop):
            asked.append((len(prompts), n, stop))

    found = engine_probe.speed(Fake(), [[1, 2, 3], [4, 5, 6]], 7)
    assert asked[:2] == [(2, 1, False), (2, 8, False)] and found.keys() == {
        "prefill_tokens_per_s",
        "decode_tokens_per_s",
    }


def test_round_numbers():
    assert roofline.round_numbers(4, 230) == [5, 10, 20, 50, 100, 200]


def test_bandwidth():
    assert roofline.copy_bandwidth(1) > 1e7
