"""滚动与流：与逐条路径求和、与 scipy 的最大流、与暴力的最小割相同。"""

import itertools

import pytest
import torch

import rollout_and_flow as rf
from nlp_common.base.errors import UserError


@pytest.fixture
def maps():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 5, 5, generator=generator).softmax(-1) for _ in range(3)]


def test_rollout_is_the_sum_over_all_paths(maps):
    """R_3[i, j] = Σ 所有路 i→a→b→j 的份额之积。"""
    layers = [rf.with_residual(weights, 0.5) for weights in maps]
    got = rf.rollout(maps)[-1]
    for i, j in itertools.product(range(5), repeat=2):
        total = sum(layers[2][i, a] * layers[1][a, b] * layers[0][b, j] for a in range(5) for b in range(5))
        assert got[i, j] == pytest.approx(float(total), abs=1e-6)
    assert torch.allclose(got.sum(-1), torch.ones(5))


def test_rollout_of_one_layer_without_residual_is_that_layer(maps):
    assert torch.allclose(rf.rollout(maps[:1], 0.0)[0], maps[0].mean(0))
    assert len(rf.rollout(maps)) == 3


def test_flow_equals_scipy(maps):
    sparse = pytest.importorskip("scipy.sparse")
    from scipy.sparse.csgraph import maximum_flow

    scale = 10**6
    size, layers = 5, [rf.with_residual(weights, 0.5) for weights in maps]
    matrix = torch.zeros(20, 20)
    for number, layer in enumerate(layers):
        for i, j in itertools.product(range(size), repeat=2):
            matrix[number * size + j, (number + 1) * size + i] = layer[i, j]
    graph = sparse.csr_matrix((matrix * scale).round().to(torch.int32).numpy())
    for target in (0, 4):
        got = rf.attention_flow(maps, target)
        for source in range(size):
            expected = maximum_flow(graph, source, 3 * size + target).flow_value / scale
            assert got[source] == pytest.approx(expected, abs=1e-4)


def test_flow_equals_the_smallest_cut():
    """最大流等于最小割：五个点的图，暴力试每一种割法。要退回去才走得满的图也在内。"""
    pipes = [{1: 3.0, 2: 1.0}, {2: 1.0, 3: 2.0}, {4: 2.5}, {2: 0.5, 4: 1.5}, {}]
    cuts = []
    for chosen in itertools.product((False, True), repeat=3):
        side = {0} | {n + 1 for n, inside in enumerate(chosen) if inside}
        cuts.append(sum(room for u in side for v, room in pipes[u].items() if v not in side))
    before = [dict(each) for each in pipes]
    assert rf.max_flow(pipes, 0, 4) == pytest.approx(min(cuts))
    assert pipes == before  # 不改给它的图
    crossing = [{1: 1.0, 2: 1.0}, {3: 1.0, 2: 1.0}, {3: 1.0}, {}]
    assert rf.max_flow(crossing, 0, 3) == pytest.approx(2.0)


def test_views_look_from_the_last_position(maps):
    views = rf.views(maps, 0.5)
    assert torch.equal(views["layer1.head0"], maps[1][0, -1])
    assert torch.allclose(views["rollout"], rf.rollout(maps)[-1][-1])
    assert len(views) == 3 * 3 + 2


def test_the_hand_written_encoder(tmp_path):
    """--hand：训练好的编码器 [CLS] 看"不"和好恶词；结果文件夹齐全，第二次直接用。"""
    arguments = ["--hand", "--preset", "tiny", "--output_dir", str(tmp_path / "r")]
    record = rf.main(arguments)
    assert record["metrics"]["hand_rollout_feeling"] > 0.4  # 五个 token 里的两个，平均分是 0.4
    page = (tmp_path / "r" / "rollout.html").read_text(encoding="utf-8")
    assert "<svg" in page and "http" not in page.replace("http://www.w3.org", "")
    assert rf.main(arguments)["seconds"] == record["seconds"]


def test_residual_out_of_range(tmp_path):
    with pytest.raises(UserError, match="--residual 要在 0 到 1 之间"):
        rf.main(["--residual", "1", "--preset", "tiny"])
