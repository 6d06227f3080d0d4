"""save_quantized.py 与 gptq_layout.py：一个数一个数地核对布局，存了再读，sha256，写了一半、改过的文件。"""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file as numpy_load
from safetensors.torch import load_file

import save_quantized as script
from gptq_layout import (
    SUMS,
    WEIGHTS,
    check_sums,
    dequantize_linear,
    load_gptq,
    pack,
    quantize_linear,
    save_gptq,
    unpack,
    write_sums,
)
from nlp_common.base.errors import UserError
from nlp_common.lm.loading import load_causal_lm

SMALL = ["--preset", "tiny", "--n_questions", "4"]


@pytest.fixture(scope="module")
def saved(base_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gptq") / "gptq"
    tokenizer, model = load_causal_lm(str(base_folder))
    shrunk = save_gptq(folder, model, tokenizer, 128)
    return folder, model, shrunk


@pytest.fixture
def copied(saved, tmp_path):
    """一份可以弄坏的。"""
    return shutil.copytree(saved[0], tmp_path / "copy")


# ---- 布局 ----


def test_eight_numbers_in_one_int32_by_hand():
    codes = torch.tensor([[1], [2], [3], [4], [5], [6], [7], [15]])
    assert pack(codes).tolist() == [[0xF7654321 - 2**32]]  # 最高的一位是符号位
    assert unpack(pack(codes)).tolist() == codes.tolist()


def test_packing_there_and_back():
    codes = torch.randint(0, 16, (64, 24), generator=torch.Generator().manual_seed(0))
    assert pack(codes).shape == (8, 24) and pack(codes).dtype == torch.int32
    assert torch.equal(unpack(pack(codes)), codes.int())


def test_layout_number_by_number():
    """照 GPTQ 的读法一个一个取位：W[o, i] = s · (q − z − 1)。"""
    torch.manual_seed(0)
    weight = torch.randn(16, 40)
    parts = quantize_linear(weight, 16)
    assert {name: tuple(t.shape) for name, t in parts.items()} == {
        "qweight": (5, 16),
        "qzeros": (3, 2),
        "scales": (3, 16),
        "g_idx": (40,),
    }
    assert [parts[n].dtype for n in parts] == [torch.int32, torch.int32, torch.float16, torch.int32]
    assert parts["g_idx"].tolist() == [i // 16 for i in range(40)]
    back = dequantize_linear(parts)
    for o in range(16):
        for i in range(40):
            g = i // 16
            q = (parts["qweight"][i // 8, o].item() & 0xFFFFFFFF) >> 4 * (i % 8) & 15
            z = (parts["qzeros"][g, o // 8].item() & 0xFFFFFFFF) >> 4 * (o % 8) & 15
            assert z == 7  # 对称：零点 8，文件里少 1
            assert back[o, i].item() == pytest.approx(parts["scales"][g, o].item() * (q - z - 1), abs=1e-6)
    step = parts["scales"].float()[parts["g_idx"].long()].T
    assert ((back - weight).abs() <= 0.51 * step + 1e-6).all()


def test_widths_that_do_not_pack_are_said():
    with pytest.raises(UserError, match=r"12×16 .*8 的倍数"):
        quantize_linear(torch.randn(12, 16), 8)


# ---- 文件夹 ----


def test_saved_and_read_back(saved):
    folder, model, shrunk = saved
    assert min(shrunk.values()) > 7
    back = load_gptq(folder)
    for name, module in model.named_modules():
        if name in shrunk:
            expected = dequantize_linear(quantize_linear(module.weight, 128))
            assert torch.equal(back.get_submodule(name).weight, expected)
    assert torch.equal(back.model.embed_tokens.weight, model.model.embed_tokens.weight.half().float())
    assert back.lm_head.weight is back.model.embed_tokens.weight  # 共用的仍然共用
    assert not [name for name in load_file(folder / WEIGHTS) if name.startswith("lm_head")]


def test_another_reader_of_the_format_finds_the_same_weights(saved):
    """照 GPTQ 格式的说明另写一个读法，只用 numpy，不移位：int32 的四个字节，每个字节先低四位、后高四位。

    别的库（gptqmodel、vLLM）就是这样读的：W = s[g_idx] · (q − (z + 1))，存的名字、形状、类型也都核对。
    """
    folder, model, shrunk = saved
    tensors = numpy_load(folder / WEIGHTS)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    bits, group = config["bits"], config["group_size"]
    ours = load_gptq(folder)

    def halves(packed: np.ndarray) -> np.ndarray:  # (…) int32 → (…, 8)
        numbers = packed.astype("<i4").reshape(*packed.shape, 1).view(np.uint8)  # (…, 4)
        return np.stack([numbers % 16, numbers // 16], -1).reshape(*packed.shape, 8)

    for name in shrunk:
        d_out, d_in = model.get_submodule(name).weight.shape
        qweight, qzeros, scales, g_idx = (
            tensors[f"{name}.{p}"] for p in ("qweight", "qzeros", "scales", "g_idx")
        )
        groups = math.ceil(d_in / group)
        assert (qweight.shape, qweight.dtype) == ((d_in * bits // 32, d_out), np.int32)
        assert (qzeros.shape, qzeros.dtype) == ((groups, d_out * bits // 32), np.int32)
        assert (scales.shape, scales.dtype) == ((groups, d_out), np.float16)
        assert (g_idx.shape, g_idx.dtype) == ((d_in,), np.int32)
        assert f"{name}.weight" not in tensors
        codes = halves(qweight).transpose(0, 2, 1).reshape(d_in, d_out)  # 沿输入装的
        zeros = halves(qzeros).reshape(groups, d_out).astype(int) + 1  # 沿输出装的，少 1
        weight = scales.astype(np.float32)[g_idx] * (codes.astype(int) - zeros[g_idx])
        np.testing.assert_array_equal(ours.get_submodule(name).weight.detach().numpy(), weight.T)
        if model.get_submodule(name).bias is not None:
            assert tensors[f"{name}.bias"].dtype == np.float16


def test_transformers_knows_it_is_gptq(saved, base_folder):
    """config.json 认得出；没有 GPTQ 的内核时它说要装什么；我们的训练脚本拒绝它：四位的权重训练不了。"""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils.quantization_config import GPTQConfig

    config = AutoConfig.from_pretrained(saved[0])
    parsed = GPTQConfig.from_dict(dict(config.quantization_config))
    assert (parsed.bits, parsed.group_size, parsed.sym, parsed.desc_act) == (4, 128, True, False)
    assert parsed.format == "gptq" and parsed.quant_method == "gptq"  # 零点少 1 的那种；gptq_v2 不减
    with pytest.raises(ImportError, match=r"gptqmodel|optimum"):
        AutoModelForCausalLM.from_pretrained(saved[0])
    with pytest.raises(UserError, match=r"量化过的模型（gptq，4 位）.*训练不了"):
        load_causal_lm(str(saved[0]))


def test_a_changed_byte_is_found(copied):
    with (copied / WEIGHTS).open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(UserError, match=r"model.safetensors 坏了或被改过：sha256"):
        load_gptq(copied)


def test_half_written_folders_are_said(copied, tmp_path):
    (copied / "config.json").unlink()
    with pytest.raises(UserError, match=r"少了 config.json.*--retrain"):
        load_gptq(copied)
    (copied / SUMS).unlink()
    with pytest.raises(UserError, match="没有写完"):
        load_gptq(copied)
    with pytest.raises(UserError, match="没有文件夹"):
        load_gptq(tmp_path / "nothing")


def test_a_broken_list_of_sums_is_said(copied):
    (copied / SUMS).write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="读不出来"):
        check_sums(copied)


def test_weights_that_do_not_match_the_config_are_said(copied):
    config = json.loads((copied / "config.json").read_text(encoding="utf-8"))
    config["num_hidden_layers"], config["layer_types"] = 1, config["layer_types"][:1]
    (copied / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_sums(copied)
    with pytest.raises(UserError, match=r"与 config.json 对不上"):
        load_gptq(copied)


# ---- 像读者一样运行 ----


def test_run_load_and_second_run(tmp_path, base_folder, capsys):
    argv = [*SMALL, "--model", str(base_folder), "--output_dir", str(tmp_path / "out")]
    metrics = script.main(argv)["metrics"]
    assert metrics["linears_shrunk"] > 7 and metrics["same_after_saving_again"] == 1
    if "reload_difference_bitsandbytes" in metrics:
        assert metrics["reload_difference_bitsandbytes"] == 0
        check_sums(tmp_path / "out" / "bitsandbytes")
    assert (tmp_path / "out" / "sizes.svg").is_file()
    capsys.readouterr()
    assert script.main(argv)["metrics"] == metrics
    assert "直接加载" in capsys.readouterr().out
    read = script.main([*SMALL, "--load", str(tmp_path / "out" / "gptq")])
    assert read["qa_accuracy"] == 0  # 没训练过的模型


def test_load_and_model_together_are_said(tmp_path):
    with pytest.raises(UserError, match="只给一个"):
        script.main([*SMALL, "--load", str(tmp_path), "--model", "x"])
