"""把五种去处记下的点读回来：与训练时的逐点比。W&B、SwanLab 读的是本机的文件，还没有送上网的那一份。"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from nlp_common.train.track_to import mlflow_client, read_jsonl
from nlp_common.train.tracking import tracking_folder

Points = dict[tuple[int, str], float]  # (第几步, 名字) → 值

HEADER, BLOCK = 7, 32768
FULL, LAST = 1, 4


def read_jsonl_points(number: str) -> Points:
    rows = read_jsonl(tracking_folder() / "jsonl" / f"{number}.jsonl")
    return {(row["step"], name): value for row in rows if "step" in row for name, value in row.items()}


def read_tensorboard(number: str) -> Points:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tracking_folder() / "tensorboard" / number), size_guidance={"scalars": 0})
    events.Reload()
    return {(e.step, name): e.value for name in events.Tags()["scalars"] for e in events.Scalars(name)}


def read_mlflow(number: str) -> Points:
    client = mlflow_client()
    names = client.get_run(number).data.metrics
    return {(m.step, name): m.value for name in names for m in client.get_metric_history(number, name)}


def read_wandb(number: str) -> Points:
    """写文件的是它另开的一个程序，finish 回来的时候不一定写完了：等到看见 exit 那一条。"""
    from wandb.proto import wandb_internal_pb2

    paths = sorted((tracking_folder() / "wandb").glob(f"offline-run-*-{number}/*.wandb"))  # 中断过的有几个
    for _ in range(50):
        found: Points = {}
        kind = ""
        for data in (data for path in paths for data in log_records(path)):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            kind = record.WhichOneof("record_type")
            if kind == "history":
                items = record.history.item
                row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
                found |= {(row["step"], name): value for name, value in row.items() if "step" in row}
        if kind == "exit":
            break
        time.sleep(0.2)
    return found


def read_swanlab(number: str) -> Points:
    from swanlab.proto.swanlab.record.v1 import record_pb2

    [path] = (tracking_folder() / "swanlab").glob(f"run-*-{number}/*.swanlab")
    found: Points = {}
    for data in log_records(path):
        record = record_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "scalar":
            found[record.scalar.step, record.scalar.key] = record.scalar.value.number
    return found


def log_records(path: Path) -> Iterator[bytes]:
    """LevelDB 的日志格式，W&B 与 SwanLab 都用它：32 KB 一块，一条记录一个头（校验、长度、第几段），跨块的分几段。

    写到一半被杀了，末尾不完整的一条不要。
    """
    data, place, parts = path.read_bytes(), HEADER, []
    while place + HEADER <= len(data):
        left = BLOCK - place % BLOCK
        if left < HEADER:  # 一块的末尾放不下一个头：补的是 0
            place += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, place)
        part = data[place + HEADER : place + HEADER + size]
        if len(part) < size:
            return
        parts.append(part)
        place += HEADER + size
        if kind in (FULL, LAST):
            yield b"".join(parts)
            parts = []


READERS: dict[str, Callable[[str], Points]] = {
    "jsonl": read_jsonl_points,
    "tensorboard": read_tensorboard,
    "mlflow": read_mlflow,
    "wandb": read_wandb,
    "swanlab": read_swanlab,
}
