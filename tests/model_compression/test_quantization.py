"""quantization.py：GPTQ 等于精确的 OBS 更新，误差比 RTN 小；AWQ 的放大不改变模型；一位不空地装；存了再读 logits 相同；说错的话。"""

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import activation_outliers as outliers
import prune_data
import quantization as script
import quantizers
from calibration import calibration_rows, capture_inputs
from measuring import world_loss
from nlp_common.base.errors import UserError
from nlp_common.lm.loading import load_chat_lm
from nlp_common.tiny.judge import qa_accuracy
from packed_weights import Packed, load_packed, make_grid, pack_bits, packed_bytes, save_packed, unpack_bits

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny(base_folder):
    tokenizer, model = load_chat_lm(str(base_folder), CPU)
    return tokenizer, model.eval()


@pytest.fixture(scope="module")
def rows(tiny):
    return calibration_rows(tiny[0], 12, seed=0)


def layer(n_out=6, n_in=12, n=80, seed=0):
    """一层：W (out, in)、X (N, in)，各个通道互相有关，大小不一。"""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n_in, n_in, generator=generator)
    x = torch.randn(n, n_in, generator=generator) @ mix * torch.linspace(0.2, 3, n_in)
    return torch.randn(n_out, n_in, generator=generator), x


# ---------------------------------------------------------------- 取整


