"""export_gguf.py：文件与 gguf 包读的相同，transformers、llama.cpp 读出同样的答案；分词器的各项；不会写的说清楚，写一半的不留下。"""

import errno
import json

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import export_gguf as script
import gguf_format
import llama_engine
from gguf_checks import through_transformers
from gguf_format import TensorInfo, read_gguf, write_gguf
from gguf_tokenizer import CONTROL, USER_DEFINED, plain_template, pre_tokenizer_name, tokenizer_metadata
from modelfile import modelfile
from nlp_common.base.errors import UserError
from nlp_common.base.runs import open_run
from nlp_common.lm.chat_rows import answer_loss, chat_row, collate
from nlp_common.lm.chatml import CHAT_TEMPLATE
from nlp_common.lm.loading import load_causal_lm
from nlp_common.lm.losses import count_labels
from nlp_common.tiny import world

ARGV = ["--preset", "tiny", "--n_questions", "16"]


def teach(model, tokenizer, steps=60):
    """学几十步寒暄与答题：说的是整个的字，贪心的每一步都不是两可的。"""
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    rows = [chat_row(tokenizer, chat["messages"]) for chat in world.chats(8 * steps, seed=0)]
    for step in range(steps):
        batch = collate(rows[8 * step : 8 * step + 8], tokenizer.pad_token_id)
        (answer_loss(model, batch)[0] / count_labels(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.fixture(scope="module")
def tiny_folder(base_folder, tmp_path_factory):
    tokenizer, model = load_causal_lm(str(base_folder))
    folder = tmp_path_factory.mktemp("taught") / "model"
    teach(model, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exported(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf") / "out"
    argv = [*ARGV, "--model", str(tiny_folder), "--output_dir", str(folder)]
    return folder, argv, script.main(argv)["metrics"]


@pytest.fixture(scope="module")
def tiny(tiny_folder):
    return load_causal_lm(str(tiny_folder))


@pytest.fixture(scope="module")
def llama_folder(tiny, tmp_path_factory):
    """Llama 结构的小模型：四个头配两个键值头，输出层不与嵌入共用。"""
    tokenizer, _ = tiny
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 4, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.1,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("llama") / "model"
    teach(LlamaForCausalLM(config), tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_sizes_and_differences(exported):
    folder, _, metrics = exported
    assert metrics["f16"]["bytes"] < 0.52 * metrics["bytes_float32"]
    assert metrics["q8_0"]["bits_per_weight"] == pytest.approx(8.57, abs=0.02)  # 8.5，与 f32 的归一、偏置
    assert metrics["q4_0"]["bytes"] < metrics["q8_0"]["bytes"] < metrics["f16"]["bytes"]
    assert metrics["f16"]["kl"] < 1e-5 < metrics["q4_0"]["kl"]
    for wanted in ("f16", "q8_0", "q4_0"):
        assert metrics[wanted]["bytes"] == (folder / f"model-{wanted}.gguf").stat().st_size
        assert metrics[wanted].get("max_difference_to_transformers", 0.0) < 1e-4


def test_second_run_loads(exported, capsys):
    _, argv, metrics = exported
    assert script.main(argv)["metrics"] == metrics
    assert "直接加载" in capsys.readouterr().out


def test_the_gguf_package_reads_the_same(exported, tiny):
    gguf = pytest.importorskip("gguf", reason="没有装 gguf")
    folder, _, _ = exported
    _, model = tiny
    reader = gguf.GGUFReader(folder / "model-q4_0.gguf")
    ours = read_gguf(folder / "model-q4_0.gguf")
    theirs = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert ours.metadata == theirs
    assert {tensor.name for tensor in reader.tensors} == set(ours.tensors) == set(script.weights_of(model))
    for tensor in reader.tensors:
        info = ours.tensors[tensor.name]
        assert tuple(tensor.shape.tolist())[::-1] == info.shape
        assert tensor.data_offset == ours.start + info.offset and tensor.data_offset % 32 == 0
        assert np.array_equal(tensor.data.reshape(-1).view(np.uint8), ours.raw(tensor.name))
    assert ours.tensors["token_embd.weight"].kind == "q8_0"  # 嵌入另选
    assert ours.tensors["blk.0.attn_q.weight"].kind == "q4_0"
    assert ours.tensors["blk.0.attn_q.bias"].kind == "f32"


def test_metadata(exported, tiny):
    folder, _, _ = exported
    tokenizer, _ = tiny
    metadata = read_gguf(folder / "model-f16.gguf").metadata
    assert metadata["general.architecture"] == "qwen2"
    assert metadata["general.file_type"] == 1
    assert metadata["qwen2.rope.freq_base"] == 2000.0
    tokens = metadata["tokenizer.ggml.tokens"]
    assert tokens[metadata["tokenizer.ggml.eos_token_id"]] == "<|im_end|>"  # 不是 <|endoftext|>
    assert metadata["tokenizer.ggml.add_bos_token"] is False
    assert metadata["tokenizer.ggml.pre"] == "qwen2"
    kinds = metadata["tokenizer.ggml.token_type"]
    assert [tokens[i] for i, kind in enumerate(kinds) if kind == CONTROL] == [
        "<|endoftext|>", "<|im_start|>", "<|im_end|>",
    ]  # fmt: skip
    assert len(tokens) == len(kinds) == len(tokenizer)
    assert "generation %}" not in metadata["tokenizer.chat_template"]


def test_added_words_that_are_not_special(control_folder):
    tokenizer, model = load_causal_lm(str(control_folder))
    metadata = tokenizer_metadata(tokenizer, model.config)
    number = tokenizer.convert_tokens_to_ids("<tool_call>")
    assert metadata["tokenizer.ggml.token_type"][number] == USER_DEFINED


@pytest.mark.parametrize("which", ["qwen2", "llama"])
def test_llama_cpp_gives_the_same_greedy_answers(which, exported, llama_folder, tmp_path):
    if not llama_engine.engine():
        pytest.skip("没有装 llama.cpp：pip install xllamacpp")
    metrics = exported[2]
    if which == "llama":
        argv = [
            *ARGV,
            "--model",
            str(llama_folder),
            "--output_dir",
            str(tmp_path / "out"),
            "--formats",
            "f16",
        ]
        metrics = script.main(argv)["metrics"]
    # 没有训练过的模型，最大与第二大的 logits 差得很小：别的处理器上舍入不同，偶尔有一题不同；写错了的，几乎题题不同
    assert metrics["f16"]["llama_cpp"]["same_answers"] > 0.7


def test_llama_through_transformers(llama_folder, tmp_path):
    pytest.importorskip("gguf", reason="没有装 gguf")
    tokenizer, model = load_causal_lm(str(llama_folder))
    path = tmp_path / "model.gguf"
    script.export(model, tokenizer, path, "f32", "f32", "llama", "auto")
    file = read_gguf(path)
    packed = script.import_weights(file, model)
    for (name, a), (_, b) in zip(model.named_parameters(), packed.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    questions = [{"messages": [{"role": "user", "content": text}]} for text in ("你好", "小刚去了哪里？")]
    assert through_transformers(path, packed, tokenizer, questions) < 1e-4
    assert file.metadata["tokenizer.ggml.tokens"][-1].startswith("[PAD")  # 嵌入表比词表多的几行


def test_permute_there_and_back():
    weight = torch.arange(24.0).reshape(8, 3)
    moved = script.permute(weight, 2)
    assert moved[:4, 0].tolist() == [0, 6, 3, 9]  # 一个头四行：0 配 2、1 配 3 → 挨在一起
    assert torch.equal(script.unpermute(moved, 2), weight)


# ---------------------------------------------------------------- 文件


def test_round_trip_of_every_type(tmp_path):
    metadata = {
        "a.text": "汉字",
        "a.int": 7,
        "a.float": 0.5,
        "a.bool": True,
        "a.words": ["", "b"],
        "a.ints": [-1, 2],
    }
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    write_gguf(tmp_path / "a.gguf", metadata, [TensorInfo("w", (2, 3), "f32")], [weight.view(np.uint8)])
    file = read_gguf(tmp_path / "a.gguf")
    assert file.metadata == metadata
    assert np.array_equal(file.raw("w").view(np.float32).reshape(2, 3), weight)


def test_half_a_file_is_said(exported, tmp_path):
    raw = (exported[0] / "model-q8_0.gguf").read_bytes()
    for n in (10, 2000, len(raw) - 100):
        (tmp_path / "half.gguf").write_bytes(raw[:n])
        with pytest.raises(UserError, match="不完整"):
            read_gguf(tmp_path / "half.gguf")
    (tmp_path / "other.gguf").write_bytes(b"PK\x03\x04" + raw[4:])
    with pytest.raises(UserError, match="不是 GGUF"):
        read_gguf(tmp_path / "other.gguf")
    (tmp_path / "old.gguf").write_bytes(raw[:4] + b"\x02" + raw[5:])
    with pytest.raises(UserError, match="第 2 版"):
        read_gguf(tmp_path / "old.gguf")
    with pytest.raises(UserError, match="没有"):
        read_gguf(tmp_path / "none.gguf")


# ---------------------------------------------------------------- 说错的话


def fails(argv, match):
    with pytest.raises(UserError, match=match):
        script.main(argv)


def test_wrong_arguments(tmp_path):
    fails([*ARGV, "--formats", "q5_k"], "q5_k.*可以是")
    fails([*ARGV, "--formats", "f16,"], "空的一项")
    fails([*ARGV, "--model", str(tmp_path / "none")], "没有这个文件夹")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    fails([*ARGV, "--model", str(tmp_path / "a.gguf")], "GGUF")


def edited(folder, target, **changes):
    """模型文件夹的一份，config.json 改几项。"""
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    config = json.loads((target / "config.json").read_text(encoding="utf-8")) | changes
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return target


def test_models_that_cannot_be_written(base_folder, tiny, tmp_path):
    quantized = edited(
        base_folder, tmp_path / "quantized", quantization_config={"quant_method": "gptq", "bits": 4}
    )
    fails([*ARGV, "--model", str(quantized)], "量化过的模型（gptq，4 位）")
    bare = edited(base_folder, tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    fails([*ARGV, "--model", str(bare), "--output_dir", str(tmp_path / "o")], "分词器|载入")
    tokenizer, _ = tiny
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=64, n_layer=1, n_head=2)).save_pretrained(
        tmp_path / "gpt2"
    )
    tokenizer.save_pretrained(tmp_path / "gpt2")
    fails([*ARGV, "--model", str(tmp_path / "gpt2"), "--output_dir", str(tmp_path / "o")], "gpt2，这里只会写")
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 2000.0}
    long = edited(base_folder, tmp_path / "long", rope_parameters=rope)
    fails([*ARGV, "--model", str(long), "--output_dir", str(tmp_path / "o")], "位置编码是 linear")


def test_rows_that_are_not_whole_blocks(tiny, tmp_path):
    tokenizer, _ = tiny
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "odd")
    tokenizer.save_pretrained(tmp_path / "odd")
    argv = [*ARGV, "--model", str(tmp_path / "odd"), "--output_dir", str(tmp_path / "out")]
    fails(argv, "48 个数，不是 32 的倍数")
    assert not (tmp_path / "out").exists()
    assert script.main([*argv, "--formats", "f16"])["metrics"]["f16"]["kl"] < 1e-4


def test_unknown_pre_tokenizer():
    with pytest.raises(UserError, match="--pre"):
        pre_tokenizer_name({"pre_tokenizer": {"type": "Whitespace"}})
    digits = {"type": "Digits", "individual_digits": True}
    found = {"type": "Sequence", "pretokenizers": [digits, {"type": "ByteLevel"}]}
    assert pre_tokenizer_name({"pre_tokenizer": found}) == "smollm"


def test_a_full_disk_leaves_nothing(base_folder, tmp_path, monkeypatch):
    argv = [*ARGV, "--model", str(base_folder), "--output_dir", str(tmp_path / "out")]

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gguf_format.os, "fsync", full)
    fails(argv, "磁盘满了")
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(script.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    fails(argv, "只剩 0 MB")
    with open_run(tmp_path / "out") as folder:
        assert folder.finished({}) is None


def test_without_llama_cpp(monkeypatch, base_folder, tmp_path, capsys):
    monkeypatch.setattr(llama_engine, "find_spec", lambda _: None)
    argv = [*ARGV, "--model", str(base_folder), "--output_dir", str(tmp_path / "out"), "--formats", "q8_0"]
    assert "llama_cpp" not in script.main(argv)["metrics"]["q8_0"]
    assert "pip install xllamacpp" in capsys.readouterr().out


# ---------------------------------------------------------------- Modelfile


def test_modelfile(tiny, exported):
    tokenizer, _ = tiny
    text = (exported[0] / "Modelfile").read_text(encoding="utf-8")
    assert text == modelfile("model-q8_0.gguf", tokenizer, 512)
    assert 'PARAMETER stop "<|im_end|>"' in text and "FROM ./model-q8_0.gguf" in text
    assert text.count("{{- if") + text.count("{{ if") + text.count("range") == text.count(
        "{{ end }}"
    ) + text.count("{{- end }}")
    assert "SYSTEM" not in text


def test_a_template_with_its_own_system_message(tiny):
    import copy

    tokenizer = copy.deepcopy(tiny[0])
    tokenizer.chat_template = "{{ '<|im_start|>system\\nYou are S.<|im_end|>\\n' }}" + CHAT_TEMPLATE
    assert 'SYSTEM """You are S."""' in modelfile("m.gguf", tokenizer, 512)


def test_plain_template():
    assert plain_template("a{% generation %}b{%- endgeneration -%}c") == "abc"
