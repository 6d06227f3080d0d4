"""pruning.py：SparseGPT 等于穷举的最小二乘，Wanda 等于 top-k，2:4 一个不差，存了读回 logits 不变，LoRA 保住掩码，说错的话。"""

import copy
import json
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import pruning as script
import sparse_weights
from calibration import calibration_rows, capture_inputs, walk_blocks
from masked_lora import MaskedLora, add_lora, merge_lora, zeros
from nlp_common.base.errors import UserError
from nlp_common.lm.loading import load_chat_lm
from nlp_common.tiny import world
from prune_report import order, share_key
from sparse_speed import race, sparse_speed, two_of_four_here

CPU = torch.device("cpu")
SHORT = {"input_ids": list(range(9)), "labels": list(range(9))}
SHARES = st.sampled_from([0.25, 0.3, 0.5, 0.6, 0.8, "2:4"])


@pytest.fixture(scope="module")
def small_folder(base_folder, tmp_path_factory):
    """没训练过的小模型，再小一号（32 宽）：测试快。"""
    folder = tmp_path_factory.mktemp("small") / "base"
    tokenizer, model = load_chat_lm(str(base_folder), CPU)
    config = copy.deepcopy(model.config)
    config.hidden_size, config.intermediate_size = 32, 48
    torch.manual_seed(0)
    type(model)(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(small_folder):
    return load_chat_lm(str(small_folder), CPU)


@pytest.fixture(scope="module")
def rows(tiny):
    return calibration_rows(tiny[0], 12, seed=0)


@pytest.fixture(scope="module")
def pruned(tiny, rows):
    tokenizer, model = tiny
    model = copy.deepcopy(model)
    return tokenizer, model, script.prune(model, tokenizer, rows, "sparsegpt", 0.5)


def layer(seed: int, n: int = 40, width: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """8×8 的权重与各列相关的输入，float64。"""
    generator = torch.Generator().manual_seed(seed)
    w, mix = (torch.randn(width, width, generator=generator, dtype=torch.float64) for _ in range(2))
    return w, torch.randn(n, width, generator=generator, dtype=torch.float64) @ mix


def table(x: torch.Tensor) -> torch.Tensor:
    """A 使 AᵀA = H：‖A(w' − w)ᵀ‖² 就是带阻尼的误差，留给 lstsq 去解，不求逆。"""
    damping = 0.01 * 2 * (x**2).sum(0).mean()
    return torch.cat([math.sqrt(2) * x, damping.sqrt() * torch.eye(x.shape[1], dtype=x.dtype)])


def brute_force(w: torch.Tensor, x: torch.Tensor, free: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """一行 w：free 的位置随便改，别的定成 target，‖A(w' − w)‖² 最小的 w'。"""
    a, best = table(x), target.clone()
    fixed = a[:, ~free] @ (target - w)[~free]
    if free.any():
        best[free] = w[free] + torch.linalg.lstsq(a[:, free], -fixed[:, None]).solution[:, 0]
    return best


# ---------------------------------------------------------------- SparseGPT


def test_the_hessian():
    _, x = layer(0)
    assert torch.allclose(script.hessian_of(x), table(x).T @ table(x), atol=1e-9, rtol=0)


@pytest.mark.parametrize("seed", range(5))
def test_sparsegpt_is_the_brute_force_optimum_of_a_fixed_mask(seed):
    """掩码定了：一行要剪的列先来（排到左边），SparseGPT 就是留下的全都能改的最小二乘，一位不差。"""
    w, x = layer(seed)
    keep = torch.rand(8, 8, generator=torch.Generator().manual_seed(seed)) > 0.5
    for row in range(8):
        places = keep[row].long().argsort(stable=True)  # 剪的在左
        its_x = x[:, places]
        found = script.sparsegpt(
            w[row : row + 1, places], script.hessian_of(its_x), keep[row : row + 1, places]
        )
        wanted = brute_force(w[row], x, keep[row], torch.zeros_like(w[row]))
        assert torch.allclose(found[0], wanted[places], atol=1e-9, rtol=0)
        assert torch.allclose(
            script.least_squares(w, script.hessian_of(x), keep)[row], wanted, atol=1e-9, rtol=0
        )


@pytest.mark.parametrize("seed", range(5))
def test_left_to_right_every_step_is_the_brute_force_optimum(seed):
    """从左到右：剪到第 j 列，左边的定住，右边的（后来要剪的也在内）随便改，每一步都是最小二乘。"""
    w, x = layer(seed)
    keep = torch.rand(8, 8, generator=torch.Generator().manual_seed(seed + 9)) > 0.5
    wanted = w.clone()
    for j in range(8):
        for row in range(8):
            if not keep[row, j]:
                target = wanted[row].clone()
                target[j] = 0
                wanted[row] = brute_force(wanted[row], x, torch.arange(8) > j, target)
    for block in (2, 3, 128):  # 一块几列，只是攒着补，结果不变
        found = script.sparsegpt(w, script.hessian_of(x), keep, block)
        assert torch.allclose(found, wanted, atol=1e-9, rtol=0)
        assert (found[~keep] == 0).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), SHARES)
def test_between_the_optimum_and_doing_nothing(seed, share):
    w, x = layer(seed)
    h = script.hessian_of(x)
    found = script.sparsegpt(w, h, share)
    keep = found != 0
    assert keep.sum() == (32 if share == "2:4" else 64 - round(64 * share))
    best, left = script.least_squares(w, h, keep), script.relative_error(found, w, h)
    assert script.relative_error(best, w, h) <= left + 1e-9


def test_uncorrelated_inputs_need_no_repair():
    """各输入互不相关（H 是对角的）：没有可补的，SparseGPT 就是 Wanda 的分数，留下的一个也不改。"""
    w, _ = layer(3)
    x = torch.diag(torch.arange(1.0, 9, dtype=torch.float64))
    found = script.sparsegpt(w, script.hessian_of(x), "2:4")
    h = script.hessian_of(x).diagonal()
    assert torch.equal(found != 0, script.two_of_four(w**2 * h))
    assert torch.allclose(found, w * (found != 0), atol=1e-12)


# ---------------------------------------------------------------- 掩码


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.3, 0.5, 0.8]))
def test_wanda_is_top_k_in_each_row(seed, share):
    w, x = layer(seed)
    score = w.abs() * x.pow(2).sum(0).sqrt()
    keep = script.wanda_mask(w, x, share)
    for row in range(8):
        wanted = score[row].topk(8 - round(8 * share)).indices
        assert sorted(keep[row].nonzero()[:, 0].tolist()) == sorted(wanted.tolist())