def test_rtn_by_hand():
    w = torch.tensor([[-1.0, 0.0, 0.4, 2.0]])
    packed = quantizers.rtn(w, bits=2, group=4)
    # 从 −1 到 2 分 4 格，一格 1，零点 1：−1、0、0（0.4 归 0）、2
    assert packed.weight().tolist() == [[-1.0, 0.0, 0.0, 2.0]]
    assert packed.n_bytes() == 1 + 2 + 1  # 4 个两位的编号一个字节，一个 float16 的刻度，一个零点


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 8), st.integers(1, 40), st.integers(1, 4), st.integers(0, 999), st.floats(1e-3, 1e3))
def test_rtn_is_within_half_a_step(bits, n_in, n_out, seed, size):
    w = torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(seed)) * size
    packed = quantizers.rtn(w, bits, group=16)
    step = packed.scales.float()[:, torch.arange(n_in) // 16]
    # 零点要取整，最边上的一格最多差到一格；其余半格
    assert ((packed.weight() - w).abs() <= step * 1.01 + 2**bits * 6e-8).all()  # 后一项：float16 最小的一格
    assert (quantizers.rtn(torch.zeros(2, 5), bits, 16).weight() == 0).all()


def exact_obs(w, hessian, bits, group):
    """照定义：量化一列，剩下的列按约束最小二乘的解补，每一步重新求一遍逆，一点捷径也不抄。"""
    w, n_in = w.double().clone(), w.shape[1]
    h = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(n_in, dtype=torch.float64)
    found = torch.empty_like(w)
    for i in range(n_in):
        if i % group == 0:
            scale, zero = make_grid(w[:, i : i + group], bits)
        q = ((w[:, i] / scale + zero).round().clamp(0, 2**bits - 1) - zero) * scale
        found[:, i] = q
        change = q - w[:, i]  # (out,)
        # min Σ δ H δᵀ，δ_i = change：H_rr δ_r = −H_ri δ_i
        if i + 1 < n_in:
            rest = torch.linalg.solve(h[i + 1 :, i + 1 :], h[i + 1 :, i])
            w[:, i + 1 :] -= change[:, None] * rest
    return found


@pytest.mark.parametrize("bits, group", [(2, 4), (3, 12), (4, 5), (8, 4)])
def test_gptq_equals_the_exact_obs_update(bits, group):
    w, x = layer(seed=bits)
    hessian = quantizers.hessian_of(x)
    ours = quantizers.gptq(w, hessian, bits, group).weight()
    wanted = exact_obs(w, hessian, bits, group)
    assert torch.allclose(ours.double(), wanted, rtol=1e-6, atol=1e-9)  # 编号都相同，只差还原时的 float32


def test_obs_update_is_the_best_one():
    """公式 −err/[H⁻¹]ii · [H⁻¹]i: 就是约束最小二乘的解：float64，1e-9。"""
    _, x = layer(n_in=8)
    h = quantizers.hessian_of(x)
    inverse = torch.linalg.inv(h)
    upper = torch.linalg.cholesky(inverse, upper=True)
    for i in range(7):  # 去掉前 i 列以后的逆，第一行就是 U 的第 i 行（乘 U_ii）
        left = torch.linalg.inv(h[i:, i:])
        assert torch.allclose(upper[i, i:] / upper[i, i], left[0] / left[0, 0], atol=1e-9)
        rest = -torch.linalg.solve(h[i + 1 :, i + 1 :], h[i + 1 :, i])  # 第 i 列变 1，别的怎样变最好
        assert torch.allclose(upper[i, i + 1 :] / upper[i, i], rest, atol=1e-9)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_is_below_rtn(bits):
    """GPTQ 是贪心的，不是定理：越往右输入越大，最大的那几列没有谁替它们补，偶尔还不如 RTN；act-order 没有这种层。"""
    below = {"left": 0, "act": 0}
    for seed in range(40):
        w, x = layer(n_out=16, n_in=16, n=200, seed=seed)
        hessian = quantizers.hessian_of(x)
        plain = quantizers.output_error(quantizers.rtn(w, bits, 8).weight() - w, hessian)
        for order, grid in (("left", "late"), ("act", "early")):
            ours = quantizers.gptq(w, hessian, bits, 8, order, grid).weight()
            below[order] += quantizers.output_error(ours - w, hessian) < plain
    assert below["left"] >= 36 and below["act"] == 40


def test_output_error_is_the_norm():
    w, x = layer()
    change = w - quantizers.rtn(w, 3, 4).weight()
    ours = quantizers.output_error(change, quantizers.hessian_of(x))
    assert ours == pytest.approx((change.double() @ x.double().T).square().sum().item(), rel=1e-9)


def test_act_order_takes_large_inputs_first():
    w, x = layer(n_out=32, n_in=16, n=300, seed=3)
    hessian = quantizers.hessian_of(x)
    results = {order: quantizers.gptq(w, hessian, 3, 8, order, "early").weight() for order in ("left", "act")}
    assert not torch.equal(*results.values())
    first = hessian.diagonal().argmax().item()  # 输入最大的那一列最先量化，没有别的列的误差要它补
    assert torch.equal(results["act"][:, first], quantizers.rtn(w, 3, 8).weight()[:, first])


def test_awq_never_loses_to_rtn_where_it_searches():
    for seed in range(5):
        w, x = layer(n_out=8, n_in=16, seed=seed)
        hessian = quantizers.hessian_of(x)
        s, alpha = quantizers.awq_scale([w], x, hessian, 3, 8)
        ours = quantizers.output_error(quantizers.rtn(w * s, 3, 8).weight() / s - w, hessian)
        assert ours <= quantizers.output_error(quantizers.rtn(w, 3, 8).weight() - w, hessian) * (1 + 1e-9)
        assert alpha in quantizers.ALPHAS


@torch.no_grad()
def test_awq_scaling_leaves_the_model_as_it_was(tiny, rows):
    """放大与缩小抵消：不取整，logits 不变。"""
    tokenizer, model = tiny
    model = copy.deepcopy(model)
    for p in model.parameters():
        if p.dim() == 1:
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))  # 偏置不是 0
    ids = torch.tensor([rows[0]["input_ids"]])
    before = model(ids).logits
    for block, layers in zip(model.get_decoder().layers, script.linear_blocks(model), strict=True):
        inputs = capture_inputs(model, rows, layers, tokenizer.pad_token_id)
        hessians = {name: quantizers.hessian_of(x) for name, x in inputs.items()}
        scales = script.awq_block(block, layers, inputs, hessians, 2, 32)
        assert any((columns != 1).any() for _, columns in scales.values())
    assert torch.allclose(model(ids).logits, before, atol=1e-4)


