"""专家并行：路由与容量对手算的；几个进程与逐个 token 的循环一样；反向也一样。"""

import pytest
import torch

import expert_parallel as ep
from moe import TOP, MoE, Routes, capacity_of, combine, dense_loop, dispatch, route
from nlp_common.base.errors import UserError


def test_capacity_by_hand():
    assert capacity_of(8, 4, 1.0) == 4  # 8 个 token × 2 ÷ 4 个专家
    assert capacity_of(8, 4, 1.25) == 5
    assert capacity_of(3, 8, 1.0) == 1


def test_route_by_hand():
    """三个 token、三个专家，容量 1：第一选择先占；第二选择装不下的丢掉。"""
    x = torch.eye(3, dtype=torch.float64)
    router = torch.log(torch.tensor([[0.6, 0.6, 0.1], [0.3, 0.1, 0.3], [0.1, 0.3, 0.6]], dtype=torch.float64))
    routes = route(x, router, 0.5)  # ceil(0.5 × 2 × 3 / 3) = 1
    assert routes.experts.tolist() == [[0, 1], [0, 2], [2, 1]]
    assert torch.allclose(routes.gates[0], torch.tensor([2 / 3, 1 / 3], dtype=torch.float64))
    # 专家 0：token 0 的第一选择占了，token 1 的装不下；专家 2：token 2 先；专家 1：token 0 的第二选择
    assert routes.places.tolist() == [[0, 0], [-1, -1], [0, -1]]
    assert routes.dropped == pytest.approx(0.5)
    # 3·Σ f_e P_e：f = (2/3, 0, 1/3)，P = (1.3/3, 0.7/3, 1/3)
    assert routes.balance.item() == pytest.approx(3 * (2 / 3 * 1.3 / 3 + 1 / 3 * 1 / 3))
    assert routes.loads(3).tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3])


def test_the_balance_loss_is_one_when_even():
    n = 4
    x, router = torch.eye(n, dtype=torch.float64) * 50, torch.eye(n, dtype=torch.float64)
    assert route(x, router, 1.0).balance.item() == pytest.approx(1.0)


@pytest.mark.parametrize("factor", [0.3, 1.0, 4.0])
def test_boxes_equal_the_loop_and_its_gradients(factor):
    torch.manual_seed(0)
    moe = MoE(6, 5, 4, factor).double()
    x = torch.randn(10, 6, dtype=torch.float64, requires_grad=True)
    grads = []
    for y in (moe(x), dense_loop(x, moe)):
        found = torch.autograd.grad((y**2).sum(), [x, *moe.parameters()])
        grads.append([y, *found])
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(*grads, strict=True))


def test_a_dropped_token_gets_nothing():
    routes = Routes(
        torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]]), torch.tensor([[-1, -1]]), torch.tensor(1.0)
    )
    x = torch.ones(1, 3)
    assert dispatch(x, routes, 2, 1).abs().sum() == 0
    assert combine(torch.ones(2, 1, 3), routes).tolist() == [[0.0, 0.0, 0.0]]


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    folder = tmp_path_factory.mktemp("expert")
    flags = ["--preset", "tiny", "--num_processes", "2", "--num_experts", "4", "--width", "16", "--inner", "32",
             "--max_steps", "20", "--n_documents", "60", "--batch_size", "4", "--output_dir", str(folder / "out")]  # fmt: skip
    return ep.main(flags), folder / "out"


def test_processes_equal_the_loop(record):
    metrics = record[0]["metrics"]
    assert metrics["max_difference"] < 1e-12
    assert metrics["bytes_sent"] == metrics["bytes_formula"]
    assert metrics["expert_bytes"] * 2 == metrics["expert_bytes_alone"]


def test_equal_active_parameters_and_pictures(record):
    metrics, folder = record[0]["metrics"], record[1]
    router = 4 * 16 * 2  # 两层的路由；稠密的另有偏置
    bias = (32 + 16) * 2
    assert metrics["moe"]["active_parameters"] - router == metrics["dense"]["active_parameters"] - bias
    assert metrics["moe"]["parameters"] > metrics["moe"]["active_parameters"]
    assert all(len(row) == 4 and sum(row) == pytest.approx(1) for row in metrics["moe"]["loads"])
    assert metrics["dense"]["history"][-1][1] < metrics["dense"]["history"][0][1]
    assert (folder / "moe_loss.svg").exists() and (folder / "moe_loads.svg").exists() and TOP == 2


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--num_experts", "6"], "分不匀给 4 个进程"),
        (["--inner", "33"], "偶数"),
        (["--capacity_factor", "0"], "--capacity_factor"),
    ],
)
def test_sizes_that_do_not_divide(flags, said):
    with pytest.raises(UserError, match=said):
        ep.main(["--preset", "tiny", *flags])
