"""ZeRO：三级都等于一个进程；放的、发的等于公式；参数除不尽、行数除不尽也对。"""

import pytest
import torch

import zero
from nlp_common.base.errors import UserError
from zero import Piece, formulas


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """三个进程：40 行、宽 20 的偏置、96 × 20 的嵌入都除不尽。"""
    folder = tmp_path_factory.mktemp("zero") / "out"
    flags = ["--preset", "tiny", "--num_processes", "3", "--layers", "2", "--width", "20", "--rows", "7",
             "--output_dir", str(folder)]  # fmt: skip
    return zero.main(flags)["metrics"], folder


@pytest.mark.parametrize("level", list(zero.STAGES))
def test_every_stage_equals_one_process_and_the_formulas(record, level):
    its = record[0][f"stage{level}"]
    assert its["max_difference"] < 1e-12
    assert its["bytes"] == its["bytes_formula"] == record[0]["bytes_per_rank"][str(level)]
    assert its["sent"] == pytest.approx(its["sent_formula"])


def test_whole_gradients_and_parameters_are_never_together(record):
    metrics, folder = record
    assert metrics["stage1"]["most_gradients"] == metrics["stage0"]["most_gradients"]
    assert metrics["stage2"]["most_gradients"] < 0.3 * metrics["stage1"]["most_gradients"]
    assert metrics["stage3"]["most_parameters"] < 0.6 * metrics["stage2"]["most_parameters"]
    assert (folder / "zero.svg").exists()


def test_torch_equals_one_process_too(record):
    assert set(record[0]["torch"]) == {"ZeroRedundancyOptimizer", "fully_shard"}
    assert max(record[0]["torch"].values()) < 1e-12


def test_formulas_by_hand():
    """两个进程，参数有 3 与 4 个数：补到 4 与 4，一份 2 + 2。"""
    assert formulas(0, 2, [3, 4], 1) == {"parameters": 7, "gradients": 7, "states": 14, "sent": 7}
    assert formulas(1, 2, [3, 4], 1) == {"parameters": 7, "gradients": 7, "states": 8, "sent": 8}
    assert formulas(2, 2, [3, 4], 1) == {"parameters": 7, "gradients": 4, "states": 8, "sent": 8}
    assert formulas(3, 2, [3, 4], 1) == {"parameters": 4, "gradients": 4, "states": 8, "sent": 12}


def test_cutting_pads_with_zeros():
    assert [x.tolist() for x in Piece.cut(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), 3)] == [
        [1, 2],
        [3, 4],
        [0, 0],
    ]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--rows", "3"], "3 行不够 4 个进程"),
        (["--width", "30"], "4 的倍数"),
        (["--layers", "0"], "--layers"),
    ],
)
def test_impossible_settings(flags, said):
    with pytest.raises(UserError, match=said):
        zero.main(["--preset", "tiny", *flags])
