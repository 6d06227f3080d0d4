"""tensorboard_events.py：写的 TensorBoard 读得出，TensorBoard 写的读得出；断在哪个字节都说得清。"""

import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorboard_events import BrokenRecord, EventWriter, crc32c, read_scalars

floats = st.floats(width=32, allow_nan=False)


def write(folder, scalars):
    writer = EventWriter(folder, 1000.0)
    for tag, value, step, moment in scalars:
        writer.add_scalar(tag, value, step, moment)
    writer.close()
    return writer.path


def test_the_checksum_of_the_standard():
    assert crc32c(b"123456789") == 0xE3069283  # RFC 3720 附录 B.4 一类的标准值
    assert crc32c(bytes(32)) == 0x8A9136AA


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.text(min_size=1, max_size=20), floats, st.integers(-(2**62), 2**62), st.floats(0, 1e10)),
        max_size=6,
    )
)
def test_what_is_written_is_read(tmp_path_factory, scalars):
    path = write(tmp_path_factory.mktemp("events"), scalars)
    wanted = [(moment, step, tag, value) for tag, value, step, moment in scalars]
    assert list(read_scalars(path)) == wanted


def test_cut_anywhere(tmp_path):
    path = write(tmp_path, [("loss", 1.0, 1, 1.0), ("loss", 2.0, 2, 2.0)])
    data = path.read_bytes()
    counts = []
    for size in range(1, len(data)):
        path.write_bytes(data[:size])
        found = []
        try:
            for scalar in read_scalars(path):
                found.append(scalar)
        except BrokenRecord as error:
            assert "只写了一半" in str(error)
        assert found == [(1.0, 1, "loss", 1.0)][: len(found)]
        counts.append(len(found))
    assert counts == sorted(counts) and set(counts) == {0, 1}
    path.write_bytes(data[:-1])
    with pytest.raises(BrokenRecord, match=r"第 3 条记录（第 .* 字节起）只写了一半"):
        list(read_scalars(path))


def test_a_flipped_byte(tmp_path):
    path = write(tmp_path, [("loss", 1.0, 1, 1.0)])
    data = bytearray(path.read_bytes())
    data[-6] ^= 1
    path.write_bytes(data)
    with pytest.raises(BrokenRecord, match="内容与校验和对不上"):
        list(read_scalars(path))
    path.write_bytes(b"not an event file at all")
    with pytest.raises(BrokenRecord, match=r"第 1 条.*不是事件文件"):
        list(read_scalars(path))


def test_nan_and_infinity(tmp_path):
    found = list(read_scalars(write(tmp_path, [("a", math.nan, 1, 0.0), ("a", math.inf, 2, 0.0)])))
    assert math.isnan(found[0][3]) and found[1][3] == math.inf


def test_a_scalar_as_a_tensor(tmp_path):
    """TensorFlow 2 把标量写成一个数的张量。"""
    from tensorboard_events import _bytes, _key, _scalar

    tensor = _key(1, 0) + b"\x01" + _bytes(4, struct.pack("<f", 2.5))
    assert _scalar(_bytes(1, b"loss") + _bytes(8, tensor)) == ("loss", 2.5)
    assert _scalar(_bytes(1, b"image") + _bytes(4, b"png")) == ("image", None)


def test_the_same_as_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason="没有装 tensorboard，不与它比")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    path = write(tmp_path / "ours", [("train/loss", 3 - i / 7, i, 1000.0 + i) for i in range(50)])
    theirs = EventAccumulator(str(path.parent))
    theirs.Reload()
    read = [(event.wall_time, event.step, event.value) for event in theirs.Scalars("train/loss")]
    assert read == [(moment, step, value) for moment, step, _, value in read_scalars(path)]

    writer = SummaryWriter(str(tmp_path / "theirs"))
    for i in range(50):
        writer.add_scalar("loss", 1 / (i + 1), i, walltime=5.0 + i)
        writer.add_scalar("big", 1.0, i, new_style=True)
    writer.add_histogram("weights", torch.arange(8.0), 0)
    writer.close()
    found = list(read_scalars(next((tmp_path / "theirs").iterdir())))
    losses = [(moment, step, value) for moment, step, tag, value in found if tag == "loss"]
    assert losses == [(5.0 + i, i, struct.unpack("f", struct.pack("f", 1 / (i + 1)))[0]) for i in range(50)]
    assert sum(tag == "big" for _, _, tag, _ in found) == 50
