"""各家的训练日志 → 一种样子：一步一个字典。缺什么就缺着，不猜；坏了的地方说出文件与行。

认得的：我们的 run.json 与检查点、transformers 的 trainer_state.json、TensorBoard 的事件文件、
DeepSpeed / Megatron 的日志、自己 print 的文字、jsonl、csv。一步里可能有的：

    step, loss, eval_loss, grad_norm（裁剪之前的）, learning_rate, time（秒，从哪里起算都行）,
    step_seconds（这一步用了几秒）, tokens（到这一步为止一共几个）, tokens_per_s, batch（这一批数据的编号）,
    where（第几行）
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from log_text import clean, fields_of, name_of
from nlp_common.base.errors import UserError
from nlp_common.base.runs import CHECKPOINT_DONE, RUN_FILE
from nlp_common.data.encodings import BOM, raw_lines
from tensorboard_events import BrokenRecord, read_scalars

STATE, EVENTS = "trainer_state.json", "events.out.tfevents."
TEXTS = (".log", ".txt", ".out", ".jsonl", ".csv", ".tsv")
MOST_FILES = 300
KNOWN = (
    "run.json、trainer_state.json、TensorBoard 的 events.out.tfevents.*、*.jsonl、*.csv，"
    "或一行里有 step 与 loss 的文字"
)


@dataclass
class TrainingLog:
    path: Path
    kind: str
    points: list[dict]
    facts: dict = field(default_factory=dict)  # 不是一步一个的：max_grad_norm、train_seconds、skipped …
    notes: list[str] = field(default_factory=list)  # 读的时候跳过了什么、推断了什么

    def column(self, name: str) -> list[tuple[int, float]]:
        """有这一项的各步：[(步, 数)]。"""
        return [(point["step"], point[name]) for point in self.points if name in point]


def read_log(path: Path) -> TrainingLog:
    """一个文件，或一个文件夹里记得最全的那一份。"""
    if path.is_dir():
        return _read_folder(path)
    unfinished = path.with_name(f".{path.name}.work")  # 还没有训练完的，检查点在旁边的工作文件夹里
    if not path.exists() and unfinished.is_dir():
        return _read_folder(unfinished)
    if not path.exists():
        raise UserError(f"没有 {path} 这个文件或文件夹。")
    return _read_file(path)


def _read_folder(folder: Path) -> TrainingLog:
    """里面（连同下面几层）每一份都读，留下项最多的；别的、读不了的，记在 notes 里。"""
    found, broken = [], []
    for path in _candidates(folder):
        try:
            found.append(_read_file(path))
        except UserError as error:
            broken.append(str(error))
    if not found:
        if broken:
            raise UserError(f"{folder} 里没有读得懂的日志：\n  " + "\n  ".join(broken[:5]))
        raise UserError(f"{folder} 里没有找到训练日志。认得的有：{KNOWN}。")
    best = max(found, key=_richness)
    others = [log.path.relative_to(folder).as_posix() for log in found if log is not best]
    if others:
        shown = "、".join(others[:4]) + ("等" if len(others) > 4 else "")
        best.notes.append(f"{folder.name} 里还有 {shown}，没有看：要看哪一份，--log 就写到那一份。")
    best.notes += broken[:3]
    return best


def _richness(log: TrainingLog) -> tuple:
    names = {name for point in log.points for name in point if name != "where"}
    return len(names), len(log.points), log.path.stat().st_mtime


def _candidates(folder: Path) -> list[Path]:
    """同一个文件夹里的几个事件文件是一次训练的，只列一个；几个检查点里的 trainer_state.json 只要步数最大的。"""
    found: list[Path] = []
    events: set[Path] = set()
    states: list[Path] = []
    histories: list[Path] = []
    for path in sorted(folder.rglob("*"))[:100_000]:
        if not path.is_file() or len(found) >= MOST_FILES:
            continue
        if path.name == STATE:
            states.append(path)
        elif path.name == "history.json" and path.parent.name.startswith("checkpoint-"):
            histories.append(path)
        elif path.name.startswith(EVENTS) and path.parent not in events:
            events.add(path.parent)
            found.append(path)
        elif path.name == RUN_FILE or path.suffix.lower() in TEXTS:
            found.append(path)
    for group in (states, histories):
        if group:
            found.append(max(group, key=lambda path: (_number(path.parent.name), path.stat().st_mtime)))
    return found


def _number(name: str) -> int:
    digits = re.search(r"(\d+)$", name)
    return int(digits[1]) if digits else 10**12  # 不在检查点里的，是训练完写的


def _read_file(path: Path) -> TrainingLog:
    if path.stat().st_size == 0:
        raise UserError(f"{path} 是空的（0 字节）：训练还没有写，或写日志的进程先被杀了。")
    if path.name.startswith(EVENTS):
        return _read_events(path)
    if path.suffix.lower() == ".json":
        return _read_json(path)
    if path.suffix.lower() in (".csv", ".tsv"):
        return _read_csv(path)
    return _read_text(path)


# ---------------------------------------------------------------- JSON：我们的、Trainer 的


def _read_json(path: Path) -> TrainingLog:
    text = path.read_bytes().decode("utf-8", errors="replace").lstrip(BOM)
    try:
        value = json.loads(text)
    except ValueError as error:
        line, column = getattr(error, "lineno", 1), getattr(error, "colno", 1)
        ended = getattr(error, "pos", 0) >= len(text.rstrip()) - 1 or "Unterminated" in str(error)
        why = (
            "文件到这里就断了，多半是写到一半被杀了或磁盘满了" if ended else getattr(error, "msg", str(error))
        )
        raise UserError(f"{path}:{line} 第 {column} 个字起读不下去：{why}。") from None
    rows, facts, kind = value, {}, "json"
    if isinstance(value, dict) and "log_history" in value:
        rows, kind = value["log_history"], STATE
        facts = {"logging_steps": value.get("logging_steps"), "total_flos": value.get("total_flos")}
    elif isinstance(value, dict) and "history" in value:
        rows, kind = value["history"], RUN_FILE
        metrics = value.get("metrics") if isinstance(value.get("metrics"), dict) else {}
        settings = value.get("settings") if isinstance(value.get("settings"), dict) else {}
        facts = {name: settings.get(name) for name in ("max_grad_norm", "logging_steps")}
        facts |= {name: metrics.get(name) for name in ("train_seconds", "train_tokens_per_s")}
        if not rows:
            raise UserError(f"{path} 的 history 是空的：这一课没有记下训练的过程（有的课没有训练循环）。")
    elif isinstance(value, dict):
        raise UserError(
            f"{path} 里既没有 history（我们的 run.json）也没有 log_history（transformers 的 {STATE}）：不是训练日志。"
        )
    if not isinstance(rows, list):
        raise UserError(f"{path} 的历史应当是一个列表，给的是 {type(rows).__name__}。")
    log = TrainingLog(path, kind, [], {name: number for name, number in facts.items() if number is not None})
    entries = []
    for index, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            log.notes.append(f"{path} 的第 {index} 条历史不是一个字典，跳过了。")
            continue
        if "train_runtime" in row:  # 训练完写的总结，train_loss 是全程的平均，不是一步
            log.facts["train_seconds"] = row["train_runtime"]
            continue
        entries.append((f"第 {index} 条", _fields_of_row(row, log, f"{path} 的第 {index} 条")))
    if path.name == "history.json":
        _look_at_checkpoint(path.parent, log)
    return _whole(log, entries)


def _fields_of_row(row: dict, log: TrainingLog, where: str) -> dict:
    """一个字典里认得的各项；套着的字典（wandb 的导出等）拉平成 a/b。不是数的说出来。"""
    found: dict = {}
    for key, value in _flat(row):
        name = name_of(key)
        if name is None or value is None or name in found:
            continue
        if name == "batch":
            found[name] = str(value)
            continue
        try:
            found[name] = float(value)
        except (TypeError, ValueError):
            moment = _moment(value)
            if name == "time" and moment is not None:
                found[name] = moment
            elif str(value).strip():
                log.notes.append(f"{where}：{key} 不是一个数（{str(value)[:30]!r}），这一项没有用。")
    if found.get("step_seconds", 0) > 1e9:  # 叫 time，其实是时刻
        found["time"] = found.pop("step_seconds")
    return found


def _flat(row: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in row.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _moment(value: object) -> float | None:
    try:
        return datetime.fromisoformat(str(value).strip()).timestamp()
    except ValueError:
        return None


def _look_at_checkpoint(folder: Path, log: TrainingLog) -> None:
    """检查点写完整了没有；权重里有没有 NaN。"""
    log.kind = "检查点"
    for each in sorted(folder.parent.glob("checkpoint-*")):
        if not (each / CHECKPOINT_DONE).exists():
            log.notes.append(f"{each.name} 没有 {CHECKPOINT_DONE}：写到一半就停了，不能接着它训练。")
    done = folder / CHECKPOINT_DONE
    if done.exists():
        log.facts["train_seconds"] = json.loads(done.read_text(encoding="utf-8")).get("seconds")
    bad = broken_weights(folder)
    if bad:
        log.facts["broken_weights"] = bad


def broken_weights(folder: Path) -> list[str]:
    """文件夹里的 safetensors，哪些张量不全是有限的数（或文件打不开）。"""
    from safetensors import SafetensorError, safe_open

    bad = []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(str(path), "pt") as file:
                for name in file.keys():  # noqa: SIM118 （它不是字典）
                    tensor = file.get_tensor(name)
                    if tensor.is_floating_point() and not tensor.isfinite().all():
                        bad.append(f"{path.name} 的 {name}")
        except (OSError, SafetensorError) as error:
            bad.append(f"{path.name}（打不开：{error}）")
    return bad


# ---------------------------------------------------------------- TensorBoard


def _read_events(path: Path) -> TrainingLog:
    """它所在的文件夹里的全部事件文件：接着训练时会另开一个。"""
    log = TrainingLog(path, "TensorBoard", [])
    by_step: dict[int, dict] = {}
    for each in sorted(path.parent.glob(f"{EVENTS}*")):
        try:
            for wall_time, step, tag, number in read_scalars(each):
                if name := name_of(tag):
                    point = by_step.setdefault(step, {"time": wall_time})
                    point[name] = number
                    if name == "loss":
                        point["time"] = wall_time
        except BrokenRecord as error:
            log.notes.append(f"{each}：{error}；它前面的照用。")
    entries = [(f"第 {step} 步", {"step": step, **fields}) for step, fields in sorted(by_step.items())]
    return _whole(log, entries)


# ---------------------------------------------------------------- 文字、jsonl、csv


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(行号, 一行)。进度条用 \\r 在一行里改写，拆开；PowerShell 的 > 写的是 UTF-16，也读。"""
    with path.open("rb") as file:
        head = file.read(4096)
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        lines = enumerate(path.read_text(encoding="utf-16", errors="replace").splitlines(), 1)
    elif b"\0" in head:
        raise UserError(f"{path} 是二进制文件，不是文字的日志。认得的有：{KNOWN}。")
    else:
        lines = ((n, line.decode("utf-8", errors="replace")) for n, line in enumerate(raw_lines(path), 1))
    for number, line in lines:
        for part in line.lstrip(BOM).rstrip("\r\n").split("\r"):
            if part.strip():
                yield number, part


