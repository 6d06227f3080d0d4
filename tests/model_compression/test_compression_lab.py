"""compression_lab.py：剪了再量化，0 还是 0；字节数得对；Pareto 线；一张表、一张图；说错的话。"""

import copy
import math
import shutil
from types import SimpleNamespace

import pytest
import torch

import compression_lab as script
from calibration import calibration_rows
from nlp_common.base.errors import UserError
from nlp_common.lm.loading import load_chat_lm
from pruning import prune
from quantization import quantize_model


@pytest.fixture(scope="module")
def tiny(base_folder):
    tokenizer, model = load_chat_lm(str(base_folder), torch.device("cpu"))
    return tokenizer, model.eval()


@pytest.fixture
def quick(monkeypatch):
    """不真的答题：只看字节与流程。"""
    monkeypatch.setattr(script, "measure", lambda *_: {"qa_accuracy": 0.5, "heldout_loss": 1.0})
    monkeypatch.setattr(script, "speed", lambda *_: 100.0)


def test_pruned_weights_stay_zero_after_gptq(tiny):
    tokenizer, model = tiny
    model = copy.deepcopy(model)
    rows = calibration_rows(tokenizer, 12, seed=0)
    masks = prune(model, tokenizer, rows, "sparsegpt", "2:4")
    quantize_model(model, tokenizer, rows, "gptq", 4, 64, masks=masks)
    for name, keep in masks.items():
        assert (model.get_submodule(name).weight[~keep] == 0).all()


def test_bytes_by_hand(tiny, quick):
    tokenizer, model = tiny
    rows = calibration_rows(tokenizer, 12, seed=0)

    def size(name):
        return script.one(None, script.METHODS[name], model, tokenizer, rows, [])["bytes"]

    parameters = sum(p.numel() for p in model.parameters())
    layers = [layer for block in script_blocks(model) for layer in block]
    assert abs(size("float32") - 4 * parameters) < 1000  # 另有 RoPE 的缓冲区
    assert abs(size("bf16") - 2 * parameters) < 1000
    assert size("prune50") == size("float32") - sum(2 * n - math.ceil(n / 8) for n in layers)
    # 4 位：2:4 存一半的编号（2 位一个），加上一位一个的掩码：3 位一个，比不剪的少 1 位
    assert size("gptq4") - size("prune24_gptq4") == sum(n // 8 for n in layers)
    assert size("rtn2") < size("rtn3")


def script_blocks(model):
    from calibration import linear_blocks

    return [[layer.weight.numel() for layer in layers.values()] for layers in linear_blocks(model)]


def test_pareto_by_hand():
    sizes = {"a": (100, 0.9), "b": (50, 0.9), "c": (40, 0.5), "d": (45, 0.4), "e": (200, 1.0), "f": (50, 0.8)}
    methods = {name: {"bytes": size, "qa_accuracy": right} for name, (size, right) in sizes.items()}
    assert script.pareto(methods) == ["c", "b", "e"]


def test_summary_is_the_mean():
    its = script.summary([{"qa_accuracy": 0.8, "bytes": 10}, {"qa_accuracy": 1.0, "bytes": 20}])
    assert its == pytest.approx({"qa_accuracy": 0.9, "bytes": 15, "qa_accuracy_std": 0.1})


def test_lesson(tiny, quick, base_folder, tmp_path, capsys):
    options = ["--preset", "tiny", "--model", str(base_folder), "--student", str(base_folder)]
    options += ["--methods", "float32,rtn4,student_gptq8", "--seeds", "2", "--n_calibration", "12"]
    options += ["--max_eval_samples", "4", "--output_dir", str(tmp_path / "out")]
    metrics = script.main(options)["metrics"]
    assert list(metrics["methods"]) == ["float32", "rtn4", "student_gptq8"]
    svg = (tmp_path / "out" / "lab_pareto.svg").read_text(encoding="utf-8")
    assert "Pareto" in svg and "rtn4" in svg
    assert "tokens/s" in capsys.readouterr().out


def test_wrong_calls_are_said(tmp_path):
    for wrong in (
        ["--methods", "rtn5"],
        ["--methods", ""],
        ["--student", str(tmp_path / "no")],
        ["--seeds", "0"],
    ):
        with pytest.raises(UserError):
            script.main(["--preset", "tiny", *wrong])


def test_the_speed_counts_tokens(tiny):
    from nlp_common.tiny import world

    tokenizer, model = tiny
    assert script.speed(model, tokenizer, world.heldout_questions(2, seed=0)) > 0


def test_a_student_taught_before_an_interruption_is_not_taught_again(
    tiny, base_folder, tmp_path, monkeypatch
):
    """学生在结果文件夹旁边：有 run.json 的直接用，没有教完的才教。"""
    folder = tmp_path / "lab_students" / "seed0"
    shutil.copytree(base_folder, folder / "student")
    (folder / "run.json").write_text("{}", encoding="utf-8")
    stage = SimpleNamespace(
        path=tmp_path / "lab",
        device=torch.device("cpu"),
        settings=SimpleNamespace(student=None, preset="tiny"),
    )
    taught = []
    monkeypatch.setattr(script, "run_script", lambda *given: taught.append(given))
    script.load_student(stage, 0, tiny[0], "老师")
    assert not taught
    with pytest.raises(Exception, match="seed1"):  # 没有教过的：去教（这里的替身什么也没写，所以读不到）
        script.load_student(stage, 1, tiny[0], "老师")
    assert len(taught) == 1 and "--no_more" in taught[0]
