"""logit lens 与激活修补：最后一层就是模型的输出；全部换掉就成了另一个故事；换回自己什么也不变。"""

import random

import pytest
import torch

import logit_lens as ll
from nlp_common.base.errors import UserError
from questions import swap_answer
from readers import layers_of, norm_of


@pytest.fixture(scope="module")
def pair(tokenizer, few):
    here = few[2]
    return here, swap_answer(tokenizer, here, random.Random(0))


def test_the_last_layer_is_the_output(reader, few):
    ids = few[0].ids
    lens = ll.logit_lens(reader.model, ids)
    assert lens.shape[0] == reader.layers + 1
    assert torch.allclose(lens[-1], reader.model(torch.tensor([ids])).logits[0], atol=1e-5)


def test_the_first_layer_is_the_embedding(reader, few):
    model, ids = reader.model, few[0].ids
    vectors = model.get_input_embeddings().weight[ids]
    mean_square = vectors.pow(2).mean(-1, keepdim=True)
    normed = vectors / (mean_square + model.config.rms_norm_eps).sqrt() * model.model.norm.weight
    assert torch.allclose(ll.logit_lens(model, ids)[0], normed @ model.lm_head.weight.T, atol=1e-4)


def test_a_middle_layer_is_the_model_cut_short(reader, few):
    """第 1 层之后的 lens，等于只有一层的模型的输出。"""
    import copy

    short = copy.deepcopy(reader.model)
    short.model.layers = short.model.layers[:1]
    short.config.num_hidden_layers = 1
    expected = short(torch.tensor([few[1].ids])).logits[0]
    assert torch.allclose(ll.logit_lens(reader.model, few[1].ids)[1], expected, atol=1e-5)


def test_the_stream_equals_hidden_states(reader, few):
    ids = few[0].ids
    states = reader.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    stream = ll.residual_stream(reader.model, ids)
    assert len(stream) == reader.layers + 1
    for ours, theirs in zip(stream[:-1], states[:-1], strict=True):
        assert torch.allclose(ours, theirs[0], atol=1e-6)
    assert torch.allclose(norm_of(reader.model)(stream[-1]), states[-1][0], atol=1e-5)


def test_patching_with_itself_changes_nothing(reader, pair):
    here, _ = pair
    before = reader.model(torch.tensor([here.ids])).logits
    stream = ll.residual_stream(reader.model, here.ids)
    for module, values in zip((*layers_of(reader.model), norm_of(reader.model)), stream, strict=True):
        places = list(range(len(here.ids)))
        with ll.patched(module, places, values):
            assert torch.allclose(reader.model(torch.tensor([here.ids])).logits, before, atol=1e-5)
    assert torch.equal(reader.model(torch.tensor([here.ids])).logits, before)  # 钩子都摘掉了


def test_patching_the_word_before_the_first_layer_is_the_other_story(reader, pair):
    """两个故事只差答案那个词：第 0 层之前把它换过来，就是另一个故事；最后归一之前换最后一个位置，也是。"""
    moved = ll.patch_pair(reader.model, *pair)
    assert moved["source"][0] == pytest.approx(1, abs=1e-3)
    assert moved["last"][-1] == pytest.approx(1, abs=1e-3)
    assert moved["last"][0] == pytest.approx(0, abs=1e-3)
    assert moved["source"][-1] == pytest.approx(0, abs=1e-3)  # 已经没有人再读它
    assert moved["rest"][0] == pytest.approx(0, abs=1e-3)


def test_the_grid_agrees_with_the_groups(reader, pair):
    grid = ll.patch_grid(reader.model, *pair)
    moved = ll.patch_pair(reader.model, *pair)
    assert grid.shape == (reader.layers + 1, len(pair[0].ids))
    assert grid[:, -1].tolist() == pytest.approx(moved["last"], abs=1e-5)


def test_patching_a_head_equals_patching_its_columns(reader, pair):
    """第 1 层头 2 在最后一个位置取来的换掉：等于把两边 o_proj 输入之差经过它那几列加到输出上。"""
    model, (here, there) = reader.model, pair
    mixer = model.model.layers[1].self_attn.o_proj
    seen = []
    hook = mixer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0].clone()))
    model(torch.tensor([here.ids]))
    model(torch.tensor([there.ids]))
    hook.remove()
    change = (seen[1] - seen[0])[-1, 64:96] @ mixer.weight[:, 64:96].T  # (C,)

    def add(module, inputs, output):
        output = output.clone()
        output[0, -1] += change
        return output

    start, goal = (ll.preference(model, each.ids, there.answer, here.answer) for each in pair)
    hook = mixer.register_forward_hook(add)
    now = ll.preference(model, here.ids, there.answer, here.answer)
    hook.remove()
    table = ll.patch_heads(model, here, there, reader.heads)
    assert table[1][2] == pytest.approx((now - start) / (goal - start), abs=1e-4)
    assert len(table) == reader.layers and all(len(row) == reader.heads for row in table)


def test_an_empty_text_is_said(chat_folder, tmp_path):
    with pytest.raises(UserError, match="--text 是空的"):
        ll.main(["--model", str(chat_folder), "--text", "", "--output_dir", str(tmp_path / "r")])


def test_text_from_the_command_line(chat_folder, tmp_path, capsys):
    record = ll.main(
        ["--model", str(chat_folder), "--text", "小刚去了花园", "--output_dir", str(tmp_path / "r")]
    )
    assert record["metrics"]["tokens"] == 6 and 0 <= record["metrics"]["settled_at_layer"] <= 2
    assert (tmp_path / "r" / "lens.png").stat().st_size > 1000
    assert "每层最想说的下一个 token" in capsys.readouterr().out
