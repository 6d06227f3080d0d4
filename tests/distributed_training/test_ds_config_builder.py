"""ds_config_builder.py 与 megatron_layouts.py：参数加起来不多不少、状态与空等手算的、激活随层数、公布的配方、八块的算术、说错的话。"""

import json
from dataclasses import replace

import pytest

import ds_config_builder as script
from megatron_layouts import (
    Layout,
    activation_bytes,
    bubble,
    check,
    chunks_in_flight,
    measure,
    stage_layers,
    stage_params,
    state_bytes,
    token_bytes,
    traffic_bytes,
)
from model_sizes import SIZES, count_params
from nlp_common.base.errors import UserError

V3, DENSE = SIZES["deepseek-v3"], SIZES["llama-2-7b"]


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    folder = tmp_path_factory.mktemp("builder") / "out"
    return script.main(["--preset", "tiny", "--output_dir", str(folder)]), folder


def test_published_recipes_fit_and_the_count_is_exact(record):
    metrics = record[0]["metrics"]
    assert metrics["difference_to_meta_model"] == 0
    assert metrics["total_params"] == 671_026_404_352
    assert metrics["recipes_fit"] == len(script.RECIPES) == 9
    assert "<svg" in (record[1] / "recipes.svg").read_text(encoding="utf-8")


def test_the_best_layout_is_written(record):
    layout = json.loads((record[1] / "layout.json").read_text(encoding="utf-8"))
    check(V3, Layout(**layout | {"recompute": tuple(layout["recompute"])}))
    arguments = (record[1] / "megatron_args.txt").read_text(encoding="utf-8")
    assert f"--pipeline-model-parallel-size {layout['pp']}\n" in arguments


def test_eight_gpus_by_hand():
    eight = script.eight_gpus(V3)
    assert eight["full_gb"] == pytest.approx(1342, abs=0.1)  # 671.026 × 16 / 8
    assert eight["weights_bf16_gb"] == pytest.approx(167.8, abs=0.1)
    assert eight["weights_fp8_gb"] == pytest.approx(83.9, abs=0.1)
    assert eight["offload_tb"] == pytest.approx(12.08, abs=0.01)


# ---- 参数与状态 ----


@pytest.mark.parametrize("sizes", [V3, DENSE, SIZES["qwen3-30b-a3b"]], ids=lambda s: s.name)
@pytest.mark.parametrize("pp, vp", [(1, 1), (4, 1), (8, 2), (16, 1)])
def test_the_stages_add_up_to_the_model(sizes, pp, vp):
    """不切张量、不切专家：各站的参数加起来就是整个模型；每一层恰好在一站里。"""
    layout = Layout(gpus=pp, pp=pp, vp=vp)
    stages = stage_layers(sizes, layout)
    assert sorted(layer for stage in stages for layer in stage) == list(range(sizes.layers))
    total = sum(sum(stage_params(sizes, layout, i).values()) for i in range(pp))
    assert total == count_params(sizes)["total"]


def test_split_parameters_by_hand():
    """TP2 EP4：能切的减半、专家剩四分之一，归一化与 MLA 压缩的那几个整份。"""
    whole = stage_params(V3, Layout(8), 0)
    half = stage_params(V3, Layout(8, tp=2, ep=4), 0)
    assert half["experts"] == whole["experts"] / 4
    kept = 61 * (7168 * (512 + 64) + 512 + 7168 * 1536 + 1536 + 2 * 7168) + 7168 + 58 * 256 * 7168
    assert half["dense"] == pytest.approx((whole["dense"] - kept) / 2 + kept)


def test_state_bytes_by_hand():
    params = {"dense": 1000.0, "experts": 0.0}
    for zero, expected in ((0, 18_000), (1, 6000 + 1500), (2, 2000 + 2000), (3, 18_000 / 8)):
        assert state_bytes(Layout(8, zero=zero), params) == expected
    assert state_bytes(Layout(8, bf16_moments=True), params) == 4000 + 1000
    # 16 字节一个参数、不分：DeepSeek-V3 用八块，只分优化器也不够
    assert state_bytes(Layout(8), {"dense": 0.0, "experts": 1000.0}) == 6000 + 1500


# ---- 激活、空等、通信 ----


def test_bubble_by_hand():
    a = Layout(4, pp=4, global_batch=12, micro_batch=1)
    assert a.micro_batches == 12 and bubble(a) == pytest.approx(3 / 15)
    assert bubble(replace(a, vp=2)) == pytest.approx(3 / 27)
    assert bubble(Layout(4, global_batch=4)) == 0