# ---------------------------------------------------------------- 装，存，读


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 8), st.lists(st.integers(0, 255), min_size=1, max_size=70))
def test_packing_wastes_no_bit(bits, numbers):
    codes = torch.tensor(numbers) % 2**bits
    packed = pack_bits(codes, bits)
    assert len(packed) == -(-len(numbers) * bits // 8)
    assert unpack_bits(packed, bits, len(numbers)).tolist() == codes.tolist()


def test_packing_by_hand():
    # 3 位：5 = 101，1 = 001，6 = 110 → 低位在前接起来 101 100 011 → 第一个字节 10110001（低位在左）= 0b10001101
    assert pack_bits(torch.tensor([5, 1, 6]), 3).tolist() == [0b10001101, 0b1]


@pytest.mark.parametrize("method, bits", [("rtn", 8), ("gptq", 3), ("awq", 4)])
@torch.no_grad()
def test_save_and_load_give_the_same_logits(tiny, rows, tmp_path, method, bits):
    tokenizer, model = tiny
    model = copy.deepcopy(model)
    done = script.quantize_model(model, tokenizer, rows, method, bits, 64)
    save_packed(tmp_path, model, tokenizer, done.packed)
    again, loaded = load_packed(tmp_path)
    ids = torch.tensor([rows[0]["input_ids"]])
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert again.eos_token_id == tokenizer.eos_token_id
    # 说的字节就是文件里权重的字节，其余只是 safetensors 的表头
    size = (tmp_path / "packed.safetensors").stat().st_size
    assert 0 <= size - packed_bytes(model, done.packed) < 16_000
    with pytest.raises(UserError, match="已经量化过"):  # 读回来的也认得出
        script.quantize_model(loaded, tokenizer, rows, "rtn", 8, 64)


def test_every_layer_gptq_below_rtn(tiny, rows):
    tokenizer, model = tiny
    done = script.quantize_model(copy.deepcopy(model), tokenizer, rows, "gptq", 3, 64)
    assert len(done.errors) == 7 * len(model.get_decoder().layers)
    for name, errors in done.errors.items():
        assert errors["gptq"] < errors["rtn"], name


def test_a_broken_folder_is_said(tiny, rows, tmp_path):
    tokenizer, model = tiny
    with pytest.raises(UserError, match="没有文件夹"):
        load_packed(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"packed\.json"):
        load_packed(tmp_path)
    model = copy.deepcopy(model)
    save_packed(
        tmp_path, model, tokenizer, script.quantize_model(model, tokenizer, rows, "rtn", 4, 64).packed
    )
    with pytest.raises(UserError):  # 平常的读法读不了它，也说得清
        load_chat_lm(str(tmp_path), CPU)
    file, about = tmp_path / "packed.safetensors", tmp_path / "packed.json"
    whole, text = file.read_bytes(), about.read_text(encoding="utf-8")
    file.write_bytes(whole[:-10] + b"0123456789")
    with pytest.raises(UserError, match="sha256"):
        load_packed(tmp_path)
    file.write_bytes(whole)
    changed = json.loads(text)
    changed["layers"].pop("model.embed_tokens.weight")
    about.write_text(json.dumps(changed), encoding="utf-8")
    with pytest.raises(UserError, match="对不上"):
        load_packed(tmp_path)
    for bad in ("{", "[1]", '{"layers": 3, "sha256": "0"}'):
        about.write_text(bad, encoding="utf-8")
        with pytest.raises(UserError, match="坏了"):
            load_packed(tmp_path)
    about.write_text(text, encoding="utf-8")
    file.unlink()
    with pytest.raises(UserError, match="少了"):
        load_packed(tmp_path)


def test_wrong_calls_are_said(tiny, rows):
    tokenizer, model = tiny
    with pytest.raises(UserError, match="一段也没有"):
        script.quantize_model(model, tokenizer, [], "gptq", 4, 64)
    with pytest.raises(UserError, match="校准的对话太少"):
        script.quantize_model(copy.deepcopy(model), tokenizer, rows[:1], "gptq", 4, 64)
    with pytest.raises(UserError, match="不认识"):
        script.quantize_model(model, tokenizer, rows, "gguf", 4, 64)
    for wrong in (
        ["--bits", "1"],
        ["--bits", "4,"],
        ["--groups", "x"],
        ["--methods", "nf4"],
        ["--save", "gptq"],
    ):
        with pytest.raises(UserError):
            script.main(["--preset", "tiny", *wrong])
    broken = copy.deepcopy(model)
    broken.get_decoder().layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match="NaN"):
        script.quantize_model(broken, tokenizer, rows, "rtn", 4, 64)


