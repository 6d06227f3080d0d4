"""merge_lora.py 与 adapter_files.py：合并等于挂着、五种合法等于 PEFT、共用的嵌入、导出核对、四位的几种合法、说错的话。"""

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import adapter_files
import merge_lora as script
from adapter_files import (
    Adapter,
    LoRA,
    combine,
    export,
    is_tied,
    load_adapter,
    merge_into,
    put_on,
    save_adapter,
)
from lora_by_hand import add_lora, lora_layers, merge_lora
from nf4 import dequantize, quantize
from nlp_common.base.errors import UserError
from nlp_common.base.runs import file_sha256
from nlp_common.lm.adapters import weights_mark
from nlp_common.lm.loading import load_causal_lm

SMALL = ["--preset", "tiny", "--max_train_samples", "24", "--n_questions", "6"]


def lora_on(model, seed: int, r: int = 4):
    """装上随机的 A、B，α/r = 2。"""
    torch.manual_seed(seed)
    learner = copy.deepcopy(model)
    add_lora(learner, "all", r, alpha=2 * r)
    with torch.no_grad():
        for layer in lora_layers(learner).values():
            layer.B.normal_(std=0.1)
    return learner


@pytest.fixture(scope="module")
def folders(model, chat_folder, tmp_path_factory):
    """两个适配器，存成 PEFT 的文件夹。"""
    root = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("one", "two")):
        save_adapter(root / name, lora_on(model, seed), str(chat_folder), weights_mark(model))
    return root


@pytest.fixture(scope="module")
def adapters64(folders):
    """读回的两个适配器，float64。"""
    found = []
    for name in ("one", "two"):
        layers = load_adapter(folders / name).layers
        found.append(Adapter({k: LoRA(v.A.double(), v.B.double(), v.scaling) for k, v in layers.items()}, {}))
    return found


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(24)[None] % 600).logits


# ---- 合并 ----


def test_merging_changes_nothing_in_float64(model64, adapters64):
    beside = logits(put_on(copy.deepcopy(model64), adapters64[0]))
    merged = copy.deepcopy(model64)
    merge_into(merged, adapters64[0])
    assert (logits(merged) - beside).abs().max() < 1e-12
    assert (logits(model64) - beside).abs().max() > 0.1


def test_merged_by_hand(model64):
    """ΔW = 2 · [1, 2]ᵀ [3, 4] 放在左上角：W 的那四个数加上 6、8、12、16。"""
    name = "model.layers.0.self_attn.q_proj"
    weight = model64.get_submodule(name).weight
    A, B = torch.zeros(1, weight.shape[1]), torch.zeros(weight.shape[0], 1)
    A[0, :2], B[:2, 0] = torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0])
    merged = copy.deepcopy(model64)
    merge_into(merged, Adapter({name: LoRA(A, B, 2.0)}, {}))
    change = merged.get_submodule(name).weight - weight
    assert torch.allclose(change[:2, :2], torch.tensor([[6.0, 8.0], [12.0, 16.0]], dtype=torch.float64))
    assert change.abs().sum().item() == pytest.approx(42)


def test_what_is_lost_by_dtype(model, folders):
    rows = [list(range(10, 40)), list(range(5, 20))]
    adapter = load_adapter(folders / "one")
    errors = script.merge_errors(model, adapter, rows)
    assert errors["error_float64"] < 1e-12 < errors["error_float32"] < 1e-4 < errors["error_bfloat16"]
    off = script.rounding(model, adapter)
    assert off["weight_error_cast_after"] < off["weight_error_merged_in_bf16"]


def test_peft_reads_what_we_write_and_we_read_what_it_writes(model, folders, tmp_path):
    peft = pytest.importorskip("peft", reason="没有装 peft：不与它比")
    ours = logits(put_on(copy.deepcopy(model), load_adapter(folders / "one")))
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), folders / "one")
    assert (logits(theirs) - ours).abs().max() < 1e-5
    theirs.save_pretrained(tmp_path)
    again = load_adapter(tmp_path)
    for name, lora in load_adapter(folders / "one").layers.items():
        assert torch.equal(again.layers[name].A, lora.A) and again.layers[name].scaling == lora.scaling
    merged = theirs.merge_and_unload()
    mine = copy.deepcopy(model)
    merge_into(mine, again)
    assert all(torch.allclose(v, mine.state_dict()[k], atol=1e-6) for k, v in merged.state_dict().items())


