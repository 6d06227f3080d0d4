"""engines.py：四种引擎与 PyTorch 的 logits、贪心回答相同；长短不一的一批；没有装、文件坏了、提示太长，说得清楚。"""

import shutil

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import engine_files
import engines
from nlp_common.base.errors import UserError
from nlp_common.lm.generation import generate
from nlp_common.lm.loading import load_causal_lm

PROMPTS = [[3, 40, 50, 60, 70, 80, 90], [100, 101, 102], [200, 300]]  # 长短不一
CONTEXT = 64


@pytest.fixture(scope="module")
def folder(base_folder, tmp_path_factory):
    """一层的小模型，权重是 float16 写得准的数：F16 的 GGUF 就没有误差。初值放大，贪心的每一步都不是两可的。"""
    tokenizer, _ = load_causal_lm(str(base_folder))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    target = tmp_path_factory.mktemp("engines") / "model"
    LlamaForCausalLM(config).half().float().save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def loaded(folder, cache):
    """load(引擎, 存法)，一种只载入一次。"""
    found = {}

    def get(name, precision=None):
        if command := engines.missing(name):
            pytest.skip(f"没有装 {name}：{command}")
        if (name, precision) not in found:
            found[name, precision] = engines.load(str(folder), name, precision, cache, CONTEXT)
        return found[name, precision]

    yield get
    for engine in found.values():
        engine.close()


@pytest.fixture(scope="module")
def model(folder):
    return load_causal_lm(str(folder))


def log_probabilities(model, prompt):
    with torch.no_grad():
        return model(torch.tensor([prompt]), use_cache=False).logits[0, -1].log_softmax(-1)


@pytest.mark.parametrize("name", ["torch", "onnx", "openvino", "llama"])
def test_the_same_logits_and_greedy_answers(name, loaded, model):
    engine = loaded(name)
    tokenizer, plain = model
    found = engine.logits(PROMPTS).log_softmax(-1)  # (B, V)，一批里长短不一
    wanted = torch.stack([log_probabilities(plain, prompt) for prompt in PROMPTS])
    likely = wanted > -12
    # llama.cpp 乘 F16 的权重时，激活也先变成 F16
    assert (found - wanted)[likely].abs().max() < (0.1 if name == "llama" else 1e-3)
    assert engine.generate(PROMPTS, 12) == generate(plain, tokenizer, PROMPTS, 12)
    assert engine.bytes_read > 0


@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_small_weights_differ_a_little(name, loaded, model):
    _, plain = model
    wanted = torch.stack([log_probabilities(plain, prompt) for prompt in PROMPTS])
    kl, read = {}, {}
    for precision in ("int8", "int4"):
        engine = loaded(name, precision)
        found = engine.logits(PROMPTS).log_softmax(-1)
        kl[precision] = (wanted.exp() * (wanted - found)).sum(-1).mean().item()
        read[precision] = engine.bytes_read
    assert kl["int8"] < kl["int4"] < 1.0 and kl["int8"] < 0.05
    assert read["int4"] < read["int8"] < loaded(name).bytes_read / 3


def test_onnx_and_openvino_read_the_same_weights(loaded):
    if engines.missing("openvino"):
        pytest.skip("没有装 OpenVINO")
    one, two = (loaded(name, "int8").logits(PROMPTS).log_softmax(-1) for name in ("onnx", "openvino"))
    assert (one - two).abs()[one > -8].max() < 0.5  # 有 AMX 的处理器上，OpenVINO 用 bf16 算


def test_dynamic_int8_and_bf16(loaded, model):
    _, plain = model
    wanted = torch.stack([log_probabilities(plain, prompt) for prompt in PROMPTS])
    full = loaded("torch")
    for precision, share in (("bf16", 2), ("int8", 3.5)):
        engine = loaded("torch", precision)
        found = engine.logits(PROMPTS).log_softmax(-1)
        assert (wanted.exp() * (wanted - found)).sum(-1).mean() < 0.1
        assert engine.bytes_read <= full.bytes_read / share


def test_linear_bytes_by_hand(loaded):
    attention, mlp = 64 * (64 + 32 + 32 + 64), 3 * 64 * 96  # 两个键值头、四个头，一头 16 维
    vocabulary = loaded("torch").config.vocab_size * 64
    assert loaded("torch").bytes_read == 4 * (2 * (attention + mlp) + vocabulary)


@pytest.mark.parametrize("name", ["torch", "onnx", "llama"])
def test_stream(name, loaded):
    engine = loaded(name)
    events = list(engine.stream(PROMPTS, 6, stop=False))
    rows = [[token for row, token in events if row == which] for which in range(3)]
    whole = engine.generate(PROMPTS, 6, stop=False)
    assert [len(tokens) for tokens in whole] == [6, 6, 6]
    if name == "llama":  # 半个汉字等写全了才给，最后写不全的就没有：文字相同
        for ours, theirs in zip(rows, whole, strict=True):
            assert engine.tokenizer.decode(theirs).rstrip("�").startswith(engine.tokenizer.decode(ours))
    else:
        assert rows == whole
    some = engine.stream(PROMPTS, 6, stop=False)
    first = [next(some) for _ in range(2)]
    some.close()  # 中途不要了，还能接着用
    assert set(first) <= set(events)
    one = engine.generate(PROMPTS[:1], 8, temperature=1.0, seed=3)
    assert one == engine.generate(PROMPTS[:1], 8, temperature=1.0, seed=3)


