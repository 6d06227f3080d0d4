"""手写的 RNN、LSTM、GRU 与 nn 里的相同；门看得见；脚本从头到尾。"""

import pytest
import torch

import rnn_tagger as rt


@pytest.mark.parametrize("kind", rt.KINDS)
def test_equal_to_the_built_in_one(kind):
    torch.manual_seed(0)
    ours = rt.HandWrittenRNN(kind, 5, 7).double()
    theirs = rt.BUILT_IN[kind](5, 7, batch_first=True).double()
    assert {n: p.shape for n, p in ours.named_parameters()} == {
        n: p.shape for n, p in theirs.named_parameters()
    }
    theirs.load_state_dict(ours.state_dict())
    left = torch.randn(3, 11, 5, dtype=torch.double, requires_grad=True)
    right = left.detach().clone().requires_grad_()
    got, _ = ours(left)
    want, _ = theirs(right)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    weight = torch.randn_like(got)
    (got * weight).sum().backward()
    (want * weight).sum().backward()
    torch.testing.assert_close(left.grad, right.grad, atol=1e-12, rtol=0)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-12, rtol=0)


def test_open_gates_keep_and_closed_gates_forget():
    """遗忘门全开、输入门全关：细胞原样传下去；反过来：只剩这一步的。"""
    rnn = rt.HandWrittenRNN("lstm", 2, 3).double()
    with torch.no_grad():
        for parameter in rnn.parameters():
            parameter.zero_()
        rnn.bias_ih_l0[0:3], rnn.bias_ih_l0[3:6] = -50.0, 50.0  # i 关，f 开
    h, c = torch.zeros(1, 3).double(), torch.tensor([[0.3, -0.2, 0.9]]).double()
    from_x = torch.nn.functional.linear(torch.randn(1, 2).double(), rnn.weight_ih_l0, rnn.bias_ih_l0)
    _, kept, gates = rnn.lstm_step(from_x, h, c)
    torch.testing.assert_close(kept, c)
    assert float(gates[1].min()) > 0.999 and float(gates[0].max()) < 0.001


def test_gradient_of_the_first_symbol_by_hand():
    """一维的 RNN，h_t = tanh(u h)：∂h_T/∂x_1 就是各步的导数乘起来。"""
    rnn = rt.HandWrittenRNN("rnn", 1, 1).double()
    with torch.no_grad():
        for parameter, value in zip(rnn.parameters(), (0.7, 0.5, 0.1, 0.0), strict=True):
            parameter.fill_(value)
    x = torch.zeros(1, 4, 1, dtype=torch.double, requires_grad=True)
    states, _ = rnn(x)
    states[0, -1, 0].backward()
    expected = 0.7
    for t, h in enumerate(states[0, :, 0].tolist()):
        expected *= (1 - h * h) * (0.5 if t else 1)
    assert float(x.grad[0, 0, 0]) == pytest.approx(expected, rel=1e-9)


def test_memory_rows():
    ids = rt.memory_batch(6, 50, torch.Generator().manual_seed(0))
    assert ids.shape == (50, 7) and (ids[:, 0] < rt.KEYS).all() and (ids[:, 1:] >= rt.KEYS).all()


def test_script(small_dataset, tmp_path, capsys):
    arguments = ["--preset", "tiny", "--dataset", str(small_dataset), "--output_dir", str(tmp_path / "out")]
    arguments += ["--memory_steps", "2", "--hidden_size", "16", "--num_train_epochs", "2"]
    record = rt.main(arguments)
    assert set(record["metrics"]["entity_f1"]) == {
        f"{k}_{w}" for k in rt.KINDS for w in ("one_way", "both_ways")
    }
    assert set(record["metrics"]["memory_accuracy"]["rnn"]) == {str(d) for d in rt.DISTANCES}
    pictures = {path.name for path in (tmp_path / "out").glob("*.svg")}
    assert pictures == {"gates.svg", "forgetting.svg", "gradient.svg", "both_ways.svg"}
    capsys.readouterr()
    again = rt.main([*arguments, "--predict", "李雷在上海"])
    said = capsys.readouterr().out
    assert again["metrics"] == record["metrics"] and "已有训练结果" in said and "gates_predict.svg" in said
    gates = (tmp_path / "out" / "gates_predict.svg").read_text(encoding="utf-8")
    assert "雷" in gates and "遗忘门" in gates


def test_a_sentence_too_long_to_draw(tmp_path):
    from nlp_common.base.errors import UserError

    with pytest.raises(UserError, match="61 个字"):
        rt.main(["--predict", "字" * 61, "--output_dir", str(tmp_path / "out")])
    with pytest.raises(UserError, match="--hidden_size"):
        rt.main(["--hidden_size", "1", "--output_dir", str(tmp_path / "out")])


def test_gates_of_a_narrow_model_can_be_drawn(tmp_path):
    gates = {name: torch.rand(3, 2) for name in ("input", "forget", "output")}
    rt.draw_gates(tmp_path / "gates.svg", list("李雷在"), gates)
    assert "forget #1" in (tmp_path / "gates.svg").read_text(encoding="utf-8") or "遗忘门 #1" in (
        tmp_path / "gates.svg"
    ).read_text(encoding="utf-8")