# ---- 几个合成一个 ----


@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.125, -0.5]])
@pytest.mark.parametrize(
    "how, theirs",
    [("linear", "linear"), ("cat", "cat"), ("svd", "svd"), ("ties", "ties"), ("dare", "dare_linear")],
)
def test_combined_like_peft(model64, folders, adapters64, how, theirs, weights):
    peft = pytest.importorskip("peft", reason="没有装 peft：不与它比")
    library = peft.PeftModel.from_pretrained(copy.deepcopy(model64), folders / "one", adapter_name="one")
    library.load_adapter(folders / "two", adapter_name="two")
    library = library.double()
    density = {"density": 0.5} if how in ("ties", "dare") else {}
    torch.manual_seed(0)
    library.add_weighted_adapter(["one", "two"], weights, "both", theirs, **density)
    torch.manual_seed(0)
    both = combine(adapters64, weights, how)
    modules = dict(library.get_base_model().named_modules())
    for name in adapters64[0].layers:
        target = modules[name]
        if how == "dare":  # 库按 named_modules 的次序抽随机数，我们按文件里的：逐层比，各从同一种子开始
            torch.manual_seed(7)
            A, B = library.base_model._generalized_task_arithmetic_weighted_adapter(
                theirs, ["one", "two"], weights, target, 0.5, "total"
            )
            expected = B @ A
            torch.manual_seed(7)
            found = adapter_files.dare([a.layers[name] for a in adapters64], weights).delta()
        else:
            expected, found = target.get_delta_weight("both"), both.layers[name].delta()
        assert (found - expected).abs().max() < 1e-9 * max(1, expected.abs().max())


def test_cat_is_the_exact_sum_and_linear_is_not(adapters64):
    name = next(iter(adapters64[0].layers))
    one, two = (adapter.layers[name] for adapter in adapters64)
    exact = 0.3 * one.delta() + 0.7 * two.delta()
    assert (adapter_files.cat([one, two], [0.3, 0.7]).delta() - exact).abs().max() < 1e-12
    assert (adapter_files.linear([one, two], [0.3, 0.7]).delta() - exact).norm() > 0.1 * exact.norm()
    near = adapter_files.svd([one, two], [0.3, 0.7])
    assert len(near.A) == 4
    tail = torch.linalg.svdvals(exact)[4:]
    assert (near.delta() - exact).norm() == pytest.approx(tail.norm().item())


def test_ties_by_hand():
    """A 各一行：[4, −1, 3, 0] 与 [−2, −5, 1, 6]，各留一半：[4, 0, 3, 0] 与 [0, −5, 0, 6]。

    定号：+、−、+、+；同号的平均：4、−5、3、6（各只有一个）。√(w·scaling) = 1。
    """
    one = LoRA(torch.tensor([[4.0, -1, 3, 0]]), torch.ones(4, 1), 2.0)
    two = LoRA(torch.tensor([[-2.0, -5, 1, 6]]), torch.ones(4, 1), 2.0)
    both = adapter_files.ties([one, two], [0.5, 0.5], density=0.5)
    assert both.A.tolist() == [[4, -5, 3, 6]]


def test_dare_keeps_the_mean():
    torch.manual_seed(0)
    kept = torch.stack([adapter_files.drop_at_random(torch.ones(100), 0.25) for _ in range(400)])
    assert set(kept.unique().tolist()) == {0.0, 4.0} and kept.mean().item() == pytest.approx(1, abs=0.03)


# ---- 共用的嵌入，导出 ----


def test_tied_embeddings_stay_tied(chat_folder, folders, tmp_path):
    tokenizer, model = load_causal_lm(str(chat_folder))
    merge_into(model, load_adapter(folders / "one"))
    assert is_tied(model)
    shas = export(model, tokenizer, tmp_path / "merged")
    again = load_causal_lm(str(tmp_path / "merged"))[1]
    assert is_tied(again) and torch.equal(logits(again), logits(model))
    assert shas == {"model.safetensors": file_sha256(tmp_path / "merged" / "model.safetensors")}
    assert "lm_head.weight" not in load_file(tmp_path / "merged" / "model.safetensors")


