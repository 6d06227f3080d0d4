"""GGUF 第 3 版的写与读：llama.cpp、Ollama 的模型文件，权重、分词器、对话模板都在一个文件里。

    "GGUF"   版本 uint32   有几个张量 uint64   有几项元数据 uint64
    每项元数据：  键   值的类型 uint32   值
    每个张量：    名字   几维 uint32   各维 uint64（次序与 PyTorch 相反，相邻的在前）   存法 uint32   从数据区的第几个字节开始 uint64
    填充，到 32 的倍数；数据区：各张量的字节，每个都从 32 的倍数开始

全部小端。键、名字、文字是 uint64 的字节数加 UTF-8；数组是元素的类型 uint32、个数 uint64、各个元素。
数据区对齐到 32，是为了让 llama.cpp 把文件直接映射进内存，不复制就能用。
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nlp_common.base.errors import UserError

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
# 值的类型：编号、struct 的写法；文字与数组另写
NUMBERS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
UINT32, INT32, FLOAT32, BOOL, TEXT, ARRAY = 4, 5, 6, 7, 8, 9
# 张量的存法：名字 → 编号，一块几个数，一块几个字节
KINDS = {"f32": (0, 1, 4), "f16": (1, 1, 2), "q4_0": (2, 32, 18), "q8_0": (8, 32, 34)}


@dataclass(frozen=True)
class TensorInfo:
    """一个张量：名字，形状（PyTorch 的次序），存法，从数据区的第几个字节开始。"""

    name: str
    shape: tuple[int, ...]
    kind: str
    offset: int = 0

    @property
    def n_bytes(self) -> int:
        _, block, size = KINDS[self.kind]
        return int(np.prod(self.shape)) // block * size


@dataclass(frozen=True)
class GGUF:
    """读出来的文件：元数据，各个张量，数据区从文件的第几个字节开始。"""

    path: Path
    metadata: dict
    tensors: dict[str, TensorInfo]
    start: int

    def raw(self, name: str) -> np.ndarray:
        """一个张量的字节，(字节数,)。"""
        info = self.tensors[name]
        return np.fromfile(self.path, np.uint8, info.n_bytes, offset=self.start + info.offset)


# ---------------------------------------------------------------- 写


def write_gguf(path: Path, metadata: dict, infos: list[TensorInfo], data: Iterable[np.ndarray]) -> None:
    """写一个文件；data 依次给出各张量的字节（uint8），用到一个才算一个，大模型不必全在内存里。"""
    infos = place(infos)
    with path.open("wb") as file:
        file.write(MAGIC + struct.pack("<IQQ", VERSION, len(infos), len(metadata)))
        for key, value in metadata.items():
            file.write(_text(key) + _value(value))
        for info in infos:
            dims = info.shape[::-1]
            file.write(_text(info.name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims))
            file.write(struct.pack("<IQ", KINDS[info.kind][0], info.offset))
        file.write(bytes(-file.tell() % ALIGNMENT))
        for info, array in zip(infos, data, strict=True):
            assert array.nbytes == info.n_bytes, (info, array.nbytes)
            file.write(np.ascontiguousarray(array).data)
            file.write(bytes(-info.n_bytes % ALIGNMENT))
        file.flush()
        os.fsync(file.fileno())  # 磁盘满了，在这里就说


def place(infos: list[TensorInfo]) -> list[TensorInfo]:
    """定下每个张量从数据区的第几个字节开始。"""
    placed, offset = [], 0
    for info in infos:
        placed.append(TensorInfo(info.name, info.shape, info.kind, offset))
        offset += info.n_bytes + -info.n_bytes % ALIGNMENT
    return placed


def _text(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _value(value) -> bytes:
    """类型与值：bool、int（uint32）、float（float32）、str，或它们的列表（整数的列表是 int32）。"""
    if isinstance(value, list):
        kind = INT32 if isinstance(value[0], int) else _kind(value[0])
        return struct.pack("<IIQ", ARRAY, kind, len(value)) + b"".join(_plain(kind, each) for each in value)
    return struct.pack("<I", _kind(value)) + _plain(_kind(value), value)


def _kind(value) -> int:
    for python, kind in ((bool, BOOL), (int, UINT32), (float, FLOAT32), (str, TEXT)):  # bool 也是 int，先看
        if isinstance(value, python):
            return kind
    raise TypeError(type(value))


def _plain(kind: int, value) -> bytes:
    return _text(value) if kind == TEXT else struct.pack("<" + NUMBERS[kind], value)


# ---------------------------------------------------------------- 读


class _Reader:
    """一边读一边往后走；读过了头是 UserError：文件只有半个。"""

    def __init__(self, path: Path):
        self.path, self.at, self.bytes = path, 0, np.memmap(path, np.uint8, "r")

    def take(self, n: int) -> bytes:
        if n > len(self.bytes) - self.at:
            raise UserError(
                f"{self.path} 不完整：到第 {len(self.bytes):,} 个字节就没有了，请重新复制或导出一遍。"
            )
        self.at += n
        return self.bytes[self.at - n : self.at].tobytes()

    def numbers(self, form: str) -> tuple:
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))

    def text(self) -> str:
        return self.take(self.numbers("Q")[0]).decode("utf-8")

    def value(self, kind: int):
        if kind == TEXT:
            return self.text()
        if kind == ARRAY:
            kind, n = self.numbers("IQ")
            if kind in NUMBERS:
                return list(self.numbers(f"{n}{NUMBERS[kind]}"))
            return [self.value(kind) for _ in range(n)]
        if kind not in NUMBERS:
            raise UserError(f"{self.path} 的第 {self.at:,} 个字节：没有编号是 {kind} 的类型，文件坏了。")
        return self.numbers(NUMBERS[kind])[0]


def read_gguf(path: str | Path) -> GGUF:
    """读文件头（元数据与张量的位置），权重要用时才读。不是 GGUF、只有半个、别的存法，都是 UserError。"""
    path = Path(path)
    if not path.is_file() or path.stat().st_size == 0:
        raise UserError(f"没有 {path} 这个文件，或它是空的。")
    reader = _Reader(path)
    if reader.take(4) != MAGIC:
        raise UserError(f"{path} 不是 GGUF：开头的四个字节不是 GGUF。")
    version, n_tensors, n_metadata = reader.numbers("IQQ")
    if version != VERSION:
        raise UserError(f"{path} 是 GGUF 第 {version} 版，这里只读第 {VERSION} 版。")
    metadata = {}
    for _ in range(n_metadata):
        key = reader.text()
        metadata[key] = reader.value(reader.numbers("I")[0])
    tensors, kinds = {}, {number: name for name, (number, _, _) in KINDS.items()}
    for _ in range(n_tensors):
        name, (n_dims,) = reader.text(), reader.numbers("I")
        shape = reader.numbers(f"{n_dims}Q")[::-1]
        kind, offset = reader.numbers("IQ")
        if kind not in kinds:
            raise UserError(f"{path} 的 {name} 是第 {kind} 种存法，这里只会 {'、'.join(KINDS)}。")
        tensors[name] = TensorInfo(name, shape, kinds[kind], offset)
    alignment = metadata.get("general.alignment", ALIGNMENT)
    start = reader.at + -reader.at % alignment
    end = max((start + info.offset + info.n_bytes for info in tensors.values()), default=start)
    if end > path.stat().st_size:
        raise UserError(
            f"{path} 不完整：应当有 {end:,} 个字节，只有 {path.stat().st_size:,} 个。请重新导出。"
        )
    return GGUF(path, metadata, tensors, start)
