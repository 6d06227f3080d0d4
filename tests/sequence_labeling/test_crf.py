"""CRF：与逐条列举、与 pytorch-crf 相同；快的写法与对数里的写法相同；掩码一处接不上的也不留。"""

import itertools
import math

import pytest
import torch

import crf as fast
import hmm_crf as plain
from hmm_crf import NEVER


def random_case(n_rows=4, n_steps=5, n_tags=3, seed=0, spread=2.0):
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.double) * spread

    lengths = torch.randint(1, n_steps + 1, (n_rows,), generator=generator)
    lengths[0] = n_steps
    tags = torch.randint(n_tags, (n_rows, n_steps), generator=generator)
    return rand(n_rows, n_steps, n_tags), tags, lengths, rand(n_tags), rand(n_tags, n_tags), rand(n_tags)


def every_chain(emissions, length, start, steps, end):
    """一句话的每一条标签链 → 分数，照定义逐项加。"""
    n_tags = emissions.shape[-1]
    scores = {}
    for chain in itertools.product(range(n_tags), repeat=length):
        score = start[chain[0]] + end[chain[-1]]
        score = score + sum(emissions[t, k] for t, k in enumerate(chain))
        scores[chain] = float(score + sum(steps[a, b] for a, b in itertools.pairwise(chain)))
    return scores


@pytest.mark.parametrize("seed", [0, 1])
def test_equal_to_enumeration(seed):
    emissions, tags, lengths, start, steps, end = random_case(seed=seed)
    score = plain.sequence_score(emissions, tags, lengths, start, steps, end)
    paths = plain.viterbi(emissions, lengths, start, steps, end)
    assert fast.viterbi_batch(emissions, lengths, start, steps, end) == paths
    for marginals in (plain.log_marginals, fast.marginals_fast):
        log_z, node, edge = marginals(emissions, lengths, start, steps, end)
        for row, length in enumerate(lengths.tolist()):
            scores = every_chain(emissions[row], length, start, steps, end)
            exact = math.log(sum(math.exp(value) for value in scores.values()))
            assert float(log_z[row]) == pytest.approx(exact, abs=1e-9)
            assert float(score[row]) == pytest.approx(scores[tuple(tags[row, :length].tolist())], abs=1e-9)
            assert tuple(paths[row]) == max(scores, key=scores.get)
            want_node, want_edge = torch.zeros_like(node[row]), torch.zeros_like(edge[row])
            for chain, value in scores.items():
                probability = math.exp(value - exact)
                for t, k in enumerate(chain):
                    want_node[t, k] += probability
                for a, b in itertools.pairwise(chain):
                    want_edge[a, b] += probability
            torch.testing.assert_close(node[row], want_node, atol=1e-9, rtol=0)
            torch.testing.assert_close(edge[row], want_edge, atol=1e-9, rtol=0)


@pytest.mark.parametrize("shape", [(6, 9, 5), (3, 20, 28), (1, 1, 4), (5, 2, 1)])
def test_equal_to_pytorch_crf(shape):
    torchcrf = pytest.importorskip("torchcrf", reason="要 pytorch-crf 才比得了")
    n_rows, n_steps, n_tags = shape
    emissions, tags, lengths, start, steps, end = random_case(*shape, seed=2)
    ours, theirs = fast.CRF(n_tags).double(), torchcrf.CRF(n_tags, batch_first=True).double()
    with torch.no_grad():
        for module, names in ((ours, ("start", "transitions", "end")),
                              (theirs, ("start_transitions", "transitions", "end_transitions"))):  # fmt: skip
            for name, value in zip(names, (start, steps, end), strict=True):
                getattr(module, name).copy_(value)
    mask = torch.arange(n_steps) < lengths[:, None]
    weight = torch.rand(n_rows, dtype=torch.double, generator=torch.Generator().manual_seed(3))
    left, right = emissions.clone().requires_grad_(), emissions.clone().requires_grad_()
    loss, reference = ours(left, tags, lengths), -theirs(right, tags, mask, reduction="none")
    torch.testing.assert_close(loss, reference, atol=1e-9, rtol=0)
    (loss * weight).sum().backward()
    (reference * weight).sum().backward()
    for a, b in (
        (left.grad, right.grad),
        (ours.start.grad, theirs.start_transitions.grad),
        (
            ours.transitions.grad,
            theirs.transitions.grad if n_steps > 1 else torch.zeros(n_tags, n_tags).double(),
        ),
        (ours.end.grad, theirs.end_transitions.grad),
    ):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=0)
    assert ours.decode(emissions, lengths) == theirs.decode(emissions, mask)