def test_a_trained_head_is_not_lost(chat_folder, tmp_path):
    """PEFT 的 modules_to_save=["lm_head"] 接在共用嵌入的模型上：合并以后两份不同，导出也留着。"""
    peft = pytest.importorskip("peft", reason="没有装 peft：不与它比")
    tokenizer, model = load_causal_lm(str(chat_folder))
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"
    )
    wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        for value in wrapped.parameters():
            if value.requires_grad:
                value.add_(0.1 * torch.randn_like(value))
    wrapped.save_pretrained(tmp_path / "a")
    expected = logits(wrapped)
    tokenizer, plain = load_causal_lm(str(chat_folder))
    merge_into(plain, load_adapter(tmp_path / "a"))
    assert not is_tied(plain)
    export(plain, tokenizer, tmp_path / "merged")
    again = load_causal_lm(str(tmp_path / "merged"))[1]
    assert (logits(again) - expected).abs().max() < 1e-4
    assert (
        json.loads((tmp_path / "merged" / "config.json").read_text("utf-8"))["tie_word_embeddings"] is False
    )


def test_a_lost_head_is_noticed(chat_folder, tmp_path, monkeypatch):
    """不说"不再共用"就存：训练过的输出层没了，导出的核对要看出来。"""
    tokenizer, model = load_causal_lm(str(chat_folder))
    head = model.lm_head.weight.detach() + 1
    monkeypatch.setattr(adapter_files, "untie", lambda model: None)
    merge_into(model, Adapter({}, {"lm_head.weight": head}))
    model.save_pretrained(
        tmp_path / "merged", state_dict={k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    )
    tokenizer.save_pretrained(tmp_path / "merged")
    with pytest.raises(UserError, match="tie_word_embeddings"):
        adapter_files.check_export(model, tmp_path / "merged")


def test_export_in_bfloat16_is_the_cast_of_the_float32_merge(chat_folder, folders, tmp_path):
    done = script.main(
        [
            "--preset",
            "tiny",
            "--adapter",
            str(folders / "one"),
            "--export",
            str(tmp_path / "m"),
            "--dtype",
            "bfloat16",
        ]
    )
    assert done["metrics"]["sha256"] == {
        "model.safetensors": file_sha256(tmp_path / "m" / "model.safetensors")
    }
    model = load_causal_lm(str(chat_folder))[1]
    merge_into(model, load_adapter(folders / "one"))
    saved = load_file(tmp_path / "m" / "model.safetensors")
    assert all(torch.equal(value, model.state_dict()[name].bfloat16()) for name, value in saved.items())


def test_two_in_one_from_the_command_line(folders, tmp_path, chat_folder, capsys):
    given = ["--preset", "tiny", "--adapter", str(folders / "one"), "--adapter", str(folders / "two")]
    script.main([*given, "--combine", "svd", "--weights", "0.3,0.7", "--export", str(tmp_path / "m")])
    assert "one、two 用 svd 合成一个" in capsys.readouterr().out
    model = load_causal_lm(str(chat_folder))[1]
    merge_into(model, combine([load_adapter(folders / n) for n in ("one", "two")], [0.3, 0.7], "svd"))
    assert torch.equal(logits(load_causal_lm(str(tmp_path / "m"))[1]), logits(model))


def test_one_minus_itself_is_the_model_it_came_from(folders, tmp_path, chat_folder):
    """README 的练习 1。"""
    same = ["--adapter", f"a={folders / 'one'}", "--adapter", f"b={folders / 'one'}", "--weights=1,-1"]
    script.main(["--preset", "tiny", *same, "--export", str(tmp_path / "m")])
    saved, before = (load_file(f / "model.safetensors") for f in (tmp_path / "m", chat_folder))
    assert saved.keys() == before.keys()
    assert all((saved[name] - before[name]).abs().max() < 1e-5 for name in saved)


# ---- 四位 ----


def test_small_steps_vanish_on_the_old_grid():
    torch.manual_seed(0)
    weight = torch.randn(8, 128)
    q = quantize(weight, double=False)
    small = 1e-3 * torch.randn(8, 128)
    assert torch.equal(script.onto_old_grid(q, small), dequantize(q))
    assert torch.equal(script.merged_weight("old_grid", weight, small), dequantize(q))
    large = script.onto_old_grid(q, 0.5 * torch.ones(8, 128))
    assert (large - dequantize(q)).mean() > 0.3
    exact = script.requantised(weight) + small
    assert torch.equal(script.merged_weight("beside", weight, small), exact)


def test_requantising_the_merged_original_is_unbiased():
    """拿没量化的合并再量化：ΔW 平均还在；先量化过的再合并再量化，留下的少得多。"""
    torch.manual_seed(0)
    weight, delta = torch.randn(64, 512), 0.02 * torch.randn(64, 512)

    def kept(way: str) -> float:
        change = script.merged_weight(way, weight, delta) - script.requantised(weight)
        return ((change * delta).sum() / (delta**2).sum()).item()

    assert kept("original") == pytest.approx(1, abs=0.25)
    assert kept("requantise") < 0.5 and kept("old_grid") < 0.5


# ---- 说错的话：一句中文 ----


def says(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        script.main(["--preset", "tiny", *argv])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_bad_arguments(folders, tmp_path):
    one, two, out = str(folders / "one"), str(folders / "two"), str(tmp_path / "out")
    assert "--adapter 与 --export 要一起给" in says("--adapter", one)
    assert "--weights 要与 --adapter 一起给" in says("--weights", "0.7,0.3")
    assert "两个适配器都叫 one" in says("--adapter", one, "--adapter", one, "--export", out)
    assert "要一样多" in says("--adapter", one, "--adapter", two, "--weights", "1", "--export", out)
    for weights in ("多", "nan"):
        assert "逗号隔开的数" in says("--adapter", one, "--weights", weights, "--export", out)
    assert "里已经有东西" in says("--adapter", one, "--export", one)
    assert "没有适配器文件夹" in says("--adapter", str(tmp_path / "no"), "--export", out)


def test_adapters_that_do_not_fit(model, folders, chat_folder, base_folder, tmp_path):
    out = str(tmp_path / "out")
    message = says("--adapter", str(folders / "one"), "--model", str(base_folder), "--export", out)
    assert "权重却不是训练它时的那一份" in message and f"--model {chat_folder}" in message
    half = tmp_path / "half"
    shutil.copytree(folders / "one", half)
    tensors = load_file(half / "adapter_model.safetensors")
    tensors.pop(next(name for name in tensors if "lora_B" in name))
    save_file(tensors, half / "adapter_model.safetensors")
    assert "有 A，没有 B" in says("--adapter", str(half), "--export", out)
    save_adapter(tmp_path / "wide", lora_on(model, 0, r=8), str(chat_folder), weights_mark(model))
    both = ["--adapter", str(folders / "one"), "--adapter", str(tmp_path / "wide"), "--export", out]
    assert "要几个适配器的秩相同" in says(*both, "--combine", "ties")
    odd = tmp_path / "odd"
    shutil.copytree(folders / "one", odd)
    config = json.loads((odd / "adapter_config.json").read_text("utf-8")) | {"use_dora": True}
    (odd / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert "不是平常的 LoRA（use_dora）" in says("--adapter", str(odd), "--export", out)


# ---- 像读者那样跑 ----


def test_a_whole_lesson_and_the_second_run(tmp_path, chat_folder, capsys):
    argv = [*SMALL, "--model", str(chat_folder), "--output_dir", str(tmp_path / "out")]
    metrics = script.main(argv)["metrics"]
    assert set(metrics["styles"]) == {"base", "courteous", "terse", "linear", "cat", "svd", "ties", "dare"}
    assert set(metrics["four_bit"]) == set(script.FOUR_BIT) and metrics["styles"]["cat"]["far"] < 1e-5
    assert metrics["four_bit"]["beside"]["kept"] == pytest.approx(1, abs=0.1)
    assert metrics["tied_before"] == metrics["tied_after"] == 1
    result = tmp_path / "out"
    for name in (
        "combined.svg",
        "four_bit.svg",
        "courteous/adapter_config.json",
        "merged_courteous/config.json",
    ):
        assert (result / name).is_file()
    capsys.readouterr()
    script.main(argv)
    assert "直接加载" in capsys.readouterr().out
    model = load_causal_lm(str(chat_folder))[1]
    beside = logits(put_on(model, load_adapter(result / "courteous")))
    again = load_causal_lm(str(result / "merged_courteous"))[1]
    assert (logits(again) - beside).abs().max() < 1e-4
    assert not lora_layers(merge_lora(model))
