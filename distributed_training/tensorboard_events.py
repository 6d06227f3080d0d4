"""TensorBoard 的事件文件，不装 tensorboard 也能写、能读：文件是一条接一条的记录，记录里是 protobuf。

一条记录（TFRecord）：长度 8 字节 + 长度的校验和 4 字节 + 内容 + 内容的校验和 4 字节，都是小端。
内容（Event）：1 号字段是时刻（double），2 号是步数（varint），5 号是几个"名字—数"（Summary）。
这里只管标量：直方图、图片跳过不读。
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from pathlib import Path

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # protobuf 的线上类型：一个字段的数怎样写
FLOAT, DOUBLE = 1, 2  # TensorProto 里 dtype 的编号
CHECKED_BYTES = 1 << 16  # 比它长的（图片、直方图）不核对内容：纯 Python 算校验和，一秒只有几 MB


# ---------------------------------------------------------------- 写


class EventWriter:
    """往一个新的事件文件里写标量；TensorBoard 打开它所在的文件夹就看得见。"""

    def __init__(self, folder: Path, started: float | None = None):
        folder.mkdir(parents=True, exist_ok=True)
        started = time.time() if started is None else started
        self.path = folder / f"events.out.tfevents.{int(started)}.nlp-learning.0"
        self.file = self.path.open("wb")
        self._write(_double(1, started) + _bytes(3, b"brain.Event:2"))

    def add_scalar(self, tag: str, value: float, step: int, wall_time: float | None = None) -> None:
        moment = time.time() if wall_time is None else wall_time
        pair = _bytes(1, tag.encode()) + _key(2, FIXED32) + struct.pack("<f", value)  # Summary.Value
        self._write(_double(1, moment) + _key(2, VARINT) + _varint(step) + _bytes(5, _bytes(1, pair)))

    def _write(self, event: bytes) -> None:
        length = struct.pack("<Q", len(event))
        self.file.write(length + _checksum(length) + event + _checksum(event))

    def close(self) -> None:
        self.file.close()


def _key(field: int, kind: int) -> bytes:
    return _varint(field << 3 | kind)


def _double(field: int, value: float) -> bytes:
    return _key(field, FIXED64) + struct.pack("<d", value)


def _bytes(field: int, value: bytes) -> bytes:
    return _key(field, BYTES) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    """七位一组，从低到高；还有下一组，最高位就是 1。"""
    value &= (1 << 64) - 1  # 负数按补码
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


# ---------------------------------------------------------------- 读


class BrokenRecord(Exception):
    """这一条起读不下去；前面的都是好的。"""


def read_scalars(path: Path) -> Iterator[tuple[float, int, str, float]]:
    """一个文件里的标量，一个一个给：``(时刻, 步数, 名字, 数)``；写到一半的、坏的，读到那里抛 BrokenRecord。"""
    for place, event in _records(path):
        try:
            wall_time, step, summary = 0.0, 0, b""
            for field, value in _fields(event):
                if field == 1:
                    wall_time = struct.unpack("<d", value)[0]
                elif field == 2:
                    step = _signed(value)
                elif field == 5:
                    summary += value
            scalars = [_scalar(value) for field, value in _fields(summary) if field == 1]
        except (IndexError, struct.error, UnicodeDecodeError, TypeError, ValueError) as error:
            raise BrokenRecord(f"{place}的内容读不懂（{error}）") from None
        for tag, number in scalars:
            if number is not None:
                yield wall_time, step, tag, number


def _records(path: Path) -> Iterator[tuple[str, bytes]]:
    """一条条记录的 ``(它在哪里, 内容)``。"""
    with path.open("rb") as file:
        number = 0
        while True:
            number += 1
            place = f"第 {number} 条记录（第 {file.tell()} 字节起）"
            head = file.read(12)
            if not head:
                return
            if len(head) < 12:
                raise BrokenRecord(f"{place}只写了一半")
            if _checksum(head[:8]) != head[8:]:
                raise BrokenRecord(f"{place}的长度与校验和对不上，不是事件文件或者坏了")
            length = struct.unpack("<Q", head[:8])[0]
            event, check = file.read(length), file.read(4)
            if len(event) < length or len(check) < 4:
                raise BrokenRecord(f"{place}只写了一半")
            if length <= CHECKED_BYTES and _checksum(event) != check:
                raise BrokenRecord(f"{place}的内容与校验和对不上")
            yield place, event


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """protobuf 的一段：``(字段号, varint 的数 或 别的类型的字节)``。"""
    at = 0
    while at < len(data):
        key, at = _read_varint(data, at)
        field, kind = key >> 3, key & 7
        if kind == VARINT:
            value, at = _read_varint(data, at)
            yield field, value
            continue
        if kind == BYTES:
            size, at = _read_varint(data, at)
        elif kind in (FIXED64, FIXED32):
            size = 8 if kind == FIXED64 else 4
        else:
            raise ValueError(f"没有 {kind} 这种线上类型")
        if at + size > len(data):
            raise ValueError("字段比记录长")
        yield field, data[at : at + size]
        at += size


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value, shift = 0, 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _scalar(data: bytes) -> tuple[str, float | None]:
    """Summary.Value → (名字, 数)；不是标量的，数是 None。torch 写在 simple_value 里，TensorFlow 2 写成一个数的张量。"""
    tag, number = "", None
    for field, value in _fields(data):
        if field == 1:
            tag = value.decode("utf-8")
        elif field == 2:
            number = struct.unpack("<f", value)[0]
        elif field == 8:
            number = _one_number(value)
    return tag, number


def _one_number(tensor: bytes) -> float | None:
    """TensorProto 里若只有一个浮点数，就是它。"""
    kind, content = 0, b""
    for field, value in _fields(tensor):
        if field == 1:
            kind = value
        elif field in (4, 5, 6):  # 原始的字节，float 的列表，double 的列表
            content = value
    if kind == FLOAT and len(content) == 4:
        return struct.unpack("<f", content)[0]
    if kind == DOUBLE and len(content) == 8:
        return struct.unpack("<d", content)[0]
    return None


# ---------------------------------------------------------------- 校验和：CRC-32C，再转一转


def _table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


TABLE = _table()


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def _checksum(data: bytes) -> bytes:
    """TFRecord 的校验和：CRC-32C 循环右移 15 位再加一个常数（校验和里若又有校验和，不至于凑巧）。"""
    crc = crc32c(data)
    rotated = (crc >> 15 | crc << 17) & 0xFFFFFFFF
    return struct.pack("<I", (rotated + 0xA282EAD8) & 0xFFFFFFFF)