def test_the_variants_compare_over_another_range():
    w, x = layer(2)
    by_row = script.magnitude_mask(w, 0.5, by_row=True)
    assert (by_row.sum(1) == 4).all() and not torch.equal(by_row, script.magnitude_mask(w, 0.5))
    whole = script.wanda_mask(w, x, 0.5, by_row=False)
    score = w.abs() * x.norm(dim=0)
    assert whole.sum() == 32 and score[whole].min() >= score[~whole].max()


def test_magnitude_equals_torchs_own():
    from torch.nn.utils import prune as torch_prune

    w, _ = layer(1)
    linear = nn.Linear(8, 8, bias=False).double()
    linear.weight.data.copy_(w)
    torch_prune.l1_unstructured(linear, "weight", amount=0.5)
    assert torch.equal(script.magnitude_mask(w, 0.5), linear.weight_mask.bool())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6))
def test_two_of_four_is_exact(seed, fours):
    """每四个正好两个，留下的不比剪掉的小；一样大也是两个。"""
    score = torch.randn(5, 4 * fours, generator=torch.Generator().manual_seed(seed)).abs().round(decimals=1)
    keep = script.two_of_four(score).unflatten(1, (-1, 4))
    assert (keep.sum(-1) == 2).all()
    parts = score.unflatten(1, (-1, 4))
    lowest_kept = parts.masked_fill(~keep, math.inf).amin(-1)
    assert (lowest_kept >= parts.masked_fill(keep, -1).amax(-1)).all()


