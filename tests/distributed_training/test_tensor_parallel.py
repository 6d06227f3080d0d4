"""张量、流水线、两种叠起来：等于一个进程；字节数等于公式；次序与气泡对手算的；分不匀的说出来。"""

import pytest
import torch

import parallel_2d
import pipeline_parallel as pp
import tensor_parallel as tp
from nlp_common.base.errors import UserError
from saved_bytes import count_saved
from small_gpt import Sizes, loss_sum, make_batch, make_model


@pytest.fixture(scope="module")
def tensor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tensor") / "out"
    flags = ["--preset", "tiny", "--num_processes", "2", "--layers", "2", "--output_dir", str(folder)]
    return tp.main(flags)["metrics"], folder


def test_tensor_parallel_equals_one_process(tensor):
    metrics, folder = tensor
    for way in tp.WAYS:
        assert metrics[way]["max_difference"] < 1e-12 and metrics[way]["loss_difference"] < 1e-12
        assert metrics[way]["bytes_sent"] == metrics[way]["bytes_formula"]
    assert metrics["torch_difference"] < 1e-11
    assert (
        metrics["sequence"]["activation_bytes"]
        < metrics["tensor"]["activation_bytes"]
        < metrics["activation_bytes"]
    )
    assert (folder / "tensor_parallel.svg").exists()


def test_second_run_loads(tensor, capsys):
    metrics, folder = tensor
    flags = ["--preset", "tiny", "--num_processes", "2", "--layers", "2", "--output_dir", str(folder)]
    assert tp.main(flags)["metrics"] == metrics and "直接加载" in capsys.readouterr().out


def test_the_bytes_formula_by_hand():
    settings = tp.TensorSettings(num_processes=2, width=4, layers=1, rows=1, length=2)
    # 一层四次、嵌入一次、输出一次，每次 2·(1/2)·1·2·4·8 = 64 字节；交叉熵三次，每次 1·2·8 = 16
    assert tp.bytes_sent(settings, sequence=False) == 6 * 64 + 3 * 16
    # 三个 LayerNorm 3·2·4，位置 2·4，down 的偏置 4：36 个数
    assert tp.bytes_sent(settings, sequence=True) == 6 * 64 + 3 * 16 + 36 * 8


def test_cross_entropy_of_one_piece_is_the_usual_one():
    """只有一个进程的组：切开的交叉熵就是平常的，梯度也是。"""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        logits = (50 * torch.randn(2, 3, 7, dtype=torch.float64)).requires_grad_()  # e^50 也不溢出
        targets = torch.randint(7, (2, 3))
        ours = tp.split_cross_entropy(logits, targets)
        usual = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        pairs = zip(torch.autograd.grad(ours, logits), torch.autograd.grad(usual, logits), strict=True)
        assert abs(ours - usual) < 1e-9 and all((a - b).abs().max() < 1e-12 for a, b in pairs)
    finally:
        dist.destroy_process_group()


def test_saved_bytes_by_hand():
    x = torch.ones(10, dtype=torch.float64, requires_grad=True)
    weight = torch.nn.Linear(1, 1)
    with count_saved(weight) as saved:
        y = (x.exp() * 2).exp()  # 留下两次 exp 的输出
    assert saved.bytes == 2 * 80 and y.shape == (10,)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline") / "out"
    flags = ["--preset", "tiny", "--num_processes", "2", "--layers", "2", "--micro_batches", "4", "--rows", "8",
             "--output_dir", str(folder)]  # fmt: skip
    return pp.main(flags)["metrics"], folder


def test_pipeline_gradients_and_bubble(pipeline):
    metrics, folder = pipeline
    for name in pp.SCHEDULES:
        assert metrics[name]["max_difference"] < 1e-12 and metrics[name]["loss_difference"] < 1e-12
        assert metrics[name]["bubble"] == pytest.approx(1 / 5)
        assert 0 < metrics[name]["bubble_measured"] < 1  # 真等的，机器忙时大些
        assert metrics[name]["bytes_sent"] == metrics["bytes_formula"]
        assert (folder / f"pipeline_{name}.svg").exists()
    assert metrics["gpipe"]["most_micro_batches"] == 4 and metrics["1f1b"]["most_micro_batches"] == 2
    assert metrics["1f1b"]["activation_bytes"] < metrics["gpipe"]["activation_bytes"]


def test_schedules_by_hand():
    assert pp.gpipe(0, 2, 2) == [("F", 0), ("F", 1), ("B", 1), ("B", 0)]
    first, last = [("F", 0), ("F", 1), ("B", 0), ("F", 2), ("B", 1), ("B", 2)], [
        ("F", 0), ("B", 0), ("F", 1), ("B", 1), ("F", 2), ("B", 2)
    ]  # fmt: skip
    assert pp.one_f_one_b(0, 2, 3) == first and pp.one_f_one_b(1, 2, 3) == last


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("p", "m"), [(2, 1), (2, 5), (3, 2), (4, 8), (5, 16)])
def test_every_schedule_does_all_the_work_and_has_the_bubble_of_the_formula(schedule, p, m):
    spans = pp.simulate(schedule, p, m)
    assert all(
        sorted((k, i) for k, i, *_ in stage) == sorted((k, i) for k in "BF" for i in range(m))
        for stage in spans
    )
    assert pp.bubble_of(spans) == pytest.approx((p - 1) / (m + p - 1))


def test_two_dimensions_equal_one_process(tmp_path):
    flags = ["--preset", "tiny", "--layers", "2", "--rows", "8", "--output_dir", str(tmp_path / "out")]
    metrics = parallel_2d.main(flags)["metrics"]
    for way in parallel_2d.WAYS:
        its = metrics[way]
        assert its["max_difference"] < 1e-12 and its["between_rows"] == 0.0
        assert its["row_bytes"] == its["row_formula"] and its["column_bytes"] == its["column_formula"]


def test_the_grid_has_no_option_called_model():
    """parse_settings 把 --model 当作模型文件夹：给了它就换成 full 预设，默认的 2 也算。"""
    assert not hasattr(parallel_2d.GridSettings(), "model")


def test_the_grid_by_hand():
    assert parallel_2d.make_grid(2, 3) == ([[0, 1, 2], [3, 4, 5]], [[0, 3], [1, 4], [2, 5]])


def test_make_model_and_batch_are_the_same_everywhere():
    sizes = Sizes(layers=1)
    before = torch.get_rng_state()
    a, b = make_model(sizes, 3), make_model(sizes, 3)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    rows = make_batch(2, 5, sizes.vocab, 1)
    assert rows.shape == (2, 6) and torch.equal(rows, make_batch(2, 5, sizes.vocab, 1))
    assert loss_sum(a, rows).dtype == torch.float64


@pytest.mark.parametrize(
    ("script", "flags", "said"),
    [
        (tp, ["--heads", "6", "--width", "36"], "--heads 6 分不匀给 4 个进程"),
        (tp, ["--vocab", "97", "--length", "15"], "--vocab 97、--length 15"),
        (tp, ["--width", "30"], "--width 30 要是 --heads 4 的倍数"),
        (tp, ["--num_processes", "1"], "--num_processes"),
        (pp, ["--layers", "6"], "分不匀给 4 段"),
        (pp, ["--micro_batches", "5"], "分不匀成 5 个小批"),
        (parallel_2d, ["--rows", "6"], "--data × --micro_batches"),
        (parallel_2d, ["--columns", "3"], "匀分给 --columns 3 份"),
    ],
)
def test_sizes_that_do_not_divide(script, flags, said):
    with pytest.raises(UserError, match=said):
        script.main(["--preset", "tiny", *flags])
