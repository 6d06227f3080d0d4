"""nlp_common/lm/adapters.py：认名字、查坏的、查是不是它的；接上去等于 PEFT，原模型不变，权重共用。"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from nlp_common.base.errors import UserError
from nlp_common.hub.models import find_model
from nlp_common.lm.adapters import (
    attach,
    base_of,
    check_base,
    name_adapters,
    read_adapter,
    shared_copy,
    weights_mark,
    write_base,
)
from nlp_common.lm.loading import load_causal_lm

peft = pytest.importorskip("peft", reason="没有装 peft：不测适配器")


@pytest.fixture(scope="module")
def adapter(chat_folder, tmp_path_factory):
    """接在 chat_folder 上、B 不是 0 的一个。"""
    folder = tmp_path_factory.mktemp("adapter") / "mine"
    model = load_causal_lm(str(chat_folder))[1]
    mark = weights_mark(model)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, value in wrapped.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.2)
    wrapped.save_pretrained(folder)
    write_base(folder, str(chat_folder), mark)
    return folder


@pytest.fixture
def broken(adapter, tmp_path):
    """``broken(改)`` → 改过的一份。"""

    def make(change, name="mine"):
        folder = tmp_path / name
        shutil.copytree(adapter, folder)
        change(folder)
        return folder

    return make


def error_of(work, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        work(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def logits(model):
    with torch.no_grad():
        return model(torch.arange(3, 40)[None]).logits


def test_names(tmp_path):
    for name in ("a/x", "b/x", "c=d"):
        (tmp_path / name).mkdir(parents=True)
    a, b, c = (str(tmp_path / name) for name in ("a/x", "b/x", "c=d"))
    assert {name: str(path) for name, path in name_adapters([a, f"y={b}", c]).items()} == {
        "x": a,
        "y": b,
        "c=d": c,
    }
    assert name_adapters(None) == {}
    message = error_of(name_adapters, [a, b])
    assert "两个适配器都叫 x" in message and f"--adapter x2={b}" in message


def test_attached_like_peft_and_the_base_is_left_alone(chat_folder, adapter):
    model = load_causal_lm(str(chat_folder))[1]
    before = logits(model)
    copied = attach(shared_copy(model), adapter, str(chat_folder))
    library = peft.PeftModel.from_pretrained(load_causal_lm(str(chat_folder))[1], adapter)
    assert torch.equal(logits(copied), logits(library)) and not torch.equal(logits(copied), before)
    assert torch.equal(logits(model), before)
    shared = copied.model.layers[0].self_attn.q_proj.base_layer.weight
    assert shared is model.model.layers[0].self_attn.q_proj.weight


def test_the_mark_knows_one_step(chat_folder):
    model = load_causal_lm(str(chat_folder))[1]
    mark = weights_mark(model)
    assert mark == weights_mark(load_causal_lm(str(chat_folder))[1]) and len(mark) == 16
    with torch.no_grad():
        for value in model.parameters():
            value.add_(1e-6)
    assert weights_mark(model) != mark


def test_another_base(chat_folder, base_folder, adapter, broken, capsys):
    other = load_causal_lm(str(base_folder))[1]
    message = error_of(check_base, adapter, other, str(base_folder))
    assert "权重却不是训练它时的那一份" in message and f"--model {chat_folder}" in message

    unmarked = broken(lambda folder: (folder / "base.json").unlink())
    check_base(unmarked, other, str(base_folder))  # 别人的适配器没有记号：形状对得上就用，说一声
    assert f"说它接在 {chat_folder} 上" in capsys.readouterr().out

    def widen(folder):
        tensors = load_file(folder / "adapter_model.safetensors")
        save_file({k: torch.cat([v, v], 1) for k, v in tensors.items()}, folder / "adapter_model.safetensors")

    model = load_causal_lm(str(chat_folder))[1]
    message = error_of(check_base, broken(widen, "wide"), model, str(chat_folder))
    assert "不是" in message and "的 A 是 (4, 256)，模型那里是 (" in message

    def deepen(folder):
        tensors = load_file(folder / "adapter_model.safetensors")
        tensors = {k.replace("layers.1.", "layers.9."): v for k, v in tensors.items()}
        save_file(tensors, folder / "adapter_model.safetensors")

    assert "没有 model.layers.9." in error_of(check_base, broken(deepen, "deep"), model, str(chat_folder))


def test_half_written(chat_folder, broken, tmp_path):
    def cut(folder):
        file = folder / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])

    def lose(folder):
        tensors = load_file(folder / "adapter_model.safetensors")
        tensors.pop(next(name for name in tensors if "lora_B" in name))
        save_file(tensors, folder / "adapter_model.safetensors")

    again = "请重新复制或重新训练它"
    assert again in error_of(read_adapter, broken(cut, "cut"))
    assert again in error_of(
        read_adapter, broken(lambda f: (f / "adapter_model.safetensors").unlink(), "gone")
    )
    assert again in error_of(
        read_adapter, broken(lambda f: (f / "adapter_config.json").write_text("{"), "json")
    )
    model = load_causal_lm(str(chat_folder))[1]
    message = error_of(attach, model, broken(lose, "lost"), str(chat_folder))
    assert "不完整" in message and "lora_B" in message


def test_a_missing_layer_and_a_broken_mark(chat_folder, broken):
    """一层的 A、B 都不在了，留下的一对一对都齐，也看得出来；base.json 写了一半。"""
    model = load_causal_lm(str(chat_folder))[1]

    def lose_a_layer(folder):
        file = folder / "adapter_model.safetensors"
        tensors = load_file(file)
        name = next(iter(tensors)).partition(".lora_")[0]
        save_file({k: v for k, v in tensors.items() if not k.startswith(name)}, file)

    assert "不完整" in error_of(check_base, broken(lose_a_layer, "layer"), model, str(chat_folder))
    half = broken(lambda f: (f / "base.json").write_text('{"model"', encoding="utf-8"), "mark")
    assert "base.json 读不出来" in error_of(check_base, half, model, str(chat_folder))


def test_what_is_no_adapter(chat_folder, adapter, broken, tmp_path):
    assert "没有适配器文件夹" in error_of(read_adapter, tmp_path / "no")
    assert f"请用 --model {chat_folder}" in error_of(read_adapter, chat_folder)
    assert f"例如 --adapter {adapter}" in error_of(read_adapter, adapter.parent)

    def change(**values):
        def write(folder):
            config = json.loads((folder / "adapter_config.json").read_text("utf-8")) | values
            (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")

        return write

    assert "是 PREFIX_TUNING" in error_of(read_adapter, broken(change(peft_type="PREFIX_TUNING"), "prefix"))
    nameless = broken(change(base_model_name_or_path=None), "nameless")
    assert "没有写它接在哪个模型上" in error_of(base_of, nameless)
    assert base_of(adapter) == str(chat_folder)
    moved = broken(change(base_model_name_or_path=str(tmp_path / "elsewhere")), "moved")
    assert "不在了" in error_of(base_of, moved) and "--model" in error_of(base_of, moved)

    def pickled(folder):
        (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")

    assert "pickle" in error_of(read_adapter, broken(pickled, "bin"))


def test_an_adapter_where_a_whole_model_is_wanted(adapter, chat_folder):
    message = error_of(find_model, str(adapter))
    assert f"接在 {chat_folder} 上" in message and f"--adapter {adapter}" in message
    assert f"merge_lora.py --adapter {adapter} --export" in message


def test_without_peft(monkeypatch, chat_folder, adapter):
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    model = load_causal_lm(str(chat_folder))[1]
    assert "pip install peft" in error_of(attach, model, adapter, str(chat_folder))
