"""归因：手写的等于 captum；一层线性模型上等于算得出的答案；完备性；去掉头等于直接改权重。"""

import copy

import pytest
import torch

import attribution as at
from nlp_common.base.errors import UserError
from readers import without_heads


def forward(model, question):
    def score(vectors):
        return at.answer_score(model, vectors, question)

    return score


def test_integrated_gradients_equal_captum(reader64, few):
    captum = pytest.importorskip("captum.attr", reason="没有装 captum：pip install --no-deps captum")
    model = reader64.model
    for question in few[:3]:
        ours = at.integrated_gradients(model, question, 24)
        theirs = captum.IntegratedGradients(forward(model, question)).attribute(
            at.word_vectors(model, question),
            baselines=at.blank_vectors(model, question),
            n_steps=24,
            method="gausslegendre",
        )
        assert torch.allclose(ours, theirs.sum(-1)[0], atol=1e-8)


def test_gradient_x_input_equals_captum(reader64, few):
    captum = pytest.importorskip("captum.attr", reason="没有装 captum：pip install --no-deps captum")
    model, question = reader64.model, few[1]
    theirs = captum.InputXGradient(forward(model, question)).attribute(
        at.word_vectors(model, question).requires_grad_()
    )
    assert torch.allclose(at.gradient_x_input(model, question), theirs.sum(-1)[0].detach(), atol=1e-9)


def test_occlusion_equals_captum(reader64, few):
    captum = pytest.importorskip("captum.attr", reason="没有装 captum：pip install --no-deps captum")
    model, question = reader64.model, few[2]
    vectors = at.word_vectors(model, question)
    theirs = captum.Occlusion(forward(model, question)).attribute(
        vectors, sliding_window_shapes=(1, vectors.shape[-1]), baselines=at.blank_vectors(model, question)
    )[0, :, 0]
    ours = at.occlusion(model, question)
    assert torch.allclose(ours[question.story].double(), theirs[question.story].double(), atol=1e-5)


def test_gradient_equals_a_finite_difference(reader64, few):
    model, question = reader64.model, few[0]
    vectors, slope = at.word_vectors(model, question), at.gradient(model, question)
    place, step = question.source[0], 2e-3  # RMSNorm 里总是 float32，再小就只剩舍入了
    for channel in (0, 50, 127):
        up, down = vectors.clone(), vectors.clone()
        up[0, place, channel] += step
        down[0, place, channel] -= step
        difference = (at.answer_score(model, up, question) - at.answer_score(model, down, question)).item()
        assert slope[place, channel].item() == pytest.approx(difference / (2 * step), rel=0.02, abs=0.01)


def test_shares_sum_to_the_change(reader64, few):
    """完备性：点越多，份额之和离分数的变化越近；故事以外的 token 没有变，份额是 0。"""
    model, question = reader64.model, few[3]
    errors = []
    for points in (4, 16, 64):
        shares = at.integrated_gradients(model, question, points)
        error, change = at.completeness(model, question, shares)
        errors.append(error / change)
    assert errors[-1] < 0.01 and errors[-1] < errors[0]
    outside = [place for place in range(len(question.ids)) if place not in question.story]
    assert shares[outside].abs().max() == 0


def test_the_score_is_the_answer_against_its_rivals(reader, few):
    model, question = reader.model, few[4]
    logits = model(torch.tensor([question.ids])).logits[0, -1]
    expected = logits[question.answer] - sum(logits[o] for o in question.others) / len(question.others)
    got = at.answer_score(model, at.word_vectors(model, question), question)[0]
    assert got.item() == pytest.approx(expected.item(), abs=1e-4)


def test_the_fast_last_layer_changes_nothing(reader, few):
    """learn 里换上 sdpa 与只算最后一列的写法：分数不变。"""
    from nlp_common.lm.loading import make_fast

    question = few[5]
    slow = at.integrated_gradients(reader.model, question, 8)
    quick = copy.deepcopy(reader.model)
    quick.set_attn_implementation("sdpa")
    assert torch.allclose(slow, at.integrated_gradients(make_fast(quick), question, 8), atol=1e-4)


def test_removing_a_head_equals_zeroing_its_columns(reader, few):
    """去掉第 1 层第 2 个头，等于把 o_proj 里属于它的列换成 0；出来之后一切照旧。"""
    model, ids = reader.model, torch.tensor([few[0].ids])
    before = model(ids).logits
    edited = copy.deepcopy(model)
    with torch.no_grad():
        edited.model.layers[1].self_attn.o_proj.weight[:, 64:96] = 0
    with without_heads(model, [(1, 2)]):
        without = model(ids).logits
    assert torch.allclose(without, edited(ids).logits, atol=1e-5)
    assert not torch.allclose(without, before, atol=1e-3)
    assert torch.equal(model(ids).logits, before)


def test_accuracy_equals_one_by_one(reader, few):
    right = [int(reader.model(torch.tensor([q.ids])).logits[0, -1].argmax()) == q.answer for q in few]
    assert at.accuracy(reader.model, few) == sum(right) / len(few)


def test_rank_correlation():
    assert at.rank_correlation([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    assert at.rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert at.rank_correlation([1, 1, 1], [1, 2, 3]) == 0
    stats = pytest.importorskip("scipy.stats")
    xs, ys = [3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]
    assert at.rank_correlation(xs, ys) == pytest.approx(stats.spearmanr(xs, ys).statistic)


def test_a_model_that_answers_nothing(chat_folder, tmp_path):
    with pytest.raises(UserError, match="一道题也答不对"):
        at.main(["--model", str(chat_folder), "--questions", "2", "--output_dir", str(tmp_path / "r")])


def test_text_from_the_command_line(chat_folder, tmp_path, capsys):
    record = at.main(
        [
            "--model",
            str(chat_folder),
            "--text",
            "那天清晨，小刚去了花园。",
            "--output_dir",
            str(tmp_path / "r"),
        ]
    )
    assert record["metrics"]["completeness_error"] < 0.2
    assert "下一个 token 最可能是" in capsys.readouterr().out
    assert (tmp_path / "r" / "attribution.html").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "--text 是空的"),
        (" ", "--text 是空的"),
        ("花园" * 400, r"有 800 个 token，模型的上下文只有 512 个"),
    ],
)
def test_bad_text(chat_folder, tmp_path, text, said):
    with pytest.raises(UserError, match=said):
        at.main(["--model", str(chat_folder), "--text", text, "--output_dir", str(tmp_path / "r")])


def test_a_second_sentence_needs_no_flag_and_the_lesson_keeps_its_folder(chat_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(at, "HOME", tmp_path)
    for text in ("小刚去了", "小刚去了花园"):
        at.main(["--preset", "tiny", "--model", str(chat_folder), "--text", text, "--points", "4"])
    folders = [each.name for each in (tmp_path / "outputs" / "tiny").iterdir() if each.is_dir()]
    assert folders == ["attribution-text"]
    one = ["--preset", "tiny", "--model", str(chat_folder), "--output_dir", str(tmp_path / "one")]
    at.main([*one, "--text", "小刚去了", "--points", "4"])
    with pytest.raises(UserError, match="--retrain"):
        at.main([*one, "--text", "花园", "--points", "4"])  # 给了 --output_dir，照平常的规矩