def test_by_hand():
    """README 的练习 1。"""
    w, x = torch.tensor([[4.0, 3.0, 2.0, 1.0]]), torch.tensor([[1.0, 1.0, 1.0, 5.0]])
    assert script.magnitude_mask(w, 0.5).tolist() == [[True, True, False, False]]
    assert script.wanda_mask(w, x, 0.5).tolist() == [[True, False, False, True]]
    w, x = torch.tensor([[1.0, 1.0]]).double(), torch.tensor([[2.0, 1.0], [1.0, 1.0]]).double()
    h = 2 * x.T @ x
    assert h.tolist() == [[10.0, 6.0], [6.0, 4.0]]
    repaired = script.sparsegpt(w, h, torch.tensor([[False, True]]))
    assert repaired[0].tolist() == pytest.approx([0.0, 2.5])  # 1 + 6/4
    error = (x @ (repaired - w).T).pow(2).sum().item()
    assert error == pytest.approx(0.5)
    assert (x @ torch.tensor([[1.0], [0.0]]).double()).pow(2).sum() == 5  # 不补


# ---------------------------------------------------------------- 整个模型


def test_walking_equals_starting_over(tiny, rows):
    """一块一块往前走，与改了以后整个从头算，各层收到的输入相同。"""
    tokenizer, model = tiny
    model = copy.deepcopy(model)
    for layers, inputs in walk_blocks(model, rows, tokenizer.pad_token_id, batch_size=5):
        again = capture_inputs(model, rows, layers, tokenizer.pad_token_id, batch_size=5)
        for name, linear in layers.items():
            assert torch.allclose(inputs[name], again[name], atol=1e-6)
            with torch.no_grad():
                linear.weight *= linear.weight.abs() > 0.05
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("method", script.METHODS + script.VARIANTS)
@pytest.mark.parametrize("share", [0.5, "2:4"])
def test_every_layer_has_its_share_of_zeros(tiny, rows, method, share):
    tokenizer, model = tiny
    model = copy.deepcopy(model)
    masks = script.prune(model, tokenizer, rows, method, share)
    assert zeros(model) == pytest.approx(0.5, abs=1e-3)
    for name, keep in masks.items():
        weight = model.get_submodule(name).weight
        assert torch.equal(weight != 0, keep)
        if share == "2:4":
            assert (keep.unflatten(1, (-1, 4)).sum(-1) == 2).all()
    assert torch.equal(model.get_input_embeddings().weight, tiny[1].get_input_embeddings().weight)  # 不剪


def test_save_and_load_gives_the_same_logits(pruned, rows, tmp_path):
    tokenizer, model, masks = pruned
    sparse_weights.save_sparse(tmp_path / "sparse", model, tokenizer, masks)
    model.save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    ids = torch.tensor([rows[0]["input_ids"]])
    wanted = model(input_ids=ids).logits
    for again in (
        sparse_weights.load_sparse(tmp_path / "sparse"),
        load_chat_lm(str(tmp_path / "plain"), CPU),
    ):
        assert torch.equal(again[1](input_ids=ids).logits, wanted)
        assert again[0].get_vocab() == tokenizer.get_vocab()
    saved, plain = (
        (tmp_path / name).stat().st_size for name in ("sparse/sparse.safetensors", "plain/model.safetensors")
    )
    sizes = sparse_weights.total_bytes(masks, value=4)
    assert plain - saved == pytest.approx(sizes["dense"] - sizes["bitmap"], abs=4000)  # 只差文件头


def test_bytes_by_hand():
    """README 的练习 2：4×8 留下一半，16 位。"""
    found = sparse_weights.bytes_of((4, 8), 16)
    assert found == {"dense": 64, "bitmap": 36, "csr16": 84, "torch": 200, "2of4": 36}
    n = 4096
    for share, smaller in ((0.5, False), (0.6, True)):
        its = sparse_weights.bytes_of((n, n), int(n * n * (1 - share)))
        assert (its["csr16"] < its["dense"]) is smaller
    half = {"a": torch.tensor([[True, True, False, False]])}
    assert "2of4" in sparse_weights.total_bytes(half)
    assert "2of4" not in sparse_weights.total_bytes({"a": torch.tensor([[True, True, True, False]])})


def test_both_products_are_the_same_product():
    found = race(torch.randn(64, 64), torch.rand(64, 64) > 0.5, torch.randn(3, 64), repeats=1)
    assert set(found) == {"full", "dense", "csr", "dense_speedup", "csr_speedup"}
    assert isinstance(two_of_four_here(128), str)


# ---------------------------------------------------------------- 恢复


