"""quantized_deploy.py：每一种坐进座位，logits 与自己的模型相同，字节变小；没有装、写错了说清；DeepSpeed 的设置。"""

import json

import pytest
import torch

import deepspeed_part
import quantized_deploy as script
import quantized_models
from nlp_common.base.errors import UserError
from nlp_common.lm.loading import load_causal_lm
from packed_weights import save_packed
from quantized_models import VARIANTS, load_variant

PROMPTS = [[5, 6, 7, 8], [9, 10, 11]]


@pytest.fixture(scope="module")
def plain(base_folder):
    return load_variant("fp32", str(base_folder), 4)


def logits_of(loaded):
    """读提示，再走一步。"""
    first = loaded.slots.prefill([list(prompt) for prompt in PROMPTS])
    second = loaded.slots.step([12, 13])
    for row in (1, 0):
        loaded.slots.drop(row)
    return torch.cat([first, second]).float()


def test_plain_is_the_model(plain, base_folder):
    _, model = load_causal_lm(str(base_folder))
    with torch.no_grad():
        wanted = [
            model(torch.tensor([each])).logits[0, -1]
            for each in (*PROMPTS, [*PROMPTS[0], 12], [*PROMPTS[1], 13])
        ]
    assert (logits_of(plain) - torch.stack(wanted)).abs().max() < 1e-5
    assert plain.n_bytes == 4 * sum(p.numel() for p in model.parameters()) + sum(
        4 * b.numel() for b in model.buffers()
    )


def test_our_int4(plain, base_folder, monkeypatch):
    monkeypatch.setattr(quantized_models, "N_CALIBRATION", 8)
    loaded = load_variant("int4", str(base_folder), 4)
    assert loaded.n_bytes < plain.n_bytes / 5 and loaded.where == "磁盘"
    difference = (logits_of(loaded) - logits_of(plain)).abs().max()
    assert 1e-4 < difference < 3


def test_int4_from_a_packed_folder(base_folder, tmp_path):
    """quantization.py 存下的文件夹，直接读：与存的时候一样。"""
    from calibration import calibration_rows
    from quantization import quantize_model

    tokenizer, model = load_causal_lm(str(base_folder))
    done = quantize_model(model, tokenizer, calibration_rows(tokenizer, 4, 0), "rtn", 4, 32)
    save_packed(tmp_path / "packed", model, tokenizer, done.packed)
    loaded = load_variant("int4", str(tmp_path / "packed"), 4)
    wanted = quantized_models.seated(model, tokenizer, 0, "", 4, 512)
    assert (logits_of(loaded) - logits_of(wanted)).abs().max() < 1e-5
    assert loaded.n_bytes == (tmp_path / "packed" / "packed.safetensors").stat().st_size


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bnb_int8", "bnb_nf4"])
def test_bitsandbytes(name, plain, base_folder):
    pytest.importorskip("bitsandbytes", reason="没有装 bitsandbytes")
    loaded = load_variant(name, str(base_folder), 4)
    assert loaded.n_bytes < plain.n_bytes / 2
    assert 1e-4 < (logits_of(loaded) - logits_of(plain)).abs().max() < 3


def test_odd_widths(base_folder):
    assert quantized_models.odd_widths(str(base_folder)) == ["down_proj"]  # 352 = 5.5 × 64


def test_what_is_not_installed_is_said(monkeypatch, base_folder, tmp_path):
    monkeypatch.setattr(quantized_models, "find_spec", lambda name: None)
    assert VARIANTS["bnb_nf4"].missing() == quantized_models.INSTALL_BNB
    with pytest.raises(UserError, match="没有装 bitsandbytes：pip install bitsandbytes"):
        load_variant("bnb_int8", str(base_folder), 4)
    argv = ["--preset", "tiny", "--model", str(base_folder), "--variants", "bnb_int8", "--n_questions", "16"]
    with pytest.raises(UserError, match="一样也没有装"):
        script.main([*argv, "--output_dir", str(tmp_path / "out")])


def test_arguments_that_cannot_be():
    for argv, match in (
        (["--variants", "int3"], "不认识 int3"),
        (["--variants", "fp32,"], "空的一项"),
        (["--serve", "int3"], "不认识 int3"),
        (["--n_questions", "2"], "16"),
    ):
        with pytest.raises(UserError, match=match):
            script.main(["--preset", "tiny", *argv])


def test_serve_says_what_the_lesson_reads(base_folder, monkeypatch, capsys):
    served = []
    monkeypatch.setattr(script, "serve", lambda service, settings: served.append((service, settings)) or {})
    script.main(
        ["--preset", "tiny", "--model", str(base_folder), "--serve", "fp32", "--name", "mine", "--slots", "3"]
    )
    service, settings = served[0]
    assert script.LOADED.search(capsys.readouterr().out)[2] == "内存"
    assert service.name == "mine" and service.batcher.slots == settings.slots == 3
    service.batcher.close()


def test_commands(capsys):
    assert script.main(["--preset", "tiny", "--commands", "--model", "merged"]) == {}
    said = capsys.readouterr().out
    assert "vllm serve merged " in said and "sglang.launch_server --model-path merged" in said


def test_show_and_draw(tmp_path, capsys):
    row = {
        "tokens_per_s": 900.0,
        "first_ms": {"p50": 1.0, "p95": 2.0, "p99": 3.0},
        "same": 1.0,
        "lost": 0,
        "mixed": 0,
    }
    its = {
        "bytes": 1000,
        "where": "内存",
        "load_seconds": 1.0,
        "qa_accuracy": 1.0,
        "clients1": row,
        "clients16": row,
    }
    metrics = {"n": 16, "fp32": its, "int4": its}
    script.show(metrics)
    script.draw(tmp_path, metrics)
    assert "手写的 int4" in capsys.readouterr().out and (tmp_path / "deploy_speed.svg").exists()


# ---------------------------------------------------------------- DeepSpeed


def test_its_settings(tmp_path, monkeypatch):
    path = tmp_path / "ds.json"
    for text, match in (
        ("{", "不是合法的 JSON"),
        ("[]", "JSON 对象"),
        ('{"dtype": "int8"}', "8577"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=match):
            deepspeed_part.read_config(path)
    with pytest.raises(UserError, match="读不了"):
        deepspeed_part.read_config(tmp_path / "none.json")
    monkeypatch.setenv("WORLD_SIZE", "2")
    ours = deepspeed_part.read_config(script.HOME / "deepspeed_inference.json")
    assert ours["tensor_parallel"]["tp_size"] == 2 and ours["dtype"] == "bf16"
    assert (
        json.loads((script.HOME / "deepspeed_inference.json").read_text("utf-8"))["tensor_parallel"][
            "tp_size"
        ]
        == 1
    )


def test_the_settings_of_deepspeed_alone():
    with pytest.raises(UserError, match="要与 --deepspeed 一起给"):
        script.main(["--preset", "tiny", "--deepspeed_config", "a.json"])


def test_without_deepspeed(base_folder, monkeypatch):
    monkeypatch.setattr(deepspeed_part, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="没有装 DeepSpeed"):
        script.main(["--preset", "tiny", "--model", str(base_folder), "--deepspeed"])


@pytest.mark.slow
def test_deepspeed_refuses_int8(base_folder):
    pytest.importorskip("deepspeed", reason="没有装 deepspeed")
    found = deepspeed_part.run(str(base_folder), script.HOME / "deepspeed_inference.json", 16)
    assert found["int8_refused"] == 1.0 and found["difference"] < 1.0
