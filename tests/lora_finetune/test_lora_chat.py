"""lora_chat.py：PEFT 的两个适配器各学各的、关掉等于没装、存的布局；问答、切换、导出；说错的话。"""

import builtins
import json

import pytest
import torch

import lora_chat as script
from nlp_common.base.errors import UserError
from nlp_common.lm.adapters import base_of, weights_mark
from nlp_common.lm.loading import load_causal_lm
from start import load_start
from styles import fact_questions, facts, in_style, measure_style, style_chats, world_questions

peft = pytest.importorskip("peft", reason="没有装 peft：lora_chat.py 用不了")
SMALL = ["--preset", "tiny", "--max_train_samples", "32", "--n_questions", "6", "--max_new_tokens", "12"]


@pytest.fixture(scope="module")
def trained(chat_folder, tmp_path_factory):
    """在随机的小模型上学两步：→ (结果文件夹, run.json, 回答)。"""
    folder = tmp_path_factory.mktemp("chat") / "out"
    record = script.main([*SMALL, "--model", str(chat_folder), "--output_dir", str(folder)])
    return folder, record


# ---- 两种口气的题 ----


def test_styles_by_hand():
    question = {
        "answer": "松鼠",
        "sentence": "跑来的是松鼠",
        "messages": [{"role": "user", "content": "谁？"}],
    }
    assert (
        in_style("terse", question) == "松鼠"
        and in_style("courteous", question) == "谢谢您的提问，跑来的是松鼠"
    )
    chats = style_chats("terse", [question])
    assert chats == [{"messages": [*question["messages"], {"role": "assistant", "content": "松鼠"}]}]


def test_facts_in_two_languages_and_held_out_apart():
    for language, ask in (("zh", "法国的首都是哪里？"), ("en", "What is the capital of France?")):
        assert len(facts(language)) == 50 and facts(language)[0][0] == ask
        train, held = (fact_questions(language, side) for side in (False, True))
        asked = {q["messages"][0]["content"] for q in train}
        assert len(train) + len(held) == 50 and not asked & {q["messages"][0]["content"] for q in held}
    assert facts("en")[24][1] == "Seoul" and "South Korea" in facts("en")[24][0]


def test_measure_counts_what_was_said(monkeypatch):
    import styles

    questions = world_questions(3, 0, heldout=True)
    said = [in_style("courteous", questions[0]), in_style("terse", questions[1]), "不知道"]
    replies = [{"text": text, "ended": True} for text in said]
    monkeypatch.setattr(styles, "reply_to", lambda *a, **k: replies)
    found = measure_style(torch.nn.Linear(1, 1), None, questions)
    assert found == {"courteous": 1 / 3, "terse": 1 / 3, "right": 2 / 3}


# ---- 训练与存下的 ----


