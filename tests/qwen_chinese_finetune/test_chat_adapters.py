"""chat.py --adapter：接上 PEFT 的适配器，给两个就切换；同名、坏了的、别的模型的，一句话说清。"""

import builtins
import shutil
from types import SimpleNamespace

import pytest
import torch

from nlp_common.base.console import printable
from nlp_common.base.errors import UserError
from nlp_common.base.runs import RunFolder
from nlp_common.lm.adapters import attach, weights_mark, write_base
from nlp_common.lm.chatml import prompt_ids
from nlp_common.lm.loading import load_causal_lm
from nlp_common.lm.speaker import Reply, load_speaker, stream_reply

peft = pytest.importorskip("peft", reason="没有装 peft：不测适配器")


@pytest.fixture(scope="module")
def chat(load_script):
    return load_script("chat")


@pytest.fixture(scope="module")
def outputs(chat_folder, tmp_path_factory):
    """一组 tiny 结果，只有 sft。"""
    root = tmp_path_factory.mktemp("outputs")
    parts = load_causal_lm(str(chat_folder))
    record = {"stage": "sft", "settings": {"preset": "tiny"}, "metrics": {}}
    RunFolder(root / "sft").finish(lambda path: [each.save_pretrained(path) for each in parts], record)
    return root


@pytest.fixture(scope="module")
def adapters(outputs, tmp_path_factory):
    """接在 sft 上的两个，一个比一个改得多。"""
    root, base = tmp_path_factory.mktemp("adapters"), str(outputs / "sft")
    for seed, name in enumerate(("甲", "Yi")):
        model = load_causal_lm(base)[1]
        mark = weights_mark(model)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
        torch.manual_seed(seed)
        wrapped = peft.get_peft_model(model, config)
        with torch.no_grad():
            for key, value in wrapped.named_parameters():
                if "lora_B" in key:
                    value.normal_(std=0.6)
        wrapped.save_pretrained(root / name)
        write_base(root / name, base, mark)
    return root


def talk(chat, monkeypatch, capsys, lines: list[str], *argv: str) -> str:
    waiting = iter(lines)

    def typed(prompt):
        line = next(waiting, None)
        if line is None:
            raise EOFError
        print(prompt, end="")
        return line

    monkeypatch.setattr(builtins, "input", typed)
    capsys.readouterr()
    chat.main([*argv, "--max_new_tokens", "12", "--temperature", "0"])
    return capsys.readouterr().out


def said_by(outputs, folder=None) -> str:
    speaker, reply = load_speaker("", str(outputs / "sft"), 0), Reply()
    if folder:
        attach(speaker.model, folder, "sft")
    ids = prompt_ids(speaker.tokenizer, [{"role": "user", "content": "你好"}])
    greedy = SimpleNamespace(max_new_tokens=12, temperature=0.0, top_p=1.0)
    for _ in stream_reply(speaker, ids, greedy, reply):
        pass
    return printable(reply.text)


def test_two_adapters_in_one_chat(chat, outputs, adapters, monkeypatch, capsys):
    """没给 --model、--start：用适配器记着的原模型；从第一个开始，switch 换第二个，switch model 是不带的。"""
    given = ["--adapter", str(adapters / "甲"), "--adapter", str(adapters / "Yi")]
    lines = ["你好", "clear", "switch Yi", "你好", "clear", "switch model", "你好", "switch 丙"]
    out = talk(chat, monkeypatch, capsys, lines, *given)
    for name, folder in (("甲", adapters / "甲"), ("Yi", adapters / "Yi"), ("sft", None)):
        assert f"{name}：{said_by(outputs, folder)}" in out
    assert "没有叫 丙 的模型。可以换成：model、甲、Yi" in out
    assert len({said_by(outputs, f) for f in (adapters / "甲", adapters / "Yi", None)}) == 3


def test_beside_the_stages_of_the_chain(chat, outputs, adapters, monkeypatch, capsys):
    given = ["--output_root", str(outputs), "--start", "sft", "--adapter", f"短={adapters / '甲'}"]
    out = talk(chat, monkeypatch, capsys, ["你好", "clear", "切换 sft", "你好"], *given)
    assert f"短：{said_by(outputs, adapters / '甲')}" in out and f"SFT：{said_by(outputs)}" in out
    assert "还可以换成：sft" in out


def says(chat, *argv: str) -> str:
    with pytest.raises(UserError) as caught:
        chat.main(list(argv))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_adapters_that_cannot_be_used(chat, outputs, adapters, base_folder, tmp_path):
    one = str(adapters / "甲")
    assert "两个适配器都叫 甲" in says(chat, "--adapter", one, "--adapter", one)
    message = says(chat, "--output_root", str(outputs), "--start", "sft", "--adapter", f"sft={one}")
    assert "与模型 sft 同名" in message and "my_sft=" in message
    message = says(chat, "--model", str(base_folder), "--adapter", one)
    assert "权重却不是训练它时的那一份" in message and f"--model {outputs / 'sft'}" in message
    half = tmp_path / "half"
    shutil.copytree(adapters / "甲", half)
    (half / "adapter_model.safetensors").unlink()
    assert "不完整" in says(chat, "--adapter", str(half))
    assert f"--adapter {one}" in says(chat, "--model", one)  # 适配器给了 --model
