"""归纳头：分数的定义对着手写的注意力与 TransformerLens；训练、去掉、接着来。"""

import pytest
import torch

import induction_heads as ih
from nlp_common.base.errors import UserError

SMALL = [
    "--preset",
    "tiny",
    "--steps",
    "50",
    "--hidden",
    "16",
    "--heads",
    "2",
    "--vocab",
    "16",
    "--half",
    "8",
]


class Fixed(torch.nn.Module):
    """注意力是给定的"模型"。"""

    def __init__(self, maps):
        super().__init__()
        self.maps = maps

    def forward(self, ids, output_attentions=False):
        from types import SimpleNamespace

        return SimpleNamespace(attentions=self.maps)


def test_scores_of_perfect_heads():
    """手写三个完美的头：看前一个、看相同的、看相同的后一个，各自的分数是 1，别的是 0。"""
    half = 6
    maps = torch.zeros(1, 3, 2 * half, 2 * half)
    maps[0, :, 0, 0] = 1
    for t in range(1, 2 * half):
        maps[0, 0, t, t - 1] = 1
        maps[0, 1, t, t - half if t >= half else 0] = 1
        maps[0, 2, t, t - half + 1 if t >= half else 0] = 1
    scores = ih.head_scores(Fixed([maps]), torch.zeros(1, 2 * half, dtype=torch.long))
    assert scores["induction"].tolist() == [[0, 0, 1]]
    assert scores["duplicate"].tolist() == [[0, 1, 0]]
    assert scores["previous"][0, 0] == 1


def test_repeated_sequences():
    ids = ih.repeated(torch.arange(20), 8, 5, torch.Generator().manual_seed(0))
    assert ids.shape == (5, 16) and torch.equal(ids[:, :8], ids[:, 8:])
    assert all(len(set(row[:8].tolist())) == 8 for row in ids)


def test_copying_counts_from_the_second_token(reader):
    ids = ih.repeated(torch.arange(100), 6, 3, torch.Generator().manual_seed(0))
    accuracy, loss = ih.copying(reader.model, ids)
    logits = reader.model(ids).logits
    losses, right = [], []
    for row in range(3):
        for place in range(6, 11):  # 位置 6 是重复的第一个，它的下一个才看得出是重复
            target = ids[row, place + 1]
            losses.append(-logits[row, place].log_softmax(-1)[target])
            right.append(float(logits[row, place].argmax() == target))
    assert accuracy == pytest.approx(sum(right) / len(right))
    assert loss == pytest.approx(float(sum(losses)) / len(losses), abs=1e-5)


def test_the_scores_agree_with_transformer_lens(tmp_path):
    """同一个模型、同样的 token，TransformerLens 4 的 TransformerBridge 给出同样的注意力与同样的头。"""
    pytest.importorskip("transformer_lens", reason="没有装 transformer-lens")
    from transformer_lens.head_detector import (
        get_duplicate_token_head_detection_pattern,
        get_induction_head_detection_pattern,
        get_previous_token_head_detection_pattern,
    )

    settings = ih.InductionSettings(hidden=32, heads=2, vocab=40, half=10)
    torch.manual_seed(0)
    model = ih.build_model(settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)  # 注意力不要太平均
    ids = ih.repeated(torch.arange(40), 10, 1, torch.Generator().manual_seed(0))
    scores = ih.head_scores(model, ids)
    ours = model(ids, output_attentions=True).attentions
    bridge = bridge_of(model, tmp_path)  # 它把 model 的部件换成自己的，所以我们的先算好
    _, cache = bridge.run_with_cache(ids)
    maps = [cache[f"blocks.{layer}.attn.hook_pattern"][0].detach() for layer in range(2)]
    patterns = {
        "previous": get_previous_token_head_detection_pattern(ids),
        "duplicate": get_duplicate_token_head_detection_pattern(ids),
        "induction": get_induction_head_detection_pattern(ids),
    }
    rows = {"previous": slice(1, None), "duplicate": slice(10, None), "induction": slice(10, None)}
    for layer in range(2):
        assert torch.allclose(maps[layer], ours[layer][0], atol=1e-5)
        for name, pattern in patterns.items():
            theirs = (maps[layer] * pattern)[:, rows[name]].sum(-1).mean(-1)
            assert torch.allclose(scores[name][layer], theirs, atol=1e-5), name


