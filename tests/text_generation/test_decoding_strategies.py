"""decoding_strategies.py：每个改动与 transformers 的相等；量法；写错的参数；整课走一遍。"""

import json

import pytest
import torch
from transformers.generation import (
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

import decoding_strategies as ds
from nlp_common.base.errors import UserError

CASES = [
    (lambda x, seen: ds.top_k(x, 7), TopKLogitsWarper(7)),
    (lambda x, seen: ds.top_k(x, 10_000), TopKLogitsWarper(10_000)),
    (lambda x, seen: ds.top_p(x, 0.9), TopPLogitsWarper(0.9)),
    (lambda x, seen: ds.top_p(x, 0.05), TopPLogitsWarper(0.05)),
    (lambda x, seen: ds.min_p(x, 0.1), MinPLogitsWarper(0.1)),
    (lambda x, seen: ds.min_p(x, 0.9), MinPLogitsWarper(0.9)),
    (lambda x, seen: ds.typical(x, 0.9), TypicalLogitsWarper(0.9)),
    (lambda x, seen: ds.typical(x, 0.2), TypicalLogitsWarper(0.2)),
    (lambda x, seen: ds.repetition_penalty(x, seen, 1.3), RepetitionPenaltyLogitsProcessor(1.3)),
    (lambda x, seen: ds.no_repeat_ngram(x, seen, 2), NoRepeatNGramLogitsProcessor(2)),
    (lambda x, seen: ds.no_repeat_ngram(x, seen, 3), NoRepeatNGramLogitsProcessor(3)),
    (lambda x, seen: ds.no_repeat_ngram(x, seen, 1), NoRepeatNGramLogitsProcessor(1)),
]


@pytest.mark.parametrize(("change", "processor"), CASES, ids=[str(i) for i in range(len(CASES))])
def test_same_distribution_as_transformers(change, processor):
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        logits = 3 * torch.randn(50, generator=generator)
        seen = torch.randint(6, (12,), generator=generator)
        expected = processor(seen[None], logits[None].clone())[0].softmax(-1)
        torch.testing.assert_close(change(logits, seen.tolist()).softmax(-1), expected, atol=1e-6, rtol=1e-5)


def test_blocking_really_blocks(model, chat_tokenizer):
    settings = ds.DecodingSettings(max_new_tokens=40)
    prompt = chat_tokenizer("小刚去了花园。", add_special_tokens=False)["input_ids"]
    change, greedy = ds.ONE_BY_ONE["三字不重复|no 3-gram"]
    row = prompt + ds.write(model, prompt, settings, [], change, greedy, 0)
    grams = [tuple(row[i : i + 3]) for i in range(len(row) - 2)]
    assert len(grams) == len(set(grams))


def test_nats_are_the_models_own(model, chat_tokenizer):
    prompt, written = [5, 6, 7], [8, 9]
    with torch.no_grad():
        logps = model(torch.tensor([prompt + written])).logits[0].log_softmax(-1)
    expected = -(logps[2, 8] + logps[3, 9]).item() / 2
    assert ds.nats_per_token(model, prompt, written) == pytest.approx(expected, abs=1e-6)


def test_distinct_and_repeated_by_hand():
    assert ds.distinct_n([[1, 2, 1, 2], [1, 2]], 2) == 2 / 4
    assert ds.repeated_share([1, 2, 3, 1, 2, 3, 1], 3) == pytest.approx(1 - 3 / 5)
    assert ds.repeated_share([1], 4) == 0.0


def test_a_whole_lesson_and_the_second_run(tmp_path, capsys, base_folder):
    """给一个模型、自己的开头，走完全课；第二次直接用。"""
    out = tmp_path / "结果"
    arguments = [
        "--model",
        str(base_folder),
        "--prompt",
        "小刚去了花园。",
        "那天清晨，",
        "--max_new_tokens",
        "8",
    ]
    arguments += ["--output_dir", str(out)]
    record = ds.main(arguments)
    assert {"greedy", "beam_4", "contrastive", "sampling"} <= set(record["metrics"])
    for values in record["metrics"].values():
        assert values["nats_per_token"] > 0 and 0 < values["distinct_2"] <= 1
    assert record["metrics"]["beam_4"]["nats_per_token"] <= record["metrics"]["sampling"]["nats_per_token"]
    picture = (out / "decoding.svg").read_text(encoding="utf-8")
    assert all(name in picture for name in ("贪心", "对比搜索", "typical 0.9"))
    assert json.loads((out / "run.json").read_text(encoding="utf-8"))["metrics"] == record["metrics"]
    capsys.readouterr()
    ds.main(arguments)
    assert "直接加载" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompt", " "], "--prompt"),
        (["--max_new_tokens", "0"], "--max_new_tokens"),
        (["--max_new_tokens", "5000", "--prompt", "小刚"], "最多再写"),
        (["--prompt", "小刚去了花园。" * 200], "把 --prompt 改短"),
    ],
)
def test_bad_input(tmp_path, base_folder, arguments, said):
    with pytest.raises(UserError, match=said):
        ds.main(["--model", str(base_folder), "--output_dir", str(tmp_path / "out"), *arguments])


SMALL = ["--preset", "tiny", "--max_train_samples", "64", "--num_train_epochs", "1", "--n_prompts", "2"]
SMALL += ["--max_new_tokens", "6"]


def test_the_small_model_is_trained_once_although_interrupted(tmp_path, monkeypatch, capsys):
    """小模型训练完了、量到一半被打断：再来一次，不再训练，结果与一口气走完的相同。"""
    whole = ds.main([*SMALL, "--output_dir", str(tmp_path / "whole")])
    assert "human" in whole["metrics"]

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ds, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ds.main([*SMALL, "--output_dir", str(tmp_path / "cut")])
    monkeypatch.undo()
    capsys.readouterr()
    again = ds.main([*SMALL, "--output_dir", str(tmp_path / "cut")])
    assert "上次中断以前做完了" in capsys.readouterr().out
    assert again["metrics"] == whole["metrics"]


def test_longer_than_the_small_model_is_said_before_training(tmp_path):
    with pytest.raises(UserError, match="最多写 240 个"):
        ds.main(["--preset", "tiny", "--max_new_tokens", "300", "--output_dir", str(tmp_path / "out")])


def test_strange_characters_are_said(tmp_path):
    with pytest.raises(UserError, match="没学过的字"):
        ds.main([*SMALL, "--prompt", "龘", "--output_dir", str(tmp_path / "out")])
