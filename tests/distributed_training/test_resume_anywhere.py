"""resume_anywhere.py：4 个进程被杀掉、2 个接着，损失一样；1 个、3 个接着也一样；写到一半的检查点不算；说错的话。"""

import pytest
import torch

import resume_anywhere as script
from nlp_common.base.errors import UserError

TINY = ["--preset", "tiny", "--n_steps", "6", "--kill_at", "4", "--save_every", "2"]


def test_killed_with_four_resumed_with_two(tmp_path, capsys):
    argv = [*TINY, "--output_dir", str(tmp_path / "out")]
    metrics = script.main(argv)["metrics"]
    assert metrics["max_difference"] < 1e-12 and metrics["max_difference_before"] < 1e-12
    assert metrics["resumed_from"] == 2 and metrics["files"] == 4
    assert metrics["loss_last"] < metrics["loss_first"]
    shown = capsys.readouterr().out
    assert "SIGKILL" in shown or "SIGTERM" in shown
    assert "<svg" in (tmp_path / "out" / "resume.svg").read_text(encoding="utf-8")
    assert not list(tmp_path.glob(".*.work"))
    assert script.main(argv)["metrics"] == metrics
    assert "直接加载" in capsys.readouterr().out


@pytest.mark.slow
def test_any_number_of_processes_reads_it(tmp_path):
    """3 个进程写的，1 个、4 个、2 个进程读：接着的损失都与一口气的相等。"""
    argv = [*TINY, "--first", "3", "--output_dir", str(tmp_path / "out")]
    settings = script.parse_settings(script.ResumeSettings, script.PRESETS, argv)
    whole = script.train(1, settings, None)
    for then in (1, 4, 2):
        folder = tmp_path / f"then{then}"
        folder.mkdir()
        script.killed(settings, folder)
        settings.then = then
        after = script.train(then, settings, folder)
        assert after == pytest.approx(whole[2:], abs=1e-12)


def test_half_a_checkpoint_does_not_count(tmp_path):
    assert script.newest(tmp_path) is None
    for name in ("step-3", "step-12", "step-15.part"):
        (tmp_path / name).mkdir()
    assert script.newest(tmp_path) == (12, tmp_path / "step-12")


def test_the_checkpoint_knows_tensors_not_ranks(tmp_path):
    """同一份状态，1 个进程存、读回：参数、Adam 的两份状态、步数都在。"""
    import torch.distributed as dist

    if dist.is_initialized():
        pytest.skip("别的测试占着进程组")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = script.make_model(script.Sizes(), 0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        rows = script.make_batch(2, 8, 96)
        script.loss_sum(model, rows).backward()
        optimizer.step()
        script.save(tmp_path / "step-1", model, optimizer, 1)
        again = script.make_model(script.Sizes(), 1)
        other = torch.optim.AdamW(again.parameters(), lr=1e-2)
        assert script.load(tmp_path / "step-1", again, other) == 1
        for a, b in zip(model.parameters(), again.parameters(), strict=True):
            assert torch.equal(a, b)
            for name in ("exp_avg", "exp_avg_sq", "step"):
                assert torch.equal(optimizer.state[a][name], other.state[b][name])
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--then", "5"], "12 行不能平分给 5 个进程：--then"),
        (["--first", "0"], "--first"),
        (["--kill_at", "2"], "还没有存过检查点"),
        (["--kill_at", "7"], "训练完了才杀"),
        (["--port", "70000"], "--port"),
    ],
)
def test_impossible_numbers_are_said(argv, said, tmp_path):
    with pytest.raises(UserError, match=said):
        script.main([*TINY, "--output_dir", str(tmp_path / "out"), *argv])
