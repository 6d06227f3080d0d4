"""数据并行：对的分母等于一个进程，错的不等；桶装得对；累加的小批只传一遍。"""

import pytest
import torch
from torch import nn

import data_parallel
from data_parallel import make_buckets, uneven_rows
from nlp_common.base.errors import UserError
from nlp_common.lm.losses import IGNORE
from small_gpt import Sizes, make_model


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "out"
    flags = ["--preset", "tiny", "--num_processes", "3", "--layers", "2", "--width", "16", "--rows", "11",
             "--length", "8", "--bucket_kb", "4", "--output_dir", str(folder)]  # fmt: skip
    return data_parallel.main(flags)["metrics"], folder


def test_the_right_denominator_equals_one_process_and_the_wrong_one_does_not(record):
    metrics, folder = record
    assert metrics["max_difference"] < 1e-12 and metrics["torch_difference"] < 1e-12
    assert metrics["wrong_difference"] > 1e-3
    assert metrics["gradient_bytes"] == metrics["parameter_bytes"]  # 累加了两个小批，只传了一遍
    assert metrics["buckets"] > 3 and 0 < metrics["overlapped"] < 1
    assert (folder / "data_parallel.svg").exists()


def test_buckets_are_filled_from_the_last_layer():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 100))  # 64+16、64+16、1600+400 字节
    buckets = make_buckets(model, 100)
    sizes = [[p.numel() for p in bucket.parameters] for bucket in buckets]
    assert sizes == [[100], [400], [4, 16, 4], [16]]
    assert sum(map(sum, sizes)) == sum(p.numel() for p in model.parameters())
    whole = make_buckets(make_model(Sizes(layers=1)), 1e9)
    assert len(whole) == 1


def test_uneven_rows_by_hand():
    inputs, labels = uneven_rows(4, 8, 96, 0)
    assert inputs.shape == labels.shape == (4, 8)
    assert [(row != IGNORE).sum().item() for row in labels] == [8, 7, 5, 3]
    again = uneven_rows(4, 8, 96, 0)
    assert torch.equal(inputs, again[0]) and torch.equal(labels, again[1])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--rows", "7"], "至少要 8 行"),
        (["--width", "30"], "4 的倍数"),
        (["--bucket_kb", "0"], "--bucket_kb"),
    ],
)
def test_impossible_settings(flags, said):
    with pytest.raises(UserError, match=said):
        data_parallel.main(["--preset", "tiny", *flags])
