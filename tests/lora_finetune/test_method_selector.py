"""method_selector.py：公式与真张量一个字节不差，几种情形选得对，读 config.json，说错的话。"""

import pytest

import method_selector as script
from finetune_memory import SIZES, lora_parameters, parts_of
from nlp_common.base.errors import UserError

CARD = ["--preset", "tiny", "--gpu_memory"]


def advise(*argv):
    return script.advise(script.parse_settings(script.SelectorSettings, script.PRESETS, [*CARD, *argv]))


def test_formula_equals_real_tensors_byte_for_byte():
    assert script.formula_differences(seed=0) == {"full": 0, "lora": 0, "qlora": 0}


def test_published_rows():
    errors = script.published_errors()
    assert len(errors) == 4 and max(abs(error) for error in errors.values()) < 0.15


def test_lora_parameters_by_hand():
    """Qwen1.5-0.5B 一层：四个 1024×1024，三个 1024×2816；r = 8。"""
    one_layer = 8 * (4 * (1024 + 1024) + 3 * (1024 + 2816))
    assert lora_parameters(parts_of(SIZES["0.5B"]), 8) == 24 * one_layer


@pytest.mark.parametrize(
    "argv, method",
    [
        (["8", "--parameters", "0.5B", "--rows", "2000"], "lora"),
        (["24", "--parameters", "0.5B", "--rows", "500000"], "full"),
        (["24", "--parameters", "7B"], "lora"),
        (["12", "--parameters", "7B"], "qlora"),
        (["80", "--parameters", "70B"], "qlora"),
        (["24", "--parameters", "0.5B", "--rows", "500000", "--tasks", "20"], "lora"),
        (["8", "--parameters", "70B"], None),
    ],
)
def test_choices(argv, method):
    advice = advise(*argv)
    assert advice["method"] == method and advice["reasons"]
    if method:
        assert advice["expected_gb"] <= script.SPARE * float(argv[0])
        assert sum(advice["parts_gb"].values()) == pytest.approx(advice["expected_gb"])
        rows = advice["settings"]["per_device_train_batch_size"]
        assert rows * advice["settings"]["gradient_accumulation_steps"] == script.BATCH
    else:
        assert "QLoRA 至少要" in advice["reasons"][-1]


def test_more_memory_never_chooses_a_smaller_batch():
    rows = [advise(gb, "--parameters", "7B")["settings"] for gb in ("24", "40", "80")]
    sizes = [each["per_device_train_batch_size"] for each in rows]
    assert sizes == sorted(sizes)


def test_rank_grows_with_the_rows():
    assert [script.rank_for(n) for n in (500, 10_000, 200_000)] == [8, 16, 64]


@pytest.mark.parametrize(
    "text, value", [("7B", 7e9), ("1.5b", 1.5e9), ("500M", 5e8), ("7e9", 7e9), ("70亿", 7e9)]
)
def test_counts(text, value):
    assert script.count_of(text) == value


@pytest.mark.parametrize("text", ["七十亿", "7X", "", "1.2.3B", "5"])
def test_counts_that_make_no_sense_are_said(text):
    with pytest.raises(UserError, match="--parameters"):
        script.count_of(text)


def test_run_with_a_config(tmp_path, base_folder, capsys):
    out = ["--output_dir", str(tmp_path / "out")]
    metrics = script.main([*CARD, "8", "--model", str(base_folder), *out])["metrics"]
    assert metrics["advice"]["method"] == "lora"
    assert metrics["formula_difference_bytes"] == {"full": 0, "lora": 0, "qlora": 0}
    assert metrics["published_error_worst"] < 0.15
    assert (tmp_path / "out" / "memory_by_size.svg").is_file()
    printed = capsys.readouterr().out
    assert "python qlora_trainer.py" in printed and "--bases none" in printed
    again = script.main([*CARD, "48", "--parameters", "32B", *out])["metrics"]  # 换一种情形，不必 --retrain
    assert again["advice"]["method"] == "qlora"


def test_the_command_it_prints_is_understood(tmp_path, capsys):
    import qlora_trainer

    script.main([*CARD, "12", "--parameters", "7B", "--output_dir", str(tmp_path / "out")])
    line = next(
        each for each in capsys.readouterr().out.splitlines() if each.startswith("  python qlora_trainer.py")
    )
    pytest.importorskip("bitsandbytes", reason="full 预设要它：没有装，跳过")
    settings = qlora_trainer.parse_settings(
        qlora_trainer.QLoRASettings, qlora_trainer.PRESETS, line.split()[2:], qlora_trainer.FULL_MODEL
    )
    assert settings.bases == "nf4" and settings.optimizer == "paged_adamw_8bit" and settings.r == 16


def test_a_model_that_is_not_there_is_said(tmp_path):
    with pytest.raises(UserError):
        script.main([*CARD, "24", "--model", str(tmp_path / "nothing")])


def test_no_memory_is_said():
    with pytest.raises(UserError, match="--gpu_memory 要大于 0"):
        script.main([*CARD, "0"])
