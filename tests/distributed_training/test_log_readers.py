"""log_readers.py：各家的日志读成一种样子；坏的、空的、写到一半的，说出文件与行。"""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from log_readers import read_log
from log_text import fields_of, name_of
from nlp_common.base.errors import UserError
from planted_runs import WRITERS, Run
from tensorboard_events import EventWriter


def fake_run(steps=30):
    """不必真训练：各项都知道的一次。"""
    points = [
        {
            "step": step,
            "loss": 3.0 / step,
            "grad_norm": 0.5 + step / 100,
            "learning_rate": 1e-3 / step,
            "tokens": 256 * step,
            "time": 1_700_000_000.0 + 0.5 * step,
        }
        for step in range(1, steps + 1)
    ]
    settings = {"max_grad_norm": 1.0, "logging_steps": 1, "started": 1_700_000_000.0, "seed": 0}
    return Run(None, 0, 1, points, settings, None)


@pytest.mark.parametrize("kind", list(WRITERS))
def test_every_format_gives_back_the_losses(kind, tmp_path):
    run = fake_run()
    log = read_log(WRITERS[kind](run, tmp_path))
    assert [point["step"] for point in log.points] == list(range(1, 31))
    assert [loss for _, loss in log.column("loss")] == pytest.approx(
        [point["loss"] for point in run.points], abs=1e-4
    )
    if kind != "run.json":
        assert log.column("learning_rate")[4][1] == pytest.approx(2e-4)
    if kind in ("trainer_state.json", "TensorBoard", "DeepSpeed"):
        assert log.column("grad_norm")[9][1] == pytest.approx(0.6, abs=1e-3)
    if kind in ("DeepSpeed", "text"):
        assert log.column("step_seconds")[3][1] == pytest.approx(0.5)
    assert not log.notes


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("step 10 | loss 2.31 | grad_norm 0.9 | lr 1e-3 | tokens/s 1234", {"step": 10, "loss": 2.31, "grad_norm": 0.9, "learning_rate": 1e-3, "tokens_per_s": 1234}),
        ("{'loss': 2.5, 'grad_norm': '1.25', 'learning_rate': 5e-05, 'epoch': 0.1}", {"loss": 2.5, "grad_norm": 1.25, "learning_rate": 5e-5}),
        ("iter 100: loss 1.2345, time 12.50ms, mfu 3.20%", {"step": 100, "loss": 1.2345, "step_seconds": 0.0125}),
        ("step 500: train loss 4.2, val loss 4.35", {"step": 500, "loss": 4.2, "eval_loss": 4.35}),
        (" iteration       10/    1000 | consumed samples:          640 | elapsed time per iteration (ms): 1250.0 | learning rate: 1.500E-04 | lm loss: 1.05E+01 | loss scale: 65536.0 | grad norm: 1.234 | number of skipped iterations:   1 |", {"step": 10, "step_seconds": 1.25, "learning_rate": 1.5e-4, "loss": 10.5, "grad_norm": 1.234, "skipped": 1}),
        ("[Rank 0] step=20, skipped=3, lr=[0.0001, 0.0002], mom=[(0.9, 0.999)]", {"step": 20, "skipped_total": 3, "learning_rate": 1e-4}),
        ("step 7 loss nan gnorm inf", {"step": 7, "loss": math.nan, "grad_norm": math.inf}),
        ("Step: 1,200 Loss: 0.5 (12.3k tok/s)", {"step": 1200, "loss": 0.5, "tokens_per_s": 12300}),
        ("aux loss 0.3 router z loss 0.1", {}),
        ("loading 64 shards took 3.5 s", {}),
        ("", {}),
    ],
)  # fmt: skip
def test_lines_of_text(line, wanted):
    found = fields_of(line)
    assert found == pytest.approx(wanted, nan_ok=True)