def test_a_reply_ends_at_the_stop_token(loaded):
    engine = loaded("torch")
    free = engine.generate(PROMPTS, 8)
    before, engine.stop_ids = engine.stop_ids, [free[0][2]]
    try:
        stopped = engine.generate(PROMPTS[:1], 8)
    finally:
        engine.stop_ids = before
    assert stopped[0] == free[0][: free[0].index(free[0][2]) + 1]


@pytest.mark.parametrize("name", ["torch", "onnx", "llama"])
def test_prompts_that_do_not_fit(name, loaded):
    engine = loaded(name)
    for call in (engine.logits, lambda prompts: engine.generate(prompts, 4)):
        with pytest.raises(UserError, match="64 个 token，上下文一共 64 个"):
            call([[5] * CONTEXT])
        with pytest.raises(UserError, match="提示是空的"):
            call([[5], []])
    with pytest.raises(UserError, match="提示是空的"):
        engine.logits([])
    assert len(engine.generate([[5] * (CONTEXT - 3)], 10, stop=False)[0]) == 3  # 写到装不下为止


def test_unknown_and_missing(folder, cache, monkeypatch):
    with pytest.raises(UserError, match="不认识引擎 tensorrt"):
        engines.load(str(folder), "tensorrt", cache=cache)
    with pytest.raises(UserError, match="没有 int2，可以是 fp32、int8、int4"):
        engines.load(str(folder), "onnx", "int2", cache)
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    assert engines.installed() == ["torch"]
    for name, package in (("onnx", "onnxruntime"), ("openvino", "openvino"), ("llama", "xllamacpp")):
        with pytest.raises(UserError, match=f"没有装.*pip install.*{package}"):
            engines.load(str(folder), name, cache=cache)


def test_broken_files(folder, loaded, tmp_path, cache, capsys):
    loaded("onnx")
    copy = tmp_path / "cache"
    shutil.copytree(cache, copy)
    path = next(copy.glob("*/onnx-fp32/model.onnx"))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])  # 复制到一半
    assert engines.load(str(folder), "onnx", "fp32", str(copy)).logits([[5]]).shape[0] == 1
    assert "不完整" in capsys.readouterr().out
    path.write_bytes(b"\0" * len(whole))  # 大小对，内容坏了
    with pytest.raises(UserError, match="删掉这个文件夹再运行"):
        engines.load(str(folder), "onnx", "fp32", str(copy))
    (path.parent / engine_files.DONE).write_text("[", encoding="utf-8")
    engines.load(str(folder), "onnx", "fp32", str(copy))
    assert "不完整" in capsys.readouterr().out


def test_nothing_half_written(folder, tmp_path, monkeypatch):
    def interrupted(target):
        (target / "model.onnx").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine_files.cached_files(folder, "onnx-fp32", interrupted, str(tmp_path))
    assert not [path for path in tmp_path.rglob("*") if path.name in ("onnx-fp32", "model.onnx")]
    full = type("Usage", (), {"free": 1000})()
    monkeypatch.setattr(engine_files.shutil, "disk_usage", lambda _: full)
    with pytest.raises(UserError, match="只剩 0 MB"):
        engine_files.cached_files(folder, "onnx-fp32", interrupted, str(tmp_path))


@pytest.mark.slow
def test_weights_beside_the_graph(folder, loaded, tmp_path, monkeypatch):
    """大过 2 GB 的，权重另放一个文件：两家都读得到。"""
    small = loaded("onnx", "int8").logits(PROMPTS)
    monkeypatch.setattr(engine_files, "TOO_LARGE", 0)
    other = engines.load(str(folder), "onnx", "int8", str(tmp_path), CONTEXT)
    assert {path.name for path in next(tmp_path.glob("*/onnx-int8")).iterdir()} == {
        "model.onnx", "model.data", engine_files.DONE,
    }  # fmt: skip
    assert torch.equal(other.logits(PROMPTS), small)
    if engines.missing("openvino") is None:
        beside = engines.load(str(folder), "openvino", "int8", str(tmp_path), CONTEXT)
        assert torch.equal(beside.logits(PROMPTS), loaded("openvino", "int8").logits(PROMPTS))


def test_another_model_has_other_files(folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    assert engine_files.weights_id(other) == engine_files.weights_id(folder)
    config = other / "config.json"
    config.write_text(config.read_text(encoding="utf-8").replace("10000.0", "20000.0"), encoding="utf-8")
    assert engine_files.weights_id(other) != engine_files.weights_id(folder)


def test_sliding_window_is_refused(model, tmp_path):
    _, plain = model
    before = getattr(plain.config, "layer_types", None)
    plain.config.layer_types = ["sliding_attention", "full_attention"]
    try:
        with pytest.raises(UserError, match="sliding_attention"):
            engine_files.write_onnx(plain, tmp_path, "这个模型")
    finally:
        plain.config.layer_types = before