# ---------------------------------------------------------------- 激活


def test_int8_by_hand():
    x, w = torch.tensor([[127.0, -1.4]]), torch.tensor([[1.0, 127.0]])
    # 两边的刻度都是 1：127·1 + (−1)·127 = 0，真的是 127 − 177.8
    assert outliers.int8_linear(x, w).item() == 0.0


def test_an_outlier_channel_ruins_int8_and_splitting_it_off_helps():
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(64, 32, generator=generator).clamp(-3, 3), torch.randn(16, 32, generator=generator)

    def error(x, w, how):
        exact = x @ w.T
        return ((how(x, w) - exact).norm() / exact.norm()).item()

    before = error(x, w, outliers.int8_linear)
    x[:, 5] *= 200
    w[:, 5] /= 200
    after = error(x, w, outliers.int8_linear)
    assert before < 0.02 < 0.2 < after
    assert error(x, w, outliers.mixed_linear) < 0.02
    # 练习：SmoothQuant，s_j = max|x_j|^½ / max|w_j|^½，除进激活，乘进权重
    s = (x.abs().amax(0) / w.abs().amax(0)).sqrt()
    assert error(x / s, w * s, outliers.int8_linear) < 0.03


def test_what_is_said_of_a_layer_by_hand():
    x = torch.tensor([[1.0, -2.0, 12.0], [-3.0, 1.0, 4.0]])  # 各通道最大 3、2、12
    found = outliers.look(x, torch.eye(3))
    assert (found["largest"], found["largest_over_median"], found["n_outliers"]) == (12.0, 4.0, 1)
    assert 0 < found["mixed_error"] < found["int8_error"] < 0.02


def test_smoothquant_by_hand():
    """练习的答案：x 的两个通道最大 100 与 1，w 的最大 0.01 与 1：s = 100 与 1，缩放以后两个通道一样大。"""
    x_max, w_max = torch.tensor([100.0, 1.0]), torch.tensor([0.01, 1.0])
    s = (x_max / w_max).sqrt()
    assert torch.allclose(s, torch.tensor([100.0, 1.0]))
    assert torch.allclose(x_max / s, torch.ones(2)) and torch.allclose(w_max * s, torch.ones(2))


@torch.no_grad()
def test_planting_changes_nothing(tiny, rows):
    _, model = tiny
    planted = outliers.plant_outlier(model)
    ids = torch.tensor([rows[0]["input_ids"]])
    assert torch.allclose(planted(ids).logits, model(ids).logits, atol=2e-4)
    split = outliers.use_int8(planted, outliers.mixed_linear)(ids).logits
    crushed = outliers.use_int8(planted, outliers.int8_linear)(ids).logits
    exact = model(ids).logits
    assert (split - exact).norm() < 0.3 * (crushed - exact).norm()


# ---------------------------------------------------------------- 一课