def test_in_flight():
    a = Layout(4, pp=4, global_batch=12)
    assert [chunks_in_flight(a, i) for i in range(4)] == [4, 3, 2, 1]
    assert chunks_in_flight(replace(a, global_batch=2), 0) == 2  # 一共才两个 micro-batch
    assert [chunks_in_flight(replace(a, vp=2), i) for i in range(4)] == [11, 9, 7, 5]


def test_recompute_keeps_less():
    kept = [token_bytes(V3, 10, r) for r in ((), ("moe_act",), ("mla_up_proj",), ("full",))]
    assert kept == sorted(kept, reverse=True) and kept[-1] == 2 * V3.hidden
    assert token_bytes(V3, 0, ("mlp",)) < token_bytes(V3, 0)
    a = Layout(8, tp=2, global_batch=4)
    assert activation_bytes(V3, replace(a, tp=4), 0) == pytest.approx(activation_bytes(V3, a, 0) / 2)


def test_traffic_by_hand():
    """稠密的小例子：数据并行 8 块，一步 (7/8)·P·(4 + 2)；流水线每个 micro-batch 送出与送回各一份。"""
    n = count_params(DENSE)["total"]
    sent = traffic_bytes(DENSE, Layout(8, global_batch=8, length=128))
    assert sent == {"data": 7 / 8 * n * 6, "tensor": 0, "pipeline": 0, "expert": 0, "context": 0}
    sent = traffic_bytes(DENSE, Layout(2, pp=2, global_batch=4, length=128))
    assert sent["pipeline"] == 4 * 2 * 128 * 2 * DENSE.hidden and sent["data"] == 0
    sent = traffic_bytes(DENSE, Layout(2, tp=2, global_batch=4, length=128))
    # 一层里注意力、MLP 各收一次、散一次，前向反向共八次，每次出去一半
    assert sent["tensor"] == 4 * 32 * 8 * 0.5 * 128 * 2 * DENSE.hidden


def test_more_gpus_in_data_parallel_never_need_more():
    needs = [
        measure(V3, Layout(gpus, tp=2, pp=8, ep=32, global_batch=4096))["total"] for gpus in (256, 512, 1024)
    ]
    assert needs == sorted(needs, reverse=True)


# ---- 说错的话 ----


@pytest.mark.parametrize(
    "layout, said",
    [
        (Layout(8, tp=3), "GPU 的块数 8 不能被 TP × PP × CP = 3 整除"),
        (Layout(3, tp=3), "注意力的头数 128 不能被 TP = 3 整除"),
        (Layout(8, ep=3), "专家的个数 256 不能被 EP = 3 整除"),
        (Layout(8, ep=16), "GPU 的块数 8 不能被 PP × EP = 16 整除"),
        (Layout(64, pp=64), "61 层分不成"),
        (Layout(8, vp=2, global_batch=8), "VP 是把流水线"),
        (Layout(8, global_batch=9), "一步的总行数 9 不能被 micro-batch × DP = 8 整除"),
        (Layout(4, pp=4, vp=2, global_batch=6), "交错的流水线，micro-batch 的个数 6"),
        (Layout(8, zero=4, global_batch=8), "ZeRO 只有"),
        (Layout(8, pp=2, zero=3, global_batch=4), "ZeRO 只能到 1 级"),
        (Layout(8, recompute=("attention",), global_batch=8), "不会重算 attention"),
        (Layout(0), "gpus 要是正整数"),
        (Layout(2, cp=2, length=4095), "一行的长度 4095"),
    ],
)
def test_what_does_not_divide_is_said(layout, said):
    with pytest.raises(UserError, match=said):
        check(V3, layout)


def test_no_experts_no_expert_parallelism():
    with pytest.raises(UserError, match="没有专家"):
        check(DENSE, Layout(8, ep=2))


@pytest.mark.parametrize(
    "gpus, said",
    [("8", "没有一种不超过 85.5 GB"), ("7", "一步的总行数 8 不能被 micro-batch × DP = 7 整除")],
)
def test_nothing_fits_is_an_answer(gpus, said, tmp_path, capsys):
    argv = ["--preset", "tiny", "--gpus", gpus, "--global_batch", "8"]
    assert script.main([*argv, "--output_dir", str(tmp_path / "out")])["metrics"]["layouts"] == 0
    shown = capsys.readouterr().out
    assert "没有放得下的摆法" in shown and said in shown
    assert not (tmp_path / "out" / "layout.json").exists()


@pytest.mark.parametrize("argv", [["--gpus", "0"], ["--gpu_memory", "-1"], ["--model", "没有"]])
def test_bad_settings_are_said(argv, tmp_path):
    with pytest.raises(UserError):
        script.main(["--preset", "tiny", "--output_dir", str(tmp_path / "out"), *argv])