def test_gradients_numerically():
    emissions, tags, lengths, start, steps, end = random_case(3, 4, 3, seed=4)
    values = [value.requires_grad_() for value in (emissions, start, steps, end)]

    def loss(emissions, start, steps, end):
        return fast.NegativeLogLikelihood.apply(emissions, tags, lengths, start, steps, end)

    assert torch.autograd.gradcheck(loss, values, atol=1e-7)


@pytest.mark.parametrize("spread", [1.0, 30.0, 1000.0])
def test_wide_scores_do_not_underflow(spread):
    """起伏 1000 的分数：float64 的概率装不下，退回对数里的算法；结果一样，没有 NaN。"""
    case = random_case(3, 30, 6, seed=5, spread=spread)
    emissions, _, lengths, start, steps, end = case
    for got, want in zip(fast.marginals_fast(emissions, lengths, start, steps, end),
                         plain.log_marginals(emissions, lengths, start, steps, end), strict=True):  # fmt: skip
        assert torch.isfinite(got).all()
        torch.testing.assert_close(got, want, atol=1e-7, rtol=1e-9)
    mask = torch.arange(30) < lengths[:, None]
    assert fast.too_wide(emissions, mask, start, steps, end) == (spread > 20)  # 这几次走的真是两条路


def test_float32_training_is_close_to_float64():
    emissions, tags, lengths, start, steps, end = random_case(8, 60, 9, seed=6)
    single = [value.float().requires_grad_() for value in (emissions, start, steps, end)]
    double = [value.clone().requires_grad_() for value in (emissions, start, steps, end)]
    for values in (single, double):
        fast.NegativeLogLikelihood.apply(values[0], tags, lengths, *values[1:]).sum().backward()
    for a, b in zip(single, double, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, atol=1e-4, rtol=1e-4)


TAGS = ["O", *(f"{letter}-{kind}" for kind in "AB" for letter in "BMES")]


def test_mask_allows_exactly_what_bmes_allows():
    start, steps, end = fast.legal_mask(TAGS)
    allowed = {(TAGS[i], TAGS[j]) for i in range(9) for j in range(9) if steps[i, j]}
    inside = {(f"{a}-{k}", f"{b}-{k}") for k in "AB" for a in "BM" for b in "ME"}
    outside = {(a, b) for a in TAGS if a[0] in "OES" for b in TAGS if b[0] in "OBS"}
    assert allowed == inside | outside
    assert {TAGS[i] for i in range(9) if start[i]} == {t for t in TAGS if t[0] in "OBS"}
    assert {TAGS[i] for i in range(9) if end[i]} == {t for t in TAGS if t[0] in "OES"}


def test_with_the_mask_no_chain_is_illegal_and_the_probabilities_stay_right():
    from span_metrics import illegal_transitions

    torch.manual_seed(0)
    model = fast.CRF(9, fast.legal_mask(TAGS)).double()
    emissions = torch.randn(50, 12, 9, dtype=torch.double) * 5
    lengths = torch.randint(1, 13, (50,))
    found = [[TAGS[k] for k in chain] for chain in model.decode(emissions, lengths)]
    assert sum(map(illegal_transitions, found)) == 0
    free = [[TAGS[k] for k in chain] for chain in fast.CRF(9).double().decode(emissions, lengths)]
    assert sum(map(illegal_transitions, free)) > 50  # 没有掩码时真有接不上的，上面才说明问题
    with torch.no_grad():
        scores = model.scores()
    log_z, node, edge = fast.marginals_fast(emissions, lengths, *scores)
    reference = plain.log_marginals(emissions, lengths, *scores)
    for a, b in zip((log_z, node, edge), reference, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)
    assert float(edge.sum(0)[0, TAGS.index("M-A")]) == 0
    gold = torch.tensor([chain + [0] * (12 - len(chain)) for chain in model.decode(emissions, lengths)])
    loss = model(emissions.requires_grad_(), gold, lengths)
    loss.sum().backward()
    assert torch.isfinite(loss).all() and all(torch.isfinite(p.grad).all() for p in model.parameters())
    illegal = ~fast.legal_mask(TAGS)[1]
    assert (model.transitions.grad[illegal] == 0).all() and -math.inf == NEVER