def _read_text(path: Path) -> TrainingLog:
    log = TrainingLog(path, "text", [], {"overflows": 0})
    entries, first, bad, n_json = [], "", [], 0
    for number, line in _lines(path):
        first = first or line
        if "OVERFLOW" in line:  # DeepSpeed 的 fp16 溢出，这一步不更新
            log.facts["overflows"] += 1
        if line.lstrip().startswith('{"'):
            try:
                row = json.loads(line)
                n_json += 1
                entries.append((f"第 {number} 行", _fields_of_row(row, log, f"{path}:{number}")))
            except ValueError:
                bad.append(number)
        elif "train_runtime" not in line:  # transformers 训练完的总结，不是一步
            entries.append((f"第 {number} 行", fields_of(clean(line))))
    if n_json:
        log.kind = "jsonl"
    elif any("deepspeed" in str(path.name).lower() or "log_dist" in line for line in (first,)):
        log.kind = "DeepSpeed"
    if bad:
        shown = "、".join(map(str, bad[:5])) + (" 等" if len(bad) > 5 else "")
        log.notes.append(f"{path}:{bad[0]} 的 JSON 不完整（共 {len(bad)} 行：{shown}），跳过了。")
    return _whole(log, entries, first)


def _read_csv(path: Path) -> TrainingLog:
    log = TrainingLog(path, "csv", [])
    numbered = list(_lines(path))
    delimiter = "\t" if "\t" in numbered[0][1] else ","
    header = next(csv.reader([numbered[0][1]], delimiter=delimiter))
    if not any(name_of(name) for name in header):
        raise UserError(f"{path}:1 的表头里没有认得的列（{'、'.join(header)[:80]}）：要有 step 与 loss。")
    entries = []
    for number, line in numbered[1:]:
        cells = next(csv.reader([line], delimiter=delimiter))
        if len(cells) != len(header):
            log.notes.append(f"{path}:{number} 有 {len(cells)} 列，表头是 {len(header)} 列：这一行没有用。")
            continue
        row = dict(zip(header, cells, strict=True))
        entries.append((f"第 {number} 行", _fields_of_row(row, log, f"{path}:{number}")))
    return _whole(log, entries)