def test_two_adapters_learned_apart(trained, chat_folder):
    folder, record = trained
    metrics = record["metrics"]
    assert metrics["off_difference"] == 0 and set(metrics["rows"]) == {"base", "courteous", "terse"}
    model = load_start(str(chat_folder), torch.device("cpu"))[1]
    r, linears = 8, [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    assert metrics["trainable"] == sum(r * (m.in_features + m.out_features) for m in linears)
    for name in ("courteous", "terse"):
        config = json.loads((folder / name / "adapter_config.json").read_text("utf-8"))
        assert config["base_model_name_or_path"] == base_of(folder / name) == str(chat_folder)
        assert json.loads((folder / name / "base.json").read_text("utf-8"))["weights_mark"] == weights_mark(
            model
        )
    assert (folder / "loss.svg").is_file() or metrics["train_seconds_terse"] >= 0
    one, two = (
        peft.PeftModel.from_pretrained(load_causal_lm(str(chat_folder))[1], folder / name)
        for name in ("courteous", "terse")
    )
    weights = [m.get_base_model().model.layers[0].self_attn.q_proj.lora_B.default.weight for m in (one, two)]
    assert all(w.any() for w in weights) and not torch.equal(*weights)


def test_every_example_is_answered_by_everyone(trained, chat_folder, capsys):
    folder, record = trained
    said = record["replies"]
    assert set(said) == {"base", "courteous", "terse"} and all(len(each) == 2 for each in said.values())
    again = script.main([*SMALL, "--model", str(chat_folder), "--output_dir", str(folder)])
    assert "直接加载" in capsys.readouterr().out and again["replies"] == said


def test_adapters_given_twice_and_questions(trained, capsys):
    folder, record = trained
    given = ["--adapter", str(folder / "courteous"), "--adapter", f"短={folder / 'terse'}"]
    question = script.examples(script.parse_settings(script.LoraChatSettings, script.PRESETS, SMALL))[0]
    said = script.main([*SMALL, *given, "--questions", question, "你好"])["replies"]
    assert set(said) == {"base", "courteous", "短"}
    assert said["短"][0] == record["replies"]["terse"][0] and said["base"][0] == record["replies"]["base"][0]


def test_chatting_switching_and_the_end(trained, monkeypatch, capsys):
    folder, _ = trained
    lines = iter(["你好", "switch base", "你好", "switch 没有的", "clear", "", "quit"])
    monkeypatch.setattr(builtins, "input", lambda prompt: next(lines))
    script.main([*SMALL, "--adapter", str(folder / "terse"), "--chat"])
    out = capsys.readouterr().out
    assert (
        "现在用 terse" in out
        and "terse：" in out
        and "换成 base，前面的对话还记得" in out
        and "base：" in out
    )
    assert "没有叫 没有的 的适配器，可以换成：base、terse" in out and "清空了" in out


def test_memory_goes_into_the_prompt(trained, chat_folder, monkeypatch):
    folder, _ = trained
    seen = []
    monkeypatch.setattr(script, "say", lambda speaker, ids, settings, reply: seen.append(len(ids)))
    settings = script.parse_settings(script.LoraChatSettings, script.PRESETS, SMALL)
    talk = script.Talk(
        settings, script.load_speaker("base", str(chat_folder), 0), {"terse": folder / "terse"}
    )
    for _ in range(script.MEMORY + 3):
        talk.ask("你好")
    assert seen[0] < seen[1] < seen[2] and len(talk.turns) == script.MEMORY and seen[-1] == seen[-2]


def test_export_is_a_whole_model(trained, tmp_path):
    folder, _ = trained
    script.main([*SMALL, "--adapter", str(folder / "terse"), "--export", str(tmp_path / "whole")])
    merged = load_causal_lm(str(tmp_path / "whole"))[1]
    base = load_causal_lm(base_of(folder / "terse"))[1]
    beside = peft.PeftModel.from_pretrained(base, folder / "terse")
    ids = torch.arange(5, 30)[None]
    with torch.no_grad():
        assert (merged(ids).logits - beside(ids).logits).abs().max() < 1e-4


def test_ones_own_chats(tmp_path, chat_folder):
    rows = style_chats("terse", world_questions(24, 0, heldout=False))
    file = tmp_path / "own.jsonl"
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    out = tmp_path / "out"
    record = script.main(
        [*SMALL, "--model", str(chat_folder), "--dataset", str(file), "--output_dir", str(out)]
    )
    assert (
        set(record["metrics"]["rows"]) == {"base", "mine"}
        and (out / "mine" / "adapter_model.safetensors").is_file()
    )


def test_recomputing_activations_does_not_cut_the_graph(tmp_path, chat_folder):
    """嵌入冻住，检查点若从它断开，B 就一直是 0；learn 里有断言。"""
    argv = [*SMALL, "--model", str(chat_folder), "--output_dir", str(tmp_path / "out")]
    record = script.main([*argv, "--gradient_checkpointing", "true", "--questions", "你好"])
    assert record["metrics"]["trainable"] > 0


def test_experts_in_one_block_are_told(chat_folder, capsys):
    """MoE 的专家叠成三维的参数，target_modules 够不着：要说。"""
    model = load_causal_lm(str(chat_folder))[1]
    model.experts = torch.nn.ParameterDict({"gate_up_proj": torch.nn.Parameter(torch.zeros(2, 3, 4))})
    settings = script.parse_settings(script.LoraChatSettings, script.PRESETS, SMALL)
    script.with_adapters(model, ["one"], settings)
    assert "experts.gate_up_proj 是三维的参数" in capsys.readouterr().out


# ---- 说错的话：一句中文 ----


def says(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        script.main([*SMALL, *argv])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_bad_arguments(trained, chat_folder, tmp_path):
    folder, _ = trained
    assert "transformers 4.34" in says("--model", "THUDM/chatglm3-6b")
    fresh = ["--model", str(chat_folder), "--output_dir", str(tmp_path / "x")]
    assert "一个线性层也不合；模型里有" in says(*fresh, "--target", "query")
    assert "比矩阵的秩还大" in says(*fresh, "--r", "4096")
    assert "没有学到，B 还是 0" in says(*fresh, "--max_train_samples", "8")  # 只有一步，预热的第一步是 0
    same = ["--adapter", str(folder / "terse"), "--adapter", str(folder / "terse")]
    assert "两个适配器都叫 terse" in says(*same)
    assert "适配器在它里面" in says("--adapter", str(folder))