def test_moments():
    a = fields_of("[2024-03-01 12:00:00,500] [INFO] step=1, loss=2.0")["time"]
    b = fields_of("2024-03-01T12:00:02 INFO step 2 loss 1.0")["time"]
    c = fields_of("03/01/2024 12:00:03 - INFO - step 3 loss 1.0")["time"]
    assert (b - a, c - a) == pytest.approx((1.5, 2.5))


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("train/loss", "loss"),
        ("lm loss", "loss"),
        ("Train/Samples/lr", None),
        ("eval_loss", "eval_loss"),
        ("loss/val", "eval_loss"),
        ("train/grad_norm", "grad_norm"),
        ("global_step", "step"),
        ("num_input_tokens_seen", "tokens"),
        ("loss_scale", None),
        ("batch_hash", "batch"),
    ],
)
def test_names(name, wanted):
    assert name_of(name) == wanted


# ---------------------------------------------------------------- 坏的


def test_missing_and_empty(tmp_path):
    with pytest.raises(UserError, match=r"没有 .*nothing 这个文件或文件夹"):
        read_log(tmp_path / "nothing")
    for name in ("train.log", "run.json", "events.out.tfevents.1.x"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(UserError, match="是空的（0 字节）"):
            read_log(tmp_path / name)
    with pytest.raises(UserError, match="没有读得懂的日志"):
        read_log(tmp_path)
    (tmp_path / "dir").mkdir()
    with pytest.raises(UserError, match="没有找到训练日志"):
        read_log(tmp_path / "dir")


def test_half_written_json(tmp_path):
    path = tmp_path / "trainer_state.json"
    path.write_text('{\n "log_history": [\n  {"loss": 1.0, "step": 1},\n  {"loss": 0.', encoding="utf-8")
    with pytest.raises(UserError, match=r"trainer_state.json:4 第 \d+ 个字起读不下去：文件到这里就断了"):
        read_log(path)
    path.write_text('{"log_history": [\n {"loss": 1.0 "step": 1}]}', encoding="utf-8")
    with pytest.raises(UserError, match=r"trainer_state.json:2 第 \d+ 个字起读不下去"):
        read_log(path)
    path.write_text('{"weights": []}', encoding="utf-8")
    with pytest.raises(UserError, match="不是训练日志"):
        read_log(path)
    path.write_text('{"log_history": 3}', encoding="utf-8")
    with pytest.raises(UserError, match="应当是一个列表"):
        read_log(path)
    path.write_text('{"history": []}', encoding="utf-8")
    with pytest.raises(UserError, match="没有记下训练的过程"):
        read_log(path)


def test_half_written_jsonl(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [json.dumps({"step": i, "loss": 1 / i}) for i in range(1, 6)]
    rows[2] = rows[2][:7]
    path.write_text("\n".join([*rows, '{"step": 6, "lo']), encoding="utf-8")
    log = read_log(path)
    assert [point["step"] for point in log.points] == [1, 2, 4, 5]
    assert "metrics.jsonl:3 的 JSON 不完整（共 2 行：3、6）" in log.notes[0]


def test_wrong_values_and_columns(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("step,loss,grad_norm\n1,2.0,0.5\n2,坏,0.5\n3,1.0\n4,0.9,0.4\n", encoding="utf-8")
    log = read_log(path)
    assert log.column("loss") == [(1, 2.0), (4, 0.9)]
    assert "log.csv:2" not in "".join(log.notes) and "log.csv:3：loss 不是一个数" in log.notes[0]
    assert "log.csv:4 有 2 列，表头是 3 列" in log.notes[1]
    path.write_text("a,b\n1,2\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"log.csv:1 的表头里没有认得的列"):
        read_log(path)


def test_not_a_log(tmp_path):
    path = tmp_path / "x.log"
    path.write_bytes(b"\x7fELF\0\0\0\0" * 10)
    with pytest.raises(UserError, match="二进制"):
        read_log(path)
    path.write_text("hello\nworld 3\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"没有一条带损失.*第一行是：hello"):
        read_log(path)


def test_broken_events(tmp_path):
    writer = EventWriter(tmp_path, 1.0)
    for step in range(5):
        writer.add_scalar("loss", 1.0, step, float(step))
    writer.close()
    writer.path.write_bytes(writer.path.read_bytes()[:-3])
    log = read_log(tmp_path)
    assert len(log.points) == 4 and "第 6 条记录" in log.notes[0] and "只写了一半" in log.notes[0]


# ---------------------------------------------------------------- 其余的写法


def test_powershell_and_progress_bars(tmp_path):
    path = tmp_path / "ps.log"
    path.write_text("step 1 loss 2.0\nstep 2 loss 1.5\n", encoding="utf-16")
    assert len(read_log(path).points) == 2
    path.write_bytes(
        b"  0%|  | 0/2 [00:00<?]\r 50%|# | 1/2 [00:01]\r{'loss': 2.0, 'epoch': 0.5}\n{'loss': 1.0, 'epoch': 1.0}\n"
        b"{'train_runtime': 3.5, 'train_loss': 1.5, 'epoch': 1.0}\n"
    )
    log = read_log(path)
    assert log.column("loss") == [(1, 2.0), (2, 1.0)] and "没有写步数" in log.notes[0]


def test_colours_and_deepspeed_pairs_of_lines(tmp_path):
    path = tmp_path / "ds.log"
    path.write_text(
        "\x1b[32mstep=10, skipped=0, lr=[0.1]\x1b[0m\n{'loss': 2.0}\nOVERFLOW! Skipping step. loss scale: 4\nstep=20, skipped=1, lr=[0.1]\n{'loss': 1.0}\n",
        encoding="utf-8",
    )
    log = read_log(path)
    assert log.column("loss") == [(10, 2.0), (20, 1.0)] and log.facts["skipped"] == 1


def test_a_resumed_run_overrides_the_overlap(tmp_path):
    path = tmp_path / "x.log"
    path.write_text(
        "\n".join(f"step {s} loss {s}.5" for s in (1, 2, 3, 4, 5)) + "\nstep 3 loss 9\nstep 4 loss 8\n"
    )
    log = read_log(path)
    assert log.column("loss") == [(1, 1.5), (2, 2.5), (3, 9.0), (4, 8.0)]
    assert "第 6 行：步数从 5 回到 3" in log.notes[0]


def test_nested_json_and_wall_time(tmp_path):
    path = tmp_path / "wandb.jsonl"
    rows = [
        {"_step": s, "train": {"loss": 1.0, "global_step": s}, "timestamp": 1.7e9 + s} for s in range(1, 4)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    log = read_log(path)
    assert log.column("loss")[2] == (3, 1.0) and log.column("time")[1][1] == 1.7e9 + 2


def test_our_checkpoints(tmp_path):
    """还没有训练完的：读旁边的工作文件夹，取步数最大的；没有写完整的、权重有 NaN 的，都说。"""
    folder = tmp_path / ".sft.work" / "checkpoints"
    for step in (20, 100):
        each = folder / f"checkpoint-{step}"
        each.mkdir(parents=True)
        history = [{"step": s, "loss": 1.0} for s in range(10, step + 1, 10)]
        (each / "history.json").write_text(json.dumps(history))
        save_file(
            {"w": torch.tensor([1.0, math.nan if step == 100 else 0.0])}, str(each / "model.safetensors")
        )
    (folder / "checkpoint-100" / "complete.json").write_text('{"seconds": 3.5}')
    log = read_log(tmp_path / "sft")
    assert log.points[-1]["step"] == 100 and log.facts["train_seconds"] == 3.5
    assert log.facts["broken_weights"] == ["model.safetensors 的 w"]
    assert "checkpoint-20 没有 complete.json" in log.notes[0]


def test_the_richest_in_a_folder(tmp_path):
    run = fake_run()
    for kind, write in WRITERS.items():
        write(run, tmp_path / kind)
    (tmp_path / "坏.jsonl").write_text('{"a', encoding="utf-8")
    log = read_log(tmp_path)
    assert log.kind in ("TensorBoard", "DeepSpeed")
    assert any("还有" in note for note in log.notes) and any("坏.jsonl" in note for note in log.notes)
