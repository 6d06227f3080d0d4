"""种子 0 到 9，每个脚本要给读者看的事都是真的；模型和轮数与说明一致。"""

import ast
import inspect
import io
import sys
import tokenize
from pathlib import Path

import pytest
import torch

import minimal_word_embedding_train as words
import rnn_text_classifier as rnn
import simple_sentiment_classifier as mean
import transformer_encoder_classifier as built_in
import transformer_sentiment_classification as hand

SEEDS = range(10)
SCRIPTS = {"words": words, "mean": mean, "rnn": rnn, "hand": hand, "built_in": built_in}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tensors(script, data, vocab):
    return script.encode([text for text, _ in data], vocab), torch.tensor([label for _, label in data])


def fit(script, make, seed):
    """照脚本的 main() 训练一次：(模型, 词表, 最后的 loss)。"""
    torch.manual_seed(seed)
    vocab = script.build_vocab(script.DATA)
    model = make(len(vocab))
    return model, vocab, script.train(model, *tensors(script, script.DATA, vocab))


@pytest.mark.parametrize("seed", SEEDS)
def test_cats_and_dogs_come_closer_than_any_unrelated_pair(seed):
    torch.manual_seed(seed)
    vocab = words.build_vocab(words.SENTENCES)
    pairs = words.build_pairs(words.SENTENCES, vocab)
    model = words.WordEmbeddingModel(len(vocab))
    before = words.cosine(model.embedding.weight, vocab["cats"], vocab["dogs"])
    loss = words.train(model, pairs)
    table = model.embedding.weight
    after = words.cosine(table, vocab["cats"], vocab["dogs"])
    unrelated = words.unrelated_pairs(pairs)
    assert after > 0.98 > 0.6 > before
    assert max(words.cosine(table, a, b) for a, b in unrelated) < 0.45
    floor = words.loss_floor(pairs)
    assert floor < loss < floor + 0.001
    assert len(unrelated) == 88 and (vocab["cats"], vocab["dogs"]) not in unrelated


def test_loss_floor_is_the_entropy_of_the_corpus():
    vocab = words.build_vocab(["a b", "a c"])
    pairs = words.build_pairs(["a b", "a c"], vocab)
    assert pairs.tolist() == [[0, 1], [0, 2]]
    assert words.loss_floor(pairs) == pytest.approx(0.6931, abs=1e-4)  # 二选一：ln 2


@pytest.mark.parametrize("seed", SEEDS)
def test_mean_pooling_classifies_unseen_sentences_but_not_order(seed):
    model, vocab, loss = fit(mean, mean.MeanPoolingClassifier, seed)
    assert loss < 0.0003
    ids, labels = tensors(mean, mean.DATA, vocab)
    assert (mean.predict(model, ids).argmax(-1) == labels).all()
    probs = mean.predict(model, mean.encode(mean.TEST_SENTENCES, vocab))
    assert probs.argmax(-1).tolist() == [1, 0, 1] and probs[0, 1] > 0.99
    pair = mean.encode(["i love dogs i hate cats", "i hate dogs i love cats"], vocab)
    torch.testing.assert_close(*mean.predict(model, pair), atol=1e-6, rtol=0)


@pytest.mark.parametrize("seed", SEEDS)
def test_rnn_reads_word_order_and_mean_pooling_cannot(seed):
    torch.manual_seed(seed)
    vocab = rnn.build_vocab(rnn.DATA)
    ids, labels = tensors(rnn, rnn.DATA, vocab)
    test_ids, test_labels = tensors(rnn, rnn.TEST_DATA, vocab)
    model, average = rnn.RNNClassifier(len(vocab)), rnn.MeanPoolingClassifier(len(vocab))
    assert rnn.train(model, ids, labels) < 0.0002
    assert rnn.train(average, ids, labels) > 0.37  # 24 句成对的每句 ln 2，平均到 44 句是 0.378
    probs = rnn.predict(model, test_ids)[range(8), test_labels]
    assert probs.min() > 0.99
    averaged = rnn.predict(average, test_ids)
    torch.testing.assert_close(averaged[0::2], averaged[1::2], atol=1e-6, rtol=0)  # 一对里的两句分不开
    wrong_cell = model.output(model.rnn(model.embedding(ids))[0][:, -1]).argmax(-1)
    assert (wrong_cell != labels).sum() >= 5  # 取最后一格会判错这么多


@pytest.mark.parametrize("seed", SEEDS)
def test_hand_written_transformer_learns_where_to_look(seed):
    torch.manual_seed(seed)
    vocab = hand.build_vocab(hand.DATA)
    ids, labels = tensors(hand, hand.DATA, vocab)
    model = hand.TransformerClassifier(len(vocab))
    assert 0.2 < hand.feeling_share(model, ids, vocab) < 0.35  # 四个词里一个，接近平均分
    assert hand.train(model, ids, labels) < 0.0005
    assert hand.feeling_share(model, ids, vocab) > 0.9
    probs, maps = hand.predict(model, hand.encode(hand.TEST_SENTENCES, vocab))
    assert probs.argmax(-1).tolist() == [1, 0, 0] and probs.max(-1).values.min() > 0.99
    assert (maps[0, :, 3] == 0).all()  # 'i love this' 只有三个词，第四格是 <PAD>


