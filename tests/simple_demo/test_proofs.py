"""手写的每一块和 PyTorch 的对应模块：权重照抄过去，结果相等；补 <PAD> 不改变任何输出。

在 float64 里比，差要小于 1e-9：剩下的只有舍入误差，float32 里同样的误差约 1e-6。
"""

import pytest
import torch
from torch import nn

import rnn_text_classifier as rnn
import simple_sentiment_classifier as mean
import transformer_encoder_classifier as built_in
import transformer_sentiment_classification as hand

VOCAB, DIM = 12, 8
# 长短不一的四句，右边补 0。
IDS = torch.tensor([[3, 4, 5, 6, 7], [8, 2, 0, 0, 0], [9, 9, 1, 0, 0], [11, 0, 0, 0, 0]])
MASK = IDS != 0  # (4, 5)


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)


def differ(ours, theirs):
    return (ours - theirs).abs().max() > 1e-3


@pytest.fixture(params=[0, 1, 2])
def x(request, float64):
    torch.manual_seed(request.param)
    return torch.randn(4, 5, DIM)


def randomize(module):
    """偏置和 LayerNorm 的初值是 0 和 1，漏乘漏加也看不出来；全部换成随机数。"""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def copy_attention(ours, theirs):
    parts = (ours.query, ours.key, ours.value)
    theirs.in_proj_weight.data = torch.cat([part.weight for part in parts])
    theirs.in_proj_bias.data = torch.cat([part.bias for part in parts])
    theirs.out_proj.load_state_dict(ours.output.state_dict())


def pytorch_layer(ours, **options):
    theirs = nn.TransformerEncoderLayer(DIM, 1, 16, dropout=0.0, batch_first=True, **options)
    copy_attention(ours.attention, theirs.self_attn)
    for mine, name in (
        (ours.norm1, "norm1"),
        (ours.norm2, "norm2"),
        (ours.feed_forward[0], "linear1"),
        (ours.feed_forward[2], "linear2"),
    ):
        getattr(theirs, name).load_state_dict(mine.state_dict())
    return theirs


def test_attention_is_multihead_attention(x):
    ours, theirs = randomize(hand.SelfAttention(DIM)), nn.MultiheadAttention(DIM, 1, batch_first=True)
    copy_attention(ours, theirs)
    output, weights = ours(x, MASK)
    expected, expected_weights = theirs(x, x, x, key_padding_mask=~MASK)
    close(output, expected)
    close(weights, expected_weights)
    assert (weights[~MASK.unsqueeze(1).expand_as(weights)] == 0).all()  # <PAD> 正好分到 0
    close(weights.sum(-1), torch.ones(4, 5))
    assert differ(ours(x, MASK | True)[0], expected)  # 去掉 mask 就不一样，说明上面真的比了 mask


def test_layer_norm(x):
    ours, theirs = randomize(hand.LayerNorm(DIM)), nn.LayerNorm(DIM)
    theirs.load_state_dict(ours.state_dict())
    close(ours(3 * x + 2), theirs(3 * x + 2))


@pytest.mark.parametrize("training", [True, False])
def test_layer_is_transformer_encoder_layer(x, training):
    ours = randomize(hand.EncoderLayer(DIM, 16))
    theirs = pytorch_layer(ours).train(training)  # eval() 时 PyTorch 走另一条融合的路，两条都比
    with torch.no_grad():
        output, _ = ours(x, MASK)
        close(output[MASK], theirs(x, src_key_padding_mask=~MASK)[MASK])
        # 次序换成 x + sub(LayerNorm(x)) 就不一样，说明上面的比较认得出残差与归一的次序。
        other = pytorch_layer(ours, norm_first=True)(x, src_key_padding_mask=~MASK)
        assert differ(output[MASK], other[MASK])


def test_whole_hand_written_encoder():
    torch.manual_seed(0)
    model = randomize(hand.TransformerClassifier(VOCAB))
    layer = pytorch_layer(model.layer)
    x = nn.functional.embedding(IDS, model.embedding.weight) + model.position(torch.arange(5))
    expected = layer(x, src_key_padding_mask=~MASK)[:, 0] @ model.output.weight.T + model.output.bias
    close(model(IDS), expected)


def test_two_heads_by_hand_is_pytorch_layer_by_layer():
    torch.manual_seed(0)
    model = built_in.TransformerEncoderClassifier(VOCAB).eval()
    with torch.no_grad():
        x = model.embed(IDS)
        for layer in model.layers:
            weights, attended, normed, output = built_in.layer_by_hand(layer, x, ~MASK)
            expected, expected_weights = layer.self_attn(x, x, x, ~MASK, average_attn_weights=False)
            close(weights, expected_weights)
            close(attended, expected)
            close(normed, layer.norm1(x + expected))
            x = layer(x, src_key_padding_mask=~MASK)
            close(output[MASK], x[MASK])
        close(model(IDS), model.output(x[:, 0]))


def test_rnn_step(x):
    ours = randomize(nn.RNN(DIM, 16, batch_first=True))
    close(rnn.rnn_by_hand(ours, x), ours(x)[0])
    first = torch.tanh(ours.weight_ih_l0 @ x[0, 0] + ours.bias_ih_l0 + ours.bias_hh_l0)  # 旧状态是 0 的那一步
    close(rnn.rnn_by_hand(ours, x)[0, 0], first)


def test_rnn_classifier_reads_the_last_real_state():
    torch.manual_seed(0)
    model = rnn.RNNClassifier(VOCAB)
    packed = nn.utils.rnn.pack_padded_sequence(
        model.embedding(IDS), MASK.sum(1), batch_first=True, enforce_sorted=False
    )
    _, last = model.rnn(packed)  # PyTorch 自己跳过 <PAD> 的办法
    close(model(IDS), model.output(last[0]))


def test_mean_pooling_by_hand():
    vectors = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [70.0, 80.0]], [[5.0, -1.0], [9.0, 9.0], [9.0, 9.0]]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert mean.mean_pooling(vectors, mask).tolist() == [[2.0, 4.0], [5.0, -1.0]]


MODELS = {
    "mean": lambda: mean.MeanPoolingClassifier(VOCAB),
    "rnn": lambda: rnn.RNNClassifier(VOCAB),
    "rnn_mean": lambda: rnn.MeanPoolingClassifier(VOCAB),
    "hand": lambda: hand.TransformerClassifier(VOCAB),
    "built_in": lambda: built_in.TransformerEncoderClassifier(VOCAB),
}


@pytest.mark.parametrize("name", MODELS)
def test_padding_changes_no_output(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.5)
        if name.startswith("rnn"):
            model.embedding.weight[0] = 0.0  # padding_idx 的那一行本来就是 0，刚才被随机数盖掉了
        expected = model(IDS)
        alone = torch.cat([model(row[row != 0].unsqueeze(0)) for row in IDS])  # 一句一句给，一个 <PAD> 也没有
        close(expected, alone)
        close(expected, model(nn.functional.pad(IDS, (0, 3))))  # 再多补三个
        assert differ(expected, model(nn.functional.pad(IDS, (0, 1), value=5)))  # 补真词就会变


@pytest.mark.parametrize("name", ["mean", "hand", "built_in", "rnn"])
def test_the_pad_vector_gets_no_gradient(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    model(IDS).sum().backward()
    assert (model.embedding.weight.grad[0] == 0).all()
    assert (model.embedding.weight.grad[3] != 0).any()