def test_lora_keeps_the_mask(pruned):
    _, model, masks = pruned
    model = copy.deepcopy(model)
    ids = torch.randint(0, 600, (2, 9), generator=torch.Generator().manual_seed(0))
    before = model(input_ids=ids).logits
    learned = add_lora(model, rank=4, alpha=8, masked=True)
    assert torch.equal(model(input_ids=ids).logits, before)  # B 是 0
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in learned}
    with torch.no_grad():
        for parameter in learned:
            parameter.add_(0.05 * torch.randn_like(parameter))
    unmerged = model(input_ids=ids).logits
    assert not torch.allclose(unmerged, before)
    merge_lora(model)
    assert torch.equal(model(input_ids=ids).logits, unmerged)
    assert not any(isinstance(module, MaskedLora) for module in model.modules())
    for name, keep in masks.items():
        assert (model.get_submodule(name).weight[~keep] == 0).all()


def test_plain_lora_loses_the_mask():
    linear = nn.Linear(8, 8)
    with torch.no_grad():
        linear.weight[:, :4] = 0
    for masked, kept in ((True, 32), (False, 64)):
        lora = MaskedLora(linear, 2, 4.0, masked)
        with torch.no_grad():
            lora.B.fill_(0.1)
        assert (lora.weight() != 0).sum() == kept
        lora.weight().sum().backward()
        assert lora.A.grad.isfinite().all()


# ---------------------------------------------------------------- 说错的话


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--methods", "obd"], "--methods 不认识 obd"),
        (["--eval_dataset", "some/rows"], "--eval_dataset 用不上"),
        (["--shares", "0.5,"], "空的一项"),
        (["--shares", "1"], "--shares 要是 0 到 1 之间的小数"),
        (["--shares", "nan"], "--shares 要是"),
        (["--shares", "1:4"], "给的是 1:4"),
        (["--recover_share", "50"], "--recover_share 要是"),
        (["--save", "best"], "--save 要写成"),
        (["--n_calibration", "0"], "--n_calibration 要是正整数"),
        (["--dataset", "没有.jsonl"], "没有"),
    ],
)
def test_wrong_flags(flags, said):
    with pytest.raises(UserError, match=said):
        script.main(["--preset", "tiny", *flags])


def test_wrong_calibration(tiny, rows):
    tokenizer, model = tiny
    model = copy.deepcopy(model)
    before = copy.deepcopy(model.state_dict())
    for method, its, said in (
        ("wanda", [], "一段也没有"),
        ("sparsegpt", [SHORT], "校准太少"),
        ("random", rows, "不认识 random"),
    ):
        with pytest.raises(UserError, match=said):
            script.prune(model, tokenizer, its, method, 0.5)
    for share in (1.0, -0.1, "4:8"):
        with pytest.raises(UserError, match="share 要是"):
            script.prune(model, tokenizer, rows, "wanda", share)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert script.prune(model, tokenizer, [], "magnitude", 0.5)  # 不看输入，不要校准


def test_odd_widths_quantized_and_broken_models(tiny, rows):
    tokenizer, model = tiny
    odd = copy.deepcopy(model)
    odd.model.layers[1].mlp.down_proj = nn.Linear(46, 32, bias=False)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.down_proj（46）"):
        script.prune(odd, tokenizer, rows, "magnitude", "2:4")
    assert zeros(odd) < 0.01  # 一层也没有剪
    done = copy.deepcopy(model)
    done.config.packed = {"method": "gptq", "bits": 4, "group": 64}
    with pytest.raises(UserError, match="已经量化过"):
        script.prune(done, tokenizer, rows, "magnitude", 0.5)
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.layers[0].input_layernorm.weight.fill_(math.nan)
    with pytest.raises(UserError, match="NaN"):
        script.prune(broken, tokenizer, rows, "wanda", 0.5)


def test_a_quantized_folder(base_folder, tmp_path):
    import shutil

    folder = tmp_path / "quantized"
    shutil.copytree(base_folder, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match="量化过"):
        script.main(["--preset", "tiny", "--model", str(folder), "--output_dir", str(tmp_path / "out")])