# ---------------------------------------------------------------- 合成一步一个


def _whole(log: TrainingLog, entries: list[tuple[str, dict]], first: str = "") -> TrainingLog:
    """读到的各条 → log.points：同一步的并起来，按步数排。"""
    entries = _with_steps(log, [(where, dict(fields)) for where, fields in entries if fields])
    points: dict[int, dict] = {}
    last, skipped, said = -math.inf, 0.0, 0
    for where, fields in entries:
        skipped = max(skipped, fields.pop("skipped_total", 0.0))
        log.facts["skipped"] = log.facts.get("skipped", 0) + fields.pop("skipped", 0.0)
        step = fields["step"] = int(fields["step"])
        if step < last - 1 and "loss" in fields and log.kind != "TensorBoard":
            said += 1
            if said <= 3:
                log.notes.append(
                    f"{log.path.name} {where}：步数从 {last} 回到 {step}，是接着训练的；重叠的以后来的为准。"
                )
            points = {at: point for at, point in points.items() if at < step}
        last = step if "loss" in fields else last
        points.setdefault(step, {"where": where}).update(fields)
    log.facts["skipped"] = max(log.facts.get("skipped", 0), skipped, log.facts.pop("overflows", 0))
    log.points = [points[step] for step in sorted(points)]
    if not any("loss" in point for point in log.points):
        example = f"第一行是：{clean(first)[:80]}。" if first else ""
        raise UserError(f"{log.path} 里没有一条带损失（loss）的记录。{example}认得的有：{KNOWN}。")
    if len(log.notes) > 12:
        log.notes[12:] = [f"这样的话一共 {len(log.notes)} 条，后面的不列了。"]
    return log


def _with_steps(log: TrainingLog, entries: list[tuple[str, dict]]) -> list[tuple[str, dict]]:
    """没有写步数的：记在最近说过的那一步；谁也没有写，就按次序数。"""
    stepped = [fields for _, fields in entries if math.isfinite(fields.get("step", math.nan))]
    if any("loss" in fields for fields in stepped):
        return [(where, fields) for where, fields in entries if math.isfinite(fields.get("step", math.nan))]
    kept, step, counted = [], 0, 0
    for where, fields in entries:
        if stepped:
            step = int(fields["step"]) if "step" in fields else step
            fields["step"] = step
            kept.append((where, fields))
        elif "loss" in fields:
            counted += 1
            kept.append((where, {**fields, "step": counted}))
    if counted:
        log.notes.append(f"{log.path.name} 没有写步数：按次序数，第几条就是第几步。")
    return kept