def test_explicit_gradient_in_hmm_crf_is_the_gradient():
    """hmm_crf.py 不用 autograd：它的一步等于对 log Z − 分数 用 autograd 再走 AdaGrad 的一步。"""
    from small_ner import small_sentences

    from labeling import all_tags

    sentences = small_sentences(12)
    tags = all_tags(sentences)
    settings = plain.HmmCrfSettings(num_train_epochs=1, batch_size=4, learning_rate=0.1, l2=0.01)
    crf = plain.train_crf(sentences, tags, settings, show=False)  # 走开几步，免得全是 0
    ids, lengths = crf.encode(sentences[:5])
    from tagged_files import tags_of

    gold = torch.zeros(ids.shape[:2], dtype=torch.long)
    for row, sentence in enumerate(sentences[:5]):
        gold[row, : len(sentence.chars)] = torch.tensor([tags.index(t) for t in tags_of(sentence)])
    before = {name: getattr(crf, name).clone().requires_grad_() for name in plain.CRF_PARTS}
    emissions = torch.nn.functional.embedding_bag(ids.flatten(0, 1), before["weights"], mode="sum")
    emissions = emissions.view(*ids.shape[:2], -1)
    rest = [before[name] for name in ("start", "steps", "end")]
    log_z, _ = plain.log_forward(emissions, lengths, *rest)
    loss = (log_z - plain.sequence_score(emissions, gold, lengths, *rest)).sum()
    loss.backward()

    class Plain:  # 不除以平方和的"优化器"：参数减去的就是梯度
        def __init__(self, values):
            self.values = values

        def step(self, gradient, rows=slice(None)):
            self.values[rows] -= gradient

    optimizers = [Plain(getattr(crf, name)) for name in plain.CRF_PARTS]
    assert plain.crf_step(crf, optimizers, ids, lengths, gold, l2=0.0) == pytest.approx(loss.item(), rel=1e-5)
    for name in plain.CRF_PARTS:
        moved = before[name].detach() - getattr(crf, name)
        expected = before[name].grad
        if name == "weights":
            expected[-1] = 0  # 没见过的特征没有权重
        torch.testing.assert_close(moved, expected, atol=1e-4, rtol=1e-4)


def test_hmm_is_counting():
    """两句话，手算得出的概率。"""
    from tagged_files import Sentence

    sentences = [Sentence(list("甲乙"), [("A", 0, 2)]), Sentence(list("乙"), [])]
    tags = ["O", "B-A", "M-A", "E-A", "S-A"]
    hmm = plain.train_hmm(sentences, tags, smoothing=1e-9)
    assert hmm["start"].exp().tolist() == pytest.approx([0.5, 0.5, 0, 0, 0], abs=1e-6)
    assert float(hmm["steps"][1, 3].exp()) == pytest.approx(1, abs=1e-6)  # B 之后总是 E
    assert float(hmm["end"][3].exp()) == pytest.approx(1, abs=1e-6)
    assert float(hmm["emit"][hmm["row"]["甲"], 1].exp()) == pytest.approx(1, abs=1e-6)
    assert plain.decode_hmm(hmm, sentences, tags) == [["B-A", "E-A"], ["O"]]
    smoothed = plain.train_hmm(sentences, tags, smoothing=0.5)
    for name in ("start",):
        assert float(smoothed[name].exp().sum()) == pytest.approx(1)
    assert (smoothed["steps"].exp().sum(1) + smoothed["end"].exp()).tolist() == pytest.approx([1] * 5)
    assert smoothed["emit"].exp().sum(0).tolist() == pytest.approx([1] * 5)