def test_broken_sparse_folders(pruned, tmp_path):
    tokenizer, model, masks = pruned
    with pytest.raises(UserError, match="没有文件夹"):
        sparse_weights.load_sparse(tmp_path / "no")
    folder = tmp_path / "sparse"
    sparse_weights.save_sparse(folder, model, tokenizer, masks)
    weights = folder / sparse_weights.WEIGHTS
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    with pytest.raises(UserError, match="坏了或被改过"):
        sparse_weights.load_sparse(folder)
    weights.unlink()
    with pytest.raises(UserError, match=r"少了 sparse\.safetensors"):
        sparse_weights.load_sparse(folder)
    (folder / sparse_weights.ABOUT).write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="读不出来"):
        sparse_weights.load_sparse(folder)
    (folder / sparse_weights.ABOUT).unlink()
    with pytest.raises(UserError, match="没有写完"):
        sparse_weights.load_sparse(folder)


# ---------------------------------------------------------------- 全课


def write_chats(path, n: int) -> str:
    lines = [json.dumps(chat, ensure_ascii=False) for chat in world.chats(n, seed=5)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def test_own_chats_through_the_whole_lesson(small_folder, tmp_path, capsys, monkeypatch):
    """自己的模型、自己的对话；第二次直接用；存下的读得回来。"""
    monkeypatch.setattr(script, "sparse_speed", partial(sparse_speed, size=64, repeats=1))
    out = tmp_path / "out"
    flags = ["--preset", "tiny", "--model", str(small_folder), "--output_dir", str(out)]
    flags += [
        "--dataset",
        write_chats(tmp_path / "mine.jsonl", 24),
        "--shares",
        "0.5,2:4",
        "--save",
        "wanda-2:4",
    ]
    flags += ["--recover_steps", "2", "--recover_share", "0.5", "--batch_size", "4"]
    metrics = script.main(flags)["metrics"]
    assert set(metrics["methods"]) == set(script.METHODS)
    for its in metrics["methods"].values():
        assert its["2of4"]["zeros"] == 0.5 and "qa_accuracy" not in its["50"]
    assert metrics["recovered"]["sparsegpt"]["merged"]["zeros"] == pytest.approx(0.5, abs=1e-3)
    assert metrics["recovered"]["plain"]["merged"]["zeros"] < 0.01
    assert metrics["recovered"]["plain"]["pruned_again"]["zeros"] == pytest.approx(0.5, abs=1e-3)
    mean = metrics["errors"]["mean"]
    assert mean["sparsegpt_exact"] < mean["sparsegpt"] < mean["wanda"] < mean["magnitude"]
    assert zeros(sparse_weights.load_sparse(out / "sparse")[1]) == 0.5
    said = capsys.readouterr().out
    assert "困惑度" in said and "合并以后 0." in said
    script.main(flags)
    assert "已有训练结果" in capsys.readouterr().out
    for name in ("pruning_perplexity.svg", "pruning_heldout_loss.svg", "pruning_2of4.svg"):
        assert (out / name).is_file()


def test_too_few_own_chats(small_folder, tmp_path):
    flags = ["--preset", "tiny", "--model", str(small_folder), "--output_dir", str(tmp_path / "out")]
    (tmp_path / "empty.jsonl").write_text("", encoding="utf-8")
    for file, said in (
        (write_chats(tmp_path / "one.jsonl", 1), "至少要两行"),
        (tmp_path / "empty.jsonl", "空文件"),
    ):
        with pytest.raises(UserError, match=said):
            script.main([*flags, "--dataset", str(file)])
    short = [
        {"messages": [{"role": "user", "content": w}, {"role": "assistant", "content": "好"}]} for w in "甲乙"
    ]
    (tmp_path / "short.jsonl").write_text("\n".join(map(json.dumps, short)), encoding="utf-8")
    with pytest.raises(UserError, match="校准太少：一共"):
        script.main([*flags, "--dataset", str(tmp_path / "short.jsonl")])


def test_the_order_is_said():
    cells = {"magnitude": 0.3, "wanda": 0.2, "sparsegpt": 0.2005}
    methods = {name: {"50": {"heldout_loss": loss}} for name, loss in cells.items()}
    assert order(methods, "50") == "magnitude > Wanda ≈ SparseGPT"
    assert order({"wanda": methods["wanda"]}, "50") == ""
    assert [share_key(word) for word in ("0.5", "2:4", "0.125", "0.30")] == ["50", "2of4", "12.5", "30"]