@pytest.mark.parametrize("seed", SEEDS)
def test_built_in_transformer_classifies_unseen_sentences(seed):
    model, vocab, loss = fit(built_in, built_in.TransformerEncoderClassifier, seed)
    assert loss < 0.005
    probs = built_in.predict(model, built_in.encode(built_in.TEST_SENTENCES, vocab))
    assert probs.argmax(-1).tolist() == [1, 0, 0] and probs.max(-1).values.min() > 0.99


def test_same_seed_same_result_other_seed_other_result():
    losses = [fit(built_in, built_in.TransformerEncoderClassifier, seed)[2] for seed in (5, 5, 6)]
    assert losses[0] == losses[1] != losses[2]


def test_test_sentences_are_not_in_the_training_data():
    for script in (mean, hand, built_in):
        assert not {text for text, _ in script.DATA} & set(script.TEST_SENTENCES)
    assert not {text for text, _ in rnn.DATA} & {text for text, _ in rnn.TEST_DATA}


SHAPES = {
    "words": [("embedding", (20, 8)), ("output", (20, 8))],
    "mean": [("embedding", (22, 8)), ("hidden", (16, 8)), ("output", (2, 16))],
    "rnn": [("embedding", (20, 8)), ("rnn.weight_ih_l0", (16, 8)), ("output", (2, 16))],
    "hand": [
        ("position", (8, 8)),
        ("layer.attention.query", (8, 8)),
        ("layer.feed_forward.0", (16, 8)),
        ("layer.feed_forward.2", (8, 16)),
        ("output", (2, 8)),
    ],
    "built_in": [("layers.1.self_attn.in_proj_weight", (48, 16)), ("layers.1.linear1", (64, 16))],
}
MODELS = {
    "words": words.WordEmbeddingModel,
    "mean": mean.MeanPoolingClassifier,
    "rnn": rnn.RNNClassifier,
    "hand": hand.TransformerClassifier,
    "built_in": built_in.TransformerEncoderClassifier,
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_architecture_and_epochs_are_the_promised_ones(name):
    script = SCRIPTS[name]
    vocab = script.build_vocab(words.SENTENCES if name == "words" else script.DATA)
    model = MODELS[name](len(vocab))
    state = model.state_dict()
    for part, shape in SHAPES[name]:
        assert tuple(state.get(part, state.get(part + ".weight")).shape) == shape, part
    epochs = {"words": 1000, "mean": 300, "rnn": 300, "hand": 50, "built_in": 50}[name]
    assert inspect.signature(script.train).parameters["epochs"].default == epochs
    if name == "built_in":
        assert len(model.layers) == 2 and model.layers[0].self_attn.num_heads == 2
        assert not torch.equal(state["layers.0.linear1.weight"], state["layers.1.linear1.weight"])
    if name == "rnn":
        assert model.embedding.padding_idx == 0 and model.rnn.batch_first
        assert script.encode(["it is good"], vocab).shape == (1, 6)


FOLDER = Path(hand.__file__).parent
FILES = sorted(path.name for path in FOLDER.glob("*.py"))


def imported(source):
    nodes = list(ast.walk(ast.parse(source)))
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    return {module.split(".")[0] for module in modules} - sys.stdlib_module_names


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_stand_alone_and_stay_short(name):
    source = Path(SCRIPTS[name].__file__).read_text(encoding="utf-8")
    lines = [line.strip() for line in source.splitlines()]
    # 空行和单独一行的注释不算：那是透气的地方，不该为了行数省掉。
    assert 80 <= len([line for line in lines if line and not line.startswith("#")]) <= 200
    assert imported(source) <= {"torch", "matplotlib"}


@pytest.mark.parametrize("file", FILES)
def test_nothing_is_imported_from_the_rest_of_the_repository(file):
    ours = {Path(name).stem for name in FILES}
    libraries = {"torch", "matplotlib", "sklearn", "snownlp"}
    assert imported((FOLDER / file).read_text(encoding="utf-8")) <= libraries | ours


@pytest.mark.parametrize("file", FILES)
def test_one_statement_a_line(file):
    source = (FOLDER / file).read_text(encoding="utf-8")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        assert token.string != ";" or token.type != tokenize.OP, token.line
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            # a, b = x, y 是两句话；a, b = f(x) 是一句
            assert not any(isinstance(target, ast.Tuple) for target in node.targets), ast.unparse(node)