@pytest.fixture
def few(monkeypatch):
    """留出损失只看 8 段：快。"""

    def measure(model, tokenizer, questions):
        return {
            "qa_accuracy": qa_accuracy(model, tokenizer, questions),
            "heldout_loss": world_loss(model, tokenizer, 8),
        }

    monkeypatch.setattr(prune_data, "measure", measure)


def test_lesson(tmp_path, base_folder, capsys, few):
    options = [
        "--preset",
        "tiny",
        "--model",
        str(base_folder),
        "--max_eval_samples",
        "4",
        "--n_calibration",
        "12",
        "--max_train_samples",
        "4",
    ]
    options += [
        "--methods",
        "rtn,gptq",
        "--bits",
        "3",
        "--groups",
        "64",
        "--save",
        "gptq-3-64",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    metrics = script.main(options)["metrics"]
    assert metrics["methods"]["rtn-3-64"]["bytes"] < metrics["float32"]["bytes"] / 5
    assert metrics["gptq_below_rtn"] == {"layers_below_rtn": 14, "n_layers": 14}  # 误差差一半，不靠舍入
    assert (tmp_path / "out" / "quant_error.svg").is_file()
    _, model = load_packed(tmp_path / "out" / "packed")
    assert model.config.packed == {"method": "gptq", "bits": 3, "group": 64}
    script.main(options)
    assert "已有训练结果" in capsys.readouterr().out


def test_own_chats(tmp_path, base_folder):
    own = tmp_path / "own.jsonl"
    chat = {
        "messages": [
            {"role": "user", "content": "今天天气怎么样？"},
            {"role": "assistant", "content": "小刚去了花园。" * 6},
        ]
    }
    lines = []
    for place in range(30):
        chat["messages"][0]["content"] = f"第 {place} 个问题：今天天气怎么样？"
        lines.append(json.dumps(chat, ensure_ascii=False))
    own.write_text("\n".join(lines), encoding="utf-8")
    options = [
        "--preset",
        "tiny",
        "--model",
        str(base_folder),
        "--dataset",
        str(own),
        "--max_eval_samples",
        "2",
    ]
    options += ["--n_calibration", "20", "--methods", "gptq", "--bits", "8", "--groups", "64"]
    metrics = script.main([*options, "--output_dir", str(tmp_path / "out")])["metrics"]
    assert "qa_accuracy" not in metrics["float32"]
    its = metrics["methods"]["gptq-8-64"]
    assert its["heldout_loss"] == pytest.approx(metrics["float32"]["heldout_loss"], rel=0.01)


def test_python_docs(tmp_path, base_folder, monkeypatch, capsys):
    """smollm2 用的数据，没有装它也走一遍：Python 自带的手册，量困惑度。"""
    monkeypatch.setattr(prune_data, "N_HELDOUT", 2)
    monkeypatch.setattr("pydoc_data.topics.topics", {name: name + " is a word. " * 99 for name in "abcdef"})
    options = ["--preset", "tiny", "--model", str(base_folder), "--dataset", "python_docs"]
    options += ["--n_calibration", "4", "--methods", "rtn", "--bits", "8", "--groups", "64"]
    record = script.main([*options, "--save", "rtn-8-64", "--output_dir", str(tmp_path / "out")])
    metrics = record["metrics"]
    assert record["data"]["name"] == "python_docs" and "困惑度" in capsys.readouterr().out
    assert metrics["methods"]["rtn-8-64"]["perplexity"] == pytest.approx(
        metrics["float32"]["perplexity"], rel=0.01
    )
    settings = script.QuantSettings(preset="tiny", model="smollm2", groups="32")
    settings.check()
    assert (settings.dataset, settings.bits, settings.groups, settings.n_calibration) == (
        "python_docs", "4,3", "32", 32,
    )  # fmt: skip


def test_an_uneven_last_group():
    w, x = layer(n_in=12)
    packed = quantizers.gptq(w, quantizers.hessian_of(x), 4, 5)
    assert packed.scales.shape == (6, 3) and packed.weight().shape == w.shape
    assert isinstance(packed, Packed)
