"""载入时的检查：对不上的权重不许悄悄变成随机数，用不了的模型一句中文说清，坏的设置在载入时就改好。"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
)

from nlp_common.base.errors import UserError
from nlp_common.lm.classifier import load_classifier
from nlp_common.lm.loading import load_causal_lm, load_reward_model, load_tokenizer
from nlp_common.tiny.bert import character_tokenizer


@pytest.fixture
def odd(base_folder, tmp_path):
    """``odd(config={…}, weights=函数, generation={…})`` → 改过的一份小模型的文件夹。"""

    def make(config=None, weights=None, generation=None, name="odd") -> Path:
        folder = tmp_path / name
        shutil.copytree(base_folder, folder)
        for file, changes in (("config.json", config), ("generation_config.json", generation)):
            if changes:
                found = json.loads((folder / file).read_text(encoding="utf-8")) | changes
                (folder / file).write_text(json.dumps(found), encoding="utf-8")
        if weights:
            changed = weights(load_file(folder / "model.safetensors"))
            save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


def error_of(load, folder, *rest) -> str:
    with pytest.raises(UserError) as caught:
        load(str(folder), *rest)
    message = str(caught.value)
    assert str(folder) in message and "\n" not in message
    return message


def rename(prefix_of):
    return lambda weights: {prefix_of(name): value for name, value in weights.items()}


# ---- 权重对不上 ----


@pytest.mark.parametrize(
    "prefix_of",
    [
        lambda name: "_orig_mod." + name,
        lambda name: "module." + name,
        lambda name: "module._orig_mod." + name,
        lambda name: name.replace("model.layers.0.", "model.layers.0._orig_mod."),
        lambda name: name.replace("mlp.", "_checkpoint_wrapped_module.mlp."),
        lambda name: "_fsdp_wrapped_module." + name,
        lambda name: "base_model.model." + name,
    ],
)
def test_wrappers_in_the_names_are_stripped_and_do_not_come_back(odd, base_folder, prefix_of, tmp_path):
    _, wanted = load_causal_lm(str(base_folder))
    tokenizer, model = load_causal_lm(str(odd(weights=rename(prefix_of))))
    for name, value in wanted.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert model.generation_config.eos_token_id == wanted.generation_config.eos_token_id
    model.save_pretrained(tmp_path / "again")
    assert set(load_file(tmp_path / "again" / "model.safetensors")) == set(
        load_file(base_folder / "model.safetensors")
    )
    scorer = load_reward_model(str(tmp_path / "odd"), tokenizer)
    assert torch.equal(scorer.model.embed_tokens.weight, wanted.model.embed_tokens.weight)


def without(*names):
    return lambda weights: {name: value for name, value in weights.items() if name not in names}


def test_missing_and_extra_and_misshapen_weights_are_named(odd):
    missing = odd(weights=without("model.norm.weight", "model.layers.1.mlp.up_proj.weight"), name="missing")
    message = error_of(load_causal_lm, missing)
    assert "缺 model.layers.1.mlp.up_proj.weight、model.norm.weight" in message
    assert "缺 model.layers.1" in error_of(load_reward_model, missing, load_tokenizer(str(missing)))

    untied = odd({"tie_word_embeddings": False}, name="untied")
    message = error_of(load_causal_lm, untied)
    assert "缺 lm_head.weight" in message and "tie_word_embeddings 改成 true" in message

    deeper = error_of(
        load_causal_lm, odd({"num_hidden_layers": 1, "layer_types": ["full_attention"]}, name="deeper")
    )
    assert "多出 model.layers.1." in deeper and "等 12 个" in deeper

    wider = error_of(load_causal_lm, odd({"vocab_size": 700}, name="wider"))
    assert "model.embed_tokens.weight（文件里 (636, 128)，模型要 (700, 128)）" in wider

    strange = error_of(load_causal_lm, odd(weights=rename(lambda name: "net." + name), name="strange"))
    assert "缺 " in strange and "多出 net.model" in strange


def test_extra_heads_are_no_fault(odd):
    extra = odd(weights=lambda weights: weights | {"score.weight": torch.zeros(1, 128)})
    load_causal_lm(str(extra))


def test_unmerged_lora_is_refused(odd):
    lora = odd(weights=lambda weights: weights | {"model.layers.0.q_proj.lora_A.weight": torch.zeros(8, 128)})
    assert "没有合并的 LoRA" in error_of(load_causal_lm, lora)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_no_numbers(odd, value):
    def spoil(weights):
        weights["model.norm.weight"][3] = value
        return weights

    assert "NaN 或无穷大（model.norm.weight）" in error_of(load_causal_lm, odd(weights=spoil))


def test_tokenizer_longer_than_the_embedding(odd):
    def shrink(weights):
        weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:634].clone()
        return weights

    folder = odd({"vocab_size": 634}, shrink)
    assert "分词器有 636 个 token，模型的嵌入只有 634 行" in error_of(load_causal_lm, folder)
    assert "只有 634 行" in error_of(load_reward_model, folder, load_tokenizer(str(folder)))


def test_tokenizer_left_behind(odd):
    folder = odd()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink()
    message = error_of(load_causal_lm, folder)
    assert "没有分词器的文件" in message and "tokenizer.json" in message


# ---- 这里用不了的模型 ----


@pytest.mark.parametrize(
    "config, expected",
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "量化过的模型（gptq，4 位）"),
        ({"quantization_config": {"quant_method": "awq", "w_bit": 4}}, "量化过的模型（awq，4 位）"),
        ({"quantization_config": {"load_in_4bit": True}}, "量化过的模型（bitsandbytes，4 位）"),
        ({"quantization_config": {"load_in_8bit": True}}, "量化过的模型（bitsandbytes，8 位）"),
        ({"quantization_config": {"quant_method": "fp8"}}, "量化过的模型（fp8）"),
        (
            {"quantization_config": {"quant_method": "compressed-tensors"}},
            "量化过的模型（compressed-tensors）",
        ),
        ({"quantization": {"group_size": 64, "bits": 4}}, "量化过的模型"),  # MLX
        ({"model_type": "qwen9", "architectures": ["Qwen9ForCausalLM"]}, "不认识"),
        ({"model_type": "qwen2_vl", "architectures": ["Qwen2VLForConditionalGeneration"]}, "看图的模型"),
        (
            {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "vision_config": {}},
            "看图",
        ),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "不是只有解码器"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "只会填空"),
        ({"model_type": "clip", "architectures": ["CLIPModel"]}, "不是会接着写的"),
        ({"architectures": ["Qwen2ForSequenceClassification"]}, "只会打分，不会说话"),
    ],
)
def test_models_of_another_kind(odd, config, expected):
    assert expected in error_of(load_causal_lm, odd(config))


def test_custom_code_is_neither_run_nor_asked_about(odd, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("不该问读者"))
    code = {"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
    folder = odd({"model_type": "own", "auto_map": code}, name="own")
    (folder / "configuration_own.py").write_text("raise SystemExit('运行了')")
    assert "从不运行别人的代码" in error_of(load_causal_lm, folder)
    known = odd({"auto_map": code}, name="known")  # 库认识的结构：用库里的，不用文件夹里的
    (known / "modeling_own.py").write_text("raise SystemExit('运行了')")
    load_causal_lm(str(known))


def test_broken_config(odd):
    folder = odd()
    (folder / "config.json").write_text('{"model_type": ')
    assert "config.json 坏了" in error_of(load_causal_lm, folder)


@pytest.mark.parametrize(
    "generation",
    [
        {"do_sample": False, "temperature": 0.7, "top_p": 0.8, "top_k": 20},
        {"do_sample": False, "min_p": 0.1},
        {"do_sample": True, "temperature": 0.7, "top_p": 0.8},
    ],
)
def test_contradictory_generation_settings_do_not_stop_the_save(odd, generation, tmp_path, capsys):
    tokenizer, model = load_causal_lm(str(odd(generation=generation)))
    model.generation_config.eos_token_id = tokenizer.eos_token_id  # 训练阶段都会改它
    model.generation_config.pad_token_id = 0
    model.save_pretrained(tmp_path / "saved")
    assert ("generation_config" in capsys.readouterr().out) == (
        "do_sample" not in generation or not generation["do_sample"]
    )
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    if generation.get("do_sample") is False:
        assert not {"temperature", "top_p", "top_k", "min_p"} & saved.keys()


def test_generation_settings_that_the_library_refuses_are_named(odd):
    folder = odd(generation={"num_return_sequences": 3})
    assert "generation_config.json 里的设置自相矛盾" in error_of(load_causal_lm, folder)
    (folder / "generation_config.json").write_text("{")
    assert "删掉这个文件" in error_of(load_causal_lm, folder)


# ---- BERT ----

TEXTS = ["房间宽敞明亮", "早餐很难吃", "服务热情周到", "位置太偏"]


def write_bert(folder: Path, model) -> Path:
    model.save_pretrained(folder)
    character_tokenizer(TEXTS, min_count=1).save_pretrained(folder)
    return folder


def bert_config(config_class=BertConfig, **more):
    size = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    return config_class(**size, intermediate_size=64, **more)


def same_backbone(folder: Path, model) -> bool:
    saved = load_file(folder / "model.safetensors")
    return torch.equal(
        saved["bert.embeddings.word_embeddings.weight"], model.bert.embeddings.word_embeddings.weight
    )


@pytest.mark.parametrize("old", [1, 3, 15])
def test_another_number_of_classes_gets_a_new_head(tmp_path, old, capsys):
    folder = write_bert(tmp_path / "b", BertForSequenceClassification(bert_config(num_labels=old)))
    _, model = load_classifier(folder, ["负面", "正面"])
    assert model.classifier.out_features == 2 and same_backbone(folder, model)
    assert f"原来的分类层是 {old} 类，不要了；分类层是新的，2 类" in capsys.readouterr().out
    ids = torch.tensor([[2, 5, 3]])
    assert model(ids, labels=torch.tensor([1])).loss.isfinite()  # 回归的也改成分类


def test_same_number_of_classes_keeps_the_head_and_a_masked_lm_gets_a_new_one(tmp_path, capsys):
    two = BertForSequenceClassification(bert_config(num_labels=2))
    _, model = load_classifier(write_bert(tmp_path / "two", two), ["负面", "正面"])
    assert torch.equal(model.classifier.weight, two.classifier.weight)
    assert "沿用它已有的分类层" in capsys.readouterr().out
    folder = write_bert(tmp_path / "mlm", BertForMaskedLM(bert_config()))
    _, model = load_classifier(folder, ["负面", "正面"])
    assert same_backbone(folder, model)
    shown = capsys.readouterr()
    assert "分类层是新的，2 类" in shown.out and "MISSING" not in shown.out + shown.err


def test_weights_of_another_architecture_never_become_random_bert_weights(tmp_path):
    folder = write_bert(
        tmp_path / "electra", ElectraForSequenceClassification(bert_config(ElectraConfig, embedding_size=32))
    )
    assert "结构是 electra" in error_of(load_classifier, folder, ["负面", "正面"])
    config = json.loads((folder / "config.json").read_text()) | {
        "model_type": "bert"
    }  # 旧的文件夹常没有这一项
    (folder / "config.json").write_text(json.dumps(config))
    message = error_of(load_classifier, folder, ["负面", "正面"])
    assert "缺 bert.embeddings" in message and "多出" in message


def test_a_finished_classifier_needs_every_weight(tmp_path):
    folder = write_bert(tmp_path / "b", BertForSequenceClassification(bert_config(num_labels=2)))
    weights = load_file(folder / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "缺 classifier.weight" in error_of(load_classifier, folder)


def test_bert_without_its_vocabulary_and_with_one_too_long(tmp_path):
    folder = write_bert(tmp_path / "b", BertForSequenceClassification(bert_config(num_labels=2)))
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        (folder / name).unlink(missing_ok=True)
    assert "没有分词器的文件" in error_of(load_classifier, folder)
    small = bert_config(num_labels=2)
    small.vocab_size = 10
    folder = write_bert(tmp_path / "s", BertForSequenceClassification(small))
    assert "嵌入只有 10 行" in error_of(load_classifier, folder)