def bridge_of(model, folder):
    from tokenizers import Tokenizer, models
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedTokenizerFast

    words = {str(number): number for number in range(model.config.vocab_size)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="0")))
    tokenizer.pad_token = tokenizer.bos_token = tokenizer.eos_token = "0"
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "model")  # 它要读分词器是从哪里来的
    return TransformerBridge.boot_transformers(
        str(folder / "model"), hf_model=model, tokenizer=tokenizer, device="cpu", dtype=torch.float32
    )


def test_ablation_names_the_heads(reader):
    ids = ih.repeated(torch.arange(100), 8, 4, torch.Generator().manual_seed(0))
    scores = ih.head_scores(reader.model, ids)
    scores["induction"] = torch.zeros(2, 4)
    scores["induction"][1, 3] = 0.9
    scores["previous"] = torch.zeros(2, 4)
    scores["previous"][0, 1] = 0.8
    result = ih.ablate(reader.model, scores, ids)
    each = result["accuracy_without"]
    assert (result["head"], result["previous_head"], len(each)) == ("layer1.head3", "layer0.head1", 8)
    assert result["accuracy_without_head"] == result["accuracy_without_all_induction"] == each["layer1.head3"]
    assert result["accuracy_without_previous_head"] == each["layer0.head1"]
    assert result["accuracy_without_one_other"] == min(
        value for name, value in each.items() if name not in ("layer1.head3", "layer0.head1")
    )


def test_head_sizes(reader):
    """每个头 W_V、W_O 的长度，一个一个地算。"""
    total = 0.0
    for layer in reader.model.model.layers:
        for head in range(4):
            part = slice(32 * head, 32 * head + 32)
            both = [
                layer.self_attn.v_proj.weight[part].flatten(),
                layer.self_attn.o_proj.weight[:, part].flatten(),
            ]
            total += torch.cat(both).norm().item()
    assert ih.head_sizes(reader.model, 4).item() == pytest.approx(total, rel=1e-5)


def test_a_short_run_and_again(tmp_path, capsys):
    arguments = [*SMALL, "--output_dir", str(tmp_path / "r")]
    record = ih.main(arguments)
    assert {"induction_score", "accuracy", "accuracy_without_head"} <= record["metrics"].keys()
    assert [row["step"] for row in record["history"]] == [0, 25, 50]
    assert {"rise.svg", "ablation.svg", "model.safetensors", "run.json"} <= {
        p.name for p in (tmp_path / "r").iterdir()
    }
    assert ih.main(arguments)["seconds"] == record["seconds"]
    assert "直接加载" in capsys.readouterr().out


def test_stopped_after_training_and_started_again(tmp_path, monkeypatch):
    """训练完、量之前被打断：再运行不重新训练，结果相同。"""
    whole = ih.main([*SMALL, "--output_dir", str(tmp_path / "whole")])
    cut = [*SMALL, "--output_dir", str(tmp_path / "cut")]
    with monkeypatch.context() as patch:
        patch.setattr(ih, "ablate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            ih.main(cut)
    monkeypatch.setattr(ih, "train", lambda *_: pytest.fail("又训练了一遍"))
    again = ih.main(cut)
    assert again["metrics"] == whole["metrics"] and again["history"] == whole["history"]


def test_a_model_that_is_there(chat_folder, tmp_path):
    record = ih.main(["--model", str(chat_folder), "--half", "10", "--output_dir", str(tmp_path / "r")])
    metrics = record["metrics"]
    assert 0 <= metrics["induction_score"] <= 1 and "accuracy_without_top4" in metrics
    assert "accuracy_without_top16" not in metrics  # 一共才 8 个头


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--hidden", "10", "--heads", "4"], "偶数倍"),
        (["--half", "4"], "--half 至少是 8"),
        (["--vocab", "10"], "--vocab 10 不能小于"),
        (["--learning_rate", "0"], "--learning_rate 要大于 0"),
        (["--steps", "0"], "--steps 要是正整数"),
    ],
)
def test_bad_settings(more, said):
    with pytest.raises(UserError, match=said):
        ih.main(["--preset", "tiny", *more])


@pytest.mark.slow
def test_an_induction_head_appears(tmp_path):
    """默认的训练：归纳头长出来，抄得全对；去掉它（们）或看前一个的头就抄不成，去掉一个别的头照抄。"""
    metrics = ih.main(["--preset", "tiny", "--output_dir", str(tmp_path / "r")])["metrics"]
    assert metrics["induction_score_before"] < 0.1 and metrics["induction_score"] > 0.6
    assert metrics["accuracy"] > 0.98
    assert metrics["accuracy_without_head"] < 0.3 and metrics["accuracy_without_previous_head"] < 0.3
    assert metrics["accuracy_without_one_other"] > 0.9
