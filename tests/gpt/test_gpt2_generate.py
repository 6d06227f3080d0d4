"""gpt2_generate.py：每个参数的公式与 transformers 相等；生成、显示、图；模型从哪里来；写错的参数。"""

import re

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.generation import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import gpt2_generate as gg
import tiny_gpt2
from nlp_common.base.errors import UserError


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "empty cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """没训练过的小 GPT-2，hub 的文件夹布局，没有 pad（和真的 GPT-2 一样）。"""
    path = tmp_path_factory.mktemp("模型") / "gpt2"
    tokenizer = tiny_gpt2.build_tokenizer(tiny_gpt2.stories(50, 0))
    tokenizer.pad_token = None
    end = tokenizer.eos_token_id
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3
    )
    config.bos_token_id = config.eos_token_id = end
    GPT2LMHeadModel(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def settings(folder, tmp_path):
    return gg.GenerateSettings(model=str(folder), output_dir=str(tmp_path), max_new_tokens=12)


# ---------- 公式 ----------
KNOBS = [
    ({"temperature": 0.3}, [TemperatureLogitsWarper(0.3)]),
    ({"temperature": 1.7}, [TemperatureLogitsWarper(1.7)]),
    ({"top_k": 5}, [TopKLogitsWarper(5)]),
    ({"top_k": 10_000}, [TopKLogitsWarper(10_000)]),
    ({"top_p": 0.8}, [TopPLogitsWarper(0.8)]),
    ({"top_p": 0.01}, [TopPLogitsWarper(0.01)]),
    ({"repetition_penalty": 1.5}, [RepetitionPenaltyLogitsProcessor(1.5)]),
    ({"repetition_penalty": 0.7}, [RepetitionPenaltyLogitsProcessor(0.7)]),
    (
        {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2},
        [
            RepetitionPenaltyLogitsProcessor(1.2),
            TemperatureLogitsWarper(0.7),
            TopKLogitsWarper(20),
            TopPLogitsWarper(0.9),
        ],
    ),
]


@pytest.mark.parametrize(("changed", "processors"), KNOBS, ids=[str(k) for k, _ in KNOBS])
def test_same_distribution_as_transformers(changed, processors):
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        logits = 3 * torch.randn(100, generator=generator)
        seen = torch.randint(100, (9,), generator=generator)
        scores = logits[None].clone()
        for processor in processors:
            scores = processor(seen[None], scores)
        expected = scores[0].softmax(-1)
        got = gg.next_distribution(logits, seen, **changed)
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
        changes_nothing = changed.get("top_k", 0) > 100
        assert changes_nothing == bool((got - logits.softmax(-1)).abs().max() < 1e-4)


def test_greedy_puts_everything_on_the_largest():
    logits = torch.tensor([1.0, 3.0, 2.0])
    assert gg.next_distribution(logits, torch.tensor([0]), do_sample=False).tolist() == [0, 1, 0]


def test_top_p_keeps_the_fewest_that_reach_p():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    kept = [
        int((gg.next_distribution(logits, torch.tensor([0]), top_p=p) > 0).sum()) for p in (0.4, 0.6, 0.9, 1)
    ]
    assert kept == [1, 2, 3, 4]


# ---------- 生成 ----------
def test_generate_samples_from_the_distribution_it_shows(settings):
    """第一个 token 的频率，就是画出来的那些概率。"""
    model, tokenizer = gg.load(settings)
    inputs = gg.encode(tokenizer, model, settings)
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1]
    many = {name: value.repeat(3000, 1) for name, value in inputs.items()}
    settings.max_new_tokens = 1
    for changed in ({}, {"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.5}, {"repetition_penalty": 1.5}):
        probs = gg.next_distribution(logits, inputs["input_ids"][0], **changed)
        torch.manual_seed(0)
        config = gg.generation_config(tokenizer, settings, changed)
        first = model.generate(**many, generation_config=config)[:, -1]
        counts = torch.bincount(first, minlength=len(probs)) / len(first)
        assert (counts - probs).abs().max() < 0.04  # 标准误差 √(p(1-p)/3000) < 0.01
        assert counts[probs == 0].sum() == 0


def test_greedy_equals_argmax_by_hand(settings):
    model, tokenizer = gg.load(settings)
    inputs = gg.encode(tokenizer, model, settings)
    ids, expected = inputs["input_ids"], []
    with torch.no_grad():
        for _ in range(settings.max_new_tokens):
            token = model(ids).logits[0, -1].argmax()
            expected.append(token.item())
            ids = torch.cat([ids, token.view(1, 1)], dim=1)
            if token == tokenizer.eos_token_id:
                break
    assert gg.generate(model, tokenizer, inputs, settings, {"do_sample": False}) == expected


def test_run_shows_every_knob_and_no_warning(settings, capfd, recwarn, tmp_path):
    arguments = ["--model", settings.model, "--output_dir", str(tmp_path), "--max_new_tokens", "12"]
    gg.main(arguments)
    first = capfd.readouterr()
    assert first.err == "" and [str(each.message) for each in recwarn.list] == []
    titles = re.findall(r"^【\d】([^：]+)：", first.out, re.M)
    assert titles == [
        "原样采样",
        "贪心",
        "温度 0.3",
        "温度 0.7",
        "温度 1.3",
        "top-k 5",
        "top-p 0.8",
        "重复惩罚 1.5",
    ]
    assert len(re.findall(r"once upon a time → ?\S", first.out)) == 8
    bars = re.findall(r"(\d+\.\d)%  (█+|▏)", first.out)
    assert len(bars) > 8 and all(
        len(bar) == pytest.approx(float(p) * 0.3, abs=1.01) for p, bar in bars if bar != "▏"
    )
    import matplotlib.image

    picture = matplotlib.image.imread(tmp_path / "next_token.png")
    assert picture.shape[0] > 700 and picture.std() > 0.05
    gg.main(arguments)
    assert capfd.readouterr().out == first.out  # 同一种子，同样的文字
    gg.main([*arguments, "--seed", "1"])
    assert capfd.readouterr().out != first.out


def test_labels_of_the_picture_can_be_drawn_with_any_font():
    assert gg.picture_label("␣there") == "there|there"
    assert gg.picture_label("你好") == r"你好|\u4f60\u597d"
    assert gg.picture_label("🙂") == r"\U0001f642|\U0001f642"
    assert gg.picture_label("a|b\x05") == r"a/b\x05|a/b\x05"
    assert gg.picture_label("␣") == "?|?"


def test_tokens_are_shown_as_they_come(settings, monkeypatch, capsys):
    """显示出第一个词的时候，后面的还没有生成。"""
    model, tokenizer = gg.load(settings)
    inputs, log, forward = gg.encode(tokenizer, model, settings), [], model.forward
    monkeypatch.setattr(model, "forward", lambda *a, **k: log.append("算") or forward(*a, **k))

    class Streamer(gg.TextStreamer):
        def on_finalized_text(self, text, stream_end=False):
            log.append("写")

    gg.generate(model, tokenizer, inputs, settings, {}, Streamer(tokenizer, skip_prompt=True))
    order = "".join(log)
    assert "算写算写算" in order and order.count("算") > 5


def test_prompt_longer_than_the_context_is_cropped_and_said(settings, capsys):
    settings.prompt = "the fox met the owl . " * 40
    model, tokenizer = gg.load(settings)
    inputs = gg.encode(tokenizer, model, settings)
    whole = tokenizer(settings.prompt, verbose=False).input_ids
    assert inputs["input_ids"][0].tolist() == whole[-52:] and inputs["attention_mask"].shape == (1, 52)
    assert f"开头有 {len(whole)} 个 token" in capsys.readouterr().out
    assert len(gg.generate(model, tokenizer, inputs, settings, {})) <= 12
    settings.max_new_tokens = 64
    with pytest.raises(UserError, match=r"--max_new_tokens 64 太大.*64 个 token"):
        gg.encode(tokenizer, model, settings)


# ---------- 写错的参数：加载模型之前就说 ----------
@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--prompt", ""], "--prompt 是空的"),
        (["--prompt", "  \n"], "--prompt 是空的"),
        (["--temperature", "0"], "--temperature 要大于 0，给的是 0"),
        (["--temperature", "0.5", "-1"], "--temperature 要大于 0，给的是 -1"),
        (["--temperature", "nan"], "--temperature 要大于 0"),
        (["--temperature", "inf"], "--temperature 要大于 0"),
        (["--top_p", "0"], "--top_p 要大于 0、不大于 1，给的是 0"),
        (["--top_p", "1.2"], "--top_p 要大于 0、不大于 1，给的是 1.2"),
        (["--top_k", "0"], "--top_k 要是正整数，给的是 0"),
        (["--repetition_penalty", "0"], "--repetition_penalty 要大于 0"),
        (["--repetition_penalty", "inf"], "--repetition_penalty 要大于 0"),
        (["--max_new_tokens", "-5"], "--max_new_tokens 要是正整数"),
        (["--output_dir", __file__], f"--output_dir {__file__} 不能用"),
        (["--preset", "tiny", "--model", "smollm2"], "用不上 --model smollm2；要用它就去掉 --preset tiny"),
        (["--top_p", "half"], "--top_p 要是数"),
        (["--prompts", "x"], "是不是 --prompt"),
    ],
)
def test_bad_input(argv, words, monkeypatch):
    monkeypatch.setattr(gg, "load", lambda *a: pytest.fail("应当在加载模型前就说"))
    with pytest.raises(UserError) as caught:
        gg.main(argv)
    assert words in str(caught.value)


# ---------- 模型从哪里来 ----------
def test_auto_falls_back_to_smollm2_by_its_own_name(settings, folder, monkeypatch, capsys):
    settings.model = None
    monkeypatch.setattr(gg, "find_model", lambda name: str(folder) if name == "smollm2" else None)
    gg.load(settings)
    out = capsys.readouterr().out
    assert (
        "得不到 openai-community/gpt2" in out and "模型：SmolLM2-135M-Instruct" in out and "不是 GPT-2" in out
    )


def test_auto_falls_back_to_the_tiny_model_and_says_so(settings, folder, monkeypatch, capsys):
    settings.model = None
    monkeypatch.setattr(gg, "find_model", lambda name: None)
    monkeypatch.setattr(tiny_gpt2, "tiny_gpt2", lambda path, retrain: folder)
    gg.load(settings)
    out = capsys.readouterr().out
    assert out.startswith("预设 tiny") and "--preset full" in out and "不是真的 GPT-2" in out


def test_full_that_cannot_be_had_says_what_to_do(settings):
    settings.model, settings.preset = None, "full"
    with pytest.raises(UserError, match="HF_ENDPOINT"):
        gg.load(settings)


# ---------- 现场训练的小模型 ----------
def test_stories_are_consistent_and_read_as_english():
    texts = tiny_gpt2.stories(300, 0)
    assert len(set(texts)) > 290 and texts == tiny_gpt2.stories(300, 0)
    for text in texts:
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|  ", text)
        assert text.startswith(("once upon a time", "long ago")) and text.endswith(" .")
    assert sum(text.startswith("once upon a time there was") for text in texts) > 60


def test_tokenizer_makes_words_one_token_and_takes_any_text():
    tokenizer = tiny_gpt2.build_tokenizer(tiny_gpt2.stories(500, 0))
    assert tokenizer.convert_ids_to_tokens(tokenizer("the forest").input_ids)[-1] == "Ġforest"
    for text in ("once upon a time", "Zoë 你好 🙂\n\t"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_tiny_model_learns_is_kept_and_is_not_trained_twice(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tiny_gpt2, "STEPS", 25)
    monkeypatch.setattr(tiny_gpt2, "STORIES", 300)
    path = tiny_gpt2.tiny_gpt2(tmp_path / "gpt2")
    loss = float(re.search(r"没见过的故事，loss ([\d.]+)", capsys.readouterr().out)[1])
    assert loss < 4.5  # 瞎猜是 6.2
    assert {"config.json", "model.safetensors", "tokenizer.json", "run.json"} <= {
        p.name for p in path.iterdir()
    }
    monkeypatch.setattr(tiny_gpt2, "train_tiny", lambda: pytest.fail("不该再训练"))
    assert tiny_gpt2.tiny_gpt2(tmp_path / "gpt2") == path
