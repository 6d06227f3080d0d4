"""zero3_configurator.py：参数一个不差、状态与 DeepSpeed 一个字节不差、激活与真的前向比、公布的八行、三种设置文件、说错的话。"""

import dataclasses
import json
import random

import pytest
import torch
import transformers
import yaml
from transformers import AutoModelForCausalLM

import zero3_configurator as script
from config_files import accelerate_yaml, deepspeed_json, fsdp2_yaml
from memory_plan import (
    CHOICES,
    GB,
    Choice,
    Machines,
    choose,
    layer_activation,
    plan,
    zero2_needs,
    zero3_needs,
)
from model_sizes import SIZES, count_params, find_sizes, largest_module, read_sizes
from nlp_common.base.errors import UserError

# transformers 的配置类与我们的 config.json：(类, 尺寸)
TINY = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3, "num_attention_heads": 8}
TINY |= {"vocab_size": 100, "num_key_value_heads": 2}
MLA = {"q_lora_rank": 48, "kv_lora_rank": 32, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16}
MOE = {
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
}
CONFIGS = [
    ("LlamaConfig", TINY),
    ("MistralConfig", TINY | {"head_dim": 24}),
    ("Qwen2Config", TINY | {"tie_word_embeddings": True}),
    ("Qwen3Config", TINY | {"head_dim": 32}),
    ("Qwen3MoeConfig", TINY | {"moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2}),
    ("DeepseekV3Config", TINY | MLA | MOE | {"num_key_value_heads": 8, "first_k_dense_replace": 1}),
    ("DeepseekV3Config", {}),  # 671B 的真尺寸
]


def on_meta(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name, given_sizes", CONFIGS)
def test_parameters_equal_the_meta_model(name, given_sizes, tmp_path):
    config = getattr(transformers, name)(**given_sizes)
    config.save_pretrained(tmp_path)
    sizes, model = find_sizes(str(tmp_path)), on_meta(config)
    assert count_params(sizes)["total"] == sum(p.numel() for p in model.parameters())
    modules = [sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules()]
    assert largest_module(sizes) == max(modules)


def test_deepseek_v3_is_671_billion_37_active():
    counted = count_params(SIZES["deepseek-v3"])
    assert counted["total"] == 671_026_404_352
    assert counted["active"] == pytest.approx(37e9, rel=0.02)
    # 它公布的一个检查点 7.4TB：每个参数主权重 4 + Adam 8 字节，2⁴⁰ 为一 TB
    assert 12 * counted["total"] / 2**40 == pytest.approx(7.4, rel=0.02)


# ---- 状态：DeepSpeed 的估算器 ----


def test_estimates_by_hand():
    """issue 4527 贴出来的表：6,805M 个参数、最大的一层 131M，1 台 4 块；单位 GiB，两位小数。"""
    total, largest, gib = 6805 * 10**6, 131 * 10**6, 2**30
    expected = {
        (True, True): (171.13, 0.49),
        (True, False): (152.11, 3.66),
        (False, False): (2.93, 29.01),
    }
    for (offload, param), (cpu, gpu) in expected.items():
        ours = zero3_needs(total, largest, 4, 1, offload, param)
        assert ours[0] / gib == pytest.approx(cpu, abs=0.02)
        assert ours[1] / gib == pytest.approx(gpu, abs=0.005)
    # 八块 GPU，十亿个参数：2·10⁹ + 18·10⁹/8
    assert zero2_needs(10**9, 8, 1, False) == (48 * 10**9, 4_250_000_000)
    assert zero2_needs(10**9, 8, 1, True) == (48 * 10**9, 2 * 10**9)
    assert zero3_needs(10**9, 10**8, 8, 2, False, False) == (4_800_000_000, 1_525_000_000, 4 * 10**8)


def test_equal_to_deepspeed_to_the_byte():
    stage3 = pytest.importorskip("deepspeed.runtime.zero.stage3", reason="没有装 deepspeed")
    stage2 = pytest.importorskip("deepspeed.runtime.zero.stage_1_and_2")
    rng = random.Random(0)
    for _ in range(2000):
        total, largest = rng.randrange(1, 10**12), rng.randrange(1, 10**10)
        gpus, nodes = rng.randrange(1, 17), rng.randrange(1, 513)
        for offload in (False, True):
            theirs = stage2.estimate_zero2_model_states_mem_needs(total, gpus, nodes, offload)
            assert zero2_needs(total, gpus, nodes, offload) == theirs
            for param in (False, True):
                for init in (False, True):
                    given = (total, largest, gpus, nodes, offload, param, init)
                    assert zero3_needs(*given) == stage3.estimate_zero3_model_states_mem_needs(*given)


# ---- 激活 ----


def kept_by_one_layer(config, tokens=256) -> float:
    """三层比两层的前向多留下几个字节，一个 token 的。"""
    sizes = []
    for layers in (2, 3):
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = ["full_attention"] * layers
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(torch.bfloat16)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        seen, alive = {}, []

        def pack(tensor, own=own, seen=seen, alive=alive):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = storage.nbytes()
                alive.append(tensor)  # 不放掉：地址才不会被别的用
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.model(input_ids=torch.randint(100, (2, tokens // 2)), use_cache=False)
        sizes.append(sum(seen.values()))
    return (sizes[1] - sizes[0]) / tokens


@pytest.mark.parametrize("name, given_sizes", [c for c in CONFIGS if c[1]])
def test_activations_against_a_real_forward(name, given_sizes, tmp_path):
    torch.manual_seed(0)
    config = getattr(transformers, name)(**given_sizes)
    config.save_pretrained(tmp_path)
    ours = layer_activation(find_sizes(str(tmp_path)), 2)
    moe = name in ("Qwen3MoeConfig", "DeepseekV3Config")
    assert ours == pytest.approx(kept_by_one_layer(config), rel=0.08 if moe else 0.02)


# ---- 账 ----


def test_the_eight_published_rows():
    rows = script.guide_rows()
    assert [row["ours"] for row in rows] == [row["fitted"] for row in rows]
    assert sum(row["formula"] == row["fitted"] for row in rows) == 7
    assert all(row["deepspeed"] for row in rows)  # 八行它都说装得下


def test_more_of_anything_never_needs_less():
    sizes, machines = SIZES["qwen3-30b-a3b"], Machines()
    base = {"length": 2048, "batch": 2}
    for choice in CHOICES:
        least = plan(sizes, choice, machines, **base)["gpu_total"]
        assert plan(sizes, choice, machines, length=4096, batch=2)["gpu_total"] > least
        assert plan(sizes, choice, machines, length=2048, batch=3)["gpu_total"] > least
        assert plan(sizes, choice, machines, **base, checkpointing=False)["gpu_total"] > least
        assert plan(sizes, choice, Machines(nodes=2), **base)["gpu_total"] <= least


def test_smaller_needs_are_chosen_first():
    chosen, plans = choose(SIZES["qwen2.5-0.5b"], Machines(), length=512, batch=1)
    assert chosen == Choice(0)
    assert all(each["fits"] for each in plans.values())


# ---- 设置文件 ----


@pytest.mark.parametrize("choice", CHOICES, ids=lambda c: c.name())
@pytest.mark.parametrize("nodes", [1, 2])
def test_files_are_read_by_accelerate(choice, nodes, tmp_path):
    from accelerate.commands.config.config_args import load_config_from_file

    machines = Machines(nodes)
    for settings, kind in (
        (accelerate_yaml(choice, machines, 4), "DEEPSPEED" if choice.stage else "MULTI_GPU"),
        (fsdp2_yaml(choice, machines), "FSDP"),
    ):
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(settings), encoding="utf-8")
        config = load_config_from_file(str(path))
        assert str(config.distributed_type).endswith(kind) and config.num_processes == 8 * nodes
    zero = deepspeed_json(choice, 2, 4)["zero_optimization"]
    assert zero["stage"] == choice.stage
    assert ("offload_param" in zero, "offload_optimizer" in zero) == (
        choice.offload_param,
        choice.offload_optimizer,
    )


# ---- 跑一遍 ----


def test_run_writes_the_files_and_second_run_loads(tmp_path, capsys):
    argv = ["--preset", "tiny", "--output_dir", str(tmp_path / "out")]
    record = script.main(argv)
    assert record["metrics"]["guide_right"] == {"ours": 8, "formula": 7, "deepspeed": 5}
    assert record["metrics"].get("max_difference_to_deepspeed_bytes", 0) == 0
    shown = capsys.readouterr().out
    assert "← 选它" in shown and "accelerate.yaml、deepspeed.json、fsdp2.yaml" in shown
    assert json.loads((tmp_path / "out" / "deepspeed.json").read_text())["zero_optimization"]["stage"] == 1
    assert "<svg" in (tmp_path / "out" / "plan.svg").read_text(encoding="utf-8")
    assert script.main(argv)["metrics"] == record["metrics"]
    assert "直接加载" in capsys.readouterr().out


def test_nothing_fits_is_an_answer(tmp_path, capsys):
    argv = ["--preset", "tiny", "--model", "deepseek-v3", "--output_dir", str(tmp_path / "out")]
    record = script.main([*argv, "--experts_together", "1"])
    assert record["metrics"]["chosen_stage"] == -1
    shown = capsys.readouterr().out
    assert "至少要" in shown and "不写设置文件" in shown
    assert not (tmp_path / "out" / "accelerate.yaml").exists()


# ---- 说错的话 ----


def write_config(folder, **changes):
    config = {"model_type": "llama", **TINY} | changes
    path = folder / "config.json"
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "missing"}), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"hidden_size": "missing"}, "缺 hidden_size"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers 要是不小于 1 的整数，写的是 '3'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"vocab_size": True}, "vocab_size"),
        ({"vocab_size": -5}, "vocab_size"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"model_type": "rwkv"}, "model_type 是 'rwkv'"),
        ({"model_type": "missing"}, "model_type 是 None"),
        ({"num_attention_heads": 7}, "hidden_size 128 不能被 num_attention_heads 7 整除"),
        ({"num_key_value_heads": 3}, "8 个头不能平分给"),
        ({"model_type": "deepseek_v3"}, "缺 kv_lora_rank"),
        ({"model_type": "qwen3_moe"}, "缺 num_experts"),
    ],
)
def test_a_bad_config_names_the_field(changes, said, tmp_path):
    with pytest.raises(UserError, match=said):
        read_sizes(write_config(tmp_path, **changes))


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "3"])
def test_a_malformed_config_is_said(text, tmp_path):
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"config\.json"):
        find_sizes(str(tmp_path))


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--model", "没有这个"], "没有 没有这个"),
        (["--gpu_memory", "0"], "--gpu_memory 要大于 0"),
        (["--nodes", "0"], "--nodes"),
        (["--sequence_parallel", "3"], "8 块 GPU 分不成每组 3 块"),
        (["--sequence_parallel", "8", "--max_length", "1001"], "不能平分给 8 块"),
    ],
)
def test_impossible_numbers_are_said(argv, said, tmp_path):
    with pytest.raises(UserError, match=said):
        script.main(["--preset", "tiny", "--output_dir", str(tmp_path / "out"), *argv])


def test_too_long_a_row_says_so(tmp_path, capsys):
    argv = ["--preset", "tiny", "--max_length", "1000000", "--output_dir", str(tmp_path / "out")]
    assert script.main(argv)["metrics"]["chosen_stage"] == -1
    assert "占地方的是激活与 logits" in capsys.readouterr().out


def test_units():
    assert Machines().gpu_bytes == 85.5 * GB and dataclasses.replace(Machines(), nodes=3).gpus == 24
