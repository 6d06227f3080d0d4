"""一条要走许多步的流程，在哪一步被杀掉，再来一遍就从哪一步接着走。

做法：每做完一步，在日志（journal.jsonl）末尾添一行，写下它的结果；再来一遍时，日志里有的不再做，直接给出那时的结果。

    with open_journal(folder / "journal.jsonl", {"seed": 0, "model": …}) as journal:   # 第二项：决定结果的设置
        rows = journal.step("curate", lambda: curate(…))            # → 能写成 JSON 的结果；做过了就是那时记下的
        gates = journal.step("gate.quality", lambda: gate(…))
        version = journal.step("register", lambda: registry.register("assistant", folder))
        journal.step("promote", lambda: registry.promote("assistant", version, over=1))
        print(journal.skipped, journal.seconds_before)               # 这一次没有做、直接用了的步；以前做完的各步用了几秒

一步正好在"做完了"与"记下了"之间被杀，再来一遍会把它再做一次。所以每一步做两遍要与做一遍一样：
训练的步看结果文件夹在不在（run_stage 就是），登记簿的每个方法本来就这样，写文件的先写临时文件再改名。
步的次序可以随结果变（没过门就不登记）；名字在一条流程里不能重。设置变了，旧的日志不能用：挪到 <名字>.old，从头来。
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

import line_log
from nlp_common.base.errors import UserError
from nlp_common.base.runs import differences


class Journal:
    """一条流程走到了哪里。用 open_journal 打开。"""

    def __init__(self, path: Path, events: list[dict]):
        self.path = path
        self.done = {event["step"]: event["result"] for event in events}  # 步 → 它的结果
        self.seconds_before = sum(event["seconds"] for event in events)  # 以前做完的各步用了多久
        self.skipped: list[str] = []
        self._asked: set[str] = set()

    def step(self, name: str, work: Callable[[], Any]) -> Any:
        """做一步，返回 work() 的结果；做过了就不做，返回那时的结果（经过 JSON：元组变成列表，键变成字符串）。"""
        if name in self._asked:
            raise ValueError(f"一条流程里有两步都叫 {name}。")
        self._asked.add(name)
        if name in self.done:
            self.skipped.append(name)
            return self.done[name]
        started = time.perf_counter()
        result = json.loads(json.dumps(work(), ensure_ascii=False))  # 头一次与接着做，得到的是同样的东西
        seconds = round(time.perf_counter() - started, 3)
        line_log.append(self.path, {"event": "done", "step": name, "result": result, "seconds": seconds})
        self.done[name] = result
        return result


@contextlib.contextmanager
def open_journal(path: str | Path, settings: dict) -> Iterator[Journal]:
    """打开一条流程的日志（没有就新建）。另一个进程正在走同一条流程，是 UserError。

    settings：决定结果的设置。与日志里的不同，旧的日志改名留着，从头来。
    """
    path = Path(path)
    settings = json.loads(json.dumps(settings, ensure_ascii=False))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{path}.running").acquire(timeout=0)
    except Timeout:
        raise UserError(f"另一个进程正在走 {path} 这条流程：等它走完，或用 --output_dir 另开一条。") from None
    except OSError as error:
        raise UserError(
            f"写不了 {path}（{error.strerror or error}）：用 --output_dir 换一个可写的文件夹。"
        ) from error
    with lock:
        events = line_log.read(path)
        if events and events[0].get("event") != "start":
            raise UserError(
                f"{path} 的第 1 行不是流程的开头：不知道它是哪一条流程的。从备份取回，或把它移走，从头来。"
            )
        if events and (changed := differences(events[0]["settings"], settings)):
            print("流程的设置与上次的不同，从头来：\n  " + "\n  ".join(changed))
            os.replace(path, path.with_name(f"{path.name}.old"))
            events = []
        if not events:
            line_log.append(path, {"event": "start", "settings": settings})
        yield Journal(path, [event for event in events if event["event"] == "done"])
